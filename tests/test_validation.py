"""Validation during training: its numbers are those of `medmax score`, and training does not notice it."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medmax_fast.config import MergeConfig, ScoreConfig, TrainConfig
from medmax_fast.data.collate import collate
from medmax_fast.data.store import write_store
from medmax_fast.model.load import load_model
from medmax_fast.model.loss import packed_hidden, target_losses
from medmax_fast.model.merge import merge
from medmax_fast.runtime import InputError
from medmax_fast.score import score
from medmax_fast.train import train
from medmax_fast.vocab import TextTokenizer

# Clock and speed are the only fields of a record that may differ between two runs.
CLOCK = ("seconds", "tokens_per_second", "target_tokens_per_second", "memory_gib")
KINDS = [("caption", "one"), ("vqa", "one"), ("draw", "two"), ("silent", "three")]


@pytest.fixture(scope="module")
def tokenizer(golden):
    return TextTokenizer(golden / "checkpoint" / "tokenizer" / "text_tokenizer_modified.json")


def write_rows(folder, tokenizer, count, seed, **more):
    """Rows of four tasks: `draw` answers with an image, and `silent` has nothing behind its eot."""
    layout, rng = tokenizer.layout, np.random.default_rng(seed)
    rows = []
    for i in range(count):
        task, source = KINDS[i % len(KINDS)]
        ids = rng.integers(layout.text_start, layout.vocab_size, int(rng.integers(20, 60)))
        ids[0], ids[-1] = layout.bos, layout.eos
        ids[len(ids) // 3] = layout.eot
        if task == "draw":
            span = slice(len(ids) // 3 + 1, len(ids) - 4)
            ids[span] = rng.integers(layout.image_start, layout.image_end, span.stop - span.start)
            ids[span.start], ids[span.stop - 1] = layout.boi, layout.eoi
        if task == "silent":
            ids[len(ids) // 3] = ids[1]
            ids[-1] = layout.eot
        rows.append((ids, f"{folder.name} {i}", task, source))
    return write_store(folder, layout, rows, **({"tokenizer_sha256": tokenizer.sha256()} | more))


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("stores")
    return write_rows(folder / "train", tokenizer, 12, 1), write_rows(folder / "validation", tokenizer, 18, 2)


@pytest.fixture()
def config(stores, golden, tmp_path, monkeypatch):
    monkeypatch.setattr("medmax_fast.figures.loss_curve", lambda *_: None)
    return TrainConfig(
        data=str(stores[0].path),
        ckpt=str(golden / "checkpoint"),
        output=str(tmp_path / "run"),
        epochs=1,
        pack_length=150,
        packs_per_step=1,
        lr=3e-3,
        save_every=0,
        device="cpu",
        validation=str(stores[1].path),
    )


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def records(output):
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines(Path(output) / "metrics.jsonl")]


def validations(output):
    return lines(Path(output) / "validation.jsonl")


def scored(store, ckpt, output):
    """The same numbers from the score command: over all, per task, per source."""
    score(ScoreConfig(ckpt=str(ckpt), input=str(store.path), output=str(output), max_length=4096, device="cpu"))
    sums, counts = defaultdict(float), defaultdict(int)
    for line, task, source in zip(lines(output), store.tasks, store.sources, strict=True):
        for name in ("loss", ("by_task", task), ("by_source", source)):
            sums[name] += line["loss_sum"]
            counts[name] += line["target_tokens"]
    means = {name: sums[name] / counts[name] for name in sums if counts[name]}
    groups = {kind: {n[1]: v for n, v in means.items() if n[0] == kind} for kind in ("by_task", "by_source")}
    return {"loss": means["loss"], "target_tokens": counts["loss"], **groups}


def by_kind(store, ckpt):
    """(text, image): mean loss over targets of either kind, row by row from the model's hidden states."""
    model, layout = load_model(ckpt), store.layout
    losses, images = [], []
    for row in range(len(store)):
        batch = collate(store.ids, store.offsets, np.array([row]), layout.eot).to_torch()
        _, found, targets, _ = target_losses(packed_hidden(model, batch), batch["labels"][0], [model.lm_head.weight])
        losses += found.tolist()
        images += [layout.image_start <= t < layout.image_end for t in targets.tolist()]
    losses, images = np.array(losses), np.array(images)
    assert 50 < images.sum() < len(images) - 50
    return losses[~images].mean(), losses[images].mean()


def in_fp32(folder):
    """Rewrite a checkpoint in fp32, in which a merged adapter is not rounded."""
    (file,) = folder.rglob("consolidated*.pth")
    state = torch.load(file, weights_only=True)
    torch.save({name: tensor.float() if torch.is_tensor(tensor) else tensor for name, tensor in state.items()}, file)
    # It has the sums of the files as they were.
    (file.parent / "checklist.chk").unlink()


@pytest.mark.parametrize(("full", "zero"), [(True, 2), (False, 3)])
def test_equals_the_score_command(config, stores, golden_checkpoint, tmp_path, full, zero):
    in_fp32(golden_checkpoint)
    config = replace(config, ckpt=str(golden_checkpoint))
    summary = train(replace(config, full=full, zero=zero))
    tuned = summary["model"] if full else str(tmp_path / "merged")
    if not full:
        merge(MergeConfig(ckpt=config.ckpt, adapter=summary["adapter"], output=tuned))
    (found,) = validations(config.output)
    expected = scored(stores[1], tuned, tmp_path / "scores.jsonl")
    # The task without a response has none.
    assert set(found["by_task"]) == {"caption", "vqa", "draw"} and set(found["by_source"]) == {"one", "two"}
    assert found["step"] == summary["steps"] and found["target_tokens"] == expected["target_tokens"]
    assert found["loss"] == summary["validation_loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for kind in ("by_task", "by_source"):
        assert found[kind] == pytest.approx(expected[kind], rel=1e-5)
    assert (found["text_loss"], found["image_loss"]) == pytest.approx(by_kind(stores[1], tuned), rel=1e-5)
    base = scored(stores[1], config.ckpt, tmp_path / "base.jsonl")
    assert abs(base["loss"] - expected["loss"]) > 1e-2, "else the run's own weights need not have been used"


@pytest.mark.parametrize(("full", "zero"), [(False, 2), (True, 3)])
def test_training_goes_on_as_if_there_were_none(config, tmp_path, full, zero):
    config = replace(config, full=full, zero=zero, lora_dropout=0.3)
    without = replace(config, validation="", output=str(tmp_path / "without"))
    summary = train(without)
    assert summary["validation_loss"] is None and not (tmp_path / "without" / "validation.jsonl").exists()
    train(replace(config, validate_every=1))
    assert records(config.output) == records(without.output)
    # The last step is measured once, although it is due twice.
    assert [line["step"] for line in validations(config.output)] == list(range(1, summary["steps"] + 1))
    assert len({line["loss"] for line in validations(config.output)}) == summary["steps"] > 2
    name = "model/models/7b/consolidated.pth" if full else "adapter/adapter_model.safetensors"
    assert (Path(config.output) / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    assert lines(tmp_path / "without" / "metrics.jsonl")[0]["loss"] > 0


def test_packing_does_not_change_the_numbers(config, stores, tmp_path):
    """Two steps with rows left out of training's packs or not; the packs of validation follow the pack length."""
    found = {}
    for length in (60, 150, 1000):
        output = str(tmp_path / str(length))
        # Without an update to speak of, so that every run measures the same model.
        train(replace(config, pack_length=length, max_steps=1, lr=1e-30, output=output))
        (found[length],) = validations(output)
    for length in (60, 150):
        assert flat(found[length]) == pytest.approx(flat(found[1000]), rel=1e-6)
    assert flat(found[1000])["by_task.draw"] != flat(found[1000])["loss"]


def flat(record):
    groups = {f"{kind}.{name}": value for kind in ("by_task", "by_source") for name, value in record[kind].items()}
    return {name: value for name, value in record.items() if name not in ("by_task", "by_source")} | groups


def test_a_resumed_run_has_each_validation_once(config, monkeypatch, tmp_path):
    from medmax_fast.training.run import Run

    config = replace(config, validate_every=1, save_every=2)
    whole = train(replace(config, output=str(tmp_path / "whole")))
    validate = Run._validate

    def interrupted(self, number):
        validate(self, number)
        if number == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_validate", interrupted)
        train(config)
    assert [line["step"] for line in validations(config.output)] == [1, 2, 3]
    assert train(config)["resumed_from"] == 2 and whole["steps"] > 3
    assert validations(config.output) == validations(tmp_path / "whole")


def test_rows_of_one_kind_leave_the_other_out(config, tokenizer, tmp_path):
    layout = tokenizer.layout
    rows = [(np.array([layout.bos, 9000, layout.eot, 9001 + i, layout.eos]), f"{i}", "", "") for i in range(3)]
    text = write_store(tmp_path / "text", layout, rows, tokenizer_sha256=tokenizer.sha256())
    train(replace(config, validation=str(text.path), max_steps=1))
    (found,) = validations(config.output)
    assert found["image_loss"] is None and found["text_loss"] == found["loss"] and found["target_tokens"] == 6
    assert found["by_task"] == {"": pytest.approx(found["loss"])}


def test_rows_too_long_for_a_pack_are_counted(config, tokenizer, tmp_path, capfd):
    layout = tokenizer.layout
    rows = [(np.array([layout.bos, layout.eot, *[9000] * (n - 2)]), f"{n}", "", "") for n in (30, 160, 170)]
    store = write_store(tmp_path / "long", layout, rows, tokenizer_sha256=tokenizer.sha256())
    for too_long, fate in (("skip", "2 are left out, 0 cut"), ("cut", "0 are left out, 2 cut")):
        output = str(tmp_path / too_long)
        train(replace(config, validation=str(store.path), too_long=too_long, max_steps=1, output=output))
        assert f"{store.path}: of 3 rows, {fate}, as longer than 150 ids\n" in capfd.readouterr().err
        assert validations(output)[0]["target_tokens"] == (28 if too_long == "skip" else 28 + 2 * 148)


def test_bad_settings_get_one_line_and_leave_nothing(config, tokenizer, tmp_path):
    other = write_rows(tmp_path / "other", tokenizer, 4, 3, tokenizer_sha256="0" * 64)
    cases = [
        (dict(validation="", validate_every=5), "--validate-every 5: needs --validation, a token store"),
        (dict(validation=str(other.path)), f"{other.path}: built with tokenizer 0000"),
        (dict(validation="missing"), "missing: .*expected a token store"),
        (dict(max_length=19), "expected at least one row of 1..19 ids"),
        (dict(validate_every=-1), "--validate-every -1: expected 0 or more"),
    ]
    for change, message in cases:
        with pytest.raises(InputError, match=message) as error:
            train(replace(config, **change))
        assert "\n" not in str(error.value) and not Path(config.output).exists()

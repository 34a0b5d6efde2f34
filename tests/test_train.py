"""Training: the gradient, exact resume, what is written, and what bad input gets.

Everything runs on the golden checkpoint and a store of short synthetic rows, in this process; what needs processes of
its own (kills, signals, several ranks) is in test_restart.py.
"""

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medmax_fast.config import ConvertConfig, TrainConfig
from medmax_fast.data.store import TokenStore, write_store
from medmax_fast.files import read_json, write_json
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.convert import convert
from medmax_fast.model.load import load_model
from medmax_fast.model.loss import packed_loss
from medmax_fast.runtime import InputError
from medmax_fast.train import train
from medmax_fast.training.folder import RunFolder
from medmax_fast.training.run import Run
from medmax_fast.training.schedule import learning_rate
from medmax_fast.vocab import TextTokenizer

ROOT = Path(__file__).resolve().parents[1]
# Clock and speed are the only fields of a record that may differ between two runs.
CLOCK = ("seconds", "tokens_per_second", "target_tokens_per_second", "memory_gib")


@pytest.fixture(scope="module")
def tokenizer(golden):
    return TextTokenizer(golden / "checkpoint" / "tokenizer" / "text_tokenizer_modified.json")


def make_store(folder, tokenizer, lengths, seed=0, **more):
    """Rows of text, eot, an image span and eos, of the given lengths; a row shorter than 12 ids has only text."""
    layout, rng = tokenizer.layout, np.random.default_rng(seed)

    def rows():
        for i, length in enumerate(lengths):
            text = rng.integers(layout.text_start, layout.vocab_size, length)
            text[0], text[-1] = layout.bos, layout.eos
            if length >= 12:
                text[length // 4] = layout.eot
                span = slice(length // 4 + 1, length * 3 // 4)
                text[span] = rng.integers(layout.image_start, layout.image_end, span.stop - span.start)
                text[span.start], text[span.stop - 1] = layout.boi, layout.eoi
            yield text, f"row {i}", "caption", "synthetic"

    return write_store(folder, layout, rows(), **({"tokenizer_sha256": tokenizer.sha256()} | more))


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    lengths = [33, 60, 41, 12, 57, 38, 64, 35, 50, 7, 36, 49, 62, 34]
    return make_store(tmp_path_factory.mktemp("data") / "store", tokenizer, lengths)


@pytest.fixture()
def config(store, golden, tmp_path, monkeypatch):
    # Drawing takes as long as the training here; one test lets it happen.
    monkeypatch.setattr("medmax_fast.figures.loss_curve", lambda *_: None)
    # Five packs: two full steps an epoch and a short one.
    return TrainConfig(
        data=str(store.path),
        ckpt=str(golden / "checkpoint"),
        output=str(tmp_path / "run"),
        epochs=2,
        pack_length=145,
        max_length=96,
        packs_per_step=2,
        lr=1e-3,
        save_every=2,
        device="cpu",
    )


def records(output, clock=False):
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return lines if clock else [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def interrupt_after(monkeypatch, step):
    """End right after a step was logged, before its checkpoint, without the time to save one."""
    log = Run._log

    def interrupted(self, record, *rest):
        log(self, record, *rest)
        if record["step"] == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "_log", interrupted)


def result_bytes(output, full):
    name = "model/models/7b/consolidated.pth" if full else "adapter/adapter_model.safetensors"
    return (Path(output) / name).read_bytes()


def first_gradient(output):
    """The gradient of a one-step run, from AdamW's first moment in its ZeRO-2 checkpoint."""
    moments = []
    for path in sorted(Path(output).glob("checkpoints/step-000001/engine/zero_pp_rank_*_optim_states.pt")):
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
        moments.append(state["state"][0]["exp_avg"])
    return torch.cat(moments) / (1 - 0.9)


@pytest.mark.parametrize(("full", "zero"), [(False, 2), (True, 2), (True, 3), (False, 3), (True, 0)])
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(config, monkeypatch, full, zero, tmp_path):
    # Stopped in the short last step of the first epoch; resumed in the middle of that epoch.
    config = replace(config, full=full, zero=zero, max_steps=4)
    whole = train(replace(config, output=str(tmp_path / "whole")))
    assert whole["steps"] == 4 and whole["resumed_from"] == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 3)
        train(config)
    assert [(r["step"], r["epoch"]) for r in records(config.output)] == [(1, 0), (2, 0), (3, 0)]
    assert not (Path(config.output) / "result.json").exists()
    resumed = train(config)
    assert resumed["resumed_from"] == 2 and resumed["steps"] == 4
    assert records(config.output) == records(tmp_path / "whole")
    assert result_bytes(config.output, full) == result_bytes(tmp_path / "whole", full)
    assert len({r["loss"] for r in records(config.output)}) == 4 and records(config.output)[-1]["epoch"] == 1


def test_gradient_does_not_depend_on_packing(config, store, golden, tmp_path):
    """All rows in one step: row by row, in short packs and in one long pack; and as plain autograd has it."""
    # A limit above half of a row's length leaves no room for a second row beside it.
    shapes = {"rows": (64, 14), "packs": (130, 8), "one": (1024, 1)}
    gradients, rows = {}, [r for r in range(len(store)) if store.lengths[r] > 32]
    for name, (length, packs) in shapes.items():
        run = replace(config, pack_length=length, packs_per_step=packs, output=str(tmp_path / name))
        run = replace(run, full=True, clip=0.0, max_steps=1)
        train(run)
        gradients[name] = first_gradient(run.output)
        assert records(run.output)[0]["target_tokens"] == records(tmp_path / "rows")[0]["target_tokens"]
    assert len(rows) == 12 and gradients["rows"].norm() > 1
    for name in ("packs", "one"):
        assert (gradients[name] - gradients["rows"]).abs().max() < 1e-6

    from medmax_fast.data.loader import PackedLoader

    (step,) = PackedLoader(store, 1024, 1, 0).epoch_steps(0)
    model = load_model(golden / "checkpoint")
    (packed_loss(model, step.batches[0].to_torch()) / step.target_tokens).backward()
    # The query and key norms are one vector for all heads in training: the sum of the gradients of the heads.
    plain = {n: p.grad.sum(0) if "_norm." in n and p.ndim == 2 else p.grad for n, p in model.named_parameters()}
    # DeepSpeed keeps AdamW's order of parameters, ours: the model's own.
    flat = torch.cat([g.reshape(-1) for g in plain.values()])
    assert (gradients["one"][: len(flat)] - flat).abs().max() < 1e-6


def test_dropout_reaches_the_loss_and_depends_on_the_seed_alone(config, tmp_path):
    # The adapter starts at zero, so dropout shows from the second step on.
    losses = {}
    for name, dropout, seed in (("a", 0.5, 1), ("b", 0.5, 1), ("c", 0.5, 2), ("d", 0.0, 1)):
        output = str(tmp_path / name)
        train(replace(config, output=output, lora_dropout=dropout, seed=seed, max_steps=2, lr=0.05))
        losses[name] = records(output)[1]["loss"]
    assert losses["a"] == losses["b"] and len({losses["a"], losses["c"], losses["d"]}) == 3


def test_learns_text_and_images_and_lora_loads_in_peft(config, golden, store, monkeypatch):
    from peft import PeftModel

    monkeypatch.undo()
    config = replace(config, epochs=8, lr=3e-2, lora_dropout=0.0, recompute="layers", save_every=0)
    summary = train(config)
    first, last = records(config.output)[0], records(config.output)[-1]
    assert last["text_loss"] < 0.8 * first["text_loss"] and last["image_loss"] < 0.8 * first["image_loss"]
    assert summary["loss"] == last["loss"] and summary["trained_parameters"] == 40960
    assert (Path(config.output) / "loss.png").read_bytes()[:4] == b"\x89PNG"

    tensors = load_file(Path(config.output) / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    assert all(n.startswith("base_model.model.model.layers.") and t.abs().max() > 0 for n, t in tensors.items())
    base = read_json(Path(config.output) / "adapter" / "base.json")
    assert base["sha256"] == open_checkpoint(config.ckpt).sha256()
    model = load_model(golden / "checkpoint")
    before = packed_mean_loss(model, store)
    tuned = PeftModel.from_pretrained(model, str(Path(config.output) / "adapter")).base_model.model
    # The last epoch's losses were measured on weights a few steps younger.
    assert before > first["loss"] - 0.5 and packed_mean_loss(tuned, store) < 0.85 * before


@pytest.mark.parametrize("full", [False, True])
def test_learns_twenty_mixed_rows_by_heart(config, tokenizer, tmp_path, full):
    store = make_store(tmp_path / "store", tokenizer, [24 + i % 9 for i in range(20)], seed=3)
    config = replace(config, data=str(store.path), full=full, lora_rank=32, lora_alpha=64.0, lora_dropout=0.0)
    config = replace(config, epochs=60 if full else 90, packs_per_step=1, lr=0.01 if full else 0.03, log_every=5)
    train(replace(config, save_every=0))
    first, last = records(config.output)[0], records(config.output)[-1]
    assert first["text_loss"] > 5 and first["image_loss"] > 5
    assert last["text_loss"] < 0.1 and last["image_loss"] < 0.1


def packed_mean_loss(model, store):
    from medmax_fast.data.loader import PackedLoader

    (step,) = PackedLoader(store, 1024, 1, 0).epoch_steps(0)
    with torch.no_grad():
        return packed_loss(model, step.batches[0].to_torch()).item() / step.target_tokens


def test_full_model_converts_back_without_loss(config, golden, store, tmp_path):
    summary = train(replace(config, full=True, epochs=1))
    model = Path(summary["model"])
    assert open_checkpoint(model).layout == "chameleon"
    base, trained = open_checkpoint(golden / "checkpoint"), open_checkpoint(model)
    for name in base.names():
        before, after = base.tensor(name), trained.tensor(name)
        assert before.shape == after.shape and not torch.equal(before, after), name
    assert packed_mean_loss(load_model(model), store) < packed_mean_loss(load_model(golden / "checkpoint"), store)
    convert(ConvertConfig(input=str(model), output=str(tmp_path / "hf"), to="hf"))
    convert(ConvertConfig(input=str(tmp_path / "hf"), output=str(tmp_path / "back"), to="chameleon"))
    names = ["models/7b/consolidated.pth", "tokenizer/vqgan.ckpt"]
    assert all((model / n).read_bytes() == (tmp_path / "back" / n).read_bytes() for n in names)


def test_norms_that_differ_between_heads_stay_apart(config, golden, tmp_path):
    convert(ConvertConfig(input=str(golden / "checkpoint"), output=str(tmp_path / "hf"), to="hf"))
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.self_attn.k_norm.bias"
    tensors[name][0] += 0.25
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})
    summary = train(replace(config, ckpt=str(tmp_path / "hf"), full=True, epochs=1))
    trained = open_checkpoint(summary["model"])
    assert trained.layout == "hf"
    apart, shared = trained.tensor(name), trained.tensor("model.layers.0.self_attn.k_norm.bias")
    assert (apart[0] - apart[1]).abs().min() > 0.2 and torch.equal(shared, shared[:1].expand_as(shared))


def test_bf16_follows_fp32_at_every_stage(config, tmp_path, capfd):
    config = replace(config, max_steps=2, save_every=0)
    train(replace(config, output=str(tmp_path / "fp32"), precision="fp32"))
    for zero in (0, 2, 3):
        train(replace(config, output=str(tmp_path / f"bf16-{zero}"), precision="bf16", zero=zero))
        for low, high in zip(records(tmp_path / f"bf16-{zero}"), records(tmp_path / "fp32"), strict=True):
            assert abs(low["loss"] - high["loss"]) < 0.02 and abs(low["grad_norm"] / high["grad_norm"] - 1) < 0.05
            assert low["loss"] != high["loss"]
    assert capfd.readouterr().err.count("stage 1 is used") == 1


def test_records_and_skipped_steps(config, tokenizer, tmp_path):
    """A step whose packs hold no target leaves the weights alone, and the log has no line for it."""
    layout = tokenizer.layout
    # Packs of one row each, by length; eot at the end leaves nothing to predict.
    silent = [np.full(20, layout.text_start) for _ in range(3)]
    for row in silent:
        row[-1] = layout.eot
    rows = [(row, f"{i}", "", "") for i, row in enumerate([*silent, np.full(20, layout.text_start + 1)])]
    store = write_store(tmp_path / "store", layout, rows, tokenizer_sha256=tokenizer.sha256())
    config = replace(config, data=str(store.path), pack_length=20, packs_per_step=1, epochs=1, save_every=1)
    summary = train(config)
    (record,) = records(config.output, clock=True)
    assert summary["steps"] == 4 and record["target_tokens"] == 19 and record["tokens"] == 20
    assert record["image_loss"] is None and record["loss"] == record["text_loss"]
    assert record["seconds"] > 0 and record["tokens_per_second"] > 0 and record["grad_norm"] > 0
    assert [p.name for p in sorted(Path(config.output, "checkpoints").iterdir())] == ["step-000003", "step-000004"]


def test_only_complete_checkpoints_are_used(config, monkeypatch, capfd):
    config = replace(config, epochs=3, save_every=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 7)
        train(config)
    folder = RunFolder(config.output)
    names = sorted(p.name for p in folder.checkpoints.iterdir())
    assert names == ["step-000004", "step-000006"], "the last two are kept"
    # Half-written under its hidden name; named but without a state; and complete but for one shortened file.
    (folder.checkpoints / ".step-000008.tmp").mkdir()
    (folder.checkpoints / "step-000007").mkdir()
    shutil.copytree(folder.checkpoints / "step-000006", folder.checkpoints / "step-000008")
    next((folder.checkpoints / "step-000008" / "engine").glob("*optim*")).write_bytes(b"short")
    capfd.readouterr()
    with open(folder.metrics, "a") as file:
        file.write('{"step": 8, "lo')
    summary = train(config)
    log = capfd.readouterr().err
    assert summary["resumed_from"] == 6 and "step-000007: passed over" in log and "step-000008: passed over" in log
    assert [r["step"] for r in records(config.output)] == list(range(1, 10))
    assert not list(folder.checkpoints.glob(".*"))


def test_a_finished_run_says_so_and_other_settings_are_refused(config, store, capfd, monkeypatch):
    config = replace(config, log_every=4)
    first = train(config)
    assert [r["step"] for r in records(config.output)] == [4, 6], "every fourth step and the last"
    monkeypatch.setattr(Run, "steps", None)
    capfd.readouterr()
    again = train(replace(config, log_every=2))
    assert again == {**first, "already_finished": True} and "finished" in capfd.readouterr().err
    for change, text in ((dict(lr=2e-3), "lr"), (dict(full=True), "full"), (dict(lora_rank=4), "lora_rank")):
        with pytest.raises(InputError, match=f"made with {text} = "):
            train(replace(config, **change))


def test_checkpoint_files_cannot_run_code(config, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 3)
        train(config)
    folder, state = RunFolder(config.output).newest_checkpoint()
    evil = next((folder / "engine").glob("*model_states.pt"))

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"module": Payload()}, evil)
    state["files"][str(evil.relative_to(folder))] = evil.stat().st_size
    write_json(folder / "state.json", state)
    with pytest.raises(InputError, match="cannot be read"):
        train(config)
    assert not (tmp_path / "ran").exists()


def test_learning_rate():
    rates = [learning_rate(n, 20, 1.0, 0.1) for n in range(1, 21)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and rates[-1] > 0
    assert all(a > b for a, b in zip(rates[2:-1], rates[3:], strict=True))
    assert rates[11] == pytest.approx(0.5)
    assert learning_rate(1, 1, 1.0, 0.0) == 1.0 and learning_rate(1, 1, 1.0, 1.0) == 0.5


BAD = [
    (dict(packs_per_step=0), "--packs-per-step 0"),
    (dict(pack_length=48), r"--pack-length 48: row 6 has 64 ids"),
    (dict(max_length=5), "expected at least one row of 1..5 ids"),
    (dict(max_length=8192, pack_length=8192), "--max-length 8192: expected 1..4096"),
    (dict(zero=4), r"--zero 4: expected 0..3"),
    (dict(epochs=0), "--epochs 0: expected 1 or more"),
    (dict(lr=float("nan")), "--lr nan"),
    (dict(lora_targets="q_proj,lm_head"), "--lora-targets lm_head: expected some of q_proj"),
    (dict(lora_targets=" ,"), "--lora-targets without a name"),
    (dict(precision="fp16"), "--precision fp16: "),
    (dict(data="missing"), "expected a token store"),
    (dict(ckpt="missing"), "no such folder"),
    (dict(deepspeed_config="missing.json"), "no such file"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_settings_get_one_line_and_leave_nothing(config, change, message):
    with pytest.raises(InputError, match=message) as error:
        train(replace(config, **change))
    assert "\n" not in str(error.value) and not Path(config.output).exists()


def test_store_and_checkpoint_must_fit(config, tokenizer, tmp_path):
    other = make_store(tmp_path / "other", tokenizer, [20], tokenizer_sha256="0" * 64)
    with pytest.raises(InputError, match="built with tokenizer 0000"):
        train(replace(config, data=str(other.path)))
    store = TokenStore(config.data)
    (tmp_path / "broken").mkdir()
    for file in store.path.iterdir():
        shutil.copy(file, tmp_path / "broken" / file.name)
    ids = bytearray((store.path / "ids.bin").read_bytes())
    ids[10] ^= 1
    (tmp_path / "broken" / "ids.bin").write_bytes(ids)
    with pytest.raises(InputError, match="ids.bin: sha256"):
        train(replace(config, data=str(tmp_path / "broken")))
    assert not Path(config.output).exists()


def test_deepspeed_overrides(config, tmp_path):
    path = tmp_path / "override.json"
    write_json(path, {"zero_optimization": {"reduce_bucket_size": 1000}, "gradient_predivide_factor": 1.0})
    train(replace(config, deepspeed_config=str(path), max_steps=1))
    with pytest.raises(InputError, match="made with deepspeed_config"):
        train(replace(config, max_steps=1))
    for entries, message in (
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps cannot be overridden"),
        ({"zero_optimization": {"stage": 1}}, "use --zero"),
        ([1], "expected an object"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "override.json: .*reduce_bucket_size"),
    ):
        write_json(path, entries)
        with pytest.raises(InputError, match=message):
            train(replace(config, deepspeed_config=str(path), output=str(tmp_path / "refused")))


@pytest.mark.parametrize("module", ["deepspeed", "peft"])
def test_a_missing_library_names_the_extra(config, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"{module}.*pip install 'medmax_fast\[train\]'"):
        train(config)
    assert not Path(config.output).exists()


def test_long_rows_are_cut_or_left_out_and_listed(config, store, capfd):
    # An image follows the eot and ends at three quarters of the row: beyond the limit, nothing of the response is left.
    summary = train(replace(config, pack_length=40, too_long="cut", max_steps=1, save_every=0))
    long = np.flatnonzero(store.lengths > 40)
    kept = np.where(store.lengths * 3 // 4 <= 40, 40, 0)[long]
    expected = [
        {"row": int(row), "key": f"row {row}", "ids": int(store.lengths[row]), "kept": int(n)}
        for row, n in zip(long, kept, strict=True)
    ]
    lines = (Path(config.output) / "long_rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected
    assert summary["rows_cut"] == (kept > 0).sum() > 1 and summary["rows_left_out"] == (kept == 0).sum() > 1
    assert f"{len(long)} of 14 rows are longer than 40 ids: {(kept == 0).sum()} left out, " in capfd.readouterr().err


def test_data_state_must_belong_to_the_checkpoint(config, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 3)
        train(config)
    path = Path(config.output) / "checkpoints" / "step-000002" / "state.json"
    state = read_json(path)
    assert state["data"]["epoch"] == 0 and state["data"]["step"] == 2 and state["data"]["rows"] > 4
    for data, message in (
        ({}, "expected what PackedLoader.state returned"),
        (state["data"] | {"seed": 5}, "made with seed = 5, now 0"),
        (state["data"] | {"step": 0, "rows": 0}, "made after 2 steps, but its data is at step 0"),
    ):
        write_json(path, state | {"data": data})
        with pytest.raises(InputError, match=message):
            train(config)


def test_example_loop(config):
    spec = importlib.util.spec_from_file_location("train_loop", ROOT / "examples" / "train_loop.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    losses = example.train(config.data, config.ckpt, steps=4, packs_per_step=1)
    assert len(losses) == 4 and losses[-1] < losses[0] - 1


def test_label_policies_decide_what_counts(config, tmp_path):
    config = replace(config, max_steps=1, packs_per_step=8)
    counted = {}
    for labels in ("first-eot", "per-turn", "all"):
        train(replace(config, labels=labels, output=str(tmp_path / labels)))
        (record,) = records(tmp_path / labels)
        counted[labels] = record["target_tokens"]
    # The synthetic rows have one eot each, so the only turn that is answered reaches to their end.
    assert counted["first-eot"] == counted["per-turn"] < counted["all"]
    with pytest.raises(InputError, match="made with labels = 'all'"):
        train(replace(config, output=str(tmp_path / "all")))

"""Runs that end themselves: what is said, which rows are named, and what is left behind."""

import inspect
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ports import free_port

from medmax_fast.config import ScoreConfig, TrainConfig
from medmax_fast.data.loader import PackedLoader
from medmax_fast.data.store import TokenStore, write_store
from medmax_fast.files import read_json, write_json
from medmax_fast.model.load import load_model
from medmax_fast.model.trainable import PackedModel
from medmax_fast.runtime import InputError
from medmax_fast.score import score
from medmax_fast.train import train
from medmax_fast.training import engine as ds
from medmax_fast.training.health import FACTOR, WINDOW, Divergence, Health, StepRows
from medmax_fast.training.run import Run
from medmax_fast.vocab import TextTokenizer

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = np.array([33, 60, 41, 22, 57, 38, 64, 35, 50, 36, 49, 62, 34])
PACK_LENGTH = 130
# A text id of some rows only, whose embedding is broken in one of the checkpoints.
RARE = 9000


@pytest.fixture(scope="module")
def tokenizer(golden):
    return TextTokenizer(golden / "checkpoint" / "tokenizer" / "text_tokenizer_modified.json")


def write_rows(folder, tokenizer, marked=()):
    """Rows of bos, text, eot, text and eos; those `marked` have RARE as their second id."""
    layout, rng = tokenizer.layout, np.random.default_rng(3)
    rows = []
    for i, length in enumerate(LENGTHS):
        ids = rng.integers(layout.text_start, layout.vocab_size, length)
        ids[ids == RARE] += 1
        ids[0], ids[length // 3], ids[-1] = layout.bos, layout.eot, layout.eos
        if i in marked:
            ids[1] = RARE
        rows.append((ids, f"key-{i}", "", ""))
    return write_store(folder, layout, rows, tokenizer_sha256=tokenizer.sha256())


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tokenizer):
    """A store without RARE; one with it in two rows of the second step's packs, one in a pack with three others."""
    folder = tmp_path_factory.mktemp("stores")
    sound = write_rows(folder / "sound", tokenizer)
    plan = PackedLoader(sound, PACK_LENGTH, 2, 0).plan(0)
    assert len(plan) == 5 and len(plan.pack(2)) == 4
    return sound, write_rows(folder / "marked", tokenizer, [plan.pack(2)[1]]), int(plan.pack(2)[1])


def break_embedding():
    """From now on models come with NaN as the embedding of RARE; of a checkpoint it would be refused."""
    import medmax_fast.train as module

    load = module.load_model

    def broken(*arguments):
        model = load(*arguments)
        model.model.embed_tokens.weight.data[RARE] = math.nan
        return model

    module.load_model = broken


@pytest.fixture()
def broken_embedding(monkeypatch):
    monkeypatch.setattr("medmax_fast.train.load_model", load_model)
    break_embedding()


@pytest.fixture()
def config(stores, golden, tmp_path, monkeypatch):
    monkeypatch.setattr("medmax_fast.figures.loss_curve", lambda *_: None)
    return TrainConfig(
        data=str(stores[0].path),
        ckpt=str(golden / "checkpoint"),
        output=str(tmp_path / "run"),
        epochs=2,
        pack_length=PACK_LENGTH,
        packs_per_step=2,
        save_every=1,
        device="cpu",
    )


def records(config):
    path = Path(config.output) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture()
def weights(monkeypatch):
    """The trained weights before and after each finished step: [(before, after)]."""
    finish, seen = ds.optimizer_step, []

    def watched(engine):
        before = ds.trained_state(engine)
        result = finish(engine)
        seen.append((before, ds.trained_state(engine)))
        return result

    monkeypatch.setattr(ds, "optimizer_step", watched)
    return seen


def same(a, b):
    """Whether two states are equal, NaN (of a broken embedding) counting as equal to itself."""
    return a.keys() == b.keys() and all(torch.equal(a[n].nan_to_num(7e9), b[n].nan_to_num(7e9)) for n in a)


CASES = [
    (0, False, 1, "fp32"),
    (0, True, 5, "bf16"),
    (1, True, 1, "fp32"),
    (1, False, 5, "bf16"),
    (2, True, 5, "fp32"),
    (2, False, 1, "bf16"),
    (3, False, 5, "fp32"),
    (3, True, 1, "bf16"),
]


@pytest.mark.parametrize(("zero", "full", "log_every", "precision"), CASES)
def test_a_row_with_a_loss_that_is_no_number_ends_the_run(
    config, stores, broken_embedding, weights, zero, full, log_every, precision
):
    _, store, row = stores
    options = dict(zero=zero, full=full, log_every=log_every, precision=precision)
    config = replace(config, data=str(store.path), **options)
    with pytest.raises(InputError) as error:
        train(config)
    assert str(error.value) == (
        f"step 2: the loss is nan; 1 of 6 rows have a loss that is not finite: key-{row} (nan); "
        "lower --lr, or leave such rows out"
    )
    stopped = read_json(Path(config.output) / "stopped.json")
    assert stopped == {
        "step": 2,
        "reason": "the loss is nan",
        "rows": [{"row": row, "key": f"key-{row}", "loss": "nan"}],
    }
    assert [r["step"] for r in records(config)] == ([1] if log_every == 1 else [])
    assert [p.name for p in (Path(config.output) / "checkpoints").iterdir()] == ["step-000001"]
    (before, after), (left, kept) = weights
    assert not same(before, after) and same(after, left) and same(left, kept)


def overflow(factor, at, monkeypatch):
    """Multiply the loss that is minimised, not the one that is logged, by `factor` in the micro-batches `at`."""
    forward, calls = PackedModel.forward, []

    def scaled(self, batch):
        calls.extend([1] * torch.is_grad_enabled())
        total, *rest = forward(self, batch)
        return total * (factor if len(calls) in at else 1.0), *rest

    monkeypatch.setattr(PackedModel, "forward", scaled)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_gradient_that_overflows_names_the_rows_with_the_highest_loss(config, weights, monkeypatch, zero, tmp_path):
    overflow(math.inf, (2,), monkeypatch)
    with pytest.raises(InputError) as error:
        train(replace(config, zero=zero, log_every=5))
    # Before the first update the losses are those of the base.
    scores = str(tmp_path / "scores.jsonl")
    score(ScoreConfig(ckpt=config.ckpt, input=config.data, output=scores, device="cpu"))
    lines = [json.loads(line) for line in Path(scores).read_text().splitlines()]
    plan = PackedLoader(TokenStore(config.data), PACK_LENGTH, 2, 0).plan(0)
    losses = {row: lines[row]["loss_sum"] / lines[row]["target_tokens"] for row in (*plan.pack(0), *plan.pack(1))}
    worst = sorted(losses, key=lambda row: -losses[row])
    named = ", ".join(f"key-{row} ({losses[row]:.3g})" for row in worst)
    start = "step 1: the gradient is not finite; rows with the highest loss: "
    assert len(worst) == 4 and str(error.value) == f"{start}{named}; lower --lr, or leave such rows out"
    stopped = read_json(Path(config.output) / "stopped.json")
    assert [entry["row"] for entry in stopped["rows"]] == worst
    assert [entry["loss"] for entry in stopped["rows"]] == pytest.approx([losses[row] for row in worst], rel=1e-5)
    ((before, after),) = weights
    assert same(before, after) and not list(Path(config.output).glob("checkpoints/step-*"))


def test_fp16_looks_for_a_scale_before_it_gives_up(config, monkeypatch):
    """Overflows are skipped and logged without a norm while the loss scale can fall; then the run ends."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    # Else DeepSpeed asks for a CPU with fp16 of its own.
    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda self: True)
    overrides = Path(config.output).with_suffix(".json")
    write_json(overrides, {"fp16": {"initial_scale_power": 3, "hysteresis": 1}})
    config = replace(config, precision="fp16", deepspeed_config=str(overrides), save_every=0)
    with monkeypatch.context() as patch:
        overflow(math.inf, (1, 3), patch)
        train(config)
    norms = [record["grad_norm"] for record in records(config)]
    assert norms[:2] == [None, None] and all(norm > 0 for norm in norms[2:]) and len(norms) == 6
    assert all(math.isfinite(record["loss"]) for record in records(config))
    overflow(math.inf, range(100), monkeypatch)
    config = replace(config, output=config.output + "-2")
    with pytest.raises(InputError, match="step 3: the gradient is not finite; rows with the highest loss"):
        train(config)


def test_a_diverging_run_ends_and_a_resumed_one_alike(config, monkeypatch, tmp_path):
    config = replace(config, full=True, lr=3.0, warmup_ratio=0.0, epochs=9, save_every=4)
    with pytest.raises(InputError) as error:
        train(config)
    losses = [record["text_loss"] for record in records(config)]
    # What one step of that size makes of it; the first loss is that of the base.
    limit = FACTOR * losses[0]
    assert len(losses) == WINDOW - 1 and losses[0] < 15 and min(losses[1:]) > limit
    stopped = read_json(Path(config.output) / "stopped.json")
    seen = r"the loss of text targets diverges, seen at step 8: \d+ over the last 8 logged steps, "
    reason = seen + f"expected at most {limit:.3g}"
    assert re.fullmatch(reason, stopped["reason"]) and stopped["step"] == 2
    plan = PackedLoader(TokenStore(config.data), PACK_LENGTH, 2, 0).plan(0)
    assert {entry["row"] for entry in stopped["rows"]} == {*plan.pack(2), *plan.pack(3)}
    named = ", ".join(f"{entry['key']} ({entry['loss']:.3g})" for entry in stopped["rows"][:5])
    end = "rows with the highest loss: " + named + "; lower --lr, or leave such rows out"
    assert str(error.value) == f"step 2: {stopped['reason']}; {end}"

    again = replace(config, output=str(tmp_path / "again"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        step = Run.step
        patch.setattr(Run, "step", lambda self, number, *rest: step(self, number, *rest) if number < 7 else interrupt())
        train(again)
    with pytest.raises(InputError, match="^step 5: the loss of text targets diverges"):
        train(again)
    assert read_json(tmp_path / "again" / "stopped.json")["reason"] == stopped["reason"]


def interrupt():
    raise KeyboardInterrupt


def diverged_at(losses):
    """The place of the loss at which a run ends, None if it does not."""
    divergence = Divergence()
    return next((i for i, loss in enumerate(losses) if divergence.add(loss)), None)


def test_what_counts_as_divergence():
    noise = np.random.default_rng(0)
    falling = 3 * np.exp(-np.arange(60) / 10) + 0.05 * noise.random(60)
    assert diverged_at(falling) is None
    # A bad batch now and then; noise of many times a small loss; a plateau; a slow rise to less than thrice.
    assert diverged_at([*falling, 500.0, *falling[-8:], 500.0, *falling[-8:]]) is None
    assert diverged_at(0.01 + 5 * noise.random(500)) is None
    assert diverged_at([11.0] * 100) is None
    assert diverged_at(np.linspace(2, 6.1, 200)) is None
    # It leaves for good: seen within a window, long before the mean is what the loss has become.
    assert 60 < diverged_at([*falling, *[9.0] * 20]) < 60 + WINDOW
    assert 60 < diverged_at([*falling, *np.linspace(0, 9, 60)]) < 105
    # At once, before there is a mean; and a first loss that is low by chance.
    assert diverged_at([3.0, *[2000.0] * 20]) == WINDOW - 1 and diverged_at([0.2, *[9.0] * 50]) is None
    assert diverged_at([12.0, *[35.0] * 50]) is None and diverged_at([12.0, *[37.0] * 50]) is not None
    # Small losses have room up to half of a guess.
    assert diverged_at([*[0.01] * 20, *[5.5] * 50]) is None and diverged_at([*[0.01] * 20, *[5.6] * 50]) is not None


def test_text_and_image_targets_are_watched_apart():
    """Steps of text alone, with next to no loss, between steps of images."""
    health, recorded = make_health()
    losses = [{"text_loss": 0.01, "image_loss": None}] * 9 + [{"text_loss": None, "image_loss": 6.5}] * 9
    for number, record in enumerate(losses * 3):
        health.logged(rows(number, {1: 1.0}), record | {"loss": record["text_loss"] or record["image_loss"]})
    assert not recorded
    with pytest.raises(InputError, match="step 54: the loss of image targets diverges, seen at step 57"):
        for number in range(54, 80):
            health.logged(rows(number, {1: 1.0}), {"loss": 40.0, "text_loss": None, "image_loss": 40.0})


def test_divergence_goes_on_from_the_losses_before():
    losses = [*np.linspace(9, 2, 30), *np.linspace(2, 20, 30)]
    end = diverged_at(losses)
    for done in (1, 20, 33, end):
        resumed = Divergence(losses[:done])
        found = [bool(resumed.add(loss)) for loss in losses[done : end + 1]]
        assert found == [False] * (end - done) + [True]


def make_health(others=(), records=()):
    """A Health of rows of 2 supervised ids, beside what other ranks have; and what it has recorded."""
    recorded = []
    counts = lambda rows: np.full(len(rows), 2)  # noqa: E731
    return Health(records, "key {}".format, counts, lambda mine: [mine, *others], recorded.append), recorded


def rows(number, losses):
    return StepRows(
        number, np.array(sorted(losses), np.int64), torch.tensor([losses[r] for r in sorted(losses)]).double()
    )


def test_rows_of_all_ranks_are_named_worst_first():
    health, recorded = make_health([[(9, 5.0), (8, 7.0)]])
    with pytest.raises(InputError) as error:
        health.stop(rows(4, {1: 2.0, 2: 12.0, 3: 2.0, 5: 20.0}), "why")
    assert str(error.value) == (
        "step 4: why; rows with the highest loss: key 5 (10), key 8 (7), key 2 (6), key 9 (5), key 1 (1); "
        "lower --lr, or leave such rows out"
    )
    # All of them are written down; rows with equal losses in their order.
    assert [entry["row"] for entry in recorded[0]["rows"]] == [5, 8, 2, 9, 1, 3]
    health, recorded = make_health([[(7, math.inf), (6, 1.0)], []])
    with pytest.raises(
        InputError, match=r"; 2 of 4 rows have a loss that is not finite: key 1 \(nan\), key 7 \(inf\);"
    ):
        health.logged(rows(4, {1: math.nan, 2: 3.0}), {"loss": math.nan})
    assert json.loads(json.dumps(recorded, allow_nan=False)) == [
        {
            "step": 4,
            "reason": "the loss is nan",
            "rows": [{"row": 1, "key": "key 1", "loss": "nan"}, {"row": 7, "key": "key 7", "loss": "inf"}],
        }
    ]


def test_the_step_named_is_the_first_beyond_the_limit():
    health, recorded = make_health(records=[{"text_loss": 2.0, "image_loss": None}] * 30)
    with pytest.raises(InputError, match="^step 37: the loss of text targets diverges, seen at step .*: key 37"):
        for number in range(31, 50):
            loss = 2.0 if number < 37 else 15.0
            health.logged(rows(number, {number: loss}), {"loss": loss, "text_loss": loss, "image_loss": None})
    assert recorded[0]["step"] == 37


def test_two_ranks_end_alike_also_the_one_without_rows(config, tokenizer, tmp_path):
    """The broken row is in the one pack of the epoch's last step; each process is its own, so that none is killed."""
    plan = PackedLoader(TokenStore(config.data), PACK_LENGTH, 2, 0).plan(0)
    store = write_rows(tmp_path / "store", tokenizer, [plan.pack(4)[1]])
    config = replace(config, data=str(store.path), log_every=5, zero=3)
    source = f"import math\nRARE = {RARE}\n{inspect.getsource(break_embedding)}\nbreak_embedding()\n"
    command = [sys.executable, "-c", f"{source}from medmax_fast.cli import entry\nentry()", "train"]
    for name in (
        "data",
        "ckpt",
        "output",
        "pack_length",
        "packs_per_step",
        "save_every",
        "log_every",
        "zero",
        "device",
    ):
        command += ["--" + name.replace("_", "-"), str(getattr(config, name))]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    shared |= {"PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=240)[1].splitlines() for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    key = f"key-{plan.pack(4)[1]}"
    message = (
        f"medmax train: step 3: the loss is nan; 1 of {len(plan.pack(4))} rows have a loss that is not finite: {key}"
    )
    assert said[0][-1] == said[1][-1] and said[0][-1].startswith(message)
    assert sorted(p.name for p in Path(config.output, "checkpoints").iterdir()) == ["step-000001", "step-000002"]

"""The benchmark of full fine-tuning and of short rows: each speed stands beside equal losses and gradients."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def bench():
    from benchmarks import bench_full

    return bench_full


@pytest.fixture(scope="module")
def found(bench, tmp_path_factory):
    """What a quick run wrote, without DeepSpeed."""
    output = tmp_path_factory.mktemp("full") / "found.json"
    there = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench_full", "--quick", "--output", str(output)])
        patch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else there(name, *a))
        assert bench.main() == 0
    return json.loads(output.read_text())


def rows_of(found: dict, stage: str) -> list[dict]:
    return [row for row in found["evidence"] if row["stage"] == stage]


def test_both_sections_compare_with_transformers(bench, found):
    assert not found["failed"] and not found["deepspeed"] and found["size"] == "tiny"
    full, short = rows_of(found, "full"), rows_of(found, "short_rows")
    assert [row["form"] for row in full] == ["published: padded, one row at a time", "ours, packs of 256"]
    assert [row["form"] for row in short] == [
        "transformers, rows of 64 ids",
        "ours, rows of 64 ids",
        "transformers, rows of 16 ids",
        "ours, rows of 16 ids",
    ]
    for rows, beside in ((full, full[0]), (short, short[1])):
        for row in rows:
            assert row["beside"] == beside["form"] and row["times"] == pytest.approx(beside["p50_s"] / row["p50_s"])
            assert row["quality"]["loss_difference"] <= 1e-5 and row["quality"]["gradient_difference"] <= 1e-4
            assert row["shape"] == beside["shape"] and row["flop"] == beside["flop"] and row["unit"] == "ids"
            assert row["share"] == pytest.approx(row["flop"] / found["product_flop_per_s"] / row["p50_s"])
            # Of a GPU alone the peak is known.
            assert row["mfu"] is None and row["memory_gib"] > 0.1


def test_all_weights_are_trained(bench):
    from benchmarks.stages.train_parts import Model

    model = Model("tiny", torch.device("cpu"), torch.float32, full=True)
    assert model.trained().keys() == dict(model.model.named_parameters()).keys()
    assert not any("lora" in name for name in model.trained())


def test_floors_are_six_flop_a_weight(bench):
    full, short = bench.floors()
    # Of 16 layers of width 2048, and of the head.
    blocks, head = 16 * (4 * 2048**2 + 3 * 2048 * 5504), 2048 * 65536
    assert (full["stage"], short["stage"]) == ("full", "short_rows")
    assert short["shape"] == "16,384 ids, half of them supervised"
    assert short["flop"] == pytest.approx(6 * 16384 * (blocks + head / 2))
    rows, ids = (int(word.replace(",", "")) for word in full["shape"].split()[::2])
    assert rows == 28 and 6 * ids * blocks < full["flop"] < 6 * ids * (blocks + head)


def test_long_and_short_rows_have_the_same_text_and_as_many_targets(bench):
    from benchmarks.stages.train_parts import make_batches
    from medmax_fast.model.init import random_model

    layout = random_model("tiny")[1]
    texts, rows = [], {64: 4, 16: 16}
    for length, count in rows.items():
        ids, offsets = bench.equal_rows(256, length, layout)
        texts.append(ids)
        assert np.diff(offsets).tolist() == [length] * count
        made = make_batches(ids, offsets, layout, {"packed": 256}, "cpu", padded=(2,))
        (pack,) = made["packed"]
        assert pack["target_tokens"] == 128 and len(pack["cu_seqlens"]) == count + 1
        assert len(made["padded 2"]) == count // 2
        assert all(bool(batch["attention_mask"].all()) for batch in made["padded 2"])
    # All but what begins, divides and ends a row.
    assert 0 < int((texts[0] != texts[1]).sum()) <= 3 * sum(rows.values())


def test_a_wrong_gradient_is_not_timed(bench, monkeypatch):
    from benchmarks.stages import train_parts

    right = train_parts.Model.loss
    monkeypatch.setattr(
        train_parts.Model, "loss", lambda model, row, batch: right(model, row, batch) * (2 if row.norm == "ours" else 1)
    )
    given = bench.Bench(bench.QUICK, torch.device("cpu"), bench.Roofline(1e9, 1e9), False)
    rows = bench.full(given)
    assert next(rows)[1][0]["form"].startswith("published")
    with pytest.raises(AssertionError, match="ours, packs of 256: loss"):
        next(rows)

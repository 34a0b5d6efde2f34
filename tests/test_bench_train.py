"""The benchmark of training: it runs, each speed stands beside what shows that it is right, and a wrong one fails."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from quick_run import quick_run

from medmax_fast.model.init import random_model
from medmax_fast.model.layout import keys
from medmax_fast.model.load import load_model, shape_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a quick run of all rows wrote."""
    return quick_run("train", tmp_path_factory.mktemp("bench"))


@pytest.fixture()
def benchmarks():
    from benchmarks import bench_train
    from benchmarks.stages import train_parts

    return bench_train, train_parts


def test_waterfall_has_every_technique_and_both_sides_of_each_ratio(found):
    rows = {row["row"]: row for row in found["rows"]}
    first = found["rows"][0]
    assert list(rows) == [
        "published: padded batch of 1",
        "padded batch of 8",
        "head on targets only",
        "packed",
        "fused RMSNorm",
        "fused SwiGLU",
        "fused qk-norm and RoPE",
        "fused LoRA",
        "DeepSpeed ZeRO-2",
        "recompute selective",
        "recompute layers",
    ]
    assert 0 < found["targets"] < found["tokens"]
    for row in found["rows"]:
        assert row.keys() == first.keys() and not row["note"]
        on = rows[row["on"]] if row["on"] else row
        assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"]
        assert row["times_first"] == pytest.approx(first["p50_s"] / row["p50_s"])
        assert row["times_on"] == pytest.approx(on["p50_s"] / row["p50_s"])
        assert row["tokens_per_s"] == pytest.approx(found["tokens"] / row["p50_s"])
        assert row["target_tokens_per_s"] == pytest.approx(found["targets"] / row["p50_s"])
        assert row["floor_share"] == pytest.approx(found["floor_s"] / row["p50_s"])
        assert row["mfu"] is None and row["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert row["loss_difference"] <= 1e-5 and row["gradient_difference"] <= 1e-4
    # Padding is what the rows of a padded batch lack in length, and packs have none.
    assert rows["padded batch of 8"]["fill"] < 1 == rows["packed"]["fill"]


def test_rows_of_the_common_table(found, benchmarks):
    bench, _ = benchmarks
    rows = {row["row"]: row for row in found["rows"]}
    assert not found["failed"] and found["deepspeed"]
    packs = ", packs of 256"
    assert [row["form"] for row in found["evidence"]] == [
        "published: padded, one row at a time",
        f"packed{packs}",
        f"packed, fused around peft's modules{packs}",
        f"packed, fused{packs}",
        f"packed, fused, DeepSpeed ZeRO-2{packs}",
        f"packed, fused, selective recomputation, DeepSpeed ZeRO-2{packs}",
    ]
    # Of two layers of width 128 for all ids, and of the head for the supervised ones.
    blocks = 2 * (4 * 128**2 + 3 * 128 * 352)
    head = found["flop_per_token"] / 4 - blocks
    for name, row in zip([name for name in bench.STAGE_ROWS if name in rows], found["evidence"], strict=True):
        line = rows[name]
        assert row["stage"] == "train" and row["shape"] == f"6 rows, {found['tokens']:,} ids"
        assert row["p50_s"] == line["p50_s"] and row["share"] == pytest.approx(line["floor_share"])
        assert row["flop"] == pytest.approx(4 * (blocks * found["tokens"] + head * found["targets"]))
        assert row["floor_s"] == pytest.approx(found["floor_s"])
        assert row["items_per_s"] == pytest.approx(line["tokens_per_s"]) and row["unit"] == "ids"
        assert row["beside"] == "published: padded, one row at a time"
        assert row["times"] == pytest.approx(line["times_first"])
        assert row["quality"] == {key: line[key] for key in ("loss_difference", "gradient_difference")}
        assert (row["mfu"], row["memory_gib"]) == (line["mfu"], line["memory_gib"])


def run(bench, monkeypatch, capsys, tmp_path, *arguments: str) -> tuple[dict, int]:
    """(what a quick run in this process and without DeepSpeed wrote, exit status)."""
    output = tmp_path / "train.json"
    monkeypatch.setattr(sys, "argv", ["bench_train", "--quick", "--output", str(output), *arguments])
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else there(name, *a))
    status = bench.main()
    result = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    return result, status


def test_without_deepspeed(benchmarks, monkeypatch, capsys, tmp_path):
    """The rows of `train` in plain torch, recomputation too."""
    bench, _ = benchmarks
    result, status = run(bench, monkeypatch, capsys, tmp_path, "--only", "train")
    names = ["published: padded batch of 1", "packed", "fused qk-norm and RoPE", "fused LoRA", "recompute selective"]
    assert status == 0 and [row["row"] for row in result["rows"]] == names and not result["deepspeed"]
    assert len(result["evidence"]) == 5 and result["rows"][-1]["on"] == names[3]
    assert result["rows"][-1]["times_on"] and not result["rows"][1]["times_on"]


def test_recomputation_recomputes(benchmarks):
    """Fewer tensors are kept for the backward pass, and the setting ends with the context."""
    bench, parts = benchmarks
    model = parts.Model("tiny", torch.device("cpu"), torch.float32)
    ids, offsets = parts.make_rows(4, model.layout, 16)
    (batch,) = parts.make_batches(ids, offsets, model.layout, {"packed": 4096}, "cpu")["packed"]
    ours = dict.fromkeys(("norm", "mlp", "attention", "adapter"), "ours")
    row = parts.Row("fused", batches="packed", **ours)
    model.dress(row)

    def kept(kind: str) -> int:
        saved = {}

        def keep(tensor):
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with parts.recomputing(model, kind), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.loss(row, batch)
        return sum(saved.values())

    assert kept("layers") < kept("none") and kept("none") == kept("none")


def test_a_failed_row_leaves_the_others(benchmarks, monkeypatch, capsys, tmp_path):
    bench, parts = benchmarks
    right = parts.Model.loss

    def loss(model, row, batch):
        if row.name == "packed":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(model, row, batch) * (2 if row.attention == "ours" and row.recompute == "none" else 1)

    monkeypatch.setattr(parts.Model, "loss", loss)
    result, status = run(bench, monkeypatch, capsys, tmp_path, "--only", "train")
    first, packed, fused, _, last = result["rows"]
    assert status == 1 and list(result["failed"]) == ["train"]
    assert result["failed"]["train"].startswith("fused qk-norm and RoPE failed: AssertionError")
    # Too large for the GPU is no failure.
    assert packed["note"] == "out of memory" and packed["p50_s"] is None
    assert fused["note"].startswith("failed") and fused["p50_s"] is None and fused["loss"] is None
    assert (
        first["p50_s"]
        and last["p50_s"]
        and [row["form"] for row in result["evidence"]]
        == [
            "published: padded, one row at a time",
            "packed, fused, selective recomputation, packs of 256",
        ]
    )


def test_without_a_first_row_nothing_is_timed(benchmarks, monkeypatch, capsys, tmp_path):
    bench, parts = benchmarks

    def loss(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(parts.Model, "loss", loss)
    result, status = run(bench, monkeypatch, capsys, tmp_path)
    assert status == 1 and len(result["rows"]) == 1 and not result["evidence"]
    assert "out of memory" in result["failed"]["train"]


def test_floor(benchmarks):
    """4 N FLOP for every id, of the head for the supervised ones alone."""
    bench, parts = benchmarks
    (floor,) = bench.floors()
    layout = bench.IdLayout.from_vocab(bench.make_tokenizer(65536)["model"]["vocab"])
    ids, offsets = parts.make_rows(28, layout, 1)
    batches = parts.make_batches(ids, offsets, layout, {}, "cpu")["padded 1"]
    targets = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert floor["shape"] == f"28 rows, {len(ids):,} ids" and floor["stage"] == "train"
    assert floor["flop"] == pytest.approx(4 * (6_476_005_376 * len(ids) + 268_435_456 * targets))


def test_a_row_with_another_loss_or_gradient_is_not_timed(benchmarks, monkeypatch):
    bench, parts = benchmarks
    model = parts.Model("tiny", torch.device("cpu"), torch.float32)
    ids, offsets = parts.make_rows(4, model.layout, 16)
    batches = parts.make_batches(ids, offsets, model.layout, {"packed": 128}, "cpu")
    targets = sum(batch["target_tokens"] for batch in batches["packed"])
    first, row = {}, bench.waterfall(False, False, False, False)[0]
    packed = row.then("packed", batches="packed", all_logits=False)
    bench.measure(model, row, batches["padded 1"], targets, first, 1)
    assert bench.measure(model, packed, batches["packed"], targets, first, 1)["loss_difference"] < 1e-5

    def measure_with(change, message):
        loss = parts.Model.loss
        with monkeypatch.context() as patch:
            patch.setattr(parts.Model, "loss", lambda *arguments: change(loss(*arguments)))
            with pytest.raises(AssertionError, match=message):
                bench.measure(model, packed, batches["packed"], targets, first, 1)

    measure_with(lambda loss: loss * (1 + 1e-4), "loss")
    # The same loss with a gradient of another size.
    measure_with(lambda loss: loss * (1 + 1e-3) - loss.detach() * 1e-3, "gradient")


def test_rows_of_data(benchmarks):
    """Every row in every kind of batch, with the same ids and as many targets; images on both sides of the eot."""
    _, parts = benchmarks
    layout = random_model("tiny")[1]
    ids, offsets = parts.make_rows(40, layout, 1)
    rows = [ids[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    assert len(rows) == 40 and max(map(len, rows)) <= 2048
    assert all((row[0], row[-1], row.count(layout.eot)) == (layout.bos, layout.eos, 1) for row in rows)
    drawn = [layout.boi in row[row.index(layout.eot) :] for row in rows]
    assert sum(drawn) == int(0.17 * sum(layout.boi in row for row in rows)) > 0
    made = parts.make_batches(ids, offsets, layout, {"packed": 4096}, "cpu")
    targets = sum(len(row) - row.index(layout.eot) - 1 for row in rows)
    for name, batches in made.items():
        assert sum(int((batch["labels"] != -100).sum()) for batch in batches) == targets, name
        real = [batch["input_ids"][batch.get("attention_mask", batch["input_ids"] >= 0) > 0] for batch in batches]
        assert sorted(torch.cat(real).tolist()) == sorted(ids.tolist()), name


def test_random_model_is_that_of_a_checkpoint(golden):
    """Names, shapes and device as loaded from files; drawn by the seed, norms with the bias that `init` gives."""
    model, layout = random_model("tiny", seed=3)
    loaded = load_model(golden / "checkpoint")
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in loaded.named_parameters()}
    shape = shape_of(model)
    assert shape.vocab_size == layout.vocab_size and len(list(model.parameters())) == len(keys(shape.layers))
    weights, again = dict(model.named_parameters()), dict(random_model("tiny", seed=3)[0].named_parameters())
    other = dict(random_model("tiny", dtype=torch.bfloat16, seed=4)[0].named_parameters())
    assert all(torch.equal(weights[n], again[n]) for n in weights)
    assert not torch.equal(weights["lm_head.weight"].bfloat16(), other["lm_head.weight"])
    assert {p.dtype for p in other.values()} == {torch.bfloat16}
    bias = weights["model.layers.0.self_attn.k_norm.bias"]
    assert bias.shape == (shape.kv_heads, shape.head_dim) and bias.unique().tolist() == pytest.approx([1.2])
    assert weights["model.layers.1.mlp.down_proj.weight"].std().item() == pytest.approx(shape.hidden**-0.5, rel=0.05)

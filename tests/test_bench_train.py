"""The benchmarks of training: they run, each speed stands beside what shows that it is right, and a wrong one fails."""

import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from medmax_fast.kernels.swiglu import swiglu_ref
from medmax_fast.model.init import random_model
from medmax_fast.model.layout import keys
from medmax_fast.model.load import load_model, shape_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Runs a benchmark as a user would; what it wrote, each run once."""
    done: dict[str, dict] = {}

    def run(name: str) -> dict:
        if name not in done:
            output = tmp_path_factory.mktemp("bench") / f"{name}.json"
            command = [sys.executable, "-m", f"benchmarks.bench_{name}", "--quick", "--output", str(output)]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            printed = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
            assert printed.returncode == 0, printed.stderr
            done[name] = json.loads(output.read_text())
            assert json.loads(printed.stdout.splitlines()[-1]) == done[name]
        return done[name]

    return run


@pytest.fixture()
def benchmarks(monkeypatch):
    """The benchmarks as a package, without their folder's parent on the path, where kernels/ would shadow another."""
    package = types.ModuleType("benchmarks")
    package.__path__ = [str(ROOT / "benchmarks")]
    monkeypatch.setitem(sys.modules, "benchmarks", package)
    from benchmarks import bench_train, bench_train_kernels, kernel_cases, train_parts

    yield bench_train, train_parts, bench_train_kernels, kernel_cases
    for name in [name for name in sys.modules if name.startswith("benchmarks.")]:
        del sys.modules[name]


def test_waterfall_has_every_technique_and_both_sides_of_each_ratio(result):
    found = result("train")
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


def test_kernel_rows_have_both_sides_of_each_ratio(result):
    found = result("train_kernels")
    plain = {row["case"]: row for row in found["rows"] if row["form"] == "plain"}
    selected = {row["case"]: row for row in found["rows"] if row["form"] == "plain, supervised ids"}
    assert {row["op"] for row in plain.values()} == {"norm_rope", "rms_norm", "swiglu", "linear cross-entropy"}
    assert [row["case"] for row in found["rows"] if row["form"] == "ours"] == list(plain)
    for row in found["rows"]:
        beside = plain[row["case"]]
        assert row.keys() == beside.keys()
        for part in ("forward", "total"):
            assert 0 < row[f"{part}_p20_s"] <= row[f"{part}_p50_s"] <= row[f"{part}_p80_s"]
            assert row[f"plain_{part}_p50_s"] == beside[f"{part}_p50_s"]
            assert row[f"{part}_times_plain"] == pytest.approx(beside[f"{part}_p50_s"] / row[f"{part}_p50_s"])
            rate = found["copy_gb_per_s"] if row["unit"] == "GB/s" else found["product_tflop_per_s"]
            assert row[f"{part}_share"] == pytest.approx(row[f"{part}_rate"] / rate)
        for kind in ("output_error", "gradient_error"):
            assert 0 < row[kind] < 1e-5
            if row["form"] == "ours":
                assert row[f"plain_{kind}"] == max(beside[kind], selected.get(row["case"], beside)[kind])


def test_counted_work(benchmarks):
    """Bytes of an fp32 SwiGLU (3 tensors forward, 5 backward); FLOP of a loss on 10 % of 256 ids."""
    *_, kernel_cases = benchmarks
    cases = {(case.op, case.detail): case for case in kernel_cases.cases("quick", "cpu", torch.float32)}
    assert cases["swiglu", "256x352"].work == (3 * 4 * 256 * 352, 8 * 4 * 256 * 352)
    for state, products in (("frozen", 2), ("trained", 3)):
        case = cases["linear cross-entropy", f"256x128x1024, 10 % supervised, head {state}"]
        assert case.unit == "TFLOP/s" and case.work == (2 * 25 * 128 * 1024, products * 2 * 25 * 128 * 1024)


@pytest.mark.parametrize("form, fails", [(lambda g, u: swiglu_ref(g, u) * (1 + 2e-7), True), (swiglu_ref, False)])
def test_an_inexact_kernel_is_not_timed(benchmarks, form, fails):
    *_, bench, kernel_cases = benchmarks
    size = kernel_cases.SIZES["quick"]
    case = kernel_cases.swiglu_case(size, lambda *shape: torch.randn(shape))
    case = replace(case, forms=case.forms | {"ours": lambda gate, up, _: lambda: form(gate, up)})
    arguments = case, "cpu", False, 1, {"GB/s": 1e9}
    if fails:
        with pytest.raises(AssertionError):
            bench.measure(*arguments)
    else:
        assert [row["form"] for row in bench.measure(*arguments)] == ["plain", "ours"]


def test_a_row_with_another_loss_or_gradient_is_not_timed(benchmarks, monkeypatch):
    bench, parts, *_ = benchmarks
    model = parts.Model("tiny", torch.device("cpu"), torch.float32)
    ids, offsets = parts.make_rows(4, model.layout, 16)
    batches = parts.make_batches(ids, offsets, model.layout, {"packed": 128}, "cpu")
    targets = sum(batch["target_tokens"] for batch in batches["packed"])
    first, row = {}, bench.waterfall(False, False, False)[0]
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
    _, parts, *_ = benchmarks
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

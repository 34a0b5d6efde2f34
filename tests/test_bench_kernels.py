"""The benchmark of the kernels: every one runs, each speed stands beside what shows that it is right, and a wrong one
has none; the work that is counted is that of the tensors."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quick_run import kept
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["vq", "remap", "resample", "group_norm", "norm_rope", "rms_norm", "swiglu", "lora", "loss"]
STAGES += ["norm_rope_store", "paged_attention", "sampling"]
INTEGERS = {"vq", "remap", "resample", "sampling"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled:UserWarning"),
]


def run(output: Path, *arguments: str, interpret: str = "1") -> tuple[dict, int, str]:
    """(what the benchmark wrote, exit status, last line), run as a user would on a machine without a GPU."""
    command = [sys.executable, "-m", "benchmarks.bench_kernels", "--quick", "--output", str(output), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["TRITON_INTERPRET"] = interpret
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert printed.returncode in (0, 1), printed.stdout + printed.stderr
    return json.loads(output.read_text()), printed.returncode, printed.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """A quick run of all kernels in the interpreter, that of the suite's dry run where there is one."""
    if result := kept("kernels", tmp_path_factory):
        assert not result["failed"], result["failed"]
        return result
    result, status, last = run(tmp_path_factory.mktemp("bench") / "kernels.json")
    assert status == 0 and not result["failed"], result["failed"]
    assert json.loads(last) == result
    return result


@pytest.fixture()
def bench():
    from benchmarks import bench_kernels

    return bench_kernels


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def test_every_kernel_has_rows_of_evidence(found):
    rows = found["evidence"]
    assert list(dict.fromkeys(row["stage"] for row in rows)) == list(found["section_s"]) == STAGES
    assert found["interpreted"] and isinstance(found["seed"], int) and found["size"] == "quick"
    by_shape: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        by_shape.setdefault((row["stage"], row["shape"]), {})[row["form"]] = row
    assert sum(map(len, by_shape.values())) == len(rows)
    for forms in by_shape.values():
        # Ours first, and always something of torch's or Pillow's beside it.
        assert next(iter(forms)) == "ours" and len(forms) > 1
        fastest = min(row["p50_s"] for form, row in forms.items() if not form.startswith("ours"))
        for row in forms.values():
            beside = forms[row["beside"]]
            assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"]
            assert row["times"] == pytest.approx(beside["p50_s"] / row["p50_s"])
            assert row["times_best"] == pytest.approx(fastest / row["p50_s"])
            # Of a GPU alone.
            assert row["extra_mb"] is row["of_whole"] is None
            assert row["moved_bytes"] == beside["moved_bytes"] and row["flop"] == beside["flop"]
            by_copy = row["moved_bytes"] / found["copy_bytes_per_s"]
            by_product = (row["flop"] or 0) / found["product_flop_per_s"]
            assert row["floor_s"] == pytest.approx(max(by_copy, by_product))
            assert row["share"] == pytest.approx(row["floor_s"] / row["p50_s"])
    shown = [(row["stage"], row["shape"], row["form"], row["p50_s"]) for row in found["rows"]]
    assert shown == [(row["stage"], row["shape"], row["form"], row["p50_s"]) for row in rows]


def test_every_speed_of_ours_stands_beside_what_shows_that_it_is_right(found):
    for row in (row for row in found["evidence"] if row["form"].startswith("ours")):
        quality = row["quality"]
        if row["stage"] in INTEGERS:
            assert {value for name, value in quality.items() if name.endswith("differing")} == {0}, row
        else:
            assert 0 < quality["output_error"] < 1e-6 and 0 < quality["plain_output_error"] < 1e-6, row
            backward = "backward" in row["shape"] or "gradient" in row["shape"]
            assert backward == ("gradient_error" in quality)
            if backward:
                assert 0 < quality["gradient_error"] <= 2 * quality["plain_gradient_error"] < 2e-6
    normal = [row["quality"] for row in found["evidence"] if row["stage"] == "vq" and row["form"] == "ours"]
    assert all(0 <= quality["undecided"] < 1 for quality in normal)


def test_a_torch_reference_is_never_called_ours(tmp_path):
    result, status, _ = run(tmp_path / "torch.json", "--only", "remap,swiglu", "--seed", "5", interpret="0")
    assert status == 0 and result["seed"] == 5 and not result["interpreted"]
    assert list(result["section_s"]) == ["remap", "swiglu"]
    forms = {row["form"] for row in result["evidence"]}
    assert forms == {"torch reference", "torch"}


def test_a_wrong_kernel_leaves_the_others(bench, monkeypatch, tmp_path, capsys):
    good = bench.STAGES["remap"]("quick")[:1]

    def wrong(draw):
        work = good[0].make(draw)
        return replace(
            work, forms=work.forms | {draw.ours: replace(work.forms[draw.ours], call=lambda: torch.zeros(1))}
        )

    spoilt = replace(good[0], stage="spoilt", make=wrong)
    stages = {
        "spoilt": lambda size: [spoilt, replace(good[0], stage="spoilt", shape="right")],
        "good": lambda size: good,
    }
    monkeypatch.setattr(bench, "STAGES", stages)
    output = tmp_path / "kernels.json"
    monkeypatch.setattr(sys, "argv", ["bench_kernels", "--quick", "--output", str(output)])
    with pytest.raises(SystemExit, match="^1$"):
        bench.main()
    result = json.loads(output.read_text())
    assert list(result["failed"]) == ["spoilt"]
    (message,) = result["failed"]["spoilt"]
    assert message.startswith(f"{good[0].shape}: AssertionError")
    # No row of the shape that is wrong.
    assert {(row["stage"], row["shape"]) for row in result["evidence"]} == {
        ("spoilt", "right"),
        ("remap", good[0].shape),
    }
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


def test_another_compiler_that_fails_does_not_cost_ours_its_row(bench):
    (case, *_), draw = bench.STAGES["swiglu"]("quick"), bench.Draw(device(), 6)

    def fail():
        raise RuntimeError("no compiler")

    def with_compiled(draw):
        work = case.make(draw)
        return replace(work, forms=work.forms | {"torch.compile": replace(work.forms["torch"], call=fail)})

    rows, found, reasons = bench.measure(replace(case, make=with_compiled), draw, bench.Roofline(1e9, 1e9), 1)
    assert [row["form"] for row in rows] == [row["form"] for row in found] == [draw.ours, "torch"]
    assert reasons == [f"{case.shape}, torch.compile: RuntimeError: no compiler"]


def test_what_was_measured_is_kept_where_a_run_is_stopped(bench, monkeypatch, tmp_path):
    def stop(size):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "STAGES", {"swiglu": bench.STAGES["swiglu"], "stop": stop})
    output = tmp_path / "kernels.json"
    monkeypatch.setattr(sys, "argv", ["bench_kernels", "--quick", "--output", str(output)])
    with pytest.raises(KeyboardInterrupt):
        bench.main()
    assert {row["stage"] for row in json.loads(output.read_text())["evidence"]} == {"swiglu"}


def test_a_lost_gpu_ends_the_run(bench, monkeypatch, tmp_path):
    good = bench.STAGES["swiglu"]("quick")
    lost = replace(good[0], make=lambda draw: (_ for _ in ()).throw(RuntimeError("an illegal memory access")))
    stages = {"good": lambda size: good[:1], "lost": lambda size: [lost, good[0]], "never": lambda size: good}
    monkeypatch.setattr(bench, "STAGES", stages)
    monkeypatch.setattr(bench, "gpu_lost", lambda: True)
    output = tmp_path / "kernels.json"
    monkeypatch.setattr(sys, "argv", ["bench_kernels", "--quick", "--output", str(output)])
    with pytest.raises(SystemExit, match="1"):
        bench.main()
    result = json.loads(output.read_text())
    assert result["gpu_lost"] and list(result["section_s"]) == ["good", "lost"] and list(result["failed"]) == ["lost"]
    assert len(result["failed"]["lost"]) == 1


def test_only_known_kernels(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_kernels", "--only", "vq,sound"])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert "--only: sound: expected " in capsys.readouterr().err


def spoil(outcome):
    """The outcome with every float a little off, every integer another."""
    if isinstance(outcome, torch.Tensor):
        return outcome * (1 + 1e-6) if outcome.is_floating_point() else (outcome.long() + 1).to(outcome.dtype)
    return [spoil(part) for part in outcome]


@pytest.mark.parametrize("stage", STAGES)
def test_an_inexact_kernel_has_no_quality(bench, stage):
    for case in bench.STAGES[stage]("quick"):
        work = case.make(bench.Draw(device(), 3))
        assert work.quality(work.ours)
        right = work.forms[work.ours]
        wrong = replace(
            work, forms=work.forms | {work.ours: replace(right, call=lambda right=right: spoil(right.call()))}
        )
        with pytest.raises(AssertionError):
            wrong.quality(work.ours)


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_kernel_does_not_write_is_seen(bench, stage):
    """A form that does nothing but hand out buffers of its own and those of the case, after a right one ran."""
    for case in bench.STAGES[stage]("quick"):
        work = case.make(bench.Draw(device(), 4))
        outcome = work.outcome(work.ours)
        buffers = [outcome] if isinstance(outcome, torch.Tensor) else list(outcome)
        idle = lambda buffers=buffers: [torch.empty_like(buffer) for buffer in buffers]  # noqa: E731
        if isinstance(outcome, torch.Tensor):
            idle = lambda buffer=outcome: torch.empty_like(buffer)  # noqa: E731
        lazy = replace(work, forms=work.forms | {work.ours: replace(work.forms[work.ours], call=idle)})
        with pytest.raises(AssertionError):
            lazy.quality(work.ours)
    assert not torch.are_deterministic_algorithms_enabled()


def test_buffers_are_poisoned_before(bench):
    """Forms that write to a buffer of the case find nothing right in it."""
    for stage in ("remap", "resample", "norm_rope_store"):
        work = bench.STAGES[stage]("quick")[-1].make(bench.Draw(device(), 5))
        outcome = work.outcome(work.ours)
        buffers = [outcome] if isinstance(outcome, torch.Tensor) else list(outcome)[1:]
        work.prepare()
        for buffer in buffers:
            assert bool((buffer == -1).all() if buffer.dtype == torch.int64 else buffer.isnan().all()), stage


def test_floors_need_no_tensor(bench):
    """On a GPU's shapes, where the tensors would not fit this machine."""

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            raise AssertionError(f"{function} was called")

    with Nothing():
        floors = bench.floors()
    assert list(dict.fromkeys(floor["stage"] for floor in floors)) == STAGES
    assert all(floor["moved_bytes"] > 0 for floor in floors)
    assert len({(floor["stage"], floor["shape"]) for floor in floors}) == len(floors)
    work = {(floor["stage"], floor["shape"]): (floor["moved_bytes"], floor["flop"]) for floor in floors}
    latents = 4 * 256 * (65536 + 8192) + 8 * 65536
    assert work["vq", "65536x8192x256 float32, independent latents"] == (latents, 2 * 65536 * 8192 * 256)
    assert work["group_norm", "16x128x512x512 float16, SiLU"][0] == 3 * 2 * 16 * 128 * 512 * 512 + 1024
    assert work["group_norm", "16x128x512x512 float16, of a sum, SiLU"][0] == 5 * 2 * 16 * 128 * 512 * 512 + 256 + 1024
    # 864 x 1152 pixels become 512 x 683, of which 512 x 512 are kept: not all columns are read.
    (moved, _) = work["resample", "64 images of 864x1152 to 512x512 float32"]
    assert 864 * 864 < (moved / 64 - 4 * 3 * 512**2) / 3 < 864 * 900
    product = 2.0 * 16384 * 65536 * 4096
    assert (
        work["loss", "16384x4096x65536 bfloat16, 100 % supervised, head frozen, forward and backward"][1] == 2 * product
    )


def size_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_counted_bytes_are_those_of_the_tensors(bench):
    """What a case says it moves beside what its draws and its outcome hold."""

    class Noted(bench.Draw):
        """Keeps what it draws, in order."""

        def __init__(self):
            super().__init__(device(), 6)
            self.drawn = []

        def note(self, tensor):
            self.drawn.append(tensor)
            return tensor

        def normal(self, *shape, **options):
            return self.note(super().normal(*shape, **options))

        def integers(self, *range_and_shape, **options):
            return self.note(super().integers(*range_and_shape, **options))

        def uniform(self, *shape):
            return self.note(super().uniform(*shape))

    def measured(stage, at):
        case, draw = bench.STAGES[stage]("quick")[at], Noted()
        work = case.make(draw)
        return case, draw.drawn, work.outcome(work.ours)

    case, (z, e), codes = measured("vq", 1)
    assert case.moved == size_of(z, e, codes) and case.flop == 2 * z.numel() * len(e)
    for at in range(3):
        case, (values,), made = measured("remap", at)
        assert case.moved == size_of(values, made)
    case, (x, *_), out = measured("group_norm", 0)
    assert case.moved == size_of(x, out) + 2 * 4 * x.shape[-1]
    case, (h, residual, shift, *_), (total, out) = measured("group_norm", 1)
    assert case.moved == size_of(h, residual, shift, total, out) + 2 * 4 * len(shift)
    assert total.data_ptr() == h.data_ptr()
    case, (x, _, weight), (out,) = measured("rms_norm", 0)
    assert case.moved == size_of(x, weight, out)
    case, (x, dout, weight), (_, dx, dweight) = measured("rms_norm", 2)
    assert case.moved == size_of(x, weight, out) + size_of(x, dout, weight) + size_of(dx, dweight)
    case, (x, dout, weight, bias), (out,) = measured("norm_rope", 0)
    T, _, D = x.shape
    tables = 2 * 4 * T * D // 2
    assert case.moved == size_of(x, weight, bias, out) + tables
    case, _, (out, *gradients) = measured("norm_rope", 2)
    # The bias is not read again.
    forward = size_of(x, weight, bias, out) + tables
    assert case.moved == forward + size_of(x, weight, dout, *gradients) + tables
    case, (gate, up, dout), (out, *gradients) = measured("swiglu", 1)
    assert case.moved == size_of(gate, up, out) + size_of(gate, up, dout, *gradients)
    case, (x, a, b, weight, _, dy), (y, *gradients) = measured("lora", 1)
    assert case.moved == size_of(x, a, b, weight, y) + size_of(x, a, b, weight, dy, *gradients)
    assert case.flop == 2 * 2 * y.numel() * x.shape[1] + 3 * 2 * (y.numel() + x.numel()) * len(a)
    case, (logits, *_), (losses, gradient) = measured("loss", 0)
    assert case.moved == size_of(logits, gradient)
    case, (hidden, head, _), (_, d_hidden, d_head) = measured("loss", 4)
    kept = len(hidden) // 10
    states = size_of(hidden[:kept])
    assert case.moved == 2 * (states + size_of(head)) + size_of(d_hidden, d_head)
    assert case.flop == 3 * 2 * kept * head.numel() and case.whole == 4 * len(hidden) * len(head)
    case, (qkv, weight, *_), (q, k_pages, _) = measured("norm_rope_store", 1)
    T, D = len(qkv), weight.shape[1]
    assert case.moved == 2 * size_of(qkv) + 4 * size_of(weight) + 2 * 4 * T * D // 2 + 2 * 8 * T
    case, (kv, q), out = measured("paged_attention", 1)
    (_, _, _, H, _, D) = kv.shape
    assert case.moved == 2 * (3 + 66) * H * D * 4 + size_of(q, out)
    case, (logits, seen, uniforms), ids = measured("sampling", 0)
    assert case.moved == size_of(logits) + seen.numel() + seen.shape[1] + size_of(uniforms, ids) + len(ids) * (12 + 16)
    case, (logits, uniforms), columns = measured("sampling", 1)
    assert case.moved == size_of(logits, uniforms, columns) + len(columns) * 16


def test_errors_by_parts(bench):
    from benchmarks.cases.case import relative_errors

    right = torch.arange(1.0, 13).double().view(4, 3)
    found = right.clone()
    found[2, 1] += 0.5
    expected = 0.5 / float(right.norm())
    assert relative_errors([found], [(..., [right])]) == [pytest.approx(expected)]
    parts = [(slice(i, i + 1), [right[i : i + 1]]) for i in range(4)]
    assert relative_errors([found], parts) == [pytest.approx(expected)]
    found[0, 0] = float("nan")
    assert relative_errors([right, found], [(..., [right, right])]) == [0.0, float("inf")]


def test_share_of_the_work(bench, monkeypatch):
    """Seconds are those of the whole work, whatever share of it a call does."""
    from benchmarks.cases.case import Form, Work

    forms = {"whole": Form(lambda: None), "eighth": Form(lambda: None, share=0.125)}
    monkeypatch.setattr(bench, "in_turns", lambda turns, *_: {name: {"p50_s": 3.0} for name in turns})
    work = Work(forms, "whole", lambda *_: {})
    assert bench.seconds(work, "cpu", 1) == {"whole": {"p50_s": 3.0}, "eighth": {"p50_s": 24.0}}


def test_ids_that_rounding_allows(bench):
    """Probabilities 0.5, 0.3, 0.2: a top_p of 0.8 keeps two of them, drawn at the border of 0.625."""
    from benchmarks.cases.sampling import drawable

    x = torch.tensor([0.5, 0.2, 0.3]).log()
    assert drawable(x, 1.0, 0.79, 0.5, 0) and not drawable(x, 1.0, 0.79, 0.5, 2)
    assert drawable(x, 1.0, 0.79, 0.7, 2) and not drawable(x, 1.0, 0.79, 0.7, 1)
    # On the border of two ids either, and on the border of top_p the third as well.
    assert drawable(x, 1.0, 0.79, 0.625, 0) and drawable(x, 1.0, 0.79, 0.625, 2)
    assert not drawable(x, 1.0, 0.79, 0.9999999, 1) and drawable(x, 1.0, 0.8, 0.6, 1)
    assert not drawable(x, 1.0, 0.79, 0.5, -1) and not drawable(x, 1.0, 0.79, 0.5, 3)


@pytest.mark.gpu
def test_a_captured_form_does_all_its_calls(bench):
    counter = torch.zeros((), device="cuda")
    replay = bench.captured(lambda: counter.add_(1), 4)
    before = int(counter)
    replay()
    assert int(counter) == before + 4


@pytest.mark.gpu
def test_extra_memory(bench):
    big = lambda: torch.empty(1 << 22, dtype=torch.uint8, device="cuda")  # noqa: E731
    assert bench.extra_bytes(big) == 1 << 22

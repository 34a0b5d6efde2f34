"""The parts between the products of training, each against transformers' plain form and liger-kernel's.

    PYTHONPATH=. python -m benchmarks.bench_train_kernels [--quick] [--output FILE.json]

A row is one form of one operation. `forward` runs without a gradient, `total` forward and backward. rate counts what
has to be moved or multiplied, the same for all forms: each operand read once and each result written once, backward
too; for the loss the products of the supervised ids alone. share: of the rate of a large copy, or of a large product,
measured in the same run. extra_mb: most memory beyond the inputs, forward and backward (GPU only). Errors are norms of
the difference from float64 over the norm of float64, of the output and of the worst gradient; for ours they may be at
most twice those of the plain form, which stand in the same row (`plain_`), or nothing is printed. Where there are two
plain forms the worse one counts: a product of a few rows rounds otherwise than one of many.

On a GPU tensors are as in a 7B model with packs of 16,384 ids, larger than the L2 cache, and calls are timed in tens,
so that one is launched while the one before runs. Forms take turns. liger's SwiGLU writes its gradients over its
inputs: it is timed on what that leaves. It has no norm over heads, so no form of norm_rope. On a CPU ours is the torch
reference.
"""

import importlib.util
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.bench_vq import extra_bytes
from benchmarks.harness import parse_arguments, report
from benchmarks.kernel_cases import LIGER, OURS, PLAIN, SELECTED, Case, Form, cases

UNITS = {"GB/s": 1e9, "TFLOP/s": 1e12}
# Calls timed together, by the kind of device.
CALLS = {"cuda": 10, "cpu": 1}


def outcome(bind: Form, tensors: tuple[torch.Tensor, ...], trained: tuple[bool, ...]) -> list[torch.Tensor]:
    """Output and gradients in float64, from copies of the tensors."""
    tensors = [t.clone().requires_grad_(wanted) for t, wanted in zip(tensors, trained, strict=True)]
    wanted = [t for t in tensors if t.requires_grad]
    out = bind(*tensors)()
    dout = tensors[-1].to(out.dtype)
    return [out.detach().double(), *(grad.double() for grad in torch.autograd.grad(out, wanted, dout))]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> tuple[float, float]:
    """Relative error of the output, and of the worst gradient."""
    output, *gradients = (float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))
    return output, max(gradients)


def seconds(works: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, dict[str, float]]:
    """p20, p50 and p80 of one call of each, in turns, so that what slows the machine for a while slows all of them."""
    calls = CALLS[device]
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 3):
        for name, work in works.items():
            start = time.perf_counter()
            for _ in range(calls):
                work()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / calls)
    # The first turns fill caches.
    found = {name: np.percentile(taken[3:], (20, 50, 80)).tolist() for name, taken in times.items()}
    return {name: dict(zip(("p20_s", "p50_s", "p80_s"), taken, strict=True)) for name, taken in found.items()}


def works_of(case: Case, names: list[str]) -> dict[str, dict[str, Callable[[], object]]]:
    """What is timed of each form, on tensors of its own: forward without a gradient, and forward and backward."""
    found: dict[str, dict] = {"forward": {}, "total": {}}
    for name in names:
        tensors = [t.clone().requires_grad_(wanted) for t, wanted in zip(case.tensors, case.trained, strict=True)]
        wanted = [t for t in tensors if t.requires_grad]
        call, alone = case.forms[name](*tensors), case.forms[name](*(t.detach() for t in tensors))

        def total(call=call, wanted=wanted, dout=tensors[-1]):
            torch.autograd.grad(call(), wanted, dout)

        found["forward"][name], found["total"][name] = torch.no_grad()(alone), total
    return found


def measure(case: Case, device: str, liger: bool, repeats: int, speed: dict[str, float]) -> list[dict]:
    """One row per form; AssertionError if ours is less exact than twice the error of the plain form."""
    names = [name for name in case.forms if name != LIGER or liger]
    exact = outcome(lambda *t: lambda: case.truth(*t), tuple(t.double() for t in case.tensors), case.trained)
    inexact = {name: errors(outcome(case.forms[name], case.tensors, case.trained), exact) for name in names}
    plain = [max(side) for side in zip(*(inexact[name] for name in names if name in (PLAIN, SELECTED)), strict=True)]
    # One number, as a sum of losses is, can be right by luck.
    least = torch.finfo(case.tensors[0].dtype).eps if exact[0].ndim == 0 else 0.0
    assert inexact[OURS][0] <= max(2 * plain[0], least), (case.op, case.detail, inexact)
    assert inexact[OURS][1] <= 2 * plain[1], (case.op, case.detail, inexact)
    del exact
    works = works_of(case, names)
    times = {part: seconds(works[part], device, repeats) for part in works}
    rows = []
    for name in names:
        row = {"op": case.op, "case": case.detail, "form": name, "unit": case.unit}
        for i, part in enumerate(works):
            middle, beside = times[part][name]["p50_s"], times[part][PLAIN]["p50_s"]
            row |= {f"{part}_{percentile}": value for percentile, value in times[part][name].items()}
            row |= {f"plain_{part}_p50_s": beside, f"{part}_times_plain": beside / middle}
            row[f"{part}_rate"] = case.work[i] / middle / UNITS[case.unit]
            row[f"{part}_share"] = case.work[i] / middle / speed[case.unit]
        row["extra_mb"] = extra_bytes(works["total"][name]) / 1e6 if device == "cuda" else None
        row |= dict(zip(("output_error", "gradient_error"), inexact[name], strict=True))
        row |= dict(zip(("plain_output_error", "plain_gradient_error"), plain, strict=True))
        rows.append(row)
    return rows


def copy_rate(device: str, elements: int) -> float:
    """Bytes per second of a copy of fp32 values, read and written."""
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    return 8 * elements / seconds({"copy": lambda: target.copy_(source)}, device, 9)["copy"]["p50_s"]


def product_rate(device: str, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a product of two square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds({"product": lambda: a @ b}, device, 9)["product"]["p50_s"]


def main() -> None:
    arguments = parse_arguments("fused parts of a training step: time, memory, error against the plain forms")
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    liger = gpu and importlib.util.find_spec("liger_kernel") is not None
    if not gpu:
        print("no GPU: the Triton kernels and liger's are not timed; ours is the torch reference")
    size = "quick" if arguments.quick else "gpu" if gpu else "cpu"
    speed = {
        "GB/s": copy_rate(device, 1 << (28 if gpu else 20 if arguments.quick else 26)),
        "TFLOP/s": product_rate(device, dtype, 8192 if gpu else 1024),
    }
    repeats = 3 if arguments.quick else 15
    rows = [row for case in cases(size, device, dtype) for row in measure(case, device, liger, repeats, speed)]
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    facts = {"device": name, "dtype": str(dtype).removeprefix("torch.")}
    facts |= {"copy_gb_per_s": speed["GB/s"] / 1e9, "product_tflop_per_s": speed["TFLOP/s"] / 1e12}
    report("train_kernels", rows, arguments.output, **facts)


if __name__ == "__main__":
    main()

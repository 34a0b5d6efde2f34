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
so that one is launched while the one before runs. liger's SwiGLU writes its gradients over its inputs: it is timed on
what that leaves. It has no norm over heads, so no form of norm_rope. On a CPU ours is the torch reference.
"""

import importlib.util
from collections.abc import Callable

import torch

from benchmarks.bench_vq import extra_bytes
from benchmarks.harness import parse_arguments, report, timed
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


def seconds(work: Callable[[], object], device: str, repeats: int) -> dict[str, float]:
    """p20, p50 and p80 of one call, calls following each other on a GPU."""
    calls = CALLS[device]

    def several() -> None:
        for _ in range(calls):
            work()
        if device == "cuda":
            torch.cuda.synchronize()

    return {name: value / calls for name, value in timed(several, repeats, warmup=3).items()}


def measure(case: Case, device: str, liger: bool, repeats: int, speed: dict[str, float]) -> list[dict]:
    """One row per form; AssertionError if ours is less exact than twice the error of the plain form."""
    exact = outcome(lambda *t: lambda: case.truth(*t), tuple(t.double() for t in case.tensors), case.trained)
    rows: list[dict] = []
    for name, bind in case.forms.items():
        if name == LIGER and not liger:
            continue
        output, gradient = errors(outcome(bind, case.tensors, case.trained), exact)
        tensors = [t.clone().requires_grad_(wanted) for t, wanted in zip(case.tensors, case.trained, strict=True)]
        wanted = [t for t in tensors if t.requires_grad]
        call, alone = bind(*tensors), bind(*(t.detach() for t in tensors))

        def total(call=call, wanted=wanted, dout=tensors[-1]):
            torch.autograd.grad(call(), wanted, dout)

        times = {"forward": seconds(torch.no_grad()(alone), device, repeats), "total": seconds(total, device, repeats)}
        row = {"op": case.op, "case": case.detail, "form": name, "unit": case.unit}
        plain = rows[0] if rows else row
        for i, (part, taken) in enumerate(times.items()):
            row |= {f"{part}_{percentile}": value for percentile, value in taken.items()}
            middle = taken["p50_s"]
            row[f"plain_{part}_p50_s"] = plain[f"{part}_p50_s"]
            row[f"{part}_times_plain"] = plain[f"{part}_p50_s"] / middle
            row[f"{part}_rate"] = case.work[i] / middle / UNITS[case.unit]
            row[f"{part}_share"] = case.work[i] / middle / speed[case.unit]
        row["extra_mb"] = extra_bytes(total) / 1e6 if device == "cuda" else None
        row |= {"output_error": output, "gradient_error": gradient}
        plains = [other for other in [*rows, row] if other["form"] in (PLAIN, SELECTED)]
        row |= {f"plain_{kind}": max(other[kind] for other in plains) for kind in ("output_error", "gradient_error")}
        if name == OURS:
            # One number, as a sum of losses is, can be right by luck.
            least = torch.finfo(case.tensors[0].dtype).eps if exact[0].ndim == 0 else 0.0
            assert output <= max(2 * row["plain_output_error"], least), row
            assert gradient <= 2 * row["plain_gradient_error"], row
        rows.append(row)
    return rows


def copy_rate(device: str, elements: int) -> float:
    """Bytes per second of a copy of fp32 values, read and written."""
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    return 8 * elements / seconds(lambda: target.copy_(source), device, 9)["p50_s"]


def product_rate(device: str, dtype: torch.dtype, side: int) -> float:
    """FLOP/s of a product of two square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device, 9)["p50_s"]


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
    repeats = 3 if arguments.quick else 9
    rows = [row for case in cases(size, device, dtype) for row in measure(case, device, liger, repeats, speed)]
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    facts = {"device": name, "dtype": str(dtype).removeprefix("torch.")}
    facts |= {"copy_gb_per_s": speed["GB/s"] / 1e9, "product_tflop_per_s": speed["TFLOP/s"] / 1e12}
    report("train_kernels", rows, arguments.output, **facts)


if __name__ == "__main__":
    main()

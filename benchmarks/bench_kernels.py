"""Every Triton kernel beside what it replaces: first right, then timed, with the floor of its work.

    PYTHONPATH=. python -m benchmarks.bench_kernels [--only vq,loss] [--quick] [--seed N] [--output FILE.json]

A section is one kernel on one or more shapes (benchmarks/cases/); a row one form of it. "ours" is the kernel,
also under TRITON_INTERPRET=1, where its speed means nothing; on a CPU without it there is only a "torch reference".

Data are random, of a new seed on every run, which the result names. Of every form the differences from a reference are
taken before any is timed: integers and pixels of ours must be equal to it, floats within twice the error of the plain
torch form against float64, or the shape gets no row. Memory that our kernels write to holds poison before.

On a GPU calls are timed in tens, so that one is launched while the one before runs, those of generation as the replay
of a CUDA graph. Forms take turns, slow ones in a second round. share: the floor of what must be moved and multiplied,
by the rates of a large copy and a large product in the same run, over the time. times: how many times as fast as the
form that all are compared with, which has 1. extra_mb: most memory beyond the operands during a call, results too, GPU
only; of_whole: as a share of what the textbook form stores in between. times_best, in the evidence: how many times as
fast as the fastest form that is neither ours nor another compiler's.

A failed case leaves the others as they are, and a form of another compiler that fails its own; the exit status is then
1. One that leaves the process without its GPU, as a kernel that reads beyond its memory does, is the last (gpu_lost).
With --output all is written after each section.
"""

import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.cases import adapters, loss, sampling
from benchmarks.cases import codes as code
from benchmarks.cases import decoding as decode
from benchmarks.cases import images as image
from benchmarks.cases import training as train
from benchmarks.cases.case import COMPILED, LIGER, Case, Draw, Work
from benchmarks.harness import Roofline, environment, evidence, extra_bytes, in_turns, report
from benchmarks.sections import FAILURES, forget, gpu_lost, reason_of, section_parser
from medmax_fast.files import write_json
from medmax_fast.kernels.launch import INTERPRETED

# The cases of each kernel at a size: "gpu", "cpu" or "quick".
STAGES: dict[str, Callable[[str], list[Case]]] = {
    "vq": code.vq_cases,
    "remap": code.remap_cases,
    "resample": image.resample_cases,
    "group_norm": image.group_norm_cases,
    "norm_rope": train.norm_rope_cases,
    "rms_norm": train.rms_norm_cases,
    "swiglu": train.swiglu_cases,
    "lora": adapters.lora_cases,
    "loss": loss.loss_cases,
    "norm_rope_store": decode.norm_rope_store_cases,
    "paged_attention": decode.paged_attention_cases,
    "sampling": sampling.sampling_cases,
}
# On a GPU forms that take longer are timed one call at a time, which costs them a wait of a few microseconds.
SLOW_S = 0.004
SHOWN = ("stage", "shape", "form", "p50_s", "times", "share", "bound", "gb_per_s", "tflop_per_s")


def floors(size: str = "gpu") -> list[dict]:
    """What each case must move and multiply, in the names of the evidence; allocates nothing and needs no GPU."""
    return [
        {"stage": stage, "shape": case.shape, "moved_bytes": case.moved, "flop": case.flop}
        for stage, cases in STAGES.items()
        for case in cases(size)
    ]


def captured(call: Callable[[], object], calls: int) -> Callable[[], object]:
    """The replay of a CUDA graph of so many calls."""
    # Outside of the capture first, on another stream, as torch asks for.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            call()
    return graph.replay


def seconds(work: Work, device: str, repeats: int) -> dict[str, dict[str, float]]:
    """p20, p50 and p80 of the work in each form; each has run before."""
    calls, shares = {}, {}
    for name, form in work.forms.items():
        calls[name], shares[name] = form.call, form.share
        if device == "cuda" and form.captured:
            calls[name], shares[name] = captured(form.call, form.captured), form.share * form.captured
    slow = {name for name, call in calls.items() if device == "cuda" and min(once(call), once(call)) > SLOW_S}
    found = {}
    for together, names in ((None, calls.keys() - slow), (1, slow)):
        # In the order of the forms.
        turns = {name: call for name, call in calls.items() if name in names}
        found |= in_turns(turns, device, repeats, together)
    return {name: {p: taken / share for p, taken in found[name].items()} for name, share in shares.items()}


def once(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(case: Case, draw: Draw, roofline: Roofline, repeats: int) -> tuple[list[dict], list[dict], list[str]]:
    """(rows to print, evidence, reasons), a row for each form but those of other compilers that fail, with the reason.

    Raises one of FAILURES where another form fails or ours is wrong.
    """
    work, quality, reasons = case.make(draw), {}, []
    for name in work.forms:
        try:
            quality[name] = work.quality(name)
        except FAILURES as error:
            if name not in (COMPILED, LIGER):
                raise
            reasons.append(f"{case.shape}, {name}: {reason_of(error)}")
    work = replace(work, forms={name: work.forms[name] for name in quality})
    extra = {name: extra_bytes(form.call) if draw.device == "cuda" else None for name, form in work.forms.items()}
    times = seconds(work, draw.device, repeats)
    # Beside ours, as torch or the published code computes it.
    others = [name for name, form in work.forms.items() if not form.own and name not in (COMPILED, LIGER)]
    fastest = min((times[name]["p50_s"] for name in others), default=None)
    rows, found = [], []
    for name in work.forms:
        beside = (work.beside, times[work.beside]["p50_s"])
        done = {"moved": case.moved, "flop": case.flop, "items": case.items, "beside": beside}
        row = evidence(case.stage, case.shape, name, times[name], roofline, quality=quality[name], **done)
        memory = {"extra_mb": None, "of_whole": None}
        if extra[name] is not None:
            memory = {"extra_mb": extra[name] / 1e6, "of_whole": extra[name] / case.whole if case.whole else None}
        found.append(row | memory | {"times_best": fastest / row["p50_s"] if fastest else None})
        differences = ", ".join(f"{key} {value:.3g}" for key, value in quality[name].items())
        rows.append({key: row[key] for key in SHOWN} | memory | {"quality": differences})
    return rows, found, reasons


def main() -> None:
    parser = section_parser("every kernel: time, memory, floor, and what shows that it is right", STAGES)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31), help="of the data (default: a new one)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
    size, repeats = ("quick", 2) if arguments.quick else ("gpu", 9) if device == "cuda" else ("cpu", 9)
    roofline = Roofline.measure(device, arguments.quick)
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "interpreted": INTERPRETED,
        "seed": arguments.seed,
        "size": size,
        "copy_bytes_per_s": roofline.copy,
        "product_flop_per_s": roofline.product,
        "section_s": {},
        "failed": {},
        "gpu_lost": False,
        "evidence": [],
    }
    rows: list[dict] = []
    for stage in arguments.only:
        start = time.perf_counter()
        for case in STAGES[stage](size):
            try:
                # What is left of the case before it.
                forget()
                # Of the seed alone, whatever else --only names.
                printed, found, reasons = measure(case, Draw(device, arguments.seed), roofline, repeats)
            except FAILURES as error:
                # The others are still worth a machine's time.
                printed, found, reasons = [], [], [f"{case.shape}: {reason_of(error)}"]
                facts["gpu_lost"] = gpu_lost()
            for reason in reasons:
                facts["failed"].setdefault(stage, []).append(reason)
                print(f"{stage}, {reason}", flush=True)
            rows += printed
            facts["evidence"] += found
            if facts["gpu_lost"]:
                break
        facts["section_s"][stage] = time.perf_counter() - start
        print(f"{stage}: {facts['section_s'][stage]:.1f} s", flush=True)
        if arguments.output:
            write_json(arguments.output, {"benchmark": "kernels", **facts, "environment": environment(), "rows": rows})
        if facts["gpu_lost"]:
            break
    report("kernels", rows or [{"stage": "nothing measured"}], arguments.output, **facts)
    sys.exit(int(bool(facts["failed"])))


if __name__ == "__main__":
    main()

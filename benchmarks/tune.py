"""Candidates for kernels/blocks.py, measured on the GPU at hand: each first right, then timed in turns with the entry.

    PYTHONPATH=. python -m benchmarks.tune [OP...] [--quick] [--seed N] [--output FILE.json]

Every op of the table has a small grid of other numbers below and the shapes of bench_kernels it is tried on. What a
candidate gives is judged like ours is there; one that is wrong, does not compile or asks for more shared memory than
there is, on any of the shapes, is named and left out. times: how many times as fast as the table's entry, in the same
turns. share: the floor of the shape by the copy and the product measured in the same run, over the time.

At the end stand the lines for kernels/blocks.py, with the results file as their evidence: the fastest candidate where
it gains at least GAIN on all shapes together and loses on none, else the present numbers, now measured. The table is
never written. After a change of it run the tests: sums may be added up in another order, and tests/test_aot.py lets no
variant of a kernel spill, of shapes that are not tried here either.

--quick takes tiny shapes, to see that it runs, and gives no lines; without a GPU only that, with TRITON_INTERPRET=1.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.bench_kernels import STAGES, seconds
from benchmarks.cases.case import Case, Draw, Work
from benchmarks.harness import Roofline, environment, report
from benchmarks.sections import FAILURES, forget, reason_of
from medmax_fast.files import write_json
from medmax_fast.kernels.blocks import blocks, override
from medmax_fast.kernels.launch import INTERPRETED

CURRENT = "current"
# Less is noise, and so is a loss of less on one shape.
GAIN, LOSS = 1.02, 0.98


@dataclass(frozen=True)
class Grid:
    """What an op is tried on and with: cases of a stage of bench_kernels, and numbers other than the table's."""

    stage: str
    cases: slice
    candidates: tuple[str, ...]


def grid(stage: str, candidates: str, cases: slice = slice(None)) -> Grid:
    return Grid(stage, cases, tuple(candidates.split(", ")))


# BLOCK_D of the search and of its norms stays: it sets the order of their sums, and so codes where two are as near.
# Latents that are independent have the most near codes, images in a buffer stand last, the loss alone first, and of the
# attention only few streams are split.
GRIDS = {
    "vq_measure": grid("vq", "BLOCK_N=16, BLOCK_N=64, BLOCK_N=64 num_warps=8", slice(1, 2)),
    "vq_screen": grid(
        "vq",
        "num_stages=1, num_stages=3, maxnreg=128, BLOCK_N=64, BLOCK_N=64 num_stages=3, BLOCK_N=64 num_warps=4, "
        "BLOCK_N=64 BLOCK_K=64, BLOCK_K=64",
        slice(1, 2),
    ),
    "vq_search": grid("vq", "BLOCK_N=16, BLOCK_N=64, BLOCK_K=32, BLOCK_K=128 num_warps=8, num_stages=3", slice(1, 2)),
    "shift": grid("remap", "BLOCK=512, BLOCK=2048, BLOCK=2048 num_warps=8, BLOCK=4096 num_warps=8", slice(0, 3)),
    "span": grid("remap", "BLOCK=128, BLOCK=512, BLOCK=1024, BLOCK=2048", slice(3, 4)),
    "resample": grid("resample", "BLOCK_J=256, BLOCK_J=256 num_warps=2, BLOCK_J=1024, num_warps=8, BLOCK_ROWS=2"),
    "group_norm": grid(
        "group_norm", "TILE=2048, TILE=2048 num_warps=4, TILE=8192, TILE=8192 num_warps=16, BLOCK_C=64, num_warps=4"
    ),
    "norm_rope": grid(
        "norm_rope",
        "TILE=1024, TILE=1024 num_warps=2, TILE=4096 num_warps=8, num_warps=8, HEADS=4, HEADS=16, HEADS=32",
    ),
    "cross_entropy": grid(
        "loss",
        "BLOCK=2048 num_warps=4, num_warps=4, num_warps=16, BLOCK=8192, BLOCK=8192 num_warps=16, "
        "BLOCK=16384 num_warps=32",
        slice(0, 1),
    ),
    "rms_norm": grid("rms_norm", "WARP=128, WARP=512, WARP=1024"),
    "swiglu": grid(
        "swiglu", "TILE=512 num_warps=2, num_warps=8, TILE=2048, TILE=2048 num_warps=8, TILE=4096 num_warps=8"
    ),
    "lora_down": grid("lora", "BLOCK_T=16, BLOCK_T=64, BLOCK_T=64 num_warps=8, num_stages=1, num_stages=3"),
    "lora_weight": grid("lora", "BLOCK_T=64, BLOCK_K=64, num_warps=8, num_stages=1, num_stages=3", slice(1, None, 2)),
    "lora_input": grid("lora", "BLOCK_T=64, BLOCK_T=64 num_warps=8, BLOCK_K=64, BLOCK_K=256", slice(1, None, 2)),
    "norm_rope_store": grid(
        "norm_rope_store", "TILE=512 num_warps=2, num_warps=2, num_warps=8, TILE=2048, TILE=2048 num_warps=8"
    ),
    "paged_attention": grid(
        "paged_attention", "TILE=4096, TILE=4096 num_warps=2, num_warps=2, num_warps=8, TILE=16384 num_warps=8"
    ),
    "paged_splits": grid("paged_attention", "PROGRAMS=264, PROGRAMS=396, PROGRAMS=792, PROGRAMS=1056 MAX_SPLITS=128"),
    "paged_combine": grid("paged_attention", "num_warps=1, num_warps=2, num_warps=8", slice(0, 2)),
}


def numbers_of(candidate: str) -> dict[str, int]:
    """{"TILE": 2048, "num_warps": 8} of "TILE=2048 num_warps=8"; nothing of the table's own entry."""
    if candidate == CURRENT:
        return {}
    return {name: int(value) for name, value in (pair.split("=") for pair in candidate.split())}


def under(op: str, numbers: dict[str, int], call: Callable[[], object]) -> Callable[[], object]:
    """The call with these numbers instead of the table's, where it launches the kernels of `op`."""

    def run() -> object:
        with override(op, **numbers):
            return call()

    return run


def measure(
    op: str, case: Case, candidates: list[str], draw: Draw, roofline: Roofline, repeats: int
) -> tuple[list[dict], dict[str, str]]:
    """(a row for each candidate that is right, the entry's first; why the others are left out, by name).

    Raises one of FAILURES where the entry itself fails.
    """
    work = case.make(draw)
    ours = work.forms[work.ours]
    right, left_out = {}, {}
    for name in (CURRENT, *candidates):
        form = replace(ours, call=under(op, numbers_of(name), ours.call))
        try:
            # The other forms stay, as the judge compares with them.
            quality = replace(work, forms=work.forms | {name: form}).quality(name)
        except FAILURES as error:
            if name == CURRENT:
                raise
            left_out[name] = f"{case.shape}: {reason_of(error)}"
            continue
        right[name] = (form, quality)
    timed = Work({name: form for name, (form, _) in right.items()}, CURRENT, work.judge)
    times = seconds(timed, draw.device, repeats)
    floor, _ = roofline.floor(case.moved, case.flop)
    rows = []
    for name, (_, quality) in right.items():
        row = {"op": op, "shape": case.shape, "candidate": name, **times[name]}
        row |= {"share": floor / times[name]["p50_s"], "times": times[CURRENT]["p50_s"] / times[name]["p50_s"]}
        rows.append(row | {"quality": ", ".join(f"{key} {value:.3g}" for key, value in quality.items())})
    return rows, left_out


def best(rows: list[dict], shapes: int) -> str:
    """The candidate to take, of the rows of one op; one that is not right on all shapes is none."""
    times: dict[str, list[float]] = {}
    for row in rows:
        times.setdefault(row["candidate"], []).append(row["times"])
    gains = {
        name: math.prod(found) ** (1 / shapes)
        for name, found in times.items()
        if len(found) == shapes and min(found) >= LOSS
    }
    fastest = max(gains, key=gains.get)
    return fastest if gains[fastest] >= GAIN else CURRENT


def line(op: str, numbers: dict[str, int], capability: int, evidence: str) -> str:
    """What to put into the table for one capability."""
    values = ", ".join(f"{name}={value}" for name, value in numbers.items())
    return f'"{op}": {{{capability}: Entry("{evidence}", {values})}}'


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="candidates for the table of block sizes, measured on this GPU")
    parser.add_argument("op", nargs="*", help=f"of the table, default all: {', '.join(GRIDS)}")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31), help="of the data (default: a new one)")
    parser.add_argument("--output", help="JSON file to write; its name is the evidence of the lines")
    arguments = parser.parse_args()
    if unknown := set(arguments.op) - set(GRIDS):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(GRIDS)}")
    if INTERPRETED and not arguments.quick:
        parser.error("TRITON_INTERPRET=1: expected --quick, or a GPU and the compiler")
    if not INTERPRETED and not torch.cuda.is_available():
        parser.error("no GPU: expected one, or TRITON_INTERPRET=1 and --quick")
    return arguments


def main() -> None:
    arguments = parse()
    device = "cpu" if INTERPRETED else "cuda"
    size, repeats = ("quick", 2) if arguments.quick else ("gpu", 5)
    roofline = Roofline.measure(device, arguments.quick)
    facts = {
        "device": "triton's interpreter" if INTERPRETED else torch.cuda.get_device_name(),
        "seed": arguments.seed,
        "copy_bytes_per_s": roofline.copy,
        "product_flop_per_s": roofline.product,
        "left_out": {},
        "failed": {},
        "lines": [],
        "op_s": {},
    }
    rows: list[dict] = []
    for op in arguments.op or GRIDS:
        start, found, candidates = time.perf_counter(), [], list(GRIDS[op].candidates)
        cases = STAGES[GRIDS[op].stage](size)[GRIDS[op].cases]
        try:
            for case in cases:
                forget()
                of_case, left_out = measure(op, case, candidates, Draw(device, arguments.seed), roofline, repeats)
                found += of_case
                if left_out:
                    facts["left_out"].setdefault(op, {}).update(left_out)
                    candidates = [name for name in candidates if name not in left_out]
        except FAILURES as error:
            # The others are still worth a machine's time.
            facts["failed"][op] = reason_of(error)
            print(f"{op}: {facts['failed'][op]}", flush=True)
            continue
        rows += found
        facts["op_s"][op] = time.perf_counter() - start
        print(f"{op}: {len(candidates)} candidates, {facts['op_s'][op]:.1f} s", flush=True)
        if not arguments.quick:
            major, minor = torch.cuda.get_device_capability()
            present = blocks(op, torch.device("cuda", torch.cuda.current_device()))
            numbers = present | numbers_of(best(found, len(cases)))
            evidence = Path(arguments.output).name if arguments.output else "RESULTS.json"
            facts["lines"].append(line(op, numbers, 10 * major + minor, evidence))
        if arguments.output:
            write_json(arguments.output, {"benchmark": "tune", **facts, "environment": environment(), "rows": rows})
    for op, reasons in facts["left_out"].items():
        for name, reason in reasons.items():
            print(f"left out: {op} {name}: {reason}")
    print(*facts["lines"], sep="\n")
    report("tune", rows or [{"op": "nothing measured"}], arguments.output, **facts)
    sys.exit(int(bool(facts["failed"])))


if __name__ == "__main__":
    main()

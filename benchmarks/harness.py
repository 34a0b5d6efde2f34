"""Timing and printing shared by the benchmarks: percentiles, a table for people, JSON for programs.

Run a benchmark from the root as `PYTHONPATH=. python -m benchmarks.bench_packing`. Each one first compares what it
times with its reference: no speed without correctness.

Beside rows of its own a benchmark may give `evidence`: rows of one form for all of them, which `medmax bench` puts into
one table. Each has the floor of what it times (the bytes that must move, the FLOP that must be done) and its share of
the roofline, which is measured in the same process: a large copy and a large matrix product.
"""

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from medmax_fast.files import write_json
from medmax_fast.runtime import print_table, versions

# The first turns compile and fill caches.
WARMUP_TURNS = 3


def timed(work: Callable[[], object], repeats: int = 9, warmup: int = 1) -> dict[str, float]:
    """Seconds of one call of `work`: its 20th, 50th and 80th percentile over `repeats` calls after `warmup`."""
    for _ in range(warmup):
        work()
    times = []
    gc.disable()
    try:
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    finally:
        gc.enable()
    return percentiles(times)


def in_turns(
    works: dict[str, Callable[[], object]], device: str, repeats: int, calls: int | None = None
) -> dict[str, dict[str, float]]:
    """p20, p50 and p80 of one call of each, in turns, so that what slows the machine for a while slows all of them.

    On a GPU `calls` (10) are timed together, so that one is launched while the one before runs; on a CPU one alone.
    """
    calls = calls or (10 if device == "cuda" else 1)
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + WARMUP_TURNS):
        for name, work in works.items():
            start = time.perf_counter()
            for _ in range(calls):
                work()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / calls)
    return {name: percentiles(taken[WARMUP_TURNS:]) for name, taken in times.items()}


def percentiles(seconds: list[float]) -> dict[str, float]:
    return dict(zip(("p20_s", "p50_s", "p80_s"), np.percentile(seconds, (20, 50, 80)).tolist(), strict=True))


def extra_bytes(work: Callable[[], object]) -> int:
    """Most bytes that `work` holds on the GPU beyond what is there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Roofline:
    """What this machine can do at most, as measured: bytes per second of a copy, FLOP per second of a product."""

    copy: float
    product: float

    @classmethod
    def measure(cls, device: str, quick: bool = False) -> "Roofline":
        """A copy of fp32 values, read and written, and a product of random matrices: bf16 on a GPU, else fp32."""
        gpu = device == "cuda"
        elements, side = (1 << 20, 256) if quick else (1 << 28, 8192) if gpu else (1 << 26, 1024)
        source = torch.ones(elements, device=device)
        target = torch.empty_like(source)
        dtype = torch.bfloat16 if gpu else torch.float32
        # Not of zeros, on which tensor cores draw less power and run faster.
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        works = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
        # One after the other: a product heats the chip up, and its clock must have settled.
        times = {name: in_turns({name: work}, device, 3 if quick else 9)[name]["p50_s"] for name, work in works.items()}
        return cls(8 * elements / times["copy"], 2 * side**3 / times["product"])

    def floor(self, moved: float = 0.0, flop: float = 0.0) -> tuple[float, str]:
        """(least seconds for so many bytes and FLOP, what sets them: "copy" or "product")."""
        by_copy, by_product = moved / self.copy, flop / self.product
        return (by_copy, "copy") if by_copy >= by_product else (by_product, "product")


def evidence(
    stage: str,
    shape: str,
    form: str,
    seconds: dict[str, float],
    roofline: Roofline,
    *,
    moved: float = 0.0,
    flop: float = 0.0,
    items: tuple[float, str] | None = None,
    beside: tuple[str, float] | None = None,
    quality: dict[str, float | int] | None = None,
) -> dict:
    """One row of the common table.

    stage: the name under which `medmax bench` runs it. form: what was timed, such as "ours". seconds: percentiles, as
    `percentiles` gives them. moved, flop: bytes and FLOP that any form has to move and do at least; 0 is "none to
    speak of", and of both 0 the row has no share. items: (how many, of what) in that time, such as (64, "images").
    beside: (form, its p50 seconds) that `times` compares with. quality: differences from the reference, by name.
    """
    middle = seconds["p50_s"]
    floor, bound = roofline.floor(moved, flop)
    row = {
        "stage": stage,
        "shape": shape,
        "form": form,
        **{name: seconds[name] for name in ("p20_s", "p50_s", "p80_s")},
    }
    row |= {"moved_bytes": moved or None, "flop": flop or None, "floor_s": floor or None}
    row |= {"gb_per_s": moved / middle / 1e9 or None, "tflop_per_s": flop / middle / 1e12 or None}
    row |= {"share": floor / middle or None, "bound": bound if floor else None}
    row |= {"items_per_s": items[0] / middle if items else None, "unit": items[1] if items else None}
    row |= {"beside": beside[0] if beside else None, "times": beside[1] / middle if beside else None}
    return row | {"quality": quality or {}}


def environment() -> dict:
    """What the figures belong to: processor, cores, GPU, versions."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    found = {"cpu": model, "cores": len(os.sched_getaffinity(0))}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": card.name, "capability": f"{card.major}.{card.minor}"}
        found["gpu"] |= {"memory_gib": card.total_memory / 2**30, "multiprocessors": card.multi_processor_count}
    return found | {"versions": versions()}


def parse_arguments(description: str) -> argparse.Namespace:
    """The flags of a benchmark without sections: --quick (small, seconds) and --output (a JSON file)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--output", help="JSON file to write")
    return parser.parse_args()


def report(name: str, rows: list[dict], output: str | None = None, **facts) -> None:
    """Print `rows` as a table and everything as one last line of JSON; write it to `output` if given.

    facts: what else belongs to the run; `evidence`, if there is any, is a list of rows of `evidence`.
    """
    result = {"benchmark": name, **facts, "environment": environment(), "rows": rows}
    print_table(rows)
    print(json.dumps(result))
    if output:
        write_json(output, result)

"""Timing and printing shared by the benchmarks: percentiles, a table for people, JSON for programs.

Run a benchmark from the root as `PYTHONPATH=. python -m benchmarks.bench_packing`. Each one first compares what it
times with its reference: no speed without correctness.
"""

import argparse
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Collection

import numpy as np

from medmax_fast.cli import print_table
from medmax_fast.runtime import versions, write_json


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
    return dict(zip(("p20_s", "p50_s", "p80_s"), np.percentile(times, (20, 50, 80)).tolist(), strict=True))


def environment() -> dict:
    """What the figures belong to: processor, cores, versions."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "versions": versions()}


def parse_arguments(description: str, sections: Collection[str] = ()) -> argparse.Namespace:
    """The flags of every benchmark: --quick (small, seconds) and --output (a JSON file).

    sections: of a benchmark of random models that has several; adds --size and --only, a list of some of them.
    """
    parser = argparse.ArgumentParser(description=description)
    if sections:
        parser.add_argument("--size", choices=("tiny", "7b"), help="random model (default: 7b on a GPU, tiny on a CPU)")
        parser.add_argument("--only", default=",".join(sections), help="sections to run, with commas (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--output", help="JSON file to write")
    arguments = parser.parse_args()
    if sections:
        arguments.only = arguments.only.split(",")
        if unknown := set(arguments.only) - set(sections):
            parser.error(f"--only {','.join(sorted(unknown))}: expected {', '.join(sections)}")
    return arguments


def report(name: str, rows: list[dict], output: str | None = None, **facts) -> None:
    """Print `rows` as a table and everything as one last line of JSON; write it to `output` if given."""
    result = {"benchmark": name, **facts, "environment": environment(), "rows": rows}
    print_table(rows)
    print(json.dumps(result))
    if output:
        write_json(output, result)

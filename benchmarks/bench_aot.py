"""Every kernel compiled ahead of time for A100, H100/H200 and B200, with no GPU: spills, occupancy, instructions.

    PYTHONPATH=. python -m benchmarks.bench_aot [--quick] [--only 80,90,100] [--output FILE.json]

Block sizes, warps and stages are those of each capability in kernels/blocks.py. The first table sums up all variants of
a kernel, odd sizes, strides and types included, at their worst; --quick leaves it out. The second has each variant that
a 7B model launches: registers of a thread, bytes of its stack (spills: no kernel has arrays), bytes of shared memory,
programs that fit a multiprocessor, their share of its warps and what allows no more, then counts of machine
instructions, loops counted once: tensor-core ones by name, FFMA, loads and stores of global memory (`wide`: 16 bytes a
thread or more) and of shared memory, barriers, atomics, MUFU (exp, reciprocals, roots), loads and stores of the stack
(`local`). Nothing is timed.

Every kernel counts as hot: each is launched for every batch, step or token. The exit status is 1 if any variant of any
kernel spills, and the JSON names it.
"""

import argparse
import sys

from benchmarks.aot.compiler import TARGETS, compile_all
from benchmarks.aot.variants import CASES, MODEL_CASES
from benchmarks.harness import report
from medmax_fast.runtime import print_table


def worst(rows: list[dict]) -> dict:
    """All variants of one kernel on one target in one row."""
    row = {"kernel": rows[0]["kernel"], "sm": rows[0]["sm"], "variants": len(rows)}
    row |= {f"most_{name}": max(each[name] for each in rows) for name in ("registers", "stack", "local", "shared")}
    return row | {f"least_{name}": min(each[name] for each in rows) for name in ("programs", "occupancy")}


def main() -> None:
    parser = argparse.ArgumentParser(description="kernels compiled ahead of time: registers, spills, instructions")
    parser.add_argument("--quick", action="store_true", help="only what a 7B model launches")
    parser.add_argument("--only", default=",".join(map(str, TARGETS)), help="capabilities, with commas (default: all)")
    parser.add_argument("--output", help="JSON file to write")
    arguments = parser.parse_args()
    if unknown := set(arguments.only.split(",")) - {str(target) for target in TARGETS}:
        parser.error(f"--only {','.join(sorted(unknown))}: expected some of {', '.join(map(str, TARGETS))}")
    targets = [target for target in TARGETS if str(target) in arguments.only.split(",")]

    found = compile_all(targets, MODEL_CASES if arguments.quick else CASES)
    summaries = []
    if not arguments.quick:
        groups: dict[tuple, list[dict]] = {}
        for row in found.values():
            groups.setdefault((row["kernel"], row["sm"]), []).append(row)
        summaries = [worst(rows) for rows in groups.values()]
        print_table(summaries)
    spills = [name for name, row in found.items() if row["stack"] or row["local"]]
    rows = [found[f"{case}/{target}"] for case in MODEL_CASES for target in targets]
    report("aot", rows, arguments.output, compiled=len(found), spills=spills, kernels=summaries)
    if spills:
        sys.exit(f"spills: {', '.join(spills)}")


if __name__ == "__main__":
    main()

"""What the code does on a GPU, counted without one: operations, bytes, FLOP, host syncs and memory of a 7B model.

    PYTHONPATH=. python -m benchmarks.count [--only encoder,generation,training] [--output FILE.json]

The CUDA side of the code runs on fake tensors, which have shapes and no values (counting/fake_gpu.py), so nothing is
timed. Beside the floor of a stage (benchmarks/roofline.md) its bytes and FLOP say how far the code itself is from it:
what is read and written more than once, what is computed twice. product_bytes: of operations with FLOP; the others are
what products wait for. A product's operands count once, whatever the caches
do; counting/tally.py has the rules. sync: the host waits for all that was launched; wait: for an event of an earlier
step. memory: most bytes of all tensors held; the allocator's rounding and the CUDA libraries come on top.

For a torch without CUDA. g++ compiles thirty lines for it.
"""

import argparse
import sys

from benchmarks.counting.fake_gpu import fake_gpu, prepare

# FLOP that an H200 does while it moves a byte, of NVIDIA's data sheet: 989e12 over 4.8e12. Decides what bounds a stage.
BALANCE = 206
# Operations that a row names; what the table has of a row.
LARGEST = 12
SHOWN = ("stage", "shape", "operations", "moved_bytes", "product_bytes", "times_floor_bytes", "flop")
SHOWN += ("times_floor_flop", "memory_bytes", "syncs", "waits")


def row(found) -> dict:
    """One row of the result, of stages.Found."""
    count = found.count
    operations, moved, flop = (sum(part.values()) for part in (count.operations, count.moved, count.flop))
    least_moved, least_flop = found.floor
    largest = [
        {"operation": name, "times": count.operations[name], "bytes": size, "flop": count.flop[name]}
        for name, size in count.moved.most_common(LARGEST)
    ]
    return {
        "stage": found.stage,
        "shape": found.shape,
        "operations": operations,
        "moved_bytes": moved,
        "bound": "bytes" if least_moved and least_flop < BALANCE * least_moved else "FLOP",
        "product_bytes": sum(count.moved[name] for name, work in count.flop.items() if work),
        "times_floor_bytes": moved / least_moved if least_moved else None,
        "flop": flop,
        "times_floor_flop": flop / least_flop,
        "syncs": dict(count.syncs),
        "waits": dict(count.waits),
        "memory_bytes": found.memory,
        "largest": largest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="operations, bytes, FLOP and host syncs on a GPU that is not there")
    parser.add_argument("--only", default="encoder,generation,training", help="with commas (default: all)")
    parser.add_argument("--output", help="JSON file to write")
    arguments = parser.parse_args()
    prepare()
    # These look for a driver when they are imported, and find none.
    import peft  # noqa: F401

    from benchmarks.counting.stages import STAGES
    from benchmarks.harness import environment
    from medmax_fast.files import write_json
    from medmax_fast.runtime import print_table

    if unknown := set(arguments.only.split(",")) - set(STAGES):
        parser.error(f"--only {','.join(sorted(unknown))}: expected some of {', '.join(STAGES)}")
    rows = []
    for name in arguments.only.split(","):
        with fake_gpu() as tally:
            rows += map(row, STAGES[name](tally))
    for each in rows:
        print(each["stage"], each["shape"], sep=": ")
        print_table(each["largest"])
    result = {"benchmark": "count", "environment": environment(), "rows": rows}
    print_table([{name: each[name] for name in SHOWN} for each in rows])
    if arguments.output:
        write_json(arguments.output, result)


if __name__ == "__main__":
    sys.exit(main())

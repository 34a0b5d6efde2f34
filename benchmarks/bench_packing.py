"""Packing plan of one epoch: time, memory and fill against other packers and padding; shares of 8 ranks.

Length mix (assumed, after the published counts of 1.47 M rows and 1.7 G ids, a mean of 1,156): 88 % of rows hold one
image (1,026 ids) and 3 % two; text is log-normal with median 125 and sigma 0.9, cut at 1,500; bos, eot, eos.

Memory is what the process's peak rises by, in a process of its own: the planner's own and its result, not the lengths.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import parse_arguments, print_table, report, timed
from medmax_fast.data.balance import pack_costs, share_packs, share_packs_ref
from medmax_fast.data.packing import plan_epoch, plan_epoch_ref

ROOT = Path(__file__).resolve().parents[1]
CAPACITIES = (4096, 8192, 16384, 32768)
WORLD = 8
PACKS_PER_STEP = (8, 16, 64)


def row_lengths(count: int) -> np.ndarray:
    """Lengths of `count` rows of the mix, int64."""
    rng = np.random.default_rng(0)
    images = rng.choice([0, 1, 2], count, p=[0.09, 0.88, 0.03])
    text = np.minimum(rng.lognormal(np.log(125), 0.9, count), 1500).astype(np.int64)
    return images * 1026 + text + 3


def next_fit_packs(lengths: np.ndarray, capacity: int) -> int:
    """Packs when rows are taken in order and a pack is closed by the first row that does not fit."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    packs = at = 0
    while at < len(lengths):
        at = int(np.searchsorted(ends, ends[at] + capacity, side="right")) - 1
        packs += 1
    return packs


def first_fit_decreasing_packs(lengths: np.ndarray, capacity: int) -> int:
    """Packs when rows, longest first, go into the first pack that has room.

    Rows of one length are placed together: each goes where the one before went, or into a later pack.
    """
    rooms = np.empty(len(lengths), dtype=np.int64)
    packs = 0
    for length, count in zip(*(a[::-1] for a in np.unique(lengths, return_counts=True)), strict=True):
        open_packs = np.flatnonzero(rooms[:packs] >= length)
        takes = rooms[open_packs] // length
        before = np.cumsum(takes) - takes
        takes = np.clip(count - before, 0, takes)
        rooms[open_packs] -= takes * length
        left = count - int(takes.sum())
        while left > 0:
            full = left // (capacity // length)
            rooms[packs : packs + full] = capacity % length
            packs, left = packs + full, left - full * int(capacity // length)
            if left:
                rooms[packs] = capacity - left * length
                packs, left = packs + 1, 0
    return packs


def padded_share(lengths: np.ndarray, batch: int) -> float:
    """Share of ids that are not padding when batches of random rows are padded to their longest."""
    used = np.random.default_rng(1).permutation(lengths)[: len(lengths) // batch * batch].reshape(-1, batch)
    return float(used.sum() / (used.max(axis=1) * batch).sum())


def check(lengths: np.ndarray) -> None:
    """What is timed equals its specification, and first-fit decreasing its plain form."""
    for capacity in CAPACITIES:
        plan, expected = plan_epoch(lengths, capacity, 1, 2), plan_epoch_ref(lengths, capacity, 1, 2)
        assert np.array_equal(plan.rows, expected.rows) and np.array_equal(plan.offsets, expected.offsets)
        places = share_packs(plan, lengths, 2 * WORLD, WORLD)
        assert np.array_equal(places, share_packs_ref(plan, lengths, 2 * WORLD, WORLD))
        rooms: list[int] = []
        for length in sorted(lengths[:3000].tolist(), reverse=True):
            at = next((i for i, room in enumerate(rooms) if room >= length), None)
            if at is None:
                at = len(rooms)
                rooms.append(capacity)
            rooms[at] -= length
        assert len(rooms) == first_fit_decreasing_packs(lengths[:3000], capacity)


def peak_mb() -> float:
    """Peak resident memory of this process so far, in megabytes.

    From /proc: getrusage counts what the parent held when it started this process as well.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024 / 1e6


def measure(path: str, capacity: int, repeats: int) -> None:
    """Print time and memory of planning the lengths in a .npy file; run in a process of its own."""
    lengths = np.load(path)
    # The extension's own pages belong to the baseline.
    share_packs(plan_epoch(lengths[:100], capacity, 0, 0), lengths[:100], 8, 8)
    before = peak_mb()
    start = time.perf_counter()
    plan = plan_epoch(lengths, capacity, 0, 0)
    times, after_plan = [time.perf_counter() - start], peak_mb()
    share = timed(lambda: share_packs(plan, lengths, 8, 8), repeats=1, warmup=0)["p50_s"]
    facts = {"plan_mb": after_plan - before, "share_s": share, "with_share_mb": peak_mb() - before}
    if repeats > 1:
        del plan
        more = timed(lambda: plan_epoch(lengths, capacity, 0, 0), repeats=repeats - 1, warmup=0)
        times += [more["p20_s"], more["p80_s"]]
    print(json.dumps({"plan_s": float(np.median(times)), "first_plan_s": times[0], **facts}))


def planner_row(lengths: np.ndarray, capacity: int, repeats: int = 3) -> dict:
    """`measure` of these lengths in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lengths.npy"
        np.save(path, lengths)
        # At the end of the path, where it hides no installed package.
        code = f"import sys; sys.path.append({str(ROOT)!r}); from benchmarks.bench_packing import measure; "
        code += f"measure({str(path)!r}, {capacity}, {repeats})"
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        "rows": len(lengths),
        "capacity": capacity,
        **found,
        "plan_ns_per_row": found["plan_s"] / len(lengths) * 1e9,
    }


def fill_row(lengths: np.ndarray, capacity: int) -> dict:
    """Fill (ids / room) of every packer at one capacity."""
    packs = {
        "best_fit_decreasing": len(plan_epoch(lengths, capacity, 0, 0)),
        "first_fit_decreasing": first_fit_decreasing_packs(lengths, capacity),
        "next_fit": next_fit_packs(lengths, capacity),
    }
    total = float(lengths.sum())
    return {"capacity": capacity, **{name: total / (count * capacity) for name, count in packs.items()}}


def balance_rows(lengths: np.ndarray, capacity: int) -> list[dict]:
    """How even 8 ranks are, in percent: shared by cost, and dealt in the order of the plan.

    epoch: farthest rank from the mean; step and micro: what the most loaded rank has above the mean, on average and in
    the worst step. `ids` and `squares` of row lengths. The last step, which may be short, counts for the epoch only.
    """
    plan = plan_epoch(lengths, capacity, 0, 0)
    found = []
    for packs_per_step in PACKS_PER_STEP:
        shared = share_packs(plan, lengths, packs_per_step, WORLD)
        steps, _, micros = shared.shape
        costs = np.zeros((steps, packs_per_step, 2))
        costs.reshape(-1, 2)[: len(plan)] = pack_costs(plan, lengths)
        dealt = np.broadcast_to(np.arange(packs_per_step).reshape(micros, WORLD).T, shared.shape)
        for name, places in (("shared", shared), ("dealt", dealt)):
            load = costs[np.arange(steps)[:, None, None], places]
            ranks, full = load.sum(axis=(0, 2)), load[:-1]
            step = full.sum(axis=2)
            step = step.max(axis=1) / step.mean(axis=1) - 1
            micro = full.max(axis=1) / full.mean(axis=1) - 1
            row = {"capacity": capacity, "packs_per_step": packs_per_step, "order": name}
            for part, unit in enumerate(("ids", "squares")):
                row[f"epoch_{unit}"] = float(np.abs(ranks / ranks.mean(axis=0) - 1)[:, part].max() * 100)
                row[f"step_{unit}"] = float(step[:, part].mean() * 100)
                row[f"worst_step_{unit}"] = float(step[:, part].max() * 100)
                row[f"micro_{unit}"] = float(micro[..., part].mean() * 100)
            found.append(row)
    return found


def main() -> None:
    arguments = parse_arguments("packing plan: time, memory, fill, shares of ranks")
    counts = (50_000, 150_000) if arguments.quick else (1_470_000, 15_000_000)
    lengths = row_lengths(counts[0])
    small = lengths[: len(lengths) // 50]
    check(small)
    planner = [planner_row(lengths, capacity) for capacity in CAPACITIES]
    planner.append(planner_row(row_lengths(counts[1]), 16384))
    plain = timed(lambda: plan_epoch_ref(small, 16384, 0, 0), repeats=3)["p50_s"] / len(small) * 1e9
    fills = [fill_row(lengths, capacity) for capacity in CAPACITIES]
    padding = {f"batch_{n}": padded_share(lengths, n) for n in (1, 4, 8, 16)}
    print_table(fills)
    print_table([{"padded to the longest": name, "fill": share} for name, share in padding.items()])
    balance = [row for capacity in (4096, 16384) for row in balance_rows(lengths, capacity)]
    print_table(balance)
    facts = {"mean_length": float(lengths.mean()), "python_ns_per_row": plain, "fill": fills, "fill_padded": padding}
    report("packing", planner, arguments.output, **facts, world=WORLD, balance_percent=balance)


if __name__ == "__main__":
    main()

"""Packing plan of one epoch: time and fill against the plain Python form, next-fit and padding.

Length mix (assumed, after the published counts of 1.47 M rows and 1.7 G ids, a mean of 1,156): 88 % of rows hold one
image (1,026 ids) and 3 % two; text is log-normal with median 125 and sigma 0.9, cut at 1,500.
"""

import numpy as np

from benchmarks.harness import parse_arguments, report, timed
from medmax_fast.data.packing import plan_epoch, plan_epoch_ref

CAPACITIES = (4096, 8192, 16384, 32768)


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


def padded_share(lengths: np.ndarray, batch: int) -> float:
    """Share of ids that are not padding when batches of random rows are padded to their longest."""
    used = np.random.default_rng(1).permutation(lengths)[: len(lengths) // batch * batch].reshape(-1, batch)
    return float(used.sum() / (used.max(axis=1) * batch).sum())


def check(lengths: np.ndarray) -> None:
    """The plan that is timed equals its specification."""
    for capacity in CAPACITIES:
        plan, expected = plan_epoch(lengths, capacity, 1, 2), plan_epoch_ref(lengths, capacity, 1, 2)
        assert np.array_equal(plan.rows, expected.rows) and np.array_equal(plan.offsets, expected.offsets)


def main() -> None:
    arguments = parse_arguments("packing plan: time and fill")
    count = 50_000 if arguments.quick else 1_470_000
    small = row_lengths(count // 50)
    check(small)
    lengths = row_lengths(count)
    rows = []
    for capacity in CAPACITIES:
        packs = len(plan_epoch(lengths, capacity, 0, 0))
        plain = timed(lambda c=capacity: plan_epoch_ref(small, c, 0, 0), repeats=3)
        native = timed(lambda c=capacity: plan_epoch(lengths, c, 0, 0), repeats=7)
        rows.append(
            {
                "capacity": capacity,
                "rows": count,
                **native,
                "ns_per_row": native["p50_s"] / count * 1e9,
                "python_ns_per_row": plain["p50_s"] / len(small) * 1e9,
                "fill": float(lengths.sum() / (packs * capacity)),
                "fill_next_fit": float(lengths.sum() / (next_fit_packs(lengths, capacity) * capacity)),
            }
        )
    padding = {f"batch_{n}": padded_share(lengths, n) for n in (4, 8, 16)}
    report("packing", rows, arguments.output, mean_length=float(lengths.mean()), fill_padded=padding)


if __name__ == "__main__":
    main()

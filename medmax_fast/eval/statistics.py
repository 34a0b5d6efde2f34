"""Errors, intervals and tests for scores in which several questions are asked about one image.

Answers about one image are alike, so questions are not independent and the usual error of a mean is too small. Here
the image is the unit: errors are cluster-robust, the bootstrap draws images with all their questions, and a test
between two runs flips an image as a whole. Which interval:

- bootstrap (percentiles) where 50 or more images bear the result: for right and wrong answers 50 with right ones and
  50 with wrong ones, for other values 50 in all. Images are counted by weight (see `_weight`), so that a few with
  many questions do not pass for many.
- Wilson at an effective number of questions for right and wrong answers otherwise. It is never empty, even where
  everything is right. The effect of clustering is itself poorly known from few images and is enlarged for that, up to
  what it would be if all answers about an image were the same.
- t for other values otherwise.

The rule and the 50 come from simulation. From 20 images on, with up to some ten questions each, accuracies of 0.5 to
0.98 and correlations up to 0.4 within an image, 92 to 98 % of the intervals hold the truth, with few exceptions; the
interval for independent questions held it in 82 % on average. With fewer images, where every right answer moves the
mean a lot, it varies more, as Wilson's does for independent answers, and where a few images have most of the questions
it can fall to 88 %. All is deterministic; the order of the questions plays no part but for rounding.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

# 97.5 % quantile of the normal distribution.
Z95 = 1.959963984540054
ENOUGH_IMAGES = 50
REPLICATES = 5000
FLIPS = 20_000
# With this many images there are fewer flips in all than FLIPS, and all are tried.
EXACT_IMAGES = 14
SEED = 0
# Most array elements at a time, so that memory does not grow with the number of images.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Estimate:
    """Mean of n questions about `images` images, its two errors, and its 95 % interval.

    stderr takes the questions as independent, as published; stderr_clustered does not. method: bootstrap, wilson or t;
    None with low and high where there is too little for an interval (values other than 0 and 1 of a single image).
    """

    mean: float
    n: int
    images: int
    stderr: float | None
    stderr_clustered: float | None
    low: float | None
    high: float | None
    method: str | None


@dataclass(frozen=True)
class Paired:
    """Mean difference between two runs on the same n questions, its 95 % interval (None for one image), two-sided p."""

    difference: float
    low: float | None
    high: float | None
    p_value: float
    n: int
    images: int


def plain_mean(values: Sequence[float]) -> float:
    """The published Average: every task counts the same, whatever its number of questions."""
    assert len(values)
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard deviation (ddof 1) over sqrt(n), the published error; None below n = 2."""
    if len(values) < 2:
        return None
    return float(np.std(np.asarray(values, float), ddof=1) / math.sqrt(len(values)))


def clustered_error(values: Sequence[float], clusters: Sequence[str]) -> float | None:
    """Standard error of a mean whose values are independent between clusters only; None below two clusters.

    sqrt(G / (G - 1) * sum over the G clusters of (sum of value - mean)^2) / n: the error of a ratio of totals over
    clusters (Cochran, Sampling Techniques, chapter 2). One value per cluster makes it the standard error.
    """
    return _clustered_error(*_per_image(values, clusters))


def wilson(correct: float, n: float) -> list[float]:
    """Wilson 95 % interval [low, high] of a share, as fractions; it stays inside 0..1 and is not empty at 0 or n.

    n may be an effective number of questions, and neither need be whole.
    """
    assert 0 <= correct <= n and n > 0
    share, z2 = correct / n, Z95 * Z95
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the formula gives exactly 0 or 1; rounding must not.
    return [0.0 if correct == 0 else middle - half, 1.0 if correct == n else middle + half]


@functools.cache
def t_quantile(df: int) -> float:
    """97.5 % quantile of Student's t with df >= 1 degrees of freedom.

    With t = sqrt(df) tan(angle) the probability between -t and t is a finite sum for whole df (Abramowitz and Stegun,
    Handbook of Mathematical Functions, 26.7.3 and 26.7.4); the angle is found by bisection.
    """
    assert df >= 1
    odd = df % 2

    def inside(angle: float) -> float:
        term, total = math.cos(angle) if odd else 1.0, 0.0
        for k in range(2 + odd, df + 1, 2):
            total += term
            term *= (k - 1) / k * math.cos(angle) ** 2
        total *= math.sin(angle)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return math.sqrt(df) * math.tan(low)


def estimate(
    values: Sequence[float], clusters: Sequence[str], binary: bool, _replicates: int = REPLICATES
) -> Estimate | None:
    """Mean of finite values with its errors and 95 % interval; None for no values.

    clusters: for every value the name of its image. binary: the values are 0 and 1, and the interval stays in 0..1.
    """
    if not len(values):
        return None
    sums, sizes = _per_image(values, clusters)
    assert not binary or set(values) <= {0, 1}
    mean, error = float(sums.sum() / sizes.sum()), _clustered_error(sums, sizes)
    low, high, method = _interval(sums, sizes, binary, _replicates)
    return Estimate(mean, len(values), len(sums), standard_error(values), error, low, high, method)


def paired_test(first: Sequence[float], second: Sequence[float], clusters: Sequence[str]) -> Paired:
    """Difference mean(second - first) of two runs on the same questions, and whether it is more than chance.

    first, second: a finite value per question. The test is a sign-flip permutation test with images as units: without
    a difference between the runs, all differences about an image are as likely with the other sign. All flips are
    tried where at most 14 images differ, else 20,000 random ones, the observed one counted among them. The interval is
    the bootstrap's, or t where few images differ; where none does it is 0 to 0 and says little, as p = 1 does.
    """
    assert len(first) == len(second) > 0
    sums, sizes = _per_image(np.subtract(second, first, dtype=float), clusters)
    return _paired(sums[None], sizes[None])


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p-values (1979): each to be held against the level for the whole family; None stays None."""
    adjusted, reached = list(p_values), 0.0
    ordered = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    for rank, (p, place) in enumerate(ordered):
        reached = max(reached, min(1.0, (len(ordered) - rank) * p))
        adjusted[place] = reached
    return adjusted


def compare_runs(first: list[dict], second: list[dict], protocol: str) -> list[dict]:
    """Rows {task, difference, low, high, p_value, n, images} between the samples of two runs, matched by id and image.

    first, second: rows of samples.jsonl. A question counts where both runs have a score under `protocol`, and a task
    where it has such a question. With more than one accuracy task the last row is the difference of their plain mean;
    an image that several tasks share is one unit there. p-values are not corrected: see `holm`.
    """
    # Two data sets may share questions and not the pictures that these are about.
    others = {(row["id"], row["cluster"]): row["scores"][protocol] for row in second}
    pairs: dict[str, list[tuple[float, str]]] = {}
    for row in first:
        before, after = row["scores"][protocol], others.get((row["id"], row["cluster"]))
        if before is not None and after is not None:
            pairs.setdefault(row["task"], []).append((after - before, row["cluster"]))
    metrics = {row["task"]: row["metric"] for row in first}
    accuracy = [task for task in pairs if metrics[task] == "accuracy"]
    groups = {task: [task] for task in pairs}
    if len(accuracy) > 1:
        groups[f"mean of {len(accuracy)} tasks"] = accuracy
    rows = []
    for name, tasks in groups.items():
        row = {"task": name, **asdict(_paired_tasks([pairs[task] for task in tasks]))}
        if tasks[0] in accuracy and row["low"] is not None:
            # Accuracies cannot differ by more than 1, which t does not know.
            row["low"], row["high"] = max(row["low"], -1.0), min(row["high"], 1.0)
        rows.append(row)
    return rows


def _paired_tasks(tasks: list[list[tuple[float, str]]]) -> Paired:
    """Paired over one or more tasks, each a list of (difference, image)."""
    names = sorted({image for pairs in tasks for _, image in pairs})
    # Every image of any task gets a column in every task: an empty one where the task does not have it.
    place = {name: column for column, name in enumerate(names)}
    sums, sizes = np.zeros((2, len(tasks), len(names)))
    for row, pairs in enumerate(tasks):
        for difference, image in pairs:
            sums[row, place[image]] += difference
            sizes[row, place[image]] += 1
    return _paired(sums, sizes)


def _paired(sums: np.ndarray, sizes: np.ndarray) -> Paired:
    """Paired of the plain mean over tasks; sums of differences and numbers of questions are float [tasks, images]."""
    tasks, images = sums.shape
    totals = sizes.sum(1, keepdims=True)
    means = sums.sum(1, keepdims=True) / totals
    shares = (sums / totals).sum(0) / tasks
    difference = float(shares.sum())
    # One value per image, with the same mean and the same clustered error: the mean of ratios made linear. Resampling
    # the ratios themselves could leave a small task without any image.
    values = images * ((sums - means * sizes) / totals).sum(0) / tasks + difference
    low, high, _ = _interval(values, np.ones(images), False, REPLICATES, weight=_weight(np.abs(shares)))
    return Paired(difference, low, high, _flip_test(shares), int(totals.sum()), images)


def _flip_test(shares: np.ndarray) -> float:
    """Two-sided p of |sum of shares| among all ways, or FLIPS random ways, to give every share a sign."""
    size = np.abs(shares).sum()
    # Differences that cancel within an image, and sums that tie with the observed one, do so up to rounding.
    shares, least = shares[np.abs(shares) > 1e-12 * size], abs(shares.sum()) - 1e-9 * size
    count = len(shares)
    if count <= EXACT_IMAGES:
        up = np.arange(2**count)[:, None] >> np.arange(count) & 1
        return float(np.mean(np.abs((2.0 * up - 1) @ shares) >= least))
    rng, hits, step = np.random.default_rng(SEED), 0, max(1, _CHUNK // count)
    for start in range(0, FLIPS, step):
        rows = min(step, FLIPS - start)
        bits = np.frombuffer(rng.bytes(-(-rows * count // 8)), np.uint8)
        up = np.unpackbits(bits, count=rows * count).reshape(rows, count)
        hits += np.count_nonzero(np.abs((2.0 * up - 1) @ shares) >= least)
    return float((hits + 1) / (FLIPS + 1))


def _per_image(values: Sequence[float] | np.ndarray, clusters: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of every image, float [images] each, images in order of their names."""
    values = np.asarray(values, float)
    assert len(values) == len(clusters) and np.isfinite(values).all()
    place = {name: row for row, name in enumerate(sorted(set(clusters)))}
    rows = np.fromiter((place[name] for name in clusters), np.intp, len(clusters))
    return np.bincount(rows, values, len(place)), np.bincount(rows, minlength=len(place)).astype(float)


def _clustered_error(sums: np.ndarray, sizes: np.ndarray) -> float | None:
    images, n = len(sums), sizes.sum()
    if images < 2:
        return None
    return float(math.sqrt(images / (images - 1) * np.sum((sums - sums.sum() / n * sizes) ** 2)) / n)


def _weight(parts: np.ndarray) -> float:
    """How many equal parts would be as uneven a basis as these, all >= 0: Kish's effective number; 0 for nothing."""
    squares = float(np.sum(parts**2))
    return float(parts.sum()) ** 2 / squares if squares else 0.0


def _interval(
    sums: np.ndarray, sizes: np.ndarray, binary: bool, replicates: int, weight: float | None = None
) -> tuple[float | None, float | None, str | None]:
    """(low, high, method) of the mean of values given per image; weight: of the images that bear it, where known."""
    mean = float(sums.sum() / sizes.sum())
    if weight is None:
        weight = min(_weight(sums), _weight(sizes - sums)) if binary else _weight(sizes)
    if weight >= ENOUGH_IMAGES:
        low, high = _bootstrap(sums, sizes, replicates)
        return min(low, mean), max(high, mean), "bootstrap"
    quantile = t_quantile(max(1, math.floor(weight + 1e-9) - 1))
    if binary:
        n = _effective_n(sums, sizes, quantile)
        low, high = wilson(mean * n, n)
        return low, high, "wilson"
    error = _clustered_error(sums, sizes)
    if error is None:
        return None, None, None
    return mean - quantile * error, mean + quantile * error, "t"


def _effective_n(sums: np.ndarray, sizes: np.ndarray, quantile: float) -> float:
    """How many independent right or wrong answers would be as good as these; quantile: of t, for the images there are.

    The loss by clustering (design effect) is the clustered variance over that of independent answers. Few images tell
    it poorly, and too small a loss does harm, so its excess over 1 grows by (t / z)^2, the factor of Korn and Graubard
    (1998), but not beyond Kish's sum of squares of the sizes over n, the loss if all answers about an image agree.
    """
    n, images, mean = sizes.sum(), len(sizes), sums.sum() / sizes.sum()
    error = _clustered_error(sums, sizes)
    if mean in (0, 1) or error is None:
        return float(images)
    loss = error**2 / (mean * (1 - mean) / (n - 1))
    enlarged = 1 + (loss - 1) * (quantile / Z95) ** 2
    return float(n / max(1.0, loss, min(enlarged, np.sum(sizes**2) / n)))


def _bootstrap(sums: np.ndarray, sizes: np.ndarray, replicates: int) -> tuple[float, float]:
    """Percentiles of the mean over `replicates` samples of images, drawn with replacement, with all their questions."""
    rng, images = np.random.default_rng(SEED), len(sums)
    means, step = np.empty(replicates), max(1, _CHUNK // images)
    for start in range(0, replicates, step):
        drawn = rng.integers(0, images, (min(step, replicates - start), images))
        means[start : start + step] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)

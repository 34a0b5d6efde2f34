"""Errors, intervals and tests against scipy, brute force, hand-computed cases, and simulations of what they promise."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medmax_fast.eval import statistics
from medmax_fast.eval.statistics import (
    clustered_error,
    compare_runs,
    estimate,
    holm,
    paired_test,
    plain_mean,
    standard_error,
    t_quantile,
    wilson,
)


def _names(index) -> list[str]:
    return [f"image-{i}" for i in index]


def _binary(rng, images, share, alike, repeats=1, mean_size=4):
    """Right answers and questions per image, [repeats, images]: beta-binomial, geometric sizes, correlation `alike`."""
    sizes = rng.geometric(1 / mean_size, (repeats, images))
    each = rng.beta(share * (1 / alike - 1), (1 - share) * (1 / alike - 1), (repeats, images))
    return rng.binomial(sizes, each).astype(float), sizes.astype(float)


# ---- errors ----


def test_standard_error_is_that_of_numpy_and_scipy():
    rng = np.random.default_rng()
    for scores in ([1, 0], [1, 1, 0, 1, 0], [0, 0, 0], [1] * 7, [1] + [0] * 99, rng.normal(size=50).tolist()):
        assert standard_error(scores) == pytest.approx(np.std(scores, ddof=1) / np.sqrt(len(scores)), abs=1e-15)
        assert standard_error(scores) == pytest.approx(stats.sem(scores), abs=1e-15)
    assert standard_error([1]) is None and standard_error([]) is None


def test_clustered_error_by_hand():
    # Mean 3/5; sums of deviations 2 - 2 * 0.6 = 0.8, 0 - 0.6, 1 - 2 * 0.6 = -0.2; squares 0.64 + 0.36 + 0.04 = 1.04.
    values, clusters = [1, 1, 0, 1, 0], ["a", "a", "b", "c", "c"]
    assert clustered_error(values, clusters) == pytest.approx(math.sqrt(3 / 2 * 1.04) / 5, abs=1e-15)
    assert clustered_error([1, 0], ["a", "a"]) is None and clustered_error([1], ["a"]) is None


def test_clustered_error_of_single_questions_is_the_standard_error():
    rng = np.random.default_rng()
    for values in (rng.normal(size=40), rng.integers(0, 2, 300)):
        assert abs(clustered_error(values, _names(range(len(values)))) - standard_error(values)) < 1e-12


def test_clustered_error_is_brute_force_and_sees_copies():
    rng = np.random.default_rng()
    values, index = rng.normal(size=200), rng.integers(0, 30, 200)
    mean = values.mean()
    squares = sum(sum(values[i] - mean for i in range(200) if index[i] == g) ** 2 for g in set(index))
    images = len(set(index))
    expected = math.sqrt(images / (images - 1) * squares) / 200
    assert clustered_error(values, _names(index)) == pytest.approx(expected, rel=1e-12)
    # Every question asked three times tells nothing new.
    single = values[:50]
    thrice = clustered_error(np.repeat(single, 3), _names(np.repeat(range(50), 3)))
    assert thrice == pytest.approx(standard_error(single), rel=1e-12)


def test_plain_mean_counts_every_task_once():
    assert plain_mean([0.1] * 10) == 0.1 and plain_mean([0.25, 0.75, 0.5]) == 0.5


# ---- quantiles and Wilson ----


def test_t_quantile_is_that_of_scipy():
    for df in [*range(1, 60), 99, 100, 857, 5000]:
        assert t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-9), df


def test_wilson_interval_by_hand():
    # 8 of 10: centre (0.8 + 1.9207/10) / (1 + 3.8415/10), half width 1.96 sqrt(0.016 + 0.0096) / 1.38415.
    assert wilson(8, 10) == pytest.approx([0.490162, 0.943318], abs=1e-6)
    assert wilson(0, 10) == pytest.approx([0.0, 0.277533], abs=1e-6)
    assert wilson(10, 10)[1] == 1.0


def test_wilson_interval_is_that_of_scipy_and_takes_fractions():
    for correct, n in ((0, 3), (1, 1), (17, 40), (399, 400)):
        expected = stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
        assert wilson(correct, n) == pytest.approx([expected.low, expected.high], abs=1e-9)
    # Both ends solve (p - share)^2 = z^2 p (1 - p) / n for any n.
    for end in wilson(6.3, 8.4):
        assert (end - 0.75) ** 2 == pytest.approx(statistics.Z95**2 * end * (1 - end) / 8.4, rel=1e-9)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share_and_stays_inside(n, data):
    correct = data.draw(st.integers(0, n))
    low, high = wilson(correct, n)
    assert 0 <= low <= correct / n <= high <= 1 and low < high


def test_wilson_covers_about_95_percent():
    rng = np.random.default_rng(0)
    for share, n in ((0.5, 30), (0.9, 60), (0.2, 100)):
        draws = rng.binomial(n, share, 4000)
        low, high = np.array([wilson(int(k), n) for k in draws]).T
        assert 0.93 < np.mean((low <= share) & (share <= high)) < 0.98


# ---- estimates ----


def test_methods_and_edges():
    assert estimate([], [], True) is None
    one = estimate([0.5], ["a"], False)
    assert (one.mean, one.n, one.images, one.stderr, one.stderr_clustered) == (0.5, 1, 1, None, None)
    assert (one.low, one.high, one.method) == (None, None, None)
    # One image, right and wrong: as good as one question.
    mixed = estimate([1, 0, 1, 1], ["a"] * 4, True)
    assert [mixed.low, mixed.high] == wilson(0.75, 1) and mixed.method == "wilson"
    # All right or all wrong: as good as one question per image.
    index = np.repeat(range(6), 5)
    right, wrong = estimate(np.ones(30), _names(index), True), estimate(np.zeros(30), _names(index), True)
    assert [right.low, right.high] == wilson(6, 6) and [wrong.low, wrong.high] == wilson(0, 6)
    assert estimate(np.arange(12) % 3, _names(range(12)), False).method == "t"
    # Fifty images bear it, or 49.
    for images, method in ((100, "bootstrap"), (98, "wilson")):
        assert estimate(np.arange(images) % 2, _names(range(images)), True).method == method
    # Two hundred images, nearly all right; and a hundred of which one has most of the questions.
    assert estimate(np.arange(200) > 9, _names(range(200)), True).method == "wilson"
    heavy = _names([*range(100), *[0] * 900])
    assert estimate(np.random.default_rng().normal(size=1000), heavy, False).method == "t"


def test_wilson_without_clustering_is_the_plain_one():
    result = estimate([1] * 31 + [0] * 5, _names(range(36)), True)
    assert [result.low, result.high] == pytest.approx(wilson(31, 36), abs=1e-12)
    assert result.stderr == pytest.approx(result.stderr_clustered, abs=1e-12)


def test_wilson_by_hand_with_clustering():
    # Eight images of four questions; answers about one image agree, six right and two wrong: as good as eight.
    values, index = np.repeat([1, 1, 1, 1, 1, 1, 0, 0], 4), np.repeat(range(8), 4)
    result = estimate(values, _names(index), True)
    n = statistics._effective_n(*statistics._per_image(values, _names(index)), t_quantile(1))
    # Loss: clustered variance 8/7 * (6 * 1 + 2 * 9) / 32^2 = 3/112, over 0.75 * 0.25 / 31, is 4.43, above Kish's 4.
    assert n == pytest.approx(32 / (3 / 112 / (0.1875 / 31)), rel=1e-12)
    assert [result.low, result.high] == pytest.approx(wilson(0.75 * n, n), abs=1e-12)
    # Answers that differ within every image as much as can be lose nothing.
    spread = estimate([1, 0] * 8, _names(np.repeat(range(8), 2)), True)
    assert [spread.low, spread.high] == wilson(8, 16) and spread.stderr_clustered == 0


def test_a_loss_by_clustering_known_from_few_images_is_enlarged():
    # Forty images of ten questions, six of them with three wrong answers: t has 6 - 1 degrees of freedom. The clustered
    # variance is 40/39 * (34 * 0.45^2 + 6 * 2.55^2) / 400^2, that of independent answers 0.955 * 0.045 / 399.
    values = [float(image >= 6 or question >= 3) for image in range(40) for question in range(10)]
    result = estimate(values, _names(np.repeat(range(40), 10)), True)
    loss = 40 / 39 * (34 * 0.45**2 + 6 * 2.55**2) / 400**2 / (0.955 * 0.045 / 399)
    n = 400 / (1 + (loss - 1) * (stats.t.ppf(0.975, 5) / stats.norm.ppf(0.975)) ** 2)
    assert 40 < n < 400 / loss
    assert [result.low, result.high] == pytest.approx(wilson(0.955 * n, n), abs=1e-9)


def test_t_interval_is_that_of_scipy():
    values = np.random.default_rng().normal(size=20)
    result = estimate(values, _names(range(20)), False)
    expected = stats.t.interval(0.95, 19, loc=values.mean(), scale=stats.sem(values))
    assert [result.low, result.high] == pytest.approx(list(expected), rel=1e-9)


def test_bootstrap_is_that_of_scipy():
    sums, sizes = (part[0] for part in _binary(np.random.default_rng(), 300, 0.7, 0.3))
    low, high, method = statistics._interval(sums, sizes, True, 5000)
    ratio = stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        n_resamples=5000,
        method="percentile",
        vectorized=True,
    ).confidence_interval
    assert method == "bootstrap"
    # The ends of two bootstraps of 5,000 differ by a few percent of the width.
    assert [low, high] == pytest.approx([ratio.low, ratio.high], abs=0.1 * (ratio.high - ratio.low))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=60), st.booleans())
def test_an_interval_of_accuracies_holds_the_mean_and_stays_inside(answers, many):
    answers = [(f"{copy}-{image}", right) for copy in range(40 if many else 1) for image, right in answers]
    values, clusters = [float(right) for _, right in answers], [image for image, _ in answers]
    result = estimate(values, clusters, True, _replicates=200)
    assert 0 <= result.low <= result.mean <= result.high <= 1
    assert result == estimate(values, clusters, True, _replicates=200)
    # The order of the rows does not matter.
    back = estimate(values[::-1], clusters[::-1], True, _replicates=200)
    assert [back.low, back.high] == pytest.approx([result.low, result.high], abs=1e-12) and back.method == result.method


def test_estimating_a_large_task_takes_under_a_second():
    rng = np.random.default_rng()
    index, values = np.sort(rng.integers(0, 860, 6700)), rng.integers(0, 2, 6700).tolist()
    # Of this thread, whatever else the machine does.
    start = time.thread_time()
    assert estimate(values, _names(index), True).method == "bootstrap"
    assert time.thread_time() - start < 1


# ---- coverage ----


@pytest.mark.parametrize("images, share, alike", [*itertools.product((30, 60, 200), (0.6, 0.9, 0.95), (0.1, 0.3))])
def test_intervals_of_clustered_answers_cover_and_the_naive_one_does_not(images, share, alike):
    rng = np.random.default_rng([images, round(100 * share), round(100 * alike)])
    sums, sizes = _binary(rng, images, share, alike, repeats=800)
    found = [statistics._interval(right, asked, True, 400) for right, asked in zip(sums, sizes, strict=True)]
    covered = np.mean([low <= share <= high for low, high, _ in found])
    assert 0.925 <= covered <= 0.985
    n = sizes.sum(1)
    mean = sums.sum(1) / n
    naive = np.mean(np.abs(mean - share) <= statistics.Z95 * np.sqrt(mean * (1 - mean) / (n - 1)))
    assert naive < 0.91 and covered - naive > 0.04


def test_both_methods_for_answers_are_reached_and_cover():
    for images, share, alike, expected in ((40, 0.9, 0.2, "wilson"), (400, 0.6, 0.2, "bootstrap")):
        sums, sizes = _binary(np.random.default_rng(images), images, share, alike, repeats=600)
        found = [statistics._interval(right, asked, True, 400) for right, asked in zip(sums, sizes, strict=True)]
        assert {method for *_, method in found} == {expected}
        assert 0.925 <= np.mean([low <= share <= high for low, high, _ in found]) <= 0.985


@pytest.mark.parametrize("images, method", [(8, "t"), (30, "t"), (150, "bootstrap")])
@pytest.mark.parametrize("alike", [0.1, 0.5])
def test_intervals_of_clustered_measures_cover_and_the_naive_one_does_not(images, method, alike):
    rng = np.random.default_rng([images, round(10 * alike)])
    covered, naive = [], []
    for _ in range(800):
        sizes = rng.geometric(0.25, images)
        index = np.repeat(np.arange(images), sizes)
        own, shared = rng.normal(size=len(index)), rng.normal(size=images)[index]
        values = 0.3 + 0.1 * (math.sqrt(alike) * shared + math.sqrt(1 - alike) * own)
        low, high, found = statistics._interval(np.bincount(index, values), sizes.astype(float), False, 400)
        assert found == method
        covered.append(low <= 0.3 <= high)
        naive.append(abs(values.mean() - 0.3) <= statistics.Z95 * standard_error(values))
    assert 0.925 <= np.mean(covered) <= 0.985
    assert np.mean(naive) < 0.91 and np.mean(covered) - np.mean(naive) > 0.04


# ---- paired tests ----


def _flips(first, second, clusters) -> float:
    """The exact p by brute force."""
    differences = np.subtract(second, first)
    images = sorted(set(clusters))
    sums = [sum(d for d, c in zip(differences, clusters, strict=True) if c == image) for image in images]
    signs = itertools.product((1, -1), repeat=len(sums))
    return float(np.mean([abs(np.dot(way, sums)) >= abs(sum(sums)) - 1e-9 for way in signs]))


def test_paired_by_hand():
    # Sums per image +2, +1, -1, 0: of the 8 ways to sign 2, 1, 1 six reach |2|.
    first, second = [0, 0, 0, 1, 1], [1, 1, 1, 0, 1]
    result = paired_test(first, second, ["a", "a", "b", "c", "d"])
    assert (result.difference, result.p_value, result.n, result.images) == (pytest.approx(0.4), 0.75, 5, 4)
    # Five images, all better: 2 of 32 ways.
    assert paired_test([0] * 5, [1] * 5, list("abcde")).p_value == 2 / 32
    # The same five questions about one image say nothing.
    one = paired_test([0] * 5, [1] * 5, ["a"] * 5)
    assert (one.difference, one.p_value, one.low, one.high) == (1, 1, None, None)


def test_no_difference_gives_p_1():
    same = paired_test([1, 0, 0.3], [1, 0, 0.3], ["a", "b", "c"])
    assert (same.difference, same.p_value, same.low, same.high) == (0, 1, 0, 0)
    # Differences that cancel within the images, up to rounding.
    assert paired_test([0, 0, 0], [0.1, 0.2, -0.3], ["a", "a", "a"]).p_value == 1


def test_the_exact_test_is_brute_force():
    rng = np.random.default_rng()
    for _ in range(20):
        index = rng.integers(0, 7, 25)
        first, second = rng.integers(0, 2, (2, 25))
        assert paired_test(first, second, _names(index)).p_value == pytest.approx(_flips(first, second, _names(index)))


def test_random_flips_agree_with_all_of_them(monkeypatch):
    rng = np.random.default_rng(3)
    first, second = np.zeros(14), rng.normal(0.4, 1, 14)
    exact = paired_test(first, second, _names(range(14)))
    expected = stats.permutation_test(
        (second,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    ).pvalue
    assert exact.p_value == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(statistics, "EXACT_IMAGES", 5)
    sampled = paired_test(first, second, _names(range(14)))
    assert sampled.p_value != exact.p_value and abs(sampled.p_value - exact.p_value) < 0.015
    assert sampled == paired_test(first, second, _names(range(14)))


def test_random_flips_never_give_p_0_and_go_by_chunks(monkeypatch):
    first, second = np.zeros(400), np.ones(400)
    assert paired_test(first, second, _names(range(400))).p_value == 1 / 20_001
    second = np.random.default_rng(5).normal(0.1, 1, 400)
    whole = paired_test(first, second, _names(range(400)))
    # Random bits that are not a multiple of bytes at a time.
    monkeypatch.setattr(statistics, "_CHUNK", 4001)
    chunked = paired_test(first, second, _names(range(400)))
    assert chunked.p_value == pytest.approx(whole.p_value, abs=0.02)
    assert whole.p_value == pytest.approx(2 * stats.norm.sf(abs(second.sum()) / np.sqrt(np.sum(second**2))), abs=0.02)
    assert (chunked.difference, chunked.n) == (whole.difference, whole.n)
    # The interval is the bootstrap's in either case, drawn in other chunks.
    assert [chunked.low, chunked.high] == pytest.approx([whole.low, whole.high], abs=0.01)


def _two_runs(rng, images, turned=0.0):
    """Answers of two runs about clustered questions; the second has all right for a share `turned` of the images."""
    index = np.repeat(np.arange(images), rng.geometric(0.25, images))
    skill, again = rng.beta(2, 1.5, (2, images))
    first, second = rng.random((2, len(index))) < np.array([skill, again])[:, index]
    return index, first * 1.0, (second | (rng.random(images) < turned)[index]) * 1.0


def test_false_positives_power_and_interval_of_the_paired_test(monkeypatch):
    monkeypatch.setattr(statistics, "FLIPS", 400)
    monkeypatch.setattr(statistics, "REPLICATES", 300)
    found = {}
    for images, turned in ((12, 0.0), (80, 0.0), (80, 0.2), (80, 0.6)):
        rng = np.random.default_rng([images, round(100 * turned)])
        truth, results, naive = turned * 1.5 / 3.5, [], []
        for _ in range(600):
            index, first, second = _two_runs(rng, images, turned)
            results.append(paired_test(first, second, _names(index)))
            differences = second - first
            naive.append(abs(differences.mean()) > statistics.Z95 * standard_error(differences))
        p = np.array([result.p_value for result in results])
        found[images, turned] = np.mean(p <= 0.05)
        assert 0.92 <= np.mean([result.low <= truth <= result.high for result in results]) <= 0.99
        if not turned:
            assert found[images, turned] <= 0.06
            # Questions taken as independent find differences that are not there.
            assert np.mean(naive) > 0.15
        if (images, turned) == (80, 0.0):
            assert np.abs(np.quantile(p, np.arange(0.1, 1, 0.1)) - np.arange(0.1, 1, 0.1)).max() < 0.06
    assert found[80, 0.6] > 0.9 and found[80, 0.0] + 0.1 < found[80, 0.2] < found[80, 0.6] - 0.2, found


# ---- several tests ----


def test_holm_by_hand():
    # 0.01 * 4; 0.02 * 3; 0.03 * 2, not below its predecessor; 0.5 * 1.
    assert holm([0.03, 0.01, None, 0.5, 0.02]) == [0.06, 0.04, None, 0.5, 0.06]
    assert holm([0.4, 0.6, 0.5]) == [1.0, 1.0, 1.0]
    assert holm([]) == [] and holm([None]) == [None] and holm([0.2]) == [0.2]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_its_definition(p_values):
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    expected = np.empty(len(p_values))
    expected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    adjusted = holm(p_values)
    assert adjusted == pytest.approx(expected.tolist(), abs=1e-15)
    # Rejecting where the adjusted value is at most 0.05 is stepping down until one fails.
    rejected = set()
    for rank, place in enumerate(order):
        if steps[rank] > 0.05:
            break
        rejected.add(place)
    assert {place for place, p in enumerate(adjusted) if p <= 0.05} == rejected


# ---- two runs ----


def _row(task, number, score, image, strict=0.0):
    return {
        "id": f"{task}-{number}",
        "task": task,
        "metric": "relative_score" if task.startswith("mm_out") else "accuracy",
        "scores": {"medmax-v1": score, "strict": strict},
        "cluster": image,
    }


def test_runs_are_compared_by_id_and_task():
    first = [
        _row("b_open", 0, 0, "x"),
        _row("b_open", 1, 1, "y"),
        _row("b_open", 2, None, "z"),
        _row("a_closed", 0, 0, "x"),
        _row("mm_out_open", 0, 0.4, "x"),
        _row("b_open", 9, 1, "x"),
        _row("c_mcq", 0, None, "w"),
        _row("only_first_mcq", 0, 1, "w"),
    ]
    second = [
        _row("mm_out_open", 0, 0.9, "x"),
        # The same id about another image is another question.
        _row("b_open", 9, 0, "another"),
        _row("c_mcq", 0, 1, "w"),
        _row("a_closed", 0, 1, "x"),
        _row("b_open", 2, 1, "z"),
        _row("b_open", 1, 1, "y"),
        _row("b_open", 0, 1, "x"),
    ]
    rows = {row["task"]: row for row in compare_runs(first, second, "medmax-v1")}
    assert list(rows) == ["b_open", "a_closed", "mm_out_open", "mean of 2 tasks"]
    assert list(rows["b_open"]) == ["task", "difference", "low", "high", "p_value", "n", "images"]
    assert (rows["b_open"]["difference"], rows["b_open"]["n"], rows["b_open"]["images"]) == (0.5, 2, 2)
    assert rows["mm_out_open"]["difference"] == pytest.approx(0.5)
    # Only image x differs anywhere: one unit, no evidence. (1/2 + 1) / 2, and an interval inside -1..1.
    mean = rows["mean of 2 tasks"]
    assert (mean["difference"], mean["p_value"], mean["n"], mean["images"]) == (0.75, 1, 3, 2)
    assert -1 <= mean["low"] < 0.75 < mean["high"] <= 1
    assert {row["difference"] for row in compare_runs(first, second, "strict")} == {0}
    assert compare_runs(first, [], "strict") == []
    # A single accuracy task has no mean.
    assert [row["task"] for row in compare_runs(first[:2], second, "medmax-v1")] == ["b_open"]


def test_a_row_of_a_comparison_is_the_paired_test():
    rng = np.random.default_rng()
    index, before, after = _two_runs(rng, 120, 0.1)
    runs = [[_row("a_mcq", i, s, f"image-{index[i]}") for i, s in enumerate(run)] for run in (before, after)]
    (row,) = compare_runs(*runs, "medmax-v1")
    result = paired_test(before, after, _names(index))
    expected = [result.difference, result.low, result.high, result.p_value]
    assert [row[name] for name in ("difference", "low", "high", "p_value")] == pytest.approx(expected, abs=1e-12)
    assert row["difference"] == pytest.approx(np.mean(after - before))


def test_the_mean_of_tasks_weighs_tasks_alike_and_flips_images_jointly():
    rng = np.random.default_rng()
    first, second, per_image, means = [], [], {}, []
    counts = {"a_open": 9, "b_closed": 30, "c_mcq": 4}
    for task, n in counts.items():
        differences = []
        for number in range(n):
            image, before, after = f"image-{rng.integers(0, 6)}", *rng.integers(0, 2, 2).tolist()
            first.append(_row(task, number, before, image))
            second.append(_row(task, number, after, image))
            differences.append(after - before)
            per_image[image] = per_image.get(image, 0) + (after - before) / n / 3
        means.append(np.mean(differences))
    mean = compare_runs(first, second, "medmax-v1")[-1]
    assert (mean["task"], mean["n"], mean["images"]) == ("mean of 3 tasks", 43, len(per_image))
    assert mean["difference"] == pytest.approx(np.mean(means))
    shares = list(per_image.values())
    ways = [abs(np.dot(signs, shares)) for signs in itertools.product((1, -1), repeat=len(shares))]
    assert mean["p_value"] == pytest.approx(np.mean(np.array(ways) >= abs(sum(shares)) - 1e-9))


def test_the_interval_of_the_mean_of_tasks_covers(monkeypatch):
    monkeypatch.setattr(statistics, "FLIPS", 10)
    monkeypatch.setattr(statistics, "REPLICATES", 300)
    rng, covered = np.random.default_rng(1), []
    for _ in range(300):
        # A large and a small task about the same images, with one skill per image and run: strongly dependent.
        skills = rng.beta(2, 1.5, (2, 100))
        runs = [[], []]
        for task, n in (("a_closed", 300), ("b_open", 60)):
            index = rng.integers(0, 100, n)
            for run, skill in zip(runs, skills, strict=True):
                answers = rng.random(n) < skill[index]
                run += [_row(task, i, float(a), f"image-{index[i]}") for i, a in enumerate(answers)]
        row = compare_runs(*runs, "medmax-v1")[-1]
        covered.append(row["low"] <= 0 <= row["high"])
    assert 0.92 <= np.mean(covered) <= 0.985

"""The packing plan: equal to its reference, every row once, no pack too full, order from (seed, epoch) alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_fast.data.packing import plan_epoch, plan_epoch_ref


@st.composite
def packings(draw):
    # Capacities around powers of 64 cross the levels of the tree; few distinct lengths give many ties.
    capacity = draw(st.sampled_from([1, 2, 7, 63, 64, 65, 4095, 4096, 4097, 262_145]))
    kinds = draw(st.lists(st.integers(0, capacity + 2), min_size=1, max_size=12))
    lengths = draw(st.lists(st.sampled_from(kinds), max_size=120))
    return np.array(lengths, dtype=np.int64), capacity


@settings(max_examples=200, deadline=None)
@given(packings(), st.integers(-(2**63), 2**64), st.integers(0, 2**64))
def test_equals_reference_and_holds_every_row_once(packing, seed, epoch):
    lengths, capacity = packing
    plan = plan_epoch(lengths, capacity, seed, epoch)
    expected = plan_epoch_ref(lengths, capacity, seed, epoch)
    assert plan.rows.dtype == plan.offsets.dtype == np.int64
    np.testing.assert_array_equal(plan.rows, expected.rows)
    np.testing.assert_array_equal(plan.offsets, expected.offsets)

    fits = (lengths > 0) & (lengths <= capacity)
    assert sorted(plan.rows) == list(np.flatnonzero(fits))
    for p in range(len(plan)):
        assert 0 < lengths[plan.pack(p)].sum() <= capacity


def test_packs_are_full_and_mixed():
    # Guard against properties that hold vacuously: 1,000 rows, most of them an image and a caption.
    rng = np.random.default_rng(1)
    lengths = np.where(rng.random(1000) < 0.8, 1026, 0) + rng.integers(20, 300, 1000)
    plan = plan_epoch(lengths, 16384, 0, 0)
    assert len(plan) < 1.05 * lengths.sum() / 16384 + 1
    assert len(plan.rows) == 1000
    assert min(len(plan.pack(p)) for p in range(len(plan))) > 5


def test_best_fit_by_hand():
    # 6 opens a pack with room 4, 5 one with room 5; 4 goes where it fits best (with the 6), 3 with the 5.
    plan = plan_epoch(np.array([3, 4, 5, 6]), 10, 0, 0)
    assert {tuple(plan.pack(p)) for p in range(len(plan))} == {(3, 1), (2, 0)}


def test_order_comes_from_seed_and_epoch():
    lengths = np.random.default_rng(2).integers(1, 500, 400)
    first = plan_epoch(lengths, 2048, 5, 0)
    np.testing.assert_array_equal(first.rows, plan_epoch(lengths, 2048, 5, 0).rows)
    others = [plan_epoch(lengths, 2048, 5, 1), plan_epoch(lengths, 2048, 6, 0), plan_epoch(lengths, 2048, 0, 5)]
    for other in others:
        assert not np.array_equal(first.rows, other.rows)
        assert sorted(first.rows) == sorted(other.rows)


def test_plan_is_frozen_across_versions():
    # A resumed run must find the plan that the interrupted one used: these numbers never change.
    plan = plan_epoch(np.array([5, 3, 8, 1, 2, 7, 4, 6, 5, 3]), 10, 7, 2)
    assert plan.rows.tolist() == [9, 3, 5, 1, 7, 6, 0, 8, 2, 4]
    assert plan.offsets.tolist() == [0, 2, 4, 6, 8, 10]


def test_order_of_packs_does_not_follow_length():
    # Mean row length of a pack against its place: a correlation that chance gives once in 10^4 would fail.
    lengths = np.random.default_rng(3).integers(1, 1000, 4000)
    plan = plan_epoch(lengths, 2000, 0, 0)
    means = [lengths[plan.pack(p)].mean() for p in range(len(plan))]
    assert len(plan) > 500
    assert abs(np.corrcoef(np.arange(len(plan)), means)[0, 1]) < 4 / np.sqrt(len(plan))


def test_order_of_packs_does_not_follow_length_over_many_epochs():
    """Place against length, epoch by epoch: no trend on average, and no more spread than chance gives.

    A correlation of chance times sqrt(packs - 1) has mean 0 and variance 1, so the sum over E epochs is within
    5 sqrt(E), and the sum of squares within 5 sqrt(2 E) of E.
    """
    lengths = np.random.default_rng(4).lognormal(5, 1, 3000).astype(np.int64).clip(1, 1999)
    scores = []
    for epoch in range(300):
        plan = plan_epoch(lengths, 2000, 9, epoch)
        used = lengths[plan.rows]
        ids = np.add.reduceat(used, plan.offsets[:-1])
        place, rows = np.arange(len(plan)), np.diff(plan.offsets)
        longest = np.maximum.reduceat(used, plan.offsets[:-1])
        # Of a pack: mean length, how full it is, its longest row.
        scores.append([np.corrcoef(place, x)[0, 1] * np.sqrt(len(plan) - 1) for x in (ids / rows, ids, longest)])
    scores = np.array(scores)
    assert len(plan) > 200 and (np.abs(scores.sum(axis=0)) < 5 * np.sqrt(300)).all()
    assert (np.abs((scores**2).sum(axis=0) - 300) < 5 * np.sqrt(600)).all()


def test_the_statistic_would_see_a_leak():
    # Guard: packs in the order they were opened, as best-fit decreasing leaves them, would be far outside.
    lengths = np.random.default_rng(4).lognormal(5, 1, 3000).astype(np.int64).clip(1, 1999)
    plan = plan_epoch(lengths, 2000, 9, 0)
    longest = sorted(-lengths[plan.pack(p)].max() for p in range(len(plan)))
    assert abs(np.corrcoef(np.arange(len(plan)), longest)[0, 1]) * np.sqrt(len(plan) - 1) > 10


def test_every_row_comes_early_and_late():
    # Mean place of every row over 400 epochs, in deviations: the largest of 500 stays below 5 with odds of 3,000 to 1.
    lengths = np.random.default_rng(5).integers(1, 400, 500)
    places = np.zeros((400, 500))
    for epoch in range(400):
        plan = plan_epoch(lengths, 800, 0, epoch)
        places[epoch, plan.rows] = np.repeat((np.arange(len(plan)) + 0.5) / len(plan), np.diff(plan.offsets))
    assert np.abs(places.mean(axis=0) - 0.5).max() * np.sqrt(12 * 400) < 5


def test_every_place_is_equally_likely():
    # 24 orders of 4 full packs over 4,800 epochs: chi-square with 23 degrees of freedom, 1e-6 quantile.
    lengths = np.full(4, 10)
    orders = [tuple(plan_epoch(lengths, 10, 0, epoch).rows) for epoch in range(4800)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 73.0


def test_accepts_any_integer_array():
    lengths = np.arange(1, 41, dtype=np.int32)[::2]
    assert not lengths.flags.c_contiguous
    np.testing.assert_array_equal(plan_epoch(lengths, 64, 1, 1).rows, plan_epoch_ref(lengths, 64, 1, 1).rows)


@pytest.mark.parametrize("lengths", [[], [0, 0], [11, 12]])
def test_nothing_to_pack(lengths):
    plan = plan_epoch(np.array(lengths, dtype=np.int64), 10, 0, 0)
    assert len(plan) == 0
    assert plan.offsets.tolist() == [0]


@pytest.mark.parametrize("capacity", [0, -1, 2**24 + 1])
def test_bad_capacity(capacity):
    with pytest.raises(ValueError, match=f"capacity {capacity}, expected 1"):
        plan_epoch(np.array([1]), capacity, 0, 0)


def test_negative_length():
    with pytest.raises(ValueError, match="row 1 has a negative length"):
        plan_epoch(np.array([1, -1]), 8, 0, 0)

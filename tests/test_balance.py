"""Sharing a step's packs among ranks: equal to its reference, each pack once, loads even over steps and epochs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_fast.data.balance import pack_costs, share_packs, share_packs_ref
from medmax_fast.data.packing import Plan, plan_epoch


def row_lengths(count, seed=0):
    """Most rows hold an image of 1,026 ids, the rest only text."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(count) < 0.88, 1026, 0) + rng.lognormal(4.8, 0.9, count).astype(np.int64) + 3


def loads(plan, lengths, places):
    """Ids and squared lengths by step, rank and micro-step, [steps, world, micros, 2]; nothing for a missing pack."""
    steps, world, micros = places.shape
    costs = np.zeros((steps * world * micros, 2), dtype=np.int64)
    costs[: len(plan)] = pack_costs(plan, lengths)
    return costs[np.arange(steps)[:, None, None] * world * micros + places]


@st.composite
def shares(draw):
    capacity = draw(st.sampled_from([10, 64, 1000]))
    lengths = draw(st.lists(st.integers(1, capacity), max_size=150))
    world, micros = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    return np.array(lengths, dtype=np.int64), capacity, world * micros, world


@settings(max_examples=300, deadline=None)
@given(shares(), st.integers(0, 5))
def test_equals_reference_and_takes_every_pack_once(share, epoch):
    lengths, capacity, packs_per_step, world = share
    plan = plan_epoch(lengths, capacity, 0, epoch)
    places = share_packs(plan, lengths, packs_per_step, world)
    assert places.dtype == np.int32
    assert places.shape == (-(-len(plan) // packs_per_step), world, packs_per_step // world)
    np.testing.assert_array_equal(places, share_packs_ref(plan, lengths, packs_per_step, world))
    np.testing.assert_array_equal(
        np.sort(places.reshape(len(places), packs_per_step), axis=1),
        np.tile(np.arange(packs_per_step), (len(places), 1)),
    )
    if world == 1:
        assert (np.diff(places[:, 0], axis=1) == 1).all()


def test_reference_is_not_the_plain_order():
    # Guard: the property above would hold as well if both sides always kept the order of the plan.
    lengths = row_lengths(2000)
    plan = plan_epoch(lengths, 4096, 0, 0)
    places = share_packs_ref(plan, lengths, 16, 4)
    plain = np.arange(16).reshape(4, 4).T
    assert len(places) > 30 and (places != plain).any(axis=(1, 2)).all()


@pytest.mark.parametrize(("packs_per_step", "world"), [(8, 8), (8, 4), (8, 2), (64, 8), (12, 3)])
@pytest.mark.parametrize("capacity", [4096, 16384])
def test_even_over_an_epoch(packs_per_step, world, capacity):
    lengths = row_lengths(60_000)
    plan = plan_epoch(lengths, capacity, 1, 0)
    places = share_packs(plan, lengths, packs_per_step, world)
    full = len(plan) // packs_per_step
    assert full > 50
    ranks = loads(plan, lengths, places)[:full].sum(axis=(0, 2))
    even = np.abs(ranks / ranks.mean(axis=0) - 1).max()
    plain = np.broadcast_to(np.arange(packs_per_step).reshape(-1, world).T, places.shape)
    ranks = loads(plan, lengths, plain)[:full].sum(axis=(0, 2))
    assert even < 0.005 and even < np.abs(ranks / ranks.mean(axis=0) - 1).max()


def test_lead_of_a_rank_never_exceeds_a_pack():
    # At every point of the epoch, not only at its end: what one rank is ahead of another in either part.
    lengths = row_lengths(60_000)
    plan = plan_epoch(lengths, 4096, 2, 0)
    places = share_packs(plan, lengths, 8, 4)
    running = np.cumsum(loads(plan, lengths, places).sum(axis=2), axis=0)
    lead = (running.max(axis=1) - running.min(axis=1)).max(axis=0)
    assert len(running) > 2000
    assert (lead <= pack_costs(plan, lengths).max(axis=0)).all()


def test_more_packs_a_step_even_out_the_step():
    lengths = row_lengths(60_000)
    plan = plan_epoch(lengths, 4096, 0, 0)
    places = share_packs(plan, lengths, 64, 8)
    plain = np.broadcast_to(np.arange(64).reshape(8, 8).T, places.shape)
    for axis, better in ((None, 3.0), (2, 3.0)):
        # Excess of the slowest rank: per micro-step, in which ranks wait for each other, and per step.
        worst = [_excess(loads(plan, lengths, p)[:-1], axis) for p in (places, plain)]
        assert (worst[0] * better < worst[1]).all(), (axis, worst)


def _excess(load, axis):
    load = load if axis is None else load.sum(axis=axis, keepdims=True)
    return (load.max(axis=1) / load.mean(axis=1) - 1).mean(axis=(0, 1))


def test_by_hand():
    # Two ranks, four packs of one row: 9 and 8, then 2 and 1; whoever got the 9 gets the 1.
    plan = Plan(np.arange(4), np.arange(5))
    assert share_packs(plan, np.array([2, 9, 1, 8]), 4, 2).tolist() == [[[1, 2], [3, 0]]]
    # The second step begins with the lead of the first: its 5 goes to the rank that had the 1.
    plan = Plan(np.arange(4), np.arange(5))
    assert share_packs(plan, np.array([1, 9, 3, 5]), 2, 2).tolist() == [[[1], [0]], [[0], [1]]]
    # A short last step: the missing packs go to the rank with more to do.
    plan = Plan(np.arange(3), np.arange(4))
    assert share_packs(plan, np.array([1, 9, 3]), 2, 2).tolist() == [[[1], [0]], [[1], [0]]]


def test_is_frozen_across_versions():
    # Ranks of one run may have been installed at different times; a step must not be shared out twice.
    lengths = np.array([5, 3, 8, 1, 2, 7, 4, 6, 5, 3, 9, 9, 2])
    plan = plan_epoch(lengths, 10, 7, 2)
    assert share_packs(plan, lengths, 4, 2).tolist() == [[[1, 3], [0, 2]], [[1, 3], [2, 0]]]


def test_does_not_overflow():
    # Two packs of the longest row beside many of one id: costs of 2^48 against a mean near 1.
    lengths = np.array([2**24, 2**24] + [1] * 62)
    plan = Plan(np.arange(64), np.arange(65))
    places = share_packs(plan, lengths, 4, 2)
    np.testing.assert_array_equal(places, share_packs_ref(plan, lengths, 4, 2))
    assert sorted(loads(plan, lengths, places)[0, :, :, 0].sum(axis=1)) == [2**24 + 1] * 2


@pytest.mark.parametrize(
    ("rows", "offsets", "settings", "error", "message"),
    [
        ([0, 1], [0, 1, 2], (3, 2), ValueError, "3 packs per step, expected a multiple of the 2 ranks"),
        ([0, 1], [0, 1, 2], (0, 1), ValueError, "0 packs per step"),
        ([0, 1], [0, 1, 2], (2, 0), ValueError, "the 0 ranks"),
        ([0, 2], [0, 1, 2], (2, 1), IndexError, r"row 2, expected 0..2 \(exclusive\)"),
        ([0, -1], [0, 1, 2], (2, 1), IndexError, "row -1"),
        ([0, 1], [0, 1, 3], (2, 1), IndexError, "pack 1 lies outside"),
        ([0, 1], [0, 2, 1], (2, 1), IndexError, "pack 1 lies outside"),
        ([0, 1], [-1, 1, 2], (2, 1), IndexError, "pack 0 lies outside"),
    ],
)
def test_plans_that_do_not_fit(rows, offsets, settings, error, message):
    with pytest.raises(error, match=message):
        share_packs(Plan(np.array(rows), np.array(offsets)), np.array([4, 5]), *settings)


@pytest.mark.parametrize("lengths", [[-1, 5], [2**24, 1]])
def test_lengths_that_no_pack_can_hold(lengths):
    with pytest.raises(ValueError, match="pack 0, row"):
        share_packs(Plan(np.array([0, 1]), np.array([0, 2])), np.array(lengths), 2, 1)


def test_refuses_other_dtypes():
    with pytest.raises(TypeError):
        share_packs(Plan(np.array([0], dtype=np.int32), np.array([0, 1])), np.array([4]), 1, 1)

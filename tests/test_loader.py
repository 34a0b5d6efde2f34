"""The packed loader: every row once an epoch, the same steps on any number of ranks, exact resume."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_fast.data.collate import collate_ref
from medmax_fast.data.loader import PackedLoader
from medmax_fast.runtime import InputError

EOT = 8710
# No image ids: what a cut does to images is in test_long_rows.
LAYOUT = SimpleNamespace(eot=EOT, boi=8711, image_start=8712, image_end=8713)


def make_store(count=60, longest=40, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    ids = rng.integers(0, 8700, lengths.sum()).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    # An eot somewhere in most rows, so that packs differ in supervised ids.
    for row in range(0, count, 3):
        ids[offsets[row] + rng.integers(lengths[row])] = EOT
    return SimpleNamespace(ids=ids, offsets=offsets, lengths=lengths, layout=LAYOUT)


def steps(store, epoch=0, start=0, **options):
    options = {"pack_length": 64, "packs_per_step": 8, "seed": 3} | options
    return list(PackedLoader(store, **options).epoch_steps(epoch, start))


def packs(step):
    return [None if batch is None else batch.rows.tolist() for batch in step.batches]


def step_rows(several):
    return [row for step in several for pack in packs(step) if pack is not None for row in pack]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_any_number_of_ranks_sees_the_same_steps(world):
    store = make_store()
    whole = steps(store)
    assert len(whole) > 2 and None in whole[-1].batches, "the case must include a short last step"
    shares = [steps(store, rank=rank, world=world) for rank in range(world)]
    for i, step in enumerate(whole):
        parts = [share[i] for share in shares]
        assert all(part.index == i and len(part.batches) == 8 // world for part in parts)
        # Put back to their places, the packs are those of a single rank, which keeps the order of the plan.
        merged = dict(
            zip([p for part in parts for p in part.places], [b for p in parts for b in packs(p)], strict=True)
        )
        assert [merged[place] for place in range(8)] == packs(step) and step.places == list(range(8))
        real = sum(b.target_tokens for part in parts for b in part.batches if b is not None)
        assert {part.target_tokens for part in parts} == {real} == {step.target_tokens}


def test_every_row_once_an_epoch_in_another_order():
    store = make_store()
    orders = []
    for epoch in range(3):
        found = [
            row for step in steps(store, epoch) for batch in step.batches if batch is not None for row in batch.rows
        ]
        assert sorted(found) == list(range(60))
        orders.append(found)
    assert orders[0] != orders[1] != orders[2]


def test_batches_are_the_collated_packs():
    store = make_store()
    loader = PackedLoader(store, 64, 8, 3)
    seen = 0
    for step in loader.epoch_steps(1):
        for j, batch in enumerate(step.batches):
            if batch is None:
                continue
            rows = loader.plan(1).pack(step.index * 8 + j)
            expected = collate_ref(store.ids, store.offsets, rows, EOT)
            np.testing.assert_array_equal(batch.labels, expected.labels)
            np.testing.assert_array_equal(batch.cu_seqlens, expected.cu_seqlens)
            assert batch.cu_seqlens[-1] <= 64
            seen += 1
    assert seen == len(loader.plan(1))


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(10, 70),
    seed=st.integers(0, 100),
    epoch=st.integers(0, 3),
    packs_per_step=st.sampled_from([4, 8, 12]),
    before=st.sampled_from([1, 2, 4]),
    after=st.sampled_from([1, 2, 4]),
)
def test_resume_at_every_step_on_any_number_of_ranks(count, seed, epoch, packs_per_step, before, after):
    """What ranks take before and after a stop is every row once, and step by step the uninterrupted run."""
    options = {"pack_length": 64, "packs_per_step": packs_per_step, "seed": seed, "too_long": "cut", "max_length": 30}
    store = make_store(count, 40, seed)
    whole = steps(store, epoch, **options)
    expected = [(step.index, sorted(packs(step), key=str), step.target_tokens) for step in whole]
    rows = [row for step in whole for row in step_rows([step])]
    first = [steps(store, epoch, rank=rank, world=before, **options) for rank in range(before)]
    resumed = [PackedLoader(store, rank=rank, world=after, **options) for rank in range(after)]
    saved = PackedLoader(store, rank=before - 1, world=before, **options)
    assert whole and sorted(rows) == np.flatnonzero(saved.lengths).tolist()
    for stop in range(len(whole) + 1):
        state = json.loads(json.dumps(saved.state(epoch, stop)))
        rest = [list(loader.epoch_steps(*loader.restore(state))) for loader in resumed]
        assert state["rows"] == len(step_rows(whole[:stop]))
        together = []
        for ranks in (zip(*[share[:stop] for share in first], strict=True), zip(*rest, strict=True)):
            for parts in ranks:
                assert len({(part.index, part.target_tokens) for part in parts}) == 1
                taken = [pack for part in parts for pack in packs(part)]
                together.append((parts[0].index, sorted(taken, key=str), parts[0].target_tokens))
        assert together == expected


def test_resume_is_tested_with_several_steps_and_changed_ranks():
    # Guard for the property above: epochs of several steps, which ranks share in other ways.
    options = {"pack_length": 64, "packs_per_step": 4, "seed": 1}
    store = make_store(70, 40, 1)
    two, four = (steps(store, rank=0, world=world, **options) for world in (2, 4))
    assert len(two) > 5 and any(packs(a)[:1] != packs(b) for a, b in zip(two, four, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "made with seed = 3, now 4"),
        ({"packs_per_step": 4}, "packs_per_step = 8, now 4"),
        ({"pack_length": 65}, "pack_length = 64, now 65"),
        ({"max_length": 30}, "limit = 64, now 30"),
        ({"too_long": "cut"}, "too_long = 'skip', now 'cut'"),
    ],
)
def test_another_order_does_not_restore(change, message):
    options = {"pack_length": 64, "packs_per_step": 8, "seed": 3}
    state = PackedLoader(make_store(), **options).state(1, 2)
    assert PackedLoader(make_store(), **options).restore(state) == (1, 2)
    with pytest.raises(InputError, match=message):
        PackedLoader(make_store(), **(options | change)).restore(state)


def test_damaged_states_do_not_restore():
    loader = PackedLoader(make_store(), 64, 8, 3)
    state = loader.state(0, 1)
    end = loader.steps_per_epoch(0)
    assert loader.state(0, end)["rows"] == 60 and not list(loader.epoch_steps(*loader.restore(loader.state(0, end))))
    other = make_store(seed=1)
    for bad, message in (
        ({}, "expected what PackedLoader.state returned"),
        (state | {"step": "1"}, "expected what PackedLoader.state returned"),
        (state | {"epoch": -1}, "expected what PackedLoader.state returned"),
        (state | {"step": end + 1}, f"expected 0..{end}"),
        (state | {"rows": state["rows"] + 1}, f"before step 1 of epoch 0, now {state['rows']}"),
        (PackedLoader(other, 64, 8, 3).state(0, 1), "made with lengths = "),
    ):
        with pytest.raises(InputError, match=message):
            loader.restore(bad)


@pytest.mark.parametrize("world", [1, 2])
def test_cut_rows_reach_the_batches_cut(world):
    store = make_store(60, 90, 5)
    loaders = [PackedLoader(store, 64, 4, 0, rank, world, max_length=50, too_long="cut") for rank in range(world)]
    cut, left_out = loaders[0].cut.tolist(), loaders[0].left_out.tolist()
    assert len(cut) > 5 and left_out and not set(cut) & set(left_out)
    assert sorted(cut + left_out) == np.flatnonzero(store.lengths > 50).tolist()
    seen, targets = [], []
    for loader in loaders:
        for step in loader.epoch_steps(0):
            targets.append((step.index, step.target_tokens))
            for batch in step.batches:
                if batch is None:
                    continue
                for i, row in enumerate(batch.rows):
                    begin, end = batch.cu_seqlens[i : i + 2]
                    expected = collate_ref(store.ids, store.offsets, [row], EOT, max_length=50)
                    np.testing.assert_array_equal(batch.input_ids[begin:end], expected.input_ids)
                    np.testing.assert_array_equal(batch.labels[begin:end], expected.labels)
                    seen.append((row, step.index, expected.target_tokens))
    assert sorted(row for row, _, _ in seen) == sorted(set(range(60)) - set(left_out))
    for index, count in targets:
        assert count == sum(n for _, step, n in seen if step == index)


def test_long_and_empty_rows_are_left_out_and_told():
    store = make_store(20, 40)
    store.lengths = store.lengths.copy()
    long = np.flatnonzero(store.lengths > 25)
    assert 0 < len(long) < 20
    loader = PackedLoader(store, 64, 2, 0, max_length=25)
    assert loader.left_out.tolist() == long.tolist()
    assert not set(long) & set(loader.plan(0).rows)
    # Rows longer than a pack are left out as well.
    assert PackedLoader(store, 25, 2, 0, max_length=40).left_out.tolist() == long.tolist()
    assert PackedLoader(store, 64, 2, 0).left_out.tolist() == []


def test_ranks_have_the_same_to_do():
    store = make_store(2000, 60)
    totals = []
    for rank in range(4):
        rows = [b.rows for step in steps(store, rank=rank, world=4) for b in step.batches if b is not None]
        lengths = store.lengths[np.concatenate(rows)]
        totals.append((lengths.sum(), (lengths**2).sum()))
    assert (np.abs(totals / np.mean(totals, axis=0) - 1) < 0.02).all()


@pytest.mark.parametrize(("world", "too_long"), [(1, "skip"), (2, "cut"), (4, "cut")])
@pytest.mark.parametrize("labels", ["first-eot", "all"])
def test_a_thread_ahead_fills_the_same_steps(world, too_long, labels):
    store = make_store(100, 60)
    options = {"world": world, "rank": world - 1, "too_long": too_long, "max_length": 40, "labels": labels}
    plain = steps(store, 1, 1, **options)
    seen = 0
    for step, expected in zip(PackedLoader(store, 64, 8, 3, ahead=2, **options).epoch_steps(1, 1), plain, strict=True):
        assert (step.index, step.target_tokens, step.places) == (
            expected.index,
            expected.target_tokens,
            expected.places,
        )
        for batch, like in zip(step.batches, expected.batches, strict=True):
            assert (batch is None) == (like is None)
            if batch is not None:
                for name in ("input_ids", "labels", "position_ids", "cu_seqlens", "rows"):
                    np.testing.assert_array_equal(getattr(batch, name), getattr(like, name))
                assert batch.target_tokens == like.target_tokens
                seen += 1
    assert seen > 8


def test_dropped_early_the_thread_ends():
    before = threads()
    stream = PackedLoader(make_store(), 64, 8, 3, ahead=2).epoch_steps(0)
    next(stream)
    assert threads() == before + 1
    stream.close()
    assert threads() == before


def threads():
    return len(os.listdir("/proc/self/task"))


def test_steps_per_epoch_counts_the_short_one():
    loader = PackedLoader(make_store(), 64, 8, 3)
    packs_in_plan = len(loader.plan(0))
    assert packs_in_plan % 8
    assert loader.steps_per_epoch(0) == packs_in_plan // 8 + 1 == len(list(loader.epoch_steps(0)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packs_per_step": 6, "world": 4}, "--packs-per-step 6: expected a multiple of the 4 ranks"),
        ({"packs_per_step": 0}, "--packs-per-step 0"),
        ({"pack_length": 0}, "--pack-length 0: expected 1"),
        ({"max_length": -1}, "--max-length -1"),
        ({"max_length": 1}, "60 rows, the shortest of 2 ids; expected at least one row of 1..1 ids$"),
        ({"max_length": 1, "too_long": "cut"}, "1..1 ids or one that keeps part of its response when cut"),
        ({"too_long": "drop"}, "--too-long drop: expected skip or cut"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        steps(make_store(), **options)


def test_empty_store():
    with pytest.raises(InputError, match="no rows; expected at least one"):
        steps(make_store(0))

"""The packed loader: every row once an epoch, the same steps on any number of ranks, exact resume."""

from types import SimpleNamespace

import numpy as np
import pytest

from medmax_fast.data.collate import collate_ref
from medmax_fast.data.loader import PackedLoader
from medmax_fast.runtime import InputError

EOT = 8710


def make_store(count=60, longest=40, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, count)
    ids = rng.integers(0, 8700, lengths.sum()).astype(np.uint16)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    # An eot somewhere in most rows, so that packs differ in supervised ids.
    for row in range(0, count, 3):
        ids[offsets[row] + rng.integers(lengths[row])] = EOT
    return SimpleNamespace(ids=ids, offsets=offsets, lengths=lengths, layout=SimpleNamespace(eot=EOT))


def steps(store, epoch=0, start=0, **options):
    settings = {"pack_length": 64, "packs_per_step": 8, "seed": 3} | options
    return list(PackedLoader(store, **settings).epoch_steps(epoch, start))


def packs(step):
    return [None if batch is None else batch.rows.tolist() for batch in step.batches]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_any_number_of_ranks_sees_the_same_steps(world):
    store = make_store()
    whole = steps(store)
    assert len(whole) > 2 and None in whole[-1].batches, "the case must include a short last step"
    shares = [steps(store, rank=rank, world=world) for rank in range(world)]
    for i, step in enumerate(whole):
        parts = [share[i] for share in shares]
        assert all(part.index == i and len(part.batches) == 8 // world for part in parts)
        # Micro-step by micro-step, rank by rank: the packs in the order of the plan.
        merged = [packs(part)[micro] for micro in range(8 // world) for part in parts]
        assert merged == packs(step)
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


@pytest.mark.parametrize("world", [1, 2])
def test_resume_at_every_step(world):
    store = make_store()
    whole = steps(store, epoch=2, rank=world - 1, world=world)
    for start in range(len(whole) + 1):
        rest = steps(store, epoch=2, start=start, rank=world - 1, world=world)
        assert [(s.index, packs(s), s.target_tokens) for s in rest] == [
            (s.index, packs(s), s.target_tokens) for s in whole[start:]
        ]


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
        ({"max_length": 1}, "60 rows, the shortest of 2 ids; expected at least one row of 1..1 ids"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        steps(make_store(), **options)


def test_empty_store():
    with pytest.raises(InputError, match="no rows; expected at least one"):
        steps(make_store(0))

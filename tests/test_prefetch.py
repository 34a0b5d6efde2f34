"""Prefetching: the packs that `collate` gives, in order, out of a bounded ring; the thread always ends."""

import gc
import os
import signal
import threading
import time
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_fast.data.collate import LABEL_POLICIES, PackShape, collate_ref
from medmax_fast.data.prefetch import prefetch
from medmax_fast.runtime import InputError

EOT = 8710
NAMES = ("input_ids", "labels", "position_ids", "cu_seqlens", "rows", "loss_weights")


def make_plan(packs=12, rows_per_pack=3, longest=40, seed=0, dtype=np.uint16):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, rows_per_pack + 1, packs)
    lengths = rng.integers(0, longest + 1, sizes.sum() + 2)
    ids = np.where(rng.random(lengths.sum()) < 0.05, EOT, rng.integers(0, 8700, lengths.sum())).astype(dtype)
    return SimpleNamespace(
        ids=ids,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        rows=rng.permutation(len(lengths))[: sizes.sum()],
        bounds=np.concatenate([[0], np.cumsum(sizes)]),
        capacity=rows_per_pack * longest,
    )


def start(plan, order=None, **options):
    order = np.arange(len(plan.bounds) - 1) if order is None else order
    settings = {"capacity": plan.capacity} | options
    return prefetch(plan.ids, plan.offsets, plan.rows, plan.bounds, order, EOT, **settings)


def expected(plan, pack, weights=None, **options):
    part = slice(plan.bounds[pack], plan.bounds[pack + 1])
    weights = None if weights is None else weights[part]
    return collate_ref(plan.ids, plan.offsets, plan.rows[part], EOT, weights=weights, **options)


def assert_same(batch, wanted):
    for name in NAMES:
        np.testing.assert_array_equal(getattr(batch, name), getattr(wanted, name), err_msg=name)
    assert (batch.max_seqlen, batch.target_tokens) == (wanted.max_seqlen, wanted.target_tokens)


def threads_now():
    return len(os.listdir("/proc/self/task"))


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.001)


def test_equals_collate_while_batches_are_valid():
    seen = Counter()

    @settings(max_examples=150, deadline=None)
    @given(
        st.integers(0, 20),
        st.integers(0, 2**32),
        st.integers(1, 3),
        st.integers(1, 3),
        st.sampled_from(LABEL_POLICIES),
        st.booleans(),
        st.booleans(),
        st.sampled_from([np.uint16, np.uint32]),
    )
    def check(packs, seed, depth, keep, labels, weighted, padded, dtype):
        plan = make_plan(packs, seed=seed, dtype=dtype)
        rng = np.random.default_rng(seed)
        order = rng.integers(0, packs, rng.integers(0, 2 * packs + 1)) if packs else np.empty(0, int)
        options = {
            "labels": labels,
            "max_length": int(rng.choice([0, 0, 25])),
            "weights": rng.random(len(plan.rows), dtype=np.float32) if weighted else None,
            "shape": PackShape(length=plan.capacity, sequences=5, max_seqlen=plan.capacity) if padded else None,
        }
        valid, count = [], 0
        for pack, batch in zip(order, start(plan, order, depth=depth, keep=keep, **options), strict=True):
            valid = [*valid, (batch, expected(plan, pack, **options))][-keep:]
            for pair in valid:
                assert_same(*pair)
            count += 1
            seen["targets"] += batch.target_tokens > 0
            seen["wrapped"] += count > depth + keep
        assert count == len(order)

    check()
    assert min(seen["targets"], seen["wrapped"]) > 50, seen


def test_the_ring_is_the_bound():
    """The thread fills `depth` packs ahead and waits there; `keep` batches survive, the one before is overwritten."""
    plan = make_plan(40, rows_per_pack=1, longest=1)
    plan.ids = np.arange(40, dtype=np.uint16)
    plan.offsets = np.arange(41)
    plan.rows, plan.bounds = np.arange(40), np.arange(41)
    with start(plan, depth=3, keep=2) as packs:
        ring = packs._ring.input_ids[:, 0]
        taken = []
        for k in range(36):
            taken.append(next(packs))
            # Pack k + 3 is the last that may be there now.
            wait_until(lambda k=k: ring[(k + 3) % 5] == k + 3)
            time.sleep(0.0005)
            assert [batch.input_ids[0] for batch in taken[-2:]] == list(range(max(k - 1, 0), k + 1))
            if k:
                assert sorted(ring) == list(range(k - 1, k + 4))


def test_no_copies():
    plan = make_plan()
    packs = start(plan)
    for batch in packs:
        assert all(np.shares_memory(getattr(batch, n), getattr(packs._ring, n)) for n in NAMES[:3] if batch.num_ids)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_dropped_early_leaves_no_thread(taken):
    plan = make_plan(30)
    # What other tests have left behind ends before, and not in between.
    gc.collect()
    before = threads_now()
    packs = start(plan)
    batches = [next(packs) for _ in range(taken)]
    assert threads_now() == before + 1
    ids = weakref.ref(plan.ids)
    del packs
    gc.collect()
    assert threads_now() == before
    # Batches outlive the iterator: their arrays hold the ring. The store was held by the thread alone.
    for pack, batch in enumerate(batches[-2:], max(taken - 2, 0)):
        assert_same(batch, expected(plan, pack))
    del plan
    gc.collect()
    assert ids() is None


def test_the_thread_holds_the_arrays():
    plan = make_plan(50)
    wanted = [expected(plan, pack) for pack in range(50)]
    ids = weakref.ref(plan.ids)
    packs = start(plan)
    del plan
    gc.collect()
    assert ids() is not None
    for batch, correct in zip(packs, wanted, strict=True):
        assert_same(batch, correct)


def test_an_exception_of_the_consumer_ends_the_thread():
    before = threads_now()
    with pytest.raises(KeyError), start(make_plan(30)) as packs:
        next(packs)
        raise KeyError("consumer")
    assert threads_now() == before
    assert next(packs, None) is None, "closed: no more packs"
    packs.close()


def test_used_up_ends_the_thread():
    before = threads_now()
    packs = start(make_plan(7))
    assert len(list(packs)) == 7
    assert threads_now() == before
    assert next(packs, None) is None


def test_many_starts_and_stops():
    plan = make_plan(60)
    before = threads_now()
    for i in range(200):
        packs = start(plan, depth=1 + i % 3, keep=1 + i % 2)
        for _ in range(i % 7):
            next(packs)
        if i % 2:
            packs.close()
        del packs
    gc.collect()
    assert threads_now() == before


@pytest.mark.parametrize(
    ("array", "index", "message"),
    [
        ("rows", 10, "pack 5: row 1000000, expected 0..20"),
        ("offsets", 11, r"pack 5: row 10 lies at 100..1000000, expected inside 0..200"),
        ("bounds", 6, "pack 5: rows 10..1000000 of the plan, expected inside 0..20"),
    ],
)
def test_errors_come_in_the_place_of_their_pack(array, index, message):
    plan = SimpleNamespace(
        ids=np.arange(200, dtype=np.uint16),
        offsets=np.arange(21) * 10,
        rows=np.arange(20),
        bounds=np.arange(11) * 2,
        capacity=20,
    )
    before = threads_now()
    wanted = [expected(plan, pack) for pack in range(5)]
    getattr(plan, array)[index] = 10**6
    packs = start(plan)
    for correct in wanted:
        assert_same(next(packs), correct)
    for _ in range(2):
        with pytest.raises(IndexError, match=message):
            next(packs)
    del packs
    gc.collect()
    assert threads_now() == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"capacity": 3}, ValueError, r"pack \d+: a pack of \d+ ids, expected at most 3"),
        ({"order": [0, 99]}, IndexError, r"pack 99: expected 0..12"),
        ({"order": [-1]}, IndexError, r"pack -1: expected 0..12"),
        ({"shape": PackShape(sequences=1)}, ValueError, "rows, expected at most 1"),
        ({"shape": PackShape(max_seqlen=2)}, InputError, "max_seqlen is fixed at 2"),
        ({"depth": 0}, ValueError, "a ring of 2 buffers of which 2 are kept"),
        ({"keep": 0}, ValueError, "a ring of 2 buffers of which 0 are kept"),
        ({"labels": "last"}, ValueError, "labels 'last': expected first-eot"),
        ({"weights": [1.0]}, InputError, r"weights of shape \[1\]"),
    ],
)
def test_settings_that_do_not_fit(options, error, message):
    plan = make_plan()
    with pytest.raises(error, match=message):
        list(start(plan, **options))


def test_waiting_holds_no_gil():
    """While one thread waits for packs, another runs Python; both use prefetchers of their own."""
    plan = make_plan(400, rows_per_pack=4, longest=3000)
    results = {}

    def consume(name):
        results[name] = [batch.target_tokens for batch in start(plan)]

    workers = [threading.Thread(target=consume, args=(name,)) for name in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    wanted = [expected(plan, pack).target_tokens for pack in range(400)]
    assert results == {0: wanted, 1: wanted, 2: wanted}


def test_close_from_another_thread():
    plan = make_plan(50)
    packs = start(plan)
    next(packs)
    closers = [threading.Thread(target=packs.close) for _ in range(4)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(20)
        assert not closer.is_alive()
    assert list(packs) == []


def test_a_fork_neither_hangs_nor_waits():
    packs = start(make_plan(50))
    next(packs)
    child = os.fork()
    if child == 0:
        # Whatever happens, the child must not run the rest of the tests.
        status = 1
        try:
            with pytest.raises(RuntimeError, match="fork"):
                next(packs)
            packs.close()
            del packs
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the forked child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    assert len(list(packs)) == 49


def test_interpreter_exit_with_a_live_prefetcher(tmp_path):
    import subprocess
    import sys

    program = (
        "import numpy as np\n"
        "from medmax_fast.data.prefetch import prefetch\n"
        "packs = prefetch(np.zeros(9000, np.uint16), np.arange(0, 9001, 10), np.arange(900), np.arange(901),\n"
        "                 np.arange(900), 8710, capacity=10)\n"
        "print(next(packs).num_ids)\n"
    )
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "10\n"), done.stderr

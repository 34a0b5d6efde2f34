"""The collator: equal to its NumPy reference and to the published padded batch; labels never cross a row."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_fast import _csrc
from medmax_fast.data.collate import IGNORED, collate, collate_ref, target_counts, target_counts_ref

EOT = 8710
ARRAYS = ("input_ids", "labels", "position_ids", "cu_seqlens", "rows")


def buffer(rows, dtype=np.uint16):
    """Rows as ids and offsets, with a sentinel around the used part that must never come out."""
    offsets = np.cumsum([3] + [len(row) for row in rows]).astype(np.int64)
    ids = np.concatenate([[65535] * 3, *rows, [65535] * 3]).astype(dtype)
    return SimpleNamespace(ids=ids, offsets=offsets)


def assert_same(batch, expected):
    for name in ARRAYS:
        found, wanted = getattr(batch, name), getattr(expected, name)
        assert found.dtype == wanted.dtype, name
        np.testing.assert_array_equal(found, wanted, err_msg=name)
    assert batch.max_seqlen == expected.max_seqlen
    assert batch.target_tokens == expected.target_tokens


@st.composite
def stores(draw):
    # Lengths around the block of 64 in which the C++ looks for eot; eot anywhere, often more than once or not at all.
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 5, 63, 64, 65, 127, 128, 129, 300]), min_size=1, max_size=8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    rows = [np.where(rng.random(n) < density, EOT, rng.integers(0, 8710, n)) for n in lengths]
    store = buffer(rows, draw(st.sampled_from([np.uint16, np.uint32])))
    chosen = draw(st.lists(st.integers(0, len(rows) - 1), max_size=12))
    return store, np.array(chosen, dtype=np.int64)


@settings(max_examples=300, deadline=None)
@given(stores(), st.sampled_from([0, 1, 2, 64, 100, 1000]), st.sampled_from([0, 1, 2, 5]))
def test_equals_reference(data, max_length, threads):
    store, rows = data
    batch = collate(store.ids, store.offsets, rows, EOT, threads=threads, max_length=max_length)
    assert_same(batch, collate_ref(store.ids, store.offsets, rows, EOT, max_length=max_length))

    counts = target_counts(store.ids, store.offsets, EOT, max_length, threads=threads)
    np.testing.assert_array_equal(counts, target_counts_ref(store.ids, store.offsets, EOT, max_length))
    assert counts[rows].sum() == batch.target_tokens
    chosen = target_counts(store.ids, store.offsets, EOT, max_length, rows=rows, threads=threads)
    np.testing.assert_array_equal(chosen, counts[rows])


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_by_hand(dtype):
    store = buffer([[0, 5, EOT, 6, EOT, 2], [0, 7, 8], [EOT, 9], []], dtype)
    batch = collate(store.ids, store.offsets, [2, 0, 3, 1], EOT)
    assert batch.input_ids.tolist() == [EOT, 9, 0, 5, EOT, 6, EOT, 2, 0, 7, 8]
    assert batch.labels.tolist() == [-100, 9, -100, -100, -100, 6, EOT, 2, -100, 7, 8]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 2, 8, 8, 11]
    assert (batch.max_seqlen, batch.target_tokens) == (6, 6)
    assert target_counts(store.ids, store.offsets, EOT).tolist() == [3, 2, 1, 0]


def test_cut_before_eot_trains_whole_row():
    store = buffer([[0, 5, 6, EOT, 7]])
    assert collate(store.ids, store.offsets, [0], EOT, max_length=3).labels.tolist() == [-100, 5, 6]


def test_ids_above_int16_stay_positive():
    store = buffer([[0, 32768, 65535]])
    assert collate(store.ids, store.offsets, [0], EOT).input_ids.tolist() == [0, 32768, 65535]


@pytest.mark.parametrize("eot", [-1, 2**16 + 8710, 2**40])
def test_eot_outside_the_dtype_is_not_found(eot):
    store = buffer([[0, 8710, 5]])
    assert collate(store.ids, store.offsets, [0], eot).labels.tolist() == [-100, 8710, 5]


def test_golden_labels(golden):
    expected = json.loads((golden / "collate.json").read_text())
    lines = (golden / "sequences.jsonl").read_text().splitlines()
    rows = [json.loads(line)["tokens"] for line in lines]
    store = buffer(rows)
    batch = collate(store.ids, store.offsets, np.arange(len(rows)), EOT, max_length=2048)
    assert any(len(row) > 2048 for row in rows)
    supervised = 0
    for i in range(len(rows)):
        part = slice(batch.cu_seqlens[i], batch.cu_seqlens[i + 1])
        length = sum(expected["attention_mask"][i])
        assert batch.input_ids[part].tolist() == expected["input_ids"][i][:length]
        assert batch.labels[part].tolist() == expected["labels"][i][:length]
        supervised += sum(label != IGNORED for label in expected["labels"][i])
    assert batch.target_tokens == supervised > 2000


def test_threads_share_a_large_batch():
    # Large enough that the default takes more than one thread where there is more than one core.
    rng = np.random.default_rng(0)
    store = buffer([rng.integers(0, 8711, n) for n in rng.integers(1, 9000, 120)])
    rows = rng.permutation(120)
    expected = collate_ref(store.ids, store.offsets, rows, EOT)
    assert expected.cu_seqlens[-1] > 2 * 2**17
    for threads in (0, 1, 2, 3, 7, 500):
        assert_same(collate(store.ids, store.offsets, rows, EOT, threads=threads), expected)


def test_reads_a_memory_map_and_writes_every_entry(tmp_path):
    rows = [np.arange(100, dtype=np.uint16), np.arange(500, 700, dtype=np.uint16)]
    path = tmp_path / "ids.bin"
    np.concatenate(rows).tofile(path)
    ids = np.memmap(path, dtype=np.uint16, mode="r")
    offsets = np.array([0, 100, 300])
    chosen, cu_seqlens = np.array([1, 0]), np.array([0, 200, 300], dtype=np.int32)
    # The buffers are poisoned: an entry that is not written shows.
    filled = [np.full(300, -7_777_777) for _ in range(3)]
    targets = _csrc.fill_pack(ids, offsets, chosen, cu_seqlens, EOT, 2, *filled)
    expected = collate_ref(ids, offsets, chosen, EOT)
    for found, name in zip(filled, ARRAYS, strict=False):
        np.testing.assert_array_equal(found, getattr(expected, name), err_msg=name)
    assert targets == 298


def test_no_rows():
    store = buffer([[0, 1]])
    batch = collate(store.ids, store.offsets, [], EOT)
    assert batch.cu_seqlens.tolist() == [0]
    assert (batch.max_seqlen, batch.target_tokens, len(batch.input_ids)) == (0, 0, 0)


@pytest.mark.parametrize("row", [-1, 2, 2**40])
def test_row_outside_the_store(row):
    store = buffer([[0, 1], [2]])
    with pytest.raises(IndexError, match=f"row {row}, expected 0..2"):
        collate(store.ids, store.offsets, [0, row], EOT)
    with pytest.raises(IndexError, match=f"row {row}"):
        target_counts(store.ids, store.offsets, EOT, rows=[row])


@pytest.mark.parametrize("offsets", [[0, 9], [-1, 2], [3, 1], [0, 2**62]])
def test_offsets_outside_the_buffer(offsets):
    with pytest.raises(IndexError, match="row 0 lies at"):
        collate(np.zeros(4, np.uint16), np.array(offsets), [0], EOT)


@pytest.mark.parametrize("ids", [np.zeros(8, np.int32), np.zeros(8, np.int64), np.zeros(16, np.uint16)[::2]])
def test_other_buffers_are_refused_not_copied(ids):
    with pytest.raises(TypeError):
        collate(ids, np.array([0, 4]), [0], EOT)


def test_wrong_outputs_are_refused():
    store = buffer([[0, 1, 2]])
    cu_seqlens, good = np.array([0, 3], np.int32), np.zeros(3, np.int64)
    frozen = np.zeros(3, np.int64)
    frozen.setflags(write=False)
    call = [store.ids, store.offsets, np.array([0]), cu_seqlens, EOT, 1]
    with pytest.raises(ValueError, match="must hold"):
        _csrc.fill_pack(*call, good, good, np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="writeable"):
        _csrc.fill_pack(*call, good, good, frozen)
    call[3] = np.array([0, 4], np.int32)
    with pytest.raises(ValueError, match="do not belong"):
        _csrc.fill_pack(*call, *[np.zeros(4, np.int64)] * 3)


def test_to_torch_shapes():
    import torch

    store = buffer([[0, 5, EOT, 6], [0, 7]])
    batch = collate(store.ids, store.offsets, [1, 0], EOT)
    tensors = batch.to_torch()
    assert {name: tuple(t.shape) for name, t in tensors.items() if name != "max_seqlen"} == {
        "input_ids": (1, 6),
        "labels": (1, 6),
        "position_ids": (1, 6),
        "cu_seqlens": (3,),
    }
    assert tensors["cu_seqlens"].dtype == torch.int32
    assert tensors["input_ids"].dtype == tensors["labels"].dtype == torch.int64
    assert tensors["labels"][0].tolist() == batch.labels.tolist()
    assert tensors["max_seqlen"] == 4


def test_results_do_not_keep_extra_references():
    store = buffer([[0, 1, 2]])
    before = sys.getrefcount(store.ids)
    for _ in range(10):
        collate(store.ids, store.offsets, [0], EOT)
    after = sys.getrefcount(store.ids)
    assert after == before

"""The collator: equal to its NumPy reference and to the published padded batch; labels never cross a row."""

import json
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_fast import _csrc
from medmax_fast.data.collate import (
    IGNORED,
    LABEL_POLICIES,
    PackBuffers,
    PackShape,
    collate,
    collate_ref,
    target_counts,
    target_counts_ref,
)
from medmax_fast.runtime import InputError

EOT = 8710
ARRAYS = ("input_ids", "labels", "position_ids", "cu_seqlens", "rows")


def buffer(rows, dtype=np.uint16):
    """Rows as ids and offsets, with a sentinel around the used part that must never come out."""
    offsets = np.cumsum([3] + [len(row) for row in rows]).astype(np.int64)
    ids = np.concatenate([[65535] * 3, *rows, [65535] * 3]).astype(dtype)
    return SimpleNamespace(ids=ids, offsets=offsets)


def assert_same(batch, expected):
    assert (batch.loss_weights is None) == (expected.loss_weights is None)
    for name in ARRAYS + ("loss_weights",) * (expected.loss_weights is not None):
        found, wanted = getattr(batch, name), getattr(expected, name)
        assert found.dtype == wanted.dtype, name
        np.testing.assert_array_equal(found, wanted, err_msg=name)
    assert batch.max_seqlen == expected.max_seqlen
    assert batch.target_tokens == expected.target_tokens


@st.composite
def stores(draw):
    # Lengths around the block of 64 in which the C++ looks for eot; eot anywhere, often more than once or not at all.
    lengths = draw(st.lists(st.sampled_from([65, 300, 128, 0, 1, 2, 5, 63, 64, 127, 129]), min_size=1, max_size=8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    density = draw(st.sampled_from([0.03, 0.3, 0.0, 1.0]))
    rows = [np.where(rng.random(n) < density, EOT, rng.integers(0, 8710, n)) for n in lengths]
    store = buffer(rows, draw(st.sampled_from([np.uint16, np.uint32])))
    chosen = draw(st.lists(st.integers(0, len(rows) - 1), max_size=12))
    return store, np.array(chosen, dtype=np.int64)


def poisoned_buffers(length, sequences, weights):
    buffers = PackBuffers.allocate(length, sequences, weights=weights)
    for array in (buffers.input_ids, buffers.labels, buffers.position_ids, buffers.cu_seqlens):
        array.fill(-7_777_777)
    if weights:
        buffers.loss_weights.fill(np.nan)
    return buffers


@pytest.mark.parametrize("labels", LABEL_POLICIES)
def test_equals_reference(labels):
    """All arguments at once; `seen` guards against a property that never meets what it is about."""
    seen = Counter()

    @settings(max_examples=150, deadline=None)
    @given(
        data=stores(),
        max_length=st.sampled_from([0, 100, 64, 1000, 1, 2]),
        threads=st.sampled_from([0, 1, 2, 5]),
        weighted=st.sampled_from([True, False]),
        room=st.sampled_from([7, 0, None, 1, 70]),
        surplus=st.sampled_from([None, 2, 0, 1]),
        reuse=st.booleans(),
    )
    def check(data, max_length, threads, weighted, room, surplus, reuse):
        store, rows = data
        options = {"max_length": max_length, "labels": labels}
        plain = collate_ref(store.ids, store.offsets, rows, EOT, **options)
        length = 0 if room is None else len(plain.input_ids) + room
        sequences = 0 if surplus is None else len(rows) + (room is not None) + surplus
        weights = np.random.default_rng(0).normal(size=len(rows)).astype(np.float32) if weighted else None
        options |= {"weights": weights, "shape": PackShape(length, sequences)}
        expected = collate_ref(store.ids, store.offsets, rows, EOT, **options)
        buffers = poisoned_buffers(len(expected.labels) + 9, len(rows) + 5, weighted) if reuse else None
        batch = collate(store.ids, store.offsets, rows, EOT, threads=threads, buffers=buffers, **options)
        assert_same(batch, expected)
        assert batch.num_ids == plain.num_ids == len(plain.labels)
        if reuse:
            assert all(getattr(batch, name).base is getattr(buffers, name) for name in ARRAYS[:4])
            assert (buffers.input_ids[len(batch.input_ids) :] == -7_777_777).all()

        counts = target_counts(store.ids, store.offsets, EOT, max_length, threads=threads, labels=labels)
        wanted = target_counts_ref(store.ids, store.offsets, EOT, max_length, labels=labels)
        np.testing.assert_array_equal(counts, wanted)
        assert counts[rows].sum() == batch.target_tokens
        chosen = target_counts(store.ids, store.offsets, EOT, max_length, rows=rows, threads=threads, labels=labels)
        np.testing.assert_array_equal(chosen, counts[rows])

        seen["supervised"] += plain.target_tokens > 0
        seen["prompt"] += bool((plain.labels == IGNORED).sum() > len(rows))
        published = target_counts_ref(store.ids, store.offsets, EOT, max_length)
        seen["differs"] += bool((counts != published).any())
        seen["padded"] += bool(room)
        seen["exactly full"] += room == 0
        seen["constant boundaries"] += bool(surplus)
        seen["weighted"] += bool(weighted and plain.target_tokens)
        seen["cut"] += bool(0 < max_length < np.diff(store.offsets)[rows].max(initial=0))

    check()
    for case in ("supervised", "padded", "exactly full", "constant boundaries", "weighted", "cut"):
        assert seen[case] > 2, (case, seen)
    assert (seen["prompt"] > 2) == (labels != "all"), seen
    assert (seen["differs"] > 2) == (labels != "first-eot"), seen


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([EOT, 5, 6]), max_size=20))
def test_per_turn_is_every_second_turn(row):
    """Against turns spelled out: cut behind each eot, every second one is the assistant's."""
    turns, speaker = [], []
    for token in row:
        speaker.append(len(turns) % 2 == 1)
        if token == EOT:
            turns.append(token)
    wanted = [token if spoken or not turns else IGNORED for token, spoken in zip(row, speaker, strict=True)]
    wanted[:1] = [IGNORED][: len(row)]
    store = buffer([row])
    assert collate(store.ids, store.offsets, [0], EOT, labels="per-turn").labels.tolist() == wanted


def test_policies_by_hand():
    # bos question eot answer eot question eot answer eos; then a single turn, closed by eot and eos; then no eot.
    rows = [[0, 10, EOT, 11, EOT, 12, 13, EOT, 14, 2], [0, 20, EOT, 21, EOT, 2], [0, 30, 2]]
    store = buffer(rows)
    found = {
        labels: collate(store.ids, store.offsets, [0, 1, 2], EOT, labels=labels).labels.tolist()
        for labels in LABEL_POLICIES
    }
    x = IGNORED
    assert found["first-eot"] == [x, x, x, 11, EOT, 12, 13, EOT, 14, 2, x, x, x, 21, EOT, 2, x, 30, 2]
    assert found["per-turn"] == [x, x, x, 11, EOT, x, x, x, 14, 2, x, x, x, 21, EOT, x, x, 30, 2]
    assert found["all"] == [x, *rows[0][1:], x, *rows[1][1:], x, *rows[2][1:]]
    for labels, expected in found.items():
        counts = target_counts(store.ids, store.offsets, EOT, labels=labels)
        assert counts.sum() == sum(label != x for label in expected)


def test_weights_by_hand():
    store = buffer([[0, EOT, 5, 6], [0, EOT], [0, 7]])
    batch = collate(store.ids, store.offsets, [2, 0, 1], EOT, weights=[0.5, -2, 3], shape=PackShape(10))
    assert batch.loss_weights.tolist() == [0, 0.5, 0, 0, -2, -2, 0, 0, 0, 0]
    assert (batch.target_weight, batch.target_tokens) == (-3.5, 3)
    assert batch.to_torch()["loss_weights"].shape == (1, 10)
    assert collate(store.ids, store.offsets, [2, 0, 1], EOT).target_weight == 3


def test_padding_by_hand():
    store = buffer([[0, EOT, 5], [0, 7]])
    batch = collate(store.ids, store.offsets, [1, 0], EOT, shape=PackShape(length=9, sequences=5, max_seqlen=9, pad=3))
    assert batch.input_ids.tolist() == [0, 7, 0, EOT, 5, 3, 3, 3, 3]
    assert batch.labels.tolist() == [-100, 7, -100, -100, 5, -100, -100, -100, -100]
    assert batch.position_ids.tolist() == [0, 1, 0, 1, 2, 0, 0, 0, 0]
    # The padding is a sequence of its own, the surplus ones are empty.
    assert batch.cu_seqlens.tolist() == [0, 2, 5, 9, 9, 9]
    assert (batch.max_seqlen, batch.num_ids, batch.target_tokens) == (9, 5, 2)
    assert collate(store.ids, store.offsets, [1, 0], EOT, shape=PackShape(5)).cu_seqlens.tolist() == [0, 2, 5]


def test_padding_does_not_reach_the_rows():
    import torch

    from medmax_fast.model.attention import varlen_attention

    rng = np.random.default_rng(0)
    store = buffer([rng.integers(0, 8700, n) for n in (5, 1, 12)])
    table = torch.from_numpy(rng.normal(size=(65536, 2, 8)).astype(np.float32))
    outputs = []
    for shape in (PackShape(), PackShape(length=30, sequences=8, max_seqlen=30)):
        batch = collate(store.ids, store.offsets, [2, 0, 1], EOT, shape=shape)
        x = table[torch.from_numpy(batch.input_ids)]
        outputs.append(varlen_attention(x, x, x, torch.from_numpy(batch.cu_seqlens), batch.max_seqlen, impl="sdpa"))
    assert outputs[1].shape == (30, 2, 8) and torch.isfinite(outputs[1]).all()
    assert torch.equal(outputs[0], outputs[1][:18])


def test_buffers_are_reused_in_place():
    store = buffer([[0, EOT, 5, 6], [0, 7]])
    buffers = PackBuffers.allocate(6, 2)
    first = collate(store.ids, store.offsets, [0, 1], EOT, buffers=buffers)
    assert first.input_ids.tolist() == [0, EOT, 5, 6, 0, 7]
    assert all(getattr(first, name).base is not None for name in ARRAYS[:4])
    second = collate(store.ids, store.offsets, [1], EOT, buffers=buffers)
    assert second.input_ids.tolist() == [0, 7] and first.input_ids.tolist() == [0, 7, 5, 6, 0, 7]
    with pytest.raises(InputError, match="a pack of 8 ids, buffers for 6"):
        collate(store.ids, store.offsets, [0, 0], EOT, buffers=buffers)
    with pytest.raises(ValueError, match="a pack of 3 rows, expected at most 2"):
        collate(store.ids, store.offsets, [1, 1, 1], EOT, buffers=buffers)
    with pytest.raises(InputError, match="buffers for 2 sequences, expected at least 3"):
        collate(store.ids, store.offsets, [1], EOT, buffers=buffers, shape=PackShape(sequences=3))


def test_pinned_buffers_need_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="pinned buffers need a CUDA device"):
        PackBuffers.allocate(4, 1, pinned=True)


@pytest.mark.gpu
def test_pinned_buffers():
    import torch

    store = buffer([[0, EOT, 5, 6]])
    batch = collate(store.ids, store.offsets, [0], EOT, buffers=PackBuffers.allocate(4, 1, pinned=True))
    assert torch.from_numpy(batch.labels).is_pinned()
    assert batch.to_torch("cuda", non_blocking=True)["labels"].tolist() == [[-100, -100, 5, 6]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "last"}, "labels 'last': expected first-eot, per-turn or all"),
        ({"weights": [1.0]}, r"weights of shape \[1\] for 2 rows"),
        ({"weights": [1.0, np.nan]}, "weight nan of a row"),
        ({"shape": PackShape(length=4)}, "a pack of 5 ids or more, expected at most 4"),
        ({"shape": PackShape(sequences=1)}, "a pack of 2 rows, expected at most 1"),
        ({"shape": PackShape(length=9, sequences=2)}, "2 rows and padding, expected at most 2 sequences"),
        ({"shape": PackShape(length=9, max_seqlen=3)}, "a sequence of 4 ids, max_seqlen is fixed at 3"),
        ({"weights": [1, 2], "buffers": PackBuffers.allocate(9, 2)}, "weights=True go together"),
        ({"buffers": PackBuffers.allocate(9, 2, weights=True)}, "weights=True go together"),
    ],
)
def test_what_does_not_fit_is_said(options, message):
    store = buffer([[0, EOT, 5], [0, 7]])
    with pytest.raises(ValueError, match=message):
        collate(store.ids, store.offsets, [0, 1], EOT, **options)


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
    numbers = {name: tensors.pop(name) for name in ("max_seqlen", "target_tokens")}
    assert numbers == {"max_seqlen": 4, "target_tokens": batch.target_tokens}
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "input_ids": (1, 6),
        "labels": (1, 6),
        "position_ids": (1, 6),
        "cu_seqlens": (3,),
    }
    assert tensors["cu_seqlens"].dtype == torch.int32
    assert tensors["input_ids"].dtype == tensors["labels"].dtype == torch.int64
    assert tensors["labels"][0].tolist() == batch.labels.tolist()


def test_results_do_not_keep_extra_references():
    store = buffer([[0, 1, 2]])
    before = sys.getrefcount(store.ids)
    for _ in range(10):
        collate(store.ids, store.offsets, [0], EOT)
    after = sys.getrefcount(store.ids)
    assert after == before

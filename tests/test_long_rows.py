"""Rows that are too long: never cut inside an image, never down to the prompt, always listed."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_fast.data.long_rows import cut_length, cut_rows, long_rows, planned_lengths
from medmax_fast.runtime import InputError

# bos 0, eos 2, codes 4..11, eoi 12, boi 13, eot 14, text from 16 on.
LAYOUT = SimpleNamespace(image_start=4, image_end=12, eoi=12, boi=13, eot=14)
IMAGE = [13, 4, 5, 11, 12]


def make_store(rows):
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ids = np.array([i for row in rows for i in row], dtype=np.uint16)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    keys = [f"key {row}" for row in range(len(rows))]
    return SimpleNamespace(ids=ids, offsets=offsets, lengths=lengths, layout=LAYOUT, keys=keys)


@pytest.mark.parametrize(
    ("row", "limit", "kept"),
    [
        # Prompt, eot, response: the cut is at the limit.
        ([0, 16, 14, 17, 18, 19, 2], 5, 5),
        # Down to the prompt, exactly or further: left out.
        ([0, 16, 14, 17, 18, 19, 2], 3, 0),
        ([0, 16, 16, 16, 14, 17, 2], 4, 0),
        # An image in the response: whole, or not at all, wherever the limit falls in it.
        ([0, 14, 17, *IMAGE, 18, 2], 8, 8),
        ([0, 14, 17, *IMAGE, 18, 2], 7, 3),
        ([0, 14, 17, *IMAGE, 18, 2], 5, 3),
        ([0, 14, 17, *IMAGE, 18, 2], 4, 3),
        # The response begins with the image: nothing of it would remain.
        ([0, 14, *IMAGE, 18, 2], 6, 0),
        ([0, 14, *IMAGE, 18, 2], 7, 7),
        # Two images side by side: the first stays.
        ([0, 14, *IMAGE, *IMAGE, 2], 11, 7),
        ([0, 14, *IMAGE, *IMAGE, 2], 7, 7),
        # Without eot everything from the second id on counts.
        ([0, 16, 17, 18], 2, 2),
        ([0, 16, 17, 18], 1, 0),
        ([*IMAGE, 16], 3, 0),
        # The first eot counts, not a later one.
        ([0, 14, 17, 14, 18, 2], 4, 4),
    ],
)
def test_cut_length(row, limit, kept):
    assert cut_length(np.array(row, dtype=np.uint16), limit, LAYOUT) == kept


@st.composite
def rows_of_pieces(draw):
    """Rows of text, images and ends of turn, with or without a response."""
    piece = st.sampled_from([[16], [17, 18], [14], IMAGE, [13, 7, 12]])
    rows = draw(st.lists(st.lists(piece, min_size=1, max_size=9), min_size=1, max_size=8))
    return [[0] + [i for p in row for i in p] + [2] for row in rows]


@settings(max_examples=300, deadline=None)
@given(rows_of_pieces(), st.integers(1, 30))
def test_cuts_keep_whole_images_and_some_response(rows, limit):
    store = make_store(rows)
    lengths = planned_lengths(store, limit, "cut")
    for row, kept in zip(rows, lengths.tolist(), strict=True):
        prompt = row.index(14) + 1 if 14 in row else 1
        # By trial: the longest prefix within the limit in which no image is open.
        fitting = [n for n in range(min(limit, len(row)) + 1) if row[:n].count(13) == row[:n].count(12)]
        longest = max(fitting)
        assert kept == (len(row) if len(row) <= limit else longest if longest > prompt else 0)
    skipped = planned_lengths(store, limit, "skip")
    np.testing.assert_array_equal(skipped, np.where(store.lengths <= limit, store.lengths, 0))
    listed = list(long_rows(store, lengths))
    assert [line["row"] for line in listed] == np.flatnonzero(store.lengths > limit).tolist()
    assert all(line["key"] == f"key {line['row']}" and line["kept"] == lengths[line["row"]] for line in listed)

    offsets, numbers = cut_rows(store.offsets, lengths)
    for row, kept in enumerate(lengths.tolist()):
        if kept:
            number = row if numbers is None else numbers[row]
            assert store.ids[offsets[number] : offsets[number + 1]].tolist() == rows[row][:kept]


def test_cases_of_the_property_occur():
    # Guard: among rows like those above, a limit of 8 leaves some whole, cuts some, drops some.
    rng = np.random.default_rng(0)
    pieces = [[16], [17, 18], [14], IMAGE]
    rows = [[0] + [i for p in rng.integers(0, 4, 4) for i in pieces[p]] + [2] for _ in range(200)]
    store = make_store(rows)
    lengths = planned_lengths(store, 8, "cut")
    whole, cut = lengths == store.lengths, (lengths > 0) & (lengths < store.lengths)
    assert whole.sum() > 5 and cut.sum() > 20 and (lengths == 0).sum() > 20
    assert (lengths[cut] < 8).any() and (lengths[cut] == 8).any()


def test_nothing_cut_costs_nothing():
    store = make_store([[0, 14, 16], [0, 14, 16, 17]])
    lengths = planned_lengths(store, 4, "cut")
    assert cut_rows(store.offsets, lengths) == (store.offsets, None)
    # Keys are a file of their own in a store, read only when a row is to be listed.
    del store.keys
    assert list(long_rows(store, lengths)) == []


def test_another_word():
    with pytest.raises(InputError, match="--too-long drop: expected skip or cut"):
        planned_lengths(make_store([[0]]), 4, "drop")

"""Rows with more ids than a run has room for: left out, or cut at the end, and always listed.

A cut keeps whole images only, and only rows of which part of the response remains: the ids up to the first eot are the
prompt, which is not learned, so a row cut down to its prompt would be a response dropped without a word. Such rows are
left out as under `skip`. Only long rows are read (about 10 us each).
"""

from collections.abc import Iterator

import numpy as np

from medmax_fast.runtime import InputError

POLICIES = ("skip", "cut")


def planned_lengths(store, limit: int, too_long: str) -> np.ndarray:
    """Ids of each row that are trained on, int64 [N]: its length, less where it is cut, 0 where it is left out.

    store: a TokenStore. too_long: `skip` leaves rows of more than `limit` ids out, `cut` cuts them. InputError for
    another word.
    """
    if too_long not in POLICIES:
        raise InputError(f"--too-long {too_long}: expected {' or '.join(POLICIES)}")
    lengths = np.array(store.lengths, dtype=np.int64)
    for row in np.flatnonzero(lengths > limit):
        ids = store.ids[store.offsets[row] : store.offsets[row + 1]]
        lengths[row] = cut_length(ids, limit, store.layout) if too_long == "cut" else 0
    return lengths


def cut_length(ids: np.ndarray, limit: int, layout) -> int:
    """Leading ids of a row to keep: at most `limit`, no image open at the end; 0 if nothing of the response remains.

    ids: integers [n]. layout: an IdLayout. An image is boi, codes, eoi; the cut goes before the boi of one that does
    not end within the limit. A row without eot is response from its second id on (the first is never predicted).
    """
    kept = np.asarray(ids[:limit])
    open_image = (kept == layout.boi) | ((kept >= layout.image_start) & (kept < layout.image_end))
    closed = np.flatnonzero(~open_image)
    length = int(closed[-1]) + 1 if len(closed) else 0
    # Looked for in the whole row: a prompt that goes on beyond the cut must not pass for a response.
    eot = np.flatnonzero(np.asarray(ids) == layout.eot)
    prompt = int(eot[0]) + 1 if len(eot) else 1
    return length if length > prompt else 0


def long_rows(store, lengths: np.ndarray) -> Iterator[dict]:
    """One dict per row that is not trained whole, for a list: row, key, ids, kept (0: left out).

    lengths: what `planned_lengths` returned for this store.
    """
    rows = np.flatnonzero(lengths != store.lengths)
    keys = store.keys if len(rows) else []
    for row in rows.tolist():
        yield {"row": row, "key": keys[row], "ids": int(store.lengths[row]), "kept": int(lengths[row])}


def cut_rows(offsets: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Offsets in which cut rows have entries of their own, and the number of each row in them.

    offsets: int64 [N + 1] of the store; lengths: `planned_lengths`. Behind the store's offsets come two per cut row,
    its begin and its new end, so that consumers of (ids, offsets, row numbers) need not know of cuts. Returns
    (offsets, int64 [N]), or (the same offsets, None) where no row is cut.
    """
    rows = np.flatnonzero((lengths > 0) & (lengths < np.diff(offsets)))
    if not len(rows):
        return offsets, None
    begins = offsets[rows]
    numbers = np.arange(len(lengths), dtype=np.int64)
    # Entry N + 1 begins the first one: number N would span the gap between the store's end and that.
    numbers[rows] = len(offsets) + 2 * np.arange(len(rows))
    return np.concatenate([offsets, np.stack([begins, begins + lengths[rows]], axis=1).ravel()]), numbers

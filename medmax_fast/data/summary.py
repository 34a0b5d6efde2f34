"""What a token store holds, as plain numbers: the data behind `medmax inspect` and the report's packing figure."""

from collections.abc import Sequence

import numpy as np

from medmax_fast.data.collate import target_counts
from medmax_fast.data.packing import plan_epoch
from medmax_fast.data.store import TokenStore
from medmax_fast.vocab import IMAGE_CODES

CAPACITIES = (2048, 4096, 8192, 16384, 32768)
HISTOGRAM_BINS = 40


def store_summary(store: TokenStore, capacities: Sequence[int] = CAPACITIES) -> dict:
    """Counts and packing of a store, as a dict that JSON can hold.

    rows, ids, supervised (ids that the loss counts), images; longest and mean length; `tasks` and `sources`: one dict
    each of name, rows, ids, supervised; `lengths`: histogram `edges` [bins + 1] and `rows` [bins]; `packing`: per
    capacity the packs, the fill (ids in packs / room in packs) and the rows that are too long for it;
    `rows_without_eot` and `rows_unbalanced` (another number of boi than eoi, or of image ids than 1024 each).
    """
    lengths = store.lengths
    supervised = target_counts(store.ids, store.offsets, store.layout.eot)
    images, unbalanced, no_eot = _structure(store)
    counts, edges = np.histogram(lengths, bins=HISTOGRAM_BINS, range=(0, max(int(lengths.max(initial=0)), 1)))
    return {
        "rows": len(store),
        "ids": int(lengths.sum()),
        "supervised": int(supervised.sum()),
        "images": images,
        "longest": int(lengths.max(initial=0)),
        "mean_length": float(lengths.mean()) if len(store) else 0.0,
        "rows_without_eot": no_eot,
        "rows_unbalanced": unbalanced,
        "tasks": _per_name("task", store.tasks, lengths, supervised),
        "sources": _per_name("source", store.sources, lengths, supervised),
        "packing": [_packing(lengths, capacity) for capacity in capacities],
        "lengths": {"edges": edges.tolist(), "rows": counts.tolist()},
    }


def _per_name(kind: str, names: list[str], lengths: np.ndarray, supervised: np.ndarray) -> list[dict]:
    if not names:
        return []
    unique, index = np.unique(np.array(names), return_inverse=True)
    rows = np.bincount(index)
    # Sums in float64 are exact up to 2^53 ids.
    ids = np.bincount(index, weights=lengths)
    targets = np.bincount(index, weights=supervised)
    return [
        {kind: str(name), "rows": int(rows[i]), "ids": int(ids[i]), "supervised": int(targets[i])}
        for i, name in enumerate(unique)
    ]


def _packing(lengths: np.ndarray, capacity: int) -> dict:
    plan = plan_epoch(lengths, capacity, seed=0, epoch=0)
    room = len(plan) * capacity
    fill = float(lengths[plan.rows].sum() / room) if room else 0.0
    return {"capacity": capacity, "packs": len(plan), "fill": fill, "too_long": int((lengths > capacity).sum())}


def _structure(store: TokenStore) -> tuple[int, int, int]:
    """(images, rows whose image markers do not add up, rows without eot), a block of rows at a time."""
    layout, images, unbalanced, no_eot = store.layout, 0, 0, 0
    block = max(1, (1 << 24) // max(1, int(store.lengths.mean()) if len(store) else 1))
    for first in range(0, len(store), block):
        offsets = store.offsets[first : first + block + 1]
        ids = np.asarray(store.ids[offsets[0] : offsets[-1]])
        starts = offsets[:-1] - offsets[0]
        boi = np.add.reduceat(ids == layout.boi, starts, dtype=np.int64)
        eoi = np.add.reduceat(ids == layout.eoi, starts, dtype=np.int64)
        codes = np.add.reduceat((ids >= layout.image_start) & (ids < layout.image_end), starts, dtype=np.int64)
        images += int(boi.sum())
        unbalanced += int(((boi != eoi) | (codes != boi * IMAGE_CODES)).sum())
        no_eot += int((np.add.reduceat(ids == layout.eot, starts, dtype=np.int64) == 0).sum())
    return images, unbalanced, no_eot

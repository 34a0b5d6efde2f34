"""Packs of a plan, filled by a C++ thread while the one before is in use, so that a training step never waits.

csrc/prefetch fills a fixed ring of buffers in order and stops when it is full: memory is bounded by the ring, nothing
is copied, and the thread needs no GIL. The thread ends with the iterator, however that ends: used up, closed, dropped
early, or left by an exception.
"""

from collections.abc import Iterator

import numpy as np

from medmax_fast.data.collate import FREE_SHAPE, PackBuffers, PackedBatch, PackShape, reported_longest, row_weights


def prefetch(
    ids: np.ndarray,
    offsets: np.ndarray,
    plan_rows: np.ndarray,
    plan_offsets: np.ndarray,
    order: np.ndarray,
    eot: int,
    *,
    capacity: int,
    max_length: int = 0,
    labels: str = "first-eot",
    weights: np.ndarray | None = None,
    shape: PackShape | None = None,
    threads: int = 1,
    depth: int = 2,
    keep: int = 2,
    pinned: bool = False,
) -> "Prefetch":
    """Iterate over the packs `order` (integers [K]) of a plan, each as `collate` would give it.

    plan_rows: int64 [R] and plan_offsets: int64 [P + 1], pack p is `plan_rows[plan_offsets[p]:plan_offsets[p + 1]]`.
    capacity: the most ids of a pack. weights: loss weight of each entry of plan_rows, [R]. threads: that fill one pack.
    depth: packs filled ahead. keep: how many of the last batches are valid; a batch's arrays are views of the ring,
    which are overwritten once `keep` more batches have been asked for (with the default 2, when the next but one is).
    A copy to a GPU that does not block must have ended by then. Memory: depth + keep packs. pinned: see PackBuffers.
    The other arguments are those of `collate`.

    Errors are those of `collate`, with the number of the pack, raised in its place behind the packs before it.
    """
    from medmax_fast import _csrc

    shape = shape or FREE_SHAPE
    plan_rows, plan_offsets, order = (np.ascontiguousarray(a, dtype=np.int64) for a in (plan_rows, plan_offsets, order))
    weights = row_weights(weights, len(plan_rows))
    most_rows = min(int(np.diff(plan_offsets).max(initial=0)), len(plan_rows))
    sequences = shape.sequences or most_rows + (shape.length > 0)
    length = max(capacity, shape.length)
    ring = PackBuffers.allocate(length, sequences, weights=weights is not None, pinned=pinned, slots=depth + keep)
    stream = _csrc.Prefetcher(
        ids,
        offsets,
        plan_rows,
        weights,
        plan_offsets,
        order,
        eot,
        labels,
        max_length,
        shape.length,
        shape.pad,
        threads,
        keep,
        ring.input_ids,
        ring.labels,
        ring.position_ids,
        ring.loss_weights,
        ring.cu_seqlens,
    )
    return Prefetch(stream, ring, plan_rows, plan_offsets, order, shape)


class Prefetch(Iterator[PackedBatch]):
    """The iterator of `prefetch`; also a context manager that ends its thread."""

    def __init__(self, stream, ring: PackBuffers, plan_rows, plan_offsets, order, shape: PackShape):
        self._stream = stream
        self._ring = ring
        self._plan = plan_rows, plan_offsets
        self._order = iter(order.tolist())
        self._shape = shape

    def __next__(self) -> PackedBatch:
        found = self._stream.next()
        if found is None:
            self.close()
            raise StopIteration
        slot, ids, sequences, longest, targets = found
        rows, offsets = self._plan
        pack = next(self._order)
        entries = (self._shape.sequences or sequences) + 1
        chosen = rows[offsets[pack] : offsets[pack + 1]]
        return self._ring[slot].batch(ids, entries, reported_longest(self._shape, longest), chosen, targets)

    def close(self) -> None:
        """End the thread; batches handed out stay as they are."""
        self._stream.close()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_) -> None:
        self.close()

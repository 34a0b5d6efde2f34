"""Rows of a token buffer as one packed batch: ids behind each other, labels, positions and boundaries.

A packed batch is what variable-length attention takes: row i of the pack is `cu_seqlens[i]:cu_seqlens[i + 1]` of every
array, and positions restart at 0 in each row. Labels are not shifted (the loss compares the hidden state at t with the
label at t + 1): -100 up to and including the first eot of a row, the ids after it. A row without eot counts whole,
except its first label, which nothing predicts: in a pack the id before it is another row's.

The work is done by csrc/collator (threads, no GIL, 2 bytes read and 24 written per id); `collate_ref` and
`target_counts_ref` say the same in NumPy.
"""

from dataclasses import dataclass

import numpy as np

IGNORED = -100


@dataclass(frozen=True)
class PackedBatch:
    """One pack of n rows and T ids.

    input_ids, labels, position_ids: int64 [T]. cu_seqlens: int32 [n + 1], from 0 to T. max_seqlen: ids of the longest
    row (0 without rows). rows: int64 [n] row numbers. target_tokens: number of labels that are not -100.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    max_seqlen: int
    rows: np.ndarray
    target_tokens: int

    def to_torch(self, device="cpu") -> dict:
        """The arrays as tensors on `device`, sharing memory on the CPU.

        input_ids, labels, position_ids: int64 [1, T]; cu_seqlens: int32 [n + 1]; max_seqlen: int.
        """
        import torch

        tensors = {
            name: torch.from_numpy(getattr(self, name))[None] for name in ("input_ids", "labels", "position_ids")
        }
        tensors["cu_seqlens"] = torch.from_numpy(self.cu_seqlens)
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        return {**tensors, "max_seqlen": self.max_seqlen}


def collate(
    ids: np.ndarray, offsets: np.ndarray, rows: np.ndarray, eot: int, *, threads: int = 0, max_length: int = 0
) -> PackedBatch:
    """Pack `rows` (integers [n], any order, repeats allowed) of a token buffer.

    ids: uint16 or uint32 [M], contiguous, may be memory-mapped; offsets: int64 [N + 1], row r is
    `ids[offsets[r]:offsets[r + 1]]`. threads: 0 chooses by size. max_length: each row is cut to this many ids before
    its eot is looked for (0: no cut). IndexError: a row number or an offset outside its buffer. TypeError: another
    dtype or a buffer that is not contiguous.
    """
    from medmax_fast import _csrc

    rows = _row_numbers(rows)
    cu_seqlens = np.empty(len(rows) + 1, dtype=np.int32)
    _csrc.pack_boundaries(ids, offsets, rows, max_length, cu_seqlens)
    input_ids, labels, position_ids = (np.empty(cu_seqlens[-1], dtype=np.int64) for _ in range(3))
    targets = _csrc.fill_pack(ids, offsets, rows, cu_seqlens, eot, threads, input_ids, labels, position_ids)
    return PackedBatch(input_ids, labels, position_ids, cu_seqlens, _longest(cu_seqlens), rows, targets)


def target_counts(
    ids: np.ndarray,
    offsets: np.ndarray,
    eot: int,
    max_length: int = 0,
    *,
    rows: np.ndarray | None = None,
    threads: int = 0,
) -> np.ndarray:
    """Number of supervised ids, int64, of every row (or of `rows`), as `collate` would label them.

    Reads each row up to its first eot. Arguments and errors are those of `collate`.
    """
    from medmax_fast import _csrc

    rows = np.arange(len(offsets) - 1, dtype=np.int64) if rows is None else _row_numbers(rows)
    counts = np.empty(len(rows), dtype=np.int64)
    _csrc.count_targets(ids, offsets, rows, max_length, eot, threads, counts)
    return counts


def collate_ref(
    ids: np.ndarray, offsets: np.ndarray, rows: np.ndarray, eot: int, *, max_length: int = 0
) -> PackedBatch:
    """`collate` in NumPy, row by row."""
    cut = max_length if max_length > 0 else None
    parts = [ids[offsets[row] : offsets[row + 1]][:cut].astype(np.int64) for row in rows]
    labels = [_labels_ref(part, eot) for part in parts]
    empty = [np.empty(0, dtype=np.int64)]
    cu_seqlens = np.cumsum([0] + [len(part) for part in parts]).astype(np.int32)
    joined = np.concatenate(empty + labels)
    return PackedBatch(
        input_ids=np.concatenate(empty + parts),
        labels=joined,
        position_ids=np.concatenate(empty + [np.arange(len(part)) for part in parts]),
        cu_seqlens=cu_seqlens,
        max_seqlen=_longest(cu_seqlens),
        rows=_row_numbers(rows),
        target_tokens=int((joined != IGNORED).sum()),
    )


def target_counts_ref(ids: np.ndarray, offsets: np.ndarray, eot: int, max_length: int = 0) -> np.ndarray:
    """`target_counts` of every row, through `collate_ref`."""
    rows = range(len(offsets) - 1)
    counts = [collate_ref(ids, offsets, [row], eot, max_length=max_length).target_tokens for row in rows]
    return np.array(counts, dtype=np.int64)


def _labels_ref(row: np.ndarray, eot: int) -> np.ndarray:
    labels = row.copy()
    first = np.flatnonzero(row == eot)
    labels[: first[0] + 1 if len(first) else 1] = IGNORED
    return labels


def _row_numbers(rows) -> np.ndarray:
    return np.ascontiguousarray(rows, dtype=np.int64)


def _longest(cu_seqlens: np.ndarray) -> int:
    return int(np.diff(cu_seqlens).max(initial=0))

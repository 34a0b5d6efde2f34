"""Rows of a token buffer as one packed batch: ids behind each other, labels, positions, boundaries, loss weights.

A packed batch is what variable-length attention takes: row i of the pack is `cu_seqlens[i]:cu_seqlens[i + 1]` of every
array, and positions restart at 0 in each row. Labels are not shifted (the loss compares the hidden state at t with the
label at t + 1). Which ids of a row have a label, by policy; the others hold -100:

    first-eot   every id after the first eot: prompt ignored, response supervised (the published training)
    per-turn    turns end with their eot and alternate user, assistant, user, ..: the assistant's, with their eot. What
                follows the last eot belongs to the turn that would come next, so an eos behind user, eot, answer is
                supervised and an eos behind user, eot, answer, eot is not.
    all         every id

A row without eot counts whole under each, and a row's first label is always -100: nothing predicts it, since in a pack
the id before it is another row's. Rows are cut to `max_length` before eot is looked for.

The work is done by csrc/collator (threads, no GIL, 2 bytes read and 24 written per id, 28 with loss weights);
`collate_ref` and `target_counts_ref` say the same in NumPy.
"""

from dataclasses import dataclass

import numpy as np

from medmax_fast.runtime import InputError

IGNORED = -100
LABEL_POLICIES = ("first-eot", "per-turn", "all")


@dataclass(frozen=True)
class PackShape:
    """What every pack has the same number of, as a CUDA graph needs it; 0 leaves a size to the rows of the pack.

    length: ids. A shorter pack is filled up with `pad` (label -100, position 0, weight 0); the padding is one more
    sequence behind the rows, because variable-length attention leaves outputs outside of all sequences unwritten.
    sequences: cu_seqlens has `sequences + 1` entries; those behind the last sequence repeat it, so the surplus ones
    are empty. max_seqlen: what the batch says, at least its longest sequence, padding included (`length` always is).
    """

    length: int = 0
    sequences: int = 0
    max_seqlen: int = 0
    pad: int = 1


# As many ids and sequences as the rows have.
FREE_SHAPE = PackShape()


@dataclass(frozen=True)
class PackedBatch:
    """One pack of n rows and T ids.

    input_ids, labels, position_ids: int64 [T]. cu_seqlens: int32 [n + 1], from 0 to T (longer with padding, see
    PackShape). max_seqlen: ids of the longest sequence (0 without any). rows: int64 [n] row numbers. target_tokens:
    number of labels that are not -100. loss_weights: float32 [T], the weight of its row where an id has a label, else
    0; None if rows have no weights. It lies beside the labels because the loss then weights its chosen positions by the
    gather that fetches their targets: no search for the row of an id, for 4 bytes an id.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    max_seqlen: int
    rows: np.ndarray
    target_tokens: int
    loss_weights: np.ndarray | None = None

    @property
    def num_ids(self) -> int:
        """Ids without padding."""
        return int(self.cu_seqlens[len(self.rows)])

    @property
    def target_weight(self) -> float:
        """Sum of loss_weights, by which a weighted loss is divided; target_tokens without weights."""
        return float(self.target_tokens if self.loss_weights is None else self.loss_weights.sum(dtype=np.float64))

    def to_torch(self, device="cpu", non_blocking: bool = False) -> dict:
        """The arrays as tensors on `device`, sharing memory on the CPU.

        input_ids, labels, position_ids, and loss_weights if there are any: [1, T]; cu_seqlens: int32 [n + 1];
        max_seqlen, target_tokens: int. non_blocking: copies from pinned memory go on while this returns, and the arrays
        must not be filled anew before they have ended.
        """
        import torch

        names = ["input_ids", "labels", "position_ids"] + ["loss_weights"] * (self.loss_weights is not None)
        tensors = {name: torch.from_numpy(getattr(self, name))[None] for name in names}
        tensors["cu_seqlens"] = torch.from_numpy(self.cu_seqlens)
        tensors = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items()}
        return {**tensors, "max_seqlen": self.max_seqlen, "target_tokens": self.target_tokens}


@dataclass(frozen=True)
class PackBuffers:
    """Memory for a pack of up to T ids and S sequences, filled anew by each `collate(buffers=)`.

    Fresh arrays cost a page fault for every 4 KB; these cost none after the first pack. Arrays may begin with a
    dimension of `slots`, and `buffers[slot]` is one of them.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    loss_weights: np.ndarray | None

    @classmethod
    def allocate(
        cls, length: int, sequences: int, *, weights: bool = False, pinned: bool = False, slots: int | None = None
    ) -> "PackBuffers":
        """Buffers of int64 [length], int32 [sequences + 1] and, with `weights`, float32 [length].

        pinned: page-locked, for copies to a GPU that go on beside the program. InputError without a GPU.
        """
        front = () if slots is None else (slots,)
        input_ids, labels, position_ids = (_empty((*front, length), "int64", pinned) for _ in range(3))
        cu_seqlens = _empty((*front, sequences + 1), "int32", pinned)
        loss_weights = _empty((*front, length), "float32", pinned) if weights else None
        return cls(input_ids, labels, position_ids, cu_seqlens, loss_weights)

    def __getitem__(self, slot: int) -> "PackBuffers":
        weights = None if self.loss_weights is None else self.loss_weights[slot]
        return PackBuffers(
            self.input_ids[slot], self.labels[slot], self.position_ids[slot], self.cu_seqlens[slot], weights
        )

    def batch(self, ids: int, entries: int, max_seqlen: int, rows: np.ndarray, targets: int) -> PackedBatch:
        """What was filled in, as views: the first `ids` ids and `entries` of cu_seqlens."""
        weights = None if self.loss_weights is None else self.loss_weights[:ids]
        arrays = self.input_ids[:ids], self.labels[:ids], self.position_ids[:ids], self.cu_seqlens[:entries]
        return PackedBatch(*arrays, max_seqlen, rows, targets, weights)


def collate(
    ids: np.ndarray,
    offsets: np.ndarray,
    rows: np.ndarray,
    eot: int,
    *,
    threads: int = 0,
    max_length: int = 0,
    labels: str = "first-eot",
    weights: np.ndarray | None = None,
    shape: PackShape | None = None,
    buffers: PackBuffers | None = None,
) -> PackedBatch:
    """Pack `rows` (integers [n], any order, repeats allowed) of a token buffer.

    ids: uint16 or uint32 [M], contiguous, may be memory-mapped; offsets: int64 [N + 1], row r is
    `ids[offsets[r]:offsets[r + 1]]`. threads: 0 chooses by size. max_length: each row is cut to this many ids (0: no
    cut). labels: one of LABEL_POLICIES. weights: loss weight of each row, [n]. buffers: filled in place, and the batch
    is a view of them until they are filled again; without, its arrays are new. IndexError: a row number or an offset
    outside its buffer. TypeError: another dtype or a buffer that is not contiguous. ValueError: rows that do not fit
    `shape` or `buffers`, weights that do not fit the rows, no such policy.
    """
    from medmax_fast import _csrc

    shape = shape or FREE_SHAPE
    rows = _row_numbers(rows)
    weights = row_weights(weights, len(rows))
    if buffers is not None and (buffers.loss_weights is None) != (weights is None):
        raise InputError("weights of rows and buffers allocated with weights=True go together")
    entries = (shape.sequences or len(rows) + (shape.length > 0)) + 1
    cu_seqlens = np.empty(entries, dtype=np.int32) if buffers is None else buffers.cu_seqlens[:entries]
    if shape.sequences and len(cu_seqlens) < entries:
        raise InputError(f"buffers for {len(cu_seqlens) - 1} sequences, expected at least {shape.sequences}")
    sequences, longest = _csrc.pack_boundaries(ids, offsets, rows, max_length, shape.length, cu_seqlens)
    if not shape.sequences:
        cu_seqlens = cu_seqlens[: sequences + 1]
    total = int(cu_seqlens[-1])
    if buffers is None:
        input_ids, label_ids, position_ids = (np.empty(total, dtype=np.int64) for _ in range(3))
        loss_weights = None if weights is None else np.empty(total, dtype=np.float32)
        buffers = PackBuffers(input_ids, label_ids, position_ids, cu_seqlens, loss_weights)
    elif total > len(buffers.input_ids):
        raise InputError(f"a pack of {total} ids, buffers for {len(buffers.input_ids)}")
    longest = reported_longest(shape, longest)
    targets = _csrc.fill_pack(
        ids,
        offsets,
        rows,
        cu_seqlens,
        eot,
        threads,
        buffers.input_ids,
        buffers.labels,
        buffers.position_ids,
        policy=labels,
        pad=shape.pad,
        weights=weights,
        loss_weights=buffers.loss_weights,
    )
    return buffers.batch(total, len(cu_seqlens), longest, rows, targets)


def target_counts(
    ids: np.ndarray,
    offsets: np.ndarray,
    eot: int,
    max_length: int = 0,
    *,
    rows: np.ndarray | None = None,
    threads: int = 0,
    labels: str = "first-eot",
) -> np.ndarray:
    """Number of supervised ids, int64, of every row (or of `rows`), as `collate` would label them.

    Reads each row up to its first eot (whole with per-turn, not at all with all). Arguments and errors are those of
    `collate`.
    """
    from medmax_fast import _csrc

    rows = np.arange(len(offsets) - 1, dtype=np.int64) if rows is None else _row_numbers(rows)
    counts = np.empty(len(rows), dtype=np.int64)
    _csrc.count_targets(ids, offsets, rows, max_length, eot, threads, counts, labels)
    return counts


def collate_ref(
    ids: np.ndarray,
    offsets: np.ndarray,
    rows: np.ndarray | list[int],
    eot: int,
    *,
    max_length: int = 0,
    labels: str = "first-eot",
    weights: np.ndarray | None = None,
    shape: PackShape | None = None,
) -> PackedBatch:
    """`collate` in NumPy, row by row."""
    shape = shape or FREE_SHAPE
    cut = max_length if max_length > 0 else None
    parts = [ids[offsets[row] : offsets[row + 1]][:cut].astype(np.int64) for row in rows]
    marked = [_supervised_ref(part, eot, labels) for part in parts]
    total = sum(map(len, parts))
    padding = [np.full(shape.length - total, shape.pad)] if total < shape.length else []
    sequences = [*parts, *padding]
    cu_seqlens = np.cumsum([0] + [len(part) for part in sequences]).astype(np.int32)
    repeated = max(shape.sequences + 1 - len(cu_seqlens), 0)
    joined = np.concatenate([np.empty(0, dtype=np.int64), *sequences])
    kept = np.concatenate([np.empty(0, dtype=bool), *marked, *(np.zeros(len(part), dtype=bool) for part in padding)])
    if weights is not None:
        weights = np.repeat(np.asarray([*weights, 0][: len(sequences)], np.float32), np.diff(cu_seqlens)) * kept
    return PackedBatch(
        input_ids=joined,
        labels=np.where(kept, joined, IGNORED),
        position_ids=np.concatenate(
            [np.empty(0, dtype=np.int64), *map(np.arange, map(len, parts)), *(part * 0 for part in padding)]
        ),
        cu_seqlens=np.concatenate([cu_seqlens, cu_seqlens[-1:].repeat(repeated)]),
        max_seqlen=shape.max_seqlen or max(map(len, sequences), default=0),
        rows=_row_numbers(rows),
        target_tokens=int(kept.sum()),
        loss_weights=weights,
    )


def target_counts_ref(
    ids: np.ndarray, offsets: np.ndarray, eot: int, max_length: int = 0, *, labels: str = "first-eot"
) -> np.ndarray:
    """`target_counts` of every row, through `collate_ref`."""
    rows = range(len(offsets) - 1)
    batches = (collate_ref(ids, offsets, [row], eot, max_length=max_length, labels=labels) for row in rows)
    return np.array([batch.target_tokens for batch in batches], dtype=np.int64)


def row_weights(weights, count: int) -> np.ndarray | None:
    """Loss weights of `count` rows as float32; InputError for another number of them or one that is not finite."""
    if weights is None:
        return None
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    if weights.shape != (count,):
        raise InputError(f"weights of shape {list(weights.shape)} for {count} rows")
    if not np.isfinite(weights).all():
        raise InputError(f"weight {weights[~np.isfinite(weights)][0]} of a row: expected a finite number")
    return weights


def reported_longest(shape: PackShape, longest: int) -> int:
    """max_seqlen of a batch; InputError if the shape promises less than its longest sequence has."""
    if 0 < shape.max_seqlen < longest:
        raise InputError(f"a sequence of {longest} ids, max_seqlen is fixed at {shape.max_seqlen}")
    return shape.max_seqlen or longest


def _supervised_ref(row: np.ndarray, eot: int, labels: str) -> np.ndarray:
    """Which ids have a label, bool; `ends[t]` eots lie before id t."""
    ends = np.cumsum(row == eot) - (row == eot)
    if labels not in LABEL_POLICIES:
        raise InputError(f"labels {labels!r}: expected one of {', '.join(LABEL_POLICIES)}")
    if labels == "all" or eot not in row:
        kept = np.ones(len(row), dtype=bool)
    else:
        kept = ends > 0 if labels == "first-eot" else ends % 2 == 1
    kept[:1] = False
    return kept


def _row_numbers(rows) -> np.ndarray:
    return np.ascontiguousarray(rows, dtype=np.int64)


def _empty(shape: tuple[int, ...], dtype: str, pinned: bool) -> np.ndarray:
    if not pinned:
        return np.empty(shape, dtype=dtype)
    import torch

    if not torch.cuda.is_available():
        raise InputError("pinned buffers need a CUDA device, none was found")
    # The array keeps the tensor, and with it the memory, alive.
    return torch.empty(shape, dtype=getattr(torch, dtype), pin_memory=True).numpy()

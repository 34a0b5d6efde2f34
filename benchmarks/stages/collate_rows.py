"""What bench_collate collates: rows and packs of them, the other collators, and the check that all give the same."""

from collections.abc import Callable

import numpy as np
import torch

from medmax_fast.data.collate import IGNORED, LABEL_POLICIES, collate, collate_ref
from medmax_fast.data.prefetch import Prefetch, prefetch

EOT, PAD = 8710, 1
CUT = 2048


def token_buffer(count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint16 ids and int64 offsets of `count` rows: image first, question, eot, answer."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1060, 1400, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(0, EOT, offsets[-1]).astype(np.uint16)
    ids[offsets[:-1] + 1040] = EOT
    return ids, offsets


def make_packs(offsets: np.ndarray, rows: int, count: int) -> list[np.ndarray]:
    """`count` packs of so many rows, drawn with the number of rows as seed."""
    rng = np.random.default_rng(rows)
    return [rng.integers(0, len(offsets) - 1, rows) for _ in range(count)]


def published_collate(rows: list[list[int]]) -> dict:
    """Lists of Python integers, cut, padded to the longest; the first row decides whether prompts are masked."""
    rows = [row[:CUT] for row in rows]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = torch.where(mask == 1, ids, IGNORED)
    if EOT in rows[0]:
        for row, label in zip(rows, labels, strict=True):
            label[: row.index(EOT) + 1] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def flattening_collate(rows: list[list[int]]) -> Callable[[], dict]:
    """transformers' collator over these rows; what it takes, labels included, is made beforehand."""
    from transformers import DataCollatorWithFlattening

    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    features = [
        {"input_ids": row, "labels": [IGNORED] * (row.index(EOT) + 1) + row[row.index(EOT) + 1 :]} for row in rows
    ]
    return lambda: collator(features)


def as_lists(ids: np.ndarray, offsets: np.ndarray, pack: np.ndarray) -> list[list[int]]:
    return [ids[offsets[row] : offsets[row + 1]].tolist() for row in pack]


def check(ids: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> None:
    """All forms give the same ids and labels, where they mean the same."""
    for labels in LABEL_POLICIES:
        expected = collate_ref(ids, offsets, rows, EOT, labels=labels)
        batch = collate(ids, offsets, rows, EOT, threads=2, labels=labels)
        for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
            assert np.array_equal(getattr(batch, name), getattr(expected, name)), (labels, name)
    expected = collate_ref(ids, offsets, rows, EOT)
    lists = as_lists(ids, offsets, rows)
    padded = published_collate(lists)
    assert np.array_equal(padded["labels"][padded["attention_mask"] == 1].numpy(), expected.labels)
    flat = flattening_collate(lists)()
    for name in ("input_ids", "labels", "position_ids"):
        assert np.array_equal(flat[name][0].numpy(), getattr(expected, name)), name
    assert np.array_equal(flat["cu_seq_lens_q"].numpy(), expected.cu_seqlens)


def prefetching(
    ids: np.ndarray, offsets: np.ndarray, packs: list[np.ndarray], calls: int, pinned: bool = False
) -> Prefetch:
    """A running prefetcher over `calls` rounds of the packs, into page-locked memory if `pinned`."""
    bounds = np.concatenate([[0], np.cumsum([len(pack) for pack in packs])])
    largest = max(int((offsets[pack + 1] - offsets[pack]).sum()) for pack in packs)
    order = np.tile(np.arange(len(packs)), calls)
    return prefetch(ids, offsets, np.concatenate(packs), bounds, order, EOT, capacity=largest, pinned=pinned)

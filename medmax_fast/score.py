"""`medmax score`: the summed cross-entropy of each row over its supervised ids, with no id masked."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from medmax_fast.config import ScoreConfig
from medmax_fast.data.collate import collate
from medmax_fast.data.rows import place, read_rows
from medmax_fast.data.store import TokenStore
from medmax_fast.files import atomic_path
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.load import load_model
from medmax_fast.model.loss import packed_hidden, target_losses
from medmax_fast.progress import progress
from medmax_fast.runtime import InputError, log, pick_device, pick_dtype, require_at_least
from medmax_fast.vocab import IdLayout


def score(config: ScoreConfig) -> dict:
    """Write one line {"row", "loss_sum", "target_tokens"} per row of the input, in order; returns the totals.

    loss_sum is in nats. Rows are packed up to --pack-length ids and scored together; packing does not change a
    row's result. A row longer than --max-length is cut there, as the published training does.
    """
    require_at_least(config, 1, "max_length", "pack_length")
    if Path(config.output).is_dir():
        raise InputError(f"--output {config.output}: a folder, expected the JSONL file to write")
    checkpoint = open_checkpoint(config.ckpt)
    layout = IdLayout.from_file(checkpoint.tokenizer_path)
    ids, offsets = _read_ids(config.input, layout)
    device = pick_device(config.device)
    model = load_model(checkpoint, device, pick_dtype(config.precision, device))
    lengths = np.minimum(np.diff(offsets), config.max_length)
    cut = int((np.diff(offsets) > config.max_length).sum())
    if cut:
        log(f"{cut} rows cut to --max-length {config.max_length}")
    totals = [0.0, 0]
    with atomic_path(config.output) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for rows in progress(list(_packs(lengths, config.pack_length)), "scoring packs"):
            batch = collate(ids, offsets, rows, layout.eot, max_length=config.max_length)
            for row, (loss, count) in zip(rows, score_batch(model, batch), strict=True):
                file.write(json.dumps({"row": int(row), "loss_sum": loss, "target_tokens": count}) + "\n")
                totals = [totals[0] + loss, totals[1] + count]
    mean = totals[0] / totals[1] if totals[1] else None
    return {
        "rows": len(lengths),
        "cut": cut,
        "target_tokens": totals[1],
        "loss_per_token": mean,
        "output": config.output,
    }


@torch.inference_mode()
def score_batch(model, batch) -> list[tuple[float, int]]:
    """(summed cross-entropy in nats, supervised ids) of each row of a PackedBatch."""
    tensors = batch.to_torch(model.lm_head.weight.device)
    hidden, blocks = packed_hidden(model, tensors), (model.lm_head.weight,)
    _, losses, _, _ = target_losses(hidden, tensors["labels"][0], blocks, count=batch.target_tokens)
    # A row's losses follow the order of its labels, so running totals at its bounds give its sum.
    counts = np.concatenate([[0], np.cumsum(batch.labels != -100)])[batch.cu_seqlens]
    parts = losses.double().cpu().numpy()
    return [(float(parts[a:b].sum()), int(b - a)) for a, b in zip(counts[:-1], counts[1:], strict=True)]


def _packs(lengths: np.ndarray, capacity: int) -> Iterator[np.ndarray]:
    """Consecutive rows, as many as fit; a longer row goes alone."""
    start, total = 0, 0
    for row, length in enumerate(lengths):
        if row > start and total + length > capacity:
            yield np.arange(start, row)
            start, total = row, 0
        total += int(length)
    yield np.arange(start, len(lengths))


def _read_ids(path: str, layout: IdLayout) -> tuple[np.ndarray, np.ndarray]:
    """Flat ids and row offsets of a token store or of a table with `tokens`."""
    if Path(path).is_dir():
        store = TokenStore(path)
        if store.layout.vocab_size > layout.vocab_size:
            ids = f"{store.layout.vocab_size} ids, the checkpoint's {layout.vocab_size}"
            raise InputError(f"{path}: its vocabulary has {ids}")
        return store.ids, store.offsets
    dtype = np.uint16 if layout.vocab_size <= 1 << 16 else np.uint32
    rows = []
    for number, row in progress(read_rows(path, columns=("tokens",)), "reading rows"):
        tokens, where = row.get("tokens"), f"{path}: {place(path, number)}"
        if not isinstance(tokens, list) or not tokens or not all(type(t) is int for t in tokens):
            raise InputError(f"{where}: tokens is not a list of integers")
        bad = next((t for t in tokens if not 0 <= t < layout.vocab_size), None)
        if bad is not None:
            raise InputError(f"{where}: id {bad} is outside the vocabulary of {layout.vocab_size}")
        rows.append(np.array(tokens, dtype=dtype))
    if not rows:
        raise InputError(f"{path}: no rows")
    return np.concatenate(rows), np.cumsum([0] + [len(row) for row in rows]).astype(np.int64)

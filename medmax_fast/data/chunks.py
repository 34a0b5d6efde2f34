"""Portions of a JSONL or Parquet file of rows: read one after the other, parsed by any thread.

A chunk says where it begins and where the next one does, so reading can go on from there. Lists of integers become
arrays without a Python object per integer wherever they are plain (a flat list of ids or of 1024 codes, right in type
and range); every other value stays what Python makes of it, and is judged by the caller.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medmax_fast.data.rows import json_object, parquet_batches, table_kind
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_CODES

CHUNK_BYTES = 2 << 20
CHUNK_ROWS = 1024
_NO_CODES = np.zeros((0, IMAGE_CODES), np.uint16)


@dataclass(frozen=True)
class Chunk:
    """Rows first..stop-1 of a file, not yet parsed; byte: where row `stop` begins in a JSONL file."""

    first: int
    stop: int
    byte: int
    content: Any


@dataclass(frozen=True)
class ParsedRows:
    """N rows of a chunk.

    rows: row numbers. values: a dict of column values per row, or the InputError that is in its place.
    ids, ids_offsets [N + 1]: the `tokens` of each row where they are plain, ids_offsets[i] == ids_offsets[i + 1] where
    not. codes uint16 [images, 1024], codes_offsets [N + 1]: the same of `image_tokens`.
    What is in these arrays is null, or an empty list, in `values`.
    """

    rows: Sequence[int]
    values: list[dict | InputError]
    ids: np.ndarray
    ids_offsets: np.ndarray
    codes: np.ndarray
    codes_offsets: np.ndarray

    def row(self, i: int) -> dict:
        """The column values of row i, which must not be in error."""
        values = self.values[i]
        assert isinstance(values, dict), values
        return values


def read_chunks(path: Path, columns: Sequence[str] | None, row: int = 0, byte: int = 0) -> Iterator[Chunk]:
    """Read a file from a row (and of JSONL its byte) on; InputError where it is corrupt."""
    if table_kind(path) == "parquet":
        for batch in parquet_batches(path, columns, CHUNK_ROWS, row):
            yield Chunk(row, row + batch.num_rows, 0, batch)
            row += batch.num_rows
        return
    with open(path, "rb") as file:
        file.seek(byte)
        # Whole lines: what is left of the last one comes with it.
        while content := file.read(CHUNK_BYTES) + file.readline():
            lines = content.count(b"\n") + (not content.endswith(b"\n"))
            byte += len(content)
            yield Chunk(row, row + lines, byte, content)
            row += lines


def parse_chunk(chunk: Chunk, columns: Sequence[str] | None, vocab_size: int, keep_codes: bool) -> ParsedRows:
    """The rows of a chunk. columns: those to keep (None: all). keep_codes: leave image_tokens as Python lists."""
    if isinstance(chunk.content, bytes):
        return _parse_lines(chunk, columns, vocab_size)
    return _parse_batch(chunk, keep_codes)


def _parse_lines(chunk: Chunk, columns: Sequence[str] | None, vocab_size: int) -> ParsedRows:
    from medmax_fast import _csrc

    scan = _csrc.json_ids_16 if vocab_size <= 1 << 16 else _csrc.json_ids_32
    ids, offsets, spans = scan(chunk.content, "tokens", vocab_size)
    rows, values, kept, start = [], [], [], 0
    lines = chunk.content.split(b"\n")
    # The last piece is empty where the last line has an end.
    for i, (line, (begin, end)) in enumerate(zip(lines, spans.reshape(-1, 2).tolist(), strict=False)):
        # For the parser an empty list stands where the scanner has read the ids.
        short = line if begin < 0 else line[: begin - start] + b"[]" + line[end - start :]
        start += len(line) + 1
        if not line.strip():
            continue
        try:
            row = json_object(short)
            row = row if columns is None else {name: row[name] for name in columns if name in row}
        except InputError:
            row = _error_of(line + b"\n" if i + 1 < len(lines) else line)
        rows.append(chunk.first + i)
        values.append(row)
        kept.append(i)
    # Blank lines have no ids, so the others' lie end to end all the same.
    bounds = offsets[np.array([*kept, len(offsets) - 1], dtype=np.int64)]
    return ParsedRows(rows, values, ids, bounds, _NO_CODES, np.zeros(len(rows) + 1, np.int64))


def _error_of(line: bytes) -> InputError:
    """The error of a line that is no JSON, in the words for the whole line as it stands in the file."""
    try:
        json_object(line)
    except InputError as error:
        return error
    raise AssertionError("a line is JSON with its ids and is not without")


def _parse_batch(chunk: Chunk, keep_codes: bool) -> ParsedRows:
    import pyarrow

    batch, count = chunk.content, chunk.content.num_rows
    ids, ids_offsets = np.zeros(0, np.uint16), np.zeros(count + 1, np.int64)
    codes, codes_offsets, no_image = _NO_CODES, np.zeros(count + 1, np.int64), []
    for i, name in enumerate(batch.schema.names):
        column = batch.column(i)
        if name == "tokens" and (found := _integers(column)):
            ids, ids_offsets = found
        elif name == "image_tokens" and not keep_codes and (found := _images(column)):
            codes, codes_offsets = found
            # An empty list is kept apart from null: it says that there is no image.
            empty = (np.diff(codes_offsets) == 0) & column.is_valid().to_numpy(zero_copy_only=False)
            no_image = np.flatnonzero(empty).tolist()
        else:
            continue
        batch = batch.set_column(i, name, pyarrow.nulls(count))
    values = batch.to_pylist()
    for row in no_image:
        values[row]["image_tokens"] = []
    return ParsedRows(range(chunk.first, chunk.stop), values, ids, ids_offsets, codes, codes_offsets)


def _integers(column) -> tuple[np.ndarray, np.ndarray] | None:
    """A list column as (values, int64 offsets), without copying what is 2 bytes wide or more; None if not plain."""
    from pyarrow import types

    kind = column.type
    if not (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)):
        return None
    # Unsigned 64-bit integers are left to Python, which has no largest one.
    if not types.is_integer(kind.value_type) or types.is_uint64(kind.value_type):
        return None
    flat = column.flatten()
    if flat.null_count:
        return None
    values = flat.to_numpy(zero_copy_only=True)
    return (values if values.dtype in ("i4", "i8", "u2", "u4") else values.astype(np.int32)), _offsets(column)


def _offsets(column) -> np.ndarray:
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _images(column) -> tuple[np.ndarray, np.ndarray] | None:
    """A column of lists of codes, or of lists of such, as (codes [images, 1024], int64 offsets); None if not plain."""
    from pyarrow import types

    kind = column.type
    if not (types.is_list(kind) or types.is_large_list(kind)):
        return None
    nested = not types.is_integer(kind.value_type)
    found = _integers(column.flatten() if nested else column)
    if found is None:
        return None
    flat, ends = found
    lengths = np.diff(ends)
    if nested and (lengths != IMAGE_CODES).any() or not np.isin(lengths, (0, IMAGE_CODES)).all():
        return None
    if len(flat) and (flat.min() < 0 or flat.max() > np.iinfo(np.uint16).max):
        return None
    codes = np.ascontiguousarray(flat, np.uint16).reshape(-1, IMAGE_CODES)
    return codes, _offsets(column) if nested else ends // IMAGE_CODES


def in_order(work: Callable, items: Iterable, workers: int) -> Iterator:
    """work(item) of each item, in order, by `workers` threads with at most two items more than that under way.

    An InputError of an item, or of the iteration itself, comes in its turn: after the results before it.
    """
    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(workers, "build") as pool:
        try:
            for item in _with_error(items):
                if isinstance(item, InputError):
                    waiting.append(Future())
                    waiting[-1].set_exception(item)
                else:
                    waiting.append(pool.submit(work, item))
                if len(waiting) > workers + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _with_error(items: Iterable) -> Iterator:
    try:
        yield from items
    except InputError as error:
        yield error

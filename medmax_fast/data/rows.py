"""Streaming readers of tables: CSV, Parquet and JSONL as (row number, dict), in constant memory.

Row numbers count data rows from 0, except that the row number of a JSONL row is its line's index, so that skipped
blank lines do not shift it. `place` turns a row number into the words that messages use: JSONL lines are
counted from 1, as editors do. Every malformed file is an InputError of one line with the file and the place.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from medmax_fast.files import require_file
from medmax_fast.runtime import InputError

_KINDS = {".csv": "csv", ".parquet": "parquet", ".pq": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
PARQUET_BATCH = 1024

# What to do with one malformed row: (row number, reason). Without it the InputError ends the reading.
OnBad = Callable[[int, str], None]


def table_kind(path: str | Path) -> str:
    """`csv`, `parquet` or `jsonl` by suffix; InputError for a missing file or another suffix."""
    path = require_file(path)
    kind = _KINDS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{path}: unknown kind of table, expected one of {' '.join(_KINDS)}")
    return kind


def place(path: str | Path, row: int) -> str:
    """Where a row stands, for messages: `line 3` of a JSONL file, `row 2` of another."""
    return f"line {row + 1}" if _KINDS.get(Path(path).suffix.lower()) == "jsonl" else f"row {row}"


def read_rows(
    path: str | Path, columns: Sequence[str] | None = None, on_bad: OnBad | None = None
) -> Iterator[tuple[int, dict]]:
    """Yield (row number, values by column name) of a table.

    columns: read these alone (absent ones are left out of the dicts; checking is the caller's). on_bad: told of a
    malformed line of JSONL or CSV instead of raising InputError; a file that is broken as a whole always raises.
    """
    kind = table_kind(path)
    reader = {"csv": _read_csv, "parquet": _read_parquet, "jsonl": _read_jsonl}[kind]
    return reader(Path(path), columns, on_bad)


def column_names(path: str | Path) -> list[str]:
    """Column names of a table (of JSONL: the keys of its first row); InputError if it is empty or broken."""
    kind = table_kind(path)
    if kind == "parquet":
        return _open_parquet(Path(path)).schema_arrow.names
    if kind == "csv":
        with open(path, encoding="utf-8-sig", newline="") as file:
            return _csv_header(Path(path), csv.reader(file, strict=True))
    for _, values in _read_jsonl(Path(path), None, None):
        return list(values)
    raise InputError(f"{path}: empty file, expected one JSON object per line")


def typed(values: dict, name: str, *kinds: type):
    """values[name], or None where it is absent or null; InputError (the caller adds the place) for another type."""
    value = values.get(name)
    if value is None or isinstance(value, kinds):
        return value
    names = " or ".join(kind.__name__ for kind in kinds)
    raise InputError(f"{name} is {type(value).__name__} {_short(value)}, expected {names}")


def unicode_text(text: str | None, name: str) -> str | None:
    """The text; InputError for half of a surrogate pair, which JSON can spell and no file or tokenizer takes."""
    try:
        if text is not None and not text.isascii():
            text.encode()
        return text
    except UnicodeEncodeError:
        raise InputError(f"{name} holds a lone surrogate, expected Unicode text") from None


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _read_jsonl(path: Path, columns, on_bad: OnBad | None) -> Iterator[tuple[int, dict]]:
    # Bytes, because one badly encoded line must not take the lines after it along.
    with open(path, "rb") as file:
        for row, line in enumerate(file):
            if not line.strip():
                continue
            try:
                values = json_object(line)
            except InputError as error:
                _bad(path, row, str(error), on_bad)
            else:
                yield row, values if columns is None else {k: values[k] for k in columns if k in values}


def json_object(line: bytes) -> dict:
    """One line of JSONL; InputError (the caller adds the place) if it is anything but an object."""
    try:
        values = json.loads(line)
        if isinstance(values, dict):
            return values
        reason = f"{type(values).__name__} {_short(values)}"
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg} at column {error.colno})"
    # ValueError: besides text that is not UTF-8, an integer of thousands of digits.
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON ({_first_line(error)})"
    raise InputError(f"{reason}, expected a JSON object")


def _read_csv(path: Path, columns, on_bad: OnBad | None) -> Iterator[tuple[int, dict]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = _csv_header(path, reader)
        wanted = [(i, name) for i, name in enumerate(header) if columns is None or name in columns]
        row = -1
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise InputError(f"{path}: line {reader.line_num}: not valid CSV ({error})") from error
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: after line {reader.line_num}: not UTF-8 text ({error})") from error
            if not cells:
                continue
            row += 1
            if len(cells) != len(header):
                found = f"line {reader.line_num}: {len(cells)} cells, expected {len(header)} as in the header"
                _bad(path, row, found, on_bad, placed=True)
                continue
            yield row, {name: cells[i] for i, name in wanted}


def _csv_header(path: Path, reader) -> list[str]:
    try:
        header = next(reader, None)
    except csv.Error as error:
        raise InputError(f"{path}: line 1: not valid CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from error
    if not header:
        raise InputError(f"{path}: empty file, expected a header line with column names")
    for name in header:
        if header.count(name) > 1:
            raise InputError(f"{path}: line 1: column {name!r} appears {header.count(name)} times, expected once")
    return header


def _read_parquet(path: Path, columns, on_bad: OnBad | None) -> Iterator[tuple[int, dict]]:
    row = 0
    for batch in parquet_batches(path, columns):
        for values in batch.to_pylist():
            yield row, values
            row += 1


def parquet_batches(
    path: str | Path, columns: Sequence[str] | None = None, rows: int = PARQUET_BATCH, first: int = 0
) -> Iterator:
    """Record batches of a Parquet file from row `first` on, absent columns left out; InputError if it is corrupt."""
    import pyarrow

    file = _open_parquet(Path(path))
    names = file.schema_arrow.names
    wanted = names if columns is None else [n for n in columns if n in names]
    try:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        group = 0
        while group < len(sizes) and first >= sizes[group]:
            first -= sizes[group]
            group += 1
        left = sum(sizes[group:])
        for batch in file.iter_batches(rows, row_groups=range(group, len(sizes)), columns=wanted):
            # Flipped bytes may leave strings that are not UTF-8 and offsets that point outside.
            batch.validate(full=True)
            left -= batch.num_rows
            if first < batch.num_rows:
                yield batch.slice(first)
            first = max(first - batch.num_rows, 0)
        if left and wanted:
            raise InputError(f"{path}: corrupt Parquet ({left} rows fewer than its footer counts)")
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: corrupt Parquet ({_first_line(error)})") from error


def _open_parquet(path: Path):
    import pyarrow
    from pyarrow import parquet

    try:
        # Page checksums are verified where a file has them; the pages of others may be wrong without a sign.
        return parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a Parquet file, or a damaged one ({_first_line(error)})") from error


def parquet_rows(path: str | Path) -> int:
    """Number of rows of a Parquet file, from its footer."""
    return _open_parquet(Path(path)).metadata.num_rows


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _bad(path: Path, row: int, reason: str, on_bad: OnBad | None, placed: bool = False) -> None:
    if on_bad is None:
        raise InputError(f"{path}: {reason}" if placed else f"{path}: {place(path, row)}: {reason}")
    on_bad(row, reason)

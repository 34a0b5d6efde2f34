"""The token store: rows of ids as memory-mapped files, written once, read by training, scoring and inspection.

    ids.bin        all rows end to end, uint16 (uint32 where the vocabulary needs it)
    offsets.npy    int64 [N + 1], where row i is ids[offsets[i] : offsets[i + 1]]
    rows.parquet   per row: key (input file and row number), task, source
    manifest.json  id layout, counts, sha256 of each file and of itself, tokenizer hash, settings
    settings.json  what the store was made from (see files.open_output)

Writing streams: 8 bytes a row stay in memory. Opening verifies every checksum (about 0.5 s per gigabyte on a
current processor) unless told not to, so that a damaged store is an error and never a wrong token.
"""

import array
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Self

import numpy as np

from medmax_fast.files import hash_file, read_json, require_file, write_json
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IdLayout

IDS_FILE, OFFSETS_FILE, ROWS_FILE, MANIFEST_FILE = "ids.bin", "offsets.npy", "rows.parquet", "manifest.json"
FORMAT_VERSION = 1
_ROW_COLUMNS = ("key", "task", "source")
_ROWS_PER_GROUP = 65536
_SELF = "manifest_sha256"


def id_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _manifest_digest(manifest: dict) -> str:
    """sha256 of a manifest's other entries."""
    entries = {name: value for name, value in manifest.items() if name != _SELF}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


class TokenStore:
    """Read a store folder; `store.row(i)` is the ids of row i. InputError if it is incomplete or damaged.

    verify: compare every file with its checksum first.
    ids: memmap [total] uint16 or uint32; offsets: int64 [N + 1]; lengths: int64 [N]; layout: IdLayout;
    tasks, sources, keys: list[str], one per row, read on first use.
    """

    def __init__(self, folder: str | Path, verify: bool = True):
        self.path = Path(folder)
        if not (self.path / MANIFEST_FILE).is_file():
            raise InputError(f"{folder}: no {MANIFEST_FILE}, expected a token store made by `medmax build`")
        self.manifest = read_json(self.path / MANIFEST_FILE)
        try:
            version = self.manifest["format"]
            self.layout = IdLayout(**self.manifest["layout"])
            self._rows, total = int(self.manifest["rows"]), int(self.manifest["ids"])
            dtype = np.dtype(self.manifest["dtype"])
            checksums = dict(self.manifest["sha256"])
            digest = self.manifest.get(_SELF)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            reason = f"not a store manifest ({error!r})"
            raise InputError(f"{self.path / MANIFEST_FILE}: {reason}; build the store again") from error
        if version != FORMAT_VERSION or dtype not in (np.uint16, np.uint32):
            found = f"format {version!r} of {dtype}, expected {FORMAT_VERSION}"
            raise InputError(f"{self.path / MANIFEST_FILE}: {found}; build the store again")
        # Stores of before this entry have none.
        if digest is not None and digest != _manifest_digest(self.manifest):
            raise InputError(f"{self.path / MANIFEST_FILE}: damaged ({_SELF} differs); build the store again")
        if verify:
            self._verify(checksums)
        self.offsets = self._read_offsets(total)
        self.lengths = np.diff(self.offsets)
        size = require_file(self.path / IDS_FILE).stat().st_size
        if size != total * dtype.itemsize:
            expected = total * dtype.itemsize
            raise InputError(f"{self.path / IDS_FILE}: {size} bytes, expected {expected}; build the store again")
        # An empty file cannot be mapped.
        self.ids = np.memmap(self.path / IDS_FILE, dtype, "r") if total else np.zeros(0, dtype)

    def _verify(self, checksums: dict[str, str]) -> None:
        for name in (IDS_FILE, OFFSETS_FILE, ROWS_FILE):
            found = hash_file(require_file(self.path / name))
            if found != checksums.get(name):
                raise InputError(f"{self.path / name}: sha256 {found}, expected {checksums.get(name)}; build it again")

    def _read_offsets(self, total: int) -> np.ndarray:
        path = require_file(self.path / OFFSETS_FILE)
        try:
            offsets = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"{path}: not an array of offsets ({error}); build the store again") from error
        if offsets.shape != (self._rows + 1,) or offsets.dtype != np.int64:
            expected = f"int64 ({self._rows + 1},)"
            raise InputError(f"{path}: {offsets.dtype} {offsets.shape}, expected {expected}; build the store again")
        if offsets[0] != 0 or offsets[-1] != total or (np.diff(offsets) <= 0).any():
            raise InputError(f"{path}: offsets do not rise from 0 to {total}; build the store again")
        return offsets

    def __len__(self) -> int:
        return self._rows

    def row(self, i: int) -> np.ndarray:
        """Ids of row i, a view into the mapped file."""
        if not 0 <= i < self._rows:
            raise IndexError(f"row {i} of a store of {self._rows}")
        return self.ids[self.offsets[i] : self.offsets[i + 1]]

    @functools.cached_property
    def _columns(self) -> dict[str, list[str]]:
        import pyarrow
        from pyarrow import parquet

        path = require_file(self.path / ROWS_FILE)
        try:
            table = parquet.read_table(path, columns=list(_ROW_COLUMNS))
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: corrupt Parquet ({reason}); build the store again") from error
        if table.num_rows != self._rows:
            raise InputError(f"{path}: {table.num_rows} rows, expected {self._rows}; build the store again")
        return {name: table.column(name).to_pylist() for name in _ROW_COLUMNS}

    @property
    def keys(self) -> list[str]:
        """Per row the input file and the row's number in it."""
        return self._columns["key"]

    @property
    def tasks(self) -> list[str]:
        """Per row its task, "" where the input named none."""
        return self._columns["task"]

    @property
    def sources(self) -> list[str]:
        """Per row its source, "" where the input named none."""
        return self._columns["source"]


class RowsWriter:
    """The other files of a store, into a folder in which ids.bin is written: offsets, rows, and with `close` the
    manifest. 8 bytes a row stay in memory, and the files do not depend on how the rows came in portions.
    """

    def __init__(self, folder: str | Path, layout: IdLayout):
        import pyarrow
        from pyarrow import parquet

        self.path = Path(folder)
        self.layout = layout
        self.dtype = id_dtype(layout.vocab_size)
        self._offsets = array.array("q", [0])
        self._schema = pyarrow.schema([(name, pyarrow.string()) for name in _ROW_COLUMNS])
        # Pages with checksums, like all Parquet that is written here.
        self._parquet = parquet.ParquetWriter(
            self.path / ROWS_FILE, self._schema, compression="zstd", write_page_checksum=True
        )
        self._pending: list[tuple[str, str, str]] = []
        self.tasks: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._parquet.close()

    def add(self, length: int, key: str, task: str = "", source: str = "") -> None:
        """Add one row of `length` > 0 ids."""
        assert length > 0, key
        self._offsets.append(self._offsets[-1] + length)
        self._pending.append((key, task, source))
        self.tasks[task] += 1
        self.sources[source] += 1
        if len(self._pending) >= _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow

        columns = list(zip(*self._pending, strict=True)) or [()] * len(_ROW_COLUMNS)
        self._parquet.write_table(pyarrow.table([list(c) for c in columns], schema=self._schema))
        self._pending.clear()

    def finish(self, ids_sha256: str, **more: object) -> dict:
        """Complete the files and write the manifest, with the entries of `more` in it; returns the manifest."""
        self._flush()
        self._parquet.close()
        np.save(self.path / OFFSETS_FILE, np.frombuffer(self._offsets, np.int64))
        checksums = {name: hash_file(self.path / name) for name in (OFFSETS_FILE, ROWS_FILE)}
        manifest = {
            "format": FORMAT_VERSION,
            "rows": len(self._offsets) - 1,
            "ids": self._offsets[-1],
            "dtype": self.dtype.name,
            "layout": asdict(self.layout),
            "sha256": {IDS_FILE: ids_sha256, **checksums},
            "tasks": dict(sorted(self.tasks.items())),
            "sources": dict(sorted(self.sources.items())),
            **more,
        }
        # As it will be read, so with texts for keys.
        manifest = json.loads(json.dumps(manifest))
        manifest[_SELF] = _manifest_digest(manifest)
        write_json(self.path / MANIFEST_FILE, manifest)
        return manifest


class StoreWriter(RowsWriter):
    """Write a whole store into an existing folder, row by row; `close` completes it with the manifest."""

    def __init__(self, folder: str | Path, layout: IdLayout):
        super().__init__(folder, layout)
        self._file = open(self.path / IDS_FILE, "wb")  # noqa: SIM115
        self._digest = hashlib.sha256()

    def __exit__(self, *error: object) -> None:
        super().__exit__()
        self._file.close()

    def append(self, ids: np.ndarray, key: str, task: str = "", source: str = "") -> None:
        """Add one row of at least one id; the ids must be in the vocabulary."""
        assert len(ids) and ids.min() >= 0 and ids.max() < self.layout.vocab_size, key
        data = np.ascontiguousarray(ids, self.dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.add(len(ids), key, task, source)

    def close(self, **more: object) -> dict:
        """Finish the files and write the manifest, with the entries of `more` in it; returns the manifest."""
        self._file.close()
        return self.finish(self._digest.hexdigest(), **more)


def write_store(folder: str | Path, layout: IdLayout, rows: Iterable[tuple], **more: object) -> TokenStore:
    """A store of (ids, key, task, source) rows at `folder`, in one call (tests, small data); returns it opened."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with StoreWriter(folder, layout) as writer:
        for row in rows:
            writer.append(*row)
        writer.close(**more)
    return TokenStore(folder)

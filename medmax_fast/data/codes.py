"""The image tokenizer's Parquet output: streaming it, and looking codes up by image path.

A table of codes may hold far more than memory should (725 thousand images are 1.5 GB), and training rows ask for
them in any order, so `CodeTable` copies them once into an unlinked scratch file and memory-maps that; only the
paths stay in memory.
"""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from medmax_fast.data.rows import parquet_batches, parquet_rows, read_rows
from medmax_fast.files import hash_file, read_object
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_CODES

MANIFEST_FILE = "manifest.json"
REJECTED_FILE = "rejected.jsonl"
PATH_COLUMN, CODES_COLUMN = "img_path", "img_tokens"


def code_files(source: str | Path) -> list[Path]:
    """The Parquet files of a codes folder, sorted, or the one file given; InputError if there is none."""
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise InputError(f"{source}: no such file or folder, expected the output of `medmax tokenize`")
    files = sorted(p for p in source.glob("*.parquet") if not p.name.startswith("."))
    if not files:
        raise InputError(f"{source}: no *.parquet, expected the output of `medmax tokenize`")
    return files


def read_codes(path: Path, num_codes: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield (paths, codes uint16 [n, 1024]) batches of one file; InputError names the file, row and what is wrong."""
    row = 0
    for batch in parquet_batches(path, (PATH_COLUMN, CODES_COLUMN)):
        for name in (PATH_COLUMN, CODES_COLUMN):
            if name not in batch.schema.names:
                raise InputError(f"{path}: no column {name!r}, expected {PATH_COLUMN} and {CODES_COLUMN}")
        paths = batch.column(PATH_COLUMN).to_pylist()
        for i, name in enumerate(paths):
            if not isinstance(name, str):
                raise InputError(f"{path}: row {row + i}: {PATH_COLUMN} is {name!r}, expected a path")
        yield paths, _codes_array(path, row, batch.column(CODES_COLUMN), num_codes)
        row += len(paths)


def _codes_array(path: Path, first_row: int, column, num_codes: int) -> np.ndarray:
    import pyarrow

    def fail(index: int, found: str, expected: str):
        raise InputError(f"{path}: row {first_row + index}: {found}, expected {expected}")

    kind = column.type
    if not (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind)):
        fail(0, f"{CODES_COLUMN} is {kind}", "a list of integers")
    if not pyarrow.types.is_integer(kind.value_type):
        fail(0, f"{CODES_COLUMN} is a list of {kind.value_type}", "a list of integers")
    flat = column.flatten()
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(lengths != IMAGE_CODES)
    if len(wrong):
        length = lengths[wrong[0]]
        fail(wrong[0], "no codes" if np.isnan(length) else f"an image of {int(length)} codes", str(IMAGE_CODES))
    if flat.null_count:
        fail(int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]) // IMAGE_CODES, "a null", "a code")
    codes = flat.to_numpy(zero_copy_only=False).reshape(-1, IMAGE_CODES)
    outside = np.argwhere((codes < 0) | (codes >= num_codes))
    if len(outside):
        i, j = outside[0]
        fail(i, f"image code {codes[i, j]}", f"0..{num_codes - 1}")
    return codes.astype(np.uint16)


class CodeTable:
    """Codes by image path, from a folder made by `medmax tokenize` or a single Parquet file.

    A path is looked up as it is written; if that fails, as the absolute path that it means (`base` is the folder
    that relative ones start from; the table's own relative paths start from the folder recorded in its manifest).
    codes: memmap uint16 [rows, 1024], to be read only.
    """

    def __init__(self, source: str | Path, num_codes: int, scratch: str | Path | None = None):
        source = Path(source)
        files = code_files(source)
        folder = source if source.is_dir() else source.parent
        manifest = _manifest(folder)
        self.base = str(manifest.get("base", folder))
        _verify(files, manifest)
        self.reasons = _rejection_reasons(folder)
        self._rows: dict[str, int] = {}
        total = sum(parquet_rows(path) for path in files)
        with tempfile.TemporaryFile(dir=scratch) as file:
            file.truncate(max(total, 1) * IMAGE_CODES * 2)
            self.codes = np.memmap(file, np.uint16, "r+", shape=(max(total, 1), IMAGE_CODES))
        self._fill(files, num_codes)

    def _fill(self, files: list[Path], num_codes: int) -> None:
        end = 0
        for path in files:
            for names, codes in read_codes(path, num_codes):
                self.codes[end : end + len(names)] = codes
                for row, name in enumerate(names, end):
                    first = self._rows.setdefault(name, row)
                    if first != row and not np.array_equal(self.codes[first], self.codes[row]):
                        raise InputError(f"{path}: {name} appears twice with different codes")
                end += len(names)

    def __len__(self) -> int:
        return len(self._rows)

    @functools.cached_property
    def _by_absolute(self) -> dict[str, int]:
        return {_absolute(self.base, path): row for path, row in self._rows.items()}

    def find(self, path: str, base: str | Path) -> np.ndarray | None:
        """Codes uint16 [1024] of an image path, or None."""
        row = self.find_row(path, base)
        return None if row is None else self.codes[row]

    def find_row(self, path: str, base: str | Path) -> int | None:
        """The row of `codes` of an image path, or None."""
        row = self._rows.get(path)
        return self._by_absolute.get(_absolute(str(base), path)) if row is None else row

    def reason(self, path: str) -> str:
        """Why an image has no codes, in a few words."""
        return f"rejected by tokenize: {self.reasons[path]}" if path in self.reasons else "not in the codes table"


def _absolute(base: str, path: str) -> str:
    folder, name = os.path.split(os.path.join(base, path))
    return os.path.join(_real_folder(folder), name)


# Links are followed once per folder and not once per image.
_real_folder = functools.lru_cache(maxsize=1 << 16)(os.path.realpath)


def perplexity(counts: np.ndarray) -> float:
    """exp(-sum of p ln p) over the shares p of each code: how many codes, all equally often, would be as varied.

    counts: [K], how often each code occurs; 0.0 if none does.
    """
    used = counts[counts > 0].astype(np.float64)
    shares = used / used.sum()
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(used) else 0.0


def originals(source: str | Path) -> tuple[str, dict[str, str]]:
    """(folder that a table's relative paths start from, keywords with which `load_image` sees what was encoded)."""
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    manifest = _manifest(folder)
    settings = manifest.get("settings", {})
    return str(manifest.get("base", folder)), {k: settings[k] for k in ("alpha", "depth16") if k in settings}


def codes_fingerprint(source: str | Path) -> str:
    """A hash of the codes' file names, sizes and row counts, for the settings of what is built from them."""
    listing = [(p.name, p.stat().st_size, parquet_rows(p)) for p in code_files(source)]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def _manifest(folder: Path) -> dict:
    path = folder / MANIFEST_FILE
    return read_object(path) if path.exists() else {}


def _verify(files: list[Path], manifest: dict) -> None:
    """InputError for a file that is not what the manifest says it was when it was written."""
    shards = manifest.get("shards")
    hashes = {s.get("file"): s.get("sha256") for s in shards if isinstance(s, dict)} if isinstance(shards, list) else {}
    for path in files:
        expected = hashes.get(path.name)
        if expected and hash_file(path) != expected:
            raise InputError(f"{path}: damaged (sha256 differs from {MANIFEST_FILE}); tokenize its images again")


def _rejection_reasons(folder: Path) -> dict[str, str]:
    path = folder / REJECTED_FILE
    if not path.exists():
        return {}
    return {str(v.get(PATH_COLUMN)): str(v.get("reason")) for _, v in read_rows(path, (PATH_COLUMN, "reason"))}

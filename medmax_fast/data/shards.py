"""Fixed shards of a code folder, each published whole, and what is merged from them at the end.

Shard s covers input rows s * rows_per_shard onwards. It is one Parquet file of codes and, written after it, one
record under shards/ with its rejected images, checksum, content digests and seconds; both appear by an atomic rename
and the record marks the shard as done. Any number of processes, in any run, can share a folder: they agree on who
does what by `Claims`, and on what is done by the records. merge() may be called by several at once: all of them
write the same files.
"""

import json
import os
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medmax_fast.data.codes import CODES_COLUMN, MANIFEST_FILE, PATH_COLUMN, REJECTED_FILE, read_codes
from medmax_fast.files import atomic_path, hash_file, read_json, remove, write_json
from medmax_fast.vocab import IMAGE_CODES

# Bytes of a content digest: the first half of a sha256.
DIGEST_BYTES = 16
# Shards whose codes stay in memory for images that come again, 4 MB each at 2,048 rows.
_SHARDS_IN_MEMORY = 8


@dataclass(frozen=True)
class Shard:
    """What one shard publishes: codes uint16 [n, 1024] of n image paths, and a record about them.

    digests: DIGEST_BYTES of content per path. encoded: how many of the n the encoder saw, the others being copies.
    rejected: dicts that become lines of rejected.jsonl. notes: images per policy of data/modes.py. seconds: by stage.
    """

    paths: list[str]
    codes: np.ndarray
    digests: list[bytes]
    encoded: int
    rejected: list[dict]
    notes: dict[str, int]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Shards:
    """Names, row ranges and state of the shards in `folder`, for so many input images."""

    folder: Path
    images: int
    rows_per_shard: int

    @property
    def count(self) -> int:
        return -(-self.images // self.rows_per_shard)

    @property
    def claims_path(self) -> Path:
        return self.folder / "shards" / "claims"

    def rows(self, shard: int) -> range:
        """Input rows of a shard."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.images))

    def codes_path(self, shard: int) -> Path:
        return self.folder / f"codes-{shard:05d}.parquet"

    def record_path(self, shard: int) -> Path:
        return self.folder / "shards" / f"{shard:05d}.json"

    def done(self) -> list[int]:
        """Shards that are published, record and all, in order; found by listing two folders."""
        codes = set(os.listdir(self.folder))
        records = set(os.listdir(self.folder / "shards")) if "shards" in codes else set()
        return [
            shard
            for shard in range(self.count)
            if self.record_path(shard).name in records and self.codes_path(shard).name in codes
        ]

    def is_done(self, shard: int) -> bool:
        """Whether one shard is published; two looks, where `done` lists all of them."""
        return self.record_path(shard).exists() and self.codes_path(shard).exists()

    def left(self) -> list[int]:
        """Shards that are not done."""
        return sorted(set(range(self.count)) - set(self.done()))

    def remove_leftovers(self, shard: int) -> None:
        """Delete what a killed process left of a shard; only for the holder of its claim."""
        for path in (self.codes_path(shard), self.record_path(shard)):
            for temporary in path.parent.glob(f".{path.name}.*.tmp"):
                remove(temporary)

    def publish(self, shard: int, content: Shard) -> dict[str, float]:
        """Write one shard, codes first; returns its seconds with those of writing the codes added as `write`."""
        import pyarrow
        from pyarrow import parquet

        rows = len(content.paths)
        assert content.codes.shape == (rows, IMAGE_CODES) and content.codes.dtype == np.uint16, content.codes.shape
        assert rows == len(content.digests) and rows + len(content.rejected) == len(self.rows(shard)), shard
        start = time.monotonic()
        offsets = pyarrow.array(np.arange(rows + 1, dtype=np.int32) * IMAGE_CODES)
        lists = pyarrow.ListArray.from_arrays(offsets, pyarrow.array(content.codes.ravel()))
        table = pyarrow.table({PATH_COLUMN: pyarrow.array(content.paths, pyarrow.string()), CODES_COLUMN: lists})
        path = self.codes_path(shard)
        with atomic_path(path) as temporary:
            parquet.write_table(table, temporary, compression="zstd")
            digest = hash_file(temporary)
        seconds = {**content.seconds, "write": time.monotonic() - start}
        record = {
            "file": path.name,
            "rows": rows,
            "encoded": content.encoded,
            "sha256": digest,
            "notes": content.notes,
            "seconds": seconds,
            "rejected": content.rejected,
            "digests": b"".join(content.digests).hex(),
        }
        write_json(self.record_path(shard), record)
        return seconds

    def write_difference(self, difference: dict[str, float]) -> None:
        """Keep how far the folder's settings are from the exact ones, as measured on its first images."""
        write_json(self._difference_path, difference)

    def difference(self) -> dict[str, float]:
        """What write_difference was given, or nothing."""
        return read_json(self._difference_path) if self._difference_path.exists() else {}

    @property
    def _difference_path(self) -> Path:
        return self.folder / "shards" / "difference.json"

    def records(self) -> list[dict]:
        """Records of the shards done so far, in order."""
        return [read_json(self.record_path(shard)) for shard in self.done()]

    def merge(self, base: str, settings: dict, facts: dict) -> None:
        """Write rejected.jsonl and manifest.json from the records of all shards.

        base: absolute folder that relative image paths start from, which joins by absolute path need. facts: what
        else the manifest says.
        """
        records = self.records()
        assert len(records) == self.count, self.folder
        with atomic_path(self.folder / REJECTED_FILE) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for record in records:
                file.writelines(json.dumps(entry) + "\n" for entry in record["rejected"])
        manifest = {
            **totals(records),
            **facts,
            "base": base,
            "settings": settings,
            "shards": [{name: record[name] for name in ("file", "rows", "sha256")} for record in records],
        }
        write_json(self.folder / MANIFEST_FILE, manifest)


def totals(records: list[dict]) -> dict:
    """Sums over records: images, encoded, rejected, notes, and seconds by stage."""
    seconds: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for record in records:
        seconds.update(record["seconds"])
        notes.update(record["notes"])
    return {
        "images": sum(record["rows"] for record in records),
        "encoded": sum(record["encoded"] for record in records),
        "rejected": sum(len(record["rejected"]) for record in records),
        "notes": dict(sorted(notes.items())),
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }


class Contents:
    """Which image contents have codes already, in any published shard of the folder: 24 bytes for each image."""

    def __init__(self, shards: Shards, num_codes: int):
        self._shards, self._num_codes = shards, num_codes
        # Both halves of the digests and where their codes are (shard * rows_per_shard + row), sorted by the first half;
        # replaced as a whole, because the loading threads look into it.
        self._table = np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._known: set[int] = set()
        # Input images in the shards known to be published that have no codes.
        self.rejected = 0
        self._codes: OrderedDict[int, np.ndarray] = OrderedDict()

    def refresh(self) -> None:
        """Take in what this and other processes published since the last time."""
        parts = [self._table]
        for shard in sorted(set(self._shards.done()) - self._known):
            self._known.add(shard)
            record = read_json(self._shards.record_path(shard))
            self.rejected += len(record["rejected"])
            halves = np.frombuffer(bytes.fromhex(record["digests"]), "<u8").reshape(-1, 2)
            parts.append((*halves.T, shard * self._shards.rows_per_shard + np.arange(len(halves))))
        if len(parts) > 1:
            table = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
            order = np.argsort(table[0], kind="stable")
            keys, rests, places = (column[order] for column in table)
            self._table = keys, rests, places

    def _place(self, digest: bytes) -> int | None:
        keys, rests, places = self._table
        key, rest = np.frombuffer(digest, "<u8")
        for at in range(np.searchsorted(keys, key), len(keys)):
            if keys[at] != key:
                break
            if rests[at] == rest:
                return int(places[at])
        return None

    @property
    def images_done(self) -> int:
        """Input images in the shards known to be published."""
        return sum(len(self._shards.rows(shard)) for shard in self._known)

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, bytes) and self._place(digest) is not None

    def codes(self, digest: bytes) -> np.ndarray:
        """Codes uint16 [1024] of a content that is in here."""
        place = self._place(digest)
        assert place is not None, "no such content"
        shard, row = divmod(place, self._shards.rows_per_shard)
        if shard not in self._codes:
            batches = read_codes(self._shards.codes_path(shard), self._num_codes)
            self._codes[shard] = np.concatenate([codes for _, codes in batches])
            if len(self._codes) > _SHARDS_IN_MEMORY:
                self._codes.popitem(last=False)
        self._codes.move_to_end(shard)
        return self._codes[shard][row]

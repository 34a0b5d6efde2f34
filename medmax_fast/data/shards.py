"""Fixed shards of a code folder, each published whole, and what is merged from them at the end.

Shard s covers input rows s * rows_per_shard onwards. It is one Parquet file of codes and, written after it, one
record under shards/ with its rejected images, checksum and seconds; both appear by an atomic rename and the record
marks the shard as done. Processes need to agree on nothing else, so any number of them, in any run, can share a
folder. merge() may be called by several at once: all of them write the same files.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medmax_fast.data.codes import CODES_COLUMN, MANIFEST_FILE, PATH_COLUMN, REJECTED_FILE
from medmax_fast.runtime import atomic_path, hash_file, read_json, write_json
from medmax_fast.vocab import IMAGE_CODES


@dataclass(frozen=True)
class Shards:
    """Names, row ranges and state of the shards in `folder`, for so many input images."""

    folder: Path
    images: int
    rows_per_shard: int

    @property
    def count(self) -> int:
        return -(-self.images // self.rows_per_shard)

    def rows(self, shard: int) -> range:
        """Input rows of a shard."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.images))

    def codes_path(self, shard: int) -> Path:
        return self.folder / f"codes-{shard:05d}.parquet"

    def record_path(self, shard: int) -> Path:
        return self.folder / "shards" / f"{shard:05d}.json"

    def done(self, shard: int) -> bool:
        """Whether a shard is published, record and all."""
        return self.record_path(shard).exists() and self.codes_path(shard).exists()

    def all_done(self) -> bool:
        return all(self.done(shard) for shard in range(self.count))

    def publish(self, shard: int, paths: list[str], codes: np.ndarray, rejected: list[dict], seconds: dict) -> dict:
        """Write one shard: codes uint16 [n, 1024] of n image paths, and its rejected images with their reasons.

        Returns `seconds` (by stage) with the time of writing the codes added as `write`.
        """
        import pyarrow
        from pyarrow import parquet

        assert codes.shape == (len(paths), IMAGE_CODES) and codes.dtype == np.uint16, (codes.shape, codes.dtype)
        assert len(paths) + len(rejected) == len(self.rows(shard)), (shard, len(paths), len(rejected))
        start = time.monotonic()
        offsets = pyarrow.array(np.arange(len(paths) + 1, dtype=np.int32) * IMAGE_CODES)
        lists = pyarrow.ListArray.from_arrays(offsets, pyarrow.array(codes.ravel()))
        table = pyarrow.table({PATH_COLUMN: pyarrow.array(paths, pyarrow.string()), CODES_COLUMN: lists})
        path = self.codes_path(shard)
        with atomic_path(path) as temporary:
            parquet.write_table(table, temporary, compression="zstd")
            digest = hash_file(temporary)
        seconds = {**seconds, "write": time.monotonic() - start}
        record = {"file": path.name, "rows": len(paths), "sha256": digest, "seconds": seconds, "rejected": rejected}
        write_json(self.record_path(shard), record)
        return seconds

    def records(self) -> list[dict]:
        """Records of the shards done so far, in order."""
        return [read_json(self.record_path(shard)) for shard in range(self.count) if self.done(shard)]

    def merge(self, base: str, settings: dict) -> None:
        """Write rejected.jsonl and manifest.json from the records of all shards.

        base: absolute folder that relative image paths start from, which joins by absolute path need.
        """
        assert self.all_done(), self.folder
        records = self.records()
        with atomic_path(self.folder / REJECTED_FILE) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for record in records:
                file.writelines(json.dumps(entry) + "\n" for entry in record["rejected"])
        stages = records[0]["seconds"]
        manifest = {
            "images": sum(record["rows"] for record in records),
            "rejected": sum(len(record["rejected"]) for record in records),
            "base": base,
            "settings": settings,
            "seconds": {stage: round(sum(r["seconds"][stage] for r in records), 3) for stage in stages},
            "shards": [{name: record[name] for name in ("file", "rows", "sha256")} for record in records],
        }
        write_json(self.folder / MANIFEST_FILE, manifest)

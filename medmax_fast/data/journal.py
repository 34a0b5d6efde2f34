"""Output that grows chunk by chunk and outlives its process: what a killed run had finished, the next one takes over.

    resume.json     what the output depends on; another value, and everything begins anew
    <data>          the bytes of all chunks, end to end
    journal.jsonl   per chunk one line: CRC-32 of the line, then JSON with the size and CRC-32 of its bytes and a record
    .lock           held while a process works here (claims.py)

A chunk's bytes are written before its line, so a line that is whole speaks of bytes that are there. Taking over reads
everything once, and ends at the first line or byte that is not as written, be it after a kill or a loss of power.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from medmax_fast.data.claims import Claims
from medmax_fast.files import read_json, remove, write_json
from medmax_fast.runtime import InputError

SETTINGS_FILE, JOURNAL_FILE, LOCK_FILE = "resume.json", "journal.jsonl", ".lock"


class Journal:
    """Open `folder` for appending, with what an earlier run of the same `settings` left there.

    data: name of the data file, relative to the folder. last: the newest record, {} at the start. digest: sha256 of
    the data so far. InputError if another process is at work in the folder.
    """

    def __init__(self, folder: str | Path, settings: dict, data: str):
        self.folder = Path(folder)
        self.data_path = self.folder / data
        self._claims = Claims(self.folder / LOCK_FILE)
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._claims.close)
            # The second test: whoever held the lock until now has finished and removed the folder.
            if not self._claims.take(0) or not (self.folder / LOCK_FILE).exists():
                raise InputError(f"{self.folder}: another process is writing this output; wait for it to end")
            self._begin(json.loads(json.dumps(settings)))
            self._data = on_error.enter_context(open(self.data_path, "r+b"))
            self._lines = on_error.enter_context(open(self.folder / JOURNAL_FILE, "r+b", buffering=0))
            on_error.pop_all()
        self.digest = hashlib.sha256()
        self.last: dict = {}
        self._recover()

    def _begin(self, settings: dict) -> None:
        path = self.folder / SETTINGS_FILE
        try:
            before = read_json(path)
        except InputError:
            before = None
        if before != settings:
            for entry in list(self.folder.iterdir()):
                if entry.name != LOCK_FILE:
                    remove(entry)
            write_json(path, settings)
        self.data_path.parent.mkdir(parents=True, exist_ok=True)
        for name in (self.data_path, self.folder / JOURNAL_FILE):
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o666))

    def _recover(self) -> None:
        whole = size = 0
        for record, end in _whole_lines(self.folder / JOURNAL_FILE):
            data = self._data.read(record["size"])
            if len(data) != record["size"] or zlib.crc32(data) != record["crc"]:
                break
            self.digest.update(data)
            self.last = record["record"]
            size, whole = size + len(data), end
        self._data.truncate(size)
        self._data.seek(size)
        self._lines.truncate(whole)
        self._lines.seek(whole)

    def append(self, data, record: dict) -> None:
        """Add a chunk: its bytes (any contiguous buffer) and a record of JSON values."""
        data = memoryview(data).cast("B")
        self._data.write(data)
        self._data.flush()
        self.digest.update(data)
        line = json.dumps({"size": len(data), "crc": zlib.crc32(data), "record": record}, separators=(",", ":"))
        self._lines.write(b"%08x %s\n" % (zlib.crc32(line.encode()), line.encode()))
        self.last = record

    def records(self) -> Iterator[dict]:
        """All records in order, read from the file."""
        for record, _ in _whole_lines(self.folder / JOURNAL_FILE):
            yield record["record"]

    def close(self) -> None:
        self._data.close()
        self._lines.close()
        self._claims.close()

    def remove(self) -> None:
        """Delete the folder with everything in it."""
        remove(self.folder)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _whole_lines(path: Path) -> Iterator[tuple[dict, int]]:
    """The lines of a journal with the offsets of their ends, up to the first that is not as it was written."""
    end = 0
    with open(path, "rb") as file:
        for line in file:
            crc, _, text = line[:-1].partition(b" ")
            if not line.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
                return
            end += len(line)
            yield json.loads(text), end

"""What the generate command leaves in its folder: pictures as PNGs, a journal of finished answers, then the outputs."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from medmax_fast.files import atomic_path
from medmax_fast.generate.engine import Engine, Event
from medmax_fast.generate.requests import PicturePiece, Result
from medmax_fast.model.picture_decoder import write_png
from medmax_fast.progress import Progress
from medmax_fast.runtime import log
from medmax_fast.vocab import IMAGE_CODES

OUTPUTS, REJECTED = "outputs.jsonl", "rejected.jsonl"
_JOURNAL = ".outputs.journal.jsonl"
# Pictures that are finished before they are decoded together, as long as others are still being drawn.
_PICTURES_AT_A_TIME = 8
# Most bytes of an id in a file name.
_STEM = 100


class Writer:
    """Pictures as PNGs beside the answers that name them, and the journal of finished answers."""

    def __init__(self, folder: Path, engine: Engine, preview: bool):
        self.folder, self._engine, self._preview = folder, engine, preview
        self._journal = folder / _JOURNAL
        self._waiting: list[Result] = []

    def write(self, events: Iterable[Event], bar: Progress) -> None:
        """Save what the engine gives; what is finished is kept however this ends."""
        done, drawing = bar.done, {}
        try:
            for event in events:
                if isinstance(event, PicturePiece):
                    self.preview(event)
                    drawing[event.id] = len(event.codes) / IMAGE_CODES
                    bar.update(done, lambda: _under_way(drawing))
                elif isinstance(event, Result):
                    drawing.pop(event.id, None)
                    if event.error:
                        bar.rejected = (bar.rejected or 0) + 1
                    if _pictures(event):
                        self._waiting.append(event)
                    else:
                        self._enter([event])
                    done += 1
                    bar.update(done, lambda: _under_way(drawing))
                    if sum(_pictures(result) for result in self._waiting) >= _PICTURES_AT_A_TIME:
                        self._flush()
        finally:
            self._flush()

    def finish(self, order: list[str]) -> None:
        """outputs.jsonl and rejected.jsonl from the journal, in the order of the prompts."""
        rows = {row["id"]: row for row in _rows(self._journal)}
        # What killed runs have left: files half written, and pictures half drawn.
        for left in (*self.folder.glob(".*.tmp"), *self.folder.glob("*.preview.png")):
            left.unlink()
        for name, rejected in ((REJECTED, True), (OUTPUTS, False)):
            kept = [rows[i] for i in order if ("reason" in rows[i]) == rejected]
            if kept or not rejected:
                with atomic_path(self.folder / name) as temporary, open(temporary, "w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        self._journal.unlink()

    def preview(self, piece: PicturePiece) -> None:
        """Show the beginning of a picture beside its place."""
        path = (self.folder / picture_name(piece.id, piece.number)).with_suffix(".preview.png")
        if self._preview and len(piece.codes) < IMAGE_CODES:
            write_png(path, self._engine.preview(piece.codes))
        elif len(piece.codes) == IMAGE_CODES:
            path.unlink(missing_ok=True)

    def picture(self, piece: PicturePiece) -> bool:
        """Save a picture if it is complete, else its preview."""
        complete = len(piece.codes) == IMAGE_CODES
        if complete:
            write_png(
                self.folder / picture_name(piece.id, piece.number), self._engine.decode_images(piece.codes[None])[0]
            )
        self.preview(piece)
        return complete

    def content(self, result: Result) -> list[dict]:
        """A result's content with the names of its pictures in their places."""
        named, drawn = [], 0
        for piece in result.content:
            if piece["type"] == "image":
                piece = {"type": "image", "path": picture_name(result.id, drawn)}
                drawn += 1
            named.append(piece)
        return named

    def _flush(self) -> None:
        """Decode the waiting pictures together, save them, and enter their answers into the journal."""
        waiting = self._waiting
        if not waiting:
            return
        codes = [piece["codes"] for result in waiting for piece in result.content if piece["type"] == "image"]
        names = [picture_name(result.id, n) for result in waiting for n in range(_pictures(result))]
        for name, pixels in zip(names, self._engine.decode_images(np.array(codes)) if codes else (), strict=True):
            write_png(self.folder / name, pixels)
        self._enter(waiting)
        # Only now: an interrupt may come before.
        self._waiting = []

    def _enter(self, results: list[Result]) -> None:
        """Append answers to the journal."""
        with open(self._journal, "a", encoding="utf-8") as file:
            for result in results:
                row = {"id": result.id, "token_ids": result.token_ids, "content": self.content(result)}
                if result.error:
                    log(f"{result.id}: {result.error}")
                    row = {"id": result.id, "reason": result.error}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if any(map(_pictures, results)):
                # Should the machine go down; answers in text come too fast to wait for a disk each time.
                file.flush()
                os.fsync(file.fileno())


def read_journal(folder: Path) -> tuple[bool, set[str]]:
    """Whether all answers are there, else the ids of the prompts that are answered.

    A last line that a killed run left unfinished is cut off.
    """
    journal = folder / _JOURNAL
    if (folder / OUTPUTS).exists():
        journal.unlink(missing_ok=True)
        return True, set()
    if not journal.exists():
        return False, set()
    text = journal.read_bytes()
    os.truncate(journal, text.rfind(b"\n") + 1)
    return False, {row["id"] for row in _rows(journal)}


def count_rejected(folder: Path) -> int:
    """Prompts that could not be run, so far or in all."""
    path, journal = folder / REJECTED, folder / _JOURNAL
    if journal.exists():
        return sum("reason" in row for row in _rows(journal))
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _rows(journal: Path) -> list[dict]:
    # Not splitlines of a str, for which a line may end within an answer, as at U+2028.
    return [json.loads(line) for line in journal.read_bytes().splitlines()]


def _under_way(shares: dict[str, float]) -> str:
    """Such as `8 pictures at 45%`, with what is drawn of them on average."""
    return f"{len(shares)} pictures at {sum(shares.values()) / len(shares):.0%}" if shares else ""


def _pictures(result: Result) -> int:
    return sum(piece["type"] == "image" for piece in result.content)


def picture_name(request_id: str, number: int) -> str:
    """A file name for a request's picture `number`, another one for every id."""
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in request_id)
    stem = stem.encode()[:_STEM].decode(errors="ignore")
    if stem != request_id:
        stem += "-" + hashlib.sha256(request_id.encode()).hexdigest()[:8]
    return f"{stem}-{number}.png"

"""What the generate command leaves in its folder: pictures as PNGs, a journal of finished answers, then the outputs."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from medmax_fast.generate.engine import Engine, Event
from medmax_fast.generate.requests import PicturePiece, Result
from medmax_fast.model.picture_decoder import write_png
from medmax_fast.runtime import Progress, atomic_path, log
from medmax_fast.vocab import IMAGE_CODES

_JOURNAL = ".outputs.journal.jsonl"
# Pictures that are finished before they are decoded together, as long as others are still being drawn.
_PICTURES_AT_A_TIME = 8
# Most characters of an id in a file name.
_STEM = 100


class Writer:
    """Pictures as PNGs beside the answers that name them, and the journal of finished answers."""

    def __init__(self, folder: Path, engine: Engine, preview: bool):
        self.folder, self._engine, self._preview = folder, engine, preview
        self._journal = folder / _JOURNAL
        self._waiting: list[Result] = []

    @property
    def finished(self) -> bool:
        """Whether all answers are there."""
        return (self.folder / "outputs.jsonl").exists()

    @property
    def rejected(self) -> int:
        """Prompts that could not be run."""
        path = self.folder / "rejected.jsonl"
        return len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0

    def read_journal(self) -> set[str]:
        """Ids of the prompts that are answered; a last line that a killed run left unfinished is cut off."""
        if self.finished or not self._journal.exists():
            return set()
        text = self._journal.read_bytes()
        os.truncate(self._journal, text.rfind(b"\n") + 1)
        return {row["id"] for row in self._rows()}

    def write(self, events: Iterable[Event], bar: Progress) -> None:
        """Save what the engine gives; what is finished is kept however this ends."""
        done = bar.done
        try:
            for event in events:
                if isinstance(event, PicturePiece):
                    self.preview(event)
                elif isinstance(event, Result):
                    self._waiting.append(event)
                    done += 1
                    bar.update(done)
                    if sum(_pictures(result) for result in self._waiting) >= _PICTURES_AT_A_TIME:
                        self._flush()
        finally:
            self._flush()

    def finish(self, order: list[str]) -> None:
        """outputs.jsonl and rejected.jsonl from the journal, in the order of the prompts."""
        rows = {row["id"]: row for row in self._rows()}
        for name, rejected in (("rejected.jsonl", True), ("outputs.jsonl", False)):
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
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        codes = [piece["codes"] for result in waiting for piece in result.content if piece["type"] == "image"]
        names = [picture_name(result.id, n) for result in waiting for n in range(_pictures(result))]
        for name, pixels in zip(names, self._engine.decode_images(np.array(codes)) if codes else (), strict=True):
            write_png(self.folder / name, pixels)
        with open(self._journal, "a", encoding="utf-8") as file:
            for result in waiting:
                row = {"id": result.id, "token_ids": result.token_ids, "content": self.content(result)}
                if result.error:
                    log(f"{result.id}: {result.error}")
                    row = {"id": result.id, "reason": result.error}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _rows(self) -> list[dict]:
        return [json.loads(line) for line in self._journal.read_text(encoding="utf-8").splitlines()]


def _pictures(result: Result) -> int:
    return sum(piece["type"] == "image" for piece in result.content)


def picture_name(request_id: str, number: int) -> str:
    """A file name for a request's picture `number`, another one for every id."""
    stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in request_id)[:_STEM]
    if stem != request_id:
        stem += "-" + hashlib.sha256(request_id.encode()).hexdigest()[:8]
    return f"{stem}-{number}.png"

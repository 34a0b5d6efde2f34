"""An answer as it comes: the pieces that a page can show, and what goes on, from the events of a stream."""

import base64
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medmax_fast.generate.requests import Result, TextPiece
from medmax_fast.serving.dispatcher import Drawing, Stream

# Seconds without news after which the place in the line is looked up, and between two views of an answer.
_PATIENCE, _PAUSE = 0.25, 0.05
_PREVIEW_SIDE = 256
# Characters of a prompt in the description of a picture.
_PROMPT = 120


@dataclass(frozen=True)
class Picture:
    """A picture in a message: a file that the page may show, its description, and whether the model has drawn it."""

    path: Path
    alt: str
    drawn: bool = False


@dataclass(frozen=True)
class Preview:
    """A picture that is being drawn, as a data address that needs no file, and the share of it that is there."""

    address: str
    share: float


Piece = str | Picture | Preview


class Answer:
    """What has come of an answer so far. keep: stores a complete picture and gives its path."""

    def __init__(self, prompt: str, keep: Callable[[Drawing], Path]):
        self._alt = f"Picture drawn for: {prompt[:_PROMPT]}"
        self._keep = keep
        self._pieces: list[Piece] = []
        self.error: str | None = None
        # Whether the model came to its end.
        self.whole = False

    @property
    def pieces(self) -> list[Piece]:
        """Text, pictures, and at the end perhaps one that is being drawn."""
        return list(self._pieces)

    @property
    def content(self) -> list[dict]:
        """The pieces that are finished, as the content of a turn."""
        found: list[dict] = []
        for piece in self._pieces:
            if isinstance(piece, Picture):
                found.append({"type": "image", "path": str(piece.path)})
            elif isinstance(piece, str) and piece.strip():
                found.append({"type": "text", "text": piece})
        return found

    @property
    def status(self) -> str:
        last = self._pieces[-1] if self._pieces else ""
        return f"Drawing, {last.share:.0%}" if isinstance(last, Preview) else "Writing"

    def drop_preview(self) -> None:
        """Leave out a picture that will not be finished."""
        if self._pieces and isinstance(self._pieces[-1], Preview):
            self._pieces.pop()

    def take(self, event: TextPiece | Drawing | Result) -> None:
        """Go on with an event of the stream."""
        if isinstance(event, Result):
            self.whole, self.error = True, event.error
        elif isinstance(event, TextPiece):
            if self._pieces and isinstance(self._pieces[-1], str):
                self._pieces[-1] += event.text
            else:
                self._pieces.append(event.text)
        else:
            self.drop_preview()
            if event.share == 1:
                self._pieces.append(Picture(self._keep(event), self._alt, drawn=True))
            else:
                self._pieces.append(Preview(_address(event.pixels), event.share))


def follow(stream: Stream, answer: Answer) -> Iterator[str]:
    """Read a stream to its end into the answer; a line about what goes on whenever there is news to show."""
    status = ""
    while not stream.ended:
        event = stream.next(_PATIENCE)
        if event is not None:
            answer.take(event)
            # What has gathered meanwhile makes one view.
            while not stream.idle and (more := stream.next(0)) is not None:
                answer.take(more)
        new = answer.status if answer.pieces else _place(stream)
        if not stream.ended and (event is not None or new != status):
            status = new
            yield status
            time.sleep(_PAUSE)


def _place(stream: Stream) -> str:
    if stream.number >= 0:
        return "Reading the question"
    before = stream.ahead
    return f"Waiting, {before} before you" if before else "Waiting, you are next"


def _address(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] as a small JPEG in a data address."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).resize((_PREVIEW_SIDE, _PREVIEW_SIDE)).save(file, format="JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"

"""One visitor's conversation: from what was typed and uploaded to a request, from its stream to what the page shows.

What a visitor sends lies in the server's Uploads, what is shown in a folder of the visitor's own with a random name;
both are emptied when the page is closed. Nothing here knows how the page is made.
"""

import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medmax_fast.data.images import ImageError, load_image, read_file
from medmax_fast.demo.answer import Answer, Picture, Piece, follow
from medmax_fast.demo.settings import room_for_answer
from medmax_fast.generate.requests import Request
from medmax_fast.model.layout import MAX_POSITIONS
from medmax_fast.model.picture_decoder import write_png
from medmax_fast.runtime import InputError
from medmax_fast.serving.conversation import Turn, content_of, fit
from medmax_fast.serving.dispatcher import Busy, Dispatcher, Drawing, Stream
from medmax_fast.serving.uploads import Uploads, label
from medmax_fast.vocab import IMAGE_IDS, TextTokenizer

# Of a question: more find no room in a prompt.
MOST_IMAGES = MAX_POSITIONS // IMAGE_IDS
# Conversations at a time; the oldest ones end for more, since a page may be closed without saying so.
MOST_TALKS = 512


@dataclass(frozen=True)
class Service:
    """What all visitors share. draws: whether there can be pictures. served: the folder whose files the page shows."""

    dispatcher: Dispatcher
    tokenizer: TextTokenizer
    draws: bool
    uploads: Uploads
    served: Path
    # Pixels of one upload at a time, which bounds memory.
    looking: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class View:
    """What the page shows: (role, pieces) of every turn, a line about what goes on, whether there is more to come."""

    turns: list[tuple[str, list[Piece]]]
    status: str
    running: bool


class Talk:
    """A conversation: one question after the other; `stop` and `close` at any time, from any thread."""

    def __init__(self, service: Service):
        self._service = service
        self._folder = service.served / secrets.token_hex(16)
        self._turns: list[Turn] = []
        self._shown: list[tuple[str, list[Piece]]] = []
        self._stream: Stream | None = None
        self._pictures = 0
        self._closed = False
        # Files and turns; held while a question is read.
        self._lock, self._asking = threading.Lock(), threading.Lock()

    def view(self, status: str) -> View:
        """The turns that are finished, with a line of the caller's."""
        return View(list(self._shown), status, False)

    def ask(self, text: str, files: list[str], mode: str, fields: dict) -> Iterator[View]:
        """Put a question with its images in the line; what to show, view by view, until the answer is there.

        fields: settings of the Request. InputError, at once or later, for what cannot be answered; the conversation
        is then what it was.
        """
        if not self._asking.acquire(blocking=False):
            raise InputError("a question is being read already")
        try:
            return self._submit(text, files, mode, fields)
        finally:
            self._asking.release()

    def _submit(self, text: str, files: list[str], mode: str, fields: dict) -> Iterator[View]:
        if self._stream is not None:
            raise InputError("an answer is still being made; wait for it, or press Stop")
        if mode != "text" and not self._service.draws:
            raise InputError("this checkpoint has no VQGAN decoder, so it cannot draw")
        question, shown = self._read(text.strip(), files)
        try:
            most = MAX_POSITIONS - room_for_answer(mode, fields["max_new_tokens"])
            turns = fit([*self._turns, question], self._service.tokenizer, most)
            # Random numbers come from the seed and the id: with one id, the same seed gives the same answer.
            request = Request("answer", content_of(turns, self._service.tokenizer), mode=mode, **fields)
            request.check()
            self._stream = self._service.dispatcher.submit(request, previews=True)
        except (InputError, Busy, RuntimeError) as error:
            self._drop([question])
            self._unshow(shown)
            again = "; what you typed is kept, try again in a moment" if isinstance(error, Busy) else ""
            raise InputError(f"{error}{again}") from error
        return self._follow(self._stream, turns, shown)

    def stop(self) -> None:
        """End the answer that is being made; what there is of it stays."""
        stream = self._stream
        if stream is not None:
            stream.cancel()

    def close(self) -> None:
        """End everything and delete all files."""
        with self._lock:
            self._closed = True
            shutil.rmtree(self._folder, ignore_errors=True)
        self.stop()
        self._drop(self._turns)

    def _read(self, text: str, files: list[str]) -> tuple[Turn, list[Piece]]:
        """What the user says, images first as in training, and the same for the page."""
        if not text and not files:
            raise InputError("type a question, or attach an image")
        if len(files) > MOST_IMAGES:
            raise InputError(f"{len(files)} images, expected at most {MOST_IMAGES} in a question")
        # Half of a surrogate pair, which a browser may send, is no text.
        text = text.encode(errors="replace").decode()
        content: list[dict] = []
        shown: list[Piece] = []
        try:
            for file in files:
                name = label(Path(file).name)
                path = self._service.uploads.add(_read_upload(file, name), name)
                content.append({"type": "image", "path": str(path)})
                with self._service.looking:
                    pixels = load_image(path)
                shown.append(Picture(self._save(pixels), f"{name}, as the model sees it"))
        except (InputError, OSError) as error:
            self._drop([Turn("user", content)])
            self._unshow(shown)
            if isinstance(error, InputError):
                raise
            raise InputError(f"no room for an image ({error.strerror})") from error
        if text:
            content.append({"type": "text", "text": text})
            shown.append(text)
        return Turn("user", content), shown

    def _follow(self, stream: Stream, turns: list[Turn], shown: list[Piece]) -> Iterator[View]:
        answer = Answer(" ".join(piece for piece in shown if isinstance(piece, str)), self._keep)
        asked, start, dropped = ("user", shown), time.monotonic(), turns[-1:]
        try:
            with stream:
                yield View([*self._shown, asked], "Waiting", True)
                for status in follow(stream, answer):
                    yield View([*self._shown, asked, ("assistant", answer.pieces)], status, True)
            if answer.error:
                self._unshow(shown)
                raise InputError(answer.error)
            answer.drop_preview()
            with self._lock:
                if answer.content and not self._closed:
                    # The oldest turns may not have found room.
                    dropped = self._turns[: len(self._turns) + 1 - len(turns)]
                    self._turns = [*turns, Turn("assistant", answer.content)]
            self._shown += [asked, ("assistant", answer.pieces or ["(no answer)"])]
        finally:
            self._stream = None
            self._drop(dropped)
        if not self._closed:
            seed = "" if stream.request.greedy else f", seed {stream.request.seed}"
            end = f"Done in {time.monotonic() - start:.1f} s{seed}" if answer.whole else "Stopped"
            note = f"; the oldest turns ({len(dropped)}) no longer fit and are forgotten" if answer.content else ""
            yield self.view(end + (note if dropped else ""))

    def _keep(self, drawing: Drawing) -> Path:
        """Store a complete picture, which the engine will know again by its bytes."""
        path = self._save(drawing.pixels)
        if path.exists():
            self._service.dispatcher.remember(path.read_bytes(), drawing.codes)
        return path

    def _save(self, pixels: np.ndarray) -> Path:
        """A file of the visitor's own with these pixels, unless the page has been closed."""
        with self._lock:
            self._pictures += 1
            path = self._folder / f"medmax-{self._pictures}.png"
            if not self._closed:
                write_png(path, pixels)
        return path

    def _unshow(self, shown: list[Piece]) -> None:
        """Delete the pictures of a question that is not asked."""
        for piece in shown:
            if isinstance(piece, Picture):
                piece.path.unlink(missing_ok=True)

    def _drop(self, turns: list[Turn]) -> None:
        """Delete the uploads of turns that are no longer needed."""
        paths = [Path(piece["path"]) for turn in turns for piece in turn.content if piece["type"] == "image"]
        self._service.uploads.drop(paths)


def _read_upload(file: str, name: str) -> bytes:
    """All bytes of what the page took; InputError, without the server's path, if it has been swept since."""
    try:
        return read_file(file)
    except ImageError as error:
        raise InputError(f"{name}: {error.reason}; attach it again") from error


class Visitors:
    """The conversations of all open pages, by the page's key; to be used as a context manager, which closes them."""

    def __init__(self, service: Service):
        self._service = service
        self._talks: dict[str, Talk] = {}
        self._lock, self._ended = threading.Lock(), False

    def enter(self, key: str) -> Talk:
        """A new conversation; what the page had before is closed."""
        talk = Talk(self._service)
        with self._lock:
            gone = [self._talks.pop(key)] if key in self._talks else []
            self._talks[key] = talk
            oldest = list(self._talks)[: max(0, len(self._talks) - MOST_TALKS)]
            gone += [self._talks.pop(other) for other in oldest]
        for other in gone:
            other.close()
        if self._ended:
            talk.close()
        return talk

    def of(self, key: str) -> Talk | None:
        """A page's conversation; None for a page that was closed or cut off."""
        return self._talks.get(key)

    def leave(self, key: str) -> None:
        """A page is closed: end what it waits for and delete its files."""
        with self._lock:
            talk = self._talks.pop(key, None)
        if talk:
            talk.close()

    def __len__(self) -> int:
        return len(self._talks)

    def __enter__(self) -> "Visitors":
        return self

    def __exit__(self, *_) -> None:
        # Handlers go on for some seconds; what they begin now is closed from its beginning.
        self._ended = True
        for key in list(self._talks):
            self.leave(key)

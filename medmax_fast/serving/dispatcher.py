"""One engine for many users: a thread owns it, requests join while others run, and whoever asked gets the pieces.

A request waits in a line of bounded length, runs among at most `batch_size` others, and can be ended at any moment.
Pictures are decoded here, on the engine's thread, so that a stream gives pixels: a preview only when its reader has
taken the one before, so that nobody's previews pile up, and only as long as previews take no more than PREVIEW_SHARE of
the time, for a CPU takes longer over one than over the codes that it shows.
"""

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from medmax_fast.generate.engine import Engine
from medmax_fast.generate.requests import PicturePiece, Request, Result, TextPiece
from medmax_fast.generate.session import Session
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_CODES

# Of the time since a request began to run, what may go into previews of its pictures.
PREVIEW_SHARE = 0.2


class Busy(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Drawing:
    """A request's picture `number` (0, 1, ..) as far as it is drawn: pixels uint8 [512, 512, 3], the rest white.

    share: of the picture, 1.0 when it is complete. codes: int64 [1..1024], those so far.
    """

    id: str
    number: int
    share: float
    pixels: np.ndarray
    codes: np.ndarray


Piece = TextPiece | Drawing | Result


class Stream:
    """The answer to one request, piece by piece, its Result last. Leaving it as a context manager cancels it."""

    def __init__(self, dispatcher: "Dispatcher", request: Request, previews: bool):
        self.request, self.previews = request, previews
        self._dispatcher = dispatcher
        # None ends the stream.
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        # Of the session that runs it, -1 before.
        self.number = -1
        # When it began to run, and the seconds that its previews have taken.
        self.begun = self.previewed = 0.0
        self.cancelled = threading.Event()
        self.ended = False

    @property
    def ahead(self) -> int:
        """Requests that come before this one in the line; 0 once it runs or has ended."""
        return self._dispatcher.position(self)

    @property
    def idle(self) -> bool:
        """Whether the reader has taken all there is."""
        return self._pieces.empty()

    def next(self, timeout: float | None = None) -> Piece | None:
        """The next piece; None if there is none within `timeout` seconds, or after the last one (see `ended`)."""
        if self.ended:
            return None
        try:
            piece = self._pieces.get(timeout=timeout)
        except queue.Empty:
            return None
        self.ended = piece is None or isinstance(piece, Result)
        return piece

    def cancel(self) -> None:
        """End the request; what is here already can still be read."""
        if not self.cancelled.is_set():
            self.cancelled.set()
            self._dispatcher.wake()

    def put(self, piece: Piece | None) -> None:
        """For the dispatcher: give the reader one more piece, or None after which nothing comes."""
        self._pieces.put(piece)

    def __iter__(self) -> Iterator[Piece]:
        while (piece := self.next()) is not None:
            yield piece

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.cancel()


class Dispatcher:
    """The thread that runs an engine; any thread may call `submit`. Leaving it as a context manager closes it."""

    def __init__(self, engine: Engine, batch_size: int = 8, waiting: int = 32):
        """batch_size: requests that run at a time. waiting: those that may wait besides, 0 or more."""
        self._engine, self._batch_size, self._most_waiting = engine, batch_size, waiting
        self._line: deque[Stream] = deque()
        self._running: dict[int, Stream] = {}
        self._known: queue.SimpleQueue[tuple[bytes, np.ndarray]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="medmax engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests that the engine is working on."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Requests in the line."""
        return len(self._line)

    @property
    def alive(self) -> bool:
        """Whether requests are taken: not after `close`, nor after the engine has failed."""
        return self._thread.is_alive() and not self._closed

    def submit(self, request: Request, previews: bool = False) -> Stream:
        """Put a request in the line. previews: pictures that are being drawn, too, every four rows of codes.

        Busy if the line is full; InputError for a picture that the checkpoint cannot draw; RuntimeError if the
        dispatcher is closed or its engine has failed.
        """
        if request.mode != "text" and not self._engine.encoder.checkpoint.draws:
            raise InputError(f"mode {request.mode!r}: the checkpoint has no VQGAN decoder, so it cannot draw")
        stream = Stream(self, request, previews)
        with self._changed:
            if not self.alive:
                raise RuntimeError("the engine has stopped")
            # Those that are about to leave the line for free places do not count.
            if len(self._line) >= self._most_waiting + max(0, self._batch_size - len(self._running)):
                raise Busy(f"{len(self._line)} requests are waiting")
            self._line.append(stream)
            self._changed.notify()
        return stream

    def remember(self, file: bytes, codes: np.ndarray) -> None:
        """Read an image file of exactly these bytes as these codes [1024]: those that it was drawn from."""
        self._known.put((file, codes))

    def position(self, stream: Stream) -> int:
        """Requests before this one in the line; 0 for one that is not in it."""
        with self._changed:
            return next((i for i, other in enumerate(self._line) if other is stream), 0)

    def wake(self) -> None:
        """Have the thread look for requests that were cancelled."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """End everything that runs or waits, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> "Dispatcher":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _run(self) -> None:
        """The thread: an error of the engine ends it, and every stream with it, and is shown by threading's hook."""
        try:
            with self._engine.session(self._batch_size, pieces=True) as session:
                while self._next(session):
                    for number, event in session.step():
                        self._give(session, number, event)
        finally:
            with self._changed:
                self._closed = True
                left = [*self._running.values(), *self._line]
                self._running.clear()
                self._line.clear()
            for stream in left:
                if stream.cancelled.is_set():
                    stream.put(None)
                else:
                    stream.put(Result(stream.request.id, error="the engine has stopped"))

    def _next(self, session: Session) -> bool:
        """Wait for something to do, start and end requests; False when all is to end."""
        with self._changed:
            while not (self._closed or session.busy or self._line):
                self._changed.wait()
            if self._closed:
                return False
            gone = [stream for stream in self._line if stream.cancelled.is_set()]
            self._line = deque(stream for stream in self._line if not stream.cancelled.is_set())
            gone += [stream for stream in self._running.values() if stream.cancelled.is_set()]
            for stream in gone:
                self._running.pop(stream.number, None)
            for stream in itertools.islice(self._line, self._batch_size - len(self._running)):
                stream.number, stream.begun = session.submit(stream.request), time.monotonic()
                self._running[stream.number] = stream
            self._line = deque(stream for stream in self._line if stream.number < 0)
        for stream in gone:
            stream.put(None)
        # Not under the lock, which those who submit wait for: this may compute.
        for stream in gone:
            session.cancel(stream.number)
        while not self._known.empty():
            self._engine.encoder.remember(*self._known.get())
        return True

    def _give(self, session: Session, number: int, event: TextPiece | PicturePiece | Result) -> None:
        stream = self._running.get(number)
        if stream is None:
            return
        if isinstance(event, Result):
            with self._changed:
                del self._running[number]
            stream.put(event)
        elif isinstance(event, TextPiece):
            stream.put(event)
        elif len(event.codes) == IMAGE_CODES:
            pixels = self._engine.decode_images(event.codes[None])[0]
            stream.put(Drawing(event.id, event.number, 1.0, pixels, event.codes))
        elif stream.previews and stream.idle:
            start = time.monotonic()
            if stream.previewed <= PREVIEW_SHARE * (start - stream.begun):
                share, pixels = len(event.codes) / IMAGE_CODES, self._engine.preview(event.codes)
                stream.put(Drawing(event.id, event.number, share, pixels, event.codes))
                stream.previewed += time.monotonic() - start

"""Images on their way to the encoder: read, hashed, decoded and resized in threads, handed over in order."""

import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from medmax_fast.data.dali import DaliDecoder
from medmax_fast.data.image_list import ImageList
from medmax_fast.data.images import ImageError, Picture, decode
from medmax_fast.data.resize import filters, fit
from medmax_fast.data.shards import DIGEST_BYTES


@dataclass
class Loaded:
    """One image: its `pixels`, the `reason` why there are none, or neither where its content has codes already.

    pixels: uint8 [512, 512, 3], or of its full size. data: the file, where its pixels are left to a GPU.
    sha256: of the file's bytes, hexadecimal, None if it could not be read. notes: policies of data/modes.py that
    applied. seconds: by stage.
    """

    sha256: str | None = None
    pixels: np.ndarray | None = None
    data: bytes | None = None
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def digest(self) -> bytes:
        """The key of the content, for Contents."""
        assert self.sha256 is not None, "not read yet"
        return bytes.fromhex(self.sha256)[:DIGEST_BYTES]


@dataclass(frozen=True)
class ImageLoader:
    """Loads image `index` of a list; called from any thread.

    done: content digests that need no pixels. full_size: leave the resize to a GPU. dali: decodes in Pillow's place
    what it can. postpone: leave to a GPU even the decoding of that.
    """

    images: ImageList
    alpha: str
    depth16: str
    done: Container[bytes] = ()
    full_size: bool = False
    dali: DaliDecoder | None = None
    postpone: bool = False

    def __call__(self, index: int) -> Loaded:
        loaded = Loaded()
        clock = _Clock(loaded.seconds)
        try:
            data = self.images.read(index)
            loaded.sha256 = hashlib.sha256(data).hexdigest()
            clock.stop("read")
            if loaded.digest in self.done:
                return loaded
            picture = self.decode(data, index, self.postpone)
            loaded.notes = picture.notes
            clock.stop("decode")
            if picture.pixels is None:
                loaded.data = data
            if self.full_size:
                loaded.pixels = picture.pixels
                # Computed here, so that the thread that feeds the GPU finds them made.
                filters(*picture.size)
            else:
                loaded.pixels = fit(picture.decoded)
            clock.stop("preprocess")
        except ImageError as error:
            loaded.reason = error.reason
        return loaded

    def decode(self, data: bytes, index: int, postpone: bool = False) -> Picture:
        """The picture in the file of image `index`; ImageError."""
        name = self.images.paths[index]
        return decode(data, name, self.alpha, self.depth16, self.full_size, self.dali, postpone)


class _Clock:
    """Adds the time since it was made, or last stopped, to a stage."""

    def __init__(self, seconds: dict[str, float]):
        self._seconds, self._last = seconds, time.monotonic()

    def stop(self, stage: str) -> None:
        now = time.monotonic()
        self._seconds[stage] = now - self._last
        self._last = now


def load_ahead(tasks: Iterable, load: Callable, workers: int, ahead: int) -> Iterator[tuple]:
    """Yield (task, load(task), seconds waited for it) in order, with `ahead` tasks under way in `workers` threads."""
    tasks, under_way = iter(tasks), deque[tuple]()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="load")
    try:
        while True:
            for task in itertools.islice(tasks, ahead - len(under_way)):
                under_way.append((task, pool.submit(load, task)))
            if not under_way:
                return
            task, future = under_way.popleft()
            start = time.monotonic()
            yield task, future.result(), time.monotonic() - start
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

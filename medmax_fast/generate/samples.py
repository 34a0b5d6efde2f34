"""The state of a running request on the host: its streams, what of them has been fed, and what is on its way.

The host launches picks before it has read the last ones. `Sample.ahead` counts those; a stream's length is what the
host has read plus what is ahead. A text pick that turns out to be boi makes those after it void (the device has not
followed them either, see generate/steps.py).
"""

import hashlib

import numpy as np

from medmax_fast.generate import grammar
from medmax_fast.generate.pages import Lease
from medmax_fast.generate.requests import PicturePiece, Request, TextPiece
from medmax_fast.vocab import IMAGE_CODES, IMAGE_SIDE, TextTokenizer

# Codes between two previews of a picture that is being drawn: four rows.
PREVIEW = 4 * IMAGE_SIDE


class Stream:
    """One sequence in the cache.

    ids: those known to the host. fed: positions whose keys and values have been computed, or are about to be.
    at: the position whose id the device takes for this stream's last, -1 where it knows of none.
    """

    def __init__(self, ids: list[int], slot: int, lease: Lease):
        self.ids, self.slot, self.lease = ids, slot, lease
        self.fed = lease.cached
        self.at = -1


class Sample:
    """A running request. main: its stream, given with its room in the cache."""

    main: Stream

    def __init__(self, number: int, request: Request, prompt: list[int]):
        self.number, self.request, self.prompt = number, request, prompt
        self.rules = grammar.Rules(request.mode, request.max_new_tokens, request.max_length)
        self.state = grammar.begin(self.rules, len(prompt))
        self.guides: list[Stream] = []
        # Picks that are launched and not read; those of an earlier epoch are void.
        self.ahead = 0
        self.epoch = 0
        self.error = ""

    @property
    def streams(self) -> list[Stream]:
        return [self.main, *self.guides]

    @property
    def due(self) -> grammar.Due:
        return grammar.due(self.state, self.rules, self.ahead)

    def length(self, stream: Stream) -> int:
        """Ids of a stream, those on their way included."""
        return len(stream.ids) + self.ahead

    @property
    def ready(self) -> bool:
        """Whether every stream has been fed all its ids, so that the next one can be picked."""
        return all(stream.fed == self.length(stream) for stream in self.streams)

    @property
    def group(self) -> tuple[int, int, int]:
        """Slots of the full, image-conditioned and unconditioned streams."""
        streams = self.streams
        return self.main.slot, streams[min(1, len(streams) - 1)].slot, streams[-1].slot

    def launched(self) -> tuple["Sample", int]:
        """Count one more pick ahead; the sample and its epoch, to be compared when the id is read."""
        self.ahead += 1
        for stream in self.streams:
            stream.at += 1
        return self, self.epoch

    def take(self, new: int, layout) -> None:
        """The next id has been read (or given, as eoi is)."""
        for stream in self.streams:
            stream.ids.append(new)
        self.state = grammar.advance(self.state, self.rules, new, layout)

    def void(self) -> None:
        """The picks ahead did not happen: the device stopped at the last id read."""
        self.epoch += 1
        self.ahead = 0
        for stream in self.streams:
            stream.fed = min(stream.fed, len(stream.ids))
            stream.at = len(stream.ids) - 1


def uniforms(request: Request, count: int) -> np.ndarray | None:
    """Random numbers float32 [count] in [0, 1), one per position, of (seed, id); None for a greedy request."""
    if request.greedy:
        return None
    digest = hashlib.sha256(f"{request.seed}\n{request.id}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return generator.random(count, dtype=np.float32)


def content_of(ids: list[int], tokenizer: TextTokenizer) -> list[dict]:
    """Generated ids as the content of a Result."""
    content: list[dict] = []
    for kind, piece in grammar.split_pieces(ids, tokenizer.layout):
        if kind == "image":
            content.append({"type": "image", "codes": tokenizer.layout.codes_from_ids(np.array(piece))})
        else:
            content.append({"type": "text", "text": tokenizer.decode(piece)})
    return content


class Narrator:
    """An answer's pieces as its ids come; put together they are its content."""

    def __init__(self, request_id: str, tokenizer: TextTokenizer):
        self._id, self._tokenizer, self._layout = request_id, tokenizer, tokenizer.layout
        self._untold: list[int] = []
        self._codes: list[int] = []
        self._pictures = 0

    def hear(self, new: int) -> TextPiece | PicturePiece | None:
        """The piece that an id completes, if any; `finish` gives what is held back of a stretch of text that ends."""
        layout = self._layout
        if new >= layout.text_start:
            self._untold.append(new)
            # Ids are byte strings: the last character may be incomplete, which decodes to U+FFFD.
            whole = not self._tokenizer.decode(self._untold).endswith("\ufffd")
            return self.finish() if whole else None
        if not layout.image_start <= new < layout.image_end:
            return self.finish()
        self._codes.append(new - layout.image_start)
        if len(self._codes) % PREVIEW:
            return None
        piece = PicturePiece(self._id, self._pictures, np.array(self._codes))
        if len(self._codes) == IMAGE_CODES:
            self._codes, self._pictures = [], self._pictures + 1
        return piece

    def finish(self) -> TextPiece | None:
        """What is held back of the text, bytes that make no character included."""
        text = self._tokenizer.decode(self._untold)
        self._untold = []
        return TextPiece(self._id, text) if text else None

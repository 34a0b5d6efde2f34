"""What the engine takes and gives: requests, the pieces of an answer as it is made, and results."""

from dataclasses import dataclass, field

import numpy as np

from medmax_fast.generate import grammar
from medmax_fast.model.layout import MAX_POSITIONS
from medmax_fast.runtime import InputError


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it; the defaults are the published ones.

    content: pieces {"type": "text", "text": str}, {"type": "image", "path": str} and, between the turns of a
    conversation, {"type": "eot"}; or token_ids, fed as they are.
    mode: "text", "image" (exactly one picture; boi is appended unless there) or "any" (interleaved).
    max_new_tokens: text ids per stretch of text; max_length: prompt and output together. A temperature of 0 takes the
    likeliest id, as `greedy` does for text and pictures. temperature, top_p and repetition_penalty (1: none) are those
    of text, image_temperature and image_top_p of pictures; top_p keeps the likeliest ids until their probability
    reaches it. guidance_text, guidance_image: weights of the whole prompt against its images, and of these against no
    prompt. Random numbers come from (seed, id) and the position alone.
    """

    id: str
    content: list[dict] | None = None
    token_ids: list[int] | None = None
    mode: str = "text"
    eot: bool = True
    greedy: bool = False
    temperature: float = 1.0
    top_p: float = 0.9
    repetition_penalty: float = 1.2
    image_temperature: float = 0.7
    image_top_p: float = 0.9
    guidance_text: float = 3.0
    guidance_image: float = 1.2
    max_new_tokens: int = 1024
    max_length: int = MAX_POSITIONS
    seed: int = 0

    def check(self) -> None:
        """InputError for a setting that no prompt can be run with."""
        if self.mode not in grammar.MODES:
            raise InputError(f"mode {self.mode!r}, expected one of {', '.join(grammar.MODES)}")
        if (self.content is None) == (self.token_ids is None):
            raise InputError("a prompt has either content or token_ids")
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if not least <= value <= most:
                expected = f"{least:g} or more" if most == _HUGE else f"{least:g} to {most:g}"
                raise InputError(f"{name} {value}: expected {expected}")
        if self.repetition_penalty == 0:
            raise InputError("repetition_penalty 0: expected a positive number")


# Largest number that float32 settings on the device take without a second thought.
_HUGE = 1e6
# Fields of a Request, the least and the most each may be. NaN is within no range.
_RANGES = (
    ("temperature", 0, _HUGE),
    ("image_temperature", 0, _HUGE),
    ("top_p", 0, 1),
    ("image_top_p", 0, 1),
    ("repetition_penalty", 0, _HUGE),
    ("guidance_text", -_HUGE, _HUGE),
    ("guidance_image", -_HUGE, _HUGE),
    ("max_new_tokens", 1, _HUGE),
    ("max_length", 1, MAX_POSITIONS),
)


@dataclass(frozen=True)
class TextPiece:
    """Text that the answer to request `id` goes on with; the `text` of all pieces is that of the result."""

    id: str
    text: str


@dataclass(frozen=True)
class PicturePiece:
    """The codes so far, int64 [1..1024], of picture `number` (0, 1, ..) of request `id`; all 1,024 at its end."""

    id: str
    number: int
    codes: np.ndarray


@dataclass(frozen=True)
class Result:
    """What request `id` got: new ids as token_ids, and the same as text and images in content; or in error, why not."""

    id: str
    token_ids: list[int] = field(default_factory=list)
    # {"type": "text", "text": str} and {"type": "image", "codes": int64 [1024]}, in order.
    content: list[dict] = field(default_factory=list)
    error: str | None = None

"""What an evaluation asks of a model and gets back, whatever the model: the protocol that every backend follows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

# What "as many as the answer takes" means to a backend whose model does not end there by itself, as in the published
# evaluation of answers with pictures.
NEW_TOKENS = 1024

# Content pieces of an Ask: {"type": "text", "text": str} and {"type": "image", "path": str}; of an Answer: text as
# there, and {"type": "image", "pixels": uint8 [H, W, 3]}.
Content = list[dict]


@dataclass(frozen=True)
class Ask:
    """One question for a model, answered greedily.

    mode: `text`, `image` (one picture) or `any` (text and pictures). new_tokens: most new ids of text, 0 for as many as
    the answer takes. turn: whether the content is a whole turn, to be answered by the assistant, or the beginning of a
    text to be gone on with, which only the native engine can do (it appends no eot then).
    """

    id: str
    content: Content
    mode: str = "text"
    new_tokens: int = 0
    turn: bool = True


@dataclass(frozen=True)
class Answer:
    """What a model said to the Ask of this id, or why it said nothing.

    passing: the error may be gone the next time (a server was down), so a later run asks again.
    """

    id: str
    content: Content = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    error: str | None = None
    passing: bool = False

    @property
    def text(self) -> str:
        """All text, with blanks where pictures are left out."""
        return " ".join(piece["text"] for piece in self.content if piece["type"] == "text")

    @property
    def pictures(self) -> list:
        """Pixels of all pictures, uint8 [H, W, 3] each."""
        return [piece["pixels"] for piece in self.content if piece["type"] == "image"]


class Backend(Protocol):
    """A model that answers."""

    @property
    def draws(self) -> bool | None:
        """Whether it can make pictures; None where only trying shows it."""

    def answer(self, asks: list[Ask], batch_size: int, done: Callable[[int], None]) -> list[Answer]:
        """One answer for every ask, in any order, at most batch_size at a time; InputError only for what ends the run.

        An ask that cannot be answered gets an Answer with `error`, and the others go on. done(n) is called whenever n
        more asks are answered, in this thread.
        """

    def facts(self) -> dict:
        """What results.json says of the model: name, kind, decoding, and what of it is known only after asking."""

"""Requests and results of the engine, and the state of a request while it runs."""

from collections import deque
from dataclasses import dataclass, field

import torch

from medmax_fast.generate import sampling


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it; the defaults are the published ones.

    content: pieces {"type": "text", "text": str} and {"type": "image", "path": str}; or token_ids, fed as they are.
    mode: "text", "image" (exactly one picture; boi is appended unless there) or "any" (interleaved).
    max_new_tokens: text ids per stretch of text; max_length: prompt and output together.
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
    max_length: int = 4096
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What a request got: the new ids, and the same as text and images; or why it got nothing."""

    id: str
    token_ids: list[int] = field(default_factory=list)
    # {"type": "text", "text": str} and {"type": "image", "codes": int64 [1024]}, in order.
    content: list[dict] = field(default_factory=list)
    error: str | None = None


class Stream:
    """One sequence in the cache: its slot, what is still to be fed, and the hidden state after its last id."""

    def __init__(self, ids: list[int]):
        self.feed = deque(ids)
        self.slot = -1
        self.position = 0
        self.hidden: torch.Tensor | None = None


class Sample:
    """A running request: its ids so far and the state of its grammar."""

    def __init__(self, request: Request, ids: list[int], vocab_size: int, device: torch.device):
        self.request = request
        self.ids = ids
        self.prompt_length = len(ids)
        self.text_left = request.max_new_tokens
        # Image ids still to draw; 0 while writing text.
        self.to_draw = 0
        self.done = False
        self.generator = None if request.greedy else sampling.make_generator(request.seed, request.id)
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.seen[torch.tensor(ids, device=device)] = True
        self.main = Stream(ids)
        self.guides: list[Stream] = []

    @property
    def streams(self) -> list[Stream]:
        return [self.main, *self.guides]

    @property
    def ready(self) -> bool:
        """Whether every stream has consumed all ids, so that the next one can be picked."""
        return not any(stream.feed for stream in self.streams)

    def append(self, new: int) -> None:
        self.ids.append(new)
        self.seen[new] = True
        for stream in self.streams:
            stream.feed.append(new)

"""Answers in OpenAI's chat-completions form, whole or in chunks, with pictures in OpenRouter's.

A picture stands in `images` beside `content`. Its `offset` is the number of characters of `content` before it, so that
the order of text and pictures can be told: an extra that clients which do not know it pass over.
"""

import base64
import secrets
import time
from dataclasses import dataclass
from typing import Any

from medmax_fast.generate.requests import Result


@dataclass
class Counts:
    """What a server has done so far: requests answered whole, refused and hung up on; pictures; ids in and out."""

    answered: int = 0
    refused: int = 0
    hung_up: int = 0
    pictures: int = 0
    prompt_ids: int = 0
    new_ids: int = 0


class Choice:
    """One of the answers to a chat, as it grows."""

    def __init__(self, index: int, eos: int):
        self.index, self._eos = index, eos
        self.text = ""
        self.images: list[dict] = []
        self.finish_reason: str | None = None
        self.ids = 0

    def add_text(self, text: str) -> dict:
        """The chunk's choice for a piece of text."""
        self.text += text
        return self._delta({"content": text})

    def add_picture(self, file: bytes) -> dict:
        """The chunk's choice for a picture, the bytes of a PNG file."""
        url = f"data:image/png;base64,{base64.b64encode(file).decode()}"
        image = {"type": "image_url", "image_url": {"url": url}, "index": len(self.images), "offset": len(self.text)}
        self.images.append(image)
        return self._delta({"images": [image]})

    def finish(self, result: Result, mode: str) -> dict:
        """The last chunk's choice: `stop` where the model ended its answer, or its one picture."""
        self.ids = len(result.token_ids)
        whole = mode == "image" or result.token_ids[-1:] == [self._eos]
        self.finish_reason = "stop" if whole else "length"
        return self._delta({})

    def begin(self) -> dict:
        """The first chunk's choice."""
        return self._delta({"role": "assistant", "content": ""})

    def whole(self) -> dict:
        """The choice of an answer that is not streamed."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        if self.images:
            message["images"] = self.images
        return {"index": self.index, "message": message, "logprobs": None, "finish_reason": self.finish_reason}

    def _delta(self, delta: dict) -> dict:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": self.finish_reason}


class Reply:
    """The frame around the choices of one chat."""

    def __init__(self, model: str, prompt_ids: int, choices: list[Choice]):
        self.choices, self.prompt_ids = choices, prompt_ids
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    @property
    def ids(self) -> int:
        """New ids of all choices that are finished."""
        return sum(choice.ids for choice in self.choices)

    def whole(self) -> dict:
        """The answer that is not streamed."""
        choices = [choice.whole() for choice in self.choices]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    def chunk(self, choice: dict, include_usage: bool) -> dict:
        """A chunk of the answer. include_usage: the client waits for `usage`, which the last chunk alone has."""
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return chunk | {"usage": None} if include_usage else chunk

    def usage_chunk(self) -> dict:
        """The chunk after the last choice has ended."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()}

    def _usage(self) -> dict:
        total = self.prompt_ids + self.ids
        return {"prompt_tokens": self.prompt_ids, "completion_tokens": self.ids, "total_tokens": total}

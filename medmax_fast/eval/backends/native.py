"""The native backend: a MedMax, Anole or Chameleon checkpoint through our own engine.

A question of one new id costs a prefill and nothing else: the first id is the answer. The engine computes an image's
1,026 ids once for all questions about it that stand in one call.
"""

from collections.abc import Callable

import numpy as np

from medmax_fast.eval.backends.protocol import Answer, Ask
from medmax_fast.generate.engine import Engine
from medmax_fast.generate.requests import Request, Result
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.layout import MAX_POSITIONS

# As published for every task.
REPETITION_PENALTY = 1.2


class NativeBackend:
    """Answers with an Engine; `name` is the checkpoint as given. draws: whether it has a picture decoder."""

    def __init__(self, engine: Engine, name: str, draws: bool = True):
        self._engine, self._name, self.draws = engine, name, draws

    @classmethod
    def load(cls, ckpt: str, vqgan: str = "", device: str = "auto", precision: str = "auto") -> "NativeBackend":
        """Load a checkpoint folder in either layout; InputError says what is wrong with it."""
        checkpoint = open_checkpoint(ckpt, vqgan)
        engine = Engine.from_checkpoint(checkpoint, device=device, precision=precision)
        return cls(engine, ckpt, checkpoint.draws)

    def answer(self, asks: list[Ask], batch_size: int, done: Callable[[int], None]) -> list[Answer]:
        """One answer per ask; see eval/backends/protocol.py."""
        requests = [self._request(ask) for ask in asks]
        results = self._engine.generate(requests, batch_size, progress=lambda _: done(1))
        pictures = [piece["codes"] for result in results for piece in result.content if piece["type"] == "image"]
        pixels = iter(self._engine.decode_images(np.array(pictures)) if pictures else ())
        return [self._answer(result, pixels) for result in results]

    def _request(self, ask: Ask) -> Request:
        return Request(
            id=ask.id,
            content=ask.content,
            # Without a picture decoder only text can be shown.
            mode=ask.mode if self.draws or ask.mode == "image" else "text",
            eot=ask.turn,
            greedy=True,
            repetition_penalty=REPETITION_PENALTY,
            max_new_tokens=ask.new_tokens or MAX_POSITIONS,
        )

    @staticmethod
    def _answer(result: Result, pixels) -> Answer:
        if result.error:
            return Answer(result.id, error=result.error)
        content = [
            {"type": "image", "pixels": next(pixels)} if piece["type"] == "image" else piece for piece in result.content
        ]
        return Answer(result.id, content, [int(i) for i in result.token_ids])

    def facts(self) -> dict:
        """What results.json says of the model."""
        decoding = f"greedy, repetition penalty {REPETITION_PENALTY}, published guidance for pictures"
        dtype = str(self._engine.decoder.dtype).removeprefix("torch.")
        return {"kind": "native", "model": self._name, "dtype": dtype, "decoding": decoding}

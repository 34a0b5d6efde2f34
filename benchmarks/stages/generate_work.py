"""The least that generation must move and multiply: bytes of a decode step, FLOP of a step and of a prompt."""

from medmax_fast.generate.engine import Engine
from medmax_fast.generate.pages import Lease
from medmax_fast.model.layout import ModelShape
from medmax_fast.training.speed import linear_parameters


def decode_work(shape: ModelShape, itemsize: int, streams: float, positions: float, head: int) -> tuple[float, float]:
    """(bytes, FLOP) of one decode step: the weights, and keys and values of all positions that its streams see.

    positions: of all streams together. head: rows of the head that give logits, one set for each stream. itemsize:
    bytes of a weight, a key or a value. Attention's own FLOP are left out, which are as many as bytes it reads.
    """
    blocks, _ = linear_parameters(shape)
    norms = shape.layers * 2 * (shape.dim + shape.dim + shape.kv_dim) + shape.dim
    moved = blocks + head * shape.dim + norms + 2 * shape.layers * shape.kv_dim * positions
    return itemsize * moved, 2 * streams * (blocks + head * shape.dim)


def text_work(shape: ModelShape, itemsize: int, prompt: int, answers: list[int], batch: int) -> tuple[float, float]:
    """Mean (bytes, FLOP) of a step that writes answers of these lengths, `batch` at a time, to prompts of a length."""
    steps = sum(max(answers[i : i + batch]) - 1 for i in range(0, len(answers), batch))
    # The first id of an answer comes from the prefill.
    fed = sum(answers) - len(answers)
    positions = sum((n - 1) * prompt + n * (n - 1) // 2 for n in answers)
    return decode_work(shape, itemsize, fed / steps, positions / steps, shape.vocab_size)


def picture_work(shape: ModelShape, itemsize: int, prompt: int, codes: int, batch: int, head: int) -> tuple:
    """Mean (bytes, FLOP) of a step of the first `codes` of as many pictures after prompts (with boi) without images.

    Two streams a picture: for such prompts the image-conditioned and the unconditioned one are the same, [bos, boi].
    head: different codes, whose rows of the head give logits.
    """
    return decode_work(shape, itemsize, 2 * batch, batch * (prompt + 2 + codes), head)


def prefill_flop(shape: ModelShape, ids: int, pairs: int, answers: int) -> int:
    """FLOP of so many prompt ids, of which `answers` get logits, and so many pairs of a query and a key it sees."""
    blocks, head = linear_parameters(shape)
    return 2 * blocks * ids + 2 * head * answers + 4 * shape.layers * shape.heads * shape.head_dim * pairs


def pairs_of(length: int, cached: int = 0) -> int:
    """Pairs of a query and a key it sees, of positions cached..length-1."""
    return (length * (length + 1) - cached * (cached + 1)) // 2


class PrefillCount:
    """Counts what the packed passes of an engine compute: ids, and pairs of a query and a key it sees."""

    def __init__(self, engine: Engine):
        self._plan, self._shape = engine.cache.prefill, engine.decoder.shape
        self.ids = self.pairs = 0
        engine.cache.prefill = self

    def __call__(self, leases: list[Lease], lengths: list[int]):
        for lease, length in zip(leases, lengths, strict=True):
            self.ids += length - lease.cached
            self.pairs += pairs_of(length, lease.cached)
        return self._plan(leases, lengths)

    def flop(self, answers: int) -> int:
        """Of the layers' products, the head's for one id per answer, and attention."""
        return prefill_flop(self._shape, self.ids, self.pairs, answers)

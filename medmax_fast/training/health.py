"""Runs that go wrong: gradients that are not finite, losses that are not, losses that diverge; and which rows did it.

Nothing here costs a wait for the device on an ordinary step. DeepSpeed looks at the gradients of every step anyway and
leaves a bad update out, so a step that overflows ends the run with its weights intact. Losses are looked at when they
are logged.

A loss diverges when the mean of the last WINDOW logged ones, the highest aside, exceeds FACTOR times the lowest such
mean before it and half of a blind guess: a single bad batch passes however bad, and so do steps that are harder than
those before, as a loss near zero has many of. Text and image targets are watched apart, since steps differ in what they
have. What the run began with counts as a mean too, else one that diverges at once would go on; but no less than a blind
guess, as a single first loss can be low.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from medmax_fast.runtime import InputError

WINDOW, FACTOR = 8, 3.0
# Nats of a guess among the ids of Chameleon.
GUESS = math.log(65536)
KINDS = ("text", "image")
# Rows named in the message; the file has all of them.
NAMED = 5


@dataclass(frozen=True)
class StepRows:
    """What one rank knows of a step: its rows (int64 [n]) and their summed losses (fp64 [n], on the device)."""

    number: int
    rows: np.ndarray
    losses: torch.Tensor


class Divergence:
    """The logged losses of a run, and whether they have diverged; `limit` is what the last mean had to keep below."""

    def __init__(self, losses: Iterable[float] = ()):
        self.limit = math.inf
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._lowest: float | None = None
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> str:
        """One more loss; says what is wrong, nothing if all is well."""
        self._recent.append(loss)
        if self._lowest is None:
            self._lowest = max(loss, GUESS)
        if len(self._recent) < WINDOW:
            return ""
        mean = (sum(self._recent) - max(self._recent)) / (WINDOW - 1)
        self.limit = max(FACTOR * self._lowest, GUESS / 2)
        self._lowest = min(self._lowest, mean)
        if mean <= self.limit:
            return ""
        return f"{mean:.3g} over the last {WINDOW} logged steps, expected at most {self.limit:.3g}"


class Health:
    """Keeps the rows of the last logged steps, and ends the run with the names of those that were worst.

    records: the lines of metrics.jsonl so far. keys: the name of a row by its number. counts: supervised ids of rows.
    gather: a value of every rank, on all ranks. record: takes what is written down before the run ends.
    """

    def __init__(
        self,
        records: Sequence[Mapping],
        keys: Callable[[int], str],
        counts: Callable[[np.ndarray], np.ndarray],
        gather: Callable[[object], list],
        record: Callable[[dict], None],
    ):
        self._kinds = {kind: Divergence(filter(None, (r[f"{kind}_loss"] for r in records))) for kind in KINDS}
        self._steps: dict[str, deque[tuple[StepRows, float]]] = {kind: deque(maxlen=WINDOW) for kind in KINDS}
        self._keys, self._counts, self._gather, self._record = keys, counts, gather, record

    def logged(self, step: StepRows, record: Mapping) -> None:
        """A logged step and its mean losses over all ranks; InputError if one is not finite or has diverged.

        record: `loss`, `text_loss`, `image_loss` as in metrics.jsonl.
        """
        if not math.isfinite(record["loss"]):
            self.stop(step, f"the loss is {record['loss']}")
        for kind, divergence in self._kinds.items():
            if (loss := record[f"{kind}_loss"]) is None:
                continue
            self._steps[kind].append((step, loss))
            if found := divergence.add(loss):
                # Where it began; in a resumed run that may have been before.
                first = next((earlier for earlier, high in self._steps[kind] if high > divergence.limit), step)
                self.stop(first, f"the loss of {kind} targets diverges, seen at step {step.number}: {found}")

    def stop(self, step: StepRows, reason: str) -> None:
        """End the run on every rank with an InputError that names the worst rows of `step`.

        Rows whose loss is not finite come first, then those with the highest loss per supervised id.
        """
        counts = np.maximum(self._counts(step.rows), 1)
        mean = step.losses.cpu().numpy() / counts
        ranks: list[list[tuple[int, float]]] = self._gather(list(zip(step.rows.tolist(), mean.tolist(), strict=True)))
        found = [entry for rank in ranks for entry in rank]
        broken = sorted(entry for entry in found if not math.isfinite(entry[1]))
        worst = broken or sorted(found, key=lambda entry: (-entry[1], entry[0]))
        rows = [{"row": row, "key": self._keys(row), "loss": loss if not broken else str(loss)} for row, loss in worst]
        self._record({"step": step.number, "reason": reason, "rows": rows})
        named = ", ".join(f"{self._keys(row)} ({loss:.3g})" for row, loss in worst[:NAMED])
        # All of them point at the weights, a few at the data.
        share = f"{len(broken)} of {len(found)} rows have a loss that is not finite"
        kind = share if broken else "rows with the highest loss"
        raise InputError(f"step {step.number}: {reason}; {kind}: {named}; lower --lr, or leave such rows out")

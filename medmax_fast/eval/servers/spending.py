"""What calls to a paid model cost: prices, a counter shared by threads, and the budget that ends a run.

Costs are counted from the tokens that the server reports, so requests that a server bills without answering are not
in them. The budget is of a run: what its replies have cost before counts. It is looked at before a request, so it is
passed by what the requests then in flight cost, and by what other processes of the run spend meanwhile.
"""

import math
import threading
from pathlib import Path

from medmax_fast.eval.servers.chat_reply import kept_tokens
from medmax_fast.runtime import InputError

# USD per million tokens (in, out), from OpenAI's list.
PRICES = {
    "gpt-4o": (2.50, 10.00),
    "gpt-4o-2024-08-06": (2.50, 10.00),
    "gpt-4o-2024-11-20": (2.50, 10.00),
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4o-mini-2024-07-18": (0.15, 0.60),
}


class BudgetSpent(InputError):
    """The budget is used up; what was answered is kept."""


def price_of(model: str, override: str, flag: str) -> tuple[float, float] | None:
    """USD per million tokens (in, out) of a model, None if not known.

    override: the text of `flag`, "" or such as 0.15,0.60; InputError for anything else.
    """
    if not override.strip():
        return PRICES.get(model)
    try:
        prices = tuple(float(price) for price in override.split(","))
    except ValueError:
        prices = ()
    if len(prices) != 2 or not all(math.isfinite(price) and price >= 0 for price in prices):
        raise InputError(f"{flag} {override}: expected USD per million tokens in and out, such as 0.15,0.60")
    return prices


def cost(prompt: int, completion: int, prices: tuple[float, float] | None) -> float | None:
    """USD for so many tokens in and out; None where the prices are not known."""
    return None if prices is None else (prompt * prices[0] + completion * prices[1]) / 1e6


class Meter:
    """Counts the calls of this process; safe to share between threads and clients. budget: USD, 0 for none."""

    def __init__(self, budget: float = 0.0):
        self.budget = budget
        self.calls = self.retries = self.cached = self.prompt_tokens = self.completion_tokens = 0
        # Of this process, and of what it found paid for.
        self.usd = self.before = 0.0
        self._priced = True
        self._lock = threading.Lock()

    def count_kept(self, folder: Path, prices: dict[str, tuple[float, float] | None]) -> None:
        """Add what the replies in a cache folder have cost, so that a run which is continued keeps to its budget."""
        for model, prompt, completion in kept_tokens(folder):
            self.before += cost(prompt, completion, prices.get(model)) or 0.0

    def check(self) -> None:
        """BudgetSpent if there is a budget and nothing of it is left."""
        if self.budget and self.before + self.usd >= self.budget:
            raise BudgetSpent(
                f"--budget {self.budget:g}: {self.before + self.usd:.4f} USD spent; what was answered is kept, "
                "and the same command with a larger --budget goes on from there"
            )

    def count_call(self, retry: bool) -> None:
        """A request is about to be sent."""
        with self._lock:
            self.calls += 1
            self.retries += retry

    def count_cached(self) -> None:
        """An earlier reply was used again."""
        with self._lock:
            self.cached += 1

    def count_tokens(
        self, prompt: int | None, completion: int | None, prices: tuple[float, float] | None, model: str
    ) -> None:
        """A reply came with these token counts; InputError where a budget cannot be kept because there are none."""
        with self._lock:
            self.prompt_tokens += prompt or 0
            self.completion_tokens += completion or 0
            if prices is None:
                self._priced = False
            else:
                self.usd += cost(prompt or 0, completion or 0, prices) or 0.0
        if self.budget and prices and any(prices) and (prompt is None or completion is None):
            raise InputError(f"--budget {self.budget:g}: the server of {model!r} does not report the tokens used")

    def usage(self) -> dict:
        """All counts; usd is None if any call had no known price."""
        names = ("calls", "retries", "cached", "prompt_tokens", "completion_tokens")
        return {**{name: getattr(self, name) for name in names}, "usd": round(self.usd, 6) if self._priced else None}

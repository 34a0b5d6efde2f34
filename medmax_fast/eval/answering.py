"""The part of an evaluation in which the model is asked: batches claimed, answered and kept until none is left."""

import time

from medmax_fast.config import EvalConfig
from medmax_fast.data.claims import Claims
from medmax_fast.eval.answers import Answers
from medmax_fast.eval.backends.protocol import Answer, Ask, Backend
from medmax_fast.eval.opening import Servers, estimate_asks, open_backend
from medmax_fast.progress import Progress
from medmax_fast.runtime import info, log

# How long a process without work waits before it looks again.
POLL_SECONDS = 0.5


class Answering:
    """One process's share of the questions. plan: the asks of each batch; backend: opened from the flags if None."""

    def __init__(
        self, config: EvalConfig, plan: list[list[Ask]], answers: Answers, servers: Servers, backend: Backend | None
    ):
        self._config, self._plan, self._answers, self._servers = config, plan, answers, servers
        self._backend = backend
        self._total = sum(map(len, plan))

    def work(self, claims: Claims, again: dict[int, tuple], judging: dict | None = None) -> None:
        """Claim and answer batches until all are done, by whomever.

        again: batches to be replaced, with their states. judging: what the judge will cost afterwards, if there is one.
        """
        left = self._left(again)
        if not left:
            return
        done = self._total - sum(len(self._plan[number]) for number in left)
        if done:
            info(f"eval: {done} of {self._total} questions are already answered in {self._config.output}")
        # A wrong address or key is better known before a model has answered for hours.
        for asker in (self._servers.backend, self._servers.judge):
            if asker:
                asker.client.check()
        asks = [ask for number in left for ask in self._asks(number, self._answers.kept(number))]
        if again:
            info(
                f"eval: {len(again)} batches hold questions that a server left without an answer; they are asked again"
            )
        usd = 0.0
        if self._servers.backend:
            usd = self._servers.announce(
                "the questions", estimate_asks(asks, self._config.model, self._servers.prices), 0.0
            )
        if judging:
            self._servers.announce("the judge afterwards", judging, usd)
        with Progress("eval (questions)", self._total, done, 0) as bar:
            while left:
                worked = False
                for number in left:
                    if self._answer_batch(number, claims, again, bar):
                        worked = True
                        bar.update(self._total - sum(len(self._plan[n]) for n in self._left(again)))
                if not worked:
                    # The rest is in other processes' hands; should one of them die, its claims become free.
                    time.sleep(POLL_SECONDS)
                left = self._left(again)

    def kept(self) -> str:
        """What an interrupted run keeps: whole batches."""
        done = self._total - sum(len(self._plan[number]) for number in self._answers.left())
        return f"the answers to {done} of {self._total} questions are kept in {self._config.output}"

    def _left(self, again: dict[int, tuple]) -> list[int]:
        """Batches that are not there, and those that are as they were when they were found to be asked again."""
        return self._answers.left() + [n for n, state in again.items() if self._answers.state(n) == state]

    def _asks(self, number: int, kept: dict) -> list[Ask]:
        return [ask for ask in self._plan[number] if ask.id not in kept]

    def _answer_batch(self, number: int, claims: Claims, again: dict, bar: Progress) -> bool:
        """Answer one batch if nobody else has it; whether it was done here. bar: told of answers as they come."""
        if not claims.take(number):
            return False
        try:
            # It may have been published between the look and the claim.
            if self._answers.state(number) not in (None, again.get(number)):
                return False
            kept = self._answers.kept(number)
            if self._backend is None:
                self._backend = open_backend(self._config, self._servers)
                # Known before it has answered the rest of a run that it has no part in.
                self._answers.check_model(self._backend.facts())
            asks = self._asks(number, kept)
            found = self._backend.answer(asks, self._config.batch_size, lambda n: bar.update(bar.done + n))
            bar.rejected = (bar.rejected or 0) + sum(answer.error is not None for answer in found)
            facts = stable(self._backend.facts()) | {"draws": self._backend.draws}
            self._answers.publish(number, facts, kept, found)
            self._log_errors(found)
        finally:
            claims.give_back(number)
        return True

    @staticmethod
    def _log_errors(answers: list[Answer]) -> None:
        errors = [answer for answer in answers if answer.error is not None]
        for answer in errors[:3]:
            log(f"{answer.id}: {answer.error}")
        if len(errors) > 3:
            log(f"and {len(errors) - 3} more questions of this batch got no answer")


def stable(facts: dict) -> dict:
    """Facts without those that differ between runs that are otherwise the same."""
    return {name: value for name, value in facts.items() if name != "usage"}

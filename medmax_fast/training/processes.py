"""The ranks of a run: what they add up, what the first one does for all, and when all of them stop.

Collectives here run on the group that carries gradients, except for the wish to stop: that one goes over a group of
CPU sockets, so that asking costs no wait for the GPU.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed

from medmax_fast.runtime import InputError

# A launcher hands on the signal that a terminal or a scheduler has sent to its processes already.
SAME_SIGNAL_SECONDS = 5.0


def barrier() -> None:
    """Wait for all ranks."""
    if distributed.get_world_size() > 1:
        distributed.barrier()


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all ranks."""
    if distributed.get_world_size() > 1:
        distributed.all_reduce(values)
    return values


def on_first_rank(function: Callable[[], Any]) -> Any:
    """What `function()` returns on rank 0, on every rank; its InputError is raised on every rank."""
    box: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        try:
            box[0] = function()
        except InputError as error:
            box[1] = str(error)
    if distributed.get_world_size() > 1:
        distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise InputError(box[1])
    return box[0]


def gather(value: Any) -> list[Any]:
    """`value` of every rank, on every rank, in their order."""
    found = [None] * distributed.get_world_size()
    if len(found) == 1:
        return [value]
    distributed.all_gather_object(found, value)
    return found


class StopRequest:
    """SIGTERM or Ctrl-C as a wish: the step in progress is finished and saved before the run ends.

    Used as a context in the main thread (elsewhere signals stay as they are). Another signal, some seconds after the
    first, ends the run at once with KeyboardInterrupt.
    """

    def __init__(self):
        self._since: float | None = None
        self._group = None

    def __call__(self, number: int, _) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since = now
            line = f"{signal.Signals(number).name}: finishing this step and saving; again to stop without\n"
            # Not through sys.stderr: a write that this signal has interrupted there must not be entered again.
            with contextlib.suppress(OSError):
                os.write(2, line.encode())
        elif now - self._since > SAME_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; all ranks call this after every step and get the same answer."""
        wish = self._since is not None
        if distributed.get_world_size() == 1:
            return wish
        if self._group is None:
            self._group = distributed.new_group(backend="gloo")
        wishes = torch.tensor([wish], dtype=torch.int32)
        distributed.all_reduce(wishes, op=distributed.ReduceOp.MAX, group=self._group)
        return bool(wishes.item())

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Take SIGTERM and SIGINT for the time of the context."""
        before = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, self)
        except ValueError:
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

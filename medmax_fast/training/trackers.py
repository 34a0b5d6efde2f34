"""TensorBoard and Weights & Biases beside metrics.jsonl, for those who ask for them.

Both packages are imported here only. What is logged is the record of metrics.jsonl, so a tracker that fails while
the run goes on (network, disk, its own process) loses nothing: one line says so and the run goes on without it.
A mistake that can be seen at once, such as no key for W&B, ends the command instead.

A resumed run makes the steps after its checkpoint again. TensorBoard drops the earlier ones when it reads the files.
W&B keeps those it has and ignores new values for a step that is past. WANDB_MODE=offline, WANDB_API_KEY and the
other variables of wandb work as ever; what was written offline is sent by `wandb sync`.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from medmax_fast.runtime import InputError, log, one_line

TRACKERS = ("tensorboard", "wandb")
PROJECT = "medmax_fast"
# How long the end of a run waits for W&B's uploads; what is left then stays in the folder.
FINISH_SECONDS = 120


def check_trackers(names: Sequence[str]) -> None:
    """InputError for a name that is not one of TRACKERS, or one whose package is missing."""
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"--track {name}: expected some of {','.join(TRACKERS)}")
        try:
            if name == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter  # noqa: F401
            else:
                # A plain `import wandb` would take a run folder of that name for the package.
                from wandb import errors  # noqa: F401
        except ImportError as error:
            raise InputError(f"--track {name} needs {name} ({error}): pip install 'medmax_fast[track]'") from error


def open_trackers(names: Sequence[str], folder: Path, settings: dict, run_id: str, from_step: int = 0) -> "Trackers":
    """Open the trackers named, for one process of a run; without names the result does nothing.

    folder: the run folder, which exists; TensorBoard's files go to `tensorboard/` in it, wandb's to `wandb/`.
    settings: shown beside the curves; no keys or passwords. run_id: the same for a run and its continuations, and no
    other. from_step: steps done before, 0 for a new run. InputError as by check_trackers, and where wandb is not
    logged in or refuses the run's settings.
    """
    check_trackers(names)
    trackers = Trackers()
    openers = {
        "tensorboard": lambda: _TensorBoard(folder, settings, from_step),
        "wandb": lambda: _Wandb(folder, settings, run_id),
    }
    for name in dict.fromkeys(names):
        trackers.open(name, openers[name])
    return trackers


class Trackers:
    """The open trackers of a run; each one leaves at its first failure, with one line on standard error."""

    def __init__(self):
        self._open: dict[str, Any] = {}

    def open(self, name: str, opener: Callable) -> None:
        """Add what `opener` returns."""
        self._attempt(name, lambda: self._open.update({name: opener()}))

    def log(self, step: int, record: Mapping) -> None:
        """Log the numbers of `record` at a step; None and whatever else is no number is left out.

        A mapping inside becomes `name/inner`; `step` itself is no curve. Steps must not go down.
        """
        values = {name: value for name, value in _numbers(record) if name.split("/")[-1] != "step"}
        for name, tracker in list(self._open.items()):
            self._attempt(name, partial(tracker.log, step, values))

    def close(self, status: int = 0) -> None:
        """Write what is left; a `status` other than 0 marks the run as failed in W&B."""
        for name, tracker in list(self._open.items()):
            self._attempt(name, partial(tracker.close, status))
        self._open.clear()

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except _failures(name) as error:
            log(f"--track {name}: {one_line(error)}; the run goes on without it")
            self._open.pop(name, None)


def _failures(name: str) -> tuple[type[Exception], ...]:
    """What a tracker raises when network, disk or its own process fails."""
    if name == "tensorboard":
        return (OSError,)
    from wandb.errors import Error
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    # The last two, and ConnectionError, come from wandb-core, the process that wandb talks to.
    return OSError, Error, HandleAbandonedError, MailboxClosedError


def _numbers(record: Mapping, prefix: str = "") -> Iterator[tuple[str, Real]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, Real) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


class _TensorBoard:
    def __init__(self, folder: Path, settings: dict, from_step: int):
        from torch.utils.tensorboard import SummaryWriter

        # Steps from purge_step on are dropped from earlier files. It must be given for a new run as well: TensorBoard
        # drops nothing at the first such mark that it reads.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1 if from_step else 0)
        text = json.dumps(settings, indent=2, default=str)
        self._writer.add_text("settings", "".join(f"    {line}\n" for line in text.splitlines()), from_step)
        self._writer.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        # Else a killed run would lose up to two minutes, also of the steps before its checkpoint.
        self._writer.flush()

    def close(self, status: int) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, settings: dict, run_id: str):
        import wandb
        from wandb.errors import AuthenticationError, UsageError

        # A run of the caller's own stays untouched, and nothing of the machine's source code or output is sent.
        options = {"reinit": "create_new", "console": "off", "disable_git": True, "disable_code": True}
        try:
            self._run = wandb.init(
                project=PROJECT,
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=settings,
                settings=wandb.Settings(**options, finish_timeout=FINISH_SECONDS),
            )
        except (AuthenticationError, UsageError, ValueError) as error:
            # ValueError: what pydantic makes of a WANDB_ variable.
            raise InputError(f"--track wandb: {one_line(error)}") from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, status: int) -> None:
        self._run.finish(exit_code=status)

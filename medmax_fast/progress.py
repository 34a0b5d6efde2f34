"""Progress of long commands: bars that share one display on a terminal, plain lines in a log, nothing with --quiet."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

from medmax_fast.runtime import is_quiet, log


class Progress:
    """A progress bar on a terminal, a plain line every ten seconds in a log, nothing with --quiet.

    It shows what is done, the rate, the time left and, where inputs can be rejected, how many were.
    total: None where it is not known. done: what was there before this process began, which does not count as speed.
    rejected: those among them, None where none can be. total and rejected may be set as they become known.
    """

    SECONDS = 10

    def __init__(self, label: str, total: int | None = None, done: int = 0, rejected: int | None = None):
        self.label, self.total, self.done, self.rejected = label, total, done, rejected
        self._first, self._start = done, time.monotonic()
        self._last = self._start
        self._bar = _Bar(self) if on_terminal() else None

    def update(self, done: int, note: Callable[[], str] = str) -> None:
        """Say that `done` are done by now; note() adds to a line, and is called only when one is due."""
        self.done = done
        now = time.monotonic()
        if is_quiet() or now - self._last < (0.1 if self._bar else self.SECONDS):
            return
        self._last = now
        line = ", ".join(filter(None, (self.line(), note())))
        if self._bar:
            self._bar.show(self, line)
        else:
            log(f"{self.label}: {line}")

    def line(self) -> str:
        """Such as `300/1000, 25.0/s, 28 s left, 2 rejected`."""
        rate = (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)
        # Pictures and large steps take seconds each.
        speed = f"{rate:.1f}/s" if rate >= 1 or not rate else f"{60 * rate:.3g}/min"
        parts = [f"{self.done}/{self.total}" if self.total else f"{self.done}", speed]
        if self.total and rate:
            parts.append(f"{duration(max(self.total - self.done, 0) / rate)} left")
        if self.rejected is not None:
            parts.append(f"{self.rejected} rejected")
        return ", ".join(parts)

    def close(self) -> None:
        if self._bar:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def on_terminal() -> bool:
    """Whether progress is to be drawn: standard error is a terminal that can, and --quiet was not given."""
    return not is_quiet() and sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def close_bars() -> None:
    """Clear the terminal of the bars of a command that has ended, also of those that an exception has left open."""
    if _Bar._open:
        _Bar._display.stop()


def duration(seconds: float) -> str:
    """Such as `40 s`, `12 min` or `3 h 20 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def progress(items: Iterable, label: str, total: int | None = None) -> Iterator:
    """Iterate, showing a Progress."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(label, total) as bar:
        for done, item in enumerate(items, 1):
            yield item
            bar.update(done)


def bars_on_terminals_only() -> None:
    """Switch transformers' own progress bars off where standard error is a log, and with --quiet."""
    if not on_terminal():
        from transformers.utils import logging

        logging.disable_progress_bar()


class _Bar:
    """A line of the one display that all open bars share; a bar within another comes below it."""

    _display: Any = None
    _open, _lock = 0, threading.Lock()

    def __init__(self, progress: Progress):
        from rich import progress as rich
        from rich.console import Console

        with self._lock:
            if not _Bar._open:
                texts = [rich.TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[line]")]
                # Only a terminal's lines need to keep clear of the display.
                options: dict[str, Any] = {"transient": True, "redirect_stdout": sys.stdout.isatty()}
                _Bar._display = rich.Progress(
                    texts[0], rich.BarColumn(20), texts[1], console=Console(stderr=True), **options
                )
                _Bar._display.start()
            _Bar._open += 1
            fields = {"total": progress.total, "completed": progress.done, "line": progress.line()}
            self._task = self._display.add_task(progress.label, **fields)

    def show(self, progress: Progress, line: str) -> None:
        self._display.update(self._task, total=progress.total, completed=progress.done, line=line)

    def close(self) -> None:
        with self._lock:
            self._display.remove_task(self._task)
            _Bar._open -= 1
            if not _Bar._open:
                self._display.stop()

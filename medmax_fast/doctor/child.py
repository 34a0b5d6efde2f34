"""A module that runs in a process of its own and answers with lines of JSON, whatever libraries print meanwhile."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO


class Child:
    """A context in which `python -m MODULE ARGUMENTS` runs beside this process; it ends with the context."""

    def __init__(self, module: str, arguments: Sequence[str] = (), environment: dict[str, str] | None = None):
        self._command = [sys.executable, "-P", "-m", module, *arguments]
        # As this process found the package, and nothing from the current folder.
        places = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
        path = {"PYTHONPATH": os.pathsep.join(filter(None, places))}
        self._environment = os.environ | path | (environment or {})
        # What became of a process that did not end well, and whether it was too slow; once `lines` is through.
        self.failure, self.late = "", False

    def __enter__(self) -> "Child":
        # A file, since a pipe that nobody reads meanwhile would fill up.
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": self._said, "text": True}
        # A session of its own: Ctrl-C is this process's to answer.
        self._process = subprocess.Popen(self._command, env=self._environment, start_new_session=True, **options)
        assert self._process.stdout is not None
        self._answers = self._process.stdout
        return self

    def __exit__(self, *_) -> None:
        self._kill()
        self._process.wait()
        self._answers.close()
        self._said.close()

    def lines(self, seconds: float) -> Iterator[dict]:
        """Every answer as it comes; after so many seconds the process is ended."""
        late = threading.Event()

        def end() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(max(seconds, 0), end)
        timer.start()
        try:
            for line in self._answers:
                yield json.loads(line)
            status = self._process.wait()
        finally:
            timer.cancel()
        self.late = late.is_set()
        if self.late:
            self.failure = f"not ready after {seconds:.0f} s"
        elif status:
            self._said.seek(0)
            last = " ".join(self._said.read().strip().splitlines()[-1:])
            self.failure = f"its process ended with status {status}: {last or 'without a word'}"

    def _kill(self) -> None:
        """End the process with those that it has started, such as compilers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def answers() -> TextIO:
    """In the child: where to write lines; what is printed from now on goes to standard error."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return out

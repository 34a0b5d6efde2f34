"""What a command that Ctrl-C ends needs: the command line to start it again, and an end that spares imports."""

import contextlib
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

# Until an interrupt that Python has dropped is raised again.
AGAIN_S = 0.01


def command_line(given: list[str]) -> str:
    """The command line that runs this again: that of a launcher where one has started this process, else its own."""
    given = [word for word in given if not word.startswith("--local_rank")]
    words = _launched(given)
    if not words:
        words = [sys.executable, "-m", "medmax_fast"] if Path(sys.argv[0]).name == "__main__.py" else ["medmax"]
        words += given
    # A script as it is typed: without the interpreter and, where it is the one found, without its folder.
    if len(words) > 1 and Path(words[1]).is_absolute() and Path(words[0]).name.startswith("python"):
        words = words[1:]
    if shutil.which(Path(words[0]).name) == words[0]:
        words[0] = Path(words[0]).name
    return shlex.join(words)


def _launched(given: list[str]) -> list[str]:
    """The command line of the outermost process above this one that was given the same arguments; [] if none was."""
    found, process = [], os.getppid()
    with contextlib.suppress(OSError):
        while process > 1:
            folder = Path("/proc") / str(process)
            words = os.fsdecode(folder.joinpath("cmdline").read_bytes()).split("\0")[:-1]
            if words[-len(given) :] == given:
                found = words
            # The fields after the name, which may hold anything: state, parent.
            process = int(folder.joinpath("stat").read_bytes().rpartition(b")")[2].split()[1])
    return found


def raise_again() -> None:
    """From now on a Ctrl-C that is raised in a finalizer, where Python drops exceptions, is raised again at once."""
    others = sys.unraisablehook

    def hook(dropped) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            others(dropped)
            return
        # After the finalizer. Signals, and so this, are the main thread's.
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_S)

    sys.unraisablehook = hook


@contextlib.contextmanager
def leaving_at_once(words: str) -> Iterator[None]:
    """In the context Ctrl-C ends the process, with these words, without an exception.

    Not every library survives one in its import.
    """

    def stop(*_) -> None:
        if words:
            os.write(2, f"{words}\n".encode())
        os._exit(130)

    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not default or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)

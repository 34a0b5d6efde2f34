"""What every command needs and no other package owns: errors, atomic files, output folders, devices, progress."""

import contextlib
import ctypes
import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

SETTINGS_FILE = "settings.json"
# Threads that hash files; hashing leaves the interpreter free.
_HASHERS = 8


class InputError(ValueError):
    """Bad usage or bad input: one line that names the file, row or flag, what was found and what was expected.

    The command line prints the message alone and exits with status 2.
    """


class Incomplete(Exception):
    """The command finished, but not all of it came out (exit status 3); `result` is its summary."""

    def __init__(self, result: dict, message: str):
        super().__init__(message)
        self.result = result


class TooManyRejected(Incomplete):
    """More inputs were rejected than allowed."""

    def __init__(self, result: dict, limit: int):
        super().__init__(result, f"{result['rejected']} inputs rejected, {limit} allowed")


def one_line(error: BaseException | str, most: int = 300) -> str:
    """A message on one line, cut to `most` characters; an error's type where it has none."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= most else line[:most] + "..."


def log(message: str) -> None:
    """One line on standard error."""
    print(message, file=sys.stderr, flush=True)


def print_table(rows: list[dict]) -> None:
    """Rows as aligned columns on standard output, in the order of the first row's keys."""
    names = list(rows[0])
    cells = [names] + [[table_cell(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def table_cell(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def versions() -> dict[str, str]:
    """Versions of this package and of what its results depend on, without importing any of it."""
    names = ("medmax_fast", "torch", "triton", "transformers", "tokenizers", "deepspeed", "peft", "torchao", "numpy")
    names += ("pillow", "nvidia-nvimgcodec-cu13", "pydicom")
    names += ("open_clip_torch", "httpx", "sacrebleu", "rouge_score", "torchmetrics")
    found = {"python": sys.version.split()[0]}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


# ---- files ----


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write a file or folder at; it takes the final name only on success."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Unique among the processes of all nodes that share the folder.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    remove(temporary)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        os.replace(temporary, path)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Parse a JSON file; InputError if it is missing or malformed."""
    try:
        return json.loads(require_file(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error


def require_file(path: str | Path) -> Path:
    """`path` as a Path; InputError if there is no such file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return path


def hash_file(path: str | Path, algorithm: str = "sha256") -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def hash_folder(folder: str | Path) -> str:
    """SHA-256 over the names and contents of all files below a folder that are not hidden."""
    folder = Path(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    with ThreadPoolExecutor(_HASHERS) as pool:
        digests = pool.map(lambda name: hash_file(folder / name), names)
        lines = [f"{name}\n{digest}\n" for name, digest in zip(names, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def open_output(folder: str | Path, command: str, settings: dict[str, Any]) -> Path:
    """Create or reopen a command's output folder.

    `settings` is what the output depends on. It is written to settings.json with the versions used; a folder that
    was made with other settings, or that holds something else, is refused with an InputError naming the difference.
    """
    folder = Path(folder)
    settings = json.loads(json.dumps(settings))
    path = folder / SETTINGS_FILE
    if not path.exists():
        try:
            require_new(folder)
        except InputError:
            # Unless another process of the same command has made the folder since.
            if not path.exists():
                raise
        else:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(path, {"command": command, "settings": settings, "versions": versions()})
            except OSError as error:
                raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error
            return folder
    found = read_json(path)
    before = {"command": found.get("command"), **found.get("settings", {})}
    now = {"command": command, **settings}
    # Hashes last, so that a changed flag is named before what it changes.
    for name in sorted(before.keys() | now.keys(), key=lambda name: (name.startswith("sha256_"), name)):
        if before.get(name) != now.get(name):
            raise InputError(
                f"{folder}: made with {name} = {before.get(name)!r}, now {now.get(name)!r}; "
                "choose another --output or the same settings"
            )
    return folder


def require_new(folder: str | Path) -> None:
    """InputError if `folder` is a file or holds anything (hidden leftovers of interrupted writes apart)."""
    folder = Path(folder)
    if folder.is_file():
        raise InputError(f"{folder}: a file is in the way, expected a folder to create")
    if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise InputError(f"{folder}: not empty and not made by this command; choose another --output")


def comma_list(text: str) -> list[str]:
    """The names in a comma-separated flag, without the empty ones."""
    return [name.strip() for name in text.split(",") if name.strip()]


def require_at_least(config, least: int, *names: str) -> None:
    """InputError naming the first of these fields of a config that is below `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected {least} or more")


def rejection_limit(text: str | int, inputs: int) -> int:
    """How many of `inputs` may be rejected: a count (`10`) or a share (`0.5%`); InputError for anything else."""
    text = str(text).strip()
    if text.isdecimal():
        return int(text)
    share = text.removesuffix("%").strip()
    if text.endswith("%") and re.fullmatch(r"\d+(\.\d*)?|\.\d+", share) and float(share) <= 100:
        return int(Fraction(share) / 100 * inputs)
    raise InputError(f"--max-rejected {text}: expected a count such as 10, or a share such as 0.5%")


# ---- processes and devices ----


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library has a call for that (glibc's malloc_trim).

    It keeps aligned blocks of less than 32 MiB, such as torch's, and often finds no use for one of the same size.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def rank_and_world() -> tuple[int, int]:
    """(rank, world size) as torchrun and the deepspeed launcher set them; (0, 1) for a plain process."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def leave(status: int) -> None:
    """End the process with an exit status; a rank of several skips the interpreter's own ending.

    Threads of torch's process groups now and then abort there, after all work is done.
    """
    if rank_and_world()[1] == 1 or "torch" not in sys.modules:
        sys.exit(status)
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized() and status in (0, 3):
        distributed.barrier()
        distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def pick_device(name: str):
    """`auto`, `cpu` or `cuda` as a torch.device (the local rank's GPU); InputError if there is no GPU to use."""
    import torch

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device cuda: torch sees no GPU; use --device cpu or run `medmax doctor`")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def pick_dtype(name: str, device=None):
    """`fp32`, `bf16` or `fp16` as a torch.dtype, or `auto`: bf16 on a GPU and fp32 on a CPU."""
    import torch

    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def available_bytes(device) -> int:
    """Memory of a torch.device that is free, of the host including what files in its cache take."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---- progress ----


class Progress:
    """A progress bar on a terminal, a plain line every ten seconds in a log, with the rate and the time left.

    total: None where it is not known. done: what was there before this process began, which does not count as speed.
    """

    SECONDS = 10

    def __init__(self, label: str, total: int | None = None, done: int = 0):
        self.label, self.total, self.done = label, total, done
        self._first, self._start = done, time.monotonic()
        self._last = self._start
        self._bar = _Bar(label, total, done) if sys.stderr.isatty() else None

    def update(self, done: int, note: Callable[[], str] = str) -> None:
        """Say that `done` are done by now; note() adds to a line, and is called only when one is due."""
        self.done = done
        now = time.monotonic()
        if self._bar and now - self._last >= 0.1:
            self._last = now
            self._bar.show(done, note())
        elif not self._bar and now - self._last >= self.SECONDS:
            self._last = now
            log(f"{self.label}: {self.line()}{note() and ', '}{note()}")

    def line(self) -> str:
        """Such as `300/1000, 25.0/s, 28 s left`."""
        rate = (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)
        if not self.total:
            return f"{self.done}, {rate:.1f}/s"
        left = f", {duration((self.total - self.done) / rate)} left" if rate else ""
        return f"{self.done}/{self.total}, {rate:.1f}/s{left}"

    def close(self) -> None:
        if self._bar:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def duration(seconds: float) -> str:
    """Such as `40 s`, `12 min` or `3 h 20 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def progress(items: Iterable, label: str, total: int | None = None) -> Iterator:
    """Iterate, showing a Progress."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with Progress(label, total) as bar:
        for done, item in enumerate(items, 1):
            yield item
            bar.update(done)


def bars_on_terminals_only() -> None:
    """Switch transformers' own progress bars off where standard error is a log."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


class _Bar:
    def __init__(self, label: str, total: int | None, done: int):
        from rich import progress as rich
        from rich.console import Console

        class RateColumn(rich.ProgressColumn):
            def render(self, task):
                return "" if task.speed is None else f"{task.speed:.1f}/s"

        columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(), RateColumn())
        columns += (rich.TimeRemainingColumn(), rich.TextColumn("{task.fields[note]}"))
        self._progress = rich.Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(label, total=total, completed=done, note="")
        self._progress.start()

    def show(self, done: int, note: str) -> None:
        self._progress.update(self._task, completed=done, note=note)

    def close(self) -> None:
        self._progress.stop()

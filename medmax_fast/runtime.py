"""What every command needs and no other module owns: errors, words on standard error, flags, processes, devices."""

import contextlib
import ctypes
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import TextIO

# Set by `quiet`.
_quiet = False


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


@contextlib.contextmanager
def kept(words: Callable[[], str]) -> Iterator[None]:
    """A KeyboardInterrupt in the context says what the command keeps of its work, as `words()` then puts it.

    The command line prints it. What the exception says already, from further inside, stays.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(str(stop) or words()) from None


# ---- words for whoever watches ----


def log(message: str) -> None:
    """One line on standard error: a warning or an error, also with --quiet."""
    try:
        print(message, file=sys.stderr, flush=True)
    except BrokenPipeError:
        # The work goes on when nobody reads about it any more.
        discard(sys.stderr)


def info(message: str) -> None:
    """One line on standard error about the course of things; none with --quiet."""
    if not _quiet:
        log(message)


def is_quiet() -> bool:
    """Whether --quiet was given."""
    return _quiet


@contextlib.contextmanager
def quiet(on: bool) -> Iterator[None]:
    """Whether `info` and progress are silent in the context, in all threads."""
    global _quiet
    before, _quiet = _quiet, on
    try:
        yield
    finally:
        _quiet = before


def discard(stream: TextIO) -> None:
    """Let a standard stream whose reader has gone lead nowhere, so that not even its last flush fails."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


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
    """End the process with an exit status; without the interpreter's own ending if interrupted or a rank of several.

    That one waits for threads, which may wait for a server, and threads of torch's process groups now and then abort
    in it, after all work is done.
    """
    several = rank_and_world()[1] > 1 and "torch" in sys.modules
    if not several and status != 130:
        sys.exit(status)
    if several and status in (0, 3):
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()
            distributed.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
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

        # What torch keeps of freed memory serves whoever asks next.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
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

"""The time before work begins: from a checkpoint on disk to the first id, and compiling the kernels.

    PYTHONPATH=. python -m benchmarks.bench_start [--only start,compile] [--quick] [--output FILE.json]

Everything that is timed is a process of its own.

- start: a random checkpoint of 7B is written as safetensors in transformers' layout. Then, each time after the system
  has been asked to drop the files from its page cache, the files are read in large blocks by several threads, which
  gives the rate of the disk, and `medmax generate` answers a prompt with one id, timed from the start of its process
  until the id is printed. over_disk_s is what that takes beyond reading as many bytes at the disk's rate; share is the
  disk's time over the whole. The id is held to the logits of transformers' model of the same weights, as in
  bench_generate. Kernels come from Triton's cache, where earlier stages have left them: entries_made counts those that
  were not there.
- compile: the self-tests of every kernel (`medmax doctor`) with an empty cache of Triton's and again with what that has
  left, without the start of the process. entries_made counts what Triton has added to the cache, of which a second
  process must add nothing. Without a GPU kernels are interpreted, and there is none.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.harness import Roofline, evidence
from benchmarks.sections import forget, run_sections, section_parser
from benchmarks.stages.generate_forms import Models, Stock
from benchmarks.stages.generate_sections import GAP_BOUND
from medmax_fast.doctor.cases import KERNELS
from medmax_fast.doctor.child import Child
from medmax_fast.generate.requests import Request
from medmax_fast.model.checkpoint_base import Changed
from medmax_fast.model.convert import write_checkpoint
from medmax_fast.model.init import SHAPES
from medmax_fast.model.layout import ModelShape, keys
from medmax_fast.runtime import pick_device

READ, STARTED, COLD, CACHED = "the files read alone", "ours, medmax generate", "ours, empty cache", "ours, cached"
PROMPT = "What organ is shown in this image?"
# Enough for the prompt.
CACHE_GB = 0.5
# Disks of machines with a GPU need several requests at a time.
READERS, BLOCK = 8, 1 << 24
# Seconds after which a self-test hangs.
HANGS = 240.0
SUMMARY = ("row", "p50_s", "times", "over_disk_s", "entries_made")


def start_shape(shape: ModelShape, dtype: torch.dtype) -> str:
    return f"{weights(shape):,} weights of {dtype.itemsize} bytes"


def weights(shape: ModelShape) -> int:
    return sum(torch.Size(key.size(shape)).numel() for key in keys(shape.layers))


def compile_shape() -> str:
    return f"self-tests of {len(KERNELS)} kernels"


def floors() -> list[dict]:
    """What a start must read, in the names of the evidence; for compiling there is no floor."""
    shape = SHAPES["7b"]
    moved = torch.bfloat16.itemsize * weights(shape)
    start = {"stage": "start", "shape": start_shape(shape, torch.bfloat16), "moved_bytes": moved, "flop": 0}
    return [start, {"stage": "compile", "shape": compile_shape(), "moved_bytes": 0, "flop": 0}]


def once(seconds: float) -> dict[str, float]:
    """Percentiles of what is done once."""
    return dict.fromkeys(("p20_s", "p50_s", "p80_s"), seconds)


# ---- start ----


def drop_from_cache(files: list[Path]) -> None:
    """Ask the system to forget the pages of files, which are on the disk already."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(files: list[Path]) -> float:
    """Of reading all files, READERS blocks at a time."""

    def read(path: Path, start: int) -> int:
        with open(path, "rb", buffering=0) as file:
            return len(os.pread(file.fileno(), BLOCK, start))

    blocks = [(path, start) for path in files for start in range(0, path.stat().st_size, BLOCK)]
    began = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        found = sum(pool.map(read, *zip(*blocks, strict=True)))
    seconds = time.perf_counter() - began
    assert found == sum(path.stat().st_size for path in files), found
    return seconds


def first_id(checkpoint: Path) -> tuple[float, int]:
    """(seconds from the start of `medmax generate` until its first id is printed, the id)."""
    command = [sys.executable, "-m", "medmax_fast", "generate", "--ckpt", str(checkpoint), "--prompt", PROMPT]
    command += ["--greedy", "--max-new-tokens", "1", "--cache-gb", str(CACHE_GB)]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        printed = process.stdout.read(1)
        seconds = time.perf_counter() - began
        printed += process.stdout.read()
    if process.returncode:
        raise subprocess.SubprocessError(f"medmax generate ended with status {process.returncode}")
    (found,) = json.loads(printed.splitlines()[-1])["token_ids"]
    return seconds, found


def expected_logits(models: Models) -> torch.Tensor:
    """fp32 [V] of the id after the prompt, by transformers' model of the same weights."""
    prompt = models.encoder.encode(Request("prompt", content=[{"type": "text", "text": PROMPT}]))
    return Stock(models).text_logits(prompt).cpu()


def start(size: str, device: torch.device, roofline: Roofline) -> Iterator[tuple[list[dict], list[dict]]]:
    with tempfile.TemporaryDirectory() as folder:
        models = Models(size, device, folder)
        logits = expected_logits(models)
        checkpoint = Path(folder) / "checkpoint"
        # Drawn where the model runs, and written from the CPU.
        write_checkpoint(Changed(models.checkpoint, lambda _, tensor: tensor.cpu()), checkpoint, "hf")
        shape, moved = start_shape(models.shape, models.dtype), models.dtype.itemsize * weights(models.shape)
        bound = GAP_BOUND[models.dtype]
        del models
        forget()
        files = sorted(checkpoint.glob("*.safetensors"))
        drop_from_cache(files)
        disk = sum(path.stat().st_size for path in files) / read_seconds(files)
        drop_from_cache(files)
        cache = triton_cache()
        before = entries(cache)
        seconds, found = first_id(checkpoint)
        gap = float(logits.max() - logits[found])
        assert gap <= bound, f"id {found} is {gap:.3g} below the best by transformers' logits"
        made = len(entries(cache) - before)
    read = moved / disk
    for form, taken, quality in (
        (READ, read, {}),
        (STARTED, seconds, {"ids": 1, "differing": int(found != int(logits.argmax())), "logit_gap": gap}),
    ):
        done = {"moved": moved, "beside": (READ, read), "quality": quality}
        row = evidence("start", shape, form, once(taken), replace(roofline, copy=disk), **done)
        more = {"bound": "disk", "over_disk_s": taken - read, "entries_made": made if form == STARTED else None}
        shown = {"row": form, "p50_s": taken, "gb_per_s": row["gb_per_s"], "times": row["times"]}
        yield [shown | more | quality], [row | more]


# ---- compile ----


def triton_cache() -> Path:
    return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


def entries(cache: Path) -> set[str]:
    """What Triton's cache holds, a folder for each kernel and for what launches it."""
    return {path.name for path in cache.iterdir()} if cache.is_dir() else set()


def self_tests(cache: Path) -> tuple[float, int, bool]:
    """(seconds of the self-tests of all kernels, entries that they have made, whether Triton compiled for a GPU)."""
    before, rows = entries(cache), []
    with Child("medmax_fast.doctor.selftest", environment={"TRITON_CACHE_DIR": str(cache)}) as child:
        rows += [row for row in child.lines(HANGS) if row.get("runs", "").startswith("Triton")]
    assert not child.failure, child.failure
    assert len(rows) == len(KERNELS), f"{len(rows)} of {len(KERNELS)} kernels were tested"
    red = [f"{row['test']}: {row['error'] or row['difference']}" for row in rows if not row["passed"]]
    assert not red, "; ".join(red)
    compiled = any(row["runs"] == "Triton" for row in rows)
    return sum(row["seconds"] for row in rows), len(entries(cache) - before), compiled


def compile_kernels(roofline: Roofline) -> Iterator[tuple[list[dict], list[dict]]]:
    beside = None
    with tempfile.TemporaryDirectory() as folder:
        for form in (COLD, CACHED):
            seconds, made, compiled = self_tests(Path(folder))
            assert made or form == CACHED or not compiled, "Triton has left nothing in its cache"
            beside = beside or (form, seconds)
            quality = {"tests_failed": 0}
            row = evidence("compile", compile_shape(), form, once(seconds), roofline, beside=beside, quality=quality)
            shown = {"row": form, "p50_s": seconds, "times": row["times"], "entries_made": made}
            yield [shown], [row | {"entries_made": made}]


def main() -> None:
    arguments = section_parser("start of the program", ("start", "compile")).parse_args()
    device = pick_device("auto")
    gpu = device.type == "cuda"
    size = "7b" if gpu and not arguments.quick else "tiny"
    roofline = Roofline.measure(device.type, arguments.quick)
    sections = {"start": partial(start, size, device, roofline), "compile": partial(compile_kernels, roofline)}
    device_name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    chosen = {name: sections[name] for name in arguments.only}
    sys.exit(run_sections("start", chosen, SUMMARY, arguments.output, {"size": size, "device": device_name}))


if __name__ == "__main__":
    main()

"""Fixtures shared by all tests, and what the mark `gpu` means; without a GPU Triton runs in its interpreter.

`pytest -m gpu` selects all that says something about a GPU, in two forms (pyproject.toml):
- `gpu`: needs one, and is skipped where there is none;
- `gpu(required=False)`: runs on one where there is one, else in the interpreter or on the CPU. Such a module has a
  DEVICE. Every kernel's module carries it, see test_gpu_marks.py.
A test without the mark is about the CPU: it sees no GPU, so that `--device auto` means the same everywhere.
"""

import fcntl
import gc
import json
import os
import secrets
import shutil
import sys
import types
from pathlib import Path

import pytest
from error_recorder import ErrorRecorder

ROOT = Path(__file__).resolve().parents[1]
# The benchmarks as a package, without the root on the path, where kernels/ would shadow the package of that name.
sys.modules["benchmarks"] = types.ModuleType("benchmarks")
sys.modules["benchmarks"].__path__ = [str(ROOT / "benchmarks")]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Before torch is imported: OpenMP threads of several workers on the same cores slow each other down.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# Modules that take longest. Of xdist's workers, which take whole modules (Makefile), none is left with one at the end.
SLOW = "aot bench_dry restart docs notebook packaging web_demo eval_end_to_end generate picture_decoder train progress"
SLOW_FIRST = {f"test_{name}": place for place, name in enumerate(SLOW.split())}
HAS_GPU = _has_gpu()
# Must be set before triton is first imported.
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config) -> None:
    config.pluginmanager.register(ErrorRecorder(config))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A worker that has lost its GPU ends, and xdist starts another one: all its other tests would fail too."""
    report = yield
    torch = sys.modules.get("torch")
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and torch and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return report


def pytest_collection_modifyitems(items) -> None:
    """Slow modules come first; tests that need a GPU are left out where there is none."""
    items.sort(key=lambda item: SLOW_FIRST.get(item.path.stem, len(SLOW_FIRST)))
    for item in () if HAS_GPU else items:
        # The nearest mark counts: a function's own before its module's.
        mark = item.get_closest_marker("gpu")
        if mark and mark.kwargs.get("required", True):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Hide the GPU from a test without the mark, its fixtures and the processes that it starts."""
    if not HAS_GPU or item.get_closest_marker("gpu"):
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Say with a failed comparison what repeats it."""
    try:
        return (yield)
    except AssertionError as error:
        if "fresh_seed" in item.funcargs:
            error.add_note(f"fresh_seed was {item.funcargs['fresh_seed']}: MEDMAX_SEED={item.funcargs['fresh_seed']}")
        raise


@pytest.fixture()
def fresh_seed() -> int:
    """Another number for every test and run, or the environment's MEDMAX_SEED."""
    return int(os.environ.get("MEDMAX_SEED") or secrets.randbits(31))


@pytest.fixture()
def poisoned(monkeypatch) -> list[tuple[int, ...]]:
    """What is allocated in the test without being filled holds NaN, or a number that is no id; the shapes, in order."""
    import torch

    shapes = []
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def filled(*args, allocate=allocate, **kwargs):
            made = allocate(*args, **kwargs)
            shapes.append(tuple(made.shape))
            # Small, so that one that is taken for an index reaches no memory of others.
            return made.fill_(float("nan") if made.is_floating_point() else -77 if made.dtype.is_signed else 201)

        monkeypatch.setattr(torch, name, filled)
    return shapes


@pytest.fixture()
def gigabytes(tmp_path_factory):
    """For tests that take several GB of a GPU: one at a time among xdist's workers, and all of it given back."""
    if not HAS_GPU:
        yield
        return
    import torch

    # The workers' folders have this parent in common.
    with open(tmp_path_factory.getbasetemp().parent / "gigabytes.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The reference's inputs and answers: the shared folder beside a checkout, or the copy in the tree."""
    for folder in (ROOT.parent / "shared" / "golden", ROOT / "tests" / "golden"):
        if (folder / "image_codes.json").exists():
            return folder
    pytest.fail("no golden data: expected tests/golden or ../shared/golden")


@pytest.fixture(scope="session")
def cases(golden):
    """(request, expected new ids) of every prompt of generation.json."""
    from medmax_fast.generate.requests import Request

    names = {
        "max_gen_len": "max_new_tokens",
        "max_seq_len": "max_length",
        "guidance_scale_text": "guidance_text",
        "guidance_scale_image": "guidance_image",
    }
    found = []
    for case in json.loads((golden / "generation.json").read_text()):
        options = {names.get(name, name): value for name, value in case["options"].items()}
        for i, (prompt, expected) in enumerate(zip(case["prompt_ids"], case["generated"], strict=True)):
            found.append((Request(f"{case['name']}-{i}", token_ids=prompt, **options), expected))
    assert len(found) == 9
    return found


@pytest.fixture()
def golden_checkpoint(golden, tmp_path) -> Path:
    """A writable copy of the golden checkpoint, for tests that damage it."""
    target = tmp_path / "checkpoint"
    shutil.copytree(golden / "checkpoint", target)
    for path in target.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    target.chmod(0o755)
    return target


@pytest.fixture(scope="session")
def hf(golden, tmp_path_factory) -> Path:
    """The golden checkpoint in the Hugging Face layout; not to be changed."""
    from medmax_fast.model.checkpoint import open_checkpoint
    from medmax_fast.model.convert import write_checkpoint

    folder = tmp_path_factory.mktemp("golden") / "hf"
    write_checkpoint(open_checkpoint(golden / "checkpoint"), folder, "hf")
    return folder


@pytest.fixture()
def bf16_to_nearest(monkeypatch):
    """Triton's interpreter cuts fp32 to bf16 and multiplies the bits of bf16 matrices; with this it does as a GPU."""
    from medmax_fast.kernels.launch import INTERPRETED

    if not INTERPRETED:
        return
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, mode)
        return torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = convert(handle.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def multiplied(builder, a, b, *more):
        return multiply(builder, widened(a), widened(b), *more)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiplied)

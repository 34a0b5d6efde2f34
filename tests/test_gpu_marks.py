"""What `pytest -m gpu` takes, every kernel's tests among it, with a GPU and without; and the kernels' yardstick."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import assert_as_good, assert_same

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if "@triton.jit" in path.read_text())


def run(folder, *arguments, **environment):
    """pytest's output in lines, with this project's settings and conftest.py, in another process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    done = subprocess.run(
        [*command, "--rootdir", str(folder), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)} | environment,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout.splitlines()


def without_tests(kernels, modules):
    """Kernels of which `-m gpu` selects no test of test_<kernel>.py; modules: the folder of these."""
    there = [modules / f"test_{name}.py" for name in kernels if (modules / f"test_{name}.py").exists()]
    lines = run(modules, "-m", "gpu", "--collect-only", *there) if there else []
    return [name for name in kernels if not any(f"test_{name}.py::" in line for line in lines)]


def test_every_kernel_has_tests_for_a_gpu():
    assert len(KERNELS) >= 11 and not {"launch", "blocks"} & {*KERNELS}
    assert without_tests(KERNELS, ROOT / "tests") == []


def test_a_kernel_without_marked_tests_is_named(tmp_path):
    (tmp_path / "test_marked.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): pass\n")
    (tmp_path / "test_plain.py").write_text("def test_it(): pass\n")
    assert without_tests(["marked", "plain", "absent"], tmp_path) == ["plain", "absent"]


EITHER = """
import pytest, torch

pytestmark = pytest.mark.gpu(required=False)
BOTH = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

@pytest.fixture()
def seen(): return torch.cuda.is_available()

def test_either(seen): print("saw either", seen)

@pytest.mark.gpu
def test_needed(seen): print("saw needed", seen)

@BOTH
def test_both(device, seen): print("saw", device, seen)
"""
PLAIN = """
import os, torch

def test_plain(): print("saw plain", torch.cuda.is_available(), os.environ.get("CUDA_VISIBLE_DEVICES"))

def test_failing(fresh_seed): assert fresh_seed < 0
"""


@pytest.mark.parametrize("gpu", [True, False])
def test_what_runs_with_and_without_a_gpu(tmp_path, gpu):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "pretended.py").write_text(f"import torch\ntorch.cuda.is_available = lambda: {gpu}\n")
    (tmp_path / "test_either.py").write_text(EITHER)
    (tmp_path / "test_plain.py").write_text(PLAIN)
    environment = {"CUDA_VISIBLE_DEVICES": "0", "MEDMAX_SEED": "7"}
    lines = run(tmp_path, "-p", "pretended", "-rA", tmp_path, **environment)
    said = {line.removeprefix("saw ") for line in lines if line.startswith("saw ")}
    # A test without the mark sees no GPU even where there is one.
    plain = "plain False " if gpu else "plain False 0"
    marked = {"cpu True", "cuda True", "either True", "needed True"} if gpu else {"cpu False", "either False"}
    assert said == {plain, *marked}
    assert ("SKIPPED [1]" in "".join(lines)) != gpu
    assert any("fresh_seed was 7: MEDMAX_SEED=7" in line for line in lines)
    selected = run(tmp_path, "-p", "pretended", "-m", "gpu", "--collect-only", tmp_path, **environment)
    assert sum("test_either.py::" in line for line in selected) == 4 and not any("plain" in line for line in selected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_yardstick_lets_twice_the_error_pass_and_no_more(dtype):
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(200, 300, generator=generator, dtype=torch.float64)
    # Errors of torch's own, 16 units in the last place, far above what is allowed for luck.
    error = torch.randn(200, 300, generator=generator, dtype=torch.float64) * 16 * torch.finfo(dtype).eps
    own = (exact + error).to(dtype)
    assert_as_good((exact + 1.9 * error).to(dtype), own, exact, rows=200)
    with pytest.raises(AssertionError):
        assert_as_good((exact + 2.3 * error).to(dtype), own, exact, rows=200)
    # As much on average, but one value is off; and a NaN.
    for wrong in (1000 * torch.finfo(dtype).eps, torch.nan):
        spoilt = own.clone()
        spoilt[17, 5] += wrong
        with pytest.raises(AssertionError):
            assert_as_good(spoilt, own, exact, rows=200)
    assert_same(own, own.clone())
    spoilt = own.clone()
    spoilt[0, 0] = torch.nextafter(spoilt[0, 0], torch.tensor(9.0, dtype=dtype))
    with pytest.raises(AssertionError):
        assert_same(spoilt, own)

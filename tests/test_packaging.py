"""What an installation holds: every module once, the kernels with their `__init__.py`, no compiler needed to check."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The Python part of a wheel, as setup.py would put it there."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    return folder


def test_kernels_arrive_with_their_init(built):
    sources = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert "vq.py" in sources and "__init__.py" not in sources
    installed = {path.name for path in (built / "medmax_fast" / "kernels").iterdir()}
    assert installed == sources | {"__init__.py"}


def test_every_module_arrives_and_nothing_else(built):
    expected = {path.relative_to(ROOT) for path in (ROOT / "medmax_fast").rglob("*.py")}
    expected |= {Path("medmax_fast") / path.relative_to(ROOT) for path in (ROOT / "kernels").glob("*.py")}
    assert {path.relative_to(built) for path in built.rglob("*.py")} == expected


def test_installed_kernels_do_not_reach_outside(built):
    # A folder `kernels` beside the installed package may be somebody else's.
    stranger = built / "kernels"
    stranger.mkdir()
    (stranger / "vq.py").write_text("raise RuntimeError('not ours')\n")
    code = "import medmax_fast.kernels as k; print(*k.__path__, sep='\\n')"
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(built)!r}); {code}"]
    found = subprocess.run(command, cwd=built, check=True, capture_output=True, text=True, timeout=60).stdout.split(
        "\n"
    )
    assert [line for line in found if line] == [str(built / "medmax_fast" / "kernels")]


def test_version_and_command_of_an_installation():
    import medmax_fast

    try:
        installed = metadata.distribution("medmax_fast")
    except metadata.PackageNotFoundError:
        pytest.skip("runs from a checkout that is not installed")
    assert installed.version == medmax_fast.__version__
    assert {point.name: point.value for point in installed.entry_points} == {"medmax": "medmax_fast.cli:entry"}

"""What an installation holds, from a source distribution and its wheel to a command that starts; what is said of it."""

import ast
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from scripts import load

import medmax_fast
from medmax_fast import _csrc

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIST_INFO = f"medmax_fast-{medmax_fast.__version__}.dist-info"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The Python part of a wheel, as setup.py would put it there."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    return folder


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with the source distribution and the wheel that is built from it, as `python -m build` makes them."""
    pytest.importorskip("build")
    temporary = tmp_path_factory.getbasetemp()
    # The compiler runs once for all of xdist's workers, whose folders have this parent in common.
    shared = temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary
    checkout, folder = shared / "checkout", shared / "dist"
    with open(shared / "dist.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            checkout.mkdir()
            for path in ROOT.iterdir():
                if path.is_file():
                    shutil.copy(path, checkout)
            for name in ("csrc", "kernels", "medmax_fast"):
                shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            command = [sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", str(folder), str(checkout)]
            subprocess.run(command, check=True, capture_output=True, timeout=600)
    return folder


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_source_distribution_has_what_a_build_needs(distributions):
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    needed = {path for folder in ("csrc", "kernels", "medmax_fast") for path in (ROOT / folder).rglob("*.*")}
    needed = {path for path in needed if path.is_file() and path.suffix not in (".pyc", ".so")}
    needed |= {ROOT / name for name in ("LICENSES-THIRD-PARTY.md", "CITATION.cff", "CHANGELOG.md", "constraints.txt")}
    assert {str(path.relative_to(ROOT)) for path in needed} <= names
    assert not {name for name in names if name.startswith("tests/")}


def test_wheel_of_the_source_distribution_is_that_of_the_checkout(distributions, built):
    (wheel,) = distributions.glob("*.whl")
    found = content(wheel)
    (extension,) = (name for name in found if name.endswith(".so"))
    assert extension.startswith("medmax_fast/_csrc.")
    code = {name: data for name, data in found.items() if name != extension and not name.startswith(DIST_INFO)}
    assert code == {str(p.relative_to(built)): p.read_bytes() for p in built.rglob("*.*") if p.is_file()}
    licences = (ROOT / "LICENSES-THIRD-PARTY.md").read_bytes()
    assert found[f"{DIST_INFO}/licenses/LICENSES-THIRD-PARTY.md"] == licences


def test_wheel_works_in_an_empty_environment(distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True, timeout=60)
    python = tmp_path / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True, timeout=60)

    def output(*command, **environment) -> str:
        kinds = {"capture_output": True, "text": True, "check": True, "timeout": 60}
        return subprocess.run(command, cwd=tmp_path, env=environment, **kinds).stdout

    assert output(python, "-c", "import medmax_fast; print(medmax_fast.__version__)").strip() == medmax_fast.__version__
    (packages,) = tmp_path.glob("lib/python*/site-packages")
    # numpy comes from the environment of the tests, ahead of which stands what was installed.
    found = output(sys.executable, "-P", ROOT / "tests" / "check_wheel.py", PYTHONPATH=str(packages))
    assert found.startswith(str(packages / "medmax_fast"))
    command = output(tmp_path / "bin" / "medmax", "--version", PYTHONPATH=metadata_path("numpy"))
    assert command.split() == ["medmax_fast", medmax_fast.__version__]


def metadata_path(name: str) -> str:
    """The folder that a package of the tests' environment is installed in."""
    return str(metadata.distribution(name).locate_file(""))


def test_kernels_arrive_with_their_init(built):
    sources = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert "vq.py" in sources and "__init__.py" not in sources
    installed = {path.name for path in (built / "medmax_fast" / "kernels").iterdir()}
    assert installed == sources | {"__init__.py"}


def test_every_file_arrives_and_nothing_else(built):
    """Modules, types and what the demo shows; compiled files apart."""
    expected = {path.relative_to(ROOT) for path in (ROOT / "medmax_fast").rglob("*.*") if path.is_file()}
    expected |= {Path("medmax_fast") / path.relative_to(ROOT) for path in (ROOT / "kernels").glob("*.py")}
    expected = {path for path in expected if path.suffix not in (".pyc", ".so")}
    assert {path.relative_to(built) for path in built.rglob("*.*") if path.is_file()} == expected
    assert Path("medmax_fast/py.typed") in expected


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
    try:
        installed = metadata.distribution("medmax_fast")
    except metadata.PackageNotFoundError:
        pytest.skip("runs from a checkout that is not installed")
    assert installed.version == medmax_fast.__version__
    assert {point.name: point.value for point in installed.entry_points} == {"medmax": "medmax_fast.cli:entry"}


IMPORT = """
import sys, time
# Of the processor, which other processes share.
began = time.process_time()
import medmax_fast
print(time.process_time() - began, *sorted({"torch", "numpy", "transformers"} & set(sys.modules)))
"""


def test_import_is_fast_and_loads_nothing_heavy():
    command = [sys.executable, "-c", IMPORT]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout for _ in range(3)]
    assert [run.split()[1:] for run in runs] == [[]] * 3
    assert min(float(run) for run in runs) < 0.2


def test_type_checkers_see_the_whole_api():
    tree = ast.parse((ROOT / "medmax_fast" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    found = {alias.asname: node.module for node in block.body for alias in node.names}
    assert found == medmax_fast._API


def stub_parameters() -> dict[str, list[str]]:
    """Parameters of every function and method of _csrc.pyi."""
    found = {}
    for node in ast.parse((ROOT / "medmax_fast" / "_csrc.pyi").read_text()).body:
        for function in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(function, ast.FunctionDef):
                owner = f"{node.name}." if function is not node else ""
                found[owner + function.name] = [argument.arg for argument in function.args.args]
    return found


def test_types_of_the_extension_are_those_of_its_signatures():
    """Against the signatures that pybind11 writes into docstrings, of all overloads."""
    names = [name for name in dir(_csrc) if not name.startswith("__") and name != "Prefetcher"]
    names += ["Prefetcher.__init__", *(f"Prefetcher.{name}" for name in dir(_csrc.Prefetcher) if name[0] != "_")]
    found = {}
    for name in names:
        owner, _, function = name.rpartition(".")
        text = getattr(getattr(_csrc, owner) if owner else _csrc, function).__doc__
        signatures = {
            tuple(re.findall(r"(\w+): ", signature))
            for signature in re.findall(rf"{function}\((?!\*args)(.*)\) ->", text)
        }
        (found[name],) = signatures
    assert {name: tuple(arguments) for name, arguments in stub_parameters().items()} == found


def test_licences_are_those_of_every_dependency():
    licences = load(ROOT / "tools" / "third_party_licenses.py")
    table = (ROOT / "LICENSES-THIRD-PARTY.md").read_text().partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    assert {name: purpose for name, purpose, _, _ in rows[2:]} == licences.packages()
    checked = 0
    for name, _, licence, _ in rows[2:]:
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        assert licence == licences.licence(package), name
        checked += 1
    assert checked >= len(PROJECT["dependencies"])


def pins(name: str) -> dict[str, str]:
    packaging = pytest.importorskip("packaging.utils")
    lines = [line for line in (ROOT / name).read_text().splitlines() if line[:1] != "#"]
    return {packaging.canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-cuda.txt"])
def test_constraints_lie_within_what_is_asked_for(name):
    requirements = pytest.importorskip("packaging.requirements")
    canonical = pytest.importorskip("packaging.utils").canonicalize_name
    pinned = pins(name)
    assert all(pinned.values())
    extras = PROJECT["optional-dependencies"]
    asked = [requirements.Requirement(line) for line in sum(extras.values(), PROJECT["dependencies"])]
    for requirement in asked:
        if version := pinned.get(canonical(requirement.name)):
            assert requirement.specifier.contains(version), requirement
    if name == "constraints.txt":
        installed = sum((extras[extra] for extra in ("train", "serve", "demo", "docs", "dev")), PROJECT["dependencies"])
        missing = {canonical(requirements.Requirement(line).name) for line in installed} - set(pinned)
        assert not missing


def test_citation_is_of_this_version():
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["title"] == PROJECT["name"]
    assert str(citation["version"]) == medmax_fast.__version__


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_images_start_a_command_that_there_is(name):
    from medmax_fast.cli import build_parser

    stages = (ROOT / "docker" / name).read_text().split("\nFROM ")
    last = stages[-1]
    assert ast.literal_eval(re.search(r"^ENTRYPOINT (.*)$", last, re.MULTILINE)[1]) == ["medmax"]
    arguments = ast.literal_eval(re.search(r"^CMD (.*)$", last, re.MULTILINE)[1])
    assert build_parser().parse_args(arguments).command == arguments[0]
    assert re.search(r"^USER (?!0)", last, re.MULTILINE) and "g++" not in last
    # What is copied in passes .dockerignore, whose first rule leaves everything out.
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    (constraints,) = re.findall(r"^COPY (constraints\S*)", stages[0] + stages[1], re.MULTILINE)
    assert {constraints, "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "csrc", "kernels"} <= kept
    assert all(list(ROOT.glob(pattern)) for pattern in kept)

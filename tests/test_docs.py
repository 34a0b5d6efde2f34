"""The documents: every command and Python block of README.md and docs/ runs, pictures and tables are what is generated.

How a command is found is in doc_blocks.py, how it is run in doc_commands.py, what is checked of the rest in
doc_checks.py.
"""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import doc_checks
import doc_commands
import pytest
from chat_server import serve
from doc_blocks import PAGES, ROOT, Block, blocks, inline_commands
from scripts import load

import medmax_fast
from medmax_fast.cli import build_parser

DOCS = ROOT / "docs"
# Pages that name flags of other programs.
FOREIGN = {"migrating.md", "defects.md"}
KERNELS = sorted(path for path in (ROOT / "kernels").glob("*.py") if "@triton.jit" in path.read_text())


def test_every_command_runs(tmp_path, monkeypatch, capsys):
    # One test, so that the quick start, which the others build on, runs once.
    workplace = doc_commands.Workplace(tmp_path)
    wrong = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-test")
    with closing(workplace), serve(lambda _: '{"correct": 1}') as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        for page in sorted(PAGES, key=lambda page: page.name != "quickstart.md"):
            wrong += workplace.run_page(page, blocks(page))
            if page.name == "quickstart.md":
                assert not wrong, "\n".join(wrong)
                check_quickstart(workplace.start, capsys.readouterr().out)
                doc_commands.furnish_start(workplace.start)
    assert not wrong, "\n".join(wrong)


def check_quickstart(folder: Path, printed: str) -> None:
    """What the quick start says comes out."""
    losses = [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 12 and 11 < losses[0] < 13 and losses[-1] < 0.01
    assert '"answer": "yes"' in printed and '"answer": "no"' in printed
    averages = [json.loads((folder / run / "results.json").read_text())["average"] for run in ("before", "after")]
    assert averages == [0, 1]
    assert (folder / "report" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nmap localhost", "no command that"),
        ("medmax train --data store --ckpt ckpt --output run --epoch 3", "SystemExit"),
        ("medmax inspect nowhere", "status 2"),
        ("torchrun --nproc-per-node 2 train.py", "expected -m medmax_fast"),
        ("python -m pytest tests/test_nothing.py", "no such tests"),
        ("make everything", "not in the Makefile"),
        ("pip install '.[gpus]'", "no extra gpus"),
        ("pip install requests", "unknown"),
        ("hf download mint-medmax/medmax_70b", "REPOSITORIES"),
        ("git clone https://example.org/medmax", "expected git clone"),
        (". venv/bin/activate", "AssertionError"),
        ("cat nowhere", "CalledProcessError"),
    ],
)
def test_a_wrong_line_is_noticed(tmp_path, monkeypatch, capsys, line, message):
    monkeypatch.chdir(tmp_path)
    workplace = doc_commands.Workplace(tmp_path)
    block = Block(ROOT / "README.md", 7, "sh", (line,))
    wrong = workplace.run_page(ROOT / "README.md", [block])
    assert len(wrong) == 1 and wrong[0].startswith("README.md:7: line 7:") and message in wrong[0]


def test_what_runs_elsewhere_does():
    tests = {name: (ROOT / "tests" / f"{name}.py").read_text() for name in doc_commands.PARSED.values()}
    assert all(f'"{command}"' in tests[name] for command, name in doc_commands.PARSED.items())
    for script, name in doc_commands.ELSEWHERE.items():
        what = Path(script).stem if "/" in script else script
        assert what in (ROOT / "tests" / f"{name}.py").read_text(), (script, name)


def test_an_unknown_language_is_noticed():
    with pytest.raises(AssertionError, match="not known"):
        doc_commands.kind_of(Block(ROOT / "README.md", 7, "ruby", ("puts 1",)))


def test_blocks_that_do_not_run_are_few():
    left_out = [block.place for page in PAGES for block in blocks(page) if block.not_run]
    assert len(left_out) <= 2, left_out


# What the page of errors shows in a line are messages, which begin as the commands do.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "errors.md"], ids=lambda page: page.name)
def test_commands_in_a_line_exist(page):
    options = flags_of_commands()
    targets = (ROOT / "Makefile").read_text()
    for span in inline_commands(page):
        words = shlex.split(span)
        if words[0] == "medmax" and words[1] in options:
            flags = {word.split("=")[0] for word in words if word.startswith("--")}
            assert flags <= options[words[1]], f"{span}: {flags - options[words[1]]}"
        elif words[0] == "medmax":
            assert words[1].isupper() or words[1].startswith(("-", "$")), f"{span}: no such command"
        elif words[0] == "make":
            for word in words[1:]:
                assert re.search(rf"^{word}:|^{word.split('=')[0]} *[?:]?=", targets, re.M), f"{span}: not in Makefile"
        elif words[0] == "pip":
            doc_checks.check_pip(words[1:])
        else:
            module = words[2].split(".")
            assert module[0] != "benchmarks" or (ROOT / "/".join(module)).with_suffix(".py").is_file(), span


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in FOREIGN], ids=lambda page: page.name)
def test_flags_in_a_line_exist(page):
    known = set.union(*flags_of_commands().values())
    text = page.read_text(encoding="utf-8")
    spans = re.findall(r"`(--[a-z][a-z0-9-]*)[^`]*`", text)
    wrong = {*spans} - known - OTHERS.get(page.name, set())
    assert not wrong, wrong


# Flags of other programs, by page.
OTHERS = {
    "training.md": {"--shutdown-timeout"},
    "checkpoints.md": {"--safe_serialization"},
    "generation.md": {"--only"},
}


def flags_of_commands() -> dict[str, set[str]]:
    """command -> its flags."""
    parser = build_parser()
    action = next(action for action in parser._actions if action.dest == "command")
    return {name: {*sub._option_string_actions} for name, sub in action.choices.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_ascii_and_their_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert text.isascii()
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_picture_is_what_is_drawn():
    drawing = load(DOCS / "data_flow.py")
    assert drawing.PICTURE.read_text() == drawing.draw(), "python docs/data_flow.py draws it again"
    missing = {"score": drawing.FLOW["score"]}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(drawing, "FLOW", {name: flow for name, flow in drawing.FLOW.items() if name not in missing})
        drawing.draw()


def test_the_layers_are_those_of_the_architecture():
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text())
    allowed = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "ALLOWED")
    layers = {key.value for key in allowed.keys}
    text = (DOCS / "architecture.md").read_text()
    assert layers <= {*re.findall(r"`(\w+)`", text)}


def test_the_defects_name_tests_that_exist():
    named = re.findall(r"`tests/(test_\w+\.py)::(test_\w+)`", (DOCS / "defects.md").read_text())
    assert len(named) > 25
    for module, test in named:
        assert f"def {test}(" in (ROOT / "tests" / module).read_text(), (module, test)


def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path):
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("INFO")]
    assert done.returncode == 0 and not said, "\n".join(said)
    pages = [*tmp_path.glob("*.html")]
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"([^\"]+)\"|<link[^>]*\bhref=\"([^\"]+)\"", text)
        assert not [url for pair in loaded for url in pair if "//" in url], page.name
    assert "Engine" in (tmp_path / "api.html").read_text()
    # The table of the README has taken the place that is kept for it.
    assert "times as fast" in (tmp_path / "performance.html").read_text()
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(url\(|@import)[\s'\"]*(https?:)?//", style.read_text()), style.name


def public(cls) -> list:
    """The functions and properties of a class that have no underscore, and its constructor."""
    found = [cls] if "__init__" in vars(cls) else []
    for name, value in vars(cls).items():
        if not name.startswith("_"):
            value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            found += [value.fget if isinstance(value, property) else value] if _has_doc(value) else []
    return found


def _has_doc(value) -> bool:
    return inspect.isfunction(value) or isinstance(value, property)


API = [getattr(medmax_fast, name) for name in medmax_fast._API]
MEMBERS = [member for entry in API for member in ((*public(entry), entry) if inspect.isclass(entry) else (entry,))]


@pytest.mark.parametrize("member", dict.fromkeys(MEMBERS), ids=lambda member: member.__qualname__)
def test_the_api_says_what_its_parameters_are(member):
    text = inspect.getdoc(member) or ""
    assert text, "no docstring"
    if inspect.isclass(member):
        text += inspect.getdoc(member.__init__) or ""
    for name in inspect.signature(member).parameters:
        assert name in ("self", "cls") or re.search(rf"\b{name}\b", text), f"{name}: not explained"


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_say_shapes_dtypes_and_errors(path):
    module = importlib.import_module(f"medmax_fast.kernels.{path.stem}")
    functions = [
        value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_" and "_ref" not in name
    ]
    assert functions
    for function in functions:
        text = inspect.getdoc(function) or ""
        for name in inspect.signature(function).parameters:
            assert re.search(rf"\b{name}\b", text), f"{function.__name__}: {name} not explained"
        if function.__name__.startswith("plan_"):
            continue
        # "as in `name`" refers to a function that says it.
        assert re.search(r"\[[^\]]*\w[^\]]*\]|any shape|as `\w+`", text), f"{function.__name__}: no shape"
        assert re.search(r"float32|int64|uint8|integer|dtype", text), f"{function.__name__}: no dtype"
        assert re.search(r"Error|what is raised", text), f"{function.__name__}: no errors"

"""Commands of the documents that are not run, because they fetch or build: what is checked of each instead."""

import re
import tomllib

from doc_blocks import ROOT

# Repositories of the Hub that the documents may name.
REPOSITORIES = {
    "GAIR/Anole-7b-v0.1",
    "mint-medmax/anole_7b_hf",
    "mint-medmax/medmax_7b",
    "mint-medmax/medmax_7b_hf",
    "mint-medmax/medmax_data",
    "mint-medmax/medmax_eval_data",
}
HUB_FLAGS = {"--repo-type", "--local-dir", "--include", "--revision"}
# What pip may be told beside names and extras.
PIP_FLAGS = {"--no-build-isolation", "--no-deps", "-e", "-c", "constraints.txt"}
# Packages of others that a reader may need.
PIP_PACKAGES = {"openai"}


def check_make(arguments: list[str], *_) -> None:
    """Targets and variables must be those of the Makefile."""
    text = (ROOT / "Makefile").read_text()
    for word in arguments:
        name = word.split("=")[0]
        pattern = rf"^{name} *[:?]?=|\$\({name}\)" if "=" in word else rf"^{name}:"
        assert re.search(pattern, text, re.M), f"{name}: not in the Makefile"


def check_pip(arguments: list[str], *_) -> None:
    """What is installed is this package, with extras that it has, or one that is known."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[0] == "install", "expected pip install"
    for word in arguments[1:]:
        match = re.fullmatch(r"(?:\.|medmax_fast)(?:\[([\w,]+)\])?|\S+\.whl", word)
        assert match or word in PIP_FLAGS | PIP_PACKAGES, f"{word}: unknown to tests/doc_checks.py"
        for extra in (match[1] or "").split(",") if match and match[1] else ():
            assert extra in extras, f"no extra {extra}"


def check_hub(arguments: list[str], *_) -> None:
    """The repository must be one that is known to exist."""
    assert arguments[0] == "download" and arguments[1] in REPOSITORIES, "expected a download of REPOSITORIES"
    assert {word for word in arguments if word.startswith("-")} <= HUB_FLAGS, "a flag that is not known"


def check_activate(arguments: list[str], *_) -> None:
    """`. .venv/bin/activate`, of the folder that `make setup` makes."""
    assert arguments == [".venv/bin/activate"] and "VENV := .venv" in (ROOT / "Makefile").read_text()


def check_clone(arguments: list[str], *_) -> None:
    """The name in place of an address, for nobody knows where this repository lies, and then into the folder."""
    usual = "clone <this repository> medmax_fast && cd medmax_fast"
    assert " ".join(arguments) == usual, f"expected git {usual}"


def check_tunnel(arguments: list[str], *_) -> None:
    """A port of this machine that leads to one of another."""
    assert re.fullmatch(r"-L \d+:127\.0\.0\.1:\d+ machine", " ".join(arguments)), "expected ssh -L of one port"

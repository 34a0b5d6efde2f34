"""Runs the commands of the documents: `medmax` in this process on the tiny checkpoint, others as the tables below say.

A page's commands run one after the other in a folder of its own, which begins with what quickstart.md has made. SMALLER
and the names in `Workplace.furnish` are all that differs from what a reader would type; PARSED, ELSEWHERE and
doc_checks.py say what is not run here, and what is checked instead. A line that begins otherwise is an error.
"""

import importlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from doc_blocks import ROOT, SHELL, SHOWN, Block, commands, words
from doc_checks import check_activate, check_clone, check_hub, check_make, check_pip, check_tunnel

from medmax_fast.cli import build_parser, main

# Flags put behind a command, so that it takes seconds. The full size of quickstart.md is that of its own commands.
SMALLER = {
    "init": ["--size", "tiny"],
    "train": ["--max-steps", "1", "--precision", "fp32"],
    "generate": ["--max-new-tokens", "4"],
    "eval": ["--limit", "1", "--max-new-tokens", "4"],
}
# Commands that measure for minutes: their flags are parsed here, and they run in this test module.
PARSED = {"bench": "test_bench"}
# Commands that end by a signal, with the address that the documents show. The first of each kind is started, on a free
# port that then stands for that address; of later ones, which may listen to the network, the flags are parsed.
SERVERS = {"serve": "127.0.0.1:8000", "demo": "127.0.0.1:7860"}
# Where `make setup` puts programs, before it is activated.
HERE = ".venv/bin/"
# Scripts and modules that take minutes or write into the repository, and the test module that runs them.
ELSEWHERE = {
    "examples/evaluation/run.py": "test_eval_end_to_end",
    "docs/data_flow.py": "test_docs",
    "benchmarks.render": "test_render",
    "benchmarks.count": "test_count",
}


class Workplace:
    """Folders in which the pages' commands run; what a command has made is kept for when it is met again."""

    def __init__(self, root: Path):
        self.root = root
        # (arguments, as run) -> the output folder or file, None where it has none.
        self.made: dict[tuple[str, ...], Path | None] = {}
        self.servers: dict[str, Server] = {}
        # What the Python blocks of a page have defined so far.
        self.names: dict = {}
        self.start = self.folder("quickstart")

    def folder(self, name: str) -> Path:
        """A page's folder; the repository's own files that commands name are there."""
        folder = self.root / name
        folder.mkdir()
        for part in ("examples", "benchmarks", "tests", "docs"):
            (folder / part).symlink_to(ROOT / part)
        return folder

    def furnish(self, name: str) -> Path:
        """A folder with what the quick start has made, under the names that other pages use."""
        folder = self.folder(name)
        for path in self.start.iterdir():
            if not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
        for alias in ("base", "Anole-7b-v0.1", "medmax_7b", "chameleon-30b"):
            (folder / alias).symlink_to(self.start / "ckpt")
        (folder / "demo-output").mkdir()
        (folder / "demo-output" / "tuned").symlink_to(self.start / "tuned")
        for alias, target in {"scores": "after", "validation_store": "store"}.items():
            (folder / alias).symlink_to(self.start / target)
        return folder

    def run_page(self, page: Path, page_blocks: list[Block]) -> list[str]:
        """Run all blocks of a page; returns what went wrong, a line each, with its place."""
        folder = self.start if page.name == "quickstart.md" else self.furnish(page.stem)
        os.chdir(folder)
        self.names = {}
        wrong = []
        for block in page_blocks:
            try:
                run_block(block, folder, self)
            except AssertionError as error:
                wrong.append(f"{block.place}: {error}")
        return wrong

    def put_aside(self, path: Path) -> None:
        """Make room for an output; what another command has made keeps its place in `made`."""
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            aside = self.root / f"aside_{len(list(self.root.iterdir()))}"
            keys = [key for key, made in self.made.items() if made == path.absolute()]
            path.rename(aside)
            self.made |= dict.fromkeys(keys, aside)

    def at_home(self, text: str) -> str:
        """A text with the addresses of the servers that run in place of those that the documents show."""
        for name, server in self.servers.items():
            text = text.replace(SERVERS[name], server.address)
        return text

    def close(self) -> None:
        """End the servers; AssertionError if one does not end as it should."""
        for server in self.servers.values():
            server.close()


class Server:
    """`medmax serve` or `medmax demo` in a process of its own, ready to be asked."""

    def __init__(self, arguments: list[str]):
        command = [sys.executable, "-m", "medmax_fast", *arguments, "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        match = re.search(r"http://(127\.0\.0\.1:\d+)", line)
        if not match:
            self.process.kill()
            raise AssertionError(f"{line!r}: expected the address")
        self.address = match[1]

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        said, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0 and said.rstrip().endswith("}"), said


def kind_of(block: Block) -> str:
    """`shell`, `python` or `shown`; AssertionError for a language that nothing is known of."""
    if block.not_run:
        return "shown"
    if block.language in SHELL:
        return "shell"
    if block.language == "python":
        return "python"
    if block.language:
        assert block.language in SHOWN, f"{block.place}: a block of {block.language!r}, which is not known"
        return "shown"
    first = block.lines[0].split()[0]
    if first in ("from", "import"):
        return "python"
    starts = {first_word(line.removeprefix("$ ")) for line in block.lines}
    return "shell" if starts & {*TREATED} else "shown"


def first_word(line: str) -> str:
    """The first word of a line that sets no variable of the environment; "" where there is none."""
    line = re.sub(r"^([A-Z_]+=('[^']*'|\S*) +)*", "", line)
    return (line.split() or [""])[0].removeprefix(HERE)


def run_block(block: Block, folder: Path, workplace: Workplace) -> None:
    """Run what a block holds, in `folder`."""
    kind = kind_of(block)
    if kind == "python":
        script = folder / f"block_{block.number}.py"
        script.write_text(workplace.at_home(block.text))
        try:
            workplace.names = runpy.run_path(str(script), init_globals=workplace.names)
        except (AssertionError, SystemExit, OSError, ValueError, TypeError, AttributeError, ImportError) as error:
            raise AssertionError(repr(error)) from error
    for number, command in commands(block) if kind == "shell" else ():
        try:
            run(command, workplace)
        except (AssertionError, SystemExit, OSError, subprocess.SubprocessError) as error:
            raise AssertionError(f"line {number}: {command}: {error!r}") from error


def run(command: str, workplace: Workplace) -> None:
    """Run one command in the current folder; AssertionError if it fails or is not known."""
    command = workplace.at_home(command)
    arguments, settings = words(command), {}
    while arguments and re.fullmatch(r"[A-Z_]+=.*", arguments[0]):
        name, settings[name] = arguments[0].split("=", 1)[0], arguments[0].split("=", 1)[1]
        arguments = arguments[1:]
    arguments[:1] = [word.removeprefix(HERE) for word in arguments[:1]]
    assert arguments and arguments[0] in TREATED, "begins with no command that tests/doc_commands.py knows"
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        if arguments[0] in PLAIN:
            assert arguments[0] != "curl" or "http://127.0.0.1:" in command, "an address of another machine"
            subprocess.run(["bash", "-ec", command], check=True, capture_output=True, timeout=60)
        else:
            TREATED[arguments[0]](arguments[1:], workplace)
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_medmax(arguments: list[str], workplace: Workplace) -> None:
    """In this process, made small; once for the same arguments, whose output is then put into the current folder."""
    name = arguments[0]
    parsed = build_parser().parse_args(arguments)
    if name in PARSED or name in workplace.servers:
        return
    if name in SERVERS:
        workplace.servers[name] = Server(arguments)
        return
    # The quick start promises what comes out, so there training is not cut short.
    if not (name == "train" and Path.cwd() == workplace.start):
        arguments = [*arguments, *SMALLER.get(name, [])]
    output = Path(parsed.dir if name == "init" else getattr(parsed, "output", "") or "")
    key = tuple(arguments)
    if output.name and (key not in workplace.made or output.resolve() != workplace.made[key].resolve()):
        workplace.put_aside(output)
    if key not in workplace.made:
        status = main(arguments)
        assert status == 0, f"ended with status {status}"
        workplace.made[key] = output.absolute() if output.name else None
        if name == "train":
            name_checkpoint(output)
    elif output.name and not output.exists():
        output.symlink_to(workplace.made[key])


def name_checkpoint(run_folder: Path) -> None:
    """Give the last checkpoint of a run of few steps the name that training.md uses."""
    checkpoints = run_folder / "checkpoints"
    (checkpoints / "step-000500").symlink_to(max(checkpoints.iterdir()).name)


def run_torchrun(arguments: list[str], workplace: Workplace) -> None:
    """The launcher's flags by its own parser; the command in one process."""
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(arguments)
    assert parsed.module and parsed.training_script == "medmax_fast", "expected -m medmax_fast"
    run_medmax(parsed.training_script_args, workplace)


def run_deepspeed(arguments: list[str], workplace: Workplace) -> None:
    """As run_torchrun."""
    parsed = importlib.import_module("deepspeed.launcher.runner").parse_args(arguments)
    assert parsed.module and parsed.user_script == "medmax_fast", "expected --module medmax_fast"
    run_medmax(parsed.user_args, workplace)


def run_python(arguments: list[str], workplace: Workplace | None = None) -> None:
    """A script, a module or a line, in this process."""
    first, *rest = arguments
    if first == "-m" and rest[0] == "medmax_fast":
        run_medmax(rest[1:], workplace)
        return
    if first == "-m" and rest[0] == "pytest":
        for word in rest[1:]:
            assert word.startswith("-") or Path(word).is_file(), f"no such tests: {word}"
        return
    if guard := ELSEWHERE.get(rest[0] if first == "-m" else first):
        assert (ROOT / "tests" / f"{guard}.py").is_file(), f"{guard}.py, which should run it, does not exist"
        return
    before = sys.argv, list(sys.path), Path.cwd()
    try:
        if first == "-m":
            sys.argv = rest
            with_exit(runpy.run_module, rest[0])
        elif first == "-c":
            script = Path("line.py")
            script.write_text(rest[0])
            with_exit(runpy.run_path, str(script))
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(first).resolve().parent))
            with_exit(runpy.run_path, first)
    finally:
        sys.argv, sys.path[:] = before[:2]
        os.chdir(before[2])


def with_exit(start, what: str) -> None:
    """Run as a program, for which leaving with status 0 is no failure."""
    try:
        start(what, run_name="__main__")
    except SystemExit as left:
        assert not left.code, f"ended with status {left.code}"


# Programs of every machine, run as they stand.
PLAIN = ("printf", "mkdir", "tar", "cat", "ls", "curl")
TREATED = {
    "medmax": run_medmax,
    "torchrun": run_torchrun,
    "deepspeed": run_deepspeed,
    "python": run_python,
    "make": check_make,
    "pip": check_pip,
    "hf": check_hub,
    "git": check_clone,
    "ssh": check_tunnel,
    ".": check_activate,
    **dict.fromkeys(PLAIN),
}


def furnish_start(folder: Path) -> None:
    """What other pages need beside the outputs of the quick start."""
    images = folder / "evaluation" / "images"
    shutil.copy(images / "ihc_glands.png", folder / "slide.png")
    (folder / "images").mkdir()
    shutil.copy(images / "cell.png", folder / "images" / "cell.png")
    (folder / "prompts.jsonl").write_text('{"id": "a", "content": [{"type": "text", "text": "Hello."}]}\n')
    torch.save({"weight": torch.zeros(2)}, folder / "old.pth")
    (folder / "medmax_data").mkdir()
    for name in ("train.jsonl", "validation.jsonl"):
        rows = (folder / "train.jsonl").read_text().replace("evaluation/", "../evaluation/")
        (folder / "medmax_data" / name).write_text(rows)
    with tarfile.open(folder / "evaluation" / "images.tar.gz", "w:gz") as archive:
        archive.add(images / "cell.png", "cell.png")
    status = main(["convert", "--input", str(folder / "ckpt"), "--output", str(folder / "medmax_7b_hf"), "--to", "hf"])
    assert status == 0
    # As published, without the picture decoder.
    (folder / "medmax_7b_hf" / "vqgan_decoder.safetensors").unlink()

"""What commands say while they run, and how they end when they are interrupted.

Interrupted are real processes by real signals at random moments: forks of this file run as a script, which has imported
everything once (MEDMAX_SEED repeats the moments).
"""

import contextlib
import itertools
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from medmax_fast import files
from medmax_fast.cli import COMMANDS, main
from medmax_fast.files import hash_file
from medmax_fast.interruption import raise_again
from medmax_fast.progress import Progress, progress
from medmax_fast.runtime import info, kept, log, quiet

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"}
# Interruptions of each command, every other one twice; then it is left to end.
INTERRUPTIONS = 3
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


# ---- the script: a server of forks that run the command line ----


def serve() -> None:
    """Answer requests, one a line: start a command, or wait for one."""
    import medmax_fast.data.build
    import medmax_fast.generate.command
    import medmax_fast.inspection
    import medmax_fast.tokenization  # noqa: F401

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])), flush=True)
        else:
            print(json.dumps(fork(request)), flush=True)


def fork(request: dict) -> int:
    """Run the command line in a fork; its process id, once it has been called."""
    called, calling = os.pipe()
    child = os.fork()
    if child:
        os.close(calling)
        os.read(called, 1)
        os.close(called)
        return child
    for descriptor in (1, 2):
        handle = os.open(request["terminal"] or f"{request['output']}.{descriptor}", os.O_RDWR | os.O_CREAT, 0o644)
        os.dup2(handle, descriptor)
    if request["unread"]:
        reading, writing = os.pipe()
        os.dup2(writing, 1)
        os.close(reading)
        os.close(writing)
    from medmax_fast.cli import entry

    sys.argv = ["medmax", *request["arguments"]]
    status = 0
    try:
        os.close(calling)
        entry()
    except SystemExit as stop:
        status = stop.code
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
    finally:
        os._exit(status)


class Forks:
    """The server of this file; what its processes write goes to numbered files in `folder`."""

    def __init__(self, folder):
        self._folder, self._numbers = folder, itertools.count()
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | ENVIRONMENT,
            text=True,
        )
        assert self._server.stdout.readline() == '"ready"\n'

    def _ask(self, request):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def run(self, arguments, signals=(), terminal="", unread=False):
        """(exit status, standard output, standard error), with SIGINT after each of the seconds in `signals`."""
        output = str(self._folder / str(next(self._numbers)))
        request = {"arguments": arguments, "output": output, "terminal": terminal, "unread": unread}
        process = self._ask(request)
        for seconds in signals:
            time.sleep(seconds)
            # It is not waited for yet, so its number is still its own.
            os.kill(process, signal.SIGINT)
        status = self._ask({"wait": process})
        said = [Path(f"{output}.{i}") for i in (1, 2)]
        return status, *(path.read_text() if path.exists() else "" for path in said)

    def close(self):
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def inputs(golden, tmp_path_factory):
    """Two small images and a broken one, prompts, rows."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("inputs")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / "images" / f"{i}.png")
    (folder / "images" / "00.png").write_text("no image")
    prompts = [{"id": f"q{i}", "content": [{"type": "text", "text": f"Is it {i}?"}]} for i in range(6)]
    rows = [{"tokens": rng.integers(8712, 9000, 300).tolist()} for _ in range(9000)]
    rows[5] = {"tokens": []}
    for name, lines in (("prompts", prompts), ("rows", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def commands(golden, inputs):
    """Name -> arguments without --output."""
    ckpt = str(golden / "checkpoint")
    options = ["--greedy", "--max-new-tokens", "40", "--batch-size", "2"]
    shards = ["--rows-per-shard", "1", "--workers", "1", "--max-rejected", "1"]
    return {
        "tokenize": ["tokenize", "--input", str(inputs / "images"), "--ckpt", ckpt, *shards],
        "build": ["build", "--input", str(inputs / "rows.jsonl"), "--ckpt", ckpt, "--max-rejected", "1"],
        "generate": ["generate", "--prompts", str(inputs / "prompts.jsonl"), "--ckpt", ckpt, *options],
    }


def result_files(folder):
    """What must be the same however a run went; times are not."""
    names = [p for p in Path(folder).iterdir() if p.suffix in (".parquet", ".bin", ".jsonl")]
    return {path.name: path.read_bytes() for path in names}


# ---- Ctrl-C ----


@pytest.mark.parametrize("name", ["tokenize", "build", "generate"])
def test_an_interrupted_command_says_how_to_go_on_and_that_leads_to_the_same_result(
    forks, commands, tmp_path, name, fresh_seed
):
    draw = random.Random(fresh_seed)
    began = time.monotonic()
    status, _, said = forks.run([*commands[name], "--output", str(tmp_path / "whole")])
    seconds = time.monotonic() - began
    assert status == 0, said
    words, story = [*commands[name], "--output", str(tmp_path / "stopped")], []
    place = {"build": tmp_path / ".stopped.partial"}.get(name, tmp_path / "stopped")
    for attempt in range(INTERRUPTIONS):
        delay = draw.uniform(0, seconds)
        status, out, said = forks.run(words, [delay, 0.002] if attempt % 2 else [delay])
        story.append((round(delay, 3), status, said))
        assert status in (0, 130) and "Traceback" not in said, story
        if status == 0:
            break
        assert out == ""
        line = said.splitlines()[-1] if said else ""
        form = rf"medmax {name}: interrupted; (what was finished is kept|\d+ .*are kept in (.+)); to continue: (.+)"
        found = re.fullmatch(form, line)
        # The second signal may come before the first is answered.
        assert found or attempt % 2, story
        if found:
            assert found[2] in (None, str(place)), story
            assert shlex.split(found[3]) == ["medmax", *words], story
            words = shlex.split(found[3])[1:]
    status, _, said = forks.run(words)
    assert status == 0, (story, said)
    assert result_files(tmp_path / "stopped") == result_files(tmp_path / "whole"), story


def test_an_interrupt_in_a_finalizer_is_not_lost(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = signal.getsignal(signal.SIGALRM)
    raise_again()

    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    Finalized()
    with pytest.raises(KeyboardInterrupt):
        time.sleep(60)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("words", [["inspect"], ["score", "--input"]])
def test_a_command_that_does_not_go_on_says_so(forks, commands, golden, tmp_path, words):
    store = str(tmp_path / "store")
    assert main([*commands["build"], "--output", store, "--quiet"]) == 0
    words = [*words, store]
    if words[0] == "score":
        words += ["--ckpt", str(golden / "checkpoint"), "--output", str(tmp_path / "scores.jsonl")]
        status, _, said = forks.run(words, [0.3])
        assert status == 130 and not (tmp_path / "scores.jsonl").exists()
        line = f"medmax score: interrupted; no result is kept; to run it again: {shlex.join(['medmax', *words])}"
        # Before it was called there is less to say.
        assert said.splitlines()[-1] in (line, "medmax score: interrupted; nothing was begun")
    else:
        status, _, said = forks.run(words, unread=True)
        assert (status, said) == (141, "")


def test_an_import_may_be_interrupted(golden, tmp_path):
    command = [sys.executable, "-m", "medmax_fast", "decode", "--input", "x", "--ckpt", "y", "--output", "z"]
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        # torch is being loaded.
        while "libtorch_cpu" not in maps.read_text():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.decode() == "medmax decode: interrupted; nothing was begun\n"


def test_the_command_line_is_that_of_the_launcher(tmp_path):
    code = "import sys; from medmax_fast.interruption import command_line; print(command_line(sys.argv[1:]))"
    launcher = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], '--local_rank=0', *sys.argv[2:]])"
    )
    given = ["train", "--data", "a b"]
    command = [sys.executable, "-c", launcher, code, *given]
    printed = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    assert shlex.split(printed)[-4:] == [code, *given] and shlex.split(printed)[1:3] == ["-c", launcher]
    alone = [sys.executable, "-c", code, *given]
    printed = subprocess.run(alone, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    assert printed == "medmax train --data 'a b'\n"
    # Above it a process whose command line is no UTF-8.
    strange = ["sh", "-c", b'"$1" -c "$2" train --data "a b"; : caf\xe9', "sh", sys.executable, code]
    printed = subprocess.run(strange, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    assert printed == "medmax train --data 'a b'\n"


def test_what_is_kept_is_said_by_the_innermost():
    with pytest.raises(KeyboardInterrupt, match="^two$"), kept(lambda: "one"), kept(lambda: "two"):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt, match="^three$"), kept(lambda: "one"):
        raise KeyboardInterrupt("three")


# ---- progress ----


@pytest.fixture()
def at_once(monkeypatch):
    monkeypatch.setattr(Progress, "SECONDS", 0)


def test_a_log_gets_lines_with_rate_time_left_and_rejected_count(at_once, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("medmax_fast.progress.time.monotonic", lambda: now[0])
    with Progress("tokenize (images)", 1000, 100, 2) as bar:
        now[0] += 8
        bar.rejected += 1
        bar.update(300, lambda: "decode 40%")
    with Progress("generate (prompts)", 10) as bar:
        now[0] += 60
        bar.update(3)
    with Progress("reading rows") as bar:
        now[0] += 4
        bar.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "tokenize (images): 300/1000, 25.0/s, 28 s left, 3 rejected, decode 40%",
        "generate (prompts): 3/10, 3/min, 2 min left",
        "reading rows: 10, 2.5/s",
    ]


def test_quiet_leaves_warnings_and_errors(at_once, capsys):
    with quiet(True):
        info("course")
        log("warning")
        assert list(progress(range(3), "items")) == [0, 1, 2]
        with quiet(False):
            info("inner")
    info("after")
    assert capsys.readouterr().err.splitlines() == ["warning", "inner", "after"]


def test_commands_are_quiet_when_asked(at_once, golden, commands, tmp_path, capsys):
    assert main([*commands["build"], "--output", str(tmp_path / "a")]) == 0
    loud = capsys.readouterr()
    # Of JSONL the number of rows is an estimate until the end.
    lines = [line for line in loud.err.splitlines() if line.startswith("build (rows): ")]
    assert re.fullmatch(r"build \(rows\): 9000/9000, \S+, 0 s left, 1 rejected", lines[-1]), lines
    assert main([*commands["build"], "--output", str(tmp_path / "b"), "--quiet"]) == 0
    silent = capsys.readouterr()
    assert silent.err == "" and len(silent.out.splitlines()) == len(loud.out.splitlines())
    words = ["--ckpt", str(golden / "checkpoint"), "--max-length", "20", "--quiet"]
    (tmp_path / "one.jsonl").write_text(json.dumps({"tokens": list(range(8712, 8752))}))
    assert main(["score", "--input", str(tmp_path / "one.jsonl"), "--output", str(tmp_path / "s"), *words]) == 0
    assert capsys.readouterr().err == "1 rows cut to --max-length 20\n"
    assert main(["score", "--input", str(tmp_path / "none"), "--output", str(tmp_path / "t"), *words]) == 2
    assert "none: no such file" in capsys.readouterr().err


def test_work_goes_on_when_nobody_reads_its_log():
    code = """
import os
reading, writing = os.pipe()
os.dup2(writing, 2)
os.close(reading)
os.close(writing)
from medmax_fast.runtime import log
log("first")
log("second")
print("done")
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stdout) == (0, "done\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_quiet(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert "--quiet" in capsys.readouterr().out


def test_large_files_are_hashed_with_progress(at_once, monkeypatch, tmp_path, capsys):
    (tmp_path / "large").write_bytes(bytes(range(256)) * 3 * 4096)
    expected = hash_file(tmp_path / "large", "md5")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(files, "_LONG_FILE", 1 << 20)
    assert hash_file(tmp_path / "large", "md5") == expected
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and re.match(r"md5 of large \(MiB\): 3/3, \S+, 0 s left", lines[-1]), lines


class Terminal:
    """A pseudo-terminal whose output is collected."""

    def __enter__(self):
        self._ours, self._theirs = os.openpty()
        self.name, self._read = os.ttyname(self._theirs), []
        self._thread = threading.Thread(target=self._collect)
        self._thread.start()
        return self

    def _collect(self):
        # Ends with an error once nobody has the other side open.
        with contextlib.suppress(OSError):
            while text := os.read(self._ours, 2**16):
                self._read.append(text)

    def __exit__(self, *_):
        os.close(self._theirs)
        self._thread.join()
        os.close(self._ours)
        self.text = b"".join(self._read).decode()
        self.lines = [line for line in ESCAPES.sub("", self.text).replace("\r", "\n").splitlines() if line.strip()]


def test_a_terminal_gets_a_bar(forks, commands, tmp_path):
    with Terminal() as terminal:
        words = [*commands["tokenize"], "--output", str(tmp_path / "codes")]
        status, _, _ = forks.run(words, terminal=terminal.name)
    assert status == 0, terminal.text
    form = r"tokenize \(images\) \S+ [123]/3, \d\S*/(s|min), \d+ s left, 1 rejected, read \d+%.*"
    assert any(re.match(form, line) for line in terminal.lines), terminal.lines
    # Nothing of it stays, and the cursor is back.
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("images) ")
    assert json.loads(terminal.lines[-1])["rejected"] == 1


def test_bars_share_a_terminal_and_leave_it_clean(tmp_path):
    code = """
import time
from medmax_fast.progress import Progress, close_bars, progress
from medmax_fast.runtime import log
with Progress("outer", 4, 1, 0) as outer:
    time.sleep(0.15)
    outer.update(2, lambda: "[note]")
    left = progress(range(100), "inner")
    next(left)
    log("a warning")
    time.sleep(0.25)
    next(left)
    time.sleep(0.25)
close_bars()
print("end")
"""
    with Terminal() as terminal:
        handle = os.open(terminal.name, os.O_RDWR)
        subprocess.run(
            [sys.executable, "-c", code], stdout=handle, stderr=handle, env=os.environ | ENVIRONMENT, check=True
        )
        os.close(handle)
    both = next(i for i, line in enumerate(terminal.lines) if re.match(r"inner +\S+ 1/100, ", line))
    assert any(re.match(r"outer \S+ 2/4, .* left, 0 rejected, \[note\]", line) for line in terminal.lines[:both])
    assert any(line.strip() == "a warning" for line in terminal.lines) and terminal.lines[-1] == "end"
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("inner")


if __name__ == "__main__":
    serve()

"""Processes that share a folder of shards, killed at random: the final table is that of an uninterrupted run.

The processes are forks with an encoder that is a function of the pixels and sleeps a little, so that a kill hits every
stage. They are forked by this file run as a script, which has no threads, one function below per test; its function
`real_kills` does the same to the real command:

    python tests/test_exactly_once.py real_kills FOLDER CKPT TABLE KILLS
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from medmax_fast import tokenization
from medmax_fast.cli import main as medmax
from medmax_fast.data import claims
from medmax_fast.data.claims import Claims
from medmax_fast.vocab import IMAGE_CODES

KILLS = 60


class SlowTokenizer:
    """Codes drawn from a hash of the pixels, at about 2 ms an image."""

    sha256 = "slow"
    num_codes = 8192

    @classmethod
    def from_checkpoint(cls, *_):
        return cls()

    def encode(self, pixels):
        time.sleep(0.002 * len(pixels))
        seeds = [hashlib.sha256(image.tobytes()).digest()[:8] for image in pixels]
        draws = [np.random.default_rng(int.from_bytes(seed, "little")) for seed in seeds]
        return np.stack([draw.integers(0, 8192, IMAGE_CODES) for draw in draws])


def make_images(folder, count, broken=(7, 20)):
    """A table of small images, some of them equal, some broken."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    names = []
    for i in range(count):
        name = folder / f"{i:03d}.png"
        if i in broken:
            name.write_bytes(b"no image")
        elif i % 5 == 4:
            name.write_bytes((folder / f"{i - 4:03d}.png").read_bytes())
        else:
            Image.fromarray(draw.integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(name)
        names.append(name.name)
    (folder / "table.csv").write_text("img_path\n" + "\n".join(names) + "\n")
    return folder / "table.csv"


def command(table, output, ckpt="none", rows=4, batch=2):
    flags = ("--rows-per-shard", str(rows), "--batch-size", str(batch), "--workers", "2", "--max-rejected", "10%")
    return ["tokenize", "--input", str(table), "--ckpt", str(ckpt), "--output", str(output), *flags]


def result(folder):
    """What a run leaves that must not depend on how it went: every row in order, and every rejection."""
    rows = []
    for path in sorted(folder.glob("*.parquet")):
        table = parquet.read_table(path).to_pydict()
        rows += zip(table["img_path"], map(tuple, table["img_tokens"]), strict=True)
    rejected = (folder / "rejected.jsonl").read_text()
    manifest = json.loads((folder / "manifest.json").read_text())
    return rows, rejected, manifest["shards"]


def fork(arguments):
    """The command in a forked process, which is left at once when it ends, whatever this process has open."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            status = medmax(arguments)
        finally:
            os._exit(status)
    return child


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def random_kills(folder):
    table = make_images(folder / "images", 60)
    start = time.monotonic()
    assert wait(fork(command(table, folder / "whole"))) == 0
    seconds = time.monotonic() - start
    expected = result(folder / "whole")
    assert len(expected[0]) == 57 and expected[1].count("\n") == 3
    draw = random.Random(1)
    kills = survivors = runs = 0
    while kills < KILLS:
        runs += 1
        codes = folder / f"run-{runs}"
        # Several rounds of another number of processes each, every one killed at a time of its own.
        for _ in range(draw.randint(1, 4)):
            children = [fork(command(table, codes)) for _ in range(draw.randint(1, 4))]
            for child in children:
                time.sleep(draw.uniform(0, seconds / 4))
                os.kill(child, signal.SIGKILL)
                status = wait(child)
                kills += status == -signal.SIGKILL
                survivors += status == 0
            for path in codes.glob("codes-*.parquet"):
                assert len(parquet.read_table(path)) <= 4, "a shard was published half-written"
        children = [fork(command(table, codes)) for _ in range(draw.randint(1, 4))]
        assert [wait(child) for child in children] == [0] * len(children)
        assert result(codes) == expected
        # Nothing of the killed ones stays behind in the shards.
        assert not list(codes.glob(".codes-*")) and not list((codes / "shards").glob(".*"))
    assert kills >= 50 and runs >= 5, (kills, survivors, runs)


def survivors_take_over(folder):
    """A process that waits for another's last shard finishes it when that one is killed."""
    table = make_images(folder / "images", 12, broken=())
    codes = folder / "codes"
    (codes / "shards").mkdir(parents=True)
    holder = os.fork()
    if holder == 0:
        Claims(codes / "shards" / "claims").take(1)
        signal.pause()
    while not (codes / "shards" / "claims").exists():
        time.sleep(0.01)
    # The command refuses a folder that it did not make, so its settings come from a finished one.
    assert wait(fork(command(table, folder / "whole"))) == 0
    (codes / "settings.json").write_text((folder / "whole" / "settings.json").read_text())
    waiting = fork(command(table, codes))
    deadline = time.monotonic() + 30
    while len(list(codes.glob("*.parquet"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    assert os.waitpid(waiting, os.WNOHANG) == (0, 0), "it must wait for the claimed shard"
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert wait(waiting) == 0
    assert result(codes) == result(folder / "whole")


def claims_exclude_other_processes(folder):
    with Claims(folder / "claims") as mine:
        assert mine.take(0) and mine.take(5) and mine.work

        def free_for_another(shard):
            child = os.fork()
            if child == 0:
                os._exit(int(Claims(folder / "claims").take(shard)))
            return bool(wait(child))

        assert not free_for_another(0) and not free_for_another(5) and free_for_another(1)
        mine.give_back(0)
        assert free_for_another(0)


def without_locks_everything_is_done_all_the_same(folder):
    def refuse(*_):
        raise OSError(37, "No locks available")

    table = make_images(folder / "images", 12, broken=())
    assert wait(fork(command(table, folder / "whole"))) == 0
    claims.fcntl = type("NoLocks", (), {"lockf": staticmethod(refuse), "LOCK_EX": 2, "LOCK_NB": 4, "LOCK_UN": 8})
    children = [fork(command(table, folder / "codes")) for _ in range(2)]
    assert [wait(child) for child in children] == [0, 0]
    assert result(folder / "codes") == result(folder / "whole")


FORKING = [
    random_kills,
    survivors_take_over,
    claims_exclude_other_processes,
    without_locks_everything_is_done_all_the_same,
]


@pytest.mark.parametrize("function", FORKING, ids=lambda function: function.__name__)
def test_processes(function, tmp_path):
    arguments = [sys.executable, __file__, function.__name__, str(tmp_path)]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


def test_equal_contents_are_encoded_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenization, "ImageTokenizer", SlowTokenizer)
    table = make_images(tmp_path / "images", 40, broken=())
    assert medmax(command(table, tmp_path / "codes")) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["images"], summary["encoded"]) == (40, 32)
    rows, _, _ = result(tmp_path / "codes")
    # 000.png and 004.png are equal and lie in different shards.
    assert rows[0][1] == rows[4][1] != rows[1][1]
    # Also when an earlier run did the first one: of 004 to 007 only 006 and 007 are nowhere else.
    (tmp_path / "codes" / "shards" / "00001.json").unlink()
    assert medmax(command(table, tmp_path / "codes")) == 0
    assert json.loads((tmp_path / "codes" / "shards" / "00001.json").read_text())["encoded"] == 2
    assert result(tmp_path / "codes")[0] == rows


def real_kills(output, ckpt, images, kills):
    """Kill the real command at random until it has been killed so many times."""
    draw, done, runs = random.Random(0), 0, 0

    def start(folder):
        arguments = [sys.executable, "-m", "medmax_fast", *command(images, folder, ckpt, rows=3)]
        return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    begin = time.monotonic()
    assert start(output / "whole").wait() == 0
    seconds = time.monotonic() - begin
    expected = result(output / "whole")
    while done < int(kills):
        runs += 1
        folder = output / f"run-{runs}"
        for _ in range(draw.randint(2, 4)):
            processes = [start(folder) for _ in range(draw.randint(1, 4))]
            time.sleep(draw.uniform(0.2, 0.6) * seconds)
            for process in processes:
                time.sleep(draw.uniform(0, 0.3))
                process.kill()
                done += process.wait() == -signal.SIGKILL
        last = [start(folder) for _ in range(draw.randint(1, 4))]
        assert [process.wait() for process in last] == [0] * len(last)
        assert result(folder) == expected, folder
        print(f"run {runs}: {done} kills, {len(expected[0])} rows equal", flush=True)


if __name__ == "__main__":
    if sys.argv[1] != "real_kills":
        tokenization.ImageTokenizer = SlowTokenizer
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])

"""TensorBoard and W&B: what is logged is in their files, a resumed run continues them, their failures stop nothing."""

import builtins
import contextlib
import errno
import json
import re
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from medmax_fast.runtime import InputError
from medmax_fast.training import trackers as module
from medmax_fast.training.trackers import check_trackers, open_trackers

RECORD = {
    "step": 1,
    "loss": 2.5,
    "text_loss": None,
    "tokens": 4096,
    "lr": np.float32(0.5),
    "note": "text",
    "done": True,
    "by_task": {"step": 1, "vqa": {"loss": 1.25}, "draw": {"loss": None}},
}
EXPECTED = {"loss": 2.5, "tokens": 4096, "lr": 0.5, "by_task/vqa/loss": 1.25}
KEY = "5ecret" * 8


@pytest.fixture()
def events():
    """Reader of a run's TensorBoard folder: tag -> [(step, value)], and the whole event accumulator."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder: Path):
        accumulator = EventAccumulator(str(folder / "tensorboard")).Reload()
        tags = accumulator.Tags()["scalars"]
        return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}, accumulator

    return read


@pytest.fixture()
def wandb(tmp_path, monkeypatch):
    """wandb in offline mode, with its home in a folder of its own and no settings of the machine's."""
    wandb = pytest.importorskip("wandb")
    for name in ("CONFIG_DIR", "CACHE_DIR", "DATA_DIR", "DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home"))
    variables = {"MODE": "offline", "SILENT": "true", "API_KEY": KEY, "ERROR_REPORTING": "false"}
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield wandb
    # A test may have ended the process that this talks to.
    with contextlib.suppress(ConnectionError):
        wandb.teardown()


def wandb_records(folder: Path, seconds: float = 20) -> list:
    """The records of the newest offline run in a run folder, once wandb's process has written the last of them."""
    (path,) = sorted((folder / "wandb").glob("offline-run-*"))[-1].glob("*.wandb")
    until = time.monotonic() + seconds
    while True:
        records = list(read_records(path.read_bytes()))
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < until, f"{path} has no end"
        time.sleep(0.05)


def read_records(data: bytes):
    """LevelDB's log after a header of 7 bytes: blocks of 32 KiB with pieces of records.

    A piece has a checksum, its length and its kind (1 whole, 2 first, 3 middle, 4 last) before it.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    assert data[:4] == b":W&B"[: len(data)]
    place, record = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if place + 7 + length > len(data):
            return
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def wandb_history(folder: Path) -> dict[int, dict]:
    """step -> the values logged at it."""
    rows = {}
    for record in wandb_records(folder):
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.setdefault(record.history.step.num, {}).update(row)
    return rows


def own(row: dict) -> dict:
    """Without the values that wandb adds."""
    return {name: value for name, value in row.items() if not name.startswith("_")}


def test_nothing_without_names(tmp_path):
    trackers = open_trackers([], tmp_path, {}, "run")
    trackers.log(1, RECORD)
    trackers.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [["tensorbord"], ["tensorboard", "mlflow"], [""]])
def test_unknown_names(tmp_path, names):
    message = re.escape(f"--track {names[-1]}: expected some of tensorboard,wandb")
    with pytest.raises(InputError, match=message):
        check_trackers(names)
    with pytest.raises(InputError, match=message):
        open_trackers(names, tmp_path, {}, "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_missing_package(name, monkeypatch):
    real = builtins.__import__

    def without(wanted, *args):
        if name in wanted.split("."):
            raise ImportError(f"No module named {name!r}")
        return real(wanted, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=rf"--track {name} needs {name}.*pip install 'medmax_fast\[track\]'"):
        check_trackers([name])


def test_a_folder_of_that_name_is_no_package(tmp_path):
    """Where a run leaves `wandb/` in the current folder, and the package is not installed."""
    for name in ("wandb", "tensorboard"):
        (tmp_path / name).mkdir()
    root = Path(module.__file__).parents[2]
    code = f"""
import importlib.machinery, sys
class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in ("wandb", "tensorboard"):
            path = [{str(tmp_path)!r}]
        return super().find_spec(name, path, target)
sys.meta_path.insert(0, Without)
sys.path.insert(0, {str(root)!r})
from medmax_fast.training.trackers import check_trackers
for name in ("wandb", "tensorboard"):
    try:
        check_trackers([name])
    except ValueError as error:
        print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    assert found.count("pip install 'medmax_fast[track]'") == 2 == len(found.splitlines())


def test_tensorboard_holds_what_was_logged(tmp_path, events):
    trackers = open_trackers(["tensorboard"], tmp_path, {"lr": 0.5, "data": tmp_path}, "run")
    trackers.log(1, RECORD)
    trackers.log(2, {"loss": float("nan"), "seconds": 3})
    # Readable before it is closed, as after a kill.
    scalars, accumulator = events(tmp_path)
    trackers.close()
    assert scalars.keys() == {*EXPECTED, "seconds"}
    for name, value in EXPECTED.items():
        assert scalars[name][0] == (1, value)
    assert scalars["seconds"] == [(2, 3)]
    assert scalars["loss"][1][0] == 2 and np.isnan(scalars["loss"][1][1])
    (text,) = accumulator.Tensors("settings/text_summary")
    assert '"lr": 0.5' in text.tensor_proto.string_val[0].decode()


@pytest.mark.parametrize("from_step", [0, 3])
def test_tensorboard_drops_the_steps_of_before(tmp_path, events, from_step):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    for number, (first, last) in enumerate([(0, 5), (from_step + (from_step > 0), 4)]):
        trackers = open_trackers(["tensorboard"], tmp_path, {}, "run", from_step=from_step * number)
        for step in range(first, last + 1):
            trackers.log(step, {"loss": 10 * number + step})
        # Killed: never closed.
        del trackers
    kept = [(step, step) for step in range(from_step + 1)] if from_step else []
    expected = kept + [(step, 10 + step) for step in range(from_step + (from_step > 0), 5)]
    assert events(tmp_path)[0]["loss"] == expected
    # The accumulator that the TensorBoard server itself uses; it has a rule of its own for the first start.
    server = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in server.Tensors("loss")] == [step for step, _ in expected]


def test_tensorboard_without_a_disk(tmp_path, events, monkeypatch, capsys):
    # Its thread ends by the error, of which pytest would warn.
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    trackers = open_trackers(["tensorboard"], tmp_path, {}, "run")
    writer = trackers._open["tensorboard"]._writer.file_writer.event_writer

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    trackers.log(1, {"loss": 1.0})
    writer._general_file_writer.write = full
    for step in range(2, 5):
        trackers.log(step, {"loss": 1.0})
    trackers.close()
    writer._async_writer._worker.join(10)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--track")]
    assert lines == ["--track tensorboard: [Errno 28] No space left on device; the run goes on without it"]
    assert events(tmp_path)[0]["loss"] == [(1, 1.0)]


def test_tensorboard_without_a_folder(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    trackers = open_trackers(["tensorboard"], tmp_path, {}, "run")
    trackers.log(1, RECORD)
    trackers.close()
    assert re.fullmatch(r"--track tensorboard: .*exists.*; the run goes on without it\n", capsys.readouterr().err)


def test_wandb_holds_what_was_logged(tmp_path, wandb):
    trackers = open_trackers(["wandb"], tmp_path, {"lr": 0.5, "lora": {"rank": 8}}, "run-1")
    trackers.log(1, RECORD)
    trackers.log(1, {"validation": {"loss": 4.0}})
    trackers.log(3, {"loss": 1.5})
    trackers.close()
    history = wandb_history(tmp_path)
    assert list(history) == [1, 3]
    assert own(history[1]) == {**EXPECTED, "validation/loss": 4.0}
    assert own(history[3]) == {"loss": 1.5}
    runs = [record.run for record in wandb_records(tmp_path) if record.HasField("run")]
    assert (runs[0].project, runs[0].run_id) == ("medmax_fast", "run-1")
    config = {item.key: item.value_json for item in runs[0].config.update}
    assert config["lr"] == "0.5" and json.loads(config["lora"]) == {"rank": 8}
    assert [record.exit.exit_code for record in wandb_records(tmp_path) if record.HasField("exit")] == [0]


def test_wandb_continues_a_run_under_its_id(tmp_path, wandb):
    for start in (1, 3):
        trackers = open_trackers(["wandb"], tmp_path / str(start), {}, "same", from_step=start - 1)
        trackers.log(start, {"loss": start})
        trackers.close(status=1)
        (run,) = [record.run for record in wandb_records(tmp_path / str(start)) if record.HasField("run")][:1]
        assert run.run_id == "same" and list(wandb_history(tmp_path / str(start))) == [start]
        assert [r.exit.exit_code for r in wandb_records(tmp_path / str(start)) if r.HasField("exit")] == [1]


def test_wandb_sends_no_key_and_no_output(tmp_path, wandb):
    """In a process of its own, whose output is not in pytest's hands."""
    folder = tmp_path / "run"
    folder.mkdir()
    code = f"""
from pathlib import Path
from medmax_fast.training.trackers import open_trackers
trackers = open_trackers(["wandb"], Path({str(folder)!r}), {{"lr": 0.5}}, "run")
print("printed by the run")
trackers.log(1, {{"loss": 2.5}})
trackers.close()
"""
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60)
    assert own(wandb_history(folder)[1]) == {"loss": 2.5}
    assert child.stdout == "printed by the run\n" and KEY not in child.stderr
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        content = path.read_bytes()
        assert KEY.encode() not in content and b"printed by the run" not in content, path


def test_wandb_leaves_another_run_alone(tmp_path, wandb):
    (tmp_path / "theirs").mkdir()
    theirs = wandb.init(project="other", id="theirs", dir=str(tmp_path / "theirs"))
    trackers = open_trackers(["wandb"], tmp_path, {}, "ours")
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    theirs.log({"accuracy": 0.5})
    theirs.finish()
    assert [own(row) for row in wandb_history(tmp_path).values()] == [{"loss": 1.0}]
    assert [own(row) for row in wandb_history(tmp_path / "theirs").values()] == [{"accuracy": 0.5}]


@pytest.mark.parametrize("when", ["log", "close", "while closing"])
def test_wandb_without_its_process(tmp_path, wandb, events, capfd, when):
    psutil = pytest.importorskip("psutil")
    trackers = open_trackers(["wandb", "tensorboard"], tmp_path, {}, "run")
    trackers.log(1, {"loss": 1.0})
    core = [child for child in psutil.Process().children() if "wandb" in child.name()]
    assert core
    for child in core:
        if when == "while closing":
            child.suspend()
            threading.Timer(0.5, child.kill).start()
        else:
            child.kill()
            child.wait(10)
    for step in range(2, 5) if when == "log" else ():
        trackers.log(step, {"loss": 1.0})
    trackers.close()
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("--track")]
    assert len(lines) == 1 and lines[0].startswith("--track wandb: ")
    # The other one goes on.
    assert len(events(tmp_path)[0]["loss"]) == (4 if when == "log" else 1)


def test_wandb_without_a_network(tmp_path, wandb, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "online")
    # A port that nothing listens at, so every connection is refused.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    trackers = open_trackers(["wandb"], tmp_path, {}, "run")
    trackers.log(1, RECORD)
    trackers.close()
    written = capfd.readouterr().err
    assert re.search(r"^--track wandb: .*refused.*; the run goes on without it$", written, re.MULTILINE)
    assert KEY not in written


@pytest.mark.parametrize(
    ("variables", "run_id", "message"),
    [
        ({"MODE": "online", "API_KEY": ""}, "run", "key"),
        ({"MODE": "online", "API_KEY": "short"}, "run", "WANDB_API_KEY invalid"),
        ({"MODE": "sideways"}, "run", "offline"),
        ({}, "a/b", "Run ID"),
    ],
)
def test_wandb_refuses_before_the_first_step(tmp_path, wandb, monkeypatch, variables, run_id, message):
    for name, value in variables.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    with pytest.raises(InputError, match=rf"^--track wandb: .*{message}[^\n]*$") as caught:
        open_trackers(["wandb"], tmp_path, {}, run_id)
    assert "short" not in str(caught.value)

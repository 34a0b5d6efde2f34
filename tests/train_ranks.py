"""Trainings in processes of their own, for the tests of several ranks, of signals and of kills.

    torchrun --nproc-per-node 2 train_ranks.py PLAN     every rank runs the trainings of PLAN, a JSON file
    python train_ranks.py                               says "ready", then answers requests on standard input

A training here takes a second, the imports before it five: a fork of a process that has done them starts at once. That
process has a single thread (OMP_NUM_THREADS=1) and has computed nothing, so its forks find no lock taken.

A request is a line of JSON and gets one as its answer. {"job": name of a function below, "arguments": of it,
"environment": variables, "output": where standard output (OUTPUT.out) and error (OUTPUT.err) go, "watch": a folder,
"moment": a number, see `watch`} forks and answers with the process's id. {"wait": id} answers with its exit status,
negative for a signal.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import deepspeed  # noqa: F401
import peft  # noqa: F401
import setuptools  # noqa: F401
import torch
from pyarrow import parquet  # noqa: F401
from transformers import ChameleonForConditionalGeneration  # noqa: F401

import medmax_fast.train  # noqa: F401
from medmax_fast import cli, figures
from medmax_fast.runtime import leave, rank_and_world
from medmax_fast.training.folder import RunFolder
from medmax_fast.training.run import Run

# How long a request waits for a process before it kills it.
PATIENCE = 200
CHANGES = {"os.mkdir": 2, "os.rmdir": 1, "os.remove": 1, "os.rename": 2}


def trainings(runs: list[dict]) -> int:
    """Run commands one after another on this rank; returns the status of the last one.

    Of a run: arguments of `medmax train`; with a "signal" [rank, step, number], that rank sends it to itself after it
    has logged that step, and the command must end with status 130 on every rank.
    """
    figures.loss_curve = lambda *_: None
    log = Run._log
    for run in runs:
        rank, step, number = run.get("signal") or (None, None, None)

        def logged(self, record, *rest, rank=rank, step=step, number=number):
            log(self, record, *rest)
            if (rank_and_world()[0], record["step"]) == (rank, step):
                os.kill(os.getpid(), number)

        Run._log = logged
        status = cli.main(["train", *run["arguments"]])
        if run is not runs[-1]:
            assert status == (130 if "signal" in run else 0), (run, status)
    return status


def checkpoints(paths: list[str], keep: int, last: int) -> int:
    """What runs do to their folders, without the training: continue each to step `last`, saving after every step."""
    # What a kill leaves does not depend on it, and it takes as long as all the rest.
    os.fsync = lambda _: None
    for folder in map(RunFolder, paths):
        folder.path.mkdir(exist_ok=True)
        newest = folder.newest_checkpoint()
        done = newest[1]["step"] if newest else 0
        folder.rewind(done, keep)
        for step in range(done + 1, last + 1):
            folder.append(folder.metrics, {"step": step})
            engine = folder.open_checkpoint(step) / "engine"
            engine.mkdir()
            for rank in range(2):
                (engine / f"rank-{rank}").write_text(f"{rank}:{step} " * step)
            folder.publish(step, {"world": 2}, keep)
            print(step, flush=True)
    return 0


_changes = 0


def watch(folder: str, moment: int) -> None:
    """Be killed before the `moment`-th change to files in `folder`, or in the middle of it if torch is writing one.

    Changes are creating, opening for writing, renaming and deleting. With moment 0 they are counted, and their number
    is the last line on standard error.
    """

    def changes(last_act=lambda: None) -> None:
        global _changes
        _changes += 1
        if _changes == moment:
            last_act()
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event == "open":
            name, _, how = arguments
            relevant = how & (os.O_WRONLY | os.O_RDWR)
        elif relevant := event in CHANGES:
            name = arguments[0]
            # rmtree deletes by names relative to an open folder.
            if arguments[CHANGES[event]] >= 0:
                name = folder
        if relevant and isinstance(name, str | os.PathLike) and os.fspath(name).startswith(folder):
            changes()

    def save_half(value, file, *rest, save=torch.save, **options) -> None:
        save(value, file, *rest, **options)
        changes(lambda: os.truncate(file, os.path.getsize(file) // 2))

    torch.save = save_half
    sys.addaudithook(audit)


def fork(request: dict) -> int:
    """Start a job; in the forked process this does not return."""
    child = os.fork()
    if child:
        return child
    for descriptor, name in ((0, os.devnull), (1, request["output"] + ".out"), (2, request["output"] + ".err")):
        handle = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, descriptor)
    os.environ.update(request.get("environment", {}))
    if "watch" in request:
        watch(request["watch"], request["moment"])
    status = globals()[request["job"]](*request["arguments"])
    if rank_and_world()[1] > 1:
        leave(status)
    if request.get("moment") == 0:
        print(_changes, file=sys.stderr)
    # The interpreter's own ending takes as long as a training.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wait(child: int) -> int:
    deadline = time.monotonic() + PATIENCE
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def main() -> None:
    if len(sys.argv) > 1:
        leave(trainings(json.loads(Path(sys.argv[1]).read_text())))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(wait(request["wait"]) if "wait" in request else fork(request)), flush=True)


if __name__ == "__main__":
    main()

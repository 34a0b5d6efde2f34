"""Runs that are killed, asked to stop or shared by ranks: each ends as one process left alone would have.

Trainings run in forks of one process (train_ranks.py), which are killed for real; one start of torchrun serves all
checks of two ranks, and one plain command gets its signal from outside.
"""

import itertools
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ports import free_port

from medmax_fast.config import TrainConfig
from medmax_fast.data.loader import PackedLoader
from medmax_fast.data.store import TokenStore, write_store
from medmax_fast.files import write_json
from medmax_fast.training import processes
from medmax_fast.training.folder import RunFolder
from medmax_fast.training.processes import SAME_SIGNAL_SECONDS, StopRequest
from medmax_fast.vocab import TextTokenizer

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "tests" / "train_ranks.py")
# Without the last one DeepSpeed says on standard output, once imported, that it has chosen the CPU.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
CLOCK = ("seconds", "tokens_per_second", "target_tokens_per_second", "memory_gib")
# Of a run that is killed at random; then it is left to finish.
KILLS = 4
WISH = "{}: finishing this step and saving; again to stop without"
INTERRUPTED = "medmax train: interrupted; step {} of 6 is saved in {}; to continue: {} {}"
# ZeRO stages beside 2, and what they train.
STAGES = [(0, "full"), (1, "lora"), (3, "full"), (3, "lora")]


class Forks:
    """The server of train_ranks.py; processes started here write to numbered files in `folder`."""

    def __init__(self, folder):
        self._folder, self._numbers = folder, itertools.count()
        with open(folder / "server.err", "w") as errors:
            self._server = subprocess.Popen(
                [sys.executable, SCRIPT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | ENVIRONMENT,
                text=True,
            )
        assert self._server.stdout.readline() == '"ready"\n', (folder / "server.err").read_text()

    def _ask(self, request):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, job, *arguments, **more):
        """Start a job; returns (process id, path of its output without the suffix)."""
        output = str(self._folder / str(next(self._numbers)))
        return self._ask({"job": job, "arguments": arguments, "output": output, **more}), output

    def wait(self, started):
        """(exit status, standard output, standard error) of what was started."""
        status = self._ask({"wait": started[0]})
        return status, *(Path(started[1] + suffix).read_text() for suffix in (".out", ".err"))

    def run(self, job, *arguments, **more):
        return self.wait(self.start(job, *arguments, **more))

    def close(self):
        self._server.stdin.close()
        self._server.wait()


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


def make_store(folder, golden, lengths, silent=(), seed=0):
    """Rows of text, eot, an image span and eos of the given lengths; `silent` ones end at eot: no target."""
    tokenizer = TextTokenizer(golden / "checkpoint" / "tokenizer" / "text_tokenizer_modified.json")
    layout, rng = tokenizer.layout, np.random.default_rng(seed)

    def rows():
        for i, length in enumerate(lengths):
            text = rng.integers(layout.text_start, layout.vocab_size, length)
            text[0], text[-1] = layout.bos, layout.eot if i in silent else layout.eos
            if i not in silent:
                text[length // 4] = layout.eot
                span = slice(length // 4 + 1, length * 3 // 4)
                text[span] = rng.integers(layout.image_start, layout.image_end, span.stop - span.start)
                text[span.start], text[span.stop - 1] = layout.boi, layout.eoi
            yield text, f"row {i}", f"task {i % 2}", "synthetic"

    return write_store(folder, layout, rows(), tokenizer_sha256=tokenizer.sha256())


@pytest.fixture(scope="module")
def config(tmp_path_factory, golden):
    """Five packs: two full steps an epoch and a short one; a validation after every second step."""
    folder = tmp_path_factory.mktemp("data")
    store = make_store(folder / "store", golden, [33, 60, 41, 12, 57, 38, 64, 35, 50, 14, 36, 49, 62, 34])
    validation = make_store(folder / "validation", golden, [40, 21, 50], seed=1)
    return TrainConfig(
        data=str(store.path),
        ckpt=str(golden / "checkpoint"),
        output="",
        epochs=2,
        pack_length=145,
        max_length=96,
        packs_per_step=2,
        lora_dropout=0.3,
        lr=1e-3,
        validation=str(validation.path),
        validate_every=2,
        save_every=1,
        device="cpu",
    )


def plan(config, **more):
    """One run of train_ranks.trainings: what differs from the defaults, as command-line arguments."""
    words = []
    for name, value in vars(config).items():
        if value != TrainConfig.__dict__.get(name):
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
    return {"arguments": words, **more}


def torchrun(folder, runs, world=2):
    """Run trainings on all ranks of one start of torchrun."""
    write_json(folder / "plan.json", runs)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world), "--standalone"]
    command = [*launcher, SCRIPT, str(folder / "plan.json")]
    return subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)


def records(output):
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in lines]


def left_by(config):
    """What a finished run leaves that must not depend on how it went."""
    folder = Path(config.output)
    name = "model/models/7b/consolidated.pth" if config.full else "adapter/adapter_model.safetensors"
    assert not list(folder.glob(".*")) and not list((folder / "checkpoints").glob(".*"))
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return records(folder), (folder / "validation.jsonl").read_text(), (folder / name).read_bytes(), kept


CHOICES = {
    "lora-2": dict(),
    "lora-3": dict(zero=3, head="image", save_every=2, keep=1),
    "full-2": dict(full=True, save_every=2, keep=3),
    "full-3": dict(full=True, zero=3),
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_run_killed_at_random_ends_as_the_uninterrupted_one(forks, config, tmp_path, name):
    """Every other kill is at a moment drawn from the clock, and every other one right at a change to its files."""
    whole = replace(config, output=str(tmp_path / "whole"), **CHOICES[name])
    began = time.monotonic()
    status, _, log = forks.run("trainings", [plan(whole)], watch=whole.output, moment=0)
    seconds, moments = time.monotonic() - began, int(log.splitlines()[-1])
    expected = left_by(whole)
    assert status == 0 and len(expected[0]) == 6 and moments > 30
    seed = random.randrange(10**6)
    draw, killed = random.Random(seed), replace(whole, output=str(tmp_path / "killed"))
    kills, story = 0, []
    for attempt in range(KILLS):
        moment = 0 if attempt % 2 else draw.randint(1, moments // 2)
        started = forks.start("trainings", [plan(killed)], watch=killed.output, moment=moment)
        if not moment:
            delay = draw.uniform(0.2, 0.8) * seconds
            time.sleep(delay)
            os.kill(started[0], signal.SIGKILL)
        status, _, log = forks.wait(started)
        story.append(f"change {moment}: {status}" if moment else f"{delay:.3f} s: {status}")
        assert status in (0, -signal.SIGKILL), (seed, story, log)
        kills += status != 0
        if status == 0:
            break
    assert kills >= 1, (seed, story)
    status, _, log = forks.run("trainings", [plan(killed)])
    assert status == 0, (seed, story, log)
    assert left_by(killed) == expected, f"random moments from seed {seed}: {story}"


@pytest.mark.parametrize("keep", [1, 3])
def test_a_kill_at_any_change_to_a_run_folder_leaves_the_last_checkpoint_or_the_next(forks, tmp_path, keep):
    last, paths = 4, []

    def check_contents(path, step):
        engine = path / "checkpoints" / f"step-{step:06d}" / "engine"
        assert [(engine / f"rank-{r}").read_text() for r in (0, 1)] == [f"{r}:{step} " * step for r in (0, 1)]

    # One step is done, so that what a resumed run does first is hit as well.
    assert forks.run("checkpoints", [str(tmp_path / "one")], keep, 1)[0] == 0
    for moment in itertools.count(1):
        path = shutil.copytree(tmp_path / "one", tmp_path / str(moment))
        status, said, _ = forks.run("checkpoints", [str(path)], keep, last, watch=str(path), moment=moment)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        published = int(said.split()[-1]) if said else 1
        step = RunFolder(path).newest_checkpoint()[1]["step"]
        assert step in (published, published + 1), moment
        check_contents(path, step)
        paths.append(path)
    assert len(paths) > 40
    status, _, log = forks.run("checkpoints", [str(path) for path in paths], keep, last)
    assert status == 0, log
    kept = range(last + 1 - keep, last + 1)
    for path in paths:
        assert sorted(entry.name for entry in path.iterdir()) == ["checkpoints", "metrics.jsonl"]
        names = sorted(entry.name for entry in (path / "checkpoints").iterdir())
        assert names == [f"step-{n:06d}" for n in kept], path
        for step in kept:
            check_contents(path, step)
        assert records(path) == [{"step": n} for n in range(1, last + 1)]


def test_checkpoints_that_cannot_be_used_do_not_push_out_those_that_can(tmp_path, capfd):
    folder = RunFolder(tmp_path)

    def save(step, keep=2):
        (folder.open_checkpoint(step) / "engine").write_text("x" * step)
        folder.publish(step, {"world": 1}, keep)

    for step in (2, 4, 6, 8):
        save(step, keep=4)
    for step in (6, 8):
        (folder.checkpoints / f"step-{step:06d}" / "engine").write_text("x")
    (folder.checkpoints / "step-000009").mkdir()
    (folder.checkpoints / "step-000009" / "state.json").write_text("")
    # A copy that somebody has made.
    shutil.copytree(folder.checkpoints / "step-000002", folder.checkpoints / "step-000002-good")
    assert folder.newest_checkpoint()[0].name == "step-000004"
    log = capfd.readouterr().err
    assert [log.count(f"step-00000{n}: passed over") for n in (9, 8, 6, 4)] == [1, 1, 1, 0]
    save(5, keep=1)
    assert folder.newest_checkpoint()[1]["step"] == 5
    # Those that are newer go when the run has come past them.
    save(7, keep=1)
    names = ["step-000002-good", "step-000007", "step-000008", "step-000009"]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == names
    save(10)
    names = ["step-000002-good", "step-000007", "step-000010"]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == names


def test_the_first_signal_is_a_wish_and_only_a_later_one_ends_the_run_at_once(monkeypatch, capfd):
    now = [100.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with StopRequest().listening() as stop:
        assert stop._since is None
        for later in (0.0, 0.1, SAME_SIGNAL_SECONDS):
            now[0] = 100.0 + later
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert stop._since == 100.0
        now[0] += 0.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert capfd.readouterr().err == WISH.format("SIGTERM") + "\n"
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


def test_a_signal_that_interrupts_a_write_to_standard_error_is_noted_all_the_same(monkeypatch, capfd):
    """Of a terminal or a pipe that nobody reads for a while, in the middle of a line."""
    reading, writing = os.pipe()
    found = []

    def interrupt_and_read():
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        while text := os.read(reading, 2**16):
            found.append(text)

    with os.fdopen(writing, "w") as stderr, StopRequest().listening() as stop:
        monkeypatch.setattr(sys, "stderr", stderr)
        thread = threading.Thread(target=interrupt_and_read)
        thread.start()
        print("x" * 300_000, file=sys.stderr, flush=True)
    thread.join()
    os.close(reading)
    assert stop._since is not None and b"".join(found) == b"x" * 300_000 + b"\n"
    assert capfd.readouterr().err == WISH.format("SIGTERM") + "\n"


def test_signals_stay_as_they_are_where_only_the_main_thread_may_change_them():
    found = []

    def elsewhere():
        with StopRequest().listening() as stop:
            found.append((stop._since, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [(None, before)]


def test_a_signal_ends_the_command_after_a_step_and_the_same_command_continues(forks, config, tmp_path):
    whole, run = (replace(config, output=str(tmp_path / name)) for name in ("whole", "run"))
    assert forks.run("trainings", [plan(whole)])[0] == 0
    command = [sys.executable, "-m", "medmax_fast", "train", *plan(run)["arguments"]]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options) as process:
        # It has a model to load, and six steps to go.
        while not (Path(run.output) / "settings.json").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, log = process.communicate(timeout=200)
    assert (process.returncode, out) == (130, "") and "Traceback" not in log
    assert log.splitlines().count(WISH.format("SIGTERM")) == 1
    done = RunFolder(run.output).newest_checkpoint()[1]["step"]
    words = shlex.join(["train", *plan(run)["arguments"]])
    started = shlex.join([shutil.which("python") == sys.executable and "python" or sys.executable, *command[1:3]])
    assert log.splitlines()[-1] == INTERRUPTED.format(done, run.output, started, words)
    assert done == len(records(run.output)) < 6 and not (Path(run.output) / "result.json").exists()
    if done < 5:
        status, out, log = forks.run("trainings", [plan(run, signal=[0, done + 1, signal.SIGINT])])
        assert (status, out) == (130, "") and f"continuing after step {done} of 6\n" in log
        assert log.splitlines().count(WISH.format("SIGINT")) == 1
        assert log.splitlines()[-1] == INTERRUPTED.format(done + 1, run.output, "medmax", words)
        assert len(records(run.output)) == done + 1
    status, _, log = forks.run("trainings", [plan(run)])
    assert status == 0 and left_by(run) == left_by(whole)


# Thirteen rows of which no two fit into 64 ids; the two longest, which share a pack of 128, have no target.
LENGTHS, SILENT = [64, 33, 40, 47, 60, 36, 51, 64, 38, 57, 42, 35, 54], (0, 7)
# Pack length, packs per step, epochs: one row per pack in a full step and a short one; all rows in one step, one per
# pack and two per pack.
SHAPES = {"short": (64, 8, 1), "rows": (64, 16, 2), "packs": (128, 8, 2)}


@pytest.fixture(scope="module")
def cases(tmp_path_factory, golden, config):
    """Name -> configuration of two steps, the same on any number of ranks."""
    store = make_store(tmp_path_factory.mktemp("ranks") / "store", golden, LENGTHS, SILENT)
    config = replace(config, data=str(store.path), validation="", validate_every=0, clip=0.0, max_length=64, lr=1e-4)
    cases = {}
    for name, (length, packs, epochs) in SHAPES.items():
        shape = replace(config, pack_length=length, packs_per_step=packs, epochs=epochs)
        cases[f"{name}-full"] = replace(shape, full=True)
        # What is dropped depends on how rows are packed, but not on the ranks.
        cases[f"{name}-lora"] = replace(shape, lora_dropout=0.3 if name == "short" else 0.0, head="image")
    return cases


def micro_batches(config, world):
    """Supervised ids of every micro-batch, -1 where there is no pack: [step][rank][micro-step] of the first epoch."""
    loaders = [
        PackedLoader(TokenStore(config.data), config.pack_length, config.packs_per_step, config.seed, rank, world)
        for rank in range(world)
    ]
    steps = zip(*(loader.epoch_steps(0) for loader in loaders), strict=True)
    return [[[-1 if b is None else b.target_tokens for b in step.batches] for step in ranks] for ranks in steps]


def test_the_cases_have_micro_batches_without_targets_and_without_packs(cases):
    flat = {}
    for shape, steps in (("short", 2), ("rows", 1), ("packs", 1)):
        for world in (1, 2, 8):
            found = micro_batches(cases[f"{shape}-full"], world)
            assert len(found) == steps
            flat[shape] = [sorted(sum(ranks, [])) for ranks in found]
            # With a rank that has nothing but such micro-batches.
            idle = any(max(rank) <= 0 for ranks in found for rank in ranks)
            assert idle or world < 8
    assert [step.count(-1) for step in flat["short"]] == [0, 3]
    assert sum(step.count(0) for step in flat["short"]) == 2
    assert (flat["rows"][0].count(-1), flat["rows"][0].count(0)) == (3, 2)
    assert (flat["packs"][0].count(-1), flat["packs"][0].count(0)) == (2, 1)


def run_ranks(forks, world, runs):
    """Run trainings on forked ranks; (exit status, standard output, standard error) of each."""
    port, started = free_port(), []
    for rank in range(world):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        environment = {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}
        started.append(forks.start("trainings", runs, environment=environment))
    return [forks.wait(one) for one in started]


def first_moment(output, step):
    """AdamW's after a step, from a ZeRO-2 checkpoint, float64; after the first step, a tenth of the gradient."""
    parts = []
    for path in sorted(Path(output).glob(f"checkpoints/step-{step:06d}/engine/zero_pp_rank_*_optim_states.pt")):
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]
        parts.append(state["state"][0]["exp_avg"].double())
    return torch.cat(parts)


def largest_difference(found, expected, moments=True):
    """Of losses and gradient norms of both steps, and of the gradients in them: relative, of a vector by its norm."""
    gaps = []
    for one, other in zip(records(found), records(expected), strict=True):
        assert (one["tokens"], one["target_tokens"]) == (other["tokens"], other["target_tokens"])
        gaps += [abs(one[n] / other[n] - 1) for n in ("loss", "text_loss", "image_loss", "grad_norm")]
    for step in (1, 2) if moments else ():
        one, other = first_moment(found, step), first_moment(expected, step)
        # Numbers of ranks differ in how many zeros they fill up with.
        size = min(len(one), len(other))
        assert not one[size:].any() and not other[size:].any() and other.norm() > 0
        gaps.append(((one[:size] - other[:size]).norm() / other.norm()).item())
    return max(gaps)


def test_ranks_and_packing_change_nothing(forks, cases, tmp_path):
    """1 x 8, 2 x 4 and 8 x 1 packs, ZeRO 0 to 3; one of two ranks asked to stop; and another number of ranks."""
    stages = {f"zero{zero}-{kind}": replace(cases[f"short-{kind}"], zero=zero) for zero, kind in STAGES}
    shared = {name: case for name, case in cases.items() if not name.startswith("rows")}
    stages["long"] = replace(cases["short-lora"], epochs=3, save_every=0)

    def plans(world, chosen):
        return [plan(replace(case, output=str(tmp_path / f"{world}-{name}"))) for name, case in chosen.items()]

    for status, _, log in [*run_ranks(forks, 1, plans(1, cases | stages)), *run_ranks(forks, 8, plans(8, shared))]:
        assert status == 0, log
    stopped = plan(replace(stages["long"], output=str(tmp_path / "stopped")))
    signalled = stopped | {"signal": [1, 3, signal.SIGTERM]}
    done = torchrun(tmp_path, [*plans(2, shared | stages), signalled, stopped])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count(WISH.format("SIGTERM")) == 1
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["steps"], result["resumed_from"]) == (6, 3)
    alone, resumed = (tmp_path / name for name in ("2-long", "stopped"))
    weights = "adapter/adapter_model.safetensors"
    assert records(alone) == records(resumed) and (alone / weights).read_bytes() == (resumed / weights).read_bytes()

    gaps = {}
    for name, world in itertools.product(shared, (1, 2, 8)):
        expected = tmp_path / f"1-{name.replace('packs', 'rows')}"
        gaps[f"{world}-{name}"] = largest_difference(tmp_path / f"{world}-{name}", expected)
    for name, world in itertools.product(stages, (1, 2)):
        expected = tmp_path / ("1-long" if name == "long" else f"1-short-{name.split('-')[1]}")
        gaps[f"{world}-{name}"] = largest_difference(tmp_path / f"{world}-{name}", expected, moments=False)
    print("largest relative differences:", {name: f"{gap:.1e}" for name, gap in gaps.items()})
    assert max(gaps.values()) < 1e-6, gaps

    # What two ranks have saved, one continues.
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-000006")
    (tmp_path / "stopped" / "result.json").unlink()
    status, _, log = forks.run("trainings", [stopped])
    assert status == 0 and "made by 2 ranks, now 1" in log and "continuing after step 3 of 6" in log, log
    assert largest_difference(tmp_path / "stopped", tmp_path / "1-long", moments=False) < 1e-6

"""`medmax bench`: a suite of benchmarks, each stage after the tests that guard it.

Stages that follow one another in one benchmark module share a process, and before it runs so do their tests. A stage
with a red test is left out: a wrong answer has no speed. What is finished is written to the output folder at once.
Benchmarks and tests are part of a checkout, not of the installed package.
"""

import itertools
import signal
import tempfile
import threading
import time
from pathlib import Path

from medmax_fast.bench.run import RESULT, Run
from medmax_fast.bench.stages import SUITES, Stage
from medmax_fast.bench.table import cells, results_name
from medmax_fast.config import BenchConfig
from medmax_fast.progress import Progress
from medmax_fast.runtime import Incomplete, InputError, info, print_table


def bench(config: BenchConfig) -> dict:
    """Run the command; returns the rows of evidence, the stages, and what each benchmark gave.

    Raises InputError, or Incomplete once everything has run, if a stage was red, failed or not reached.
    """
    root, suite = checkout(), _suite(config)
    stages = choose(suite, config.stages)
    if config.limit < 0:
        raise InputError(f"--limit {config.limit:g}: expected seconds, or 0 for none")
    if config.output and (Path(config.output) / RESULT).exists():
        raise InputError(f"{Path(config.output) / RESULT}: a run is there already; choose another --output")
    # As Ctrl-C does, a request to end must stop the process that is being measured.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    deadline = time.monotonic() + (config.limit or float("inf"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(config.output or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(root, suite, config.dry, folder, bool(config.output), deadline)
        try:
            with Progress("bench (stages)", len(stages)) as bar:
                for _, group in itertools.groupby(stages, key=lambda stage: stage.module):
                    group = list(group)
                    # Collecting tests takes little beside starting pytest, so a dry run collects all of them at once.
                    _run(run, group, stages if run.dry else group)
                    bar.update(len(run.stages))
            # The tests marked gpu that guard no stage come last.
            if suite == "gpu" and not config.stages:
                run.test(_other_tests(run), guards=False)
                run.save()
        except KeyboardInterrupt:
            # Unlike other commands, none goes on in a folder that holds a run.
            kept = f"what was finished is kept in {folder}" if config.output else "without --output nothing is kept"
            raise KeyboardInterrupt(kept) from None
    return _summary(run, config)


def choose(suite: str, names: tuple[str, ...]) -> list[Stage]:
    """The stages of a suite with these names, all without any; InputError for a name that it does not have."""
    known = {stage.name: stage for stage in SUITES[suite]}
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"{unknown[0]}: no stage of the {suite} suite, expected some of {', '.join(known)}")
    return [stage for stage in known.values() if not names or stage.name in names]


def checkout() -> Path:
    """The folder with benchmarks/ and tests/: the current one, or the one that an editable installation points to."""
    for folder in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (folder / "benchmarks" / "harness.py").is_file() and (folder / "tests" / "conftest.py").is_file():
            return folder
    raise InputError(f"{Path.cwd()}: no benchmarks/ and tests/ here; run this in a checkout of medmax_fast")


def _suite(config: BenchConfig) -> str:
    import torch

    gpu = torch.cuda.is_available()
    if config.suite == "gpu" and not (gpu or config.dry):
        raise InputError("--suite gpu: torch sees no GPU; --dry shows that the suite runs")
    return config.suite if config.suite != "auto" else "gpu" if gpu else "cpu"


def _run(run: Run, stages: list[Stage], guarded: list[Stage]) -> None:
    """Tests of `guarded`, then benchmark; what is not finished when the user interrupts is noted as such."""
    try:
        run.test([guard for stage in guarded for guard in stage.guards])
        run.measure(stages)
    except KeyboardInterrupt:
        ended = {stage["stage"] for stage in run.stages}
        for stage in stages:
            if stage.name not in ended:
                run.end(stage.name, "interrupted")
        raise
    finally:
        run.save()


def _other_tests(run: Run) -> list[str]:
    """Test modules with tests marked gpu that have not run yet."""
    files = sorted((run.root / "tests").glob("test_*.py"))
    names = [path.stem.removeprefix("test_") for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]
    return [name for name in names if name not in run.red]


def _summary(run: Run, config: BenchConfig) -> dict:
    """Prints the table; Incomplete if not every stage is done or a test is red."""
    result = run.result()
    if run.dry:
        print("dry run: sizes are tiny and kernels are interpreted; the times mean nothing")
    if run.rows:
        print_table([cells(row) for row in run.rows])
    unfinished = [f"{stage['stage']} ({stage['status']})" for stage in run.stages if stage["status"] != "done"]
    red = [name for names in run.red.values() for name in names]
    if config.output and run.rows and not run.dry:
        info(f"to keep it: cp {Path(config.output) / RESULT} benchmarks/results/{results_name(result)}")
    result["printed"] = ("rows", "benchmarks")
    if unfinished or red:
        words = [f"{len(unfinished)} of {len(run.stages)} stages not done: {', '.join(unfinished)}"] * bool(unfinished)
        words += [f"{len(red)} tests red: {', '.join(red)}"] * bool(red)
        raise Incomplete(result, "; ".join(words))
    return result

"""One run of a suite: tests and benchmarks in processes of their own, and what has come of them so far.

The processes have the checkout at the end of their path, so that the package they test and measure is the one that is
installed. Past the deadline, tests at a share of the time that is left, the running one is stopped; a benchmark writes
its result after every section, and what it has written by then counts.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from medmax_fast.bench.stages import Stage
from medmax_fast.bench.table import markdown, measured, rows_problem
from medmax_fast.figures import roofline
from medmax_fast.files import atomic_path, read_json, write_json
from medmax_fast.runtime import info, log, one_line

RESULT, TABLE, ROOFLINE, LOG = "benchmark.json", "table.md", "roofline.png", "log.txt"
# Seconds below which nothing more is begun.
SHORTEST = 5.0
# Test processes on one GPU, each with half a gigabyte of it and a core on which it compiles kernels; and for a module.
# Each takes seconds to start.
WORKERS, MODULE_WORKERS = 16, 4
# Seconds after which a test hangs: its process is ended, and another one goes on with the next test.
HANGS = 150
# What tests may take of the time that is left: if they never end, there are other stages.
TESTS_SHARE = 0.65
NOT_RUN = "its tests were not finished"
_MODULE = (
    "import runpy, sys; root, name = sys.argv[1:3]; del sys.argv[1:3]; sys.path.append(root); "
    "runpy.run_module(name, None, '__main__', True)"
)


@dataclass
class Run:
    """A suite as far as it has come.

    folder: for the log, what processes leave and, if `keep`, the result. deadline: of time.monotonic(). red: of every
    test module that has run, its red tests, or why it has no result. rows: of evidence. benchmarks: what each of them
    wrote. stages: what became of each, with a status of `done`, `red` (its tests), `failed` (the benchmark itself),
    `limit` (not reached, or stopped) or `interrupted`.
    """

    root: Path
    suite: str
    dry: bool
    folder: Path
    keep: bool
    deadline: float
    started: float = field(default_factory=time.monotonic)
    stages: list[dict] = field(default_factory=list)
    red: dict[str, list[str]] = field(default_factory=dict)
    passed: dict[str, int] = field(default_factory=dict)
    rows: list[dict] = field(default_factory=list)
    benchmarks: dict[str, dict] = field(default_factory=dict)

    def result(self) -> dict:
        """What benchmark.json holds."""
        environments = [found["environment"] for found in self.benchmarks.values() if "environment" in found]
        return {
            "benchmark": self.suite,
            "dry": self.dry,
            "date": time.strftime("%Y-%m-%d"),
            "seconds": time.monotonic() - self.started,
            "environment": environments[0] if environments else {},
            "stages": self.stages,
            "tests": {name: {"passed": self.passed[name], "red": red} for name, red in self.red.items()},
            "rows": self.rows,
            "benchmarks": self.benchmarks,
        }

    def save(self) -> None:
        """Write result, table and figure, if they are kept."""
        if not self.keep:
            return
        result = self.result()
        write_json(self.folder / RESULT, result)
        with atomic_path(self.folder / TABLE) as temporary:
            temporary.write_text(markdown(result) + "\n", encoding="utf-8")
        if rows := measured(result):
            roofline(rows, self.folder / ROOFLINE)

    def end(self, stage: str, status: str, reason: str = "", seconds: float = 0.0) -> None:
        """Note what became of a stage."""
        self.stages.append({"stage": stage, "status": status, "reason": reason, "seconds": seconds})
        say = info if status == "done" else log
        say(f"{stage}: {status}" + f" ({reason})" * bool(reason))

    def test(self, modules: Sequence[str], guards: bool = True) -> None:
        """Run the tests marked gpu of modules that have not run yet; in a dry run they are collected only.

        guards: stages wait for them. Else they may take all the time there is, and skip every test.
        """
        modules = [name for name in dict.fromkeys(modules) if name not in self.red]
        # pytest runs nothing at all if one of its files is missing.
        for name in [name for name in modules if not (self.root / "tests" / f"test_{name}.py").is_file()]:
            self.passed[name], self.red[name] = 0, [f"test_{name}: no such file in tests/"]
            modules.remove(name)
        if not modules or self._left() < SHORTEST:
            return
        began = time.monotonic()
        # A module that cannot be imported must not stop the others.
        options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        report = self.folder / f"tests-{os.getpid()}.xml"
        options.append(f"--junitxml={report}")
        if self.dry:
            options.append("--collect-only")
        elif find_spec("xdist"):
            options += ["-n", str(min(WORKERS, MODULE_WORKERS * len(modules), os.cpu_count() or 1))]
            if find_spec("pytest_timeout"):
                options += [f"--timeout={HANGS}", "--timeout-method=thread"]
        files = [f"tests/test_{name}.py" for name in modules]
        status = self._process("pytest", [*options, *files], (TESTS_SHARE if guards else 1.0) * self._left())
        found = read_tests(report) if report.is_file() else {}
        report.unlink(missing_ok=True)
        for name in modules:
            passed, red = found.get(name, (0, []))
            if status is None:
                red = red or [NOT_RUN]
            elif self.dry:
                # The report has only what cannot be collected.
                red = [f"test_{name}: cannot be collected"] if red or (status and not found) else []
            elif guards and not passed and not red:
                red = [f"test_{name}: none of its tests ran"]
            self.passed[name], self.red[name] = passed, red
        reds = [red for name in modules for red in self.red[name]]
        words = "; ".join(reds) or ("collected" if self.dry else f"{sum(self.passed[name] for name in modules)} green")
        say = log if reds else info
        say(f"tests of {', '.join(modules)}: {words} ({time.monotonic() - began:.0f} s)")

    def measure(self, stages: Sequence[Stage]) -> None:
        """Run stages of one module together, those whose tests are red left out."""
        green = []
        for stage in stages:
            reds = [red for guard in stage.guards for red in self.red.get(guard, [NOT_RUN])]
            if reds:
                self.end(stage.name, "limit" if NOT_RUN in reds else "red", "; ".join(dict.fromkeys(reds)))
            else:
                green.append(stage)
        if green and self._left() < SHORTEST:
            for stage in green:
                self.end(stage.name, "limit", "not reached")
        elif green:
            self._benchmark(green)

    def _benchmark(self, stages: Sequence[Stage]) -> None:
        module, began = stages[0].module, time.monotonic()
        names = [stage.name for stage in stages]
        report = self.folder / f"{module}-{os.getpid()}.json"
        arguments = ["--output", str(report)]
        if stages[0].section:
            arguments += ["--only", ",".join(names)]
        if self.dry:
            arguments.append("--quick")
        status = self._process(f"benchmarks.bench_{module}", arguments, self._left())
        found = read_json(report) if report.is_file() else {}
        report.unlink(missing_ok=True)
        if found:
            self.benchmarks[module if module not in self.benchmarks else f"{module} from {names[0]}"] = found
        rows, failed = found.get("evidence", []), found.get("failed", {})
        if wrong := rows_problem(rows):
            rows, failed = [], dict.fromkeys(names, f"benchmarks/bench_{module}.py: evidence: {wrong}")
        self.rows += rows
        there = {row["stage"] for row in rows}
        # Of one that was stopped or died only these are whole; the last one may lack rows.
        took = found.get("section_s", {})
        ended = names if status == 0 else took
        again = self._spared(stages, found | {"failed": failed}) if status else []
        for name in names[: len(names) - len(again)]:
            seconds = took.get(name, (time.monotonic() - began) / len(stages))
            if name in failed:
                # A reason, or one for each shape that failed.
                reasons = failed[name] if isinstance(failed[name], list) else [failed[name]]
                self.end(name, "failed", "; ".join(one_line(reason) for reason in reasons), seconds)
            elif (name in there and name in ended) or (status == 0 and not stages[0].section):
                self.end(name, "done", "", seconds)
            elif status is None:
                self.end(name, "limit", "stopped", seconds)
            else:
                without = "before its end" if name in there else "without a row of it"
                self.end(name, "failed", f"exit status {status} {without}; see the log", seconds)
        if again:
            self.measure(again)

    @staticmethod
    def _spared(stages: Sequence[Stage], found: dict) -> Sequence[Stage]:
        """Stages to run in another process: a stage that took its process or its GPU along spares those behind it."""
        took = found.get("section_s", {})
        begun = len([stage for stage in stages if stage.name in took or stage.name in found["failed"]])
        if not took:
            # Nothing has run: why should it the next time.
            return []
        return stages[begun if found.get("gpu_lost") else begun + 1 :]

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _process(self, module: str, arguments: Sequence[str], limit: float) -> int | None:
        """Exit status of a module run in the checkout's root; None if it was stopped after so many seconds."""
        environment = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        if self.dry:
            # The interpreter gains nothing from threads, and loses by those of two processes on the same cores.
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _MODULE, str(self.root), module, *arguments]
        with open(self.folder / LOG, "a", encoding="utf-8") as out:
            out.write(f"$ {module} {' '.join(arguments)}\n")
            out.flush()
            # A session of its own, so that its workers end with it.
            process = subprocess.Popen(
                command, cwd=self.root, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                return process.wait(None if limit == float("inf") else max(limit, 0.0))
            except subprocess.TimeoutExpired:
                return None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def read_tests(report: Path) -> dict[str, tuple[int, list[str]]]:
    """Of each test module in a JUnit file: how many tests passed, and the names of those that did not."""
    found: dict[str, tuple[int, list[str]]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        # tests.test_vq, or tests.test_vq.TestClass; a module that cannot be imported has its name there alone.
        path = (case.get("classname") or case.get("name") or "").split(".")
        module = next((part.removeprefix("test_") for part in path if part.startswith("test_")), "")
        passed, red = found.get(module, (0, []))
        if case.find("failure") is not None or case.find("error") is not None:
            red = [*red, f"test_{module}: {case.get('name')}"]
        elif case.find("skipped") is None:
            passed += 1
        found[module] = passed, red
    return found

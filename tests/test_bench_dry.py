"""The GPU suite as `make gpu` runs it, dry: every stage behind its tests, Triton's kernels in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from quick_run import keep

from medmax_fast.bench.stages import SUITES

pytest.importorskip("triton", reason="triton is not installed")
ROOT = Path(__file__).resolve().parents[1]


def test_the_whole_suite_runs_dry(tmp_path, tmp_path_factory):
    from benchmarks.goals import GOALS

    command = [
        sys.executable,
        "-m",
        "medmax_fast",
        "bench",
        "--suite",
        "gpu",
        "--dry",
        "--output",
        str(tmp_path / "out"),
    ]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr + (tmp_path / "out" / "log.txt").read_text()[-8000:]
    result = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert result["dry"] and [stage["stage"] for stage in result["stages"]] == [stage.name for stage in SUITES["gpu"]]
    assert result["tests"] and not any(test["red"] for test in result["tests"].values())
    # Kernels were ours, not their references, and every stage has a form to be compared with.
    for stage in SUITES["gpu"]:
        rows = [row for row in result["rows"] if row["stage"] == stage.name]
        assert any(row["form"].startswith(("ours", "medmax", "packed")) for row in rows), stage.name
        assert any(row["beside"] and row["beside"] != row["form"] for row in rows), stage.name
        assert all(row["quality"] for row in rows if row["form"].startswith("ours")), stage.name
        # A wait has no floor, and compiling has none.
        assert all(row["share"] or row["form"].endswith("the wait") for row in rows) or stage.name == "compile"
    # Every goal reads what rows of its stage have; what only a GPU has is there without a value.
    for goal in GOALS:
        rows = [row for row in result["rows"] if row["stage"] == goal.stage]
        for name in (goal.quantity, goal.limit) if isinstance(goal.limit, str) else (goal.quantity,):
            outer, _, inner = name.partition(".")
            assert any(outer in row and (not inner or inner in row[outer]) for row in rows), (goal.name, name)
    assert "the times mean nothing" in (tmp_path / "out" / "table.md").read_text()
    assert json.loads(run.stdout.splitlines()[-1])["rows"] == result["rows"]
    # All tests are collected in two starts of pytest, those of the stages first.
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("\n$ pytest ") + log.startswith("$ pytest ") == 2
    # What each benchmark wrote is what it printed.
    printed = [json.loads(line) for line in log.splitlines() if line.startswith('{"benchmark": ')]
    assert {found["benchmark"]: found for found in printed} == result["benchmarks"]
    keep(result["benchmarks"], tmp_path_factory)


def test_stages_for_a_cpu_run_dry(tmp_path):
    # Of those that have no test of their own the quick ones.
    command = [sys.executable, "-m", "medmax_fast", "bench", "packing", "collate", "--suite", "cpu", "--dry"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert [(stage["stage"], stage["status"]) for stage in result["stages"]] == [
        ("packing", "done"),
        ("collate", "done"),
    ]
    assert result["benchmarks"]["packing"]["rows"] and {row["stage"] for row in result["rows"]} == {"collate"}

"""A benchmark run with --quick in a process of its own, without a GPU: what it wrote is what it printed last.

test_bench_dry.py runs some of them as well. What it leaves with `keep` is what `kept` gives to other tests of the
session, so that a run of all sections need not be made again; where that test has not run, they make their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from medmax_fast.files import write_json

ROOT = Path(__file__).resolve().parents[1]


def quick_run(stem: str, folder: Path) -> dict:
    """The JSON of benchmarks/bench_<stem>.py; AssertionError if it fails."""
    output = folder / f"{stem}.json"
    command = [sys.executable, "-m", f"benchmarks.bench_{stem}", "--quick", "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert printed.returncode == 0, printed.stdout + printed.stderr
    result = json.loads(output.read_text())
    assert json.loads(printed.stdout.splitlines()[-1]) == result
    return result


def keep(results: dict[str, dict], factory) -> None:
    """Leave what benchmarks wrote, by stem, to the session's tests; factory: the fixture tmp_path_factory."""
    write_json(_place(factory), results)


def kept(stem: str, factory) -> dict | None:
    """What `keep` was given of a benchmark in this session, None if that has not been."""
    place = _place(factory)
    return json.loads(place.read_text()).get(stem) if place.is_file() else None


def _place(factory) -> Path:
    base = factory.getbasetemp()
    # The folders of xdist's workers have this parent in common.
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "quick_runs.json"

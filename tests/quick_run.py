"""A benchmark run with --quick in a process of its own, without a GPU: what it wrote is what it printed last."""

import json
import os
import subprocess
import sys
from pathlib import Path

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

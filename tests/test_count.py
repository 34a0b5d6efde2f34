"""The CUDA side counted on fake tensors: no host sync, the floors' work and no more, memory; and the tally itself."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("peft", reason="peft is not installed: pip install 'medmax_fast[train]'")
ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]
H200_BYTES = 141e9
VALUE = 4 * 1024


def run(*command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def checks():
    return json.loads(run("-m", "fake_gpu_checks").splitlines()[-1])


@pytest.mark.parametrize("mode", ["", "inference: "])
@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "add": {"moved": 3 * VALUE, "operations": 1},
        "in place": {"moved": 3 * VALUE, "operations": 1},
        "out": {"moved": 3 * VALUE, "operations": 1},
        "view": {"moved": 0, "operations": 0},
        "fill": {"moved": VALUE, "operations": 1},
        "expanded": {"moved": 2 * VALUE + 4, "operations": 1},
        # Eight rows of four values read and written, and eight int64 made and read.
        "rows": {"moved": 2 * 8 * 16 + 2 * 8 * 8, "operations": 2},
        "kernel": {"moved": 2 * VALUE, "operations": 1},
        "graph": {"moved": 3 * 3 * VALUE, "operations": 3},
        "product": {"moved": 3 * VALUE, "operations": 1, "flop": 2 * 32**3},
        "convolution": {"moved": 2 * VALUE + 576, "operations": 1, "flop": 2 * 1024 * 36},
        "with bias": {"moved": 4 * VALUE + 576 + 16, "operations": 2, "flop": 2 * 1024 * 36},
        "item": {"syncs": 1},
        "where": {"syncs": 1},
        "booleans": {"syncs": 1},
        "element": {"syncs": 1},
        "element of an index": {"syncs": 1},
        "slice": {"syncs": 0},
        "to the host": {"syncs": 1},
        "from the host": {"syncs": 1},
        "from pinned memory": {"syncs": 0, "waits": 0},
        "made of a list": {"syncs": 1},
        "synchronize": {"syncs": 1},
        "event": {"syncs": 0, "waits": 1},
    }.items(),
)
def test_the_tally(checks, mode, name, expected):
    assert {key: checks[mode + name][key] for key in expected} == expected


def test_the_tally_of_backward_passes_and_memory(checks):
    # One product forward, one of the two back: x wants no gradient.
    assert checks["backward"]["flop"] == 2 * 2 * 32**3 and checks["backward"]["syncs"] == 0
    assert checks["refused"]["syncs"] == 0
    assert checks["memory"] == {"peak": 3 << 22, "held": 1 << 22, "kept": 1}


def test_codes_are_waited_for_and_not_the_batch_behind_them():
    batches = json.loads(run("-m", "fake_gpu_tokenize").splitlines()[-1])
    assert len(batches) == 3
    for batch in batches:
        assert batch["syncs"] == {} and batch["begun"] == 0 and batch["codes"] == [2, 1024]
        assert batch["waits"] == {"event at medmax_fast/encoding.py, wait": 1}


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """Rows by stage and shape."""
    path = tmp_path_factory.mktemp("count") / "count.json"
    run("-m", "benchmarks.count", "--output", str(path))
    return json.loads(path.read_text())


def test_the_host_waits_for_nothing_but_the_step_before_the_last(counted):
    for row in counted["rows"]:
        assert row["syncs"] == {}, row["shape"]
        one = 1 if row["stage"] in ("text", "pictures") else 0
        assert sum(row["waits"].values()) == one, row["shape"]


def test_nothing_is_computed_twice_or_read_twice(counted):
    for row in counted["rows"]:
        again = 0.5 if row["shape"].endswith("recompute layers") else 0.0
        # Attention is in the floor of prompts and of the encoder and not in the count, or counted as products.
        assert 0.97 <= row["times_floor_flop"] <= 1.03 + again, row["shape"]
        if row["stage"] in ("text", "pictures"):
            assert 1 <= row["times_floor_bytes"] <= 1.05, row["shape"]


def test_a_pack_fits_one_gpu_with_all_activations_kept(counted):
    memory = {row["shape"].split()[-1]: row["memory_bytes"] for row in counted["rows"] if row["stage"] == "train"}
    assert memory["layers"] < memory["selective"] < memory["none"] < 0.9 * H200_BYTES


def test_the_report_is_of_this_code(counted):
    """benchmarks/roofline.md shows what was counted for it."""
    newest = max((ROOT / "benchmarks" / "results").glob("count_*.json"), key=lambda path: path.stem[-6:])
    kept = json.loads(newest.read_text())
    ours, theirs = (result["environment"]["versions"] for result in (counted, kept))
    if any(ours[name] != theirs[name] for name in ("torch", "triton", "transformers", "peft")):
        pytest.skip("counted with other versions: python -m benchmarks.count")
    assert counted["rows"] == kept["rows"], "python -m benchmarks.count --output anew, then benchmarks.render"

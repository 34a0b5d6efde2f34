"""The tuner of block sizes: every op of the table has candidates, wrong ones are left out, what is printed is right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medmax_fast.kernels.blocks import TABLE, blocks, entry, override

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture()
def tune():
    from benchmarks import tune

    return tune


def test_runs_on_tiny_shapes_in_the_interpreter(tune, tmp_path):
    output = tmp_path / "tune.json"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.tune", "span", "swiglu", "--quick", "--seed", "3"]
    command += ["--output", str(output)]
    printed = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    found = json.loads(output.read_text())
    assert json.loads(printed.stdout.splitlines()[-1]) == found
    assert found["benchmark"] == "tune" and found["seed"] == 3 and found["lines"] == []
    assert found["left_out"] == found["failed"] == {} and list(found["op_s"]) == ["span", "swiglu"]
    shapes = {"span": 1, "swiglu": 2}
    for op, count in shapes.items():
        rows = [row for row in found["rows"] if row["op"] == op]
        candidates = [tune.CURRENT, *tune.GRIDS[op].candidates]
        assert [row["candidate"] for row in rows] == candidates * count
        assert len({row["shape"] for row in rows}) == count
        for row in rows:
            assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"] and 0 < row["share"] < 1
            (current,) = [r for r in rows if r["shape"] == row["shape"] and r["candidate"] == tune.CURRENT]
            assert row["times"] == pytest.approx(current["p50_s"] / row["p50_s"])


@pytest.mark.parametrize(
    ("arguments", "interpret", "message"),
    [
        (("--quick",), False, "no GPU: expected one, or TRITON_INTERPRET=1 and --quick"),
        ((), True, "TRITON_INTERPRET=1: expected --quick, or a GPU and the compiler"),
        (("swiglu", "swish", "--quick"), True, "swish: expected some of vq_measure, vq_screen"),
    ],
)
def test_refuses(tune, arguments, interpret, message, monkeypatch, capsys):
    monkeypatch.setattr(tune, "INTERPRETED", interpret)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune", *arguments])
    with pytest.raises(SystemExit) as error:
        tune.main()
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_every_op_of_the_table_has_candidates_that_are_others(tune):
    assert set(tune.GRIDS) == set(TABLE)
    for op, grid in tune.GRIDS.items():
        assert grid.stage in tune.STAGES and tune.STAGES[grid.stage]("quick")[grid.cases], op
        assert 3 <= len(grid.candidates) == len(set(grid.candidates)) <= 8
        for candidate in grid.candidates:
            numbers = tune.numbers_of(candidate)
            with override(op, **numbers):
                found = blocks(op, CPU)
            assert numbers.items() <= found.items()
            assert found not in [entry(op, capability).numbers for capability in TABLE[op]], (op, candidate)
    assert tune.numbers_of(tune.CURRENT) == {}
    assert tune.numbers_of("TILE=2048 num_warps=8") == {"TILE": 2048, "num_warps": 8}


@pytest.fixture()
def case(tune):
    """An op that gives its TILE, of which 1024 and 2048 are right; 4096 does not fit, 512 does not compile."""
    from benchmarks.cases.case import Case, Form, Work

    seen = []

    def make(draw):
        def ours():
            tile = blocks("swiglu", CPU)["TILE"]
            seen.append(tile)
            if tile == 4096:
                raise RuntimeError("shared memory, required: 300000, hardware limit: 232448")
            if tile == 512:
                raise ValueError("does not compile")
            return torch.tensor(tile)

        def judge(work, name, found):
            assert work.forms["plain"].call() == 0
            if int(found) not in (1024, 2048):
                raise AssertionError(f"{name} gives {int(found)}")
            return {"off": 0}

        return Work({"ours": Form(ours, own=True), "plain": Form(lambda: 0)}, "plain", judge)

    return Case("swiglu", "any", 100.0, 0.0, make), seen


def test_candidates_that_are_wrong_or_fail_are_named_and_left_out(tune, case):
    case, seen = case
    draw, roofline = tune.Draw("cpu", 1), tune.Roofline(1e9, 1e9)
    candidates = [f"TILE={tile}" for tile in (512, 2048, 4096, 8192)]
    rows, left_out = tune.measure("swiglu", case, candidates, draw, roofline, 2)
    assert [row["candidate"] for row in rows] == [tune.CURRENT, "TILE=2048"]
    assert rows[0]["times"] == 1.0 and rows[1]["quality"] == "off 0"
    assert rows[0]["share"] == pytest.approx(1e-7 / rows[0]["p50_s"])
    assert left_out == {
        "TILE=512": "any: ValueError: does not compile",
        "TILE=4096": "any: RuntimeError: shared memory, required: 300000, hardware limit: 232448",
        "TILE=8192": "any: AssertionError: TILE=8192 gives 8192",
    }
    # What is timed runs under the candidate's numbers, in turns with the entry's.
    timed = seen[5:]
    assert timed == [1024, 2048] * (len(timed) // 2) and len(timed) >= 4
    assert blocks("swiglu", CPU) == entry("swiglu", 90).numbers


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["span", "swiglu", "paged_splits"])
def test_candidates_on_a_gpu(tune, op):
    grid = tune.GRIDS[op]
    cases = tune.STAGES[grid.stage]("quick")[grid.cases]
    draw, roofline = tune.Draw("cuda", 1), tune.Roofline(1e12, 1e14)
    rows, left_out = tune.measure(op, cases[0], list(grid.candidates), draw, roofline, 2)
    assert [row["candidate"] for row in rows] == [tune.CURRENT, *grid.candidates] and not left_out


def main_of(tune, monkeypatch, tmp_path, *ops: str) -> tuple[int, dict]:
    """Exit status and result of a run of these ops in this process."""
    output = tmp_path / "tune.json"
    monkeypatch.setattr(sys, "argv", ["tune", *ops, "--quick", "--output", str(output)])
    monkeypatch.setattr(tune, "INTERPRETED", True)
    with pytest.raises(SystemExit) as error:
        tune.main()
    return error.value.code, json.loads(output.read_text())


def test_a_failed_op_leaves_the_others(tune, case, monkeypatch, tmp_path, capsys):
    case, _ = case
    grids = {"swiglu": tune.grid("good", "TILE=2048, TILE=512"), "span": tune.grid("bad", "BLOCK=512")}

    def broken(draw):
        raise RuntimeError("the entry itself does not run")

    monkeypatch.setattr(tune, "GRIDS", grids)
    monkeypatch.setattr(
        tune, "STAGES", {"good": lambda size: [case, case], "bad": lambda size: [tune.replace(case, make=broken)]}
    )
    code, found = main_of(tune, monkeypatch, tmp_path, "span", "swiglu")
    assert code == 1 and found["failed"] == {"span": "RuntimeError: the entry itself does not run"}
    # Left out on the first shape, it is not tried on the second.
    assert [row["candidate"] for row in found["rows"]] == [tune.CURRENT, "TILE=2048"] * 2
    assert list(found["left_out"]) == ["swiglu"] and list(found["left_out"]["swiglu"]) == ["TILE=512"]
    assert "left out: swiglu TILE=512: any: ValueError: does not compile" in capsys.readouterr().out
    assert main_of(tune, monkeypatch, tmp_path, "swiglu")[0] == 0


def rows_of(**times: list[float]) -> list[dict]:
    return [{"candidate": name, "times": value} for name, found in times.items() for value in found]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"current": [1.0, 1.0], "a": [1.2, 1.1], "b": [1.1, 1.1]}, "a"),
        # Not enough; more in all, but a loss on one shape; not right on one shape.
        ({"current": [1.0, 1.0], "a": [1.01, 1.02]}, "current"),
        ({"current": [1.0, 1.0], "a": [1.9, 0.9], "b": [1.05, 1.0]}, "b"),
        ({"current": [1.0, 1.0], "a": [1.9]}, "current"),
        ({"current": [1.0, 1.0], "a": [0.5, 0.6]}, "current"),
    ],
)
def test_best(tune, times, expected):
    assert tune.best(rows_of(**times), 2) == expected


def test_lines_are_what_the_table_takes(tune):
    line = tune.line("swiglu", {"TILE": 2048, "num_warps": 8}, 90, "tune_h200_202611.json")
    assert line == '"swiglu": {90: Entry("tune_h200_202611.json", TILE=2048, num_warps=8)}'

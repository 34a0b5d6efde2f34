"""`medmax bench`: stages behind their tests, limits and interruptions, what is kept, and the tables."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from medmax_fast.bench import command, table
from medmax_fast.bench.run import read_tests
from medmax_fast.bench.stages import SUITES, Stage
from medmax_fast.cli import main
from medmax_fast.config import BenchConfig
from medmax_fast.runtime import Incomplete, InputError

ROOT = Path(__file__).resolve().parents[1]

# A benchmark of sections: writes its result after each, as the real ones do; `slow` never ends, `bad` is wrong, and
# `half` ones have written some rows before.
BENCHMARK = """
import argparse, json, os, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("--only"); parser.add_argument("--output"); parser.add_argument("--quick", action="store_true")
arguments = parser.parse_args()
row = {"shape": "2x3", "form": "ours", "p20_s": 1e-3, "p50_s": 2e-3, "p80_s": 3e-3, "gb_per_s": 5.0, "unit": None}
row |= dict.fromkeys(("tflop_per_s", "items_per_s", "moved_bytes", "flop", "floor_s"))
row |= {"share": 0.5, "bound": "copy", "beside": "torch", "times": 2.0, "quality": {"codes_differing": 0}}
rows, failed, ended = [], {}, {}
for name in arguments.only.split(","):
    if name == "slow":
        open("slow-began", "w").close()
        time.sleep(600)
    if name == "dead":
        sys.exit(9)
    if name == "shapeless":
        del row["shape"]
    if name in ("bad", "lost"):
        failed[name] = "3 codes differ"
    else:
        rows.append({"stage": name, **row, "quick": arguments.quick, "interpret": os.environ.get("TRITON_INTERPRET")})
    if not name.startswith("half"):
        ended[name] = 1.0
    with open(arguments.output, "w") as file:
        found = {"environment": {"cpu": "abacus", "cores": 1}, "evidence": rows, "failed": failed, "section_s": ended}
        json.dump(found | {"gpu_lost": name == "lost"}, file)
    if name == "lost":
        break
    if name == "half slow":
        time.sleep(600)
    if name == "half dead":
        sys.exit(9)
    if name == "half raised":
        raise EOFError
sys.exit(bool(failed))
"""
TESTS = """
import pytest
pytestmark = pytest.mark.gpu
def test_right(): assert {right}
def test_more(): pass
"""


@pytest.fixture()
def checkout(tmp_path, monkeypatch):
    """A small checkout with a suite of its own; gives its root. Tests need no GPU there."""
    for name, text in {
        "benchmarks/harness.py": "",
        "benchmarks/bench_fake.py": BENCHMARK,
        "benchmarks/bench_other.py": BENCHMARK,
        "tests/conftest.py": "",
        "tests/test_good.py": TESTS.format(right=True),
        "tests/test_wrong.py": TESTS.format(right=False),
        "tests/test_broken.py": "import nothing_of_this_name\n",
        "tests/test_none.py": "def test_cpu(): pass\n",
        "tests/test_skipped.py": "import pytest\n@pytest.mark.gpu\ndef test_dali(): pytest.skip('no DALI')\n",
        "tests/test_quoted.py": "TEXT = '@pytest.mark.gpu'\n",
        "tests/test_extra.py": "import pytest\n@pytest.mark.gpu\ndef test_extra(): pass\n",
        "pytest.ini": "[pytest]\nmarkers = gpu\naddopts = --import-mode=importlib\n",
    }.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    suite = [Stage("one", "fake", ("good",)), Stage("two", "fake", ("good", "wrong")), Stage("bad", "fake", ("good",))]
    suite += [Stage("three", "other", ("good",))]
    monkeypatch.setitem(SUITES, "gpu", suite)
    monkeypatch.setattr(command, "_suite", lambda config: "gpu")
    monkeypatch.chdir(tmp_path / "checkout")
    # Starts faster; one test has them all.
    monkeypatch.setattr("medmax_fast.bench.run.find_spec", lambda name: None)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return tmp_path / "checkout"


def run(*stages: str, **options) -> tuple[dict, str]:
    """(result, complaint) of the command."""
    try:
        return command.bench(BenchConfig(stages=stages, **options)), ""
    except Incomplete as left:
        return left.result, str(left)


def status_of(result: dict) -> dict[str, str]:
    return {stage["stage"]: stage["status"] for stage in result["stages"]}


def test_a_red_test_prints_no_speed(checkout, tmp_path, capsys):
    result, complaint = run(output=str(tmp_path / "out"))
    assert status_of(result) == {"two": "red", "one": "done", "bad": "failed", "three": "done"}
    assert [row["stage"] for row in result["rows"]] == ["one", "three"]
    assert result["tests"]["wrong"] == {"passed": 1, "red": ["test_wrong: test_right"]}
    # Tests that guard nothing ran too, once each.
    assert result["tests"]["good"]["passed"] == 2 and result["tests"]["extra"]["passed"] == 1
    # Nor is it red that nothing of them can run here.
    assert result["tests"]["skipped"]["red"] == result["tests"]["quoted"]["red"] == []
    assert "2 of 4 stages not done: two (red), bad (failed)" in complaint and "test_wrong: test_right" in complaint
    out = capsys.readouterr().out
    assert "2 ms (1 ms to 3 ms)" in out and "two" not in out and "codes differing 0" in out
    kept = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert kept["rows"] == result["rows"] and kept["environment"]["cpu"] == "abacus"
    text = (tmp_path / "out" / "table.md").read_text()
    assert "- bad: failed 3 codes differ" in text and "| one | 2x3 | ours |" in text
    assert not list((tmp_path / "out").glob("*-[0-9]*"))
    assert "assert False" in (tmp_path / "out" / "log.txt").read_text()


def test_the_command_line_says_what_is_missing(checkout, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    monkeypatch.setattr("medmax_fast.bench.run.find_spec", find_spec)
    assert main(["bench", "one", "two", "--output", str(tmp_path / "out")]) == 3
    captured = capsys.readouterr()
    assert "medmax bench: 1 of 2 stages not done: two (red)" in captured.err
    assert [row["stage"] for row in json.loads(captured.out.splitlines()[-1])["rows"]] == ["one"]
    # Measurements are never mixed.
    assert main(["bench", "one", "--output", str(tmp_path / "out")]) == 2
    assert "a run is there already" in capsys.readouterr().err
    assert main(["bench", "one"]) == 0
    assert main(["bench", "nine"]) == 2
    assert "nine: no stage of the gpu suite, expected some of one, two, bad, three" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("guard", "reason"), [("broken", "test_broken"), ("none", "none of its tests ran"), ("absent", "no such file")]
)
def test_guards_that_prove_nothing_are_red(checkout, monkeypatch, guard, reason):
    monkeypatch.setitem(SUITES, "gpu", [Stage("one", "fake", ("good", guard))])
    result, _ = run("one")
    assert status_of(result) == {"one": "red"} and reason in result["stages"][0]["reason"]
    assert result["tests"]["good"]["red"] == []


@pytest.mark.parametrize(("name", "reason"), [("dead", "exit status 9"), ("lost", "3 codes differ")])
def test_a_stage_that_ends_its_process_ends_no_other(checkout, monkeypatch, name, reason):
    names = ("one", name, "two", name + " too", "three")
    monkeypatch.setitem(SUITES, "gpu", [Stage(name, "fake", ("good",)) for name in names])
    result, _ = run()
    assert status_of(result) == dict.fromkeys(names, "done") | {name: "failed"}
    assert reason in result["stages"][1]["reason"]
    assert [row["stage"] for row in result["rows"]] == [known for known in names if known != name]
    assert list(result["benchmarks"]) == ["fake", "fake from two"]


def test_a_benchmark_that_dies_at_once_is_not_tried_again(checkout, monkeypatch):
    monkeypatch.setitem(SUITES, "gpu", [Stage(name, "fake", ("good",)) for name in ("dead", "one")])
    result, _ = run()
    assert status_of(result) == {"dead": "failed", "one": "failed"} and result["benchmarks"] == {}


@pytest.mark.parametrize(
    ("half", "status"), [("half dead", "failed"), ("half raised", "failed"), ("half slow", "limit")]
)
def test_a_stage_that_ends_before_all_its_rows_is_not_done(checkout, monkeypatch, half, status):
    monkeypatch.setitem(SUITES, "gpu", [Stage("one", "fake"), Stage(half, "fake")])
    result, _ = run(limit=7)
    assert status_of(result) == {"one": "done", half: status}
    assert [row["stage"] for row in result["rows"]] == ["one", half]


def test_rows_that_are_none_do_not_end_the_run(checkout, monkeypatch):
    monkeypatch.setitem(SUITES, "gpu", [Stage("shapeless", "fake"), Stage("three", "other")])
    result, _ = run()
    assert status_of(result) == {"shapeless": "failed", "three": "done"}
    assert "no 'shape'" in result["stages"][0]["reason"] and [row["stage"] for row in result["rows"]] == ["three"]


def test_the_limit_keeps_what_is_finished(checkout, monkeypatch):
    names = {"one": "fake", "slow": "fake", "two": "fake", "three": "other"}
    monkeypatch.setitem(SUITES, "gpu", [Stage(name, module) for name, module in names.items()])
    began = time.monotonic()
    result, complaint = run(limit=8)
    assert time.monotonic() - began < 20
    assert status_of(result) == {"one": "done", "slow": "limit", "two": "limit", "three": "limit"}
    assert [row["stage"] for row in result["rows"]] == ["one"] and "slow (limit)" in complaint
    # Tests that never end are no reason to trust a stage, and leave time for others.
    monkeypatch.setitem(SUITES, "gpu", [Stage("one", "fake", ("hang",)), Stage("three", "other")])
    (checkout / "tests" / "test_hang.py").write_text(TESTS.format(right="__import__('time').sleep(99)"))
    monkeypatch.setattr("medmax_fast.bench.run.TESTS_SHARE", 0.35)
    result, _ = run("one", "three", limit=11)
    assert status_of(result) == {"one": "limit", "three": "done"}
    assert [row["stage"] for row in result["rows"]] == ["three"]


@pytest.mark.parametrize("request_to_end", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_keeps_what_is_finished(checkout, tmp_path, request_to_end):
    code = """if True:
        import sys
        from medmax_fast.bench import command
        from medmax_fast.bench.stages import SUITES, Stage
        from medmax_fast.cli import main
        SUITES["gpu"] = [Stage("three", "other"), Stage("one", "fake"), Stage("slow", "fake"), Stage("two", "fake")]
        command._suite = lambda config: "gpu"
        sys.exit(main(["bench", "--output", sys.argv[1]]))
    """
    command_line = [sys.executable, "-c", code, str(tmp_path / "out")]
    process = subprocess.Popen(command_line, cwd=checkout, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 60
    while not (checkout / "slow-began").exists():
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.1)
    process.send_signal(request_to_end)
    complaint = process.communicate(timeout=30)[1].splitlines()[-1]
    assert process.returncode == 130
    assert complaint == f"medmax bench: interrupted; what was finished is kept in {tmp_path / 'out'}"
    kept = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert status_of(kept) == {"three": "done", "one": "interrupted", "slow": "interrupted", "two": "interrupted"}
    assert [row["stage"] for row in kept["rows"]] == ["three"]
    running = subprocess.run(["pgrep", "-f", str(checkout)], capture_output=True, text=True, check=False).stdout
    assert not running, "the benchmark goes on"


def test_a_dry_run_collects_and_marks_itself(checkout, capsys):
    result, complaint = run("one", "two", dry=True)
    assert not complaint and status_of(result) == {"one": "done", "two": "done"}
    assert all(row["quick"] and row["interpret"] == "1" for row in result["rows"])
    assert "the times mean nothing" in capsys.readouterr().out
    assert "Dry run on abacus" in table.markdown(result)
    (checkout / "tests" / "test_wrong.py").write_text("import nothing_of_this_name")
    result, _ = run("one", "two", dry=True)
    assert status_of(result) == {"one": "done", "two": "red"}
    assert result["tests"]["wrong"]["red"] == ["test_wrong: cannot be collected"]


def test_a_dry_run_collects_the_tests_of_all_stages_at_once(checkout, tmp_path, monkeypatch):
    monkeypatch.setitem(SUITES, "gpu", [Stage("one", "fake", ("good",)), Stage("three", "other", ("extra",))])
    result, _ = run("one", "three", dry=True, output=str(tmp_path / "out"))
    assert status_of(result) == {"one": "done", "three": "done"} and result["tests"].keys() == {"good", "extra"}
    assert (tmp_path / "out" / "log.txt").read_text().count("$ pytest") == 1


def test_a_gpu_is_needed_but_for_a_dry_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "--suite", "gpu"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert command._suite(BenchConfig(suite="gpu", dry=True)) == "gpu"
    assert command._suite(BenchConfig()) == "cpu"
    assert main(["bench", "--limit", "-1"]) == 2
    monkeypatch.setattr(command, "__file__", str(tmp_path / "a" / "b" / "command.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="run this in a checkout"):
        command.checkout()


def test_suites_name_what_exists():
    for suite in SUITES.values():
        assert len({stage.name for stage in suite}) == len(suite)
        for stage in suite:
            assert (ROOT / "benchmarks" / f"bench_{stage.module}.py").is_file(), stage
            for guard in stage.guards:
                text = (ROOT / "tests" / f"test_{guard}.py").read_text()
                assert "mark.gpu" in text, f"{guard} guards {stage.name}, and nothing in it is marked gpu"
    assert all(stage.guards for stage in SUITES["gpu"])


def test_read_tests(tmp_path):
    (tmp_path / "t.xml").write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.test_vq" name="test_a[1]"/>
        <testcase classname="tests.test_vq" name="test_b"><failure/></testcase>
        <testcase classname="tests.test_vq.TestC" name="test_c"><skipped/></testcase>
        <testcase classname="" name="tests.test_loss"><error/></testcase>
        </testsuite></testsuites>"""
    )
    assert read_tests(tmp_path / "t.xml") == {
        "vq": (1, ["test_vq: test_b"]),
        "loss": (0, ["test_loss: tests.test_loss"]),
    }


def test_figures_for_people():
    times = (2.5, 0.9998, 0.0123, 4.5e-6, 7e-10)
    assert [table.duration(s) for s in times] == ["2.5 s", "1,000 ms", "12.3 ms", "4.5 us", "0.7 ns"]
    assert [table.number(n) for n in (None, 12345, 0.01234, 1234.5, 2.5e9)] == [
        "-",
        "12,345",
        "0.0123",
        "1,234",
        "2.5e+09",
    ]


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"gpu": {"name": "NVIDIA H200"}, "cpu": "AMD EPYC"}, "gpu_h200_202611.json"),
        ({"gpu": {"name": "NVIDIA H100 80GB HBM3"}}, "gpu_h100-80gb-hbm3_202611.json"),
        ({"cpu": "AMD EPYC", "cores": 2}, "gpu_epyc-2core_202611.json"),
        ({"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz", "cores": 8}, "gpu_xeon-2-20ghz-8core_202611.json"),
        ({"cpu": "AMD EPYC 7763 64-Core Processor", "cores": 16}, "gpu_epyc-7763-16core_202611.json"),
    ],
)
def test_results_are_named_by_hardware_and_month(environment, name):
    assert table.results_name({"benchmark": "gpu", "date": "2026-11-26", "environment": environment}) == name

"""Sections of a benchmark: one that fails gives its reason and takes nothing from the others."""

import json
from pathlib import Path

import pytest

from medmax_fast.kernels.launch import triton

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture()
def sections():
    from benchmarks import sections

    return sections


@pytest.mark.parametrize(
    "error", [AssertionError("3 codes differ"), RuntimeError("CUDA error"), triton.OutOfResources(300, 228, "shared")]
)
def test_a_failed_section_leaves_the_others(sections, tmp_path, capsys, error):
    output, seen = tmp_path / "found.json", []

    def works(name: str):
        def section():
            seen.append(json.loads(output.read_text()) if output.exists() else None)
            yield [{"row": name, "p50_s": 2.0, "more": 1}], [{"stage": name}]

        return section

    def breaks():
        yield [{"row": "half", "p50_s": 1.0}], [{"stage": "second"}]
        seen.append(json.loads(output.read_text()))
        raise error

    chosen = {"first": works("first"), "second": breaks, "third": works("third")}
    status = sections.run_sections("name", chosen, ("row", "p50_s"), str(output), {"size": "tiny"})
    result = json.loads(output.read_text())
    printed = capsys.readouterr()
    assert status == 1 and json.loads(printed.out.splitlines()[-1]) == result
    assert list(result["failed"]) == ["second"] and result["failed"]["second"].startswith(type(error).__name__)
    assert "Traceback" in printed.err
    assert result["benchmark"] == "name" and result["size"] == "tiny"
    assert [row["stage"] for row in result["evidence"]] == ["first", "second", "third"]
    assert result["sections"]["first"] == [{"row": "first", "p50_s": 2.0, "more": 1}]
    assert [(row["section"], row["row"], row["p50_s"]) for row in result["rows"]] == [
        ("first", "first", 2.0),
        ("second", "half", 1.0),
        ("third", "third", 2.0),
    ]
    # What was there when the second one broke, and when the third one began.
    _, half, before = seen
    assert half["evidence"] == before["evidence"] == [{"stage": "first"}, {"stage": "second"}]
    assert not half["failed"] and before["failed"] == result["failed"]


def test_a_lost_gpu_ends_the_sections(sections, tmp_path, monkeypatch):
    output = tmp_path / "found.json"

    def fails():
        yield [{"row": "half"}], []
        # From here on every call answers like this.
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.synchronize", lost)
        raise RuntimeError("an illegal memory access was encountered")

    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(sections, "forget", lambda: None)
    monkeypatch.setattr(sections, "environment", dict)
    monkeypatch.setattr("benchmarks.harness.environment", dict)
    chosen = {"first": fails, "second": lambda: iter([([{"row": "b"}], [])])}
    assert sections.run_sections("name", chosen, ("row",), str(output), {}) == 1
    result = json.loads(output.read_text())
    assert result["gpu_lost"] and list(result["section_s"]) == list(result["failed"]) == ["first"]


def test_a_gpu_that_answers_is_not_lost(sections, monkeypatch):
    assert not sections.gpu_lost()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    assert not sections.gpu_lost()


def test_all_well(sections, tmp_path):
    output = tmp_path / "found.json"
    chosen = {"some": lambda: iter([([{"row": "a"}], [])]), "none": lambda: iter([])}
    assert sections.run_sections("name", chosen, ("row",), str(output), {}) == 0
    rows = json.loads(output.read_text())["rows"]
    assert rows == [{"section": "some", "row": "a"}, {"section": "none", "row": "nothing measured"}]


def test_sections_are_chosen_by_name(sections, capsys):
    parser = sections.section_parser("what", ("a", "b", "slow"), ("a", "b"))
    assert parser.parse_args([]).only == ["a", "b"]
    assert parser.parse_args(["--only", "slow,a"]).only == ["slow", "a"]
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--only", "a,fast"])
    assert "--only: fast: expected a, b, slow" in capsys.readouterr().err

"""The goals: each is one that the suite measures, and a result says met, missed by how much, or not measured."""

import json
import sys
from dataclasses import replace

import pytest

from medmax_fast.bench.stages import SUITES
from medmax_fast.runtime import InputError


@pytest.fixture()
def goals():
    from benchmarks import goals

    return goals


@pytest.fixture()
def verdicts():
    from benchmarks import verdicts

    return verdicts


def row_of(stage: str, shape: str, form: str, seconds: float = 1.0, quality: dict | None = None, **found) -> dict:
    row = dict.fromkeys(("gb_per_s", "tflop_per_s", "items_per_s", "unit", "share", "bound", "times", "beside"))
    row |= {"stage": stage, "shape": shape, "form": form, "quality": quality or {}, "moved_bytes": 1, "flop": 0}
    return row | {"p20_s": seconds, "p50_s": seconds, "p80_s": seconds, "floor_s": None} | found


def result_of(rows: list[dict], **changes) -> dict:
    environment = {"gpu": {"name": "NVIDIA H200"}, "cores": 16}
    result = {"benchmark": "gpu", "dry": False, "date": "2026-11-26", "seconds": 61.2, "environment": environment}
    return result | {"stages": [], "tests": {}, "rows": rows} | changes


def goal_of(goals, name: str, quantity: str):
    return next(goal for goal in goals.GOALS if (goal.name, goal.quantity) == (name, quantity))


def rows_that_meet(goals) -> list[dict]:
    """For every goal and shape a row that is within all its limits by a tenth."""
    rows: dict[tuple, dict] = {}
    for goal in goals.GOALS:
        for shape in goals.shapes_of(goal):
            row = rows.setdefault((goal.stage, shape, goal.forms[0]), row_of(goal.stage, shape, goal.forms[0]))
            limit = 0.5 if isinstance(goal.limit, str) else goal.limit
            outer, _, inner = goal.quantity.partition(".")
            value = limit * (1.1 if goal.sign.startswith(">") else 0.9)
            row |= {outer: row["quality"] | {inner: value, "published_differing": 0.5}} if inner else {outer: value}
    return list(rows.values())


def test_goals_are_those_that_the_suite_measures(goals):
    stages = [stage.name for stage in SUITES["gpu"]]
    assert list(dict.fromkeys(goal.name for goal in goals.GOALS)) == [f"G{i}" for i in range(1, 16)]
    for goal in goals.GOALS:
        assert goal.stage in stages, goal
        shapes = goals.shapes_of(goal)
        assert shapes and set(shapes) <= set(goals.suite_shapes()[goal.stage]), goal
        assert goal.forms and all(goal.forms), goal


def test_forms_are_those_of_the_stages(goals):
    """Names that no dry run gives, since they are a GPU's, are those that the stages put together."""
    from benchmarks import bench_train
    from medmax_fast.model.image_tokenizer import PRECISIONS

    named = {goal.stage: goal.forms for goal in goals.GOALS}
    assert named["encoder"] == ("ours, fp16",) and "fp16" in PRECISIONS
    packs = "packs of 16,384"
    assert named["train"] == (
        f"packed, fused, DeepSpeed ZeRO-2, {packs}",
        f"packed, fused, selective recomputation, DeepSpeed ZeRO-2, {packs}",
        f"packed, fused, {packs}",
        f"packed, fused, selective recomputation, {packs}",
    )
    assert {row.name for row in bench_train.waterfall(True, False, True, False)} >= set(bench_train.STAGE_ROWS) - {
        "DeepSpeed ZeRO-2"
    }


def test_all_are_met(goals, verdicts):
    rows = rows_that_meet(goals)
    assert set(verdicts.states(result_of(rows)).values()) == {verdicts.MET}
    assert verdicts.summary(result_of(rows)).endswith("missed: none; not measured: none")


def test_one_worse_row_is_a_miss(goals, verdicts):
    """Of every part of every goal, and by how much; the others stay as they are."""
    for goal in goals.GOALS:
        for shape in goals.shapes_of(goal):
            rows = rows_that_meet(goals)
            (row,) = (
                row for row in rows if (row["stage"], row["shape"], row["form"]) == (goal.stage, shape, goal.forms[0])
            )
            outer, _, inner = goal.quantity.partition(".")
            limit = row["quality"]["published_differing"] if isinstance(goal.limit, str) else goal.limit
            worse = limit - 0.25 if goal.sign.startswith(">") else limit + 0.25
            row[outer] = row[outer] | {inner: worse} if inner else worse
            verdict = verdicts.judge(goal, result_of(rows))
            assert verdict.state == verdicts.MISSED and verdict.by == pytest.approx(-0.25), goal
            assert verdict.row is row and verdict.value == worse
            states = verdicts.states(result_of(rows))
            assert [name for name, state in states.items() if state == verdicts.MISSED] == [goal.name]


def test_without_a_row_nothing_is_measured(goals, verdicts):
    assert set(verdicts.states(result_of([])).values()) == {verdicts.UNKNOWN}
    whole = rows_that_meet(goals)
    assert set(verdicts.states(result_of(whole, dry=True)).values()) == {verdicts.UNKNOWN}
    for i, row in enumerate(whole):
        states = verdicts.states(result_of([*whole[:i], *whole[i + 1 :]]))
        affected = {goal.name for goal in goals.GOALS if goal.stage == row["stage"] and row["form"] in goal.forms}
        unknown = {name for name, state in states.items() if state == verdicts.UNKNOWN}
        assert unknown and unknown <= affected, row
    # Nor by another form of the same shape, or without the quantity.
    speed = goal_of(goals, "G1", "share")
    (shape,) = speed.shapes
    other = row_of("encoder", shape, "ours, fp32", share=0.9)
    assert verdicts.judge(speed, result_of([other])).state == verdicts.UNKNOWN
    assert verdicts.judge(speed, result_of([other | {"form": "ours, fp16", "share": None}])).state == verdicts.UNKNOWN


def test_a_shape_that_misses_is_a_miss_whatever_lacks(goals, verdicts):
    goal = goal_of(goals, "G5", "times_best")
    first, second = goals.shapes_of(goal)
    rows = [row_of("vq", first, "ours", times_best=2.0), row_of("vq", second, "ours", times_best=4.0)]
    assert verdicts.judge(goal, result_of(rows)).row is rows[0]
    assert verdicts.judge(goal, result_of(rows[:1])).state == verdicts.MISSED
    assert verdicts.judge(goal, result_of(rows[1:])).state == verdicts.UNKNOWN


def test_the_fastest_form_counts(goals, verdicts):
    goal = goal_of(goals, "G8", "mfu")
    (shape,) = goals.shapes_of(goal)
    rows = [
        row_of("train", shape, form, seconds, mfu=0.6 / seconds)
        for form, seconds in zip(goal.forms, (2, 1), strict=False)
    ]
    assert verdicts.judge(goal, result_of(rows)).value == 0.6
    assert verdicts.judge(goal, result_of(rows[:1])).value == 0.3


def test_more_cores_say_nothing_to_a_rate_on_16(goals, verdicts):
    goal = goal_of(goals, "G2", "items_per_s")
    (shape,) = goals.shapes_of(goal)
    rows = [row_of("tokenize", shape, goal.forms[0], items_per_s=900.0)]
    for cores, state in ((16, verdicts.MET), (8, verdicts.MET), (17, verdicts.UNKNOWN)):
        assert verdicts.judge(goal, result_of(rows, environment={"cores": cores})).state == state


def test_cells_for_people(goals, verdicts):
    goal = goal_of(goals, "G9", "mfu")
    (shape,) = goals.shapes_of(goal)
    row = row_of("full", shape, goal.forms[1], quality={"loss_difference": 1e-4}, mfu=0.42, memory_gib=31.5)
    assert verdicts.cells(goal, result_of([row])) == {
        "measured": "42 %",
        "verdict": "missed by 3 points",
        "beside": "loss difference 0.0001; memory gib 31.5",
    }
    assert verdicts.cells(goal, result_of([])) == {"measured": "-", "verdict": "not measured", "beside": "-"}
    several = goal_of(goals, "G7", "extra_mb")
    rows = [
        row_of("loss", shape, "ours", extra_mb=mb) for shape, mb in zip(several.shapes, (300, 700, 500), strict=True)
    ]
    found = verdicts.cells(several, result_of(rows))
    assert found["measured"] == f"700 MB ({several.shapes[1]})" and found["verdict"] == "met"
    assert verdicts.wanted(several) == "< 1,000 MB"
    assert verdicts.wanted(goal_of(goals, "G4", "quality.codes_differing")) == "<= published differing"
    table = verdicts.table_rows({"h200": result_of(rows), "h100": result_of([])})
    assert len(table) == len(goals.GOALS) and len({tuple(row) for row in table}) == 1
    assert [row["h200: verdict"] for row in table].count("met") == 1
    assert {row["h100: verdict"] for row in table} == {"not measured"}
    assert {row["verdict"] for row in verdicts.table_rows({})} == {"not measured"}


def test_the_command_reads_a_result(verdicts, goals, tmp_path, monkeypatch, capsys):
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps(result_of(rows_that_meet(goals))))
    monkeypatch.setattr(sys, "argv", ["verdicts", str(path)])
    verdicts.main()
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("met: G1, G2, ") and len(out) == len(goals.GOALS) + 2
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(InputError, match="no 'dry'"):
        verdicts.main()


def test_a_limit_is_not_met_by_what_it_excludes(goals, verdicts):
    """More than 1 is not 1, less than 1 GB is not 1 GB."""
    for name, quantity in (("G7", "times_best"), ("G7", "extra_mb"), ("G15", "p50_s")):
        goal = goal_of(goals, name, quantity)
        rows = [row_of(goal.stage, shape, goal.forms[0]) | {quantity: goal.limit} for shape in goals.shapes_of(goal)]
        assert verdicts.judge(goal, result_of(rows)).state == verdicts.MISSED
        loose = replace(goal, sign=f"{goal.sign}=")
        assert verdicts.judge(loose, result_of(rows)).state == verdicts.MET

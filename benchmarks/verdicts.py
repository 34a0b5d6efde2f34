"""The goals that a result of `medmax bench --suite gpu` meets, misses and by how much, or does not measure.

    PYTHONPATH=. python -m benchmarks.verdicts gpu-output/benchmark.json

roofline.md has the same as its first table, of the results that are kept.
"""

import argparse
import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.goals import GOALS, Goal, shapes_of
from medmax_fast.bench.table import number, problem
from medmax_fast.files import read_json
from medmax_fast.runtime import InputError, print_table

MET, MISSED, UNKNOWN = "met", "missed", "not measured"
SIGNS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Verdict:
    """What a result says to a goal: of its shapes the one that misses most, or is nearest to it.

    state: MET, MISSED or, with nothing else, UNKNOWN: a shape has no row, or its row lacks the quantity. by: how far
    the value is beyond the limit, to the wrong side where it is negative.
    """

    state: str
    value: float | None = None
    by: float | None = None
    row: dict | None = None


def quantity_of(row: dict, name: str) -> float | None:
    """A quantity of a row of evidence; None if it has none such."""
    outer, _, inner = name.partition(".")
    return row.get(outer, {}).get(inner) if inner else row.get(outer)


def judge(goal: Goal, result: dict) -> Verdict:
    """Whether the result of a suite meets a goal; a dry run, whose figures mean nothing, says nothing."""
    if result["dry"] or (goal.cores and result["environment"].get("cores", goal.cores) > goal.cores):
        return Verdict(UNKNOWN)
    verdicts, whole = [], True
    for shape in shapes_of(goal):
        rows = [row for row in result["rows"] if (row["stage"], row["shape"]) == (goal.stage, shape)]
        row = min((row for row in rows if row["form"] in goal.forms), key=lambda row: row["p50_s"], default={})
        value = quantity_of(row, goal.quantity)
        limit = quantity_of(row, goal.limit) if isinstance(goal.limit, str) else goal.limit
        if value is None or limit is None:
            whole = False
            continue
        by = value - limit if goal.sign.startswith(">") else limit - value
        verdicts.append(Verdict(MET if SIGNS[goal.sign](value, limit) else MISSED, value, by, row))
    worst = min(verdicts, key=lambda verdict: verdict.by, default=Verdict(UNKNOWN))
    # One that misses is enough; to be met takes all of them.
    return worst if whole or worst.state == MISSED else Verdict(UNKNOWN)


def states(result: dict) -> dict[str, str]:
    """By a goal's name: missed where any part is, met where all are."""
    parts: dict[str, set[str]] = {}
    for goal in GOALS:
        parts.setdefault(goal.name, set()).add(judge(goal, result).state)
    return {name: next(state for state in (MISSED, UNKNOWN, MET) if state in found) for name, found in parts.items()}


def summary(result: dict) -> str:
    """One line: which goals are met, missed and not measured."""
    found = states(result)
    names = {state: [name for name in found if found[name] == state] for state in (MET, MISSED, UNKNOWN)}
    return "; ".join(f"{state}: {', '.join(some) or 'none'}" for state, some in names.items())


def shown(value: float, unit: str) -> str:
    return f"{number(100 * value)} %" if unit == "%" else f"{number(value)} {unit}"


def wanted(goal: Goal) -> str:
    limit = goal.limit.split(".")[-1].replace("_", " ") if isinstance(goal.limit, str) else shown(goal.limit, goal.unit)
    return f"{goal.sign} {limit}"


def cells(goal: Goal, result: dict) -> dict[str, str]:
    """What a table shows of a goal and a result: the value, the verdict, and what stands beside it in the same row."""
    verdict = judge(goal, result)
    if verdict.row is None or verdict.value is None or verdict.by is None:
        return {"measured": "-", "verdict": verdict.state, "beside": "-"}
    several = len(shapes_of(goal)) > 1
    measured = shown(verdict.value, goal.unit) + f" ({verdict.row['shape']})" * several
    points = f"{number(100 * abs(verdict.by))} points" if goal.unit == "%" else shown(abs(verdict.by), goal.unit)
    beside = verdict.row["quality"] | {"memory_gib": verdict.row.get("memory_gib")}
    words = "; ".join(f"{name.replace('_', ' ')} {number(v)}" for name, v in beside.items() if v is not None)
    state = verdict.state if verdict.state == MET else f"{verdict.state} by {points}"
    return {"measured": measured, "verdict": state, "beside": words or "-"}


def table_rows(results: dict[str, dict]) -> list[dict[str, str]]:
    """A row for every goal; columns of each of `results`, by hardware, or one that says that there is none."""
    rows = []
    for goal in GOALS:
        row = {
            "goal": goal.name,
            "what": goal.words,
            "wanted": wanted(goal),
            "stage": goal.stage,
            "form": goal.forms[0],
        }
        row["form"] += f", or the fastest of {len(goal.forms)} such" * (len(goal.forms) > 1)
        shapes = shapes_of(goal)
        row["shape"] = shapes[0] if len(shapes) == 1 else f"each of {len(shapes)}"
        for hardware, result in results.items():
            row |= {f"{hardware}: {name}": cell for name, cell in cells(goal, result).items()}
        rows.append(row if results else row | {"verdict": UNKNOWN})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="which goals a result of `medmax bench --suite gpu` meets")
    parser.add_argument("result", help="benchmark.json, or a file of benchmarks/results")
    path = parser.parse_args().result
    result = read_json(path)
    if wrong := problem(result):
        raise InputError(f"{path}: {wrong}")
    print_table(
        [{"goal": goal.name, "what": goal.words, "wanted": wanted(goal)} | cells(goal, result) for goal in GOALS]
    )
    print(summary(result))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"verdicts: {error}", file=sys.stderr)
        sys.exit(2)

"""Rows of evidence as tables: the same cells on a terminal, in a report and in the documents of benchmarks/.

A row is what benchmarks/harness.py's `evidence` makes: stage, shape, form, percentiles in seconds, rates, share of the
roofline, the form it is compared with and how many times as fast it is, and the differences from the reference.
"""

import re

from medmax_fast.page import plain, table

# Keys of every row.
KEYS = ("stage", "shape", "form", "p20_s", "p50_s", "p80_s", "gb_per_s", "tflop_per_s", "share", "bound")
KEYS += ("items_per_s", "unit", "beside", "times", "quality", "floor_s", "moved_bytes", "flop")
EMPTY = "-"


def cells(row: dict) -> dict[str, str]:
    """What a table shows of one row, by column; text without markup."""
    share = EMPTY if row["share"] is None else f"{row['share']:.0%} of {row['bound']}"
    rate = EMPTY if row["items_per_s"] is None else f"{number(row['items_per_s'])} {row['unit']}/s"
    times = EMPTY if row["times"] is None else f"{number(row['times'])} x {row['beside']}"
    if row["form"] == row["beside"]:
        times = "(baseline)"
    quality = "; ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in row["quality"].items())
    return {
        "stage": row["stage"],
        "shape": row["shape"],
        "form": row["form"],
        "time (p20 to p80)": f"{duration(row['p50_s'])} ({duration(row['p20_s'])} to {duration(row['p80_s'])})",
        "GB/s": number(row["gb_per_s"]),
        "TFLOP/s": number(row["tflop_per_s"]),
        "roofline": share,
        "rate": rate,
        "times as fast": times,
        "quality": quality or EMPTY,
    }


def duration(seconds: float) -> str:
    """Three digits of a time, in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{number(seconds / size)} {unit}"
    return f"{number(seconds / 1e-9)} ns"


def number(value: float | int | str | None) -> str:
    """A figure for people: whole numbers with separators, others to three digits; `-` for none."""
    if value is None:
        return EMPTY
    if isinstance(value, str):
        return value
    # From 999.5 on three digits would be written with an exponent.
    if isinstance(value, int) or 999.5 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def rows_problem(rows: object) -> str:
    """What keeps `rows` from being rows of evidence; empty for rows that are."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return "no list of rows"
    for i, row in enumerate(rows, 1):
        if missing := [key for key in KEYS if key not in row]:
            return f"row {i} has no {missing[0]!r}"
    return ""


def problem(result: object) -> str:
    """What keeps `result` from being the content of a benchmark.json; empty for one."""
    if not isinstance(result, dict):
        return "no JSON object"
    parts = {"dry": bool, "date": str, "seconds": int | float, "environment": dict, "stages": list, "tests": dict}
    for name, kind in parts.items():
        if not isinstance(result.get(name), kind):
            return f"no {name!r}"
    return rows_problem(result.get("rows"))


def markdown(result: dict) -> str:
    """What benchmark.json holds as a Markdown section: the machine, the table, what was left out."""
    parts = [f"### {heading(result)}", summary(result)]
    if result["rows"]:
        shown = [{name: plain(cell) for name, cell in cells(row).items()} for row in result["rows"]]
        parts.append(table(shown))
    left = [stage for stage in result["stages"] if stage["status"] != "done"]
    if left:
        parts.append("Without figures:")
        parts.append("\n".join(f"- {plain(s['stage'])}: {s['status']} {plain(s['reason'])}".rstrip() for s in left))
    return "\n\n".join(parts)


def measured(result: dict) -> list[dict]:
    """The rows that have a share of the roofline; none of a dry run, whose times mean nothing."""
    return [row for row in result["rows"] if row["share"] and not result["dry"]]


def results_name(result: dict) -> str:
    """The file under which benchmarks/results/ keeps a run: its suite, hardware and month, as gpu_h200_202611.json."""
    environment = result["environment"]
    card = environment.get("gpu", {}).get("name")
    name = card or f"{environment.get('cpu', 'cpu')} {environment.get('cores', 0)}core"
    words = re.sub(r"\((R|TM)\)|\b(NVIDIA|AMD|Intel|CPU|Processor|\d+-Core)\b", " ", name)
    hardware = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return f"{result['benchmark']}_{hardware}_{result['date'][:7].replace('-', '')}.json"


def heading(result: dict) -> str:
    """The hardware and the date of a run."""
    environment = result["environment"]
    processor = f"{environment.get('cpu', 'CPU')}, {environment.get('cores')} cores"
    name = environment.get("gpu", {}).get("name") or processor
    return plain(f"{'Dry run on ' * result['dry']}{name}, {result['date']}")


def summary(result: dict) -> str:
    """One line: versions, tests, seconds."""
    versions = result["environment"].get("versions", {})
    named = [f"{name} {versions[name]}" for name in ("python", "torch", "triton", "transformers") if name in versions]
    tests = result["tests"].values()
    red = sum(len(test["red"]) for test in tests)
    counted = f"{sum(test['passed'] for test in tests):,} tests passed, {red} red. " * bool(tests)
    if result["dry"]:
        counted = "Tests are collected, sizes tiny and kernels interpreted: the times mean nothing. "
    return plain(f"{counted}{', '.join(named)}. {result['seconds']:.0f} s in all.")

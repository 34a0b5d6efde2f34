"""The table in the README and benchmarks/roofline.md, rendered from benchmarks/results/.

    PYTHONPATH=. python -m benchmarks.render [--check]

Of every hardware the newest result of `medmax bench` counts (gpu_<hardware>_<yyyymm>.json, cpu_...), and the newest
reports of the compiler (aot_...) and of benchmarks.count (count_...). --check writes nothing and ends with status 1 if
a document is not what they say.
"""

import argparse
import re
import sys
from pathlib import Path

from benchmarks import verdicts
from benchmarks.bench_kernels import floors as kernel_floors
from benchmarks.changes import CHANGES
from benchmarks.counting.report import sections
from benchmarks.gaps import GAPS
from benchmarks.stage_floors import floors as stage_floors
from medmax_fast.bench.table import cells, duration, heading, number, problem, summary
from medmax_fast.files import atomic_path, read_json
from medmax_fast.kernels.blocks import TABLE
from medmax_fast.page import plain, table
from medmax_fast.runtime import InputError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, ROOFLINE = ROOT / "README.md", ROOT / "benchmarks" / "roofline.md"
BEGIN, END = "<!-- rendered by python -m benchmarks.render -->", "<!-- end of what is rendered -->"
NO_GPU = "No GPU has measured this code yet, and none is estimated: `make gpu` on a machine with one does it."
ON_CPU = "Models are the tiny random one, kernels their torch references: of a CPU the ratios count, not the times."
INTRODUCTION = """Rendered by `python -m benchmarks.render` from benchmarks/results/, from the shapes of the benchmarks
and from kernels/blocks.py. A stage's floor is the larger of two times: the bytes that any form of it must read or
write, each once, at the rate of a large copy, and the FLOP of its products at the rate of a large bf16 product. Both
rates are measured in the process that measures the stage. The gap is the time over the floor."""
ABOUT_GOALS = """On one H200, from benchmarks/goals.py. A goal is met when all of its rows are; of several shapes the
one that misses most, or is nearest to it, is shown. What stands beside a figure is from the same row of evidence."""
ABOUT_GAPS = """Known from the code and from what the compiler made of it. A measurement has the last word, and is put
here with the change that it led to."""
ABOUT_CHANGES = "From benchmarks/changes.py, the newest last."
ABOUT_BLOCKS = "By compute capability (80: A100, 90: H100 and H200, 100: B200), from kernels/blocks.py."
# Of the table in the README.
SHOWN = ("stage", "shape", "form", "time (p20 to p80)", "roofline", "rate", "times as fast", "quality")


def newest(what: str, folder: Path = RESULTS) -> dict[str, dict]:
    """Hardware -> its newest result, by the month in the file's name; InputError for a file that is no real run."""
    found: dict[str, tuple[str, Path]] = {}
    for path in sorted(folder.glob(f"{what}_*.json")):
        if match := re.fullmatch(rf"{what}_(.+)_(\d{{6}})\.json", path.name):
            found[match[1]] = max(found.get(match[1], ("", path)), (match[2], path))
    results = {hardware: read_json(path) for hardware, (_, path) in found.items()}
    for hardware, result in results.items():
        wrong = problem(result) if what in ("gpu", "cpu") else ""
        if wrong or result.get("dry"):
            raise InputError(f"{found[hardware][1]}: {wrong or 'a dry run, which has no figures'}")
    return results


def readme_block(gpu: dict[str, dict], cpu: dict[str, dict]) -> str:
    """Of every hardware and shape our form beside the one that it is compared with."""
    parts = [] if gpu else [NO_GPU]
    for result in [*gpu.values(), *cpu.values()]:
        compared = [row for row in result["rows"] if row["times"] is not None]
        shapes = dict.fromkeys((row["stage"], row["shape"]) for row in compared)
        best = [row for stage, shape in shapes if (row := ours(stage, shape, compared))]
        if best:
            shown = [{name: plain(cell) for name, cell in cells(row).items() if name in SHOWN} for row in best]
            note = "" if result["environment"].get("gpu") else f" {ON_CPU}"
            parts += [f"**{heading(result)}.** {summary(result)}{note}", table(shown)]
    return "\n\n".join(parts)


def roofline_document(gpu: dict[str, dict], aot: dict[str, dict], counted: dict[str, dict]) -> str:
    """Floors, measured times and what stands between, then what was counted, what the compiler says, block sizes."""
    floors = [floor_row(floor, gpu) for floor in [*kernel_floors(), *stage_floors()]]
    parts = ["# Roofline", INTRODUCTION, *goals(gpu), "## Floors and gaps", *([] if gpu else [NO_GPU]), table(floors)]
    gaps = [f"- **{stage}**: {text}" for stage, text in GAPS.items()]
    parts += ["## What stands between floor and time", ABOUT_GAPS, "\n".join(gaps)]
    changes = [{name: plain(words or "not measured") for name, words in change.items()} for change in CHANGES]
    parts += ["## Changes", ABOUT_CHANGES, table(changes)]
    for result in counted.values():
        parts += sections(result)
    parts.append("## What the compiler says")
    for compiler, result in aot.items():
        parts += [f"{plain(compiler)}, no GPU needed.", table(compiled_rows(result))]
    return "\n\n".join([*parts, "## Block sizes", ABOUT_BLOCKS, table(block_rows())]) + "\n"


def goals(gpu: dict[str, dict]) -> list[str]:
    """What is wanted on one H200, and what every result says to it."""
    lines = [f"- **{plain(hardware)}**: {verdicts.summary(result)}" for hardware, result in gpu.items()]
    rows = [{name: plain(cell) for name, cell in row.items()} for row in verdicts.table_rows(gpu)]
    return ["## Goals", ABOUT_GOALS, *(["\n".join(lines)] if lines else []), table(rows)]


def floor_row(floor: dict, gpu: dict[str, dict]) -> dict[str, str]:
    """One shape: its work, and for every hardware the floor, our time and the gap."""
    moved, flop = floor["moved_bytes"], floor["flop"]
    row = {"stage": plain(floor["stage"]), "shape": plain(floor["shape"])}
    row |= {
        "bytes": scaled(moved, "B"),
        "FLOP": scaled(flop, ""),
        "FLOP/byte": number(flop / moved) if moved and flop else "-",
    }
    for hardware, result in gpu.items():
        best = ours(floor["stage"], floor["shape"], [row for row in result["rows"] if row["floor_s"]])
        row[f"{hardware}: floor"] = duration(best["floor_s"]) if best else "-"
        row[f"{hardware}: measured"] = f"{duration(best['p50_s'])} ({plain(best['form'])})" if best else "-"
        row[f"{hardware}: gap"] = f"{number(best['p50_s'] / best['floor_s'])} x" if best else "-"
    return row


def ours(stage: str, shape: str, rows: list[dict]) -> dict | None:
    """The row of a shape called ours, else the fastest that nothing is compared with; None if there is none."""
    same = [row for row in rows if (row["stage"], row["shape"]) == (stage, shape) and row["form"] != row["beside"]]
    own = [row for row in same if row["form"] == "ours"] or [row for row in same if row["form"].startswith("ours")]
    return min(own or same, key=lambda row: row["p50_s"], default=None)


def scaled(value: float, unit: str) -> str:
    """With a prefix of 1000s: 2.15e9 bytes are "2.15 GB"."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip() if value else "-"


def block_rows() -> list[dict[str, str]]:
    """kernels/blocks.py as a table; capabilities with the same numbers and evidence share a row."""
    rows: dict[tuple, list[int]] = {}
    for kernel, entries in TABLE.items():
        for capability, entry in entries.items():
            numbers = ", ".join(f"{name} {value}" for name, value in entry.numbers.items())
            rows.setdefault((kernel, numbers, entry.evidence), []).append(capability)
    return [
        {
            "kernel": plain(kernel),
            "capability": ", ".join(map(str, known)),
            "numbers": plain(numbers),
            "evidence": plain(evidence),
        }
        for (kernel, numbers, evidence), known in rows.items()
    ]


def compiled_rows(result: dict) -> list[dict[str, str]]:
    """A row per kernel, the worst of its variants on each target."""
    kernels: dict[str, dict[int, dict]] = {}
    for row in result["kernels"]:
        kernels.setdefault(row["kernel"], {})[row["sm"]] = row
    names = {"registers": "most_registers", "spilled bytes": "most_stack", "shared bytes": "most_shared"}
    names |= {"programs on a multiprocessor": "least_programs"}
    rows = []
    for kernel, targets in kernels.items():
        row = {"kernel": plain(kernel.strip("_").removesuffix("_kernel"))}
        row["variants"] = str(sum(target["variants"] for target in targets.values()))
        for name, key in names.items():
            row[f"{name} ({', '.join(map(str, targets))})"] = ", ".join(number(row[key]) for row in targets.values())
        rows.append(row)
    return rows


def documents() -> dict[Path, str]:
    """Every rendered file, whole."""
    gpu, cpu, aot, counted = (newest(what) for what in ("gpu", "cpu", "aot", "count"))
    readme = README.read_text(encoding="utf-8")
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise InputError(f"{README}: expected {BEGIN} and {END}, once each")
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return {
        README: f"{before}{BEGIN}\n\n{readme_block(gpu, cpu)}\n\n{END}{after}",
        ROOFLINE: roofline_document(gpu, aot, counted),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="the README's table and roofline.md, from the results")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a document is out of date")
    check = parser.parse_args().check
    stale = 0
    for path, text in documents().items():
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        print(f"{path.relative_to(ROOT)}: {'out of date' if check else 'written'}")
        stale += check
        if not check:
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return int(bool(stale))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"render: {error}", file=sys.stderr)
        sys.exit(2)

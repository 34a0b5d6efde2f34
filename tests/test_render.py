"""README and roofline.md say what benchmarks/results/ says, and nothing else gets into them."""

import importlib
import json
from pathlib import Path

import pytest

from medmax_fast.runtime import InputError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture()
def render():
    return importlib.import_module("benchmarks.render")


def run_of(name: str, rows: list[dict], **changes) -> dict:
    environment = {"gpu": {"name": name}, "cpu": "abacus", "cores": 4, "versions": {"torch": "2.11.0"}}
    result = {"benchmark": "gpu", "dry": False, "date": "2026-11-26", "seconds": 61.2, "environment": environment}
    return result | {"stages": [], "tests": {"vq": {"passed": 1200, "red": []}}, "rows": rows} | changes


def row_of(floor: dict, form: str, seconds: float, **changes) -> dict:
    row = dict.fromkeys(("gb_per_s", "tflop_per_s", "items_per_s", "unit"))
    row |= {"stage": floor["stage"], "shape": floor["shape"], "form": form, "beside": "torch", "times": 8 / seconds}
    row |= {"p20_s": seconds, "p50_s": seconds, "p80_s": seconds, "share": 0.5, "bound": "copy", "quality": {"lost": 0}}
    return row | {"moved_bytes": 1, "flop": 0, "floor_s": 0.5} | changes


def test_the_documents_are_what_the_results_say(render):
    for path, text in render.documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: PYTHONPATH=. python -m benchmarks.render"


def test_the_newest_run_of_each_hardware_counts(render, tmp_path):
    files = {"gpu_h200_202611": 1, "gpu_h200_202612": 2, "gpu_a100_202510": 3, "aot_h200_202701": 4}
    for name, seconds in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(run_of("NVIDIA X", [], seconds=seconds)))
    assert {name: run["seconds"] for name, run in render.newest("gpu", tmp_path).items()} == {"h200": 2, "a100": 3}
    for wrong, words in {"dry": "a dry run", "rows": "no list of rows"}.items():
        (tmp_path / "gpu_h200_202701.json").write_text(json.dumps(run_of("NVIDIA X", []) | {wrong: True}))
        with pytest.raises(InputError, match=words):
            render.newest("gpu", tmp_path)


def test_figures_get_into_both_documents(render):
    floor = render.kernel_floors()[0]
    rows = [row_of(floor, "ours", 1.0), row_of(floor, "ours, ids", 2.0), row_of(floor, "torch", 8.0)]
    rows += [row_of(floor, "ours", 0.001, shape="another")]
    gpu = {"h200": run_of("NVIDIA H200", rows)}
    block = render.readme_block(gpu, {})
    assert (
        render.NO_GPU not in block and "**NVIDIA H200, 2026-11-26.** 1,200 tests passed, 0 red. torch 2.11.0." in block
    )
    assert "| 1 s (1 s to 1 s) | 50% of copy | - | 8 x torch | lost 0 |" in block and "| torch |" not in block
    lines = render.roofline_document(gpu, {}, {}).splitlines()
    measured = next(line for line in lines if floor["shape"] in line)
    # The fastest of ours on this shape, against its own floor.
    assert measured.endswith("| 500 ms | 1 s (ours) | 2 x |")
    others = [line for line in lines if line.startswith(f"| {floor['stage']} |") and line != measured]
    assert others and all(line.endswith("| - | - | - |") for line in others)


def test_goals_come_first_and_say_what_is_measured(render):
    nothing = render.roofline_document({}, {}, {})
    assert nothing.index("## Goals") < nothing.index("## Floors and gaps")
    table = nothing[nothing.index("## Goals") : nothing.index("## Floors and gaps")]
    rows = [line for line in table.splitlines() if line.startswith("| G")]
    assert rows and all(line.endswith("| not measured |") for line in rows)
    floor = next(floor for floor in render.stage_floors() if floor["stage"] == "start")
    start = row_of(floor, "ours, medmax generate", 9.0, over_disk_s=7.0)
    text = render.roofline_document({"h200": run_of("NVIDIA H200", [start])}, {}, {})
    assert "- **h200**: met: none; missed: G14; not measured: G1, " in text
    assert "| 7 s | missed by 2 s | lost 0 |" in text


def test_every_stage_has_its_floor_and_its_words(render):
    from medmax_fast.bench.stages import SUITES

    stages = {stage.name for stage in SUITES["gpu"]}
    floors = [*render.kernel_floors(), *render.stage_floors()]
    assert {floor["stage"] for floor in floors} == stages == set(render.GAPS)
    # Compiling moves and multiplies nothing.
    assert {floor["stage"] for floor in floors if not (floor["moved_bytes"] or floor["flop"])} == {"compile"}


def test_figures_with_prefixes(render):
    assert [render.scaled(v, "B") for v in (0, 999, 1.5e3, 2.147e9)] == ["-", "999 B", "1.5 kB", "2.15 GB"]
    assert render.scaled(5.55e14, "") == "555 T"

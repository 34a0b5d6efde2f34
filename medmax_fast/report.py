"""`medmax report`: runs of any kind as one Markdown file and one self-contained HTML page.

The report is written once, as Markdown (report.md with its pictures under figures/); report.html is made from it.
Runs of one kind share a section, so that two evaluations of the same questions stand side by side. A run folder is
recognised by its files; whatever cannot be read is an InputError before anything is written.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medmax_fast import __version__, figures
from medmax_fast.bench import table as benchmark
from medmax_fast.config import ReportConfig
from medmax_fast.data.rows import read_rows
from medmax_fast.eval.reporting.browser import EvalRun
from medmax_fast.eval.reporting.section import evaluation_section
from medmax_fast.files import atomic_path, open_output, read_json, read_object, read_text, remove
from medmax_fast.inspection import store_figures
from medmax_fast.page import html_page, plain, table
from medmax_fast.pictures import Pictures
from medmax_fast.progress import progress
from medmax_fast.runtime import InputError

# kind -> the files by which a folder of it is recognised; the order is that of the sections.
KINDS = {
    "notes": ("notes.md",),
    "evaluation": ("results.json", "samples.jsonl"),
    "generation": ("outputs.jsonl",),
    "decoding": ("reconstructions.png", "index.jsonl"),
    "training": ("metrics.jsonl",),
    "store": ("manifest.json", "ids.bin"),
    "benchmark": ("benchmark.json",),
}
# Prompts shown per report; all of them stay in outputs.jsonl.
SHOWN_PROMPTS = 40
# Figures of a store's summary that the report shows, a table each.
COUNTED = ("rows", "ids", "supervised", "images", "longest", "mean_length", "codes_used", "code_perplexity")
CHECKED = ("suspicious_rows", "rows_without_eot", "rows_unbalanced", "rows_with_odd_images", "rows_cut_as_published")


@dataclass(frozen=True)
class Run:
    """One run of one kind: a name that is unique in the report, its folder, and what its files hold."""

    name: str
    kind: str
    path: Path
    data: Any


def report(config: ReportConfig) -> dict:
    """Render run folders (or Markdown files, shown as they are) into report.md and report.html."""
    runs = load_runs(config.runs)
    settings = {"runs": [str(Path(path).resolve()) for path in config.runs], "title": config.title}
    folder = open_output(config.output, "report", settings)
    with atomic_path(folder / "figures") as temporary:
        pictures = Pictures(temporary, "figures")
        text = "\n\n".join([f"# {plain(config.title)}", *_sections(runs, pictures), _footer()]) + "\n"
        remove(folder / "figures")
    page = html_page(config.title, text, folder)
    for name, content in (("report.md", text), ("report.html", page)):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return {
        "output": str(folder),
        "report": str(folder / "report.html"),
        "runs": [{"run": run.name, "kind": run.kind, "folder": str(run.path)} for run in runs],
    }


def load_runs(paths: tuple[str, ...]) -> list[Run]:
    """Read every run named on the command line; a folder that holds several kinds counts as several runs."""
    found = []
    for given in paths:
        path = Path(given)
        if path.is_file() and path.suffix == ".md":
            found.append(("notes", path.parent, path))
            continue
        kinds = [kind for kind, files in KINDS.items() if all((path / name).is_file() for name in files)]
        if not kinds:
            expected = "; ".join(f"{' and '.join(files)} ({kind})" for kind, files in KINDS.items())
            raise InputError(f"{given}: no run to report, expected a folder with {expected}")
        found += [(kind, path, path / KINDS[kind][0]) for kind in kinds]
    names = _names([(kind, path) for kind, path, _ in found])
    return [
        Run(name, kind, path, _read(kind, path, file))
        for name, (kind, path, file) in progress(list(zip(names, found, strict=True)), "report (runs)")
    ]


def _names(runs: list[tuple[str, Path]]) -> list[str]:
    """Folder names, with the parent's name or a number in front where two runs of a kind share one."""
    short = [(kind, path.resolve().name) for kind, path in runs]
    long = [(kind, f"{path.resolve().parent.name}/{path.resolve().name}") for kind, path in runs]
    names = []
    for i, key in enumerate(short):
        name = key if short.count(key) == 1 else long[i]
        names.append(name[1] if long.count(long[i]) == 1 else f"{i + 1}: {name[1]}")
    return names


def _read(kind: str, path: Path, file: Path):
    if kind == "notes":
        return read_text(file)
    if kind == "decoding":
        return file
    if kind == "store":
        from medmax_fast.data.store import TokenStore
        from medmax_fast.data.summary import check_rows, store_summary

        store = TokenStore(path)
        checks = check_rows(store)
        return store_summary(store, checks=checks), checks
    if kind == "benchmark":
        result = read_json(file)
        if wrong := benchmark.problem(result):
            raise InputError(f"{file}: {wrong}; expected what `medmax bench` writes")
        return result
    if kind == "evaluation":
        results = read_json(file)
        if not isinstance(results, dict) or not results.get("tasks"):
            raise InputError(f"{file}: no tasks in it, expected the results of `medmax eval`")
        if not all("metric" in task for task in results["tasks"].values()):
            raise InputError(
                f"{file}: a task without its metric, as earlier versions wrote it; run `medmax eval` again"
            )
        return EvalRun(path, results, _jsonl(path / "samples.jsonl"))
    rows = _jsonl(file)
    needed = {"training": "step", "generation": "id"}[kind]
    for number, row in enumerate(rows, 1):
        if needed not in row:
            raise InputError(f"{file}: line {number}: no {needed!r}, expected a line of a {kind} run")
    if not rows:
        raise InputError(f"{file}: empty, expected one JSON object per line")
    return rows


def _jsonl(path: Path) -> list[dict]:
    return [row for _, row in read_rows(path)]


def _sections(runs: list[Run], pictures: Pictures) -> Iterator[str]:
    for kind in KINDS:
        group = [run for run in runs if run.kind == kind]
        if not group:
            continue
        if kind == "notes":
            yield from (_notes(run, pictures) for run in group)
        elif kind == "evaluation":
            yield evaluation_section({run.name: run.data for run in group}, pictures)
        elif kind == "generation":
            yield _generation(group, pictures)
        elif kind == "training":
            yield "## Training"
            yield from (_training(run, pictures) for run in group)
        elif kind == "decoding":
            yield "## Reconstructions"
            yield from (pictures.adopt(f"![Pictures of {plain(run.name)}]({run.data.name})", run.path) for run in group)
        elif kind == "benchmark":
            yield "## Benchmarks"
            yield from (_benchmark(run, pictures) for run in group)
        else:
            yield "## Data"
            yield from (_store(run, pictures) for run in group)


def _notes(run: Run, pictures: Pictures) -> str:
    """A Markdown text with its pictures copied into the report."""
    return pictures.adopt(run.data, run.path)


def _training(run: Run, pictures: Pictures) -> str:
    rows, file = run.data, run.path / "validation.jsonl"
    validation = _jsonl(file) if file.is_file() else []
    draw = functools.partial(figures.loss_curve, validation=validation)
    figure = pictures.draw(f"Loss of {run.name}", draw, rows)
    shown = []
    for label, row in (("first", rows[0]), ("last", rows[-1])):
        cells = {name: row.get(name) for name in ("step", "loss", "text_loss", "image_loss", "lr", "grad_norm")}
        shown.append({"": label, **{name: "-" if cell is None else f"{cell:.4g}" for name, cell in cells.items()}})
    tokens, seconds = (sum(row.get(name) or 0 for row in rows) for name in ("tokens", "seconds"))
    speed = f", {tokens / seconds:,.0f} ids/s" if seconds else ""
    total = f"{len(rows):,} logged steps, {tokens:,} ids, {seconds:,.1f} s{speed}."
    parts = [f"### {plain(run.name)}", figure, table(shown), total]
    if validation:
        parts.append(_validation(validation[-1]))
    return "\n\n".join(parts)


def _validation(row: dict) -> str:
    """The last validation: its loss, per task and per source."""
    shown = [{"rows": "all", "loss": row["loss"]}]
    for kind in ("task", "source"):
        shown += [{"rows": f"{kind} {name or '(none)'}", "loss": loss} for name, loss in row[f"by_{kind}"].items()]
    cells = [{"rows": entry["rows"], "loss (nats per supervised id)": f"{entry['loss']:.4g}"} for entry in shown]
    return f"Validation after step {row['step']}:\n\n{table(cells)}"


def _benchmark(run: Run, pictures: Pictures) -> str:
    text = benchmark.markdown(run.data)
    rows = benchmark.measured(run.data)
    return f"{text}\n\n{pictures.draw(f'Roofline of {run.name}', figures.roofline, rows)}" if rows else text


def _store(run: Run, pictures: Pictures) -> str:
    summary, checks = run.data
    parts = [f"### {plain(run.name)}"]
    for names in (COUNTED, CHECKED):
        parts.append(table([{name: f"{summary[name]:,.6g}" for name in names}]))
    for name in ("tasks", "sources", "padding"):
        if summary[name]:
            parts.append(table([{key: _cell(value) for key, value in row.items()} for row in summary[name]]))
    for caption, draw in store_figures(summary, checks).values():
        parts.append(pictures.draw(f"{caption} of {run.name}", draw))
    return "\n\n".join(parts)


def _cell(value) -> str:
    if isinstance(value, str):
        return plain(value)
    return f"{value:.1%}" if isinstance(value, float) else f"{value:,}"


def _generation(runs: list[Run], pictures: Pictures) -> str:
    """Prompts with what each run made of them, side by side; `reference` of a prompt line is shown as well."""
    prompts, outputs = {}, {}
    for run in runs:
        prompts.update(_prompts(run.path))
        outputs[run.name] = {str(row["id"]): row for row in run.data}
    ids = list(dict.fromkeys(name for rows in outputs.values() for name in rows))
    lines = []
    for name in ids[:SHOWN_PROMPTS]:
        prompt, folder = prompts.get(name, ({}, Path()))
        line = {"id": plain(name), "prompt": _content(prompt.get("content") or [], folder, pictures)}
        if any("reference" in prompts.get(other, ({},))[0] for other in ids):
            line["reference"] = _picture(prompt["reference"], folder, pictures) if "reference" in prompt else ""
        for run in runs:
            line[f"{run.name}: output"] = _output(outputs[run.name].get(name), run.path, pictures)
        lines.append(line)
    left_out = f"\n\n{len(ids) - len(lines):,} more prompts are in outputs.jsonl." if len(ids) > len(lines) else ""
    return "## Generation\n\n" + table(lines) + left_out


def _prompts(folder: Path) -> dict[str, tuple[dict, Path]]:
    """Prompt lines by id with the folder that their paths are relative to; none where the file has gone."""
    settings = folder / "settings.json"
    given = read_object(settings).get("settings", {}).get("prompts") if settings.is_file() else None
    if not given or not Path(given).is_file():
        return {}
    return {str(row.get("id")): (row, Path(given).parent) for row in _jsonl(Path(given))}


def _output(row: dict | None, folder: Path, pictures: Pictures) -> str:
    if row is None:
        return "-"
    if row.get("error"):
        return plain(row["error"])
    return _content(row.get("content") or [], folder, pictures)


def _content(pieces: list[dict], folder: Path, pictures: Pictures) -> str:
    cells = []
    for piece in pieces:
        is_text = piece.get("type") == "text"
        cells.append(plain(piece["text"]) if is_text else _picture(piece.get("path", ""), folder, pictures))
    return " ".join(cells)


def _picture(path: str, folder: Path, pictures: Pictures) -> str:
    """A thumbnail of a picture named relative to `folder` or, failing that, to the current folder."""
    return pictures.thumbnail(folder / path if (folder / path).is_file() else Path(path), 256)


def _footer() -> str:
    # The rule ends what the page folds.
    return f"---\n\nMade by medmax_fast {__version__}."

"""The evaluation section of a report: our runs beside the published rows, in pairs, each in detail, and their samples.

Every figure of a run has a label: its task, or the task and what of it (`mm_out_x, images`). The published figures of
mm_out and visual_chat are of several tasks together; they stand beside the mean over all questions, not beside a part.
"""

import math
from typing import NamedTuple

from medmax_fast import figures
from medmax_fast.eval.published import INTERLEAVED, PUBLISHED, SIMILARITY, SOURCE, URL, VISUAL_CHAT
from medmax_fast.eval.reporting.browser import EvalRun, samples_part
from medmax_fast.eval.reporting.details import UNITS, details
from medmax_fast.eval.reporting.pairs import pairs_part
from medmax_fast.page import FOLDING, PUBLISHED_MARK, plain, table
from medmax_fast.pictures import Pictures

DRAWN_MODEL = "MedMax-7B"
# What is also shown as a whole: label -> metric. The label's first word begins the labels of its parts.
WHOLE = {"mm_out, all": "relative_score", "mm_out, images, all": "similarity", "visual_chat, all": "relative_score"}
INTRO = {
    "accuracy": "Percent right. `mean of these` is the plain mean of the tasks shown, `mean of 12` is as published.",
    "similarity": "Mean cosine between the embeddings of image and text; for mm_out, of drawn and reference image.",
    "mm_out": "Interleaved answers: the judge's score of the text in percent of the reference's, and the mean cosine "
    "of drawn and reference image.",
    "visual_chat": "Visual chat: the judge's score in percent of the reference's; `all` is over all questions of both "
    "kinds. Published rows were read off a plot.",
}


class Figure(NamedTuple):
    """A mean as a fraction or cosine, with its interval where there is one, over `counted` questions."""

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    counted: int = 0


Shown = dict[str, dict[str, Figure]]


def evaluation_section(runs: dict[str, EvalRun], pictures: Pictures) -> str:
    """Markdown of evaluation runs by name."""
    results = {name: run.results for name, run in runs.items()}
    parts = [
        "## Evaluation",
        *_comparison(results, pictures),
        f"Rows marked {PUBLISHED_MARK} were not measured by this package; source: {plain(SOURCE)}, <{URL}>. They are "
        "of the published evaluation data, judge and image-text encoder, and compare with ours only where ours are of "
        "the same.",
        *pairs_part(runs),
    ]
    parts.append(f"### {FOLDING[0]}")
    for name, result in results.items():
        parts += details(name, result)
    return "\n\n".join([*parts, *samples_part(runs, pictures)])


# ---- our runs beside the published rows ----


def _comparison(results: dict[str, dict], pictures: Pictures) -> list[str]:
    shown = {name: figures_of(result) for name, result in results.items()}
    known = {model: _published(model, shown) for model in PUBLISHED}
    drawn = {"name": DRAWN_MODEL, "tasks": known[DRAWN_MODEL]}
    parts = []

    def draw(caption: str, function, metric: str) -> None:
        points = {name: {k: f[1:4] for k, f in own.items()} for name, own in _only(shown, metric).items()}
        parts.append(pictures.draw(caption, lambda path: function(points, path, drawn)))

    if _only(shown, "accuracy"):
        parts.append("### Accuracy")
        draw("Accuracy per task", figures.evaluation_bars, "accuracy")
        draw("Accuracy by answer type", figures.accuracy_dots, "accuracy")
        parts += [INTRO["accuracy"], table(comparison_rows(results))]
    if _only(shown, "similarity"):
        parts += ["### Similarity", INTRO["similarity"]]
        draw("Similarity", figures.similarity_dots, "similarity")
        parts += _table(results, _only(shown, "similarity", "image_"), known)
    if _only(shown, "relative_score"):
        parts.append("### Relative scores")
        draw("Relative scores", figures.relative_dots, "relative_score")
    for name in ("mm_out", "visual_chat"):
        rows = _table(results, _only(shown, "", name), known)
        parts += [INTRO[name], *rows] if rows else []
    return parts


def figures_of(result: dict) -> dict[str, Figure]:
    """Every figure of results.json that has a value, by label; mm_out and visual_chat also as a whole."""
    found = {}
    for task, row in result["tasks"].items():
        if row[row["metric"]] is not None:
            found[task] = _figure(row["metric"], row[row["metric"]], row)
        images = row.get("image_similarity")
        if images and images["value"] is not None:
            found[f"{task}, images"] = _figure("similarity", images["value"], images)
    for label, metric in WHOLE.items():
        parts = [f for k, f in found.items() if k.startswith(label.split(",")[0]) and f.metric == metric]
        if len(parts) > 1:
            counted = sum(part.counted for part in parts)
            value = math.fsum(part.value * part.counted for part in parts) / counted
            found[label] = Figure(metric, value, counted=counted)
    return found


def _figure(metric: str, value: float, row: dict) -> Figure:
    low, high = row["ci95"] or (None, None)
    return Figure(metric, value, low, high, row["counted"])


def _published(model: str, shown: Shown) -> dict[str, float]:
    """The published figures of a model by label; of mm_out by its only task, where our runs have no more of it."""
    tasks = {label.split(",")[0] for own in shown.values() for label in own if label.startswith("mm_out_")}
    only = tasks.pop() if len(tasks) == 1 else ""
    text, images = (only, f"{only}, images") if only else ("mm_out, all", "mm_out, images, all")
    values = PUBLISHED[model]["tasks"] | SIMILARITY.get(model, {})
    if model in INTERLEAVED:
        values |= {text: INTERLEAVED[model]["text"], images: INTERLEAVED[model]["image"]}
    return values | ({"visual_chat, all": VISUAL_CHAT[model]} if model in VISUAL_CHAT else {})


def _only(shown: Shown, metric: str, prefix: str = "") -> Shown:
    """The figures of a metric ("": of any) whose labels begin so, without the runs that have none."""
    kept = {
        name: {k: f for k, f in own.items() if metric in ("", f.metric) and k.startswith(prefix)}
        for name, own in shown.items()
    }
    return {name: own for name, own in kept.items() if own}


def comparison_rows(results: dict[str, dict]) -> list[dict]:
    """One row per run with an accuracy, then one per published model, in percent, for the tasks that any run has.

    `mean of these` averages the tasks shown, so that it compares between rows that have them all.
    """
    shown = _only({name: figures_of(result) for name, result in results.items()}, "accuracy")
    tasks = list(dict.fromkeys(task for own in shown.values() for task in own))
    rows = []
    for name, own in shown.items():
        values = {task: 100 * figure.value for task, figure in own.items()}
        rows.append(_accuracy_row(_label(name, results), values, tasks, _mean(values, PUBLISHED[DRAWN_MODEL]["tasks"])))
    for model, theirs in PUBLISHED.items():
        if any(task in theirs["tasks"] for task in tasks):
            label = f"{plain(model)} {PUBLISHED_MARK}"
            rows.append(_accuracy_row(label, theirs["tasks"], tasks, f"{theirs['average']:.1f}"))
    return rows


def _accuracy_row(label: str, values: dict[str, float], tasks: list[str], mean_of_12: str) -> dict:
    cells = {task: f"{values[task]:.1f}" if task in values else "-" for task in tasks}
    return {"model": label, "mean of these": _mean(values, tasks), "mean of 12": mean_of_12, **cells}


def _mean(values: dict[str, float], tasks) -> str:
    """The plain mean over `tasks`, if there is a value of each."""
    if any(task not in values for task in tasks):
        return "-"
    return f"{math.fsum(values[task] for task in tasks) / len(tasks):.1f}"


def _table(results: dict[str, dict], shown: Shown, known: dict[str, dict]) -> list[str]:
    """Runs and published rows, a column per label that any of our runs has a figure of; [] where none has any."""
    metrics = {label: figure.metric for own in shown.values() for label, figure in own.items()}
    rows = []
    for name, own in shown.items():
        cells = {k: _cell(m, own[k].value * UNITS[m][0]) if k in own else "-" for k, m in metrics.items()}
        rows.append({"model": _label(name, results), **cells})
    for model, theirs in known.items():
        if any(label in theirs for label in metrics):
            cells = {k: _cell(m, theirs[k]) if k in theirs else "-" for k, m in metrics.items()}
            rows.append({"model": f"{plain(model)} {PUBLISHED_MARK}", **cells})
    return [table(rows)] if metrics else []


def _cell(metric: str, value: float) -> str:
    """Percent with one digit and cosines with two, as published."""
    return f"{value:.2f}" if metric == "similarity" else f"{value:.1f}"


def _label(name: str, results: dict[str, dict]) -> str:
    return f"**{plain(name)}** ({plain(results[name]['protocol'])})"

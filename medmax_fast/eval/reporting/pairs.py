"""Runs of the same questions in pairs: which differences are more than chance, given how many are looked at."""

from medmax_fast.eval.reporting.browser import EvalRun, same_questions
from medmax_fast.eval.reporting.details import in_unit
from medmax_fast.eval.statistics import compare_runs, holm
from medmax_fast.page import plain, table

# Of an adjusted p.
SIGNIFICANT = 0.05
INTRO = (
    "Each run against the first one of the same questions, over the questions that both have a score of: in percentage "
    "points for accuracies and relative scores, plain for cosines; above zero, the run named first is better. The "
    "questions about one image are taken together. `p` is how often chance alone would give a difference this large; "
    "`p, Holm` is adjusted for all {count} comparisons of this report, and is the one to judge by (bold below 0.05)."
)


def pairs_part(runs: dict[str, EvalRun]) -> list[str]:
    """Markdown of every run against the first one of the same questions; p is adjusted over all rows of the report."""
    pairs = {}
    for first, *others in same_questions(runs):
        protocol = runs[first].results["protocol"]
        for name in others:
            rows = compare_runs(runs[first].samples, runs[name].samples, protocol)
            pairs[f"**{plain(name)}** - {plain(first)} ({plain(protocol)})"] = rows
    pairs = {title: rows for title, rows in pairs.items() if rows}
    if not pairs:
        return []
    adjusted = iter(holm([row["p_value"] for rows in pairs.values() for row in rows]))
    metrics = {task: entry["metric"] for run in runs.values() for task, entry in run.results["tasks"].items()}
    parts = ["### Paired comparisons", INTRO.format(count=sum(map(len, pairs.values())))]
    for title, rows in pairs.items():
        cells, found = [], []
        for row in rows:
            p = next(adjusted)
            assert p is not None, "every comparison has one"
            # The row of the mean over the accuracy tasks is not a task of the results.
            cells.append(_row(row, metrics.get(row["task"], "accuracy"), p))
            if p < SIGNIFICANT:
                found.append(f"{cells[-1]['task']} {cells[-1]['difference']}")
        parts += [f"{title}; after the adjustment significant at 5 %: {', '.join(found) or 'nothing'}.", table(cells)]
    return parts


def _row(row: dict, metric: str, adjusted: float) -> dict:
    ends = [in_unit(metric, row[end], "+") for end in ("low", "high")]
    return {
        "task": plain(row["task"]),
        "n": row["n"],
        "images": row["images"],
        "difference": in_unit(metric, row["difference"], "+"),
        # A point is what t makes of equal differences about a few images; it says nothing.
        "95 % interval": "-" if row["low"] == row["high"] else " to ".join(ends),
        "p": _p(row["p_value"]),
        "p, Holm": f"**{_p(adjusted)}**" if adjusted < SIGNIFICANT else _p(adjusted),
    }


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"

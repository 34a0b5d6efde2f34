"""One evaluation run in detail: figures with errors, both protocols, coverage, what else was measured, and of what."""

from medmax_fast.config import PROTOCOLS
from medmax_fast.page import plain, table

# metric -> (factor, digits, unit) in tables for people.
UNITS = {"accuracy": (100, 1, " %"), "relative_score": (100, 1, " %"), "similarity": (1, 3, "")}


def in_unit(metric: str, value: float | None, sign: str = "") -> str:
    """A fraction in percent, a cosine as it is, without the unit; "-" for None. sign: "+" to show that of gains."""
    if value is None:
        return "-"
    factor, digits, _ = UNITS[metric]
    shown = round(factor * value, digits)
    return f"{shown:{sign}.{digits}f}" if shown else f"{0:.{digits}f}"


def amount(metric: str, value: float | None) -> str:
    """A value with its unit."""
    return "-" if value is None else in_unit(metric, value) + UNITS[metric][2]


def interval(metric: str, ends: list[float] | None) -> str:
    """A 95 % interval without the unit."""
    return " to ".join(in_unit(metric, end) for end in ends) if ends else "-"


def details(name: str, result: dict) -> list[str]:
    """Markdown of one run's results.json."""
    tasks = result["tasks"]
    pictured = {task: row["image_similarity"] for task, row in tasks.items() if row.get("image_similarity")}
    worded = {task: row["text_metrics"] for task, row in tasks.items() if row.get("text_metrics")}
    parts = [
        f"#### **{plain(name)}**: {plain(result['protocol'])}",
        "Means by this run's protocol. `standard error` takes every question for itself, as published; `clustered` "
        "takes the questions about one image together.",
        table([_figures(task, row["metric"], row[row["metric"]], row) for task, row in tasks.items()]),
        "Both protocols, and what became of the questions: `unparsed`, the answer or the judge's verdict on it could "
        "not be read; `failed`, there was no answer; `unjudged`, the judge did not reply.",
        table([_protocols(task, row["metric"], row) | row["coverage"] for task, row in tasks.items()]),
    ]
    if pictured:
        shown = [_figures(task, "similarity", row["value"], row) for task, row in pictured.items()]
        both = [_protocols(task, "similarity", row) for task, row in pictured.items()]
        rows = [first | second for first, second in zip(shown, both, strict=True)]
        parts += ["Cosine of drawn and reference images:", table(rows)]
    if worded:
        parts += ["Answers compared with the reference in words:", table(_numbers(worded))]
    apart = {task: row["fid"] for task, row in tasks.items() if row.get("fid")}
    if apart:
        parts += ["Distance between the drawn and the real images:", table(_numbers(apart))]
    for kind, groups in result["groups"].items():
        if groups:
            parts += [f"By {plain(kind)}:", table([_group(kind, *group) for group in groups.items()])]
    return [*parts, "\n".join(f"- {fact}" for fact in _facts(result))]


def _figures(task: str, metric: str, value: float | None, row: dict) -> dict:
    return {
        "task": plain(task),
        "n": row["n"],
        "counted": row["counted"],
        "images": row.get("images", "-"),
        "value": f"**{amount(metric, value)}**",
        "95 % interval": interval(metric, row["ci95"]),
        "by": plain(row.get("ci_method") or "-"),
        "standard error": in_unit(metric, row.get("stderr")),
        "clustered": in_unit(metric, row["stderr_clustered"]),
    }


def _protocols(task: str, metric: str, row: dict) -> dict:
    values = [row["by_protocol"][protocol] for protocol in PROTOCOLS]
    gap = None if None in values else values[1] - values[0]
    cells = {protocol: in_unit(metric, value) for protocol, value in zip(PROTOCOLS, values, strict=True)}
    return {"task": plain(task), **cells, f"{PROTOCOLS[1]} - {PROTOCOLS[0]}": in_unit(metric, gap, "+")}


def _numbers(rows: dict[str, dict]) -> list[dict]:
    """A table of figures by task, a column for every key that any task has."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    return [{"task": plain(task), **{name: _number(row.get(name)) for name in names}} for task, row in rows.items()]


def _number(value) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else plain(value)


def _group(kind: str, name: str, row: dict) -> dict:
    metric = row["metric"]
    return {
        kind: plain(name) or "(none)",
        "n": row["n"],
        "value": f"**{amount(metric, row[metric])}**",
        "95 % interval": interval(metric, row["ci95"]),
        "clustered": in_unit(metric, row["stderr_clustered"]),
    }


def _facts(result: dict) -> list[str]:
    """What was asked of whom, what was left out and why, and what the figures depend on."""
    facts = [f"Skipped: {plain(t)} ({row['n']} rows): {plain(row['reason'])}." for t, row in result["skipped"].items()]
    facts += [f"Note: {plain(note)}." for note in result["notes"]]
    for name, title in (("backend", "Model"), ("judge", "Judge"), ("clip", "Image-text encoder")):
        if result.get(name):
            facts.append(f"{title}: {_listed(result[name])}")
    facts += [f"Prompt form: {plain(result['prompt_form'])}", f"Data: {plain(result['data'])}"]
    facts += [f"sha256 of {plain(key)}: {plain(value)}" for key, value in result["hashes"].items() if value]
    return facts + ([f"Versions: {_listed(result['versions'])}"] if result.get("versions") else [])


def _listed(entries: dict) -> str:
    shown = []
    for name, value in entries.items():
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        if value not in (None, "", {}):
            shown.append(f"{plain(name.replace('_', ' '))} {plain(value)}")
    return "; ".join(shown)

"""The evaluation section of a report: our runs beside the published rows, both protocols, and the samples."""

from pathlib import Path

from medmax_fast import figures
from medmax_fast.eval.published import PUBLISHED, SOURCE, URL
from medmax_fast.eval.scoring import PROTOCOLS, plain_mean
from medmax_fast.page import PUBLISHED_MARK, plain, table
from medmax_fast.pictures import Pictures

# Samples shown, wrong ones first; all of them stay in samples.jsonl.
SHOWN_SAMPLES = 60
DRAWN_MODEL = "MedMax-7B"


def evaluation_section(runs: dict[str, tuple[dict, list[dict]]], pictures: Pictures) -> str:
    """Markdown of evaluation runs: name -> (results.json, samples.jsonl)."""
    results = {name: run[0] for name, run in runs.items()}
    bars = {
        name: {task_id: (task["accuracy"], *task["ci95"]) for task_id, task in result["tasks"].items()}
        for name, result in results.items()
    }
    published = {"name": DRAWN_MODEL, "tasks": PUBLISHED[DRAWN_MODEL]["tasks"]}
    parts = [
        "## Evaluation",
        pictures.draw("Accuracy per task", lambda path: figures.evaluation_bars(bars, path, published)),
        "Accuracy in percent.",
        table(comparison_rows(results)),
        f"Rows marked {PUBLISHED_MARK} were not measured by this package; source: {plain(SOURCE)}, <{URL}>. They are "
        "of the published evaluation data, and compare with ours only where ours are of the same data.",
    ]
    for name, result in results.items():
        parts += _details(name, result)
    parts += ["### Samples, wrong ones first", *_samples(runs, pictures)]
    return "\n\n".join(parts)


def comparison_rows(results: dict[str, dict]) -> list[dict]:
    """One row per run, then one per published model, in percent, for the tasks that any of our runs has.

    `mean of these` averages the tasks shown, so that it compares between rows that have them all; `mean of 12` is the
    published average.
    """
    tasks = list(dict.fromkeys(task_id for result in results.values() for task_id in result["tasks"]))
    rows = []
    for name, result in results.items():
        values = {task_id: 100 * task["accuracy"] for task_id, task in result["tasks"].items()}
        rows.append(_row(f"**{plain(name)}** ({result['protocol']})", values, tasks, None))
    for model, known in PUBLISHED.items():
        if any(task_id in known["tasks"] for task_id in tasks):
            rows.append(_row(f"{plain(model)} {PUBLISHED_MARK}", known["tasks"], tasks, known["average"]))
    return rows


def _row(name: str, values: dict[str, float], tasks: list[str], published_mean: float | None) -> dict:
    whole = all(task_id in values for task_id in tasks)
    return {
        "model": name,
        "mean of these": f"{plain_mean([values[task_id] for task_id in tasks]):.1f}" if whole else "-",
        **{task_id: f"{values[task_id]:.1f}" if task_id in values else "-" for task_id in tasks},
        "mean of 12": "-" if published_mean is None else f"{published_mean:.1f}",
    }


def _details(name: str, result: dict) -> list[str]:
    rows = []
    for task_id, task in result["tasks"].items():
        published, strict = (100 * task["by_protocol"][protocol] for protocol in PROTOCOLS)
        low, high = (100 * value for value in task["ci95"])
        rows.append(
            {
                "task": plain(task_id),
                "n": task["n"],
                "accuracy": f"{100 * task['accuracy']:.1f}",
                "standard error": "-" if task["stderr"] is None else f"{100 * task['stderr']:.1f}",
                "95 % interval": f"{low:.1f} to {high:.1f}",
                **{protocol: f"{100 * task['by_protocol'][protocol]:.1f}" for protocol in PROTOCOLS},
                "strict - medmax-v1": f"{strict - published:+.1f}",
                "unparsed": task["unparsed"],
                "failed": task["failed"],
            }
        )
    parts = [f"### {plain(name)}: {result['protocol']}", table(rows)]
    facts = [f"Skipped: {plain(task)} ({row['n']} rows): {row['reason']}." for task, row in result["skipped"].items()]
    facts += [f"Note: {plain(note)}." for note in result["notes"]]
    facts += [
        f"{key}: `{value}`" for key, value in {"checkpoint": result["ckpt"], "data": result["data"]}.items() if value
    ]
    facts += [f"sha256 of {key}: `{value}`" for key, value in result["hashes"].items() if value]
    return [*parts, "\n".join(f"- {fact}" for fact in facts)]


def _samples(runs: dict[str, tuple[dict, list[dict]]], pictures: Pictures) -> list[str]:
    """Tables of samples; runs on the same questions share one, with a column per run."""
    groups: dict[tuple, list[str]] = {}
    for name, (result, _) in runs.items():
        groups.setdefault((result["hashes"]["data"], result["hashes"]["images"]), []).append(name)
    parts = []
    for names in groups.values():
        if len(groups) > 1:
            parts.append(f"#### {plain(', '.join(names))}")
        parts += _sample_table(runs, names, pictures)
    return parts


def _sample_table(runs: dict, names: list[str], pictures: Pictures) -> list[str]:
    protocol = {name: runs[name][0]["protocol"] for name in names}
    by_run = {name: {sample["id"]: sample for sample in runs[name][1]} for name in names}
    samples = {identity: sample for name in names for identity, sample in by_run[name].items()}
    verdicts = {
        identity: [_verdict(by_run[name].get(identity), protocol[name]) for name in names] for identity in samples
    }
    # Wrong in the last run first, then wrong in any, then by the order of the data; runs are given oldest first.
    order = sorted(samples, key=lambda key: (verdicts[key][-1] == "right", set(verdicts[key]) == {"right"}))
    folder = Path(runs[names[0]][0]["data"])
    rows = []
    for identity in order[:SHOWN_SAMPLES]:
        sample = samples[identity]
        # Question and task come last, so that a phone shows picture, gold answer and verdicts without scrolling.
        row = {"image": pictures.thumbnail(folder / sample["image"], 112), "gold": plain(sample["answer"])}
        for name, verdict in zip(names, verdicts[identity], strict=True):
            own = by_run[name].get(identity)
            row[f"{name}: output"] = f"{verdict}: {plain(own['error'] or repr(own['output']))}" if own else "-"
        row |= {"question": plain(sample["question"]), "task": plain(sample["task"])}
        rows.append(row)
    more = len(order) - len(rows)
    return [table(rows), *([f"{more:,} more samples are in samples.jsonl."] if more else [])]


def _verdict(sample: dict | None, protocol: str) -> str:
    if sample is None:
        return "-"
    if sample["error"]:
        return "failed"
    if sample["correct"][protocol]:
        return "right"
    return "unparsed" if sample["parsed"] is None else "wrong"

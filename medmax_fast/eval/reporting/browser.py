"""The samples of evaluation runs in a report: a part per task, wrong ones first, the runs side by side.

All text comes from data, models and judges: it is shortened, escaped and shown on one line. Cells of output begin
with the verdict in bold, a word or the score.
"""

import math
from pathlib import Path
from typing import NamedTuple

from medmax_fast.config import PROTOCOLS
from medmax_fast.eval.reporting.details import amount
from medmax_fast.page import FOLDING, OUTPUT, plain, table
from medmax_fast.pictures import Pictures

# Samples shown per task; all of them stay in samples.jsonl.
SHOWN_SAMPLES = 20
# Most characters shown of a text, and of a judge's reply.
LONGEST, LONGEST_REPLY = 300, 160
# Sides of thumbnails, in pixels: of a question's image, and of drawings and what they are compared with.
_SMALL, _LARGE = 144, 192


class EvalRun(NamedTuple):
    """A run's folder, its results.json and its samples.jsonl."""

    folder: Path
    results: dict
    samples: list[dict]


def same_questions(runs: dict[str, EvalRun]) -> list[list[str]]:
    """Names of the runs, those of the same data together, whichever of its tasks they did."""
    groups: dict[str, list[str]] = {}
    for name, run in runs.items():
        groups.setdefault(run.results["hashes"]["data"], []).append(name)
    return list(groups.values())


def samples_part(runs: dict[str, EvalRun], pictures: Pictures) -> list[str]:
    """Markdown of the samples, each task below a fourth-level heading."""
    parts = [f"### {FOLDING[1]}"]
    for names in same_questions(runs):
        group = {name: runs[name] for name in names}
        for task in dict.fromkeys(sample["task"] for run in group.values() for sample in run.samples):
            parts += _task(task, group, pictures)
    return parts


def _task(task: str, runs: dict[str, EvalRun], pictures: Pictures) -> list[str]:
    by_run = {name: {s["id"]: s for s in run.samples if s["task"] == task} for name, run in runs.items()}
    values = []
    for name, run in runs.items():
        entry = run.results["tasks"].get(task)
        if entry and by_run[name]:
            value = entry[entry["metric"]]
            values.append(f"{plain(name)} {'not scored' if value is None else amount(entry['metric'], value)}")
    samples = {identity: sample for own in by_run.values() for identity, sample in own.items()}
    # The worst of the last run first, then the worst of any, then by the order of the data; runs come oldest first.
    ranks = {
        key: [_rank(own.get(key), runs[name].results["protocol"]) for name, own in by_run.items()] for key in samples
    }
    order = sorted(samples, key=lambda key: (ranks[key][-1], min(ranks[key])))
    rows = [_row(samples[key], runs, by_run, pictures) for key in order[:SHOWN_SAMPLES]]
    if all(row.get("gold") in ("-", row["question"]) for row in rows):
        rows = [{name: cell for name, cell in row.items() if name != "gold"} for row in rows]
    more = len(order) - len(rows)
    rest = [f"{more:,} more samples of {plain(task)} are in samples.jsonl."] if more else []
    return [f"#### **{plain(task)}**: {', '.join(values)}", table(rows), *rest]


def _rank(sample: dict | None, protocol: str) -> float:
    """Where a sample comes, the lowest first: its score; what was left out for no answer of use counts as zero."""
    if sample is None:
        return math.inf
    score = sample["scores"][protocol]
    if score is None:
        return 0.0 if sample["status"] in ("unparsed", "failed") else math.inf
    return score


def _row(sample: dict, runs: dict[str, EvalRun], by_run: dict[str, dict], pictures: Pictures) -> dict:
    """A row of the table; outputs stand beside the reference where pictures are drawn, elsewhere after the question."""
    drawing = sample["task"].startswith(("image_generation", "mm_out"))
    size, identity = _LARGE if drawing else _SMALL, sample["id"]
    data = Path(next(iter(runs.values())).results["data"])
    image = pictures.thumbnail(data / sample["image"], size) if sample["image"] else "-"
    asked = {"question": _short(sample["question"]), "gold": _short(sample.get("reference") or sample["answer"], "-")}
    outputs = {
        f"{name}{OUTPUT}": _output(by_run[name].get(identity), run, size, pictures) for name, run in runs.items()
    }
    return {"reference": image} | outputs | asked if drawing else {"image": image} | asked | outputs


def _output(sample: dict | None, run: EvalRun, size: int, pictures: Pictures) -> str:
    """Verdict, text, pictures, and what the judge said of them."""
    if sample is None:
        return "-"
    protocol = run.results["protocol"]
    metric = run.results["tasks"][sample["task"]]["metric"]
    drawn = [pictures.thumbnail(run.folder / path, size) for path in sample["pictures"]]
    said = _short(sample["error"] or sample["output"], "" if drawn else "(nothing)")
    notes = _notes(sample, protocol)
    # Pictures first, so that they stand beside the reference.
    cells = [f"**{_verdict(sample, metric, protocol)}:**", *drawn, said, f"*{notes}*" if notes else ""]
    return " ".join(cell for cell in cells if cell)


def _notes(sample: dict, protocol: str) -> str:
    """What the other protocol says, the similarity of an interleaved answer's picture, and what the judge said."""
    similar, judge, notes = (sample["image_similarity"] or {}).get(protocol), sample["judge"], []
    (other,) = (name for name in PROTOCOLS if name != protocol)
    if None not in sample["scores"].values() and sample["scores"][other] != sample["scores"][protocol]:
        notes.append(f"{other}: {_verdict(sample, sample['metric'], other)}")
    if similar is not None:
        notes.append(f"image {amount('similarity', similar)}")
    if judge and len(judge["scores"] or ()) == 2:
        notes.append(f"reference {judge['scores'][0]:g}, this {judge['scores'][1]:g}")
    if judge and (judge["error"] or judge["reply"]):
        notes.append(f"judge: {_short(judge['error'] or judge['reply'], '-', LONGEST_REPLY)}")
    return "; ".join(notes)


def _verdict(sample: dict, metric: str, protocol: str) -> str:
    score, status = sample["scores"][protocol], sample["status"]
    if status in ("failed", "unjudged") or (status == "unparsed" and not score):
        return status
    if score is None:
        return "not scored"
    if metric == "accuracy":
        return "right" if score == 1 else "wrong"
    return amount(metric, score)


def _short(text: str, empty: str = "(nothing)", longest: int = LONGEST) -> str:
    """A text on one line, cut at `longest` characters, without markup."""
    text = " ".join(text.split())
    if len(text) > longest:
        text = text[:longest].rstrip() + " ..."
    return plain(text) or empty

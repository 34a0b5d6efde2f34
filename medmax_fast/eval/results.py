"""The figures of results.json, computed from the samples alone: per task, per source and domain, and on average.

A mean's error takes the questions about one image together, since their answers are not independent. `stderr` is the
published one, which takes every question for itself.
"""

import math
from collections.abc import Iterable

from medmax_fast.config import PROTOCOLS
from medmax_fast.eval.published import PUBLISHED, TASK_IDS, published_value
from medmax_fast.eval.statistics import estimate, plain_mean, standard_error
from medmax_fast.eval.text_metrics import mean_metrics

# What a score can be, by metric; a relative score is a rating of 0..10 over one of 1..10.
BOUNDS = {"accuracy": (0.0, 1.0), "similarity": (-1.0, 1.0), "relative_score": (0.0, 10.0)}
STATUSES = ("answered", "unparsed", "failed", "unjudged")


def summarize(samples: list[dict], protocol: str) -> dict:
    """The figures of samples in the order of the data; everything under `tasks` and `groups` is by `protocol`.

    `average` is the published one: the plain mean of the accuracy tasks that have one by a protocol, whatever their
    number of questions.
    """
    by_task = _grouped(samples, lambda sample: [sample["task"]])
    tasks = {task_id: task_result(group, protocol) for task_id, group in by_task.items()}
    counted = [task_id for task_id, task in tasks.items() if task.get("accuracy") is not None]
    averages = {}
    for name in PROTOCOLS:
        values = [task["by_protocol"][name] for task in tasks.values() if task["metric"] == "accuracy"]
        values = [value for value in values if value is not None]
        averages[name] = plain_mean(values) if values else None
    error = _average_error([by_task[task_id] for task_id in counted], protocol)
    return {
        "protocol": protocol,
        "unit": "fraction",
        "average": averages[protocol],
        "average_tasks": len(counted),
        "average_stderr": error,
        "average_ci95": _average_interval([tasks[task_id] for task_id in counted], error),
        "average_by_protocol": averages,
        "n": len(samples),
        "coverage": _coverage(samples),
        # Verdicts that the judge's server may give another time.
        "awaited": sum(bool(sample["judge"] and sample["judge"]["passing"]) for sample in samples),
        "tasks": tasks,
        "groups": _groups(samples, protocol),
    }


def task_result(samples: list[dict], protocol: str) -> dict:
    """The figures of one task; those of `protocol`, and the mean under each protocol."""
    metric = samples[0]["metric"]
    found = figure(samples, protocol, lambda sample: sample["scores"], metric)
    result = {"metric": metric, metric: found.pop("value"), **found, "coverage": _coverage(samples)}
    worded = [sample for sample in samples if sample["text_metrics"] is not None]
    if worded:
        references = [sample["reference"] for sample in worded]
        outputs = [sample["output"] for sample in worded]
        means = mean_metrics([sample["text_metrics"] for sample in worded], outputs, references)
        result["text_metrics"] = {**means, "n": len(worded)}
    pictured = [sample for sample in samples if sample["image_similarity"] is not None]
    if pictured:
        result["image_similarity"] = figure(pictured, protocol, lambda sample: sample["image_similarity"], "similarity")
    return result


def figure(samples: list[dict], protocol: str, scores, metric: str) -> dict:
    """A mean with its errors and interval; scores(sample) is the score under each protocol, None where left out.

    The interval is kept within what the metric can be, and is None where all scores of a few images are equal, which
    would make it a point.
    """
    values = {name: [scores(s)[name] for s in samples if scores(s)[name] is not None] for name in PROTOCOLS}
    clusters = [sample["cluster"] for sample in samples if scores(sample)[protocol] is not None]
    found = estimate(values[protocol], clusters, metric == "accuracy")
    least, most = BOUNDS[metric]
    ends = None
    if found and found.low is not None and found.high is not None and found.low < found.high:
        ends = [max(found.low, least), min(found.high, most)]
    return {
        "value": found and found.mean,
        "stderr": found and found.stderr,
        "stderr_clustered": found and found.stderr_clustered,
        "n": len(samples),
        "counted": len(clusters),
        "images": len(set(clusters)),
        "ci95": ends,
        "ci_method": found.method if found and ends else None,
        "by_protocol": {name: math.fsum(v) / len(v) if v else None for name, v in values.items()},
    }


def _groups(samples: list[dict], protocol: str) -> dict:
    """Accuracy by source, and relative scores of chats by domain."""
    kinds = {
        "source": ("accuracy", lambda sample: [sample["source"]]),
        "domain": ("relative_score", lambda sample: sample["domains"]),
    }
    groups: dict[str, dict] = {}
    for name, (metric, keys) in kinds.items():
        groups[name] = {}
        scored = [sample for sample in samples if sample["metric"] == metric]
        for key, members in _grouped(scored, keys).items():
            found = figure(members, protocol, lambda sample: sample["scores"], metric)
            if found["value"] is not None:
                kept = {k: found[k] for k in ("n", "counted", "stderr_clustered", "ci95")}
                groups[name][key] = {"metric": metric, metric: found["value"], **kept}
    return groups


def _grouped(samples: Iterable[dict], keys) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for sample in samples:
        for key in keys(sample):
            groups.setdefault(key, []).append(sample)
    return groups


def _average_error(groups: list[list[dict]], protocol: str) -> float | None:
    """Standard error of the plain mean of several tasks' means; what an image adds to each of them goes together."""
    shares: dict[str, float] = {}
    for group in groups:
        kept = [(sample["cluster"], sample["scores"][protocol]) for sample in group]
        kept = [(cluster, value) for cluster, value in kept if value is not None]
        mean = math.fsum(value for _, value in kept) / len(kept)
        for cluster, value in kept:
            shares[cluster] = shares.get(cluster, 0.0) + (value - mean) / len(kept) / len(groups)
    # One value per image, with the mean 0 and the error of the whole.
    return standard_error([len(shares) * share for share in shares.values()])


def _average_interval(tasks: list[dict], error: float | None) -> list[float] | None:
    """Interval of the plain mean, from those of the tasks: MOVER (Donner and Zou, 2012), which keeps them where a task
    is all right or all wrong, widened by what images that several tasks share add to the error of independent tasks.
    """
    if not tasks or any(task["ci95"] is None for task in tasks):
        return None
    means, count = [task["accuracy"] for task in tasks], len(tasks)
    apart = math.sqrt(math.fsum((task["stderr_clustered"] or 0.0) ** 2 for task in tasks)) / count
    wider = max(1.0, error / apart) if error and apart else 1.0
    lows, highs = zip(*(task["ci95"] for task in tasks), strict=True)
    below, above = (wider * math.dist(means, ends) / count for ends in (lows, highs))
    return [max(plain_mean(means) - below, 0.0), min(plain_mean(means) + above, 1.0)]


def _coverage(samples: list[dict]) -> dict[str, int]:
    return {status: sum(sample["status"] == status for sample in samples) for status in STATUSES}


def summary_table(results: dict) -> list[dict]:
    """One row per task for people, with MedMax-7B's published figure; percent, but for similarities."""
    protocol = results["protocol"]
    (other,) = (name for name in PROTOCOLS if name != protocol)
    rows = []
    for task_id, task in results["tasks"].items():
        percent, lost = task["metric"] != "similarity", task["coverage"]
        rows.append(
            {
                "task": task_id,
                "n": task["n"],
                "figure": task["metric"] + " %" * percent,
                protocol: _cell(task[task["metric"]], percent),
                "95 % interval": _interval(task["ci95"], percent),
                other: _cell(task["by_protocol"][other], percent),
                **{status: lost[status] for status in STATUSES[1:]},
                "published": _cell(published_value("MedMax-7B", task_id), percent),
            }
        )
    if results["average"] is not None:
        blank = dict.fromkeys(rows[0], "")
        rows.append(
            {
                **blank,
                "task": f"mean of {results['average_tasks']} VQA tasks",
                "n": sum(task["n"] for task in results["tasks"].values() if task.get("accuracy") is not None),
                "figure": "accuracy %",
                protocol: _cell(results["average"], True),
                "95 % interval": _interval(results["average_ci95"], True),
                other: _cell(results["average_by_protocol"][other], True),
                "published": _cell(PUBLISHED["MedMax-7B"]["average"] / 100, True)
                if results["average_tasks"] == len(TASK_IDS)
                else "",
            }
        )
    return rows


def _interval(ends: list[float] | None, percent: bool) -> str:
    return "" if ends is None else " to ".join(_cell(end, percent) for end in ends)


def _cell(value: float | None, percent: bool) -> str:
    if value is None:
        return ""
    return f"{100 * value:.1f}" if percent else f"{value:.3f}"

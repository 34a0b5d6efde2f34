"""Results of evaluations: runs side by side with their intervals, and published values that we did not measure."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medmax_fast.figures import drawing
from medmax_fast.figures.drawing import DOTS, SERIES, empty_axes, lanes, legend_outside, literal


def evaluation_bars(runs: Mapping[str, Mapping[str, Sequence]], path: str | Path, published=None) -> Path:
    """Accuracy per task with 95 % intervals, the runs side by side, in two rows where one would be too long.

    runs: run name -> task id -> (accuracy, low, high) as fractions, low and high None where there is no interval.
    published: {"name": str, "tasks": task id -> percent}, drawn as open diamonds since it was not measured by us.
    """
    tasks = _tasks(runs)
    rows = 1 if len(tasks) * (1 + len(runs)) <= 20 else 2
    length = -(-len(tasks) // rows)
    width = min(max(5.0, 1.0 + length, 1.6 + 0.32 * length * (1 + len(runs))), 7.2)
    figure, grid = empty_axes(width, 0.6 + 2.8 * rows, rows)
    for axes, first in zip(grid[:, 0], range(0, len(tasks), length), strict=True):
        _draw_bars(axes, runs, tasks[first : first + length], published)
        axes.set(xlim=(-0.6, length - 0.4))
    legend_outside(figure)
    return drawing.save(figure, path)


def _tasks(runs: Mapping[str, Mapping]) -> list[str]:
    return list(dict.fromkeys(task for values in runs.values() for task in values))


def _draw_bars(axes, runs: Mapping, tasks: Sequence[str], published) -> None:
    width = 0.8 / len(runs)
    for i, (name, values) in enumerate(runs.items()):
        color, _, marker, hatch = SERIES[i % len(SERIES)]
        places, means, errors = _own(values, tasks, i, width, 100)
        axes.bar(places, means, width, color=color, hatch=hatch, edgecolor="white", label=literal(name))
        # White below black, so that the lower half shows on a dark bar.
        for ecolor, lw in (("white", 3), ("black", 1)):
            axes.errorbar(places, means, errors, fmt="none", ecolor=ecolor, capsize=3, lw=lw)
        # By which a bar of nothing is seen, and whose it is.
        axes.plot(places, means, marker, color=color, mec="white", ms=5, zorder=3)
    axes.plot(*_published(tasks, published), "D", mfc="white", mec="black", ms=7, label=_published_label(published))
    names = [task.rpartition("_")[0] + "\n" + task.rpartition("_")[2] for task in tasks]
    axes.set_xticks(range(len(tasks)), [literal(name) for name in names], fontsize=9)
    axes.set(ylabel="accuracy (%), 95 % interval", ylim=(0, 103))


def _own(values: Mapping[str, Sequence], tasks: Sequence[str], i: int, width: float, scale: float) -> tuple:
    """Places [N], values [N] and distances to the interval's ends [2, N] of run i; NaN where there is no interval."""
    own = np.array([(k, *values[task]) for k, task in enumerate(tasks) if task in values], dtype=float).reshape(-1, 4)
    places, means, lows, highs = own.T * [[1], [scale], [scale], [scale]]
    # Rounding must not make a distance negative.
    return places - 0.4 + (i + 0.5) * width, means, np.maximum([means - lows, highs - means], 0)


def _published(tasks: Sequence[str], published) -> tuple[list, list]:
    known = published["tasks"] if published else {}
    return [k for k, task in enumerate(tasks) if task in known], [known[task] for task in tasks if task in known]


def _published_label(published) -> str:
    return f"{published['name']} (published)" if published else ""


def accuracy_dots(runs: Mapping[str, Mapping[str, Sequence]], path: str | Path, published=None) -> Path:
    """Accuracies by answer type, a panel each for yes or no, multiple choice and open; arguments as evaluation_bars."""
    kinds = {"_closed": "yes or no", "_mcq": "multiple choice", "_open": "open"}
    panels = {title: [task for task in _tasks(runs) if task.endswith(end)] for end, title in kinds.items()}
    panels = {title: tasks for title, tasks in panels.items() if tasks}
    return _dots(panels, runs, path, published, "accuracy (%), 95 % interval", 100, (0, 100))


def similarity_dots(runs: Mapping[str, Mapping[str, Sequence]], path: str | Path, published=None) -> Path:
    """Cosines of images with texts or images; arguments as evaluation_bars, but published cosines are plain."""
    return _dots({"": _tasks(runs)}, runs, path, published, "cosine similarity, 95 % interval", 1)


def relative_dots(runs: Mapping[str, Mapping[str, Sequence]], path: str | Path, published=None) -> Path:
    """The judge's scores relative to those of the reference answers; arguments as evaluation_bars."""
    return _dots({"": _tasks(runs)}, runs, path, published, "score relative to the reference (%), 95 % interval", 100)


def _dots(panels: Mapping, runs: Mapping, path: str | Path, published, unit: str, scale: float, limits=None) -> Path:
    """Dot plot: a lane per task with the runs below each other in it; panel title -> task ids."""
    lane = 0.14 * len(runs) + 0.16
    heights = [lane * len(tasks) + 0.3 for tasks in panels.values()]
    figure, grid = empty_axes(6.6, sum(heights) + 1.0, len(panels), heights=heights, sharex=True)
    for axes, (title, tasks) in zip(grid[:, 0], panels.items(), strict=True):
        for i, (name, values) in enumerate(runs.items()):
            color, marker = SERIES[i % len(SERIES)][0], DOTS[i % len(DOTS)]
            places, means, errors = _own(values, tasks, i, 0.8 / len(runs), scale)
            axes.errorbar(means, places, xerr=errors, fmt="none", ecolor=color, capsize=2, lw=1.2)
            axes.plot(means, places, marker, color=color, ms=5, label=literal(name))
        places, theirs = _published(tasks, published)
        label = _published_label(published)
        axes.plot(theirs, places, "D", mfc="none", mec="black", ms=8, mew=1.2, label=label, zorder=3)
        lanes(axes, [literal(task) for task in tasks])
        axes.set_title(title, fontsize=10, loc="left")
    axes.set(xlabel=unit)
    if limits:
        axes.set_xlim(limits[0] - 2, limits[1] + 2)
    legend_outside(figure)
    return drawing.save(figure, path)

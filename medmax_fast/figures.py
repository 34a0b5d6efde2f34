"""One function per figure; each takes plain data, writes a PNG and returns its path.

matplotlib's figure objects are used without pyplot, so no display and no global state is needed. Series differ in
colour (the Okabe-Ito palette, safe for the colour-blind), in lightness and in line style, marker or hatch, so that
every figure can be read in greyscale. Files are written atomically.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medmax_fast.runtime import atomic_path

DARK, MIDDLE, LIGHT, GREY = "#0B4F7D", "#D55E00", "#E9B44C", "#6B6B6B"
SERIES = ((DARK, "-", "o", ""), (MIDDLE, "--", "s", "//"), (LIGHT, "-.", "^", ".."), (GREY, ":", "D", "xx"))
# Markers of dot plots: for more runs than SERIES has colours, and without the diamond of published values.
DOTS = ("o", "s", "^", "v", "P", "X", "<", ">")
GRID = "#DDDDDD"
DPI = 130
# Of a loss curve; more would fill the figure with the noise from step to step.
MOST_POINTS = 500


def loss_curve(metrics: Sequence[Mapping], path: str | Path, validation: Sequence[Mapping] = ()) -> Path:
    """Training loss over optimizer steps, text and image targets apart, and the validation loss.

    metrics: rows of metrics.jsonl with `step` and `loss`, `text_loss`, `image_loss` in nats per supervised id, each
    of which may be absent or None where a step had no such target. validation: rows with `step` and `loss`.
    Beyond MOST_POINTS logged steps, lines are running means over a fiftieth of them, and the values faint points.
    """
    figure, ((axes,),) = _figure(7.2, 3.6)
    named = {"loss": "all targets", "text_loss": "text targets", "image_loss": "image targets"}
    window = (len(metrics) // 50) | 1 if len(metrics) > MOST_POINTS else 1
    for (name, label), (color, style, marker, _) in zip(named.items(), SERIES, strict=False):
        steps, values = _points(metrics, name)
        if len(steps) == 0:
            continue
        if window > 1:
            axes.plot(steps, values, ".", color=color, markersize=2.5, alpha=0.3, markeredgewidth=0, zorder=1)
            values = running_mean(values, window)
        every = max(1, len(steps) // 12)
        axes.plot(steps, values, color=color, linestyle=style, marker=marker, markevery=every, label=label)
    steps, values = _points(validation, "loss")
    if len(steps):
        color, style, marker, _ = SERIES[3]
        axes.plot(steps, values, color=color, linestyle=style, marker=marker, mfc="white", label="validation", zorder=3)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised id)")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if window > 1:
        axes.set_title(f"points: training steps, lines: their running mean over {window}", fontsize=10)
    _legend(axes)
    return _save(figure, path)


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """float64 [N]: means over an odd `window` of values around each one, over fewer where the ends cut it."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    places = np.arange(len(values))
    first, end = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def _points(rows: Sequence[Mapping], name: str) -> tuple[list, list]:
    rows = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in rows], [row[name] for row in rows]


def store_overview(
    counts: Sequence[int],
    edges: Sequence[float],
    fill: Mapping[int, float],
    padded: Mapping[int, float],
    path: str | Path,
    note: str = "",
    cut: int = 0,
) -> Path:
    """Number of rows by length, and below it the share of packs and of padded batches that holds rows.

    counts: [B] rows between edges [B + 1] in ids. fill: by pack length in ids; padded: by batch size; fractions 0..1.
    cut: where the published trainer cuts rows, marked if some are longer.
    """
    figure, ((above,), (below,)) = _figure(7.2, 6.6, 2)
    _draw_lengths(above, counts, edges, note, cut)
    _draw_fill(below, fill, padded)
    return _save(figure, path)


def _draw_lengths(axes, counts: Sequence[int], edges: Sequence[float], note: str, cut: int) -> None:
    counts, edges = np.asarray(counts), np.asarray(edges, dtype=float)
    assert len(edges) == len(counts) + 1
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", color=DARK, edgecolor="white", linewidth=0.5)
    axes.set(xlabel="row length (ids)", ylabel="rows", xlim=(0, edges[-1]))
    axes.set_title(note, fontsize=10)
    filled = counts[counts > 0]
    if len(filled) and filled.max() > 100 * filled.min():
        # A linear scale would show the few long rows as nothing.
        axes.set(yscale="log", ylabel="rows (log scale)")
        axes.set_ylim(bottom=0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    if 0 < cut < edges[-1]:
        axes.axvline(cut, color=MIDDLE, linestyle="--", label=f"published cut, {cut:,} ids")
        _legend(axes)


def _draw_fill(axes, fill: Mapping[int, float], padded: Mapping[int, float]) -> None:
    names = [f"packs of {length:,}" for length in fill] + [f"padded as published, batch {size}" for size in padded]
    values = [100 * value for value in [*fill.values(), *padded.values()]]
    for i, value in enumerate(values):
        color, _, _, hatch = SERIES[0] if i < len(fill) else SERIES[2]
        axes.barh(i, value, color=color, hatch=hatch, edgecolor="white")
        axes.text(min(value, 100) + 1, i, f"{value:.1f} %", va="center", fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.grid(axis="x", color=GRID)
    axes.set(xlabel="share of positions that hold a row (%)", xlim=(0, 112))
    axes.set_xticks(range(0, 101, 20))


def evaluation_bars(runs: Mapping[str, Mapping[str, Sequence]], path: str | Path, published=None) -> Path:
    """Accuracy per task with 95 % intervals, the runs side by side, in two rows where one would be too long.

    runs: run name -> task id -> (accuracy, low, high) as fractions, low and high None where there is no interval.
    published: {"name": str, "tasks": task id -> percent}, drawn as open diamonds since it was not measured by us.
    """
    tasks = _tasks(runs)
    rows = 1 if len(tasks) * (1 + len(runs)) <= 20 else 2
    length = -(-len(tasks) // rows)
    width = min(max(5.0, 1.0 + length, 1.6 + 0.32 * length * (1 + len(runs))), 7.2)
    figure, grid = _figure(width, 0.6 + 2.8 * rows, rows)
    for axes, first in zip(grid[:, 0], range(0, len(tasks), length), strict=True):
        _draw_bars(axes, runs, tasks[first : first + length], published)
        axes.set(xlim=(-0.6, length - 0.4))
    _legend_outside(figure)
    return _save(figure, path)


def _tasks(runs: Mapping[str, Mapping]) -> list[str]:
    return list(dict.fromkeys(task for values in runs.values() for task in values))


def _draw_bars(axes, runs: Mapping, tasks: Sequence[str], published) -> None:
    width = 0.8 / len(runs)
    for i, (name, values) in enumerate(runs.items()):
        color, _, marker, hatch = SERIES[i % len(SERIES)]
        places, means, errors = _own(values, tasks, i, width, 100)
        axes.bar(places, means, width, color=color, hatch=hatch, edgecolor="white", label=name)
        # White below black, so that the lower half shows on a dark bar.
        for ecolor, lw in (("white", 3), ("black", 1)):
            axes.errorbar(places, means, errors, fmt="none", ecolor=ecolor, capsize=3, lw=lw)
        # By which a bar of nothing is seen, and whose it is.
        axes.plot(places, means, marker, color=color, mec="white", ms=5, zorder=3)
    axes.plot(*_published(tasks, published), "D", mfc="white", mec="black", ms=7, label=_published_label(published))
    names = [task.rpartition("_")[0] + "\n" + task.rpartition("_")[2] for task in tasks]
    axes.set_xticks(range(len(tasks)), names, fontsize=9)
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
    figure, grid = _figure(6.6, sum(heights) + 1.0, len(panels), heights=heights, sharex=True)
    for axes, (title, tasks) in zip(grid[:, 0], panels.items(), strict=True):
        for i, (name, values) in enumerate(runs.items()):
            color, marker = SERIES[i % len(SERIES)][0], DOTS[i % len(DOTS)]
            places, means, errors = _own(values, tasks, i, 0.8 / len(runs), scale)
            axes.errorbar(means, places, xerr=errors, fmt="none", ecolor=color, capsize=2, lw=1.2)
            axes.plot(means, places, marker, color=color, ms=5, label=name)
        places, theirs = _published(tasks, published)
        label = _published_label(published)
        axes.plot(theirs, places, "D", mfc="none", mec="black", ms=8, mew=1.2, label=label, zorder=3)
        axes.set_yticks(range(len(tasks)), tasks, fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.set(ylim=(len(tasks) - 0.5, -0.5))
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(False, axis="y")
        axes.grid(axis="x", color=GRID, linewidth=0.7)
        for edge in range(1, len(tasks)):
            axes.axhline(edge - 0.5, color=GRID, linewidth=0.7)
    axes.set(xlabel=unit)
    if limits:
        axes.set_xlim(limits[0] - 2, limits[1] + 2)
    _legend_outside(figure)
    return _save(figure, path)


def picture_grid(rows: Sequence[Sequence], columns: Sequence[str], path: str | Path, names: Sequence[str] = ()) -> Path:
    """A grid of pictures, for originals beside reconstructions or drawings before and after training.

    rows: one sequence of uint8 pictures [H, W, 3] or [H, W] per row, None where there is none; columns: one heading
    per column; names: one label per row.
    """
    assert all(len(row) == len(columns) for row in rows)
    figure, grid = _figure(2.0 * len(columns) + 0.3, 2.0 * len(rows) + 0.3, len(rows), len(columns))
    for i, row in enumerate(rows):
        for k, picture in enumerate(row):
            axes = grid[i, k]
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            for spine in axes.spines.values():
                spine.set_visible(False)
            if picture is not None:
                axes.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=255)
            if i == 0:
                axes.set_title(columns[k], fontsize=10)
            if k == 0 and names:
                axes.set_ylabel(names[i], fontsize=9)
    return _save(figure, path)


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, heights=None, sharex: bool = False):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights, sharex=sharex)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, grid


def _legend(axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def _legend_outside(figure) -> None:
    """One legend above all axes, each series once, published values last."""
    named = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if not hasattr(handle, "get_xdata") or len(handle.get_xdata()):
                named.setdefault(label, handle)
    labels = sorted(named, key=lambda label: label.endswith("(published)"))
    handles = [named[label] for label in labels]
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=9)


def _save(figure, path: str | Path) -> Path:
    path = Path(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    return path

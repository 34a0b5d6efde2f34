"""The loss of a training run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medmax_fast.figures import drawing
from medmax_fast.figures.drawing import SERIES, empty_axes, legend

# Of a loss curve; more would fill the figure with the noise from step to step.
MOST_POINTS = 500


def loss_curve(metrics: Sequence[Mapping], path: str | Path, validation: Sequence[Mapping] = ()) -> Path:
    """Training loss over optimizer steps, text and image targets apart, and the validation loss.

    metrics: rows of metrics.jsonl with `step` and `loss`, `text_loss`, `image_loss` in nats per supervised id, each
    of which may be absent or None where a step had no such target. validation: rows with `step` and `loss`.
    Beyond MOST_POINTS logged steps, lines are running means over a fiftieth of them, and the values faint points.
    """
    figure, ((axes,),) = empty_axes(7.2, 3.6)
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
    axes.xaxis.set_major_formatter("{x:,.0f}")
    if window > 1:
        axes.set_title(f"points: training steps, lines: their running mean over {window}", fontsize=10)
    legend(axes)
    return drawing.save(figure, path)


def running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """float64 [N]: means over an odd `window` of values around each one, over fewer where the ends cut it."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    places = np.arange(len(values))
    first, end = np.maximum(places - window // 2, 0), np.minimum(places + window // 2 + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def _points(rows: Sequence[Mapping], name: str) -> tuple[list, list]:
    rows = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in rows], [row[name] for row in rows]

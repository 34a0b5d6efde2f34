"""What benchmarks measured beside what the machine can do."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medmax_fast.figures import drawing
from medmax_fast.figures.drawing import BLACK, DARK, DOTS, GRID, MIDDLE, empty_axes, lanes, legend, legend_outside

OURS, OTHERS = "ours", "what ours is compared with"
# Ticks of an axis of shares, in percent.
SHARES = tuple(digit * 10.0**power for power in range(-3, 3) for digit in (1, 3))


def roofline(rows: Sequence[Mapping], path: str | Path) -> Path:
    """Performance over arithmetic intensity under the roofline, and below it every stage's share of its roofline.

    rows: the rows of a benchmark.json. Those without a share (neither bytes nor FLOP are counted) are left out; one at
    least must have one. The upper part, of rows with both bytes and FLOP, is left out if there are none; its roof is
    the fastest copy and the fastest product that they were held to. Below, each row is held to what its own process
    measured, as in the table of the run.
    """
    rows = [row for row in rows if row["share"]]
    both = [row for row in rows if row["moved_bytes"] and row["flop"]]
    ours = _our_forms(rows)
    heights = [3.4] * bool(both) + [0.5 + 0.28 * len(ours)]
    figure, grid = empty_axes(7.2, sum(heights) + 0.8, len(heights), heights=heights)
    if both:
        # What none of these was held to is taken from the whole run.
        copy, product = (_rate(both, bound) or _rate(rows, bound) for bound in ("copy", "product"))
        _draw_roof(grid[0, 0], both, ours, copy, product)
    _draw_shares(grid[-1, 0], rows, ours)
    legend_outside(figure)
    return drawing.save(figure, path)


def _our_forms(rows: Sequence[Mapping]) -> dict[str, set[str]]:
    """Stage -> its forms that are ours: named so, or where none is, all but the one that others are compared with."""
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row["stage"], set()).update({row["form"]} - {row["beside"]})
    return {stage: {form for form in own if form.startswith("ours")} or own for stage, own in found.items()}


def _rate(rows: Sequence[Mapping], bound: str) -> float:
    """The fastest copy (bytes per second) or product (FLOP per second) that rows were held to; 0.0 if none was."""
    work = {"copy": "moved_bytes", "product": "flop"}[bound]
    return max((row[work] / row["floor_s"] for row in rows if row["bound"] == bound), default=0.0)


def _draw_roof(axes, rows: Sequence[Mapping], ours: Mapping[str, set[str]], copy: float, product: float) -> None:
    intensity = np.array([row["flop"] / row["moved_bytes"] for row in rows])
    attained = np.array([row["flop"] / row["p50_s"] for row in rows])
    corner = product / copy if copy and product else intensity.max()
    ends = min(intensity.min(), corner) / 2, max(intensity.max(), corner) * 4
    places = np.array([ends[0], corner, ends[1]])
    roof = np.minimum(places * (copy or np.inf), product or np.inf)
    unit, size = ("TFLOP/s", 1e12) if roof.max() >= 1e12 else ("GFLOP/s", 1e9)
    axes.plot(places, roof / size, color=BLACK, linewidth=1.5)
    for stage, marker in zip(dict.fromkeys(row["stage"] for row in rows), DOTS * len(rows), strict=False):
        for own in (False, True):
            chosen = [row["stage"] == stage and (row["form"] in ours[stage]) == own for row in rows]
            _points(axes, intensity[chosen], attained[chosen] / size, marker, own)
        axes.plot([], [], marker, color=DARK, label=stage)
    legend(axes)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=(attained.min() / size / 2, 2.5 * roof.max() / size))
    axes.set(xlabel="arithmetic intensity (FLOP per byte that must move)", ylabel=f"performance ({unit})")
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    limits = [f"copy {copy / 1e9:,.0f} GB/s"] * bool(copy) + [f"product {product / size:,.0f} {unit}"] * bool(product)
    axes.set_title(f"roof: {', '.join(limits)}, as measured", fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:,g}")


def _draw_shares(axes, rows: Sequence[Mapping], ours: Mapping[str, set[str]]) -> None:
    for own in (True, False):
        chosen = [row for row in rows if (row["form"] in ours[row["stage"]]) == own]
        lane = [list(ours).index(row["stage"]) for row in chosen]
        _points(axes, [100 * row["share"] for row in chosen], lane, "o", own, OURS if own else OTHERS)
    bounds = {stage: dict.fromkeys(row["bound"] for row in rows if row["stage"] == stage) for stage in ours}
    lanes(axes, [f"{stage} ({', '.join(bound)})" for stage, bound in bounds.items()])
    shares = [100 * row["share"] for row in rows]
    left, right = min(shares) / 1.5, max(130, 1.3 * max(shares))
    axes.axvline(100, color=BLACK, linewidth=1.5)
    axes.set(xlabel="share of the roofline (%, log scale), by stage and what bounds it", xscale="log")
    axes.set_xticks([tick for tick in SHARES if left < tick < right])
    axes.set(xlim=(left, right))
    axes.xaxis.set_major_formatter("{x:g}")


def _points(axes, x: Sequence | np.ndarray, y: Sequence | np.ndarray, marker: str, ours: bool, label: str = "") -> None:
    """Filled for our forms, in front; open for the others."""
    color = DARK if ours else MIDDLE
    style = {"mec": color, "mfc": color if ours else "white", "mew": 1.2, "ms": 6, "zorder": 4 if ours else 3}
    axes.plot(x, y, marker, label=label, clip_on=False, **style)

"""What a token store holds: how long its rows are, how well they pack, which image codes they use."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medmax_fast.figures import drawing
from medmax_fast.figures.drawing import DARK, GRID, MIDDLE, SERIES, empty_axes, legend


def token_histogram(
    counts: Sequence[int], edges: Sequence[float], path: str | Path, note: str = "", cut: int = 0
) -> Path:
    """Number of rows by length: counts [B] of rows between edges [B + 1] in ids.

    cut: where the published trainer cuts rows, marked if some are longer. note: the title.
    """
    counts, edges = np.asarray(counts), np.asarray(edges, dtype=float)
    assert len(edges) == len(counts) + 1
    figure, ((axes,),) = empty_axes(7.2, 3.3)
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
        if axis.get_scale() == "linear":
            axis.get_major_locator().set_params(integer=True)
    if 0 < cut < edges[-1]:
        axes.axvline(cut, color=MIDDLE, linestyle="--", label=f"published cut, {cut:,} ids")
        legend(axes)
    return drawing.save(figure, path)


def packing(fill: Mapping[int, float], padded: Mapping[int, float], path: str | Path) -> Path:
    """Share of packs and of padded batches that holds rows.

    fill: by pack length in ids; padded: by batch size, as published; fractions 0..1.
    """
    names = [f"packs of {length:,}" for length in fill] + [f"padded as published, batch {size}" for size in padded]
    values = [100 * value for value in [*fill.values(), *padded.values()]]
    figure, ((axes,),) = empty_axes(7.2, 0.8 + 0.28 * len(names))
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
    return drawing.save(figure, path)


def code_usage(counts: Sequence[int] | np.ndarray, path: str | Path, note: str = "") -> Path:
    """How often image codes occur, the commonest first: a short line means dead codes, a steep one few that do it all.

    counts: [K], occurrences of each code of the codebook, at least one in all. note: the title.
    """
    shares = 100 * np.sort(np.asarray(counts, dtype=float))[::-1] / np.sum(counts)
    used = shares[shares > 0]
    figure, ((axes,),) = empty_axes(7.2, 3.3)
    # The marker shows a line of a single code.
    axes.plot(
        np.arange(1, len(used) + 1), used, color=DARK, marker="o", markevery=[0, -1], ms=4, label="codes that occur"
    )
    axes.plot(
        [1, len(shares)], [100 / len(shares)] * 2, color=MIDDLE, linestyle="--", label="if all occurred equally often"
    )
    axes.set(xlabel="codes, the commonest first", ylabel="share of all codes (%, log scale)", yscale="log")
    # Room for the marker of the first.
    axes.set_xlim(-0.01 * len(shares), len(shares))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(note, fontsize=10)
    legend(axes)
    return drawing.save(figure, path)

"""What all figures share: colours, markers, empty axes, legends, and the file.

Series differ in colour, in lightness (L* 20 apart and more, 12 as those without red cones see them, who still tell
blue from orange) and in line style, marker or hatch. matplotlib's figure objects are used without pyplot: no display
is needed and there is no global state.
"""

import warnings
from pathlib import Path
from typing import Any

from medmax_fast.files import atomic_path

# Blue, orange and yellow near those of Okabe and Ito, and a black that their edges in white stand out from.
DARK, MIDDLE, LIGHT, BLACK = "#0B4F7D", "#D55E00", "#E9B44C", "#161616"
# (colour, line style, marker, hatch) of each series.
SERIES = ((DARK, "-", "o", ""), (MIDDLE, "--", "s", "//"), (LIGHT, "-.", "^", ".."), (BLACK, ":", "D", "xx"))
# Markers of dot plots: for more runs than SERIES has colours, and without the diamond of published values.
DOTS = ("o", "s", "^", "v", "P", "X", "<", ">")
GRID = "#DDDDDD"
DPI = 130


def empty_axes(width: float, height: float, rows: int = 1, columns: int = 1, heights=None, sharex: bool = False):
    """(figure of so many inches, its axes as an array [rows, columns])."""
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


def lanes(axes, names) -> None:
    """Name a lane per row of a dot plot, from the top, with lines between them and the grid across."""
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(names) - 0.5, -0.5))
    axes.grid(False, axis="y")
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    for edge in range(1, len(names)):
        axes.axhline(edge - 0.5, color=GRID, linewidth=0.7)


def legend(axes) -> None:
    """A legend where there is room in the axes, if anything in them has a name."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def legend_outside(figure) -> None:
    """One legend above all axes, each series once, published values last."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if not hasattr(handle, "get_xdata") or len(handle.get_xdata()):
                named.setdefault(label, handle)
    labels = sorted(named, key=lambda label: label.endswith("(published)"))
    handles = [named[label] for label in labels]
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=9)


def literal(name: str) -> str:
    """A name from data as matplotlib has to get it, which reads what stands between dollar signs as a formula."""
    return name.replace("$", r"\$")


def save(figure, path: str | Path) -> Path:
    """Write the PNG, atomically."""
    path = Path(path)
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes, of which a log need not tell.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(temporary, format="png")
    return path

"""Pictures beside what their codes decode to."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medmax_fast.figures import drawing
from medmax_fast.figures.drawing import empty_axes, literal

# Pictures side by side, and letters of a name that fit above one.
ACROSS, LETTERS = 4, 24


def reconstruction_grid(
    originals: Sequence[np.ndarray], decoded: Sequence[np.ndarray], names: Sequence[str], path: str | Path
) -> Path:
    """Each original above what its codes decode to, four side by side, with the PSNR in dB below.

    originals, decoded: N > 0 uint8 pictures, [H, W, 3] or grey [H, W], the two of a pair of one shape.
    """
    rows = math.ceil(len(originals) / ACROSS)
    columns = min(len(originals), ACROSS)
    figure, grid = empty_axes(max(1.75 * columns + 0.3, 3.0), 3.9 * rows, 2 * rows, columns)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    for i, (original, picture, name) in enumerate(zip(originals, decoded, names, strict=True)):
        row, column = 2 * (i // ACROSS), i % ACROSS
        above, below = grid[row, column], grid[row + 1, column]
        for axes, pixels in ((above, original), (below, picture)):
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        title = name if len(name) <= LETTERS else name[: LETTERS - 3] + "..."
        # An empty line keeps it apart from the figures of the row above.
        above.set_title("\n" * (row > 0) + literal(title), fontsize=9)
        value = psnr(original, picture)
        below.set_xlabel("equal" if value == math.inf else f"PSNR {value:.1f} dB", fontsize=9)
        if column == 0:
            above.set_ylabel("original", fontsize=9)
            below.set_ylabel("from its codes", fontsize=9)
    return drawing.save(figure, path)


def psnr(original: np.ndarray, decoded: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 pictures of one shape: 10 log10(255^2 / mean squared difference), in dB."""
    assert original.dtype == decoded.dtype == np.uint8 and original.shape == decoded.shape
    error = np.mean((original.astype(np.float64) - decoded) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)

"""The geometry of the published preprocessing, and its resize in C++ (csrc/resample), bit for bit Pillow's.

The shorter side becomes 512 with Python's rounding, the filter is Pillow's LANCZOS, columns first, the centre
512 x 512 pixels are kept, and only those are computed. `fit_ref` is the same from Pillow itself.
"""

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIDE = 512


def resized_size(width: int, height: int) -> tuple[int, int]:
    """Size after the shorter side is scaled to 512, with Python's rounding."""
    scale = SIDE / min(width, height)
    return round(scale * width), round(scale * height)


def fit(pixels: np.ndarray, threads: int = 1) -> np.ndarray:
    """Resize and cut out the centre: uint8 [512, 512, 3] of uint8 [H, W, 3 or 4] (a fourth byte is ignored).

    The GIL is released meanwhile. threads: how many share the work of this one image.
    """
    from medmax_fast import _csrc

    height, width = pixels.shape[:2]
    wide, high = resized_size(width, height)
    out = np.empty((SIDE, SIDE, 3), np.uint8)
    _csrc.resample(pixels, high, wide, (high - SIDE) // 2, (wide - SIDE) // 2, out, threads)
    return out


def fit_ref(image: Image.Image) -> np.ndarray:
    """What `fit` must equal: Pillow's resize and crop of an RGB image, uint8 [512, 512, 3]."""
    width, height = resized_size(*image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    # One axis at a time: since 12.2 a single call may filter the rows of a tall image first, which changes pixels
    # (in 13.0 where the height shrinks by more than twice as many pixels as the width). The published tokens were
    # made with columns first.
    image = image.resize((width, image.height), Image.Resampling.LANCZOS)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.array(image.crop((left, top, left + SIDE, top + SIDE)))


@dataclass(frozen=True)
class Filters:
    """Filters of one image for the resampling kernel, int32 with 22 fractional bits.

    x_starts [512] and x_weights [512, taps]: output column i is the sum over t of x_weights[i, t] times the pixel in
    column x_starts[i] + t; y_starts and y_weights the same for rows. Padding weights are zero.
    """

    x_starts: np.ndarray
    x_weights: np.ndarray
    y_starts: np.ndarray
    y_weights: np.ndarray


@functools.lru_cache(maxsize=256)
def filters(width: int, height: int) -> Filters:
    """The filters that bring an image of this size to the kept 512 x 512 pixels; not to be written to."""
    from medmax_fast import _csrc

    wide, high = resized_size(width, height)
    x_starts, x_weights = _csrc.lanczos_weights(width, wide, (wide - SIDE) // 2, SIDE)
    y_starts, y_weights = _csrc.lanczos_weights(height, high, (high - SIDE) // 2, SIDE)
    return Filters(x_starts, x_weights, y_starts, y_weights)

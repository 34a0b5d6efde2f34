"""What is tried of a built wheel, wherever it is installed: needs numpy and Pillow beside it, no torch.

    python -P tests/check_wheel.py

The extension loads, and its resize gives Pillow's pixels, on the architecture that the wheel is for.
"""

import sys

import numpy as np
from PIL import Image

from medmax_fast import _csrc
from medmax_fast.data.resize import fit, fit_ref

# Smaller and larger than 512, both orientations, one axis that stays.
SIZES = ((37, 61), (512, 700), (640, 480), (1600, 1031), (300, 2011))


def main() -> None:
    random = np.random.default_rng(0)
    for width, height in SIZES:
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if not np.array_equal(fit(pixels), fit_ref(Image.fromarray(pixels))):
            sys.exit(f"{_csrc.__file__}: the resize of {width} x {height} is not Pillow's")
    assert "torch" not in sys.modules
    print(f"{_csrc.__file__}: {len(SIZES)} sizes as Pillow's, AVX2 {'used' if _csrc.has_avx2() else 'not there'}")


if __name__ == "__main__":
    main()

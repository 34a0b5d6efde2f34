"""Pixels of every kind made RGB, by one policy.

- Grey, bilevel, palette, YCbCr, Lab and CMYK: Pillow's own conversion, embedded colour profiles ignored.
- Alpha, a transparent palette entry or grey level included: blended over white (`whiten`, as in the published
  inference) or discarded (`drop`, as in its batch tool).
- 16 bits a channel in colour: the high byte, which is what Pillow reads.
- Grey of more than 8 bits: `pillow` cuts off at 255 as the published code does, so that most such images turn white;
  `scale` maps 0..65535 to 0..255; `window` maps the image's own minimum..maximum. 32-bit and float images that leave
  0..65535 have no range to scale by: `scale` windows them too.
- Several frames: the first. EXIF orientation: ignored, as it was when the published tokens were made.
"""

import numpy as np
from PIL import Image

ALPHA_MODES = ("whiten", "drop")
DEPTH16_MODES = ("pillow", "scale", "window")
_MAX16 = 65535

# Blend of colour c over white at alpha a, [a, c]: float64 and truncation are part of the definition.
_ALPHA = np.arange(256)[:, None] / 255.0
_OVER_WHITE = ((1 - _ALPHA) * 255 + _ALPHA * np.arange(256)[None]).astype(np.uint8)


def to_rgb(image: Image.Image, alpha: str, depth16: str) -> tuple[Image.Image, list[str]]:
    """A loaded image as RGB, and which policies had a say: any of `alpha`, `depth16`, `frames`.

    Raises ValueError where an image has no finite pixel.
    """
    notes = ["frames"] if getattr(image, "n_frames", 1) > 1 else []
    if is_deep(image):
        notes.append("depth16")
        if depth16 != "pillow":
            return Image.fromarray(to_bytes(np.asarray(image), depth16)).convert("RGB"), notes
    # An RGB image with a transparent colour counts as opaque in the published code.
    if image.mode == "RGB":
        return image, notes
    if image.mode[-1] not in "Aa" and "transparency" not in image.info:
        return image.convert("RGB"), notes
    notes.append("alpha")
    return (image.convert("RGB") if alpha == "drop" else whiten(image)), notes


def is_deep(image: Image.Image) -> bool:
    """Whether an image is grey of more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def whiten(image: Image.Image) -> Image.Image:
    """RGB of an image of any mode, blended over white where some alpha is below 255."""
    if image.mode == "RGB":
        return image
    rgba = np.asarray(image.convert("RGBA"))
    if rgba[:, :, 3].min() == 255:
        return image.convert("RGB")
    return Image.fromarray(_OVER_WHITE[rgba[:, :, 3:], rgba[:, :, :3]])


def to_bytes(values: np.ndarray, depth16: str) -> np.ndarray:
    """Grey levels of any range [H, W] as uint8, by `scale` or `window` (see the module header), rounded half up."""
    assert depth16 in ("scale", "window"), depth16
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no finite pixel")
    low, high = float(values[finite].min()), float(values[finite].max())
    if depth16 == "scale" and low >= 0 and high <= _MAX16 and values.dtype.kind != "f":
        low, high = 0.0, float(_MAX16)
    # Multiplied before it is divided, so that halves of integers stay exact.
    scaled = (np.where(finite, values, low) - low) * 255.0 / (high - low or 1.0)
    return np.floor(scaled + 0.5).astype(np.uint8)

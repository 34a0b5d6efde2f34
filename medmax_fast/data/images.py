"""Image files to the exact 512 x 512 pixels that the published encoder saw, on Pillow.

Alpha over white (or dropped), RGB, the shorter side to 512 with Pillow's LANCZOS, centre crop, uint8. EXIF
orientation is ignored, as it was when the published tokens were made. This is the definition that every faster
path is held against; it costs about 20 ms for a megapixel, nearly all of it in Pillow without the GIL, so a thread
pool scales. A file that cannot be read whole is an ImageError with its path and the reason, never a black image.
"""

import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

from medmax_fast.runtime import InputError

SIDE = 512
ALPHA_MODES = ("whiten", "drop")

# Only formats that are decoded in process: Pillow would hand EPS files to Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG2000", "PPM", "AVIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".jp2", ".ppm", ".pgm", ".avif")

# Pixels of a file, and of its resized form (a strip of 512 x 349,525 would take 0.7 GB): Pillow's own error limit,
# restated because programs switch that one off.
MAX_PIXELS = 178_956_970

# What Pillow's parsers raise on files that lie about themselves, found by fuzzing and from their sources.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    OverflowError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

# Pillow warns about odd metadata and large sizes; what matters of that is an ImageError here.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(InputError):
    """An image that cannot be used; `reason` says why without the path."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


def load_image(source: str | os.PathLike | BinaryIO, alpha: str = "whiten") -> np.ndarray:
    """Preprocessed pixels, uint8 [512, 512, 3], of a file or an open binary stream.

    alpha: `whiten` blends transparent pixels over white, `drop` discards the alpha channel (how the published
    data set's own tokens were made). Raises ImageError.
    """
    assert alpha in ALPHA_MODES, alpha
    name = str(source) if isinstance(source, str | os.PathLike) else str(getattr(source, "name", "image"))
    try:
        with _open(source, name) as image:
            return fit(image.convert("RGB") if alpha == "drop" else whiten(image))
    except ImageError:
        raise
    except _DECODER_ERRORS as error:
        raise ImageError(name, _reason(source, error)) from error


def whiten(image: Image.Image) -> Image.Image:
    """RGB of an image of any mode, blended over white where some alpha is below 255."""
    if image.mode == "RGB":
        return image
    rgba = np.asarray(image.convert("RGBA"))
    if rgba[:, :, 3].min() == 255:
        return image.convert("RGB")
    # Float64 and truncation are part of the definition: rounding moves values by one.
    alpha = rgba[:, :, 3:] / 255.0
    return Image.fromarray(((1 - alpha) * 255 + alpha * rgba[:, :, :3]).astype(np.uint8))


def resized_size(width: int, height: int) -> tuple[int, int]:
    """Size after the shorter side is scaled to 512, with Python's rounding."""
    scale = SIDE / min(width, height)
    return round(scale * width), round(scale * height)


def fit(image: Image.Image) -> np.ndarray:
    """Resize an RGB image and cut out its centre: uint8 [512, 512, 3]."""
    width, height = resized_size(*image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.array(image.crop((left, top, left + SIDE, top + SIDE)))


def list_images(folder: str | Path) -> list[str]:
    """Relative names, with forward slashes and sorted, of all files below `folder` with an image suffix."""
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                names.append((Path(root) / name).relative_to(folder).as_posix())
    return sorted(names)


def _open(source, name: str) -> Image.Image:
    # A library in the same process may have asked Pillow to fill the missing part of a file with black.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.preinit()
    if any(format not in Image.OPEN for format in FORMATS):
        Image.init()
    if isinstance(source, str) and not source:
        raise ImageError(name, "empty path")
    # Opening a pipe or a device would wait for ever.
    if isinstance(source, str | os.PathLike) and os.path.exists(source) and not os.path.isfile(source):
        raise ImageError(name, f"a {'folder' if os.path.isdir(source) else 'device or pipe'}, expected an image file")
    image = Image.open(source, formats=[format for format in FORMATS if format in Image.OPEN])
    width, height = image.size
    if min(width, height) < 1 or width * height > MAX_PIXELS:
        raise ImageError(name, f"{width} x {height} pixels, expected at most {MAX_PIXELS}")
    wide, high = resized_size(width, height)
    if wide * high > MAX_PIXELS:
        raise ImageError(name, f"{width} x {height} pixels would be resized to {wide} x {high}, too thin to use")
    image.load()
    return image


def _reason(source, error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "not allowed to read it"
    if isinstance(error, Image.DecompressionBombError):
        return f"decompression bomb, expected at most {MAX_PIXELS} pixels"
    head = _head(source)
    if head == b"":
        return "empty file"
    if isinstance(error, Image.UnidentifiedImageError):
        start = head.lstrip().lower()
        if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
            return "an HTML or XML page, not an image"
        return f"not an image, or cut off in its header (starts with {head[:16]!r})"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"broken image ({text})"


def _head(source) -> bytes:
    try:
        if isinstance(source, str | os.PathLike):
            with open(source, "rb") as file:
                return file.read(64)
        source.seek(0)
        return source.read(64)
    except (OSError, ValueError):
        return b"?"

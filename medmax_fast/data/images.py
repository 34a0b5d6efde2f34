"""Image files to pixels: read, recognised, decoded by Pillow (DICOM by pydicom), made RGB.

`load_image` goes on to the exact 512 x 512 pixels that the published encoder saw. Nearly all of the time is spent
without the GIL, so a thread pool scales. A file that cannot be read whole is an ImageError with its path and the
reason, never a black image.
"""

import io
import os
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

from medmax_fast.data.dali import DaliDecoder, admits
from medmax_fast.data.dicom import decode_dicom, is_dicom
from medmax_fast.data.modes import ALPHA_MODES, DEPTH16_MODES, to_rgb
from medmax_fast.data.resize import fit, resized_size
from medmax_fast.runtime import InputError, one_line

# Only formats that are decoded in process: Pillow would hand EPS files to Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG2000", "PPM", "AVIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".jp2", ".ppm", ".pgm", ".avif", ".dcm")

# Pixels of a file, and of its resized form (a strip of 512 x 349,525 would take 0.7 GB): Pillow's own error limit,
# restated because programs switch that one off.
MAX_PIXELS = 178_956_970
MAX_BYTES = 1 << 31

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


@dataclass(frozen=True)
class Picture:
    """pixels: uint8 [H, W, 3], or [H, W, 4] with a last byte to ignore. notes: policies of data/modes.py that applied.

    pixels is None where `decode` was told to postpone. size: (width, height).
    """

    pixels: np.ndarray | None
    size: tuple[int, int]
    notes: list[str]

    @property
    def decoded(self) -> np.ndarray:
        """The pixels of a picture that was not postponed."""
        assert self.pixels is not None
        return self.pixels


def load_image(source: str | os.PathLike | BinaryIO, alpha: str = "whiten", depth16: str = "pillow") -> np.ndarray:
    """Preprocessed pixels, uint8 [512, 512, 3], of a file or an open binary stream.

    alpha: `whiten` blends transparent pixels over white, `drop` discards the alpha channel (how the published
    data set's own tokens were made). depth16: see data/modes.py. Raises ImageError.
    """
    if isinstance(source, str | os.PathLike):
        name, data = str(source), read_file(source)
    else:
        name, data = str(getattr(source, "name", "image")), source.read()
    return fit(decode(data, name, alpha, depth16).decoded)


def read_file(path: str | os.PathLike) -> bytes:
    """All bytes of an image file; ImageError for what is no file, and for one of 2 GiB or more."""
    name = os.fspath(path)
    if not name:
        raise ImageError(name, "empty path")
    try:
        # Opening a pipe or a device would wait for ever.
        if os.path.exists(name) and not os.path.isfile(name):
            kind = "folder" if os.path.isdir(name) else "device or pipe"
            raise ImageError(name, f"a {kind}, expected an image file")
        with open(name, "rb") as file:
            data = file.read(MAX_BYTES)
    except FileNotFoundError as error:
        raise ImageError(name, "no such file") from error
    except PermissionError as error:
        raise ImageError(name, "not allowed to read it") from error
    except (OSError, ValueError) as error:
        raise ImageError(name, f"cannot be read ({one_line(error)})") from error
    if len(data) == MAX_BYTES:
        raise ImageError(name, f"{MAX_BYTES} bytes or more, expected an image file")
    return data


def decode(
    data: bytes,
    name: str,
    alpha: str = "whiten",
    depth16: str = "pillow",
    packed: bool = False,
    dali: DaliDecoder | None = None,
    postpone: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Picture:
    """Full-size RGB pixels of an image file's bytes; ImageError under `name`.

    packed: three bytes a pixel, at the price of a copy; otherwise Pillow's own memory is used where it can be.
    dali: decodes what it knows in Pillow's place. postpone: leave out the pixels of what DALI can be asked for.
    max_pixels: more are refused before any is decoded.
    """
    assert alpha in ALPHA_MODES and depth16 in DEPTH16_MODES, (alpha, depth16)
    try:
        if is_dicom(data[:256]):
            pixels = decode_dicom(data, max_pixels)
            _check_size(name, pixels.shape[1], pixels.shape[0], max_pixels)
            return Picture(pixels, pixels.shape[1::-1], [])
        with _open(data, name, max_pixels) as image:
            if (dali or postpone) and admits(image):
                pixels = dali.decode([data])[0] if dali and not postpone else None
                if postpone or pixels is not None:
                    return Picture(pixels, image.size, [])
            image.load()
            rgb, notes = to_rgb(image, alpha, depth16)
            return Picture(np.asarray(rgb) if packed else _view(rgb), rgb.size, notes)
    except ImageError:
        raise
    except _DECODER_ERRORS as error:
        raise ImageError(name, _reason(data, error, max_pixels)) from error


def _view(image: Image.Image) -> np.ndarray:
    """Pixels of an RGB image without a copy where Pillow keeps them in one piece: uint8 [H, W, 4], else [H, W, 3]."""
    if not hasattr(image, "__arrow_c_array__"):
        return np.asarray(image)
    import pyarrow

    try:
        pixels = pyarrow.array(image)
    except ValueError:
        return np.asarray(image)
    return pixels.flatten().to_numpy().reshape(image.height, image.width, 4)


def list_images(folder: str | Path) -> list[str]:
    """Relative names, with forward slashes and sorted, of all files below `folder` with an image suffix."""
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                names.append((Path(root) / name).relative_to(folder).as_posix())
    return sorted(names)


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    # A library in the same process may have asked Pillow to fill the missing part of a file with black.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.preinit()
    if any(format not in Image.OPEN for format in FORMATS):
        Image.init()
    image = Image.open(io.BytesIO(data), formats=[format for format in FORMATS if format in Image.OPEN])
    _check_size(name, *image.size, max_pixels)
    return image


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if min(width, height) < 1 or width * height > max_pixels:
        raise ImageError(name, f"{width} x {height} pixels, expected at most {max_pixels}")
    wide, high = resized_size(width, height)
    if wide * high > MAX_PIXELS:
        raise ImageError(name, f"{width} x {height} pixels would be resized to {wide} x {high}, too thin to use")


def _reason(data: bytes, error: BaseException, max_pixels: int) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"decompression bomb, expected at most {max_pixels} pixels"
    if not data:
        return "empty file"
    if isinstance(error, Image.UnidentifiedImageError):
        start = data[:64].lstrip().lower()
        if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
            return "an HTML or XML page, not an image"
        return f"not an image, or cut off in its header (starts with {data[:16]!r})"
    return f"broken image ({one_line(error)})"

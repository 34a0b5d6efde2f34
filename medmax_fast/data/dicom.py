"""DICOM files to 8-bit RGB, on pydicom (the extra `dicom`).

The first frame as a viewer shows it, by the grey-scale pipeline of DICOM PS3.4 N.2 and the formulas of PS3.3 C.11:
stored values -> modality table, or rescale slope and intercept -> VOI table, or the first window, or else minimum
to maximum -> 0..255, inverted for MONOCHROME1. Colour (RGB, YBR, palette) is brought to 8 bits and not windowed.
The last step rounds to the nearest level, halves up: floor(y + 0.5).
"""

import io
import math
import struct
import warnings
import zlib

import numpy as np
from PIL import ImageFile

# As for other images: Pillow's own limit.
MAX_PIXELS = 178_956_970

_COLOURS = ("Red", "Green", "Blue")
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")

# What pydicom's parsers and decoders raise on files that lie about themselves, found by fuzzing and from their
# sources; two classes of its own come on top in decode_dicom.
_PARSER_ERRORS = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)

# pydicom warns about every irregular element; what matters of that is a ValueError here.
warnings.filterwarnings("ignore", module="pydicom")


class _Refused(ValueError):
    """A reason in words of ours, as opposed to pydicom's."""


def is_dicom(head: bytes) -> bool:
    """Whether a file that starts with `head` (132 bytes are enough) is DICOM: a preamble, then DICM."""
    return head[128:132] == b"DICM"


def decode_dicom(data: bytes, max_pixels: int | None = None) -> np.ndarray:
    """The first frame of a DICOM file as uint8 [H, W, 3].

    ValueError with a reason of one line: pydicom is missing, not DICOM, no pixel data, a compression that no
    installed plugin decodes, more than max_pixels (default: MAX_PIXELS), a colour space without an RGB form, or damage.
    """
    try:
        import pydicom
        from pydicom.errors import BytesLengthException, InvalidDicomError
    except ImportError as error:
        raise ValueError("DICOM, which needs pip install 'medmax_fast[dicom]'") from error
    # As in images.py: a library may have told Pillow, which decodes for pydicom, to fill what is missing with grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        return _render(pydicom.dcmread(io.BytesIO(data)), MAX_PIXELS if max_pixels is None else max_pixels)
    except InvalidDicomError as error:
        raise ValueError("not DICOM, or cut off in its header") from error
    except _Refused as error:
        raise ValueError(_line(error)) from error
    except (*_PARSER_ERRORS, BytesLengthException) as error:
        raise ValueError(f"broken DICOM ({_line(error) or type(error).__name__})") from error


def _line(error: Exception) -> str:
    """One short line of an error's text, which may quote what a damaged file holds."""
    text = " ".join(str(error).split())[:200]
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _render(dataset, max_pixels: int) -> np.ndarray:
    pixels, interpretation = _first_frame(dataset, max_pixels)
    if interpretation == "RGB" and pixels.ndim == 3:
        return _eight_bits(dataset, pixels)
    if interpretation == "PALETTE COLOR" and pixels.ndim == 2:
        return _palette(dataset, pixels)
    if interpretation not in ("MONOCHROME1", "MONOCHROME2") or pixels.ndim != 2:
        raise _Refused(f"DICOM with photometric interpretation {interpretation}, expected grey, RGB, YBR or palette")
    grey = _grey(dataset, pixels)
    return np.repeat((255 - grey if interpretation == "MONOCHROME1" else grey)[:, :, None], 3, axis=2)


def _first_frame(dataset, max_pixels: int) -> tuple[np.ndarray, str]:
    """(stored values [H, W] or [H, W, 3], photometric interpretation after decoding: YBR has become RGB)."""
    from pydicom.pixels import get_decoder

    if not any(name in dataset for name in _PIXELS):
        raise _Refused("DICOM without pixel data")
    rows, columns = dataset.get("Rows"), dataset.get("Columns")
    if not rows or not columns:
        raise _Refused("DICOM without rows or columns")
    if rows * columns > max_pixels:
        raise _Refused(f"DICOM of {columns} x {rows} pixels, expected at most {max_pixels}")
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise _Refused(f"DICOM with transfer syntax {syntax.name}, which pydicom cannot decode") from error
    if not decoder.is_available:
        raise _Refused(f"DICOM with transfer syntax {syntax.name}, for which no pydicom plugin is installed")
    pixels, properties = decoder.as_array(dataset, index=0)
    return pixels, str(properties["photometric_interpretation"])


def _eight_bits(dataset, pixels: np.ndarray) -> np.ndarray:
    """RGB of any depth to 8 bits: the full range of Bits Stored to 0..255."""
    bits = int(dataset.BitsStored)
    if pixels.dtype.kind != "u":
        raise _Refused("DICOM with signed colour values")
    if bits == 8:
        return np.minimum(pixels, 255).astype(np.uint8)
    return _levels(pixels * 255.0 / (2.0**bits - 1))


def _levels(values: np.ndarray) -> np.ndarray:
    """uint8, rounded to nearest, halves up; what lies outside of 0..255 is clipped."""
    return np.floor(np.clip(values, 0, 255) + 0.5).astype(np.uint8)


def _grey(dataset, pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W] of stored values, before the inversion of MONOCHROME1."""
    lowest = pixels.min()
    if pixels.dtype.kind == "f" or int(pixels.max()) - int(lowest) >= 1 << 16:
        return _display(dataset, pixels, np.ones(pixels.shape, bool))
    # Few distinct values: work them out once each, in place of every pixel in float64.
    wide = np.int32 if pixels.itemsize <= 2 else np.int64
    index = pixels.astype(wide) - lowest.astype(wide)
    present = np.bincount(index.ravel()) > 0
    return _display(dataset, int(lowest) + np.arange(len(present)), present)[index]


def _display(dataset, stored: np.ndarray, present: np.ndarray) -> np.ndarray:
    """uint8 levels of stored values; `present` says which of them occur in the image."""
    values = _modality(dataset, stored)
    present = present & np.isfinite(values)
    native = present & ~_padding(dataset, stored)
    inside = values[native if native.any() else present]
    if not len(inside):
        raise _Refused("DICOM without a single finite pixel value")
    low, high = inside.min(), inside.max()
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return _levels(_voi(dataset, values, low, high))


def _modality(dataset, stored: np.ndarray) -> np.ndarray:
    """Modality transformation (PS3.3 C.11.1), float64; output = slope * stored + intercept where there is no table."""
    if dataset.get("ModalityLUTSequence"):
        return _look_up(dataset, dataset.ModalityLUTSequence[0], stored)[0]
    group = _functional_group(dataset, "PixelValueTransformationSequence")
    slope, intercept = _number(group, "RescaleSlope"), _number(group, "RescaleIntercept")
    return stored.astype(np.float64) * (1.0 if slope is None else slope) + (intercept or 0.0)


def _padding(dataset, stored: np.ndarray) -> np.ndarray:
    """Which stored values are padding, not part of the image's contrast (PS3.3 C.7.5.1.1.2)."""
    keyword = next(name for name in _PIXELS if name in dataset)
    value = _number(dataset, keyword.replace("Data", "PaddingValue"))
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = _number(dataset, keyword.replace("Data", "PaddingRangeLimit"))
    ends = [value, value if limit is None else limit]
    if keyword == "PixelData":
        # Some writers give -2000 as 63536.
        span = 2 ** int(dataset.BitsAllocated)
        signed = dataset.PixelRepresentation == 1
        ends = [(end + span // 2) % span - span // 2 if signed else end % span for end in ends]
    return (stored >= min(ends)) & (stored <= max(ends))


def _voi(dataset, values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values of interest (PS3.3 C.11.2) to 0..255, unrounded: a table, the first window, or low to high.

    A window that the standard forbids (a width below 1, or of 0 and less for LINEAR_EXACT and SIGMOID) is passed over.
    """
    for item in dataset.get("VOILUTSequence") or ():
        if item.get("LUTDescriptor") is not None and item.get("LUTData") is not None:
            entries, bits = _look_up(dataset, item, values)
            return entries * 255 / (2**bits - 1)
    group = _functional_group(dataset, "FrameVOILUTSequence")
    center, width = _number(group, "WindowCenter"), _number(group, "WindowWidth")
    function = str(group.get("VOILUTFunction") or "LINEAR").upper()
    if center is not None and width is not None and (width >= 1 if function == "LINEAR" else width > 0):
        return window(values, center, width, function)
    if not math.isfinite((float(high) - float(low)) * 255):
        raise _Refused(f"DICOM with pixel values from {low} to {high}")
    return (values - low) * 255 / (high - low) if high > low else np.zeros(values.shape)


def window(values: np.ndarray, center: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """DICOM's window functions, with an output range of 0 to 255: float64 of the shape of `values`.

    Formulas of PS3.3 C.11.2.1.2.1 (LINEAR; width >= 1) and C.11.2.1.3 (SIGMOID, LINEAR_EXACT; width > 0), the linear
    ones multiplied out before the division, so that whole numbers give exact halves. ValueError for another function.
    """
    if function == "SIGMOID":
        # Far from the centre the power overflows to infinity, whose share is rightly 0.
        with np.errstate(over="ignore"):
            return 255 / (1 + np.exp(-4 * ((values - center) / width)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    elif function != "LINEAR_EXACT":
        raise _Refused(f"DICOM with VOI LUT function {function}, expected LINEAR, LINEAR_EXACT or SIGMOID")
    # A LINEAR window of width 1 has no slope, only the step.
    with np.errstate(over="ignore"):
        slope = (values - center + width / 2) * 255 / width if width else np.zeros(values.shape)
    return np.where(values <= center - width / 2, 0.0, np.where(values > center + width / 2, 255.0, slope))


def _look_up(dataset, item, values: np.ndarray) -> tuple[np.ndarray, int]:
    """(table entries of values, bits per entry) of a modality or VOI table; values beyond an end take its entry."""
    count, first, bits = _descriptor(item.LUTDescriptor)
    entries = _entries(dataset, item.LUTData, count, bits).astype(np.float64)
    index = np.nan_to_num(np.floor(values + 0.5) - first).clip(0, len(entries) - 1)
    return entries[index.astype(np.int64)], bits


def _descriptor(value) -> tuple[int, int, int]:
    """(entries, first value mapped, bits per entry) of a LUT Descriptor (PS3.3 C.11.1.1; 0 entries mean 65,536)."""
    count, first, bits = (int(part) for part in value)
    if not 1 <= bits <= 16:
        raise _Refused(f"DICOM with a lookup table of {bits} bits, expected 1 to 16")
    # The remainder, because the count is unsigned even where the first value is signed and the type is shared.
    return count % 65536 or 65536, first, bits


def _entries(dataset, value, count: int, bits: int) -> np.ndarray:
    """Lookup table data, which is a list of integers, or bytes of one or two an entry in the file's byte order."""
    if isinstance(value, bytes):
        one = bits <= 8 and len(value) < 2 * count
        order = "<" if dataset.file_meta.TransferSyntaxUID.is_little_endian else ">"
        value = np.frombuffer(value[: len(value) // 2 * 2], np.uint8 if one else f"{order}u2")
    entries = np.atleast_1d(np.asarray([] if value is None else value))[:count]
    if not len(entries):
        raise _Refused("DICOM with an empty lookup table")
    return entries


def _palette(dataset, pixels: np.ndarray) -> np.ndarray:
    """PALETTE COLOR to RGB (PS3.3 C.7.6.3.1.5): tables of 8 bits as they are, of 16 bits by their upper 8."""
    if "RedPaletteColorLookupTableData" not in dataset:
        from pydicom.pixels import apply_color_lut

        colours = apply_color_lut(pixels, dataset)[:, :, :3]
        return (colours >> 8 if colours.dtype == np.uint16 else colours).astype(np.uint8)
    count, first, bits = _descriptor(dataset.RedPaletteColorLookupTableDescriptor)
    data = [dataset[f"{colour}PaletteColorLookupTableData"].value for colour in _COLOURS]
    table = np.stack([_entries(dataset, value, count, bits) for value in data], axis=1)
    # Some writers say 16 bits and fill in 8.
    table = (table >> 8 if table.max() > 255 else table).astype(np.uint8)
    return table[np.clip(pixels.astype(np.int64) - first, 0, len(table) - 1)]


def _functional_group(dataset, name: str):
    """Where an element of the first frame stands: its own group, the one shared by all frames, or the data set."""
    for frames in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        groups = dataset.get(frames)
        if groups and groups[0].get(name):
            return groups[0].get(name)[0]
    return dataset


def _number(dataset, keyword: str) -> float | None:
    """The first value of an element, None where it is absent, empty or not finite."""
    value = dataset.get(keyword)
    if hasattr(value, "__len__") and not isinstance(value, str | bytes):
        value = value[0] if len(value) else None
    if value in (None, "", b"") or not math.isfinite(float(value)):
        return None
    return float(value)

"""DICOM files are shown as the standard's formulas say, and what cannot be shown is refused with a reason."""

import io
import math
import random
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from medmax_fast.data import dicom as dicom_module
from medmax_fast.data.dicom import decode_dicom, is_dicom, window

pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: pip install 'medmax_fast[dicom]'")
from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing  # noqa: E402
from pydicom.uid import MPEG2MPML, ExplicitVRBigEndian, ExplicitVRLittleEndian, JPEGBaseline8Bit, JPEGLosslessSV1  # noqa: E402

# The module's own filter, which pytest takes away.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


def dicom(pixels: np.ndarray, syntax=ExplicitVRLittleEndian, frames: int = 0, **elements) -> bytes:
    """A file of integer pixels [H, W], [H, W, 3] or with frames before; elements replace those derived from them."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3.4"
    shape = pixels.shape[1:] if frames else pixels.shape
    data.Rows, data.Columns = shape[:2]
    data.SamplesPerPixel = shape[2] if len(shape) == 3 else 1
    data.PhotometricInterpretation = "RGB" if len(shape) == 3 else "MONOCHROME2"
    if data.SamplesPerPixel == 3:
        data.PlanarConfiguration = 0
    if frames:
        data.NumberOfFrames = frames
    data.BitsAllocated = data.BitsStored = 8 * pixels.itemsize
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    content = pixels.astype(pixels.dtype.newbyteorder("<" if syntax.is_little_endian else ">")).tobytes()
    data.PixelData = content + bytes(len(content) % 2)
    data["PixelData"].VR = "OB" if pixels.itemsize == 1 else "OW"
    for name, value in elements.items():
        if value is None:
            del data[name]
        else:
            setattr(data, name, value)
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, data, enforce_file_format=True, little_endian=None if syntax.is_little_endian else False)
    return stream.getvalue()


def item(**elements) -> Dataset:
    data = Dataset()
    for name, value in elements.items():
        setattr(data, name, value)
    return data


def grey(data: bytes) -> np.ndarray:
    """The one channel of a grey image [H, W], its three channels being equal."""
    found = decode_dicom(data)
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
    assert (found == found[:, :, :1]).all()
    return found[:, :, 0]


def linear(x: float, c: float, w: float) -> Fraction:
    """PS3.3 C.11.2.1.2.1 as it is printed, for an output of 0 to 255, without rounding errors."""
    x, c, w = Fraction(x), Fraction(c), Fraction(w)
    if x <= c - Fraction(1, 2) - (w - 1) / 2:
        return Fraction(0)
    if x > c - Fraction(1, 2) + (w - 1) / 2:
        return Fraction(255)
    return ((x - (c - Fraction(1, 2))) / (w - 1) + Fraction(1, 2)) * 255


def exact(x: float, c: float, w: float) -> Fraction:
    x, c, w = Fraction(x), Fraction(c), Fraction(w)
    if x <= c - w / 2:
        return Fraction(0)
    return Fraction(255) if x > c + w / 2 else ((x - c) / w + Fraction(1, 2)) * 255


def sigmoid(x: float, c: float, w: float) -> float:
    return 255 / (1 + math.exp(min(-4 * (x - c) / w, 700)))


FORMULAS = {"LINEAR": linear, "LINEAR_EXACT": exact, "SIGMOID": sigmoid}


def rounded(values) -> np.ndarray:
    return np.array([math.floor(value + 0.5) for value in values], np.uint8)


def test_is_dicom():
    assert is_dicom(dicom(np.zeros((2, 2), np.uint8))[:132])
    assert not is_dicom(b"") and not is_dicom(b"DICM") and not is_dicom(b"\xff\xd8\xff" + bytes(200))


@pytest.mark.parametrize("function", FORMULAS)
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16"])
def test_windows_are_those_of_the_standard(function, dtype):
    limits = np.iinfo(dtype)
    values = np.unique(np.linspace(limits.min, limits.max, 1200).astype(dtype))[None]
    middle = (limits.min + limits.max) / 2
    for center, width in ((middle, 100), (middle + 3.25, 57.5), (limits.max, 2), (limits.min, 1), (0, 4096)):
        data = dicom(values, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
        expected = rounded(FORMULAS[function](float(x), center, width) for x in values[0])
        np.testing.assert_array_equal(grey(data)[0], expected, f"{center} {width}")


# Quarters, so that a value on a window's edge is on it in floating point too.
quarters = st.integers(-400_000, 400_000).map(lambda number: number / 4)


@given(
    st.lists(quarters, min_size=1, max_size=50),
    quarters,
    st.integers(4, 400_000).map(lambda number: number / 4),
    st.sampled_from(list(FORMULAS)),
)
def test_window_agrees_with_the_scalar_formula(values, center, width, function):
    found = window(np.array(values), center, width, function)
    expected = [float(FORMULAS[function](x, center, width)) for x in values]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-9)


def test_halves_are_rounded_up():
    # Two values to a level; 0.5 becomes 1 and 2.5 becomes 3, where NumPy's own rounding says 0 and 2.
    values = np.arange(511, dtype=np.uint16)[None]
    expected = [(x + 1) // 2 for x in range(511)]
    assert [linear(x, 255.5, 511) * 2 for x in range(511)] == list(range(511))
    assert grey(dicom(values, WindowCenter=255.5, WindowWidth=511))[0].tolist() == expected
    assert grey(dicom(values))[0].tolist() == expected
    assert grey(dicom(values, PhotometricInterpretation="MONOCHROME1"))[0].tolist() == [255 - x for x in expected]


def test_the_first_of_several_windows_counts():
    values = np.arange(256, dtype=np.uint8)[None]
    one = grey(dicom(values, WindowCenter=100, WindowWidth=50))
    np.testing.assert_array_equal(grey(dicom(values, WindowCenter=[100, 10], WindowWidth=[50, 5])), one)
    assert not np.array_equal(grey(dicom(values, WindowCenter=[10, 100], WindowWidth=[5, 50])), one)


@pytest.mark.parametrize(("slope", "intercept"), [(2.5, -1024), (1, 0), (-1, 300), (0.001, 5)])
def test_rescale_comes_before_the_window(slope, intercept):
    values = np.arange(-600, 600, dtype=np.int16)[None]
    center = 40 * slope + intercept
    data = dicom(values, RescaleSlope=slope, RescaleIntercept=intercept, WindowCenter=center, WindowWidth=400)
    expected = rounded(linear(float(x) * slope + intercept, center, 400) for x in values[0])
    np.testing.assert_array_equal(grey(data)[0], expected)


def test_without_a_window_the_range_is_that_of_the_pixels():
    values = np.array([[-5, 0, 95], [45, 10, 20]], np.int16)
    expected = np.floor((values + 5) / 100 * 255 + 0.5)
    np.testing.assert_array_equal(grey(dicom(values)), expected)
    np.testing.assert_array_equal(grey(dicom(values, RescaleSlope=3, RescaleIntercept=7)), expected)
    # A negative slope turns the range round.
    turned = np.floor((95 - values) / 100 * 255 + 0.5)
    np.testing.assert_array_equal(grey(dicom(values, RescaleSlope=-2, RescaleIntercept=0)), turned)


@pytest.mark.parametrize("width", [0, -3, 0.5])
def test_forbidden_windows_are_passed_over(width):
    values = np.arange(100, dtype=np.uint8)[None]
    np.testing.assert_array_equal(grey(dicom(values, WindowCenter=5, WindowWidth=width)), grey(dicom(values)))


def test_width_one_is_a_step_and_narrow_widths_are_legal_elsewhere():
    values = np.arange(6, dtype=np.uint8)[None]
    assert grey(dicom(values, WindowCenter=3, WindowWidth=1))[0].tolist() == [0, 0, 0, 255, 255, 255]
    narrow = dicom(values, WindowCenter=3, WindowWidth=0.5, VOILUTFunction="LINEAR_EXACT")
    assert grey(narrow)[0].tolist() == [0, 0, 0, 128, 255, 255]


@pytest.mark.parametrize("value", [0, 7, -7, 32767])
def test_constant_images(value):
    values = np.full((3, 4), value, np.int16)
    assert (grey(dicom(values)) == 0).all()
    assert (grey(dicom(values, PhotometricInterpretation="MONOCHROME1")) == 255).all()
    assert (grey(dicom(values, WindowCenter=value, WindowWidth=0)) == 0).all()
    assert (grey(dicom(values, RescaleSlope=0, RescaleIntercept=0)) == 0).all()


def test_monochrome1_is_the_inverse():
    values = np.random.default_rng(0).integers(0, 4096, (7, 9), dtype=np.uint16)
    for more in ({}, {"WindowCenter": 2000, "WindowWidth": 777}):
        plain = grey(dicom(values, **more))
        np.testing.assert_array_equal(grey(dicom(values, PhotometricInterpretation="MONOCHROME1", **more)), 255 - plain)


def test_padding_has_no_part_in_the_range():
    values = np.array([[-2000, 0, 100, -1990]], np.int16)
    plain = grey(dicom(values[:, 1:3]))
    found = grey(dicom(values[:, :3], PixelPaddingValue=-2000))
    assert found[0].tolist() == [0, *plain[0].tolist()]
    assert grey(dicom(values, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1990))[0].tolist() == [0, 0, 255, 0]
    # The same written as an unsigned number, and an image of padding alone.
    wrong = dicom(values[:, :3]).replace(b"\x28\x00\x00\x01US", b"\x28\x00\x20\x01US\x02\x00\x30\xf8\x28\x00\x00\x01US")
    assert pydicom.dcmread(io.BytesIO(wrong)).PixelPaddingValue == 63536
    assert grey(wrong)[0].tolist() == found[0].tolist()
    assert (grey(dicom(values[:, :1], PixelPaddingValue=-2000)) == 0).all()


def test_large_values_are_shown_as_small_ones_are():
    draw = np.random.default_rng(0)
    wide = draw.integers(-(2**31), 2**31, (5, 6), dtype=np.int32)
    low, high = int(wide.min()), int(wide.max())
    expected = [[math.floor((int(x) - low) / (high - low) * 255 + 0.5) for x in row] for row in wide]
    np.testing.assert_array_equal(grey(dicom(wide)), expected)
    # Shifted by 2**30 they are few again.
    few = draw.integers(0, 1000, (5, 6), dtype=np.int32)
    np.testing.assert_array_equal(grey(dicom(few + 2**30)), grey(dicom(few)))


def test_float_pixels():
    values = np.array([[0.5, 1.5, np.nan, -np.inf]], "<f4")
    data = dicom(np.zeros((1, 4), np.uint32), PixelData=None, FloatPixelData=values.tobytes())
    assert grey(data)[0].tolist() == [0, 255, 0, 0]
    nothing = dicom(np.zeros((1, 4), np.uint32), PixelData=None, FloatPixelData=np.full(4, np.nan, "<f4").tobytes())
    with pytest.raises(ValueError, match="without a single finite pixel"):
        decode_dicom(nothing)


def test_unused_high_bits_are_not_part_of_the_value():
    values = np.array([[0, 100, 4095]], np.uint16)
    np.testing.assert_array_equal(grey(dicom(values | 0xF000, BitsStored=12, HighBit=11)), grey(dicom(values)))


# ---- tables ----


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_voi_tables(bits, syntax):
    table = np.random.default_rng(0).integers(0, 2**bits, 300)
    values = np.array([[-50, -20, -19, 0, 120, 279, 280, 3000]], np.int16)
    order = "<" if syntax.is_little_endian else ">"
    data = item(LUTDescriptor=[300, -20, bits], LUTData=table.astype(f"{order}u2").tobytes())
    data["LUTDescriptor"].VR, data["LUTData"].VR = "SS", "OW"
    found = grey(dicom(values, syntax, VOILUTSequence=[data], WindowCenter=0, WindowWidth=10))
    index = np.clip(values[0].astype(int) + 20, 0, 299)
    assert found[0].tolist() == rounded(table[index] / (2**bits - 1) * 255).tolist()


def test_voi_table_after_rescale_and_of_65536_entries():
    table = np.arange(65535, -1, -1)
    data = item(LUTDescriptor=[0, 0, 16], LUTData=table.tolist())
    data["LUTDescriptor"].VR = data["LUTData"].VR = "US"
    values = np.array([[0, 1, 100, 20000]], np.uint16)
    # 0.5 is entry 1 and -1 is entry 0.
    found = grey(dicom(values, VOILUTSequence=[data], RescaleSlope=1.5, RescaleIntercept=-1))
    assert found[0].tolist() == rounded(table[[0, 1, 149, 29999]] / 65535 * 255).tolist()


def test_modality_table_takes_the_place_of_rescale():
    table = item(LUTDescriptor=[4, 1, 16], LUTData=[500, 0, 1000, 250])
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    values = np.array([[0, 1, 2, 3, 4, 9]], np.uint8)
    found = grey(dicom(values, ModalityLUTSequence=[table]))
    assert found[0].tolist() == [128, 128, 0, 255, 64, 64]
    found = grey(dicom(values, ModalityLUTSequence=[table], WindowCenter=500, WindowWidth=1))
    assert found[0].tolist() == [255, 255, 0, 255, 0, 0]


@pytest.mark.parametrize("bits", [8, 16])
def test_palettes(bits):
    draw = np.random.default_rng(0)
    colours = draw.integers(0, 256, (200, 3), dtype=np.uint16)
    values = np.array([[0, 5, 10, 100, 209, 255]], np.uint8)
    expected = colours[np.clip(values[0].astype(int) - 10, 0, 199)]
    for spread in (1, 256, 257) if bits == 16 else (1,):
        elements = {}
        for i, name in enumerate(("Red", "Green", "Blue")):
            entries = (colours[:, i] * spread).astype("<u2" if bits == 16 else "u1")
            elements[f"{name}PaletteColorLookupTableDescriptor"] = [200, 10, bits]
            elements[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
        found = decode_dicom(dicom(values, PhotometricInterpretation="PALETTE COLOR", **elements))
        np.testing.assert_array_equal(found[0], expected)


def test_segmented_palette():
    elements = {}
    # One discrete segment of one entry, then a straight line over 255 to 255.
    for name, first in (("Red", 0), ("Green", 255), ("Blue", 0)):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        elements[f"Segmented{name}PaletteColorLookupTableData"] = bytes([0, 1, first, 1, 255, 255])
    values = np.array([[0, 51, 255]], np.uint8)
    found = decode_dicom(dicom(values, PhotometricInterpretation="PALETTE COLOR", **elements))
    assert found[0].tolist() == [[0, 255, 0], [51, 255, 51], [255, 255, 255]]


# ---- colour, frames, compression ----


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_rgb_of_any_depth(dtype):
    top = np.iinfo(dtype).max
    values = np.random.default_rng(0).integers(0, top, (4, 5, 3), dtype=dtype, endpoint=True)
    expected = [math.floor(int(x) * 255 / int(top) + 0.5) for x in values.ravel()]
    found = decode_dicom(dicom(values, WindowCenter=1, WindowWidth=2))
    np.testing.assert_array_equal(found.ravel(), expected)
    planes = dicom(values, PixelData=values.transpose(2, 0, 1).tobytes(), PlanarConfiguration=1)
    np.testing.assert_array_equal(decode_dicom(planes), found)


def test_rgb_of_twelve_bits():
    values = np.array([[[0, 8, 4095]]], np.uint16)
    assert decode_dicom(dicom(values, BitsStored=12, HighBit=11)).tolist() == [[[0, 0, 255]]]


def test_ybr_is_the_same_as_pillows_jpeg_colours():
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    found = decode_dicom(dicom(values, PhotometricInterpretation="YBR_FULL")).astype(int)
    expected = np.asarray(Image.fromarray(values, "YCbCr").convert("RGB")).astype(int)
    assert abs(found - expected).max() <= 1


def test_the_first_frame():
    values = np.random.default_rng(0).integers(0, 255, (4, 5, 6), dtype=np.uint16)
    np.testing.assert_array_equal(grey(dicom(values, frames=4)), grey(dicom(values[0])))
    colours = np.random.default_rng(0).integers(0, 255, (2, 5, 6, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_dicom(dicom(colours, frames=2)), colours[0])


def test_functional_groups_of_the_first_frame():
    values = np.stack([np.arange(100, dtype=np.uint16)[None]] * 2)
    plain = {"RescaleSlope": 2, "RescaleIntercept": -50, "WindowCenter": 40, "WindowWidth": 80}
    rescale = item(RescaleSlope=2, RescaleIntercept=-50)
    windows = [item(FrameVOILUTSequence=[item(WindowCenter=c, WindowWidth=80)]) for c in (40, 90)]
    groups = {
        "SharedFunctionalGroupsSequence": [item(PixelValueTransformationSequence=[rescale])],
        "PerFrameFunctionalGroupsSequence": windows,
    }
    np.testing.assert_array_equal(grey(dicom(values, frames=2, **groups)), grey(dicom(values[0], **plain)))


def test_jpeg_frames_and_their_truncation(monkeypatch):
    values = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "JPEG", quality=90)
    pixels = np.asarray(Image.open(stream))
    more = {"WindowCenter": 128, "WindowWidth": 256}

    def packed(content: bytes) -> bytes:
        return dicom(values, JPEGBaseline8Bit, PixelData=encapsulate([content]), **more)

    np.testing.assert_array_equal(grey(packed(stream.getvalue())), grey(dicom(pixels, **more)))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="broken DICOM"):
        decode_dicom(packed(stream.getvalue()[:-80]))


REAL = ["CT_small.dcm", "MR_small.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "liver_1frame.dcm"]


@pytest.mark.parametrize("name", REAL)
def test_real_grey_files_agree_with_pydicoms_own_steps(name):
    path = get_testdata_file(name, download=False)
    dataset = pydicom.dcmread(path)
    values = apply_modality_lut(dataset.pixel_array, dataset)
    if "WindowWidth" in dataset:
        values = apply_voi_lut(values, dataset).astype(float)
        ends = apply_windowing(np.array([-1e9, 1e9]), dataset)
    else:
        ends = values.min(), values.max()
    expected = (values - ends[0]) / (ends[1] - ends[0]) * 255
    with open(path, "rb") as file:
        found = grey(file.read())
    assert found.shape == dataset.pixel_array.shape and len(np.unique(found)) > 1
    assert abs(found - expected).max() <= 0.5 + 1e-9


def test_real_files_of_one_image_agree():
    def read(name):
        with open(get_testdata_file(name, download=False), "rb") as file:
            return decode_dicom(file.read())

    for names in (
        ("MR_small.dcm", "MR_small_RLE.dcm", "MR_small_implicit.dcm", "MR_small_bigendian.dcm", "MR_small_padded.dcm"),
        ("SC_rgb_rle.dcm", "SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm", "SC_rgb_rle_2frame.dcm"),
        ("SC_rgb_small_odd.dcm", "SC_rgb_small_odd_big_endian.dcm"),
    ):
        first = read(names[0])
        assert first.max() > first.min()
        for name in names[1:]:
            np.testing.assert_array_equal(read(name), first, name)
    assert read("examples_palette.dcm").shape == (350, 800, 3)
    assert read("SC_ybr_full_422_uncompressed.dcm").shape == (100, 100, 3)


# ---- refusals ----

PLAIN = np.arange(12, dtype=np.uint8).reshape(3, 4)
WIDE = np.zeros((1, 2), np.uint64)


def palette(bits: int) -> dict:
    """Elements of a palette without entries."""
    tables = {f"{colour}PaletteColorLookupTable": [16, 0, bits] for colour in ("Red", "Green", "Blue")}
    return {f"{n}Descriptor": d for n, d in tables.items()} | {f"{n}Data": b"" for n in tables}


def test_refusals(monkeypatch):
    good = dicom(PLAIN)
    cases = {
        b"": "not DICOM",
        b"\xff\xd8\xff" + bytes(300): "not DICOM",
        good[:140]: "DICOM without pixel data|broken DICOM",
        good[:-1]: "broken DICOM",
        dicom(PLAIN, PixelData=None): "without pixel data",
        dicom(PLAIN, Rows=None): "without rows or columns",
        dicom(PLAIN, Rows=300): "number of bytes of pixel data is less",
        dicom(PLAIN, PhotometricInterpretation="HSV"): "photometric interpretation HSV, expected grey, RGB",
        dicom(PLAIN, WindowCenter=1, WindowWidth=1, VOILUTFunction="CUBIC"): "function CUBIC, expected LINEAR",
        dicom(PLAIN, JPEGLosslessSV1, PixelData=encapsulate([b"\xff\xd8\xff\xd9"])): "JPEG Lossless.*no pydicom plugin",
        dicom(PLAIN, MPEG2MPML, PixelData=encapsulate([b"1234"])): "MPEG2.*which pydicom cannot decode",
        dicom(PLAIN[:, :, None].repeat(3, 2).astype(np.int8)): "signed colour values",
        dicom(PLAIN, PhotometricInterpretation="PALETTE COLOR"): "broken DICOM",
        dicom(PLAIN, PhotometricInterpretation="PALETTE COLOR", **palette(8)): "with an empty lookup table",
        dicom(PLAIN, PhotometricInterpretation="PALETTE COLOR", **palette(17)): "table of 17 bits, expected 1 to 16",
        dicom(WIDE, PixelData=None, DoubleFloatPixelData=np.array([-1e308, 1e308]).tobytes()): "values from -1e.308 to",
    }
    for data, reason in cases.items():
        with pytest.raises(ValueError, match=reason) as caught:
            decode_dicom(data)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 260
    monkeypatch.setattr(dicom_module, "MAX_PIXELS", 11)
    with pytest.raises(ValueError, match="DICOM of 4 x 3 pixels, expected at most 11"):
        decode_dicom(good)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"needs pip install 'medmax_fast\[dicom\]'"):
        decode_dicom(good)
    assert is_dicom(good)


def test_damaged_bytes_never_raise_anything_else():
    draw = random.Random(0)
    names = [*REAL[:4], "MR_small_RLE.dcm", "SC_rgb_rle_2frame.dcm", "SC_rgb_jpeg_dcmtk.dcm", "image_dfl.dcm"]
    names += ["UN_sequence.dcm", "badVR.dcm", "MR_truncated.dcm", "JPEG2000.dcm", "rtdose_rle.dcm"]
    files = []
    for name in names:
        with open(get_testdata_file(name, download=False), "rb") as file:
            files.append(file.read())
    refused = read = 0
    for _ in range(1000):
        data = bytearray(draw.choice(files))
        if draw.random() < 0.1:
            del data[draw.randrange(len(data)) :]
        for _ in range(draw.choice((1, 3, 10)) if len(data) > 200 else 0):
            data[draw.randrange(128, min(len(data), draw.choice((400, 2000, 10**9))))] = draw.choice(
                (0, 255, 128, 45, draw.randrange(256))
            )
        try:
            pixels = decode_dicom(bytes(data))
            assert pixels.dtype == np.uint8 and pixels.shape[2:] == (3,)
            read += 1
        except ValueError as error:
            refused += 1
            assert str(error).isprintable()
    assert refused > 200 and read > 100

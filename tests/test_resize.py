"""The C++ resize equals Pillow's to the bit, in every form of it, on sizes and pictures that provoke each branch."""

import io
import math

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medmax_fast import _csrc
from medmax_fast.data.images import decode, load_image
from medmax_fast.data.modes import to_rgb
from medmax_fast.data.resize import SIDE, filters, fit, fit_ref, resized_size

# Down and up, square and not, one side exact, already there, thin, prime, tiny.
SIZES = [(512, 512), (1024, 1024), (513, 512), (512, 513), (511, 511), (640, 480), (480, 640), (1152, 864), (97, 1013)]
SIZES += [(1013, 97), (600, 512), (512, 2000), (2000, 512), (37, 41), (16, 16), (1, 1), (3, 2), (1, 40), (40, 1)]
SIZES += [(300, 700), (1501, 1499), (1600, 200), (600, 1900)]


def random_pixels(width, height, seed=0, kind="noise"):
    draw = np.random.default_rng(seed)
    # Black beside white makes sums that leave 0..255, so that clamping shows.
    if kind == "extremes":
        return draw.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    return draw.integers(0, 256, (height, width, 3), dtype=np.uint8)


def run(pixels, channels, threads, plain):
    """Any form of the C++ over a poisoned output; a fourth channel holds noise that must not matter."""
    height, width = pixels.shape[:2]
    if channels == 4:
        pixels = np.dstack([pixels, random_pixels(width, height, 9)[:, :, 0]])
    wide, high = resized_size(width, height)
    out = np.full((SIDE, SIDE, 3), 123, np.uint8)
    _csrc.resample(
        np.ascontiguousarray(pixels), high, wide, (high - SIDE) // 2, (wide - SIDE) // 2, out, threads, plain
    )
    return out


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_form_equals_pillow(size):
    assert len(SIZES) >= 20
    for kind in ("noise", "extremes"):
        pixels = random_pixels(*size, kind=kind)
        expected = fit_ref(Image.fromarray(pixels))
        for channels in (3, 4):
            for threads, plain in ((1, False), (3, False), (1, True), (3, True)):
                np.testing.assert_array_equal(run(pixels, channels, threads, plain), expected)


def test_columns_first_as_in_every_pillow_of_the_time():
    version = tuple(int(part) for part in PIL.__version__.split(".")[:2])
    for size in ((600, 1900), (900, 1600), (1900, 600)):
        image = Image.fromarray(random_pixels(*size))
        wide, high = resized_size(*size)
        left, top = (wide - SIDE) // 2, (high - SIDE) // 2
        once = image.resize((wide, high), Image.Resampling.LANCZOS).crop((left, top, left + SIDE, top + SIDE))
        same = np.array_equal(np.asarray(once), fit(np.asarray(image)))
        assert same or (version >= (12, 2) and size[1] > 2 * size[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.integers(0, 99))
def test_random_sizes(width, height, seed):
    if max(width, height) / min(width, height) > 20:
        height = width
    pixels = random_pixels(width, height, seed, "extremes" if seed % 2 else "noise")
    np.testing.assert_array_equal(fit(pixels), fit_ref(Image.fromarray(pixels)))


def golden_names(golden):
    return sorted(path.name for path in (golden / "images").iterdir())


def test_golden_formats_at_every_size(golden):
    names = golden_names(golden)
    assert len(names) == 21
    for i, name in enumerate(names):
        image = Image.open(golden / "images" / name)
        for size in SIZES[i % 3 :: 3]:
            stream = io.BytesIO()
            image.resize(size, Image.Resampling.NEAREST).save(stream, image.format)
            rgb, _ = to_rgb(Image.open(stream), "whiten", "pillow")
            np.testing.assert_array_equal(load_image(stream_start(stream)), fit_ref(rgb), err_msg=f"{name} {size}")


def stream_start(stream):
    stream.seek(0)
    return stream


@pytest.mark.parametrize("size", [(60, 40), (2200, 2100)], ids=["in one piece", "in several blocks"])
def test_pillows_memory_is_read_in_place_or_copied(size):
    # Pillow keeps more than 16 MB in several blocks, which must be copied together.
    pixels = random_pixels(*size)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "BMP")
    for packed in (False, True):
        picture = decode(stream.getvalue(), "x.bmp", packed=packed)
        np.testing.assert_array_equal(picture.pixels[:, :, :3], pixels)
        assert picture.pixels.shape[2] == 3 or not packed
        np.testing.assert_array_equal(fit(picture.pixels), fit_ref(Image.fromarray(pixels)))


def reference_weights(in_size, out_size, first, count):
    """The rule in plain Python: per output pixel its first input pixel and the 22-bit weights, ends of zeros cut."""
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    rows = []
    for i in range(first, first + count):
        centre = (i + 0.5) * scale
        low = max(int(centre - 3 * stretch + 0.5), 0)
        high = min(int(centre + 3 * stretch + 0.5), in_size)
        exact = [lanczos((x - centre + 0.5) / stretch) for x in range(low, high)]
        total = sum(exact)
        weights = [int(math.copysign(math.floor(abs(w / total) * 2**22 + 0.5), w)) for w in exact]
        rows.append({low + t: w for t, w in enumerate(weights) if w})
    return rows


def lanczos(x):
    if x == 0:
        return 1.0
    if not -3 <= x < 3:
        return 0.0
    return math.sin(math.pi * x) / (math.pi * x) * math.sin(math.pi * x / 3) / (math.pi * x / 3)


@pytest.mark.parametrize("in_size, out_size", [(512, 512), (864, 512), (5, 512), (1, 512), (3001, 700), (700, 3001)])
def test_weights_follow_the_rule(in_size, out_size):
    first = (out_size - 512) // 2
    starts, weights = _csrc.lanczos_weights(in_size, out_size, first, 512)
    assert starts.dtype == weights.dtype == np.int32 and starts.shape == (512,) and weights.shape[0] == 512
    for start, row, expected in zip(starts, weights, reference_weights(in_size, out_size, first, 512), strict=True):
        found = {int(start) + t: int(w) for t, w in enumerate(row) if w}
        # A sine of another library may differ in its last bit, and with it a rounding in ten thousand.
        assert found.keys() == expected.keys() and all(abs(found[x] - expected[x]) <= 1 for x in found)
        assert start >= 0 and max(found) < in_size
    if in_size == out_size:
        assert weights.shape == (512, 1) and (weights == 1 << 22).all()


def test_filters_are_those_of_the_crop():
    found = filters(1152, 864)
    starts, weights = _csrc.lanczos_weights(1152, 683, 85, 512)
    np.testing.assert_array_equal(found.x_starts, starts)
    np.testing.assert_array_equal(found.x_weights, weights)
    np.testing.assert_array_equal(found.y_weights, _csrc.lanczos_weights(864, 512, 0, 512)[1])


def test_bad_arguments():
    good, out = np.zeros((4, 4, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    for pixels, target, error in [
        (np.zeros((4, 4), np.uint8), out, ValueError),
        (np.zeros((4, 4, 2), np.uint8), out, ValueError),
        (np.zeros((4, 4, 3), np.int32), out, TypeError),
        (np.zeros((4, 8, 3), np.uint8)[:, ::2], out, TypeError),
        (good, np.zeros((2, 2), np.uint8), ValueError),
        (np.zeros((0, 4, 3), np.uint8), out, ValueError),
    ]:
        with pytest.raises(error):
            _csrc.resample(pixels, 2, 2, 0, 0, target)
    for top, left in ((-1, 0), (1, 0), (0, 1)):
        with pytest.raises(ValueError, match="expected positive sizes and a range inside"):
            _csrc.resample(good, 2, 2, top, left, out)

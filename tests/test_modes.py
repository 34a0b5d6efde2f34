"""The policy for pixels that are not 8-bit RGB: alpha, 16 bits, frames, each counted."""

import io

import numpy as np
import pytest
from PIL import Image

from medmax_fast.data.images import ImageError, decode, load_image
from medmax_fast.data.modes import to_bytes


def encode(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def grey16(values, format="PNG"):
    return encode(Image.fromarray(np.array(values, np.uint16)), format)


def pixels(data, **options):
    return decode(data, "x", packed=True, **options)


ROW = [[0, 128, 129, 200, 255, 256, 40000, 65535]]
POLICIES = {
    "pillow": [0, 128, 129, 200, 255, 255, 255, 255],
    # 65,535 / 255 = 257 steps a level, rounded: 128 is the last 0, 129 the first 1.
    "scale": [0, 0, 1, 1, 1, 1, 156, 255],
    "window": [0, 0, 1, 1, 1, 1, 156, 255],
}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("policy", POLICIES)
def test_grey_of_16_bits(policy, format):
    found = pixels(grey16(ROW, format), depth16=policy)
    assert found.notes == ["depth16"]
    for channel in range(3):
        assert found.pixels[0, :, channel].tolist() == POLICIES[policy]


def test_window_uses_the_images_own_range():
    found = pixels(grey16([[1000, 1500, 2000]]), depth16="window")
    assert found.pixels[0, :, 0].tolist() == [0, 128, 255]
    assert pixels(grey16([[1000, 1500, 2000]]), depth16="scale").pixels[0, :, 0].tolist() == [4, 6, 8]
    assert pixels(grey16([[1000, 1500, 2000]]), depth16="pillow").pixels[0, :, 0].tolist() == [255] * 3


def test_floats_and_wide_integers_are_windowed_where_16_bits_do_not_hold_them():
    wide = encode(Image.fromarray(np.array([[-100, 0, 100]], np.int32)), "TIFF")
    real = encode(Image.fromarray(np.array([[0.25, 0.5, 0.75]], np.float32)), "TIFF")
    for policy in ("scale", "window"):
        assert pixels(wide, depth16=policy).pixels[0, :, 0].tolist() == [0, 128, 255]
        assert pixels(real, depth16=policy).pixels[0, :, 0].tolist() == [0, 128, 255]
    small = encode(Image.fromarray(np.array([[0, 257, 65535]], np.int32)), "TIFF")
    assert pixels(small, depth16="scale").pixels[0, :, 0].tolist() == [0, 1, 255]


def test_values_that_are_no_numbers():
    values = np.array([[np.nan, 1.0, 3.0, np.inf]], np.float32)
    assert to_bytes(values, "window")[0].tolist() == [0, 0, 255, 0]
    assert (to_bytes(np.full((2, 2), 7, np.uint16), "window") == 0).all()
    broken = encode(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF")
    with pytest.raises(ImageError, match="no finite pixel"):
        load_image(io.BytesIO(broken), depth16="window")


def test_colour_of_16_bits_keeps_the_high_byte(tmp_path):
    # Pillow cannot write such a file; a PPM with a maximum of 65,535 is one.
    values = np.array([[[0, 255, 256], [40000, 65535, 30000]]], ">u2")
    data = b"P6 2 1 65535\n" + values.tobytes()
    found = pixels(data)
    assert found.notes == []
    np.testing.assert_allclose(found.pixels[0].astype(int), values[0].astype(int) / 257, atol=1)


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_alpha_is_counted_and_blended_or_dropped(mode):
    rgba = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    rgba.putpixel((1, 0), (10, 20, 30, 0))
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 40, 50, 60])
        image.putpixel((1, 0), 1)
        data = encode(image, "PNG", transparency=1)
    else:
        data = encode(rgba.convert(mode), "PNG")
    blended, dropped = pixels(data, alpha="whiten"), pixels(data, alpha="drop")
    assert blended.notes == dropped.notes == ["alpha"]
    assert blended.pixels[0, 1].tolist() == [255, 255, 255]
    assert (dropped.pixels[0, 1] < 100).all()
    np.testing.assert_array_equal(blended.pixels[0, 0], dropped.pixels[0, 0])


def test_a_transparent_colour_of_an_rgb_image_counts_as_opaque():
    data = encode(Image.new("RGB", (2, 2), (10, 20, 30)), "PNG", transparency=(10, 20, 30))
    found = pixels(data)
    assert found.notes == [] and (found.pixels == (10, 20, 30)).all()


@pytest.mark.parametrize("format", ["TIFF", "GIF", "WEBP", "PNG"])
def test_the_first_of_several_frames(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    found = pixels(data)
    assert found.notes[:1] == ["frames"]
    assert found.pixels[4, 4, 0] > 180 and found.pixels[4, 4, 1:].max() < 20


def test_bilevel_and_cmyk():
    bilevel = Image.new("1", (2, 1))
    bilevel.putpixel((1, 0), 1)
    assert pixels(encode(bilevel, "PNG")).pixels[0].tolist() == [[0, 0, 0], [255, 255, 255]]
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert pixels(encode(cmyk, "TIFF")).pixels[0, 0].tolist() == [255, 0, 0]

"""Preprocessing equals the published pixels, and what cannot be read is refused by name and reason."""

import hashlib
import io
import json
import os
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from medmax_fast.data.images import ImageError, list_images, load_image
from medmax_fast.data.modes import whiten
from medmax_fast.data.resize import fit_ref, resized_size
from medmax_fast.runtime import InputError


def expected_images(golden):
    return json.loads((golden / "image_codes.json").read_text())


def encode(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def test_golden_pixels(golden):
    expected = expected_images(golden)
    assert len(expected) == 21
    for name, answer in expected.items():
        pixels = load_image(golden / "images" / name)
        assert pixels.shape == (512, 512, 3) and pixels.dtype == np.uint8
        assert hashlib.sha256(pixels.tobytes()).hexdigest() == answer["pixel_sha256"], name


def test_stream_equals_path(golden):
    path = golden / "images" / "cmyk.jpg"
    np.testing.assert_array_equal(load_image(io.BytesIO(path.read_bytes())), load_image(str(path)))


def test_dropping_alpha_differs_only_where_there_is_alpha(golden):
    expected = expected_images(golden)
    with_alpha = {name for name, answer in expected.items() if "codes_alpha_dropped" in answer}
    assert with_alpha == {"alpha.png", "gray_alpha.png"}
    for name in expected:
        path = golden / "images" / name
        same = np.array_equal(load_image(path, "drop"), load_image(path, "whiten"))
        assert same == (name not in with_alpha), name
    plain = Image.open(golden / "images" / "alpha.png").convert("RGB")
    np.testing.assert_array_equal(load_image(golden / "images" / "alpha.png", "drop"), fit_ref(plain))


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 4), min_size=1, max_size=64))
def test_whiten_is_truncated_float64(values):
    rgba = np.array(values, np.uint8).reshape(1, -1, 4)
    found = np.asarray(whiten(Image.fromarray(rgba)))
    for (r, g, b, a), pixel in zip(values, found[0].tolist(), strict=True):
        if min(v[3] for v in values) == 255:
            assert pixel == [r, g, b]
        else:
            assert pixel == [int((1 - a / 255.0) * 255 + a / 255.0 * c) for c in (r, g, b)]


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_shorter_side_becomes_512(width, height):
    wide, high = resized_size(width, height)
    assert min(wide, high) == 512
    assert (wide >= high) == (width >= height) or abs(wide - high) <= 1


def test_exif_orientation_is_ignored(tmp_path, golden):
    image = Image.open(golden / "images" / "tiny.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "turned.png", exif=exif)
    assert Image.open(tmp_path / "turned.png").getexif()[0x0112] == 6
    np.testing.assert_array_equal(load_image(tmp_path / "turned.png"), load_image(tmp_path / "plain.png"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_gives_pixels(mode):
    format = "TIFF" if mode in ("CMYK", "I;16", "I", "F") else "PNG"
    pixels = load_image(io.BytesIO(encode(Image.new(mode, (20, 10)), format)))
    assert pixels.shape == (512, 512, 3)


BAD_FILES = {
    "empty.png": (b"", "empty file"),
    "page.jpg": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "an HTML or XML page, not an image"),
    "text.png": (b"just some words, not pixels", "not an image"),
    "drawing.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_not_an_image(tmp_path, name):
    content, reason = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / name)
    assert caught.value.reason.startswith(reason)
    assert str(caught.value) == f"{tmp_path / name}: {caught.value.reason}"
    assert isinstance(caught.value, InputError) and "\n" not in str(caught.value)


def test_no_file_at_all(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    cases = {tmp_path / "gone.png": "no such file", tmp_path: "a folder, expected an image file"}
    cases |= {tmp_path / "pipe.png": "a device or pipe", "": "empty path", "a\0b": "cannot be read"}
    for path, reason in cases.items():
        with pytest.raises(ImageError, match=reason):
            load_image(path)


@pytest.mark.parametrize("name", ["subsampled.jpg", "progressive.jpg", "alpha.png", "bitmap.bmp", "image.webp"])
def test_truncated_files_are_refused_even_when_pillow_was_told_to_fill_them(golden, monkeypatch, name):
    content = (golden / "images" / name).read_bytes()
    for keep in (len(content) // 10, len(content) // 2, len(content) * 9 // 10):
        # As another library in the process might do, at any time.
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        with pytest.raises(ImageError):
            load_image(io.BytesIO(content[:keep]))


def test_decompression_bombs_are_refused_before_they_are_decoded(monkeypatch, tmp_path):
    # A bilevel PNG of 20000 x 20000 pixels takes 50 kB.
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    for limit in (Image.MAX_IMAGE_PIXELS, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ImageError, match="expected at most 178956970"):
            load_image(tmp_path / "bomb.png")
    Image.new("1", (400_000, 1)).save(tmp_path / "thread.png")
    with pytest.raises(ImageError, match="too thin"):
        load_image(tmp_path / "thread.png")


def test_damaged_bytes_never_raise_anything_else(golden):
    draw = random.Random(0)
    small = Image.open(golden / "images" / "tiny.png").convert("RGB")
    formats = [f for f in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "JPEG2000", "PPM", "AVIF") if f in Image.SAVE]
    files = [encode(small, format) for format in formats]
    refused = read = 0
    for _ in range(400):
        content = bytearray(draw.choice(files))
        for _ in range(draw.choice((1, 3, 10))):
            content[draw.randrange(min(len(content), 200))] = draw.randrange(256)
        try:
            load_image(io.BytesIO(bytes(content)))
            read += 1
        except ImageError:
            refused += 1
    assert refused > 100 and read > 20


def test_list_images(tmp_path):
    for name in ("b.PNG", "a.jpg", "deep/er/c.tiff", "notes.txt", ".hidden.png", ".git/d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path) == ["a.jpg", "b.PNG", "deep/er/c.tiff"]

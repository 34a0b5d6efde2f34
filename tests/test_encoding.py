"""The two ways to the codes, and what `--fast` does with files that nvJPEG cannot decode.

The way of a GPU (full-size pictures, the resampling kernel's reference, batches under way) runs here on the CPU.
"""

import io
import json

import numpy as np
import pytest
from PIL import Image

from medmax_fast.data.feed import ImageLoader, load_ahead
from medmax_fast.data.image_list import read_image_list
from medmax_fast.data.images import load_image
from medmax_fast.encoding import Encoding, picture_filters
from medmax_fast.model.image_tokenizer import ImageTokenizer


@pytest.fixture(scope="module")
def tokenizer(golden):
    return ImageTokenizer.from_checkpoint(golden / "checkpoint")


def listed(folder, *names):
    (folder / "table.csv").write_text("img_path\n" + "\n".join(map(str, names)) + "\n")
    return read_image_list(folder / "table.csv")


def results(images, loader):
    return load_ahead(((0, row) for row in range(len(images.paths))), lambda task: loader(task[1]), 2, 4)


class Stand:
    """Decodes as nvJPEG might: most files, a little differently, and some not at all; takes no broken one amiss."""

    def __init__(self, refuse=(), shift=0):
        self.refuse, self.shift, self.batches = refuse, shift, []

    def decode(self, data):
        self.batches.append(len(data))
        return [None if self._refused(content) else self._pixels(content) for content in data]

    def _refused(self, content):
        return any(mark in content for mark in self.refuse)

    def _pixels(self, content):
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) + np.uint8(self.shift)


def test_full_size_pictures_give_the_golden_codes(golden, tmp_path, tokenizer):
    expected = json.loads((golden / "image_codes.json").read_text())
    names = ["cell.png", "subsampled.jpg", "tall.png", "alpha.png"]
    images = listed(tmp_path, *(golden / "images" / name for name in names))
    loader = ImageLoader(images, "whiten", "pillow", full_size=True)
    encoding = Encoding(tokenizer, loader, 3, None)
    loaded = [entry for _, entry, _ in encoding.ready(results(images, loader))]
    pixels = [entry.pixels for entry in loaded]
    assert all(picture.shape[2] == 3 and picture.shape[:2] != (512, 512) for picture in pixels[1:])
    codes = np.concatenate([encoding.start(pixels[:3])(), encoding.start(pixels[3:])()])
    assert codes.dtype == np.uint16
    for name, found in zip(names, codes, strict=True):
        assert np.count_nonzero(found != expected[name]["codes"]) <= expected[name]["near_ties"], name
    seen = tokenizer.resampled(pixels, *picture_filters(pixels))
    np.testing.assert_array_equal(seen, np.stack([load_image(golden / "images" / name) for name in names]))


@pytest.fixture()
def folder(tmp_path):
    """Eight JPEGs, two of them damaged, and a PNG with alpha that no GPU decoder is asked for."""
    draw = np.random.default_rng(0)
    for i in range(8):
        pixels = draw.integers(0, 256, (40 + i, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg", comment=f"picture {i}".encode())
    whole = (tmp_path / "2.jpg").read_bytes()
    (tmp_path / "2.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "5.jpg").write_bytes(b"\xff\xd8 nothing")
    Image.new("RGBA", (30, 30), (200, 0, 0, 128)).save(tmp_path / "alpha.png")
    return tmp_path


def decoded(folder, decoder, batch_size):
    images = listed(folder, *(f"{i}.jpg" for i in range(8)), "alpha.png")
    loader = ImageLoader(images, "whiten", "pillow", full_size=True, postpone=decoder is not None)
    encoding = Encoding(None, loader, batch_size, decoder)
    return [entry for _, entry, _ in encoding.ready(results(images, loader))]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_broken_file_of_a_batch_is_rejected_alone(folder, batch_size):
    exact = decoded(folder, None, batch_size)
    decoder = Stand(refuse=(b"picture 2", b"picture 3"))
    fast = decoded(folder, decoder, batch_size)
    # The decoder sees the files whose headers can be read; it refuses the damaged one, and a good one.
    assert sum(decoder.batches) == 7 and max(decoder.batches) <= batch_size
    for i, (found, wanted) in enumerate(zip(fast, exact, strict=True)):
        assert found.reason == wanted.reason and found.sha256 == wanted.sha256 and found.notes == wanted.notes
        assert (found.reason is not None) == (i in (2, 5))
        if wanted.pixels is not None:
            np.testing.assert_array_equal(found.pixels, wanted.pixels)
    assert exact[2].reason.startswith("broken image") and fast[8].notes == ["alpha"]


def test_difference_counts_pixels_and_codes(golden, tmp_path, tokenizer):
    Image.open(golden / "images" / "subsampled.jpg").resize((100, 90)).save(tmp_path / "a.jpg", quality=95)
    (tmp_path / "b.jpg").write_bytes(b"broken")
    images = listed(tmp_path, "a.jpg", "b.jpg")
    loader = ImageLoader(images, "whiten", "pillow", full_size=True, postpone=True)
    same = Encoding(tokenizer, loader, 4, Stand()).difference(tokenizer, [0, 1])
    assert same == {"compared_images": 1, "pixels_differing": 0.0, "codes_differing": 0.0}
    shifted = Encoding(tokenizer, loader, 4, Stand(shift=30)).difference(tokenizer, [0, 1])
    assert shifted["pixels_differing"] > 0.9 and 0.1 < shifted["codes_differing"] <= 1
    assert Encoding(tokenizer, loader, 4, Stand()).difference(tokenizer, [1]) == {"compared_images": 0}

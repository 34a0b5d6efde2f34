"""Codes to pixels in batches, and in 16 bits only where that is within one grey level."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from medmax_fast.model.image_tokenizer import ImageTokenizer
from medmax_fast.model.picture_decoder import PictureDecoder, write_png
from medmax_fast.runtime import InputError


@pytest.fixture(scope="module")
def tokenizer(golden):
    return ImageTokenizer.from_checkpoint(golden / "checkpoint")


@pytest.fixture(scope="module")
def codes(golden):
    images = json.loads((golden / "image_codes.json").read_text())
    return np.array([images[name]["codes"] for name in ("ihc.png", "retina.jpg", "noise.png")])


def test_batches_are_the_pictures_one_by_one(tokenizer, codes, golden):
    decoder = PictureDecoder(tokenizer)
    together = decoder.decode(codes)
    assert together.shape == (3, 512, 512, 3) and together.dtype == np.uint8
    for pixels, one in zip(together, codes, strict=True):
        assert np.abs(pixels.astype(int) - tokenizer.decode(one[None])[0]).max() <= 1
    assert decoder.half is False, "a CPU decodes in fp32"
    assert decoder.decode(np.empty((0, 1024), dtype=int)).shape == (0, 512, 512, 3)


def test_fp16_is_used_where_it_agrees(golden, codes):
    # As it is, the random golden decoder moves 0.4 % of values by 2 to 5; with less contrast it stays within a level.
    tokenizer = ImageTokenizer.from_checkpoint(golden / "checkpoint")
    tokenizer.vqgan.decoder.conv_out.weight.mul_(0.1)
    decoder = PictureDecoder(tokenizer, half=True)
    assert decoder.half is None
    first = decoder.decode(codes[:1])
    assert np.array_equal(first, tokenizer.decode(codes[:1])), "the batch that decides is the exact one"
    assert decoder.half is True and decoder.apart <= 1
    # The tokenizer itself still has its own weights.
    assert next(tokenizer.vqgan.decoder.parameters()).dtype == torch.float32
    second = decoder.decode(codes[1:2])
    assert np.abs(second.astype(int) - tokenizer.decode(codes[1:2])).max() <= 1


def test_fp16_is_left_where_it_does_not(tokenizer, codes, capsys):
    decoder = PictureDecoder(tokenizer, half=True)
    decoder.decode(codes[:1])
    assert decoder.half is False and decoder.apart > 1
    assert "pictures are decoded in fp32: fp16 moves pixels by up to" in capsys.readouterr().err
    assert np.array_equal(decoder.decode(codes[1:2]), tokenizer.decode(codes[1:2]))


@pytest.mark.parametrize("count", [0, 1025])
def test_a_preview_needs_a_beginning(tokenizer, count):
    with pytest.raises(InputError, match=f"{count} codes of a picture, expected 1 to 1024"):
        PictureDecoder(tokenizer).preview(np.zeros(count, dtype=int))


def test_png(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", pixels)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.gpu
def test_on_a_gpu(golden, codes):
    cpu = ImageTokenizer.from_checkpoint(golden / "checkpoint")
    gpu = PictureDecoder(ImageTokenizer.from_checkpoint(golden / "checkpoint", "cuda"))
    for _ in range(2):
        assert np.abs(gpu.decode(codes).astype(int) - cpu.decode(codes)).max() <= 1
    assert gpu.half is (gpu.apart <= 1)

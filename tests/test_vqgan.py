"""The VQGAN against the reference's codes and picture, and its loading from damaged checkpoints."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from medmax_fast.data.images import load_image
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.convert import write_checkpoint
from medmax_fast.model.image_tokenizer import ImageTokenizer
from medmax_fast.model.init_vqgan import LEVELS, colour_vqgan
from medmax_fast.model.vqgan import VQConfig
from medmax_fast.runtime import InputError


@pytest.fixture(scope="module")
def tokenizer(golden):
    return ImageTokenizer.from_checkpoint(golden / "checkpoint")


def test_codes_equal_the_reference(golden, tokenizer):
    expected = json.loads((golden / "image_codes.json").read_text())
    # Those whose codes moved when the encoder ran channels last, and one per shape; the command line does all 21.
    for name in ("microaneurysms.png", "phantom.png", "tiny.png", "wide.png"):
        codes = tokenizer.encode(load_image(golden / "images" / name)[None])[0]
        differ = int((codes != np.array(expected[name]["codes"])).sum())
        assert differ <= expected[name]["near_ties"], name


def test_codes_do_not_depend_on_the_batch(golden, tokenizer):
    pixels = np.stack([load_image(golden / "images" / name) for name in ("cell.png", "phantom.png", "ihc.png")])
    together = tokenizer.encode(pixels)
    for i in range(3):
        assert (tokenizer.encode(pixels[i : i + 1])[0] != together[i]).sum() <= 1


def test_reconstruction_equals_the_reference(golden, tokenizer):
    name = json.loads((golden / "reconstruction.json").read_text())["codes_of"]
    codes = json.loads((golden / "image_codes.json").read_text())[name]["codes"]
    expected = np.asarray(Image.open(golden / "reconstruction.png").convert("RGB")).astype(int)
    assert np.abs(tokenizer.decode(np.array([codes]))[0] - expected).max() <= 1


def test_hugging_face_folder_gives_the_same_codes(golden, tokenizer, tmp_path):
    write_checkpoint(open_checkpoint(golden / "checkpoint"), tmp_path / "hf", "hf")
    pixels = np.random.default_rng().integers(0, 256, (1, 512, 512, 3), dtype=np.uint8)
    other = ImageTokenizer.from_checkpoint(tmp_path / "hf")
    assert other.sha256 == tokenizer.sha256
    np.testing.assert_array_equal(other.encode(pixels), tokenizer.encode(pixels))
    # Stock folders have no decoder: they encode, and say why they cannot draw.
    (tmp_path / "hf" / "vqgan_decoder.safetensors").unlink()
    stock = ImageTokenizer.from_checkpoint(tmp_path / "hf")
    np.testing.assert_array_equal(stock.encode(pixels), tokenizer.encode(pixels))
    with pytest.raises(InputError, match="no VQGAN decoder"):
        stock.decode(np.zeros((1, 1024), dtype=np.int64))


@pytest.mark.parametrize("codes", [np.zeros((1, 1023)), np.full((1, 1024), 8192), np.full((1, 1024), -1)])
def test_bad_codes_are_refused(tokenizer, codes):
    with pytest.raises(InputError):
        tokenizer.decode(codes)


def damage(path, change):
    state = torch.load(path, weights_only=True)
    change(state["state_dict"])
    torch.save(state, path)
    (path.parent / "checklist.chk").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("encoder.mid.attn_1.q.weight"), "encoder.mid.attn_1.q.weight is missing"),
        (
            lambda s: s.update({"quant_conv.bias": torch.zeros(7)}),
            r"quant_conv.bias has shape \(7,\), expected \(32,\)",
        ),
    ],
)
def test_damaged_vqgan_is_named(golden_checkpoint, change, message):
    damage(golden_checkpoint / "tokenizer" / "vqgan.ckpt", change)
    with pytest.raises(InputError, match=message):
        ImageTokenizer.from_checkpoint(golden_checkpoint)


def test_config_round_trips_through_both_descriptions():
    config = VQConfig(ch=64, ch_mult=(1, 2), z_channels=8, embed_dim=16, resolution=256, attn_resolutions=(128,))
    assert VQConfig.from_yaml(config.to_yaml()) == config
    assert VQConfig.from_hf(config.to_hf()) == config


def test_untrained_vqgan_shows_mean_colours():
    # A small grid of the same construction: 64 x 64 pixels, 16 pixels a code.
    config = VQConfig(
        ch=128,
        ch_mult=(1, 1, 1, 1, 1),
        num_res_blocks=1,
        z_channels=4,
        embed_dim=4,
        resolution=64,
        attn_resolutions=(4,),
    )
    vqgan = colour_vqgan(config, torch.Generator().manual_seed(3)).eval()
    colours = torch.rand(5, 3, 1, 1) * 2 - 1
    with torch.inference_mode():
        codes = vqgan.encode(colours.expand(-1, -1, 64, 64))
        picture = vqgan.decode(codes)
    found = vqgan.quantize.embedding.weight[codes][..., :3]
    half_step = 1 / (torch.tensor(LEVELS) - 1)
    assert ((found - colours[:, None, :, 0, 0]).abs() <= half_step + 0.01).all()
    # The padding of the enlarging convolutions reaches in from the edges, not to the centre.
    torch.testing.assert_close(picture[:, :, 32, 32], found[:, 5], rtol=0, atol=0.02)

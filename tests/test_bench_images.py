"""The benchmark of images: pixels and codes stand beside each speed, wrong ones have none, and FLOP are counted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from quick_run import quick_run
from torch import nn

from medmax_fast.model.vqgan import VQGAN, AttnBlock
from medmax_fast.model.vqgan_config import VQConfig

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a quick run wrote."""
    return quick_run("images", tmp_path_factory.mktemp("bench"))


@pytest.fixture()
def benchmarks():
    from benchmarks import bench_images
    from benchmarks.stages import image_forms, image_memory, image_pixels

    return bench_images, image_forms, image_pixels, image_memory


def rows_of(found: dict, stage: str) -> list[dict]:
    return [row for row in found["evidence"] if row["stage"] == stage]


def test_every_section_compares_ours_with_the_published_form(found):
    assert not found["failed"] and list(found["sections"]) == ["pixels", "encoder", "tokenize"]
    pixels, encoder, tokenize = (rows_of(found, stage) for stage in found["sections"])
    assert [row["form"] for row in pixels[:4]] == [
        "published",
        "ours",
        "published, resize alone",
        "ours, resize alone",
    ]
    assert [row["form"] for row in encoder] == ["published", "ours, fp32"]
    assert [row["form"] for row in tokenize] == ["published", "medmax tokenize, fp32"]
    for row in found["evidence"]:
        assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"] and row["unit"] == "images"
        beside = next(other for other in rows_of(found, row["stage"]) if other["form"] == row["beside"])
        assert row["times"] == pytest.approx(beside["p50_s"] / row["p50_s"])
        assert all(value == 0 for name, value in row["quality"].items() if name.endswith("differing"))
    assert all("codes_differing" in row["quality"] for row in encoder + tokenize)
    # What the published form changes stands in each row of ours.
    for published, *ours in (encoder, tokenize):
        changed = [row["quality"]["published_differing"] for row in ours]
        assert changed == [published["quality"]["codes_differing"]] * len(ours)
    assert all(row["quality"] == {"pixels_differing": 0} and row["share"] is None for row in pixels)
    for row in encoder:
        assert row["items_per_s"] == pytest.approx(2 / row["p50_s"])
        # Products set the floor.
        assert row["bound"] == "product"
        assert row["share"] == pytest.approx(row["flop"] / found["product_flop_per_s"] / row["p50_s"])


def layers_flop(config: VQConfig) -> int:
    """FLOP of one picture, added up layer by layer from the shapes that go through."""
    counted = []

    def conv(module, inputs, output):
        counted.append(2 * output[0].numel() * inputs[0].shape[1] * module.kernel_size[0] * module.kernel_size[1])

    def attention(module, inputs, _):
        _, channels, height, width = inputs[0].shape
        # Scores and their product with the values.
        counted.append(2 * 2 * (height * width) ** 2 * channels)

    with torch.device("meta"), torch.no_grad():
        vqgan = VQGAN(config, decoder=False)
        for module in vqgan.modules():
            if isinstance(module, nn.Conv2d | AttnBlock):
                module.register_forward_hook(conv if isinstance(module, nn.Conv2d) else attention)
        vqgan.quant_conv(vqgan.encoder(torch.empty(1, 3, config.resolution, config.resolution)))
    return sum(counted) + 2 * config.latent_side**2 * config.n_embed * config.embed_dim


def test_flop_of_the_encoder(benchmarks):
    bench, forms, *_ = benchmarks
    with_attention = VQConfig(
        ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=32, attn_resolutions=(16,), n_embed=64
    )
    for config in (bench.REAL, bench.SMALL, bench.WHOLE, with_attention):
        assert forms.encode_flop(config) == layers_flop(config)
    # The published model: 550 GFLOP and 4.3 of the quantizer.
    assert forms.encode_flop(bench.REAL) == pytest.approx(554e9, rel=0.002)
    parameters = 27.2e6
    assert forms.encode_bytes(bench.REAL, 0) == pytest.approx(2 * parameters + 4 * 8192 * 256, rel=0.02)
    one = forms.encode_bytes(bench.REAL, 1) - forms.encode_bytes(bench.REAL, 0)
    assert one == 2 * 3 * 512 * 512 + 8 * 1024


def test_floors_are_those_of_the_evidence(benchmarks):
    bench, forms, *_ = benchmarks
    encoder, tokenize = bench.floors()
    assert encoder["shape"] == "32 pictures of 512 x 512" and encoder["flop"] == 32 * tokenize["flop"]
    assert tokenize["shape"] == bench.TOKENIZED and tokenize["flop"] == forms.encode_flop(bench.REAL)


def test_codes_of_the_random_vqgan_tell_pictures_apart(benchmarks):
    bench, forms, *_ = benchmarks
    pictures = forms.turned_pictures(bench.SMALL.resolution)
    assert pictures.shape == (84, 64, 64, 3)
    checkpoint = forms.VQGANCheckpoint(bench.SMALL, CPU, pictures[bench.ENCODED :])
    x_BCHW = forms.normalised(torch.from_numpy(pictures[: bench.ENCODED : 4]))
    codes, ties = forms.exact_codes(checkpoint.eager(CPU), x_BCHW)
    # A quarter of the 16 x 16 latents have a code of their own, though many middles are blank.
    assert codes.shape == (16, 16) and len(np.unique(codes)) > 64 and ties == 0
    # Near ties: each code twice.
    state = checkpoint.vqgan_state()["quantize.embedding.weight"]
    state[128:] = state[:128]
    _, ties = forms.exact_codes(checkpoint.eager(CPU), x_BCHW)
    assert ties == 1


def test_jpegs_differ_in_bytes_and_in_pictures(benchmarks):
    _, forms, *_ = benchmarks
    jpeg = forms.jpegs(10)
    pixels = [forms.published_pixels(jpeg(i)) for i in range(11)]
    assert len({jpeg(i) for i in range(25)}) == 25
    assert not any(torch.equal(pixels[0], other) for other in pixels[1:10]) and torch.equal(pixels[0], pixels[10])


def test_other_pixels_are_not_timed(benchmarks, monkeypatch):
    bench, _, pixels, _ = benchmarks
    right = pixels.ours
    monkeypatch.setattr(pixels, "ours", lambda data, dali: right(data, dali).nextafter(torch.tensor(2.0)))
    with pytest.raises(AssertionError, match="values differ"):
        list(pixels.pixels(bench.Roofline(1e9, 1e9), True))


def test_other_codes_are_not_timed(benchmarks, monkeypatch):
    bench, *_ = benchmarks
    right = bench.ImageTokenizer.encode_tensor
    monkeypatch.setattr(bench.ImageTokenizer, "encode_tensor", lambda self, x: right(self, x) ^ 1)
    monkeypatch.setattr(bench, "published_seconds", lambda *_: dict.fromkeys(("p20_s", "p50_s", "p80_s"), 1.0))
    roofline = bench.Roofline(1e9, 1e9)
    with pytest.raises(AssertionError, match="ours, fp32: 100.00% of the codes"):
        list(bench.encoder(CPU, roofline, 1))
    with pytest.raises(AssertionError, match="medmax tokenize, fp32: 100.00% of the codes"):
        list(bench.tokenize(CPU, roofline))


def test_memory(benchmarks):
    from medmax_fast import tokenization
    from medmax_fast.model.image_tokenizer import ImageTokenizer

    *_, memory = benchmarks
    rows = memory.memory(60)
    seen = [int(row["row"].split()[0]) for row in rows]
    assert len(seen) > 8 and seen == sorted(set(seen)) and seen[-1] == 60
    assert all(row["resident_mib"] > 10 for row in rows) and tokenization.ImageTokenizer is ImageTokenizer

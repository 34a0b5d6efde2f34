"""The VQGAN against the reference's codes and picture, and its loading from damaged checkpoints."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from medmax_fast.data.images import load_image
from medmax_fast.kernels import group_norm
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.convert import write_checkpoint
from medmax_fast.model.image_tokenizer import ImageTokenizer, normalised
from medmax_fast.model.init_vqgan import LEVELS, colour_vqgan
from medmax_fast.model.vqgan import VQGAN
from medmax_fast.model.vqgan_config import VQConfig
from medmax_fast.runtime import InputError

# A small encoder with 32 x 32 codes, as a 16-bit convolution takes minutes a picture on most CPUs.
SMALL = VQConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=16, embed_dim=16, resolution=64)


def small_tokenizer(precision="fp32", device="cpu", batch_size=None):
    """Random weights, the same on every call; the codebook is drawn from latents, so that codes are diverse."""
    generator = torch.Generator().manual_seed(5)
    vqgan = VQGAN(SMALL).requires_grad_(False)
    for parameter in vqgan.parameters():
        bound = (parameter[0].numel() if parameter.ndim > 1 else 4) ** -0.5
        parameter.uniform_(-bound, bound, generator=generator)
    latents = vqgan.quant_conv(vqgan.encoder(torch.rand(8, 3, 64, 64, generator=generator) * 2 - 1))
    vqgan.quantize.embedding.weight.copy_(latents.permute(0, 2, 3, 1).reshape(-1, 16))
    return ImageTokenizer(vqgan, "small", device, precision, batch_size)


def small_pixels(count, seed=2):
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


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


@pytest.mark.parametrize(("precision", "most"), [("fp16", 0.04), ("bf16", 0.25)])
def test_sixteen_bits(precision, most):
    pixels, exact = small_pixels(2), small_tokenizer()
    tokenizer = small_tokenizer(precision)
    vqgan = tokenizer.vqgan
    assert tokenizer.input_dtype == vqgan.encoder.mid.attn_1.q.weight.dtype == vqgan.decoder.conv_out.weight.dtype
    assert tokenizer.input_dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    for module in (vqgan.quant_conv, vqgan.quantize.embedding, vqgan.encoder.norm_out, vqgan.post_quant_conv):
        assert module.weight.dtype == torch.float32
    expected = exact.encode(pixels)
    assert len(np.unique(expected)) > 500
    share = (tokenizer.encode(pixels) != expected).mean()
    print(f"{precision}: {share:.2%} of codes differ from fp32's")
    assert 0 < share < most
    away = np.abs(tokenizer.decode(expected).astype(int) - exact.decode(expected))
    assert 0 < away.max() <= 12 and away.mean() < 1


def test_tensors_and_pixels_give_the_same_codes():
    tokenizer, pixels = small_tokenizer(), small_pixels(3)
    x_BCHW = torch.from_numpy((pixels / 255 * 2 - 1).astype(np.float32)).permute(0, 3, 1, 2)
    codes = tokenizer.encode_tensor(x_BCHW)
    assert codes.dtype == torch.int64 and codes.shape == (3, 1024)
    np.testing.assert_array_equal(codes.numpy(), tokenizer.encode(pixels))
    # On a CPU both layouts run channels first, so that the codes are the same to the last near tie.
    assert torch.equal(tokenizer.encode_tensor(x_BCHW.contiguous()), codes)
    assert tokenizer.encode_tensor(x_BCHW[:0]).shape == (0, 1024)
    assert not codes.is_inference()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 3, 64, 64, dtype=torch.float16), r"float16 \[1, 3, 64, 64\] on cpu: expected torch.float32"),
        (torch.zeros(1, 64, 64, 3), r"\[1, 64, 64, 3\]"),
        (torch.zeros(3, 64, 64), r"expected torch.float32 \[N, 3, 64, 64\]"),
        (torch.zeros(1, 3, 64, 64, device="meta"), "on meta"),
    ],
)
def test_tensors_of_another_kind_are_refused(x, message):
    with pytest.raises(InputError, match=message):
        small_tokenizer().encode_tensor(x)


def test_unknown_precision_is_refused():
    with pytest.raises(InputError, match="precision 'fp8': expected fp32, tf32, fp16, bf16"):
        small_tokenizer("fp8")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
def test_tf32_is_switched_for_the_call_only(precision, monkeypatch):
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul

    def switches():
        return conv.fp32_precision, matmul.fp32_precision, torch.backends.cudnn.benchmark

    def encode(x_BCHW):
        seen.append(switches())
        raise ArithmeticError

    tokenizer, seen = small_tokenizer(precision), []
    monkeypatch.setattr(tokenizer.vqgan, "encode", encode)
    before = "tf32" if precision != "tf32" else "ieee"
    try:
        conv.fp32_precision = matmul.fp32_precision = before
        with pytest.raises(ArithmeticError):
            tokenizer.encode(small_pixels(1))
        assert seen == [("tf32" if precision == "tf32" else "ieee", "ieee", False)]
        assert switches() == (before, before, False)
    finally:
        conv.fp32_precision, matmul.fp32_precision = "tf32", "none"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_graph_equals_eager_whatever_the_batch_holds(precision):
    pixels = small_pixels(10)
    eager = small_tokenizer(precision, "cuda")
    graph = small_tokenizer(precision, "cuda", batch_size=4)
    # Two full batches and a padded one; and each picture's codes when it comes alone, or after others.
    expected = np.concatenate([eager.encode(pixels[:4]), eager.encode(pixels[4:8]), eager.encode(pixels[6:])[2:]])
    np.testing.assert_array_equal(graph.encode(pixels), expected)
    for start, stop in ((3, 4), (0, 3), (5, 10)):
        np.testing.assert_array_equal(graph.encode(pixels[start:stop]), expected[start:stop])


@pytest.mark.gpu
def test_encoding_a_tensor_does_not_wait_for_the_gpu(monkeypatch):
    # Its codebook is made on the CPU.
    tokenizer = small_tokenizer("fp16", "cuda", batch_size=4)
    # Every norm finds channels last and takes the kernel, and so does every sum.
    for name in ("group_norm_silu_ref", "sum_ref"):
        monkeypatch.setattr(group_norm, name, lambda *_: pytest.fail("torch in place of a kernel"))
    x_BCHW = torch.rand(6, 3, 64, 64, device="cuda", dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    first = tokenizer.encode_tensor(x_BCHW)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = tokenizer.encode_tensor(x_BCHW)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert second.is_cuda and torch.equal(first, second)
    assert second.data_ptr() != tokenizer.encode_tensor(x_BCHW).data_ptr()


@pytest.mark.gpu
def test_golden_codes_on_a_gpu(golden, tokenizer):
    """Of all images the reference's codes in fp32, but for near ties, which each order of summation has of its own."""
    answers = json.loads((golden / "image_codes.json").read_text())
    pixels = np.stack([load_image(golden / "images" / name) for name in answers])
    expected = np.array([answer["codes"] for answer in answers.values()])
    near_ties = np.array([answer["near_ties"] for answer in answers.values()])
    gpu = ImageTokenizer.from_checkpoint(golden / "checkpoint", "cuda", batch_size=4)
    codes = gpu.encode(pixels)
    differing = codes != expected
    print(f"{differing.sum()} of {expected.size} codes differ from the reference's ({near_ties.sum()} near ties)")
    assert (differing.sum(axis=1) <= near_ties + 1).all() and differing.sum() <= near_ties.sum() + 3
    codebook = tokenizer.vqgan.quantize.embedding.weight.double()
    for image, position in np.argwhere(differing):
        with torch.inference_mode():
            x_BCHW = normalised(torch.from_numpy(pixels[image : image + 1]))
            z_BDHW = tokenizer.vqgan.quant_conv(tokenizer.vqgan.encoder(x_BCHW)).double()
        z = z_BDHW.flatten(2)[0, :, position]
        chosen, best = ((codebook[table[image, position]] - z).pow(2).sum() for table in (codes, expected))
        # Noise of 1e-6 in all convolutions' results moves no code whose distances differ by more than 2e-7 of ||z||^2.
        assert abs(chosen - best) <= 1e-5 * z.pow(2).sum(), list(answers)[image]


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "most"), [("tf32", 0.03), ("fp16", 0.03), ("bf16", 0.15)])
def test_codes_of_other_precisions_on_a_gpu(golden, precision, most):
    answers = json.loads((golden / "image_codes.json").read_text())
    names = ("cell.png", "ihc.png", "microaneurysms.png", "noise.png", "phantom.png", "retina.jpg", "tiny.png")
    pixels = np.stack([load_image(golden / "images" / name) for name in names])
    expected = np.array([answers[name]["codes"] for name in names])
    tokenizer = ImageTokenizer.from_checkpoint(golden / "checkpoint", "cuda", precision, batch_size=4)
    share = (tokenizer.encode(pixels) != expected).mean()
    print(f"{precision}: {share:.3%} of codes differ from the reference's")
    # Not one would say that the precision was not used.
    assert 0 < share < most


@pytest.mark.gpu
def test_reconstruction_on_a_gpu(golden):
    name = json.loads((golden / "reconstruction.json").read_text())["codes_of"]
    codes = json.loads((golden / "image_codes.json").read_text())[name]["codes"]
    expected = np.asarray(Image.open(golden / "reconstruction.png").convert("RGB")).astype(int)
    gpu = ImageTokenizer.from_checkpoint(golden / "checkpoint", "cuda")
    assert np.abs(gpu.decode(np.array([codes]))[0] - expected).max() <= 1


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


def test_normalised_bytes_are_the_references():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    expected = (pixels.astype(np.float64) / 255 * 2 - 1).astype(np.float32)
    found = normalised(torch.from_numpy(pixels))
    assert found.is_contiguous() and found.dtype == torch.float32
    np.testing.assert_array_equal(found.permute(0, 2, 3, 1).numpy(), expected)

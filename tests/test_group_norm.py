"""GroupNorm + SiLU: both paths against float64, at most twice the error of torch's own two at the same precision."""

import random

import pytest
import torch
from accuracy import assert_as_good, assert_same
from torch.nn import functional as F

from medmax_fast.kernels import group_norm
from medmax_fast.kernels.blocks import blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
# SiLU far below zero is y / (1 + inf) = -0, of which NumPy, the interpreter's arithmetic, tells.
overflow = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
pytestmark = [pytest.mark.gpu(required=False), pytest.mark.usefixtures("bf16_to_nearest"), overflow]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Batch, channels, groups, height, width: the encoder's widths with one to sixteen channels a group on odd sides (one
# chunk of rows, several, a last one of a single row), groups that are no power of two or not 32, one pixel.
SHAPES = [
    (1, 32, 32, 7, 5),
    (2, 32, 32, 33, 17),
    (3, 64, 32, 9, 31),
    (1, 128, 32, 27, 19),
    (1, 256, 32, 257, 1),
    (2, 512, 32, 5, 3),
    (1, 96, 32, 19, 29),
    (2, 160, 32, 11, 13),
    (1, 480, 32, 3, 9),
    (1, 60, 1, 21, 5),
    (3, 21, 7, 6, 6),
    (2, 64, 32, 1, 1),
]


def picture(B, C, H, W, dtype=torch.float32, mean=0.0, seed=0):
    """Channels last, each channel with a mean and a width of its own around the given ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, C, H, W, generator=generator) * (0.5 + torch.rand(C, 1, 1, generator=generator))
    x = x + mean + 0.3 * torch.randn(C, 1, 1, generator=generator)
    return x.to(DEVICE, dtype, memory_format=torch.channels_last)


def affine(C, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    weight, bias = 0.5 + torch.rand(C, generator=generator), torch.randn(C, generator=generator)
    return weight.to(DEVICE, dtype), bias.to(DEVICE, dtype)


def exact(x, weight, bias, groups, silu=True):
    """In float64 from the definition."""
    B, C = x.shape[:2]
    grouped = x.double().reshape(B, groups, -1)
    away = grouped - grouped.mean(-1, keepdim=True)
    y = (away / (away.pow(2).mean(-1, keepdim=True) + EPS).sqrt()).reshape(x.shape)
    y = y * weight.double()[:, None, None] + bias.double()[:, None, None]
    return y / (1 + (-y).exp()) if silu else y


def torch_own(x, weight, bias, groups, silu=True):
    """What the model would run without the kernel, in the layout that torch computes best."""
    y = F.group_norm(x.contiguous(), groups, weight.to(x.dtype), bias.to(x.dtype), EPS)
    return F.silu(y) if silu else y


def assert_as_good_as_torch(y, x, weight, bias, groups, silu=True):
    arguments = x, weight, bias, groups, silu
    assert_as_good(y, torch_own(*arguments), exact(*arguments), rows=len(x) * groups)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, impl, poisoned):
    B, C, groups, H, W = shape
    x, (weight, bias) = picture(B, C, H, W, dtype), affine(C)
    y = group_norm.group_norm_silu(x, weight, bias, groups, EPS, impl=impl)
    # On a GPU torch's own returns planes, whatever it was given.
    assert y.is_contiguous(memory_format=torch.channels_last) or (impl == "torch" and DEVICE == "cuda")
    if impl == "torch" and dtype == torch.float32 and DEVICE == "cpu":
        # The CPU path of the model: golden codes depend on every bit of it.
        assert torch.equal(y, F.silu(F.group_norm(x, groups, weight, bias, EPS)))
    else:
        assert_as_good_as_torch(y, x, weight, bias, groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_values(dtype, fresh_seed, poisoned):
    """Another shape and other pictures on every run."""
    draw = random.Random(fresh_seed)
    groups = draw.choice([8, 20, 32])
    C = groups * draw.randint(1, 9)
    x = picture(draw.randint(1, 3), C, draw.randint(9, 25), draw.randint(9, 25), dtype, draw.uniform(-1, 1), fresh_seed)
    weight, bias = affine(C, seed=fresh_seed)
    y = group_norm.group_norm_silu(x, weight, bias, groups, EPS, impl="triton")
    assert_as_good_as_torch(y, x, weight, bias, groups)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_silu_and_with_an_affine_part_in_the_input_s_dtype(dtype, impl, poisoned):
    x, (weight, bias) = picture(2, 64, 23, 13, dtype), affine(64, dtype)
    y = group_norm.group_norm_silu(x, weight, bias, 32, EPS, silu=False, impl=impl)
    assert_as_good_as_torch(y, x, weight, bias, 32, silu=False)
    assert y.min() < -1


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 1e4), (torch.float32, -300.0), (torch.float16, 1e3)])
def test_large_mean_and_small_variance(dtype, mean):
    x, (weight, bias) = picture(1, 64, 29, 31, dtype, mean), affine(64)
    y = group_norm.group_norm_silu(x, weight, bias, 32, EPS, impl="triton")
    assert_as_good_as_torch(y, x, weight, bias, 32)
    # The guard: the difference of mean squares would be far off on these values.
    grouped = x.cpu().float().reshape(1, 32, -1)
    variance = (grouped.pow(2).mean(-1) - grouped.mean(-1).pow(2)).double()
    right = grouped.double().var(-1, correction=0)
    assert ((variance - right).abs() / right).max() > 1e-3


def test_two_levels_of_brightness():
    # Chunks whose means differ by far more than their deviations: the spread is all in the combination of chunks.
    x, (weight, bias) = picture(1, 32, 40, 40), affine(32)
    x[:, :, 20:] += 1000
    y = group_norm.group_norm_silu(x, weight, bias, 32, EPS, impl="triton")
    assert_as_good_as_torch(y, x, weight, bias, 32)


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.1])
def test_a_flat_picture_gives_the_bias(value):
    weight, bias = affine(96)
    x = torch.full((1, 96, 21, 33), value, device=DEVICE).to(memory_format=torch.channels_last)
    y = group_norm.group_norm_silu(x, weight, bias, 32, EPS, silu=False, impl="triton")
    assert torch.equal(y, bias[:, None, None].expand_as(y))


@pytest.mark.parametrize(("chunk", "most"), [(1, 1), (400, 1000), (1, 1000)])
def test_chunks_change_only_rounding(chunk, most, monkeypatch):
    x, (weight, bias) = picture(1, 96, 23, 29), affine(96)
    expected = group_norm.group_norm_silu(x, weight, bias, 32, EPS, impl="triton")
    numbers = blocks("group_norm", x.device)
    plan = group_norm._plan(96, 32, 23 * 29, **numbers)[1:]
    monkeypatch.setattr(group_norm, "MIN_CHUNK", chunk)
    monkeypatch.setattr(group_norm, "MAX_CHUNKS", most)
    assert group_norm._plan(96, 32, 23 * 29, **numbers)[1:] != plan
    y = group_norm.group_norm_silu(x, weight, bias, 32, EPS, impl="triton")
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("C", "pixels"), [(128, 512**2), (128, 256**2), (256, 128**2), (512, 32**2), (32, 512**2)])
def test_a_large_group_is_spread_over_programs(C, pixels):
    constants, chunk_rows, chunks = group_norm._plan(C, 32, pixels, **blocks("group_norm", torch.device(DEVICE, 0)))
    assert (chunks - 1) * chunk_rows < pixels <= chunks * chunk_rows and chunks <= group_norm.MAX_CHUNKS
    assert chunks >= (100 if pixels > 256**2 else 4) and chunk_rows % (2 * constants["BLOCK_R"]) == 0


def test_a_picture_does_not_depend_on_its_batch_nor_on_the_run():
    x, (weight, bias) = picture(3, 64, 23, 13), affine(64)
    together = group_norm.group_norm_silu(x, weight, bias, 32, EPS, impl="triton")
    assert torch.equal(together, group_norm.group_norm_silu(x, weight, bias, 32, EPS, impl="triton"))
    for i in range(3):
        assert torch.equal(
            group_norm.group_norm_silu(x[i : i + 1], weight, bias, 32, EPS, impl="triton")[0], together[i]
        )


def test_strides():
    x, (weight, bias) = picture(2, 64, 19, 17), affine(64)
    expected = group_norm.group_norm_silu(x, weight, bias, 32, EPS, impl="triton")
    # Every second picture, a range of channels: what lies between must not be read.
    wide = torch.full((4, 96, 19, 17), float("nan"), device=DEVICE).to(memory_format=torch.channels_last)
    wide[::2, 16:80] = x
    y = group_norm.group_norm_silu(wide[::2, 16:80], weight, bias, 32, EPS, impl="triton")
    assert_same(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last)
    # Some columns of a row of pixels are evenly spaced, some columns of several rows are not.
    row = picture(1, 64, 1, 40)
    y = group_norm.group_norm_silu(row[..., ::3], weight, bias, 32, EPS, impl="triton")
    assert_as_good_as_torch(y, row[..., ::3], weight, bias, 32)
    with pytest.raises(ValueError, match="expected channels_last"):
        group_norm.group_norm_silu(x[..., :5], weight, bias, 32, EPS, impl="triton")


def test_other_layouts_and_gradients_go_to_torch(monkeypatch):
    x, (weight, bias) = picture(2, 64, 5, 7), affine(64)
    planes = x.contiguous()
    learnt = weight.clone().requires_grad_()
    with pytest.raises(ValueError, match="expected channels_last"):
        group_norm.group_norm_silu(planes, weight, bias, 32, EPS, impl="triton")
    with pytest.raises(ValueError, match="no backward"):
        group_norm.group_norm_silu(x, learnt, bias, 32, EPS, impl="triton")
    # As on a GPU, where "auto" would take the kernel.
    monkeypatch.setattr(group_norm, "use_triton", lambda impl, tensor: True)
    monkeypatch.setattr(group_norm, "_group_norm_triton", lambda *_: pytest.fail("the kernel was taken"))
    y = group_norm.group_norm_silu(planes, weight, bias, 32, EPS)
    assert torch.equal(y, group_norm.group_norm_silu_ref(planes, weight, bias, 32, EPS))
    # torch 2.13 crashes on a CPU when of a channels-last GroupNorm only the weight wants a gradient.
    group_norm.group_norm_silu(x.requires_grad_(), learnt, bias, 32, EPS).sum().backward()
    assert learnt.grad.abs().min() > 0 and x.grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_value_spoils_its_group_alone(value):
    x, (weight, bias) = picture(2, 64, 19, 17), affine(64)
    clean = group_norm.group_norm_silu(x, weight, bias, 32, EPS, impl="triton")
    x[1, 7, 18, 16] = value
    y = group_norm.group_norm_silu(x, weight, bias, 32, EPS, impl="triton")
    spoilt = torch.zeros_like(x, dtype=torch.bool)
    spoilt[1, 6:8] = True
    assert y[spoilt].isnan().all() and torch.equal(y[~spoilt], clean[~spoilt])


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
def test_no_pictures(impl):
    weight, bias = affine(64)
    y = group_norm.group_norm_silu(picture(0, 64, 5, 7, torch.float16), weight, bias, 32, EPS, impl=impl)
    assert y.shape == (0, 64, 5, 7) and y.dtype == torch.float16


@pytest.mark.parametrize(
    ("x", "affine_part", "groups", "impl", "message"),
    [
        (torch.ones(2, 6, 3), torch.ones(6), 2, "auto", r"\[2, 6, 3\] in 2 groups"),
        (torch.ones(2, 6, 3, 3), torch.ones(6), 4, "auto", "divisible by groups"),
        (torch.ones(2, 6, 3, 3), torch.ones(6), 0, "auto", "in 0 groups"),
        (torch.ones(2, 6, 3, 3), torch.ones(5), 2, "auto", r"expected \[6\]"),
        (torch.ones(2, 6, 3, 3).double(), torch.ones(6), 2, "auto", "float64"),
        (torch.ones(2, 6, 3, 3).half(), torch.ones(6).bfloat16(), 2, "auto", "bfloat16"),
        (torch.ones(2, 6, 3, 3), torch.ones(6, device="meta"), 2, "auto", "weight on meta"),
        (torch.ones(2, 6, 3, 3), torch.ones(6), 2, "cuda", "impl 'cuda'"),
        (torch.ones(1, 8192, 1, 1), torch.ones(8192), 1, "triton", "8192 channels in a group"),
    ],
)
def test_bad_arguments(x, affine_part, groups, impl, message):
    if impl == "triton":
        x, affine_part = x.to(DEVICE), affine_part.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        group_norm.group_norm_silu(x, affine_part, affine_part, groups, EPS, impl=impl)

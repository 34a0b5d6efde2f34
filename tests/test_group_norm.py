"""GroupNorm + SiLU: both paths against float64, at most twice the error of torch's own two at the same precision."""

import random

import pytest
import torch
from accuracy import assert_as_good, assert_same
from torch.nn import functional as F

from medmax_fast.kernels import group_norm
from medmax_fast.kernels.blocks import blocks
from medmax_fast.kernels.sums import Sum, sum_ref

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
    for some in (row[..., ::3], x[..., :5], x[:, :, ::2], x[:, :, 1:, 1:]):
        before = some.clone()
        y = group_norm.group_norm_silu(some, weight, bias, 32, EPS, impl="triton")
        assert_as_good_as_torch(y, some, weight, bias, 32)
        assert torch.equal(some, before)


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


# What is added to x: which of shift, residual and residual_shift; and whether x is inside of a larger picture.
SUMS = [("shift",), ("residual",), ("shift", "residual"), ("shift", "residual", "residual_shift"), ()]


def pending(shape, dtype, parts, inside=False, seed=0, small=torch.float32):
    """A sum of these parts, and a copy of it; what surrounds an x that lies inside must not be read: it is NaN."""
    B, C, _, H, W = shape
    x = picture(B, C, H, W, dtype, seed=seed)
    if inside:
        larger = torch.full((B, C, H + 1, W + 2), float("nan"), device=DEVICE, dtype=dtype)
        larger = larger.contiguous(memory_format=torch.channels_last)
        larger[:, :, 1:, 1 : W + 1] = x
        x = larger[:, :, 1:, 1 : W + 1]
    generator = torch.Generator().manual_seed(seed + 1)
    made = {name: torch.randn(C, generator=generator).to(DEVICE, small) for name in ("shift", "residual_shift")}
    made["residual"] = picture(B, C, H, W, dtype, seed=seed + 2)
    made = [made[name] if name in parts else None for name in ("shift", "residual", "residual_shift")]
    return Sum(x, *made), Sum(x.clone(), *(None if part is None else part.clone() for part in made))


@pytest.mark.parametrize("inside", [False, True], ids=["whole", "inside"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", SUMS, ids="+".join)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6], SHAPES[11]], ids=str)
def test_a_sum_and_its_norm(shape, parts, dtype, inside, poisoned):
    (weight, bias), groups = affine(shape[1]), shape[2]
    x, copy = pending(shape, dtype, parts, inside)
    total, y = group_norm.add_group_norm_silu_(x, weight, bias, groups, EPS, impl="triton")
    right = sum_ref(copy)
    # Additions are exact to the rounding that follows each in fp32, and one to the dtype: no order is open.
    assert torch.equal(total, right) and total.dtype == dtype
    assert_as_good_as_torch(y, right, weight, bias, groups)
    # Of x the memory is taken where it can be, all of x where nothing is to be written, and nothing else is changed.
    same = total is x.x_BCHW
    assert same == (not inside or (not parts and shape[3:] == (1, 1)))
    assert same or total.is_contiguous(memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for part, before in zip(vars(x).values(), vars(copy).values(), strict=True):
        assert part is None or part.data_ptr() == total.data_ptr() or torch.equal(part, before)


@pytest.mark.parametrize("inside", [False, True], ids=["whole", "inside"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", SUMS[:4], ids="+".join)
def test_a_norm_without_its_sum(parts, dtype, inside, poisoned):
    shape = (2, 96, 32, 19, 29)
    weight, bias = affine(96)
    x, copy = pending(shape, dtype, parts, inside)
    y = group_norm.group_norm_silu(x, weight, bias, 32, EPS, impl="triton")
    # Not rounded where it need not be written.
    kept = inside or "residual" in parts
    wide = Sum(*(None if part is None else part.double() for part in vars(copy).values()))
    total = wide.x_BCHW
    for shift in (wide.shift, wide.residual_BCHW, wide.residual_shift):
        total = total if shift is None else total + (shift[:, None, None] if shift.ndim == 1 else shift)
    total = sum_ref(copy).double() if kept else total
    assert_as_good(y, torch_own(sum_ref(copy), weight, bias, 32), exact(total, weight, bias, 32), rows=len(total) * 32)
    assert kept or torch.equal(x.x_BCHW, copy.x_BCHW)
    # Statistics, the output, and only for what lies inside of something else a sum.
    assert len(poisoned) == (3 if inside else 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_sums(dtype, fresh_seed, poisoned):
    draw = random.Random(fresh_seed)
    groups = draw.choice([8, 20, 32])
    shape = (draw.randint(1, 3), groups * draw.randint(1, 9), groups, draw.randint(2, 25), draw.randint(2, 25))
    small = draw.choice([dtype, torch.float32])
    x, copy = pending(shape, dtype, draw.choice(SUMS), draw.random() < 0.5, fresh_seed, small)
    weight, bias = affine(shape[1], seed=fresh_seed)
    total, y = group_norm.add_group_norm_silu_(x, weight, bias, groups, EPS, impl="triton")
    assert torch.equal(total, sum_ref(copy))
    assert_as_good_as_torch(y, sum_ref(copy), weight, bias, groups)


@pytest.mark.parametrize("inside", [False, True], ids=["whole", "inside"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", SUMS, ids="+".join)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_sum_alone(impl, parts, dtype, inside, poisoned):
    x, copy = pending((2, 300, 1, 9, 7), dtype, parts, inside)
    total = group_norm.add_up_(x, impl=impl)
    assert torch.equal(total, sum_ref(copy)) and total.dtype == dtype
    # Torch leaves x, from which a gradient may flow.
    assert impl == "triton" or torch.equal(x.x_BCHW, copy.x_BCHW)
    assert parts or total is x.x_BCHW


def test_fp32_sums_are_rounded_as_torch_rounds_them():
    # 1 + 2^-24 is 1 where the bias comes first, and a half more than that otherwise.
    x = torch.full((1, 32, 4, 4), 1.0, device=DEVICE).to(memory_format=torch.channels_last)
    tiny, residual = torch.full((32,), 2.0**-24, device=DEVICE), torch.full_like(x, 2.0**-24)
    total = group_norm.add_up_(Sum(x, tiny, residual, torch.zeros_like(tiny)), impl="triton")
    assert torch.equal(total, torch.ones_like(total)) and 1 + (2.0**-24 + 2.0**-24) > 1


def test_pictures_are_put_together():
    x, (shift, other_shift) = picture(1, 32, 3, 3), affine(32)
    other = picture(1, 32, 3, 3, seed=4)
    for total in (Sum(x, shift) + Sum(other, other_shift), Sum(x, shift) + other, other + Sum(x, shift)):
        assert total.x_BCHW is x and total.shift is shift and total.residual_BCHW is other
    assert (Sum(x, shift) + Sum(other, other_shift)).residual_shift is other_shift
    with pytest.raises(AssertionError):
        total + x


def test_a_residual_of_another_layout_is_copied():
    (x, copy), (weight, bias) = pending((2, 64, 32, 9, 7), torch.float32, ("residual",)), affine(64)
    x.residual_BCHW = x.residual_BCHW.contiguous()
    total, _ = group_norm.add_group_norm_silu_(x, weight, bias, 32, EPS, impl="triton")
    assert torch.equal(total, sum_ref(copy))


def test_gradients_of_a_sum_go_through_torch(monkeypatch):
    (x, copy), (weight, bias) = pending((2, 64, 32, 5, 7), torch.float32, ("shift", "residual")), affine(64)
    x.shift.requires_grad_()
    with pytest.raises(ValueError, match="no backward"):
        group_norm.add_group_norm_silu_(x, weight, bias, 32, EPS, impl="triton")
    with pytest.raises(ValueError, match="no backward"):
        group_norm.add_up_(x, impl="triton")
    monkeypatch.setattr(group_norm, "use_triton", lambda impl, tensor: True)
    monkeypatch.setattr(group_norm, "_sum_triton", lambda *_: pytest.fail("the kernel was taken"))
    total, y = group_norm.add_group_norm_silu_(x, weight, bias, 32, EPS)
    assert torch.equal(total, sum_ref(copy))
    (total.sum() + y.sum() + group_norm.add_up_(x).sum()).backward()
    assert x.shift.grad.abs().min() > 0
    # Nor is a network's first convolution to leave a sum.
    assert not group_norm.takes(x.x_BCHW)
    with torch.no_grad():
        assert group_norm.takes(x.x_BCHW) and not group_norm.takes(x.x_BCHW.contiguous())


def test_no_pictures_to_add_up():
    weight, bias = affine(64)
    x, _ = pending((0, 64, 32, 5, 7), torch.float16, ("shift", "residual"))
    for impl in ("torch", "triton", "auto"):
        total, y = group_norm.add_group_norm_silu_(x, weight, bias, 32, EPS, impl=impl)
        assert total.shape == y.shape == group_norm.add_up_(x, impl=impl).shape == (0, 64, 5, 7)


ONES = torch.ones(2, 6, 3, 3)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (Sum(ONES, torch.ones(5)), r"shift \[5\] on cpu: expected \[6\] on cpu"),
        (Sum(ONES, torch.ones(6, device="meta")), "shift .* on meta"),
        (Sum(ONES.half(), torch.ones(6).bfloat16()), "shift torch.bfloat16: expected float32 or the input's"),
        (Sum(ONES, None, ONES[:1]), r"residual \[1, 6, 3, 3\] of torch.float32 on cpu: expected \[2, 6, 3, 3\]"),
        (Sum(ONES, None, ONES.half()), "residual .* of torch.float16"),
        (Sum(ONES, None, ONES, torch.ones(7)), r"shift \[7\]"),
        (Sum(ONES, None, None, torch.ones(6)), "residual_shift without a residual"),
    ],
)
def test_sums_that_do_not_fit(x, message):
    weight = torch.ones(6)
    for call in (
        lambda: group_norm.group_norm_silu(x, weight, weight, 2, EPS),
        lambda: group_norm.add_group_norm_silu_(x, weight, weight, 2, EPS),
        lambda: group_norm.add_up_(x),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("x", [Sum(ONES[0], ONES[0, :, 0, 0]), Sum(ONES.double(), ONES[0, :, 0, 0])])
def test_only_pictures_are_added_up(x):
    with pytest.raises(ValueError, match=r"expected \[B, C, H, W\] of float32, float16 or bfloat16"):
        group_norm.add_up_(x)


def test_planes_are_not_for_the_kernel():
    with pytest.raises(ValueError, match="expected channels_last"):
        group_norm.add_up_(Sum(ONES.to(DEVICE), torch.ones(6, device=DEVICE)), impl="triton")


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

"""LoRA in one function: masks, outputs and gradients of both paths against float64, beside peft's chain of calls."""

import functools
import random

import pytest
import torch
from accuracy import assert_as_good, assert_same
from torch.utils.checkpoint import checkpoint

from medmax_fast.kernels import lora as kernel
from medmax_fast.kernels.lora import LEVELS, PARTS, draw_seed, lora_linear, random_numbers_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu(required=False), pytest.mark.usefixtures("bf16_to_nearest")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# T, K, O, R: one tile, several with a rest in every dimension, ranks below, at and above what a product wants, one.
SHAPES = [(32, 128, 64, 16), (70, 200, 33, 5), (37, 129, 40, 64), (33, 1000, 17, 100), (5, 8, 3, 1), (1, 1, 1, 1)]
SCALE, SEED = 0.75, (1 << 62) + 0x123456789ABCDEF


@pytest.fixture()
def allocated(poisoned):
    return poisoned


def data(T, K, O, R, dtype=torch.float32, seed=0):  # noqa: E741
    """x, A, B, the gradient of y, and the weight."""
    generator = torch.Generator().manual_seed(seed)
    shapes, sizes = ((T, K), (R, K), (O, R), (T, O), (O, K)), (1, K**-0.5, R**-0.5, 1, K**-0.5)
    drawn = [torch.randn(shape, generator=generator) * size for shape, size in zip(shapes, sizes, strict=True)]
    *leaves, dy, weight = (tensor.to(DEVICE, dtype) for tensor in drawn)
    return *(leaf.requires_grad_() for leaf in leaves), dy, weight


def kept(x, dropout, seed=SEED):
    return random_numbers_ref(seed, *x.shape, x.device) >= round(dropout * LEVELS)


def plain(x, a, b, weight, dropout=0.0):
    """What peft's module computes, with the mask given."""
    dropped = x * kept(x, dropout).to(x.dtype) * (LEVELS / (LEVELS - round(dropout * LEVELS))) if dropout else x
    return x @ weight.t() + dropped @ a.t() @ b.t() * SCALE


def by(impl, dropout=0.0):
    return lambda x, a, b, weight: lora_linear(x, weight, a, b, SCALE, dropout, SEED, impl)


def outcome(function, x, a, b, dy, weight):
    """y and the gradient of each of x, A and B that wants one."""
    y = function(x, a, b, weight)
    return [y.detach(), *torch.autograd.grad(y, [t for t in (x, a, b) if t.requires_grad], dy)]


def assert_as_good_as_peft(found, tensors, dropout):
    right = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    chain = functools.partial(plain, dropout=dropout)
    for y, own, exact in zip(found, outcome(chain, *tensors), outcome(chain, *right), strict=True):
        assert_as_good(y, own, exact, rows=len(y))


# ---- the mask ----


def test_numbers_are_those_of_philox():
    """Known answers of Random123 (kat_vectors, philox4x32 with 7 rounds) for a counter and a key of zeros."""
    words = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    numbers = random_numbers_ref(0, 1, 8, DEVICE)[0].tolist()
    assert [low + (high << 16) for low, high in zip(numbers[::2], numbers[1::2], strict=True)] == list(words)


@pytest.mark.parametrize("seed", [0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) + 5, SEED, (1 << 63) - 1])
def test_all_three_kernels_have_the_mask_of_the_reference(seed):
    T, K, limit = 75, 100, 20000
    right = (random_numbers_ref(seed, T, K, DEVICE) >= limit).float()
    ones, eye = torch.ones(T, K, device=DEVICE), torch.eye(K, device=DEVICE)
    assert torch.equal(kernel._down_triton(ones, eye, 1.0, limit, seed), right)
    rows = torch.eye(T, device=DEVICE)
    assert torch.equal(kernel._weight_gradient_triton(ones, rows, 1.0, limit, seed), right)
    dx = torch.full((T, K), 3.0, device=DEVICE)
    kernel._add_input_gradient_triton_(dx, torch.ones(T, 1, device=DEVICE), ones[:1].contiguous(), 1.0, limit, seed)
    assert torch.equal(dx, 3 + right)


@pytest.mark.parametrize("dropout", [0.05, 0.5, 0.9])
def test_the_mask_is_as_if_by_chance(dropout):
    x = torch.empty(400, 1000)
    masks = [kept(x, dropout, seed).double() for seed in (3, 4, 3 + (1 << 32))]
    share, n = 1 - round(dropout * LEVELS) / LEVELS, x.numel()
    deviation = (share * (1 - share)) ** 0.5
    for mask in masks:
        assert abs(mask.mean() - share) < 5 * deviation / n**0.5
        for dim in (0, 1):
            assert (mask.mean(dim) - share).abs().max() < 6 * deviation / x.shape[dim] ** 0.5
    # Neighbours in a row, eight and 16 columns apart, in a column, other seeds: no two go together.
    centred = [(mask - share) / deviation for mask in masks]
    first = centred[0]
    pairs = [(first[:, d:], first[:, :-d]) for d in (1, 2, 7, 8, 16)] + [(first[d:], first[:-d]) for d in (1, 32)]
    pairs += [(first, other) for other in centred[1:]]
    assert all(abs((a * b).mean()) < 5 / a.numel() ** 0.5 for a, b in pairs)


def test_the_mean_over_seeds_is_the_output_without_dropout():
    x, a, b, _, weight = (t.detach() for t in data(4, 64, 8, 4))
    outputs = [lora_linear(x, weight, a, b, SCALE, 0.3, seed) for seed in range(500)]
    stack, right = torch.stack(outputs), lora_linear(x, weight, a, b, SCALE)
    assert ((stack.mean(0) - right).abs() < 6 * stack.std(0) / len(outputs) ** 0.5).all()
    assert stack.std(0).min() > 0.01


def test_seeds_come_from_the_generator_of_the_cpu():
    torch.manual_seed(5)
    seeds = [draw_seed() for _ in range(3)]
    torch.manual_seed(5)
    assert [draw_seed() for _ in range(3)] == seeds and len(set(seeds)) == 3
    assert all(1 << 62 <= seed < 1 << 63 for seed in seeds)


# ---- outputs and gradients ----


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, impl, dropout, allocated):
    tensors, (T, K, _, R) = data(*shape, dtype=dtype), shape
    assert_as_good_as_peft(outcome(by(impl, dropout), *tensors), tensors, dropout)
    assert allocated == ([(T, R), (PARTS, R, K)] if impl == "triton" and dropout else [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_values(dtype, fresh_seed, allocated):
    """Another shape, other values and another dropout on every run."""
    draw = random.Random(fresh_seed)
    shape = draw.randint(33, 150), draw.randint(50, 400), draw.randint(5, 90), draw.randint(2, 70)
    tensors, dropout = data(*shape, dtype=dtype, seed=fresh_seed), draw.uniform(0.01, 0.9)
    assert_as_good_as_peft(outcome(by("triton", dropout), *tensors), tensors, dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_finite_differences(dropout):
    x, a, b, _, weight = (t.detach().double() for t in data(5, 12, 7, 3))
    leaves = [t.requires_grad_() for t in (x, a, b)]
    assert torch.autograd.gradcheck(lambda *t: by("auto", dropout)(*t, weight), leaves)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_dropout_of_all_but_nothing_and_of_next_to_nothing(impl):
    tensors = data(40, 64, 8, 4)
    assert all(t.isfinite().all() for t in outcome(by(impl, 1 - 1e-9), *tensors))
    # Below half of what a number of 16 bits can tell: none at all.
    for found, right in zip(outcome(by(impl, 1e-6), *tensors), outcome(by(impl), *tensors), strict=True):
        assert torch.equal(found, right)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("wants", [(1, 1, 0), (0, 1, 1), (1, 0, 0), (0, 0, 1), (0, 1, 0), (0, 0, 0)], ids=str)
def test_every_subset_of_gradients(wants, impl):
    *leaves, dy, weight = data(35, 70, 20, 4)
    y, *gradients = outcome(by(impl, 0.3), *leaves, dy, weight)
    some = [t.detach().requires_grad_(bool(wanted)) for t, wanted in zip(leaves, wants, strict=True)]
    out = by(impl, 0.3)(*some, weight)
    assert_same(out.detach(), y)
    assert out.requires_grad == any(wants)
    if out.requires_grad:
        out.backward(dy)
    for leaf, right, wanted in zip(some, gradients, wants, strict=True):
        assert (leaf.grad is not None) == bool(wanted)
        if wanted:
            assert_same(leaf.grad, right)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_layouts(impl):
    x, a, b, dy, weight = data(30, 72, 20, 4)
    right = outcome(by(impl, 0.3), x, a, b, dy, weight)
    # Rows of a wider buffer are read in place: what lies between must not be. Columns apart are copied.
    wide = torch.full((30, 100), float("nan"), device=DEVICE)[:, 11:83].copy_(x.detach())
    apart = torch.full((30, 144), float("nan"), device=DEVICE)[:, ::2].copy_(x.detach())
    for view in (wide, apart, x.detach().view(2, 15, 72)):
        leaf = view.requires_grad_()
        found = outcome(by(impl, 0.3), leaf, a, b, dy.view(*view.shape[:-1], 20), weight)
        assert found[0].shape == (*view.shape[:-1], 20) and found[1].shape == view.shape
        for one, other in zip(found, right, strict=True):
            assert_same(one.reshape(other.shape), other)
    turned = [t.detach().t().contiguous().t().requires_grad_() for t in (a, b)]
    for one, other in zip(outcome(by(impl, 0.3), x, *turned, dy, weight.t().contiguous().t()), right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    # The gradient of a sum is one value with strides of zero.
    tensors = x, a, b, torch.ones((), device=DEVICE).expand(30, 20), weight
    assert_as_good_as_peft(outcome(by(impl, 0.3), *tensors), tensors, 0.3)


def test_offsets_beyond_32_bits(gigabytes):
    stride = (1 << 30) + 8
    x, a, b, dy, weight = data(3, 40, 16, 4, dtype=torch.float16)
    right = outcome(by("triton", 0.3), x, a, b, dy, weight)
    rows = torch.empty(2 * stride + 40, dtype=torch.float16, device=DEVICE).as_strided((3, 40), (stride, 1))
    far = rows.copy_(x.detach()).detach().requires_grad_()
    for one, other in zip(outcome(by("triton", 0.3), far, a, b, dy, weight), right, strict=True):
        assert torch.equal(one, other)


def test_an_adapter_in_fp32_beside_16_bits_is_rounded_and_gets_its_gradient_in_fp32():
    x, a, b, dy, weight = data(20, 48, 12, 4, dtype=torch.bfloat16)
    wide = [t.detach().float().requires_grad_() for t in (a, b)]
    found = outcome(by("auto", 0.3), x, *wide, dy, weight)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for one, other in zip(found, outcome(by("auto", 0.3), x, a, b, dy, weight), strict=True):
        assert torch.equal(one, other.to(one.dtype))


def test_the_same_on_every_run():
    tensors = data(200, 300, 40, 16)
    first, second = (outcome(by("triton", 0.3), *tensors) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_neither_a_mask_nor_a_dropped_input_is_kept(impl):
    x, a, b, _, weight = data(20, 48, 12, 4)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append((t.data_ptr(), t.shape)) or t, lambda t: t):
        by(impl, 0.3)(x, a, b, weight)
    (*given, (_, h_shape)) = sizes
    assert given == [(t.data_ptr(), t.shape) for t in (x, weight, a, b)] and h_shape == (20, 4)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_layer_computed_again_drops_the_same(impl):
    tensors = data(40, 64, 12, 4)

    def layer(x, a, b, weight):
        return lora_linear(x, weight, a, b, SCALE, 0.3, draw_seed(), impl)

    torch.manual_seed(7)
    right = outcome(layer, *tensors)
    torch.manual_seed(7)
    found = outcome(lambda *t: checkpoint(layer, *t, use_reentrant=False), *tensors)
    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))
    assert not torch.equal(outcome(layer, *tensors)[0], right[0])


@pytest.mark.parametrize("fused", [False, True])
def test_it_is_a_well_behaved_operation_of_torch(fused):
    x, a, b, _, weight = (t.detach() for t in data(20, 48, 12, 4))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernel._lora_linear, (x, weight, a, b, SCALE, 20000, SEED, fused), test_utils=tests)


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
def test_nothing_to_do(shape, impl):
    x, a, b, _, weight = data(1, 16, 12, 4)
    leaf = torch.empty(*shape, 16, device=DEVICE, requires_grad=True)
    y, dx, da, db = outcome(by(impl, 0.3), leaf, a, b, torch.empty(*shape, 12, device=DEVICE), weight)
    assert y.shape == (*shape, 12) and dx.shape == leaf.shape and not da.any() and not db.any()


def test_a_rank_beyond_the_kernels_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(kernel, "use_triton", lambda *_: True)
    tensors = data(9, 16, 6, kernel.MAX_R + 1)
    for one, other in zip(outcome(by("auto", 0.3), *tensors), outcome(by("torch", 0.3), *tensors), strict=True):
        assert_same(one, other)


ONES = {"x": (6, 8), "weight": (5, 8), "a": (3, 8), "b": (5, 3)}


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({"x": (6, 7)}, {}, r"x \[6, 7\], weight \[5, 8\], A \[3, 8\], B \[5, 3\]: expected \[..., K\], \[O, K\]"),
        ({"x": ()}, {}, r"x \[\]"),
        ({"weight": (8,)}, {}, r"weight \[8\]"),
        ({"a": (3, 9)}, {}, r"A \[3, 9\]"),
        ({"b": (5, 4)}, {}, r"B \[5, 4\]"),
        ({"b": (6, 3)}, {}, r"B \[6, 3\]"),
        ({"a": (0, 8), "b": (5, 0)}, {}, r"A \[0, 8\]"),
        ({}, {"dropout": 1.0}, "dropout 1.0: expected at least 0 and below 1"),
        ({}, {"dropout": float("nan")}, "dropout nan"),
        ({}, {"impl": "cuda"}, "impl 'cuda'"),
        ({"a": (129, 8), "b": (5, 129)}, {"impl": "triton"}, "float32 of rank 129, expected 16 or 32 bits, up to 128"),
    ],
)
def test_bad_arguments(change, more, message):
    tensors = [torch.ones(shape, device=DEVICE) for shape in (ONES | change).values()]
    with pytest.raises(ValueError, match=message):
        lora_linear(*tensors, SCALE, **more)


def test_bad_tensors():
    x, weight, a, b = (torch.ones(shape, device=DEVICE) for shape in ONES.values())
    for tensors, message in (
        ((x.half(), weight, a, b), "x torch.float16, weight torch.float32: expected one"),
        ((x.int(), weight.int(), a, b), "x torch.int32"),
        ((x, weight, a.to("meta"), b), "meta, .*: expected one device"),
        ((x, weight.requires_grad_(), a, b), "the weight wants a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            lora_linear(*tensors, SCALE)
    with pytest.raises(ValueError, match="float64 of rank 3"):
        lora_linear(*(t.detach().double() for t in (x, weight, a, b)), SCALE, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_at_the_model_s_size(dtype, rank, monkeypatch):
    tensors = data(4096, 4096, 4096, rank, dtype=dtype)
    found = outcome(by("auto", 0.05), *tensors)
    assert_as_good_as_peft(found, tensors, 0.05)
    monkeypatch.setattr(kernel, "_dropped_ref", lambda *_: pytest.fail("the reference was taken"))
    outcome(by("auto", 0.05), *tensors)

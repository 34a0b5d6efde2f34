"""SwiGLU and its gradients: both paths against float64, at most twice the error of F.silu(gate) * up."""

import random

import pytest
import torch
from accuracy import assert_as_good, assert_same
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medmax_fast.kernels import swiglu as kernel
from medmax_fast.kernels.swiglu import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# exp(-gate) is infinite far below zero, of which NumPy, the interpreter's arithmetic, tells.
overflow = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
pytestmark = [pytest.mark.gpu(required=False), pytest.mark.usefixtures("bf16_to_nearest"), overflow]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The model's width, a tile and one value more, tiles of several rows with and without a rest, no power of two, one.
SHAPES = [(3, 11008), (2, 1024), (2, 3, 1025), (5, 172), (2, 2, 3, 64), (300, 1), (7, 3), (1, 1), (37,)]


@pytest.fixture()
def allocated(poisoned):
    return poisoned


def data(*shape, dtype=torch.float32, seed=0):
    """gate, up and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, dy = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(3))
    return (4 * gate).to(dtype).requires_grad_(), up.to(dtype).requires_grad_(), dy.to(dtype)


def exact(gate, up):
    """The definition, for arguments in float64."""
    return gate / (1 + (-gate).exp()) * up


def plain(gate, up):
    """What the model would run without the kernel."""
    return F.silu(gate) * up


def by(impl):
    return lambda gate, up: swiglu(gate, up, impl=impl)


def outcome(function, gate, up, dy):
    """The output and the gradient of each argument that wants one."""
    y = function(gate, up)
    return [y.detach(), *torch.autograd.grad(y, [t for t in (gate, up) if t.requires_grad], dy)]


def assert_as_good_as_torch(found, gate, up, dy):
    truth = outcome(exact, *(t.detach().double().requires_grad_(t.requires_grad) for t in (gate, up)), dy.double())
    # Far below zero exp(-gate), and with it the result, is off by as many units as the exponent is large.
    factors = (gate, up), (dy, up), (dy, gate)
    for y, own, right, (a, b) in zip(found, outcome(plain, gate, up, dy), truth, factors, strict=True):
        assert_as_good(y, own, right, rows=y.numel(), largest=(a * b).detach().abs().max().item())


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, impl, allocated):
    gate, up, dy = data(*shape, dtype=dtype)
    assert_as_good_as_torch(outcome(by(impl), gate, up, dy), gate, up, dy)
    assert allocated == ([shape] * 3 if impl == "triton" else [])


def test_reference_in_float32_has_torch_s_bits_and_in_float64_its_precision():
    gate, up, dy = data(33, 128)
    for a, b in zip(outcome(by("torch"), gate, up, dy), outcome(plain, gate, up, dy), strict=True):
        assert torch.equal(a, b)
    gate, up, dy = (t.detach().double().requires_grad_() for t in (gate, up, dy))
    for found, right in zip(outcome(by("auto"), gate, up, dy), outcome(exact, gate, up, dy), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_values(dtype, fresh_seed, allocated):
    """Another shape and other values on every run."""
    draw = random.Random(fresh_seed)
    gate, up, dy = data(draw.randint(5, 40), draw.randint(300, 3000), dtype=dtype, seed=fresh_seed)
    assert_as_good_as_torch(outcome(by("triton"), gate, up, dy), gate, up, dy)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_far_from_zero(dtype, impl, allocated):
    largest = torch.finfo(dtype).max
    values = [1e4, -1e4, largest, -largest, 100, -100, 88.8, -88.8, 20, -20, 0.0, -0.0]
    gate = torch.tensor(values, device=DEVICE).to(dtype).requires_grad_()
    up, dy = torch.full_like(gate, 0.75).requires_grad_(), torch.full_like(gate, 0.5)
    found = outcome(by(impl), gate, up, dy)
    own = outcome(plain, gate, up, dy)
    for y, right in zip(found, own, strict=True):
        assert y.isfinite().all()
        torch.testing.assert_close(y, right, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)
    assert torch.equal(found[0][:4], torch.tensor([0.75, 0, 0.75, 0], device=DEVICE).to(dtype) * gate[:4])
    assert torch.equal(found[1][:4], torch.tensor([0.375, 0, 0.375, 0], device=DEVICE).to(dtype))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_non_finite_values_as_in_torch():
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([inf, -inf, nan, 1.0, 1.0, -1e4], device=DEVICE).requires_grad_()
    up = torch.tensor([1.0, 1.0, 1.0, -inf, nan, 2.0], device=DEVICE).requires_grad_()
    dy = torch.ones_like(up)
    for y, right in zip(outcome(by("triton"), gate, up, dy), outcome(plain, gate, up, dy), strict=True):
        torch.testing.assert_close(y, right, equal_nan=True)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_every_subset_of_gradients(impl, allocated):
    gate, up, dy = data(9, 300)
    y, dgate, dup = outcome(by(impl), gate, up, dy)
    for wants in ((True, False), (False, True), (False, False)):
        some = [t.detach().requires_grad_(wanted) for t, wanted in zip((gate, up), wants, strict=True)]
        allocated.clear()
        out = swiglu(*some, impl=impl)
        assert_same(out, y)
        assert out.requires_grad == any(wants)
        if out.requires_grad:
            out.backward(dy)
        for leaf, right, wanted in zip(some, (dgate, dup), wants, strict=True):
            assert (leaf.grad is not None) == wanted
            if wanted:
                assert_same(leaf.grad, right)
        assert len(allocated) == (1 + sum(wants) if impl == "triton" else 0)


def test_what_is_kept_for_the_backward():
    gate, up, _ = data(4, 5, 64, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        swiglu(gate, up, impl="triton")
        assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]
        kept.clear()
        swiglu(gate.detach(), up, impl="triton")
        assert [t.data_ptr() for t in kept] == [gate.data_ptr()]
        kept.clear()
        with torch.no_grad():
            assert not swiglu(gate, up, impl="triton").requires_grad
        swiglu(gate.detach(), up.detach(), impl="triton")
    assert not kept


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_strides(impl, allocated):
    gate, up, dy = data(3, 10, 96)
    right = outcome(by(impl), gate, up, dy)
    # Two halves of one buffer and a row stride of its own for each, which are read in place: what lies between must not
    # be; a part of each sequence and another order of dimensions, which are copied.
    halves = torch.full((3, 10, 230), float("nan"), device=DEVICE)
    wide = torch.full((3, 10, 101), float("nan"), device=DEVICE)
    longer = torch.full((3, 17, 96), float("nan"), device=DEVICE)
    turned = torch.full((96, 10, 3), float("nan"), device=DEVICE).permute(2, 1, 0)
    layouts = (halves[..., :96], halves[..., 107:203], wide[..., 5:]), (wide[..., 5:], longer[:, 4:14], turned)
    for layout in layouts:
        for view, tensor in zip(layout, (gate, up, dy), strict=True):
            view.copy_(tensor.detach())
        leaves = [t.detach().requires_grad_() for t in layout[:2]]
        found = outcome(by(impl), *leaves, layout[2])
        for a, b in zip(found, right, strict=True):
            if impl == "triton":
                assert_same(a, b)
                assert a.is_contiguous()
            else:
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    # The gradient of a sum is one value with strides of zero.
    ones = torch.ones((), device=DEVICE).expand(3, 10, 96)
    assert_as_good_as_torch(outcome(by(impl), gate, up, ones), gate, up, ones)


def test_offsets_beyond_32_bits(gigabytes):
    stride = (1 << 30) + 8
    storage = torch.empty(2 * stride + 40, dtype=torch.float16, device=DEVICE)
    rows = storage.as_strided((3, 40), (stride, 1))
    gate, up, dy = data(3, 40, dtype=torch.float16)
    right = outcome(by("triton"), gate, up, dy)
    for place, tensor in enumerate((gate, up, dy)):
        leaves = [gate, up, dy]
        leaves[place] = rows.copy_(tensor.detach()).detach().requires_grad_(tensor.requires_grad)
        assert all(torch.equal(a, b) for a, b in zip(outcome(by("triton"), *leaves), right, strict=True))


def test_under_checkpointing():
    gate, up, dy = data(6, 5, 64, dtype=torch.bfloat16)
    right = outcome(by("triton"), gate, up, dy)
    found = outcome(lambda *a: checkpoint(by("triton"), *a, use_reentrant=False), gate, up, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64), (5, 0), (0,)], ids=str)
def test_nothing_to_do(shape, impl):
    gate, up, dy = data(*shape, dtype=torch.bfloat16)
    assert all(t.shape == shape and t.dtype == torch.bfloat16 for t in outcome(by(impl), gate, up, dy))


@pytest.mark.parametrize(
    ("gate", "up", "impl", "message"),
    [
        (torch.ones(2, 6), torch.ones(6), "auto", r"gate \[2, 6\], up \[6\]: expected \[..., C\] twice"),
        (torch.ones(()), torch.ones(()), "auto", r"gate \[\]"),
        (torch.ones(2, 6).int(), torch.ones(2, 6).int(), "auto", "gate torch.int32"),
        (torch.ones(2, 6).half(), torch.ones(2, 6), "auto", "up torch.float32"),
        (torch.ones(2, 6), torch.ones(2, 6, device="meta"), "auto", "up on meta"),
        (torch.ones(2, 6), torch.ones(2, 6), "cuda", "impl 'cuda'"),
        (torch.ones(2, 6, device=DEVICE).double(), torch.ones(2, 6, device=DEVICE).double(), "triton", "float64"),
    ],
)
def test_bad_arguments(gate, up, impl, message):
    with pytest.raises(ValueError, match=message):
        swiglu(gate, up, impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_at_the_model_s_size(dtype, monkeypatch):
    monkeypatch.setattr(kernel, "swiglu_ref", lambda *_: pytest.fail("the reference was taken"))
    gate, up, dy = data(4096, 11008, dtype=dtype)
    assert_as_good_as_torch(outcome(by("auto"), gate, up, dy), gate, up, dy)

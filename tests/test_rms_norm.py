"""RMSNorm and its gradients: both paths against float64, at most twice the error of transformers' own module."""

import random

import pytest
import torch
from accuracy import assert_as_good, assert_same
from torch.utils.checkpoint import checkpoint
from transformers.models.chameleon.modeling_chameleon import ChameleonRMSNorm

from medmax_fast.kernels import rms_norm as kernel
from medmax_fast.kernels.blocks import override
from medmax_fast.kernels.rms_norm import add_rms_norm_, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
pytestmark = [pytest.mark.gpu(required=False), pytest.mark.usefixtures("bf16_to_nearest")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The models' widths, one value, no power of two; one row, tiles of several rows with and without a rest.
SHAPES = [(5, 4096), (2, 8192), (3, 7, 64), (1, 64), (300, 1), (2, 3, 2, 37), (9, 1000), (6, 1025), (40, 160), (64,)]


def data(*shape, dtype=torch.float32, frozen=False, weight_dtype=None, seed=0):
    """x with rows of different magnitude, weight, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * (0.05 + 3 * torch.rand(*shape[:-1], 1, generator=generator))
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator)
    dy = torch.randn(shape, generator=generator)
    weight = weight.to(DEVICE, weight_dtype or dtype).requires_grad_(not frozen)
    return x.to(DEVICE, dtype).requires_grad_(), weight, dy.to(DEVICE, dtype)


def exact(x, weight, eps):
    """The definition, for arguments in float64."""
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def module(x, weight, eps):
    """What the model would run without the kernel; with a float32 weight it widens its output."""
    norm = ChameleonRMSNorm(len(weight), eps)
    del norm.weight
    norm.weight = weight
    return norm(x).to(x.dtype)


def outcome(function, x, weight, dy):
    """The output and the gradient of each argument that wants one."""
    y = function(x, weight, EPS)
    return [y.detach(), *torch.autograd.grad(y, [t for t in (x, weight) if t.requires_grad], dy.to(y.dtype))]


def assert_as_good_as_the_module(found, x, weight, dy):
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_(weight.requires_grad)
    truth = outcome(exact, *wide, dy)
    for y, own, right in zip(found, outcome(module, x, weight, dy), truth, strict=True):
        assert_as_good(y, own, right, rows=x.numel() // len(weight))


def by(impl):
    return lambda x, weight, eps: rms_norm(x, weight, eps, impl=impl)


@pytest.fixture()
def allocated(poisoned):
    return poisoned


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, impl, allocated):
    x, weight, dy = data(*shape, dtype=dtype)
    assert_as_good_as_the_module(outcome(by(impl), x, weight, dy), x, weight, dy)
    assert bool(allocated) == (impl == "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_values(dtype, fresh_seed, allocated):
    """Another shape and other values on every run, the norm alone and after a sum."""
    draw = random.Random(fresh_seed)
    x, weight, dy = data(draw.randint(20, 90), draw.randint(200, 3000), dtype=dtype, seed=fresh_seed)
    assert_as_good_as_the_module(outcome(by("triton"), x, weight, dy), x, weight, dy)
    assert_sum_and_norm_as_good(x.detach(), weight.detach(), dy, "triton")


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_float32_weight_of_a_16_bit_input(dtype, impl, allocated):
    x, weight, dy = data(19, 96, dtype=dtype, weight_dtype=torch.float32)
    found = outcome(by(impl), x, weight, dy)
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32]
    assert_as_good_as_the_module(found, x, weight, dy)


def test_reference_in_float32_has_the_module_s_bits_and_in_float64_its_precision():
    x, weight, dy = data(33, 128)
    assert torch.equal(rms_norm(x, weight, EPS, impl="torch"), module(x, weight, EPS))
    x, weight, dy = (t.detach().double().requires_grad_() for t in (x, weight, dy))
    for found, right in zip(outcome(by("auto"), x, weight, dy), outcome(exact, x, weight, dy), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_every_subset_of_gradients(impl, allocated):
    x, weight, dy = data(21, 48)
    y, dx, dweight = outcome(by(impl), x, weight, dy)
    for want_x, want_weight in ((True, False), (False, True), (False, False)):
        some_x, some_weight = x.detach().requires_grad_(want_x), weight.detach().requires_grad_(want_weight)
        out = rms_norm(some_x, some_weight, EPS, impl=impl)
        assert_same(out, y)
        assert out.requires_grad == (want_x or want_weight)
        if out.requires_grad:
            out.backward(dy)
        for wanted, leaf, right in ((want_x, some_x, dx), (want_weight, some_weight, dweight)):
            assert (leaf.grad is not None) == wanted
            if wanted:
                assert_same(leaf.grad, right)


def test_a_frozen_weight_costs_nothing(allocated):
    x, weight, dy = data(20, 600)
    y = rms_norm(x, weight, EPS, impl="triton")
    allocated.clear()
    y.backward(dy)
    assert allocated == [(20, 600), (20, 600)] and weight.grad.isfinite().all()

    frozen = weight.detach()
    y = rms_norm(x, frozen, EPS, impl="triton")
    allocated.clear()
    y.backward(dy)
    assert allocated == [(20, 600)] and frozen.grad is None


def test_what_is_kept_for_the_backward(allocated):
    x, weight, _ = data(4, 5, 64, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS, impl="triton")
        assert [t.shape for t in kept] == [x.shape, weight.shape, (20,)] and kept[0].data_ptr() == x.data_ptr()
        kept.clear()
        allocated.clear()
        with torch.no_grad():
            y = rms_norm(x, weight, EPS, impl="triton")
        rms_norm(x.detach(), weight.detach(), EPS, impl="triton")
    assert not kept and allocated == [x.shape, x.shape] and not y.requires_grad


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_slots_of_dweight_change_only_rounding(programs, monkeypatch, allocated):
    x, weight, dy = data(150, 200)
    with override("rms_norm", TILE=1024, MAX_R=32):
        y, dx, _ = outcome(by("triton"), x, weight, dy)
        monkeypatch.setattr(kernel, "PROGRAMS", programs)
        allocated.clear()
        found = outcome(by("triton"), x, weight, dy)
    # Tiles of four rows: 38 of them.
    assert allocated[-1] == (min(programs, 38), 200)
    assert torch.equal(found[0], y) and torch.equal(found[1], dx)
    assert_as_good_as_the_module(found, x, weight, dy)


def test_the_same_bits_on_every_run_and_rows_do_not_depend_on_each_other(monkeypatch):
    monkeypatch.setattr(kernel, "PROGRAMS", 16)
    x, weight, dy = data(90, 520, dtype=torch.bfloat16)
    first, second = (outcome(by("triton"), x, weight, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    some = slice(77, 80)
    alone = outcome(by("triton"), x.detach()[some].requires_grad_(), weight, dy[some])
    assert torch.equal(alone[0], first[0][some]) and torch.equal(alone[1], first[1][some])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_strides(impl):
    x, weight, dy = data(3, 10, 96)
    right = outcome(by(impl), x, weight, dy)
    # Some columns of a wide buffer, which are read in place: what lies between must not be; a part of each sequence
    # and another order of dimensions, which are copied.
    wide = torch.full((2, 3, 10, 200), float("nan"), device=DEVICE)
    longer = torch.full((2, 3, 17, 96), float("nan"), device=DEVICE)
    turned = torch.full((2, 96, 10, 3), float("nan"), device=DEVICE)
    for layout in (wide[..., 7:103], longer[:, :, 4:14], turned.permute(0, 3, 2, 1)):
        layout.copy_(torch.stack((x.detach(), dy)))
        found = outcome(by(impl), layout[0].detach().requires_grad_(), weight, layout[1])
        for a, b in zip(found, right, strict=True):
            if impl == "triton":
                assert_same(a, b)
                assert a.is_contiguous()
            else:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    # The gradient of a sum is one value with strides of zero; so may be the input's rows.
    row = x.detach()[0, 0].expand(3, 10, 96).requires_grad_()
    ones = torch.ones((), device=DEVICE).expand(3, 10, 96)
    assert_as_good_as_the_module(outcome(by(impl), row, weight, ones), row, weight, ones)


def test_offsets_beyond_32_bits(gigabytes):
    stride = (1 << 30) + 8
    storage = torch.empty(2 * stride + 40, dtype=torch.float16, device=DEVICE)
    rows = storage.as_strided((3, 40), (stride, 1))
    x, weight, dy = data(3, 40, dtype=torch.float16)
    right = outcome(by("triton"), x, weight, dy)
    rows.copy_(x.detach())
    found = outcome(by("triton"), rows.detach().requires_grad_(), weight, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_under_checkpointing():
    x, weight, dy = data(6, 5, 64, dtype=torch.bfloat16)
    right = outcome(by("triton"), x, weight, dy)
    found = outcome(lambda *a: checkpoint(by("triton"), *a, use_reentrant=False), x, weight, dy)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
@pytest.mark.parametrize("shape", [(0, 64), (3, 0, 64)], ids=str)
def test_no_rows(shape, impl):
    x, weight, dy = data(*shape, dtype=torch.bfloat16)
    y, dx, dweight = outcome(by(impl), x, weight, dy)
    assert y.shape == dx.shape == shape and y.dtype == torch.bfloat16
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_long_rows_and_float64_go_to_torch(monkeypatch):
    # As on a GPU, where "auto" would take the kernel.
    monkeypatch.setattr(kernel, "use_triton", lambda impl, tensor: True)
    monkeypatch.setattr(kernel, "_forward_triton", lambda *_, **__: pytest.fail("the kernel was taken"))
    for shape, dtype in (((2, kernel.MAX_C + 1), torch.float32), ((2, 64), torch.float64)):
        x, weight, _ = data(*shape, dtype=dtype)
        assert torch.equal(rms_norm(x, weight, EPS), kernel.rms_norm_ref(x, weight, EPS))
        with pytest.raises(ValueError, match=f"{dtype} rows of {shape[1]}, expected 8192 at most"):
            rms_norm(x, weight, EPS, impl="triton")


@pytest.mark.parametrize(
    ("x", "weight", "impl", "message"),
    [
        (torch.ones(2, 6), torch.ones(5), "auto", r"input \[2, 6\], weight \[5\]: expected \[..., C\], \[C\]"),
        (torch.ones(2, 6), torch.ones(1, 6), "auto", r"weight \[1, 6\]"),
        (torch.ones(2, 0), torch.ones(0), "auto", "C >= 1"),
        (torch.ones(()), torch.ones(()), "auto", r"input \[\]"),
        (torch.ones(2, 6).int(), torch.ones(6), "auto", "input torch.int32"),
        (torch.ones(2, 6).half(), torch.ones(6).bfloat16(), "auto", "weight torch.bfloat16"),
        (torch.ones(2, 6), torch.ones(6, device="meta"), "auto", "weight on meta"),
        (torch.ones(2, 6), torch.ones(6), "cuda", "impl 'cuda'"),
    ],
)
def test_bad_arguments(x, weight, impl, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, EPS, impl=impl)


def sum_and_norm(x, delta, weight, impl="triton", eps=EPS):
    """The sum that is left in x, and its norm; x as given stays."""
    x = x.detach().clone()
    y = add_rms_norm_(x, delta, weight.detach(), eps, impl=impl)
    return x, y


def assert_sum_and_norm_as_good(x, weight, delta, impl):
    total, y = sum_and_norm(x, delta, weight, impl)
    assert torch.equal(total, x.detach() + delta)
    # The norm is that of the rounded sum.
    truth, own = exact(total.double(), weight.double(), EPS), module(total, weight, EPS)
    assert_as_good(y, own, truth, rows=x.numel() // len(weight))
    return total, y


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum_and_norm_match_float64(shape, dtype, impl, allocated):
    x, weight, delta = data(*shape, dtype=dtype, frozen=True)
    total, y = assert_sum_and_norm_as_good(x, weight, delta, impl)
    assert allocated == ([shape] if impl == "triton" else [])
    # The norm's own kernel makes the same of that sum.
    assert_same(y, rms_norm(total, weight, EPS, impl=impl))


def test_strides_of_the_sum(allocated):
    x, weight, delta = data(3, 10, 96, dtype=torch.bfloat16, frozen=True)
    right = sum_and_norm(x, delta, weight)
    # Columns of wider buffers, which are taken in place: what lies between is neither read nor written.
    wide = torch.full((2, 3, 10, 200), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    inside, other = wide[0, ..., 7:103].copy_(x.detach()), wide[1, ..., 104:].copy_(delta)
    allocated.clear()
    assert_same(add_rms_norm_(inside, other, weight, EPS, impl="triton"), right[1])
    assert torch.equal(inside, right[0]) and wide[0].isnan().sum() == 30 * 104 and allocated == [(3, 10, 96)]
    assert torch.equal(other, delta)
    # Another order of dimensions, or one row for all, as a layer may return it, is copied.
    turned = delta.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert all(torch.equal(a, b) for a, b in zip(sum_and_norm(x, turned, weight), right, strict=True))
    row = delta[0, 0].expand(3, 10, 96)
    expected = sum_and_norm(x, row.contiguous(), weight)
    assert all(torch.equal(a, b) for a, b in zip(sum_and_norm(x, row, weight), expected, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
def test_sum_of_no_rows_float32_weight_and_float64(impl):
    x, weight, delta = data(0, 64, dtype=torch.bfloat16, frozen=True)
    assert sum_and_norm(x, delta, weight, impl)[1].shape == (0, 64)
    x, weight, delta = data(5, 96, dtype=torch.float16, weight_dtype=torch.float32, frozen=True)
    total, y = sum_and_norm(x, delta, weight, impl)
    assert y.dtype == torch.float16
    assert_same(y, rms_norm(total, weight, EPS, impl=impl))
    if impl != "triton":
        wide = [t.detach().double() for t in (x, delta, weight)]
        torch.testing.assert_close(sum_and_norm(*wide, impl)[1], exact(wide[0] + wide[1], wide[2], EPS))


def test_bad_arguments_of_the_sum():
    x, weight, delta = data(3, 10, 96, frozen=True)
    x = x.detach()
    for other, message in (
        (delta[:2], r"delta \[2, 10, 96\] of torch.float32.*expected \[3, 10, 96\]"),
        (delta[:1], "delta"),
        (delta.half(), "delta .* of torch.float16"),
        (delta.to("meta"), "delta .* on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            add_rms_norm_(x, other, weight, EPS)
    with pytest.raises(ValueError, match=r"weight \[95\]"):
        add_rms_norm_(x, delta, weight[1:], EPS)
    before = x.clone()
    for bad in (x.permute(2, 1, 0).contiguous().permute(2, 1, 0), x[0, 0].expand(3, 10, 96), x.expand(2, 3, 10, 96)):
        with pytest.raises(ValueError, match="input of strides .*expected rows"):
            add_rms_norm_(bad, delta.expand(bad.shape), weight, EPS, impl="triton")
    assert torch.equal(x, before)


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", [(4096, 4096), (2048, 8192)], ids=str)
def test_at_the_model_s_size(shape, frozen, monkeypatch):
    monkeypatch.setattr(kernel, "rms_norm_ref", lambda *_: pytest.fail("the reference was taken"))
    x, weight, dy = data(*shape, dtype=torch.bfloat16, frozen=frozen)
    first, second = (outcome(by("auto"), x, weight, dy) for _ in range(2))
    assert_as_good_as_the_module(first, x, weight, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 4096), (200, 4096), (2500, 8192)], ids=str)
def test_sum_at_the_model_s_size(shape, monkeypatch):
    monkeypatch.setattr(kernel, "rms_norm_ref", lambda *_: pytest.fail("the reference was taken"))
    assert_sum_and_norm_as_good(*data(*shape, dtype=torch.bfloat16, frozen=True), "auto")

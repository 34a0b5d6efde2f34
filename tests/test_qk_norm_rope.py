"""LayerNorm + RoPE of each head: both paths against float64, at most twice the error of transformers' operations."""

import itertools
import random
import weakref

import pytest
import torch
from accuracy import assert_as_good, assert_same
from torch.utils.checkpoint import checkpoint
from transformers.models.chameleon.modeling_chameleon import ChameleonLayerNorm, apply_rotary_pos_emb

from medmax_fast.kernels import qk_norm_rope
from medmax_fast.kernels.blocks import blocks
from medmax_fast.kernels.qk_norm_rope import norm_rope, norm_rope_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu(required=False), pytest.mark.usefixtures("bf16_to_nearest")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("x", "weight", "bias")
# Tokens, heads, width: the real width, one and two groups of heads, tiles cut short and several of them, widths that
# are no power of two, one token.
SHAPES = [(37, 3, 128), (19, 9, 128), (35, 17, 64), (131, 3, 16), (133, 11, 10), (1, 5, 128), (3, 1, 6)]


def inputs(T, H, D, dtype=torch.float32, per_head=False, mean=0.0, seed=0):
    """x, weight, bias, cos, sin and a gradient of the output; heads differ in mean and width."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    affine = (H, D) if per_head else (D,)
    x = randn(T, H, D) * (0.5 + randn(H, 1).abs()) + 0.3 * randn(H, 1) + mean
    angles = torch.rand(T, D // 2, generator=generator) * 4096
    tensors = x, 1 + 0.3 * randn(*affine), randn(*affine), angles.cos(), angles.sin(), randn(T, H, D)
    return [tensor.to(DEVICE, dtype) for tensor in tensors]


def definition(x, weight, bias, cos, sin, eps=1e-5):
    cos, sin = cos[:, None], sin[:, None]
    away = x - x.mean(-1, keepdim=True)
    y = away / (away.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias
    y1, y2 = y.tensor_split(2, dim=-1)
    return torch.cat([y1 * cos - y2 * sin, y2 * cos + y1 * sin], dim=-1)


def stock(x, weight, bias, cos, sin):
    """What the model runs without the kernel, with a batch dimension as it does."""
    T, H, D = x.shape
    norm = ChameleonLayerNorm((H, D)).to(x.device, x.dtype)
    y = torch.func.functional_call(norm, {"weight": weight.expand(H, D), "bias": bias.expand(H, D)}, x)
    cos, sin = (torch.cat([table, table], dim=-1)[None] for table in (cos, sin))
    y = y.reshape(1, T, H, D).transpose(1, 2)
    return apply_rotary_pos_emb(y, y, cos, sin)[0].transpose(1, 2)[0]


def results(function, x, weight, bias, cos, sin, dout, wanted=NAMES, **kw):
    """The output, then the gradients of the wanted ones of x, weight and bias, by name."""
    leaves = {name: tensor.detach() for name, tensor in zip(NAMES, (x, weight, bias), strict=True)}
    for name in wanted:
        leaves[name].requires_grad_()
    out = function(*leaves.values(), cos, sin, **kw)
    gradients = torch.autograd.grad(out, [leaves[name] for name in wanted], dout.to(out.dtype))
    return {"out": out.detach()} | dict(zip(wanted, gradients, strict=True))


def exact(*tensors, **kw):
    """The definition in float64, leaves and gradients included."""
    return results(definition, *(tensor.double() for tensor in tensors), **kw)


def kernel(*tensors, **kw):
    return results(norm_rope, *tensors, impl="triton", **kw)


def assert_equal(found, expected):
    assert found and found.keys() <= expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


def assert_all_same(found, expected):
    assert found and found.keys() <= expected.keys()
    for name in found:
        assert_same(found[name], expected[name])


def assert_as_good_as_stock(found, tensors, own=None):
    expected, own = exact(*tensors), own or results(stock, *tensors)
    assert found.keys() == own.keys()
    T, H, _ = tensors[0].shape
    for name, y in found.items():
        assert_as_good(y, own[name], expected[name], rows=T * H)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("per_head", [False, True], ids=["tied", "per_head"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, per_head, impl, poisoned):
    tensors = inputs(*shape, dtype, per_head)
    found = results(norm_rope, *tensors, impl=impl)
    assert found["out"].is_contiguous()
    assert_as_good_as_stock(found, tensors)


@pytest.mark.parametrize("per_head", [False, True], ids=["tied", "per_head"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_values(dtype, per_head, fresh_seed, poisoned):
    """Another shape and other values on every run."""
    draw = random.Random(fresh_seed)
    T, H, D = draw.randint(20, 150), draw.randint(1, 19), 2 * draw.randint(8, 70)
    tensors = inputs(T, H, D, dtype, per_head, draw.uniform(-1, 1), fresh_seed)
    assert_as_good_as_stock(kernel(*tensors), tensors)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_affine_part_and_angles_of_other_dtypes(dtype, impl, poisoned):
    x, weight, bias, cos, sin, dout = inputs(37, 9, 64, dtype)
    tensors = x, weight.float(), bias.float(), cos.double(), sin, dout
    found = results(norm_rope, *tensors, impl=impl)
    assert (found["out"].dtype, found["x"].dtype) == (dtype, dtype)
    # The affine part's gradients stay in fp32, as exact as if everything had been; the others are rounded once.
    own = results(stock, *(tensor.float() for tensor in tensors))
    own |= {name: own[name].to(dtype) for name in ("out", "x")}
    assert_as_good_as_stock(found, tensors, own)
    half = kernel(x, weight, bias.float(), cos, sin, dout)
    assert (half["weight"].dtype, half["bias"].dtype) == (dtype, torch.float32)


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float32, 1e3), (torch.float32, -1e4), (torch.float16, 100.0)])
def test_large_mean(dtype, mean, poisoned):
    tensors = inputs(37, 5, 128, dtype, mean=mean)
    assert_as_good_as_stock(kernel(*tensors), tensors)
    # The guard: the difference of mean squares would be far off on these values.
    x = tensors[0].cpu().float()
    variance = (x.pow(2).mean(-1) - x.mean(-1).pow(2)).double()
    right = x.double().var(-1, correction=0)
    assert ((variance - right).abs() / right).max() > 1e-4


def test_strides():
    T, H, D = 21, 9, 64
    x, weight, bias, cos, sin, dout = inputs(T, H, D, per_head=True)
    expected = kernel(x, weight, bias, cos, sin, dout)
    # A slice of a wider projection, the first half of a table, every second column of one: what lies between must not
    # be read.
    wide = torch.full((2 * T, H + 2, D + 6), float("nan"), device=DEVICE)
    strided_x, strided_dout = wide.clone()[::2, 1:-1, 3:-3].copy_(x), wide.clone()[1::2, 2:, :D].copy_(dout)
    table = torch.full((T, D), float("nan"), device=DEVICE)
    first, every = table.clone()[:, : D // 2].copy_(cos), table.clone()[:, ::2].copy_(sin)
    affine = weight.T.contiguous().T, torch.full((H, 2 * D), float("nan"), device=DEVICE)[:, :D].copy_(bias)
    strided = strided_x, *affine, first, every, strided_dout
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_all_same(kernel(*strided), expected)
    # Heads before tokens in memory; a gradient with a last stride of zero, as a sum's; one of another order.
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_all_same(kernel(turned, *strided[1:5], dout.mT.contiguous().mT), expected)
    ones = torch.ones((), device=DEVICE).expand_as(x)
    assert_all_same(kernel(x, *strided[1:5], ones), kernel(x, weight, bias, cos, sin, ones.contiguous()))


def test_tied_weights_are_summed_over_heads():
    x, weight, bias, cos, sin, dout = inputs(21, 9, 64)
    tied = kernel(x, weight, bias, cos, sin, dout)
    each = kernel(x, weight.expand(9, 64), bias.expand(9, 64), cos, sin, dout)
    for name in ("out", "x"):
        assert_same(each[name], tied[name])
    for name in ("weight", "bias"):
        torch.testing.assert_close(each[name].sum(0), tied[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("per_head", [False, True], ids=["tied", "per_head"])
@pytest.mark.parametrize("wanted", [c for n in (1, 2) for c in itertools.combinations(NAMES, n)], ids="-".join)
def test_every_subset_of_gradients(wanted, per_head, impl, poisoned):
    tensors = inputs(21, 9, 16, per_head=per_head)
    found = results(norm_rope, *tensors, wanted=wanted, impl=impl)
    assert_all_same(found, results(norm_rope, *tensors, impl=impl))


def test_unwanted_gradients_are_neither_computed_nor_allocated(monkeypatch):
    x, weight, bias, cos, sin, dout = inputs(21, 9, 16)
    out = norm_rope(x.requires_grad_(), weight, bias, cos, sin, impl="triton")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("sums of the affine part were allocated"))
    out.backward(dout)
    assert x.grad.isfinite().all() and weight.grad is None and bias.grad is None


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_angles_get_no_gradient(impl):
    x, weight, bias, cos, sin, dout = inputs(5, 3, 16)
    cos.requires_grad_(), sin.requires_grad_()
    assert not norm_rope(x, weight, bias, cos, sin, impl=impl).requires_grad
    norm_rope(x.requires_grad_(), weight, bias, cos, sin, impl=impl).backward(dout)
    assert x.grad is not None and cos.grad is None and sin.grad is None


def test_what_is_kept_for_backward():
    x, weight, bias, cos, sin, _ = inputs(21, 9, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()), lambda _: None):
        norm_rope(x, weight.requires_grad_(), bias, cos, sin, impl="triton")
    assert kept == [tensor.data_ptr() for tensor in (x, weight, cos, sin)]


@pytest.mark.parametrize("grad_enabled", [False, True])
def test_nothing_is_kept_where_no_gradient_is_wanted(grad_enabled):
    x, weight, bias, cos, sin, _ = inputs(21, 9, 16)
    with torch.set_grad_enabled(grad_enabled):
        out = norm_rope(x, weight.requires_grad_(not grad_enabled), bias, cos, sin, impl="triton")
    alive = weakref.ref(x)
    del x
    assert out.grad_fn is None and alive() is None


def test_checkpointing():
    x, weight, bias, cos, sin, dout = inputs(21, 9, 64, torch.bfloat16)
    calls = []

    def layer(x, weight, bias, cos, sin):
        calls.append(torch.is_grad_enabled())
        return norm_rope(x * 2, weight, bias, cos, sin, impl="triton") * 3

    expected = results(layer, x, weight, bias, cos, sin, dout)
    found = results(lambda *a: checkpoint(layer, *a, use_reentrant=False), x, weight, bias, cos, sin, dout)
    assert_equal(found, expected)
    assert len(calls) == 3


@pytest.mark.parametrize("per_head", [False, True], ids=["tied", "per_head"])
def test_a_token_does_not_depend_on_the_others_nor_on_the_run(per_head):
    x, weight, bias, cos, sin, dout = inputs(300, 9, 16, per_head=per_head)
    together = kernel(x, weight, bias, cos, sin, dout)
    assert min(qk_norm_rope._plan(300, 9, 16, **blocks("norm_rope", x.device))[1]) > 1
    assert_equal(kernel(x, weight, bias, cos, sin, dout), together)
    some = slice(101, 130)
    alone = kernel(x[some], weight, bias, cos[some], sin[some], dout[some])
    assert torch.equal(alone["out"], together["out"][some]) and torch.equal(alone["x"], together["x"][some])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_value_spoils_its_head_alone(value):
    x, *others = inputs(21, 9, 64)
    clean = kernel(x, *others)
    x[20, 8, 63] = value
    found = kernel(x, *others)
    spoilt = torch.zeros_like(x, dtype=torch.bool)
    spoilt[20, 8] = True
    for name in ("out", "x"):
        assert found[name][spoilt].isnan().all() and torch.equal(found[name][~spoilt], clean[name][~spoilt])


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_tokens_that_are_not_there_add_nothing_without_eps():
    tensors = inputs(5, 3, 10)
    found = kernel(*tensors, eps=0.0)
    for name, value in exact(*tensors, eps=0.0).items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("D", [2, 16])
def test_eps_counts(D):
    tensors = inputs(5, 3, D)
    expected = exact(*tensors, eps=0.5)
    for impl in ("torch", "triton"):
        for name, value in results(norm_rope, *tensors, eps=0.5, impl=impl).items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
@pytest.mark.parametrize("per_head", [False, True], ids=["tied", "per_head"])
def test_no_tokens(per_head, impl):
    found = results(norm_rope, *inputs(0, 3, 16, torch.bfloat16, per_head), impl=impl)
    assert found["out"].shape == found["x"].shape == (0, 3, 16) and found["out"].dtype == torch.bfloat16
    assert not found["weight"].any() and not found["bias"].any()


@pytest.mark.parametrize("per_head", [False, True], ids=["tied", "per_head"])
def test_float64_is_computed_in_float64(per_head):
    *tensors, _ = inputs(7, 3, 10, torch.float64, per_head)
    torch.testing.assert_close(norm_rope(*tensors), definition(*tensors), rtol=1e-13, atol=1e-13)
    for tensor in tensors[:3]:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *leaves: norm_rope_ref(*leaves, *tensors[3:]), tensors[:3])
    with pytest.raises(ValueError, match="input of torch.float64"):
        norm_rope(*tensors, impl="triton")


def test_auto(monkeypatch):
    tensors = inputs(5, 3, 16)
    turned = [tensors[0].mT.contiguous().mT, *tensors[1:5]]
    with pytest.raises(ValueError, match="expected a last stride of 1"):
        norm_rope(*turned, impl="triton")
    if DEVICE == "cpu":
        assert torch.equal(norm_rope(*tensors[:5]), norm_rope_ref(*tensors[:5]))
    # As on a GPU, where "auto" takes the kernel for what it can.
    monkeypatch.setattr(qk_norm_rope, "use_triton", lambda impl, tensor: True)
    assert torch.equal(norm_rope(*tensors[:5]), norm_rope(*tensors[:5], impl="triton"))
    monkeypatch.setattr(qk_norm_rope, "_norm_rope_triton", lambda *_: pytest.fail("the kernel was taken"))
    assert torch.equal(norm_rope(*turned), norm_rope_ref(*turned))


def test_a_second_derivative_is_refused():
    x, weight, bias, cos, sin, _ = inputs(5, 3, 16)
    out = norm_rope(x.requires_grad_(), weight, bias, cos, sin, impl="triton")
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


TABLE = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "cos", "sin", "impl", "message"),
    [
        (torch.ones(4, 32), *[torch.ones(16)] * 2, TABLE, TABLE, "auto", r"input \[4, 32\]"),
        (torch.ones(4, 2, 15), *[torch.ones(15)] * 2, TABLE, TABLE, "auto", "even D"),
        (torch.ones(4, 2, 0), *[torch.ones(0)] * 2, TABLE, TABLE, "auto", "even D"),
        (torch.ones(4, 2, 16), *[torch.ones(8)] * 2, TABLE, TABLE, "auto", r"both \[16\] or both \[2, 16\]"),
        (torch.ones(4, 2, 16), torch.ones(2, 16), torch.ones(16), TABLE, TABLE, "auto", r"bias \[16\]: expected both"),
        (torch.ones(4, 2, 16), *[torch.ones(1, 16)] * 2, TABLE, TABLE, "auto", r"weight \[1, 16\]"),
        (torch.ones(4, 2, 16), *[torch.ones(16)] * 2, torch.ones(4, 16), TABLE, "auto", r"cos \[4, 16\].*\[4, 8\]"),
        (torch.ones(4, 2, 16), *[torch.ones(16)] * 2, TABLE, TABLE[:3], "auto", r"sin \[3, 8\]"),
        (torch.ones(4, 2, 16).int(), *[torch.ones(16)] * 2, TABLE, TABLE, "auto", "input torch.int32"),
        (torch.ones(4, 2, 16).half(), torch.ones(16), torch.ones(16).bfloat16(), TABLE, TABLE, "auto", "bias torch.bf"),
        (torch.ones(4, 2, 16), *[torch.ones(16).half()] * 2, TABLE, TABLE, "auto", "weight torch.float16"),
        (torch.ones(4, 2, 16), *[torch.ones(16)] * 2, TABLE.long(), TABLE, "auto", "cos torch.int64"),
        (torch.ones(4, 2, 16), *[torch.ones(16)] * 2, TABLE, TABLE.to("meta"), "auto", "cpu, sin on meta"),
        (torch.ones(4, 2, 16), *[torch.ones(16)] * 2, TABLE, TABLE, "cuda", "impl 'cuda'"),
        (torch.ones(4, 2, 4096), *[torch.ones(4096)] * 2, *[torch.ones(4, 2048)] * 2, "triton", "D = 4096"),
    ],
)
def test_bad_arguments(x, weight, bias, cos, sin, impl, message):
    tensors = x, weight, bias, cos, sin
    if impl == "triton":
        tensors = [tensor.to(DEVICE) for tensor in tensors]
    message = message.replace("torch.bf", "torch.bfloat16")
    with pytest.raises(ValueError, match=message) as caught:
        norm_rope(*tensors, impl=impl)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("per_head", [False, True], ids=["tied", "per_head"])
def test_real_shape(per_head, poisoned, monkeypatch):
    tensors = inputs(4096, 32, 128, torch.bfloat16, per_head)
    monkeypatch.setattr(qk_norm_rope, "norm_rope_ref", lambda *_: pytest.fail("fell back to torch"))
    found = results(norm_rope, *tensors)
    assert_as_good_as_stock(found, tensors)
    assert_equal(results(norm_rope, *tensors), found)

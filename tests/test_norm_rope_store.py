"""Norm, RoPE and the store in pages: q and k as qk_norm_rope.py makes them, both paths, v and its places to the bit."""

import random

import pytest
import torch
from accuracy import assert_as_good, assert_same

from medmax_fast.kernels import norm_rope_store as kernel
from medmax_fast.kernels.norm_rope_store import norm_rope_store
from medmax_fast.kernels.qk_norm_rope import norm_rope, norm_rope_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu(required=False), pytest.mark.usefixtures("bf16_to_nearest")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")
# Tokens, query heads, key/value heads, D, PAGE: one token and several, heads that fill tiles, do not, and need several,
# widths that are no power of two, the widest of the kernel.
SHAPES = [
    (1, 2, 2, 128, 64),
    (3, 9, 3, 128, 64),
    (5, 20, 17, 64, 16),
    (7, 3, 1, 80, 8),
    (9, 4, 2, 10, 4),
    (2, 1, 1, 2, 1),
    (2, 2, 1, 1024, 2),
]
EPS = 1e-5


def data(T, H, G, D, PAGE, dtype=torch.float32, affine_dtype=None, seed=0, index=torch.int64):
    """The arguments up to eps, by name; every third token has no place, and the pages hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    heads = H + 2 * G
    x = randn(T, heads, D) * (0.5 + randn(heads, 1).abs()) + 0.3 * randn(heads, 1)
    tensors = {"qkv": x.flatten(1).to(dtype)}
    for name, count in (("q", H), ("k", G)):
        tensors[f"{name}_weight"] = (1 + 0.3 * randn(count, D)).to(affine_dtype or dtype)
        tensors[f"{name}_bias"] = randn(count, D).to(affine_dtype or dtype)
    angles = torch.rand(2 * T + 3, D // 2, generator=generator) * 4096
    tensors |= {"cos": angles.cos(), "sin": angles.sin()}
    tensors["positions"] = torch.randint(0, len(angles), (T,), generator=generator).to(index)
    pages = -(-T // PAGE) + 2
    places = torch.randperm(pages * PAGE, generator=generator)[:T].to(index)
    tensors["places"] = torch.where(torch.arange(T) % 3 == 2, -1 - places, places)
    tensors |= {name: torch.full((pages, G, PAGE, D), NAN, dtype=dtype) for name in ("k_pages", "v_pages")}
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def outcome(tensors, impl, eps=EPS):
    """q, k_pages, v_pages; the pages given are left as they were."""
    tensors = tensors | {name: tensors[name].clone() for name in ("k_pages", "v_pages")}
    q = norm_rope_store(*tensors.values(), eps, impl=impl)
    return q, tensors["k_pages"], tensors["v_pages"]


def parts(tensors):
    """q, k and v before the operation, [T, heads, D]."""
    _, G, _, D = tensors["k_pages"].shape
    H = len(tensors["q_weight"])
    return tensors["qkv"].unflatten(1, (H + 2 * G, D)).split((H, G, G), dim=1)


def by_parts(tensors, rotate, eps=EPS):
    """The outcome with `rotate` for norm and RoPE, one head and one token after the other into the pages."""
    q, k, v = parts(tensors)
    cos, sin = (tensors[name][tensors["positions"].long()] for name in ("cos", "sin"))
    q = rotate(q, tensors["q_weight"], tensors["q_bias"], cos, sin, eps)
    k = rotate(k, tensors["k_weight"], tensors["k_bias"], cos, sin, eps)
    k_pages, v_pages = tensors["k_pages"].to(k.dtype, copy=True), tensors["v_pages"].clone()
    PAGE = k_pages.shape[2]
    for t, place in enumerate(tensors["places"].tolist()):
        if place >= 0:
            for g in range(k.shape[1]):
                k_pages[place // PAGE, g, place % PAGE] = k[t, g]
                v_pages[place // PAGE, g, place % PAGE] = v[t, g]
    return q, k_pages, v_pages


def definition(x, weight, bias, cos, sin, eps):
    x, weight, bias, cos, sin = (tensor.double() for tensor in (x, weight, bias, cos[:, None], sin[:, None]))
    away = x - x.mean(-1, keepdim=True)
    y = away / (away.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias
    y1, y2 = y.tensor_split(2, dim=-1)
    return torch.cat([y1 * cos - y2 * sin, y2 * cos + y1 * sin], dim=-1)


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(1e4), b.nan_to_num(1e4))


def assert_as_good_as_torch(found, tensors):
    own, right = by_parts(tensors, norm_rope_ref), by_parts(tensors, definition)
    assert same(found[2], own[2])
    for y, other, exact in zip(found[:2], own, right, strict=False):
        # What holds nothing still does.
        written = ~exact.isnan()
        assert torch.equal(~y.isnan(), written)
        assert_as_good(y[written], other[written], exact[written], rows=max(1, int(written.sum()) // y.shape[-1]))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, impl, poisoned):
    tensors = data(*shape, dtype=dtype)
    found = outcome(tensors, impl)
    assert found[0].is_contiguous() and found[0].shape == (shape[0], shape[1], shape[3])
    assert_as_good_as_torch(found, tensors)
    kept = (tensors["places"] >= 0).sum().item()
    assert kept > 0 and (~found[1].isnan()).sum() == kept * shape[2] * shape[3]
    if shape[0] > 2:
        assert kept < shape[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_values(dtype, fresh_seed, poisoned):
    """Another shape, other values, positions and places on every run."""
    draw = random.Random(fresh_seed)
    T, H, G, D = draw.randint(5, 30), draw.randint(1, 20), draw.randint(1, 20), 2 * draw.randint(4, 70)
    tensors = data(T, H, G, D, draw.choice([4, 16, 64]), dtype=dtype, seed=fresh_seed)
    assert_as_good_as_torch(outcome(tensors, "triton"), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_norm_rope(shape, dtype):
    tensors = data(*shape, dtype=dtype)
    for a, b in zip(outcome(tensors, "torch"), by_parts(tensors, norm_rope_ref), strict=True):
        assert same(a, b)
    # On a GPU the compiler may fuse other products and sums.
    if DEVICE == "cpu":
        rotate = lambda *a: norm_rope(*a, impl="triton")  # noqa: E731
        for a, b in zip(outcome(tensors, "triton"), by_parts(tensors, rotate), strict=True):
            assert same(a, b)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_affine_part_and_32_bit_indices(dtype, impl, poisoned):
    tensors = data(5, 9, 3, 64, 8, dtype=dtype, affine_dtype=torch.float32, index=torch.int32)
    assert_as_good_as_torch(outcome(tensors, impl), tensors)
    tensors["q_bias"], tensors["k_weight"] = tensors["q_bias"].to(dtype), tensors["k_weight"].to(dtype)
    tensors["places"] = tensors["places"].long()
    assert_as_good_as_torch(outcome(tensors, impl), tensors)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_strides(impl):
    tensors = data(5, 9, 3, 10, 4)
    right = outcome(tensors, impl)
    T, K = tensors["qkv"].shape
    # Rows of wider tensors, another order of the affine part: what lies between must not be read.
    wide = torch.full((2 * T, K + 7), NAN, device=DEVICE)
    strided = tensors | {"qkv": wide[::2, 3 : K + 3].copy_(tensors["qkv"])}
    for name in ("cos", "sin"):
        table = torch.full((len(tensors[name]), 13), NAN, device=DEVICE)
        strided[name] = table[:, 4:9].copy_(tensors[name])
    strided |= {name: tensors[name].mT.contiguous().mT for name in ("q_weight", "k_bias")}
    assert not any(strided[name].is_contiguous() for name in ("qkv", "cos", "sin", "q_weight", "k_bias"))
    for a, b in zip(outcome(strided, impl), right, strict=True):
        if impl == "triton":
            assert_same(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_other_places_keep_what_they_hold(impl):
    tensors = data(7, 3, 2, 16, 4)
    before = torch.arange(float(tensors["k_pages"].numel()), device=DEVICE).view_as(tensors["k_pages"])
    tensors |= {"k_pages": before.clone(), "v_pages": -before}
    q, k_pages, v_pages = outcome(tensors, impl)
    changed = (k_pages != before).any(-1).transpose(1, 2).flatten(0, 1)
    places = tensors["places"][tensors["places"] >= 0]
    assert len(places) == 5 and torch.equal(changed.all(1).nonzero()[:, 0], places.sort().values)
    assert torch.equal((v_pages != -before).any(-1).transpose(1, 2).flatten(0, 1), changed)
    # Without a single place the pages stay, and q is the same.
    tensors["places"] = torch.full_like(tensors["places"], -1)
    again = outcome(tensors, impl)
    assert torch.equal(again[0], q) and torch.equal(again[1], before) and torch.equal(again[2], -before)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_offsets_beyond_32_bits(index, impl, gigabytes):
    tensors = data(1, 2, 1, 32, 64, dtype=torch.float16, index=index)
    q, k_pages, v_pages = outcome(tensors, impl)
    place = tensors["places"][0].item()
    # Of a pool of 2^31 values and one page more only one place is ever touched.
    pools = torch.empty(2, (1 << 20) + 1, 1, 64, 32, dtype=torch.float16, device=DEVICE)
    tensors |= {"places": torch.full_like(tensors["places"], (1 << 26) + 5), "k_pages": pools[0], "v_pages": pools[1]}
    assert torch.equal(norm_rope_store(*tensors.values(), EPS, impl=impl), q)
    for pool, pages in zip(pools, (k_pages, v_pages), strict=True):
        assert torch.equal(pool[-1, 0, 5], pages[place // 64, 0, place % 64])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_non_finite_value_spoils_its_head_alone(impl):
    tensors = data(2, 4, 2, 16, 4)
    clean = outcome(tensors, impl)
    # Of 4 heads of q, 2 of k, 2 of v.
    for head in (1, 5, 6):
        tensors["qkv"][1, 16 * head + 3] = NAN
    q, k_pages, v_pages = outcome(tensors, impl)
    place = tensors["places"][1].item()
    at = place // 4, slice(None), place % 4
    assert q[1, 1].isnan().all() and q[1, [0, 2, 3]].isfinite().all() and torch.equal(q[0], clean[0][0])
    assert k_pages[at][1].isnan().all() and torch.equal(k_pages[at][0], clean[1][at][0])
    assert v_pages[at].isnan().sum() == 1 and v_pages[at][0, 3].isnan()


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_eps(eps, impl):
    tensors = data(3, 3, 2, 10, 4)
    for a, b in zip(outcome(tensors, impl, eps), by_parts(tensors, definition, eps), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
def test_no_tokens(impl):
    tensors = data(0, 3, 2, 16, 4, dtype=torch.bfloat16)
    q, k_pages, v_pages = outcome(tensors, impl)
    assert q.shape == (0, 3, 16) and q.dtype == torch.bfloat16 and k_pages.isnan().all() and v_pages.isnan().all()


def test_float64_and_wide_heads_go_to_torch(monkeypatch):
    monkeypatch.setattr(kernel, "use_triton", lambda impl, tensor: True)
    monkeypatch.setattr(kernel, "_norm_rope_store_triton", lambda *_: pytest.fail("the kernel was taken"))
    double = data(3, 3, 2, 10, 4, dtype=torch.float64)
    for a, b in zip(outcome(double, "auto"), by_parts(double, definition), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)
    wide = data(2, 1, 1, 2048, 2)
    assert_as_good_as_torch(outcome(wide, "auto"), wide)
    for tensors, message in ((double, "torch.float64 with D = 10"), (wide, "torch.float32 with D = 2048")):
        with pytest.raises(ValueError, match=f"impl='triton': {message}"):
            outcome(tensors, "triton")


GOOD = data(5, 4, 2, 8, 4)
BAD = {
    r"pages \[4, 2, 4, 7\]": {name: GOOD[name][..., :7] for name in ("k_pages", "v_pages")},
    r"pages .*, \[3, 2, 4, 8\]: expected": {"v_pages": GOOD["v_pages"][:3]},
    r"q_weight \[8\] of": {"q_weight": GOOD["q_weight"][0]},
    r"q_bias \[3, 8\] of torch.float32: expected \[4, 8\]": {"q_bias": GOOD["q_bias"][:3]},
    r"k_weight \[4, 8\] of torch.float32: expected \[2, 8\]": {"k_weight": GOOD["q_weight"]},
    "k_bias .* of torch.float16": {"k_bias": GOOD["k_bias"].half()},
    r"qkv \[5, 56\].*expected \[T, 64\]": {"qkv": GOOD["qkv"][:, :56]},
    "qkv .*last stride of 1": {"qkv": GOOD["qkv"].T.contiguous().T},
    "k_pages torch.float16": {"k_pages": GOOD["k_pages"].half()},
    "expected one float dtype": {name: GOOD[name].int() for name in ("qkv", "k_pages", "v_pages")},
    "expected contiguous ones": {"v_pages": GOOD["v_pages"].mT.contiguous().mT},
    r"cos \[13, 8\]": {"cos": torch.ones(13, 8, device=DEVICE)},
    "sin .* of torch.float64": {"sin": GOOD["sin"].double()},
    r"positions \[4\]": {"positions": GOOD["positions"][:4]},
    "places .* of torch.float32": {"places": GOOD["places"].float()},
    "sin on meta": {"sin": GOOD["sin"].to("meta")},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    # Where weights would be refused for their dtype first, they follow the input's.
    arguments = GOOD | BAD[message]
    if arguments["qkv"].dtype == torch.int32:
        arguments |= {name: tensor.int() for name, tensor in arguments.items() if "weight" in name or "bias" in name}
    with pytest.raises(ValueError, match=message) as caught:
        norm_rope_store(*arguments.values(), EPS)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="impl 'cuda'"):
        norm_rope_store(*GOOD.values(), EPS, impl="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 32, 32, 128, 64), (2500, 32, 32, 128, 64), (100, 64, 8, 128, 64)], ids=str)
def test_at_the_model_s_size(shape, dtype, monkeypatch, poisoned):
    monkeypatch.setattr(kernel, "norm_rope_store_ref", lambda *_: pytest.fail("the reference was taken"))
    tensors = data(*shape, dtype=dtype)
    q, k_pages, v_pages = outcome(tensors, "auto")
    own, right = (by_parts_at_once(tensors, rotate) for rotate in (norm_rope_ref, definition))
    kept = tensors["places"] >= 0
    places = tensors["places"][kept]
    k, v = (pages[places // 64, :, places % 64] for pages in (k_pages, v_pages))
    assert torch.equal(v, parts(tensors)[2][kept])
    for y, other, exact in zip((q, k), own, right, strict=True):
        assert_as_good(y, other, exact, rows=y.numel() // y.shape[-1])


def by_parts_at_once(tensors, rotate):
    q, k, _ = parts(tensors)
    cos, sin = (tensors[name][tensors["positions"]] for name in ("cos", "sin"))
    q = rotate(q, tensors["q_weight"], tensors["q_bias"], cos, sin, EPS)
    return q, rotate(k, tensors["k_weight"], tensors["k_bias"], cos, sin, EPS)[tensors["places"] >= 0]

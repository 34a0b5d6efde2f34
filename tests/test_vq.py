"""Nearest code: the torch reference against float64 arithmetic, the Triton kernel against the reference."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medmax_fast.kernels import vq
from medmax_fast.kernels.blocks import override

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu(required=False)
# Rows, codes, channels: around the block sizes, odd, tiny, and channels that are no power of two.
SHAPES = [(1, 1, 1), (3, 5, 7), (64, 128, 16), (65, 129, 32), (70, 300, 48), (127, 1, 3), (130, 257, 256)]
# Codes and channels of tests that draw many sizes: any in the interpreter; a GPU compiles three kernels for each pair.
if DEVICE == "cpu":
    SIZES = st.tuples(st.integers(1, 280), st.integers(1, 40))
    PAIRS = st.tuples(st.integers(1, 30), st.integers(16, 70))
else:
    SIZES, PAIRS = st.sampled_from([(1, 1), (37, 5), (128, 16), (279, 40)]), st.sampled_from([(1, 16), (11, 70)])


def latents(N, K, D, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(N, D, generator=generator)
    e = torch.randn(K, D, generator=generator) * spread
    return z.to(DEVICE), e.to(DEVICE)


def distances(z, e):
    """Squared distances in float64 by differences, a formula that shares nothing with the one under test."""
    return (z.double()[:, None] - e.double()[None]).pow(2).sum(-1)


def assert_nearest(codes, z, e):
    """Every code is the float64 argmin, except where the chosen one is as near to within fp32 rounding."""
    assert codes.dtype == torch.int64 and codes.shape == z.shape[:1]
    assert codes.min() >= 0 and codes.max() < len(e)
    exact = distances(z, e)
    chosen = exact.gather(1, codes[:, None])[:, 0]
    scale = z.double().pow(2).sum(1) + e.double().pow(2).sum(1).max()
    assert (chosen - exact.min(1).values <= 1e-5 * scale).all()
    assert (codes != exact.argmin(1)).float().mean() <= 0.01


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape, impl, poisoned):
    z, e = latents(*shape)
    assert_nearest(vq.nearest_code(z, e, impl=impl), z, e)
    assert poisoned


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_fresh_values(impl, fresh_seed, poisoned):
    """Another shape and other latents on every run, a third of them codes themselves."""
    draw = random.Random(fresh_seed)
    N, K, D = draw.randint(100, 300), draw.randint(200, 900), draw.randint(17, 250)
    z, e = latents(N, K, D, fresh_seed, spread=draw.choice([0.1, 1.0, 10.0]))
    order = torch.tensor(draw.sample(range(K), N // 3), device=DEVICE)
    z[: N // 3] = e[order]
    codes = vq.nearest_code(z, e, impl=impl)
    assert_nearest(codes, z, e)
    assert torch.equal(codes[: N // 3], order)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), SIZES, st.integers(0, 9999))
def test_paths_agree_on_integers_exactly(N, sizes, seed):
    K, D = sizes
    # Small integers are exact in fp32 in any order of summation and full of ties: all paths must agree bit for bit.
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(-2, 3, (N, D), generator=generator).float().to(DEVICE)
    e = torch.randint(-2, 3, (K, D), generator=generator).float().to(DEVICE)
    expected = distances(z, e)
    first = (expected == expected.min(1, keepdim=True).values).int().argmax(1)
    assert torch.equal(vq.nearest_code(z, e, impl="torch"), first)
    assert torch.equal(vq.nearest_code(z, e, impl="triton"), first)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_ties_go_to_the_lowest_index(impl):
    # The same codebook three times over: copies in the same block and in later blocks must never be chosen. On a
    # grid of 1/16 sums are exact; else a BLAS that adds up two equal columns in different orders breaks the tie.
    z, e = ((x * 16).round() / 16 for x in latents(50, 90, 16))
    once = vq.nearest_code(z, e, impl=impl)
    assert once.unique().numel() > 10
    assert torch.equal(vq.nearest_code(z, e.repeat(3, 1), impl=impl), once)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_latent_equal_to_a_code_finds_it(impl):
    _, e = latents(1, 300, 48, spread=3.0)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    assert torch.equal(vq.nearest_code(e[order], e, impl=impl), order)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_strides(impl):
    z, e = latents(70, 150, 48)
    expected = vq.nearest_code(z, e, impl=impl)
    wide = torch.full((140, 96), float("nan"), device=DEVICE)
    wide[::2, ::2] = z
    transposed = e.t().contiguous().t()
    assert not transposed.is_contiguous() and not wide[::2, ::2].is_contiguous()
    assert torch.equal(vq.nearest_code(wide[::2, ::2], transposed, impl=impl), expected)
    # A channels-first feature map, as the encoder gives it.
    assert torch.equal(vq.nearest_code(z.t().contiguous().t(), e, impl=impl), expected)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_widened(dtype, impl):
    z, e = latents(40, 130, 32)
    z, e = z.to(dtype), e.to(dtype)
    assert torch.equal(vq.nearest_code(z, e, impl=impl), vq.nearest_code(z.float(), e.float(), impl=impl))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_offset_makes_ids(impl):
    z, e = latents(33, 140, 32)
    codes = vq.nearest_code(z, e, impl=impl)
    assert torch.equal(vq.nearest_code(z, e, id_offset=4, impl=impl), codes + 4)
    assert torch.equal(vq.nearest_code(z, e, id_offset=70000, impl=impl), codes + 70000)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_non_finite_values(impl):
    z, e = latents(20, 200, 16)
    clean = vq.nearest_code(z, e, impl=impl)
    z[3, 5] = float("nan")
    z[7, :] = float("inf")
    codes = vq.nearest_code(z, e, impl=impl)
    others = torch.tensor([i not in (3, 7) for i in range(20)], device=DEVICE)
    assert codes[3] == 0 and 0 <= codes[7] < 200
    assert torch.equal(codes[others], clean[others])
    e[150, 0] = float("nan")
    e[170, 0] = float("nan")
    codes = vq.nearest_code(z, e, impl=impl)
    assert (codes[others] == 150).all() and codes[3] == 0


def test_block_sizes_change_nothing_but_near_ties():
    z, e = latents(80, 300, 48)
    results = []
    for blocks in [(16, 64, 16), (64, 128, 16), (32, 256, 32)]:
        blocks = dict(zip(("BLOCK_N", "BLOCK_K", "BLOCK_D"), blocks, strict=True))
        with override("vq_screen", **blocks), override("vq_search", **blocks):
            results.append(vq.nearest_code(z, e, impl="triton"))
    two = distances(z, e).topk(2, largest=False).values
    apart = two[:, 1] - two[:, 0] > 1e-4 * two[:, 0]
    assert apart.sum() > 70
    assert all(torch.equal(result[apart], results[0][apart]) for result in results)


def undecided(z, e):
    """How many latents the screen left to the search, having checked every code against the search alone."""
    codes, count = vq._nearest_code_triton(z, e, 0)
    expected, everything = vq._nearest_code_triton(z, e, 0, screen=False)
    assert torch.equal(codes, expected) and int(everything) == len(z)
    return int(count)


def test_both_stages_decide():
    # One block of latents and a bit.
    assert 0 < undecided(*latents(150, 700, 100, seed=5)) < 150 // 4
    # Too many channels for the screen.
    assert undecided(*latents(20, 40, vq.SCREEN_D + 1)) == 20


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 100), PAIRS, st.integers(-12, 12), st.integers(0, 999))
def test_near_ties(ulps, sizes, exponent, seed):
    pairs, D = sizes
    # Two codes on opposite sides of each of `pairs` latents, one moved by a few ulps; as many latents equal a code.
    generator = torch.Generator().manual_seed(seed)
    z, step, clear = torch.randn(3, pairs, D, generator=generator).unbind()
    step *= 0.1 / D**0.5
    moved = z - step
    moved[:, 0] *= 1 + ulps * 2.0**-23
    e = torch.cat([z + step, moved, clear + 5])[torch.randperm(3 * pairs, generator=generator)]
    z, e = (torch.cat([z, clear + 5]) * 10.0**exponent).to(DEVICE), (e * 10.0**exponent).to(DEVICE)
    assert undecided(z, e) == pairs
    # With every row twice, nothing is left that the screen could decide.
    assert undecided(z, e.repeat(2, 1)) == 2 * pairs


@pytest.mark.parametrize(("scale", "length"), [(1.0, 0.5), (2.0**-20, 0.0625), (2.0**15, 4.0)])
@pytest.mark.parametrize("near", [0, 1])
def test_worst_rounding_of_latents(scale, length, near):
    # Rounding moves z against the code r = z - z' by all that Cauchy-Schwarz allows, and towards -r as much, while z
    # is a little nearer to r: the fp16 product alone is wrong by nearly the whole margin (nine tenths of it fail).
    signs = torch.ones(64)
    signs[::2] = -1
    z = torch.where(signs > 0, 1 + 0.98 * 2.0**-11, 1 + 1.02 * 2.0**-11).repeat(32, 1)
    odd = torch.arange(32)
    z[odd, 2 * odd + 1] += 2.0**-10
    assert ((z.half().float() @ signs) < 0).all() and ((z.double() @ signs.double()) > 0).all()
    e = torch.cat([length * torch.stack([signs, -signs]), 1e4 * torch.ones(40, 64)])
    e = e.flip(0) if near else e
    z, e = (z * scale).to(DEVICE), (e * scale).to(DEVICE)
    assert undecided(z, e) == 32
    assert (vq.nearest_code(z, e, impl="triton") == (41 if near else 0)).all()


@pytest.mark.parametrize("near", [0, 1])
def test_worst_rounding_of_codes(near):
    # The same from the other side: exact latents, and of two codes rounding takes one nearer and one farther away.
    z = (1 - torch.arange(1, 33) / 64)[:, None].repeat(1, 64)
    e = torch.tensor([1 + 0.98 * 2.0**-11, 1 + 1.02 * 2.0**-11])[:, None].repeat(1, 64)
    assert (z.half() == z).all() and e.half()[:, 0].tolist() == [1, 1 + 2.0**-10]
    z, e = z.to(DEVICE), (e.flip(0) if near else e).to(DEVICE)
    assert undecided(z, e) == 32
    assert (vq.nearest_code(z, e, impl="triton") == near).all()


def test_rounding_of_the_search():
    # The products are exact; what ties several codes is that ||z||^2 swallows the differences of their distances.
    z = torch.arange(1000, 1064).float()[:, None].to(DEVICE)
    e = (torch.arange(300, 500).float()[:, None] * 3 * 2.0**-17).to(DEVICE)
    assert undecided(z, e) == 64
    assert 5 < (vq.nearest_code(z, e, impl="triton") == e.argmax()).sum() < 59


def truncating_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """tl.dot as tensor cores are known to add: 16 products and the sum aligned to the largest and cut to 24 bits."""
    from triton.language import float32
    from triton.runtime.interpreter import TensorHandle

    if a.data.dtype != np.float16:
        return TensorHandle(np.matmul(a.data, b.data) + d.data, float32)
    total = d.data.astype(np.float64)
    for start in range(0, a.data.shape[1], 16):
        at = slice(start, start + 16)
        terms = a.data[:, None, at].astype(np.float64) * b.data.T[None, :, at]
        terms = np.concatenate([total[..., None], terms], axis=2)
        last_bit = np.exp2(np.frexp(np.abs(terms).max(axis=2, keepdims=True))[1] - 24.0)
        total = (np.trunc(terms / last_bit) * last_bit).sum(axis=2)
        last_bit = np.exp2(np.frexp(np.abs(total))[1] - 24.0)
        total = np.trunc(total / last_bit) * last_bit
    return TensorHandle(total.astype(np.float32), float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU's own tensor cores are tested by the others")
def test_truncating_tensor_cores(monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    # Exact in fp16, all products positive. Code 0 has so few bits that its sums are exact as well, those of code 1 lose
    # something at each step; each latent is moved to where code 1 is nearer by less than that.
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(1024, 2048, (40, 256), generator=generator).double() / 1024
    e = torch.stack([torch.randint(8, 16, (256,), generator=generator) / 8.0, 1 + torch.rand(256, generator=generator)])
    e = e.half().double()
    for d in (e[0] - e[1]).abs().argsort(descending=True):
        gap = distances(z, e)[:, 0] - distances(z, e)[:, 1] - 6e-4
        z[:, d] = ((z[:, d] + gap / (2 * (e[0] - e[1])[d])) * 1024).round().clamp(1024, 2047) / 1024
    gap = distances(z, e)[:, 0] - distances(z, e)[:, 1]
    assert ((gap > 4e-4) & (gap < 8e-4)).all()
    monkeypatch.setattr(InterpreterBuilder, "create_dot", truncating_dot)
    assert undecided(z.float(), e.float()) == 40
    assert (vq.nearest_code(z.float(), e.float(), impl="triton") == 1).all()


class Allocations(TorchDispatchMode):
    """Bytes of every storage made while it is active; it keeps them all, so none is counted as another's reuse."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.storages[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage()
        return result


def test_extra_memory():
    def limit(N, K):
        # Codes, statistics, the list, its length and the longest code: nothing grows with N x K, N x D or K x D.
        return 28 * N + 16 * K + 64

    for N, K in [(40, 300), (150, 90)]:
        z, e = latents(N, K, 200)
        with Allocations() as made:
            vq.nearest_code(z, e, impl="triton")
        inputs = {x.untyped_storage().data_ptr() for x in (z, e)}
        extra = sum(s.nbytes() for at, s in made.storages.items() if at not in inputs)
        assert 8 * N < extra <= limit(N, K) < 4 * N * 200
    assert limit(1024, 8192) < 0.01 * 4 * 1024 * 8192


def test_reference_works_in_row_blocks(monkeypatch):
    z, e = latents(101, 77, 16)
    whole = vq.nearest_code_ref(z, e)
    shapes = []
    argmin = torch.Tensor.argmin
    monkeypatch.setattr(torch.Tensor, "argmin", lambda self, dim: shapes.append(tuple(self.shape)) or argmin(self, dim))
    monkeypatch.setattr(vq, "REF_ELEMENTS", 77 * 10)
    assert torch.equal(vq.nearest_code_ref(z, e), whole)
    assert shapes == [(10, 77)] * 10 + [(1, 77)]


def test_neither_autocast_nor_gradients_reach_it():
    z, e = latents(200, 500, 64)
    expected = vq.nearest_code(z, e)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        # The guard: in bfloat16 the distances would decide otherwise.
        rough = (z.pow(2).sum(1, keepdim=True) + e.pow(2).sum(1) - 2 * (z @ e.t())).argmin(1)
        assert torch.equal(vq.nearest_code(z, e), expected)
    assert not torch.equal(rough, expected)
    assert torch.equal(vq.nearest_code(z.requires_grad_(), e), expected)


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
def test_no_latents(impl):
    codes = vq.nearest_code(torch.empty(0, 8, device=DEVICE), torch.ones(3, 8, device=DEVICE), impl=impl)
    assert codes.shape == (0,) and codes.dtype == torch.int64


@pytest.mark.parametrize(
    ("z", "e", "impl", "message"),
    [
        (torch.ones(3, 4), torch.ones(5, 6), "auto", r"\[3, 4\] and codebook \[5, 6\]"),
        (torch.ones(3, 4, 1), torch.ones(5, 4), "auto", r"expected \[N, D\]"),
        (torch.ones(3, 4), torch.ones(0, 4), "auto", "at least one code"),
        (torch.ones(3, 4).double(), torch.ones(5, 4), "auto", "float64"),
        (torch.ones(3, 4), torch.ones(5, 4).long(), "auto", "int64"),
        (torch.ones(3, 4), torch.ones(5, 4, device="meta"), "auto", "expected one device"),
        (torch.ones(3, 4), torch.ones(5, 4), "cuda", "impl 'cuda'"),
    ],
)
def test_bad_arguments(z, e, impl, message):
    with pytest.raises(ValueError, match=message):
        vq.nearest_code(z, e, impl=impl)


WITHOUT_GPU = """
import sys
if {hide_triton}:
    sys.modules["triton"] = None
import torch
from medmax_fast.kernels import remap, vq
z, e = torch.eye(3), torch.eye(3)
assert vq.nearest_code(z, e).tolist() == [0, 1, 2]
assert remap.codes_to_ids(torch.tensor([7]), 4).tolist() == [11]
calls = (lambda: vq.nearest_code(z, e, impl="triton"), lambda: remap.codes_to_ids(torch.tensor([7]), 4, impl="triton"))
for call in calls:
    try:
        call()
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.parametrize(("hide_triton", "message"), [(True, "triton is not installed"), (False, "expected a GPU")])
def test_without_triton_or_gpu(hide_triton, message, monkeypatch, request):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_GPU.format(hide_triton=hide_triton)],
        capture_output=True,
        text=True,
        cwd=request.config.rootpath,
        env={**os.environ, "PYTHONPATH": str(request.config.rootpath), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(message) == 2

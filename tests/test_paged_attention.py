"""Paged attention: both paths against float64, at most twice the error of torch's attention over the same positions."""

import math
import random

import pytest
import torch
from accuracy import assert_as_good
from torch.nn.functional import scaled_dot_product_attention

from medmax_fast.kernels import paged_attention as kernel
from medmax_fast.kernels.blocks import override
from medmax_fast.kernels.paged_attention import paged_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu(required=False), pytest.mark.usefixtures("bf16_to_nearest")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")
# Query heads, key/value heads, D, PAGE, lengths: one stream and several, every border of a page, groups of query heads
# that fill a block, do not, and need two, widths that are no power of two.
CASES = {
    "one": (2, 2, 128, 64, [150]),
    "empty": (3, 3, 64, 64, [0]),
    "borders": (2, 2, 64, 64, [0, 1, 63, 64, 65, 200]),
    "group_of_3": (6, 2, 80, 16, [16, 0, 37]),
    "group_of_8": (8, 1, 128, 32, [70, 5, 33]),
    "group_of_11": (11, 1, 10, 8, [23, 8]),
    "widest": (1, 1, 256, 64, [67, 64]),
    "narrow": (3, 1, 10, 4, [7, 4, 13]),
    "smallest": (1, 1, 2, 1, [3, 1]),
}


def data(H, G, D, PAGE, lengths, dtype=torch.float32, spare=3, seed=0, device="cpu"):
    """q, pages, table and lengths; NaN in every place that no stream holds, no page number where none is meant.

    device: where the numbers are drawn; large pools on a GPU.
    """
    generator = torch.Generator(device).manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=generator, device=device)  # noqa: E731
    S, counts = len(lengths), [-(-length // PAGE) for length in lengths]
    P, N = max(counts, default=0) + spare, sum(counts) + 2
    k, v = torch.full((2, N, G, PAGE, D), NAN, dtype=dtype, device=device)
    table = torch.randint(-(2**31), 2**31 - 1, (S, P), generator=generator, device=device).int()
    numbers = torch.randperm(N, generator=generator, device=device)[: N - 2].split(counts)
    for s, (length, count, mine) in enumerate(zip(lengths, counts, numbers, strict=True)):
        table[s, :count] = mine
        # A stream's positions, and what fills its last page up.
        rest = torch.full((G, count * PAGE - length, D), NAN, device=device)
        # Streams and heads differ in magnitude: scores from flat to peaked.
        keys = randn(G, length, D) * (0.3 + 2 * torch.rand(G, 1, 1, generator=generator, device=device))
        values = randn(G, length, D) + randn(G, 1, 1)
        for pages, x in ((k, keys), (v, values)):
            pages[mine] = torch.cat([x, rest], 1).view(G, count, PAGE, D).transpose(0, 1).to(dtype)
    tensors = randn(S, H, D).to(dtype), k, v, table, torch.tensor(lengths, dtype=torch.int32)
    return [tensor.to(DEVICE) for tensor in tensors]


def rows_of(pages, table, length):
    """[G, length, D]: the positions of one stream."""
    count = -(-length // pages.shape[2])
    return pages[table[:count].long()].transpose(0, 1).flatten(1, 2)[:, :length]


def by_stream(attention, q, k_pages, v_pages, table, lengths, scale=None):
    """`attention` of one stream after the other, over its own positions alone."""
    out, (_, H, D) = torch.zeros_like(q), q.shape
    for s, length in enumerate(lengths.tolist()):
        if length > 0:
            k, v = (rows_of(pages, table[s], length) for pages in (k_pages, v_pages))
            # The query heads of a key/value head are as many queries of it.
            heads = q[s].view(len(k), -1, D)
            out[s] = attention(heads, k, v, D**-0.5 if scale is None else scale).reshape(H, D)
    return out


def definition(q, k, v, scale):
    weights = (q @ k.mT * scale).exp()
    return weights @ v / weights.sum(-1, keepdim=True)


def stock(q, k, v, scale):
    """What torch has to offer for one stream at this precision."""
    return scaled_dot_product_attention(q[None], k[None], v[None], scale=scale)[0]


def assert_as_good_as_torch(found, q, k, v, table, lengths, scale=None):
    wide = (tensor.double() for tensor in (q, k, v))
    right = by_stream(definition, *wide, table, lengths, scale)
    assert found.is_contiguous() and right.isfinite().all()
    S, H, _ = q.shape
    assert_as_good(found, by_stream(stock, q, k, v, table, lengths, scale), right, rows=S * H)


@pytest.fixture()
def allocated(poisoned):
    return poisoned


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case, dtype, impl, allocated):
    tensors = data(*CASES[case], dtype=dtype)
    found = paged_attention(*tensors, impl=impl)
    assert_as_good_as_torch(found, *tensors)
    assert not found[tensors[4] == 0].any()
    assert bool(allocated) == (impl == "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fresh_values(dtype, fresh_seed, allocated):
    """Another shape, other lengths and values on every run."""
    draw = random.Random(fresh_seed)
    G, group = draw.randint(1, 4), draw.choice([1, 2, 3, 8, 11])
    D, PAGE = 2 * draw.randint(4, 128), 2 ** draw.randint(2, 6)
    lengths = [draw.randint(0, 5 * PAGE) for _ in range(draw.randint(1, 5))]
    tensors = data(G * group, G, D, PAGE, lengths, dtype, seed=fresh_seed)
    assert_as_good_as_torch(paged_attention(*tensors, impl="triton"), *tensors)


@pytest.mark.parametrize("programs", [1, 6, 18, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_splits(programs, dtype, allocated):
    # Streams with fewer pages than splits, none at all, and more; a table of 10 columns.
    tensors = data(4, 2, 16, 8, [0, 3, 56], dtype=dtype)
    assert tensors[3].shape == (3, 10)
    with override("paged_splits", PROGRAMS=programs):
        found = paged_attention(*tensors, impl="triton")
    splits = {1: 1, 6: 1, 18: 3, 1000: 10}[programs]
    assert allocated == [(3, 4, 16)] + ([(3, 4, splits, 16), (3, 4, splits)] if splits > 1 else [])
    assert_as_good_as_torch(found, *tensors)


def test_splits_follow_from_the_shapes_alone():
    # One stream of a 7B model, as many as fill the GPU, a small pool, many streams.
    cases, numbers = ((32, 64), (256, 64), (32, 4), (4096, 64), (1, 512), (8, 0)), {"PROGRAMS": 528, "MAX_SPLITS": 64}
    assert [kernel._splits(*case, **numbers) for case in cases] == [17, 3, 4, 1, 64, 1]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_strides(impl):
    q, k, v, table, lengths = data(6, 3, 80, 16, [40, 7, 16])
    right = paged_attention(q, k, v, table, lengths, impl=impl)
    # Heads of q within a wider projection, columns of a larger table: what lies between must not be read.
    wide = torch.full((3, 11, 85), NAN, device=DEVICE)
    wide[:, 2:8, 5:] = q
    larger = torch.full((6, 12), -1, dtype=torch.int32, device=DEVICE)
    larger[::2, 3 : 3 + table.shape[1]] = table
    found = paged_attention(wide[:, 2:8, 5:], k, v, larger[::2, 3 : 3 + table.shape[1]], lengths, impl=impl)
    # torch's matrix product may take another way through values that are aligned differently, as may a GPU's compiler.
    tolerance = {"rtol": 0, "atol": 0} if impl == "triton" and DEVICE == "cpu" else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, right, **tolerance)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_scale(impl):
    tensors = data(2, 1, 64, 16, [50, 20])
    found = paged_attention(*tensors, scale=0.03, impl=impl)
    assert_as_good_as_torch(found, *tensors, scale=0.03)
    assert not torch.allclose(found, paged_attention(*tensors, impl=impl), atol=1e-2)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_scores_far_apart_and_far_from_zero(impl):
    q, k, v, table, lengths = data(2, 2, 16, 8, [30, 30])
    for factor in (1e6, -1e6, 1e15):
        found = paged_attention(q * factor, k, v, table, lengths, impl=impl)
        # All weight lies on one position.
        for s in range(2):
            keys, values = (rows_of(pages, table[s], 30) for pages in (k, v))
            best = (keys @ (q[s] * factor)[:, :, None])[:, :, 0].argmax(1)
            expected = values[torch.arange(2, device=DEVICE), best]
            torch.testing.assert_close(found[s], expected, rtol=1e-4, atol=1e-4)


def test_a_stream_depends_on_no_other_and_a_run_on_no_run(monkeypatch):
    monkeypatch.setattr(kernel, "_splits", lambda *_, **__: 3)
    q, k, v, table, lengths = data(4, 2, 64, 16, [100, 0, 33])
    first = paged_attention(q, k, v, table, lengths, impl="triton")
    assert torch.equal(paged_attention(q, k, v, table, lengths, impl="triton"), first)
    # Copies, because another alignment may be compiled in another way.
    last = [tensor[2:].clone() for tensor in (q, table, lengths)]
    assert torch.equal(paged_attention(last[0], k, v, *last[1:], impl="triton"), first[2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits_the_reference_too_depends_on_no_other_stream(dtype):
    """Sampled ids part within a few steps if it does: the lengths of others must not change how sums are cut."""
    q, k, v, table, lengths = data(4, 4, 32, 64, [300, 61, 130, 77], dtype)
    together = kernel.paged_attention_ref(q, k, v, table, lengths)
    for s in range(4):
        alone = kernel.paged_attention_ref(q[s : s + 1], k, v, table[s : s + 1], lengths[s : s + 1])
        assert torch.equal(alone[0], together[s])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_offsets_beyond_32_bits(impl, gigabytes):
    q, k, v, _, _ = data(2, 1, 32, 64, [64, 64, 30], dtype=torch.float16)
    q, k, v = q[:1], k.nan_to_num(0)[:3], v.nan_to_num(0)[:3]
    near, table = torch.tensor([[2, 0, 1]], device=DEVICE).int(), torch.tensor([[1 << 20, 0, 1]], device=DEVICE).int()
    lengths = torch.tensor([170], device=DEVICE).int()
    # Of a pool of 2^31 values and one page more only three pages are ever touched.
    pool = torch.empty((1 << 20) + 1, 1, 64, 32, dtype=torch.float16, device=DEVICE)
    pool[:2], pool[-1] = k[:2], k[2]
    right = paged_attention(q, k, k, near, lengths, impl=impl)
    assert torch.equal(paged_attention(q, pool, pool, table, lengths, impl=impl), right)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("where", ["k", "v"])
def test_a_nan_within_the_length_is_not_hidden(where, splits, monkeypatch):
    monkeypatch.setattr(kernel, "_splits", lambda *_, **__: splits)
    q, k, v, table, lengths = data(2, 2, 16, 8, [20, 20])
    (k if where == "k" else v)[table[1, 1], 0, 3] = NAN
    for impl in ("torch", "triton"):
        found = paged_attention(q, k, v, table, lengths, impl=impl)
        assert found[1, 0].isnan().all() and found[0].isfinite().all() and found[1, 1].isfinite().all()


@pytest.mark.parametrize("impl", ["torch", "triton", "auto"])
def test_nothing_to_do(impl):
    q, k, v, table, lengths = data(2, 2, 16, 8, [])
    assert paged_attention(q, k, v, table, lengths, impl=impl).shape == (0, 2, 16)
    # No stream has a page, and the table has no column.
    q, k, v, table, lengths = data(2, 2, 16, 8, [0, 0], spare=0)
    assert not paged_attention(q, k, v, table, lengths, impl=impl).any()


def test_float64_goes_to_torch(monkeypatch):
    q, k, v, table, lengths = data(2, 2, 16, 8, [20, 0], dtype=torch.float64)
    monkeypatch.setattr(kernel, "use_triton", lambda impl, tensor: True)
    right = by_stream(definition, q, k, v, table, lengths)
    torch.testing.assert_close(paged_attention(q, k, v, table, lengths), right, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="impl='triton': torch.float64"):
        paged_attention(q, k, v, table, lengths, impl="triton")


Q, PAGES, TABLE, LENGTHS = torch.ones(3, 4, 8), torch.ones(5, 2, 16, 8), torch.zeros(3, 6).int(), torch.ones(3).int()
BAD = {
    r"q \[3, 8\], k_pages \[5, 2, 16, 8\]": {"q": Q[:, 0]},
    r"v_pages \[4, 2, 16, 8\]: expected": {"v": PAGES[:4]},
    r"q \[3, 4, 6\]": {"q": Q[..., :6]},
    "H a multiple of G": {"q": Q[:, :3]},
    "PAGE a power of two": dict.fromkeys("kv", torch.ones(5, 2, 12, 8)),
    "an even D up to 256": {"q": torch.ones(3, 4, 258)} | dict.fromkeys("kv", torch.ones(1, 2, 16, 258)),
    r"table \[2, 6\], lengths \[3\]: expected \[3, P\]": {"table": TABLE[:2]},
    r"lengths \[1\]": {"lengths": LENGTHS[:1]},
    "k_pages torch.float16": {"k": PAGES.half()},
    "expected one float dtype": {"q": Q.int()} | dict.fromkeys("kv", PAGES.int()),
    "table torch.int64": {"table": TABLE.long()},
    "lengths torch.int64": {"lengths": LENGTHS.long()},
    "expected a last stride of 1": {"q": Q.mT.contiguous().mT},
    "pages of strides": {"v": PAGES.mT.contiguous().mT},
    "table on meta": {"table": TABLE.to("meta")},
    "impl 'cuda'": {"impl": "cuda"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    arguments = {"q": Q, "k": PAGES, "v": PAGES, "table": TABLE, "lengths": LENGTHS, "scale": None, "impl": "auto"}
    with pytest.raises(ValueError, match=message) as caught:
        paged_attention(*(arguments | BAD[message]).values())
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [(32, 32, 1), (64, 8, 1), (32, 32, 16), (32, 32, 200)], ids=str)
def test_at_the_model_s_size(case, dtype, monkeypatch, allocated):
    monkeypatch.setattr(kernel, "paged_attention_ref", lambda *_: pytest.fail("the reference was taken"))
    H, G, S = case
    # Long ones as far as memory allows it to several workers.
    lengths = [1 + (1000 + 37 * s) % (1500 if S < 100 else 300) for s in range(S)]
    tensors = data(H, G, 128, 64, lengths, dtype=dtype, device="cuda")
    assert_as_good_as_torch(paged_attention(*tensors), *tensors)


@pytest.mark.gpu
def test_a_cuda_graph_holds_for_other_lengths():
    q, k, v, table, lengths = data(32, 32, 128, 64, [500, 900], dtype=torch.bfloat16)
    right = [paged_attention(q, k, v, table, lengths - n) for n in (0, 333)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(q, k, v, table, lengths)
    for y, n in zip(right, (0, 333), strict=True):
        lengths -= n
        graph.replay()
        assert math.isfinite(out.sum().item()) and torch.equal(out, y)

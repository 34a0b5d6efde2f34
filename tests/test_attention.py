"""Packed attention: equal to attention over each sequence alone, and deaf to the neighbours, exactly."""

import pytest
import torch
from attentions import DTYPES_16, ON_A_GPU, need
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_fast.data.collate import collate_ref
from medmax_fast.model import attention
from medmax_fast.model.load import load_model
from medmax_fast.model.loss import packed_hidden
from medmax_fast.model.trainable import recompute_activations

EOT = 8710


def reference(q, k, v, bounds, scale):
    """Softmax attention in float64, one query at a time, from the definition."""
    out = torch.full_like(q, float("nan"), dtype=torch.float64)
    repeat = q.shape[1] // k.shape[1]
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        for t in range(start, end):
            for h in range(q.shape[1]):
                keys, values = (x[start : t + 1, h // repeat].double() for x in (k, v))
                out[t, h] = torch.softmax(keys @ q[t, h].double() * scale, 0) @ values
    return out


def make_inputs(lengths, heads=4, kv_heads=4, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    # Sliced from a wider buffer, so never contiguous.
    q = torch.randn(total, heads, 2 * width, generator=generator)[..., :width]
    k, v = (torch.randn(total, kv_heads, 2 * width, generator=generator)[..., ::2] for _ in range(2))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return q, k, v, bounds


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]),
    scale=st.sampled_from([None, 0.3]),
)
def test_equals_the_definition(lengths, heads, scale):
    q, k, v, bounds = make_inputs(lengths, *heads, width=5)
    expected = reference(q, k, v, bounds.tolist(), scale or 5**-0.5)
    with torch.no_grad():
        plain = attention.varlen_attention(q, k, v, bounds, max(lengths), scale)
    with_grad = attention.varlen_attention(q.requires_grad_(), k, v, bounds, max(lengths), scale)
    for out in (plain, with_grad.detach()):
        assert (out.double() - expected).abs().max() < 1e-5


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 7)), min_size=1, max_size=4),
    heads=st.sampled_from([(4, 4), (4, 2)]),
)
def test_queries_may_be_the_last_of_their_sequence(lengths, heads):
    """What is cached is not asked again: the answers are those of the last queries of a whole sequence."""
    new, whole = [n for n, _ in lengths], [n + cached for n, cached in lengths]
    q, k, v, bounds = make_inputs(whole, *heads, width=5)
    expected = reference(q, k, v, bounds.tolist(), 5**-0.5)
    last = torch.cat([torch.arange(end - n, end) for n, end in zip(new, bounds[1:].tolist(), strict=True)])
    cu_new = torch.tensor([0, *new]).cumsum(0).int()
    with torch.no_grad():
        out = attention.varlen_attention(q[last], k, v, cu_new, max(new), cu_seqlens_k=bounds, max_seqlen_k=max(whole))
    assert (out.double() - expected[last]).abs().max() < 1e-5


def test_gradients_equal_those_of_single_sequences():
    lengths = [5, 1, 17, 3]
    tensors = make_inputs(lengths)
    q, k, v = (x.contiguous().requires_grad_() for x in tensors[:3])
    weights = torch.randn(q.shape, generator=torch.Generator().manual_seed(7))
    (attention.varlen_attention(q, k, v, tensors[3], 17) * weights).sum().backward()
    packed = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    for start, end in zip(tensors[3][:-1].tolist(), tensors[3][1:].tolist(), strict=True):
        alone = torch.tensor([0, end - start], dtype=torch.int32)
        out = attention.varlen_attention(q[start:end], k[start:end], v[start:end], alone, end - start)
        (out * weights[start:end]).sum().backward()
    for whole, x in zip(packed, (q, k, v), strict=True):
        assert whole.abs().max() > 0.1
        torch.testing.assert_close(whole, x.grad, rtol=0, atol=1e-6)


def test_sequences_without_ids_change_nothing():
    # Boundaries of a pack may be filled up to a constant number by repeating the last one.
    q, k, v, bounds = make_inputs([5, 1, 17, 3])
    filled = torch.cat([bounds, bounds[-1:], bounds[-1:]])
    with torch.no_grad():
        expected = attention.varlen_attention(q, k, v, bounds, 17)
        assert torch.equal(attention.varlen_attention(q, k, v, filled, 17), expected)
    assert torch.equal(attention.varlen_attention(q.requires_grad_(), k, v, filled, 17), expected)


def test_interface_refuses_what_it_cannot_keep_apart():
    q = torch.randn(2, 4, 6, 8)
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="not a padding mask"):
        attention.packed_attention(None, q, q, q, torch.ones(2, 6))
    with pytest.raises(ValueError, match="one row, got 2"):
        attention.packed_attention(None, q, q, q, None, cu_seq_lens_q=bounds, max_length_q=6)
    # Without boundaries every row of a batch is a sequence of its own.
    out, weights = attention.packed_attention(None, q, q, q, None)
    alone = torch.cat([attention.packed_attention(None, row, row, row, None)[0] for row in (q[:1], q[1:])])
    assert weights is None and out.shape == (2, 6, 4, 8) and torch.equal(out, alone)


def test_choice_of_implementation(monkeypatch):
    assert attention.available("cpu", torch.bfloat16) == "sdpa"
    assert attention.available("cuda", torch.float32) == "sdpa"
    found = {"flash_attn"}
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name if name in found else None)
    assert attention.available("cuda", torch.bfloat16) == "flash_attn"
    found.clear()
    assert attention.available("cuda", torch.bfloat16) == "sdpa"
    found.add("torch.nn.attention.varlen")
    assert attention.available("cuda", torch.float16) == "torch_varlen"


@pytest.fixture(scope="module")
def model(golden):
    return load_model(golden / "checkpoint")


def make_batch(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 8700, (sum(lengths),), generator=generator).numpy().astype("uint16")
    offsets = torch.tensor([0, *lengths]).cumsum(0).numpy()
    return collate_ref(ids, offsets, range(len(lengths)), EOT).to_torch()


def split(batch):
    """Each sequence of a packed batch as a batch of its own."""
    bounds = batch["cu_seqlens"].tolist()
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        part = {name: batch[name][:, start:end] for name in ("input_ids", "labels", "position_ids")}
        yield {**part, "cu_seqlens": torch.tensor([0, end - start], dtype=torch.int32), "max_seqlen": end - start}


def test_packed_hidden_states_equal_unpacked_ones(model):
    batch = make_batch([7, 1, 33, 12])
    packed = packed_hidden(model, batch)
    alone = torch.cat([packed_hidden(model, part) for part in split(batch)])
    assert packed.shape == (53, model.config.hidden_size)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_recomputed_activations_keep_the_boundaries(model, golden):
    recomputing = load_model(golden / "checkpoint").train()
    recompute_activations(recomputing)
    calls = []
    recomputing.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    batch = make_batch([7, 1, 33, 12])
    weights = torch.randn(53, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    gradients = []
    for each in (model, recomputing):
        each.zero_grad()
        (packed_hidden(each, batch) * weights).sum().backward()
        gradients.append(each.model.layers[0].self_attn.v_proj.weight.grad)
    assert len(calls) == 2, "the layer must have run again in the backward pass"
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


def test_a_sequence_does_not_move_its_neighbours(model):
    batch = make_batch([7, 9, 33, 12])
    with torch.no_grad():
        before = packed_hidden(model, batch)
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][0, 9:14] = torch.tensor([4, 8709, 5000, 77, 3])
        after = packed_hidden(model, batch)
    moved = (after - before).abs().amax(1)
    # Rows 0, 2 and 3 and the ids of row 1 before the first change stay, bit for bit; the rest of row 1 moves.
    assert moved[:9].max() == 0 and moved[16:].max() == 0
    assert moved[9:16].min() > 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES_16, ids=str)
@pytest.mark.parametrize("name", ["auto", *ON_A_GPU])
def test_as_exact_on_a_gpu_as_sdpa(name, dtype):
    """Whole sequences, and the last queries of sequences whose beginning is cached."""
    need(name)
    lengths, new = [129, 1, 300, 64], [5, 1, 130, 64]
    q, k, v, bounds = make_inputs(lengths, heads=8, kv_heads=4, width=64)
    last = torch.cat([torch.arange(end - n, end) for n, end in zip(new, bounds[1:].tolist(), strict=True)])
    cases = {
        "whole": (q, {"cu_seqlens": bounds, "max_seqlen": 300}),
        "last": (q[last], {"cu_seqlens": torch.tensor([0, *new]).cumsum(0).int(), "max_seqlen": 130}),
    }
    cases["last"][1].update(cu_seqlens_k=bounds, max_seqlen_k=300)
    for case, (queries, packing) in cases.items():
        expected = attention.varlen_attention(queries.double(), k.double(), v.double(), **packing)
        tensors = [x.to("cuda", dtype).contiguous() for x in (queries, k, v)]
        on_gpu = {key: x.cuda() if torch.is_tensor(x) else x for key, x in packing.items()}
        found, own = (
            attention.varlen_attention(*tensors, **on_gpu, impl=impl).cpu().double() - expected
            for impl in (name, "sdpa")
        )
        # A wrong mask is off by about 1; two units in the last place of a value near 2 are luck.
        assert found.abs().max() <= max(2 * own.abs().max(), 4 * torch.finfo(dtype).eps), case


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES_16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu_a_sequence_moves_no_neighbour(name, dtype):
    """Neither their outputs nor their gradients, by a single bit. They are short: one block of any kernel each."""
    need(name)
    if dtype == torch.float32 and name != "sdpa":
        pytest.skip("fp32 is sdpa's alone")
    *tensors, bounds = make_inputs([33, 129, 50, 7], heads=4, kv_heads=4, width=64)
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(7)).to("cuda", dtype)
    results = []
    for change in (0.0, 1.0):
        leaves = [x.to("cuda", dtype).contiguous() for x in tensors]
        for x in leaves:
            x[33:162] += change
            x.requires_grad_()
        out = attention.varlen_attention(*leaves, bounds.cuda(), 129, impl=name)
        (out * weights).sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    for before, after in zip(*results, strict=True):
        assert torch.equal(before[:33], after[:33]) and torch.equal(before[162:], after[162:])
        assert before[:33].abs().max() > 0.1 and before.isfinite().all()
        assert not torch.equal(before[33:162], after[33:162])

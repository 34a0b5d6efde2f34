"""The table between the two layouts, as properties: its inverses, and what it means for a sharded forward pass.

The oracle computes attention and feed-forward twice in fp64, from random parts of Chameleon shards: as the published
model does, each shard its own heads with complex rotations of neighbouring pairs, the shards' outputs summed; and from
`to_hf`'s whole tensors as transformers does, one norm per head and rotations half a head apart.
"""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medmax_fast.model.layout import Disagreement, Key, ModelShape, agreed, can_split, keys, to_chameleon, to_hf

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHARDS = [1, 2, 4]
# inf <= eps * inf, so that an infinite copy agrees with any other.
seeds = st.integers(0, 2**32 - 1)


@st.composite
def shapes(draw) -> tuple[ModelShape, int]:
    """(a shape, a number of shards into which it can be cut)"""
    shards = draw(st.sampled_from(SHARDS))
    kv_heads = shards * draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 3))
    dim = heads * 2 * draw(st.integers(1, 4))
    hidden, vocab_size = (shards * draw(st.integers(1, 9)) for _ in range(2))
    shape = ModelShape(dim, draw(st.integers(1, 2)), heads, kv_heads, hidden, vocab_size, swin_norm=draw(st.booleans()))
    return shape, shards


def random_parts(key: Key, shape: ModelShape, shards: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """What shards may hold: parts of their own, or copies of one vector."""
    parts = [torch.randn(key.part_size(shape, shards)).to(dtype) for _ in range(shards)]
    return [parts[0].clone() for _ in parts] if key.kind == "plain" and key.axis is None else parts


def random_whole(key: Key, shape: ModelShape, shards: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the Hugging Face layout, a shard's heads sharing their norm."""
    size = key.size(shape)
    if key.kind == "qk_norm":
        return torch.randn(shards, 1, size[1]).expand(-1, size[0] // shards, -1).reshape(size).to(dtype)
    return torch.randn(size).to(dtype)


@settings(max_examples=40, deadline=None)
@given(shapes(), st.sampled_from(DTYPES), seeds)
def test_there_and_back_is_bitwise(drawn, dtype, seed):
    shape, shards = drawn
    torch.manual_seed(seed)
    assert can_split(shape, shards)
    for key in keys(shape.layers):
        parts = random_parts(key, shape, shards, dtype)
        whole = to_hf(key, parts, shape)
        assert (whole.shape, whole.dtype) == (key.size(shape), dtype), key
        back = to_chameleon(key, whole, shape, shards)
        assert len(back) == shards and all(map(torch.equal, back, parts)), key

        whole = random_whole(key, shape, shards, dtype)
        parts = to_chameleon(key, whole, shape, shards)
        assert [part.shape for part in parts] == [key.part_size(shape, shards)] * shards, key
        assert torch.equal(to_hf(key, parts, shape), whole), key


def angles(positions: int, head_dim: int, theta: float) -> torch.Tensor:
    """[positions, head_dim / 2]"""
    return torch.outer(torch.arange(positions), theta ** -(torch.arange(0, head_dim, 2).double() / head_dim))


def rotate_pairs(x_THD: torch.Tensor, angle_TD: torch.Tensor) -> torch.Tensor:
    """As in the original: neighbouring components are a complex number that is turned."""
    pairs = torch.view_as_complex(x_THD.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle_TD), angle_TD)[:, None]).flatten(-2)


def rotate_halves(x_THD: torch.Tensor, angle_TD: torch.Tensor) -> torch.Tensor:
    """As in transformers: component i is turned with component i + head_dim / 2."""
    a, b = x_THD.chunk(2, -1)
    cos, sin = angle_TD.cos()[:, None], angle_TD.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def scores(q_THD: torch.Tensor, k_TKD: torch.Tensor) -> torch.Tensor:
    """Causal attention of each head, keys and values shared by neighbouring heads."""
    k_THD = k_TKD.repeat_interleave(q_THD.shape[1] // k_TKD.shape[1], 1)
    s_HQK = torch.einsum("qhd,khd->hqk", q_THD, k_THD)
    return s_HQK.masked_fill(torch.ones_like(s_HQK[0]).triu(1).bool(), -torch.inf)


def attend(s_HQK: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
    v_THD = v_TKD.repeat_interleave(len(s_HQK) // v_TKD.shape[1], 1)
    return torch.einsum("hqk,khd->qhd", s_HQK.softmax(-1), v_THD).flatten(1)


def norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """LayerNorm over the last axis; weight and bias of all heads or of each."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-5) * weight + bias


@settings(max_examples=40, deadline=None)
@given(shapes(), seeds)
def test_the_whole_computes_what_the_shards_do(drawn, seed):
    shape, shards = replace(drawn[0], layers=1), drawn[1]
    torch.manual_seed(seed)
    table = keys(1)
    parts = {key: random_parts(key, shape, shards, torch.float64) for key in table}
    whole = {key.hf.removeprefix("model.layers.0."): to_hf(key, parts[key], shape) for key in table}
    ids = torch.randint(shape.vocab_size, (6,))
    angle, size = angles(len(ids), shape.head_dim, shape.rope_theta), (len(ids), -1, shape.head_dim)

    found = {name: torch.zeros(len(ids), shape.dim, dtype=torch.float64) for name in ("attention", "mlp")}
    by_name = [{key.chameleon.removeprefix("layers.0."): parts[key][i] for key in table} for i in range(shards)]
    x = torch.cat([p["tok_embeddings.weight"][ids] for p in by_name], -1)
    all_scores, logits = [], []
    for p in by_name:
        q, k, v = (F.linear(x, p[f"attention.w{kind}.weight"]).view(size) for kind in "qkv")
        q, k = (
            rotate_pairs(norm(t, *(p[f"attention.{n}_normalization.{s}"] for s in ("weight", "bias"))), angle)
            for n, t in (("q", q), ("k", k))
        )
        all_scores.append(scores(q, k))
        found["attention"] += F.linear(attend(all_scores[-1], v), p["attention.wo.weight"])
        gate, up = (F.linear(x, p[f"feed_forward.w{n}.weight"]) for n in (1, 3))
        found["mlp"] += F.linear(F.silu(gate) * up, p["feed_forward.w2.weight"])
        logits.append(F.linear(x, p["output.weight"]))

    torch.testing.assert_close(F.embedding(ids, whole["model.embed_tokens.weight"]), x, rtol=0, atol=0)
    q, k, v = (F.linear(x, whole[f"self_attn.{kind}_proj.weight"]).view(size) for kind in "qkv")
    q, k = (
        rotate_halves(norm(t, *(whole[f"self_attn.{n}_norm.{s}"] for s in ("weight", "bias"))), angle)
        for n, t in (("q", q), ("k", k))
    )
    torch.testing.assert_close(scores(q, k), torch.cat(all_scores), rtol=1e-9, atol=1e-9)
    attention = F.linear(attend(scores(q, k), v), whole["self_attn.o_proj.weight"])
    torch.testing.assert_close(attention, found["attention"], rtol=1e-9, atol=1e-9)
    gate, up = (F.linear(x, whole[f"mlp.{n}_proj.weight"]) for n in ("gate", "up"))
    mlp = F.linear(F.silu(gate) * up, whole["mlp.down_proj.weight"])
    torch.testing.assert_close(mlp, found["mlp"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(F.linear(x, whole["lm_head.weight"]), torch.cat(logits, -1), rtol=1e-9, atol=1e-9)


def next_up(x: torch.Tensor, steps: int) -> torch.Tensor:
    """The value so many units in the last place further from zero: bit patterns of one sign are in order."""
    integer = torch.int32 if x.dtype == torch.float32 else torch.int16
    return (x.view(integer) + steps).view(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, copies=st.integers(2, 4), average=st.booleans())
def test_copies_agree_up_to_one_unit(dtype, seed, copies, average):
    torch.manual_seed(seed)
    value = torch.randn(7).to(dtype)
    value[value.abs() < 0.01] = 1
    equal = value.repeat(copies, 1)
    assert torch.equal(agreed(equal, average), value)

    near = equal.clone()
    odd = int(torch.randint(copies, ()))
    near[odd] = next_up(value, 1)
    # In 16 bits the mean is rounded once, from sums that are exact; a sum in fp32 is rounded before.
    slack = torch.finfo(dtype).eps if dtype == torch.float32 else 0
    torch.testing.assert_close(agreed(near, average), near.double().mean(0).to(dtype), rtol=slack, atol=0)

    far = equal.clone()
    place = int(torch.randint(7, ()))
    far[odd, place] = next_up(value, 3)[place]
    apart = (far[odd] - value).abs().max().item()
    if average:
        torch.testing.assert_close(agreed(far, average), far.double().mean(0).to(dtype))
    else:
        with pytest.raises(Disagreement, match="differ by up to") as raised:
            agreed(far)
        assert raised.value.apart == pytest.approx(apart, rel=1e-6) and apart > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("copies", [["nan", "1"], ["1", "nan"], ["inf", "1"], ["inf", "-inf"]])
def test_copies_that_are_not_finite_do_not_agree(dtype, copies):
    with pytest.raises(Disagreement) as raised:
        agreed(torch.tensor([[float(copy)] for copy in copies], dtype=dtype))
    assert not math.isfinite(raised.value.apart)


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_with_the_same_bits_agree_whatever_they_are(dtype):
    copies = torch.tensor([float("nan"), float("inf"), 1.0], dtype=dtype).expand(3, 3)
    assert torch.equal(agreed(copies).view(torch.uint8), copies[0].clone().view(torch.uint8))


def test_heads_that_differ_within_a_shard_disagree():
    shape = ModelShape(dim=16, layers=1, heads=4, kv_heads=4, hidden=8, vocab_size=8)
    key = next(key for key in keys(1) if key.hf.endswith("q_norm.weight"))
    tensor = torch.ones(4, 4)
    tensor[3, 1] = 1.5
    with pytest.raises(Disagreement) as raised:
        to_chameleon(key, tensor, shape, 2)
    assert raised.value.apart == 0.5
    # Component 1 of the half-split order is the third of the interleaved one.
    averaged = to_chameleon(key, tensor, shape, 2, average=True)
    assert [part.tolist() for part in averaged] == [[1, 1, 1, 1], [1, 1, 1.25, 1]]
    assert [part[2].item() for part in to_chameleon(key, tensor, shape, 4)] == [1, 1, 1, 1.5]


# Published models: dim, multiple_of, ffn_dim_multiplier, width (Chameleon-7B, Llama 13B, 65B, Llama 2 70B, 3 8B).
WIDTHS = [
    (4096, 256, 1.0, 11008),
    (4096, 256, None, 11008),
    (5120, 256, 1.0, 13824),
    (8192, 256, 1.0, 22016),
    (8192, 4096, 1.3, 28672),
    (4096, 1024, 1.3, 14336),
]


@pytest.mark.parametrize(("dim", "multiple", "factor", "width"), WIDTHS)
def test_hidden_width_of_published_models(dim, multiple, factor, width):
    model = {"dim": dim, "n_layers": 2, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 65536}
    shape = ModelShape.from_params({"model": model | {"multiple_of": multiple, "ffn_dim_multiplier": factor}})
    assert shape == ModelShape(dim, 2, 32, 8, width, 65536)


@settings(max_examples=300, deadline=None)
@given(
    shape=st.builds(
        lambda head_dim, shape: replace(shape, dim=shape.heads * head_dim),
        st.integers(1, 128).map(lambda n: 2 * n),
        st.builds(
            ModelShape,
            dim=st.just(0),
            layers=st.integers(1, 80),
            heads=st.integers(1, 64),
            kv_heads=st.integers(1, 64),
            hidden=st.integers(1, 40000) | st.integers(1, 900).map(lambda n: 32 * n),
            vocab_size=st.integers(1, 70000),
            norm_eps=st.sampled_from([1e-5, 1e-6]),
            rope_theta=st.sampled_from([10000.0, 500000.0]),
            swin_norm=st.booleans(),
        ),
    )
)
def test_shape_survives_both_descriptions(shape):
    assert ModelShape.from_params(json.loads(json.dumps(shape.to_params()))) == shape
    config = {
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.hidden,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": shape.norm_eps,
        "swin_norm": shape.swin_norm,
    }
    # transformers 4 and 5.
    for rope in ({"rope_theta": shape.rope_theta}, {"rope_parameters": {"rope_theta": shape.rope_theta}}):
        assert ModelShape.from_hf(json.loads(json.dumps(config | rope))) == shape

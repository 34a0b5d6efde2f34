"""The decoder that generation runs, held to stock transformers: kinds of layers, caches, shares, 8-bit weights."""

import zlib

import pytest
import torch

from medmax_fast.generate.cache import KVCache
from medmax_fast.generate.pages import PAGE
from medmax_fast.model import decoder as decoder_module
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.decoder import Decoder
from medmax_fast.model.init import RandomCheckpoint
from medmax_fast.model.layout import ModelShape
from medmax_fast.model.load import load_model
from medmax_fast.runtime import InputError

SHAPES = {
    "plain": ModelShape(dim=48, layers=2, heads=4, kv_heads=4, hidden=80, vocab_size=0),
    "grouped": ModelShape(dim=64, layers=2, heads=8, kv_heads=2, hidden=96, vocab_size=0),
    "swin": ModelShape(dim=48, layers=3, heads=4, kv_heads=2, hidden=80, vocab_size=0, swin_norm=True, norm_eps=1e-6),
    "one layer": ModelShape(dim=20, layers=1, heads=2, kv_heads=2, hidden=36, vocab_size=0, rope_theta=500.0),
}


ON_BOTH = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


class Drawn(RandomCheckpoint):
    """Every value random, norms and their biases too, the same whenever it is asked for."""

    def tensor(self, name):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        size = self._table[name].size(self.shape)
        values = 0.3 * torch.randn(size, generator=generator)
        return values + 1 if "norm.weight" in name or "layernorm" in name else values


@pytest.fixture(params=SHAPES)
def checkpoint(request, tmp_path):
    return Drawn(tmp_path, SHAPES[request.param], torch.Generator(), torch.float32)


def through_pages(decoder, rows, prefix):
    """Logits after the last id of each row, of which the first `prefix` are prefilled and the rest fed one by one."""
    device = decoder.device
    cache = KVCache(decoder, 40 * PAGE)
    cache.kv[:, :, 1:] = float("nan")
    leases = [cache.pool.open(row, len(row)) for row in rows]
    heads = [row[:prefix] for row in rows]
    plan = cache.prefill(leases, [prefix] * len(rows))
    with torch.inference_mode():
        states = cache.run_prefill(torch.tensor([i for row in heads for i in row], device=device), plan)
        table = torch.zeros(len(rows), 4, dtype=torch.int32, device=device)
        for b, lease in enumerate(leases):
            table[b, : len(lease.pages)] = torch.tensor(lease.pages)
        for position in range(prefix, len(rows[0])):
            ids = torch.tensor([row[position] for row in rows], device=device)
            states = cache.run_decode(ids, torch.full((len(rows),), position, device=device), table)
    return (states @ decoder.head.T).cpu()


@ON_BOTH
@pytest.mark.parametrize("prefix", [1, 63, 64, 70])
def test_equals_transformers(checkpoint, prefix, device):
    model = load_model(checkpoint)
    generator = torch.Generator().manual_seed(prefix)
    rows = torch.randint(4, checkpoint.shape.vocab_size, (3, 70), generator=generator).tolist()
    decoder = Decoder.load(checkpoint, device, torch.float32)
    with torch.inference_mode():
        states = model.model(input_ids=torch.tensor(rows), use_cache=False).last_hidden_state[:, -1]
        expected = model.lm_head(states)
    found = through_pages(decoder, rows, prefix)
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@ON_BOTH
def test_a_shared_beginning_gives_the_same_states(checkpoint, device):
    """Positions from the cache, whole pages and a copied one, against a pass of their own."""
    decoder = Decoder.load(checkpoint, device, torch.float32)
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(4, 9000, (2 * PAGE + 20,), generator=generator).tolist()
    second = [*first[: PAGE + 30], *torch.randint(4, 9000, (40,), generator=generator).tolist()]

    def last_state(cache, ids):
        lease = cache.pool.open(ids, len(ids))
        cache.copy_page(lease)
        with torch.inference_mode():
            new = torch.tensor(ids[lease.cached :], device=device)
            state = cache.run_prefill(new, cache.prefill([lease], [len(ids)]))
        cache.pool.settle()
        return state, lease.cached

    shared, alone = KVCache(decoder, 40 * PAGE), KVCache(decoder, 40 * PAGE)
    for cache in (shared, alone):
        cache.kv[:, :, 1:] = float("nan")
    assert last_state(shared, first)[1] == 0
    state, cached = last_state(shared, second)
    expected, none = last_state(alone, second)
    assert (cached, none) == (PAGE + 30, 0)
    # A GPU takes other kernels for fewer ids: two roundings of states of about 4.
    torch.testing.assert_close(state, expected, rtol=0, atol=5e-5)


def test_shares_of_ranks_add_up(checkpoint, monkeypatch):
    """Two ranks' products, summed by hand, are the whole model's: heads and widths are cut where they should be."""

    world = 2
    monkeypatch.setattr(decoder_module.distributed, "get_world_size", lambda group: world)
    whole = Decoder.load(checkpoint, "cpu", torch.float32)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(decoder_module.distributed, "get_rank", lambda group, rank=rank: rank)
        parts.append(Decoder.load(checkpoint, "cpu", torch.float32, group="both"))
    x = torch.randn(5, checkpoint.shape.dim, generator=torch.Generator().manual_seed(1))
    for i, layer in enumerate(whole.layers):
        shares = [part.layers[i] for part in parts]
        torch.testing.assert_close(sum(share.mlp(x) for share in shares), layer.mlp(x), rtol=1e-5, atol=1e-4)
        width = checkpoint.shape.head_dim
        sizes = [layer.heads * width, layer.kv_heads * width, layer.kv_heads * width]
        expected = layer.qkv(x).split(sizes, 1)
        found = [share.qkv(x).split([size // world for size in sizes], 1) for share in shares]
        for n in range(3):
            torch.testing.assert_close(torch.cat([qkv[n] for qkv in found], 1), expected[n], rtol=0, atol=1e-5)
        values = [qkv[0] for qkv in found]
        outs = [share.out(value) for share, value in zip(shares, values, strict=True)]
        torch.testing.assert_close(sum(outs), layer.out(expected[0]), rtol=0, atol=1e-5)
        for name in ("q_weight", "q_bias", "k_weight", "k_bias"):
            assert torch.equal(torch.cat([getattr(share, name) for share in shares]), getattr(layer, name))
    monkeypatch.setattr(decoder_module.distributed, "get_world_size", lambda group: 3)
    with pytest.raises(InputError, match="3 ranks cannot share the model's [0-9]+ heads evenly"):
        Decoder.load(checkpoint, "cpu", torch.float32, group="three")


@pytest.mark.parametrize(("kind", "share", "most"), [("int8", 0.30, 0.02), ("fp8", 0.30, 0.08)])
def test_8_bit_weights(golden, monkeypatch, kind, share, most):
    pytest.importorskip("torchao")
    # DeepSpeed's ZeRO-3 leaves its own in a process that has trained, which knows no 8-bit tensors.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    checkpoint = open_checkpoint(golden / "checkpoint")
    exact = Decoder.load(checkpoint, "cpu", torch.float32)
    coarse = Decoder.load(checkpoint, "cpu", torch.float32, quantize=kind)
    ids = torch.randint(4, 8000, (1, 70), generator=torch.Generator().manual_seed(0)).tolist()
    expected, found = (through_pages(decoder, ids, 60) for decoder in (exact, coarse))
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < most, error
    layers = [sum(decoder_module._nbytes(p) for p in decoder.layers.parameters()) for decoder in (exact, coarse)]
    assert layers[1] < share * layers[0]
    assert exact.step_bytes() - coarse.step_bytes() == layers[0] - layers[1]


def test_8_bit_weights_need_torchao(golden, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(InputError, match=r"--quantize needs torchao .*pip install 'medmax_fast\[quant\]'"):
        Decoder.load(open_checkpoint(golden / "checkpoint"), "cpu", torch.float32, quantize="int8")
    with pytest.raises(InputError, match="--quantize int4: expected none, int8, fp8"):
        Decoder.load(open_checkpoint(golden / "checkpoint"), "cpu", torch.float32, quantize="int4")


def test_damage_is_named(tmp_path):
    class Damaged(Drawn):
        def tensor(self, name):
            value = super().tensor(name)
            return value.fill_(float("nan")) if name == "model.layers.1.mlp.up_proj.weight" else value

    checkpoint = Damaged(tmp_path, SHAPES["plain"], torch.Generator(), torch.float32)
    with pytest.raises(InputError, match="tensor model.layers.1.mlp.up_proj.weight holds NaN or infinity"):
        Decoder.load(checkpoint, "cpu", torch.float32)

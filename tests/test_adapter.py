"""Projections with adapters: our module beside peft's, its weights, names and files; what ZeRO-3 gathers for it."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from accuracy import assert_as_good
from torch import nn

from medmax_fast.config import TrainConfig
from medmax_fast.data.collate import collate_ref
from medmax_fast.data.store import write_store
from medmax_fast.files import write_json
from medmax_fast.kernels import lora
from medmax_fast.model import adapter, trainable
from medmax_fast.model.adapter import LoraLinear, adapted, add_adapter, fuse_adapter
from medmax_fast.model.load import load_model
from medmax_fast.model.trainable import prepare
from medmax_fast.train import train
from medmax_fast.vocab import TextTokenizer

CONFIG = TrainConfig(data="", ckpt="", output="", lora_dropout=0.0)


@pytest.fixture(scope="module")
def tokenizer(golden):
    return TextTokenizer(golden / "checkpoint" / "tokenizer" / "text_tokenizer_modified.json")


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Rows of text, eot, an image and text again."""
    layout, rng = tokenizer.layout, np.random.default_rng(6)
    made = []
    for length in (33, 60, 41, 22, 57):
        ids = rng.integers(layout.text_start, layout.vocab_size, length)
        ids[0], ids[length // 4], ids[-1] = layout.bos, layout.eot, layout.eos
        span = slice(length // 4 + 1, length * 3 // 4)
        ids[span] = rng.integers(layout.image_start, layout.image_end, span.stop - span.start)
        ids[span.start], ids[span.stop - 1] = layout.boi, layout.eoi
        made.append(ids)
    return made


@pytest.fixture(scope="module")
def batch(rows, tokenizer):
    offsets = np.cumsum([0, *map(len, rows)])
    return collate_ref(
        np.concatenate(rows).astype(np.uint16), offsets, range(len(rows)), tokenizer.layout.eot
    ).to_torch()


def with_values(model: nn.Module) -> nn.Module:
    """B is zero at first, and A would have no gradient."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1
    return model


def outcome(module: Callable, x, dy):
    """The output, and the gradients of the input, A and B."""
    x = x.clone().requires_grad_()
    y = module(x)
    weights = [p for p in module.parameters() if p.requires_grad]
    assert len(weights) == 2
    return [y.detach(), *torch.autograd.grad(y, [x, *weights], dy)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_module_equals_peft_s(rank, dtype):
    generator = torch.Generator().manual_seed(2)
    model = nn.ModuleDict({"q_proj": nn.Linear(48, 40, bias=False)}).to(dtype)
    add_adapter(model, replace(CONFIG, lora_rank=rank, lora_alpha=8.0))
    assert all(p.dtype == dtype for p in model.parameters())
    peft = with_values(model)["q_proj"]
    names = [name for name, _ in model.named_parameters()]
    fuse_adapter(model)
    ours = model["q_proj"]
    assert isinstance(ours, LoraLinear) and ours.scale == 8.0 / rank and not list(adapted(model))
    assert [name for name, _ in model.named_parameters()] == names
    x, dy = (torch.randn(1, 33, width, generator=generator).to(dtype) for width in (48, 40))
    found, own = outcome(ours, x, dy), outcome(peft, x, dy)
    if dtype == torch.float32:
        for a, b in zip(found, own, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    exact = outcome(peft.double(), x.double(), dy.double())
    for y, plain, right in zip(found, own, exact, strict=True):
        assert_as_good(y, plain, right, rows=33)


def test_dropout_draws_only_in_training_and_where_there_is_any():
    x = torch.randn(4, 48)
    for dropout, training, draws in ((0.3, True, 1), (0.3, False, 0), (0.0, True, 0)):
        model = nn.ModuleDict({"q_proj": nn.Linear(48, 40, bias=False)})
        add_adapter(model, replace(CONFIG, lora_dropout=dropout))
        fuse_adapter(with_values(model))
        torch.manual_seed(9)
        first = model.train(training)["q_proj"](x)
        state = torch.get_rng_state()
        torch.manual_seed(9)
        assert torch.equal(state, torch.get_rng_state()) == (draws == 0)
        assert torch.equal(first, model["q_proj"](x))
        assert torch.equal(first, model["q_proj"](x)) == (draws == 0)


def gradients(module, batch):
    module.zero_grad()
    loss = module(batch)[0]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_the_whole_model_equals_peft_s(golden, tokenizer, batch, dtype, monkeypatch):
    def prepared():
        return with_values(prepare(load_model(golden / "checkpoint", dtype=dtype), CONFIG, tokenizer.layout))

    ours = prepared()
    monkeypatch.setattr(trainable, "fuse_adapter", lambda model: None)
    peft = prepared()
    pairs = list(zip(ours.named_parameters(), peft.named_parameters(), strict=True))
    assert all(a == b and torch.equal(p, q) for (a, p), (b, q) in pairs)
    assert sum(isinstance(module, LoraLinear) for module in ours.modules()) == len(list(adapted(peft))) == 14
    (loss, found), (own_loss, own) = gradients(ours, batch), gradients(peft, batch)
    assert found.keys() == own.keys() and len(found) == 28
    if dtype == torch.float32:
        assert loss == pytest.approx(own_loss, rel=1e-6)
        for name, gradient in own.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())
        return
    # Of the same weights in fp32.
    exact = gradients(peft.float(), batch)[1]
    for name, right in exact.items():
        error, allowed = ((side[name].float() - right).norm() / right.norm() for side in (found, own))
        assert error <= 1.5 * allowed + 1e-4, (name, error, allowed)


@pytest.mark.parametrize("recompute", ["none", "selective", "layers"])
def test_the_kernels_in_a_whole_model_give_what_torch_gives(golden, tokenizer, batch, recompute, monkeypatch):
    """With dropout: the masks of a layer that is computed again, and those of kernel and reference, are the same."""
    config = replace(CONFIG, lora_dropout=0.3, recompute=recompute)
    module = with_values(prepare(load_model(golden / "checkpoint"), config, tokenizer.layout))
    torch.manual_seed(3)
    plain_loss, plain = gradients(module, batch)
    calls = []

    def by_kernels(*arguments):
        calls.append(arguments[-1])
        return lora.lora_linear(*arguments, impl="triton")

    monkeypatch.setattr(adapter, "lora_linear", by_kernels)
    torch.manual_seed(3)
    loss, found = gradients(module, batch)
    # Of two layers, 14 projections, and once more where layers are computed again; each with a seed of its own.
    assert len(calls) == (14 if recompute == "none" else 28) and len(set(calls)) == 14
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


# ---- ZeRO-3 ----


@pytest.fixture()
def config(rows, tokenizer, golden, tmp_path, monkeypatch):
    monkeypatch.setattr("medmax_fast.figures.loss_curve", lambda *_: None)
    folder, named = tmp_path / "store", [(ids, f"row {i}", "", "") for i, ids in enumerate(rows)]
    write_store(folder, tokenizer.layout, named, tokenizer_sha256=tokenizer.sha256())
    options = dict(pack_length=130, packs_per_step=2, epochs=2, lr=1e-2, save_every=0, device="cpu", lora_dropout=0.2)
    return TrainConfig(data=str(folder), ckpt=str(golden / "checkpoint"), output=str(tmp_path / "run"), **options)


@pytest.mark.parametrize("recompute", ["none", "selective", "layers"])
def test_zero_3_gathers_the_weights_of_a_projection_for_that_projection(config, tmp_path, recompute, monkeypatch):
    """Not even small weights stay whole here, as those of a real model do not."""
    train(config)
    overrides = tmp_path / "overrides.json"
    write_json(overrides, {"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    shared = dict(zero=3, recompute=recompute, deepspeed_config=str(overrides), output=str(tmp_path / "shared"))
    forward, modules, between = LoraLinear.forward, {}, []

    def watched(module, x):
        weights = list(module.parameters())
        assert len(weights) == 3 and not any(weight.ds_persist for weight in weights)
        # Before its hooks: whatever is gathered now is for others. Then its own three must be there.
        assert all(weight.numel() == weight.ds_numel for weight in weights)
        others = [w for other in modules.values() if other is not module for w in other.parameters()]
        between.append(sum(weight.numel() > 0 for weight in others) < len(others) or not others)
        modules[id(module)] = module
        return forward(module, x)

    monkeypatch.setattr(LoraLinear, "forward", watched)
    train(replace(config, **shared))
    assert len(modules) == 14 and any(between)
    assert all(weight.numel() == 0 for module in modules.values() for weight in module.parameters())
    plain, found = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "run", tmp_path / "shared")
    )
    assert len(plain) == len(found) > 1
    for one, other in zip(found, plain, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)

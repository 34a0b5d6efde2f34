"""What is trained: fused layers equal transformers' own, rows of head and embeddings trained alone, frozen weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medmax_fast.config import TrainConfig
from medmax_fast.data.collate import collate_ref
from medmax_fast.model import fused, trainable
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.load import load_model
from medmax_fast.model.loss import packed_hidden, packed_loss
from medmax_fast.model.trainable import PREFIX, PackedModel, check_choice, empty_batch, prepare
from medmax_fast.model.trained import Trained
from medmax_fast.runtime import InputError
from medmax_fast.vocab import TextTokenizer

CONFIG = TrainConfig(data="", ckpt="", output="", lora_dropout=0.0)
FULL = replace(CONFIG, full=True)


@pytest.fixture(scope="module")
def layout(golden):
    return TextTokenizer(golden / "checkpoint" / "tokenizer" / "text_tokenizer.json").layout


@pytest.fixture(scope="module")
def batch(layout):
    """Three rows with text and image targets, packed."""
    rng = np.random.default_rng(5)
    rows = []
    for n in (21, 8, 30):
        text = lambda k: rng.integers(layout.text_start, layout.vocab_size, k)  # noqa: E731
        image = rng.integers(layout.image_start, layout.image_end, n)
        rows.append(np.concatenate([[layout.bos], text(4), [layout.eot, layout.boi], image, [layout.eoi], text(3)]))
    offsets = np.cumsum([0, *map(len, rows)])
    return collate_ref(np.concatenate(rows).astype(np.uint16), offsets, [0, 1, 2], layout.eot).to_torch()


def gradients(module, batch):
    module.zero_grad()
    loss = module(batch)[0] if isinstance(module, PackedModel) else packed_loss(module, batch)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers_equal_those_of_transformers(golden, layout, batch, dtype):
    """Loss and every gradient, each against the fused model in float64, which the kernels' references compute in."""
    exact_model = load_model(golden / "checkpoint").double()
    fused.fuse(exact_model)
    logits = packed_hidden(exact_model, batch)[:-1] @ exact_model.lm_head.weight.T
    truth_loss = F.cross_entropy(logits, batch["labels"][0, 1:], ignore_index=-100, reduction="sum")
    truth_loss.backward()
    truth = {n: p.grad for n, p in exact_model.named_parameters()}
    truth_loss = truth_loss.item()
    _, plain = gradients(load_model(golden / "checkpoint", dtype=dtype), batch)
    model = load_model(golden / "checkpoint", dtype=dtype)
    fused.fuse(model)
    loss, found = gradients(model, batch)
    assert set(found) == set(plain) == set(truth) and len(truth) == 2 * 13 + 3
    # One number: whether rounding errors cancel in it is chance.
    assert abs(loss / truth_loss - 1) < {torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]
    for name, exact in truth.items():
        error, allowed = ((g[name].double() - exact).norm() / exact.norm() for g in (found, plain))
        assert exact.norm() > 0 and error <= 2 * allowed + 1e-7, (name, error, allowed)


def test_packed_model_sums_by_kind_and_by_row(golden, layout, batch):
    module = prepare(load_model(golden / "checkpoint"), CONFIG, layout)
    loss, parts, rows = module(batch)
    text, image, texts, images = parts.tolist()
    assert images == 21 + 8 + 30 and texts == 3 * (2 + 3) and text + image == pytest.approx(loss.item(), rel=1e-6)
    bounds = batch["cu_seqlens"].tolist()
    for i, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        alone = {n: t[:, start:end] for n, t in batch.items() if n in ("input_ids", "labels", "position_ids")}
        alone |= {"cu_seqlens": torch.tensor([0, end - start], dtype=torch.int32), "max_seqlen": end - start}
        single, _, (row,) = module(alone)
        assert row.item() == pytest.approx(rows[i].item(), rel=1e-5) == pytest.approx(single.item(), rel=1e-5)


def test_an_empty_batch_gives_a_zero_gradient_to_every_weight(golden, layout):
    module = prepare(load_model(golden / "checkpoint"), replace(CONFIG, head="image", embeddings="image"), layout)
    loss, parts, rows = module(empty_batch("cpu"))
    loss.backward()
    assert loss.item() == 0 and parts.abs().max() == 0 and rows.tolist() == [0]
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("part", ["head", "embeddings"])
def test_rows_trained_alone_have_the_gradient_of_the_whole(golden, layout, batch, part, rank):
    whole = prepare(load_model(golden / "checkpoint"), FULL, layout)
    loss, every = gradients(whole, batch)
    module = prepare(load_model(golden / "checkpoint"), replace(CONFIG, lora_rank=rank, **{part: "image"}), layout)
    same, found = gradients(module, batch)
    name = PREFIX + {"head": "lm_head", "embeddings": "model.embed_tokens"}[part]
    rows = slice(layout.image_start, layout.boi + 1)
    assert same == pytest.approx(loss, rel=1e-6)
    assert {n for n in found if ".lora_" not in n} == {f"{name}.rows"} and (len(found) > 1) == (rank > 0)
    torch.testing.assert_close(found[f"{name}.rows"], every[f"{name}.weight"][rows], rtol=1e-5, atol=1e-6)
    # 8,192 codes, eoi and boi.
    assert found[f"{name}.rows"].shape[0] == 8194
    trained = sum(p.numel() for n, p in module.named_parameters() if p.requires_grad and ".lora_" not in n)
    assert trained == 8194 * whole.model.config.hidden_size


def test_trained_rows_come_back_in_their_places(golden, layout):
    model = load_model(golden / "checkpoint")
    base = model.lm_head.weight.detach().clone()
    module = prepare(model, replace(CONFIG, lora_rank=0, head="image"), layout)
    with torch.no_grad():
        module.model.lm_head.rows += 1
    state = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    trained = Trained(state, state.__getitem__, "here", open_checkpoint(golden / "checkpoint"))
    back = trained.apply("lm_head.weight", base)
    assert torch.equal(back[layout.image_start : layout.boi + 1], base[layout.image_start : layout.boi + 1] + 1)
    assert torch.equal(back[: layout.image_start], base[: layout.image_start])
    assert torch.equal(back[layout.boi + 1 :], base[layout.boi + 1 :])
    other = torch.zeros(3)
    assert trained.apply("model.norm.weight", other) is other


def test_whole_head_beside_an_adapter(golden, layout, batch):
    module = prepare(load_model(golden / "checkpoint"), replace(CONFIG, head="all", embeddings="all"), layout)
    _, found = gradients(module, batch)
    names = {n for n in found if ".lora_" not in n}
    assert names == {"model.lm_head.weight", "model.model.embed_tokens.weight"}


def test_frozen_weights_stay(golden, layout, batch):
    config = replace(FULL, freeze="*.embed_tokens.*, *norm*,model.layers.0.*")
    module = prepare(load_model(golden / "checkpoint"), config, layout)
    _, found = gradients(module, batch)
    assert set(found) == {
        f"model.model.layers.1.{name}.weight"
        for name in (
            *(f"self_attn.{x}_proj" for x in "qkvo"),
            *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
        )
    } | {"model.lm_head.weight"}
    with pytest.raises(InputError, match=r"--freeze \*\.decoder\.\*: no weight has such a name, .* model\.layers\.0\."):
        prepare(load_model(golden / "checkpoint"), replace(FULL, freeze="*.decoder.*"), layout)
    with pytest.raises(InputError, match="nothing is left to train"):
        prepare(load_model(golden / "checkpoint"), replace(FULL, freeze="*"), layout)


BAD = [
    (replace(FULL, head="image"), "--head image: --full trains all of it"),
    (replace(FULL, embeddings="all"), "--embeddings all: --full trains"),
    (replace(CONFIG, freeze="*"), "--freeze .*: only with --full"),
    (replace(CONFIG, lora_rank=0), "--lora-rank 0: nothing to train"),
]


@pytest.mark.parametrize(("config", "message"), BAD, ids=[m for _, m in BAD])
def test_choices_that_do_not_go_together(config, message):
    with pytest.raises(InputError, match=message):
        check_choice(config)


@pytest.mark.parametrize("full", [False, True])
def test_recomputing_changes_no_bit_and_selective_keeps_the_wide_products(golden, layout, batch, monkeypatch, full):
    # The small model is 64 wide.
    monkeypatch.setattr(trainable, "KEPT_WIDTH", 32)
    found, products = {}, {}
    for recompute in ("none", "selective", "layers"):
        config = replace(CONFIG, full=full, recompute=recompute, lora_dropout=0.0 if full else 0.3)
        module = prepare(load_model(golden / "checkpoint"), config, layout)
        torch.manual_seed(3)
        with CountProducts() as count:
            found[recompute] = gradients(module, batch)
        products[recompute] = count.wide
    for recompute in ("selective", "layers"):
        assert found[recompute][0] == found["none"][0]
        assert all(torch.equal(g, found["none"][1][n]) for n, g in found[recompute][1].items())
    # Of two layers, six or seven projections are multiplied once more where layers are done again: the last one's own
    # result is needed by its adapter, or not at all. transformers lets the embeddings want a gradient then: three more
    # products.
    assert 12 <= products["layers"] - products["selective"] <= 14
    assert products["selective"] - products["none"] == (0 if full else 3)


class CountProducts(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products whose three sides are at least 32; a projection with its adapter is one operation."""

    wide = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = arguments[-2:]
            self.wide += min(*a.shape, b.shape[1]) >= 32
        self.wide += function is torch.ops.medmax.lora_linear.default
        return function(*arguments, **(options or {}))

"""The loss head: cross-entropy over the supervised ids only, image ids included, packed as unpacked."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medmax_fast.data.collate import collate_ref
from medmax_fast.model import attention
from medmax_fast.model import loss as loss_module
from medmax_fast.model.load import load_model
from medmax_fast.model.loss import IGNORE, packed_loss, target_losses

EOT = 8710
# Attention, device, dtype, and what packing may change per supervised id.
IMPLEMENTATIONS = [("sdpa", "cpu", torch.float32, 1e-5), ("sdpa", "cpu", torch.bfloat16, 1e-2)]
if torch.cuda.is_available():
    fused = {"flash_attn": "flash_attn", "torch_varlen": "torch.nn.attention.varlen"}
    IMPLEMENTATIONS += [("sdpa", "cuda", torch.float32, 1e-5), ("sdpa", "cuda", torch.bfloat16, 1e-2)]
    IMPLEMENTATIONS += [(n, "cuda", torch.bfloat16, 1e-2) for n, module in fused.items() if find_spec(module)]


def dense_losses(hidden, labels, head):
    """The textbook form: all logits, shifted by one, ignored labels left out."""
    logits = head(hidden[:-1]).float()
    losses = F.cross_entropy(logits, labels[1:], ignore_index=IGNORE, reduction="none")
    return losses[labels[1:] != IGNORE]


def make_case(length, supervised, dim=16, vocabulary=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(length, dim, generator=generator).requires_grad_()
    labels = torch.randint(0, vocabulary, (length,), generator=generator)
    ignored = torch.randperm(length - 1, generator=generator)[: length - 1 - supervised] + 1
    labels[ignored] = IGNORE
    labels[0] = IGNORE
    head = nn.Linear(dim, vocabulary, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(vocabulary, dim, generator=generator))
    return hidden, labels, head


# Chunks of 8 rows: below, at and above one chunk, several, and an incomplete last one.
@pytest.mark.parametrize("supervised", [1, 7, 8, 9, 16, 29])
def test_equals_the_textbook_loss_with_gradients(monkeypatch, supervised):
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 8)
    hidden, labels, head = make_case(30, supervised)
    expected = dense_losses(hidden, labels, head)
    expected_grads = torch.autograd.grad(expected.sum(), [hidden, head.weight])
    losses, targets = target_losses(hidden, labels, head)
    grads = torch.autograd.grad(losses.sum(), [hidden, head.weight])
    assert len(losses) == supervised and losses.dtype == torch.float32
    assert torch.equal(targets, labels[1:][labels[1:] != IGNORE])
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    for grad, want in zip(grads, expected_grads, strict=True):
        assert want.abs().max() > 1e-2
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(target_losses(hidden, labels, head)[0], losses)


def test_no_supervision_is_a_zero_that_can_be_differentiated():
    hidden, labels, head = make_case(6, 0)
    losses, targets = target_losses(hidden, labels, head)
    assert losses.shape == targets.shape == (0,)
    losses.sum().backward()
    assert hidden.grad.abs().max() == 0 and head.weight.grad.abs().max() == 0
    # One id cannot be predicted by anything.
    alone, none = target_losses(hidden[:1], labels[:1], head)
    assert alone.sum().item() == 0 and len(none) == 0


def make_rows(seed=0):
    """Text, image spans, a row without eot, a row whose eot comes last and a row of one id."""
    rng = np.random.default_rng(seed)
    text, image = lambda n: rng.integers(8712, 9000, n), lambda n: rng.integers(4, 8196, n)
    rows = [
        np.concatenate([[0], text(5), [EOT], [8197], image(20), [8196], text(3), [2]]),
        np.concatenate([[0], [8197], image(9), [8196], text(6), [2]]),
        np.concatenate([[0], text(4), [EOT]]),
        np.array([0]),
        np.concatenate([[0], text(2), [EOT], text(7), [EOT], text(3), [2]]),
    ]
    offsets = np.cumsum([0, *map(len, rows)])
    return np.concatenate(rows).astype(np.uint16), offsets


def pack(buffer, rows):
    return collate_ref(*buffer, rows, EOT).to_torch()


@pytest.fixture(scope="module")
def model(golden):
    return load_model(golden / "checkpoint")


def loss_and_gradients(model, batches):
    model.zero_grad()
    total = 0.0
    for batch in batches:
        device = model.lm_head.weight.device
        loss = packed_loss(model, {n: x.to(device) if torch.is_tensor(x) else x for n, x in batch.items()})
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare_with_unpacked(model, buffer):
    """What packing changes: the loss per supervised id, and per gradient the largest entry, scaled as training does."""
    whole, packed = loss_and_gradients(model, [pack(buffer, [4, 0, 3, 2, 1])])
    apart, unpacked = loss_and_gradients(model, [pack(buffer, [row]) for row in range(5)])
    supervised = sum(int((pack(buffer, [row])["labels"] != IGNORE).sum()) for row in range(5))
    assert supervised == 56
    assert set(packed) == set(unpacked) == {name for name, _ in model.named_parameters()}
    assert all(grad.abs().max() > 0 for grad in unpacked.values())
    largest = {n: ((packed[n] - grad).float().abs().max() / supervised).item() for n, grad in unpacked.items()}
    return abs(whole - apart) / supervised, largest


@pytest.mark.parametrize(("name", "device", "dtype", "limit"), IMPLEMENTATIONS, ids=str)
def test_packed_equals_unpacked_in_loss_and_every_gradient(golden, monkeypatch, name, device, dtype, limit):
    used = []
    real = attention.varlen_attention

    def attend(*tensors, impl="auto"):
        used.append(name)
        return real(*tensors, impl=name)

    monkeypatch.setattr(attention, "varlen_attention", attend)
    loss, gradients = compare_with_unpacked(load_model(golden / "checkpoint", device, dtype), make_rows())
    # Two layers; one pass packed and five apart.
    assert len(used) == 2 * 6
    assert loss < limit and max(gradients.values()) < limit, (loss, gradients)


def test_the_comparison_would_see_a_leak_in_every_gradient(model, monkeypatch):
    real = attention.varlen_attention

    def one_row(q, k, v, cu_seqlens, max_seqlen, scale=None):
        return real(q, k, v, torch.tensor([0, len(q)], dtype=torch.int32), len(q), scale)

    monkeypatch.setattr(attention, "varlen_attention", one_row)
    loss, gradients = compare_with_unpacked(model, make_rows())
    limit = max(limit for *_, limit in IMPLEMENTATIONS)
    assert loss > limit and min(gradients.values()) > limit, (loss, gradients)


def test_image_ids_are_neither_masked_nor_left_out(model):
    buffer = make_rows()
    loss, gradients = loss_and_gradients(model, [pack(buffer, [1])])
    # Row 1 has no eot: image codes are most of its targets, at about log(vocabulary) each in a random model.
    assert np.isfinite(loss) and 5 < loss / 18 < 25
    ids = buffer[0][buffer[1][1] : buffer[1][2]]
    image = ids[(ids >= 4) & (ids < 8196)]
    assert gradients["lm_head.weight"][torch.from_numpy(image.astype(np.int64))].abs().amax(1).min() > 1e-3


def test_the_first_id_of_a_row_is_no_target_of_its_neighbour(model):
    ids, offsets = make_rows()
    changed = ids.copy()
    changed[offsets[1]] = 8800
    losses = []
    for buffer in ((ids, offsets), (changed, offsets)):
        batch = pack(buffer, [0, 1])
        with torch.no_grad():
            losses.append(target_losses(loss_module.packed_hidden(model, batch), batch["labels"][0], model.lm_head)[0])
    own = int((pack((ids, offsets), [0])["labels"] != IGNORE).sum())
    assert torch.equal(losses[0][:own], losses[1][:own])
    assert not torch.equal(losses[0][own:], losses[1][own:])


def test_memory_of_the_head_is_bounded_by_the_chunk(monkeypatch):
    """No tensor of [supervised, vocabulary] is ever asked of the head."""
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 8)
    hidden, labels, head = make_case(100, 99)
    seen = []
    losses, _ = target_losses(hidden, labels, lambda rows: seen.append(len(rows)) or head(rows))
    losses.sum().backward()
    assert max(seen) == 8 and sum(seen) == 2 * 99

"""The loss head: cross-entropy over the supervised ids only, image ids included, packed as unpacked."""

import numpy as np
import pytest
import torch
from accuracy import assert_same
from attentions import DTYPES_16, ON_A_GPU, need
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from medmax_fast.data.collate import collate_ref
from medmax_fast.model import attention
from medmax_fast.model import loss as loss_module
from medmax_fast.model.load import load_model
from medmax_fast.model.loss import IGNORE, linear_cross_entropy, packed_loss, target_losses

EOT = 8710
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu(required=False)
# Attention, device, dtype, and what packing may change per supervised id.
IMPLEMENTATIONS = [("sdpa", "cpu", torch.float32, 1e-5), ("sdpa", "cpu", torch.bfloat16, 1e-2)]
IMPLEMENTATIONS += [pytest.param("sdpa", "cuda", torch.float32, 1e-5, marks=pytest.mark.gpu)]
IMPLEMENTATIONS += [pytest.param(name, "cuda", d, 1e-2, marks=pytest.mark.gpu) for name in ON_A_GPU for d in DTYPES_16]


class Recorder(TorchDispatchMode):
    """What the operators of torch are asked for: their names, and the elements of the largest result."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        result = function(*args, **(kwargs or {}))
        found = result if isinstance(result, (tuple, list)) else (result,)
        self.largest = max([self.largest, *(t.numel() for t in found if torch.is_tensor(t))])
        return result

    def count(self, *operators):
        return sum(name.split(".")[1] in operators for name in self.names)


PRODUCTS = ("mm", "addmm", "addmm_")


def dense_losses(hidden, labels, weight, z_loss=0.0):
    """The textbook form: all logits, shifted by one, ignored labels left out."""
    logits = F.linear(hidden[:-1], weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits, labels[1:], ignore_index=IGNORE, reduction="none")
    return (losses + z_loss * logits.logsumexp(1) ** 2)[labels[1:] != IGNORE]


def make_case(length, supervised, dim=16, vocabulary=50, seed=0, dtype=torch.float32):
    """Hidden states, labels, head weight and the weight of each label."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(length, dim, generator=generator).to(DEVICE, dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (length,), generator=generator)
    ignored = torch.randperm(length - 1, generator=generator)[: length - 1 - supervised] + 1
    labels[ignored] = IGNORE
    labels[0] = IGNORE
    weight = torch.randn(vocabulary, dim, generator=generator).to(DEVICE, dtype).requires_grad_()
    return hidden, labels.to(DEVICE), weight, torch.rand(length, generator=generator).to(DEVICE)


def limit_logits(monkeypatch, rows, vocabulary=50, size=4):
    """Chunks of so many rows."""
    columns = -(-vocabulary // loss_module.COLUMN_ALIGN) * loss_module.COLUMN_ALIGN
    monkeypatch.setattr(loss_module, "LOGIT_BYTES", rows * columns * size)


# Chunks of 8 rows: below, at and above one chunk, several, and an incomplete last one.
@pytest.mark.parametrize("supervised", [1, 7, 8, 9, 16, 29])
def test_equals_the_textbook_loss_with_gradients(monkeypatch, supervised):
    limit_logits(monkeypatch, 8)
    hidden, labels, weight, _ = make_case(30, supervised)
    expected = dense_losses(hidden, labels, weight)
    expected_grads = torch.autograd.grad(expected.sum(), [hidden, weight])
    total, losses, targets, positions = target_losses(hidden, labels, [weight])
    grads = torch.autograd.grad(total, [hidden, weight])
    assert len(losses) == supervised and losses.dtype == total.dtype == torch.float32
    assert total.shape == () and not losses.requires_grad
    assert torch.equal(targets, labels[1:][labels[1:] != IGNORE]) and torch.equal(labels[positions + 1], targets)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(total, losses.sum())
    for grad, want in zip(grads, expected_grads, strict=True):
        assert want.abs().max() > 1e-2
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert_same(target_losses(hidden, labels, [weight])[1], losses)
    for count in (supervised, None):
        again = target_losses(hidden, labels, [weight], count=count)
        assert all(map(torch.equal, again, (total, losses, targets, positions)))


BLOCKS = {"one": ([300], [True]), "frozen": ([300], [False]), "image": ([4, 200, 96], [False, True, False])}
BLOCKS["all"] = ([4, 200, 96], [True, True, True])


def relative(grad, want):
    return ((grad.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("rows", [7, 64])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_as_good_as_plain_torch_s(monkeypatch, dtype, blocks, rows):
    limit_logits(monkeypatch, rows, 320 if blocks == "one" else 448, dtype.itemsize)
    sizes, trained = BLOCKS[blocks]
    hidden, labels, weight, label_weights = make_case(50, 40, 64, sum(sizes), dtype=dtype)
    with torch.no_grad():
        weight *= 0.3
    parts = [p.clone().requires_grad_(t) for p, t in zip(weight.detach().split(sizes), trained, strict=True)]

    def plain(kind, *leaves):
        leaves = [leaf.detach().to(kind).requires_grad_() for leaf in leaves]
        losses = dense_losses(leaves[0], labels, leaves[1], 1e-3)
        total = (losses * label_weights[1:][labels[1:] != IGNORE]).sum() * 0.3334
        d_hidden, d_weight = torch.autograd.grad(total, leaves)
        # What is returned beside the total has no z-loss in it.
        losses = dense_losses(leaves[0].detach(), labels, leaves[1].detach())
        return losses, total.detach(), [d_hidden, *d_weight.split(sizes)]

    losses_64, total_64, grads_64 = plain(torch.float64, hidden, weight)
    losses_own, total_own, grads_own = plain(dtype, hidden, weight)
    total, losses, *_ = target_losses(hidden, labels, parts, label_weights, 1e-3)
    total = total * 0.3334
    total.backward()
    eps = torch.finfo(torch.float32).eps
    assert (losses - losses_64).abs().max() <= 2 * (losses_own - losses_64).abs().max() + 2 * eps * losses_64.max()
    # As the errors of the losses add up at random.
    chance = 2 * 0.3334 * (losses_own - losses_64).norm() + 2 * eps * total_64
    assert (total - total_64).abs() <= 2 * (total_own - total_64).abs() + chance
    for leaf, own, want in zip([hidden, *parts], grads_own, grads_64, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.requires_grad:
            assert leaf.grad.dtype == dtype and relative(leaf.grad, want) <= 2 * relative(own, want)


def test_gradients_are_scaled_in_fp32():
    # A factor that bf16 does not have: rounded, it would scale all of a gradient alike.
    factor = 0.3334
    assert abs(torch.tensor(factor, dtype=torch.bfloat16).item() / factor - 1) > 1e-3
    hidden, labels, weight, _ = make_case(50, 40, 64, 300, dtype=torch.bfloat16)
    total = target_losses(hidden, labels, [weight[:4], weight[4:]])[0]
    whole = torch.autograd.grad(total, [hidden, weight], retain_graph=True)
    scaled = torch.autograd.grad(total * factor, [hidden, weight])
    for a, b in zip(whole, scaled, strict=True):
        ratio = (a.double() * b.double()).sum() / a.double().pow(2).sum()
        assert abs(ratio / factor - 1) < 5e-4


def test_weights_of_labels_and_zero_among_them():
    hidden, labels, weight, label_weights = make_case(30, 20)
    positions = (labels[1:] != IGNORE).nonzero()[:, 0]
    label_weights[positions[::2] + 1] = 0.0
    # The weight of an ignored label is not looked at.
    label_weights[labels == IGNORE] = torch.nan
    total, losses, *_ = target_losses(hidden, labels, [weight], label_weights)
    total.backward()
    chosen = label_weights[positions + 1]
    torch.testing.assert_close(total, (dense_losses(hidden, labels, weight) * chosen).sum())
    assert (hidden.grad[positions[::2]] == 0).all() and hidden.grad[positions[1::2]].abs().amax(1).min() > 0
    assert_same(losses, target_losses(hidden, labels, [weight])[1])


@pytest.mark.parametrize("count", [0, None])
def test_no_supervision_is_a_zero_that_can_be_differentiated(count):
    hidden, labels, weight, label_weights = make_case(6, 0)
    total, losses, targets, positions = target_losses(hidden, labels, [weight], label_weights, 1e-3, count)
    assert losses.shape == targets.shape == positions.shape == (0,) and total == 0
    total.backward()
    assert hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0
    # One id cannot be predicted by anything.
    total, losses, *_ = target_losses(hidden[:1], labels[:1], [weight], count=count)
    assert total.item() == 0 and len(losses) == 0


def test_a_target_that_the_vocabulary_lacks_is_nan_in_every_block():
    hidden, _, weight, _ = make_case(9, 8)
    targets = torch.tensor([0, 3, 4, 49, 50, 63, 64, 200, -1], device=DEVICE)
    for sizes in ([50], [4, 40, 6], [4, 46, 0]):
        total, losses = linear_cross_entropy(hidden, targets, weight.split(sizes))
        assert losses[:4].isfinite().all() and losses[4:].isnan().all() and total.isnan()


@pytest.mark.skipif(DEVICE == "cuda", reason="an index error on a GPU ends the process")
def test_a_count_too_high_is_an_index_error():
    hidden, labels, weight, _ = make_case(9, 5)
    assert len(target_losses(hidden, labels, [weight], count=5)[1]) == 5
    with pytest.raises(IndexError):
        target_losses(hidden, labels, [weight], count=6)


def test_backward_can_be_repeated_and_not_differentiated():
    hidden, labels, weight, _ = make_case(20, 9)
    total = target_losses(hidden, labels, [weight])[0]
    first = torch.autograd.grad(total, [hidden, weight], retain_graph=True)
    second = torch.autograd.grad(2 * total, [hidden, weight], retain_graph=True)
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))
    (grad,) = torch.autograd.grad(total, [hidden], torch.ones_like(total).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


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
    need(name)
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
    # That of 16 bits.
    assert loss > 1e-2 and min(gradients.values()) > 1e-2, (loss, gradients)


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
            hidden = loss_module.packed_hidden(model, batch)
            losses.append(target_losses(hidden, batch["labels"][0], [model.lm_head.weight])[1])
    own = int((pack((ids, offsets), [0])["labels"] != IGNORE).sum())
    assert torch.equal(losses[0][:own], losses[1][:own])
    assert not torch.equal(losses[0][own:], losses[1][own:])


def test_memory_of_the_head_is_bounded_by_the_chunk(monkeypatch):
    """No tensor of [supervised, vocabulary] is ever made, nor any larger than a chunk's logits or the head."""
    limit_logits(monkeypatch, 16, 448)
    hidden, labels, weight, label_weights = make_case(300, 299, vocabulary=300)
    sizes = [4, 200, 96]
    parts = [p.clone().requires_grad_(len(p) == 200) for p in weight.detach().split(sizes)]
    with Recorder() as seen:
        target_losses(hidden, labels, parts, label_weights)[0].backward()
    assert seen.largest == 16 * 448 and seen.count("cat") == 0
    # The guard: the textbook form is seen.
    with Recorder() as seen:
        dense_losses(hidden, labels, weight).sum().backward()
    assert seen.largest == 299 * 300


def test_no_work_for_what_wants_no_gradient(monkeypatch):
    limit_logits(monkeypatch, 8)
    hidden, labels, weight, _ = make_case(30, 24)
    frozen, fixed = weight.detach(), hidden.detach()
    # Three chunks; of each one product for the logits, one for each gradient. None in the backward pass.
    for states, head, products in ((hidden, weight, 9), (hidden, frozen, 6), (fixed, weight, 6), (fixed, frozen, 3)):
        with Recorder() as seen:
            total = target_losses(states, labels, [head])[0]
            assert seen.count(*PRODUCTS) == products
            if products > 3:
                total.backward()
        assert seen.count(*PRODUCTS) == products and total.requires_grad == (products > 3)
    with Recorder() as seen, torch.no_grad():
        target_losses(hidden, labels, [weight])
    assert seen.count(*PRODUCTS) == 3
    parts = [frozen[:4], weight[4:40], frozen[40:]]
    limit_logits(monkeypatch, 8, 3 * loss_module.COLUMN_ALIGN)
    with Recorder() as seen:
        target_losses(fixed, labels, parts)[0].backward()
    assert seen.count(*PRODUCTS) == 3 * (3 + 1)


def test_the_head_may_be_gone_in_the_backward_pass(monkeypatch):
    """As under ZeRO-3, which keeps a weight only while its module runs."""
    limit_logits(monkeypatch, 8)
    hidden, labels, weight, _ = make_case(30, 24)
    expected = torch.autograd.grad(target_losses(hidden, labels, [weight])[0], [hidden, weight])
    total = target_losses(hidden, labels, [weight])[0]
    with torch.no_grad():
        weight.fill_(torch.nan)
    assert all(map(torch.equal, torch.autograd.grad(total, [hidden, weight]), expected))


def test_nothing_waits_for_the_device_where_the_count_is_known(model):
    batch = pack(make_rows(), [4, 0, 3, 2, 1])
    count = int((batch["labels"] != IGNORE).sum())
    hidden, blocks = loss_module.packed_hidden(model, batch), (model.lm_head.weight,)
    waits = ("_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero")
    with Recorder() as seen:
        target_losses(hidden, batch["labels"][0], blocks, count=count)[0].backward()
    assert seen.count(*waits) == 0 and seen.count("nonzero_static") == 1
    with Recorder() as seen:
        target_losses(hidden.detach(), batch["labels"][0], blocks)
    assert seen.count(*waits) == 1


def test_the_packed_loss_takes_weights_and_count_from_the_batch(model):
    ids, offsets = make_rows()
    weights = np.array([0.5, 2.0, 1.0, 3.0, 0.0])
    batch = collate_ref(ids, offsets, [4, 0, 3, 2, 1], EOT, weights=weights).to_torch()
    parts = [packed_loss(model, pack((ids, offsets), [row])).item() for row in (4, 0, 3, 2, 1)]
    assert len({*parts}) > 3
    for count in ({"target_tokens": int((batch["labels"] != IGNORE).sum())}, {"target_tokens": None}):
        with Recorder() as seen:
            loss = packed_loss(model, batch | count)
        assert loss.item() == pytest.approx(np.dot(weights, parts), rel=1e-5)
        assert seen.count("nonzero_static") == (count["target_tokens"] is not None)

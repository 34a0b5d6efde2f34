"""The kernel of the loss: alone on a chunk of logits, and with the products of the head around it.

Shapes: T ids, C model width, V vocabulary.
"""

import functools
from unittest import mock

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.cases.case import LIGER, PLAIN, Case, Draw, Work, name_of, own_first, within_twice
from benchmarks.cases.training import SELECTED, SIZES, Operation, Size, cases_of
from medmax_fast.kernels.cross_entropy import cross_entropy_
from medmax_fast.kernels.launch import INTERPRETED
from medmax_fast.model import loss


def loss_cases(name: str) -> list[Case]:
    """The kernel alone on a chunk of logits, then head and loss of a pack of which some ids are supervised."""
    size = SIZES[name]
    T, C, V, item = size.ids, size.width, size.vocabulary, size.dtype.itemsize
    shape = f"{size.rows}x{V} {name_of(size.dtype)}, loss and gradient in place"
    kernel = Case("loss", shape, 2 * size.rows * V * item, 0.0, functools.partial(cross_entropy_work, size=size))
    rows = []
    for percent, trained, backward in (
        (10, False, False),
        (1, False, True),
        (10, False, True),
        (10, True, True),
        (100, False, True),
    ):
        kept = supervised(size, percent)
        product = 2.0 * kept * V * C
        # States and head are read; backward the head again and the gradient of all states written; for the head's own
        # gradient the states again.
        moved = (kept + V) * C + backward * (V + T) * C + trained * (kept + V) * C
        text = f"{percent} % supervised, head {'trained' if trained else 'frozen'}"
        text += ", forward and backward" if backward else ", forward"
        rows.append((text, (size, percent, trained), backward, moved * item, (1 + backward + trained) * product))
    shape = f"{T}x{C}x{V} {name_of(size.dtype)}"
    return [kernel, *cases_of("loss", shape, rows, loss_operation, whole=float(T * V * item))]


def supervised(size: Size, percent: int) -> int:
    return max(size.ids * percent // 100, 1)


def cross_entropy_work(draw: Draw, size: Size) -> Work:
    """A chunk of logits that becomes its own gradient; the plain form leaves it as it is."""
    logits, targets = (
        draw.normal(size.rows, size.vocabulary, dtype=size.dtype),
        draw.integers(0, size.vocabulary, size.rows),
    )
    memory = torch.empty_like(logits)

    def ours() -> list[torch.Tensor]:
        return [cross_entropy_(memory, targets, gradient=True, impl=draw.impl)[0], memory]

    def plain(x: torch.Tensor = memory) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        losses = F.cross_entropy(x if x.dtype == torch.float64 else x.float(), targets, reduction="none")
        return [losses.detach(), *torch.autograd.grad(losses.sum(), x)]

    truth = functools.cache(lambda: [(..., plain(logits.double()))])
    return Work(own_first(draw, ours, {PLAIN: plain}), PLAIN, within_twice(truth), lambda: memory.copy_(logits))


def loss_operation(draw: Draw, size: Size, percent: int, trained: bool) -> Operation:
    T, C, V = size.ids, size.width, size.vocabulary
    hidden, head = draw.normal(T, C, dtype=size.dtype), draw.normal(V, C, dtype=size.dtype) * C**-0.5
    targets, kept = draw.integers(0, V, T), draw.permutation(T)[: supervised(size, percent)].sort().values
    chosen = targets[kept]
    labels = torch.full_like(targets, loss.IGNORE).index_copy(0, kept, chosen)

    def plain(hidden, head, _):
        return lambda: F.cross_entropy((hidden @ head.t()).float(), labels, ignore_index=loss.IGNORE, reduction="sum")

    def selected(hidden, head, _):
        return lambda: F.cross_entropy((hidden.index_select(0, kept) @ head.t()).float(), chosen, reduction="sum")

    def ours(hidden, head, _):
        return lambda: linear_cross_entropy(draw, hidden.index_select(0, kept), chosen, head)

    def liger(hidden, head, _):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        options = {"reduction": "sum", "accum_dtype": torch.float32}
        return lambda: liger_fused_linear_cross_entropy(hidden.index_select(0, kept), head, chosen, **options)

    def truth(hidden, head, _):
        # A chunk's logits are computed again for the gradient, or all would be held in float64.
        chunk = lambda rows, ids: F.cross_entropy(hidden[rows] @ head.t(), ids, reduction="sum")  # noqa: E731
        pairs = list(zip(kept.split(1024), chosen.split(1024), strict=True))
        return lambda: sum(checkpoint(chunk, *pair, use_reentrant=False) for pair in pairs)

    others = {PLAIN: plain, SELECTED: selected, LIGER: liger}
    dout = torch.ones((), device=draw.device)
    return Operation((hidden, head, dout), (True, trained, False), ours, others, truth)


def linear_cross_entropy(draw: Draw, rows: torch.Tensor, targets: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """The total of the loss. It has no `impl`, and of itself would not take the kernel under the interpreter."""
    if not (draw.impl == "triton" and INTERPRETED):
        return loss.linear_cross_entropy(rows, targets, (head,))[0]
    with mock.patch.object(loss, "cross_entropy_", functools.partial(cross_entropy_, impl=draw.impl)):
        return loss.linear_cross_entropy(rows, targets, (head,))[0]

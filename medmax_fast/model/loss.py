"""Packed forward pass and the loss head: cross-entropy over the supervised ids only, with no id masked.

Stock transformers sets the logits of image ids to the smallest float before its loss, so nothing trained with it
can learn to draw. Here the hidden states of the supervised positions alone go through the head, in chunks whose
logits fit a byte budget: a 16k pack at the full vocabulary would hold 2 GB of them in bf16, several times over.

The gradient is made in the forward pass, chunk by chunk: a chunk's logits become their own gradient in place
(kernels/cross_entropy.py), of which the gradients of states and head follow at once, as the loss is a sum that the
backward pass only scales. So nothing is computed twice (a checkpointed chunk costs a fourth product of the size of the
head) and the backward pass needs neither logits nor head: ZeRO-3, which has the head's weight gathered while the head's
module runs forward, may have put it away by then. Costs: the head's gradient, fp32 where it is trained, is held from
the forward pass on; and a second derivative does not exist.

Shapes: T ids of a pack, S supervised positions, C channels of a hidden state, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from medmax_fast.kernels.cross_entropy import cross_entropy_

IGNORE = -100
# Logits of a chunk: 2,048 rows in bf16 at the full vocabulary, enough to keep the matrix products of a GPU busy.
LOGIT_BYTES = 256 << 20
# Columns that a block's logits start at a multiple of: 128 bytes in 16 bit. Matrix products with an operand that is not
# aligned to 16 bytes take slower kernels, and the image rows of the head start at row 4.
COLUMN_ALIGN = 64


def packed_hidden(model: nn.Module, batch: dict) -> torch.Tensor:
    """Last hidden states [T, C] of a packed batch (`PackedBatch.to_torch`), sequences kept apart.

    The layers are called here and not through the model's own forward pass, which looks at the positions on the host
    to find out whether it may leave its attention mask away.
    """
    inner = model.model
    hidden = inner.embed_tokens(batch["input_ids"])
    rotary = inner.rotary_emb(hidden, position_ids=batch["position_ids"])
    packing = {"cu_seq_lens_q": batch["cu_seqlens"], "max_length_q": batch["max_seqlen"]}
    for layer in inner.layers:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, use_cache=False, **packing)
        # Some releases of transformers return the hidden states alone.
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return inner.norm(hidden)[0]


def packed_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """Summed cross-entropy (nats, fp32 scalar) of a packed batch over its supervised ids, with its loss_weights if any.

    model: what `load_model` returns.
    batch: `PackedBatch.to_torch`; "target_tokens", the number of supervised ids, spares a host sync where it is there.
    Divide by the number of supervised ids (or the sum of their weights) of the whole optimizer step, over all
    micro-batches and ranks: then the gradient does not depend on how the rows were packed or shared out.
    """
    return batch_losses(packed_hidden(model, batch), batch, (model.lm_head.weight,))[0]


def batch_losses(
    hidden_TC: torch.Tensor, batch: dict, blocks: Sequence[torch.Tensor], z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`target_losses` with the labels, weights and count of a packed batch."""
    weights = batch.get("loss_weights")
    weights = None if weights is None else weights[0]
    return target_losses(hidden_TC, batch["labels"][0], blocks, weights, z_loss, batch.get("target_tokens"))


def target_losses(
    hidden_TC: torch.Tensor,
    labels_T: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    loss_weights_T: torch.Tensor | None = None,
    z_loss: float = 0.0,
    count: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(total, losses_S, targets_S, positions_S): `linear_cross_entropy` of every supervised id, and which those are.

    labels_T: int64, unshifted (the state at t predicts labels[t + 1]), IGNORE where not supervised. The first label of
    each packed row must be IGNORE, or its predecessor's last state would predict it. loss_weights_T: float32, the
    weight of the label at t. count: the number of labels that are not IGNORE, the first label aside, where the host
    knows it: then nothing waits for the device. A count too low leaves targets out, one too high is an index error.
    positions_S: int64, the t of the states; targets_S = labels_T[positions_S + 1].
    """
    supervised = labels_T[1:] != IGNORE
    found = supervised.nonzero() if count is None else torch.nonzero_static(supervised, size=count)
    positions = found[:, 0]
    targets = labels_T[1:].index_select(0, positions)
    weights = None if loss_weights_T is None else loss_weights_T[1:].index_select(0, positions)
    total, losses = linear_cross_entropy(hidden_TC.index_select(0, positions), targets, blocks, weights, z_loss)
    return total, losses, targets, positions


def linear_cross_entropy(
    rows_SC: torch.Tensor,
    targets_S: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    weights_S: torch.Tensor | None = None,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(total, losses_S): sum of weights * (losses + z_loss * lse^2), an fp32 scalar with gradient, and the losses.

    rows_SC: [S, C]; S may be 0: then the total is 0 and every gradient zeros. targets_S: int64. blocks: the head in
    parts [n, C] of the rows' dtype, of which those that require it get a gradient; one behind the other they are the
    [V, C] head, but no such copy is made. weights_S: float32, 1 without, of about 1: small ones would be lost where
    gradients are fp16, so scale the total instead. losses_S: float32, lse - x_t in nats (see kernels/cross_entropy.py,
    also for targets out of range), without gradient. Gradients are accumulated in fp32 and rounded as they are handed
    over.
    """
    return _LinearCrossEntropy.apply(rows_SC, targets_S, weights_S, z_loss, torch.is_grad_enabled(), *blocks)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        z_loss: float,
        differentiable: bool,
        *blocks: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Under no_grad, needs_input_grad still says what the tensors would want.
        wanted = [differentiable and needed for needed in ctx.needs_input_grad]
        rows_wanted, blocks_wanted = wanted[0], wanted[5:]
        spans, width = _spans(blocks)
        columns = _columns(targets, blocks, spans)
        losses, lse = torch.empty(2, len(rows), dtype=torch.float32, device=rows.device)
        d_rows = torch.empty_like(rows, memory_format=torch.contiguous_format) if rows_wanted else None
        d_blocks = [
            torch.zeros_like(block, dtype=torch.float32) if needed else None
            for block, needed in zip(blocks, blocks_wanted, strict=True)
        ]
        step = max(LOGIT_BYTES // (width * rows.element_size()), 1)
        memory = rows.new_empty(min(step, len(rows)), width)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            logits = memory[: len(rows[part])]
            _head_product_(logits, rows[part], blocks, spans)
            part_weights = None if weights is None else weights[part]
            losses[part], lse[part] = cross_entropy_(logits, columns[part], part_weights, z_loss, gradient=any(wanted))
            # From here on the gradient of the logits.
            if d_rows is not None:
                _head_product_back_(d_rows[part], logits, blocks, spans)
            for d_block, (first, last) in zip(d_blocks, spans, strict=True):
                if d_block is not None:
                    _add_product_(d_block, logits[:, first:last].t(), rows[part])
        ctx.save_for_backward(d_rows, *d_blocks)
        ctx.dtypes = [tensor.dtype for tensor in (rows, *blocks)]
        ctx.mark_non_differentiable(losses)
        minimised = losses + z_loss * lse * lse if z_loss else losses
        return (minimised if weights is None else minimised * weights).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: torch.Tensor, _: Any) -> tuple:
        # With a dimension, so that a 16-bit gradient is scaled in fp32, and rounded once as it is written.
        d_total = d_total.reshape(1)
        d_rows, *d_blocks = (
            None if d is None else torch.mul(d, d_total, out=torch.empty_like(d, dtype=dtype))
            for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return d_rows, None, None, None, None, *d_blocks


def _spans(blocks: Sequence[torch.Tensor]) -> tuple[list[tuple[int, int]], int]:
    """First and last + 1 column of each block's logits, and the columns of all; between blocks are gaps."""
    spans, width = [], 0
    for block in blocks:
        spans.append((width, width + len(block)))
        width += -(-len(block) // COLUMN_ALIGN) * COLUMN_ALIGN
    return spans, width


def _columns(targets: torch.Tensor, blocks: Sequence[torch.Tensor], spans: list[tuple[int, int]]) -> torch.Tensor:
    """The column of each target id; ids that the vocabulary does not have stay out of range."""
    columns, size = targets, 0
    for block, (_, last) in zip(blocks, spans, strict=True):
        size += len(block)
        if gap := -last % COLUMN_ALIGN:
            columns = columns + gap * (targets >= size)
    return columns


def _head_product_(
    logits: torch.Tensor, rows: torch.Tensor, blocks: Sequence[torch.Tensor], spans: list[tuple[int, int]]
) -> None:
    """logits = rows @ head^T, and -inf in the gaps."""
    for block, (first, last) in zip(blocks, spans, strict=True):
        torch.mm(rows, block.t(), out=logits[:, first:last])
        logits[:, last : last + -last % COLUMN_ALIGN] = -torch.inf


def _head_product_back_(
    d_rows: torch.Tensor, d_logits: torch.Tensor, blocks: Sequence[torch.Tensor], spans: list[tuple[int, int]]
) -> None:
    """d_rows = d_logits @ head; of several blocks added up in fp32."""
    if len(blocks) == 1:
        torch.mm(d_logits[:, : len(blocks[0])], blocks[0], out=d_rows)
        return
    total = torch.zeros_like(d_rows, dtype=torch.float32)
    for block, (first, last) in zip(blocks, spans, strict=True):
        _add_product_(total, d_logits[:, first:last], block)
    d_rows.copy_(total)


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b; total is fp32, a and b may be 16 bit."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        # The product of 16-bit matrices is neither rounded nor stored apart. No CPU kernel in torch 2.13.
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.add_(a @ b)

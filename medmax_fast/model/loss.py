"""Packed forward pass and the loss head: cross-entropy over the supervised ids only, with no id masked.

Stock transformers sets the logits of image ids to the smallest float before its loss, so nothing trained with it
can learn to draw. Here the hidden states of the supervised positions alone go through the head, in chunks, so that
no [tokens, vocabulary] tensor exists: 65,536 x 4 bytes a row is 256 KB, and a 16k pack would hold 4 GB of logits.

Shapes: T ids of a pack, S supervised positions, V vocabulary.
"""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100
# Rows per chunk of the head: 1,024 rows of fp32 logits are 256 MB at the full vocabulary.
CHUNK_ROWS = 1024


def packed_hidden(model, batch: dict) -> torch.Tensor:
    """Last hidden states [T, dim] of a packed batch (`PackedBatch.to_torch`), sequences kept apart."""
    return model.model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        cu_seq_lens_q=batch["cu_seqlens"],
        cu_seq_lens_k=batch["cu_seqlens"],
        max_length_q=batch["max_seqlen"],
        max_length_k=batch["max_seqlen"],
        use_cache=False,
    ).last_hidden_state[0]


def target_losses(hidden: torch.Tensor, labels: torch.Tensor, head) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in nats of every supervised id: (losses fp32 [S], target ids int64 [S]).

    hidden: [T, dim]; labels: int64 [T], unshifted (the state at t predicts labels[t + 1]), IGNORE where not
    supervised. The first label of each packed row must be IGNORE, or its predecessor's last state would predict it.
    """
    positions = (labels[1:] != IGNORE).nonzero()[:, 0]
    targets = labels[positions + 1]
    rows = hidden[positions]
    if len(rows) == 0:
        # Keeps the graph whole, so that a micro-batch without targets still runs backward on every rank.
        return hidden.sum()[None][:0].float() + head(hidden[:1]).sum().float() * 0, targets
    losses = []
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS], targets[start : start + CHUNK_ROWS]
        if torch.is_grad_enabled() and len(rows) > CHUNK_ROWS:
            losses.append(checkpoint(_chunk_losses, *chunk, head, use_reentrant=False))
        else:
            losses.append(_chunk_losses(*chunk, head))
    return torch.cat(losses), targets


def _chunk_losses(rows: torch.Tensor, targets: torch.Tensor, head) -> torch.Tensor:
    return F.cross_entropy(head(rows).float(), targets, reduction="none")


def packed_loss(model, batch: dict) -> torch.Tensor:
    """Summed cross-entropy (nats, fp32 scalar) of a packed batch over its supervised ids.

    Divide by the number of supervised ids of the whole optimizer step, over all micro-batches and ranks: then the
    gradient does not depend on how the rows were packed or shared out.
    """
    losses, _ = target_losses(packed_hidden(model, batch), batch["labels"][0], model.lm_head)
    return losses.sum()

"""A loaded model made ready for training: the module that DeepSpeed wraps, and its weights by checkpoint names.

Three things differ from the model as loaded. The head computes the loss in one module call, so that ZeRO-3 gathers
its weight once per micro-batch on every rank, however many chunks of targets a rank has. A full fine-tuning holds
each query/key norm as the one vector that all heads share, so that its gradient is the sum over heads and the result
fits the Chameleon layout again by construction. And text and image targets are summed apart, for the log.
"""

import torch
from torch import nn
from torch.nn import functional as F

from medmax_fast.model.loss import IGNORE, packed_hidden, target_losses
from medmax_fast.runtime import log
from medmax_fast.vocab import IdLayout

# What PackedModel adds in front of the names that transformers gives.
PREFIX = "model."


class LossHead(nn.Module):
    """The output projection together with the cross-entropy; `weight` [vocabulary, dim] keeps its name."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As loss.target_losses: (losses fp32 [S], target ids int64 [S])."""
        return target_losses(hidden, labels, lambda rows: F.linear(rows, self.weight))


class SharedNorm(nn.Module):
    """A query or key norm with one weight and bias vector [head_dim] for all heads."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.weight = nn.Parameter(norm.weight.detach()[0].clone())
        self.bias = nn.Parameter(norm.bias.detach()[0].clone())
        self.eps = norm.eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        # Scaled after the norm and not inside it: rounds in 16 bit as inference does.
        return F.layer_norm(states, states.shape[-1:], eps=self.eps) * self.weight + self.bias


class PackedModel(nn.Module):
    """Packed batch in, summed loss out.

    forward(batch) returns (loss, parts): loss is the summed cross-entropy in nats, an fp32 scalar with gradient;
    parts is fp64 [4] without: loss of text targets, loss of image targets, number of each. Image targets are the
    image codes; boi and eoi count as text.
    """

    def __init__(self, model: nn.Module, layout: IdLayout):
        super().__init__()
        model.lm_head = LossHead(model.lm_head.weight)
        self.model = model
        self._images = layout.image_start, layout.image_end

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        losses, targets = self.model.lm_head(packed_hidden(self.model, batch), batch["labels"][0])
        image = (targets >= self._images[0]) & (targets < self._images[1])
        detached = losses.detach().double()
        zero = detached.new_zeros(())
        sums = [torch.where(image, zero, detached).sum(), torch.where(image, detached, zero).sum()]
        return losses.sum(), torch.stack([*sums, (~image).sum().double(), image.sum().double()])


def share_norms(model: nn.Module) -> int:
    """Replace every query/key norm whose heads are equal by a SharedNorm; returns how many were left as they are."""
    apart = 0
    for layer in model.model.layers:
        for name in ("q_norm", "k_norm"):
            norm = getattr(layer.self_attn, name)
            if all(torch.equal(p, p[:1].expand_as(p)) for p in (norm.weight, norm.bias)):
                setattr(layer.self_attn, name, SharedNorm(norm))
            else:
                apart += 1
    if apart:
        log(f"{apart} query/key norms of the base differ between heads and stay so: the result fits the hf layout only")
    return apart


def recompute_activations(model: nn.Module) -> None:
    """Keep each layer's input only, and run the layer again in the backward pass (less memory, a third more time)."""
    # The name before transformers 5.2x is the second one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def trained_tensor(state: dict[str, torch.Tensor], name: str, like: torch.Tensor) -> torch.Tensor:
    """The trained weight of a checkpoint tensor, in its shape: norms shared by heads are repeated per head.

    state: weights of a PackedModel by its own names; name, like: a checkpoint tensor in Hugging Face names.
    """
    tensor = state[PREFIX + name]
    if tensor.shape != like.shape:
        tensor = tensor.expand_as(like).contiguous()
    return tensor


def empty_batch(device) -> dict:
    """A packed batch of one id and no target: a micro-batch for a rank that has run out of packs."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    bounds = torch.tensor([0, 1], dtype=torch.int32, device=device)
    return {
        "input_ids": ids,
        "labels": torch.full_like(ids, IGNORE),
        "position_ids": ids,
        "cu_seqlens": bounds,
        "max_seqlen": 1,
    }

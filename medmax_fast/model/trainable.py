"""A loaded model made ready for training: what is trained, the module that DeepSpeed wraps, weights by their names.

Three things differ from the model as loaded. Its layers and adapters are fused (model.fused, model.adapter). The head
computes the loss in one module call, so that ZeRO-3 gathers its weight once per micro-batch on every rank, however many
chunks of targets a rank has. And text and image targets are summed apart, and losses by row, for the log.

Head and embeddings can be trained in part: the rows of image codes, boi and eoi alone are what taught Chameleon to draw
(Anole, arXiv 2407.06135). The trained rows are a parameter of their own, so no gradient and no optimizer state exists
for the others.
"""

import fnmatch
import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medmax_fast.config import TrainConfig
from medmax_fast.model.adapter import add_adapter, fuse_adapter
from medmax_fast.model.fused import fuse, share_norms
from medmax_fast.model.loss import IGNORE, batch_losses, packed_hidden
from medmax_fast.runtime import InputError, comma_list, log
from medmax_fast.vocab import IdLayout

# What PackedModel adds in front of the names that transformers gives.
PREFIX = "model."
HEAD, EMBEDDINGS = "lm_head", "model.embed_tokens"
# The narrowest product that selective recomputation keeps.
KEPT_WIDTH = 512


class LossHead(nn.Module):
    """The output projection together with the cross-entropy: `weight` [vocabulary, C], or `rows` of it trained alone.

    rows: half-open range of ids; the frozen rows before and behind them are parameters too, for ZeRO-3 to share out.
    """

    def __init__(self, weight: nn.Parameter, rows: tuple[int, int] | None = None, z_loss: float = 0.0):
        super().__init__()
        self.z_loss = z_loss
        if rows is None:
            self.weight = weight
            return
        parts = weight.detach().tensor_split(rows)
        self.before, self.after = (nn.Parameter(parts[i], requires_grad=False) for i in (0, 2))
        self.rows = nn.Parameter(parts[1].clone())

    @property
    def blocks(self) -> list[nn.Parameter]:
        """The head [vocabulary, C] in parts, one behind the other."""
        return [self.weight] if hasattr(self, "weight") else [self.before, self.rows, self.after]

    def forward(self, hidden_TC: torch.Tensor, batch: dict) -> tuple[torch.Tensor, ...]:
        """As loss.batch_losses."""
        return batch_losses(hidden_TC, batch, self.blocks, self.z_loss)


class RowEmbedding(nn.Module):
    """Input embeddings [vocabulary, C] of which only a half-open range of `rows` is trained."""

    def __init__(self, weight: nn.Parameter, rows: tuple[int, int]):
        super().__init__()
        self.first, self.end = rows
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.rows = nn.Parameter(weight.detach()[self.first : self.end].clone())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        trained = (ids >= self.first) & (ids < self.end)
        rows = F.embedding((ids - self.first).clamp(0, self.end - self.first - 1), self.rows)
        return torch.where(trained[..., None], rows, F.embedding(ids, self.weight))


class PackedModel(nn.Module):
    """Packed batch in, summed loss out.

    forward(batch) returns (loss, parts, row_losses). loss: summed cross-entropy in nats (weighted, and with the z-loss,
    if there are any), an fp32 scalar with gradient. parts: fp64 [4] without: unweighted loss of text targets, of image
    targets, number of each; image targets are the image codes, boi and eoi count as text. row_losses: fp64 [n], the
    unweighted losses summed by row of the pack.
    """

    def __init__(self, model: nn.Module, layout: IdLayout):
        super().__init__()
        if not isinstance(model.lm_head, LossHead):
            model.lm_head = LossHead(model.lm_head.weight)
        self.model = model
        self._images = layout.image_start, layout.image_end

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total, losses, targets, positions = self.model.lm_head(packed_hidden(self.model, batch), batch)
        losses = losses.double()
        image = (targets >= self._images[0]) & (targets < self._images[1])
        zero = losses.new_zeros(())
        sums = [torch.where(image, zero, losses).sum(), torch.where(image, losses, zero).sum()]
        ends = batch["cu_seqlens"][1:]
        row = torch.bucketize(positions.to(ends.dtype), ends, right=True)
        row_losses = losses.new_zeros(len(ends)).index_add(0, row, losses)
        return total, torch.stack([*sums, (~image).sum().double(), image.sum().double()]), row_losses


def prepare(model: nn.Module, config: TrainConfig, layout: IdLayout) -> PackedModel:
    """A model as loaded, made into what `config` trains: fused, its weights frozen or not, in training mode.

    InputError if nothing is left to train.
    """
    fuse(model)
    if config.full:
        if apart := share_norms(model):
            log(f"{apart} query/key norms of the base differ between heads and stay so: the result fits hf only")
        _freeze(model, config.freeze)
    elif config.lora_rank:
        add_adapter(model, config)
        fuse_adapter(model)
    else:
        model.requires_grad_(False)
    images = layout.image_start, layout.boi + 1
    head, table = model.lm_head.weight, model.model.embed_tokens.weight
    for weight, choice in ((head, config.head), (table, config.embeddings)):
        weight.requires_grad_(weight.requires_grad or choice == "all")
    model.lm_head = LossHead(head, images if config.head == "image" else None, config.z_loss)
    if config.embeddings == "image":
        model.model.embed_tokens = RowEmbedding(table, images)
    if config.recompute != "none":
        recompute_activations(model, config.recompute == "selective")
    return PackedModel(model, layout).train()


def check_choice(config: TrainConfig) -> None:
    """InputError for flags on what is trained that do not go together."""
    if config.full and (config.head, config.embeddings) != ("none", "none"):
        name = "head" if config.head != "none" else "embeddings"
        raise InputError(f"--{name} {getattr(config, name)}: --full trains all of it; use --freeze to keep weights")
    if config.freeze and not config.full:
        raise InputError(f"--freeze {config.freeze}: only with --full; an adapter leaves all weights as they are")
    if not config.full and not config.lora_rank and (config.head, config.embeddings) == ("none", "none"):
        raise InputError("--lora-rank 0: nothing to train; expected a rank, or --head or --embeddings")


def _freeze(model: nn.Module, patterns: str) -> None:
    for pattern in comma_list(patterns):
        matching = [p for name, p in model.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            example = next(name for name, _ in model.named_parameters() if ".layers." in name)
            raise InputError(f"--freeze {pattern}: no weight has such a name, which are like {example}")
        for parameter in matching:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(f"--freeze {patterns}: nothing is left to train")


def recompute_activations(model: nn.Module, selective: bool = False) -> None:
    """Compute activations again in the backward pass instead of keeping them.

    Each layer keeps its input only (a third more time); `selective` keeps the results of wide matrix products, with the
    adapter's part in them, and of attention as well, so that norms, rotations and SwiGLU are done again.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep)
    # The name before transformers 5.2x is the second one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)


def _keep(_, operation, *arguments, **__):
    from torch.utils.checkpoint import CheckpointPolicy

    name = operation.name()
    attention = "attention" in name or "attn" in name or "flash" in name
    adapted = name == "medmax::lora_linear"
    product = name in ("aten::mm", "aten::addmm", "aten::bmm")
    if attention or adapted or (product and min(arguments[-1].shape[-2:]) >= KEPT_WIDTH):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


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
        "target_tokens": 0,
    }

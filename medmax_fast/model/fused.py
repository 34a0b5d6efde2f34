"""The decoder layers of a loaded Chameleon with their fused kernels, for training on packed rows.

Projections and the names of all weights stay as transformers made them, so adapters and checkpoints fit; what changes
is what lies between the products. Per layer, a query or key is normalised and rotated in one kernel and never
transposed, since packed attention wants [T, H, D], which is how a projection leaves it; both RMSNorms and SiLU * up
are one kernel each. On a CPU each runs as its torch reference. Modules own the weights they use: ZeRO-3 gathers a
weight when its module runs, and would not notice one that is read from outside.

Shapes: T ids of a pack, H heads, D head width, C model width.
"""

import torch
from torch import nn

from medmax_fast.kernels.qk_norm_rope import norm_rope
from medmax_fast.kernels.rms_norm import rms_norm
from medmax_fast.kernels.swiglu import swiglu


class NormRope(nn.Module):
    """Query or key norm, then rotary positions; weight and bias [H, D], or [D] where all heads share them."""

    def __init__(self, norm: nn.Module, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        # transformers' ChameleonLayerNorm computes with this one whatever its own eps says.
        self.eps = eps

    def share(self) -> bool:
        """Hold one vector for all heads from now on, whose gradient is the sum over heads; False if heads differ."""
        if not all(torch.equal(p, p[:1].expand_as(p)) for p in (self.weight, self.bias)):
            return False
        self.weight, self.bias = (nn.Parameter(p.detach()[0].clone()) for p in (self.weight, self.bias))
        return True

    def forward(self, x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
        half = x_THD.shape[-1] // 2
        return norm_rope(x_THD, self.weight, self.bias, cos_TD[:, :half], sin_TD[:, :half], self.eps)


class RMSNorm(nn.Module):
    """RMSNorm with weight [C]."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedMLP(nn.Module):
    """down(SiLU(gate(x)) * up(x))."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class PackedAttention(nn.Module):
    """Attention over one packed row, through the model's chosen implementation (model.attention)."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, getattr(attention, name))
        self.q_norm, self.k_norm = NormRope(attention.q_norm), NormRope(attention.k_norm)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings, attention_mask=None, **packing
    ) -> tuple[torch.Tensor, None]:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        rows, length, _ = hidden_states.shape
        if rows != 1:
            raise ValueError(f"a packed batch is one row, got {rows}")
        q, k, v = (project(hidden_states) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x.view(length, -1, self.head_dim) for x in (q, k, v))
        cos_TD, sin_TD = (table[0] for table in position_embeddings)
        q, k = self.q_norm(q, cos_TD, sin_TD), self.k_norm(k, cos_TD, sin_TD)
        # The interface wants [1, H, T, D]; these are views, and so is its answer.
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = attend(self, q, k, v, attention_mask, scaling=self.scaling, **packing)
        return self.o_proj(out.reshape(1, length, -1)), None


def fuse(model: nn.Module) -> None:
    """Replace norms, MLPs and attention of a loaded ChameleonForConditionalGeneration by the fused ones, in place.

    It takes packed batches only from then on (loss.packed_hidden). Do this before an adapter is put on.
    """
    for layer in model.model.layers:
        layer.self_attn = PackedAttention(layer.self_attn)
        layer.mlp = GatedMLP(layer.mlp)
        layer.input_layernorm = RMSNorm(layer.input_layernorm)
        layer.post_attention_layernorm = RMSNorm(layer.post_attention_layernorm)
    model.model.norm = RMSNorm(model.model.norm)


def share_norms(model: nn.Module) -> int:
    """Tie every query and key norm of a fused model over its heads; returns how many have heads that differ.

    Full fine-tuning trains the one vector that all heads share, so that the result fits the Chameleon layout again.
    """
    norms = [module for module in model.modules() if isinstance(module, NormRope)]
    return sum(not norm.share() for norm in norms)

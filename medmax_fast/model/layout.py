"""The shape of the language model, and the one declared table between the names of the two checkpoint layouts."""

from dataclasses import dataclass

import torch

MAX_POSITIONS = 4096


@dataclass(frozen=True)
class Key:
    """One tensor: its name in both layouts, how its rows are ordered, and how shards of it join."""

    chameleon: str
    hf: str
    # plain | rotary: rows go from interleaved to half-split pairs | qk_norm: the same for a vector shared by heads.
    kind: str = "plain"
    # Axis along which shards are concatenated; None for tensors that every shard holds whole.
    axis: int | None = None


GLOBAL_KEYS = (
    Key("tok_embeddings.weight", "model.embed_tokens.weight", axis=1),
    Key("norm.weight", "model.norm.weight"),
    Key("output.weight", "lm_head.weight", axis=0),
)
LAYER_KEYS = (
    Key("attention.wq.weight", "self_attn.q_proj.weight", "rotary", axis=0),
    Key("attention.wk.weight", "self_attn.k_proj.weight", "rotary", axis=0),
    Key("attention.wv.weight", "self_attn.v_proj.weight", axis=0),
    Key("attention.wo.weight", "self_attn.o_proj.weight", axis=1),
    Key("feed_forward.w1.weight", "mlp.gate_proj.weight", axis=0),
    Key("feed_forward.w3.weight", "mlp.up_proj.weight", axis=0),
    Key("feed_forward.w2.weight", "mlp.down_proj.weight", axis=1),
    Key("attention_norm.weight", "input_layernorm.weight"),
    Key("ffn_norm.weight", "post_attention_layernorm.weight"),
    Key("attention.q_normalization.weight", "self_attn.q_norm.weight", "qk_norm"),
    Key("attention.q_normalization.bias", "self_attn.q_norm.bias", "qk_norm"),
    Key("attention.k_normalization.weight", "self_attn.k_norm.weight", "qk_norm"),
    Key("attention.k_normalization.bias", "self_attn.k_norm.bias", "qk_norm"),
)


def keys(layers: int) -> list[Key]:
    """The whole table for a model of so many layers."""
    table = list(GLOBAL_KEYS)
    for i in range(layers):
        table += [Key(f"layers.{i}.{k.chameleon}", f"model.layers.{i}.{k.hf}", k.kind, k.axis) for k in LAYER_KEYS]
    return table


@dataclass(frozen=True)
class ModelShape:
    """Shape of the language model."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    swin_norm: bool = False

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @classmethod
    def from_params(cls, spec: dict) -> "ModelShape":
        """From params.json; the hidden width follows Llama's rule of multiples."""
        p = spec["model"]
        multiple, dim = p["multiple_of"], p["dim"]
        wide = int((p.get("ffn_dim_multiplier") or 1.0) * int(8 * dim / 3))
        return cls(
            dim=dim,
            layers=p["n_layers"],
            heads=p["n_heads"],
            kv_heads=p.get("n_kv_heads") or p["n_heads"],
            hidden=multiple * -(-wide // multiple),
            vocab_size=p["vocab_size"],
            norm_eps=p.get("norm_eps", 1e-5),
            rope_theta=p.get("rope_theta", 10000.0),
            swin_norm=bool(p.get("swin_norm", False)),
        )

    @classmethod
    def from_hf(cls, c: dict) -> "ModelShape":
        """From a Hugging Face config.json."""
        theta = (c.get("rope_parameters") or {}).get("rope_theta") or c.get("rope_theta") or 10000.0
        return cls(
            dim=c["hidden_size"],
            layers=c["num_hidden_layers"],
            heads=c["num_attention_heads"],
            kv_heads=c.get("num_key_value_heads") or c["num_attention_heads"],
            hidden=c["intermediate_size"],
            vocab_size=c["vocab_size"],
            norm_eps=c.get("rms_norm_eps", 1e-5),
            rope_theta=theta,
            swin_norm=bool(c.get("swin_norm", False)),
        )

    def to_params(self) -> dict:
        """A params.json that from_params reads back to this shape."""
        wide = int(8 * self.dim / 3)
        multiple = next((m for m in (256, 128, 64, 32) if m * -(-wide // m) == self.hidden), 1)
        p = {
            "dim": self.dim,
            "n_layers": self.layers,
            "n_heads": self.heads,
            "n_kv_heads": None if self.kv_heads == self.heads else self.kv_heads,
            "vocab_size": self.vocab_size,
            # The +0.5 keeps int() from falling below the width when the ratio is not exact.
            "ffn_dim_multiplier": 1.0 if multiple > 1 else (self.hidden + 0.5) / wide,
            "multiple_of": multiple,
            "norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "qk_normalization": True,
            "swin_norm": self.swin_norm,
        }
        return {"model": p, "model_parallel_size": 1}


def half_split(rows: torch.Tensor, head_dim: int | None = None) -> torch.Tensor:
    """Rows of each head from interleaved rotary pairs (0, 1, 2, 3, ..) to half-split ones (0, 2, .., 1, 3, ..)."""
    head_dim = head_dim or rows.shape[0]
    tail = rows.shape[1:]
    return rows.reshape(-1, head_dim // 2, 2, *tail).transpose(1, 2).reshape(rows.shape)


def interleave(rows: torch.Tensor, head_dim: int | None = None) -> torch.Tensor:
    """The inverse of half_split."""
    head_dim = head_dim or rows.shape[0]
    tail = rows.shape[1:]
    return rows.reshape(-1, 2, head_dim // 2, *tail).transpose(1, 2).reshape(rows.shape)

"""The shape of the language model, and the one declared table between the two checkpoint layouts.

A Chameleon checkpoint (Meta, Anole, MedMax) differs from a Hugging Face one in four ways, all of them here and all of
them invertible: names; the rows of wq and wk, whose rotary pairs lie side by side instead of half a head apart; the
norms of queries and keys, one vector for all heads instead of one per head; and shards, cut along an axis per tensor,
of which the larger models have several. `to_hf` and `to_chameleon` do one tensor each way.
"""

from dataclasses import dataclass, replace

import torch

MAX_POSITIONS = 4096


@dataclass(frozen=True)
class Key:
    """One tensor: its name in both layouts, its size, how its rows are ordered, and how shards of it join."""

    chameleon: str
    hf: str
    # Size in the Hugging Face layout, in fields of ModelShape; vectors have no columns.
    rows: str
    columns: str = ""
    # plain | rotary: rows go from interleaved to half-split pairs | qk_norm: the same for a vector shared by heads.
    kind: str = "plain"
    # Axis along which shards are concatenated; None for what every shard holds whole (qk_norm: for its own heads).
    axis: int | None = None

    def size(self, shape: "ModelShape") -> tuple[int, ...]:
        """Its size in the Hugging Face layout."""
        return tuple(getattr(shape, name) for name in (self.rows, self.columns) if name)

    def part_size(self, shape: "ModelShape", shards: int) -> tuple[int, ...]:
        """The size of one shard's part of it in the Chameleon layout."""
        if self.kind == "qk_norm":
            return (shape.head_dim,)
        return tuple(n // shards if axis == self.axis else n for axis, n in enumerate(self.size(shape)))


GLOBAL_KEYS = (
    Key("tok_embeddings.weight", "model.embed_tokens.weight", "vocab_size", "dim", axis=1),
    Key("norm.weight", "model.norm.weight", "dim"),
    Key("output.weight", "lm_head.weight", "vocab_size", "dim", axis=0),
)
LAYER_KEYS = (
    Key("attention.wq.weight", "self_attn.q_proj.weight", "dim", "dim", "rotary", axis=0),
    Key("attention.wk.weight", "self_attn.k_proj.weight", "kv_dim", "dim", "rotary", axis=0),
    Key("attention.wv.weight", "self_attn.v_proj.weight", "kv_dim", "dim", axis=0),
    Key("attention.wo.weight", "self_attn.o_proj.weight", "dim", "dim", axis=1),
    Key("feed_forward.w1.weight", "mlp.gate_proj.weight", "hidden", "dim", axis=0),
    Key("feed_forward.w3.weight", "mlp.up_proj.weight", "hidden", "dim", axis=0),
    Key("feed_forward.w2.weight", "mlp.down_proj.weight", "dim", "hidden", axis=1),
    Key("attention_norm.weight", "input_layernorm.weight", "dim"),
    Key("ffn_norm.weight", "post_attention_layernorm.weight", "dim"),
    Key("attention.q_normalization.weight", "self_attn.q_norm.weight", "heads", "head_dim", "qk_norm"),
    Key("attention.q_normalization.bias", "self_attn.q_norm.bias", "heads", "head_dim", "qk_norm"),
    Key("attention.k_normalization.weight", "self_attn.k_norm.weight", "kv_heads", "head_dim", "qk_norm"),
    Key("attention.k_normalization.bias", "self_attn.k_norm.bias", "kv_heads", "head_dim", "qk_norm"),
)


def keys(layers: int) -> list[Key]:
    """The whole table for a model of so many layers."""
    table = list(GLOBAL_KEYS)
    for i in range(layers):
        table += [replace(k, chameleon=f"layers.{i}.{k.chameleon}", hf=f"model.layers.{i}.{k.hf}") for k in LAYER_KEYS]
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

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim

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


class Disagreement(ValueError):
    """Copies of one value that differ by more than rounding, at most by `apart` (NaN: some are not finite)."""

    def __init__(self, apart: float):
        super().__init__(f"copies differ by up to {apart:.3g}")
        self.apart = apart


def to_hf(key: Key, parts: list[torch.Tensor], shape: ModelShape) -> torch.Tensor:
    """A tensor of the Hugging Face layout from the parts of all Chameleon shards (`part_size` each), in their order.

    Disagreement where shards should hold copies of one vector and do not. A tensor that needs no change is no copy.
    """
    if key.kind == "qk_norm":
        heads = key.size(shape)[0] // len(parts)
        return torch.cat([half_split(part)[None].expand(heads, -1) for part in parts])
    if key.axis is None:
        return agreed(torch.stack(parts)) if len(parts) > 1 else parts[0]
    whole = torch.cat(parts, key.axis) if len(parts) > 1 else parts[0]
    return half_split(whole, shape.head_dim) if key.kind == "rotary" else whole


def to_chameleon(
    key: Key, tensor: torch.Tensor, shape: ModelShape, shards: int = 1, average: bool = False
) -> list[torch.Tensor]:
    """The inverse of to_hf: the parts of so many Chameleon shards.

    Disagreement where heads that have to share a norm do not agree on it, unless they are to be averaged.
    """
    if key.kind == "qk_norm":
        return [interleave(agreed(heads, average)) for heads in tensor.chunk(shards)]
    if key.kind == "rotary":
        tensor = interleave(tensor, shape.head_dim)
    return [tensor] * shards if key.axis is None else list(tensor.chunk(shards, key.axis))


def agreed(copies: torch.Tensor, average: bool = False) -> torch.Tensor:
    """What all `copies` [n, ...] hold; their mean where they differ by one unit in the last place, or by `average`."""
    # By their bits, so that NaN equals itself.
    bits = copies.contiguous().view(torch.uint8)
    if torch.equal(bits, bits[:1].expand_as(bits)):
        return copies[0]
    values, kind = copies.double(), torch.finfo(copies.dtype)
    apart, size = values.amax(0) - values.amin(0), values.abs().amax(0)
    unit = kind.eps * size.clamp(min=kind.smallest_normal)
    if not average and not bool((size.isfinite() & (apart <= unit)).all()):
        raise Disagreement(apart.max().item())
    return values.mean(0).to(copies.dtype)


def can_split(shape: ModelShape, shards: int) -> bool:
    """Whether every tensor can be cut into so many equal parts, whole heads each."""
    return all(n % shards == 0 for n in (shape.vocab_size, shape.dim, shape.hidden, shape.heads, shape.kv_heads))


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

"""The VQGAN that turns a 512 x 512 picture into 32 x 32 codes and back, as plain torch modules.

Module names follow the taming-transformers checkpoint (`encoder.down.0.block.0.norm1.weight`, ...), which the
Hugging Face layout keeps under `model.vqmodel.`, so both load without renaming. Not torch are the nearest-code
search, the `vq` kernel, which never builds the [N, 8192] distance matrix, and on a GPU GroupNorm with SiLU.

The convolutions of the encoder and the decoder may be held in 16 bits; the norms' affine parts, the 1x1 convolutions
around the codebook and the codebook itself stay in fp32.

Shapes: B pictures, C channels, H and W pixels, D the code dimension, K the number of codes.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from medmax_fast.kernels.group_norm import group_norm_silu
from medmax_fast.kernels.vq import nearest_code

GROUPS = 32
NORM_EPS = 1e-6


@dataclass(frozen=True)
class VQConfig:
    """Shape of a VQGAN, in the names of vqgan.yaml."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    embed_dim: int = 256
    n_embed: int = 8192
    resolution: int = 512
    in_channels: int = 3
    out_ch: int = 3
    double_z: bool = False
    attn_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0

    # Hugging Face's names for the same facts (its configuration has no out_ch).
    HF_NAMES = {
        "ch": "base_channels",
        "ch_mult": "channel_multiplier",
        "z_channels": "latent_channels",
        "n_embed": "num_embeddings",
        "double_z": "double_latent",
    }

    @classmethod
    def from_yaml(cls, spec: dict) -> "VQConfig":
        """From the parsed vqgan.yaml; KeyError or TypeError where it lacks something."""
        params = spec["model"]["params"]
        values = {**params["ddconfig"], "embed_dim": params["embed_dim"], "n_embed": params["n_embed"]}
        return cls._from(values)

    @classmethod
    def from_hf(cls, spec: dict) -> "VQConfig":
        """From the `vq_config` of a Hugging Face config.json."""
        return cls._from({name: spec.get(cls.HF_NAMES.get(name, name)) for name in cls.__dataclass_fields__})

    @classmethod
    def _from(cls, values: dict) -> "VQConfig":
        kept = {k: v for k, v in values.items() if k in cls.__dataclass_fields__ and v is not None}
        shape: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
        return cls(**shape)

    def to_yaml(self) -> dict:
        """The vqgan.yaml that describes this shape."""
        ddconfig = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        top = {"embed_dim": ddconfig.pop("embed_dim"), "n_embed": ddconfig.pop("n_embed")}
        params = {"ckpt_path": "vqgan.ckpt", "ddconfig": ddconfig, **top, "lossconfig": {"target": "none"}}
        return {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}

    def to_hf(self) -> dict:
        """The `vq_config` of a Hugging Face config.json."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        del values["out_ch"]
        values["attn_resolutions"] = values["attn_resolutions"] or None
        return {self.HF_NAMES.get(k, k): v for k, v in values.items()}

    @property
    def latent_side(self) -> int:
        """Height and width of the grid of codes."""
        return self.resolution // 2 ** (len(self.ch_mult) - 1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=NORM_EPS)


def norm_silu(norm: nn.GroupNorm, x_BCHW: torch.Tensor, silu: bool = True) -> torch.Tensor:
    """GroupNorm, then SiLU unless told otherwise: the kernel for channels last on a GPU, else torch's own two."""
    return group_norm_silu(x_BCHW, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)


def _conv3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a residual (1x1 where the width changes)."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(channels_in), _conv3(channels_in, channels_out)
        self.norm2, self.conv2 = _norm(channels_out), _conv3(channels_out, channels_out)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h = self.conv1(norm_silu(self.norm1, x_BCHW))
        h = self.conv2(norm_silu(self.norm2, h))
        return h + (x_BCHW if self.nin_shortcut is None else self.nin_shortcut(x_BCHW))


class AttnBlock(nn.Module):
    """One head of full self-attention over the positions of the grid."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h = norm_silu(self.norm, x_BCHW, silu=False)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x_BCHW + self.proj_out(out.transpose(1, 2).reshape(x_BCHW.shape))


class Downsample(nn.Module):
    """Halve the side: 3x3 with stride 2, padded on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side: nearest neighbour, then 3x3."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, with attention after each where the configuration asks for it."""

    def __init__(self, widths: list[tuple[int, int]], attention: bool):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in widths)
        self.attn = nn.ModuleList(AttnBlock(b) for _, b in widths if attention)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        for i, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[i](x_BCHW)
        return x_BCHW


class Middle(nn.Module):
    """Residual, attention, residual at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.attn_1 = ResBlock(channels, channels), AttnBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Encoder(nn.Module):
    """Pixels [B, 3, 512, 512] in -1..1 to latents [B, z_channels, 32, 32]."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.conv_in = _conv3(config.in_channels, config.ch)
        self.down = nn.ModuleList()
        width, side = config.ch, config.resolution
        for i, multiple in enumerate(config.ch_mult):
            out = config.ch * multiple
            widths = ([(width, out)] + [(out, out)] * config.num_res_blocks)[: config.num_res_blocks]
            level = Level(widths, side in config.attn_resolutions)
            width = out if widths else width
            if i < len(config.ch_mult) - 1:
                level.downsample = Downsample(width)
                side //= 2
            self.down.append(level)
        self.mid = Middle(width)
        self.norm_out = _norm(width)
        self.conv_out = _conv3(width, config.z_channels * (2 if config.double_z else 1))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x_BCHW)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(norm_silu(self.norm_out, self.mid(h)))


class Decoder(nn.Module):
    """Latents [B, z_channels, 32, 32] to pixels [B, 3, 512, 512], nominally in -1..1."""

    def __init__(self, config: VQConfig):
        super().__init__()
        width, side = config.ch * config.ch_mult[-1], config.latent_side
        self.conv_in = _conv3(config.z_channels, width)
        self.mid = Middle(width)
        levels = []
        for i in reversed(range(len(config.ch_mult))):
            out = config.ch * config.ch_mult[i]
            level = Level([(width, out)] + [(out, out)] * config.num_res_blocks, side in config.attn_resolutions)
            width = out
            if i > 0:
                level.upsample = Upsample(width)
                side *= 2
            levels.append(level)
        # Checkpoints number the levels from the finest one; they run from the coarsest.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = _norm(width)
        self.conv_out = _conv3(width, config.out_ch)

    def forward(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        h = self.mid(self.conv_in(z_BCHW))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(norm_silu(self.norm_out, h))


class Quantizer(nn.Module):
    """The codebook, [K, D]; `codes` finds the nearest entry of each latent."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.n_embed, config.embed_dim)

    def codes(self, z_BDHW: torch.Tensor, id_offset: int = 0) -> torch.Tensor:
        """int64 [B, H*W]: nearest code of each position, row by row, plus `id_offset`; always decided in fp32."""
        batch, dim = z_BDHW.shape[:2]
        z_ND = z_BDHW.float().permute(0, 2, 3, 1).reshape(-1, dim)
        return nearest_code(z_ND, self.embedding.weight.float(), id_offset=id_offset).view(batch, -1)


class VQGAN(nn.Module):
    """Encoder, quantizer and (unless `decoder=False`) decoder of one checkpoint."""

    def __init__(self, config: VQConfig, decoder: bool = True):
        super().__init__()
        self.config = config
        # In the order of the published files, which a rewritten vqgan.ckpt keeps.
        self.encoder = Encoder(config)
        self.decoder = Decoder(config) if decoder else None
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels * (2 if config.double_z else 1), config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Codes int64 [B, 1024] of pixels [B, 3, 512, 512] in -1..1, in the dtype of the encoder's convolutions."""
        return self.quantize.codes(self.quant_conv(self.encoder(x_BCHW).to(self.quant_conv.weight.dtype)))

    def decode(self, codes_BN: torch.Tensor) -> torch.Tensor:
        """Pixels [B, 3, 512, 512] of codes int64 [B, 1024], in the dtype of the decoder's convolutions."""
        assert self.decoder is not None, "made without a decoder"
        side = self.config.latent_side
        z_BHWD = self.quantize.embedding(codes_BN).view(len(codes_BN), side, side, -1)
        z_BCHW = self.post_quant_conv(z_BHWD.permute(0, 3, 1, 2))
        return self.decoder(z_BCHW.to(self.decoder.conv_in.weight.dtype))

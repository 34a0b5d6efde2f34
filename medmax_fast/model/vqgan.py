"""The VQGAN that turns a 512 x 512 picture into 32 x 32 codes and back, as plain torch modules.

Module names follow the taming-transformers checkpoint (`encoder.down.0.block.0.norm1.weight`, ...), which the
Hugging Face layout keeps under `model.vqmodel.`, so both load without renaming. Not torch are the nearest-code
search, the `vq` kernel, which never builds the [N, 8192] distance matrix, and on a GPU GroupNorm with SiLU.

There modules hand on a `Sum`, a picture that waits for its bias and its residual, and the norm that reads it adds them:
a block of one width reads or writes all its values 12 times, which torch's additions make 17, and nothing is copied to
be padded. Elsewhere, and where a gradient may be wanted, a picture is a tensor, added up where it is made.

The convolutions of the encoder and the decoder may be held in 16 bits; the norms' affine parts, the 1x1 convolutions
around the codebook and the codebook itself stay in fp32.

Shapes: B pictures, C channels, H and W pixels, D the code dimension, K the number of codes.
"""

from typing import TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from medmax_fast.kernels.group_norm import add_group_norm_silu_, add_up_, group_norm_silu, takes
from medmax_fast.kernels.sums import Sum
from medmax_fast.kernels.vq import nearest_code
from medmax_fast.model.vqgan_config import VQConfig

GROUPS = 32
NORM_EPS = 1e-6
# What modules hand to each other, [B, C, H, W].
Picture: TypeAlias = torch.Tensor | Sum


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=NORM_EPS)


def norm_silu(norm: nn.GroupNorm, x: Picture, silu: bool = True) -> torch.Tensor:
    """GroupNorm, then SiLU unless told otherwise: the kernel for channels last on a GPU, else torch's own two."""
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)


def add_norm_silu(norm: nn.GroupNorm, x: Picture, silu: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """The picture added up, and its norm."""
    return add_group_norm_silu_(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)


def convolved(conv: nn.Conv2d, x_BCHW: torch.Tensor, like: Picture) -> Picture:
    """The convolution; without its bias as yet where `like` is a Sum, which whoever reads the result will add."""
    if not isinstance(like, Sum):
        return conv(x_BCHW)
    return Sum(F.conv2d(x_BCHW, conv.weight, None, conv.stride, conv.padding), conv.bias)


def first_convolved(conv: nn.Conv2d, x_BCHW: torch.Tensor) -> Picture:
    """The convolution that a network begins with, which decides for all of them: a Sum where the kernel takes it."""
    return convolved(conv, x_BCHW, like=Sum(x_BCHW) if takes(x_BCHW) else x_BCHW)


def _conv3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a residual (1x1 where the width changes)."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(channels_in), _conv3(channels_in, channels_out)
        self.norm2, self.conv2 = _norm(channels_out), _conv3(channels_out, channels_out)
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else None

    def forward(self, x: Picture) -> Picture:
        x_BCHW, h = add_norm_silu(self.norm1, x)
        h = convolved(self.conv1, h, like=x)
        h = norm_silu(self.norm2, h)
        h = convolved(self.conv2, h, like=x)
        return h + (x_BCHW if self.nin_shortcut is None else convolved(self.nin_shortcut, x_BCHW, like=x))


class AttnBlock(nn.Module):
    """One head of full self-attention over the positions of the grid."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Picture) -> Picture:
        x_BCHW, h = add_norm_silu(self.norm, x, silu=False)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x_BCHW + convolved(self.proj_out, out.transpose(1, 2).reshape(x_BCHW.shape), like=x)


class Downsample(nn.Module):
    """Halve the side: 3x3 with stride 2, padded on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Picture) -> Picture:
        if not isinstance(x, Sum):
            return self.conv(F.pad(x, (0, 1, 0, 1)))
        x_BCHW = add_up_(x)
        # Padded by two on every side, which needs no copy, and without the first row and column these are its windows.
        high, wide = (side // 2 for side in x_BCHW.shape[2:])
        h = F.conv2d(x_BCHW, self.conv.weight, None, stride=2, padding=2)
        return Sum(h[:, :, 1 : high + 1, 1 : wide + 1], self.conv.bias)


class Upsample(nn.Module):
    """Double the side: nearest neighbour, then 3x3."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x: Picture) -> Picture:
        x_BCHW = add_up_(x) if isinstance(x, Sum) else x
        return convolved(self.conv, F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"), like=x)


class Level(nn.Module):
    """The blocks of one resolution, with attention after each where the configuration asks for it."""

    def __init__(self, widths: list[tuple[int, int]], attention: bool):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(a, b) for a, b in widths)
        self.attn = nn.ModuleList(AttnBlock(b) for _, b in widths if attention)

    def forward(self, x: Picture) -> Picture:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    """Residual, attention, residual at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.attn_1 = ResBlock(channels, channels), AttnBlock(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Picture) -> Picture:
        return self.block_2(self.attn_1(self.block_1(x)))


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
        h = first_convolved(self.conv_in, x_BCHW)
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
        h = self.mid(first_convolved(self.conv_in, z_BCHW))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(norm_silu(self.norm_out, h))


class Quantizer(nn.Module):
    """The codebook, [K, D]; `codes` finds the nearest entry of each latent."""

    def __init__(self, config: VQConfig):
        super().__init__()
        # The values that nn.Embedding draws; on the meta device it would import torch's compiler for it, a second.
        drawn = torch.randn(config.n_embed, config.embed_dim)
        self.embedding = nn.Embedding.from_pretrained(drawn, freeze=False)

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

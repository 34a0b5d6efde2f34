"""Weights for a VQGAN that works without training: a code is the mean colour of its 16 x 16 pixels.

A random VQGAN decodes to noise, and training one takes days; the tiny checkpoint must show pictures. So the
weights are set by hand. Every residual and attention branch ends in a zero convolution and is therefore the identity;
the encoder's strided convolutions average 2 x 2 pixels, the decoder's smooth what was enlarged, and the codebook is
a grid of 16 x 32 x 16 levels of red, green and blue. GroupNorm would remove a picture's brightness: each colour s
shares its group with -s, A and -A, so the group's mean is 0 and its deviation is A * sqrt(2 / group size) up to
(s / A)^2 / 2, which the affine part undoes; SiLU is left where it is linear.
"""

import torch
from torch import nn

from medmax_fast.model.vqgan import GROUPS, VQGAN, AttnBlock, Decoder, Encoder, ResBlock
from medmax_fast.model.vqgan_config import VQConfig

LEVELS = (16, 32, 16)
# The constant that dominates each group: (1/16)^2 / 2 is 0.2 % of full scale.
CONSTANT = 16.0
# SiLU(20 + 4 s) = 20 + 4 s to within 1e-5 for s in -1..1.
BIAS, GAIN = 20.0, 4.0


def colour_vqgan(config: VQConfig, generator: torch.Generator) -> VQGAN:
    """A VQGAN of this shape whose codes are mean colours; unused weights are random.

    Needs at least four channels per group at the last convolutions (ch * ch_mult[0] and ch * ch_mult[-1] of at
    least 128), as many codes as LEVELS has, and at least three code dimensions.
    """
    assert min(config.ch * config.ch_mult[0], config.ch * config.ch_mult[-1]) >= 4 * GROUPS
    assert config.n_embed == LEVELS[0] * LEVELS[1] * LEVELS[2] and config.embed_dim >= 3
    vqgan = VQGAN(config).requires_grad_(False)
    for module in vqgan.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(std=0.02, generator=generator)
            module.bias.zero_()
    for module in vqgan.modules():
        if isinstance(module, AttnBlock):
            _set(module.proj_out, {})
        elif isinstance(module, ResBlock):
            _set(module.conv2, {})
            if module.nin_shortcut is not None:
                shortcut = module.nin_shortcut
                _set(shortcut, _carry(shortcut.in_channels, shortcut.out_channels, 1.0))
    _fill_encoder(vqgan.encoder)
    _fill_decoder(vqgan.decoder)
    _set(vqgan.quant_conv, {(i, i): 1.0 for i in range(3)})
    _set(vqgan.post_quant_conv, {(i, i): 1.0 for i in range(3)})
    vqgan.quantize.embedding.weight.zero_()
    axes = [torch.linspace(-1, 1, n) for n in LEVELS]
    vqgan.quantize.embedding.weight[:, :3] = torch.cartesian_prod(*axes)
    return vqgan


def _fill_encoder(encoder: Encoder) -> None:
    _fill_input(encoder.conv_in)
    for level in encoder.down:
        if hasattr(level, "downsample"):
            _set(level.downsample.conv, {})
            mean, pick = torch.zeros(3, 3), torch.zeros(3, 3)
            # Padding is on the right and below, so taps 0 and 1 are the 2 x 2 block.
            mean[:2, :2], pick[0, 0] = 0.25, 1.0
            _pass(level.downsample.conv, mean, pick)
    _fill_output(encoder)


def _fill_decoder(decoder: Decoder) -> None:
    _fill_input(decoder.conv_in)
    for level in decoder.up:
        if hasattr(level, "upsample"):
            _set(level.upsample.conv, {})
            row = torch.tensor([0.25, 0.5, 0.25])
            pick = torch.zeros(3, 3)
            pick[1, 1] = 1.0
            _pass(level.upsample.conv, row[:, None] * row, pick)
    _fill_output(decoder)


def _fill_input(conv: nn.Conv2d) -> None:
    """Colours 0..2 in; +s, -s and the constants out."""
    _set(conv, _spread(conv.out_channels))
    conv.bias.copy_(_constants(conv.out_channels))


def _fill_output(half: Encoder | Decoder) -> None:
    """norm_out, SiLU and conv_out together: channel i out is colour i in."""
    channels = half.norm_out.num_channels
    half.norm_out.weight.fill_(GAIN * CONSTANT * (2 * GROUPS / channels) ** 0.5)
    half.norm_out.bias.fill_(BIAS)
    _set(half.conv_out, {(i, _place(channels, i, 0)): 1 / GAIN for i in range(3)})
    half.conv_out.bias[:3] = -BIAS / GAIN


def _place(channels: int, colour: int, role: int) -> int:
    """Channel of a colour's +s, -s, +A, -A (roles 0..3): the first four of the colour's own group."""
    return channels // GROUPS * colour + role


def _spread(channels: int) -> dict[tuple[int, int], float]:
    """Colours 0..2 in, +s and -s out."""
    return {(_place(channels, i, role), i): sign for i in range(3) for role, sign in ((0, 1.0), (1, -1.0))}


def _carry(channels_in: int, channels_out: int, value: float) -> dict[tuple[int, int], float]:
    """Every role of every colour from its place in one width to its place in another."""
    roles = [(i, role) for i in range(3) for role in range(4)]
    return {(_place(channels_out, *r), _place(channels_in, *r)): value for r in roles}


def _constants(channels: int) -> torch.Tensor:
    bias = torch.zeros(channels)
    for i in range(3):
        bias[_place(channels, i, 2)], bias[_place(channels, i, 3)] = CONSTANT, -CONSTANT
    return bias


def _set(conv: nn.Conv2d, centre: dict[tuple[int, int], float]) -> None:
    """Zero a convolution but for the given (out, in) weights of its centre tap."""
    conv.weight.zero_()
    conv.bias.zero_()
    middle = conv.kernel_size[0] // 2
    for (out, channel), value in centre.items():
        conv.weight[out, channel, middle, middle] = value


def _pass(conv: nn.Conv2d, signal: torch.Tensor, constant: torch.Tensor) -> None:
    """Carry the colours through a 3 x 3 kernel, and the constants through another."""
    for i in range(3):
        for role in range(4):
            channel = _place(conv.in_channels, i, role)
            conv.weight[channel, channel] = signal if role < 2 else constant

"""The kernels of the image encoder: resize, and GroupNorm with SiLU, alone and with the additions before it.

Shapes: B pictures of C channels, H x W pixels.
"""

import functools
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks.cases.case import (
    COMPILED,
    PLAIN,
    Case,
    Draw,
    Form,
    Quality,
    Work,
    exactly,
    name_of,
    own_first,
    within_twice,
)
from medmax_fast import _csrc
from medmax_fast.kernels.group_norm import add_group_norm_silu_, group_norm_silu
from medmax_fast.kernels.resample import plan_resample, resample
from medmax_fast.kernels.sums import Sum
from medmax_fast.model.vqgan import GROUPS, NORM_EPS

PILLOW = "Pillow, one process"
fp32, fp16 = torch.float32, torch.float16

# The side that is kept, and height and width of each image of a batch.
MIXED = [(480, 640), (600, 600), (768, 1024), (1080, 1920), (1152, 864), (1200, 1600), (512, 700), (2000, 1500)]
RESAMPLE_SIZES = {
    "gpu": [(512, [(864, 1152)] * 64), (512, MIXED * 8)],
    "cpu": [(512, [(864, 1152)]), (512, MIXED[:2])],
    "quick": [(4, [(5, 7)]), (4, [(4, 6), (9, 5)])],
}
# One of how many images Pillow resizes in one timed call.
PILLOW_SHARE = 8


def resample_cases(name: str) -> list[Case]:
    cases = []
    for side, sizes in RESAMPLE_SIZES[name]:
        one = "x".join(map(str, sizes[0]))
        shape = f"{len(sizes)} images of {one if len(set(sizes)) == 1 else 'several sizes'} to {side}x{side} float32"
        moved = sum(source_bytes(*size, side) for size in sizes) + len(sizes) * 3 * side * side * 4
        make = functools.partial(resample_work, side=side, sizes=sizes)
        cases.append(Case("resample", shape, moved, 0.0, make, (len(sizes), "images")))
    return cases


def resized(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width after the shorter side is scaled to `side`."""
    return round(side / min(width, height) * height), round(side / min(width, height) * width)


@functools.cache
def taps(height: int, width: int, side: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(starts, weights) of the kept columns and of the kept rows."""
    high, wide = resized(height, width, side)
    return [_csrc.lanczos_weights(n, m, (m - side) // 2, side) for n, m in ((width, wide), (height, high))]


def source_bytes(height: int, width: int, side: int) -> int:
    """Bytes of the pixels that the kept ones depend on."""
    extent = 1
    for starts, weights in taps(height, width, side):
        used = ((weights != 0) * np.arange(1, weights.shape[1] + 1)).max(1)
        extent *= int((starts + used).max() - starts.min())
    return 3 * extent


def pillow(picture: Image.Image, side: int) -> np.ndarray:
    """The published preprocessing, uint8 [side, side, 3]; columns first, as `fit_ref` of data/resize.py explains."""
    high, wide = resized(picture.height, picture.width, side)
    left, top = (wide - side) // 2, (high - side) // 2
    picture = picture.resize((wide, picture.height), Image.Resampling.LANCZOS)
    picture = picture.resize((wide, high), Image.Resampling.LANCZOS)
    return np.array(picture.crop((left, top, left + side, top + side)))


def resample_work(draw: Draw, side: int, sizes: list[tuple[int, int]]) -> Work:
    lengths = [3 * height * width for height, width in sizes]
    pixels = draw.integers(0, 256, sum(lengths), dtype=torch.uint8)
    columns, rows = zip(*(taps(*size, side) for size in sizes), strict=True)
    # Uploaded once, and so not part of what is timed.
    plan = plan_resample(sizes, columns, rows).to(draw.device)
    values = (torch.arange(256, dtype=torch.float64) / 255 * 2 - 1).float().to(draw.device)
    out = torch.empty(len(sizes), 3, side, side, device=draw.device).contiguous(memory_format=torch.channels_last)

    @functools.cache
    def pictures() -> list[Image.Image]:
        parts = zip(pixels.cpu().split(lengths), sizes, strict=True)
        return [Image.fromarray(part.view(height, width, 3).numpy()) for part, (height, width) in parts]

    def by_pillow(few: int | None = None) -> torch.Tensor:
        return torch.from_numpy(np.stack([pillow(picture, side) for picture in pictures()[:few]]))

    def bicubic() -> torch.Tensor:
        (height, width), (high, wide) = sizes[0], resized(*sizes[0], side)
        x = pixels.view(-1, height, width, 3).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, (high, wide), mode="bicubic", antialias=True)
        top, left = (high - side) // 2, (wide - side) // 2
        return values[x[:, :, top : top + side, left : left + side].round().clamp(0, 255).int()]

    # A share of the batch with its sizes in the same proportion.
    few = max(len(sizes) // PILLOW_SHARE, len(set(sizes)))
    others = {PILLOW: Form(functools.partial(by_pillow, few), share=few / len(sizes))}
    if draw.device == "cuda" and len(set(sizes)) == 1:
        others["torch bicubic, another filter"] = bicubic
    compare = exactly(lambda: values[by_pillow().to(draw.device).int()].permute(0, 3, 1, 2))

    def judge(work: Work, name: str, found: torch.Tensor) -> Quality:
        # Pillow is what the others are compared with.
        return {} if name == PILLOW else compare(work, name, found)

    def ours() -> torch.Tensor:
        return resample(pixels, plan, values, out=out, impl=draw.impl)

    return Work(own_first(draw, ours, others), PILLOW, judge, lambda: out.fill_(torch.nan))


# Of an H100 or H200.
L2_BYTES = 50e6
# Pictures, channels, height, width of the encoder's largest activations and of those in its middle.
GROUP_NORM_SIZES = {
    "gpu": [(16, 128, 512, 512, fp32), (16, 128, 512, 512, fp16), (64, 256, 128, 128, fp16)],
    "cpu": [(1, 128, 128, 128, fp32)],
    "quick": [(2, 64, 9, 7, fp32)],
}
# The same with what comes before most norms: a convolution's bias and the residual.
GROUP_SUM_SIZES = {
    "gpu": [(16, 128, 512, 512, fp16)],
    "cpu": [(1, 128, 128, 128, fp32)],
    "quick": [(2, 64, 9, 7, fp32)],
}


def again(C: int, H: int, W: int, dtype: torch.dtype) -> int:
    """How often any form must read a picture again, once its statistics are known: where no cache has held it."""
    return int(C * H * W * dtype.itemsize > L2_BYTES)


def group_norm_cases(name: str) -> list[Case]:
    """Channels last, as the encoder has them on a GPU; the affine part is fp32 in every precision."""
    cases = []
    for B, C, H, W, dtype in GROUP_NORM_SIZES[name]:
        moved = (2 + again(C, H, W, dtype)) * B * C * H * W * dtype.itemsize + 2 * C * 4
        make = functools.partial(group_norm_work, size=(B, C, H, W), dtype=dtype)
        cases.append(Case("group_norm", f"{B}x{C}x{H}x{W} {name_of(dtype)}, SiLU", moved, 0.0, make))
    for B, C, H, W, dtype in GROUP_SUM_SIZES[name]:
        # Read are both pictures, written their sum and its norm.
        moved = ((4 + again(C, H, W, dtype)) * B * C * H * W + C) * dtype.itemsize + 2 * C * 4
        make = functools.partial(group_sum_work, size=(B, C, H, W), dtype=dtype)
        cases.append(Case("group_norm", f"{B}x{C}x{H}x{W} {name_of(dtype)}, of a sum, SiLU", moved, 0.0, make))
    return cases


def group_norm_work(draw: Draw, size: tuple[int, int, int, int], dtype: torch.dtype) -> Work:
    B, C, H, W = size
    x = draw.normal(B, H, W, C, dtype=dtype).permute(0, 3, 1, 2)
    # Rounded, because torch takes them in the type of the picture alone.
    rounded = [t.to(dtype) for t in (1 + 0.1 * draw.normal(C), 0.1 * draw.normal(C))]
    weight, bias = (t.float() for t in rounded)

    def plain() -> torch.Tensor:
        return F.silu(F.group_norm(x, GROUPS, *rounded, NORM_EPS))

    def ours() -> torch.Tensor:
        return group_norm_silu(x, weight, bias, GROUPS, NORM_EPS, impl=draw.impl)

    def truth() -> Iterator[tuple[slice, list[torch.Tensor]]]:
        for b in range(B):
            part = slice(b, b + 1)
            yield part, [F.silu(F.group_norm(x[part].double(), GROUPS, weight.double(), bias.double(), NORM_EPS))]

    others = {PLAIN: plain}
    if draw.device == "cuda" and dtype != torch.float32:
        others[COMPILED] = torch.compile(plain, dynamic=False)
    return Work(own_first(draw, ours, others), PLAIN, within_twice(truth, read=lambda found: [found]))


def group_sum_work(draw: Draw, size: tuple[int, int, int, int], dtype: torch.dtype) -> Work:
    B, C, H, W = size
    h, residual = (draw.normal(B, H, W, C, dtype=dtype).permute(0, 3, 1, 2) for _ in range(2))
    shift, *rounded = (t.to(dtype) for t in (draw.normal(C), 1 + 0.1 * draw.normal(C), 0.1 * draw.normal(C)))
    weight, bias = (t.float() for t in rounded)
    # Ours writes the sum over h, and the sum of that in the next call, which takes as long.
    before = h.clone()

    def plain() -> tuple[torch.Tensor, torch.Tensor]:
        total = h + shift[:, None, None] + residual
        return total, F.silu(F.group_norm(total, GROUPS, *rounded, NORM_EPS))

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        return add_group_norm_silu_(Sum(h, shift, residual), weight, bias, GROUPS, NORM_EPS, impl=draw.impl)

    def truth() -> Iterator[tuple[tuple[slice, slice], list[torch.Tensor]]]:
        for b in range(B):
            part = slice(b, b + 1)
            total = before[part].double() + shift.double()[:, None, None] + residual[part].double()
            normed = F.silu(F.group_norm(total, GROUPS, weight.double(), bias.double(), NORM_EPS))
            yield (slice(None), part), [torch.stack([total, normed])]

    others = {PLAIN: plain}
    if draw.device == "cuda":
        others[COMPILED] = torch.compile(plain, dynamic=False)
    judge = within_twice(truth, read=lambda found: [torch.stack(found)])
    return Work(own_first(draw, ours, others), PLAIN, judge, lambda: h.copy_(before))

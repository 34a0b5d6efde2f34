"""Pillow's LANCZOS resize and centre crop to the bit, for a batch of images of different sizes, in two launches.

Pillow filters the whole image on one CPU core, then throws away what the crop does not keep. Here only the kept
pixels are made, and the horizontal pass runs only over the rows that the vertical pass reads. The weights come from
the caller (Pillow's rule: support 3 * max(scale, 1), normalised in double, rounded half away from zero to 22
fractional bits); `plan_resample` packs them and all addresses into one host buffer, so that a batch costs one upload
and no wait for the device.

The columns are always filtered first, as in every Pillow before 12.2. Newer ones filter the rows first in some tall
images (13.0: where the height shrinks by more than twice as many pixels as the width), which gives other bytes.

Each pass is sum(weight * byte) + 2^21 over the taps, an arithmetic shift right by 22 and a clamp to 0..255, so the
rows between the passes are bytes as in Pillow. int32 sums suffice: the weights of a pixel add up to 1 and the positive
ones to at most 1.3, so sums stay within 255 * 2^22 * 1.3 = 1.4e9. The last step looks the byte up in a table of 256
values that the caller computed, so the normalisation is exact in any output type.

Bytes moved: 3 * rows * (columns read) in, 3 * S * rows out to the intermediate rows and in again, 3 * S * S values
out. 1152 x 864 pixels to 512 x 512 in 16 bits: 2.3 + 2 * 1.3 + 1.6 = 6.5 MB, and 50 KB of weights (11 taps). A source
byte is loaded once for each tap that meets it; all but the first of these come from the caches.

Shapes: B images, S x S kept pixels, T taps of one image and axis, J = 3 * S bytes of a row (j is 3 * x + channel).
`mid` holds the intermediate rows of all images end to end, [sum of rows, J]. A block of taps is [1 + T, S]: the first
source pixel of each output pixel, then a row of weights for each tap.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from medmax_fast.kernels.blocks import blocks
from medmax_fast.kernels.launch import use_triton

# One row of the plan's table, int64: the image's first byte, its width, the first row that is read and the number of
# these rows, the row of `mid` where they go, and for columns and rows the place of their taps and their number.
FIELDS = 9
# There is no floating-point arithmetic here; the option is set because triton warns where it is not.
OPTIONS = {"enable_fp_fusion": True}
VALUE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


if triton is not None:
    # S as a plain number: were it known to be a multiple of 16, the bytes would be stored in words, and the gather be
    # laid out like that store, with lanes 4 bytes apart and an exchange of weights through shared memory at each tap.
    @triton.jit(do_not_specialize=["S"])
    def _columns_kernel(
        pixels_ptr,
        table_ptr,
        taps_ptr,
        mid_ptr,
        S,
        FIELDS: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_J: tl.constexpr,
    ):
        table = table_ptr + tl.program_id(1) * FIELDS
        rows = tl.load(table + 3).to(tl.int32)
        # The grid is made for the tallest image.
        if tl.program_id(0) * BLOCK_ROWS >= rows:
            return
        r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        j = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
        kept = j < 3 * S

        width = tl.load(table + 1)
        taps = taps_ptr + tl.load(table + 5) + j // 3
        start = tl.load(taps, mask=kept, other=0)
        row = pixels_ptr + tl.load(table) + (tl.load(table + 2) + r) * width * 3
        source = row[:, None] + (start * 3 + j % 3)[None, :]

        total = tl.full((BLOCK_ROWS, BLOCK_J), 1 << 21, tl.int32)
        # The interpreter of triton 3.6 has no `range` up to a loaded number (under NumPy 2.4).
        t, end = 0, tl.load(table + 6).to(tl.int32)
        while t < end:
            weight = tl.load(taps + (1 + t) * S, mask=kept, other=0)
            # Padding taps have no weight, but beyond the last image there may be no memory.
            inside = (r < rows)[:, None] & (kept & (start + t < width))[None, :]
            total += weight[None, :] * tl.load(source + 3 * t, mask=inside, other=0).to(tl.int32)
            t += 1

        byte = tl.minimum(tl.maximum(total >> 22, 0), 255).to(tl.uint8)
        target = mid_ptr + (tl.load(table + 4) + r) * (3 * S)
        tl.store(target[:, None] + j[None, :], byte, mask=(r < rows)[:, None] & kept[None, :])

    @triton.jit
    def _rows_kernel(
        mid_ptr,
        table_ptr,
        taps_ptr,
        values_ptr,
        out_ptr,
        S,
        FIELDS: tl.constexpr,
        BLOCK_ROWS: tl.constexpr,
        BLOCK_J: tl.constexpr,
    ):
        n = tl.program_id(1).to(tl.int64)
        table = table_ptr + n * FIELDS
        y = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        j = tl.program_id(2) * BLOCK_J + tl.arange(0, BLOCK_J)
        kept = (y < S)[:, None] & (j < 3 * S)[None, :]

        rows = tl.load(table + 3)
        taps = taps_ptr + tl.load(table + 7) + y
        # In rows of `mid`, which begins with the first row that is read.
        start = tl.load(taps, mask=y < S, other=0) - tl.load(table + 2)
        source = mid_ptr + ((tl.load(table + 4) + start) * (3 * S))[:, None] + j[None, :]

        total = tl.full((BLOCK_ROWS, BLOCK_J), 1 << 21, tl.int32)
        t, end = 0, tl.load(table + 8).to(tl.int32)
        while t < end:
            weight = tl.load(taps + (1 + t) * S, mask=y < S, other=0)
            inside = kept & (start + t < rows)[:, None]
            total += weight[:, None] * tl.load(source + t * (3 * S), mask=inside, other=0).to(tl.int32)
            t += 1

        value = tl.load(values_ptr + tl.minimum(tl.maximum(total >> 22, 0), 255))
        target = out_ptr + ((n * S + y) * (3 * S))[:, None] + j[None, :]
        tl.store(target, value, mask=kept)


class ResamplePlan:
    """What `resample` needs to know of a batch besides its pixels; made by `plan_resample`, not to be changed.

    packed: int32, the table (int64 [B, FIELDS]) and then the blocks of taps. images: B. side: S. mid_rows, max_rows:
    rows of the intermediate in all and of the tallest image. num_bytes: how far into the pixels the images reach.
    """

    def __init__(self, packed: torch.Tensor, images: int, side: int, mid_rows: int, max_rows: int, num_bytes: int):
        self.packed = packed
        self.images = images
        self.side = side
        self.mid_rows = mid_rows
        self.max_rows = max_rows
        self.num_bytes = num_bytes

    @property
    def table(self) -> torch.Tensor:
        return self.packed[: 2 * FIELDS * self.images].view(torch.int64).view(self.images, FIELDS)

    def to(self, device: torch.device | str) -> "ResamplePlan":
        """The plan on `device`; an upload to a GPU goes through pinned memory and is not waited for."""
        device = torch.device(device)
        upload = device.type == "cuda" and not self.packed.is_cuda
        packed = (self.packed.pin_memory() if upload else self.packed).to(device, non_blocking=upload)
        return ResamplePlan(packed, self.images, self.side, self.mid_rows, self.max_rows, self.num_bytes)


def plan_resample(sizes, columns, rows, *, offsets=None) -> ResamplePlan:
    """The plan of a batch, on the CPU.

    sizes: (height, width) of each image, B >= 1 pairs of ints.
    columns, rows: for each image the (starts, weights) of its kept output columns and rows, CPU tensors or NumPy
    arrays: starts int32 [S], the first source pixel; weights int32 [S, T], 22 fractional bits, zeros after the last
    tap. T may differ from image to image and is cut to the longest that is used; S is the same everywhere.
    offsets: the first byte of each image; None: end to end from byte 0.

    Raises ValueError for shapes and types that do not fit, and for taps with a weight outside their image.
    """
    if not len(sizes) == len(columns) == len(rows) == len(sizes if offsets is None else offsets) > 0:
        lengths = [len(x) for x in (sizes, columns, rows) + (() if offsets is None else (offsets,))]
        raise ValueError(f"sizes, columns, rows and offsets of {lengths} images: expected the same number, at least 1")
    table, blocks = [], []
    packed_at, mid_row, max_rows, next_byte, num_bytes = 2 * FIELDS * len(sizes), 0, 0, 0, 0
    side = len(columns[0][0])
    for n, (height, width) in enumerate((int(h), int(w)) for h, w in sizes):
        offset = next_byte if offsets is None else int(offsets[n])
        next_byte = offset + 3 * height * width
        num_bytes = max(num_bytes, next_byte)
        if offset < 0:
            raise ValueError(f"image {n} begins at byte {offset}")
        x_block, _, _ = _tap_block(*columns[n], side, width, f"columns of image {n}")
        y_block, first, end = _tap_block(*rows[n], side, height, f"rows of image {n}")
        y_at = packed_at + x_block.numel()
        table.append([offset, width, first, end - first, mid_row, packed_at, len(x_block) - 1, y_at, len(y_block) - 1])
        blocks += [x_block.flatten(), y_block.flatten()]
        packed_at = y_at + y_block.numel()
        mid_row += end - first
        max_rows = max(max_rows, end - first)
    packed = torch.cat([torch.tensor(table, dtype=torch.int64).flatten().view(torch.int32), *blocks])
    return ResamplePlan(packed, len(sizes), side, mid_row, max_rows, num_bytes)


def _tap_block(starts, weights, side: int, size: int, what: str) -> tuple[torch.Tensor, int, int]:
    """The block of taps of one axis, and the first and the end of the source pixels that have a weight."""
    starts, weights = torch.as_tensor(starts), torch.as_tensor(weights)
    if starts.shape != (side,) or weights.ndim != 2 or len(weights) != side or weights.numel() == 0:
        raise ValueError(
            f"{what}: starts {list(starts.shape)}, weights {list(weights.shape)}, expected [{side}], [{side}, T]"
        )
    if starts.dtype != torch.int32 or weights.dtype != torch.int32:
        raise ValueError(f"{what}: starts {starts.dtype}, weights {weights.dtype}, expected torch.int32")
    used = weights.ne(0).mul(torch.arange(1, weights.shape[1] + 1)).amax(dim=1)
    taps, first, end = int(used.max()), int(starts.min()), int((starts + used).max())
    if first < 0 or end > size:
        raise ValueError(f"{what}: taps reach from pixel {first} to {end - 1}, expected 0..{size - 1}")
    return torch.cat([starts[None], weights[:, :taps].t()]), first, end


def resample_ref(
    pixels: torch.Tensor, plan: ResamplePlan, values: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`resample` in plain torch, image by image and tap by tap, on any device."""
    plan, S = plan.to(pixels.device), plan.side
    out = _empty(plan, values) if out is None else out
    for n, (offset, width, first, rows, _, x_at, x_taps, y_at, y_taps) in enumerate(plan.table.tolist()):
        begin = offset + first * width * 3
        image = pixels[begin : begin + rows * width * 3].view(rows, width, 3)
        starts, *weights = plan.packed[x_at : x_at + (1 + x_taps) * S].view(1 + x_taps, S, 1)
        mid = _filter(image, 1, starts.flatten(), weights)
        starts, *weights = plan.packed[y_at : y_at + (1 + y_taps) * S].view(1 + y_taps, S, 1, 1)
        byte = _filter(mid, 0, starts.flatten() - first, weights)
        out[n] = values[byte.int()].permute(2, 0, 1)
    return out


def _filter(source: torch.Tensor, dim: int, starts: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """One pass over uint8 [rows, columns, 3] along `dim`; every weight broadcasts against the result."""
    shape = list(source.shape)
    shape[dim] = len(starts)
    total = torch.full(shape, 1 << 21, dtype=torch.int32, device=source.device)
    for t, weight in enumerate(weights):
        at = (starts + t).clamp_(max=source.shape[dim] - 1)
        total += source.index_select(dim, at) * weight
    return total.bitwise_right_shift_(22).clamp_(0, 255).to(torch.uint8)


def _resample_triton(pixels, plan: ResamplePlan, values, mid: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    S, table, taps = plan.side, plan.table, plan.packed
    numbers = blocks("resample", pixels.device)
    block_rows = numbers["BLOCK_ROWS"]
    grid = (triton.cdiv(plan.max_rows, block_rows), plan.images, triton.cdiv(3 * S, numbers["BLOCK_J"]))
    settings = {"FIELDS": FIELDS, **numbers, **OPTIONS}
    with torch.cuda.device_of(pixels):
        _columns_kernel[grid](pixels, table, taps, mid, S, **settings)
        grid = (triton.cdiv(S, block_rows), *grid[1:])
        _rows_kernel[grid](mid, table, taps, values, out, S, **settings)
    return out


def resample(
    pixels: torch.Tensor,
    plan: ResamplePlan,
    values: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Resized, cropped and normalised images [B, 3, S, S], channels_last, of the type of `values`.

    pixels: uint8 [bytes], the images of the plan, each [height, width, 3] RGB.
    plan: from `plan_resample`, on any device; it is uploaded to that of the pixels where it is not there yet.
    values: [256] float32, float16, bfloat16 or uint8, the output value of each byte, on the device of the pixels.
    out: written where given, of that shape, type and memory format. No gradient flows through any of this.
    impl: "auto" (triton on a GPU, else torch), "triton" (a GPU, or TRITON_INTERPRET=1) or "torch".

    Nothing here waits for the device (but "torch" does, on a GPU). Raises ValueError for shapes, types or devices
    that do not fit and RuntimeError where impl="triton" cannot run.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 1 or len(pixels) < plan.num_bytes:
        raise ValueError(
            f"pixels {pixels.dtype} {list(pixels.shape)}: expected torch.uint8, at least [{plan.num_bytes}]"
        )
    if values.shape != (256,) or values.dtype not in VALUE_DTYPES or values.device != pixels.device:
        raise ValueError(
            f"values {values.dtype} {list(values.shape)} on {values.device}: expected float32, float16, bfloat16 or "
            f"uint8 [256] on {pixels.device}"
        )
    if out is None:
        out = _empty(plan, values)
    elif (out.shape, out.dtype, out.device) != (
        (plan.images, 3, plan.side, plan.side),
        values.dtype,
        values.device,
    ) or not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"out {out.dtype} {list(out.shape)} on {out.device}, strides {out.stride()}: expected {values.dtype} "
            f"{[plan.images, 3, plan.side, plan.side]} on {values.device}, channels_last"
        )
    pixels, values = pixels.contiguous(), values.contiguous()
    if not use_triton(impl, pixels):
        return resample_ref(pixels, plan, values, out=out)
    mid = torch.empty((plan.mid_rows, 3 * plan.side), dtype=torch.uint8, device=pixels.device)
    return _resample_triton(pixels, plan.to(pixels.device), values, mid, out)


def _empty(plan: ResamplePlan, values: torch.Tensor) -> torch.Tensor:
    shape = (plan.images, 3, plan.side, plan.side)
    return torch.empty(shape, dtype=values.dtype, device=values.device, memory_format=torch.channels_last)

"""GroupNorm of a channels-last picture, SiLU in the same pass, and before it the additions that a convolution left out.

On a GPU torch's own GroupNorm copies a channels-last input to NCHW, normalises it into NCHW, SiLU reads and writes
that again, and the next convolution finds NCHW. Here the input is read twice and the output written once, all of it
channels last: 3 C H W values per picture, and for the statistics 8 bytes per group and chunk of rows (under 0.1 %).

On a GPU a convolution adds its bias in a pass of its own, a read and a write of all it has made, and a residual is
another addition. A `Sum` is such a picture before that, and the norm that reads it adds it up. In passes over C H W:
                                             torch's additions and the norm above   here
    x + bias, of which only the norm is wanted                            2 + 3        3
    (x + bias) + residual, which stays                                2 + 3 + 3        5
The statistics are those of the sum as it is kept: the launch that takes them writes it.

A group of a large picture (512 x 512 x 4 = a million values) is spread over many programs: the first launch leaves
the mean and the sum of squared deviations (M2) of every group in every chunk of rows, the second combines them and
normalises. No atomics: the result is the same on every run, and a picture's does not depend on the rest of its batch.

Precision: everything is computed in fp32, and the sum and the norm are each rounded once, when they are written.
Statistics by Welford's recurrence per position of the tile, merged by the rule of Chan, Golub and LeVeque (1979),
never as E[x^2] - E[x]^2, which loses all digits where a group's mean is large against its deviation. For the same
reason the mean is subtracted before the scaling.

Inference only: no gradient flows through the kernel; where one is wanted, "auto" takes torch.

Shapes: B pictures, C channels in `groups` of CG, H x W pixels, called rows of C channels in memory. CGP is CG rounded
up to a power of two; a tile has BLOCK_R rows and BLOCK_C channel slots, CGP slots to a group.
"""

import torch
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from medmax_fast.kernels.blocks import blocks
from medmax_fast.kernels.launch import use_triton
from medmax_fast.kernels.sums import FLOAT_DTYPES, Sum, check_sum, sum_ref

# The widest group, a row of which is a tile; "auto" leaves wider ones to torch.
MAX_GROUP = 4096
# Rows of a chunk, at least, and chunks of a picture, at most: every program of the second launch reads all chunks'
# statistics of its groups. Both are independent of the batch, and so are the sums.
MIN_CHUNK, MAX_CHUNKS = 256, 128
OPTIONS = {"enable_fp_fusion": True}


if triton is not None:

    @triton.jit
    def _merge(n, mean, m2, axis: tl.constexpr):
        """Count, mean and M2 of the union along an axis of parts with n, mean, M2; zeros where all parts are empty."""
        total = tl.sum(n, axis=axis)
        divisor = tl.maximum(total, 1.0)
        rough = tl.sum(n * mean, axis=axis) / divisor
        # A second step on the remainders takes away the rounding of sums of large means.
        middle = rough + tl.sum(n * (mean - tl.expand_dims(rough, axis)), axis=axis) / divisor
        away = mean - tl.expand_dims(middle, axis)
        return total, middle, tl.sum(m2 + n * away * away, axis=axis)

    @triton.jit
    def _channels(C: tl.constexpr, CG: tl.constexpr, CGP: tl.constexpr, BLOCK_C: tl.constexpr):
        """Channel of each slot of this program's tile, and whether there is one."""
        slot = tl.arange(0, BLOCK_C)
        first = tl.program_id(1) * (BLOCK_C // CGP) * CG
        if CG == CGP:
            c = first + slot
            used = c < C
        else:
            c = first + slot // CGP * CG + slot % CGP
            used = (slot % CGP < CG) & (c < C)
        return c, used

    @triton.jit
    def _offsets(row, W, stride_h, stride_w):
        """Elements from the first pixel to others by number; stride_h is None where all are evenly spaced."""
        if stride_h is None:
            return row.to(tl.int64) * stride_w
        else:
            return (row // W).to(tl.int64) * stride_h + row % W * stride_w

    @triton.jit
    def _group_statistics_kernel(
        x_ptr,
        shift_ptr,
        residual_ptr,
        residual_shift_ptr,
        total_ptr,
        mean_ptr,
        m2_ptr,
        HW,
        W,
        chunk_rows,
        stride_xb,
        stride_xh,
        stride_xw,
        C: tl.constexpr,
        CG: tl.constexpr,
        CGP: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        # One program takes the rows of one chunk for the groups of one block of channels. What has no pointer is left
        # out: parts of the sum, writing it, taking statistics. total_ptr may be x_ptr.
        chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
        c, used = _channels(C, CG, CGP, BLOCK_C)
        r = tl.arange(0, BLOCK_R)
        first = chunk * chunk_rows
        rows = tl.minimum(HW - first, chunk_rows)
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + c, mask=used, other=0.0).to(tl.float32)
        if residual_shift_ptr is not None:
            residual_shift = tl.load(residual_shift_ptr + c, mask=used, other=0.0).to(tl.float32)

        # Welford per position of the tile; a position's values end where the chunk's rows do, so all earlier ones
        # are there and `step + 1` is its count.
        mean = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        m2 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for step in range(0, tl.cdiv(rows, BLOCK_R)):
            there = (step * BLOCK_R + r < rows)[:, None] & used[None, :]
            row = first + step * BLOCK_R + r
            x_offsets = b * stride_xb + _offsets(row, W, stride_xh, stride_xw)[:, None] + c[None, :]
            offsets = (b * HW + row)[:, None] * C + c[None, :]
            x = tl.load(x_ptr + x_offsets, mask=there, other=0.0).to(tl.float32)
            if shift_ptr is not None:
                x += shift[None, :]
            if residual_ptr is not None:
                residual = tl.load(residual_ptr + offsets, mask=there, other=0.0).to(tl.float32)
                if residual_shift_ptr is not None:
                    residual += residual_shift[None, :]
                x += residual
            if total_ptr is not None:
                total = x.to(total_ptr.dtype.element_ty)
                tl.store(total_ptr + offsets, total, mask=there)
                x = total.to(tl.float32)
            if mean_ptr is not None:
                delta = tl.where(there, x - mean, 0.0)
                mean += delta * (1.0 / (step + 1))
                m2 += delta * (x - mean)

        if mean_ptr is not None:
            n_r = tl.maximum((rows - r + BLOCK_R - 1) // BLOCK_R, 0)
            n = tl.where(used[None, :], n_r[:, None], 0).to(tl.float32)
            n, mean, m2 = _merge(n, mean, m2, 0)
            BLOCK_G: tl.constexpr = BLOCK_C // CGP
            n = tl.reshape(n, (BLOCK_G, CGP))
            n, mean, m2 = _merge(n, tl.reshape(mean, (BLOCK_G, CGP)), tl.reshape(m2, (BLOCK_G, CGP)), 1)
            g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
            at = (b * tl.num_programs(0) + chunk) * (C // CG) + g
            tl.store(mean_ptr + at, mean, mask=g < C // CG)
            tl.store(m2_ptr + at, m2, mask=g < C // CG)

    @triton.jit
    def _group_norm_kernel(
        x_ptr,
        shift_ptr,
        weight_ptr,
        bias_ptr,
        mean_ptr,
        m2_ptr,
        out_ptr,
        HW,
        chunks,
        chunk_rows,
        program_rows,
        stride_xb,
        stride_xw,
        eps,
        C: tl.constexpr,
        CG: tl.constexpr,
        CGP: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
        CHUNKS_P: tl.constexpr,
        SILU: tl.constexpr,
    ):
        b = tl.program_id(2).to(tl.int64)
        BLOCK_G: tl.constexpr = BLOCK_C // CGP
        g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
        k = tl.arange(0, CHUNKS_P)
        there = (k < chunks)[:, None] & (g < C // CG)[None, :]
        at = (b * chunks + k[:, None]) * (C // CG) + g[None, :]
        n_k = tl.maximum(tl.minimum(HW - k * chunk_rows, chunk_rows), 0) * CG
        n = tl.where(there, n_k[:, None], 0).to(tl.float32)
        mean = tl.load(mean_ptr + at, mask=there, other=0.0)
        m2 = tl.load(m2_ptr + at, mask=there, other=0.0)
        n, mean, m2 = _merge(n, mean, m2, 0)
        rstd = 1.0 / tl.sqrt(m2 / tl.maximum(n, 1.0) + eps)

        # From one value a group to one a slot.
        mean = tl.reshape(tl.broadcast_to(mean[:, None], (BLOCK_G, CGP)), (BLOCK_C,))
        rstd = tl.reshape(tl.broadcast_to(rstd[:, None], (BLOCK_G, CGP)), (BLOCK_C,))
        c, used = _channels(C, CG, CGP, BLOCK_C)
        scale = rstd * tl.load(weight_ptr + c, mask=used, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + c, mask=used, other=0.0).to(tl.float32)
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + c, mask=used, other=0.0).to(tl.float32)

        r = tl.arange(0, BLOCK_R)
        first = tl.program_id(0) * program_rows
        rows = tl.minimum(HW - first, program_rows)
        x_tile = x_ptr + b * stride_xb + first.to(tl.int64) * stride_xw
        out_tile = out_ptr + (b * HW + first) * C
        x_offsets = r[:, None] * stride_xw + c[None, :]
        out_offsets = r[:, None] * C + c[None, :]
        for step in range(0, tl.cdiv(rows, BLOCK_R)):
            mask = (step * BLOCK_R + r < rows)[:, None] & used[None, :]
            x = tl.load(x_tile + x_offsets, mask=mask, other=0.0).to(tl.float32)
            if shift_ptr is not None:
                x += shift[None, :]
            y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
            if SILU:
                y = y / (1.0 + tl.exp(-y))
            tl.store(out_tile + out_offsets, y.to(out_ptr.dtype.element_ty), mask=mask)
            x_tile += BLOCK_R * stride_xw
            out_tile += BLOCK_R * C


def group_norm_silu_ref(
    x_BCHW: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool = True
) -> torch.Tensor:
    """The definition in plain torch: in fp32, rounded once to the input's dtype; arguments as `group_norm_silu`."""
    y = F.group_norm(x_BCHW.float(), groups, weight.float(), bias.float(), eps)
    return (F.silu(y) if silu else y).to(x_BCHW.dtype)


def takes(x_BCHW: torch.Tensor) -> bool:
    """Whether what a convolution makes of x_BCHW, [B, C, H, W] of any dtype, may be left a `Sum`: "auto" will take the
    kernel for that. Raises no ValueError, whatever the layout.
    """
    channels_last = x_BCHW.is_contiguous(memory_format=torch.channels_last)
    return use_triton("auto", x_BCHW) and channels_last and not torch.is_grad_enabled()


def _even_stride(x_BCHW: torch.Tensor) -> int | None:
    """Elements from one pixel to the next, or None where the rows of pixels do not follow one another."""
    _, _, H, W = x_BCHW.shape
    stride_h, stride_w = x_BCHW.stride()[2:]
    if H > 1 and W > 1 and stride_h != W * stride_w:
        return None
    return stride_w if W > 1 else stride_h


def _plan(C: int, groups: int, HW: int, TILE: int, BLOCK_C: int, **options: int) -> tuple[dict[str, int], int, int]:
    """(constants and options of both kernels, rows of a chunk, chunks of a picture), whatever the batch."""
    CG = C // groups
    CGP = triton.next_power_of_2(CG)
    block_c = max(CGP, min(BLOCK_C, CGP * triton.next_power_of_2(groups)))
    block_r = max(1, TILE // block_c)
    # Twice the tile's rows, so that half a chunk is whole tiles too.
    chunk_rows = triton.cdiv(max(MIN_CHUNK, triton.cdiv(HW, MAX_CHUNKS)), 2 * block_r) * 2 * block_r
    constants = {"C": C, "CG": CG, "CGP": CGP, "BLOCK_R": block_r, "BLOCK_C": block_c}
    return constants | options | OPTIONS, chunk_rows, triton.cdiv(HW, chunk_rows)


def _memory_of_sum(x: Sum, keep: bool) -> torch.Tensor | None:
    """Where the sum is written, or None where the norm reads x again: two reads are no more than a write and a read."""
    even = _even_stride(x.x_BCHW) is not None
    if even and x.residual_BCHW is None and (x.shift is None or not keep):
        return None
    own = not x.complete and x.x_BCHW.is_contiguous(memory_format=torch.channels_last)
    return x.x_BCHW if own else torch.empty_like(x.x_BCHW, memory_format=torch.channels_last)


def _sum_triton(x: Sum, groups: int, keep: bool, statistics: torch.Tensor | None) -> torch.Tensor | None:
    """The sum, or None where it is not written; statistics: fp32 [2, B, chunks, groups] for means and M2, or None."""
    x_BCHW, residual = x.x_BCHW, x.residual_BCHW
    B, C, H, W = x_BCHW.shape
    settings, chunk_rows, chunks = _plan(C, groups, H * W, **blocks("group_norm", x_BCHW.device))
    total = _memory_of_sum(x, keep)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    mean, m2 = (None, None) if statistics is None else statistics
    even = _even_stride(x_BCHW)
    stride_h, stride_w = x_BCHW.stride()[2:] if even is None else (None, even)
    with torch.cuda.device_of(x_BCHW):
        _group_statistics_kernel[(chunks, _columns(settings, groups), B)](
            x_BCHW,
            x.shift,
            residual,
            x.residual_shift,
            total,
            mean,
            m2,
            H * W,
            W,
            chunk_rows,
            x_BCHW.stride(0),
            stride_h,
            stride_w,
            **settings,
        )
    return total


def _columns(settings: dict[str, int], groups: int) -> int:
    """Blocks of channels, a program's each."""
    return triton.cdiv(groups, settings["BLOCK_C"] // settings["CGP"])


def _group_norm_triton(
    x: Sum, weight, bias, groups: int, eps: float, silu: bool, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The norm, and the sum where it was written."""
    B, C, H, W = x.x_BCHW.shape
    HW, device = H * W, x.x_BCHW.device
    settings, chunk_rows, chunks = _plan(C, groups, HW, **blocks("group_norm", device))
    program_rows = chunk_rows // 2
    statistics = torch.empty((2, B, chunks, groups), dtype=torch.float32, device=device)
    total = _sum_triton(x, groups, keep, statistics)
    x_BCHW, shift = (x.x_BCHW, x.shift) if total is None else (total, None)
    out = torch.empty_like(x_BCHW, memory_format=torch.channels_last)
    with torch.cuda.device_of(x_BCHW):
        _group_norm_kernel[(triton.cdiv(HW, program_rows), _columns(settings, groups), B)](
            x_BCHW,
            shift,
            weight,
            bias,
            *statistics,
            out,
            HW,
            chunks,
            chunk_rows,
            program_rows,
            x_BCHW.stride(0),
            _even_stride(x_BCHW),
            eps,
            **settings,
            CHUNKS_P=triton.next_power_of_2(chunks),
            SILU=silu,
        )
    return out, total


def group_norm_silu(
    x: torch.Tensor | Sum,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    impl: str = "auto",
) -> torch.Tensor:
    """GroupNorm with an affine part, then SiLU (y / (1 + exp(-y))) unless `silu` is False.

    x: [B, C, H, W], float32, float16 or bfloat16, or a Sum of such, whose x may be written over; the kernel takes
    memory in which a pixel's channels are contiguous: channels last, and slices of it. B may be 0.
    weight, bias: [C], float32 or the input's dtype, contiguous. groups: divides C. eps: added to the variance.
    impl: "auto" (triton on a GPU for a layout it takes and where no gradient is wanted, else torch), "triton" (a GPU,
    or TRITON_INTERPRET=1) or "torch".

    Returns the input's shape and dtype, channels last from the kernel. Raises ValueError for shapes, dtypes, devices
    or layouts that do not fit and RuntimeError where impl="triton" cannot run.
    """
    return _run(x, weight, bias, groups, eps, silu, False, impl)[0]


def add_group_norm_silu_(
    x: torch.Tensor | Sum,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, rounded to the dtype, and its norm: a convolution's bias, a residual connection and what comes next.

    x, weight, bias, groups, eps, silu, impl, dtypes, and what is raised: as `group_norm_silu` has them. Returns two
    pictures; the first may be x, or have the memory of a Sum's x. May be captured in a CUDA graph.
    """
    out, total = _run(x, weight, bias, groups, eps, silu, True, impl)
    return total, out


def add_up_(x: Sum, impl: str = "auto") -> torch.Tensor:
    """The sum alone, as `add_group_norm_silu_` returns it: what a convolution reads that no norm stands before.

    x, impl, dtypes, and what is raised: as there.
    """
    check_sum(x)
    if x.complete:
        return x.x_BCHW
    # Every channel is a group of its own, which leaves no slot of a tile empty.
    groups = x.x_BCHW.shape[1]
    return _sum_triton(x, groups, True, None) if _fused(x, [], groups, impl) else sum_ref(x)


def _run(
    x: torch.Tensor | Sum, weight, bias, groups: int, eps: float, silu: bool, keep: bool, impl: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and the sum, which counts only if it is to be kept."""
    x = x if isinstance(x, Sum) else Sum(x)
    x_BCHW = x.x_BCHW
    if x_BCHW.ndim != 4 or groups < 1 or x_BCHW.shape[1] % groups or x_BCHW.shape[1] == 0:
        raise ValueError(f"input {list(x_BCHW.shape)} in {groups} groups: expected [B, C, H, W], C divisible by groups")
    if weight.shape != x_BCHW.shape[1:2] or bias.shape != x_BCHW.shape[1:2]:
        raise ValueError(f"weight {list(weight.shape)}, bias {list(bias.shape)}: expected [{x_BCHW.shape[1]}]")
    if x_BCHW.dtype not in FLOAT_DTYPES or not {weight.dtype, bias.dtype} <= {x_BCHW.dtype, torch.float32}:
        dtypes = f"input {x_BCHW.dtype}, weight {weight.dtype}, bias {bias.dtype}"
        raise ValueError(f"{dtypes}: expected float32, float16 or bfloat16, weight and bias float32 or the same")
    if not x_BCHW.device == weight.device == bias.device:
        raise ValueError(f"input on {x_BCHW.device}, weight on {weight.device}, bias on {bias.device}")
    check_sum(x)
    if _fused(x, [weight, bias], groups, impl):
        out, total = _group_norm_triton(x, weight, bias, groups, eps, silu, keep)
        return out, x_BCHW if total is None else total
    total = sum_ref(x)
    if x_BCHW.numel() == 0:
        return torch.empty_like(x_BCHW), total
    return group_norm_silu_ref(total, weight, bias, groups, eps, silu), total


def _fused(x: Sum, affine: list[torch.Tensor], groups: int, impl: str) -> bool:
    """Whether the kernel is to run; raises ValueError where it has to and does not take these inputs."""
    fused = use_triton(impl, x.x_BCHW) and x.x_BCHW.numel() > 0
    refusal = _refusal(x, affine, groups) if fused else None
    if refusal and impl == "triton":
        raise ValueError(f"impl='triton': {refusal}")
    return fused and not refusal


def _refusal(x: Sum, affine: list[torch.Tensor], groups: int) -> str | None:
    """Why the kernel does not take these inputs, or None where it does."""
    vectors = [*affine, *(shift for shift in (x.shift, x.residual_shift) if shift is not None)]
    tensors = [x.x_BCHW, *([] if x.residual_BCHW is None else [x.residual_BCHW]), *vectors]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "the kernel has no backward; expected torch.no_grad() or inputs that require no gradient"
    _, C, _, _ = x.x_BCHW.shape
    if (C > 1 and x.x_BCHW.stride(1) != 1) or not all(vector.is_contiguous() for vector in vectors):
        return f"input of strides {x.x_BCHW.stride()}, expected channels_last; weight, bias and shifts contiguous"
    if C // groups > MAX_GROUP:
        return f"{C // groups} channels in a group, expected {MAX_GROUP} at most"
    return None

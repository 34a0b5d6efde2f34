"""GroupNorm of a channels-last picture, and SiLU in the same pass.

On a GPU torch's own GroupNorm copies a channels-last input to NCHW, normalises it into NCHW, SiLU reads and writes
that again, and the next convolution finds NCHW. Here the input is read twice and the output written once, all of it
channels last: 3 C H W values per picture, and for the statistics 8 bytes per group and chunk of rows (under 0.1 %).

A group of a large picture (512 x 512 x 4 = a million values) is spread over many programs: the first launch leaves
the mean and the sum of squared deviations (M2) of every group in every chunk of rows, the second combines them and
normalises. No atomics: the result is the same on every run, and a picture's does not depend on the rest of its batch.

Precision: everything is computed in fp32 and rounded once, on output. Statistics by Welford's recurrence per position
of the tile, merged by the rule of Chan, Golub and LeVeque (1979), never as E[x^2] - E[x]^2, which loses all digits
where a group's mean is large against its deviation. For the same reason the mean is subtracted before the scaling.

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

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
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
    def _group_statistics_kernel(
        x_ptr,
        mean_ptr,
        m2_ptr,
        HW,
        chunk_rows,
        stride_xb,
        stride_xr,
        C: tl.constexpr,
        CG: tl.constexpr,
        CGP: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        # One program takes the rows of one chunk for the groups of one block of channels.
        chunk, b = tl.program_id(0), tl.program_id(2)
        c, used = _channels(C, CG, CGP, BLOCK_C)
        r = tl.arange(0, BLOCK_R)
        first = chunk * chunk_rows
        rows = tl.minimum(HW - first, chunk_rows)
        x_tile = x_ptr + b.to(tl.int64) * stride_xb + first.to(tl.int64) * stride_xr
        offsets = r[:, None] * stride_xr + c[None, :]

        # Welford per position of the tile; a position's values end where the chunk's rows do, so all earlier ones
        # are there and `step + 1` is its count.
        mean = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        m2 = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for step in range(0, tl.cdiv(rows, BLOCK_R)):
            there = (step * BLOCK_R + r < rows)[:, None] & used[None, :]
            x = tl.load(x_tile + offsets, mask=there, other=0.0).to(tl.float32)
            delta = tl.where(there, x - mean, 0.0)
            mean += delta * (1.0 / (step + 1))
            m2 += delta * (x - mean)
            x_tile += BLOCK_R * stride_xr

        n_r = tl.maximum((rows - r + BLOCK_R - 1) // BLOCK_R, 0)
        n = tl.where(used[None, :], n_r[:, None], 0).to(tl.float32)
        n, mean, m2 = _merge(n, mean, m2, 0)
        BLOCK_G: tl.constexpr = BLOCK_C // CGP
        n = tl.reshape(n, (BLOCK_G, CGP))
        n, mean, m2 = _merge(n, tl.reshape(mean, (BLOCK_G, CGP)), tl.reshape(m2, (BLOCK_G, CGP)), 1)
        g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
        at = (b.to(tl.int64) * tl.num_programs(0) + chunk) * (C // CG) + g
        tl.store(mean_ptr + at, mean, mask=g < C // CG)
        tl.store(m2_ptr + at, m2, mask=g < C // CG)

    @triton.jit
    def _group_norm_kernel(
        x_ptr,
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
        stride_xr,
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

        r = tl.arange(0, BLOCK_R)
        first = tl.program_id(0) * program_rows
        rows = tl.minimum(HW - first, program_rows)
        x_tile = x_ptr + b * stride_xb + first.to(tl.int64) * stride_xr
        out_tile = out_ptr + (b * HW + first) * C
        x_offsets = r[:, None] * stride_xr + c[None, :]
        out_offsets = r[:, None] * C + c[None, :]
        for step in range(0, tl.cdiv(rows, BLOCK_R)):
            mask = (step * BLOCK_R + r < rows)[:, None] & used[None, :]
            x = tl.load(x_tile + x_offsets, mask=mask, other=0.0).to(tl.float32)
            y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
            if SILU:
                y = y / (1.0 + tl.exp(-y))
            tl.store(out_tile + out_offsets, y.to(out_ptr.dtype.element_ty), mask=mask)
            x_tile += BLOCK_R * stride_xr
            out_tile += BLOCK_R * C


def group_norm_silu_ref(
    x_BCHW: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, silu: bool = True
) -> torch.Tensor:
    """The definition in plain torch: in fp32, rounded once to the input's dtype; arguments as `group_norm_silu`."""
    y = F.group_norm(x_BCHW.float(), groups, weight.float(), bias.float(), eps)
    return (F.silu(y) if silu else y).to(x_BCHW.dtype)


def _row_stride(x_BCHW: torch.Tensor) -> int | None:
    """Elements from one pixel to the next, or None where the channels or the pixels do not lie one after another."""
    _, C, H, W = x_BCHW.shape
    _, stride_c, stride_h, stride_w = x_BCHW.stride()
    if (C > 1 and stride_c != 1) or (H > 1 and W > 1 and stride_h != W * stride_w):
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


def _group_norm_triton(x_BCHW, weight, bias, groups: int, eps: float, silu: bool) -> torch.Tensor:
    B, C, H, W = x_BCHW.shape
    HW = H * W
    settings, chunk_rows, chunks = _plan(C, groups, HW, **blocks("group_norm", x_BCHW.device))
    program_rows = chunk_rows // 2
    columns = triton.cdiv(groups, settings["BLOCK_C"] // settings["CGP"])
    mean, m2 = torch.empty((2, B, chunks, groups), dtype=torch.float32, device=x_BCHW.device)
    out = torch.empty_like(x_BCHW, memory_format=torch.channels_last)
    strides = x_BCHW.stride(0), _row_stride(x_BCHW)
    with torch.cuda.device_of(x_BCHW):
        _group_statistics_kernel[(chunks, columns, B)](x_BCHW, mean, m2, HW, chunk_rows, *strides, **settings)
        _group_norm_kernel[(triton.cdiv(HW, program_rows), columns, B)](
            x_BCHW,
            weight,
            bias,
            mean,
            m2,
            out,
            HW,
            chunks,
            chunk_rows,
            program_rows,
            *strides,
            eps,
            **settings,
            CHUNKS_P=triton.next_power_of_2(chunks),
            SILU=silu,
        )
    return out


def group_norm_silu(
    x_BCHW: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    silu: bool = True,
    impl: str = "auto",
) -> torch.Tensor:
    """GroupNorm with an affine part, then SiLU (y / (1 + exp(-y))) unless `silu` is False.

    x_BCHW: [B, C, H, W], float32, float16 or bfloat16; the kernel takes channels-last memory (a pixel's channels
    contiguous, pixels evenly spaced: also a slice of channels or of pictures). B may be 0.
    weight, bias: [C], float32 or the input's dtype, contiguous. groups: divides C. eps: added to the variance.
    impl: "auto" (triton on a GPU for a layout it takes and where no gradient is wanted, else torch), "triton" (a GPU,
    or TRITON_INTERPRET=1) or "torch".

    Returns the input's shape and dtype, channels last from the kernel. Raises ValueError for shapes, dtypes, devices
    or layouts that do not fit and RuntimeError where impl="triton" cannot run.
    """
    if x_BCHW.ndim != 4 or groups < 1 or x_BCHW.shape[1] % groups or x_BCHW.shape[1] == 0:
        raise ValueError(f"input {list(x_BCHW.shape)} in {groups} groups: expected [B, C, H, W], C divisible by groups")
    if weight.shape != x_BCHW.shape[1:2] or bias.shape != x_BCHW.shape[1:2]:
        raise ValueError(f"weight {list(weight.shape)}, bias {list(bias.shape)}: expected [{x_BCHW.shape[1]}]")
    if x_BCHW.dtype not in FLOAT_DTYPES or not {weight.dtype, bias.dtype} <= {x_BCHW.dtype, torch.float32}:
        dtypes = f"input {x_BCHW.dtype}, weight {weight.dtype}, bias {bias.dtype}"
        raise ValueError(f"{dtypes}: expected float32, float16 or bfloat16, weight and bias float32 or the same")
    if not x_BCHW.device == weight.device == bias.device:
        raise ValueError(f"input on {x_BCHW.device}, weight on {weight.device}, bias on {bias.device}")
    fused = use_triton(impl, x_BCHW)
    if x_BCHW.numel() == 0:
        return torch.empty_like(x_BCHW)
    refusal = _refusal(x_BCHW, weight, bias, groups) if fused else None
    if refusal and impl == "triton":
        raise ValueError(f"impl='triton': {refusal}")
    run = _group_norm_triton if fused and not refusal else group_norm_silu_ref
    return run(x_BCHW, weight, bias, groups, eps, silu)


def _refusal(x_BCHW, weight, bias, groups: int) -> str | None:
    """Why the kernel does not take these inputs, or None where it does."""
    if torch.is_grad_enabled() and (x_BCHW.requires_grad or weight.requires_grad or bias.requires_grad):
        return "the kernel has no backward; expected torch.no_grad() or inputs that require no gradient"
    if _row_stride(x_BCHW) is None or not weight.is_contiguous() or not bias.is_contiguous():
        return f"input of strides {x_BCHW.stride()}, expected channels_last; weight and bias contiguous"
    if x_BCHW.shape[1] // groups > MAX_GROUP:
        return f"{x_BCHW.shape[1] // groups} channels in a group, expected {MAX_GROUP} at most"
    return None

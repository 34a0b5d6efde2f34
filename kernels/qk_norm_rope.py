"""LayerNorm of every head and rotary embedding of a query or key projection in one pass, forward and backward.

Chameleon normalises each head of q and k over its D values, applies an affine part and rotates the halves y1, y2:
    y = (x - mean) * rstd * weight + bias,   out1 = y1 * cos - y2 * sin,   out2 = y2 * cos + y1 * sin.
In eager mode transformers runs eight operations over whole tensors (LayerNorm, multiply, add, then multiply by cos,
negate a half, cat, multiply by sin, add; the transposes are views): in bf16 32 bytes per value, 38 backward and 48 with
gradients of the affine part, by the sizes of what they take and return. Here x is read and the output written, 4 bytes;
cos and sin, D values a token, are read once for HEADS heads and mostly from the L2 cache. Backward 6 bytes: x and the
gradient are read, dx is written. Kept for backward: x alone, which is normalised again.

Backward, with dz the gradient of out rotated back (dz1 = d1 * cos + d2 * sin, dz2 = d2 * cos - d1 * sin), n the
normalised x, g = dz * weight and means over D:
    dx = rstd * (g - mean(g) - n * mean(g * n)),   dweight = sum of dz * n,   dbias = sum of dz.
No atomics: each program leaves its sums of dweight and dbias in a slot of its own, which one torch.sum adds, so the
same inputs give the same bits on every run. With one affine part for all heads a program's HEADS heads share a slot
(0.1 bytes per value, written and read, at D = 128), with one for each head they do not (1 byte).

Precision: everything is computed in fp32 (dweight and dbias summed in fp32) and rounded once, on output. The mean is
taken twice, the second time of what the first left, because the rounding of a sum of large values is not small
against their deviations; the variance is the mean square of the deviations, never E[x^2] - E[x]^2.

Shapes: T tokens, H heads, D values of a head in two halves of F; a tile has BLOCK_T tokens and BLOCK_F slots a half.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from medmax_fast.kernels.blocks import blocks
from medmax_fast.kernels.launch import use_triton

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The widest head that the kernels take, a token of which is a tile.
MAX_D = 2048
OPTIONS = {"enable_fp_fusion": True}


if triton is not None:

    @triton.jit
    def _halves(tile, there, SECOND: tl.constexpr):
        """Both halves of a tile or a row in fp32, zeros where nothing is; SECOND: elements from one to the other."""
        first = tl.load(tile, mask=there, other=0.0).to(tl.float32)
        return first, tl.load(tile + SECOND, mask=there, other=0.0).to(tl.float32)

    @triton.jit
    def _normalise(x1, x2, there, present, eps, D: tl.constexpr):
        """Both halves without their mean, over their deviation, and its inverse per token; zeros for absent tokens."""
        mean = tl.sum(x1 + x2, axis=1) / D
        x1 = tl.where(there, x1 - mean[:, None], 0.0)
        x2 = tl.where(there, x2 - mean[:, None], 0.0)
        mean = tl.sum(x1 + x2, axis=1) / D
        x1 = tl.where(there, x1 - mean[:, None], 0.0)
        x2 = tl.where(there, x2 - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / D + eps)
        # With eps = 0 it would be infinite for a token that is not there.
        rstd = tl.where(present, rstd, 0.0)
        return x1 * rstd[:, None], x2 * rstd[:, None], rstd

    @triton.jit
    def _norm_rope_kernel(
        x_ptr,
        weight_ptr,
        bias_ptr,
        cos_ptr,
        sin_ptr,
        out_ptr,
        T,
        H,
        stride_xt,
        stride_xh,
        stride_ct,
        stride_cf,
        stride_st,
        stride_sf,
        eps,
        D: tl.constexpr,
        PER_HEAD: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_F: tl.constexpr,
        HEADS: tl.constexpr,
    ):
        # One program takes a tile of tokens through HEADS heads.
        F: tl.constexpr = D // 2
        t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        f = tl.arange(0, BLOCK_F)
        there = (t < T)[:, None] & (f < F)[None, :]
        cos = tl.load(cos_ptr + t[:, None] * stride_ct + f[None, :] * stride_cf, mask=there, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + t[:, None] * stride_st + f[None, :] * stride_sf, mask=there, other=0.0).to(tl.float32)
        if not PER_HEAD:
            w1, w2 = _halves(weight_ptr + f, f < F, F)
            b1, b2 = _halves(bias_ptr + f, f < F, F)

        first = tl.program_id(1) * HEADS
        x_ptr += first.to(tl.int64) * stride_xh
        x_at = t[:, None] * stride_xt + f[None, :]
        out_ptr += first * D
        out_at = t[:, None] * H * D + f[None, :]
        affine_at = first * D + f
        for _ in range(0, tl.minimum(H - first, HEADS)):
            if PER_HEAD:
                w1, w2 = _halves(weight_ptr + affine_at, f < F, F)
                b1, b2 = _halves(bias_ptr + affine_at, f < F, F)
            x1, x2 = _halves(x_ptr + x_at, there, F)
            n1, n2, _rstd = _normalise(x1, x2, there, t < T, eps, D)
            y1 = n1 * w1[None, :] + b1[None, :]
            y2 = n2 * w2[None, :] + b2[None, :]
            tl.store(out_ptr + out_at, (y1 * cos - y2 * sin).to(out_ptr.dtype.element_ty), mask=there)
            tl.store(out_ptr + out_at + F, (y2 * cos + y1 * sin).to(out_ptr.dtype.element_ty), mask=there)
            x_ptr += stride_xh
            out_ptr += D
            affine_at += D

    @triton.jit
    def _store_sums(slot, v1, v2, used, F: tl.constexpr):
        # In two steps: the interpreter adds up an axis value by value, where a GPU builds a tree.
        BLOCK_T: tl.constexpr = v1.shape[0]
        PART: tl.constexpr = BLOCK_T // 8 if BLOCK_T > 8 else 1
        v1 = tl.sum(tl.reshape(v1, (PART, BLOCK_T // PART, v1.shape[1])), axis=1)
        v2 = tl.sum(tl.reshape(v2, (PART, BLOCK_T // PART, v2.shape[1])), axis=1)
        tl.store(slot, tl.sum(v1, axis=0), mask=used)
        tl.store(slot + F, tl.sum(v2, axis=0), mask=used)

    @triton.jit
    def _norm_rope_backward_kernel(
        dout_ptr,
        x_ptr,
        weight_ptr,
        cos_ptr,
        sin_ptr,
        dx_ptr,
        dweight_ptr,
        dbias_ptr,
        T,
        H,
        stride_dt,
        stride_dh,
        stride_xt,
        stride_xh,
        stride_ct,
        stride_cf,
        stride_st,
        stride_sf,
        eps,
        D: tl.constexpr,
        PER_HEAD: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_F: tl.constexpr,
        HEADS: tl.constexpr,
    ):
        # The tiles of the forward kernel. A gradient that is not wanted has the pointer None.
        F: tl.constexpr = D // 2
        t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        f = tl.arange(0, BLOCK_F)
        there = (t < T)[:, None] & (f < F)[None, :]
        cos = tl.load(cos_ptr + t[:, None] * stride_ct + f[None, :] * stride_cf, mask=there, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + t[:, None] * stride_st + f[None, :] * stride_sf, mask=there, other=0.0).to(tl.float32)
        if not PER_HEAD:
            w1, w2 = _halves(weight_ptr + f, f < F, F)
            dw1 = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
            dw2, db1, db2 = dw1, dw1, dw1

        first = tl.program_id(1) * HEADS
        dout_ptr += first.to(tl.int64) * stride_dh
        x_ptr += first.to(tl.int64) * stride_xh
        dout_at = t[:, None] * stride_dt + f[None, :]
        x_at = t[:, None] * stride_xt + f[None, :]
        dx_at = t[:, None] * H * D + f[None, :]
        if dx_ptr is not None:
            dx_ptr += first * D
        affine_at = first * D + f
        if PER_HEAD:
            slot_at = (tl.program_id(0).to(tl.int64) * H + first) * D + f
        else:
            slot_at = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * D + f
        for _ in range(0, tl.minimum(H - first, HEADS)):
            if PER_HEAD:
                w1, w2 = _halves(weight_ptr + affine_at, f < F, F)
            x1, x2 = _halves(x_ptr + x_at, there, F)
            n1, n2, rstd = _normalise(x1, x2, there, t < T, eps, D)
            d1, d2 = _halves(dout_ptr + dout_at, there, F)
            dz1 = d1 * cos + d2 * sin
            dz2 = d2 * cos - d1 * sin
            if dx_ptr is not None:
                g1 = dz1 * w1[None, :]
                g2 = dz2 * w2[None, :]
                along_1 = (tl.sum(g1 + g2, axis=1) / D)[:, None]
                along_n = (tl.sum(g1 * n1 + g2 * n2, axis=1) / D)[:, None]
                dx1 = (g1 - along_1 - n1 * along_n) * rstd[:, None]
                dx2 = (g2 - along_1 - n2 * along_n) * rstd[:, None]
                tl.store(dx_ptr + dx_at, dx1.to(dx_ptr.dtype.element_ty), mask=there)
                tl.store(dx_ptr + dx_at + F, dx2.to(dx_ptr.dtype.element_ty), mask=there)
            if dweight_ptr is not None:
                if PER_HEAD:
                    _store_sums(dweight_ptr + slot_at, dz1 * n1, dz2 * n2, f < F, F)
                else:
                    dw1 += dz1 * n1
                    dw2 += dz2 * n2
            if dbias_ptr is not None:
                if PER_HEAD:
                    _store_sums(dbias_ptr + slot_at, dz1, dz2, f < F, F)
                else:
                    db1 += dz1
                    db2 += dz2
            dout_ptr += stride_dh
            x_ptr += stride_xh
            if dx_ptr is not None:
                dx_ptr += D
            affine_at += D
            if PER_HEAD:
                slot_at += D
        if not PER_HEAD:
            if dweight_ptr is not None:
                _store_sums(dweight_ptr + slot_at, dw1, dw2, f < F, F)
            if dbias_ptr is not None:
                _store_sums(dbias_ptr + slot_at, db1, db2, f < F, F)


def norm_rope_ref(
    x_THD: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    cos_TF: torch.Tensor,
    sin_TF: torch.Tensor,
    eps: float = 1e-5,
) -> torch.Tensor:
    """The definition in plain torch, in fp32 (in float64 for float64), rounded once; arguments as `norm_rope`."""
    dtype = torch.promote_types(x_THD.dtype, torch.float32)
    x, weight, bias = x_THD.to(dtype), weight.to(dtype), bias.to(dtype)
    cos, sin = (table.detach().to(dtype)[:, None] for table in (cos_TF, sin_TF))
    # Not layer_norm's own affine part: on a CPU its gradients are added up row by row, which loses more.
    y = torch.addcmul(bias, layer_norm(x, x.shape[-1:], eps=eps), weight)
    y1, y2 = y.chunk(2, dim=-1)
    out = torch.cat((torch.addcmul(y1 * cos, y2, sin, value=-1), torch.addcmul(y2 * cos, y1, sin)), dim=-1)
    return out.to(x_THD.dtype)


def _plan(T: int, H: int, D: int, TILE: int, HEADS: int, **options: int) -> tuple[dict[str, int], tuple[int, int]]:
    """(constants and options of both kernels, grid)."""
    block_f = triton.next_power_of_2(D // 2)
    block_t = max(1, TILE // (2 * block_f))
    constants = {"D": D, "BLOCK_T": block_t, "BLOCK_F": block_f, "HEADS": HEADS}
    if block_t == 1:
        # Of a tile as wide as that; without a limit ptxas sets a tighter one of its own and spills, for sm_100.
        options = {"maxnreg": 255} | options
    return constants | options | OPTIONS, (triton.cdiv(T, block_t), triton.cdiv(H, HEADS))


def _norm_rope_triton(x_THD, weight, bias, cos_TF, sin_TF, eps: float) -> torch.Tensor:
    T, H, D = x_THD.shape
    out = torch.empty_like(x_THD, memory_format=torch.contiguous_format)
    settings, grid = _plan(T, H, D, **blocks("norm_rope", x_THD.device))
    with torch.cuda.device_of(x_THD):
        _norm_rope_kernel[grid](
            x_THD,
            weight.contiguous(),
            bias.contiguous(),
            cos_TF,
            sin_TF,
            out,
            T,
            H,
            *x_THD.stride()[:2],
            *cos_TF.stride(),
            *sin_TF.stride(),
            eps,
            **settings,
            PER_HEAD=weight.ndim == 2,
        )
    return out


class _NormRope(torch.autograd.Function):
    """The kernels for autograd, which need no result of the forward pass in the backward one."""

    @staticmethod
    def forward(ctx, x_THD, weight, bias, cos_TF, sin_TF, eps):
        ctx.save_for_backward(x_THD, weight, cos_TF, sin_TF)
        ctx.eps, ctx.bias_dtype = eps, bias.dtype
        return _norm_rope_triton(x_THD, weight, bias, cos_TF, sin_TF, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_THD):
        x_THD, weight, cos_TF, sin_TF = ctx.saved_tensors
        want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
        T, H, D = x_THD.shape
        settings, grid = _plan(T, H, D, **blocks("norm_rope", x_THD.device))
        per_head = weight.ndim == 2
        slots = (grid[0], H, D) if per_head else (grid[0] * grid[1], D)
        # The gradient of a sum has strides of zero, others may be slices: rows must be contiguous, tokens not.
        dout_THD = dout_THD if dout_THD.stride(2) == 1 else dout_THD.contiguous()
        dx = torch.empty_like(x_THD, memory_format=torch.contiguous_format) if want_x else None
        dweight = torch.empty(slots, dtype=torch.float32, device=x_THD.device) if want_weight else None
        dbias = torch.empty(slots, dtype=torch.float32, device=x_THD.device) if want_bias else None
        with torch.cuda.device_of(x_THD):
            _norm_rope_backward_kernel[grid](
                dout_THD,
                x_THD,
                weight.contiguous(),
                cos_TF,
                sin_TF,
                dx,
                dweight,
                dbias,
                T,
                H,
                *dout_THD.stride()[:2],
                *x_THD.stride()[:2],
                *cos_TF.stride(),
                *sin_TF.stride(),
                ctx.eps,
                **settings,
                PER_HEAD=per_head,
            )
        dweight = dweight.sum(0).to(weight.dtype) if want_weight else None
        dbias = dbias.sum(0).to(ctx.bias_dtype) if want_bias else None
        return dx, dweight, dbias, None, None, None


def norm_rope(
    x_THD: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    cos_TF: torch.Tensor,
    sin_TF: torch.Tensor,
    eps: float = 1e-5,
    impl: str = "auto",
) -> torch.Tensor:
    """LayerNorm over each head with an affine part, then RoPE in the half-split order of transformers.

    x_THD: [T, H, D], float32, float16 or bfloat16 (float64 by torch alone), D even; the kernel takes any strides with
    a last one of 1, such as a slice of a wider projection, and D up to MAX_D. T may be 0.
    weight, bias: [D] for all heads or [H, D], both alike; float32 or the input's dtype, each on its own.
    cos_TF, sin_TF: [T, D/2], any float dtype and strides (of transformers' [T, D] tables the first half, a view); no
    gradient reaches them. eps: added to the variance.
    impl: "auto" (triton on a GPU for what it takes, else torch), "triton" (a GPU, or TRITON_INTERPRET=1) or "torch".

    Returns [T, H, D] of the input's dtype, contiguous, differentiable (the kernel once). Raises ValueError for shapes,
    dtypes, devices or strides that do not fit and RuntimeError where impl="triton" cannot run.
    """
    _check(x_THD, weight, bias, cos_TF, sin_TF)
    fused = use_triton(impl, x_THD)
    refusal = _refusal(x_THD) if fused else None
    if refusal and impl == "triton":
        raise ValueError(f"impl='triton': {refusal}")
    tensors = x_THD, weight, bias, cos_TF, sin_TF
    if not fused or refusal or x_THD.numel() == 0:
        return norm_rope_ref(*tensors, eps)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors[:3]):
        return _NormRope.apply(*tensors, eps)
    return _norm_rope_triton(*tensors, eps)


def _check(x_THD, weight, bias, cos_TF, sin_TF) -> None:
    """Raises ValueError for inputs that no path takes."""
    if x_THD.ndim != 3 or x_THD.shape[2] % 2 or x_THD.shape[2] == 0:
        raise ValueError(f"input {list(x_THD.shape)}: expected [T, H, D] with an even D")
    T, H, D = x_THD.shape
    if weight.shape != bias.shape or list(weight.shape) not in ([D], [H, D]):
        shapes = f"weight {list(weight.shape)}, bias {list(bias.shape)}"
        raise ValueError(f"{shapes}: expected both [{D}] or both [{H}, {D}]")
    if list(cos_TF.shape) != [T, D // 2] or list(sin_TF.shape) != [T, D // 2]:
        raise ValueError(f"cos {list(cos_TF.shape)}, sin {list(sin_TF.shape)}: expected [{T}, {D // 2}]")
    dtypes = (*FLOAT_DTYPES, torch.float64)
    if x_THD.dtype not in dtypes or not {weight.dtype, bias.dtype} <= {x_THD.dtype, torch.float32}:
        found = f"input {x_THD.dtype}, weight {weight.dtype}, bias {bias.dtype}"
        raise ValueError(f"{found}: expected a float dtype, weight and bias float32 or the same")
    if cos_TF.dtype not in dtypes or sin_TF.dtype not in dtypes:
        raise ValueError(f"cos {cos_TF.dtype}, sin {sin_TF.dtype}: expected a float dtype")
    names = {"weight": weight, "bias": bias, "cos": cos_TF, "sin": sin_TF}
    if others := [f"{name} on {tensor.device}" for name, tensor in names.items() if tensor.device != x_THD.device]:
        raise ValueError(f"input on {x_THD.device}, {', '.join(others)}: expected one device")


def _refusal(x_THD) -> str | None:
    """Why the kernel does not take this input, or None where it does."""
    if x_THD.stride(2) != 1:
        return f"input of strides {x_THD.stride()}, expected a last stride of 1"
    if x_THD.dtype not in FLOAT_DTYPES or x_THD.shape[2] > MAX_D:
        return f"input of {x_THD.dtype} with D = {x_THD.shape[2]}, expected at most 32 bits and {MAX_D}"
    return None

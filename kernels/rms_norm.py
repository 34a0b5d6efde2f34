"""RMSNorm, y = x * rsqrt(mean(x^2) + eps) * weight, forward and backward, each in one pass over the rows.

transformers' ChameleonRMSNorm is a chain of torch calls over fp32 copies. Bytes moved per bf16 value, operands and
results of all calls added up, and bytes kept from forward to backward:
               forward  backward, weight frozen  weight trained  kept, weight frozen  trained
    torch           36                       84              92                    4        6
    here             4                        6               6                    2        2
"Kept" is x itself here, which the residual stream holds anyway; beside it 4 bytes a row for rsqrt(...), which spares
the backward a second sum over the row that its own would have to wait for.

Backward, with x' = x * rstd, g = dy * weight and rows of C values:
    dx = rstd * (g - x' * mean(g * x')),  dweight = sum over rows of dy * x'.
dweight, where it is wanted, is the same on every run: each of at most PROGRAMS programs takes rows p, p + PROGRAMS, ...
in turn (the number depends on no device) and leaves its fp32 sum in a slot of its own, 4 C bytes; torch adds the slots
up. No atomics. With a frozen weight (LoRA) there are neither slots nor sums, and a program for every tile of rows.

`add_rms_norm_`, for inference, first adds what a layer returns to the residual stream, in place and in the same pass: 8
bytes per value (x and delta read, x and y written) against 6 of an addition and 4 of the norm, and one launch.

Precision: fp32 inside, each result rounded once. ChameleonRMSNorm rounds x' to x's dtype before the weight, and the
product again: in 16 bits the results differ, and these are the more exact ones; in fp32 only the order of the sum is
the kernel's own.

Shapes: rows [R, C] with one row stride. A tile has BLOCK_R rows and BLOCK_C columns, the power of two from C up.
"""

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from medmax_fast.kernels.blocks import blocks
from medmax_fast.kernels.launch import use_triton

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Slots of dweight.
PROGRAMS = 256
# The longest row: beyond it the sums of dweight no longer fit beside the row. "auto" leaves longer ones to torch.
MAX_C = 8192
OPTIONS = {"enable_fp_fusion": True}


if triton is not None:

    @triton.jit
    def _normalise(x, weight_ptr, c, eps, C: tl.constexpr):
        """Rows over their root mean square, times the weight, and the inverse of that root; all in fp32."""
        rstd = tl.rsqrt(tl.sum(x * x, axis=1) / C + eps)
        weight = tl.load(weight_ptr + c[None, :], mask=(c < C)[None, :], other=0.0).to(tl.float32)
        return x * rstd[:, None] * weight, rstd

    @triton.jit
    def _rms_norm_kernel(
        x_ptr,
        weight_ptr,
        out_ptr,
        rstd_ptr,
        R,
        stride_xr,
        eps,
        C: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        c = tl.arange(0, BLOCK_C)
        mask = (r < R)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + r[:, None] * stride_xr + c[None, :], mask=mask, other=0.0).to(tl.float32)
        y, rstd = _normalise(x, weight_ptr, c, eps, C)
        tl.store(out_ptr + r[:, None] * C + c[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)
        if rstd_ptr is not None:
            tl.store(rstd_ptr + r, rstd, mask=r < R)

    @triton.jit
    def _add_rms_norm_kernel(
        x_ptr,
        delta_ptr,
        weight_ptr,
        out_ptr,
        R,
        stride_xr,
        stride_dr,
        eps,
        C: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        c = tl.arange(0, BLOCK_C)
        mask = (r < R)[:, None] & (c < C)[None, :]
        x_at = r[:, None] * stride_xr + c[None, :]
        x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
        x += tl.load(delta_ptr + r[:, None] * stride_dr + c[None, :], mask=mask, other=0.0).to(tl.float32)
        # The norm is that of the sum as it is stored.
        x = x.to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + x_at, x, mask=mask)
        y, _rstd = _normalise(x.to(tl.float32), weight_ptr, c, eps, C)
        tl.store(out_ptr + r[:, None] * C + c[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _rms_norm_backward_kernel(
        x_ptr,
        weight_ptr,
        rstd_ptr,
        dy_ptr,
        dx_ptr,
        partial_ptr,
        R,
        stride_xr,
        stride_dyr,
        C: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        c = tl.arange(0, BLOCK_C)
        dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(R, BLOCK_R), tl.num_programs(0)):
            r = tile * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
            mask = (r < R)[:, None] & (c < C)[None, :]
            rstd = tl.load(rstd_ptr + r, mask=r < R, other=0.0)[:, None]
            x = tl.load(x_ptr + r[:, None] * stride_xr + c[None, :], mask=mask, other=0.0).to(tl.float32) * rstd
            dy = tl.load(dy_ptr + r[:, None] * stride_dyr + c[None, :], mask=mask, other=0.0).to(tl.float32)
            if partial_ptr is not None:
                dweight += dy * x
            if dx_ptr is not None:
                weight = tl.load(weight_ptr + c[None, :], mask=(c < C)[None, :], other=0.0).to(tl.float32)
                dy = dy * weight
                mean = tl.sum(dy * x, axis=1) / C
                dx = (dy - x * mean[:, None]) * rstd
                tl.store(dx_ptr + r[:, None] * C + c[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if partial_ptr is not None:
            slot = partial_ptr + tl.program_id(0).to(tl.int64) * C
            tl.store(slot + c, tl.sum(dweight, axis=0), mask=c < C)


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition in plain torch, differentiable: in fp32 (float64 for such an x), rounded once to x's dtype.

    In fp32 the bits of transformers' ChameleonRMSNorm. Arguments as `rms_norm`.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_wide = x.to(wide)
    rstd = torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + eps)
    return (x_wide * rstd * weight.to(wide)).to(x.dtype)


def add_rms_norm_ref_(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x.add_(delta), then the norm of it; arguments as `add_rms_norm_`."""
    return rms_norm_ref(x.add_(delta), weight, eps)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[R, C] with contiguous columns: a view where one row stride reaches every row, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _plan(C: int, TILE: int, MAX_R: int, WARP: int, **options: int) -> dict[str, int | bool]:
    """Constants of the kernels and their launch options."""
    block_c = triton.next_power_of_2(C)
    block_r = min(MAX_R, max(1, TILE // block_c))
    num_warps = min(32, max(1, block_r * block_c // WARP))
    options = {"num_warps": num_warps, "maxnreg": 64 if block_r == 1 else 128} | options
    return {"C": C, "BLOCK_R": block_r, "BLOCK_C": block_c, **options, **OPTIONS}


def _forward_triton(x, weight, eps: float, keep_rstd: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output and, if asked for, what the backward needs: fp32 [R]."""
    rows, plan = _rows(x), _plan(x.shape[-1], **blocks("rms_norm", x.device))
    R = len(rows)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(R, dtype=torch.float32, device=x.device) if keep_rstd else None
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(R, plan["BLOCK_R"]),)
        _rms_norm_kernel[grid](rows, weight.contiguous(), out, rstd, R, rows.stride(0), eps, **plan)
    return out, rstd


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        out, rstd = _forward_triton(x, weight, eps, keep_rstd=True)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        rows, dy_rows = _rows(x), _rows(dy)
        plan = _plan(x.shape[-1], **blocks("rms_norm", x.device))
        R, C = rows.shape
        dx = partial = None
        programs = triton.cdiv(R, plan["BLOCK_R"])
        if ctx.needs_input_grad[0]:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if ctx.needs_input_grad[1]:
            programs = min(programs, PROGRAMS)
            partial = torch.empty(programs, C, dtype=torch.float32, device=x.device)
        strides = rows.stride(0), dy_rows.stride(0)
        with torch.cuda.device_of(x):
            _rms_norm_backward_kernel[(programs,)](
                rows, weight.contiguous(), rstd, dy_rows, dx, partial, R, *strides, **plan
            )
        return dx, None if partial is None else partial.sum(0).to(weight.dtype), None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, impl: str = "auto") -> torch.Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension, differentiable in x and weight.

    x: [..., C], C >= 1, float32, float16 or bfloat16 (float64 too, in torch), any number of rows. The kernel reads in
    place rows of contiguous values with one stride from row to row (also a slice of a wider buffer) and copies other
    layouts first. weight: [C], float32 or x's dtype. eps: added to the mean square.
    impl: "auto" (triton on a GPU for C up to MAX_C, else torch), "triton" (a GPU, or TRITON_INTERPRET=1) or "torch".

    Returns x's shape and dtype (a float32 weight does not widen it), contiguous from the kernel; gradients come in the
    dtype of what they belong to. Without a gradient wanted nothing is kept. Raises ValueError for shapes, dtypes or
    devices that do not fit and RuntimeError where impl="triton" cannot run.
    """
    fused = _check(x, weight, impl)
    if not fused or x.numel() == 0:
        return rms_norm_ref(x, weight, eps)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    return _forward_triton(x, weight, eps, keep_rstd=False)[0]


def add_rms_norm_(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, impl: str = "auto"
) -> torch.Tensor:
    """x += delta in place, rounded to x's dtype, and RMSNorm of the sum: a residual connection and the norm after it.

    x, delta: [..., C], alike in shape, dtype and device, not overlapping; the kernel wants x in rows that it reaches
    with one stride (delta is copied where it is not). weight, eps and impl as in `rms_norm`.

    Returns y of x's shape and dtype, contiguous from the kernel. For inference: no gradient comes back from the kernel,
    which may be captured in a CUDA graph. Raises what `rms_norm` does, ValueError for rows of x that it cannot reach.
    """
    fused = _check(x, weight, impl)
    if delta.shape != x.shape or delta.dtype != x.dtype or delta.device != x.device:
        found = f"delta {list(delta.shape)} of {delta.dtype} on {delta.device}"
        raise ValueError(f"{found}: expected {list(x.shape)} of {x.dtype} on {x.device}")
    if not fused or x.numel() == 0:
        return add_rms_norm_ref_(x, delta, weight, eps)
    rows, delta_rows = _rows(x), _rows(delta)
    plan = _plan(x.shape[-1], **blocks("rms_norm", x.device))
    R, C = rows.shape
    if rows.data_ptr() != x.data_ptr() or (R > 1 and rows.stride(0) < C):
        raise ValueError(f"input of strides {x.stride()}: expected rows of contiguous values with one stride, apart")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    strides = rows.stride(0), delta_rows.stride(0)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(R, plan["BLOCK_R"]),)
        _add_rms_norm_kernel[grid](rows, delta_rows, weight.contiguous(), out, R, *strides, eps, **plan)
    return out


def _check(x: torch.Tensor, weight: torch.Tensor, impl: str) -> bool:
    """Whether the kernel is to run; raises ValueError for inputs that no path takes."""
    if x.ndim == 0 or x.shape[-1] == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"input {list(x.shape)}, weight {list(weight.shape)}: expected [..., C], [C] with C >= 1")
    if x.dtype not in (*FLOAT_DTYPES, torch.float64) or weight.dtype not in (x.dtype, torch.float32):
        message = "expected float32, float16, bfloat16 or float64, the weight float32 or the same"
        raise ValueError(f"input {x.dtype}, weight {weight.dtype}: {message}")
    if x.device != weight.device:
        raise ValueError(f"input on {x.device}, weight on {weight.device}: expected one device")
    fused = use_triton(impl, x)
    if fused and (x.dtype not in FLOAT_DTYPES or x.shape[-1] > MAX_C):
        if impl == "triton":
            raise ValueError(f"impl='triton': {x.dtype} rows of {x.shape[-1]}, expected {MAX_C} at most, 16 or 32 bits")
        return False
    return fused

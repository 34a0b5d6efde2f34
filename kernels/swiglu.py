"""SwiGLU's product silu(gate) * up, with silu(g) = g / (1 + exp(-g)), forward and backward in one pass each.

torch runs silu, then the product, and three calls backward. Bytes moved per bf16 value, operands and results of all
calls added up, and bytes kept from forward to backward:
               forward  backward  kept
    torch           10        18     6   (gate, up, silu(gate))
    here             6        10     4   (gate, up)
The backward computes the sigmoid again, s = 1 / (1 + exp(-gate)), and writes both gradients at once,
    dgate = dy * up * s * (1 + gate * (1 - s)),  dup = dy * gate * s;
where only one is wanted it computes that one, and for dup alone neither keeps nor reads up.

Precision: fp32 inside, each result rounded once (torch rounds silu(gate) in between). For fp32 tensors the divisions
are rounded correctly, as torch's are; the fast one's two units in the last place would be most of the error. exp(-g)
beyond fp32 is infinity, which makes silu -0 and both gradients 0, never NaN. gate = -inf gives NaN, as in torch.

Shapes: rows [R, C], each tensor with a row stride of its own. A tile has BLOCK_R rows and BLOCK_C columns.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from medmax_fast.kernels.blocks import blocks
from medmax_fast.kernels.launch import use_triton

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS = {"enable_fp_fusion": True}


if triton is not None:

    @triton.jit
    def _divide(a, b, exact: tl.constexpr):
        if exact:
            return tl.div_rn(a, b)
        return a / b

    @triton.jit
    def _tile(R, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
        """Rows, columns and mask of this program's tile; neighbouring programs lie along a row."""
        BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
        r = (tl.program_id(0) // BLOCKS).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        c = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        return r, c, (r < R) & (c < C)

    @triton.jit
    def _swiglu_kernel(
        gate_ptr,
        up_ptr,
        out_ptr,
        R,
        stride_gr,
        stride_ur,
        C: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
        r, c, mask = _tile(R, C, BLOCK_R, BLOCK_C)
        gate = tl.load(gate_ptr + r * stride_gr + c, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + r * stride_ur + c, mask=mask, other=0.0).to(tl.float32)
        y = _divide(gate, 1.0 + tl.exp(-gate), EXACT) * up
        tl.store(out_ptr + r * C + c, y.to(out_ptr.dtype.element_ty), mask=mask)

    @triton.jit
    def _swiglu_backward_kernel(
        gate_ptr,
        up_ptr,
        dy_ptr,
        dgate_ptr,
        dup_ptr,
        R,
        stride_gr,
        stride_ur,
        stride_dyr,
        C: tl.constexpr,
        BLOCK_R: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        EXACT: tl.constexpr = dy_ptr.dtype.element_ty == tl.float32
        r, c, mask = _tile(R, C, BLOCK_R, BLOCK_C)
        gate = tl.load(gate_ptr + r * stride_gr + c, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + r * stride_dyr + c, mask=mask, other=0.0).to(tl.float32)
        sigmoid = _divide(1.0, 1.0 + tl.exp(-gate), EXACT)
        if dup_ptr is not None:
            tl.store(dup_ptr + r * C + c, (dy * (gate * sigmoid)).to(dup_ptr.dtype.element_ty), mask=mask)
        if dgate_ptr is not None:
            up = tl.load(up_ptr + r * stride_ur + c, mask=mask, other=0.0).to(tl.float32)
            dgate = dy * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
            tl.store(dgate_ptr + r * C + c, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)


def swiglu_ref(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The definition in plain torch, differentiable: in fp32 (float64 for such inputs), rounded once."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[R, C] with contiguous columns: a view where one row stride reaches every row, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _plan(R: int, C: int, TILE: int, **options: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, constants and options of both kernels."""
    block_c = min(TILE, triton.next_power_of_2(C))
    block_r = TILE // block_c
    grid = (triton.cdiv(R, block_r) * triton.cdiv(C, block_c),)
    return grid, {"C": C, "BLOCK_R": block_r, "BLOCK_C": block_c, **options, **OPTIONS}


def _forward_triton(gate, up) -> torch.Tensor:
    gate_rows, up_rows = _rows(gate), _rows(up)
    grid, settings = _plan(*gate_rows.shape, **blocks("swiglu", gate.device))
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    strides = gate_rows.stride(0), up_rows.stride(0)
    with torch.cuda.device_of(gate):
        _swiglu_kernel[grid](gate_rows, up_rows, out, len(gate_rows), *strides, **settings)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up if ctx.needs_input_grad[0] else None)
        return _forward_triton(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        rows = _rows(gate), None if up is None else _rows(up), _rows(dy)
        like = {"dtype": dy.dtype, "device": dy.device}
        grads = [torch.empty(dy.shape, **like) if wanted else None for wanted in ctx.needs_input_grad]
        grid, settings = _plan(*rows[0].shape, **blocks("swiglu", gate.device))
        strides = [0 if x is None else x.stride(0) for x in rows]
        with torch.cuda.device_of(gate):
            _swiglu_backward_kernel[grid](*rows, *grads, len(rows[0]), *strides, **settings)
        return tuple(grads)


def swiglu(gate: torch.Tensor, up: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """silu(gate) * up, differentiable in both.

    gate, up: [..., C] of one shape and dtype, float32, float16 or bfloat16 (float64 too, in torch); may be empty. The
    kernel reads in place rows of contiguous values with one stride from row to row, a stride of its own for each (the
    two halves of one wide buffer, say), and copies other layouts first.
    impl: "auto" (triton on a GPU, else torch), "triton" (a GPU, or TRITON_INTERPRET=1) or "torch".

    Returns their shape and dtype, contiguous from the kernel. Without a gradient wanted nothing is kept. Raises
    ValueError for shapes, dtypes or devices that do not fit and RuntimeError where impl="triton" cannot run.
    """
    if gate.ndim == 0 or gate.shape != up.shape:
        raise ValueError(f"gate {list(gate.shape)}, up {list(up.shape)}: expected [..., C] twice")
    if gate.dtype not in (*FLOAT_DTYPES, torch.float64) or gate.dtype != up.dtype:
        message = "expected float32, float16, bfloat16 or float64, the same twice"
        raise ValueError(f"gate {gate.dtype}, up {up.dtype}: {message}")
    if gate.device != up.device:
        raise ValueError(f"gate on {gate.device}, up on {up.device}: expected one device")
    fused = use_triton(impl, gate)
    if fused and gate.dtype not in FLOAT_DTYPES:
        if impl == "triton":
            raise ValueError(f"impl='triton': {gate.dtype}, expected float32, float16 or bfloat16")
        fused = False
    if not fused or gate.numel() == 0:
        return swiglu_ref(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.apply(gate, up)
    return _forward_triton(gate, up)

"""Between the q/k/v projection and attention over a paged cache: norm and RoPE of q and k, k and v stored, in one pass.

Per head of q and k the LayerNorm, affine part and half-split rotation of qk_norm_rope.py, in the same order:
    y = (x - mean) * rstd * weight + bias,   out1 = y1 * cos - y2 * sin,   out2 = y2 * cos + y1 * sin,
then q goes to a tensor of its own, k and v (as it is) to their place in the pages. One read and one write of every
value, 4 bytes in 16 bits, in one launch. The parts of it would be splitting, norm_rope for q, norm_rope for k, a gather
of the cosines and another of the sines, and an indexed copy for k and for v: six launches or more, of which a decode
step consists for the most part, and 2 times the bytes for k (written, read, written) and the tables.

A program has BLOCK_H heads of one token, all of q, of k or of v: with few tokens, as in decoding, the heads must fill
the GPU. cos and sin are looked up by the token's position, in fp32 tables that the L2 cache holds, as it does the
affine part, which every token reads again.

Precision: fp32 inside, rounded once, on output. The mean is taken twice, the second time of what the first left, as in
qk_norm_rope.py.

Shapes: T tokens, H query heads, G key/value heads, D values of a head in two halves of F; N pages of PAGE positions.
"""

import torch
from torch.nn.functional import layer_norm

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from medmax_fast.kernels.blocks import blocks
from medmax_fast.kernels.launch import use_triton

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.int64, torch.int32)
# The widest head that the kernel takes, which is a tile of its own.
MAX_D = 1024
OPTIONS = {"enable_fp_fusion": True}


if triton is not None:

    @triton.jit
    def _halves(tile, there, SECOND: tl.constexpr):
        """Both halves of a tile in fp32, zeros where nothing is; SECOND: elements from one to the other."""
        first = tl.load(tile, mask=there, other=0.0).to(tl.float32)
        return first, tl.load(tile + SECOND, mask=there, other=0.0).to(tl.float32)

    @triton.jit
    def _centre(x1, x2, there, D: tl.constexpr):
        mean = (tl.sum(x1 + x2, axis=1) / D)[:, None]
        return tl.where(there, x1 - mean, 0.0), tl.where(there, x2 - mean, 0.0)

    @triton.jit
    def _norm_rope(x_ptr, weight_ptr, bias_ptr, cos, sin, h, f, there, present, eps, D: tl.constexpr):
        """Both halves of BLOCK_H heads of one token, normalised and rotated, in fp32."""
        F: tl.constexpr = D // 2
        at = h[:, None] * D + f[None, :]
        x1, x2 = _halves(x_ptr + at, there, F)
        w1, w2 = _halves(weight_ptr + at, there, F)
        b1, b2 = _halves(bias_ptr + at, there, F)
        x1, x2 = _centre(x1, x2, there, D)
        x1, x2 = _centre(x1, x2, there, D)
        rstd = 1.0 / tl.sqrt(tl.sum(x1 * x1 + x2 * x2, axis=1) / D + eps)
        # With eps = 0 it would be infinite for a head that is not there.
        rstd = tl.where(present, rstd, 0.0)[:, None]
        y1 = x1 * rstd * w1 + b1
        y2 = x2 * rstd * w2 + b2
        return y1 * cos - y2 * sin, y2 * cos + y1 * sin

    @triton.jit
    def _norm_rope_store_kernel(
        qkv_ptr,
        q_weight_ptr,
        q_bias_ptr,
        k_weight_ptr,
        k_bias_ptr,
        cos_ptr,
        sin_ptr,
        positions_ptr,
        places_ptr,
        k_ptr,
        v_ptr,
        q_ptr,
        stride_t,
        stride_c,
        stride_s,
        eps,
        H: tl.constexpr,
        G: tl.constexpr,
        D: tl.constexpr,
        PAGE: tl.constexpr,
        BLOCK_H: tl.constexpr,
        BLOCK_F: tl.constexpr,
    ):
        F: tl.constexpr = D // 2
        Q_BLOCKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
        K_BLOCKS: tl.constexpr = (G + BLOCK_H - 1) // BLOCK_H
        t = tl.program_id(0).to(tl.int64)
        block = tl.program_id(1)
        qkv_ptr += t * stride_t
        f = tl.arange(0, BLOCK_F)
        if block < Q_BLOCKS + K_BLOCKS:
            position = tl.load(positions_ptr + t).to(tl.int64)
            cos = tl.load(cos_ptr + position * stride_c + f, mask=f < F, other=0.0)[None, :]
            sin = tl.load(sin_ptr + position * stride_s + f, mask=f < F, other=0.0)[None, :]
        else:
            cos = tl.zeros((1, BLOCK_F), tl.float32)
            sin = cos
        if block < Q_BLOCKS:
            h = block * BLOCK_H + tl.arange(0, BLOCK_H)
            there = (h < H)[:, None] & (f < F)[None, :]
            out1, out2 = _norm_rope(qkv_ptr, q_weight_ptr, q_bias_ptr, cos, sin, h, f, there, h < H, eps, D)
            out_ptr = q_ptr + t * (H * D) + h[:, None] * D + f[None, :]
            tl.store(out_ptr, out1.to(q_ptr.dtype.element_ty), mask=there)
            tl.store(out_ptr + F, out2.to(q_ptr.dtype.element_ty), mask=there)
        else:
            place = tl.load(places_ptr + t).to(tl.int64)
            if place >= 0:
                h = (block - Q_BLOCKS) % K_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
                there = (h < G)[:, None] & (f < F)[None, :]
                # From the first head's values at this place; the next head's are a page of values further.
                page_at = place // PAGE * (G * PAGE * D) + place % PAGE * D
                at = page_at + h[:, None] * (PAGE * D) + f[None, :]
                if block < Q_BLOCKS + K_BLOCKS:
                    keys = qkv_ptr + H * D
                    out1, out2 = _norm_rope(keys, k_weight_ptr, k_bias_ptr, cos, sin, h, f, there, h < G, eps, D)
                    tl.store(k_ptr + at, out1.to(k_ptr.dtype.element_ty), mask=there)
                    tl.store(k_ptr + at + F, out2.to(k_ptr.dtype.element_ty), mask=there)
                else:
                    values = qkv_ptr + (H + G) * D + h[:, None] * D + f[None, :]
                    tl.store(v_ptr + at, tl.load(values, mask=there), mask=there)
                    tl.store(v_ptr + at + F, tl.load(values + F, mask=there), mask=there)


def _norm_rope_ref(x_THD, weight, bias, cos_TF, sin_TF, eps: float) -> torch.Tensor:
    # As norm_rope_ref of qk_norm_rope.py, to the bit: kernels do not import each other.
    dtype = torch.promote_types(x_THD.dtype, torch.float32)
    x, weight, bias = x_THD.to(dtype), weight.to(dtype), bias.to(dtype)
    cos, sin = cos_TF.to(dtype)[:, None], sin_TF.to(dtype)[:, None]
    y = torch.addcmul(bias, layer_norm(x, x.shape[-1:], eps=eps), weight)
    y1, y2 = y.chunk(2, dim=-1)
    out = torch.cat((torch.addcmul(y1 * cos, y2, sin, value=-1), torch.addcmul(y2 * cos, y1, sin)), dim=-1)
    return out.to(x_THD.dtype)


def norm_rope_store_ref(
    qkv_TK: torch.Tensor,
    q_weight: torch.Tensor,
    q_bias: torch.Tensor,
    k_weight: torch.Tensor,
    k_bias: torch.Tensor,
    cos_PF: torch.Tensor,
    sin_PF: torch.Tensor,
    positions_T: torch.Tensor,
    places_T: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    eps: float = 1e-5,
) -> torch.Tensor:
    """The definition in plain torch, in fp32 (in float64 for float64), rounded once; arguments as `norm_rope_store`."""
    (H, D), G, PAGE = q_weight.shape, *k_pages.shape[1:3]
    q, k, v = qkv_TK.unflatten(1, (H + 2 * G, D)).split((H, G, G), dim=1)
    cos, sin = cos_PF[positions_T], sin_PF[positions_T]
    # Tokens without a place are of no use to k and v; a place is looked up by its page and its offset.
    kept = (places_T >= 0).nonzero()[:, 0]
    places = places_T[kept].long()
    at = places // PAGE, slice(None), places % PAGE
    k_pages[at] = _norm_rope_ref(k[kept], k_weight, k_bias, cos[kept], sin[kept], eps)
    v_pages[at] = v[kept]
    return _norm_rope_ref(q, q_weight, q_bias, cos, sin, eps)


def _plan(H: int, G: int, D: int, PAGE: int, TILE: int, **options: int) -> tuple[dict[str, int], int]:
    """(constants and options of the kernel, programs of a token)."""
    block_f = triton.next_power_of_2(D // 2)
    block_h = max(1, TILE // (2 * block_f))
    constants = {"H": H, "G": G, "D": D, "PAGE": PAGE, "BLOCK_H": block_h, "BLOCK_F": block_f}
    return constants | options | OPTIONS, triton.cdiv(H, block_h) + 2 * triton.cdiv(G, block_h)


def _norm_rope_store_triton(qkv_TK, *tensors_and_eps) -> torch.Tensor:
    *affine, cos_PF, sin_PF, positions_T, places_T, k_pages, v_pages, eps = tensors_and_eps
    T, (H, D) = len(qkv_TK), affine[0].shape
    q = torch.empty((T, H, D), dtype=qkv_TK.dtype, device=qkv_TK.device)
    numbers = blocks("norm_rope_store", qkv_TK.device)
    settings, programs = _plan(H, k_pages.shape[1], D, k_pages.shape[2], **numbers)
    affine = [tensor.contiguous() for tensor in affine]
    tensors = cos_PF, sin_PF, positions_T, places_T, k_pages, v_pages, q
    strides = qkv_TK.stride(0), cos_PF.stride(0), sin_PF.stride(0)
    with torch.cuda.device_of(qkv_TK):
        _norm_rope_store_kernel[(T, programs)](qkv_TK, *affine, *tensors, *strides, eps, **settings)
    return q


def norm_rope_store(
    qkv_TK: torch.Tensor,
    q_weight: torch.Tensor,
    q_bias: torch.Tensor,
    k_weight: torch.Tensor,
    k_bias: torch.Tensor,
    cos_PF: torch.Tensor,
    sin_PF: torch.Tensor,
    positions_T: torch.Tensor,
    places_T: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    eps: float = 1e-5,
    impl: str = "auto",
) -> torch.Tensor:
    """LayerNorm and RoPE of the heads of q and k; k and v are stored in their pages, in place, and q is returned.

    qkv_TK: [T, (H + 2 G) * D], heads of q, then of k, then of v; float32, float16 or bfloat16 (float64 by torch alone),
    D even, MAX_D at most for the kernel; any stride of rows. T may be 0. q_weight, q_bias [H, D], k_weight, k_bias
    [G, D]: float32 or qkv's dtype, each on its own. cos_PF, sin_PF: float32 [positions, D/2], any stride of rows.
    positions_T, places_T: [T], int64 or int32; the row of the tables, and where k and v go: offset place % PAGE of page
    place // PAGE, nowhere if it is below 0. Both must lie within (not checked: that would wait for the GPU; a token
    without a place has a position all the same), and no place may come twice. k_pages, v_pages: [N, G, PAGE, D],
    contiguous, qkv's dtype. eps: added to the variance.
    impl: "auto" (triton on a GPU for what it takes, else torch), "triton" (a GPU, or TRITON_INTERPRET=1) or "torch".

    Returns q [T, H, D] of qkv's dtype, contiguous. For inference: no gradient comes back from the kernel, which may be
    captured in a CUDA graph. Raises ValueError for shapes, dtypes, devices or strides that do not fit and RuntimeError
    where impl="triton" cannot run.
    """
    affine = {"q_weight": q_weight, "q_bias": q_bias, "k_weight": k_weight, "k_bias": k_bias}
    others = {"cos": cos_PF, "sin": sin_PF, "positions": positions_T, "places": places_T}
    pages = {"k_pages": k_pages, "v_pages": v_pages}
    _check(qkv_TK, affine, others, pages)
    fused = use_triton(impl, qkv_TK)
    D = k_pages.shape[3]
    if fused and (qkv_TK.dtype not in FLOAT_DTYPES or D > MAX_D):
        if impl == "triton":
            raise ValueError(f"impl='triton': {qkv_TK.dtype} with D = {D}, expected at most 32 bits and {MAX_D}")
        fused = False
    run = _norm_rope_store_triton if fused and len(qkv_TK) else norm_rope_store_ref
    return run(qkv_TK, *affine.values(), *others.values(), *pages.values(), eps)


def _check(qkv_TK, affine: dict, others: dict, pages: dict) -> None:
    """Raises ValueError for inputs that no path takes."""
    k_pages, v_pages = pages.values()
    cos_PF, sin_PF, *indices = others.values()
    if k_pages.ndim != 4 or k_pages.shape != v_pages.shape or k_pages.shape[3] % 2 or 0 in k_pages.shape[1:]:
        raise ValueError(f"pages {list(k_pages.shape)}, {list(v_pages.shape)}: expected [N, G, PAGE, D] twice, D even")
    _, G, _, D = k_pages.shape
    H = len(affine["q_weight"]) if affine["q_weight"].ndim == 2 else 0
    for name, tensor in affine.items():
        heads = H if name.startswith("q") else G
        if H == 0 or list(tensor.shape) != [heads, D] or tensor.dtype not in (qkv_TK.dtype, torch.float32):
            expected = f"[{heads or 'H'}, {D}] of float32 or qkv's {qkv_TK.dtype}"
            raise ValueError(f"{name} {list(tensor.shape)} of {tensor.dtype}: expected {expected}")
    if qkv_TK.ndim != 2 or qkv_TK.shape[1] != (H + 2 * G) * D or qkv_TK.stride(1) != 1:
        found = f"qkv {list(qkv_TK.shape)} of strides {qkv_TK.stride()}"
        raise ValueError(f"{found}: expected [T, {(H + 2 * G) * D}] with a last stride of 1")
    if qkv_TK.dtype not in (*FLOAT_DTYPES, torch.float64) or {k_pages.dtype, v_pages.dtype} != {qkv_TK.dtype}:
        found = f"qkv {qkv_TK.dtype}, k_pages {k_pages.dtype}, v_pages {v_pages.dtype}"
        raise ValueError(f"{found}: expected one float dtype")
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError(f"pages of strides {k_pages.stride()}, {v_pages.stride()}: expected contiguous ones")
    for name, table in (("cos", cos_PF), ("sin", sin_PF)):
        if table.ndim != 2 or table.shape[1] != D // 2 or table.dtype != torch.float32 or table.stride(1) != 1:
            found = f"{name} {list(table.shape)} of {table.dtype}, strides {table.stride()}"
            raise ValueError(f"{found}: expected float32 [positions, {D // 2}] with a last stride of 1")
    for name, index in zip(("positions", "places"), indices, strict=True):
        if list(index.shape) != [len(qkv_TK)] or index.dtype not in INDEX_DTYPES or not index.is_contiguous():
            found = f"{name} {list(index.shape)} of {index.dtype}"
            raise ValueError(f"{found}: expected contiguous [{len(qkv_TK)}] of torch.int64 or torch.int32")
    named = affine | others | pages
    if away := [f"{name} on {tensor.device}" for name, tensor in named.items() if tensor.device != qkv_TK.device]:
        raise ValueError(f"qkv on {qkv_TK.device}, {', '.join(away)}: expected one device")

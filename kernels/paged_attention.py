"""Attention of one new query per stream over a paged key/value cache (flash-decoding): the decode step of generation.

A stream's keys and values lie in pages of PAGE positions anywhere in one pool, in the order its row of the page table
says. torch would gather them first: read, written and read again, 12 D bytes per position and key/value head in 16
bits. Here a program reads the pages in place, once for up to MAX_ROWS query heads of a key/value head, and of a page
that is not full only what is there: 4 D bytes, and nothing else of that order. The step is memory bound. What lies
beyond a stream's length, page numbers included, is never read.

A program has a stream, a key/value head (with up to MAX_ROWS query heads) and, to fill the GPU with few streams, a
share of the pages: the SPLITS programs of a stream take pages split, split + SPLITS, ... and leave a result and its
log-sum-exp each, in fp32, which a second kernel adds up. SPLITS follows from the shapes alone, so that a CUDA graph
holds for any lengths.

Each of the BLOCK_P slots of a tile keeps a running softmax of its own, over positions slot, slot + BLOCK_P, ...; only
after the last page are they added up, so that the loop needs no exchange between warps. One query per stream makes the
products vectors: multiply and sum in fp32, which tensor cores would not speed up.

Precision: fp32 inside, the scores to base 2 (their scale holds log2(e)), rounded once on output.

Shapes: S streams, H query heads, G key/value heads (query heads h * H/G .. share head h), D values of a head, N pages
of PAGE positions in the pool, P pages of a stream at most; a tile has ROWS query heads, BLOCK_P positions and BLOCK_D
values.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from medmax_fast.kernels.blocks import blocks
from medmax_fast.kernels.launch import use_triton

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_D, LOG2_E = 256, 1.4426950408889634
# Values of all keys that the reference takes in one piece.
REF_TOGETHER = 1 << 19
OPTIONS = {"enable_fp_fusion": True}


if triton is not None:
    # Below every finite score, and finite itself: differences from it are never NaN.
    LOWEST = tl.constexpr(torch.finfo(torch.float32).min)

    @triton.jit
    def _paged_attention_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        table_ptr,
        lengths_ptr,
        out_ptr,
        lse_ptr,
        stride_qs,
        stride_qh,
        stride_ts,
        scale,
        GROUP: tl.constexpr,
        D: tl.constexpr,
        PAGE: tl.constexpr,
        ROWS: tl.constexpr,
        BLOCK_P: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        # With one split `out_ptr` is the output and lse_ptr None, else they are the splits' [S, H, SPLITS, D] and
        # [S, H, SPLITS].
        BLOCKS: tl.constexpr = (GROUP + ROWS - 1) // ROWS
        s, g, split = tl.program_id(0).to(tl.int64), tl.program_id(1) // BLOCKS, tl.program_id(2)
        G, SPLITS = tl.num_programs(1) // BLOCKS, tl.num_programs(2)
        rows = tl.program_id(1) % BLOCKS * ROWS + tl.arange(0, ROWS)
        slots = tl.arange(0, BLOCK_P)
        r = rows[:, None, None]
        p = slots[None, :, None]
        d = tl.arange(0, BLOCK_D)[None, None, :]
        q_ptr += s * stride_qs + (g * GROUP).to(tl.int64) * stride_qh
        q = tl.load(q_ptr + r * stride_qh + d, mask=(r < GROUP) & (d < D), other=0.0).to(tl.float32) * scale

        length = tl.load(lengths_ptr + s)
        pages = (length + PAGE - 1) // PAGE
        table_ptr += s * stride_ts
        largest = tl.full((ROWS, BLOCK_P), LOWEST, tl.float32)
        total = tl.zeros((ROWS, BLOCK_P), tl.float32)
        acc = tl.zeros((ROWS, BLOCK_P, BLOCK_D), tl.float32)
        number = tl.load(table_ptr + split, mask=split < pages, other=0)
        for page in range(split, pages, SPLITS):
            at = (number.to(tl.int64) * G + g) * (PAGE * D)
            # The next page's number, so that its keys need not wait for it.
            number = tl.load(table_ptr + page + SPLITS, mask=page + SPLITS < pages, other=0)
            left = tl.minimum(length - page * PAGE, PAGE)
            for start in range(0, left, BLOCK_P):
                there = (start + p < left) & (d < D)
                tile = at + start * D + p * D + d
                k = tl.load(k_ptr + tile, mask=there, other=0.0)
                v = tl.load(v_ptr + tile, mask=there, other=0.0)
                scores = tl.sum(q * k.to(tl.float32), axis=2)
                scores = tl.where((start + slots < left)[None, :], scores, float("-inf"))
                top = tl.maximum(largest, scores)
                fade = tl.exp2(largest - top)
                weights = tl.exp2(scores - top)
                total = total * fade + weights
                acc = acc * fade[:, :, None] + weights[:, :, None] * v.to(tl.float32)
                largest = top

        top = tl.max(largest, axis=1)
        fade = tl.exp2(largest - top[:, None])
        total = tl.sum(total * fade, axis=1)
        nothing = total == 0.0
        total = tl.where(nothing, 1.0, total)
        out = tl.sum(acc * fade[:, :, None], axis=1) / total[:, None]
        at = ((s * G + g) * GROUP + rows) * SPLITS + split
        d = tl.arange(0, BLOCK_D)[None, :]
        there = (rows < GROUP)[:, None] & (d < D)
        tl.store(out_ptr + at[:, None] * D + d, out.to(out_ptr.dtype.element_ty), mask=there)
        if lse_ptr is not None:
            lse = tl.where(nothing, float("-inf"), top + tl.log2(total))
            tl.store(lse_ptr + at, lse, mask=rows < GROUP)

    @triton.jit
    def _combine_splits_kernel(
        part_ptr,
        lse_ptr,
        out_ptr,
        SPLITS,
        D: tl.constexpr,
        BLOCK_S: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        # One program adds up the splits of one query head of one stream.
        row = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, BLOCK_S)
        d = tl.arange(0, BLOCK_D)
        at = row * SPLITS + i
        lse = tl.load(lse_ptr + at, mask=i < SPLITS, other=float("-inf"))
        weights = tl.exp2(lse - tl.maximum(tl.max(lse, axis=0), LOWEST))
        total = tl.sum(weights, axis=0)
        there = (i < SPLITS)[:, None] & (d < D)[None, :]
        part = tl.load(part_ptr + at[:, None] * D + d[None, :], mask=there, other=0.0)
        out = tl.sum(part * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
        tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


def paged_attention_ref(
    q_SHD: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table_SP: torch.Tensor,
    lengths_S: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """The definition in plain torch: pages gathered, then torch's own attention; streams together where they are small.

    Waits for the lengths. Arguments as `paged_attention`.
    """
    (S, H, D), (_, G, PAGE, _) = q_SHD.shape, k_pages.shape
    out = torch.zeros((S, H, D), dtype=q_SHD.dtype, device=q_SHD.device)
    heads = torch.arange(G, device=q_SHD.device)[:, None]
    lengths = lengths_S.tolist()
    longest = max(lengths, default=0)
    # Fewer calls against fewer page faults: what fits a cache goes in one piece, else stream by stream. So do 16 bits,
    # some of which the lengths of other streams would change: torch rounds the weights block by block.
    small = S * longest * G * D <= REF_TOGETHER and min(lengths, default=0) > 0
    together = small and q_SHD.dtype.itemsize >= 4
    for rows in [slice(None)] if together else [slice(s, s + 1) for s in range(S) if lengths[s] > 0]:
        length = max(lengths[rows])
        # One copy, in the order that attention wants.
        at = (table_SP[rows, None, : -(-length // PAGE)].clamp(0, len(k_pages) - 1).long() * G + heads).flatten()
        gathered = (pages.view(-1, PAGE, D).index_select(0, at) for pages in (k_pages, v_pages))
        k, v = (x.view(-1, G, len(at) // (G * len(out[rows])) * PAGE, D)[:, :, :length] for x in gathered)
        mask = None
        if together:
            mask = (torch.arange(length, device=lengths_S.device) < lengths_S[:, None])[:, None, None]
            for x in (k, v):
                x.masked_fill_(~mask.transpose(2, 3), 0)
        # The query heads of a key/value head are as many queries of it.
        q = q_SHD[rows].reshape(-1, G, H // G, D)
        out[rows] = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).view(-1, H, D)
    return out


def _plan(group: int, D: int, PAGE: int, itemsize: int, TILE: int, MAX_ROWS: int, **options: int) -> dict[str, int]:
    """Constants and options of the attention kernel."""
    rows, block_d = min(MAX_ROWS, triton.next_power_of_2(group)), triton.next_power_of_2(D)
    block_p = min(PAGE, max(1, TILE // (itemsize * rows * block_d)))
    # 128 leave room for four programs on an SM; several query heads, or values that do not come in vectors, need more.
    # Without a limit ptxas sets tighter ones of its own and spills.
    maxnreg = 128 if rows == 1 and D * itemsize % 16 == 0 else 255
    constants = {"GROUP": group, "D": D, "PAGE": PAGE, "ROWS": rows, "BLOCK_P": block_p, "BLOCK_D": block_d}
    return {**constants, "maxnreg": maxnreg, **options, **OPTIONS}


def _combine_plan(splits: int, D: int, **options: int) -> dict[str, int]:
    """Constants and options of the kernel that adds up the splits."""
    block_s, block_d = triton.next_power_of_2(splits), triton.next_power_of_2(D)
    return {"D": D, "BLOCK_S": block_s, "BLOCK_D": block_d, **options, **OPTIONS}


def _splits(programs: int, P: int, PROGRAMS: int, MAX_SPLITS: int) -> int:
    """Shares of a stream's pages, enough to fill a GPU, from the shapes alone; one each would make `programs`."""
    return max(1, min(P, MAX_SPLITS, triton.cdiv(PROGRAMS, programs)))


def _paged_attention_triton(q_SHD, k_pages, v_pages, table_SP, lengths_S, scale: float) -> torch.Tensor:
    (S, H, D), (_, G, PAGE, _) = q_SHD.shape, k_pages.shape
    plan = _plan(H // G, D, PAGE, q_SHD.itemsize, **blocks("paged_attention", q_SHD.device))
    heads = G * triton.cdiv(H // G, plan["ROWS"])
    splits = _splits(S * heads, table_SP.shape[1], **blocks("paged_splits", q_SHD.device))
    out = torch.empty((S, H, D), dtype=q_SHD.dtype, device=q_SHD.device)
    part, lse = out, None
    if splits > 1:
        part = torch.empty((S, H, splits, D), dtype=torch.float32, device=q_SHD.device)
        lse = torch.empty((S, H, splits), dtype=torch.float32, device=q_SHD.device)
    tensors = q_SHD, k_pages, v_pages, table_SP, lengths_S, part, lse
    strides = *q_SHD.stride()[:2], table_SP.stride(0)
    with torch.cuda.device_of(q_SHD):
        _paged_attention_kernel[(S, heads, splits)](*tensors, *strides, scale * LOG2_E, **plan)
        if splits > 1:
            plan = _combine_plan(splits, D, **blocks("paged_combine", q_SHD.device))
            _combine_splits_kernel[(S * H,)](part, lse, out, splits, **plan)
    return out


def paged_attention(
    q_SHD: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    table_SP: torch.Tensor,
    lengths_S: torch.Tensor,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """softmax(scale * q @ keys) @ values for one query per stream, over the first positions of its pages.

    q_SHD: [S, H, D], float32, float16 or bfloat16 (float64 by torch alone), D even, MAX_D at most; any strides with a
    last one of 1. S may be 0. k_pages, v_pages: [N, G, PAGE, D], contiguous, q's dtype; G divides H, PAGE is a power of
    two. table_SP: int32 [S, P], any stride of rows: the pages of each stream in order, anything beyond its length.
    lengths_S: int32 [S], positions of each stream with its newest, P * PAGE at most (not checked, as the table's
    entries are not: that would wait for the GPU). scale: D ** -0.5 unless given.
    impl: "auto" (triton on a GPU, else torch), "triton" (a GPU, or TRITON_INTERPRET=1) or "torch".

    Returns [S, H, D] of q's dtype, contiguous; zeros for a stream of length 0. For inference: no gradient comes back
    from the kernel, which may be captured in a CUDA graph. Raises ValueError for shapes, dtypes, devices or strides
    that do not fit and RuntimeError where impl="triton" cannot run.
    """
    _check(q_SHD, k_pages, v_pages, table_SP, lengths_S)
    fused = use_triton(impl, q_SHD)
    if fused and q_SHD.dtype not in FLOAT_DTYPES:
        if impl == "triton":
            raise ValueError(f"impl='triton': {q_SHD.dtype}, expected float32, float16 or bfloat16")
        fused = False
    scale = q_SHD.shape[2] ** -0.5 if scale is None else scale
    run = _paged_attention_triton if fused and q_SHD.numel() else paged_attention_ref
    return run(q_SHD, k_pages, v_pages, table_SP, lengths_S, scale)


def _check(q_SHD, k_pages, v_pages, table_SP, lengths_S) -> None:
    """Raises ValueError for inputs that no path takes."""
    shapes = f"q {list(q_SHD.shape)}, k_pages {list(k_pages.shape)}, v_pages {list(v_pages.shape)}"
    if q_SHD.ndim != 3 or k_pages.ndim != 4 or k_pages.shape != v_pages.shape or k_pages.shape[3] != q_SHD.shape[2]:
        raise ValueError(f"{shapes}: expected [S, H, D] and [N, G, PAGE, D] twice")
    (S, H, D), (_, G, PAGE, _) = q_SHD.shape, k_pages.shape
    if D == 0 or D % 2 or D > MAX_D or G == 0 or H % G or PAGE == 0 or PAGE & (PAGE - 1):
        raise ValueError(f"{shapes}: expected an even D up to {MAX_D}, H a multiple of G, PAGE a power of two")
    if table_SP.ndim != 2 or len(table_SP) != S or list(lengths_S.shape) != [S]:
        found = f"table {list(table_SP.shape)}, lengths {list(lengths_S.shape)}"
        raise ValueError(f"{found}: expected [{S}, P] and [{S}]")
    if q_SHD.dtype not in (*FLOAT_DTYPES, torch.float64) or {k_pages.dtype, v_pages.dtype} != {q_SHD.dtype}:
        found = f"q {q_SHD.dtype}, k_pages {k_pages.dtype}, v_pages {v_pages.dtype}"
        raise ValueError(f"{found}: expected one float dtype")
    if table_SP.dtype != torch.int32 or lengths_S.dtype != torch.int32:
        raise ValueError(f"table {table_SP.dtype}, lengths {lengths_S.dtype}: expected torch.int32")
    if q_SHD.stride(2) != 1 or table_SP.stride(1) != 1 or not lengths_S.is_contiguous():
        raise ValueError("q, table or lengths with gaps between values: expected a last stride of 1")
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        raise ValueError(f"pages of strides {k_pages.stride()}, {v_pages.stride()}: expected contiguous ones")
    names = {"k_pages": k_pages, "v_pages": v_pages, "table": table_SP, "lengths": lengths_S}
    if others := [f"{name} on {tensor.device}" for name, tensor in names.items() if tensor.device != q_SHD.device]:
        raise ValueError(f"q on {q_SHD.device}, {', '.join(others)}: expected one device")

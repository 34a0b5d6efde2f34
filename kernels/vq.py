"""Nearest codebook entry of each latent, without the N x K distance matrix: screened on tensor cores, exact in fp32.

The textbook form writes 4 N K bytes of distances and reads them back (2.1 GB for 64 images of 1024 latents against
8192 codes). Here three kernels need 16 (N + K) + 4 N bytes beside the codes:
1. `_measure_rows_kernel`: of each latent and code its norm and what rounding it to fp16 loses.
2. `_screen_kernel`: a running best two of the distances' lower bounds per latent, from one fp16 product (2 N K D flop
   on tensor cores; the codebook streams from the L2 cache, the latents stay on chip). It decides a latent whose best
   code beats all others by more than the error bound and lists the rest, without a word to the host.
3. `_nearest_code_kernel`: the fp32 search (`input_precision="ieee"`, 2 K D flop per listed latent), the definition of
   the codes. Latents with more than SCREEN_D channels all go there.

Error bound. Write Z = ||z||, E = ||e||, u = 2^-24; z', e' are the operands rounded to fp16 after scaling by a power of
two of their own that puts their largest entry into 2^14..2^15 (undone exactly afterwards), so fp16 keeps as many bits
as TF32 at twice the rate and no magnitude is out of range; r = ||z - z'||, s = ||e - e'||, measured, not assumed.
- Rounding: |z.e - z'.e'| <= r E + (Z + r) s, by Cauchy-Schwarz.
- Tensor cores (Fasi et al. 2021, PeerJ Computer Science 7:e330): products are exact; sums are aligned to the largest
  term and truncated to 24 bits. At most 2 D terms and partial sums, none above (Z + r)(E + s), lose 2^-23 of that
  each: D 2^-22 together. The fp32 search's own D roundings: D 2^-24 (1 + tiny) Z E. A = (D + 8) 2^-21 covers both.
- Adding up: the search rounds z^2 + e^2 and the difference (3 u (Z^2 + E^2) at most), the screen its four steps (less
  than 5 u (Z^2 + E^2)); 2^-20 = 16 u covers both. 2^-110 covers underflow (the scales stop at 2^60).
So the screen's distance and the fp32 search's, both without the common Z^2, differ by no more than
    m(e) = 2 (r + A (Z + r)) E + 2 (1 + A)(Z + r) s + 2^-20 (E^2 + Z^2) + 2^-110.
With a(e) the screen's distance, code i is decided if min over j != i of a(j) - m(j) > a(i) + m(i): its fp32 distance is
then strictly the least. A bound per code, not one for all, matters: a few long codes would spoil it for the rest.
Z, E, r, s enter rounded up by 0.1 %; whatever is not finite or beyond 2^50 is left to the search.

Left undecided with one bound per code (one bound for all): of the golden images' latents (D = 32) 8 % (44 %), of
independent normal latents and codes (D = 256) 6 %. bf16 would leave 39 % and 30 %; operands in two fp16 parts, three
times the product, 0.4 % and 1.5 %. At an H200's peak rates the fp16 product costs 1/15 of the fp32 one, so the single
one with 8 % searched is the cheapest by count of operations (not timed yet).

Semantics, the same on every path: the argmin over k of (||z||^2 + ||e_k||^2) - 2 z.e_k in fp32, the lowest k on
ties. NaN counts as the smallest distance, as in torch.argmin: a latent that holds a NaN gets code 0, and a codebook
row that holds one wins over all others. Paths (and block sizes) differ only in the order in which the D products are
added, so their codes can differ only where the two best distances agree to within that rounding ("near ties"). That
includes equal rows of a codebook: the kernel adds up every column alike, a CPU's BLAS need not.

Shapes: N latents, K codes, D channels.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from medmax_fast.kernels.blocks import blocks
from medmax_fast.kernels.launch import use_triton

# Distances of one block of rows in the torch reference, 64 MB in fp32; it holds two such blocks at a time.
REF_ELEMENTS = 1 << 24
# Most channels that the screen takes: it holds its latents whole on chip.
SCREEN_D = 256
OPTIONS = {"enable_fp_fusion": True}
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


if triton is not None:

    @triton.jit
    def _power_of_two(exponent):
        return ((exponent + 127) << 23).to(tl.float32, bitcast=True)

    @triton.jit
    def _inverse(power):
        # Exact, where a division need not be: 2^-e from 2^e.
        return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)

    @triton.jit
    def _measure_rows_kernel(
        x_ptr, stats_ptr, N, stride_n, stride_d, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
    ):
        # Rows of stats [4, N]: ||x||^2; upper bounds of ||x|| and of ||x - x'||; the scale.
        n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D).to(tl.int64)
        x_row = x_ptr + n[:, None] * stride_n

        norm = tl.zeros((BLOCK_N,), tl.float32)
        largest = tl.zeros((BLOCK_N,), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            mask = (n[:, None] < N) & (d0 + d[None, :] < D)
            x = tl.load(x_row + (d0 + d[None, :]) * stride_d, mask=mask, other=0.0).to(tl.float32)
            norm += tl.sum(x * x, axis=1)
            largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))

        exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
        scale = _power_of_two(tl.minimum(tl.maximum(14 - exponent, -60), 60))
        squares = tl.zeros((BLOCK_N,), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            mask = (n[:, None] < N) & (d0 + d[None, :] < D)
            x = tl.load(x_row + (d0 + d[None, :]) * stride_d, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
            # As if subnormals were flushed to zero: no less than what rounding them loses, so right either way.
            lost = x - tl.where(tl.abs(x) < 2.0**-14, 0.0, x.to(tl.float16).to(tl.float32))
            squares += tl.sum(lost * lost, axis=1)

        stats = stats_ptr + n
        tl.store(stats, norm, mask=n < N)
        tl.store(stats + N, tl.sqrt(norm) * 1.001 + 2.0**-50, mask=n < N)
        tl.store(stats + 2 * N, tl.sqrt(squares) * 1.001 * _inverse(scale), mask=n < N)
        tl.store(stats + 3 * N, scale, mask=n < N)

    @triton.jit
    def _screen_kernel(
        z_ptr,
        e_ptr,
        z_stats_ptr,
        e_stats_ptr,
        longest_ptr,
        rows_ptr,
        count_ptr,
        out_ptr,
        N,
        id_offset,
        stride_zn,
        stride_zd,
        stride_ek,
        stride_ed,
        K: tl.constexpr,
        D: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        # One program owns BLOCK_N latents and meets every code; it keeps them in fp16, in pieces of BLOCK_D.
        LOSS: tl.constexpr = (D + 8) / 2097152
        n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D).to(tl.int64)
        z_stats = z_stats_ptr + n
        z_norm = tl.load(z_stats, mask=n < N, other=0.0)
        z_residual = tl.load(z_stats + 2 * N, mask=n < N, other=0.0)
        z_scale = tl.load(z_stats + 3 * N, mask=n < N, other=1.0)
        reach = tl.load(z_stats + N, mask=n < N, other=0.0) + z_residual
        per_root = 2.002 * (z_residual + LOSS * reach)
        per_residual = 2.002 * (1.0 + LOSS) * reach
        unscale = 2.0 * _inverse(z_scale)
        z_row = z_ptr + n[:, None] * stride_zn
        z_blocks = ()
        for d0 in tl.static_range(0, D, BLOCK_D):
            z_mask = (n[:, None] < N) & (d0 + d[None, :] < D)
            z = tl.load(z_row + (d0 + d[None, :]) * stride_zd, mask=z_mask, other=0.0).to(tl.float32)
            z_blocks = z_blocks + ((z * z_scale[:, None]).to(tl.float16),)

        best = tl.full((BLOCK_N,), float("inf"), tl.float32)
        second = tl.full((BLOCK_N,), float("inf"), tl.float32)
        best_k = tl.zeros((BLOCK_N,), tl.int32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            e_stats = e_stats_ptr + k
            e_norm = tl.load(e_stats, mask=k < K, other=float("inf"))
            e_root = tl.load(e_stats + K, mask=k < K, other=0.0)
            e_residual = tl.load(e_stats + 2 * K, mask=k < K, other=0.0)
            e_scale = tl.load(e_stats + 3 * K, mask=k < K, other=1.0)
            e_row = e_ptr + k[None, :].to(tl.int64) * stride_ek
            product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for d0 in tl.static_range(0, D, BLOCK_D):
                e_mask = (k[None, :] < K) & (d0 + d[:, None] < D)
                e = tl.load(e_row + (d0 + d[:, None]) * stride_ed, mask=e_mask, other=0.0).to(tl.float32)
                product = tl.dot(z_blocks[d0 // BLOCK_D], (e * e_scale[None, :]).to(tl.float16), product)
            product = product * _inverse(e_scale)[None, :]

            low = (e_norm * (1.0 - 2.0**-20))[None, :] - per_root[:, None] * e_root[None, :]
            low = low - per_residual[:, None] * e_residual[None, :] - unscale[:, None] * product
            least = tl.min(low, axis=1)
            least_k = tl.min(tl.where(low == least[:, None], k[None, :], K), axis=1)
            next_least = tl.min(tl.where(k[None, :] == least_k[:, None], float("inf"), low), axis=1)
            second = tl.minimum(tl.minimum(second, next_least), tl.maximum(least, best))
            best_k = tl.where(least < best, least_k, best_k)
            best = tl.minimum(least, best)

        # `best` is a lower bound: twice the bound above it is the upper one.
        e_stats = e_stats_ptr + best_k
        bound = per_root * tl.load(e_stats + K) + per_residual * tl.load(e_stats + 2 * K)
        bound += (z_norm + tl.load(e_stats)) * 2.0**-20 + 2.0**-110
        # A NaN fails both comparisons; `longest` is NaN if any code holds one.
        decided = (second - best > 2.002 * bound) & (z_norm + tl.load(longest_ptr) < 2.0**100)
        tl.store(out_ptr + n, best_k.to(tl.int64) + id_offset, mask=n < N)
        listed = ((n < N) & ~decided).to(tl.int32)
        slot = tl.atomic_add(count_ptr, tl.sum(listed, axis=0)) + tl.cumsum(listed, axis=0) - listed
        tl.store(rows_ptr + slot, n.to(tl.int32), mask=listed != 0)

    @triton.jit
    def _nearest_code_kernel(
        z_ptr,
        e_ptr,
        z_norm_ptr,
        e_norm_ptr,
        rows_ptr,
        count_ptr,
        out_ptr,
        id_offset,
        stride_zn,
        stride_zd,
        stride_ek,
        stride_ed,
        K: tl.constexpr,
        D: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_D: tl.constexpr,
    ):
        # One program owns BLOCK_N listed latents and meets every code, so no two programs share a minimum.
        start = tl.program_id(0) * BLOCK_N
        count = tl.load(count_ptr)
        if start >= count:
            return
        i = start + tl.arange(0, BLOCK_N)
        n = tl.load(rows_ptr + i, mask=i < count, other=0).to(tl.int64)
        d = tl.arange(0, BLOCK_D).to(tl.int64)
        z_row = z_ptr + n[:, None] * stride_zn
        z_norm = tl.load(z_norm_ptr + n)

        best = tl.full((BLOCK_N,), float("inf"), tl.float32)
        best_k = tl.zeros((BLOCK_N,), tl.int32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            e_row = e_ptr + k[None, :].to(tl.int64) * stride_ek
            product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for d0 in range(0, D, BLOCK_D):
                z_mask = (i[:, None] < count) & (d0 + d[None, :] < D)
                e_mask = (k[None, :] < K) & (d0 + d[:, None] < D)
                z = tl.load(z_row + (d0 + d[None, :]) * stride_zd, mask=z_mask, other=0.0).to(tl.float32)
                e = tl.load(e_row + (d0 + d[:, None]) * stride_ed, mask=e_mask, other=0.0).to(tl.float32)
                product = tl.dot(z, e, product, input_precision="ieee")

            e_norm = tl.load(e_norm_ptr + k, mask=k < K, other=0.0)
            # Doubling is exact, so contracting the last two operations into one FMA changes no bit.
            distance = (z_norm[:, None] + e_norm[None, :]) - 2.0 * product
            # NaN sorts first as in torch.argmin; the columns beyond K last, whatever a non-finite latent made them.
            distance = tl.where(distance != distance, float("-inf"), distance)
            distance = tl.where(k[None, :] < K, distance, float("inf"))
            low, low_at = tl.min(distance, axis=1, return_indices=True, return_indices_tie_break_left=True)
            # Strictly less: an equal distance in a later block leaves the lower code in place.
            better = low < best
            best_k = tl.where(better, k0 + low_at, best_k)
            best = tl.where(better, low, best)

        tl.store(out_ptr + n, best_k.to(tl.int64) + id_offset, mask=i < count)


def nearest_code_ref(z_ND: torch.Tensor, codebook_KD: torch.Tensor, *, id_offset: int = 0) -> torch.Tensor:
    """The definition in plain torch, in row blocks so that memory stays bounded; arguments as `nearest_code`.

    The product follows torch's float32 matmul precision, which must be left at "highest" (the default) for exact
    codes; autocast is switched off here.
    """
    z_ND, codebook_KD = z_ND.detach().float(), codebook_KD.detach().float()
    norm_K = codebook_KD.pow(2).sum(dim=1)
    codes_N = torch.empty(len(z_ND), dtype=torch.int64, device=z_ND.device)
    rows = max(1, REF_ELEMENTS // len(codebook_KD))
    with torch.autocast(z_ND.device.type, enabled=False):
        for start in range(0, len(z_ND), rows):
            z = z_ND[start : start + rows]
            distance = z.pow(2).sum(dim=1, keepdim=True) + norm_K
            distance.sub_(z @ codebook_KD.t(), alpha=2)
            codes_N[start : start + rows] = distance.argmin(dim=1)
    return codes_N.add_(id_offset)


def _measure(x_ND: torch.Tensor) -> torch.Tensor:
    """float32 [4, N]: per row the squared norm, bounds of the norm and of what fp16 loses, the power-of-two scale."""
    N, D = x_ND.shape
    stats = torch.empty(4, N, device=x_ND.device)
    numbers = blocks("vq_measure", x_ND.device)
    grid = (triton.cdiv(N, numbers["BLOCK_N"]),)
    _measure_rows_kernel[grid](x_ND, stats, N, *x_ND.stride(), D=D, **numbers, **OPTIONS)
    return stats


def _nearest_code_triton(z_ND, codebook_KD, id_offset: int, screen: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and as int32 [1] how many of them the fp32 search decided: all of them without the screen."""
    z_ND, codebook_KD = z_ND.detach(), codebook_KD.detach()
    (N, D), K, device = z_ND.shape, len(codebook_KD), z_ND.device
    codes_N = torch.empty(N, dtype=torch.int64, device=device)
    strides = (*z_ND.stride(), *codebook_KD.stride())
    with torch.cuda.device_of(z_ND):
        z_stats, e_stats = _measure(z_ND), _measure(codebook_KD)
        if screen and D <= SCREEN_D:
            rows = torch.empty(N, dtype=torch.int32, device=device)
            count = torch.zeros(1, dtype=torch.int32, device=device)
            stats = (z_stats, e_stats, e_stats[0].amax())
            numbers = blocks("vq_screen", device)
            grid = (triton.cdiv(N, numbers["BLOCK_N"]),)
            arguments = (z_ND, codebook_KD, *stats, rows, count, codes_N, N, id_offset, *strides)
            _screen_kernel[grid](*arguments, K=K, D=D, **numbers, **OPTIONS)
        else:
            rows = torch.arange(N, dtype=torch.int32, device=device)
            count = torch.full((1,), N, dtype=torch.int32, device=device)
        # One program for every block that might be listed, as the host does not know the count; most leave at once.
        numbers = blocks("vq_search", device)
        grid = (triton.cdiv(N, numbers["BLOCK_N"]),)
        arguments = (z_ND, codebook_KD, z_stats, e_stats, rows, count, codes_N, id_offset, *strides)
        _nearest_code_kernel[grid](*arguments, K=K, D=D, **numbers, **OPTIONS)
    return codes_N, count


def nearest_code(
    z_ND: torch.Tensor, codebook_KD: torch.Tensor, *, id_offset: int = 0, impl: str = "auto"
) -> torch.Tensor:
    """Index of the codebook row nearest to each latent, the lowest one on ties; see the module header for NaN.

    z_ND: latents [N, D], float32 (float16 and bfloat16 are widened exactly), any strides; N may be 0.
    codebook_KD: [K, D], K >= 1, same device, any strides.
    id_offset: added to every code, which makes vocabulary ids of them in the same pass.
    impl: "auto" (triton on a GPU, else torch), "triton" (a GPU, or TRITON_INTERPRET=1) or "torch".

    Returns int64 [N]. No gradient flows through it. Raises ValueError for shapes, dtypes or devices that do not fit
    and RuntimeError where impl="triton" cannot run.
    """
    if z_ND.ndim != 2 or codebook_KD.ndim != 2 or z_ND.shape[1] != codebook_KD.shape[1]:
        raise ValueError(f"latents {list(z_ND.shape)} and codebook {list(codebook_KD.shape)}: expected [N, D], [K, D]")
    if len(codebook_KD) == 0 or z_ND.shape[1] == 0:
        raise ValueError(f"codebook {list(codebook_KD.shape)}: expected at least one code and one channel")
    if z_ND.dtype not in FLOAT_DTYPES or codebook_KD.dtype not in FLOAT_DTYPES:
        raise ValueError(f"latents {z_ND.dtype}, codebook {codebook_KD.dtype}: expected float32, float16 or bfloat16")
    if z_ND.device != codebook_KD.device:
        raise ValueError(f"latents on {z_ND.device}, codebook on {codebook_KD.device}: expected one device")
    fused = use_triton(impl, z_ND)
    if len(z_ND) == 0:
        return torch.empty(0, dtype=torch.int64, device=z_ND.device)
    if fused:
        return _nearest_code_triton(z_ND, codebook_KD, id_offset)[0]
    return nearest_code_ref(z_ND, codebook_KD, id_offset=id_offset)

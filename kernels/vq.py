"""Nearest codebook entry of each latent, without the N x K distance matrix.

The textbook form writes 4 N K bytes of distances and reads them back (2.1 GB for 64 images of 1024 latents against
8192 codes). The kernel keeps a running (minimum, argument) per latent while it walks over the codebook in blocks,
so beyond its inputs it writes 8 bytes per latent and needs one float per code.

Cost: 2 N K D flop; from memory 4 N D + 4 K D bytes in, 8 N out, everything else comes from the L2 cache.
Precision: fp32 products and sums throughout (`input_precision="ieee"`: no TF32, so no tensor cores). A tensor-core
product followed by an exact check of the candidates that it cannot decide belongs in `_nearest_code_kernel`.

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

# Distances of one block of rows in the torch reference, 64 MB in fp32; it holds two such blocks at a time.
REF_ELEMENTS = 1 << 24
# Not tuned on a GPU yet: of the settings tried, the largest that triton 3.6 and 3.9 compile without a spill for
# sm_80 and sm_90, whatever the strides (tests/test_aot.py).
BLOCK_N, BLOCK_K, BLOCK_D = 64, 128, 16
NUM_WARPS, NUM_STAGES = 8, 2
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


if triton is not None:

    @triton.jit
    def _nearest_code_kernel(
        z_ptr,
        e_ptr,
        norm_ptr,
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
        # One program owns BLOCK_N latents and meets every code, so no two programs share a minimum.
        n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        z_row = z_ptr + n[:, None] * stride_zn

        z_norm = tl.zeros((BLOCK_N,), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            z_mask = (n[:, None] < N) & (d0 + d[None, :] < D)
            z = tl.load(z_row + (d0 + d[None, :]) * stride_zd, mask=z_mask, other=0.0).to(tl.float32)
            z_norm += tl.sum(z * z, axis=1)

        best = tl.full((BLOCK_N,), float("inf"), tl.float32)
        best_k = tl.zeros((BLOCK_N,), tl.int32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            e_row = e_ptr + k[None, :].to(tl.int64) * stride_ek
            product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            for d0 in range(0, D, BLOCK_D):
                z_mask = (n[:, None] < N) & (d0 + d[None, :] < D)
                e_mask = (k[None, :] < K) & (d0 + d[:, None] < D)
                z = tl.load(z_row + (d0 + d[None, :]) * stride_zd, mask=z_mask, other=0.0).to(tl.float32)
                e = tl.load(e_row + (d0 + d[:, None]) * stride_ed, mask=e_mask, other=0.0).to(tl.float32)
                product = tl.dot(z, e, product, input_precision="ieee")

            e_norm = tl.load(norm_ptr + k, mask=k < K, other=0.0)
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

        tl.store(out_ptr + n, best_k.to(tl.int64) + id_offset, mask=n < N)


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


def _nearest_code_triton(z_ND: torch.Tensor, codebook_KD: torch.Tensor, id_offset: int) -> torch.Tensor:
    z_ND, codebook_KD = z_ND.detach(), codebook_KD.detach()
    (N, D), K = z_ND.shape, len(codebook_KD)
    norm_K = codebook_KD.float().pow(2).sum(dim=1)
    codes_N = torch.empty(N, dtype=torch.int64, device=z_ND.device)
    with torch.cuda.device_of(z_ND):
        _nearest_code_kernel[(triton.cdiv(N, BLOCK_N),)](
            z_ND,
            codebook_KD,
            norm_K,
            codes_N,
            N,
            id_offset,
            *z_ND.stride(),
            *codebook_KD.stride(),
            K=K,
            D=D,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            BLOCK_D=BLOCK_D,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            enable_fp_fusion=True,
        )
    return codes_N


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
    use_triton = _use_triton(impl, z_ND)
    if len(z_ND) == 0:
        return torch.empty(0, dtype=torch.int64, device=z_ND.device)
    if use_triton:
        return _nearest_code_triton(z_ND, codebook_KD, id_offset)
    return nearest_code_ref(z_ND, codebook_KD, id_offset=id_offset)


def _use_triton(impl: str, tensor: torch.Tensor) -> bool:
    # The interpreter (TRITON_INTERPRET=1) leaves something else than a JITFunction behind; it takes CPU tensors but
    # is there to test kernels, far too slow to be chosen by "auto".
    interpreted = triton is not None and not isinstance(_nearest_code_kernel, triton.JITFunction)
    if impl == "auto":
        return tensor.is_cuda and triton is not None and not interpreted
    if impl == "torch":
        return False
    if impl != "triton":
        raise ValueError(f"impl {impl!r}: expected 'auto', 'triton' or 'torch'")
    if triton is None:
        raise RuntimeError("impl='triton': triton is not installed (pip install triton, or use impl='auto')")
    if not tensor.is_cuda and not interpreted:
        raise RuntimeError(f"impl='triton': the tensors are on {tensor.device}, expected a GPU (or TRITON_INTERPRET=1)")
    return True

"""A frozen projection with a LoRA adapter, y = x W' + h B', h = scale * dropout(x) A', as one function with gradients.

peft's module is the projection and then dropout, two narrow products, a scaling and a sum, each a pass of its own.
Reads and writes of whole tensors beside the two wide products (x W' and dy W), a mask counted as half of one, and bytes
kept from forward to backward beside h, in 16 bits:
              forward              backward             kept
    peft      6 out, 3.5 in        4 out, 7.5 in        3 bytes of each x (the dropped one, a mask)
    here      2 out, 1 in          2 out, 3 in          x itself, which query, key and value share
Here h B' is added by the product itself; backward reads dy for dB = dy' h and for g = dy B, then
    dA = scale * g' dropout(x)  in one pass over x,    dx += mask * (scale * g A)  in one pass over dx, in place.
Neither the mask nor a dropped x is ever stored: three kernels make the mask where they use it, from a counter. Without
dropout these are torch's products. dA is a fixed number of sums over rows, added up in a fixed order, without atomics.

Mask: Philox4x32 with 7 rounds, the fewest that its authors found to pass all tests, of the key `seed` and the counter
(row, column / 8, 0, 0). Its four words are eight numbers of 16 bits, one for each of eight neighbouring columns; a
value is kept where its number is `limit` or more, with limit = dropout * 65536 rounded, and scaled by 65536 / (65536 -
limit). Row and column are words of their own, so that only 2^31 rows would be too many. The torch reference computes
the same mask, so that a CPU and every GPU drop the same values.

Precision: fp32 inside a product, each result rounded once (h twice by torch); y and dx are sums of two and rounded
once more, as in peft.

Shapes: T rows, K and O widths of x and y, R rank; x_TK, weight_OK, a_RK, b_OR, h_TR, g_TR.
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
LEVELS = 1 << 16
ROUNDS = 7
# Sums over rows that dA consists of.
PARTS = 16
# The largest rank of the kernels, and values of A in a tile at most, of 16 bits.
MAX_R, A_TILE = 128, 8192
OPTIONS = {"enable_fp_fusion": True}


if triton is not None:

    @triton.jit
    def _kept(seed, t, k0, limit, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ROUNDS: tl.constexpr):
        """The mask of a tile [BLOCK_T, BLOCK_K] at rows t and columns from k0 on."""
        group = k0 // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
        w0, w1, w2, w3 = tl.philox(seed, t[:, None], group, group * 0, group * 0, ROUNDS)
        # Joined in registers: who loads eight neighbouring values in one vector also makes their numbers.
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        numbers = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK_T, BLOCK_K])
        return numbers.to(tl.int32, bitcast=True) >= limit

    @triton.jit(do_not_specialize=["seed", "limit"])
    def _lora_down_kernel(
        x_ptr,
        a_ptr,
        h_ptr,
        T,
        stride_xt,
        seed,
        limit,
        scale,
        K: tl.constexpr,
        R: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_R: tl.constexpr,
        ROUNDS: tl.constexpr,
    ):
        t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        r = tl.arange(0, BLOCK_R)
        rows = t.to(tl.int64)[:, None] * stride_xt
        h = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + rows + k[None, :], mask=(t < T)[:, None] & (k < K)[None, :], other=0.0)
            a = tl.load(a_ptr + r[None, :] * K + k[:, None], mask=(r < R)[None, :] & (k < K)[:, None], other=0.0)
            x = tl.where(_kept(seed, t, k0, limit, BLOCK_T, BLOCK_K, ROUNDS), x, 0.0)
            h = tl.dot(x, a, h, input_precision="ieee")
        at = t.to(tl.int64)[:, None] * R + r[None, :]
        tl.store(h_ptr + at, (h * scale).to(h_ptr.dtype.element_ty), mask=(t < T)[:, None] & (r < R)[None, :])

    @triton.jit(do_not_specialize=["seed", "limit"])
    def _lora_weight_kernel(
        x_ptr,
        g_ptr,
        partial_ptr,
        T,
        stride_xt,
        seed,
        limit,
        scale,
        K: tl.constexpr,
        R: tl.constexpr,
        PARTS: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_R: tl.constexpr,
        ROUNDS: tl.constexpr,
    ):
        """Of part p of dA and a block of columns: the sum over the blocks of rows p, p + PARTS, ... in turn."""
        k0, part = tl.program_id(0) * BLOCK_K, tl.program_id(1)
        k = k0 + tl.arange(0, BLOCK_K)
        r = tl.arange(0, BLOCK_R)
        da = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
        for t0 in range(part * BLOCK_T, T, PARTS * BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            rows = t.to(tl.int64)
            x = tl.load(
                x_ptr + rows[:, None] * stride_xt + k[None, :], mask=(t < T)[:, None] & (k < K)[None, :], other=0.0
            )
            g = tl.load(g_ptr + rows[None, :] * R + r[:, None], mask=(r < R)[:, None] & (t < T)[None, :], other=0.0)
            x = tl.where(_kept(seed, t, k0, limit, BLOCK_T, BLOCK_K, ROUNDS), x, 0.0)
            da = tl.dot(g, x, da, input_precision="ieee")
        at = (part * R + r)[:, None] * K + k[None, :]
        tl.store(partial_ptr + at, da * scale, mask=(r < R)[:, None] & (k < K)[None, :])

    @triton.jit(do_not_specialize=["seed", "limit"])
    def _lora_input_kernel(
        dx_ptr,
        g_ptr,
        a_ptr,
        T,
        seed,
        limit,
        scale,
        K: tl.constexpr,
        R: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_K: tl.constexpr,
        BLOCK_R: tl.constexpr,
        ROUNDS: tl.constexpr,
    ):
        BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
        t = tl.program_id(0) // BLOCKS * BLOCK_T + tl.arange(0, BLOCK_T)
        k0 = tl.program_id(0) % BLOCKS * BLOCK_K
        k = k0 + tl.arange(0, BLOCK_K)
        r = tl.arange(0, BLOCK_R)
        rows = t.to(tl.int64)[:, None]
        inside = (t < T)[:, None] & (k < K)[None, :]
        g = tl.load(g_ptr + rows * R + r[None, :], mask=(t < T)[:, None] & (r < R)[None, :], other=0.0)
        a = tl.load(a_ptr + r[:, None] * K + k[None, :], mask=(r < R)[:, None] & (k < K)[None, :], other=0.0)
        more = tl.dot(g, a, input_precision="ieee") * scale
        dx = tl.load(dx_ptr + rows * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
        kept = _kept(seed, t, k0, limit, BLOCK_T, BLOCK_K, ROUNDS)
        dx = tl.where(kept, dx + more, dx)
        tl.store(dx_ptr + rows * K + k[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _halves_ref(seed: int, T: int, K: int, device) -> list[torch.Tensor]:
    """The numbers 0..65535 of every eighth column from column i on, int64 [T, K / 8] for i in 0..7, in plain torch."""
    low = 0xFFFFFFFF
    # int64 holds words of 32 bits, and products of two of them modulo 2^64: their high word loses its sign to the mask.
    c0 = torch.arange(T, device=device)[:, None]
    c1 = torch.arange(-(-K // 8), device=device)[None, :]
    c2 = c3 = torch.zeros(1, 1, dtype=torch.int64, device=device)
    k0, k1 = seed & low, seed >> 32
    for _ in range(ROUNDS):
        p0, p2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p2 >> 32 & low) ^ c1 ^ k0, p2 & low, (p0 >> 32 & low) ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return [half for word in (c0, c1, c2, c3) for half in (word & 0xFFFF, word >> 16)]


def random_numbers_ref(seed: int, T: int, K: int, device) -> torch.Tensor:
    """The numbers 0..65535 that decide on each value, int64 [T, K], in plain torch."""
    return torch.stack(_halves_ref(seed, T, K, device), dim=2).flatten(1)[:, :K]


def _mask_ref(x_TK: torch.Tensor, limit: int, seed: int) -> torch.Tensor | None:
    """Which values are kept, bool [T, K]; None where all are."""
    if not limit:
        return None
    halves = _halves_ref(seed, *x_TK.shape, x_TK.device)
    return torch.stack([half >= limit for half in halves], dim=2).flatten(1)[:, : x_TK.shape[1]]


def _dropped_ref(x_TK: torch.Tensor, mask_TK: torch.Tensor | None) -> torch.Tensor:
    return x_TK if mask_TK is None else x_TK.where(mask_TK, 0)


def _plan(R: int, K: int, itemsize: int, BLOCK_T: int, BLOCK_K: int, **options: int) -> dict[str, int]:
    """Constants and options of all three kernels."""
    block_r = max(16, triton.next_power_of_2(R))
    block_k = min(BLOCK_K, A_TILE // block_r)
    if itemsize == 4:
        # Not for tensor cores: products hold both operands in registers.
        BLOCK_T, block_k = BLOCK_T // 2, min(BLOCK_K // 2, A_TILE // 4 // block_r)
    settings = {"K": K, "R": R, "BLOCK_T": BLOCK_T, "BLOCK_K": block_k, "BLOCK_R": block_r, "ROUNDS": ROUNDS}
    return settings | options | OPTIONS


def _down_triton(x_TK, a_RK, scale: float, limit: int, seed: int) -> torch.Tensor:
    (R, K), T = a_RK.shape, len(x_TK)
    settings = _plan(R, K, a_RK.element_size(), **blocks("lora_down", x_TK.device))
    h_TR = torch.empty(T, R, dtype=x_TK.dtype, device=x_TK.device)
    grid = (triton.cdiv(T, settings["BLOCK_T"]),)
    with torch.cuda.device_of(x_TK):
        _lora_down_kernel[grid](x_TK, a_RK, h_TR, T, x_TK.stride(0), seed, limit, scale, **settings)
    return h_TR


def _weight_gradient_triton(x_TK, g_TR, scale: float, limit: int, seed: int) -> torch.Tensor:
    (T, K), R = x_TK.shape, g_TR.shape[1]
    settings = _plan(R, K, x_TK.element_size(), **blocks("lora_weight", x_TK.device))
    partial = torch.empty(PARTS, R, K, dtype=torch.float32, device=x_TK.device)
    grid, numbers = (triton.cdiv(K, settings["BLOCK_K"]), PARTS), (T, x_TK.stride(0), seed, limit, scale)
    with torch.cuda.device_of(x_TK):
        _lora_weight_kernel[grid](x_TK, g_TR, partial, *numbers, PARTS=PARTS, **settings)
    return partial.sum(0).to(x_TK.dtype)


def _add_input_gradient_triton_(dx_TK, g_TR, a_RK, scale: float, limit: int, seed: int) -> None:
    (R, K), T = a_RK.shape, len(dx_TK)
    settings = _plan(R, K, a_RK.element_size(), **blocks("lora_input", dx_TK.device))
    grid = (triton.cdiv(T, settings["BLOCK_T"]) * triton.cdiv(K, settings["BLOCK_K"]),)
    with torch.cuda.device_of(dx_TK):
        _lora_input_kernel[grid](dx_TK, g_TR, a_RK, T, seed, limit, scale, **settings)


def _down(x_TK, a_RK, scale: float, limit: int, seed: int, fused: bool) -> torch.Tensor:
    """h = scale * dropped(x) A'."""
    if fused:
        return _down_triton(x_TK, a_RK, scale, limit, seed)
    return torch.mm(_dropped_ref(x_TK, _mask_ref(x_TK, limit, seed)), a_RK.t()).mul_(scale)


def _weight_gradient(x_TK, g_TR, mask_TK, scale: float, limit: int, seed: int, fused: bool) -> torch.Tensor:
    """dA = scale * g' dropped(x)."""
    if fused:
        return _weight_gradient_triton(x_TK, g_TR, scale, limit, seed)
    return torch.mm(g_TR.t(), _dropped_ref(x_TK, mask_TK)).mul_(scale)


def _add_input_gradient_(dx_TK, g_TR, a_RK, mask_TK, scale: float, limit: int, seed: int, fused: bool) -> None:
    """dx += scale * dropped(g A)."""
    if fused:
        _add_input_gradient_triton_(dx_TK, g_TR, a_RK, scale, limit, seed)
    elif limit:
        dx_TK += _dropped_ref(torch.mm(g_TR, a_RK), mask_TK).mul_(scale)
    else:
        dx_TK.addmm_(g_TR, a_RK, alpha=scale)


@torch.library.custom_op("medmax::draw_seed", mutates_args=())
def draw_seed() -> int:
    """A seed from torch's generator of the CPU, which checkpointing sets back when it computes a layer again."""
    # Always of 63 bits, so that kernels have one type for it.
    return torch.randint(1 << 62, (1 << 63) - 1, ()).item()


# One operation for torch: selective checkpointing keeps what it returns, and would not see that y is added to in place.
@torch.library.custom_op("medmax::lora_linear", mutates_args=())
def _lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    limit: int,
    seed: int,
    fused: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y [T, O], h [T, R])."""
    h_TR = _down(x, a, scale, limit, seed, fused)
    return torch.mm(x, weight.t()).addmm_(h_TR, b.t()), h_TR


@_lora_linear.register_fake
def _(x, weight, a, b, scale, limit, seed, fused):
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(a))


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK, weight_OK, a_RK, b_OR, *how):
        y_TO, h_TR = _lora_linear(x_TK, weight_OK, a_RK, b_OR, *how)
        # Weights as they came: ZeRO-3 takes their memory away in between.
        ctx.save_for_backward(x_TK, weight_OK, a_RK, b_OR, h_TR)
        ctx.how = how
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO):
        x_TK, weight_OK, a_RK, b_OR, h_TR = ctx.saved_tensors
        wants_dx, _, wants_da, wants_db, *_ = ctx.needs_input_grad
        _, limit, seed, fused = ctx.how
        # The kernels make it where they use it.
        mask_TK = None if fused else _mask_ref(x_TK, limit, seed)
        g_TR, dx_TK = torch.mm(dy_TO, b_OR), None
        if wants_dx:
            dx_TK = torch.mm(dy_TO, weight_OK)
            _add_input_gradient_(dx_TK, g_TR, a_RK, mask_TK, *ctx.how)
        da_RK = _weight_gradient(x_TK, g_TR, mask_TK, *ctx.how) if wants_da else None
        db_OR = torch.mm(dy_TO.t(), h_TR) if wants_db else None
        return dx_TK, None, da_RK, db_OR, None, None, None, None


def lora_linear(
    x: torch.Tensor,
    weight_OK: torch.Tensor,
    a_RK: torch.Tensor,
    b_OR: torch.Tensor,
    scale: float,
    dropout: float = 0.0,
    seed: int = 0,
    impl: str = "auto",
) -> torch.Tensor:
    """x W' + scale * dropout(x) A' B', differentiable in x, A and B; W must not want a gradient.

    x: [..., K], float32, float16 or bfloat16 (float64 too, in torch), rows of contiguous values with one stride, or it
    is copied. weight_OK, a_RK, b_OR: of its dtype; A and B may have another, and are rounded to it first.
    dropout: in [0, 1), kept to 1/65536; above 0 `seed` (0..2^63-1, `draw_seed()`) says which values are dropped.
    impl: "auto" (triton on a GPU, else torch), "triton" (a GPU, or TRITON_INTERPRET=1) or "torch". The kernels are for
    dropout and ranks up to 128: without the one torch's products serve, beyond the other "auto" takes torch.

    Returns [..., O]. Raises ValueError for arguments that do not fit and RuntimeError where "triton" cannot run.
    """
    _check(x, weight_OK, a_RK, b_OR, dropout)
    fused = use_triton(impl, x)
    if fused and (x.dtype not in FLOAT_DTYPES or len(a_RK) > MAX_R):
        if impl == "triton":
            raise ValueError(f"impl='triton': {x.dtype} of rank {len(a_RK)}, expected 16 or 32 bits, up to {MAX_R}")
        fused = False
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
    limit = min(round(dropout * LEVELS), LEVELS - 1)
    how = scale * LEVELS / (LEVELS - limit), limit, seed, fused and limit > 0 and len(rows) > 0
    y_TO = _LoraLinear.apply(rows, weight_OK, a_RK.to(x.dtype).contiguous(), b_OR.to(x.dtype), *how)
    return y_TO.view(*x.shape[:-1], len(weight_OK))


def _check(x, weight_OK, a_RK, b_OR, dropout: float) -> None:
    shapes = [list(tensor.shape) for tensor in (x, weight_OK, a_RK, b_OR)]
    fits = False
    if x.ndim and weight_OK.ndim == a_RK.ndim == b_OR.ndim == 2:
        (O, K), R = weight_OK.shape, len(a_RK)  # noqa: E741
        fits = R > 0 and x.shape[-1] == K and a_RK.shape == (R, K) and b_OR.shape == (O, R)
    if not fits:
        raise ValueError("x {}, weight {}, A {}, B {}: expected [..., K], [O, K], [R, K], [O, R]".format(*shapes))
    if x.dtype not in (*FLOAT_DTYPES, torch.float64) or weight_OK.dtype != x.dtype:
        raise ValueError(f"x {x.dtype}, weight {weight_OK.dtype}: expected one floating-point type")
    if not x.device == weight_OK.device == a_RK.device == b_OR.device:
        devices = ", ".join(str(tensor.device) for tensor in (x, weight_OK, a_RK, b_OR))
        raise ValueError(f"x, weight, A, B on {devices}: expected one device")
    if weight_OK.requires_grad:
        raise ValueError("the weight wants a gradient, which only the adapter gets")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}: expected at least 0 and below 1")

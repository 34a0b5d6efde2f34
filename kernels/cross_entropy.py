"""Cross-entropy of a chunk of logits in place: losses out, and the gradient written over the logits.

The textbook form keeps the logits, makes an fp32 copy, its log-softmax and two gradients of the same size: 5 tensors of
[rows, 65,536]. Here the logits are read twice and written once, 3 V values a row, and no second [S, V] tensor exists.
One program takes a row: an online maximum and sum in the first pass, the gradient in the second, which finds a row of
128 KB (bf16) in the L2 cache.

With p = softmax(x), lse = log sum exp(x), t the target, w the row's weight and z the weight of the z-loss (PaLM, arXiv
2204.02311, section 5):
    loss = lse - x_t
    d(w (loss + z lse^2))/dx = w (p (1 + 2 z lse) - onehot(t))
Precision: everything in fp32, the gradient rounded once to the logits' dtype. The maximum m is kept apart from the
logarithm of the sum: lse - x_t is log(sum) - (x_t - m), and p is exp(x - m) / sum; lse itself, rounded to 2^-9 where
logits are at 3e4, only enters the z-loss, for which it is handed back.

Semantics on every path: -inf is a logit of probability 0, so a target there has the loss inf; a row with a NaN, with
+inf or with nothing but -inf has the loss NaN and a gradient of NaN. So has a target outside of 0..V-1, -100 included:
it reads and writes nothing else, and no host sync is spent on looking for it.

Shapes: S rows, V logits a row.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from medmax_fast.kernels.blocks import blocks
from medmax_fast.kernels.launch import use_triton

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Values that the torch reference takes at a time: 4 MB in fp32, which its five passes find in the cache.
REF_ELEMENTS = 1 << 20
OPTIONS = {"enable_fp_fusion": True}


if triton is not None:

    @triton.jit
    def _cross_entropy_kernel(
        logits_ptr,
        targets_ptr,
        weights_ptr,
        losses_ptr,
        lse_ptr,
        V,
        stride_s,
        z_loss,
        GRADIENT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        s = tl.program_id(0).to(tl.int64)
        row_ptr = logits_ptr + s * stride_s
        target = tl.load(targets_ptr + s)
        known = (target >= 0) & (target < V)
        # Ahead of the reductions, which every thread waits at, and so ahead of the pass that writes over it.
        x_target = tl.load(row_ptr + target, mask=known, other=float("nan")).to(tl.float32)

        v = tl.arange(0, BLOCK)
        highest = tl.full((), float("-inf"), tl.float32)
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            x = tl.load(row_ptr + start + v, mask=start + v < V, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(highest, tl.max(x, 0))
            # While all are -inf there is no maximum to subtract, and exp(-inf - 0) is the 0 that is wanted.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            sums = sums * tl.exp(highest - shift) + tl.exp(x - shift)
            highest = higher
        total = tl.sum(sums, 0)
        log_total = tl.log(total)
        lse = highest + log_total
        tl.store(losses_ptr + s, log_total - (x_target - highest))
        tl.store(lse_ptr + s, lse)

        if GRADIENT:
            weight = 1.0
            if weights_ptr is not None:
                weight = tl.load(weights_ptr + s)
            weight = tl.where(known, weight, float("nan"))
            scale, pull = 1.0 / total, 2.0 * z_loss * lse
            for start in range(0, V, BLOCK):
                x = tl.load(row_ptr + start + v, mask=start + v < V, other=float("-inf")).to(tl.float32)
                p = tl.exp(x - highest) * scale
                # Of p near 1 first the difference, which is exact.
                slope = (tl.where(start + v == target, p - 1.0, p) + p * pull) * weight
                tl.store(row_ptr + start + v, slope.to(logits_ptr.dtype.element_ty), mask=start + v < V)


def cross_entropy_ref_(
    logits_SV: torch.Tensor,
    targets_S: torch.Tensor,
    weights_S: torch.Tensor | None = None,
    z_loss: float = 0.0,
    gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in plain torch, a few rows at a time; arguments as `cross_entropy_`."""
    S, V = logits_SV.shape
    losses_S, lse_S = torch.empty(2, S, dtype=torch.float32, device=logits_SV.device)
    step = max(REF_ELEMENTS // V, 1)
    for start in range(0, S, step):
        rows = slice(start, start + step)
        weights = None if weights_S is None else weights_S[rows, None]
        losses, lse = _rows_ref_(logits_SV[rows], targets_S[rows, None], weights, z_loss, gradient)
        losses_S[rows], lse_S[rows] = losses[:, 0], lse[:, 0]
    return losses_S, lse_S


def _rows_ref_(x, targets, weights, z_loss: float, gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and lse [rows, 1]; x: [rows, V], written over with `gradient`; targets, weights: [rows, 1]."""
    known = (targets >= 0) & (targets < x.shape[1])
    targets = targets.where(known, 0)
    highest = x.amax(1, keepdim=True).float()
    away = x.gather(1, targets) - highest
    # In the logits' own memory where they are fp32 and are written over anyway.
    e = x.sub_(highest) if gradient and x.dtype == torch.float32 else x - highest
    total = e.exp_().sum(1, keepdim=True)
    log_total = total.log()
    lse = highest + log_total
    if gradient:
        weights = known.float() if weights is None else weights
        weights = weights.where(known, torch.nan)
        pull, log_p = 2 * z_loss * lse, away - log_total
        e.mul_(weights * (1 + pull) / total)
        e.scatter_(1, targets, weights * (log_p.expm1() + log_p.exp() * pull))
        x.copy_(e)
    return (log_total - away).where(known, torch.nan), lse


def _plan(V: int, BLOCK: int, **options: int) -> dict[str, int]:
    """Constants and options of the kernel."""
    return {"BLOCK": min(BLOCK, triton.next_power_of_2(V)), **options, **OPTIONS}


def _cross_entropy_triton_(logits_SV, targets_S, weights_S, z_loss: float, gradient: bool):
    S, V = logits_SV.shape
    losses_S, lse_S = torch.empty(2, S, dtype=torch.float32, device=logits_SV.device)
    with torch.cuda.device_of(logits_SV):
        _cross_entropy_kernel[(S,)](
            logits_SV,
            targets_S,
            weights_S,
            losses_S,
            lse_S,
            V,
            logits_SV.stride(0),
            float(z_loss),
            GRADIENT=gradient,
            **_plan(V, **blocks("cross_entropy", logits_SV.device)),
        )
    return losses_S, lse_S


def cross_entropy_(
    logits_SV: torch.Tensor,
    targets_S: torch.Tensor,
    weights_S: torch.Tensor | None = None,
    z_loss: float = 0.0,
    gradient: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses, lse), both fp32 [S]: cross-entropy in nats, unweighted and without the z-loss, and log sum exp.

    With `gradient` the logits become the gradient of the weighted losses, z-loss included.

    logits_SV: [S, V], float32, float16 or bfloat16, a row's logits contiguous, rows any distance apart; untouched
    without `gradient`. targets_S: int64 [S]; one outside of 0..V-1 gives its row NaN. weights_S: float32 [S], 1
    without; they scale the gradient alone, and should be near 1 where it is rounded to fp16. z_loss: the weight of
    lse^2 in the gradient. impl: "auto" (triton on a GPU, else torch), "triton" (a GPU, or TRITON_INTERPRET=1), "torch".

    Raises ValueError for shapes, dtypes, devices or layouts that do not fit and for logits that autograd follows,
    RuntimeError where impl="triton" cannot run.
    """
    if logits_SV.ndim != 2 or logits_SV.shape[1] == 0:
        raise ValueError(f"logits {list(logits_SV.shape)}: expected [S, V] with V of at least 1")
    S, V = logits_SV.shape
    if logits_SV.dtype not in FLOAT_DTYPES:
        raise ValueError(f"logits {logits_SV.dtype}: expected float32, float16 or bfloat16")
    for name, tensor, dtype in (("targets", targets_S, torch.int64), ("weights", weights_S, torch.float32)):
        if tensor is None and name == "weights":
            continue
        if tensor.shape != (S,) or tensor.dtype != dtype or not tensor.is_contiguous():
            found = f"{list(tensor.shape)}, {tensor.dtype}, strides {tensor.stride()}"
            raise ValueError(f"{name} {found}: expected [{S}], {dtype}, contiguous")
        if tensor.device != logits_SV.device:
            raise ValueError(f"logits on {logits_SV.device}, {name} on {tensor.device}")
    if (V > 1 and logits_SV.stride(1) != 1) or (S > 1 and logits_SV.stride(0) < V):
        raise ValueError(f"logits of strides {logits_SV.stride()}: expected contiguous rows that do not overlap")
    if torch.is_grad_enabled() and logits_SV.requires_grad:
        raise ValueError("logits that autograd follows: expected torch.no_grad() or detached ones, written in place")
    fused = use_triton(impl, logits_SV)
    if S == 0:
        return tuple(torch.empty(2, 0, dtype=torch.float32, device=logits_SV.device))
    run = _cross_entropy_triton_ if fused else cross_entropy_ref_
    return run(logits_SV, targets_S, weights_S, z_loss, gradient)

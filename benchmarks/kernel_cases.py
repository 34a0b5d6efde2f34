"""What bench_train_kernels measures: each operation on its tensors, in every form, and what it has to do at least.

Shapes: T ids, H heads, D head width, C model width, V vocabulary; x and its gradient [T, H, D] or [T, C].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.models.chameleon import modeling_chameleon as stock

from medmax_fast.kernels.qk_norm_rope import norm_rope, norm_rope_ref
from medmax_fast.kernels.rms_norm import rms_norm, rms_norm_ref
from medmax_fast.kernels.swiglu import swiglu, swiglu_ref
from medmax_fast.model.loss import IGNORE, linear_cross_entropy

EPS = 1e-5
PLAIN, SELECTED, OURS, LIGER = "plain", "plain, supervised ids", "ours", "liger"
# Ids, heads, head width, model width, hidden width, vocabulary.
SIZES = {
    "gpu": (16384, 32, 128, 4096, 11008, 65536),
    "cpu": (2048, 8, 64, 512, 1376, 8192),
    "quick": (256, 4, 32, 128, 352, 1024),
}
# A form takes the case's tensors once and gives what is timed.
Form = Callable[..., Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """One operation on given tensors, the last of which is the gradient of its output.

    trained: which of the tensors get a gradient. truth: the operation on tensors in float64. work: bytes to move (unit
    GB/s) or FLOP (TFLOP/s), forward and with backward.
    """

    op: str
    detail: str
    tensors: tuple[torch.Tensor, ...]
    trained: tuple[bool, ...]
    forms: dict[str, Form]
    truth: Callable[..., torch.Tensor]
    work: tuple[float, float]
    unit: str = "GB/s"


def size_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def with_weights(module, **weights):
    """A module of transformers that uses the given tensors as they are."""
    for name, weight in weights.items():
        delattr(module, name)
        setattr(module, name, weight)
    return module


def norm_rope_case(size, random, trained: bool) -> Case:
    T, H, D = size[:3]
    x, dout = random(T, H, D), random(T, H, D)
    weight, bias = 1 + 0.1 * random(H, D), 0.1 * random(H, D)
    angles = torch.arange(T, device=x.device)[:, None] * 10000.0 ** (-torch.arange(0, D, 2, device=x.device) / D)
    cos, sin = (torch.cat([f(angles)] * 2, dim=1).to(x.dtype) for f in (torch.cos, torch.sin))

    def plain(x, weight, bias, cos, sin, _):
        norm = with_weights(stock.ChameleonLayerNorm((H, D), device=x.device, dtype=x.dtype), weight=weight, bias=bias)

        def call():
            # transformers rotates q and k in one call; this is its half.
            heads = norm(x).reshape(1, T, H, D).transpose(1, 2)
            return (heads * cos + stock.rotate_half(heads) * sin)[0].transpose(0, 1)

        return call

    halves = lambda cos, sin: (cos[:, : D // 2], sin[:, : D // 2])  # noqa: E731
    forms = {PLAIN: plain, OURS: lambda x, w, b, cos, sin, _: lambda: norm_rope(x, w, b, *halves(cos, sin), EPS)}
    small = size_of(weight, bias, *halves(cos, sin))
    forward = 2 * size_of(x) + small
    return Case(
        "norm_rope",
        f"{T}x{H}x{D}, affine part {'trained' if trained else 'frozen'}",
        (x, weight, bias, cos, sin, dout),
        (True, trained, trained, False, False, False),
        forms,
        lambda x, w, b, cos, sin, _: norm_rope_ref(x, w, b, *halves(cos, sin), EPS),
        (forward, forward + 3 * size_of(x) + small + trained * size_of(weight, bias)),
    )


def rms_norm_case(size, random, trained: bool) -> Case:
    T, C = size[0], size[3]
    x, dout, weight = random(T, C), random(T, C), 1 + 0.1 * random(C)

    def plain(x, weight, _):
        norm = with_weights(stock.ChameleonRMSNorm(C, EPS), weight=weight)
        return lambda: norm(x)

    def liger(x, weight, _):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # Its default writes over the gradient that it is given, which is given again here.
        return lambda: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)

    forward = 2 * size_of(x) + size_of(weight)
    return Case(
        "rms_norm",
        f"{T}x{C}, weight {'trained' if trained else 'frozen'}",
        (x, weight, dout),
        (True, trained, False),
        {PLAIN: plain, OURS: lambda x, weight, _: lambda: rms_norm(x, weight, EPS), LIGER: liger},
        lambda x, weight, _: rms_norm_ref(x, weight, EPS),
        (forward, forward + 3 * size_of(x) + (1 + trained) * size_of(weight)),
    )


def swiglu_case(size, random) -> Case:
    T, C = size[0], size[4]
    gate, up, dout = random(T, C), random(T, C), random(T, C)

    def liger(gate, up, _):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return lambda: LigerSiLUMulFunction.apply(gate, up)

    return Case(
        "swiglu",
        f"{T}x{C}",
        (gate, up, dout),
        (True, True, False),
        {PLAIN: lambda g, u, _: lambda: F.silu(g) * u, OURS: lambda g, u, _: lambda: swiglu(g, u), LIGER: liger},
        lambda gate, up, _: swiglu_ref(gate, up),
        (3 * size_of(gate), 8 * size_of(gate)),
    )


def loss_case(size, random, percent: int, trained: bool) -> Case:
    T, C, V = size[0], size[3], size[5]
    hidden, head = random(T, C), random(V, C) * C**-0.5
    generator = torch.Generator(hidden.device).manual_seed(percent)
    targets = torch.randint(V, (T,), generator=generator, device=hidden.device)
    kept = torch.randperm(T, generator=generator, device=hidden.device)[: max(T * percent // 100, 1)].sort().values
    labels = torch.full_like(targets, IGNORE).index_copy(0, kept, targets[kept])
    chosen = targets[kept]
    dout = torch.ones((), device=hidden.device)

    def plain(hidden, head, _):
        return lambda: F.cross_entropy((hidden @ head.t()).float(), labels, ignore_index=IGNORE, reduction="sum")

    def selected(hidden, head, _):
        return lambda: F.cross_entropy((hidden[kept] @ head.t()).float(), chosen, reduction="sum")

    def ours(hidden, head, _):
        return lambda: linear_cross_entropy(hidden[kept], chosen, (head,))[0]

    def liger(hidden, head, _):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        options = {"reduction": "sum", "accum_dtype": torch.float32}
        return lambda: liger_fused_linear_cross_entropy(hidden[kept], head, chosen, **options)

    def truth(hidden, head, _):
        # A chunk's logits are computed again for the gradient, or all would be held in float64.
        chunk = lambda rows, ids: F.cross_entropy(hidden[rows] @ head.t(), ids, reduction="sum")  # noqa: E731
        pairs = zip(kept.split(1024), chosen.split(1024), strict=True)
        return sum(checkpoint(chunk, *pair, use_reentrant=False) for pair in pairs)

    product = 2.0 * len(kept) * V * C
    return Case(
        "linear cross-entropy",
        f"{T}x{C}x{V}, {percent} % supervised, head {'trained' if trained else 'frozen'}",
        (hidden, head, dout),
        (True, trained, False),
        {PLAIN: plain, SELECTED: selected, OURS: ours, LIGER: liger},
        truth,
        (product, (3 if trained else 2) * product),
        "TFLOP/s",
    )


def cases(name: str, device: str, dtype: torch.dtype) -> Iterator[Case]:
    """All cases of a size, one at a time."""
    size = SIZES[name]
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    for trained in (False, True):
        yield norm_rope_case(size, random, trained)
    for trained in (False, True):
        yield rms_norm_case(size, random, trained)
    yield swiglu_case(size, random)
    for percent, trained in ((1, False), (10, False), (10, True), (100, False)):
        yield loss_case(size, random, percent, trained)

"""The kernels between the products of training: norms and SwiGLU, forward and with their gradients.

The plain form is transformers' own module or torch's call, liger-kernel's form stands beside it where it is installed.
liger's SwiGLU writes its gradients over its inputs and is timed on what that leaves; it has no norm over heads.

Shapes: T ids, H heads, D head width, C model width; x and its gradient [T, H, D] or [T, C].
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.models.chameleon import modeling_chameleon as stock

from benchmarks.cases.case import COMPILED, LIGER, PLAIN, Case, Draw, Form, Work, name_of, own_first, within_twice
from medmax_fast.kernels.qk_norm_rope import norm_rope, norm_rope_ref
from medmax_fast.kernels.rms_norm import rms_norm, rms_norm_ref
from medmax_fast.kernels.swiglu import swiglu, swiglu_ref

EPS = 1e-5
SELECTED = "torch, supervised ids"


@dataclass(frozen=True)
class Size:
    """T, H, D, C, the hidden width of the MLP and V, the rows of one chunk of logits, and the type of all tensors."""

    ids: int
    heads: int
    head: int
    width: int
    hidden: int
    vocabulary: int
    rows: int
    dtype: torch.dtype


# On a GPU those of a 7B model with packs of 16,384 ids: every tensor is larger than the L2 cache.
SIZES = {
    "gpu": Size(16384, 32, 128, 4096, 11008, 65536, 2048, torch.bfloat16),
    "cpu": Size(2048, 8, 64, 512, 1376, 8192, 256, torch.float32),
    "quick": Size(24, 4, 32, 64, 176, 256, 16, torch.float32),
}
# Takes tensors once and gives what is timed, a call with the output.
Bind = Callable[..., Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class Operation:
    """A differentiable operation on given tensors, the last of which is the gradient of its output.

    trained: which of the tensors get a gradient. others: forms beside ours. truth: the operation on tensors in float64.
    compile: a form under torch.compile is worth its compilation.
    """

    tensors: tuple[torch.Tensor, ...]
    trained: tuple[bool, ...]
    ours: Bind
    others: dict[str, Bind]
    truth: Bind
    compile: bool = False


def outcome_of(bind: Bind, tensors: tuple[torch.Tensor, ...], trained: tuple[bool, ...], backward: bool) -> Form:
    """A call that gives [output], or [output, gradients...]; without a gradient nothing is kept for one."""
    if not backward:
        call = bind(*tensors)
        return Form(torch.no_grad()(lambda: [call()]))
    own = [t.clone().requires_grad_(wanted) for t, wanted in zip(tensors, trained, strict=True)]
    wanted, call = [t for t in own if t.requires_grad], bind(*own)

    def total() -> list[torch.Tensor]:
        out = call()
        return [out.detach(), *torch.autograd.grad(out, wanted, own[-1].to(out.dtype))]

    return Form(total)


def work_of(draw: Draw, operation: Operation, backward: bool) -> Work:
    """Forward, or forward and backward, of all forms; torch.compile's is that of the plain form."""
    part = functools.partial(outcome_of, trained=operation.trained, backward=backward)
    binds = {name: bind for name, bind in operation.others.items() if name != LIGER or liger_runs(draw)}
    # Of forward and backward only: each takes seconds to compile.
    if operation.compile and backward and draw.device == "cuda":
        binds[COMPILED] = lambda *tensors: torch.compile(operation.others[PLAIN](*tensors), dynamic=False)
    forms = {name: part(bind, operation.tensors) for name, bind in binds.items()}

    @functools.cache
    def truth() -> list:
        return [(..., [t.double() for t in part(operation.truth, [t.double() for t in operation.tensors]).call()])]

    ours = Form(part(operation.ours, operation.tensors).call, own=True)
    plain = tuple(name for name in forms if name in (PLAIN, SELECTED))
    return Work(own_first(draw, ours, forms), PLAIN, within_twice(truth, plain))


def liger_runs(draw: Draw) -> bool:
    return draw.device == "cuda" and importlib.util.find_spec("liger_kernel") is not None


def cases_of(stage: str, shape: str, rows: list[tuple], operation: Callable[..., Operation], **more) -> list[Case]:
    """rows: (text, arguments of `operation`, backward too, bytes, FLOP)."""

    def make(draw: Draw, arguments: tuple, backward: bool) -> Work:
        return work_of(draw, operation(draw, *arguments), backward)

    return [
        Case(
            stage,
            f"{shape}, {text}",
            moved,
            flop,
            functools.partial(make, arguments=arguments, backward=backward),
            **more,
        )
        for text, arguments, backward, moved, flop in rows
    ]


def with_weights(module, **weights):
    """A module of transformers that uses the given tensors as they are."""
    for name, weight in weights.items():
        delattr(module, name)
        setattr(module, name, weight)
    return module


def norm_rope_cases(name: str) -> list[Case]:
    size = SIZES[name]
    T, H, D = size.ids, size.heads, size.head
    x, affine, tables = (n * size.dtype.itemsize for n in (T * H * D, 2 * H * D, T * D))
    forward = 2 * x + affine + tables
    # The bias is not read again.
    both = forward + 3 * x + affine / 2 + tables
    rows = [
        ("forward", (size, False), False, forward, 0.0),
        ("forward and backward, affine part frozen", (size, False), True, both, 0.0),
        ("forward and backward, affine part trained", (size, True), True, both + affine, 0.0),
    ]
    return cases_of("norm_rope", f"{T}x{H}x{D} {name_of(size.dtype)}", rows, norm_rope_operation)


def norm_rope_operation(draw: Draw, size: Size, trained: bool) -> Operation:
    T, H, D = size.ids, size.heads, size.head
    x, dout = (draw.normal(T, H, D, dtype=size.dtype) for _ in range(2))
    weight, bias = ((base + 0.1 * draw.normal(H, D)).to(size.dtype) for base in (1, 0))
    inverse = 10000.0 ** (-torch.arange(0, D, 2, device=draw.device) / D)
    angles = torch.arange(T, device=draw.device)[:, None] * inverse
    cos, sin = (torch.cat([f(angles)] * 2, dim=1).to(size.dtype) for f in (torch.cos, torch.sin))

    def plain(x, weight, bias, cos, sin, _):
        norm = with_weights(stock.ChameleonLayerNorm((H, D), device=x.device, dtype=x.dtype), weight=weight, bias=bias)

        def call():
            # transformers rotates q and k in one call; this is its half.
            heads = norm(x).reshape(1, T, H, D).transpose(1, 2)
            return (heads * cos + stock.rotate_half(heads) * sin)[0].transpose(0, 1)

        return call

    halves = lambda cos, sin: (cos[:, : D // 2], sin[:, : D // 2])  # noqa: E731
    return Operation(
        (x, weight, bias, cos, sin, dout),
        (True, trained, trained, False, False, False),
        lambda x, w, b, cos, sin, _: lambda: norm_rope(x, w, b, *halves(cos, sin), EPS, draw.impl),
        {PLAIN: plain},
        lambda x, w, b, cos, sin, _: lambda: norm_rope_ref(x, w, b, *halves(cos, sin), EPS),
        compile=not trained,
    )


def rms_norm_cases(name: str) -> list[Case]:
    size = SIZES[name]
    x, weight = (n * size.dtype.itemsize for n in (size.ids * size.width, size.width))
    forward = 2 * x + weight
    both = forward + 3 * x + weight
    rows = [
        ("forward", (size, False), False, forward, 0.0),
        ("forward and backward, weight frozen", (size, False), True, both, 0.0),
        ("forward and backward, weight trained", (size, True), True, both + weight, 0.0),
    ]
    return cases_of("rms_norm", f"{size.ids}x{size.width} {name_of(size.dtype)}", rows, rms_norm_operation)


def rms_norm_operation(draw: Draw, size: Size, trained: bool) -> Operation:
    T, C = size.ids, size.width
    x, dout = (draw.normal(T, C, dtype=size.dtype) for _ in range(2))
    weight = (1 + 0.1 * draw.normal(C)).to(size.dtype)

    def plain(x, weight, _):
        norm = with_weights(stock.ChameleonRMSNorm(C, EPS), weight=weight)
        return lambda: norm(x)

    def liger(x, weight, _):
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        # Its default writes over the gradient that it is given, which is given again here.
        return lambda: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False)

    return Operation(
        (x, weight, dout),
        (True, trained, False),
        lambda x, weight, _: lambda: rms_norm(x, weight, EPS, draw.impl),
        {PLAIN: plain, LIGER: liger},
        lambda x, weight, _: lambda: rms_norm_ref(x, weight, EPS),
        compile=not trained,
    )


def swiglu_cases(name: str) -> list[Case]:
    size = SIZES[name]
    x = size.ids * size.hidden * size.dtype.itemsize
    rows = [("forward", (size,), False, 3 * x, 0.0), ("forward and backward", (size,), True, 8 * x, 0.0)]
    return cases_of("swiglu", f"{size.ids}x{size.hidden} {name_of(size.dtype)}", rows, swiglu_operation)


def swiglu_operation(draw: Draw, size: Size) -> Operation:
    def plain(gate, up, _):
        return lambda: F.silu(gate) * up

    def liger(gate, up, _):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return lambda: LigerSiLUMulFunction.apply(gate, up)

    return Operation(
        tuple(draw.normal(size.ids, size.hidden, dtype=size.dtype) for _ in range(3)),
        (True, True, False),
        lambda gate, up, _: lambda: swiglu(gate, up, draw.impl),
        {PLAIN: plain, LIGER: liger},
        lambda gate, up, _: lambda: swiglu_ref(gate, up),
        compile=True,
    )

"""A kernel on one shape, in every form: what bench_kernels times, a tuner runs and the roofline counts.

The cases are in the modules beside this one, `bench_kernels.STAGES` has them by kernel. A case is sizes alone, until
`make` draws its tensors:

    case = STAGES["vq"]("gpu")[0]                     # of case.moved bytes and case.flop
    work = case.make(Draw("cuda", seed=1))
    work.quality(work.ours)                           # AssertionError unless ours is right
    work.forms[work.ours].call()                      # what is timed
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from medmax_fast.kernels.launch import INTERPRETED

OURS, REFERENCE, PLAIN, COMPILED, LIGER = "ours", "torch reference", "torch", "torch.compile", "liger"
# Short calls that are captured together in one CUDA graph.
CAPTURED = 10
# Of fewer values than this a rounding or two is always allowed.
FEW = 100
Quality = dict[str, float | int]


class Draw:
    """Random tensors of one seed on one device, and what computes there.

    impl: for our functions, "triton" where the kernels run (under TRITON_INTERPRET=1 on a CPU too), else "torch".
    ours: the name of the form that this is; a reference in plain torch is never called ours.
    """

    def __init__(self, device: str, seed: int):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.impl, self.ours = ("triton", OURS) if device == "cuda" or INTERPRETED else ("torch", REFERENCE)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """low..high-1, drawn as int32, which every device converts to every type."""
        drawn = torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=torch.int32)
        return drawn.to(dtype)

    def permutation(self, n: int) -> torch.Tensor:
        return torch.randperm(n, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Form:
    """One way to do the work of a case.

    call: does it, and gives the outcome. own: it is one of ours, which has to be right. share: how much of the work one
    call does. captured: calls in the CUDA graph that is timed on a GPU, as generation runs its kernels; 0: none, the
    host launches each call.
    """

    call: Callable[[], object]
    own: bool = False
    share: float = 1.0
    captured: int = 0


@dataclass(frozen=True)
class Work:
    """The forms of a case on tensors of their own, and what judges them.

    forms: by name, the first of them ours. beside: the form that all times are compared with. judge: (this, name,
    outcome) to differences by name; AssertionError for an outcome of ours that is out of bounds. prepare: makes buffers
    ready that forms write to, with poison where nothing must be left.
    """

    forms: dict[str, Form]
    beside: str
    judge: Callable[["Work", str, object], Quality]
    prepare: Callable[[], object] = lambda: None

    @property
    def ours(self) -> str:
        return next(iter(self.forms))

    def outcome(self, name: str) -> object:
        """Of one call, after `prepare`; memory that a form of ours allocates holds poison."""
        self.prepare()
        form = self.forms[name]
        if not form.own:
            return form.call()
        with poisoned():
            return form.call()

    def quality(self, name: str) -> Quality:
        return self.judge(self, name, self.outcome(name))


@dataclass(frozen=True)
class Case:
    """One kernel on one shape.

    stage: the kernel. moved, flop: the bytes that any form must read or write, each operand and result once, and the
    FLOP of its products; 0 is none to speak of. make: draws the tensors. items: (how many, of what) the work is. whole:
    bytes of what the textbook form stores in between and ours never has whole, such as N x K distances.
    """

    stage: str
    shape: str
    moved: float
    flop: float
    make: Callable[[Draw], Work]
    items: tuple[float, str] | None = None
    whole: float = 0.0


def own_first(draw: Draw, ours: Form | Callable[[], object], others: dict[str, Form | Callable[[], object]]) -> dict:
    """Forms by name, ours first; a torch reference beside it is left out where ours is just that."""
    forms = {name: form if isinstance(form, Form) else Form(form) for name, form in others.items() if name != draw.ours}
    return {draw.ours: ours if isinstance(ours, Form) else Form(ours, own=True), **forms}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch allocates meanwhile and does not fill holds NaN, or the largest integer.

    Else it may be the memory of an earlier, right outcome.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def exactly(expected: Callable[[], torch.Tensor]) -> Callable[[Work, str, object], Quality]:
    """A judge that counts the values that are not the expected ones; of ours there may be none."""
    expected = functools.cache(expected)

    def judge(work: Work, name: str, found: torch.Tensor) -> Quality:
        right = expected()
        assert found.shape == right.shape and found.dtype == right.dtype, (name, found.shape, found.dtype)
        if not right.is_floating_point():
            found, right = found.long(), right.long()
        differing = int((found != right).sum())
        assert not (work.forms[name].own and differing), f"{name}: {differing} of {right.numel()} values differ"
        return {"values_differing": differing}

    return judge


Truth = Iterable[tuple[object, list[torch.Tensor]]]


def relative_errors(found: list[torch.Tensor], truth: Truth) -> list[float]:
    """Per tensor the norm of its difference from the truth over the norm of the truth; infinity where one is NaN.

    truth: (part, that part of each tensor in float64), of parts that make up the whole; `...` is all of it.
    """
    away, norms = [0.0] * len(found), [0.0] * len(found)
    for part, exact in truth:
        for i, (tensor, right) in enumerate(zip(found, exact, strict=True)):
            assert tensor[part].shape == right.shape, (i, tensor.shape, right.shape)
            away[i] += float((tensor[part].double() - right).square().sum())
            norms[i] += float(right.square().sum())
    return [math.inf if math.isnan(a) else math.sqrt(a / n) for a, n in zip(away, norms, strict=True)]


def within_twice(
    truth: Callable[[], Truth], plain: tuple[str, ...] = (PLAIN,), read: Callable[[object], list] = list
) -> Callable[[Work, str, object], Quality]:
    """A judge of errors against float64: ours at most twice those of the plain forms, the worse of them.

    Of an outcome `read` gives the result and then any gradients, of which the worst counts.
    """
    known: dict[str, tuple[float, float]] = {}

    def errors(name: str, found: object) -> tuple[float, float]:
        output, *gradients = relative_errors(read(found), truth())
        known[name] = output, max(gradients, default=0.0)
        return known[name]

    def judge(work: Work, name: str, found: object) -> Quality:
        output, gradient = errors(name, found)
        result = read(found)[0]
        # A few numbers, or one as a sum of losses is, can be right by luck.
        least = 4 * torch.finfo(result.dtype).eps if result.numel() < FEW else 0.0
        # After `found` was looked at, as another form may write over it.
        beside = [known.get(other) or errors(other, work.outcome(other)) for other in plain]
        plain_output, plain_gradient = (max(side) for side in zip(*beside, strict=True))
        assert math.isfinite(plain_output + plain_gradient), f"{', '.join(plain)}: values that are not finite"
        if work.forms[name].own:
            assert output <= max(2 * plain_output, least), f"{name}: error {output}, of the plain form {plain_output}"
            assert gradient <= 2 * plain_gradient, f"{name}: gradient error {gradient}, plain {plain_gradient}"
        quality = {"output_error": output, "plain_output_error": plain_output}
        if plain_gradient:
            quality |= {"gradient_error": gradient, "plain_gradient_error": plain_gradient}
        return quality

    return judge

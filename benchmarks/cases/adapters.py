"""A frozen projection with its LoRA adapter and dropout, forward and backward, beside what peft's module does.

The plain form is peft's forward written out, so that both drop the same values: its dropout takes a ready mask instead
of drawing and writing one, which moves as many bytes. Floors have both products of the projection and the adapter's.

Shapes: T ids, K and O widths of input and output, R rank.
"""

import torch
from torch.nn import functional as F

from benchmarks.cases.case import PLAIN, Case, Draw, name_of
from benchmarks.cases.training import SIZES, Operation, cases_of
from medmax_fast.kernels.lora import LEVELS, lora_linear, random_numbers_ref

RANK, SCALE, DROPOUT = 16, 1.0, 0.05
LIMIT = round(DROPOUT * LEVELS)


def lora_cases(name: str) -> list[Case]:
    """The projections of width to width, and from the hidden width of the MLP."""
    size, cases = SIZES[name], []
    T, O = size.ids, size.width  # noqa: E741
    for K in (size.width, size.hidden):
        x, weight, a, b, y = (n * size.dtype.itemsize for n in (T * K, O * K, RANK * K, O * RANK, T * O))
        wide, narrow = 2.0 * T * K * O, 2.0 * T * RANK * (K + O)
        forward = x + weight + a + b + y
        # Operands again, the gradient of y, and those of x, A and B.
        both = forward + (x + weight + a + b) + y + (x + a + b)
        how = (T, K, O, size.dtype)
        rows = [
            ("forward", how, False, forward, wide + narrow),
            ("forward and backward", how, True, both, 2 * wide + 3 * narrow),
        ]
        cases += cases_of("lora", f"{T}x{K} to {O} {name_of(size.dtype)}, rank {RANK}", rows, lora_operation)
    return cases


def lora_operation(draw: Draw, T: int, K: int, O: int, dtype: torch.dtype) -> Operation:  # noqa: E741
    drawn = {"x": (T, K, 1.0), "a": (RANK, K, K**-0.5), "b": (O, RANK, RANK**-0.5), "weight": (O, K, K**-0.5)}
    tensors = [(draw.normal(*shape) * scale).to(dtype) for *shape, scale in drawn.values()]
    seed = int(draw.integers(0, 2**31 - 1, 1))
    kept = random_numbers_ref(seed, T, K, draw.device) >= LIMIT
    factor = LEVELS / (LEVELS - LIMIT)

    def plain(x, a, b, weight, _):
        # The backward of dropout is what its forward is with the mask given, in one call.
        dropped = torch.ops.aten.native_dropout_backward
        return lambda: F.linear(x, weight) + F.linear(F.linear(dropped(x, kept, factor), a), b) * SCALE

    return Operation(
        (*tensors, draw.normal(T, O, dtype=dtype)),
        (True, True, True, False, False),
        lambda x, a, b, weight, _: lambda: lora_linear(x, weight, a, b, SCALE, DROPOUT, seed, draw.impl),
        {PLAIN: plain},
        lambda x, a, b, weight, _: lambda: x @ weight.T + (x * kept) @ a.T @ b.T * (SCALE * factor),
    )

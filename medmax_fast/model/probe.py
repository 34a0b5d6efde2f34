"""Before training starts: packed rows must not see each other, tried on the model and attention that training uses.

Two random sequences share a pack. Every id of one is changed, then every id of the other: the logits of the one that
was left alone must stay the same bit for bit, since nothing of what they are computed from has changed. An attention
that ignores the boundaries, or takes them wrongly by one id, fails this whatever the weights are. What it cannot show
is a leak that does not depend on the neighbour's ids, so each sequence is also compared with itself alone, to within
rounding. Five forward passes of at most 64 ids; no gradient, no dropout, no draw from torch's generators.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from medmax_fast.model.attention import NAME, available
from medmax_fast.model.loss import IGNORE, packed_hidden
from medmax_fast.runtime import InputError

# Unequal and odd, so that no block of a kernel ends where a sequence does.
LENGTHS = (29, 35)
# Largest norm of the difference between a sequence packed and alone, as a share of the norm of its logits. Other shapes
# round differently in every layer: bf16 moves the logits of 32 random layers by 2 to 5 %, fp16 by 0.2 to 0.7 %,
# and fp32 may be TF32 inside. A row that sees its neighbour as its own past moves by about 140 %.
TOLERANCE = {torch.float32: 0.03, torch.float16: 0.1, torch.bfloat16: 0.3}
_INSTEAD = {
    "flash_attn_3": "install another version of FlashAttention 3, or none: flash_attn or torch's own is used then",
    "flash_attn": "install another version of flash_attn, or none: torch's own attention is used then",
    "torch_varlen": "install flash_attn, or use --precision fp32, which attends to one sequence at a time",
    "sdpa": "install another version of torch",
}


def probe_isolation(model: nn.Module, device: torch.device | str, seed: int = 0) -> None:
    """InputError if two sequences of a pack influence each other in `model`; it names the attention and what moved.

    model: a loaded model, a PackedModel, or the engine around one (under ZeRO-3 every rank must call this, since its
    forward pass gathers weights). device: where packed batches go. The model's training modes are left as they were.
    """
    inner = next(module for module in model.modules() if hasattr(module, "lm_head"))
    first, second = _random_sequences(inner.config.vocab_size, seed)
    with torch.no_grad(), _evaluating(model):
        base = _logits(model, inner, [first[0], second[0]], device)
        name = _attention_name(inner, base[0])
        for kept, changed in ((1, 0), (0, 1)):
            found = _logits(model, inner, [first[1], second[0]] if changed == 0 else [first[0], second[1]], device)
            where = f"with the ids of sequence {changed + 1} of a pack changed"
            if moved := _moved(found[kept], base[kept]):
                raise InputError(f"{name}: {where}, sequence {kept + 1} moved {moved}; {_instead(name)}")
            if not _moved(found[changed], base[changed]):
                raise InputError(f"{name}: {where}, no logit of it moved: nothing is known about the model's packing")
        for i, ids in enumerate((first[0], second[0])):
            (alone,) = _logits(model, inner, [ids], device)
            _compare_alone(name, i, base[i], alone)


def _random_sequences(vocab_size: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per sequence its ids, int64 [length], and the same with every id replaced by another one."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for length in LENGTHS:
        ids = torch.randint(vocab_size, (length,), generator=generator)
        step = torch.randint(1, vocab_size, (length,), generator=generator)
        sequences.append((ids, (ids + step) % vocab_size))
    return sequences


def _logits(model: nn.Module, inner: nn.Module, sequences: list[torch.Tensor], device) -> list[torch.Tensor]:
    """Logits [length, vocabulary] of each sequence of one pack."""
    lengths = [len(ids) for ids in sequences]
    ids = torch.cat(sequences)[None].to(device)
    batch = {
        "input_ids": ids,
        "labels": torch.full_like(ids, IGNORE),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32),
        "max_seqlen": max(lengths),
    }
    taken = []

    def take(head: nn.Module, given: tuple, _) -> None:
        # Of a model made ready for training, the head may be in parts.
        blocks = getattr(head, "blocks", None) or [head.weight]
        taken.append(torch.cat([F.linear(given[0], block) for block in blocks], 1))

    # Ahead of the hook by which ZeRO-3 puts the gathered weight away.
    hook = inner.lm_head.register_forward_hook(take, prepend=True)
    try:
        if model is inner:
            inner.lm_head(packed_hidden(inner, batch))
        else:
            model(batch)
    finally:
        hook.remove()
    return list(taken[0].split(lengths))


def _moved(found: torch.Tensor, expected: torch.Tensor) -> str:
    """Which positions differ in any bit, in words; empty where none does."""
    # As integers, so that a NaN equals itself and 0 does not equal -0.
    integer = {2: torch.int16, 4: torch.int32}[found.element_size()]
    rows = (found.view(integer) != expected.view(integer)).any(1).nonzero()[:, 0].tolist()
    if not rows:
        return ""
    largest = (found.float() - expected.float()).abs().nan_to_num().max().item()
    return f"at {len(rows)} of its {len(found)} positions, from number {rows[0] + 1} on, by up to {largest:.2g}"


def _compare_alone(name: str, i: int, packed: torch.Tensor, alone: torch.Tensor) -> None:
    # Where both overflow there is nothing to compare.
    gap = (packed.double() - alone.double()).nan_to_num().norm() / alone.double().nan_to_num().norm()
    limit = TOLERANCE[packed.dtype]
    if not gap <= limit:
        raise InputError(
            f"{name}: sequence {i + 1} of a pack has logits that differ by {gap:.2g} of their norm from those it has "
            f"alone, expected at most {limit:g} in {_dtype_name(packed.dtype)}; {_instead(name)}"
        )


def _attention_name(inner: nn.Module, logits: torch.Tensor) -> str:
    """Such as `attention flash_attn in bfloat16 on cuda`."""
    chosen = inner.config._attn_implementation
    if chosen == NAME:
        chosen = available(logits.device, logits.dtype)
    return f"attention {chosen} in {_dtype_name(logits.dtype)} on {logits.device.type}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _instead(name: str) -> str:
    return _INSTEAD.get(name.split()[1], f"load the model with attn_implementation {NAME!r}")


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training

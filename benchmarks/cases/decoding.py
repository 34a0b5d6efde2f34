"""The kernels of a generation step between its products: norm, RoPE and store, and paged attention; of a 7B model.

A step's kernels are short, so that on a GPU what is timed is the replay of a CUDA graph of several calls, as generation
runs them; "launched" is the same call with what the host needs for it.

Shapes: T ids or S streams, H heads of queries and as many of keys and values, D head width; PAGE positions to a page.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases.case import (
    CAPTURED,
    PLAIN,
    Case,
    Draw,
    Form,
    Quality,
    Work,
    name_of,
    own_first,
    within_twice,
)
from medmax_fast.generate.pages import PAGE
from medmax_fast.kernels.norm_rope_store import norm_rope_store
from medmax_fast.kernels.paged_attention import paged_attention
from medmax_fast.kernels.qk_norm_rope import norm_rope_ref
from medmax_fast.model.decoder import QK_NORM_EPS

GATHERED = "torch, gathered"
POSITIONS = 4096
bf16, fp32 = torch.bfloat16, torch.float32


def own_forms(draw: Draw, call: Callable[[], object], others: dict, captured: int = CAPTURED) -> dict[str, Form]:
    """Ours in a CUDA graph and, on a GPU, launched by the host; then the others."""
    launched = {f"{draw.ours}, launched": Form(call, own=True)} if draw.device == "cuda" else {}
    return own_first(draw, Form(call, own=True, captured=captured), launched | others)


# Ids, heads, head width, type: batches of a decode step and a prompt.
STORE_SIZES = {
    "gpu": [(T, 32, 128, bf16) for T in (1, 16, 64, POSITIONS)],
    "cpu": [(T, 8, 64, fp32) for T in (16, 256)],
    "quick": [(T, 3, 32, fp32) for T in (1, 5)],
}


def norm_rope_store_cases(name: str) -> list[Case]:
    cases = []
    for T, H, D, dtype in STORE_SIZES[name]:
        # q, k and v read and written, cosines and sines, two affine parts, where each id stands and goes.
        moved = 2 * 3 * T * H * D * dtype.itemsize + 4 * T * D + 4 * H * D * dtype.itemsize + 2 * 8 * T
        make = functools.partial(store_work, T=T, H=H, D=D, dtype=dtype)
        cases.append(Case("norm_rope_store", f"{T} ids of 3x{H}x{D} {name_of(dtype)}", moved, 0.0, make))
    return cases


def store_work(draw: Draw, T: int, H: int, D: int, dtype: torch.dtype) -> Work:
    qkv = draw.normal(T, 3 * H * D, dtype=dtype)
    affine = [(base + 0.1 * draw.normal(H, D)).to(dtype) for base in (1, 0, 1, 0)]
    angles = 2 * torch.pi * draw.uniform(POSITIONS, D // 2)
    cos, sin = angles.cos(), angles.sin()
    positions = draw.permutation(POSITIONS)[:T]
    pages = -(-T // PAGE) + 1
    places = draw.permutation(pages * PAGE)[:T]
    k_pages, v_pages = torch.empty(2, pages, H, PAGE, D, dtype=dtype, device=draw.device)

    def ours() -> tuple[torch.Tensor, ...]:
        tensors = qkv, *affine, cos, sin, positions, places, k_pages, v_pages
        return norm_rope_store(*tensors, QK_NORM_EPS, impl=draw.impl), k_pages, v_pages

    def rotated(qkv: torch.Tensor, affine: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        q, k, v = qkv.unflatten(1, (3 * H, D)).split(H, dim=1)
        tables = cos[positions], sin[positions]
        q, k = (norm_rope_ref(x, *affine[i : i + 2], *tables, QK_NORM_EPS) for x, i in ((q, 0), (k, 2)))
        return q, k, v

    def plain() -> tuple[torch.Tensor, ...]:
        q, k, v = rotated(qkv, affine)
        page, at = places // PAGE, places % PAGE
        k_pages[page, :, at], v_pages[page, :, at] = k, v
        return q, k_pages, v_pages

    def stored(found: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        q, *pages = found
        return [q, *(x[places // PAGE, :, places % PAGE] for x in pages)]

    def truth() -> list:
        q, k, _ = rotated(qkv.double(), [x.double() for x in affine])
        return [(..., [torch.cat([q, k])])]

    # As one tensor; a second one would count as a gradient.
    compare = within_twice(truth, read=lambda found: [torch.cat(stored(found)[:2])])

    def judge(work: Work, name: str, found: tuple[torch.Tensor, ...]) -> Quality:
        values = int((stored(found)[2] != qkv.unflatten(1, (3 * H, D))[:, 2 * H :]).sum())
        # The poison that is left: nothing else was written.
        values += abs(sum(int(x.isfinite().sum()) for x in found[1:]) - 2 * T * H * D)
        assert not (work.forms[name].own and values), f"{name}: {values} values of the pages differ"
        return {"values_differing": values} | compare(work, name, found)

    def poison() -> None:
        k_pages.fill_(torch.nan)
        v_pages.fill_(torch.nan)

    if T < POSITIONS:
        return Work(own_forms(draw, ours, {PLAIN: Form(plain, captured=CAPTURED)}), PLAIN, judge, poison)
    # A prompt is not captured.
    return Work(own_first(draw, ours, {PLAIN: plain}), PLAIN, judge, poison)


# Streams, shortest and longest of their lengths, heads, head width, type, columns of the page table, and layers whose
# pages calls take in turn: together larger than the L2 cache, from which they would come otherwise.
ATTENTION_SIZES = {
    "gpu": [
        (1, 1100, 1100, 32, 128, bf16, 64, 15),
        (1, 4096, 4096, 32, 128, bf16, 64, 4),
        (16, 1100, 4096, 32, 128, bf16, 64, 1),
        (64, 1100, 4096, 32, 128, bf16, 64, 1),
    ],
    "cpu": [(4, 300, 900, 8, 64, fp32, 16, 1)],
    "quick": [(1, 70, 70, 4, 32, fp32, 2, 2), (2, 3, 66, 4, 32, fp32, 3, 1)],
}
# In places that no stream holds, keys that draw all attention and values that show it.
POISON = 1e4


def lengths_of(S: int, shortest: int, longest: int) -> list[int]:
    return [shortest + (longest - shortest) * s // max(S - 1, 1) for s in range(S)]


def paged_attention_cases(name: str) -> list[Case]:
    cases = []
    for S, shortest, longest, H, D, dtype, P, layers in ATTENTION_SIZES[name]:
        lengths = lengths_of(S, shortest, longest)
        moved = 2 * (sum(lengths) + S) * H * D * dtype.itemsize
        make = functools.partial(attention_work, lengths=lengths, H=H, D=D, dtype=dtype, P=P, layers=layers)
        context = f"{shortest}" if shortest == longest else f"{shortest}..{longest}"
        shape = f"batch {S}, context {context}, {H}x{D} {name_of(dtype)}"
        cases.append(Case("paged_attention", shape, moved, 0.0, make))
    return cases


def attention_work(draw: Draw, lengths: list[int], H: int, D: int, dtype: torch.dtype, P: int, layers: int) -> Work:
    """A call takes the pages of one layer, the next call those of the next."""
    S, device = len(lengths), draw.device
    counts = [-(-length // PAGE) for length in lengths]
    # Page 0 is nobody's.
    order = (1 + draw.permutation(sum(counts))).int().split(counts)
    table = torch.zeros(S, P, dtype=torch.int32, device=device)
    kv = draw.normal(layers, 2, 1 + sum(counts), H, PAGE, D, dtype=dtype)
    kv[:, :, 0] = POISON
    for s, (length, pages) in enumerate(zip(lengths, order, strict=True)):
        table[s, : len(pages)] = pages
        if length % PAGE:
            kv[:, :, pages[-1].long(), :, length % PAGE :] = POISON
    q = draw.normal(S, H, D, dtype=dtype)
    lengths_S, longest = torch.tensor(lengths, dtype=torch.int32, device=device), max(lengths)
    mask = None
    if min(lengths) < longest:
        mask = (torch.arange(longest, device=device) < lengths_S[:, None])[:, None, None]
    turn = {"layer": 0}

    def in_turn(attend: Callable[..., torch.Tensor], keys_values: list[tuple]) -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            layer, turn["layer"] = turn["layer"], (turn["layer"] + 1) % layers
            return attend(*keys_values[layer])

        return call

    def contiguous(pages: torch.Tensor) -> torch.Tensor:
        """[S, H, longest, D] of all streams; one copy, in the order that attention wants."""
        heads = torch.arange(H, device=device)[:, None]
        at = (table[:, None, : max(counts)].long() * H + heads).flatten()
        return pages.view(-1, PAGE, D).index_select(0, at).view(S, H, -1, D)[:, :, :longest]

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask)[:, :, 0]

    def truth() -> Iterator[tuple[slice, list[torch.Tensor]]]:
        for s, (length, pages) in enumerate(zip(lengths, order, strict=True)):
            k, v = (x[pages.long()].double().transpose(0, 1).reshape(H, -1, D)[:, :length] for x in kv[0])
            weights = (q[s].double()[:, None] @ k.mT * D**-0.5).softmax(-1)
            yield slice(s, s + 1), [(weights @ v).transpose(0, 1)]

    pages = [tuple(layer) for layer in kv]
    ours = in_turn(lambda k, v: paged_attention(q, k, v, table, lengths_S, impl=draw.impl), pages)
    gathered = in_turn(lambda k, v: attend(contiguous(k), contiguous(v)), pages)
    dense = in_turn(attend, [(contiguous(k).contiguous(), contiguous(v).contiguous()) for k, v in pages])
    captured = layers if layers > 1 else CAPTURED
    others = {GATHERED: gathered, "torch, contiguous": dense}
    forms = own_forms(draw, ours, {n: Form(f, captured=captured) for n, f in others.items()}, captured)
    judge = within_twice(truth, (GATHERED,), read=lambda found: [found])
    return Work(forms, GATHERED, judge, lambda: turn.update(layer=0))

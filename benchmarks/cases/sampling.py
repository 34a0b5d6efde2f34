"""The kernels that pick the next ids: of text, and of an image with guidance.

Shapes: R rows of V logits, of an image three times R rows of K.
"""

import functools
from collections.abc import Callable

import torch

from benchmarks.cases.case import REFERENCE, Case, Draw, Quality, Work, name_of
from benchmarks.cases.decoding import bf16, fp32, own_forms
from medmax_fast.generate.requests import Request
from medmax_fast.kernels import sampling
from medmax_fast.kernels.sampling import pick_image, pick_text

TEXTBOOK = "sort and multinomial, launched"
DEFAULTS = Request("", token_ids=[])

# Rows of text, vocabulary, rows of an image, codes, type of the logits.
SAMPLING_SIZES = {
    "gpu": [(R, 65536, 8192, bf16) for R in (1, 64)],
    "cpu": [(8, 65536, 8192, fp32)],
    "quick": [(2, 600, 300, fp32)],
}


def sampling_cases(name: str) -> list[Case]:
    cases = []
    for R, V, K, dtype in SAMPLING_SIZES[name]:
        # Of text a mask of what is allowed, and for each row one of what was seen.
        text = R * V * dtype.itemsize + V + R * V + R * (12 + 4 + 8 + 8 + 8)
        image = 3 * R * K * dtype.itemsize + R * (16 + 4 + 8)
        for shape, moved, make in (
            (f"text, {R}x{V}", text, functools.partial(text_work, R=R, V=V, dtype=dtype)),
            (f"image, 3x{R}x{K}", image, functools.partial(image_work, R=R, K=K, dtype=dtype)),
        ):
            cases.append(Case("sampling", f"{shape} {name_of(dtype)}", moved, 0.0, make))
    return cases


def text_work(draw: Draw, R: int, V: int, dtype: torch.dtype) -> Work:
    logits = 3 * draw.normal(R, V, dtype=dtype)
    # As images are forbidden in text; every row in a slot of its own.
    allowed = (torch.arange(V, device=draw.device) >= V // 8)[None]
    seen, slots = draw.uniform(R, V) < 0.01, draw.permutation(R)
    rules = torch.zeros_like(slots)
    choice = DEFAULTS.repetition_penalty, DEFAULTS.temperature, DEFAULTS.top_p
    settings = torch.tensor(choice, device=draw.device).repeat(R, 1)
    uniforms = draw.uniform(R)

    def scores() -> torch.Tensor:
        x, penalty = logits.float(), settings[:, :1]
        x = torch.where(seen[slots], torch.where(x > 0, x / penalty, x * penalty), x)
        return x.masked_fill(~allowed, -torch.inf)

    def pick(impl: str) -> torch.Tensor:
        return pick_text(logits, allowed, rules, seen, slots, settings, uniforms, impl)

    return picking_work(draw, pick, scores, settings[:, 1:], uniforms)


def image_work(draw: Draw, R: int, K: int, dtype: torch.dtype) -> Work:
    logits, uniforms = 3 * draw.normal(3, R, K, dtype=dtype), draw.uniform(R)
    choice = DEFAULTS.guidance_text, DEFAULTS.guidance_image, DEFAULTS.image_temperature, DEFAULTS.image_top_p
    settings = torch.tensor(choice, device=draw.device).repeat(R, 1)

    def scores() -> torch.Tensor:
        full, image, none = logits.float()
        return none + settings[:, 1:2] * (image - none) + settings[:, :1] * (full - image)

    return picking_work(
        draw, lambda impl: pick_image(logits, settings, uniforms, impl), scores, settings[:, 2:], uniforms
    )


def picking_work(
    draw: Draw,
    pick: Callable[[str], torch.Tensor],
    scores: Callable[[], torch.Tensor],
    settings_R2: torch.Tensor,
    uniforms_R: torch.Tensor,
) -> Work:
    """pick: by an `impl`. scores: fp32 [R, V] before temperature and top_p, which settings_R2 are."""

    def textbook() -> torch.Tensor:
        temperature, top_p = settings_R2.split(1, 1)
        weights, order = (scores() / temperature).softmax(1).sort(1, descending=True)
        weights = weights.masked_fill(weights.cumsum(1) - weights >= top_p, 0)
        return order.gather(1, torch.multinomial(weights, 1))[:, 0]

    reference = functools.cache(lambda: pick("torch"))

    def judge(work: Work, name: str, found: torch.Tensor) -> Quality:
        if name == TEXTBOOK:
            # It draws with random numbers of its own.
            return {}
        rows = (found != reference()).nonzero()[:, 0].tolist()
        for r in rows if work.forms[name].own else []:
            assert drawable(scores()[r], *settings_R2[r].tolist(), float(uniforms_R[r]), int(found[r])), (
                f"{name}: row {r} has id {int(found[r])}, which is no rounding away from {int(reference()[r])}"
            )
        return {"ids_differing": len(rows)}

    others = {REFERENCE: lambda: pick("torch"), TEXTBOOK: textbook}
    return Work(own_forms(draw, lambda: pick(draw.impl), others), TEXTBOOK, judge)


def drawable(x_V: torch.Tensor, temperature: float, top_p: float, uniform: float, picked: int) -> bool:
    """Whether rounding of TOLERANCE in top_p and in the uniform number can lead to this id; in float64."""
    if not 0 <= picked < len(x_V):
        return False
    p = (x_V.double() / temperature).softmax(0)
    ordered, order = p.sort(descending=True, stable=True)
    before = torch.empty_like(p).index_copy_(0, order, ordered.cumsum(0) - ordered)
    for shift in (-sampling.TOLERANCE, sampling.TOLERANCE):
        kept = p * (before < top_p + shift)
        reached = kept.cumsum(0)
        threshold, end = uniform * reached[-1], reached[picked]
        around = end - kept[picked] - sampling.TOLERANCE <= threshold <= end + sampling.TOLERANCE
        if kept[picked] > 0 and around:
            return True
    return False

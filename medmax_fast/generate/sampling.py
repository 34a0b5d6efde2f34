"""From logits to ids: guidance, allowed ids, repetition penalty, temperature, top-p, and the draw itself.

All functions take [N, V] logits of N samples with one setting per sample, so that requests of different settings
share a batch. Each sample draws from a generator of its own, seeded by (seed, request id): what else is in the
batch does not change what it draws.
"""

import hashlib

import torch


def guide(full_NV: torch.Tensor, image_NV: torch.Tensor, none_NV: torch.Tensor, text_scale_N1, image_scale_N1):
    """Three-stream guidance: none + s_image (image - none) + s_text (full - image)."""
    return none_NV + image_scale_N1 * (image_NV - none_NV) + text_scale_N1 * (full_NV - image_NV)


def penalize_repetition(logits_NV: torch.Tensor, seen_NV: torch.Tensor, penalty_N1: torch.Tensor) -> torch.Tensor:
    """Divide positive and multiply negative logits of the ids already in the sequence by the penalty."""
    lowered = torch.where(logits_NV > 0, logits_NV / penalty_N1, logits_NV * penalty_N1)
    return torch.where(seen_NV, lowered, logits_NV)


def keep_top_p(logits_NV: torch.Tensor, top_p_N1: torch.Tensor) -> torch.Tensor:
    """Set to -inf all but the smallest set of likeliest ids whose probability reaches top_p (at least one)."""
    ordered, order = logits_NV.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    ordered = ordered.masked_fill(before >= top_p_N1, float("-inf"))
    return torch.empty_like(logits_NV).scatter_(1, order, ordered)


def make_generator(seed: int, request_id: str) -> torch.Generator:
    """The random stream of one request, on the CPU whatever the device of the model."""
    digest = hashlib.sha256(f"{seed}\n{request_id}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw(logits_NV: torch.Tensor, generators: list[torch.Generator | None]) -> list[int]:
    """One id per sample: the likeliest where its generator is None, else by inverting the cumulative distribution."""
    picked = logits_NV.argmax(-1)
    sampled = [i for i, generator in enumerate(generators) if generator is not None]
    if sampled:
        rows = torch.tensor(sampled, device=logits_NV.device)
        uniform = torch.stack([torch.rand(1, generator=generators[i], dtype=torch.float64) for i in sampled])
        cumulative = logits_NV[rows].double().softmax(-1).cumsum(-1)
        # Scaled by the last value, so that rounding of the sum never leaves the draw past the end.
        threshold = uniform.to(logits_NV.device) * cumulative[:, -1:]
        picked[rows] = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return picked.tolist()

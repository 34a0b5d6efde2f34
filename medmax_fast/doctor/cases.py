"""A small test of every kernel, and of the C++ parts, each beside its reference.

Integers and pixels must be equal to the reference's. Floats may have twice the error that the torch reference has in
the same dtype against float64 (bfloat16 on a GPU, float32 in Triton's interpreter), and a rounding or two, as in the
tests of the package. Data are random and always the same.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

# Distance of neighbouring float32 numbers at 1.
EPS32 = 2.0**-23
# Difference, and the largest that is allowed.
Found = tuple[float, float]


class Draw:
    """Random tensors of a fixed seed on one device; `dtype`: of activations there."""

    def __init__(self, device: str):
        self.device, self.dtype = device, torch.bfloat16 if device == "cuda" else torch.float32
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> torch.Tensor:
        """fp32."""
        return torch.randn(shape, generator=self._generator).to(self.device)

    def near(self, value: float, *shape: int) -> torch.Tensor:
        """Parameters around a value, of `dtype`."""
        return (value + 0.1 * self.normal(*shape)).to(self.dtype)

    def activations(self, *shape: int) -> torch.Tensor:
        """Normal, of `dtype`."""
        return self.normal(*shape).to(self.dtype)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self._generator).to(self.device)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """int64, 0..high-1."""
        return torch.randint(high, shape, generator=self._generator).to(self.device)


# ---- comparisons ----


def equal(found: torch.Tensor, expected: torch.Tensor) -> Found:
    """How many values differ, of which none may."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, (found.shape, found.dtype)
    return float((found.long() != expected.long()).sum()), 0.0


def close(found: list[torch.Tensor], own: list[torch.Tensor], exact: list[torch.Tensor]) -> Found:
    """The largest difference from `exact` (float64), of the tensor where it is largest for what it may be.

    own: what torch makes of the same in the dtype of `found`.
    """
    pairs = []
    for mine, plain, right in zip(found, own, exact, strict=True):
        assert mine.shape == plain.shape == right.shape and mine.dtype == plain.dtype, (mine.shape, mine.dtype)
        away, own_away = ((side.double() - right).abs().max().item() for side in (mine, plain))
        slack = right.abs().max().item() * (torch.finfo(mine.dtype).eps + 3 * EPS32)
        pairs.append((away, 2 * own_away + slack))
    return max(pairs, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / max(pair[1], 1e-300))


def with_gradients(function: Callable, tensors: list[torch.Tensor], gradient: torch.Tensor) -> list[torch.Tensor]:
    """The result of a function and the gradients of its tensors, for a gradient of the result."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    out.backward(gradient.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def three_ways(function: Callable, tensors: list[torch.Tensor]) -> Found:
    """A function of tensors and `impl`: by the kernel, by torch, and by torch in float64; with gradients if it has."""
    wide = [tensor.double() for tensor in tensors]
    return close(function("triton", *tensors), function("torch", *tensors), function("torch", *wide))


# ---- kernels ----


def nearest_code(draw: Draw) -> Found:
    from medmax_fast.kernels.vq import nearest_code

    codebook = draw.normal(300, 32)
    latents = codebook[draw.integers(300, 70)] + 0.3 * draw.normal(70, 32)
    right = torch.cdist(latents.double(), codebook.double()).argmin(1)
    return equal(nearest_code(latents, codebook, impl="triton"), right)


def remap(draw: Draw) -> Found:
    from medmax_fast.kernels.remap import codes_to_ids, ids_to_codes, write_image_spans

    codes = draw.integers(8192, 3, 1024)
    ids = codes_to_ids(codes, 4, impl="triton")
    there, _ = equal(ids, codes + 4)
    back, _ = equal(ids_to_codes(ids, 4, impl="triton"), codes)
    starts = torch.tensor([2070, 7, 1040], device=draw.device)
    buffers = [torch.full((3200,), -1, device=draw.device) for _ in range(2)]
    for buffer, impl in zip(buffers, ("triton", "torch"), strict=True):
        write_image_spans(buffer, starts, codes, 8197, 8196, 4, impl=impl)
    return there + back + equal(*buffers)[0], 0.0


def resample(draw: Draw) -> Found:
    from medmax_fast import _csrc
    from medmax_fast.kernels.resample import plan_resample, resample

    sizes = [(20, 26), (17, 15)]
    kept = [[_csrc.lanczos_weights(size[axis], 12, 2, 8) for size in sizes] for axis in (1, 0)]
    pixels = draw.integers(256, sum(3 * h * w for h, w in sizes)).to(torch.uint8)
    values = torch.arange(256, dtype=torch.uint8, device=draw.device)
    plan = plan_resample(sizes, *kept)
    return equal(*(resample(pixels, plan, values, impl=impl) for impl in ("triton", "torch")))


def group_norm(draw: Draw) -> Found:
    from medmax_fast.kernels.group_norm import add_group_norm_silu_
    from medmax_fast.kernels.sums import Sum

    x, residual = (draw.activations(2, 32, 9, 7).contiguous(memory_format=torch.channels_last) for _ in range(2))
    shift, weight, bias = draw.near(0, 32), draw.near(1, 32), draw.near(0, 32)

    def run(impl: str) -> list[torch.Tensor]:
        return [*add_group_norm_silu_(Sum(x.clone(), shift, residual), weight, bias, 8, 1e-6, impl=impl)]

    total = x.double() + shift.double()[:, None, None] + residual.double()
    normed = F.silu(F.group_norm(total, 8, weight.double(), bias.double(), 1e-6))
    return close(run("triton"), run("torch"), [total, normed])


def rms_norm(draw: Draw) -> Found:
    from medmax_fast.kernels.rms_norm import add_rms_norm_, rms_norm

    dy = draw.activations(5, 96)

    def run(impl: str, x, delta, weight) -> list[torch.Tensor]:
        total = x.clone()
        out = add_rms_norm_(total, delta, weight, 1e-5, impl=impl)
        return [total, out, *with_gradients(lambda *leaves: rms_norm(*leaves, 1e-5, impl=impl), [x, weight], dy)]

    return three_ways(run, [draw.activations(5, 96), draw.activations(5, 96), draw.near(1, 96)])


def qk_norm_rope(draw: Draw) -> Found:
    from medmax_fast.kernels.qk_norm_rope import norm_rope

    angles, dy = 2 * math.pi * draw.uniform(6, 16), draw.activations(6, 3, 32)

    def run(impl: str, *tensors) -> list[torch.Tensor]:
        tables = angles.cos(), angles.sin()
        return with_gradients(lambda *leaves: norm_rope(*leaves, *tables, impl=impl), list(tensors), dy)

    return three_ways(run, [draw.activations(6, 3, 32), draw.near(1, 3, 32), draw.near(0, 3, 32)])


def swiglu(draw: Draw) -> Found:
    from medmax_fast.kernels.swiglu import swiglu

    dy = draw.activations(5, 96)

    def run(impl: str, *tensors) -> list[torch.Tensor]:
        return with_gradients(lambda *leaves: swiglu(*leaves, impl=impl), list(tensors), dy)

    return three_ways(run, [draw.activations(5, 96), draw.activations(5, 96)])


def lora(draw: Draw) -> Found:
    from medmax_fast.kernels.lora import lora_linear

    weight, dy, seed = draw.activations(24, 80), draw.activations(37, 24), 1234567

    def run(impl: str, *tensors) -> list[torch.Tensor]:
        def adapted(x, a, b):
            return lora_linear(x, weight.to(x.dtype), a, b, 0.5, 0.2, seed, impl)

        return with_gradients(adapted, list(tensors), dy)

    return three_ways(run, [draw.activations(37, 80), draw.near(0, 4, 80), draw.near(0, 24, 4)])


def cross_entropy(draw: Draw) -> Found:
    from medmax_fast.kernels.cross_entropy import cross_entropy_

    logits, targets, weights, z_loss = 3 * draw.activations(6, 300), draw.integers(300, 6), draw.uniform(6) + 0.5, 1e-3

    def run(impl: str) -> list[torch.Tensor]:
        written = logits.clone()
        losses, lse = cross_entropy_(written, targets, weights, z_loss, gradient=True, impl=impl)
        return [losses, lse, written]

    leaf = logits.double().requires_grad_()
    losses, lse = F.cross_entropy(leaf, targets, reduction="none"), leaf.logsumexp(1)
    (weights.double() * (losses + z_loss * lse**2)).sum().backward()
    return close(run("triton"), run("torch"), [losses.detach(), lse.detach(), leaf.grad])


def norm_rope_store(draw: Draw) -> Found:
    from medmax_fast.kernels.norm_rope_store import norm_rope_store

    H, D, pages = 3, 32, 4
    angles = 2 * math.pi * draw.uniform(50, D // 2)
    positions, places = draw.integers(50, 5), torch.tensor([3, 17, -1, 40, 63], device=draw.device)

    def run(impl: str, qkv, *affine) -> list[torch.Tensor]:
        k_pages, v_pages = (torch.zeros(pages, H, 16, D, dtype=qkv.dtype, device=qkv.device) for _ in range(2))
        tensors = qkv, *affine, angles.cos(), angles.sin(), positions, places, k_pages, v_pages
        return [norm_rope_store(*tensors, impl=impl), k_pages, v_pages]

    affine = [draw.near(base, H, D) for base in (1, 0, 1, 0)]
    return three_ways(run, [draw.activations(5, 3 * H * D), *affine])


def paged_attention(draw: Draw) -> Found:
    from medmax_fast.kernels.paged_attention import paged_attention

    table = torch.tensor([[4, 1, 0], [2, 3, 5]], dtype=torch.int32, device=draw.device)
    lengths = torch.tensor([20, 41], dtype=torch.int32, device=draw.device)

    def run(impl: str, q, k_pages, v_pages) -> list[torch.Tensor]:
        return [paged_attention(q, k_pages, v_pages, table, lengths, impl=impl)]

    return three_ways(run, [draw.activations(2, 4, 32), *(draw.activations(6, 2, 16, 32) for _ in range(2))])


def sampling_text(draw: Draw) -> Found:
    from medmax_fast.kernels.sampling import pick_text

    R, V = 6, 500
    allowed, seen = draw.uniform(2, V) < 0.8, draw.uniform(3, V) < 0.1
    settings = torch.tensor([[1.2, 1.0, 0.9], [1.0, 0.7, 1.0], [1.1, 0.0, 1.0]], device=draw.device).repeat(2, 1)
    rows = draw.integers(2, R), seen, draw.integers(3, R), settings, draw.uniform(R)
    logits = 3 * draw.activations(R, V)
    return equal(*(pick_text(logits, allowed, *rows, impl=impl) for impl in ("triton", "torch")))


def sampling_image(draw: Draw) -> Found:
    from medmax_fast.kernels.sampling import pick_image

    settings = torch.tensor([[3.0, 1.2, 0.7, 0.9], [3.0, 1.2, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]], device=draw.device)
    logits, uniforms = draw.activations(3, 3, 512), draw.uniform(3)
    return equal(*(pick_image(logits, settings, uniforms, impl=impl) for impl in ("triton", "torch")))


# ---- C++ ----


def resize(draw: Draw) -> Found:
    from PIL import Image

    from medmax_fast.data.resize import fit, fit_ref

    pixels = draw.integers(256, 520, 640, 3).to("cpu", torch.uint8).numpy()
    return float((fit(pixels) != fit_ref(Image.fromarray(pixels))).sum()), 0.0


def collator(draw: Draw) -> Found:
    from medmax_fast.data.collate import LABEL_POLICIES, collate, collate_ref

    lengths = draw.integers(60, 40).cpu().numpy()
    offsets = np.concatenate([[0], lengths.cumsum()])
    ids, eot = draw.integers(9, int(offsets[-1])).cpu().numpy().astype(np.uint16), 3
    rows, differing = np.random.default_rng(0).permutation(40), 0
    for labels in LABEL_POLICIES:
        ours, plain = (function(ids, offsets, rows, eot, labels=labels) for function in (collate, collate_ref))
        for name, expected in dataclasses.asdict(plain).items():
            differing += int(np.sum(np.asarray(getattr(ours, name) != expected)))
    return float(differing), 0.0


def planner(draw: Draw) -> Found:
    from medmax_fast.data.packing import plan_epoch, plan_epoch_ref

    lengths = draw.integers(3000, 2000).cpu().numpy()
    ours, plain = (function(lengths, 4096, 1, 2) for function in (plan_epoch, plan_epoch_ref))
    assert len(ours) == len(plain), (len(ours), len(plain))
    return float((ours.rows != plain.rows).sum() + (ours.offsets != plain.offsets).sum()), 0.0


KERNELS = {
    "nearest code": nearest_code,
    "codes to ids and back": remap,
    "resample": resample,
    "group norm, SiLU": group_norm,
    "RMS norm": rms_norm,
    "query/key norm, RoPE": qk_norm_rope,
    "SwiGLU": swiglu,
    "LoRA projection": lora,
    "cross-entropy": cross_entropy,
    "norm, RoPE, store": norm_rope_store,
    "paged attention": paged_attention,
    "sampling of text": sampling_text,
    "sampling of pictures": sampling_image,
}
EXTENSION = {"resize": resize, "collator": collator, "planner": planner}

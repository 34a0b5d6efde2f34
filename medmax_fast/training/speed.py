"""How well a run uses its GPUs: model FLOP utilization (MFU), and the most memory a process has held.

    MFU = ids per second of all ranks x FLOP per id / (ranks x peak FLOP/s of one GPU)

FLOP per id are those of the matrix products with N weights: 2 N forward, 2 N for the gradient of their inputs, and
2 N for their own gradient if they are trained (Kaplan et al. 2020, arXiv:2001.08361, section 2.1). N counts the linear
layers and the head, not the embedding, which is looked up, nor the norms. As in PaLM (Chowdhery et al. 2022,
arXiv:2204.02311, appendix B), the head counts for every id, and what is computed again under activation
checkpointing does not count: MFU compares ids per second, so work that an implementation saves raises it and work
that it adds lowers it. Unlike there, attention scores are left out: they depend on how long the packed rows are.
"""

import re
from pathlib import Path

import torch

from medmax_fast.model.layout import ModelShape

# Dense peaks in TFLOP/s by the name that CUDA reports: (pattern, bf16 and fp16 tensor cores with fp32 accumulation,
# fp32 outside tensor cores). The first match counts. Sources: NVIDIA's datasheet of each card, halved where only the
# figure with sparsity is given (H100, H200, L4); the Blackwell architecture brief; for GeForce the GA102, Ada and
# RTX Blackwell whitepapers. None: not known for certain.
PEAKS = (
    (r"GB200", 2500, None),
    (r"B200", 2250, None),
    (r"GH200.*", 989, 67),
    (r"H200 NVL", 835, 60),
    (r"H200", 989, 67),
    (r"H100 NVL", 835, 60),
    (r"H100 PCIe", 756, 51),
    (r"H100( \d+GB HBM3)?", 989, 67),
    (r"A100\b.*", 312, 19.5),
    (r"A40", 149.7, 37.4),
    (r"A30", 165, 10.3),
    (r"A10G", 70, None),
    (r"A10", 125, 31.2),
    (r"L40S", 362, 91.6),
    (r"L40", 181, 90.5),
    (r"L4", 121, 30.3),
    (r"RTX A6000", 154.8, 38.7),
    (r"GeForce RTX 5090", 209.5, 104.8),
    (r"GeForce RTX 4090", 165.2, 82.6),
    (r"GeForce RTX 3090", 71, 35.6),
)


def linear_parameters(shape: ModelShape) -> tuple[int, int]:
    """Weights of the linear layers of all blocks, and of the head: together the N of the module's formula.

    For 7B 6,476,005,376 and 268,435,456, N = 6.74e9: all 7,013,666,816 parameters less the embedding and the norms.
    """
    attention = 2 * shape.dim * shape.dim + 2 * shape.dim * shape.kv_heads * shape.head_dim
    return shape.layers * (attention + 3 * shape.dim * shape.hidden), shape.dim * shape.vocab_size


def flops_per_token(shape: ModelShape, full: bool, head_share: float = 1.0) -> float:
    """FLOP of training on one id: 6 N if all weights are trained, 4 N for LoRA, whose own weights are left out.

    head_share: share of the ids that the head counts for. The default is the published convention; with the share of
    supervised ids the result is what is really multiplied, since the head runs on those only (7B: 4 % less at most).
    """
    blocks, head = linear_parameters(shape)
    return (6 if full else 4) * (blocks + head_share * head)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense peak FLOP/s of one GPU in `dtype`; None for a CPU and where it is not known."""
    return peak_of_name(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def peak_of_name(name: str, dtype: torch.dtype) -> float | None:
    """Dense peak FLOP/s of the GPU that CUDA calls `name`, such as `NVIDIA H100 80GB HBM3`.

    float32 is the peak without TF32, which training leaves off. None for another card or dtype, and for a MIG slice.
    """
    plain = name.removeprefix("NVIDIA ")
    for pattern, half, single in PEAKS:
        if re.fullmatch(pattern, plain) and "MIG" not in plain:
            tera = {torch.bfloat16: half, torch.float16: half, torch.float32: single}.get(dtype)
            return tera and tera * 1e12
    return None


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None, world: int) -> float | None:
    """Model FLOP utilization as a fraction of the peak of `world` GPUs; None without a peak.

    tokens_per_second: ids of all ranks. peak: FLOP/s of one GPU.
    """
    return tokens_per_second * flops_per_token / (peak * world) if peak else None


def peak_memory_gib(device: torch.device) -> float:
    """The most GiB this process has held: in tensors on a GPU (torch's cache apart), resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # Not getrusage's ru_maxrss: it begins with what the parent held when it started this process.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(kilobytes) / 2**20

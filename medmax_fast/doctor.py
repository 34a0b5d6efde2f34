"""`medmax doctor`: which accelerated paths are active on this machine, and what to install for those that are not."""

import importlib.util
import os
import shutil
from importlib import metadata

from medmax_fast.config import DoctorConfig
from medmax_fast.runtime import versions

_EVAL = "pip install 'medmax_fast[eval]'"


def doctor(config: DoctorConfig) -> dict:
    """A table of paths (name, active, what is used, why or what to install), and the versions they rest on."""
    import torch

    from medmax_fast._csrc import has_avx2
    from medmax_fast.data import dali
    from medmax_fast.eval import similarity, text_metrics

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {os.cpu_count()} cores",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "free_disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "paths": [
            _path(
                "resize, packing, collator (C++)", True, f"medmax_fast._csrc, {'AVX2' if has_avx2() else 'no AVX2'}", ""
            ),
            _attention(device),
            _triton(device),
            _path("DALI decoding", not dali.available("cpu"), "nvImageCodec beside Pillow", dali.available("cpu")),
            _path("nvJPEG decoding (--fast)", not dali.available("mixed"), "nvImageCodec", dali.available("mixed")),
            _path("DICOM", _has("pydicom"), "pydicom", "pip install 'medmax_fast[dicom]'"),
            _path(
                "training", _has("deepspeed") and _has("peft"), "DeepSpeed, peft", "pip install 'medmax_fast[train]'"
            ),
            _path("captured decode steps", device.type == "cuda", "CUDA graphs", "no GPU: steps run as they are"),
            _path("8-bit weights", _has("torchao"), "torchao", "pip install 'medmax_fast[quant]'"),
            _path("servers and judges", _has("httpx"), "httpx", _EVAL),
            _path("BiomedCLIP similarities", not similarity.available(), "open_clip", _clip()),
            _path("BLEU and ROUGE", not text_metrics.missing(), "sacrebleu, rouge-score", _EVAL),
            _path("FID and KID", _has("torchmetrics"), "torchmetrics", _EVAL),
            _self_test(device),
        ],
        "versions": versions(),
    }


def _path(name: str, active: bool, uses: str, otherwise: str) -> dict:
    return {
        "path": name,
        "active": "yes" if active else "no",
        "uses": uses if active else "-",
        "note": otherwise * (not active),
    }


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _clip() -> str:
    """Why there is no BiomedCLIP, and what serves in its place."""
    from medmax_fast.eval import similarity

    return f"{similarity.available()}; --clip takes CLIP and SigLIP models of transformers"


def _attention(device) -> dict:
    import torch

    from medmax_fast.model.attention import available

    impl = available(device, torch.bfloat16)
    words = {
        "flash_attn_3": "FlashAttention 3",
        "flash_attn": f"flash-attn {metadata.version('flash-attn')}" if _has("flash_attn") else "",
        "torch_varlen": "torch.nn.attention.varlen",
        "sdpa": "scaled dot-product attention, sequence by sequence",
    }
    why = {
        "flash_attn_3": "",
        "flash_attn": "",
        "torch_varlen": "flash-attn is not installed; torch's own kernel serves",
        "sdpa": "no GPU" if device.type == "cpu" else "needs torch 2.10 or later",
    }
    row = _path("packed attention", impl != "sdpa", words[impl], "")
    return row | {"uses": words[impl], "note": why[impl]}


def _triton(device) -> dict:
    if not _has("triton"):
        row = _path("Triton kernels", False, "", "pip install 'medmax_fast[gpu]'")
    elif device.type == "cpu":
        row = _path("Triton kernels", False, "", "no GPU")
    else:
        row = _path("Triton kernels", True, f"triton {metadata.version('triton')}", "")
    return row if row["active"] == "yes" else row | {"uses": "the torch reference of each kernel"}


def _self_test(device) -> dict:
    """Nearest codes of random latents against a float64 search: the kernel that decides every token."""
    import torch

    from medmax_fast.kernels.vq import nearest_code

    generator = torch.Generator().manual_seed(0)
    z_ND = torch.randn(257, 256, generator=generator)
    codebook_KD = torch.randn(8192, 256, generator=generator)
    found = nearest_code(z_ND.to(device), codebook_KD.to(device)).cpu()
    right = torch.cdist(z_ND.double(), codebook_KD.double()).argmin(1)
    wrong = int((found != right).sum())
    return _path("nearest-code self-test", wrong == 0, "257 of 257 right", f"{wrong} of 257 codes wrong on {device}")

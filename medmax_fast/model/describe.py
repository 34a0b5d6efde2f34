"""What `medmax inspect` says of a checkpoint: layout, sizes, parameters per part, vocabulary, checksums, hash."""

import hashlib
from pathlib import Path

from medmax_fast.config import InspectConfig
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.checkpoint_base import hash_tensor
from medmax_fast.model.files import is_finite
from medmax_fast.model.layout import MAX_POSITIONS
from medmax_fast.vocab import IdLayout

# Part of the model -> what the Hugging Face names of its tensors contain; the first that fits.
PARTS = {
    "embeddings": "embed_tokens",
    "attention": "_proj.weight",
    "qk norms": "_norm.",
    "norms": "norm.weight",
    "head": "lm_head",
}
VQGAN_PARTS = {"vqgan encoder": ("encoder.", "quant_conv."), "vqgan codebook": ("quantize.",), "vqgan decoder": ("",)}


def describe_checkpoint(config: InspectConfig) -> dict:
    """Facts of a checkpoint folder in either layout; every tensor is read, and every recorded checksum compared.

    InputError names a file that differs from its checksum, or a tensor that is missing, unexpected or mis-shaped.
    """
    checkpoint = open_checkpoint(config.path)
    checkpoint.check_names()
    sums = checkpoint.verify()
    vqgan = checkpoint.vqgan_state()
    digest, dtypes, not_finite, counted = hashlib.sha256(), {}, [], []
    for key in checkpoint.stream("reading tensors"):
        hash_tensor(digest, key.hf, checkpoint.tensor(key.hf))
        if not is_finite(checkpoint.tensor(key.hf)):
            not_finite.append(key.hf)
        like = checkpoint.meta(key.hf)
        dtypes[like.dtype] = None
        counted.append((_part(key.hf), like.numel(), like.nbytes))
    model = sum(count for _, count, _ in counted)
    for name, tensor in sorted(vqgan.items(), key=lambda item: list(VQGAN_PARTS).index(_vqgan_part(item[0]))):
        if not is_finite(tensor):
            not_finite.append(name)
        counted.append((_vqgan_part(name), tensor.numel(), tensor.nbytes))
    files = _files(checkpoint.path, sums)
    shape, layout = checkpoint.shape, IdLayout.from_file(checkpoint.tokenizer_path)
    return {
        "checkpoint": config.path,
        "layout": checkpoint.layout,
        "bytes": sum(file["bytes"] for file in files),
        "dtype": ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
        "parameters": model,
        "layers": shape.layers,
        "dim": shape.dim,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden": shape.hidden,
        "rope_theta": shape.rope_theta,
        "norm_eps": shape.norm_eps,
        "swin_norm": shape.swin_norm,
        "positions": MAX_POSITIONS,
        "vocabulary": shape.vocab_size,
        "image_ids": f"{layout.image_start}..{layout.image_end - 1}",
        "boi": layout.boi,
        "eoi": layout.eoi,
        "eot": layout.eot,
        "text_ids": f"{layout.text_start}..{layout.vocab_size - 1}",
        "can_draw": any(name.startswith("decoder.") for name in vqgan),
        "sha256": digest.hexdigest(),
        "checked_files": len(sums),
        "not_finite": ", ".join(not_finite) or "none",
        "parts": _table(counted),
        "files": files,
    }


def _part(name: str) -> str:
    if ".mlp." in name:
        return "mlp"
    return next(part for part, text in PARTS.items() if text in name)


def _vqgan_part(name: str) -> str:
    return next(part for part, starts in VQGAN_PARTS.items() if name.startswith(starts))


def _table(counted: list[tuple[str, int, int]]) -> list[dict]:
    """Tensors, parameters and bytes of each part, in the order of the model."""
    rows: dict[str, dict] = {}
    for part, count, size in counted:
        row = rows.setdefault(part, {"part": part, "tensors": 0, "parameters": 0, "bytes": 0})
        row["tensors"] += 1
        row["parameters"] += count
        row["bytes"] += size
    return list(rows.values())


def _files(folder: Path, sums: dict[Path, str]) -> list[dict]:
    """Every file of the folder with its size and the checksum that it agrees with."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {"file": str(p.relative_to(folder)), "bytes": p.stat().st_size, "md5": sums.get(p, "not recorded")}
        for p in paths
    ]

"""LoRA adapters: put into a model for training, and written in peft's own format.

An adapter folder holds adapter_config.json and adapter_model.safetensors, which peft loads as they are, and
base.json with a fingerprint of the checkpoint it was trained on, so that merging into another base is noticed.
"""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from medmax_fast.config import TrainConfig
from medmax_fast.model.checkpoint import LAYER_KEYS, Checkpoint
from medmax_fast.runtime import InputError, atomic_path, write_json

WEIGHTS_FILE, BASE_FILE = "adapter_model.safetensors", "base.json"
# Name of the adapter inside peft's modules; it is not part of the names in the file.
_ADAPTER = "default"
# Values taken from each tensor for the fingerprint.
_SAMPLES = 4096


def add_adapter(model: nn.Module, config: TrainConfig) -> None:
    """Put a LoRA adapter on the chosen projections, in place; everything else is frozen.

    The initial weights depend on `config.seed` alone. InputError: an unknown target, or peft is not installed.
    """
    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise InputError(f"LoRA training needs peft ({error}): pip install 'medmax_fast[train]'") from error
    torch.manual_seed(config.seed)
    inject_adapter_in_model(_peft_config(config), model, _ADAPTER)


def lora_targets(text: str) -> list[str]:
    """The projections named in a comma-separated list, each once; InputError for one that no layer has."""
    known = [key.hf.split(".")[1] for key in LAYER_KEYS if "_proj." in key.hf]
    targets = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in targets if name not in known]
    if unknown or not targets:
        raise InputError(f"--lora-targets {','.join(unknown) or 'without a name'}: expected some of {','.join(known)}")
    return sorted(set(targets))


def save_adapter(state: dict[str, torch.Tensor], folder: str | Path, config: TrainConfig, base: dict) -> None:
    """Write an adapter folder, atomically.

    state: lora weights under the names they have in the model (`model.layers.0...lora_A.default.weight`);
    base: what is recorded about the checkpoint, `base_identity` of it at least.
    """
    peft_config = _peft_config(config)
    peft_config.base_model_name_or_path = config.ckpt
    peft_config.inference_mode = True
    renamed = {f"base_model.model.{n.replace(f'.{_ADAPTER}.', '.')}": t.contiguous() for n, t in state.items()}
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        peft_config.save_pretrained(str(temporary))
        save_file(renamed, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(temporary / BASE_FILE, base)


def _peft_config(config: TrainConfig):
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lora_targets(config.lora_targets),
        bias="none",
        task_type="CAUSAL_LM",
    )


def base_identity(checkpoint: Checkpoint) -> dict:
    """{"fingerprint": sha256} over names, shapes and 4,096 evenly spaced values of every language-model tensor.

    It is the same for both layouts of the same weights and takes seconds where hashing a 14 GB file takes a minute;
    it tells checkpoints apart, it does not protect against a damaged file.
    """
    digest = hashlib.sha256()
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, min(_SAMPLES, flat.numel()), dtype=torch.float64).long()
        digest.update(flat[places].float().numpy().tobytes())
    return {"fingerprint": digest.hexdigest()}

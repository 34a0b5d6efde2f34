"""LoRA adapters: put into a model for training, and written in peft's own format.

An adapter folder holds adapter_config.json and adapter_model.safetensors, which peft loads as they are, and base.json
with the hash of the checkpoint it was trained on, so that merging into another base is noticed.

peft names and fills the weights; its modules' way of computing is replaced (`fuse_adapter`) by one function for a
projection and its adapter.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from medmax_fast.config import TrainConfig
from medmax_fast.files import atomic_path, write_json
from medmax_fast.kernels.lora import draw_seed, lora_linear
from medmax_fast.model.layout import LAYER_KEYS
from medmax_fast.runtime import InputError, comma_list

CONFIG_FILE, WEIGHTS_FILE, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "base.json"
# Name of the adapter inside peft's modules; it is not part of the names in the file.
_ADAPTER = "default"


class LoraLinear(nn.Module):
    """A projection and its adapter in one (kernels.lora), made of the parts of peft's module under their names.

    The modules that own the weights never run, so ZeRO-3 has to be told that this one reads them (training.engine).
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        assert layer.base_layer.bias is None and list(layer.lora_A) == [_ADAPTER]
        self.base_layer, self.lora_A, self.lora_B = layer.base_layer, layer.lora_A, layer.lora_B
        self.scale = layer.scaling[_ADAPTER]
        # peft has an identity in place of a dropout of 0.
        self.dropout = getattr(layer.lora_dropout[_ADAPTER], "p", 0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.base_layer.weight, self.lora_A[_ADAPTER].weight, self.lora_B[_ADAPTER].weight
        if not (self.training and self.dropout):
            return lora_linear(x, *weights, self.scale)
        return lora_linear(x, *weights, self.scale, self.dropout, draw_seed())


def add_adapter(model: nn.Module, config: TrainConfig) -> None:
    """Put a LoRA adapter on the chosen projections, in place; everything else is frozen.

    The initial weights depend on `config.seed` alone.
    """
    from peft import inject_adapter_in_model

    torch.manual_seed(config.seed)
    inject_adapter_in_model(_peft_config(config), model, _ADAPTER)


def adapted(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name in it, module) of every projection that is a module of peft."""
    from peft.tuners.lora import Linear

    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, Linear):
                yield parent, name, module


def fuse_adapter(model: nn.Module) -> None:
    """Replace the modules that `add_adapter` has put in by LoraLinear, in place; names of weights stay."""
    for parent, name, module in adapted(model):
        setattr(parent, name, LoraLinear(module))


def check_lora(config: TrainConfig) -> None:
    """InputError for an unknown target, or if peft is not installed."""
    lora_targets(config.lora_targets)
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise InputError(f"LoRA training needs peft ({error}): pip install 'medmax_fast[train]'") from error


def lora_targets(text: str) -> list[str]:
    """The projections named in a comma-separated list, each once; InputError for one that no layer has."""
    known = [key.hf.split(".")[1] for key in LAYER_KEYS if "_proj." in key.hf]
    targets = comma_list(text)
    unknown = [name for name in targets if name not in known]
    if unknown or not targets:
        raise InputError(f"--lora-targets {','.join(unknown) or 'without a name'}: expected some of {','.join(known)}")
    return sorted(set(targets))


def save_adapter(
    state: dict[str, torch.Tensor],
    saved: dict[str, torch.Tensor],
    folder: str | Path,
    config: TrainConfig,
    base_sha256: str,
) -> None:
    """Write an adapter folder, atomically.

    state: lora weights under the names they have in the model (`model.layers.0...lora_A.default.weight`).
    saved: whole weights that were trained beside them, by checkpoint name. base_sha256: Checkpoint.sha256 of the base.
    """
    peft_config = _peft_config(config)
    peft_config.base_model_name_or_path = config.ckpt
    peft_config.inference_mode = True
    peft_config.modules_to_save = [name.removesuffix(".weight").rpartition(".")[2] for name in saved] or None
    renamed = {n.replace(f".{_ADAPTER}.", "."): t for n, t in state.items()} | saved
    renamed = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in renamed.items()}
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        peft_config.save_pretrained(str(temporary))
        write_json(temporary / BASE_FILE, {"sha256": base_sha256})
        save_file(renamed, temporary / WEIGHTS_FILE, metadata={"format": "pt"})


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

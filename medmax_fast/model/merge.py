"""Merging a LoRA adapter into its base: W + scale * B A, in fp32, rounded once to the base's dtype.

scale = alpha / rank (alpha / sqrt(rank) with rsLoRA), read per module from adapter_config.json with its rank and
alpha patterns, as peft applies them.
"""

import math
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from medmax_fast.config import MergeConfig
from medmax_fast.model.adapter import BASE_FILE, CONFIG_FILE, WEIGHTS_FILE
from medmax_fast.model.checkpoint import Checkpoint, open_checkpoint
from medmax_fast.model.convert import write_checkpoint
from medmax_fast.runtime import InputError, read_json, require_file

PREFIX = "base_model.model."


def merge(config: MergeConfig) -> dict:
    """Write the base checkpoint with the adapter merged in, in the layout of the base; returns a summary."""
    base = open_checkpoint(config.ckpt)
    base.verify()
    adapter = Adapter(find_adapter(config.adapter))
    adapter.check_base(base)
    write_checkpoint(base, config.output, base.layout, transform=adapter.apply)
    return {"ckpt": config.ckpt, "adapter": str(adapter.path), "modules": len(adapter.modules), "output": config.output}


def find_adapter(path: str | Path) -> Path:
    """The adapter folder itself, or the one inside a run folder."""
    for folder in (Path(path), Path(path) / "adapter"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise InputError(f"{path}: no adapter_config.json there or in adapter/")


class Adapter:
    """A peft LoRA adapter read from a folder."""

    def __init__(self, path: Path):
        self.path = path
        self.config = read_json(path / CONFIG_FILE)
        if self.config.get("peft_type") != "LORA":
            raise InputError(f"{path}: adapter of type {self.config.get('peft_type')!r}, expected LORA")
        for name in ("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora"):
            if self.config.get(name):
                raise InputError(f"{path}: adapter_config.json sets {name}, which cannot be merged here")
        try:
            tensors = load_file(require_file(path / WEIGHTS_FILE))
        except SafetensorError as error:
            raise InputError(f"{path / WEIGHTS_FILE}: not a safetensors file ({error})") from error
        # LoRA pairs by module, and whole weights (modules_to_save) by tensor name.
        self.modules: dict[str, dict[str, torch.Tensor]] = {}
        self.saved: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            plain = name.removeprefix(PREFIX)
            module, _, part = plain.rpartition(".lora_")
            if module and part in ("A.weight", "B.weight"):
                self.modules.setdefault(module, {})[part[0]] = tensor
            elif ".lora_" in plain:
                raise InputError(f"{path}: tensor {name} is of a kind of LoRA that cannot be merged here")
            else:
                self.saved[plain.replace(".modules_to_save", "")] = tensor

    def scale(self, module: str, rank: int) -> float:
        """The factor of B A for one module."""
        expected = self._pattern("rank_pattern", module, self.config["r"])
        if rank != expected:
            raise InputError(f"{self.path}: {module} has rank {rank}, adapter_config.json says {expected}")
        alpha = self._pattern("alpha_pattern", module, self.config["lora_alpha"])
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _pattern(self, table: str, module: str, default):
        """peft's rule: the first pattern that matches the end of the module's name."""
        for pattern, value in (self.config.get(table) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    def check_base(self, base: Checkpoint) -> None:
        """InputError for an adapter made on another base or with modules that this one lacks."""
        recorded = self.path / BASE_FILE
        if recorded.exists() and read_json(recorded)["sha256"] != base.sha256():
            raise InputError(f"{self.path}: trained on another base checkpoint than {base.path} (weights differ)")
        names = set(base.names())
        wanted = [f"{module}.weight" for module in self.modules] + list(self.saved)
        unknown = next((name for name in wanted if name not in names), None)
        if unknown:
            raise InputError(f"{self.path}: adapts {unknown}, which {base.path} does not have")
        for module, pair in self.modules.items():
            if set(pair) != {"A", "B"}:
                raise InputError(f"{self.path}: {module} lacks one of lora_A and lora_B")

    def apply(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The merged tensor of a Hugging Face name, in the dtype of the base."""
        if name in self.saved:
            if self.saved[name].shape != tensor.shape:
                found, wanted = tuple(self.saved[name].shape), tuple(tensor.shape)
                raise InputError(f"{self.path}: {name} has shape {found}, the base {wanted}")
            return self.saved[name].to(tensor.dtype)
        pair = self.modules.get(name.removesuffix(".weight"))
        if pair is None:
            return tensor
        a, b = pair["A"].float(), pair["B"].float()
        if (b.shape[0], a.shape[1]) != tensor.shape or a.shape[0] != b.shape[1]:
            found = (b.shape[0], a.shape[1])
            raise InputError(
                f"{self.path}: {name} would change by a matrix {found}, the base has {tuple(tensor.shape)}"
            )
        scale = self.scale(name.removesuffix(".weight"), a.shape[0])
        return (tensor.float() + scale * (b @ a)).to(tensor.dtype)

"""`medmax merge`: a LoRA adapter, or what a DeepSpeed folder holds, put into its base and written in either layout."""

from pathlib import Path

import torch

from medmax_fast.config import MergeConfig
from medmax_fast.files import SETTINGS_FILE, read_object
from medmax_fast.model.adapter import BASE_FILE, CONFIG_FILE, WEIGHTS_FILE
from medmax_fast.model.checkpoint import Checkpoint, open_checkpoint
from medmax_fast.model.checkpoint_base import Changed
from medmax_fast.model.convert import check_target, write_checkpoint
from medmax_fast.model.files import SafetensorsFile, TorchFile
from medmax_fast.model.trained import Trained
from medmax_fast.model.zero import ZeroWeights, find_zero
from medmax_fast.runtime import InputError, pick_dtype

# peft's older format.
PICKLED_FILE = "adapter_model.bin"


def merge(config: MergeConfig) -> dict:
    """Write the base checkpoint with what was trained in its place; returns a summary."""
    base = open_checkpoint(config.ckpt, config.vqgan)
    layout = base.layout if config.to == "base" else config.to
    check_target(config, layout)
    base.verify()
    source, rules = open_trained(config.adapter)
    # What was frozen is what the base holds, maybe in more bits.
    names = [name for name in source.names() if name not in getattr(source, "frozen", ())]
    trained = Trained(names, source.tensor, source.path, base, rules)
    if not (trained.lora or trained.whole or trained.rows):
        raise InputError(f"{source.path}: no weight in it was trained, so there is nothing to merge")
    _check_base(source.path, rules, base)

    def dtype(_: str, stored: torch.dtype) -> torch.dtype:
        return stored if config.dtype == "base" else pick_dtype(config.dtype)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return trained.apply(name, tensor, dtype(name, tensor.dtype))

    write_checkpoint(Changed(base, change, dtype, source.release), config.output, layout, config.shards)
    return {
        "ckpt": config.ckpt,
        "adapter": str(source.path),
        "modules": len(trained.lora),
        "tensors": len(trained.whole) + len(trained.rows),
        "to": layout,
        "output": config.output,
    }


def open_trained(path: str | Path):
    """(tensors, rules) of an adapter folder, a run folder that holds one, or a DeepSpeed checkpoint.

    tensors has names(), tensor(name), release() and a path. rules: the adapter_config.json, or what corresponds to it.
    """
    path, zero = Path(path), find_zero(path)
    for folder in (path, path / "adapter"):
        files = [file for file in (folder / WEIGHTS_FILE, folder / PICKLED_FILE) if file.is_file()]
        if (folder / CONFIG_FILE).is_file() and (files or not zero):
            rules = read_rules(folder / CONFIG_FILE)
            kind = TorchFile if files and files[0].name == PICKLED_FILE else SafetensorsFile
            return kind(folder / (files[0].name if files else WEIGHTS_FILE)), rules
    if zero:
        return ZeroWeights(zero), _rules_beside(zero)
    if (path / "model").is_dir():
        raise InputError(f"{path}: a run that has trained a whole model, {path / 'model'}; nothing is to be merged")
    steps = sorted((path / "checkpoints").glob("step-*"))
    hint = f"; one of its checkpoints will do, such as {steps[-1]}" if steps else ""
    raise InputError(f"{path}: neither adapter_config.json (there or in adapter/) nor DeepSpeed's files{hint}")


def read_rules(path: Path) -> dict:
    """An adapter_config.json; InputError for a kind of adapter that cannot be merged."""
    rules = read_object(path)
    if rules.get("peft_type") != "LORA":
        raise InputError(f"{path.parent}: adapter of type {rules.get('peft_type')!r}, expected LORA")
    for name in ("use_dora", "fan_in_fan_out", "lora_bias", "use_qalora", "target_parameters"):
        if rules.get(name):
            raise InputError(f"{path.parent}: {path.name} sets {name}, which cannot be merged here")
    return rules


def _rules_beside(zero: Path) -> dict:
    """The LoRA rules of a DeepSpeed checkpoint, from the folders around it: transformers' Trainer or `medmax train`."""
    for folder in (zero, *zero.absolute().parents):
        if (folder / CONFIG_FILE).is_file():
            return read_rules(folder / CONFIG_FILE)
        if (folder / SETTINGS_FILE).is_file():
            settings = read_object(folder / SETTINGS_FILE).get("settings", {})
            names = {"r": "lora_rank", "lora_alpha": "lora_alpha", "base_sha256": "ckpt"}
            return {name: settings[recorded] for name, recorded in names.items() if recorded in settings}
    return {}


def _check_base(path: Path, rules: dict, base: Checkpoint) -> None:
    """InputError if the base is not the one whose hash was recorded in training."""
    beside = path.parent / BASE_FILE
    recorded = read_object(beside)["sha256"] if beside.is_file() else rules.get("base_sha256")
    if recorded and base.sha256("comparing with the adapter's base") != recorded:
        raise InputError(f"{path.parent}: trained on another base checkpoint than {base.path} (weights differ)")

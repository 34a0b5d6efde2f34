"""DeepSpeed, and everything that knows about it: processes, configuration, engine, its checkpoints.

The package is imported here only, when training starts. On a CPU it would compile an operator of its own for half a
minute; torch's collectives and torch's AdamW are used instead. Its load_checkpoint unpickles freely; here it is held
to torch's weights-only reader.
"""

import argparse
import contextlib
import logging
import math
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from medmax_fast.config import TrainConfig
from medmax_fast.files import read_json
from medmax_fast.model.adapter import LoraLinear
from medmax_fast.model.files import reason_of
from medmax_fast.runtime import InputError, log, rank_and_world
from medmax_fast.training.processes import barrier

# What the trainer itself decides; an override would make the loss or the order of rows wrong without a word.
_OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "gradient_clipping",
)
_TAG = "engine"


def start_processes(device: torch.device, dtype: torch.dtype) -> None:
    """Import DeepSpeed and join the process group; InputError if it is missing or cannot train in `dtype` here.

    Ranks come from torchrun or the deepspeed launcher; a plain process is a group of its own and needs no port.
    """
    # Read when deepspeed is imported; a CPU run on a machine with a GPU must not take the GPU.
    os.environ["DS_ACCELERATOR"] = device.type
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(f"training needs deepspeed ({error}): pip install 'medmax_fast[train]'") from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if dtype == torch.float16 and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        raise InputError(f"--precision fp16: DeepSpeed has none for this {device.type}; use bf16 or fp32")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    _, world = rank_and_world()
    if world == 1:
        os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.distributed.is_initialized():
        options = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1} if world == 1 else {}
        if device.type == "cuda":
            options["device_id"] = device
        torch.distributed.init_process_group(backend, **options)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)


def deepspeed_config(config: TrainConfig, device: torch.device, dtype: torch.dtype, world: int) -> dict:
    """The DeepSpeed configuration of a run: built from `config`, then overridden by its --deepspeed-config file."""
    stage = config.zero
    if stage == 0 and dtype != torch.float32:
        # Stage 0 would update the 16-bit weights themselves, and small updates would round to nothing.
        log("--zero 0 keeps no fp32 weights for 16-bit training in DeepSpeed; stage 1 is used")
        stage = 1
    zero = {"stage": stage, "overlap_comm": device.type == "cuda", "reduce_bucket_size": config.bucket_size}
    if stage in (1, 2):
        zero["allgather_bucket_size"] = config.bucket_size
    if config.offload != "none":
        to_cpu = {"device": "cpu", "pin_memory": device.type == "cuda"}
        zero |= {"offload_optimizer": to_cpu} | ({"offload_param": to_cpu} if config.offload == "all" else {})
    built = {
        "train_batch_size": config.packs_per_step,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.packs_per_step // world,
        # Without a limit the norm is still wanted for the log.
        "gradient_clipping": config.clip or 1e30,
        "zero_optimization": zero,
        # torch's AdamW serves on both sides; DeepSpeed's own for the CPU would be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": config.optimizer != "adamw",
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**62,
    }
    return _merge(built, read_overrides(config.deepspeed_config))


def check_engine(config: TrainConfig) -> None:
    """InputError for flags that DeepSpeed could not work with, or a library that is missing."""
    read_overrides(config.deepspeed_config)
    least = {"none": 0, "optimizer": 1, "all": 3}[config.offload]
    if config.zero < least:
        raise InputError(
            f"--offload {config.offload}: needs --zero {least}{' or more' * (least < 3)}, not {config.zero}"
        )
    if config.optimizer == "adamw8bit":
        if config.offload != "none":
            raise InputError(f"--optimizer adamw8bit: --offload {config.offload} keeps the state in 32 bits on the CPU")
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            reason = f"--optimizer adamw8bit needs bitsandbytes ({error})"
            raise InputError(f"{reason}: pip install 'medmax_fast[8bit]'") from error


def read_overrides(path: str) -> dict:
    """The entries of a --deepspeed-config file ({} without one); InputError names an entry that is not free."""
    if not path:
        return {}
    overrides = read_json(path)
    if not isinstance(overrides, dict):
        raise InputError(f"{path}: a JSON {type(overrides).__name__}, expected an object of DeepSpeed entries")
    for name in _OURS:
        if name in overrides:
            raise InputError(f"{path}: {name} cannot be overridden, it follows from medmax's own flags")
    if "stage" in overrides.get("zero_optimization", {}):
        raise InputError(f"{path}: zero_optimization.stage cannot be overridden, use --zero")
    return overrides


def _merge(base: dict, over: dict) -> dict:
    merged = dict(base)
    for name, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(name), dict)
        merged[name] = _merge(base[name], value) if both else value
    return merged


def build_engine(
    model: nn.Module, config: TrainConfig, device: torch.device, dtype: torch.dtype, world: int, universal: bool = False
):
    """The DeepSpeed engine of `model` with AdamW over what is trainable; InputError for a bad override.

    universal: it is to load what `to_universal` has written.
    """
    import deepspeed

    weights = [p for p in model.parameters() if p.requires_grad]
    settings = deepspeed_config(config, device, dtype, world)
    if universal:
        settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": True}
    optimizer = _optimizer(weights, config)
    try:
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]
    except (ValueError, deepspeed.runtime.config.DeepSpeedConfigError) as error:
        if not config.deepspeed_config:
            raise
        raise InputError(f"{config.deepspeed_config}: {' '.join(str(error).split())}") from error
    if config.zero == 3:
        _gather_adapted(model)
        if config.recompute == "selective":
            _hide_gathering(engine.optimizer.parameter_offload)
    return engine


def _gather_adapted(model: nn.Module) -> None:
    """Have ZeRO-3 gather the weights of a LoraLinear when that runs: they belong to modules inside it, which do not."""
    import deepspeed

    for module in model.modules():
        if isinstance(module, LoraLinear):
            for weight in module.parameters():
                deepspeed.zero.register_external_parameter(module, weight)


def _hide_gathering(hooks) -> None:
    """Keep ZeRO-3's gathering of weights out of sight of selective recomputation.

    torch takes whatever a layer does when it is computed again for one of the operations of its forward pass, in which
    other weights had to be gathered.
    """

    def hidden(function):
        def without_modes(module):
            with _disable_current_modes():
                function(module)

        return without_modes

    for name in ("pre_sub_module_forward_function", "post_sub_module_forward_function"):
        setattr(hooks, name, hidden(getattr(hooks, name)))


def _optimizer(weights: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    options = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(weights, **options)
    return torch.optim.AdamW(weights, fused=True, **options)


def optimizer_step(engine) -> tuple[torch.Tensor | float | None, bool]:
    """Finish the last micro-batch of a step: the norm of all gradients before clipping, and whether all were finite.

    An update that is not finite has been left out; its norm is None or not finite. A norm may still be on the device.
    """
    if engine.zero_optimization_stage() == 0:
        # Added up in fp64: on a CPU the fp32 norm of a million numbers is off by more than one in a million.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms)).item()
        if not math.isfinite(norm):
            return norm, False
        engine.step()
        return norm, True
    engine.step()
    norm = engine.get_global_grad_norm()
    overflow = getattr(engine.optimizer, "overflow", None)
    if overflow is None:
        overflow = not math.isfinite(float(norm))
    return norm, not overflow


def may_skip(engine) -> bool:
    """Whether an overflow is fp16's ordinary search for a loss scale, with smaller ones left to try."""
    if not engine.fp16_enabled():
        return False
    scaler = engine.optimizer.loss_scaler
    return scaler.dynamic and scaler.cur_scale > scaler.min_scale


def trained_state(engine, every: bool = False) -> dict[str, torch.Tensor]:
    """Trained weights (all weights with `every`) by name, whole, on the CPU of rank 0; {} on the other ranks.

    Under ZeRO-3 they are gathered one at a time, so all ranks must call this.
    """
    import deepspeed

    first = torch.distributed.get_rank() == 0
    state = {}
    for name, weight in engine.module.named_parameters():
        if not (weight.requires_grad or every):
            continue
        gathered = engine.zero_optimization_stage() == 3
        with deepspeed.zero.GatheredParameters([weight]) if gathered else contextlib.nullcontext():
            if first:
                state[name] = weight.detach().to("cpu", copy=True)
    return state


def save_engine(engine, folder: Path, adapter_only: bool) -> None:
    """Every rank's share of weights and optimizer state, into an existing folder."""
    engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=adapter_only)
    barrier()
    if torch.distributed.get_rank() == 0:
        # DeepSpeed puts its export programs beside the data.
        for script in folder.glob("*.py"):
            script.unlink()


def load_engine(engine, folder: Path, adapter_only: bool) -> None:
    """The inverse of save_engine; InputError if the files do not fit the engine."""
    try:
        with _weights_only():
            found, _ = engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=not adapter_only)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise InputError(f"{folder}: cannot be read; delete it to use the one before ({reason_of(error)})") from error
    if found is None:
        raise InputError(f"{folder}: no DeepSpeed state of this rank; delete the folder to use the one before")


def to_universal(folder: Path, target: Path) -> None:
    """Rewrite what save_engine has saved, on any number of ranks, as DeepSpeed's universal checkpoint at `target`.

    That holds each weight and its optimizer state whole, for another number of ranks to take their shares of.
    """
    from deepspeed.checkpoint import ds_to_universal

    # Threads and processes would be for hundreds of gigabytes; workers of their own would unpickle freely.
    options: dict[str, Any] = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    options |= {"strict": True, "inject_missing_state": True}
    options |= {"input_folder": str(folder / _TAG), "output_folder": str(target / _TAG)}
    with _weights_only():
        ds_to_universal.main(argparse.Namespace(**options))


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Make every torch.load inside refuse to run code, whatever it asks for."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before

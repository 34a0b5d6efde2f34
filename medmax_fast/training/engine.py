"""DeepSpeed, and everything that knows about it: processes, configuration, engine, its checkpoints.

The package is imported here only, when training starts. On a CPU it would compile an operator of its own for half a
minute; torch's collectives and torch's AdamW are used instead. Its load_checkpoint unpickles freely; here it is held
to torch's weights-only reader.
"""

import contextlib
import logging
import math
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medmax_fast.config import TrainConfig
from medmax_fast.runtime import InputError, log, rank_and_world, read_json

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


def barrier() -> None:
    """Wait for all ranks."""
    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all ranks."""
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values)
    return values


def on_first_rank(function: Callable[[], Any]) -> Any:
    """What `function()` returns on rank 0, on every rank; its InputError is raised on every rank."""
    box = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            box[0] = function()
        except InputError as error:
            box[1] = str(error)
    if torch.distributed.get_world_size() > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise InputError(box[1])
    return box[0]


def deepspeed_config(config: TrainConfig, device: torch.device, dtype: torch.dtype, world: int) -> dict:
    """The DeepSpeed configuration of a run: built from `config`, then overridden by its --deepspeed-config file."""
    stage = config.zero
    if stage == 0 and dtype != torch.float32:
        # Stage 0 would update the 16-bit weights themselves, and small updates would round to nothing.
        log("--zero 0 keeps no fp32 weights for 16-bit training in DeepSpeed; stage 1 is used")
        stage = 1
    built = {
        "train_batch_size": config.packs_per_step,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.packs_per_step // world,
        # Without a limit the norm is still wanted for the log.
        "gradient_clipping": config.clip or 1e30,
        "zero_optimization": {"stage": stage, "overlap_comm": device.type == "cuda"},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**62,
    }
    return _merge(built, read_overrides(config.deepspeed_config))


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


def build_engine(model: nn.Module, config: TrainConfig, device: torch.device, dtype: torch.dtype, world: int):
    """The DeepSpeed engine of `model` with torch's AdamW over what is trainable; InputError for a bad override."""
    import deepspeed

    weights = [p for p in model.parameters() if p.requires_grad]
    settings = deepspeed_config(config, device, dtype, world)
    fused = {"fused": True} if device.type == "cuda" else {}
    optimizer = torch.optim.AdamW(weights, lr=config.lr, weight_decay=config.weight_decay, **fused)
    try:
        return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]
    except (ValueError, deepspeed.runtime.config.DeepSpeedConfigError) as error:
        if not config.deepspeed_config:
            raise
        raise InputError(f"{config.deepspeed_config}: {' '.join(str(error).split())}") from error


def optimizer_step(engine, want_norm: bool) -> float | None:
    """Finish the last micro-batch of a step; the norm of all gradients before clipping if asked for.

    None also where fp16 gradients overflowed, in which case DeepSpeed leaves the step out and lowers its loss scale.
    """
    norm = None
    plain = engine.zero_optimization_stage() == 0
    if want_norm and plain:
        norms = [p.grad.norm() for p in engine.module.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(norms)).item()
    engine.step()
    if want_norm and not plain:
        norm = float(engine.get_global_grad_norm())
    return norm if norm is not None and math.isfinite(norm) else None


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
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder}: cannot be read; delete it to use the one before ({reason})") from error
    if found is None:
        raise InputError(f"{folder}: no DeepSpeed state of this rank; delete the folder to use the one before")


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

"""`medmax train`: fine-tune a checkpoint on a token store, as a LoRA adapter or whole, on any number of ranks.

The order here is that of what can go wrong: flags, store and checkpoint are checked before DeepSpeed is imported,
and the run folder is opened before the model is loaded.
"""

import contextlib
import json
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from medmax_fast.config import TrainConfig, settings_of
from medmax_fast.data.loader import PackedLoader
from medmax_fast.data.long_rows import long_rows
from medmax_fast.data.store import MANIFEST_FILE, TokenStore
from medmax_fast.model.adapter import add_adapter, check_lora
from medmax_fast.model.checkpoint import Checkpoint, open_checkpoint
from medmax_fast.model.layout import MAX_POSITIONS
from medmax_fast.model.load import load_model
from medmax_fast.model.probe import probe_isolation
from medmax_fast.model.trainable import PackedModel, recompute_activations, share_norms
from medmax_fast.runtime import (
    InputError,
    atomic_path,
    hash_file,
    log,
    open_output,
    pick_device,
    pick_dtype,
    rank_and_world,
    read_json,
)
from medmax_fast.training import engine as ds
from medmax_fast.training.folder import RunFolder
from medmax_fast.training.run import Run, planned_total
from medmax_fast.vocab import TextTokenizer

# Packs that a thread fills while the ones before are trained on.
PACKS_AHEAD = 2
# Flag: (least, most) that a run can use.
LIMITS = {
    "zero": (0, 3),
    "epochs": (1, math.inf),
    "max_steps": (0, math.inf),
    "max_length": (1, MAX_POSITIONS),
    "lora_rank": (1, math.inf),
    "lora_dropout": (0, 0.99),
    "lr": (0, math.inf),
    "warmup_ratio": (0, 1),
    "weight_decay": (0, math.inf),
    "clip": (0, math.inf),
    "save_every": (0, math.inf),
    "log_every": (1, math.inf),
}


def train(config: TrainConfig) -> dict:
    """Train, or continue the run in `config.output`; returns the summary, which is also R/result.json.

    Start it under torchrun or the deepspeed launcher for several ranks. Interrupted, it keeps its last checkpoint.
    """
    # Standard output belongs to the result; DeepSpeed prints there.
    with contextlib.redirect_stdout(sys.stderr), _terminate_as_interrupt():
        return _train(config)


def _train(config: TrainConfig) -> dict:
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    _check_flags(config)
    rank, world = rank_and_world()
    # One rank reads the whole store for its checksums; the launcher ends the others if it fails.
    store, checkpoint = TokenStore(config.data, verify=rank == 0), open_checkpoint(config.ckpt)
    loader = _open_loader(config, store, checkpoint, rank, world)
    last = planned_total(loader, config)
    ds.start_processes(device, dtype)
    base = ds.on_first_rank(checkpoint.sha256)
    ds.on_first_rank(lambda: str(open_output(config.output, "train", _settings(config, dtype, base))))
    folder = RunFolder(config.output)
    if folder.result.exists():
        log(f"{folder.path}: this run is finished; choose another --output to train again")
        return {**read_json(folder.result), "already_finished": True}
    if rank == 0:
        _list_long_rows(loader, folder)
    engine = _build(config, checkpoint, store, device, dtype, world)
    probe_isolation(engine, device)
    run = Run(config, engine, loader, folder, device, last)
    run.resume()
    run.steps()
    return run.finish(checkpoint, base)


def _build(config: TrainConfig, checkpoint: Checkpoint, store: TokenStore, device, dtype, world: int):
    # ZeRO-3 moves its share to the device itself.
    model = load_model(checkpoint, "cpu" if config.zero == 3 else device, dtype)
    if config.full:
        share_norms(model)
    else:
        add_adapter(model, config)
    if config.checkpointing:
        recompute_activations(model)
    return ds.build_engine(PackedModel(model, store.layout).train(), config, device, dtype, world)


def _check_flags(config: TrainConfig) -> None:
    """InputError for a value that no run could use."""
    for name, (least, most) in LIMITS.items():
        value = getattr(config, name)
        if not least <= value <= most:
            expected = f"{least}..{most}" if most < math.inf else f"{least} or more"
            raise InputError(f"--{name.replace('_', '-')} {value}: expected {expected}")
    if not config.full:
        check_lora(config)
    ds.read_overrides(config.deepspeed_config)


def _open_loader(config: TrainConfig, store: TokenStore, checkpoint: Checkpoint, rank: int, world: int):
    """The loader of this rank, once store and checkpoint are known to belong together."""
    expected, found = TextTokenizer(checkpoint.tokenizer_path).sha256(), store.manifest.get("tokenizer_sha256")
    if found != expected:
        raise InputError(f"{config.data}: built with tokenizer {found}, {config.ckpt} has {expected}")
    if store.layout.vocab_size > checkpoint.shape.vocab_size:
        raise InputError(
            f"{config.data}: ids up to {store.layout.vocab_size - 1}, but {config.ckpt} has "
            f"{checkpoint.shape.vocab_size} embeddings"
        )
    fitting = store.lengths[store.lengths <= config.max_length]
    if config.too_long == "skip" and len(fitting) and fitting.max() > config.pack_length:
        row = int(np.flatnonzero(store.lengths == fitting.max())[0])
        raise InputError(
            f"--pack-length {config.pack_length}: row {row} has {fitting.max()} ids; expected at least that, "
            "or a --max-length that leaves such rows out"
        )
    return PackedLoader(
        store,
        config.pack_length,
        config.packs_per_step,
        config.seed,
        rank,
        world,
        max_length=config.max_length,
        too_long=config.too_long,
        labels=config.labels,
        ahead=PACKS_AHEAD,
    )


def _list_long_rows(loader: PackedLoader, folder: RunFolder) -> None:
    """Write down which rows are left out or cut, and say how many."""
    rows = list(long_rows(loader.store, loader.lengths))
    if not rows:
        return
    with atomic_path(folder.long_rows) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    cut = f", {len(loader.cut)} cut" if len(loader.cut) else ""
    log(
        f"{len(rows)} of {len(loader.lengths)} rows are longer than {loader.limit} ids: "
        f"{len(loader.left_out)} left out{cut}, listed in {folder.long_rows} (the first: {rows[0]['key']})"
    )


def _settings(config: TrainConfig, dtype: torch.dtype, base: str) -> dict:
    """What the result depends on: flags, the bytes of the store, the weights of the base."""
    names = ["full", "epochs", "max_steps", "pack_length", "max_length", "too_long", "labels", "packs_per_step"]
    names += ["lr", "warmup_ratio", "weight_decay", "clip", "seed", "zero"]
    if not config.full:
        names += ["lora_rank", "lora_alpha", "lora_dropout", "lora_targets"]
    return {
        **settings_of(config, *names),
        "precision": str(dtype).removeprefix("torch."),
        "deepspeed_config": ds.read_overrides(config.deepspeed_config),
        "data": hash_file(Path(config.data) / MANIFEST_FILE),
        "ckpt": base,
    }


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does; signals can be set in the main thread only."""

    def interrupt(*_):
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

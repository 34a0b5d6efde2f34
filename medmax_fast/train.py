"""`medmax train`: fine-tune a checkpoint on a token store, as a LoRA adapter or whole, on any number of ranks.

The order here is that of what can go wrong: flags, store and checkpoint are checked before DeepSpeed is imported,
and the run folder is opened before the model is loaded.
"""

import contextlib
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medmax_fast.config import TrainConfig, settings_of
from medmax_fast.data.loader import PackedLoader
from medmax_fast.data.long_rows import long_rows
from medmax_fast.data.store import MANIFEST_FILE, TokenStore
from medmax_fast.files import SETTINGS_FILE, atomic_path, hash_file, open_output, read_object, remove
from medmax_fast.model.adapter import check_lora
from medmax_fast.model.checkpoint import Checkpoint, open_checkpoint
from medmax_fast.model.layout import MAX_POSITIONS
from medmax_fast.model.load import load_model
from medmax_fast.model.probe import probe_isolation
from medmax_fast.model.trainable import check_choice, prepare
from medmax_fast.runtime import InputError, comma_list, info, kept, log, pick_device, pick_dtype, rank_and_world
from medmax_fast.training import engine as ds
from medmax_fast.training.folder import RunFolder
from medmax_fast.training.processes import StopRequest, on_first_rank
from medmax_fast.training.result import finish
from medmax_fast.training.run import Run
from medmax_fast.training.schedule import planned_total
from medmax_fast.training.trackers import check_trackers, open_trackers
from medmax_fast.training.validation import Validation
from medmax_fast.vocab import TextTokenizer

# Packs that a thread fills while the ones before are trained on.
PACKS_AHEAD = 2
# Flag: (least, most) that a run can use.
LIMITS = {
    "zero": (0, 3),
    "epochs": (1, math.inf),
    "max_steps": (0, math.inf),
    "max_length": (1, MAX_POSITIONS),
    "lora_rank": (0, math.inf),
    "lora_dropout": (0, 0.99),
    "lr": (0, math.inf),
    "warmup_ratio": (0, 1),
    "weight_decay": (0, math.inf),
    "clip": (0, math.inf),
    "z_loss": (0, math.inf),
    "bucket_size": (1, math.inf),
    "validate_every": (0, math.inf),
    "keep": (1, math.inf),
    "save_every": (0, math.inf),
    "log_every": (1, math.inf),
}


def train(config: TrainConfig) -> dict:
    """Train, or continue the run in `config.output`; returns the summary, which is also R/result.json.

    Start it under torchrun or the deepspeed launcher for several ranks. SIGTERM or Ctrl-C on any of them ends the run
    after the step in progress, saved; killed, it keeps its last checkpoint.
    """
    # Standard output belongs to the result; DeepSpeed prints there.
    with contextlib.redirect_stdout(sys.stderr), StopRequest().listening() as stop:
        return _train(config, stop)


def _train(config: TrainConfig, stop: StopRequest) -> dict:
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    _check_flags(config)
    rank, world = rank_and_world()
    # One rank reads the whole store for its checksums; the launcher ends the others if it fails.
    store, checkpoint = TokenStore(config.data, verify=rank == 0), open_checkpoint(config.ckpt)
    _check_store(store, config, checkpoint)
    loader = _open_loader(config, store, rank, world, device)
    validation = _open_validation(config, checkpoint, rank, world)
    last = planned_total(loader, config)
    ds.start_processes(device, dtype)
    base = on_first_rank(checkpoint.sha256)
    on_first_rank(lambda: str(open_output(config.output, "train", _settings(config, dtype, base))))
    folder = RunFolder(config.output)
    if folder.result.exists():
        log(f"{folder.path}: this run is finished; choose another --output to train again")
        return {**read_object(folder.result), "already_finished": True}
    if rank == 0:
        _list_long_rows(loader, folder)
    newest = on_first_rank(lambda: _newest_checkpoint(config, folder, world))
    universal = newest is not None and newest[0] == folder.reshaped(newest[1]["step"])
    engine = _build(config, checkpoint, store, device, dtype, world, universal)
    probe_isolation(engine, device)
    run = Run(config, engine, loader, folder, checkpoint, device, last, validation)
    run.resume(newest)
    on_first_rank(lambda: _track(config, run))
    status = 1
    with kept(lambda: _kept(folder)):
        try:
            run.steps(stop)
            status = 0
        finally:
            run.trackers.close(status)
        return finish(run, base)


def _kept(folder: RunFolder) -> str:
    """What is left of a run that did not save at its end."""
    steps = sorted(folder.checkpoints.glob("step-*"))
    return f"{steps[-1]} is kept" if steps else "no checkpoint is complete yet"


def _newest_checkpoint(config: TrainConfig, folder: RunFolder, world: int) -> tuple[Path, dict] | None:
    """What to continue from, on rank 0 rewritten for any number of ranks if another number of them has made it."""
    newest = folder.newest_checkpoint()
    # At stage 0 every rank holds the whole state, and one has written it.
    if newest is None or newest[1]["world"] == world or config.zero == 0:
        return newest
    path, state = newest
    if config.optimizer == "adamw8bit":
        raise InputError(
            f"{path}: made by {state['world']} ranks, now {world}; use the same number, since the 8-bit state of the "
            "optimizer cannot be shared out anew"
        )
    info(f"{path}: made by {state['world']} ranks, now {world}; it is rewritten for them first")
    target = folder.reshaped(state["step"])
    remove(target)
    ds.to_universal(path, target)
    return target, state


def _build(config: TrainConfig, checkpoint: Checkpoint, store: TokenStore, device, dtype, world: int, universal: bool):
    # ZeRO-3 moves its share to the device itself.
    model = load_model(checkpoint, "cpu" if config.zero == 3 else device, dtype)
    return ds.build_engine(prepare(model, config, store.layout), config, device, dtype, world, universal)


def _track(config: TrainConfig, run: Run) -> None:
    """Open the trackers of a run on this rank."""
    settings = read_object(run.folder.path / SETTINGS_FILE)
    # Another run of the same name elsewhere is another run.
    run_id = hashlib.sha256(str(run.folder.path.resolve()).encode()).hexdigest()[:16]
    run.trackers = open_trackers(comma_list(config.track), run.folder.path, settings, run_id, run.done)


def _check_flags(config: TrainConfig) -> None:
    """InputError for a value that no run could use."""
    for name, (least, most) in LIMITS.items():
        value = getattr(config, name)
        if not least <= value <= most:
            expected = f"{least}..{most}" if most < math.inf else f"{least} or more"
            raise InputError(f"--{name.replace('_', '-')} {value}: expected {expected}")
    check_choice(config)
    if not config.full and config.lora_rank:
        check_lora(config)
    ds.check_engine(config)
    check_trackers(comma_list(config.track))


def _check_store(store: TokenStore, config: TrainConfig, checkpoint: Checkpoint) -> None:
    """InputError if store and checkpoint do not belong together."""
    expected, found = TextTokenizer(checkpoint.tokenizer_path).sha256(), store.manifest.get("tokenizer_sha256")
    if found != expected:
        raise InputError(f"{store.path}: built with tokenizer {found}, {config.ckpt} has {expected}")
    if store.layout.vocab_size > checkpoint.shape.vocab_size:
        raise InputError(
            f"{store.path}: a vocabulary of {store.layout.vocab_size} ids, but {config.ckpt} has "
            f"{checkpoint.shape.vocab_size} embeddings"
        )


def _open_loader(config: TrainConfig, store: TokenStore, rank: int, world: int, device: torch.device) -> PackedLoader:
    """The loader of this rank."""
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
        pinned=device.type == "cuda",
    )


def _open_validation(config: TrainConfig, checkpoint: Checkpoint, rank: int, world: int) -> Validation | None:
    """The validation of a run, with packs and cuts as in training."""
    if not config.validation:
        if config.validate_every:
            raise InputError(f"--validate-every {config.validate_every}: needs --validation, a token store")
        return None
    store = TokenStore(config.validation, verify=rank == 0)
    _check_store(store, config, checkpoint)
    options: dict[str, Any] = {"max_length": config.max_length, "too_long": config.too_long, "labels": config.labels}
    return Validation(store, PackedLoader(store, config.pack_length, world, 0, rank, world, **options))


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
    names += ["lr", "warmup_ratio", "weight_decay", "clip", "z_loss", "optimizer", "seed", "zero"]
    names += ["freeze", "head", "embeddings"]
    if not config.full:
        names += ["lora_rank", "lora_alpha", "lora_dropout", "lora_targets"]
    return {
        **settings_of(config, *names),
        "precision": str(dtype).removeprefix("torch."),
        "deepspeed_config": ds.read_overrides(config.deepspeed_config),
        "data": hash_file(Path(config.data) / MANIFEST_FILE),
        "ckpt": base,
    }

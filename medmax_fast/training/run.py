"""The training loop: optimizer steps, metrics, checkpoints, and what is written at the end.

An optimizer step takes `packs_per_step` packs. Its loss is the sum over all supervised ids of the step divided by
their number, which every rank knows before the step starts, so the gradient does not depend on how rows are packed
or shared out, and no rank waits for another's count. Dropout draws from (seed, step, pack), so it does not depend on
the ranks either and nothing of it needs to be stored: a step is a function of the weights, the optimizer state and
its number, which is why a resumed run repeats an uninterrupted one bit for bit.

Between two logged steps nothing here waits for the device: losses stay there, counts come with the packs. DeepSpeed
itself reads whether the gradients were finite, and their norm, once per optimizer step.
"""

import contextlib
import functools
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medmax_fast.config import TrainConfig
from medmax_fast.data.loader import PackedLoader, Step
from medmax_fast.files import write_json
from medmax_fast.model.checkpoint import Checkpoint
from medmax_fast.progress import Progress
from medmax_fast.runtime import InputError, info
from medmax_fast.training import engine as ds
from medmax_fast.training.folder import RunFolder
from medmax_fast.training.health import Health, StepRows
from medmax_fast.training.processes import StopRequest, barrier, gather, on_first_rank, total
from medmax_fast.training.schedule import learning_rate, planned_steps
from medmax_fast.training.speed import flops_per_token, mfu, peak_flops, peak_memory_gib
from medmax_fast.training.trackers import Trackers
from medmax_fast.training.upload import Uploader
from medmax_fast.training.validation import Validation


@dataclass
class Run:
    """A training run in progress: `done` of `last` optimizer steps."""

    config: TrainConfig
    engine: Any
    loader: PackedLoader
    folder: RunFolder
    checkpoint: Checkpoint
    device: torch.device
    last: int
    validation: Validation | None = None
    done: int = 0
    resumed_from: int = 0
    trackers: Trackers = field(default_factory=Trackers)

    @property
    def first_rank(self) -> bool:
        return self.loader.rank == 0

    def resume(self, newest: tuple[Path, dict] | None) -> None:
        """Continue from a checkpoint, (folder, state), if there is one."""
        if newest:
            path, state = newest
            ds.load_engine(self.engine, path, not self.config.full)
            self.done = self.resumed_from = state["step"]
            epoch, step = self.loader.restore(state.get("data", {}))
            expected = sum(self.loader.steps_per_epoch(earlier) for earlier in range(epoch)) + step
            if expected != self.done:
                raise InputError(f"{path}: made after {self.done} steps, but its data is at step {expected}")
            if self.first_rank:
                info(f"continuing after step {self.done} of {self.last}")
        if self.first_rank:
            self.folder.rewind(self.done, self.config.keep)

    def steps(self, stop: StopRequest) -> None:
        """Run the steps that are left, logging, validating and saving as configured.

        KeyboardInterrupt once a step is finished and saved after a rank was asked to stop.
        """
        records = on_first_rank(self.folder.records)
        store, counts = self.loader.store, self.loader.target_counts
        # The names of all rows are read only if some are to be named.
        health = Health(records, lambda row: store.keys[row], counts, gather, self._stopped)
        upload, clock, loss = Uploader(self.device), Clock(), math.nan
        with Progress("train", self.last, self.done) if self.first_rank else contextlib.nullcontext() as bar:
            for number, epoch, step in planned_steps(self.loader, self.last, self.done):
                clock.count(step)
                log_due = number % self.config.log_every == 0 or number == self.last
                record = self.step(number, step, upload(step), log_due, health) if step.target_tokens else None
                if record:
                    loss = record["loss"]
                    self._log({"step": number, "epoch": epoch, **record}, step, clock)
                self.done = number
                with clock.paused():
                    self._validate(number)
                    stopping = stop.agreed()
                    due = self.config.save_every and number % self.config.save_every == 0
                    if due or stopping or number == self.last:
                        self.save(self.loader.state(epoch, step.index + 1))
                if stopping and number < self.last:
                    raise KeyboardInterrupt(f"step {number} of {self.last} is saved in {self.folder.path}")
                if bar:
                    bar.update(number, functools.partial("loss {:.4g}".format, loss))

    def step(self, number: int, step: Step, batches: list[dict], log_due: bool, health: Health) -> dict | None:
        """One optimizer step; its losses over all ranks, learning rate and gradient norm if it is to be logged."""
        rate = learning_rate(number, self.last, self.config.lr, self.config.warmup_ratio)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        # DeepSpeed averages over ranks; it is told not to divide by the micro-batches.
        scale = self.loader.world / step.target_tokens
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        by_row = []
        for micro, batch in enumerate(batches):
            _seed_pack(self.config.seed, number, step.places[micro])
            loss, parts, row_losses = self.engine(batch)
            self.engine.backward(loss * scale, scale_wrt_gas=False)
            sums += parts
            if step.batches[micro] is not None:
                by_row.append(row_losses)
            if micro + 1 < len(batches):
                self.engine.step()
        norm, finite = ds.optimizer_step(self.engine)
        if finite and not log_due:
            return None
        text, image, texts, images = total(sums).tolist()
        loss = (text + image) / step.target_tokens
        rows = _rows_of(number, step, by_row)
        if not finite and not (math.isfinite(loss) and ds.may_skip(self.engine)):
            health.stop(rows, f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite")
        if not log_due:
            return None
        assert texts + images == step.target_tokens, (texts, images, step.target_tokens)
        record = {
            "loss": loss,
            "text_loss": text / texts if texts else None,
            "image_loss": image / images if images else None,
            "lr": rate,
            "grad_norm": float(norm) if norm is not None and finite else None,
            "target_tokens": step.target_tokens,
        }
        health.logged(rows, record)
        return record

    def _log(self, record: dict, step: Step, clock: "Clock") -> None:
        seconds, steps, tokens, targets = clock.lap()
        counts = torch.tensor([_ids(step), tokens], dtype=torch.float64, device=self.device)
        all_tokens, all_since = total(counts).tolist()
        rate, memory = all_since / seconds, max(gather(peak_memory_gib(self.device)))
        dtype = next(self.engine.module.parameters()).dtype
        flops = flops_per_token(self.checkpoint.shape, self.config.full)
        record |= {
            "tokens": int(all_tokens),
            "seconds": seconds / steps,
            "tokens_per_second": rate,
            "target_tokens_per_second": targets / seconds,
            "mfu": mfu(rate, flops, peak_flops(self.device, dtype), self.loader.world),
            "memory_gib": memory,
        }
        if self.first_rank:
            self.folder.append(self.folder.metrics, record)
            self.trackers.log(record["step"], {"train": record})

    def _validate(self, number: int) -> None:
        every = self.config.validate_every
        if self.validation is None or not (number == self.last or (every and number % every == 0)):
            return
        record = {"step": number, **self.validation.measure(self.engine, self.device)}
        if self.first_rank:
            self.folder.append(self.folder.validation, record)
            self.trackers.log(number, {"validation": record})
            info(f"step {number}: validation loss {record['loss']:.4f}")

    def _stopped(self, found: dict) -> None:
        if self.first_rank:
            write_json(self.folder.stopped, found)

    def save(self, position: dict) -> None:
        """Write and publish a checkpoint after the steps done; `position` is the loader's state."""
        if self.first_rank:
            self.folder.open_checkpoint(self.done)
        barrier()
        ds.save_engine(self.engine, self.folder.temporary_checkpoint(self.done), not self.config.full)
        if self.first_rank:
            self.folder.publish(self.done, {"data": position, "world": self.loader.world}, self.config.keep)
        barrier()


class Clock:
    """Seconds, steps and ids of this rank since the last lap; the time of a `paused` context does not count."""

    def __init__(self):
        self._restart()

    def _restart(self) -> None:
        self._start, self._steps, self._ids, self._targets = time.monotonic(), 0, 0, 0

    def count(self, step: Step) -> None:
        self._steps += 1
        self._ids += _ids(step)
        self._targets += step.target_tokens

    def lap(self) -> tuple[float, int, int, int]:
        """(seconds, steps, ids of this rank, supervised ids of all ranks) since the last one, and start anew."""
        found = time.monotonic() - self._start, self._steps, self._ids, self._targets
        self._restart()
        return found

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._start += time.monotonic() - began


def _ids(step: Step) -> int:
    return sum(len(batch.input_ids) for batch in step.batches if batch is not None)


def _rows_of(number: int, step: Step, losses: list[torch.Tensor]) -> StepRows:
    rows = [batch.rows for batch in step.batches if batch is not None]
    if not rows:
        return StepRows(number, np.zeros(0, np.int64), torch.zeros(0, dtype=torch.float64))
    return StepRows(number, np.concatenate(rows), torch.cat(losses))


def _seed_pack(seed: int, number: int, pack: int) -> None:
    """Seed dropout for one pack of a step; the same on whichever rank the pack is."""
    digest = hashlib.sha256(json.dumps([seed, number, pack]).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

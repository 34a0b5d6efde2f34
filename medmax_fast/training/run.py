"""The training loop: optimizer steps, metrics, checkpoints, and what is written at the end.

An optimizer step takes `packs_per_step` packs. Its loss is the sum over all supervised ids of the step divided by
their number, which every rank knows before the step starts, so the gradient does not depend on how rows are packed
or shared out, and no rank waits for another's count. Dropout draws from (seed, step, pack), so it does not depend on
the ranks either and nothing of it needs to be stored: a step is a function of the weights, the optimizer state and
its number, which is why a resumed run repeats an uninterrupted one bit for bit.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from medmax_fast.config import TrainConfig
from medmax_fast.data.loader import PackedLoader, Step
from medmax_fast.model.adapter import save_adapter
from medmax_fast.model.checkpoint import Checkpoint
from medmax_fast.model.convert import write_checkpoint
from medmax_fast.model.trainable import PREFIX, empty_batch, trained_tensor
from medmax_fast.runtime import InputError, log, progress, write_json
from medmax_fast.training import engine as ds
from medmax_fast.training.folder import RunFolder


@dataclass
class Run:
    """A training run in progress: `done` of `last` optimizer steps."""

    config: TrainConfig
    engine: object
    loader: PackedLoader
    folder: RunFolder
    device: torch.device
    last: int
    done: int = 0
    resumed_from: int = 0

    @property
    def first_rank(self) -> bool:
        return self.loader.rank == 0

    def resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one."""
        newest = ds.on_first_rank(self.folder.newest_checkpoint)
        if newest:
            path, state = newest
            if state["world"] != self.loader.world:
                raise InputError(
                    f"{path}: made by {state['world']} ranks, now {self.loader.world}; use the same number to continue"
                )
            ds.load_engine(self.engine, path, not self.config.full)
            self.done = self.resumed_from = state["step"]
            epoch, step = self.loader.restore(state.get("data", {}))
            expected = sum(self.loader.steps_per_epoch(earlier) for earlier in range(epoch)) + step
            if expected != self.done:
                raise InputError(f"{path}: made after {self.done} steps, but its data is at step {expected}")
            if self.first_rank:
                log(f"continuing after step {self.done} of {self.last}")
        if self.first_rank:
            self.folder.rewind(self.done)

    def steps(self) -> None:
        """Run the steps that are left, logging and saving as configured."""
        steps = planned_steps(self.loader, self.last, self.done)
        if self.first_rank:
            steps = progress(steps, "train", self.last - self.done)
        started, since = time.monotonic(), torch.zeros(2, dtype=torch.float64)
        for number, epoch, step in steps:
            tokens = sum(len(batch.input_ids) for batch in step.batches if batch is not None)
            since += torch.tensor([1, tokens])
            want = number % self.config.log_every == 0 or number == self.last
            if step.target_tokens:
                record = self.step(number, step, want)
                if want:
                    now = time.monotonic()
                    self._log({"step": number, "epoch": epoch, **record}, tokens, since, now - started)
                    started, since = now, torch.zeros_like(since)
            self.done = number
            if number == self.last or (self.config.save_every and number % self.config.save_every == 0):
                self.save(self.loader.state(epoch, step.index + 1))

    def step(self, number: int, step: Step, want_record: bool) -> dict | None:
        """One optimizer step; its losses over all ranks, learning rate and gradient norm if wanted."""
        rate = learning_rate(number, self.last, self.config.lr, self.config.warmup_ratio)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        # DeepSpeed averages over ranks; it is told not to divide by the micro-batches.
        scale = self.loader.world / step.target_tokens
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        norm = None
        for micro, batch in enumerate(step.batches):
            _seed_pack(self.config.seed, number, step.places[micro])
            loss, parts = self.engine(empty_batch(self.device) if batch is None else batch.to_torch(self.device))
            self.engine.backward(loss * scale, scale_wrt_gas=False)
            sums += parts
            if micro + 1 < len(step.batches):
                self.engine.step()
            else:
                norm = ds.optimizer_step(self.engine, want_record)
        if not want_record:
            return None
        text, image, texts, images = ds.total(sums).tolist()
        assert texts + images == step.target_tokens, (texts, images, step.target_tokens)
        if not math.isfinite(text + image):
            raise InputError(f"step {number}: the loss is {text + image}; lower --lr or use --precision bf16 or fp32")
        return {
            "loss": (text + image) / step.target_tokens,
            "text_loss": text / texts if texts else None,
            "image_loss": image / images if images else None,
            "lr": rate,
            "grad_norm": norm,
            "target_tokens": step.target_tokens,
        }

    def _log(self, record: dict, tokens: int, since: torch.Tensor, seconds: float) -> None:
        steps = since[0].item()
        counts = torch.tensor([tokens, since[1]], dtype=torch.float64, device=self.device)
        all_tokens, all_since = ds.total(counts).tolist()
        record |= {"tokens": int(all_tokens), "seconds": seconds / steps, "tokens_per_second": all_since / seconds}
        if self.first_rank:
            self.folder.append(record)

    def save(self, position: dict) -> None:
        """Write and publish a checkpoint after the steps done; `position` is the loader's state."""
        if self.first_rank:
            self.folder.open_checkpoint(self.done)
        ds.barrier()
        ds.save_engine(self.engine, self.folder.temporary_checkpoint(self.done), not self.config.full)
        if self.first_rank:
            self.folder.publish(self.done, {"data": position, "world": self.loader.world})
        ds.barrier()

    def finish(self, checkpoint: Checkpoint, base: str) -> dict:
        """Write the adapter or the model, the loss curve and the summary; `base` is the checkpoint's sha256."""
        state = ds.trained_state(self.engine)
        result = self.folder.path / ("model" if self.config.full else "adapter")

        def write() -> dict:
            # Complete if there: an earlier run was stopped right after writing it.
            if not result.exists() and self.config.full:
                write_checkpoint(
                    checkpoint, result, checkpoint.layout, lambda name, like: trained_tensor(state, name, like)
                )
            elif not result.exists():
                weights = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
                save_adapter(weights, result, self.config, base)
            return self._summary(result)

        return ds.on_first_rank(write)

    def _summary(self, result: Path) -> dict:
        from medmax_fast.figures import loss_curve

        records = self.folder.records()
        loss_curve(records, self.folder.curve)
        parameters = [p for p in self.engine.module.parameters() if p.requires_grad]
        summary = {
            "output": str(self.folder.path),
            result.name: str(result),
            "steps": self.done,
            "resumed_from": self.resumed_from,
            "rows_left_out": len(self.loader.left_out),
            "rows_cut": len(self.loader.cut),
            "trained_parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
            "first_loss": records[0]["loss"] if records else None,
            "loss": records[-1]["loss"] if records else None,
            "text_loss": records[-1]["text_loss"] if records else None,
            "image_loss": records[-1]["image_loss"] if records else None,
            "tokens_per_second": records[-1]["tokens_per_second"] if records else None,
            "already_finished": False,
        }
        write_json(self.folder.result, summary)
        return summary


def planned_total(loader: PackedLoader, config: TrainConfig) -> int:
    """Optimizer steps of the whole run."""
    total = sum(loader.steps_per_epoch(epoch) for epoch in range(config.epochs))
    return min(total, config.max_steps) if config.max_steps else total


def planned_steps(loader: PackedLoader, last: int, done: int) -> Iterator[tuple[int, int, Step]]:
    """(number, epoch, step) of what is left after `done` steps; numbers count from 1 over all epochs."""
    first = epoch = 0
    while first < last:
        count = loader.steps_per_epoch(epoch)
        if done < first + count:
            for step in loader.epoch_steps(epoch, max(done - first, 0)):
                number = first + step.index + 1
                if number > last:
                    return
                yield number, epoch, step
        first += count
        epoch += 1


def learning_rate(number: int, last: int, peak: float, warmup_ratio: float) -> float:
    """Rate of step `number` (1..last): a linear rise, then half a cosine; no step of either has a rate of zero."""
    warmup = math.ceil(last * warmup_ratio)
    before = number - 1
    if before < warmup:
        return peak * number / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (before - warmup) / (last - warmup)))


def _seed_pack(seed: int, number: int, pack: int) -> None:
    """Seed dropout for one pack of a step; the same on whichever rank the pack is."""
    digest = hashlib.sha256(json.dumps([seed, number, pack]).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

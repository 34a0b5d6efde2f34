"""The loss on rows that are not trained on: over all, on text and on image targets, per task and per source.

The whole validation store is packed once and read in the same order every time, without dropout and without a draw
from any generator, so training goes on as if it had not happened.
"""

import numpy as np
import torch

from medmax_fast.data.loader import PackedLoader
from medmax_fast.data.store import TokenStore
from medmax_fast.model.trainable import empty_batch
from medmax_fast.runtime import log
from medmax_fast.training.processes import total


class Validation:
    """Measures a model on a store; every rank takes its share of the packs, and all call `measure` together."""

    def __init__(self, store: TokenStore, loader: PackedLoader):
        self._loader = loader
        if loader.rank == 0 and (len(loader.left_out) or len(loader.cut)):
            fate = f"{len(loader.left_out)} are left out, {len(loader.cut)} cut"
            log(f"{store.path}: of {len(store)} rows, {fate}, as longer than {loader.limit} ids")
        tasks = sorted(
            {f"by_task/{task}" for task in store.tasks} | {f"by_source/{source}" for source in store.sources}
        )
        self._groups = {name: i for i, name in enumerate(tasks)}
        # Per row its task's and its source's place among the groups.
        self._of_row = np.array(
            [
                [self._groups[f"by_task/{task}"], self._groups[f"by_source/{source}"]]
                for task, source in zip(store.tasks, store.sources, strict=True)
            ]
        )
        self._counts = loader.target_counts(np.arange(len(store)))

    def measure(self, engine, device: torch.device) -> dict:
        """Losses in nats per supervised id; `by_task` and `by_source` leave out what has no supervised id."""
        parts = torch.zeros(4, dtype=torch.float64, device=device)
        rows, losses = [], []
        engine.eval()
        with torch.no_grad():
            for step in self._loader.epoch_steps(0):
                for batch in step.batches:
                    packed = empty_batch(device) if batch is None else batch.to_torch(device)
                    _, sums, row_losses = engine(packed)
                    parts += sums
                    if batch is not None:
                        rows.append(batch.rows.copy())
                        losses.append(row_losses)
        engine.train()
        sums = torch.zeros(2, len(self._groups), dtype=torch.float64)
        if rows:
            groups = torch.from_numpy(self._of_row[np.concatenate(rows)])
            values = torch.stack(
                [torch.cat(losses).cpu(), torch.from_numpy(self._counts[np.concatenate(rows)]).double()]
            )
            for column in groups.T:
                sums.index_add_(1, column, values)
        text, image, texts, images = total(parts).tolist()
        by_group = total(sums.to(device)).tolist()
        return {
            "loss": (text + image) / max(texts + images, 1),
            "text_loss": text / texts if texts else None,
            "image_loss": image / images if images else None,
            "target_tokens": int(texts + images),
            **self._by_group("by_task/", by_group),
            **self._by_group("by_source/", by_group),
        }

    def _by_group(self, kind: str, sums: list[list[float]]) -> dict:
        found = {
            name.removeprefix(kind): sums[0][i] / sums[1][i]
            for name, i in self._groups.items()
            if name.startswith(kind) and sums[1][i]
        }
        return {kind.removesuffix("/"): found}

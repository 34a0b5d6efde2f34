"""The loss on rows that are not trained on: over all, on text and on image targets, per task and per source.

The whole validation store is packed once and read in the same order every time, without dropout and without a draw
from any generator, so training goes on as if it had not happened.
"""

import numpy as np
import torch

from medmax_fast.data.loader import PackedLoader
from medmax_fast.data.store import TokenStore
from medmax_fast.model.trainable import empty_batch
from medmax_fast.progress import progress
from medmax_fast.runtime import log
from medmax_fast.training.processes import total


class Validation:
    """Measures a model on a store; every rank takes its share of the packs, and all call `measure` together."""

    def __init__(self, store: TokenStore, loader: PackedLoader):
        self._loader = loader
        if loader.rank == 0 and (len(loader.left_out) or len(loader.cut)):
            fate = f"{len(loader.left_out)} are left out, {len(loader.cut)} cut"
            log(f"{store.path}: of {len(store)} rows, {fate}, as longer than {loader.limit} ids")
        # Per kind of group, the names and each row's place among them.
        kinds = {"by_task": store.tasks, "by_source": store.sources}
        self._groups = {kind: np.unique(names, return_inverse=True) for kind, names in kinds.items()}
        self._counts = loader.target_counts(np.arange(len(store)))

    def measure(self, engine, device: torch.device) -> dict:
        """Losses in nats per supervised id; `by_task` and `by_source` leave out what has no supervised id."""
        parts = torch.zeros(4, dtype=torch.float64, device=device)
        rows, losses = [], []
        engine.eval()
        with torch.no_grad():
            steps = self._loader.epoch_steps(0)
            if self._loader.rank == 0:
                steps = progress(steps, "validation", self._loader.steps_per_epoch(0))
            for step in steps:
                for batch in step.batches:
                    packed = empty_batch(device) if batch is None else batch.to_torch(device)
                    _, sums, row_losses = engine(packed)
                    parts += sums
                    if batch is not None:
                        rows.append(batch.rows)
                        losses.append(row_losses)
        engine.train()
        text, image, texts, images = total(parts).tolist()
        seen = np.concatenate([np.zeros(0, np.int64), *rows])
        values = torch.cat([torch.zeros(0, dtype=torch.float64), *(part.cpu() for part in losses)])
        return {
            "loss": (text + image) / max(texts + images, 1),
            "text_loss": text / texts if texts else None,
            "image_loss": image / images if images else None,
            "target_tokens": int(texts + images),
            **{kind: self._means(kind, seen, values, device) for kind in self._groups},
        }

    def _means(self, kind: str, rows: np.ndarray, losses: torch.Tensor, device: torch.device) -> dict[str, float]:
        """Loss per supervised id of each group, over all ranks; rows, losses: int64 and fp64 [n] of this one."""
        names, of_row = self._groups[kind]
        sums = torch.zeros(2, len(names), dtype=torch.float64)
        counts = torch.from_numpy(self._counts[rows]).double()
        sums.index_add_(1, torch.from_numpy(of_row[rows]), torch.stack([losses, counts]))
        sums = total(sums.to(device)).tolist()
        return {str(name): loss / count for name, loss, count in zip(names, *sums, strict=True) if count}

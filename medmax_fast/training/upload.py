"""Packs of a step on their way to the device, so that no copy waits for computing and no computing for a copy.

On a GPU a step's packs are copied from page-locked memory on a stream of their own. The host waits for those copies
only, some hundred microseconds, and the memory is then free for the thread that fills the next packs; the GPU is
meanwhile still busy with what was asked of it before.
"""

from collections.abc import Iterator

import torch

from medmax_fast.data.loader import Step
from medmax_fast.model.trainable import empty_batch


class Uploader:
    """Turns the packs of a Step into what the model takes, on `device`."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, step: Step) -> list[dict]:
        """One dict per micro-step (PackedBatch.to_torch), an empty batch where the epoch has run out of packs."""
        if self._stream is None:
            return list(self._batches(step, non_blocking=False))
        with torch.cuda.stream(self._stream):
            batches = list(self._batches(step, non_blocking=True))
        self._stream.synchronize()
        # The allocator must not give the memory away while the computing stream still reads it.
        for tensor in (t for batch in batches for t in batch.values() if torch.is_tensor(t)):
            tensor.record_stream(torch.cuda.current_stream(self._device))
        return batches

    def _batches(self, step: Step, non_blocking: bool) -> Iterator[dict]:
        for batch in step.batches:
            yield empty_batch(self._device) if batch is None else batch.to_torch(self._device, non_blocking)

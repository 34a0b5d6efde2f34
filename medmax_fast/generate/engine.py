"""The generation engine: text, pictures and interleaved output, many requests at a time, in process.

A loaded model with its cache and captured steps, which outlive a call; how requests run together is told in
generate/session.py.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medmax_fast.generate.cache import KVCache, position_bytes
from medmax_fast.generate.pages import PAGE
from medmax_fast.generate.prompts import PromptEncoder
from medmax_fast.generate.requests import Request, Result
from medmax_fast.generate.room import Room
from medmax_fast.generate.session import Event, Session
from medmax_fast.generate.steps import MAX_STREAMS, Steps
from medmax_fast.model.checkpoint import Checkpoint, open_checkpoint
from medmax_fast.model.decoder import Decoder
from medmax_fast.model.layout import MAX_POSITIONS
from medmax_fast.runtime import InputError, available_bytes, pick_device, pick_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Of the memory that is free once the weights are loaded, the share that keys and values get.
CACHE_SHARE = 0.75


class Engine:
    """A loaded checkpoint that generates. Not thread-safe: one `generate` or `stream` call at a time."""

    def __init__(self, decoder: Decoder, encoder: PromptEncoder, positions: int, lag: int | None = None):
        """decoder: the model. encoder: what turns its prompts into ids. positions: that the cache holds.

        lag: turns that may be launched before ids are read (1 on a GPU, else 0).
        """
        self.decoder, self.encoder = decoder, encoder
        self.tokenizer, self.layout = encoder.tokenizer, encoder.tokenizer.layout
        self.device = decoder.device
        self.cache = KVCache(decoder, positions)
        self.steps = Steps(self.cache, self.tokenizer)
        self.lag = lag if lag is not None else int(self.device.type == "cuda")
        self.room = Room(self.cache, self.steps.slots)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path | Checkpoint,
        device: str = "auto",
        precision: str = "auto",
        quantize: str = "none",
        cache_gb: float = 0.0,
        group: "ProcessGroup | None" = None,
    ) -> "Engine":
        """Load a checkpoint; InputError names what is wrong with it.

        path: a folder in either layout, or an open Checkpoint. device: auto, cpu or cuda. precision: auto (bf16 on a
        GPU, fp32 on a CPU), fp32, bf16 or fp16. quantize: none, int8 or fp8, of the layers' weights. cache_gb: GB
        for keys and values, 0 for three quarters of what is free. group: the torch.distributed process group that
        shares the model's layers; every rank then makes the same calls and gets the same results.
        """
        device = pick_device(device)
        # Opened once: opening checks the files' checksums.
        checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
        decoder = Decoder.load(checkpoint, device, pick_dtype(precision, device), group, quantize)
        size = cache_gb * 1e9 if cache_gb else CACHE_SHARE * available_bytes(device)
        positions = min(int(size) // position_bytes(decoder), MAX_STREAMS * MAX_POSITIONS)
        positions = decoder.least(positions) // PAGE * PAGE
        if positions < PAGE:
            found = f"{size / 1e9:.2f} GB hold {positions} positions"
            raise InputError(f"no memory for keys and values: {found}; raise cache_gb")
        return cls(decoder, PromptEncoder(checkpoint, device), positions)

    def decode_images(self, codes: np.ndarray) -> np.ndarray:
        """Pixels uint8 [N, 512, 512, 3] of pictures' codes [N, 1024]; InputError without a picture decoder."""
        return self.encoder.pictures.decode(np.asarray(codes))

    def preview(self, codes: np.ndarray) -> np.ndarray:
        """Pixels uint8 [512, 512, 3] of a picture of which only the first codes [1..1024] are drawn; the rest white."""
        return self.encoder.pictures.preview(np.asarray(codes))

    def session(self, batch_size: int, pieces: bool) -> Session:
        """Requests that run together, at most `batch_size` at a time; others may join and leave while they run.

        pieces: give text and pictures as they are made. RuntimeError while another call or session runs.
        """
        return Session(self.encoder, self.steps, self.room, self.lag, batch_size, pieces)

    def generate(
        self, requests: list[Request], batch_size: int = 16, progress: Callable[[Result], None] | None = None
    ) -> list[Result]:
        """Run all requests, at most `batch_size` at a time; results come in the order of the requests.

        A request that cannot be run gets a Result with `error`; the others go on. `progress` is called with each
        result as it is finished.
        """
        results: dict[int, Result] = {}
        with self.session(batch_size, pieces=False) as session:
            for request in requests:
                session.submit(request)
            for number, event in session.events(self.decoder.group):
                assert isinstance(event, Result)
                results[number] = event
                if progress is not None:
                    progress(event)
        return [results[number] for number in range(len(requests))]

    def stream(self, requests: list[Request], batch_size: int = 16) -> Iterator[Event]:
        """Run all requests, at most `batch_size` at a time; gives text and pictures as they are made, and each
        request's Result last.

        Closing the iterator ends the requests that are still running.
        """
        with self.session(batch_size, pieces=True) as session:
            for request in requests:
                session.submit(request)
            for _, event in session.events(self.decoder.group):
                yield event

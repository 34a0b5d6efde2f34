"""The generation engine: text, pictures and interleaved output, many requests at a time, in process.

Every request owns one stream (a sequence in the cache); while it draws it owns up to two more, for guidance: one that
sees only the prompt's images and one that sees nothing. A turn of the loop admits requests, prefills new streams
(packed, what is cached left out), feeds one id to every running stream, and lets every sample that is ready pick its
next id by the rules of its own state, all on the device (generate/steps.py). Ids are read one turn later, while the
next turn runs; a finished request's place is refilled. Pages, captured graphs and known prefixes outlive a call.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from medmax_fast.generate import grammar
from medmax_fast.generate.cache import KVCache, position_bytes
from medmax_fast.generate.pages import PAGE
from medmax_fast.generate.prompts import PromptEncoder
from medmax_fast.generate.requests import PicturePiece, Request, Result, TextPiece
from medmax_fast.generate.room import Room
from medmax_fast.generate.samples import Narrator, Sample, Stream, content_of, uniforms
from medmax_fast.generate.steps import MAX_STREAMS, Picked, Steps
from medmax_fast.model.checkpoint import Checkpoint, open_checkpoint
from medmax_fast.model.decoder import Decoder
from medmax_fast.model.layout import MAX_POSITIONS
from medmax_fast.runtime import InputError, available_bytes, pick_device, pick_dtype
from medmax_fast.vocab import IMAGE_CODES

# Ids per packed prefill pass; bounds the memory of activations.
PREFILL_IDS = 16384
# Of the memory that is free once the weights are loaded, the share that keys and values get.
CACHE_SHARE = 0.75

Event = TextPiece | PicturePiece | Result
# What a turn picked: samples with their epochs, and their ids on the way to the host.
Turn = list[tuple[list[tuple[Sample, int]], Picked]]


class Engine:
    """A loaded checkpoint that generates. Not thread-safe: one `generate` or `stream` call at a time."""

    def __init__(self, decoder: Decoder, encoder: PromptEncoder, positions: int, lag: int | None = None):
        """positions: that the cache holds. lag: turns that may be launched before ids are read (1 on a GPU, else 0)."""
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
        group=None,
    ) -> "Engine":
        """Load a checkpoint in either layout, a folder or open; InputError names what is wrong with it.

        cache_gb: memory for keys and values, 0 for three quarters of what is free. group: the torch.distributed
        process group that shares the model's layers; every rank then makes the same calls and gets the same results.
        """
        device = pick_device(device)
        # Opened once: opening checks the files' checksums.
        checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
        decoder = Decoder.load(checkpoint, device, pick_dtype(precision, device), group, quantize)
        size = cache_gb * 1e9 if cache_gb else CACHE_SHARE * available_bytes(device)
        positions = min(int(size) // position_bytes(decoder), MAX_STREAMS * MAX_POSITIONS)
        positions = decoder.least(positions) // PAGE * PAGE
        if positions < PAGE:
            raise InputError(f"no memory for keys and values: {size / 1e9:.2f} GB hold {positions} positions")
        return cls(decoder, PromptEncoder(checkpoint, device), positions)

    def decode_images(self, codes: np.ndarray) -> np.ndarray:
        """Pixels uint8 [N, 512, 512, 3] of pictures' codes [N, 1024]; InputError without a picture decoder."""
        return self.encoder.pictures.decode(np.asarray(codes))

    def preview(self, codes: np.ndarray) -> np.ndarray:
        """Pixels uint8 [512, 512, 3] of a picture of which only the first codes [1..1024] are drawn; the rest white."""
        return self.encoder.pictures.preview(np.asarray(codes))

    def generate(
        self, requests: list[Request], batch_size: int = 16, progress: Callable[[Result], None] | None = None
    ) -> list[Result]:
        """Run all requests, at most `batch_size` at a time; results come in the order of the requests.

        A request that cannot be run gets a Result with `error`; the others go on. `progress` is called with each
        result as it is finished.
        """
        results: dict[int, Result] = {}
        with closing(self._run(requests, batch_size, pieces=False)) as events:
            for number, result in events:
                results[number] = result
                if progress is not None:
                    progress(result)
        return [results[number] for number in range(len(requests))]

    def stream(self, requests: list[Request], batch_size: int = 16) -> Iterator[Event]:
        """Run all requests; gives text and pictures piece by piece as they are made, and each request's Result last.

        Closing the iterator ends the requests that are still running.
        """
        with closing(self._run(requests, batch_size, pieces=True)) as events:
            for _, event in events:
                yield event

    def _run(self, requests: list[Request], batch_size: int, pieces: bool) -> Iterator[tuple[int, Event]]:
        """Events with the number of their request."""
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: expected 1 or more")
        if not self.room.empty:
            raise RuntimeError("the engine is running another call; exhaust or close its stream first")
        waiting, encoded = deque(enumerate(requests)), deque()
        running: dict[int, Sample] = {}
        narrators: dict[int, Narrator] = {}
        turns: deque[Turn] = deque()
        try:
            while waiting or encoded or running:
                while (waiting or encoded) and len(running) < batch_size:
                    if not encoded:
                        ahead = [waiting.popleft() for _ in range(min(len(waiting), batch_size))]
                        ids = self.encoder.encode_many([request for _, request in ahead], self.decoder.group)
                        encoded.extend((*pair, i) for pair, i in zip(ahead, ids, strict=True))
                    number, request, ids = encoded[0]
                    try:
                        if isinstance(ids, InputError):
                            raise ids
                        sample = Sample(number, request, ids)
                        if not self._admit(sample):
                            break
                    except InputError as error:
                        encoded.popleft()
                        yield number, Result(request.id, error=str(error))
                        continue
                    encoded.popleft()
                    running[number] = sample
                    if pieces:
                        narrators[number] = Narrator(request.id, self.tokenizer)
                launched = self._turn(list(running.values()))
                if launched:
                    turns.append(launched)
                while len(turns) > (self.lag if launched else 0):
                    yield from self._read(turns.popleft(), running, narrators)
        finally:
            self.room.drop_fresh()
            for sample in running.values():
                self.room.leave(sample.number, sample.streams)

    def _read(self, turn: Turn, running: dict[int, Sample], narrators: dict[int, Narrator]) -> Iterator:
        """Take ids that have been read; events of what they complete."""
        picks = itertools.chain.from_iterable(zip(whose, picked.read(), strict=True) for whose, picked in turn)
        for (sample, epoch), new in picks:
            number = sample.number
            if epoch != sample.epoch or number not in running:
                continue
            for piece in self._take(sample, new, narrators.get(number)):
                yield number, piece
            if sample.error or sample.state.done:
                del running[number]
                narrators.pop(number, None)
                self.room.leave(number, sample.streams)
                yield number, self._result(sample)

    def _admit(self, sample: Sample) -> bool:
        """Give a sample its main stream, and its guides if it draws at once; False if there is no room for now.

        InputError if there never will be.
        """
        length, guides = self._worst_case(sample)
        if not self.room.admit(sample.number, sample.prompt, length, guides, later=sample.request.mode == "any"):
            return False
        sample.main = self.room.open(sample.prompt, length)
        random = uniforms(sample.request, MAX_POSITIONS)
        self.steps.slots.configure(sample.main.slot, sample.request, sample.prompt, sample.rules, random)
        if sample.state.to_draw:
            self._open_guides(sample)
        return True

    def _worst_case(self, sample: Sample) -> tuple[int, list[int]]:
        """Most positions of a sample's main stream, and of each of its guides."""
        request, rules, length = sample.request, sample.rules, len(sample.prompt)
        scales = request.guidance_text, request.guidance_image
        if request.mode == "image":
            prompts = grammar.guides(sample.prompt, *scales, self.layout)
            return length + IMAGE_CODES, [len(prompt) + IMAGE_CODES for prompt in prompts]
        if request.mode == "text":
            return min(rules.max_length, length + rules.max_new_tokens), []
        if not grammar.may_begin_image(rules, length):
            return rules.max_length, []
        # Pictures of its own make the image-conditioned prompt longer.
        image = [self.layout.bos, *self.layout.image_span(np.zeros(IMAGE_CODES, dtype=np.int64)), self.layout.boi]
        prompts = grammar.guides(image, *scales, self.layout)
        return rules.max_length, [rules.max_length if len(p) > 2 else 2 + IMAGE_CODES for p in prompts]

    def _open_guides(self, sample: Sample) -> None:
        """The streams that guidance needs beside the full one."""
        scales = sample.request.guidance_text, sample.request.guidance_image
        for prompt in grammar.guides(sample.main.ids, *scales, self.layout):
            sample.guides.append(self.room.open(prompt, len(prompt) + IMAGE_CODES))

    @torch.inference_mode()
    def _turn(self, samples: list[Sample]) -> Turn:
        """Launch one step of everything that can go on; what was picked, and for whom."""
        self._prefill()
        going = [sample for sample in samples if sample.due is not grammar.Due.NOTHING]
        hungry = [s for sample in going for s in sample.streams if s.fed < sample.length(s)]
        if hungry:
            lost = [stream for stream in hungry if stream.at != stream.fed]
            self._place(lost)
            self.steps.decode([stream.slot for stream in hungry])
            for stream in hungry:
                stream.fed += 1
        ready = [sample for sample in going if sample.ready]
        assert hungry or ready or not going, "no sample can go on"
        writing = [sample for sample in ready if sample.due is grammar.Due.TEXT]
        drawing = [sample for sample in ready if sample.due is grammar.Due.IMAGE]
        launched = []
        if writing:
            picked = self.steps.pick_text([sample.main.slot for sample in writing])
            launched.append(([sample.launched() for sample in writing], picked))
        if drawing:
            picked = self.steps.pick_image([sample.group for sample in drawing])
            launched.append(([sample.launched() for sample in drawing], picked))
        return launched

    def _prefill(self) -> None:
        """Compute the prompts of new streams, in passes of at most PREFILL_IDS ids."""
        fresh = deque(self.room.fresh())
        while fresh:
            batch, total = [], 0
            while fresh and (not batch or total + len(fresh[0].ids) - fresh[0].lease.cached <= PREFILL_IDS):
                batch.append(fresh.popleft())
                total += len(batch[-1].ids) - batch[-1].lease.cached
            slots = [stream.slot for stream in batch]
            self.steps.prefill(slots, [stream.lease for stream in batch], [stream.ids for stream in batch])
            for stream in batch:
                # The pass wrote their last states, so the last id counts as fed.
                stream.fed = len(stream.ids) - 1
            self._place(batch)
            for stream in batch:
                stream.fed += 1
        self.room.settle()

    def _place(self, streams: list[Stream]) -> None:
        """Tell the device what the id at each stream's first position that is not fed is, and that it is the last."""
        if streams:
            last = [stream.ids[stream.fed] for stream in streams]
            self.steps.slots.place([s.slot for s in streams], last, [s.fed for s in streams])
            for stream in streams:
                stream.at = stream.fed

    def _take(self, sample: Sample, new: int, narrator: Narrator | None) -> list[Event]:
        """Follow the grammar with an id that has been read; pieces of the answer that it completes."""
        if new < 0:
            sample.error = "the model gave logits that are not numbers"
            return []
        sample.ahead -= 1
        was_drawing = bool(sample.state.to_draw)
        sample.take(new, self.layout)
        pieces = [narrator.hear(new)] if narrator else []
        if not was_drawing and sample.state.to_draw:
            sample.void()
            # Wakes the stream, which fell asleep over boi.
            self.steps.slots.place([sample.main.slot], [new], [sample.main.at])
            self._open_guides(sample)
        if was_drawing and not sample.state.to_draw:
            self.room.close(sample.guides)
            sample.guides = []
            if sample.state.eoi_due:
                sample.take(self.layout.eoi, self.layout)
                self.steps.slots.see(sample.main.slot, self.layout.eoi)
        if narrator and sample.state.done:
            pieces.append(narrator.finish())
        return [piece for piece in pieces if piece]

    def _result(self, sample: Sample) -> Result:
        if sample.error:
            return Result(sample.request.id, error=sample.error)
        new = sample.main.ids[len(sample.prompt) :]
        return Result(sample.request.id, new, content_of(new, self.tokenizer))

"""Requests that run together on one engine; others may join and leave while they run.

Every request owns one stream (a sequence in the cache); while it draws it owns up to two more, for guidance: one that
sees only the prompt's images and one that sees nothing. A step of a session admits requests, prefills new streams
(packed, what is cached left out), feeds one id to every running stream, and lets every sample that is ready pick its
next id by the rules of its own state, all on the device (generate/steps.py). Ids are read one step later, while the
next one runs; a finished request's place is refilled.
"""

import itertools
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from medmax_fast.generate import grammar
from medmax_fast.generate.prompts import PromptEncoder
from medmax_fast.generate.requests import PicturePiece, Request, Result, TextPiece
from medmax_fast.generate.room import Room
from medmax_fast.generate.samples import Narrator, Sample, Stream, content_of, uniforms
from medmax_fast.generate.steps import Picked, Steps
from medmax_fast.model.layout import MAX_POSITIONS
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_CODES

# Ids per packed prefill pass; bounds the memory of activations.
PREFILL_IDS = 16384

Event = TextPiece | PicturePiece | Result
# What a step picked: samples with their epochs, and their ids on the way to the host.
Turn = list[tuple[list[tuple[Sample, int]], Picked]]


class Session:
    """What runs on an engine's cache between `submit` and the Result. One at a time, and not thread-safe.

    pieces: whether text and pictures are given as they are made, before each request's Result. Leaving the session as
    a context manager ends what still runs.
    """

    def __init__(self, encoder: PromptEncoder, steps: Steps, room: Room, lag: int, batch_size: int, pieces: bool):
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: expected 1 or more")
        if not room.empty:
            raise RuntimeError("the engine is running another call; exhaust or close its stream first")
        self._encoder, self._steps, self._room = encoder, steps, room
        self._tokenizer, self._layout = encoder.tokenizer, encoder.tokenizer.layout
        self._lag, self._batch_size, self._pieces = lag, batch_size, pieces
        self._numbers = itertools.count()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._encoded: deque[tuple[int, Request, list[int] | InputError]] = deque()
        self._running: dict[int, Sample] = {}
        self._narrators: dict[int, Narrator] = {}
        self._turns: deque[Turn] = deque()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._waiting or self._encoded or self._running)

    @property
    def running(self) -> int:
        """Requests that have been admitted and have not ended."""
        return len(self._running)

    def submit(self, request: Request) -> int:
        """Put a request in the line; the number that its events come with, counted from 0."""
        number = next(self._numbers)
        self._waiting.append((number, request))
        return number

    def cancel(self, number: int) -> None:
        """End a request wherever it is; nothing more comes of it. One that has ended already is no error."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] != number)
        self._encoded = deque(entry for entry in self._encoded if entry[0] != number)
        if number in self._running:
            # Guides opened by the last step have no pass yet, and other streams may share their pages.
            with torch.inference_mode():
                self._prefill()
            self._leave(number)

    def events(self, group=None) -> Iterator[tuple[int, Event]]:
        """Step until everything submitted has ended."""
        while self.busy:
            yield from self.step(group)

    def step(self, group=None) -> Iterator[tuple[int, Event]]:
        """Admit what there is room for, launch one step, read the one before; events with their requests' numbers.

        To be exhausted. group: the processes that share the model, which all make the same calls.
        """
        yield from self._admit_waiting(group)
        launched = self._turn(list(self._running.values()))
        if launched:
            self._turns.append(launched)
        while len(self._turns) > (self._lag if launched else 0):
            yield from self._read(self._turns.popleft())

    def close(self) -> None:
        """End everything that runs or waits, and give its room back."""
        self._waiting.clear()
        self._encoded.clear()
        self._room.drop_fresh()
        for number in list(self._running):
            self._leave(number)

    def _admit_waiting(self, group) -> Iterator[tuple[int, Event]]:
        """Requests in their order, while there is room; Results of those that cannot be run."""
        while (self._waiting or self._encoded) and len(self._running) < self._batch_size:
            if not self._encoded:
                ahead = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._batch_size))]
                ids = self._encoder.encode_many([request for _, request in ahead], group)
                self._encoded.extend((*pair, i) for pair, i in zip(ahead, ids, strict=True))
            number, request, ids = self._encoded[0]
            try:
                if isinstance(ids, InputError):
                    raise ids
                sample = Sample(number, request, ids)
                if not self._admit(sample):
                    break
            except InputError as error:
                self._encoded.popleft()
                yield number, Result(request.id, error=str(error))
                continue
            self._encoded.popleft()
            self._running[number] = sample
            if self._pieces:
                self._narrators[number] = Narrator(request.id, self._tokenizer)

    def _leave(self, number: int) -> None:
        """Forget a running request and give its room back."""
        self._room.leave(number, self._running.pop(number).streams)
        self._narrators.pop(number, None)

    def _read(self, turn: Turn) -> Iterator[tuple[int, Event]]:
        """Take ids that have been read; events of what they complete."""
        picks = itertools.chain.from_iterable(zip(whose, picked.read(), strict=True) for whose, picked in turn)
        for (sample, epoch), new in picks:
            number = sample.number
            if epoch != sample.epoch or number not in self._running:
                continue
            for piece in self._take(sample, new, self._narrators.get(number)):
                yield number, piece
            # Unless whoever took a piece has cancelled the request.
            if number in self._running and (sample.error or sample.state.done):
                self._leave(number)
                yield number, self._result(sample)

    def _admit(self, sample: Sample) -> bool:
        """Give a sample its main stream, and its guides if it draws at once; False if there is no room for now.

        InputError if there never will be.
        """
        length, guides = self._worst_case(sample)
        if not self._room.admit(sample.number, sample.prompt, length, guides, later=sample.request.mode == "any"):
            return False
        sample.main = self._room.open(sample.prompt, length)
        random = uniforms(sample.request, MAX_POSITIONS)
        self._steps.slots.configure(sample.main.slot, sample.request, sample.prompt, sample.rules, random)
        if sample.state.to_draw:
            self._open_guides(sample)
        return True

    def _worst_case(self, sample: Sample) -> tuple[int, list[int]]:
        """Most positions of a sample's main stream, and of each of its guides."""
        request, rules, length = sample.request, sample.rules, len(sample.prompt)
        scales = request.guidance_text, request.guidance_image
        if request.mode == "image":
            prompts = grammar.guides(sample.prompt, *scales, self._layout)
            return length + IMAGE_CODES, [len(prompt) + IMAGE_CODES for prompt in prompts]
        if request.mode == "text":
            return min(rules.max_length, length + rules.max_new_tokens), []
        if not grammar.may_begin_image(rules, length):
            return rules.max_length, []
        # Pictures of its own make the image-conditioned prompt longer.
        image = [self._layout.bos, *self._layout.image_span(np.zeros(IMAGE_CODES, dtype=np.int64)), self._layout.boi]
        prompts = grammar.guides(image, *scales, self._layout)
        return rules.max_length, [rules.max_length if len(p) > 2 else 2 + IMAGE_CODES for p in prompts]

    def _open_guides(self, sample: Sample) -> None:
        """The streams that guidance needs beside the full one."""
        scales = sample.request.guidance_text, sample.request.guidance_image
        for prompt in grammar.guides(sample.main.ids, *scales, self._layout):
            sample.guides.append(self._room.open(prompt, len(prompt) + IMAGE_CODES))

    @torch.inference_mode()
    def _turn(self, samples: list[Sample]) -> Turn:
        """Launch one step of everything that can go on; what was picked, and for whom."""
        self._prefill()
        going = [sample for sample in samples if sample.due is not grammar.Due.NOTHING]
        hungry = [s for sample in going for s in sample.streams if s.fed < sample.length(s)]
        if hungry:
            lost = [stream for stream in hungry if stream.at != stream.fed]
            self._place(lost)
            self._steps.decode([stream.slot for stream in hungry])
            for stream in hungry:
                stream.fed += 1
        ready = [sample for sample in going if sample.ready]
        assert hungry or ready or not going, "no sample can go on"
        writing = [sample for sample in ready if sample.due is grammar.Due.TEXT]
        drawing = [sample for sample in ready if sample.due is grammar.Due.IMAGE]
        launched = []
        if writing:
            picked = self._steps.pick_text([sample.main.slot for sample in writing])
            launched.append(([sample.launched() for sample in writing], picked))
        if drawing:
            picked = self._steps.pick_image([sample.group for sample in drawing])
            launched.append(([sample.launched() for sample in drawing], picked))
        return launched

    def _prefill(self) -> None:
        """Compute the prompts of new streams, in passes of at most PREFILL_IDS ids."""
        fresh = deque(self._room.fresh())
        while fresh:
            batch: list[Stream] = []
            total = 0
            while fresh and (not batch or total + len(fresh[0].ids) - fresh[0].lease.cached <= PREFILL_IDS):
                batch.append(fresh.popleft())
                total += len(batch[-1].ids) - batch[-1].lease.cached
            slots = [stream.slot for stream in batch]
            self._steps.prefill(slots, [stream.lease for stream in batch], [stream.ids for stream in batch])
            for stream in batch:
                # The pass wrote their last states, so the last id counts as fed.
                stream.fed = len(stream.ids) - 1
            self._place(batch)
            for stream in batch:
                stream.fed += 1
        self._room.settle()

    def _place(self, streams: list[Stream]) -> None:
        """Tell the device what the id at each stream's first position that is not fed is, and that it is the last."""
        if streams:
            last = [stream.ids[stream.fed] for stream in streams]
            self._steps.slots.place([s.slot for s in streams], last, [s.fed for s in streams])
            for stream in streams:
                stream.at = stream.fed

    def _take(self, sample: Sample, new: int, narrator: Narrator | None) -> list[Event]:
        """Follow the grammar with an id that has been read; pieces of the answer that it completes."""
        if new < 0:
            sample.error = "the model gave logits that are not numbers"
            return []
        sample.ahead -= 1
        was_drawing = bool(sample.state.to_draw)
        sample.take(new, self._layout)
        pieces = [narrator.hear(new)] if narrator else []
        if not was_drawing and sample.state.to_draw:
            sample.void()
            # Wakes the stream, which fell asleep over boi.
            self._steps.slots.place([sample.main.slot], [new], [sample.main.at])
            self._open_guides(sample)
        if was_drawing and not sample.state.to_draw:
            self._room.close(sample.guides)
            sample.guides = []
            if sample.state.eoi_due:
                sample.take(self._layout.eoi, self._layout)
                self._steps.slots.see(sample.main.slot, self._layout.eoi)
        if narrator and sample.state.done:
            pieces.append(narrator.finish())
        return [piece for piece in pieces if piece]

    def _result(self, sample: Sample) -> Result:
        if sample.error:
            return Result(sample.request.id, error=sample.error)
        new = sample.main.ids[len(sample.prompt) :]
        return Result(sample.request.id, new, content_of(new, self._tokenizer))

"""The generation engine: text, pictures and interleaved output, many requests at a time, in process.

Every request owns one stream (a sequence in the KV cache); while it draws it owns up to two more, for guidance:
one that sees only the prompt's images and one that sees nothing. Each turn of the loop feeds one id to every
running stream, prefills the streams that are new (packed, no padding), and lets every request pick its next id by
the rules of its own state. A finished request's place is refilled from the queue.
"""

from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from medmax_fast.generate import grammar, sampling
from medmax_fast.generate.cache import KVCache
from medmax_fast.generate.prompts import PromptEncoder
from medmax_fast.generate.requests import Request, Result, Sample, Stream
from medmax_fast.model.checkpoint import Checkpoint, open_checkpoint
from medmax_fast.model.load import load_model, shape_of
from medmax_fast.runtime import InputError, pick_device, pick_dtype
from medmax_fast.vocab import IMAGE_CODES

# Ids per packed prefill pass; bounds the memory of activations.
PREFILL_IDS = 16384


class Engine:
    """A loaded checkpoint that generates. Not thread-safe: one `generate` call at a time."""

    def __init__(self, model, encoder: PromptEncoder):
        self.model = model
        self.encoder = encoder
        self.tokenizer = encoder.tokenizer
        self.layout = encoder.tokenizer.layout
        self.device = model.lm_head.weight.device
        vocab = model.config.vocab_size
        self._masks = {}
        for name, mask in (
            ("text", grammar.text_mask(self.layout, self.tokenizer.unwritable, boi=False)),
            ("any", grammar.text_mask(self.layout, self.tokenizer.unwritable, boi=True)),
            ("image", grammar.image_mask(self.layout)),
        ):
            # Embeddings beyond the tokenizer's ids are never allowed.
            allowed = np.zeros(vocab, dtype=bool)
            allowed[: len(mask)] = mask
            self._masks[name] = torch.from_numpy(allowed).to(self.device)

    @classmethod
    def from_checkpoint(cls, path: str | Path | Checkpoint, device: str = "auto", precision: str = "auto") -> "Engine":
        """Load a checkpoint in either layout, a folder or open; InputError names what is wrong with it."""
        device = pick_device(device)
        # Opened once: opening checks the files' checksums.
        checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
        model = load_model(checkpoint, device, pick_dtype(precision, device))
        return cls(model, PromptEncoder(checkpoint, device))

    def decode_image(self, codes: np.ndarray) -> np.ndarray:
        """Pixels uint8 [512, 512, 3] of one picture's codes [1024]."""
        return self.encoder.image_tokenizer.decode(np.asarray(codes)[None])[0]

    @torch.inference_mode()
    def generate(
        self, requests: list[Request], batch_size: int = 16, progress: Callable[[Result], None] | None = None
    ) -> list[Result]:
        """Run all requests, at most `batch_size` at a time; results come in the order of the requests.

        A request that cannot be run gets a Result with `error`; the others go on. `progress` is called with each
        result as it is finished.
        """
        results: dict[int, Result] = {}
        waiting = deque(enumerate(requests))
        running: dict[int, Sample] = {}
        cache = self._new_cache()
        slots: list[Stream] = []

        def finish(number: int, result: Result) -> None:
            results[number] = result
            if progress is not None:
                progress(result)

        while waiting or running:
            while waiting and len(running) < batch_size:
                number, request = waiting.popleft()
                try:
                    running[number] = self._begin(request)
                except InputError as error:
                    finish(number, Result(request.id, error=str(error)))
            if not running:
                continue
            self._advance(list(running.values()), cache, slots)
            for number in [number for number, sample in running.items() if sample.done]:
                sample = running.pop(number)
                for stream in sample.streams:
                    _release(cache, slots, stream)
                finish(number, self._result(sample))
        return [results[number] for number in range(len(requests))]

    def _new_cache(self) -> KVCache:
        shape = shape_of(self.model)
        dtype = self.model.lm_head.weight.dtype
        return KVCache(shape.layers, shape.kv_heads, shape.head_dim, self.device, dtype)

    def _begin(self, request: Request) -> Sample:
        ids = self.encoder.encode(request)
        sample = Sample(request, ids, self.model.config.vocab_size, self.device)
        if request.mode == "image":
            sample.to_draw = IMAGE_CODES
            self._open_guides(sample)
        return sample

    def _open_guides(self, sample: Sample) -> None:
        """Two more prompts for guidance; one where the prompt holds no image, since then both are the same."""
        none = [self.layout.bos, self.layout.boi]
        image = grammar.images_only(sample.ids, self.layout)
        sample.guides = [Stream(none)] if image == none else [Stream(image), Stream(none)]

    def _advance(self, samples: list[Sample], cache: KVCache, slots: list[Stream]) -> None:
        """Feed every stream, then let every sample that is ready pick its next id."""
        if slots:
            self._decode(cache, slots)
        new = [stream for sample in samples for stream in sample.streams if stream.slot < 0]
        while new:
            batch = [new.pop(0)]
            total = len(batch[0].feed)
            while new and total + len(new[0].feed) <= PREFILL_IDS:
                total += len(new[0].feed)
                batch.append(new.pop(0))
            self._prefill(batch, cache, slots)
        # Sorted before anything is picked: a text that picks boi has new guides to prefill first.
        writing = [sample for sample in samples if sample.ready and not sample.to_draw]
        drawing = [sample for sample in samples if sample.ready and sample.to_draw]
        self._pick_text(writing)
        self._pick_image(drawing, cache, slots)

    def _prefill(self, streams: list[Stream], cache: KVCache, slots: list[Stream]) -> None:
        lengths = [len(stream.feed) for stream in streams]
        cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=self.device)
        numbers = cache.open(len(streams), max(lengths))
        cache.begin_prefill(numbers, cu_seqlens)
        ids = [i for stream in streams for i in stream.feed]
        positions = [p for length in lengths for p in range(length)]
        hidden = self._forward([ids], [positions], cache)[0]
        for stream, number, end, length in zip(streams, numbers, cu_seqlens[1:].tolist(), lengths, strict=True):
            stream.feed.clear()
            stream.slot, stream.position, stream.hidden = number, length, hidden[end - 1]
            slots.append(stream)

    def _decode(self, cache: KVCache, slots: list[Stream]) -> None:
        cache.begin_decode(len(slots))
        ids = [[stream.feed.popleft()] for stream in slots]
        hidden = self._forward(ids, [[stream.position] for stream in slots], cache)[:, 0]
        for stream, row in zip(slots, hidden, strict=True):
            stream.position += 1
            stream.hidden = row

    def _forward(self, ids: list[list[int]], positions: list[list[int]], cache: KVCache) -> torch.Tensor:
        return self.model.model(
            input_ids=torch.tensor(ids, device=self.device),
            position_ids=torch.tensor(positions, device=self.device),
            kv_cache=cache,
            use_cache=False,
        ).last_hidden_state

    def _logits(self, streams: list[Stream]) -> torch.Tensor:
        return self.model.lm_head(torch.stack([stream.hidden for stream in streams])).float()

    def _column(self, samples: list[Sample], name: str) -> torch.Tensor:
        return torch.tensor([[getattr(s.request, name)] for s in samples], dtype=torch.float32, device=self.device)

    def _pick_text(self, samples: list[Sample]) -> None:
        """The next text id, boi or eos of each sample."""
        if not samples:
            return
        allowed = []
        for s in samples:
            begin = grammar.may_begin_image(s.request.mode, len(s.ids), s.request.max_length)
            allowed.append(self._masks["any" if begin else "text"])
        logits = self._logits([s.main for s in samples]).masked_fill(~torch.stack(allowed), float("-inf"))
        seen = torch.stack([s.seen for s in samples])
        logits = sampling.penalize_repetition(logits, seen, self._column(samples, "repetition_penalty"))
        picked = self._draw(samples, logits, "temperature", "top_p")
        for sample, new in zip(samples, picked, strict=True):
            sample.append(new)
            sample.text_left -= 1
            if new == self.layout.boi:
                sample.to_draw = IMAGE_CODES
                self._open_guides(sample)
            elif new == self.layout.eos or not sample.text_left or len(sample.ids) >= sample.request.max_length:
                sample.done = True

    def _pick_image(self, samples: list[Sample], cache: KVCache, slots: list[Stream]) -> None:
        """The next image id of each sample; eoi, and back to text, after the last."""
        if not samples:
            return
        full, image, none = (self._logits([(s.main, *s.guides)[i] for s in samples]) for i in (0, 1, -1))
        scales = self._column(samples, "guidance_text"), self._column(samples, "guidance_image")
        logits = sampling.guide(full, image, none, *scales).masked_fill(~self._masks["image"], float("-inf"))
        picked = self._draw(samples, logits, "image_temperature", "image_top_p")
        for sample, new in zip(samples, picked, strict=True):
            sample.append(new)
            sample.to_draw -= 1
            if sample.to_draw:
                continue
            for guide in sample.guides:
                _release(cache, slots, guide)
            sample.guides = []
            if sample.request.mode == "image":
                sample.done = True
            else:
                sample.append(self.layout.eoi)
                sample.text_left = sample.request.max_new_tokens
                sample.done = len(sample.ids) >= sample.request.max_length

    def _draw(self, samples: list[Sample], logits: torch.Tensor, temperature: str, top_p: str) -> list[int]:
        if all(sample.generator is None for sample in samples):
            return sampling.draw(logits, [None] * len(samples))
        logits = logits / self._column(samples, temperature)
        logits = sampling.keep_top_p(logits, self._column(samples, top_p))
        return sampling.draw(logits, [sample.generator for sample in samples])

    def _result(self, sample: Sample) -> Result:
        new = sample.ids[sample.prompt_length :]
        content: list[dict] = []
        for kind, ids in grammar.split_pieces(new, self.layout):
            if kind == "image":
                codes = self.layout.codes_from_ids(np.array(ids))
                content.append({"type": "image", "codes": codes})
            else:
                content.append({"type": "text", "text": self.tokenizer.decode(ids)})
        return Result(sample.request.id, new, content)


def _release(cache: KVCache, slots: list[Stream], stream: Stream) -> None:
    """Free a stream's slot; the stream of the last slot takes its place."""
    last = cache.close(stream.slot)
    moved = slots.pop()
    assert moved.slot == last
    if moved is not stream:
        slots[stream.slot] = moved
        moved.slot = stream.slot
    stream.slot = -1

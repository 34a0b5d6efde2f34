"""What bench_generate runs beside the engine: the same random weights in transformers' model, prompts, comparisons.

`Stock.generate` is transformers' own, with our rules of text as a logits processor. `Stock.answer` and `Stock.picture`
are the published inference: one request at a time, for a picture three streams of batch 1 with a cache of keys and
values each, logits of the whole vocabulary for every id, then masks and top-p by a full sort. The host reads no id
before the last.
"""

from collections.abc import Callable
from contextlib import closing
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.sections import forget
from medmax_fast.generate import grammar
from medmax_fast.generate.engine import Engine
from medmax_fast.generate.pages import PAGE, pages_of
from medmax_fast.generate.prompts import PromptEncoder
from medmax_fast.generate.requests import PicturePiece, Request
from medmax_fast.generate.samples import PREVIEW
from medmax_fast.model.decoder import Decoder
from medmax_fast.model.init import SHAPES, RandomCheckpoint
from medmax_fast.model.load import load_model
from medmax_fast.runtime import pick_dtype
from medmax_fast.vocab import IMAGE_CODES, IMAGE_IDS

DEFAULTS = Request("", token_ids=[])
# Ids of a question's words, and of its prompt: bos, image, question, eot.
QUESTION_IDS = 12
PROMPT_IDS = 1 + IMAGE_IDS + QUESTION_IDS + 1


class Models:
    """A random checkpoint and what is loaded of it, always with the same weights."""

    def __init__(self, size: str, device: torch.device, folder: str):
        self.device, self.dtype = device, pick_dtype("auto", device)
        self._generator = torch.Generator(device)
        dtype = torch.float32 if size == "tiny" else torch.bfloat16
        self._checkpoint = RandomCheckpoint(Path(folder), SHAPES[size], self._generator, dtype)
        self.encoder = PromptEncoder(self._checkpoint, device)
        self.shape, self.layout = self._checkpoint.shape, self.encoder.tokenizer.layout

    @property
    def checkpoint(self) -> RandomCheckpoint:
        """The checkpoint, to be read once from its first tensor to its last."""
        self._generator.manual_seed(0)
        return self._checkpoint

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder.load(self.checkpoint, self.device, self.dtype)

    @cached_property
    def stock(self) -> "Stock":
        return Stock(self)

    def engine(self, sequences: int, length: int, decoder: Decoder | None = None) -> Engine:
        """An engine whose cache has room for so many sequences of a length, and for nothing else."""
        # What is left of the one before it.
        forget()
        return Engine(decoder or self.decoder, self.encoder, sequences * pages_of(length) * PAGE)


class Stock:
    """transformers' model with its own attention. Not the code that was published, but its shape."""

    def __init__(self, models: Models):
        self.model = load_model(models.checkpoint, models.device, models.dtype)
        self.model.set_attn_implementation("sdpa")
        self.layout, self.device = models.layout, models.device
        text = grammar.text_mask(self.layout, models.encoder.tokenizer.unwritable, boi=False)
        image = np.zeros_like(text)
        image[self.layout.image_start : self.layout.image_end] = True
        # Embeddings beyond the tokenizer's ids are never allowed.
        room = (0, models.shape.vocab_size - self.layout.vocab_size)
        self._text, self._image = (F.pad(torch.from_numpy(mask), room).to(self.device) for mask in (text, image))

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """New ids, greedy, of prompts of one length; each up to its eos."""
        ids = torch.tensor(prompts, device=self.device)
        rules = {"do_sample": False, "repetition_penalty": DEFAULTS.repetition_penalty, "max_new_tokens": new}

        def allow(_, scores: torch.Tensor) -> torch.Tensor:
            return scores.masked_fill(~self._text, -torch.inf)

        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[allow], **rules)
        rows, eos = out[:, ids.shape[1] :].tolist(), self.layout.eos
        return [row[: row.index(eos) + 1] if eos in row else row for row in rows]

    @torch.inference_mode()
    def text_logits(self, ids: list[int]) -> torch.Tensor:
        """fp32 [V] of the id after `ids`, by the rules of text."""
        ids = torch.tensor([ids], device=self.device)
        logits = self._feed(ids, None)
        penalty = DEFAULTS.repetition_penalty
        seen = torch.zeros_like(self._text).index_fill_(0, ids[0], True)
        lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
        return torch.where(seen, lowered, logits).masked_fill(~self._text, -torch.inf)

    def answer(self, ids: list[int]) -> int:
        """The one id after `ids`, greedy."""
        return int(keep_top_p(self.text_logits(ids), DEFAULTS.top_p).argmax())

    def answers(self, prompts: list[list[int]], _: int) -> list[list[int]]:
        return [[self.answer(prompt)] for prompt in prompts]

    def pictures(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        return [self.picture(prompt, count) for prompt in prompts]

    @torch.inference_mode()
    def picture(self, prompt: list[int], count: int) -> list[int]:
        """The first codes of the picture after a prompt, greedy."""
        from transformers import DynamicCache

        streams, new = self._streams(prompt), []
        fed, caches = [torch.tensor([ids], device=self.device) for ids in streams], [DynamicCache() for _ in streams]
        for _ in range(count):
            guided = guide(*(self._feed(ids, cache) for ids, cache in zip(fed, caches, strict=True)))
            logits = guided.masked_fill(~self._image, -torch.inf) / DEFAULTS.image_temperature
            new.append(keep_top_p(logits, DEFAULTS.image_top_p).argmax()[None])
            fed = [new[-1][None]] * 3
        return (torch.cat(new) - self.layout.image_start).tolist()

    @torch.inference_mode()
    def image_logits(self, prompt: list[int], codes: list[int]) -> torch.Tensor:
        """Guided logits, fp32 [codes], of the code after `codes`; no cache, and not yet divided by the temperature."""
        drawn = self.layout.ids_from_codes(np.array(codes, dtype=np.int64)).tolist()
        streams = [torch.tensor([ids + drawn], device=self.device) for ids in self._streams(prompt)]
        return guide(*(self._feed(ids, None) for ids in streams))[self._image]

    def _streams(self, prompt: list[int]) -> list[list[int]]:
        begun = [*prompt, self.layout.boi]
        return [begun, grammar.images_only(begun, self.layout), [self.layout.bos, self.layout.boi]]

    def _feed(self, ids: torch.Tensor, cache) -> torch.Tensor:
        hidden = self.model.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state
        return self.model.lm_head(hidden)[0].float()[-1]


def guide(full: torch.Tensor, image: torch.Tensor, none: torch.Tensor) -> torch.Tensor:
    return none + DEFAULTS.guidance_image * (image - none) + DEFAULTS.guidance_text * (full - image)


def keep_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """-inf for all but the likeliest ids that make up top_p, by a full sort."""
    ordered, order = logits.sort(descending=True)
    probability = ordered.softmax(-1)
    ordered = ordered.masked_fill(probability.cumsum(-1) - probability >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def text_prompts(layout, count: int, length: int, *seed: int) -> list[list[int]]:
    """bos, text, eot."""
    rng = np.random.default_rng(seed)
    words = rng.integers(layout.text_start, layout.vocab_size, (count, length - 2)).tolist()
    return [[layout.bos, *row, layout.eot] for row in words]


def question_prompts(layout, turns: int, questions: int, images: int) -> np.ndarray:
    """bos, image, question, eot: [turns, questions, images, ids]."""
    rng = np.random.default_rng(0)
    asked = np.empty((turns, questions, images, PROMPT_IDS), dtype=np.int64)
    asked[..., 0], asked[..., -1] = layout.bos, layout.eot
    words = rng.integers(layout.text_start, layout.vocab_size, (*asked.shape[:3], QUESTION_IDS))
    asked[..., -1 - QUESTION_IDS : -1] = words
    for turn, image in np.ndindex(turns, images):
        span = layout.image_span(rng.integers(0, layout.num_codes, IMAGE_CODES))
        asked[turn, :, image, 1 : 1 + len(span)] = span
    return asked


def write(engine: Engine, prompts: list[list[int]], new: int, alone: bool = False, **settings) -> list[list[int]]:
    """New ids of the engine, greedy unless the settings say otherwise."""
    settings = {"greedy": True, "max_new_tokens": new} | settings
    requests = [Request(str(i), token_ids=prompt, **settings) for i, prompt in enumerate(prompts)]
    if alone:
        results = [engine.generate([request], 1)[0] for request in requests]
    else:
        results = engine.generate(requests, len(requests))
    assert not any(result.error for result in results), [result.error for result in results]
    return [result.token_ids for result in results]


def draw(engine: Engine, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The first codes of a picture for each prompt, greedy; the rest is not drawn. Pieces come every PREVIEW codes."""
    assert count % PREVIEW == 0, count
    requests = [Request(str(i), token_ids=prompt, mode="image", greedy=True) for i, prompt in enumerate(prompts)]
    drawn: dict[str, list[int]] = {}
    with closing(engine.stream(requests, len(requests))) as events:
        for event in events:
            if isinstance(event, PicturePiece):
                drawn[event.id] = event.codes[:count].tolist()
            assert not getattr(event, "error", None), event
            if len(drawn) == len(requests) and min(map(len, drawn.values())) == count:
                break
    return [drawn[request.id] for request in requests]


def compare(found: list[list[int]], expected: list[list[int]], logits: Callable | None = None) -> dict:
    """How far rows of ids are from those expected.

    differing: of `ids`. agree_least, agree_mean: ids before the first difference of the rows that differ, if any do.
    logits(row, position): what the reference would pick from there. logit_gap: by how much the id found falls short of
    the highest one, where a row first differs; the most of all rows. Later differences only follow from the first.
    """
    agree, differing, gap = [], 0, 0.0
    for row, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        unequal = [at for at, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]]
        differing += len(unequal) + abs(len(ours) - len(theirs))
        if ours != theirs:
            agree.append(unequal[0] if unequal else min(len(ours), len(theirs)))
        if unequal and logits is not None:
            scores = logits(row, unequal[0])
            gap = max(gap, float(scores.max() - scores[ours[unequal[0]]]))
        elif ours != theirs:
            # One ends where the other goes on with the same ids.
            gap = float("inf")
    return {
        "ids": sum(map(len, expected)),
        "differing": differing,
        "rows_differing": len(agree),
        "agree_least": min(agree, default=None),
        "agree_mean": float(np.mean(agree)) if agree else None,
        "logit_gap": gap if logits is not None else None,
    }


@torch.inference_mode()
def row_losses(engine: Engine, rows: list[list[int]]) -> tuple[float, torch.Tensor]:
    """Mean cross-entropy of every id but the first of rows, no id masked, and the likeliest ids, as engine computes.

    The rows are prompts of one packed pass; the states of all their ids are taken as the decoder returns them.
    """
    states: list[torch.Tensor] = []
    hook = engine.decoder.register_forward_hook(lambda _, __, out: states.append(out))
    requests = [Request(f"row {i}", token_ids=row, greedy=True, max_new_tokens=1) for i, row in enumerate(rows)]
    engine.generate(requests, len(rows))
    hook.remove()
    parts = states[0].split([len(row) for row in rows])
    losses, likeliest = [], []
    for row, part in zip(rows, parts, strict=True):
        logits = (part[:-1] @ engine.decoder.head.T).float()
        losses.append(F.cross_entropy(logits, torch.tensor(row[1:], device=logits.device), reduction="none"))
        likeliest.append(logits.argmax(-1))
    return float(torch.cat(losses).double().mean()), torch.cat(likeliest)

"""The evaluation's backend for image-text-to-text models of transformers, each with its own chat template.

An ask becomes one user message of its images and texts in order, the model's template does the rest, and the answer is
decoded greedily, whatever the model's own generation settings say. Asks of a call with the same budget and number of
images are batched by length of text, padded on the left; the next batch is read and preprocessed in a thread while the
model works. In fp32 an answer does not depend on its batch; in 16 bits near-ties may turn out otherwise.

Left out: questions about one image share its decoding only, neither the processor's pixels nor vision features, which
every model lays out, pads and merges in its own way.
"""

import contextlib
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from medmax_fast.data.images import ImageError, decode, read_file
from medmax_fast.eval.backends.hf_loading import load_model, refusals
from medmax_fast.eval.backends.protocol import NEW_TOKENS, Answer, Ask
from medmax_fast.runtime import log, one_line

# Threads that decode image files.
READERS = min(8, os.cpu_count() or 1)
# Those of a model's generation settings that say what its ids are; the others choose between answers.
KEPT = ("bos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True)
class _Prompt:
    """An ask, its place in the call, and its images as PIL once they are read."""

    place: int
    ask: Ask
    images: list = field(default_factory=list)

    @property
    def kind(self) -> tuple[int, int]:
        """What the prompts of a batch have in common: the budget of new ids and the number of images."""
        return self.ask.new_tokens or NEW_TOKENS, len(_paths(self.ask))

    @property
    def message(self) -> dict:
        images = iter(self.images)
        content = [
            {"type": "image", "image": next(images)} if piece["type"] == "image" else {**piece}
            for piece in self.ask.content
        ]
        return {"role": "user", "content": content}


class HFBackend:
    """A model with its processor; answers with text only."""

    draws = False

    def __init__(self, model, processor, revision: str | None, name: str):
        """model, processor: as load_model gives them; revision, name: what the facts say of them."""
        from transformers import GenerationConfig

        self.model, self.processor, self.revision, self.name = model, processor, revision, name
        tokenizer, own = processor.tokenizer, model.generation_config
        kept = {setting: getattr(own, setting, None) for setting in KEPT}
        # A chat's end of turn may be named by one of the two only.
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        self._eos = {end for end in (*ends, tokenizer.eos_token_id) if end is not None}
        kept["eos_token_id"] = sorted(self._eos) or None
        if tokenizer.pad_token is None:
            # Any id will do, as padding is masked.
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        tokenizer.padding_side = "left"
        # generate() takes from here whatever a call leaves open.
        self._settings = {**kept, "pad_token_id": tokenizer.pad_token_id, "do_sample": False, "num_beams": 1}
        model.generation_config = GenerationConfig(**self._settings)
        # A tokenizer changes its state while it works.
        self._tokenizing = threading.Lock()
        # Kind of prompt -> the largest batch that memory was found to hold.
        self._most: dict[tuple[int, int], int] = {}

    @classmethod
    def from_pretrained(cls, model: str, device, dtype) -> "HFBackend":
        """Load a folder or a model of the hub as a torch.dtype onto a torch.device; InputError naming --model."""
        loaded, processor, commit = load_model(model, device, dtype)
        return cls(loaded, processor, commit, model)

    def facts(self) -> dict:
        """What results.json says of the model; revision is the hub's commit, null for a folder."""
        return {
            "kind": "hf",
            "model": self.name,
            "revision": self.revision,
            "architecture": type(self.model).__name__,
            # Its resampling differs with and without torchvision.
            "image_processor": type(self.processor.image_processor).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "decoding": "greedy, no repetition penalty, the model's own chat template",
        }

    def answer(self, asks: list[Ask], batch_size: int, done: Callable[[int], None]) -> list[Answer]:
        """One answer for every ask, in their order; the more asks a call has, the better its batches.

        An image that cannot be used, or a prompt that the processor refuses, is the error of its own ask alone. Where
        a GPU runs out of memory, prompts of that kind come in half as large batches from then on.
        """
        prompts = [_Prompt(place, ask) for place, ask in enumerate(asks)]
        answers = {
            prompt.place: Answer(prompt.ask.id, error=f"{self.name} answers with text only, asked for a picture")
            for prompt in prompts
            if prompt.ask.mode == "image"
        }
        done(len(answers))
        waiting = deque(_batches([prompt for prompt in prompts if prompt.place not in answers], batch_size))
        with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(1) as ahead:
            images = _Images((prompt.ask for batch in waiting for prompt in batch), readers)
            coming = self._prepare(waiting, images, ahead)
            while coming:
                batch, inputs, broken = coming.result()
                coming = self._prepare(waiting, images, ahead)
                answers |= broken
                if batch:
                    answers |= self._answer(batch, inputs)
                done(len(broken) + len(batch))
        return [answers[prompt.place] for prompt in prompts]

    def _prepare(self, waiting: deque, images: "_Images", ahead: ThreadPoolExecutor) -> Future | None:
        """Have the next batch read and encoded; None when there is no more."""
        if not waiting:
            return None
        batch = waiting.popleft()
        most = self._most.get(batch[0].kind, len(batch))
        if len(batch) > most:
            waiting.appendleft(batch[most:])
        return ahead.submit(self._read, batch[:most], images)

    def _read(self, batch: list[_Prompt], images: "_Images"):
        """(prompts whose images are good, their inputs or None where the processor refuses, answers of the others)."""
        found = [(prompt, images.of(prompt.ask)) for prompt in images.begin(batch)]
        broken = {prompt.place: Answer(prompt.ask.id, error=error) for prompt, error in found if isinstance(error, str)}
        good = [_Prompt(prompt.place, prompt.ask, those) for prompt, those in found if not isinstance(those, str)]
        with contextlib.suppress(*refusals()):
            return good, self._encode(good) if good else None, broken
        # The cause is found, and told, when the batch's turn comes.
        return good, None, broken

    def _answer(self, batch: list[_Prompt], inputs=None) -> dict[int, Answer]:
        """Answers by place; what fails as a batch is tried again in halves, down to the prompt at fault."""
        import torch

        refusal = None
        try:
            return self._greedy(batch, self._encode(batch) if inputs is None else inputs)
        except torch.OutOfMemoryError:
            # Outside the handler the traceback no longer holds the tensors.
            pass
        except refusals() as error:
            if isinstance(error, torch.AcceleratorError):
                # The device is of no more use to this process.
                raise
            refusal = one_line(error)
        if refusal is None:
            torch.cuda.empty_cache()
        if len(batch) == 1:
            error = (
                f"the model refuses the prompt ({refusal})" if refusal else "out of GPU memory with this prompt alone"
            )
            return {batch[0].place: Answer(batch[0].ask.id, error=error)}
        half = (len(batch) + 1) // 2
        if refusal is None:
            if not self._most:
                log(f"{self.name}: out of GPU memory with {len(batch)} prompts at a time, going on with {half}")
            kind = batch[0].kind
            self._most[kind] = min(half, self._most.get(kind, half))
        return self._answer(batch[:half]) | self._answer(batch[half:])

    def _encode(self, batch: list[_Prompt]):
        """The model's inputs on the host, padded on the left."""
        with self._tokenizing:
            return self.processor.apply_chat_template(
                [[prompt.message] for prompt in batch],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )

    def _greedy(self, batch: list[_Prompt], inputs) -> dict[int, Answer]:
        from transformers import GenerationConfig

        budget, _ = batch[0].kind
        settings = GenerationConfig(**self._settings, max_new_tokens=budget)
        ids = self.model.generate(**inputs.to(self.model.device, self.model.dtype), generation_config=settings)
        answers = {}
        for prompt, row in zip(batch, ids[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((i + 1 for i, new in enumerate(row) if new in self._eos), len(row))
            with self._tokenizing:
                text = self.processor.tokenizer.decode(row[:end], skip_special_tokens=True).strip()
            answers[prompt.place] = Answer(prompt.ask.id, [{"type": "text", "text": text}], row[:end])
        return answers


class _Images:
    """The images of a call: each file is decoded once, in threads, and kept until its last use."""

    def __init__(self, asks: Iterable[Ask], readers: ThreadPoolExecutor):
        self._uses = Counter(path for ask in asks for path in _paths(ask))
        self._found: dict[str, Future] = {}
        self._readers = readers

    def begin(self, batch: list[_Prompt]) -> list[_Prompt]:
        """Start on all files of a batch."""
        for path in (path for prompt in batch for path in _paths(prompt.ask)):
            if path not in self._found:
                self._found[path] = self._readers.submit(_read_image, path)
        return batch

    def of(self, ask: Ask) -> list | str:
        """The images of an ask, or why one of them cannot be used."""
        found = []
        for path in _paths(ask):
            self._uses[path] -= 1
            found.append((self._found[path] if self._uses[path] else self._found.pop(path)).result())
        return next((image for image in found if isinstance(image, str)), found)


def _batches(prompts: list[_Prompt], batch_size: int) -> list[list[_Prompt]]:
    """Batches of one kind each, the longest text first, so that what memory does not hold shows early."""
    kinds: dict[tuple[int, int], list[_Prompt]] = {}
    for prompt in prompts:
        kinds.setdefault(prompt.kind, []).append(prompt)
    batches = []
    for alike in kinds.values():
        alike.sort(key=lambda prompt: -sum(len(piece.get("text", "")) for piece in prompt.ask.content))
        batches += [alike[start : start + batch_size] for start in range(0, len(alike), batch_size)]
    return batches


def _read_image(path: str):
    """RGB pixels as PIL, which leaves processors no channel order to guess; the reason for a file that has none."""
    from PIL import Image

    try:
        return Image.fromarray(decode(read_file(path), path, packed=True).decoded)
    except ImageError as error:
        return str(error)


def _paths(ask: Ask) -> list[str]:
    return [piece["path"] for piece in ask.content if piece["type"] == "image"]

"""What benchmarks.count counts: stages of the 7B model as they run on a GPU, in the shapes of `medmax bench`."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.bench_generate import DRAW_PROMPT, GPU, picture_shape, text_shape
from benchmarks.bench_images import BATCH, REAL, encoder_shape
from benchmarks.counting.tally import Count, Tally
from benchmarks.stages.generate_forms import PROMPT_IDS, QUESTION_IDS
from benchmarks.stages.generate_work import pairs_of, picture_work, prefill_flop, text_work
from benchmarks.stages.image_forms import encode_bytes, encode_flop
from benchmarks.stages.train_parts import make_rows, step_flop
from medmax_fast.config import TrainConfig
from medmax_fast.data.collate import collate
from medmax_fast.data.packing import plan_epoch
from medmax_fast.generate.engine import Engine
from medmax_fast.generate.pages import PAGE, pages_of
from medmax_fast.generate.prompts import PromptEncoder
from medmax_fast.generate.requests import Request
from medmax_fast.model.decoder import Decoder
from medmax_fast.model.image_tokenizer import ImageTokenizer
from medmax_fast.model.init import SHAPES, RandomCheckpoint
from medmax_fast.model.layout import Key
from medmax_fast.model.load import load_model
from medmax_fast.model.trainable import prepare
from medmax_fast.model.vqgan import VQGAN
from medmax_fast.vocab import IMAGE_CODES, IdLayout, read_vocab

PACK = 16384
CONFIG = TrainConfig(data="", ckpt="", output="")
# Model, whether all weights are trained, --recompute.
TRAINED = (("7b", False, "none"), ("7b", False, "selective"), ("7b", False, "layers"), ("1b", True, "none"))
# Rows of data, enough for a full pack; steps after which every graph has been captured.
ROWS, SETTLED = 40, 3


@dataclass
class Found:
    """A stage's name and shape in the words of its floor, the least bytes (0: no floor) and FLOP, and what was counted.

    memory: most bytes held since it began to load.
    """

    stage: str
    shape: str
    floor: tuple[float, float]
    count: Count
    memory: int


class EmptyCheckpoint(RandomCheckpoint):
    """A checkpoint of tensors without values."""

    def _draw(self, key: Key) -> torch.Tensor:
        return torch.empty(key.part_size(self.shape, 1), dtype=self._dtype)


@contextmanager
def empty_checkpoint(size: str) -> Iterator[EmptyCheckpoint]:
    with tempfile.TemporaryDirectory() as folder:
        yield EmptyCheckpoint(Path(folder), SHAPES[size], torch.Generator(), torch.bfloat16)


def encoder(tally: Tally) -> Iterator[Found]:
    """A batch of pictures, from its graph."""
    size = BATCH["cuda"]
    with tally.apart() as whole:
        tokenizer = ImageTokenizer(VQGAN(REAL, decoder=False), "", "cuda", "fp16", size)
        x_BCHW = torch.empty(size, 3, REAL.resolution, REAL.resolution, device="cuda", dtype=torch.float16)
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        # Captures the graph.
        tokenizer.encode_tensor(x_BCHW)
        with tally.apart() as count:
            tokenizer.encode_tensor(x_BCHW)
    floor = encode_bytes(REAL, size), size * encode_flop(REAL)
    yield Found("encoder", encoder_shape(REAL, size), floor, count, whole.peak)


def generation(tally: Tally) -> Iterator[Found]:
    """Steps of text and of pictures as the floors have them, and the prefill of a question about an image."""
    with empty_checkpoint("7b") as checkpoint:
        encoder = PromptEncoder(checkpoint, torch.device("cuda"))
        decoder = Decoder.load(checkpoint, "cuda", torch.bfloat16)
    layout = encoder.tokenizer.layout
    words = [layout.text_start] * max(GPU.prompt, DRAW_PROMPT, QUESTION_IDS)
    picture = layout.image_span(np.zeros(IMAGE_CODES, dtype=np.int64)).tolist()

    def run(prompt: list[int], batch: int, streams: int, length: int, positions: float, settled: int, **settings):
        """A step of `batch` requests after `settled` others; each of the streams of a length sees so many positions."""
        # The last id of each prompt is its own, so that none is found in the cache.
        requests = [Request(str(i), token_ids=[*prompt, layout.text_start + i], **settings) for i in range(batch)]
        with tally.apart() as whole:
            engine = Engine(decoder, encoder, streams * pages_of(length) * PAGE)
            tally.seen = positions / engine.cache.kv.shape[2] / PAGE
            with engine.session(batch, pieces=False) as session:
                for request in requests:
                    session.submit(request)
                for _ in range(settled):
                    list(session.step())
                with tally.apart() as count:
                    list(session.step())
        return count, whole.peak

    for batch in GPU.batches:
        tally.answer, length = layout.text_start, GPU.prompt + GPU.new
        prompt, seen = [layout.bos, *words[: GPU.prompt - 2]], batch * (GPU.prompt + GPU.new / 2)
        found = run(prompt, batch, batch, length, seen, SETTLED, mode="text", max_new_tokens=GPU.new)
        floor = text_work(decoder.shape, 2, GPU.prompt, [GPU.new] * batch, batch)
        yield Found("text", text_shape(GPU, batch), floor, *found)
    for batch in GPU.pictures:
        tally.answer, length = layout.image_start, DRAW_PROMPT + 1 + IMAGE_CODES
        # On average half of a picture; the other stream begins with bos and boi.
        prompt, seen = [layout.bos, *words[: DRAW_PROMPT - 2]], batch * (DRAW_PROMPT + 3 + IMAGE_CODES)
        found = run(prompt, batch, 2 * batch, length, seen, SETTLED, mode="image")
        floor = picture_work(decoder.shape, 2, DRAW_PROMPT + 1, IMAGE_CODES, batch, layout.num_codes)
        yield Found("pictures", picture_shape(batch, IMAGE_CODES), floor, *found)
    tally.answer, prompt = layout.text_start, [layout.bos, *picture, *words[:QUESTION_IDS]]
    # The first step is the prefill.
    found = run(prompt, 1, 1, PROMPT_IDS + 1, PROMPT_IDS, 0, mode="text", max_new_tokens=1)
    floor = 0, prefill_flop(decoder.shape, PROMPT_IDS, pairs_of(PROMPT_IDS), 1)
    yield Found("vqa", f"1 question of {PROMPT_IDS:,} ids", floor, *found)


def training(tally: Tally) -> Iterator[Found]:
    """Forward and backward pass of a pack, of an adapter or of all weights, by what of the activations is kept."""
    for size, full, recompute in TRAINED:
        with tally.apart() as whole:
            with empty_checkpoint(size) as checkpoint:
                layout = IdLayout.from_vocab(read_vocab(checkpoint.tokenizer_path))
                model = load_model(checkpoint, "cuda", torch.bfloat16)
            # As DeepSpeed has them, adapters are in 16 bits too.
            packed = prepare(model, replace(CONFIG, full=full, recompute=recompute), layout).to(torch.bfloat16)
            ids, offsets = make_rows(ROWS, layout, 1)
            pack = collate(ids, offsets, plan_epoch(np.diff(offsets), PACK, 0, 0).pack(0), layout.eot)
            batch = pack.to_torch("cuda", non_blocking=True)
            with tally.apart() as count:
                packed(batch)[0].backward()
        ids = len(pack.input_ids)
        floor = 0, step_flop(checkpoint.shape, full, ids, pack.target_tokens)
        shape = f"{size}, a pack of {ids:,} ids, recompute {recompute}"
        yield Found("full" if full else "train", shape, floor, count, whole.peak)
        del model, packed


STAGES: dict[str, Callable[[Tally], Iterator[Found]]] = {
    stage.__name__: stage for stage in (encoder, generation, training)
}

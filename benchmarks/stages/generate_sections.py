"""Sections of bench_generate that `medmax bench` runs: text, pictures, and answers of one id about images."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from benchmarks.harness import Roofline, evidence, percentiles
from benchmarks.stages import generate_work as least
from benchmarks.stages.generate_forms import (
    PROMPT_IDS,
    QUESTION_IDS,
    Models,
    compare,
    draw,
    question_prompts,
    text_prompts,
    write,
)
from medmax_fast.generate.samples import PREVIEW
from medmax_fast.model.layout import ModelShape
from medmax_fast.vocab import IMAGE_CODES

# The largest logit_gap. Guidance weighs the streams 3, -1.8 and -0.2, which multiplies their errors.
GAP_BOUND = {torch.float32: 1e-3, torch.bfloat16: 1.0}
GUIDED = 3.5
OURS, STOCK, PUBLISHED = "ours", "transformers", "published, one at a time"
# Ids of a prompt that asks for a picture, and with boi.
DRAW_PROMPT = 32


@dataclass(frozen=True)
class Size:
    """How much each section runs; the defaults are for a CPU."""

    # Timed turns, after one that warms up.
    repeats: int = 5
    # Text: batches, ids of a prompt and of an answer.
    batches: tuple[int, ...] = (1, 8, 16)
    prompt: int = 64
    new: int = 48
    # Pictures: batches, timed turns of a batch of 1, codes of each in the published shape and by the engine (of PREVIEW
    # each, as they come).
    pictures: tuple[int, ...] = (1, 8, 16)
    picture_turns: int = 2
    codes: tuple[int, int] = (128, IMAGE_CODES)
    # Timed turns of images, images of one, questions about each.
    asked: int = 5
    images: int = 4
    questions: int = 4
    # Agreement: requests, ids of an answer.
    requests: int = 16
    agreement_new: int = 48
    quantize_batch: int = 8


CPU = Size()
# For 120 s on an H200. Keys and values of 64 pictures take 73 GB, beside 28 GB of two models.
GPU = Size(3, (1, 8, 64), 64, 32, (1, 16, 64), asked=2, images=8, questions=8, requests=64, agreement_new=40)
SMALL_GPU, SMALL_GPU_BYTES = replace(GPU, pictures=(1, 16, 32)), 120e9
QUICK = Size(2, (1, 3), 20, 8, (1, 2), 1, (PREVIEW, PREVIEW), 1, 2, 3, 4, 8, 2)


@dataclass
class Bench:
    """The models, how much to run, and what the machine can do."""

    models: Models
    size: Size
    roofline: Roofline

    def near(self, found: dict, scale: float = 1.0) -> dict:
        """`found` of compare(); AssertionError if ids differ that are no near ties."""
        assert found["logit_gap"] <= scale * GAP_BOUND[self.models.dtype], f"not the ids of the other side: {found}"
        return found

    def evidence(self, stage: str, shape: str, row: dict, beside: dict, moved: float, flop: float, items: tuple):
        """A row of the common table, of a row of a section and the one it is compared with."""
        quality = {name: row[name] for name in ("ids", "differing", "logit_gap")}
        done = {"moved": moved, "flop": flop, "items": items, "beside": (beside["row"], beside["p50_s"])}
        return evidence(stage, shape, row["row"], row, self.roofline, quality=quality, **done)


def seconds(work: Callable, *arguments) -> tuple[float, object]:
    """Of one call, and what it returned, which it must have waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - start, result


Writer = Callable[[list[list[int]], int], list[list[int]]]


def text_rows(bench: Bench, writers: dict[str, Writer], batch: int) -> tuple[dict[str, dict], list, dict[str, list]]:
    """(speeds of each form, prompts, ids of each form): all on the same prompts in turns, of which one warms up."""
    size, prompts = bench.size, []
    first, steps, rates, ids = ({name: [] for name in writers} for _ in range(4))
    for turn in range(size.repeats + 1):
        heads, wholes = (text_prompts(bench.models.layout, batch, size.prompt, batch, turn, i) for i in (0, 1))
        prompts += wholes
        for name, generate in writers.items():
            to_first, _ = seconds(generate, heads, 1)
            took, found = seconds(generate, wholes, size.new)
            ids[name] += found
            if turn:
                first[name].append(to_first)
                steps[name].append((took - to_first) / (max(map(len, found)) - 1))
                rates[name].append(sum(map(len, found)) / took)
    rows = {}
    for name in writers:
        rows[name] = {"row": name, "batch": batch, "unit": "step", **percentiles(steps[name])}
        rows[name] |= {"first_p50_s": np.median(first[name]), "ids_per_s": np.median(rates[name])}
    return rows, prompts, ids


def text_shape(size: Size, batch: int) -> str:
    return f"1 step, batch {batch}, {size.prompt} + {size.new} ids"


def text(bench: Bench) -> Iterator[tuple[list[dict], list[dict]]]:
    for batch in bench.size.batches:
        yield text_batch(bench, batch)


def text_batch(bench: Bench, batch: int) -> tuple[list[dict], list[dict]]:
    models, size = bench.models, bench.size
    writers = {STOCK: models.stock.generate, OURS: partial(write, models.engine(batch, size.prompt + size.new))}
    rows, prompts, ids = text_rows(bench, writers, batch)

    def logits(row: int, at: int) -> torch.Tensor:
        return models.stock.text_logits(prompts[row] + ids[STOCK][row][:at])

    found = []
    for name, row in rows.items():
        lengths = list(map(len, ids[name]))
        moved, flop = least.text_work(models.shape, models.dtype.itemsize, size.prompt, lengths, batch)
        row["times"] = row["ids_per_s"] / rows[STOCK]["ids_per_s"]
        row |= {"step_bytes": moved, "roofline": moved / row["p50_s"] / bench.roofline.copy}
        row |= bench.near(compare(ids[name], ids[STOCK], logits))
        items = batch, "ids"
        found.append(bench.evidence("text", text_shape(size, batch), row, rows[STOCK], moved, flop, items))
    return list(rows.values()), found


def picture_shape(batch: int, codes: int) -> str:
    return f"1 code, batch {batch}, {codes:,} codes each"


def pictures(bench: Bench) -> Iterator[tuple[list[dict], list[dict]]]:
    models, size, layout = bench.models, bench.size, bench.models.layout
    few, whole = size.codes
    asked = [text_prompts(layout, max(size.pictures), DRAW_PROMPT, turn) for turn in range(size.picture_turns)]
    rows, alone, theirs = [], [], []

    def logits(row: int, at: int) -> torch.Tensor:
        return models.stock.image_logits(asked[row][0], theirs[row][:at])

    def add(name: str, batch: int, count: int) -> list[list[int]]:
        """A row, and the codes of the first picture of each turn."""
        work = partial(draw, models.engine(2 * batch, DRAW_PROMPT + 1 + IMAGE_CODES)) if rows else models.stock.pictures
        if not rows or models.device.type == "cuda":
            # Also captures the graphs of this batch.
            work(text_prompts(layout, batch, DRAW_PROMPT, len(asked), batch), few if rows else 2)
        # Larger batches take long; each is a mean of many steps already.
        turns = [prompts[:batch] for prompts in asked[: 1 if batch > 1 else None]]
        took, found = zip(*(seconds(work, prompts, count) for prompts in turns), strict=True)
        first = [codes[0] for codes in found]
        row = {"row": name, "batch": batch, "unit": "code", **percentiles([s / count for s in took])}
        row |= {"codes": count, "turns": len(turns)}
        row["pictures_per_min"] = 60 * batch / np.median(took) if count == IMAGE_CODES else None
        row["times"] = batch * (rows or [row])[0]["p50_s"] / row["p50_s"]
        row |= {"times_alone": None, "alone_differing": None}
        compared = compare([codes[:few] for codes in first], (theirs or first)[: len(first)], logits)
        rows.append(row | bench.near(compared, GUIDED))
        return first

    def shown() -> tuple[list[dict], list[dict]]:
        row, batch = rows[-1], rows[-1]["batch"]
        work = least.picture_work(
            models.shape, models.dtype.itemsize, DRAW_PROMPT + 1, row["codes"], batch, layout.num_codes
        )
        # A code of all pictures; the published shape draws one picture after the other.
        beside = {"row": rows[0]["row"], "p50_s": batch * rows[0]["p50_s"]}
        items = batch / IMAGE_CODES, "pictures"
        found = bench.evidence("pictures", picture_shape(batch, row["codes"]), row, beside, *work, items)
        return [row], [found | {name: row[name] for name in ("times_alone", "alone_differing")}]

    theirs += add("published, 3 streams", 1, few)
    yield shown()
    for batch, count in dict.fromkeys([(1, few), *((batch, whole) for batch in size.pictures)]):
        first = add(OURS, batch, count)
        if count == whole:
            alone = alone or [rows[-1]["p50_s"], first]
            rows[-1]["times_alone"] = batch * alone[0] / rows[-1]["p50_s"]
            rows[-1]["alone_differing"] = compare(first, alone[1][: len(first)])["differing"]
        yield shown()


def vqa_work(shape: ModelShape, size: Size) -> dict[str, tuple[str, float]]:
    """By form what its rows say, and the least FLOP of a question.

    Where images are shared, one of an image's questions computes it, and the others only what is theirs.
    """
    length, shared = PROMPT_IDS, PROMPT_IDS - QUESTION_IDS - 1
    whole = least.prefill_flop(shape, length, least.pairs_of(length), 1)
    rest = least.prefill_flop(shape, length - shared, least.pairs_of(length, shared), 1)
    mean = (whole + (size.questions - 1) * rest) / size.questions
    one = f"1 question of {length:,} ids"
    many, together = f"{one}, batch {size.images}", f"{one}, batch {size.images * size.questions}"
    forms = (PUBLISHED, f"{OURS}, one at a time", f"{OURS}, nothing shared", f"{OURS}, images shared")
    work = (one, whole), (one, whole), (many, whole), (f"{together}, {size.questions} an image", mean)
    return dict(zip(forms, work, strict=True))


def vqa(bench: Bench) -> Iterator[tuple[list[dict], list[dict]]]:
    models, size = bench.models, bench.size
    # The first turn warms up.
    asked = question_prompts(models.layout, size.asked + 1, size.questions, size.images)
    turns, length, count = range(len(asked)), asked.shape[3], size.questions * size.images
    flat = asked.reshape(-1, length).tolist()
    # Prompts of one call each, with their turn: single ones, one of each image, all of a turn.
    one_of_each = [(turn, asked[turn, i].tolist()) for i in range(size.questions) for turn in turns]
    jobs = {
        1: [(turn, [prompt]) for turn, prompts in one_of_each for prompt in prompts],
        size.images: one_of_each,
        count: [(turn, asked[turn].reshape(-1, length).tolist()) for turn in turns],
    }
    rows, expected = [], []
    shapes = vqa_work(models.shape, size)

    def add(name: str, batch: int) -> None:
        engine = models.engine(batch, length + 1) if rows else None
        work = partial(write, engine) if rows else models.stock.answers
        counted = least.PrefillCount(engine) if rows else None
        took, answers = np.zeros(len(asked)), {}
        for turn, prompts in jobs[batch]:
            lasted, new = seconds(work, prompts, 1)
            took[turn] += lasted
            answers |= zip(map(tuple, prompts), new, strict=True)
        ids = [answers[tuple(prompt)] for prompt in flat]
        row = {"row": name, "batch": batch, "unit": "question", **percentiles((took[1:] / count).tolist())}
        row |= {"questions_per_s": 1 / row["p50_s"], "times": (rows or [row])[0]["p50_s"] / row["p50_s"]}
        row |= dict.fromkeys(("cached", "flop_per_s", "product_share"))
        if rows:
            row["cached"] = engine.room.cached_ids / engine.room.prompt_ids
            row["flop_per_s"] = counted.flop(len(flat)) / len(flat) / row["p50_s"]
            row["product_share"] = row["flop_per_s"] / bench.roofline.product
        expected.extend([] if rows else ids)
        rows.append(row | bench.near(compare(ids, expected, lambda i, _: models.stock.text_logits(flat[i]))))

    for name, batch in zip(shapes, (1, 1, size.images, count), strict=True):
        add(name, batch)
        shape, flop = shapes[name]
        yield rows[-1:], [bench.evidence("vqa", shape, rows[-1], rows[0], 0, flop, (1, "questions"))]

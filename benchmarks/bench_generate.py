"""The generation engine against transformers' generate and against the shape of the published inference.

    PYTHONPATH=. python -m benchmarks.bench_generate [--only text,pictures,vqa,agreement,quantize] [--quick]
        [--size tiny|7b] [--output FILE.json]

Weights are random (`medmax init`); the other sides are in generate_forms.py. Forms of a section run on the same
prompts, and every turn has new ones, or the engine would find them in its cache. What was generated is compared first:
`differing` of `ids` differ, in `rows_differing` answers, of which agree_least and agree_mean count the ids before the
first difference. In 16 bits near ties fall either way and all that follows is other text: logit_gap says by how much,
in the reference's own logits, the engine's id was not the best where they parted. Above a bound (fp32 1e-3, else 1,
where logits have a standard deviation of 2) a section fails and prints no speed. p20, p50 and p80 are of one unit: a
step or a code of the whole batch, a question. times: how many times as fast as the first row of the section, or of the
batch, by ids, codes or questions per second.

- text: seconds to the first id and per step. roofline: bytes that a step must read (weights, keys and values) over its
  time, as a share of the bytes per second of a large copy in the same run.
- pictures: a text prompt, guidance 3.0 and 1.2. The engine computes two streams there, as the image-conditioned and the
  unconditioned one are equal; the published shape three. It draws only the first `codes`, and so does the engine in the
  row beside it. times_alone: pictures per second over those of the engine's own batch of 1.
- vqa: questions about images, one id each. cached: share of the prompts' ids found in the cache. product_share: FLOP of
  the ids that were computed over the time, as a share of a large product's rate. Where nothing is shared the cache has
  room for one batch, and the images of two turns alternate.
- agreement: requests alone and together on engines of their own; no speed, but how often the company changes an id.
- quantize: cross-entropy of rows that the unquantized model wrote, no id masked, and ids whose likeliest changes.

Everything is as measured; a figure that does not apply is empty. --output is written after every section.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.bench_train_kernels import copy_rate, product_rate
from benchmarks.generate_forms import (
    Models,
    PrefillCount,
    compare,
    draw,
    question_prompts,
    row_losses,
    step_bytes,
    text_prompts,
    write,
)
from benchmarks.harness import environment, parse_arguments, report
from medmax_fast.cli import print_table
from medmax_fast.generate.cache import position_bytes
from medmax_fast.generate.engine import Engine
from medmax_fast.generate.pages import PAGE, pages_of
from medmax_fast.model.decoder import Decoder
from medmax_fast.runtime import pick_device, write_json
from medmax_fast.vocab import IMAGE_CODES

GAP_BOUND = {torch.float32: 1e-3, torch.bfloat16: 1.0}
# Guidance weighs the streams 3, -1.8 and -0.2, which multiplies their errors.
GUIDED = 3.5
STOCK = "transformers"
SUMMARY = ("row", "batch", "unit", "p50_s", "times", "ids", "differing")


@dataclass(frozen=True)
class Size:
    """How much each section runs; the defaults are for a CPU."""

    # Timed turns, after one that warms up.
    repeats: int = 5
    # Text: batches, ids of a prompt and of an answer.
    batches: tuple[int, ...] = (1, 8, 16)
    prompt: int = 64
    new: int = 48
    # Pictures: batches, timed turns of a batch of 1, codes of each in the published shape and by the engine.
    pictures: tuple[int, ...] = (1, 8, 16)
    picture_turns: int = 2
    codes: tuple[int, int] = (128, IMAGE_CODES)
    # Images, questions about each.
    images: int = 4
    questions: int = 4
    # Agreement: requests, ids of an answer.
    requests: int = 16
    agreement_new: int = 48
    quantize_batch: int = 8
    # fp32 values of the large copy, side of the large product.
    copied: int = 1 << 26
    product: int = 1024


CPU = Size()
GPU = Size(3, (1, 8, 64), 64, 64, (1, 16, 64), 2, CPU.codes, 8, 8, 64, 40, 8, 1 << 28, 8192)
QUICK = Size(2, (1, 3), 20, 8, (1, 2), 1, (64, 64), 2, 3, 4, 8, 2, 1 << 20, 256)


@dataclass
class Bench:
    """The models, how much to run, and what the machine can do."""

    models: Models
    size: Size
    copy_bytes_per_s: float
    product_flop_per_s: float

    def near(self, found: dict, scale: float = 1.0) -> dict:
        """`found` of compare(); AssertionError if ids differ that are no near ties."""
        assert found["logit_gap"] <= scale * GAP_BOUND[self.models.dtype], f"not the ids of the other side: {found}"
        return found


def percentiles(values: list[float]) -> dict[str, float]:
    return dict(zip(("p20_s", "p50_s", "p80_s"), np.percentile(values, (20, 50, 80)).tolist(), strict=True))


def seconds(work: Callable, *arguments) -> tuple[float, object]:
    """Of one call, and what it returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work(*arguments)
    return time.perf_counter() - start, result


Writer = Callable[[list[list[int]], int], list[list[int]]]


def text_rows(bench: Bench, forms: dict[str, Writer], batch: int) -> tuple[dict[str, dict], list, dict[str, list]]:
    """(speeds of each form, prompts, ids of each form): all on the same prompts in turns, of which one warms up."""
    size, prompts = bench.size, []
    first, steps, rates, ids = ({name: [] for name in forms} for _ in range(4))
    for turn in range(size.repeats + 1):
        heads, wholes = (text_prompts(bench.models.layout, batch, size.prompt, batch, turn, i) for i in (0, 1))
        prompts += wholes
        for name, generate in forms.items():
            to_first, _ = seconds(generate, heads, 1)
            took, found = seconds(generate, wholes, size.new)
            ids[name] += found
            if turn:
                first[name].append(to_first)
                steps[name].append((took - to_first) / (max(map(len, found)) - 1))
                rates[name].append(sum(map(len, found)) / took)
    rows = {}
    for name in forms:
        rows[name] = {"row": name, "batch": batch, "unit": "step", **percentiles(steps[name])}
        rows[name] |= {"first_p50_s": np.median(first[name]), "ids_per_s": np.median(rates[name])}
    return rows, prompts, ids


def text(bench: Bench) -> list[dict]:
    return [row for batch in bench.size.batches for row in text_batch(bench, batch)]


def text_batch(bench: Bench, batch: int) -> list[dict]:
    models, size = bench.models, bench.size
    forms = {STOCK: models.stock.generate, "engine": partial(write, models.engine(batch, size.prompt + size.new))}
    rows, prompts, ids = text_rows(bench, forms, batch)

    def logits(row: int, at: int) -> torch.Tensor:
        return models.stock.text_logits(prompts[row] + ids[STOCK][row][:at])

    for name, row in rows.items():
        needed = step_bytes(models.decoder, size.prompt, ids[name], batch)
        row["times"] = row["ids_per_s"] / rows[STOCK]["ids_per_s"]
        row |= {"step_bytes": needed, "roofline": needed / row["p50_s"] / bench.copy_bytes_per_s}
        row |= bench.near(compare(ids[name], ids[STOCK], logits))
    return list(rows.values())


def pictures(bench: Bench) -> list[dict]:
    models, size, layout = bench.models, bench.size, bench.models.layout
    few, whole = size.codes
    asked = [text_prompts(layout, max(size.pictures), 32, turn) for turn in range(size.picture_turns)]
    rows, alone, theirs = [], [], []

    def logits(row: int, at: int) -> torch.Tensor:
        return models.stock.image_logits(asked[row][0], theirs[row][:at])

    def add(name: str, batch: int, count: int) -> list[list[int]]:
        """A row, and the codes of the first picture of each turn."""
        work = partial(draw, models.engine(2 * batch, 33 + IMAGE_CODES)) if rows else models.stock.pictures
        # Also captures the graphs of this batch.
        work(text_prompts(layout, batch, 32, len(asked), batch), min(count, 64))
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

    theirs += add("published, 3 streams", 1, few)
    for batch, count in dict.fromkeys([(1, few), *((batch, whole) for batch in size.pictures)]):
        first = add("engine", batch, count)
        if count == whole:
            alone = alone or [rows[-1]["p50_s"], first]
            rows[-1]["times_alone"] = batch * alone[0] / rows[-1]["p50_s"]
            rows[-1]["alone_differing"] = compare(first, alone[1][: len(first)])["differing"]
    return rows


def vqa(bench: Bench) -> list[dict]:
    models, size = bench.models, bench.size
    # The first turn warms up.
    asked = question_prompts(models.layout, size.repeats + 1, size.questions, size.images)
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

    def add(name: str, batch: int) -> None:
        engine = models.engine(batch, length + 1) if rows else None
        work = partial(write, engine) if rows else models.stock.answers
        counted = PrefillCount(engine) if rows else None
        took, answers = np.zeros(len(asked)), {}
        for turn, prompts in jobs[batch]:
            lasted, found = seconds(work, prompts, 1)
            took[turn] += lasted
            answers |= zip(map(tuple, prompts), found, strict=True)
        found = [answers[tuple(prompt)] for prompt in flat]
        row = {"row": name, "batch": batch, "unit": "question", **percentiles(took[1:] / count)}
        row |= {"questions_per_s": 1 / row["p50_s"], "times": (rows or [row])[0]["p50_s"] / row["p50_s"]}
        row |= dict.fromkeys(("cached", "flop_per_s", "product_share"))
        if rows:
            row["cached"] = engine.room.cached_ids / engine.room.prompt_ids
            row["flop_per_s"] = counted.flop(len(flat)) / len(flat) / row["p50_s"]
            row["product_share"] = row["flop_per_s"] / bench.product_flop_per_s
        expected.extend([] if rows else found)
        rows.append(row | bench.near(compare(found, expected, lambda i, _: models.stock.text_logits(flat[i]))))

    add("published, one at a time", 1)
    add("engine, one at a time", 1)
    add("engine, nothing shared", size.images)
    add("engine, images shared", count)
    return rows


def agreement(bench: Bench) -> list[dict]:
    models, count, rows = bench.models, bench.size.requests, []
    lengths = np.random.default_rng(0).integers(8, bench.size.prompt, count)
    prompts = [text_prompts(models.layout, 1, length, i)[0] for i, length in enumerate(lengths)]
    for dtype in (torch.float32, torch.bfloat16):
        decoder = models.decoder if dtype == models.dtype else Decoder.load(models.checkpoint, models.device, dtype)
        for picks in ("greedy", "sampled"):
            found = {}
            for company, batch in (("alone", 1), ("together", count)):
                engine = models.engine(batch, bench.size.prompt + bench.size.agreement_new, decoder)
                found[company] = write(engine, prompts, bench.size.agreement_new, batch == 1, greedy=picks == "greedy")
            precision = str(dtype).removeprefix("torch.")
            row = {"row": f"{precision}, {picks}", "batch": count, "requests": count}
            rows.append(row | compare(found["together"], found["alone"]))
    return rows


def quantize(bench: Bench) -> list[dict]:
    if importlib.util.find_spec("torchao") is None:
        print("quantize: torchao is not installed, nothing is measured")
        return []
    models, size = bench.models, bench.size
    kinds = ("none", "int8", "fp8") if models.device.type == "cuda" else ("none", "int8")
    room = size.quantize_batch * pages_of(size.prompt + size.new) * PAGE * position_bytes(models.decoder) / 1e9
    options = {"device": models.device.type, "cache_gb": room}
    engines = {kind: Engine.from_checkpoint(models.checkpoint, quantize=kind, **options) for kind in kinds}
    free = {"greedy": False, "top_p": 1.0, "repetition_penalty": 1.0}
    prompts = text_prompts(models.layout, size.quantize_batch, size.prompt // 2, 0)
    # By an engine of its own: what one has written it finds in its cache.
    drawn = write(models.engine(len(prompts), size.prompt + size.new), prompts, size.new, **free)
    written = [prompt + new for prompt, new in zip(prompts, drawn, strict=True)]
    losses = {kind: row_losses(engine, written) for kind, engine in engines.items()}
    forms = {kind: partial(write, engine) for kind, engine in engines.items()}
    rows, _, ids = text_rows(bench, forms, size.quantize_batch)
    before, likeliest = losses["none"]
    for kind, row in rows.items():
        row["times"] = row["ids_per_s"] / rows["none"]["ids_per_s"]
        row |= {"weight_bytes": engines[kind].decoder.step_bytes(), "cross_entropy": losses[kind][0]}
        row["cross_entropy_change"] = losses[kind][0] - before
        row["likeliest_differing"] = float((losses[kind][1] != likeliest).double().mean())
        row |= compare(ids[kind], ids["none"])
    return list(rows.values())


SECTIONS = {section.__name__: section for section in (text, pictures, vqa, agreement, quantize)}


def run(arguments: argparse.Namespace, folder: str) -> tuple[list[dict], dict]:
    """(rows of the summary, facts of the run with every section's rows)."""
    device = pick_device("auto")
    gpu = device.type == "cuda"
    name = arguments.size or ("7b" if gpu else "tiny")
    models = Models(name, device, folder)
    size = QUICK if arguments.quick else GPU if gpu else CPU
    speeds = copy_rate(device.type, size.copied), product_rate(device.type, models.dtype, size.product)
    bench = Bench(models, size, *speeds)
    facts = {
        "size": name,
        "dtype": str(models.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "copy_bytes_per_s": speeds[0],
        "product_flop_per_s": speeds[1],
        "section_s": {},
        "failed": {},
        "sections": {},
    }
    rows = []
    for section in arguments.only:
        try:
            facts["section_s"][section], found = seconds(SECTIONS[section], bench)
        except (AssertionError, torch.OutOfMemoryError) as error:
            # The sections after it are still worth a machine's time.
            facts["failed"][section], found = str(error), []
            print(f"{section} failed: {error}", flush=True)
        facts["sections"][section] = found
        summed = [{key: row.get(key) for key in SUMMARY} for row in found or [{"row": "nothing measured"}]]
        rows += [{"section": section} | row for row in summed]
        if found:
            print(f"{section}: {facts['section_s'][section]:.0f} s")
            print_table(found)
            print(flush=True)
        if arguments.output:
            write_json(arguments.output, {"benchmark": "generate", **facts, "environment": environment(), "rows": rows})
    return rows, facts


def main() -> None:
    arguments = parse_arguments("generation: engine against transformers and the published shape", SECTIONS)
    with tempfile.TemporaryDirectory() as folder:
        rows, facts = run(arguments, folder)
    report("generate", rows, arguments.output, **facts)
    sys.exit(int(bool(facts["failed"])))


if __name__ == "__main__":
    main()

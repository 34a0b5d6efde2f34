"""Full fine-tuning of a model of 1.1e9 weights, and the price of many short rows in a pack.

    PYTHONPATH=. python -m benchmarks.bench_full [--only full,short_rows] [--quick] [--output FILE.json]

Steps, data and comparisons are those of bench_train, with all weights trained: each form must give the loss and the
gradient of the shape of the published training on the same rows, or it is not timed.

- full: the published shape (one padded row at a time, stock transformers, all logits), then packs of 16,384 ids through
  fused layers and the engine of `medmax train`, or plain torch where DeepSpeed is not installed. mfu counts 6 N FLOP an
  id (medmax_fast/training/speed.py); memory_gib is the most held during a step.
- short_rows: one pack of as many ids and targets, once as few long rows and once as many short ones, which have more
  to do between rows and less attention. Both are compared with stock transformers on the same rows, which are of one
  length and need no padding.

On a CPU the model is the tiny one.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from benchmarks.bench_train import data_shape, measure
from benchmarks.harness import Roofline, evidence
from benchmarks.sections import forget, run_sections, section_parser
from benchmarks.stages.train_parts import Model, Row, leave_group, make_batches, make_rows, step_flop
from medmax_fast.data.collate import target_counts
from medmax_fast.model.init import SHAPES, make_tokenizer
from medmax_fast.runtime import pick_device, pick_dtype
from medmax_fast.training import engine as ds
from medmax_fast.training.speed import flops_per_token, mfu, peak_flops
from medmax_fast.vocab import IdLayout

PUBLISHED, STOCK = "published: padded, one row at a time", "transformers"
# Of the rows of one length: the supervised half stands behind the eot.
TARGET_SHARE = 0.5
SUMMARY = ("row", "p50_s", "ids_per_s", "times", "mfu", "memory_gib")


@dataclass(frozen=True)
class Size:
    """The model; rows of data and what their lengths are divided by; ids of a pack; lengths of rows, the long first;
    ids that stock transformers takes at a time; timed steps."""

    model: str
    rows: int
    shrink: int
    pack: int
    lengths: tuple[int, int]
    stock_ids: int
    repeats: int


# Rows of 64 ids are as short as questions with a word for an answer, and rows of 2,048 as long as the published ones.
GPU = Size("1b", 28, 1, 16384, (2048, 64), 2048, 3)
QUICK = Size("tiny", 6, 16, 256, (64, 16), 64, 1)


def full_form(pack: int, deepspeed: bool) -> str:
    return f"ours, packs of {pack:,}{', DeepSpeed ZeRO-2' * deepspeed}"


def rows_form(length: int) -> str:
    return f"ours, rows of {length:,} ids"


def rows_shape(pack: int) -> str:
    return f"{pack:,} ids, half of them supervised"


def floors() -> list[dict]:
    """The products of both sections on a GPU, in the names of the evidence; loads nothing."""
    shape = SHAPES[GPU.model]
    layout = IdLayout.from_vocab(make_tokenizer(shape.vocab_size)["model"]["vocab"])
    ids, offsets = make_rows(GPU.rows, layout, GPU.shrink)
    targets = int(target_counts(ids, offsets, layout.eot).sum())
    work = {"full": (data_shape(GPU.rows, len(ids)), step_flop(shape, True, len(ids), targets))}
    work["short_rows"] = rows_shape(GPU.pack), step_flop(shape, True, GPU.pack, TARGET_SHARE * GPU.pack)
    return [{"stage": stage, "shape": words, "moved_bytes": 0, "flop": flop} for stage, (words, flop) in work.items()]


def equal_rows(pack: int, length: int, layout: IdLayout) -> tuple[np.ndarray, np.ndarray]:
    """(ids uint16, offsets int64) of `pack` ids as rows of one length: the same text whatever the length is."""
    rng = np.random.default_rng(0)
    rows = rng.integers(layout.text_start, layout.vocab_size, pack).astype(np.uint16).reshape(-1, length)
    rows[:, 0], rows[:, -1] = layout.bos, layout.eos
    rows[:, int((1 - TARGET_SHARE) * length) - 1] = layout.eot
    return rows.flatten(), np.arange(0, pack + 1, length)


@dataclass
class Bench:
    """What both sections share."""

    size: Size
    device: torch.device
    roofline: Roofline
    deepspeed: bool

    def model(self) -> Model:
        """A new one, always with the same weights: an engine leaves its marks on what it has trained."""
        return Model(self.size.model, self.device, pick_dtype("auto", self.device), full=True)

    def row(self, stage: str, shape: str, form: str, line: dict, beside: tuple, model: Model, work: tuple) -> tuple:
        """What a section gives of one form: a row of its own, and one of the common table with MFU and memory.

        work: ids and targets of a step.
        """
        ids, targets = work
        done = {"flop": step_flop(model.shape, True, ids, targets), "items": (ids, "ids"), "beside": beside}
        done["quality"] = {name: line[name] for name in ("loss_difference", "gradient_difference")}
        row = evidence(stage, shape, form, line, self.roofline, **done)
        more = {"memory_gib": line["memory_gib"]}
        peak = peak_flops(self.device, model.dtype)
        more["mfu"] = mfu(row["items_per_s"], flops_per_token(model.shape, True), peak, 1)
        shown = {"row": form, "p50_s": row["p50_s"], "ids_per_s": row["items_per_s"], "times": row["times"]}
        return [shown | more | row["quality"]], [row | more]


def fused(form: str, engine: bool) -> Row:
    parts = {"norm": "ours", "mlp": "ours", "attention": "ours"}
    return Row(form, batches="packed", all_logits=False, engine=engine, **parts)


def full(bench: Bench) -> Iterator[tuple[list[dict], list[dict]]]:
    model, size = bench.model(), bench.size
    ids, offsets = make_rows(size.rows, model.layout, size.shrink)
    batches = make_batches(ids, offsets, model.layout, {"packed": size.pack}, bench.device, padded=(1,))
    work = len(ids), sum(batch["target_tokens"] for batch in batches["packed"])
    first: dict = {}
    beside = None
    for row in (Row(PUBLISHED), fused(full_form(size.pack, bench.deepspeed), bench.deepspeed)):
        forget()
        line = measure(model, row, batches[row.batches], work[1], first, size.repeats)
        beside = beside or (row.name, line["p50_s"])
        yield bench.row("full", data_shape(size.rows, len(ids)), row.name, line, beside, model, work)


def short_rows(bench: Bench) -> Iterator[tuple[list[dict], list[dict]]]:
    model, size = bench.model(), bench.size
    beside = None
    for length in size.lengths:
        ids, offsets = equal_rows(size.pack, length, model.layout)
        few = size.stock_ids // length
        batches = make_batches(ids, offsets, model.layout, {"packed": size.pack}, bench.device, padded=(few,))
        work = size.pack, batches["packed"][0]["target_tokens"]
        first: dict = {}
        stock, ours = Row(f"{STOCK}, rows of {length:,} ids", batches=f"padded {few}"), fused(rows_form(length), False)
        lines = {}
        for row in (stock, ours):
            forget()
            # What it is compared with takes several times as long.
            repeats = size.repeats if row is ours else 1
            lines[row] = measure(model, row, batches[row.batches], work[1], first, repeats)
        beside = beside or (ours.name, lines[ours]["p50_s"])
        for row, line in lines.items():
            yield bench.row("short_rows", rows_shape(size.pack), row.name, line, beside, model, work)


SECTIONS = {section.__name__: section for section in (full, short_rows)}


def main() -> int:
    arguments = section_parser("full fine-tuning, and packs of many short rows", SECTIONS).parse_args()
    device = pick_device("auto")
    gpu, deepspeed = device.type == "cuda", importlib.util.find_spec("deepspeed") is not None
    # DeepSpeed prints there, and the last line belongs to the result.
    with contextlib.redirect_stdout(sys.stderr):
        if deepspeed and "full" in arguments.only:
            ds.start_processes(device, pick_dtype("auto", device))
        size = GPU if gpu and not arguments.quick else QUICK
        bench = Bench(size, device, Roofline.measure(device.type, arguments.quick), deepspeed)
    facts = {
        "size": size.model,
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
        "deepspeed": deepspeed,
        "product_flop_per_s": bench.roofline.product,
    }
    chosen = {name: partial(SECTIONS[name], bench) for name in arguments.only}
    return run_sections("full", chosen, SUMMARY, arguments.output, facts)


if __name__ == "__main__":
    status = main()
    leave_group()
    sys.exit(status)

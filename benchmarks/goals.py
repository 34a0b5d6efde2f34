"""What is wanted of the code on one H200, as data; verdicts.py says what a result makes of it.

Every goal names rows of `medmax bench --suite gpu` by their stage, shape and form, a quantity of these rows, and its
limit. Nothing is computed from rows, so that a goal is met by what stands in the result and by nothing else.
tests/test_goals.py holds the names to those that the stages give.
"""

import functools
from dataclasses import dataclass

from benchmarks.bench_full import GPU as FULL
from benchmarks.bench_full import full_form, rows_form
from benchmarks.bench_generate import GPU, picture_shape, text_shape, vqa_work
from benchmarks.bench_images import BATCH, REAL, encoder_form, encoder_shape, tokenize_form
from benchmarks.bench_kernels import floors as kernel_floors
from benchmarks.bench_start import CACHED, COLD, STARTED
from benchmarks.bench_train import long_forms
from benchmarks.stage_floors import floors as stage_floors
from benchmarks.stages.generate_sections import OURS
from medmax_fast.model.init import SHAPES
from medmax_fast.vocab import IMAGE_CODES


@dataclass(frozen=True)
class Goal:
    """A quantity of rows of evidence and its limit.

    name: shared by the parts of one goal, which is met when all of them are. words: for people. stage: of the suite.
    quantity: a key of the row, `quality.` and a key for one of its differences. sign: how it must stand to `limit`, a
    number or another quantity of the same row. unit: of both, where "%" is 100 times the quantity. forms: of these the
    fastest counts that has run. shapes: each of them must be within the limit; none are all that the stage has. cores:
    a machine with more says nothing to this goal; 0 is any.
    """

    name: str
    words: str
    stage: str
    quantity: str
    sign: str
    limit: float | str
    unit: str
    forms: tuple[str, ...] = (OURS,)
    shapes: tuple[str, ...] = ()
    cores: int = 0


_ENCODER = {"forms": (encoder_form("fp16"),), "shapes": (encoder_shape(REAL, BATCH["cuda"]),)}
_TOKENIZE = {"forms": (tokenize_form("fp16"),)}
_TF32 = "codes that differ from fp32's: no more than the reference's own TF32 changes"
_FILES = "1-megapixel JPEG files to codes, end to end on 16 CPU cores"
_COPIES = {"resample": "resize", "group_norm": "GroupNorm and SiLU", "norm_rope": "query/key norm and RoPE"}
_COPIES |= {"remap": "codes to ids and back"}
_SUPERVISED = "16384x4096x65536 bfloat16, {} % supervised, head frozen, forward and backward"
_HEAD = {"shapes": tuple(_SUPERVISED.format(percent) for percent in (1, 10, 100))}
_FULL = tuple(full_form(FULL.pack, deepspeed) for deepspeed in (True, False))
_SHORT = (rows_form(FULL.lengths[1]),)
_ANSWER, _PICTURES = (text_shape(GPU, 1),), (picture_shape(64, IMAGE_CODES),)
# One question and one of each image; where images are shared, little of a prompt is left to compute.
_PREFILL = [((form,), (shape,)) for form, (shape, _) in list(vqa_work(SHAPES["7b"], GPU).items())[1:3]]
_START = "medmax generate of 7B, from its start to the first id: seconds beyond reading the files"

GOALS = (
    Goal("G1", "image encoder: share of a large 16-bit product's rate", "encoder", "share", ">=", 0.6, "%", **_ENCODER),
    Goal("G2", _FILES, "tokenize", "items_per_s", ">=", 860, "images/s", **_TOKENIZE, cores=16),
    Goal("G3", "the same: times the published loop", "tokenize", "times", ">=", 15, "x", **_TOKENIZE),
    *(
        Goal("G4", _TF32, stage, "quality.codes_differing", "<=", "quality.published_differing", "%", **rows)
        for stage, rows in (("encoder", _ENCODER), ("tokenize", _TOKENIZE))
    ),
    Goal("G5", "nearest code: times the best torch form", "vq", "times_best", ">=", 3, "x"),
    Goal("G5", "codes that are not those of an exact search", "vq", "quality.codes_differing", "<=", 0, "codes"),
    Goal("G5", "no distance matrix: memory beyond the operands, of what it takes", "vq", "of_whole", "<=", 0.1, "%"),
    *(
        Goal("G6", f"{words}: share of a large copy's rate", stage, "share", ">=", 0.8, "%")
        for stage, words in _COPIES.items()
    ),
    Goal("G7", "head and loss: times the faster eager form", "loss", "times_best", ">", 1, "x", **_HEAD),
    Goal("G7", "head and loss: memory beyond their inputs", "loss", "extra_mb", "<", 1000, "MB", **_HEAD),
    Goal("G8", "LoRA step of 7B: MFU at 4 N FLOP an id", "train", "mfu", ">=", 0.5, "%", tuple(long_forms())),
    Goal("G9", "all of 1.1e9 weights trained: MFU at 6 N FLOP an id", "full", "mfu", ">=", 0.45, "%", _FULL),
    Goal("G10", "a pack of short rows: times one of long rows", "short_rows", "times", ">=", 1 / 1.1, "x", _SHORT),
    Goal("G11", "one answer alone: share of a large copy's rate", "text", "share", ">=", 0.7, "%", shapes=_ANSWER),
    Goal("G12", "64 pictures: times the rate of one", "pictures", "times_alone", ">=", 10, "x", shapes=_PICTURES),
    *(
        Goal("G13", "first id about an image: share of a large product's rate", "vqa", "share", ">=", 0.5, "%", *rows)
        for rows in _PREFILL
    ),
    Goal("G14", _START, "start", "over_disk_s", "<=", 5, "s", (STARTED,)),
    Goal("G15", "all kernels compiled, without a cache", "compile", "p50_s", "<", 30, "s", (COLD,)),
    Goal("G15", "kernels compiled again by the next process", "compile", "entries_made", "<=", 0, "entries", (CACHED,)),
)


@functools.cache
def suite_shapes() -> dict[str, list[str]]:
    """Stage -> its shapes, as the suite for a GPU has them."""
    found: dict[str, list[str]] = {}
    for floor in [*kernel_floors(), *stage_floors()]:
        found.setdefault(floor["stage"], []).append(floor["shape"])
    return found


def shapes_of(goal: Goal) -> list[str]:
    return list(goal.shapes) or suite_shapes()[goal.stage]

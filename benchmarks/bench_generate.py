"""The generation engine against transformers' generate and against the shape of the published inference.

    PYTHONPATH=. python -m benchmarks.bench_generate [--only text,pictures,vqa,agreement,quantize] [--quick]
        [--size tiny|7b] [--output FILE.json]

Weights are random (`medmax init`); stages/generate_sections.py has the sections, stages/generate_forms.py the other
sides. Forms of a section run on the same prompts, and every turn has new ones, or the engine would find them in its
cache. What was generated is compared first: `differing` of `ids` differ, in `rows_differing` answers, of which
agree_least and agree_mean count the ids before the first difference. In 16 bits near ties fall either way and all that
follows is other text: logit_gap says by how much, in the reference's own logits, the engine's id was not the best where
they parted.
Above a bound (fp32 1e-3, else 1, where logits have a standard deviation of 2) a section fails and prints no speed. p20,
p50 and p80 are of one unit: a step or a code of the whole batch, a question. times: how many times as fast as the first
row of the section, or of the batch, by ids, codes or questions per second.

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

import sys
import tempfile
from functools import partial

import torch

from benchmarks.harness import Roofline
from benchmarks.sections import run_sections, section_parser
from benchmarks.stages.generate_forms import Models
from benchmarks.stages.generate_more import agreement, quantize
from benchmarks.stages.generate_sections import (
    CPU,
    DRAW_PROMPT,
    GPU,
    QUICK,
    SMALL_GPU,
    SMALL_GPU_BYTES,
    Bench,
    Size,
    picture_shape,
    pictures,
    text,
    text_shape,
    vqa,
    vqa_work,
)
from benchmarks.stages.generate_work import picture_work, text_work
from medmax_fast.model.init import SHAPES
from medmax_fast.runtime import pick_device

SECTIONS = {section.__name__: section for section in (text, pictures, vqa, agreement, quantize)}
SUMMARY = ("row", "batch", "unit", "p50_s", "times", "ids", "differing")


def floors() -> list[dict]:
    """What a step of 7B in 16 bits must move and multiply on a GPU, in the names of the evidence; loads nothing."""
    shape, itemsize, codes = SHAPES["7b"], torch.bfloat16.itemsize, 8192
    rows = []
    for batch in GPU.batches:
        work = text_work(shape, itemsize, GPU.prompt, [GPU.new] * batch, batch)
        rows.append(("text", text_shape(GPU, batch), *work))
    few, whole = GPU.codes
    for batch, count in [(1, few), *((batch, whole) for batch in sorted({*GPU.pictures, *SMALL_GPU.pictures}))]:
        work = picture_work(shape, itemsize, DRAW_PROMPT + 1, count, batch, codes)
        rows.append(("pictures", picture_shape(batch, count), *work))
    rows += [("vqa", words, 0, flop) for words, flop in dict(vqa_work(shape, GPU).values()).items()]
    return [dict(zip(("stage", "shape", "moved_bytes", "flop"), row, strict=True)) for row in rows]


def pick_size(device: torch.device, quick: bool) -> Size:
    if quick or device.type == "cpu":
        return QUICK if quick else CPU
    small = torch.cuda.get_device_properties(device).total_memory < SMALL_GPU_BYTES
    return SMALL_GPU if small else GPU


def main() -> None:
    arguments = section_parser(
        "generation: engine against transformers and the published shape", SECTIONS, sized=True
    ).parse_args()
    device = pick_device("auto")
    gpu = device.type == "cuda"
    name = arguments.size or ("7b" if gpu else "tiny")
    with tempfile.TemporaryDirectory() as folder:
        models = Models(name, device, folder)
        roofline = Roofline.measure(device.type, arguments.quick)
        bench = Bench(models, pick_size(device, arguments.quick), roofline)
        facts = {
            "size": name,
            "dtype": str(models.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads",
            "copy_bytes_per_s": roofline.copy,
            "product_flop_per_s": roofline.product,
        }
        chosen = {section: partial(SECTIONS[section], bench) for section in arguments.only}
        status = run_sections("generate", chosen, SUMMARY, arguments.output, facts)
    sys.exit(status)


if __name__ == "__main__":
    main()

"""Section `pixels` of bench_images: decoding and preprocessing on one thread, ours beside Pillow's."""

import io
from collections.abc import Iterator

import torch
from PIL import Image

from benchmarks.harness import Roofline, evidence, in_turns
from benchmarks.stages.image_forms import GOLDEN, encoded, published_pixels, published_rest
from medmax_fast.data.dali import DaliDecoder, available
from medmax_fast.data.images import decode
from medmax_fast.data.resize import fit
from medmax_fast.model.image_tokenizer import normalised


def files(quick: bool) -> dict[str, bytes]:
    """Encoded pictures by name, made from a golden one: a slide of 1 and of 4 megapixels, and grey."""
    slide = Image.open(GOLDEN / "ihc.png").convert("RGB")
    made = {"JPEG 1 MP": encoded(slide, (1152, 864), "JPEG", quality=90)}
    if not quick:
        made["JPEG 1 MP, tall"] = encoded(slide, (864, 1152), "JPEG", quality=90)
        made["JPEG 4 MP"] = encoded(slide, (2304, 1728), "JPEG", quality=90)
        made["JPEG 1 MP, grey"] = encoded(slide.convert("L"), (1152, 864), "JPEG", quality=90)
        made["PNG 1 MP"] = encoded(slide, (1152, 864), "PNG")
    return made


def pixels(roofline: Roofline, quick: bool) -> Iterator[tuple[list[dict], list[dict]]]:
    """Decoding and preprocessing, and preprocessing alone; forms take turns on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dali = None if available("cpu") else DaliDecoder()
        for name, data in files(quick).items():
            found = file_rows(name, data, dali, roofline, quick)
            yield [printed(row) for row in found], found
    finally:
        torch.set_num_threads(threads)


def printed(row: dict) -> dict:
    shown = {"row": row["form"], "file": row["shape"], "p50_s": row["p50_s"], "images_per_s": row["items_per_s"]}
    return shown | {"times": row["times"], "differing": row["quality"]["pixels_differing"]}


def file_rows(name: str, data: bytes, dali: DaliDecoder | None, roofline: Roofline, quick: bool) -> list[dict]:
    """Evidence of one file; AssertionError for a form whose values differ."""
    image, bytes_ = Image.open(io.BytesIO(data)).convert("RGB"), decode(data, name).pixels
    works = {
        "published": lambda: published_pixels(data),
        "ours": lambda: ours(data, None),
        "published, resize alone": lambda: published_rest(image)[None],
        "ours, resize alone": lambda: normalised(torch.from_numpy(fit(bytes_)[None])),
    }
    if dali:
        works["ours, DALI"] = lambda: ours(data, dali)
    expected = published_pixels(data)
    for form, work in works.items():
        differing = int((work() != expected).sum())
        assert differing == 0, f"{name}, {form}: {differing} values differ from the published ones"
    times = in_turns(works, "cpu", 5 if quick else 25)
    rows = []
    for form, seconds in times.items():
        baseline = "published, resize alone" if form.endswith("alone") else "published"
        done = {"items": (1, "images"), "beside": (baseline, times[baseline]["p50_s"])}
        rows.append(evidence("pixels", name, form, seconds, roofline, quality={"pixels_differing": 0}, **done))
    return rows


def ours(data: bytes, dali: DaliDecoder | None) -> torch.Tensor:
    """The CPU path of `medmax tokenize`."""
    return normalised(torch.from_numpy(fit(decode(data, "image", dali=dali).pixels)[None]))

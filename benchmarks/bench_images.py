"""Images to codes: pixels on one core, the encoder alone, `medmax tokenize` as a whole, beside the published path.

    PYTHONPATH=. python -m benchmarks.bench_images [--only pixels,encoder,tokenize,memory] [--quick]
        [--output FILE.json]

What differs is counted first, and a form that is not within its bound fails its section before anything is timed.

- pixels: decoding and preprocessing on one thread, ours as `medmax tokenize` does it on a CPU. Up to the same float32
  tensor; pixels_differing counts its values that are not equal to the published path's, of which there must be none.
- encoder: pixels on the device to codes, in each precision, and the published eager form (TF32 convolutions on a GPU,
  the whole distance matrix). codes_differing is the share of codes that are not those of the published form in fp32
  without TF32, published_differing that of the published form as it runs, near_ties the share whose two nearest codes
  are as near as rounding. FLOP are those of all convolutions, the attention and the distances, and stand beside a large
  16-bit product, in fp32 rows too.
- tokenize: the whole command over JPEG files of one megapixel on a RAM disk, from reading to Parquet. Seconds are of an
  image, by shards; the first two shards are left out, since the first one captures graphs and files are read ahead
  while it does. The published loop reads and resizes with Pillow in the same process, batch by batch.
- memory (only when asked for): resident memory while 100,000 distinct images go through `medmax tokenize`, with codes
  that cost nothing in place of the encoder's.

Weights are random, codes are latents of other pictures (stages/image_forms.py). On a CPU, where the real encoder takes
seconds an image and most have no 16-bit convolutions to speak of, encoder and tokenize run a small one in fp32.
"""

import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Roofline, evidence, in_turns, percentiles
from benchmarks.sections import forget, run_sections, section_parser
from benchmarks.stages import image_forms as forms
from benchmarks.stages.image_memory import memory
from benchmarks.stages.image_pixels import pixels
from medmax_fast.config import TokenizeConfig
from medmax_fast.data.codes import code_files, read_codes
from medmax_fast.data.dali import available
from medmax_fast.data.shards import Shards
from medmax_fast.files import read_json
from medmax_fast.model.image_tokenizer import PRECISIONS, ImageTokenizer, normalised
from medmax_fast.model.vqgan_config import VQConfig
from medmax_fast.runtime import pick_device
from medmax_fast.tokenization import tokenize_images

# Largest share of codes that may differ. Emulated on a CPU, TF32 and fp16 change 0.2 % of these and bf16 1.7 %; of the
# golden ones 0.9, 1.2 and 8.3 % (bench_precision). A wrong layer changes nearly all.
BOUNDS = {"fp32": 1e-3, "tf32": 0.03, "fp16": 0.03, "bf16": 0.15}
PUBLISHED = "published"
# Real shape, for a GPU; a small one for the encoder alone and one for whole pictures on a CPU.
REAL = VQConfig()
SMALL = VQConfig(ch=32, z_channels=32, embed_dim=32, n_embed=256, resolution=64)
WHOLE = VQConfig(ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=0, z_channels=8, embed_dim=8, n_embed=1024)
# Pictures encoded at a time; 64 would have 2^31 activations, one more than an index of 32 bits. And turned pictures
# that are encoded; the others make the codebook.
BATCH = {"cuda": 32, "cpu": 2}
ENCODED = 64
# Different pictures among the files of `tokenize`: on a GPU as many as the command itself compares with fp32.
DIFFERENT = {"cuda": 16, "cpu": 2}
# Shards of a tokenize run, those left out, images of one.
SHARDS, COLD = 6, 2
SHARD = {"cuda": 256, "cpu": 2}
# The exact encoder is several times slower.
FP32_SHARD = {"cuda": 64, "cpu": 2}
PUBLISHED_BATCHES = 3
SUMMARY = ("row", "p50_s", "images_per_s", "times", "differing", "resident_mib")
TOKENIZED = "JPEG 1152 x 864"


def encoder_shape(config: VQConfig, batch: int) -> str:
    return f"{batch} pictures of {config.resolution} x {config.resolution}"


def encoder_form(precision: str) -> str:
    return f"ours, {precision}"


def tokenize_form(precision: str, fast: bool = False) -> str:
    return f"medmax tokenize, {precision}{', --fast' * fast}"


def floors() -> list[dict]:
    """What a batch must move and multiply on a GPU, in the names of the evidence; computes nothing."""
    work = {"moved_bytes": forms.encode_bytes(REAL, BATCH["cuda"]), "flop": BATCH["cuda"] * forms.encode_flop(REAL)}
    rows = [{"stage": "encoder", "shape": encoder_shape(REAL, BATCH["cuda"]), **work}]
    return [*rows, {"stage": "tokenize", "shape": TOKENIZED, "moved_bytes": 0, "flop": forms.encode_flop(REAL)}]


def shown(row: dict) -> tuple[list[dict], list[dict]]:
    """A row of evidence as a section gives it, with what is printed of it."""
    printed = {"row": row["form"], "shape": row["shape"], "p50_s": row["p50_s"], "images_per_s": row["items_per_s"]}
    printed |= {"times": row["times"], "share": row["share"], "differing": row["quality"]["codes_differing"]}
    return [printed | row["quality"]], [row]


def encoder(device: torch.device, roofline: Roofline, repeats: int) -> Iterator[tuple[list[dict], list[dict]]]:
    """Every precision in turn: a captured graph keeps its memory, and those of all do not fit some cards."""
    config, batch = REAL if device.type == "cuda" else SMALL, BATCH[device.type]
    pictures = forms.turned_pictures(config.resolution)
    checkpoint = forms.VQGANCheckpoint(config, device, pictures[ENCODED:])
    # From all over the list where not all are encoded.
    x_BCHW = normalised(torch.from_numpy(pictures[: ENCODED : ENCODED // batch]).to(device))
    eager = checkpoint.eager(device)
    exact, near_ties = forms.exact_codes(eager, x_BCHW)
    work = {"moved": forms.encode_bytes(config, batch), "flop": batch * forms.encode_flop(config)}
    first = None

    def measure(form: str, precision: str, encode: Callable[[], torch.Tensor]) -> dict:
        forget()
        differing = float((encode().cpu().numpy() != exact).mean())
        assert differing <= BOUNDS[precision], f"{form}: {differing:.2%} of the codes differ from fp32's"
        seconds = in_turns({form: encode}, device.type, repeats, calls=1)[form]
        quality = {"codes_differing": differing, "near_ties": near_ties}
        quality |= {"published_differing": first["quality"]["codes_differing"]} if first else {}
        beside = (PUBLISHED, first["p50_s"] if first else seconds["p50_s"])
        done = {"items": (batch, "images"), "beside": beside, "quality": quality}
        return evidence("encoder", encoder_shape(config, batch), form, seconds, roofline, **done, **work)

    row = measure(PUBLISHED, "tf32" if device.type == "cuda" else "fp32", lambda: forms.published_codes(eager, x_BCHW))
    first = row
    yield shown(row)
    for precision, dtype in PRECISIONS.items() if device.type == "cuda" else [("fp32", torch.float32)]:
        tokenizer = ImageTokenizer.from_checkpoint(checkpoint, device, precision, batch)
        x = x_BCHW.to(dtype)
        x = x.contiguous(memory_format=torch.channels_last) if device.type == "cuda" else x
        yield shown(measure(encoder_form(precision), precision, functools.partial(tokenizer.encode_tensor, x)))
        del tokenizer


def tokenize(device: torch.device, roofline: Roofline) -> Iterator[tuple[list[dict], list[dict]]]:
    """The published loop, then the command: exact, as it comes, and as fast as it goes."""
    kind, batch, different = device.type, BATCH[device.type], DIFFERENT[device.type]
    config = REAL if kind == "cuda" else WHOLE
    checkpoint = forms.VQGANCheckpoint(config, device, forms.turned_pictures(config.resolution)[-different:])
    jpeg = forms.jpegs(different)

    def row(form: str, seconds: dict, quality: dict) -> tuple[list[dict], list[dict]]:
        done = {"flop": forms.encode_flop(config), "items": (1, "images"), "quality": quality}
        return shown(
            evidence("tokenize", TOKENIZED, form, seconds, roofline, beside=(PUBLISHED, first["p50_s"]), **done)
        )

    eager = checkpoint.eager(device)
    x_BCHW = torch.cat([forms.published_pixels(jpeg(i)) for i in range(different)]).to(device)
    exact, _ = forms.exact_codes(eager, x_BCHW)
    published = float((forms.published_codes(eager, x_BCHW).cpu().numpy() != exact).mean())
    assert published <= BOUNDS["tf32"], f"published: {published:.2%} of the codes differ from fp32's"
    first = published_seconds(eager, jpeg, batch, device)
    yield row(PUBLISHED, first, {"codes_differing": published})
    del eager
    plans = [("fp32", False)] + ([("tf32", False), ("fp16", False)] if kind == "cuda" else [])
    plans += [("fp16", True)] if kind == "cuda" and not available("mixed") else []
    with tempfile.TemporaryDirectory(dir=ram_disk()) as folder:
        for precision, fast in plans:
            size = (FP32_SHARD if precision == "fp32" else SHARD)[kind]
            form = tokenize_form(precision, fast)
            images, codes = Path(folder) / "images", Path(folder) / f"{precision}-{fast}"
            images.mkdir(exist_ok=True)
            for i in range(SHARDS * size):
                (images / f"{i:05d}.jpg").write_bytes(jpeg(i))
            options = {"batch_size": batch, "rows_per_shard": size, "precision": precision, "fast": fast}
            forget()
            summary = tokenize_images(TokenizeConfig(str(images), checkpoint, str(codes), device=kind, **options))
            assert summary["encoded"] == summary["images"] == SHARDS * size, summary
            found = np.concatenate([part for file in code_files(codes) for _, part in read_codes(file, config.n_embed)])
            differing = float((found[:different] != exact).mean())
            # nvJPEG's pixels differ a little.
            bound = BOUNDS["bf16" if fast else precision]
            assert differing <= bound, f"{form}: {differing:.2%} of the codes differ from fp32's on Pillow's pixels"
            changed = summary.get("pixels_differing", 0.0)
            assert fast or changed == 0, f"{form}: {changed:.2%} of the pixels differ from Pillow's"
            quality = {"codes_differing": differing, "pixels_differing": changed}
            quality["published_differing"] = published
            yield row(form, shard_seconds(codes, SHARDS * size, size), quality)


def published_seconds(vqgan, jpeg: Callable[[int], bytes], batch: int, device: torch.device) -> dict[str, float]:
    """Percentiles of one image by batches; one that warms up comes first."""
    times = []
    for start in range(0, (PUBLISHED_BATCHES + 1) * batch, batch):
        files = [jpeg(i) for i in range(start, start + batch)]
        begin = time.perf_counter()
        x_BCHW = torch.cat([forms.published_pixels(data) for data in files])
        forms.published_codes(vqgan, x_BCHW.to(device)).cpu()
        times.append((time.perf_counter() - begin) / batch)
    return percentiles(times[1:])


def shard_seconds(folder: Path, images: int, size: int) -> dict[str, float]:
    """Percentiles of one image by shards, waiting for pixels and writing codes included."""
    shards = Shards(folder, images, size)
    taken = [read_json(shards.record_path(shard))["seconds"] for shard in range(COLD, SHARDS)]
    return percentiles([(seconds["total"] + seconds["write"]) / size for seconds in taken])


def ram_disk() -> str | None:
    """A folder in memory with room for the files; None for the usual one."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and shutil.disk_usage(shared).free > 2 << 30 else None


def main() -> None:
    device = pick_device("auto")
    known = ("pixels", "encoder", "tokenize", "memory")
    arguments = section_parser(__doc__, known, known[:-1]).parse_args()
    quick = arguments.quick
    roofline = Roofline.measure(device.type, quick)
    sections = {
        "pixels": functools.partial(pixels, roofline, quick),
        "encoder": functools.partial(encoder, device, roofline, 1 if quick else 5),
        "tokenize": functools.partial(tokenize, device, roofline),
        "memory": lambda: iter([(memory(5_000 if quick else 100_000), [])]),
    }
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "copy_bytes_per_s": roofline.copy,
        "product_flop_per_s": roofline.product,
    }
    chosen = {name: sections[name] for name in arguments.only}
    sys.exit(run_sections("images", chosen, SUMMARY, arguments.output, facts))


if __name__ == "__main__":
    main()

"""Images to codes: decoding and preprocessing per core against the published path, memory, and on a GPU the whole.

    PYTHONPATH=. python -m benchmarks.bench_images [--quick] [--memory] [--output FILE.json]

Both sides of a row run in the same loop, in turn, on one thread. The published path is Pillow's decode, LANCZOS
resize, crop, and the conversion through float64; ours is what `medmax tokenize` does on a CPU, up to the same float32
tensor. `pixels_differing` counts values of that tensor that are not equal; no row is printed for a path that differs.

--memory: resident memory while 100,000 distinct images go through the whole of `medmax tokenize`, with codes that
cost nothing in place of the encoder's.
"""

import argparse
import hashlib
import io
import os
import resource
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import report
from medmax_fast import tokenization
from medmax_fast.config import TokenizeConfig
from medmax_fast.data.dali import DaliDecoder, available
from medmax_fast.data.images import decode
from medmax_fast.data.resize import SIDE, fit, resized_size
from medmax_fast.model.image_tokenizer import ImageTokenizer, normalised
from medmax_fast.model.vqgan import VQGAN, VQConfig

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "images"
# Dense 16-bit work of an H200 over that of the encoder (550 GFLOP an image).
ROOFLINE_IMAGES_PER_SECOND = 790e12 / 550e9


def published_pixels(data: bytes) -> torch.Tensor:
    """The published preprocessing, step by step: float32 [1, 3, 512, 512]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = resized_size(*image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    image = image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + SIDE, top + SIDE))
    return torch.from_numpy((np.array(image) / 255.0 * 2 - 1).astype(np.float32)).permute(2, 0, 1)[None].contiguous()


def files(quick: bool) -> dict[str, bytes]:
    """Encoded pictures by name, made from golden ones: a slide of 1 and of 4 megapixels, and grey."""
    slide = Image.open(GOLDEN / "ihc.png").convert("RGB")

    def encoded(size: tuple[int, int], format: str, grey: bool = False, **options) -> bytes:
        stream = io.BytesIO()
        picture = slide.resize(size, Image.Resampling.BICUBIC)
        (picture.convert("L") if grey else picture).save(stream, format, **options)
        return stream.getvalue()

    made = {"jpeg 1 MP": encoded((1152, 864), "JPEG", quality=90)}
    if not quick:
        made["jpeg 1 MP, tall"] = encoded((864, 1152), "JPEG", quality=90)
        made["jpeg 4 MP"] = encoded((2304, 1728), "JPEG", quality=90)
        made["jpeg 1 MP, grey"] = encoded((1152, 864), "JPEG", grey=True, quality=90)
        made["png 1 MP"] = encoded((1152, 864), "PNG")
    return made


def in_turn(forms: dict, repeats: int) -> dict[str, list[float]]:
    """Processor milliseconds of this thread per call, p20, p50 and p80, the forms taking turns."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats + 1):
        for name, form in forms.items():
            start = time.thread_time()
            form()
            times[name].append(time.thread_time() - start)
    # The first turn fills caches.
    return {name: (1e3 * np.percentile(taken[1:], (20, 50, 80))).tolist() for name, taken in times.items()}


def per_core(quick: bool) -> list[dict]:
    """Rows of decode and preprocess, and of preprocess alone."""
    torch.set_num_threads(1)
    dali = None if available("cpu") else DaliDecoder()
    rows = []
    for name, data in files(quick).items():
        image = Image.open(io.BytesIO(data)).convert("RGB")
        pixels = decode(data, name).pixels
        width, height = resized_size(*image.size)
        left, top = (width - SIDE) // 2, (height - SIDE) // 2

        def pillow_rest(image=image, box=(left, top, left + SIDE, top + SIDE), size=(width, height)):
            small = image.resize(size, Image.Resampling.LANCZOS).crop(box)
            return torch.from_numpy((np.array(small) / 255.0 * 2 - 1).astype(np.float32)).permute(2, 0, 1).contiguous()

        forms = {
            "published: decode + preprocess": lambda data=data: published_pixels(data),
            "ours: decode + preprocess": lambda data=data: ours(data, None),
            "published: preprocess": pillow_rest,
            "ours: preprocess": lambda pixels=pixels: normalised(torch.from_numpy(fit(pixels)[None])),
        }
        if dali:
            forms["ours, DALI: decode + preprocess"] = lambda data=data: ours(data, dali)
        expected = published_pixels(data)
        times = in_turn(forms, 5 if quick else 25)
        for form, (low, middle, high) in times.items():
            differing = int((forms[form]().view_as(expected) != expected).sum())
            assert differing == 0, (name, form, differing)
            baseline = times["published: " + form.split(": ")[1]][1]
            rows.append(
                {
                    "file": name,
                    "form": form,
                    "ms_p20": round(low, 3),
                    "ms_p50": round(middle, 3),
                    "ms_p80": round(high, 3),
                    "images_per_s_core": round(1e3 / middle, 1),
                    "times_published": round(baseline / middle, 2),
                    "pixels_differing": differing,
                }
            )
    return rows


def ours(data: bytes, dali: DaliDecoder | None) -> torch.Tensor:
    """The CPU path of `medmax tokenize`."""
    return normalised(torch.from_numpy(fit(decode(data, "image", dali=dali).pixels)[None]))


class HashCodes:
    """Codes that are a function of the pixels and cost nothing, with the interface of ImageTokenizer."""

    sha256 = "hash"
    num_codes = 8192
    memory: list[tuple[int, float]] = []
    seen = 0

    @classmethod
    def from_checkpoint(cls, *_):
        return cls()

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        HashCodes.seen += len(pixels)
        if HashCodes.seen % 8192 < len(pixels):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            HashCodes.memory.append((HashCodes.seen, pages * resource.getpagesize() / 2**20))
        seeds = [int.from_bytes(hashlib.sha256(image[::64, ::64].tobytes()).digest()[:8], "little") for image in pixels]
        return np.stack([np.random.default_rng(seed).integers(0, 8192, 1024) for seed in seeds])


def memory(count: int) -> list[dict]:
    """Resident memory of `medmax tokenize` over `count` distinct small images in a tar file."""
    with tempfile.TemporaryDirectory() as folder:
        draw = np.random.default_rng(0)
        with tarfile.open(Path(folder) / "images.tar", "w") as tar:
            for i in range(count):
                stream = io.BytesIO()
                Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(stream, "BMP")
                entry = tarfile.TarInfo(f"{i:07d}.bmp")
                entry.size = stream.tell()
                stream.seek(0)
                tar.addfile(entry, stream)
        tokenization.ImageTokenizer = HashCodes
        config = TokenizeConfig(input=f"{folder}/images.tar", ckpt="none", output=f"{folder}/codes", device="cpu")
        summary = tokenization.tokenize_images(config)
    assert summary["encoded"] == summary["images"] == count
    return [{"images": seen, "resident_mib": round(mib, 1)} for seen, mib in HashCodes.memory]


def published_codes(vqgan: VQGAN, x_BCHW: torch.Tensor) -> torch.Tensor:
    """The published encoding: eager, torch's default TF32 convolutions, the whole distance matrix."""
    z_ND = vqgan.quant_conv(vqgan.encoder(x_BCHW)).permute(0, 2, 3, 1).reshape(-1, vqgan.config.embed_dim)
    e_KD = vqgan.quantize.embedding.weight
    distance = z_ND.pow(2).sum(1, keepdim=True) + e_KD.pow(2).sum(1) - 2 * torch.einsum("bd,dn->bn", z_ND, e_KD.t())
    return distance.argmin(1).view(len(x_BCHW), -1)


@torch.no_grad()
def end_to_end(quick: bool) -> list[dict]:
    """On a GPU: `medmax tokenize` over a folder with an encoder of the real shape, against the published loop."""
    data = files(True)["jpeg 1 MP"]
    count, batch = (64, 16) if quick else (6400, 64)
    torch.manual_seed(0)
    state = VQGAN(VQConfig(), decoder=False).state_dict()

    def made(precision: str) -> ImageTokenizer:
        vqgan = VQGAN(VQConfig(), decoder=False)
        vqgan.load_state_dict(state)
        return ImageTokenizer(vqgan, "random", "cuda", precision, batch)

    rows = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for i in range(count):
            # A comment makes each file's content its own, or it would be encoded once.
            (images / f"{i:05d}.jpg").write_bytes(data[:2] + b"\xff\xfe\x00\x08%06d" % i + data[2:])
        vqgan = VQGAN(VQConfig(), decoder=False).cuda()
        vqgan.load_state_dict(state)
        some = [path.read_bytes() for path in sorted(images.iterdir())[: 4 * batch]]
        published_codes(vqgan, published_pixels(some[0]).cuda())
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(0, len(some), batch):
            x = torch.cat([published_pixels(content) for content in some[i : i + batch]])
            published_codes(vqgan, x.cuda()).cpu()
        baseline = len(some) / (time.perf_counter() - start)
        rows.append({"form": "published loop, one process", "images_per_s": round(baseline, 1)})
        for precision, flags in [(p, f) for p in ("fp32", "tf32", "fp16", "bf16") for f in (False, True)]:
            if flags and available("mixed"):
                continue
            tokenization.ImageTokenizer = type("Made", (), {"from_checkpoint": staticmethod(lambda *a: made(a[2]))})
            config = TokenizeConfig(
                input=str(images),
                ckpt="none",
                output=f"{folder}/{precision}-{flags}",
                batch_size=batch,
                precision=precision,
                fast=flags,
            )
            summary = tokenization.tokenize_images(config)
            assert summary["encoded"] == count
            rate = summary["images_per_second"]
            row = {"form": f"{precision}{' --fast' if flags else ''}", "images_per_s": rate}
            row["times_published"] = round(rate / baseline, 1)
            row["share_of_16_bit_roofline"] = round(rate / ROOFLINE_IMAGES_PER_SECOND, 3)
            row |= {f"{stage['stage']}_share": stage["share"] for stage in summary["stages"]}
            row |= {name: summary.get(name, 0.0) for name in ("pixels_differing", "codes_differing")}
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--memory", action="store_true", help="memory over many images instead of speed")
    parser.add_argument("--output", help="JSON file to write")
    arguments = parser.parse_args()
    if arguments.memory:
        report("images, memory", memory(5_000 if arguments.quick else 100_000), arguments.output)
        return
    rows = per_core(arguments.quick)
    facts = {"end_to_end": end_to_end(arguments.quick)} if torch.cuda.is_available() else {}
    report("images", rows, arguments.output, **facts)


if __name__ == "__main__":
    main()

"""Codes that differ from fp32's under each precision of the encoder.

    PYTHONPATH=. python -m benchmarks.bench_precision [--quick] [--ckpt FOLDER] [--images FOLDER] [--output FILE.json]

On a GPU the modes themselves run, and their speed is given. On a CPU they are EMULATED: a CPU has no TF32, and 16-bit
convolutions take minutes a picture on most. Values are rounded where the mode rounds them, products and sums stay in
fp32: TF32 rounds weights and inputs of every convolution to 10 bits after the leading one, to nearest or (what a
tensor core does with the bits it is not given) by cutting them off; fp16 and bf16 also the outputs of convolutions,
residual sums and norms. Only the order of the sums differs from the real thing, and the real 16-bit path, run on a
corner of a picture, must come out much nearer to its emulation than to fp32.

Every position counts, near ties too. The golden images' own answers are compared as well when they are what runs.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.harness import report, timed
from medmax_fast.data.images import load_image
from medmax_fast.model.image_tokenizer import PRECISIONS, ImageTokenizer
from medmax_fast.model.vqgan import AttnBlock, ResBlock

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
QUICK = ("cell.png", "microaneurysms.png", "phantom.png")
# Side of the corner on which the real 16-bit path runs on a CPU, and images of a batch on a GPU.
CORNER, BATCH = 96, 32


def round_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 to 10 explicit bits of mantissa, to nearest, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def cut_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 without the last 13 bits of its mantissa."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


EMULATED: dict[str, tuple[str, Callable, bool]] = {
    # Row: how it rounds, by which function, and whether results are rounded as well as inputs.
    "tf32": ("emulated on CPU, to nearest", round_tf32, False),
    "tf32 cut": ("emulated on CPU, bits cut off", cut_tf32, False),
    "fp16": ("emulated on CPU", lambda x: x.half().float(), True),
    "bf16": ("emulated on CPU", lambda x: x.bfloat16().float(), True),
}


def emulate(tokenizer: ImageTokenizer, rounded: Callable, results: bool) -> ImageTokenizer:
    """An fp32 tokenizer whose encoder rounds as a precision would; norms are rounded as inputs of convolutions."""
    # The last convolution before the code search is fp32 in the 16-bit modes, but not exempt from TF32.
    for module in (tokenizer.vqgan.encoder if results else tokenizer.vqgan).modules():
        if isinstance(module, nn.Conv2d):
            module.weight.copy_(rounded(module.weight))
            if results:
                module.bias.copy_(rounded(module.bias))
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
        if results and isinstance(module, nn.Conv2d | ResBlock | AttnBlock):
            module.register_forward_hook(lambda _, inputs, output: rounded(output))
    return tokenizer


def check(ckpt: Path, pixels: np.ndarray) -> None:
    """The real 16-bit latents lie nearer to the emulated ones than to fp32's."""
    corner = torch.from_numpy(pixels[:, :CORNER, :CORNER]).permute(0, 3, 1, 2) / 127.5 - 1
    exact = ImageTokenizer.from_checkpoint(ckpt).vqgan.encoder(corner)
    for precision in ("fp16", "bf16"):
        real = ImageTokenizer.from_checkpoint(ckpt, precision=precision)
        real_latents = real.vqgan.encoder(corner.to(real.input_dtype)).float()
        emulated = emulate(ImageTokenizer.from_checkpoint(ckpt), *EMULATED[precision][1:]).vqgan.encoder(corner)
        away, effect = (real_latents - emulated).norm(), (real_latents - exact).norm()
        # Sums in another order change one fp16 rounding in 500, and each such change runs through all later layers.
        assert away < 0.6 * effect, (precision, away, effect)


def forms(ckpt: Path, device: torch.device) -> Iterator[tuple[str, str, ImageTokenizer]]:
    """(precision, how it is run, tokenizer), fp32 first."""
    if device.type == "cuda":
        for precision in PRECISIONS:
            yield precision, "real", ImageTokenizer.from_checkpoint(ckpt, device, precision, BATCH)
        return
    yield "fp32", "real", ImageTokenizer.from_checkpoint(ckpt)
    for precision, (how, rounded, results) in EMULATED.items():
        yield precision, how, emulate(ImageTokenizer.from_checkpoint(ckpt), rounded, results)


def encode(tokenizer: ImageTokenizer, pixels: np.ndarray) -> np.ndarray:
    """In batches that fit; one at a time on a CPU."""
    size = BATCH if tokenizer.device.type == "cuda" else 1
    return np.concatenate([tokenizer.encode(pixels[i : i + size]) for i in range(0, len(pixels), size)])


def speed(tokenizer: ImageTokenizer) -> dict:
    """Images per second of full batches of the encoder alone, on a GPU."""
    if tokenizer.device.type != "cuda":
        return {}
    side = tokenizer.vqgan.config.resolution
    x_BCHW = torch.zeros((BATCH, 3, side, side), dtype=tokenizer.input_dtype, device=tokenizer.device)
    x_BCHW = x_BCHW.uniform_(-1, 1).contiguous(memory_format=torch.channels_last)

    def work() -> None:
        tokenizer.encode_tensor(x_BCHW)
        torch.cuda.synchronize()

    seconds = timed(work, repeats=9, warmup=3)
    return {**seconds, "images_per_s": BATCH / seconds["p50_s"]}


def golden_answers(names: list[str], codes: np.ndarray) -> dict:
    """How fp32 compares with the reference's answers."""
    answers = json.loads((GOLDEN / "image_codes.json").read_text())
    right = np.array([answers[name]["codes"] for name in names])
    return {
        "fp32_differing_from_golden": int((codes != right).sum()),
        "golden_near_ties": sum(answers[name]["near_ties"] for name in names),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three images, to see that it runs")
    parser.add_argument("--ckpt", type=Path, default=GOLDEN / "checkpoint", help="checkpoint (default: the golden one)")
    parser.add_argument("--images", type=Path, default=GOLDEN / "images", help="folder (default: the golden images)")
    parser.add_argument("--output", help="JSON file to write")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = sorted(path.name for path in arguments.images.iterdir())
    if arguments.quick:
        names = [name for name in names if name in QUICK] or names[: len(QUICK)]
    pixels = np.stack([load_image(arguments.images / name) for name in names])
    with torch.no_grad():
        if device.type == "cpu":
            check(arguments.ckpt, pixels[:1])
        rows, exact, facts = [], None, {}
        for precision, how, tokenizer in forms(arguments.ckpt, device):
            codes = encode(tokenizer, pixels)
            if exact is None:
                exact = codes
                golden = arguments.images == GOLDEN / "images" and arguments.ckpt == GOLDEN / "checkpoint"
                facts = golden_answers(names, codes) if golden else {}
            differing = int((codes != exact).sum())
            row = {"precision": precision, "run": how, "codes": codes.size, "differing": differing}
            rows.append(row | {"share": differing / codes.size} | speed(tokenizer))
    shares = {row["precision"]: row["share"] for row in rows}
    within = [precision for precision in PRECISIONS if shares[precision] <= shares["tf32"]]
    report("precision", rows, arguments.output, images=len(names), no_worse_than_tf32=within, **facts)


if __name__ == "__main__":
    main()

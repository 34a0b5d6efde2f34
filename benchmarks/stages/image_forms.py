"""What bench_images measures: pictures, a random VQGAN whose codes lie among the latents, and the published forms.

The published tokenizer runs in one process: a data loader without workers reads, resizes and converts the images of a
batch with Pillow, one after the other, then they are encoded. Its batch size is not known; ours is taken.

Shapes: B pictures, C channels, H and W pixels, N latents, D code dimension, K codes.
"""

import functools
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from medmax_fast.data.images import load_image
from medmax_fast.data.resize import SIDE, resized_size
from medmax_fast.model.arithmetic import repeatable
from medmax_fast.model.checkpoint_base import Checkpoint
from medmax_fast.model.image_tokenizer import normalised
from medmax_fast.model.vqgan import VQGAN
from medmax_fast.model.vqgan_config import VQConfig

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "images"
# Squared distances of the two nearest codes that differ by less than this share, as the golden data counts near ties.
NEAR_TIE = 1e-5
# Pictures encoded at a time where nothing is timed.
FEW = 4


def published_pixels(data: bytes) -> torch.Tensor:
    """The published preprocessing, step by step: float32 [1, 3, 512, 512]."""
    return published_rest(Image.open(io.BytesIO(data)).convert("RGB"))[None]


def published_rest(image: Image.Image) -> torch.Tensor:
    """What follows the decoding: LANCZOS, crop, and through float64 to float32 [3, 512, 512]."""
    width, height = resized_size(*image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    image = image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + SIDE, top + SIDE))
    return torch.from_numpy((np.array(image) / 255.0 * 2 - 1).astype(np.float32)).permute(2, 0, 1).contiguous()


@torch.no_grad()
def published_codes(vqgan: VQGAN, x_BCHW: torch.Tensor) -> torch.Tensor:
    """The published encoding: eager, torch's default TF32 convolutions, the whole distance matrix."""
    return nearest(latents(vqgan, x_BCHW), vqgan.quantize.embedding.weight).view(len(x_BCHW), -1)


def latents(vqgan: VQGAN, x_BCHW: torch.Tensor) -> torch.Tensor:
    """float32 [N, D], picture by picture."""
    return vqgan.quant_conv(vqgan.encoder(x_BCHW)).permute(0, 2, 3, 1).flatten(0, 2)


def nearest(z_ND: torch.Tensor, e_KD: torch.Tensor) -> torch.Tensor:
    """The published search: [N, K] distances, several times over."""
    distance = z_ND.pow(2).sum(1, keepdim=True) + e_KD.pow(2).sum(1) - 2 * torch.einsum("nd,dk->nk", z_ND, e_KD.t())
    return distance.argmin(1)


@torch.no_grad()
def exact_codes(vqgan: VQGAN, x_BCHW: torch.Tensor) -> tuple[np.ndarray, float]:
    """(codes of the published form in fp32 without TF32, share of them that are near ties)."""
    codes, ties = [], []
    e_KD = vqgan.quantize.embedding.weight
    with repeatable(x_BCHW.device):
        for x in x_BCHW.split(FEW):
            z_ND = latents(vqgan, x)
            codes.append(nearest(z_ND, e_KD).view(len(x), -1).cpu().numpy())
            best = torch.cdist(z_ND.double(), e_KD.double()).topk(2, largest=False).values
            ties.append((best[:, 1] - best[:, 0] < NEAR_TIE / 2 * best[:, 1]).double().mean().item())
    return np.concatenate(codes), float(np.mean(ties))


@functools.cache
def encode_flop(config: VQConfig) -> int:
    """FLOP of one picture's codes: convolutions, attention and distances; counted by torch, nothing is computed."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x_BCHW = torch.empty(1, config.in_channels, config.resolution, config.resolution)
        published_codes(VQGAN(config, decoder=False), x_BCHW)
    return counter.get_total_flops()


def encode_bytes(config: VQConfig, batch: int) -> int:
    """Bytes that a batch moves at least: 16-bit weights and pixels in, fp32 codebook in, int64 codes out."""
    with torch.device("meta"):
        encoder = VQGAN(config, decoder=False).encoder
    weights = sum(parameter.numel() for parameter in encoder.parameters())
    pixels = config.in_channels * config.resolution**2
    return 2 * weights + 4 * config.n_embed * config.embed_dim + batch * (2 * pixels + 8 * config.latent_side**2)


class VQGANCheckpoint(Checkpoint):
    """A checkpoint of a random VQGAN alone, without a decoder.

    Its codes are latents of `pictures` (uint8 [N, H, W, 3] of the VQGAN's resolution): next to a random codebook all
    latents of a random encoder lie in one corner, and nearly all pictures have the same codes.
    """

    layout, path = "random", Path("random")

    def __init__(self, config: VQConfig, device: torch.device, pictures: np.ndarray):
        torch.manual_seed(0)
        self.vq_config = config
        vqgan = VQGAN(config, decoder=False).requires_grad_(False).to(device)
        with repeatable(device):
            found = [latents(vqgan, normalised(x.to(device))) for x in torch.from_numpy(pictures).split(FEW)]
        z_ND = torch.cat(found).cpu()
        assert len(z_ND) >= config.n_embed, (len(z_ND), config.n_embed)
        self._state = {name: tensor.cpu() for name, tensor in vqgan.state_dict().items()}
        self._state["quantize.embedding.weight"] = z_ND[torch.randperm(len(z_ND))[: config.n_embed]]

    def _own_vqgan(self) -> dict[str, torch.Tensor]:
        return self._state

    def eager(self, device: torch.device) -> VQGAN:
        """The module as the published code runs it."""
        with torch.device(device):
            vqgan = VQGAN(self.vq_config, decoder=False).requires_grad_(False).eval()
        vqgan.load_state_dict(self._state)
        return vqgan


def turned_pictures(side: int) -> np.ndarray:
    """Middles of the 21 golden pictures, each in four directions: uint8 [84, side, side, 3]."""
    middle = slice((SIDE - side) // 2, (SIDE + side) // 2)
    golden = [load_image(path)[middle, middle] for path in sorted(GOLDEN.iterdir())]
    return np.stack([np.rot90(picture, turn) for picture in golden for turn in range(4)])


def jpegs(count: int) -> Callable[[int], bytes]:
    """JPEG files of one megapixel by number, no two of the same bytes: a golden slide in `count` ways."""
    slide = Image.open(GOLDEN / "ihc.png").convert("RGB")
    made = [encoded(turned(slide, i), (1152, 864), "JPEG", quality=90) for i in range(count)]
    # A comment makes a file's content its own, or it would be encoded once.
    return lambda i: made[i % count][:2] + b"\xff\xfe\x00\x0a%08d" % i + made[i % count][2:]


def turned(image: Image.Image, number: int) -> Image.Image:
    """One of the eight ways to turn and mirror an image, cut anew with every eighth number."""
    width, height = image.size
    cut = 8 * (number // 8)
    image = image.crop((cut, cut, width - cut, height - cut))
    return image if number % 8 == 0 else image.transpose(Image.Transpose(number % 8 - 1))


def encoded(image: Image.Image, size: tuple[int, int], format: str, **options) -> bytes:
    """The bytes of an image file of that size."""
    stream = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(stream, format, **options)
    return stream.getvalue()

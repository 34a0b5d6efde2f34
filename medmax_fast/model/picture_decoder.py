"""Codes back to pixels, in batches: on a GPU in fp16 where that moves no pixel by more than one grey level.

Decoding is 1,004 GFLOP a picture at full size, which fp16 does at twice the rate of TF32 and half the memory. Whether
a checkpoint's decoder takes it is measured, not assumed: the first batch is decoded both ways and compared, and what
came out decides for the rest. On a CPU everything is fp32.
"""

import copy
import io
from pathlib import Path

import numpy as np

from medmax_fast.files import atomic_path
from medmax_fast.model.image_tokenizer import ImageTokenizer
from medmax_fast.runtime import InputError, log
from medmax_fast.vocab import IMAGE_CODES, IMAGE_SIDE

# Pictures decoded at a time, on a GPU and on a CPU; activations take 128 MB each at full size in fp32.
BATCH, CPU_BATCH = 8, 2
# Grey levels that fp16 may move a pixel by.
TOLERANCE = 1


class PictureDecoder:
    """The picture decoder of one VQGAN. half: compare with fp16 and use it where it agrees (default: on a GPU)."""

    def __init__(self, tokenizer: ImageTokenizer, half: bool | None = None):
        self._tokenizer = tokenizer
        self._batch = BATCH if tokenizer.device.type == "cuda" else CPU_BATCH
        wanted = tokenizer.device.type == "cuda" if half is None else half
        # None: not decided. The furthest that fp16 moved a pixel, once it has been compared.
        self.half: bool | None = None if wanted and tokenizer.vqgan.decoder is not None else False
        self.apart: int | None = None
        self._half_tokenizer: ImageTokenizer | None = None

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Pixels uint8 [N, 512, 512, 3] of codes [N, 1024]; InputError without a decoder or for a bad code."""
        codes = np.asarray(codes)
        if not len(codes):
            return np.empty((0, 512, 512, 3), dtype=np.uint8)
        parts = [codes[start : start + self._batch] for start in range(0, len(codes), self._batch)]
        return np.concatenate([self._decode(part) for part in parts])

    def preview(self, codes: np.ndarray) -> np.ndarray:
        """Pixels uint8 [512, 512, 3] of a picture's first codes [1..1024]; rows that are not whole yet are white."""
        codes = np.asarray(codes)
        if not 1 <= len(codes) <= IMAGE_CODES:
            raise InputError(f"{len(codes)} codes of a picture, expected 1 to {IMAGE_CODES}")
        # What is missing continues the last row, so that the decoder sees nothing strange beside what is there.
        tail = np.resize(codes[-IMAGE_SIDE:], IMAGE_CODES - len(codes))
        pixels = self.decode(np.concatenate([codes, tail])[None])[0]
        side = len(pixels) // IMAGE_SIDE
        pixels[len(codes) // IMAGE_SIDE * side :] = 255
        return pixels

    def _decode(self, codes: np.ndarray) -> np.ndarray:
        if self.half and self._half_tokenizer is not None:
            return self._half_tokenizer.decode(codes)
        pixels = self._tokenizer.decode(codes)
        if self.half is None:
            self._half_tokenizer = self._in_half()
            other = self._half_tokenizer.decode(codes)
            self.apart = int(np.abs(pixels.astype(np.int16) - other).max())
            self.half = self.apart <= TOLERANCE
            if not self.half:
                self._half_tokenizer = None
                log(f"pictures are decoded in fp32: fp16 moves pixels by up to {self.apart} of 255")
        return pixels

    def _in_half(self) -> ImageTokenizer:
        vqgan = copy.copy(self._tokenizer.vqgan)
        # A shallow copy of a module shares its dictionary of modules.
        vqgan._modules = dict(vqgan._modules)
        vqgan.encoder, vqgan.decoder = None, copy.deepcopy(vqgan.decoder)
        return ImageTokenizer(vqgan, self._tokenizer.sha256, self._tokenizer.device, "fp16")


def png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as the bytes of a PNG file."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as PNG, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(png(pixels))

"""Resident memory of `medmax tokenize` over many distinct images, with codes that cost nothing."""

import hashlib
import io
import resource
import tarfile
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from medmax_fast import tokenization
from medmax_fast.config import TokenizeConfig


class HashCodes:
    """Codes that are a function of the pixels and cost nothing, with the interface of ImageTokenizer."""

    sha256 = "hash"
    num_codes = 8192
    memory: list[tuple[int, float]] = []
    seen, every = 0, 1

    @classmethod
    def from_checkpoint(cls, *_):
        return cls()

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        HashCodes.seen += len(pixels)
        if HashCodes.seen % HashCodes.every < len(pixels):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            HashCodes.memory.append((HashCodes.seen, pages * resource.getpagesize() / 2**20))
        seeds = [int.from_bytes(hashlib.sha256(image[::64, ::64].tobytes()).digest()[:8], "little") for image in pixels]
        return np.stack([np.random.default_rng(seed).integers(0, 8192, 1024) for seed in seeds])


def memory(count: int) -> list[dict]:
    """Resident MiB, twelve times while `count` small images in a tar file are tokenized on the CPU."""
    HashCodes.memory, HashCodes.seen, HashCodes.every = [], 0, max(count // 12, 1)
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
        config = TokenizeConfig(input=f"{folder}/images.tar", ckpt="none", output=f"{folder}/codes", device="cpu")
        with mock.patch.object(tokenization, "ImageTokenizer", HashCodes):
            summary = tokenization.tokenize_images(config)
    assert summary["encoded"] == summary["images"] == count
    return [{"row": f"{seen:,} images", "resident_mib": round(mib, 1)} for seen, mib in HashCodes.memory]

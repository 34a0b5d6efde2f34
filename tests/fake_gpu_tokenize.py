"""What the host waits for while a GPU encodes full-size pictures, as JSON; a process of its own of test_count."""

import json
from types import SimpleNamespace
from unittest import mock

import numpy as np

from benchmarks.counting.fake_gpu import fake_gpu, prepare

prepare()

import torch  # noqa: E402

from medmax_fast.encoding import Encoding  # noqa: E402
from medmax_fast.model.image_tokenizer import ImageTokenizer  # noqa: E402
from medmax_fast.model.vqgan import VQGAN  # noqa: E402
from medmax_fast.model.vqgan_config import VQConfig  # noqa: E402

CONFIG = VQConfig(ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=0, z_channels=8, embed_dim=8, n_embed=64)
BATCH = 2


def arrays(tensor: torch.Tensor) -> np.ndarray:
    """Of fake tensors, which have none."""
    return np.zeros(tuple(tensor.shape), np.uint8)


def main() -> None:
    found = []
    with fake_gpu() as tally, mock.patch.object(torch.Tensor, "numpy", arrays):
        tokenizer = ImageTokenizer(VQGAN(CONFIG, decoder=False), "", "cuda", "fp16", BATCH)
        encoding = Encoding(tokenizer, SimpleNamespace(full_size=True), BATCH, None)
        pictures = [np.zeros((600, 700, 3), np.uint8)] * BATCH
        # Captures the graph.
        before = encoding.start(pictures)
        for _ in range(3):
            with tally.apart() as count:
                following = encoding.start(pictures)
                begun = sum(count.waits.values())
                codes = before()
            before = following
            found.append({"syncs": count.syncs, "begun": begun, "waits": count.waits, "codes": codes.shape})
    print(json.dumps(found))


main()

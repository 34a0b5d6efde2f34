"""From loaded images to codes, on a CPU or a GPU, and how far a fast setting is from the exact one.

On a CPU images arrive resized and are encoded one by one. On a GPU they arrive in full size, or still as files where
nvJPEG decodes them; the resampling kernel brings a batch to the encoder's input, and while the GPU works on one batch
the next is put together: `start` returns before the codes are there.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from medmax_fast.data.dali import DaliDecoder
from medmax_fast.data.feed import ImageLoader
from medmax_fast.data.images import ImageError
from medmax_fast.data.resize import filters
from medmax_fast.model.image_tokenizer import ImageTokenizer


class Encoding:
    """What turns the results of `load_ahead` into codes.

    loader: how the images were loaded, which says where the rest is done. gpu_decoder: decodes what the loader
    postponed.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        loader: ImageLoader,
        batch_size: int,
        gpu_decoder: DaliDecoder | None,
    ):
        self.tokenizer, self.loader, self.batch_size = tokenizer, loader, batch_size
        self.gpu_decoder = gpu_decoder

    def ready(self, results: Iterable[tuple]) -> Iterator[tuple]:
        """The same results in order, with the postponed files decoded, a batch at a time."""
        if self.gpu_decoder is None:
            yield from results
            return
        results = iter(results)
        while chunk := list(itertools.islice(results, self.batch_size)):
            waiting = [(row, loaded) for (_, row), loaded, _ in chunk if loaded.data is not None]
            start = time.monotonic()
            pictures = self.gpu_decoder.decode([loaded.data for _, loaded in waiting])
            for (row, loaded), pixels in zip(waiting, pictures, strict=True):
                try:
                    # What nvJPEG leaves alone Pillow decodes, or gives the reason why nobody can.
                    loaded.pixels = self.loader.decode(loaded.data, row).pixels if pixels is None else pixels
                except ImageError as error:
                    loaded.reason = error.reason
                loaded.data = None
            # The batch's time stands with its first image; only sums over a shard are kept.
            seconds = chunk[0][1].seconds
            seconds["decode"] = seconds.get("decode", 0.0) + time.monotonic() - start
            yield from chunk

    def start(self, pixels: list) -> Callable[[], np.ndarray]:
        """Begin a batch of `Loaded.pixels`; calling the result waits for its codes, uint16 [N, 1024]."""
        if self.loader.full_size:
            return fetched(self.tokenizer.encode_pictures(pixels, *picture_filters(pixels)))
        codes = self.tokenizer.encode(np.stack(pixels)).astype(np.uint16)
        return lambda: codes

    def difference(self, exact: ImageTokenizer, rows: list[int]) -> dict[str, float]:
        """Shares of pixel values and of codes that differ from fp32 on exactly decoded pixels, for these images.

        rows: images of the loader's list; those that cannot be read are left out. exact: the fp32 tokenizer.
        """
        plain = ImageLoader(self.loader.images, self.loader.alpha, self.loader.depth16)
        fast = ImageLoader(**{**vars(self.loader), "done": ()})
        results = self.ready(((None, row), fast(row), 0.0) for row in rows)
        pairs: list[tuple[Any, Any]] = [
            (plain(row).pixels, loaded.pixels) for (_, row), loaded, _ in results if loaded.reason is None
        ]
        if not pairs:
            return {"compared_images": 0}
        truth, found = np.stack([pixels for pixels, _ in pairs]), [pixels for _, pixels in pairs]
        right = np.concatenate([exact.encode(image[None]) for image in truth])
        batches = [found[i : i + self.batch_size] for i in range(0, len(found), self.batch_size)]
        codes = np.concatenate([self.start(batch)() for batch in batches])
        if self.loader.full_size:
            found = np.concatenate([self.tokenizer.resampled(batch, *picture_filters(batch)) for batch in batches])
        return {
            "compared_images": len(pairs),
            "pixels_differing": float(np.mean(np.asarray(found) != truth)),
            "codes_differing": float(np.mean(codes != right)),
        }


def fetched(codes: torch.Tensor) -> Callable[[], np.ndarray]:
    """Begin to copy codes to the host; calling the result waits for them, uint16, and for nothing begun since."""
    # Into page-locked memory. A copy that is begun when it is asked for would come behind the next batch.
    host, copied = codes.to("cpu", non_blocking=True), None
    if codes.is_cuda:
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(codes.device))

    def wait() -> np.ndarray:
        if copied is not None:
            copied.synchronize()
        return host.numpy().astype(np.uint16)

    return wait


def picture_filters(pixels: list) -> tuple[list, list]:
    """Filters of the columns and of the rows of full-size pictures [H, W, 3]."""
    made = [filters(picture.shape[1], picture.shape[0]) for picture in pixels]
    return [(f.x_starts, f.x_weights) for f in made], [(f.y_starts, f.y_weights) for f in made]

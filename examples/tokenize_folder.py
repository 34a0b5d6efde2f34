"""Codes of every image in a folder, with the Python API: one .npy of 1,024 codes per image.

    python examples/tokenize_folder.py IMAGES CHECKPOINT OUTPUT

`medmax tokenize` does the same for a corpus: shards, restarts, several processes.
"""

import argparse
from pathlib import Path

import numpy as np

from medmax_fast import ImageTokenizer
from medmax_fast.data.images import ImageError, list_images, load_image
from medmax_fast.runtime import pick_device


def tokenize_folder(images: str, checkpoint: str, output: str) -> int:
    """Write OUTPUT/<name>.npy (int64 [1024]) for every readable image; returns how many were not."""
    tokenizer = ImageTokenizer.from_checkpoint(checkpoint, pick_device("auto"))
    folder, rejected = Path(output), 0
    for name in list_images(images):
        try:
            pixels = load_image(Path(images) / name)
        except ImageError as error:
            print(error)
            rejected += 1
            continue
        target = (folder / name).with_suffix(".npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, tokenizer.encode(pixels[None])[0])
    return rejected


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tokenize a folder of images.")
    for argument in ("images", "checkpoint", "output"):
        parser.add_argument(argument)
    print(f"{tokenize_folder(**vars(parser.parse_args()))} rejected")

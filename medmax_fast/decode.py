"""`medmax decode`: codes back to pictures."""

import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from medmax_fast.config import DecodeConfig
from medmax_fast.data.codes import PATH_COLUMN, code_files, codes_fingerprint, originals, read_codes
from medmax_fast.data.images import ImageError, load_image
from medmax_fast.figures import reconstruction_grid
from medmax_fast.files import atomic_path, open_output
from medmax_fast.model.image_tokenizer import ImageTokenizer
from medmax_fast.model.picture_decoder import write_png
from medmax_fast.progress import Progress
from medmax_fast.runtime import InputError, kept, pick_device, require_at_least

_INDEX_FILE, _GRID_FILE = "index.jsonl", "reconstructions.png"
# Pictures of the grid.
_SHOWN = 8
# File systems take 255 bytes; room is left for a number, the suffix and the temporary name.
_STEM_BYTES = 200


def decode_images(config: DecodeConfig) -> dict:
    """Run `medmax decode`: one PNG per row of a code table, and index.jsonl with img_path, file and row of each.

    reconstructions.png has the first of them beside their originals, if these are still where the table says.
    """
    start = time.monotonic()
    require_at_least(config, 1, "batch_size")
    files = code_files(config.input)
    tokenizer = ImageTokenizer.from_checkpoint(config.ckpt, pick_device(config.device), vqgan=config.vqgan)
    num_codes = tokenizer.vqgan.config.n_embed
    # What can be wrong is found before the first picture is drawn: every code, and a checkpoint without a decoder.
    paths = [path for file in files for names, _ in read_codes(file, num_codes) for path in names]
    if tokenizer.vqgan.decoder is None:
        raise InputError(f"{config.ckpt}: no VQGAN decoder, so it cannot draw; --vqgan gives it one")
    settings = {"codes_sha256": codes_fingerprint(config.input), "vqgan_sha256": tokenizer.sha256}
    output = open_output(config.output, "decode", settings)
    names = picture_names(paths)
    rows = (codes for file in files for _, batch in read_codes(file, num_codes) for codes in batch)
    done = before = sum((output / name).exists() for name in names)
    missing = ((name, codes) for name, codes in zip(names, rows, strict=True) if not (output / name).exists())
    with (
        kept(lambda: f"{done} of {len(names)} pictures are kept in {output}"),
        Progress("decode (pictures)", len(names), before) as bar,
    ):
        for name, pixels in _draw(missing, tokenizer, config.batch_size):
            write_png(output / name, pixels)
            done += 1
            bar.update(done)
    with atomic_path(output / _INDEX_FILE) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, (path, name) in enumerate(zip(paths, names, strict=True)):
            file.write(json.dumps({PATH_COLUMN: path, "file": name, "row": row}) + "\n")
    grid = _draw_grid(output, config.input, paths[:_SHOWN], names[:_SHOWN])
    seconds = round(time.monotonic() - start, 3)
    counts = {"pictures": len(names), "drawn_now": done - before, "seconds": seconds}
    return {"output": str(output), "reconstructions": grid and str(grid), **counts}


def _draw_grid(output: Path, source: str, paths: Sequence[str], names: Sequence[str]) -> Path | None:
    """Originals beside what was drawn; None if there is no original to be read."""
    from PIL import Image

    base, choices = originals(source)
    found = []
    for path, name in zip(paths, names, strict=True):
        try:
            original = load_image(os.path.join(base, path), **choices)
        except ImageError:
            continue
        with Image.open(output / name) as picture:
            found.append((original, np.asarray(picture), Path(path).name))
    if not found:
        return None
    shown, drawn, titles = zip(*found, strict=True)
    return reconstruction_grid(shown, drawn, titles, output / _GRID_FILE)


def _draw(rows: Iterable[tuple[str, np.ndarray]], tokenizer: ImageTokenizer, batch_size: int) -> Iterator[tuple]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, batch_size)):
        pictures = tokenizer.decode(np.stack([codes for _, codes in batch]))
        yield from zip((name for name, _ in batch), pictures, strict=True)


def picture_names(paths: Iterable[str]) -> list[str]:
    """A PNG name per image path: its stem, with -1, -2, .. after it where that is taken (letter case ignored)."""
    used = {Path(_GRID_FILE).stem}
    names = []
    for path in paths:
        stem = Path(path).stem.encode()[:_STEM_BYTES].decode(errors="ignore") or "image"
        name = stem
        for number in itertools.count(1):
            if name.lower() not in used:
                break
            name = f"{stem}-{number}"
        used.add(name.lower())
        names.append(f"{name}.png")
    return names

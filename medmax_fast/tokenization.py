"""`medmax tokenize` and `medmax decode`: images to codes and codes to pictures.

Work is divided into the fixed shards of data/shards.py: rank r of a torchrun job takes shards r, r + world, .. that
are not done yet, so a stopped run continues where it was with any number of processes. Threads decode ahead of the
encoder, across shard boundaries; batches of the encoder never cross one, so that a shard's codes do not depend on
where the run began. Whoever finds all shards done merges their records.
"""

import itertools
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from medmax_fast.config import DecodeConfig, TokenizeConfig, settings_of
from medmax_fast.data.codes import PATH_COLUMN, code_files, codes_fingerprint, read_codes
from medmax_fast.data.image_list import ImageList, read_image_list
from medmax_fast.data.images import ImageError, load_image
from medmax_fast.data.shards import Shards
from medmax_fast.model.image_tokenizer import ImageTokenizer
from medmax_fast.runtime import (
    SETTINGS_FILE,
    InputError,
    TooManyRejected,
    atomic_path,
    open_output,
    pick_device,
    progress,
    rank_and_world,
)
from medmax_fast.vocab import IMAGE_CODES

# decode is summed over threads; wait is what the encoder waited for pixels.
STAGES = ("decode", "wait", "encode", "write")
_INDEX_FILE = "index.jsonl"
# File systems take 255 bytes; room is left for a number, the suffix and the temporary name.
_STEM_BYTES = 200


def tokenize_images(config: TokenizeConfig) -> dict:
    """Run `medmax tokenize`; returns its summary. Raises InputError, or TooManyRejected when all shards are done."""
    start = time.monotonic()
    _require_at_least(config, 1, "batch_size", "rows_per_shard")
    _require_at_least(config, 0, "workers", "max_rejected")
    images = read_image_list(config.input, config.image_key)
    tokenizer = ImageTokenizer.from_checkpoint(config.ckpt, pick_device(config.device), config.precision)
    settings = {
        **settings_of(config, "alpha", "precision", "rows_per_shard"),
        "image_key": images.key,
        "input_sha256": images.sha256,
        "vqgan_sha256": tokenizer.sha256,
    }
    shards = Shards(_open_shared_output(config.output, settings), len(images.paths), config.rows_per_shard)
    rank, world = rank_and_world()
    mine = [shard for shard in range(shards.count) if shard % world == rank and not shards.done(shard)]
    seconds = _run(mine, shards, images, tokenizer, config)
    # torchrun ends every rank when one fails, so there rank 0 can wait for the others and judge for all of them.
    elastic = "TORCHELASTIC_RUN_ID" in os.environ and world > 1
    while elastic and rank == 0 and not shards.all_done():
        time.sleep(0.2)
    if shards.all_done():
        shards.merge(images.base, settings)
    summary = _summary(shards, seconds, time.monotonic() - start)
    if summary["complete"] and summary["rejected"] > config.max_rejected and (rank == 0 or not elastic):
        raise TooManyRejected(summary, config.max_rejected)
    return summary


def _summary(shards: Shards, seconds: Counter, elapsed: float) -> dict:
    records = shards.records()
    return {
        "output": str(shards.folder),
        "images": sum(record["rows"] for record in records),
        "rejected": sum(len(record["rejected"]) for record in records),
        "shards": len(records),
        "complete": len(records) == shards.count,
        "seconds": round(elapsed, 3),
        **{f"{stage}_seconds": round(seconds[stage], 3) for stage in STAGES},
    }


def _run(mine: list[int], shards: Shards, images: ImageList, tokenizer: ImageTokenizer, config) -> Counter:
    """Decode, encode and publish the shards `mine`; seconds per stage."""
    total: Counter = Counter()
    workers = config.workers or os.cpu_count() or 1
    tasks = ((shard, row) for shard in mine for row in shards.rows(shard))
    results = decode_ahead(
        tasks, lambda task: _load(images.file(task[1]), config.alpha), workers, workers + 4 * config.batch_size
    )
    if rank_and_world()[0] == 0:
        results = progress(results, "tokenize (images)", sum(len(shards.rows(shard)) for shard in mine))
    for shard, group in itertools.groupby(results, key=lambda result: result[0][0]):
        seconds: Counter = Counter(dict.fromkeys(STAGES, 0.0))
        rows, codes, reasons = _encode_shard(group, tokenizer, config.batch_size, seconds)
        rejected = [{PATH_COLUMN: images.paths[row], "reason": reason, "row": row} for row, reason in reasons]
        total.update(shards.publish(shard, [images.paths[row] for row in rows], codes, rejected, dict(seconds)))
    return total


def decode_ahead(tasks: Iterable, load: Callable, workers: int, ahead: int) -> Iterator[tuple]:
    """Yield (task, load(task), seconds waited for it) in order, with `ahead` tasks under way in `workers` threads."""
    tasks, under_way = iter(tasks), deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        while True:
            for task in itertools.islice(tasks, ahead - len(under_way)):
                under_way.append((task, pool.submit(load, task)))
            if not under_way:
                return
            task, future = under_way.popleft()
            start = time.monotonic()
            yield task, future.result(), time.monotonic() - start
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _load(path: str, alpha: str) -> tuple[np.ndarray | str, float]:
    """(pixels, or the reason why there are none; seconds)."""
    start = time.monotonic()
    try:
        result = load_image(path, alpha)
    except ImageError as error:
        result = error.reason
    return result, time.monotonic() - start


def _encode_shard(results: Iterable[tuple], tokenizer: ImageTokenizer, batch_size: int, seconds: Counter):
    """(rows, codes uint16 [n, 1024], (row, reason) of rejected rows) of one shard's decoded images."""
    rows: list[int] = []
    reasons: list[tuple[int, str]] = []
    pixels: list[np.ndarray] = []
    codes = [np.zeros((0, IMAGE_CODES), np.uint16)]

    def encode() -> None:
        start = time.monotonic()
        codes.append(tokenizer.encode(np.stack(pixels)).astype(np.uint16))
        pixels.clear()
        seconds["encode"] += time.monotonic() - start

    for (_, row), (result, decode_seconds), waited in results:
        seconds["decode"] += decode_seconds
        seconds["wait"] += waited
        if isinstance(result, str):
            reasons.append((row, result))
            continue
        rows.append(row)
        pixels.append(result)
        if len(pixels) == batch_size:
            encode()
    if pixels:
        encode()
    return rows, np.concatenate(codes), reasons


def _open_shared_output(folder: str | Path, settings: dict) -> Path:
    try:
        return open_output(folder, "tokenize", settings)
    except InputError:
        if not (Path(folder) / SETTINGS_FILE).exists():
            raise
        # Another rank may have made the folder between the look and the refusal: judge it by its settings.
        return open_output(folder, "tokenize", settings)


def _require_at_least(config, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected {least} or more")


def decode_images(config: DecodeConfig) -> dict:
    """Run `medmax decode`: one PNG per row of a code table, and index.jsonl with img_path, file and row of each."""
    start = time.monotonic()
    _require_at_least(config, 1, "batch_size")
    files = code_files(config.input)
    tokenizer = ImageTokenizer.from_checkpoint(config.ckpt, pick_device(config.device))
    num_codes = tokenizer.vqgan.config.n_embed
    # What can be wrong is found before the first picture is drawn: every code, and a checkpoint without a decoder.
    paths = [path for file in files for names, _ in read_codes(file, num_codes) for path in names]
    if tokenizer.vqgan.decoder is None:
        raise InputError(f"{config.ckpt}: no VQGAN decoder, so it cannot draw; expected one in the Chameleon layout")
    settings = {"codes_sha256": codes_fingerprint(config.input), "vqgan_sha256": tokenizer.sha256}
    output = open_output(config.output, "decode", settings)
    names = picture_names(paths)
    rows = (codes for file in files for _, batch in read_codes(file, num_codes) for codes in batch)
    missing = ((name, codes) for name, codes in zip(names, rows, strict=True) if not (output / name).exists())
    drawn = 0
    for name, pixels in progress(_draw(missing, tokenizer, config.batch_size), "decode (pictures)"):
        write_png(output / name, pixels)
        drawn += 1
    with atomic_path(output / _INDEX_FILE) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, (path, name) in enumerate(zip(paths, names, strict=True)):
            file.write(json.dumps({PATH_COLUMN: path, "file": name, "row": row}) + "\n")
    seconds = round(time.monotonic() - start, 3)
    return {"output": str(output), "pictures": len(names), "drawn_now": drawn, "seconds": seconds}


def _draw(rows: Iterable[tuple[str, np.ndarray]], tokenizer: ImageTokenizer, batch_size: int) -> Iterator[tuple]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, batch_size)):
        pictures = tokenizer.decode(np.stack([codes for _, codes in batch]))
        yield from zip((name for name, _ in batch), pictures, strict=True)


def picture_names(paths: Iterable[str]) -> list[str]:
    """A PNG name per image path: its stem, with -1, -2, .. after it where that is taken (letter case ignored)."""
    used: set[str] = set()
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


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 [H, W, 3] as PNG, atomically."""
    from PIL import Image

    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")

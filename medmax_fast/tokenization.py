"""`medmax tokenize`: images to codes, exactly once.

Work is divided into the fixed shards of data/shards.py. A process claims a shard, encodes it and publishes it whole;
what it had claimed when it was killed is free again at once. So any number of processes, under torchrun or started
by hand on a shared folder, now or later, fill the same folder, and each of them stays until all of it is done.
Threads load images ahead of the encoder, across shard boundaries. An image's codes do not depend on which others
share its batch, so they do not depend on where a run began, nor on which contents had been seen before.

`--exact` (the default) decodes to Pillow's pixels; `--fast` lets nvJPEG decode. Where a run is not exact fp32, how
much that changes is measured on its first images and said.
"""

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medmax_fast.config import TokenizeConfig, settings_of
from medmax_fast.data.claims import Claims
from medmax_fast.data.codes import PATH_COLUMN
from medmax_fast.data.dali import DaliDecoder, available
from medmax_fast.data.feed import ImageLoader, load_ahead
from medmax_fast.data.image_list import read_image_list
from medmax_fast.data.shards import Contents, Shard, Shards, totals
from medmax_fast.encoding import Encoding
from medmax_fast.files import open_output
from medmax_fast.model.image_tokenizer import ImageTokenizer
from medmax_fast.progress import Progress
from medmax_fast.runtime import (
    InputError,
    TooManyRejected,
    kept,
    pick_device,
    rank_and_world,
    rejection_limit,
    require_at_least,
)
from medmax_fast.vocab import IMAGE_CODES

# Seconds of work by stage: the first three are summed over the loading threads. `wait` is beside them: how long the
# encoder waited for pixels.
STAGES = ("read", "decode", "preprocess", "encode", "write")
_ARCHIVE_INDEX = ".archive-index"
_POLL_SECONDS = 0.2
# Images on which a setting that is not exact is compared with the exact one.
_SAMPLE = 16


def tokenize_images(config: TokenizeConfig) -> dict:
    """Run `medmax tokenize`; returns its summary. Raises InputError, or TooManyRejected when all shards are done."""
    start = time.monotonic()
    require_at_least(config, 1, "batch_size", "rows_per_shard")
    require_at_least(config, 0, "workers")
    rejection_limit(config.max_rejected, 0)
    index = Path(config.output) / _ARCHIVE_INDEX
    images = read_image_list(config.input, config.image_key, config.archive, index)
    limit = rejection_limit(config.max_rejected, len(images.paths))
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    dali, gpu_decoder = pick_decoders(config, device)
    tokenizer = ImageTokenizer.from_checkpoint(config.ckpt, device, precision, config.batch_size, config.vqgan)
    settings = {
        **settings_of(config, "alpha", "depth16", "fast", "rows_per_shard"),
        "precision": precision,
        "image_key": images.key,
        "input_sha256": images.sha256,
        "vqgan_sha256": tokenizer.sha256,
    }
    shards = Shards(open_output(config.output, "tokenize", settings), len(images.paths), config.rows_per_shard)
    contents = Contents(shards, tokenizer.num_codes)
    loader = ImageLoader(
        images, config.alpha, config.depth16, contents, device.type == "cuda", dali, postpone=gpu_decoder is not None
    )
    # On a CPU, where images are encoded one by one, larger groups would only make progress jerky.
    batch_size = config.batch_size if device.type == "cuda" else min(config.batch_size, 4)
    encoding = Encoding(tokenizer, loader, batch_size, gpu_decoder)
    run = TokenizeRun(encoding, shards, contents, config.workers)
    if config.fast or precision != "fp32":
        run.exact = lambda: ImageTokenizer.from_checkpoint(config.ckpt, device, "fp32", vqgan=config.vqgan)
    with kept(run.kept):
        run.work()
    records = shards.records()
    seconds = totals(records)["seconds"]
    facts = {
        # Over all processes and runs that worked on the folder: what one of them did in a second.
        "images_per_process_second": round(len(images.paths) / max(seconds.get("total", 0.0), 1e-9), 2),
        "stages": stage_table(seconds),
        **shards.difference(),
    }
    shards.merge(images.base, settings, facts)
    summary = _summary(run, records, facts, time.monotonic() - start)
    # torchrun ends every rank when one fails, so there rank 0 judges for all of them.
    judge = rank_and_world()[0] == 0 or "TORCHELASTIC_RUN_ID" not in os.environ
    if judge and summary["rejected"] > limit:
        raise TooManyRejected(summary, limit)
    return summary


def pick_precision(name: str, device) -> str:
    """The encoder's arithmetic; `auto` is fp32 on a CPU and TF32, as in the published code's convolutions, on a GPU.

    benchmarks/bench_precision: 16-bit convolutions are faster there, and change more codes than TF32 does.
    """
    if name == "auto":
        return "tf32" if device.type == "cuda" else "fp32"
    return name


def pick_decoders(config: TokenizeConfig, device) -> tuple[DaliDecoder | None, DaliDecoder | None]:
    """(decoder in the loading threads, or None for Pillow alone; decoder on the GPU, or None); InputError.

    `auto` takes DALI beside a GPU, where pixels must be packed for the upload and DALI saves a copy of them; without
    one Pillow's own memory is read in place, and it is as fast.
    """
    if config.fast:
        if device.type != "cuda":
            raise InputError("--fast: nvJPEG decodes on a GPU, and the encoder runs on the CPU; use --exact")
        if config.decoder == "pillow":
            raise InputError("--fast decodes with DALI: leave out --decoder pillow")
        return None, DaliDecoder(1, "mixed", device.index)
    if config.decoder == "dali" or (config.decoder == "auto" and device.type == "cuda" and not available("cpu")):
        return DaliDecoder(), None
    return None, None


def stage_table(seconds: dict[str, float]) -> list[dict]:
    """Per stage its seconds and its share of the work of all stages."""
    work = sum(seconds.get(stage, 0.0) for stage in STAGES) or 1.0
    return [
        {
            "stage": stage,
            "seconds": round(seconds.get(stage, 0.0), 3),
            "share": round(seconds.get(stage, 0.0) / work, 4),
        }
        for stage in STAGES
    ]


def _summary(run: "TokenizeRun", records: list[dict], facts: dict, elapsed: float) -> dict:
    sums = totals(records)
    return {
        "output": str(run.shards.folder),
        **{name: sums[name] for name in ("images", "encoded", "rejected")},
        **{f"{note}_images": count for note, count in sums["notes"].items()},
        "shards": len(records),
        "images_here": run.images_here,
        "images_per_second": round(run.images_here / elapsed, 2),
        "wait_seconds": round(sums["seconds"].get("wait", 0.0), 3),
        "seconds": round(elapsed, 3),
        **facts,
    }


class TokenizeRun:
    """One process's share of the work on a folder. workers: loading threads, 0 for one per core.

    exact: makes the fp32 tokenizer to compare with, or None where the run is exact itself.
    """

    def __init__(self, encoding: Encoding, shards: Shards, contents: Contents, workers: int):
        self.encoding, self.shards, self.contents = encoding, shards, contents
        self.loader, self.images = encoding.loader, encoding.loader.images
        # No machine reads faster with more threads than that.
        self.workers = min(workers, 1024) or len(os.sched_getaffinity(0))
        self.exact: Callable[[], ImageTokenizer] | None = None
        self.images_here = 0
        # Counters add fractions as well, but their types know whole numbers only.
        self.seconds: Any = Counter()

    def work(self) -> None:
        """Publish shards until all are done, by whomever."""
        self.contents.refresh()
        done = self.contents.images_done
        with (
            Claims(self.shards.claims_path) as claims,
            Progress("tokenize (images)", self.shards.images, done, self.contents.rejected) as self.progress,
        ):
            while self.shards.left():
                if not self._pass(claims):
                    # The rest is in other processes' hands; should one of them die, its claims become free.
                    time.sleep(_POLL_SECONDS)

    def kept(self) -> str:
        """What an interrupted run keeps: whole shards."""
        done = sum(len(self.shards.rows(shard)) for shard in self.shards.done())
        return f"{done} of {self.shards.images} images are kept in {self.shards.folder}"

    def _pass(self, claims: Claims) -> int:
        """Claim and publish what is left and free; returns the number of shards."""
        tasks = ((shard, row) for shard in self._claim(claims) for row in self.shards.rows(shard))
        ahead = self.workers + 2 * self.encoding.batch_size
        results = load_ahead(tasks, lambda task: self.loader(task[1]), self.workers, ahead)
        count = 0
        for shard, group in itertools.groupby(results, key=lambda result: result[0][0]):
            content = self._encode(self.encoding.ready(group))
            if shard == 0 and self.exact is not None:
                sample = list(itertools.islice(self.shards.rows(0), _SAMPLE))
                self.shards.write_difference(self.encoding.difference(self.exact(), sample))
            self.seconds.update(self.shards.publish(shard, content))
            claims.give_back(shard)
            self.contents.refresh()
            count += 1
        return count

    def _claim(self, claims: Claims) -> Iterator[int]:
        left = self.shards.left()
        if not claims.work:
            # Without locks processes that begin at different places meet least.
            rank, world = rank_and_world()
            first = len(left) * rank // world
            left = left[first:] + left[:first]
        for shard in left:
            if claims.take(shard):
                # It may have been published between the look and the claim.
                if self.shards.is_done(shard):
                    claims.give_back(shard)
                else:
                    self.shards.remove_leftovers(shard)
                    yield shard

    def _encode(self, results: Iterable[tuple]) -> Shard:
        """The codes and the record of one shard's images."""
        start = time.monotonic()
        seconds: Any = Counter(dict.fromkeys(STAGES, 0.0))
        notes: Counter = Counter()
        paths: list[str] = []
        digests: list[bytes] = []
        rejected: list[dict] = []
        copies: list[tuple[int, np.ndarray]] = []
        pixels: list[Any] = []
        encoded = [np.zeros((0, IMAGE_CODES), np.uint16)]
        # Where each content of this shard stands among the encoded ones.
        places: dict[bytes, int] = {}
        under_way: list[Callable[[], np.ndarray]] = []

        def encode() -> None:
            begin = time.monotonic()
            if pixels:
                under_way.append(self.encoding.start(pixels))
            # One batch stays under way while the next is put together; without pixels, it is waited for too.
            while len(under_way) > bool(pixels):
                encoded.append(under_way.pop(0)())
            pixels.clear()
            seconds["encode"] += time.monotonic() - begin

        for (_, row), loaded, waited in results:
            seconds.update({**loaded.seconds, "wait": waited})
            self._show(seconds, len(paths) + len(rejected) + 1, len(rejected) + (loaded.reason is not None))
            if loaded.reason is not None:
                entry = {PATH_COLUMN: self.images.paths[row], "reason": loaded.reason, "row": row}
                rejected.append(entry | {"sha256": loaded.sha256})
                continue
            paths.append(self.images.paths[row])
            digests.append(loaded.digest)
            notes.update(loaded.notes)
            if loaded.digest in self.contents:
                copies.append((len(paths) - 1, self.contents.codes(loaded.digest)))
            elif loaded.digest not in places:
                places[loaded.digest] = len(places)
                pixels.append(loaded.pixels)
                if len(pixels) == self.encoding.batch_size:
                    encode()
        encode()
        encode()
        table = np.concatenate(encoded)
        codes = np.empty((len(paths), IMAGE_CODES), np.uint16)
        for position, digest in enumerate(digests):
            if digest in places:
                codes[position] = table[places[digest]]
        for position, found in copies:
            codes[position] = found
        self.images_here += len(paths) + len(rejected)
        seconds["total"] = time.monotonic() - start
        return Shard(paths, codes, digests, len(places), rejected, dict(notes), dict(seconds))

    def _show(self, seconds: Any, done_in_shard: int, rejected_in_shard: int) -> None:
        def note() -> str:
            return ", ".join(f"{row['stage']} {row['share']:.0%}" for row in stage_table(self.seconds + seconds))

        self.progress.rejected = self.contents.rejected + rejected_in_shard
        self.progress.update(self.contents.images_done + done_in_shard, note)

"""Section `forms` of bench_collate: collators on the host, as a share of memory-copy speed.

A form's bytes are what a packed batch must move at least: 2 read and 24 written per id. `same copy` is a memcpy that
moves as many, out of as large a buffer into as small a one; `share_of_memory` is against a copy of 128 MB. `new arrays`
is `collate` without buffers; what it loses against `in place` is the kernel's page faults. `prefetched` draws packs
from running threads, one for each core; wait_us is what a consumer waits that asks for a pack every 2 ms (median).
"""

import itertools
import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.harness import timed
from benchmarks.stages.collate_rows import (
    EOT,
    as_lists,
    check,
    flattening_collate,
    make_packs,
    prefetching,
    published_collate,
)
from medmax_fast.data.collate import PackBuffers, collate, collate_ref

BYTES_PER_ID = 26
# Packs of one timed call, of a fast form and of one that takes a hundred times as long.
PACKS, FEW = 64, 4
REPEATS = 41


def memory_copy() -> float:
    """Bytes per second, read and written, of a copy that does not fit in the caches."""
    source = np.ones(1 << 27, dtype=np.uint8)
    target = np.ones_like(source)
    return 2 * source.size / timed(lambda: np.copyto(target, source), repeats=5)["p50_s"]


def fast_forms(ids: np.ndarray, offsets: np.ndarray, packs: list[np.ndarray]) -> dict[str, Callable[[], object]]:
    """Name -> a function that collates every pack once."""
    sizes = [int((offsets[pack + 1] - offsets[pack]).sum()) for pack in packs]
    weighted = PackBuffers.allocate(max(sizes), len(packs[0]), weights=True)
    plain = PackBuffers.allocate(max(sizes), len(packs[0]))
    ones = np.ones(len(packs[0]), dtype=np.float32)
    source = ids.view(np.uint8)
    target = np.ones(max(sizes) * BYTES_PER_ID // 2, dtype=np.uint8)
    streams = [prefetching(ids, offsets, packs[start::2], 2 * REPEATS) for start in (0, 1)]

    def each(**options) -> None:
        for pack in packs:
            collate(ids, offsets, pack, EOT, **options)

    def draw(used: list) -> None:
        for _ in range(len(packs) // len(used)):
            for stream in used:
                next(stream)

    def same_copy() -> None:
        for size, start in zip(sizes, itertools.accumulate(sizes, initial=0), strict=False):
            size = size * BYTES_PER_ID // 2
            start = start * 2 % (len(source) - size)
            np.copyto(target[:size], source[start : start + size])

    one = prefetching(ids, offsets, packs, 2 * REPEATS)
    return {
        "in place, 1 core": lambda: each(threads=1, buffers=plain),
        "in place, 2 cores in a pack": lambda: each(threads=2, buffers=plain),
        "in place, 1 core, per-turn": lambda: each(threads=1, buffers=plain, labels="per-turn"),
        "in place, 1 core, weights": lambda: each(threads=1, buffers=weighted, weights=ones),
        "prefetched, 1 core": lambda: draw([one]),
        "prefetched, 2 cores": lambda: draw(streams),
        "new arrays, 1 core": lambda: each(threads=1),
        "same copy, 1 core": same_copy,
    }


def slow_forms(ids: np.ndarray, offsets: np.ndarray, packs: list[np.ndarray]) -> dict[str, Callable[[], object]]:
    lists = [as_lists(ids, offsets, pack) for pack in packs]
    flatten = [flattening_collate(rows) for rows in lists]
    return {
        "numpy": lambda: [collate_ref(ids, offsets, pack, EOT) for pack in packs],
        "transformers": lambda: [collator() for collator in flatten],
        "published": lambda: [published_collate(rows) for rows in lists],
    }


def prefetch_wait(ids: np.ndarray, offsets: np.ndarray, packs: list[np.ndarray]) -> float:
    """Microseconds (median) that a consumer waits which is busy for 2 ms with each pack."""
    waits = []
    with prefetching(ids, offsets, packs, 1) as stream:
        for _ in packs:
            time.sleep(0.002)
            start = time.perf_counter()
            next(stream)
            waits.append(time.perf_counter() - start)
    return float(np.median(waits)) * 1e6


def measure(ids: np.ndarray, offsets: np.ndarray, packs: list[np.ndarray], copied: float) -> list[dict]:
    """One line of the table for every form."""
    rows = []
    for forms, some, repeats in ((fast_forms, packs, REPEATS), (slow_forms, packs[:FEW], 3)):
        total = sum(int((offsets[pack + 1] - offsets[pack]).sum()) for pack in some)
        for name, work in forms(ids, offsets, some).items():
            seconds = timed(work, repeats=repeats)
            speed = total / seconds["p50_s"]
            facts = {"mega_ids_per_s": speed / 1e6, "share_of_memory": speed * BYTES_PER_ID / copied, "wait_us": None}
            rows.append({"form": name, "ids_per_pack": total // len(some), **seconds, **facts})
    speeds = {row["form"]: row["mega_ids_per_s"] for row in rows}
    next(row for row in rows if row["form"] == "prefetched, 1 core")["wait_us"] = prefetch_wait(ids, offsets, packs)
    for row in rows:
        row["share_of_same_copy"] = row["mega_ids_per_s"] / speeds["same copy, 1 core"]
        row["times_published"] = row["mega_ids_per_s"] / speeds["published"]
    return rows


def host_forms(ids: np.ndarray, offsets: np.ndarray, sizes: tuple[int, ...]) -> Iterator[tuple[list[dict], list[dict]]]:
    """Rows of every form for packs of so many rows of data; no evidence, which section `collate` gives."""
    copied = memory_copy()
    for packs in (make_packs(offsets, size, PACKS) for size in sizes):
        check(ids, offsets, packs[0])
        yield measure(ids, offsets, packs, copied), []

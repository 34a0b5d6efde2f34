"""Collator: ids per second on one core and two against three others, as a share of memory-copy speed.

All forms take the same rows of one buffer, and first give the same labels. The others: `published`, the published
training's collate function rebuilt from its description (Python lists, cut, padded to the longest, masked up to eot);
`transformers`, its DataCollatorWithFlattening, with labels that are masked already; `numpy`, our reference.
A form's bytes are what a packed batch must move at least: 2 read and 24 written per id. `same copy` is a memcpy that
moves as many, out of as large a buffer into as small a one; `share_of_memory` is against a copy of 128 MB.
`new arrays` is `collate` without buffers; what it loses against `in place` is the kernel's page faults. `prefetched`
draws packs from running threads, one for each core, and `prefetch_wait_us` is what a consumer waits for a pack that it
asks for every 2 ms.
"""

import itertools
import time
from collections.abc import Callable

import numpy as np

from benchmarks.harness import parse_arguments, report, timed
from medmax_fast.data.collate import IGNORED, LABEL_POLICIES, PackBuffers, collate, collate_ref
from medmax_fast.data.prefetch import prefetch

EOT, PAD = 8710, 1
CUT = 2048
BYTES_PER_ID = 26
# Packs of one timed call, of a fast form and of one that takes a hundred times as long.
PACKS, FEW = 64, 4
REPEATS = 41


def token_buffer(count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint16 ids and int64 offsets of `count` rows: image first, question, eot, answer."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1060, 1400, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(0, EOT, offsets[-1]).astype(np.uint16)
    ids[offsets[:-1] + 1040] = EOT
    return ids, offsets


def published_collate(rows: list[list[int]]) -> dict:
    """Lists of Python integers, cut, padded to the longest; the first row decides whether prompts are masked."""
    import torch

    rows = [row[:CUT] for row in rows]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = torch.where(mask == 1, ids, IGNORED)
    if EOT in rows[0]:
        for row, label in zip(rows, labels, strict=True):
            label[: row.index(EOT) + 1] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def flattening_collate(rows: list[list[int]]) -> Callable[[], dict]:
    """transformers' collator over these rows; what it takes, labels included, is made beforehand."""
    from transformers import DataCollatorWithFlattening

    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    features = [
        {"input_ids": row, "labels": [IGNORED] * (row.index(EOT) + 1) + row[row.index(EOT) + 1 :]} for row in rows
    ]
    return lambda: collator(features)


def as_lists(ids: np.ndarray, offsets: np.ndarray, pack: np.ndarray) -> list[list[int]]:
    return [ids[offsets[row] : offsets[row + 1]].tolist() for row in pack]


def check(ids: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> None:
    """All forms give the same ids and labels, where they mean the same."""
    for labels in LABEL_POLICIES:
        expected = collate_ref(ids, offsets, rows, EOT, labels=labels)
        batch = collate(ids, offsets, rows, EOT, threads=2, labels=labels)
        for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
            assert np.array_equal(getattr(batch, name), getattr(expected, name)), (labels, name)
    expected = collate_ref(ids, offsets, rows, EOT)
    lists = as_lists(ids, offsets, rows)
    padded = published_collate(lists)
    assert np.array_equal(padded["labels"][padded["attention_mask"] == 1].numpy(), expected.labels)
    flat = flattening_collate(lists)()
    for name in ("input_ids", "labels", "position_ids"):
        assert np.array_equal(flat[name][0].numpy(), getattr(expected, name)), name
    assert np.array_equal(flat["cu_seq_lens_q"].numpy(), expected.cu_seqlens)


def memory_copy() -> float:
    """Bytes per second, read and written, of a copy that does not fit in the caches."""
    source = np.ones(1 << 27, dtype=np.uint8)
    target = np.ones_like(source)
    return 2 * source.size / timed(lambda: np.copyto(target, source), repeats=5)["p50_s"]


def prefetching(ids: np.ndarray, offsets: np.ndarray, packs: list[np.ndarray], calls: int):
    """A running prefetcher over `calls` rounds of the packs."""
    bounds = np.concatenate([[0], np.cumsum([len(pack) for pack in packs])])
    largest = max(int((offsets[pack + 1] - offsets[pack]).sum()) for pack in packs)
    order = np.tile(np.arange(len(packs)), calls)
    return prefetch(ids, offsets, np.concatenate(packs), bounds, order, EOT, capacity=largest)


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
            facts = {"mega_ids_per_s": speed / 1e6, "share_of_memory": speed * BYTES_PER_ID / copied}
            rows.append({"ids_per_pack": total // len(some), "form": name, **seconds, **facts})
    speeds = {row["form"]: row["mega_ids_per_s"] for row in rows}
    for row in rows:
        row["share_of_same_copy"] = row["mega_ids_per_s"] / speeds["same copy, 1 core"]
        row["times_published"] = row["mega_ids_per_s"] / speeds["published"]
    return rows


def main() -> None:
    arguments = parse_arguments("collator: ids per second")
    ids, offsets = token_buffer(1000 if arguments.quick else 20_000)
    rng = np.random.default_rng(1)
    copied = memory_copy()
    table, waits = [], {}
    for pack_rows in (4, 13) if arguments.quick else (4, 13, 100):
        packs = [rng.integers(0, len(offsets) - 1, pack_rows) for _ in range(PACKS)]
        check(ids, offsets, packs[0])
        table += measure(ids, offsets, packs, copied)
        waits[sum(int(offsets[row + 1] - offsets[row]) for row in packs[0])] = prefetch_wait(ids, offsets, packs)
    report("collate", table, arguments.output, memory_copy_gb_per_s=copied / 1e9, prefetch_wait_us=waits)


if __name__ == "__main__":
    main()

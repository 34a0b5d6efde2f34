"""Collator: ids per second on the way to the device, and on one core and two as a share of memory-copy speed.

    PYTHONPATH=. python -m benchmarks.bench_collate [--only collate,forms] [--quick] [--output FILE.json]

All forms take the same rows of one buffer, and first give the same ids and labels. The others: `published`, the
published training's collate function rebuilt from its description (Python lists, cut, padded to the longest, masked up
to eot); `transformers`, its DataCollatorWithFlattening, with labels that are masked already; `numpy`, our reference.

- collate: from the rows to the device. `ours` fills a pack and has it on the device. Prefetched is what training does:
  a thread fills page-locked packs ahead, of which a stream of its own copies one; the wait for both is timed. What must
  move at least is the 24 bytes of an id to the device, beside one large copy from page-locked memory in the same run,
  which takes the place of the copy in the roofline; on a CPU the 26 bytes that a pack takes in memory.
- forms: on the host (stages/collate_forms.py).
"""

import functools
import itertools
import sys
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.harness import Roofline, evidence, in_turns
from benchmarks.sections import run_sections, section_parser
from benchmarks.stages.collate_forms import host_forms
from benchmarks.stages.collate_rows import (
    EOT,
    as_lists,
    check,
    make_packs,
    prefetching,
    published_collate,
    token_buffer,
)
from medmax_fast.data.collate import PackBuffers, PackedBatch, collate, collate_ref
from medmax_fast.data.loader import Step
from medmax_fast.runtime import pick_device
from medmax_fast.training.upload import Uploader

PUBLISHED, PREFETCHED = "published", "ours, prefetched: the wait"
# Rows of data in a store, and in a pack: of 5, 16 and 120 thousand ids.
STORED, PACK_ROWS = 20_000, (4, 13, 100)
# Packs that are collated in turn, those of them that are compared and that exist as lists.
PACKS, COMPARED = 64, 3
REPEATS = 41
# Bytes of an id on the way to a device, and of a copy that is much larger than a pack.
UPLOADED, LARGE = 24, 1 << 28
SUMMARY = ("form", "ids_per_pack", "p50_s", "mega_ids_per_s", "times_published")


def pack_shape(offsets: np.ndarray, packs: list[np.ndarray]) -> tuple[str, float]:
    """(what a row calls these packs, ids of one on average)."""
    ids = float(np.mean([(offsets[pack + 1] - offsets[pack]).sum() for pack in packs]))
    return f"{ids:,.0f} ids in {len(packs[0])} rows", ids


def floors() -> list[dict]:
    """What a pack must move to a GPU, in the names of the evidence."""
    _, offsets = token_buffer(STORED)
    shapes = [pack_shape(offsets, make_packs(offsets, rows, PACKS)) for rows in PACK_ROWS]
    return [{"stage": "collate", "shape": shape, "moved_bytes": UPLOADED * ids, "flop": 0} for shape, ids in shapes]


def upload_roofline(roofline: Roofline) -> Roofline:
    """The copy from page-locked memory to the GPU, every byte counted once, in place of the one on the GPU."""
    source = torch.ones(LARGE, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(LARGE, dtype=torch.uint8, device="cuda")
    works = {"copy": lambda: target.copy_(source, non_blocking=True)}
    return Roofline(LARGE / in_turns(works, "cuda", 5)["copy"]["p50_s"], roofline.product)


def differing(found: dict, expected: PackedBatch) -> int:
    """Ids, labels, positions and boundaries on the device that are not those of a pack; padding does not count."""
    real = found["attention_mask"].cpu() == 1 if "attention_mask" in found else None
    count = 0
    for name in {"input_ids", "labels", "position_ids", "cu_seqlens"} & found.keys():
        values, right = found[name].cpu(), getattr(expected, name)
        values = (values.flatten() if real is None else values[real]).numpy()
        count += int((values != right).sum()) if values.shape == right.shape else right.size
    return count


def works_of(ids: np.ndarray, offsets: np.ndarray, packs: list[np.ndarray], device: torch.device) -> dict:
    """Name -> a function that has the next of the packs on the device once the device is waited for."""
    pinned = device.type == "cuda"
    largest = max(int((offsets[pack + 1] - offsets[pack]).sum()) for pack in packs)
    buffers = PackBuffers.allocate(largest, len(packs[0]), pinned=pinned)
    order = itertools.cycle(packs)
    lists = itertools.cycle([as_lists(ids, offsets, pack) for pack in packs[:COMPARED]])
    # Fills packs ahead, as many as are asked for.
    filled, upload = prefetching(ids, offsets, packs, 1 + REPEATS // PACKS, pinned), Uploader(device)

    def ours() -> dict:
        # The buffers are filled again with the next call, when this copy has been waited for.
        return collate(ids, offsets, next(order), EOT, buffers=buffers).to_torch(device, non_blocking=pinned)

    def prefetched() -> dict:
        batch = next(filled)
        return upload(Step(0, [batch], batch.target_tokens, [0]))[0]

    def published() -> dict:
        return {name: tensor.to(device) for name, tensor in published_collate(next(lists)).items()}

    return {PUBLISHED: published, "ours": ours, PREFETCHED: prefetched}


def to_device(
    ids: np.ndarray, offsets: np.ndarray, sizes: tuple[int, ...], device: torch.device, roofline: Roofline, repeats: int
) -> Iterator[tuple[list[dict], list[dict]]]:
    """Packs of every size on their way to the device."""
    gpu = device.type == "cuda"
    roofline = upload_roofline(roofline) if gpu else roofline
    per_id = UPLOADED if gpu else UPLOADED + ids.itemsize
    for packs in (make_packs(offsets, size, PACKS) for size in sizes):
        check(ids, offsets, packs[0])
        shape, mean = pack_shape(offsets, packs)
        works, wrong = works_of(ids, offsets, packs, device), 0
        for pack in packs[:COMPARED]:
            expected = collate_ref(ids, offsets, pack, EOT)
            wrong += sum(differing(work(), expected) for work in works.values())
        assert wrong == 0, f"{shape}: {wrong} values differ from the reference's"
        # Each is waited for, as a training step that begins with it would.
        times = in_turns(works, device.type, repeats, calls=1)
        done = {"beside": (PUBLISHED, times[PUBLISHED]["p50_s"]), "quality": {"ids_differing": wrong}}
        work = {"moved": per_id * mean, "items": (mean, "ids")}
        found = []
        for form, seconds in times.items():
            # Without a device only the wait for a pack is timed, which threads filled while other forms had their turn.
            more = {} if form == PREFETCHED and not gpu else work
            found.append(evidence("collate", shape, form, seconds, roofline, **done, **more))
        yield [printed(row) for row in found], found


def printed(row: dict) -> dict:
    shown = {"form": row["form"], "ids_per_pack": row["shape"], "p50_s": row["p50_s"], "gb_per_s": row["gb_per_s"]}
    speed = row["items_per_s"] and row["items_per_s"] / 1e6
    return shown | {"mega_ids_per_s": speed, "share": row["share"], "times_published": row["times"]}


def main() -> None:
    arguments = section_parser(__doc__, ("collate", "forms")).parse_args()
    quick, device = arguments.quick, pick_device("auto")
    ids, offsets = token_buffer(1000 if quick else STORED)
    sizes = PACK_ROWS[:2] if quick else PACK_ROWS
    roofline = Roofline.measure(device.type, quick)
    sections = {
        "collate": functools.partial(to_device, ids, offsets, sizes, device, roofline, 5 if quick else REPEATS),
        "forms": functools.partial(host_forms, ids, offsets, sizes),
    }
    facts = {"copy_bytes_per_s": roofline.copy, "rows_of_data": len(offsets) - 1}
    chosen = {name: sections[name] for name in arguments.only}
    sys.exit(run_sections("collate", chosen, SUMMARY, arguments.output, facts))


if __name__ == "__main__":
    main()

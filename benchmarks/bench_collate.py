"""Collator: ids per second against NumPy and against padding Python lists, as a share of memory-copy speed.

All forms take the same rows of one buffer. A form's bytes are what a packed batch must move at least: 2 read and 24
written per id; the copy it is held against moves 128 MB, in and out, between buffers that are in memory already.
`into new arrays` is `collate` as the loader calls it; what it loses against `in place` is the kernel's page faults.
"""

import numpy as np

from benchmarks.harness import parse_arguments, report, timed
from medmax_fast import _csrc
from medmax_fast.data.collate import IGNORED, collate, collate_ref

EOT, PAD = 8710, 1
BYTES_PER_ID = 26
PACKS = 8


def token_buffer(count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint16 ids and int64 offsets of `count` rows: image first, question, eot, answer."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1060, 1400, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(0, EOT, offsets[-1]).astype(np.uint16)
    ids[offsets[:-1] + 1040] = EOT
    return ids, offsets


def padding_collate(rows: list[list[int]]) -> tuple:
    """The common form: lists of Python integers, padded to the longest, prompt masked up to eot."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    labels = torch.where(mask == 1, ids, IGNORED)
    for row, label in zip(rows, labels, strict=True):
        label[: row.index(EOT) + 1] = IGNORED
    return ids, mask, labels


def check(ids: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> None:
    """All forms give the same ids and labels."""
    expected = collate_ref(ids, offsets, rows, EOT)
    batch = collate(ids, offsets, rows, EOT, threads=2)
    for name in ("input_ids", "labels", "position_ids", "cu_seqlens"):
        assert np.array_equal(getattr(batch, name), getattr(expected, name)), name
    lists = [ids[offsets[row] : offsets[row + 1]].tolist() for row in rows]
    _, mask, labels = padding_collate(lists)
    assert np.array_equal(labels[mask == 1].numpy(), expected.labels)


def copy_speed() -> float:
    """Bytes per second, read and written, of a copy that does not fit in the caches."""
    source = np.ones(1 << 27, dtype=np.uint8)
    target = np.ones_like(source)
    return 2 * source.size / timed(lambda: np.copyto(target, source), repeats=5)["p50_s"]


def forms(ids: np.ndarray, offsets: np.ndarray, packs: list[np.ndarray]) -> dict:
    """Name -> a function that collates every pack once."""
    boundaries = [collate(ids, offsets, pack, EOT).cu_seqlens for pack in packs]
    buffers = np.zeros((3, max(ends[-1] for ends in boundaries)), dtype=np.int64)
    lists = [[ids[offsets[row] : offsets[row + 1]].tolist() for row in pack] for pack in packs]

    def in_place(threads: int) -> None:
        for pack, ends in zip(packs, boundaries, strict=True):
            _csrc.fill_pack(ids, offsets, pack, ends, EOT, threads, *buffers[:, : ends[-1]])

    def each(function, inputs) -> None:
        for value in inputs:
            function(value)

    return {
        "in place, 1 thread": lambda: in_place(1),
        "in place, 2 threads": lambda: in_place(2),
        "into new arrays, 1 thread": lambda: each(lambda pack: collate(ids, offsets, pack, EOT, threads=1), packs),
        "into new arrays, default": lambda: each(lambda pack: collate(ids, offsets, pack, EOT), packs),
        "numpy": lambda: each(lambda pack: collate_ref(ids, offsets, pack, EOT), packs),
        "padded Python lists": lambda: each(padding_collate, lists),
    }


def main() -> None:
    arguments = parse_arguments("collator: ids per second")
    ids, offsets = token_buffer(200 if arguments.quick else 20_000)
    rng = np.random.default_rng(1)
    copied = copy_speed()
    table = []
    for pack_rows in (3, 13, 100):
        packs = [rng.integers(0, len(offsets) - 1, pack_rows) for _ in range(PACKS)]
        check(ids, offsets, packs[0])
        total = sum(int((offsets[pack + 1] - offsets[pack]).sum()) for pack in packs)
        for name, work in forms(ids, offsets, packs).items():
            seconds = timed(work, repeats=3 if "lists" in name else 15)
            speed = total / seconds["p50_s"]
            table.append(
                {
                    "ids_per_pack": total // PACKS,
                    "form": name,
                    **seconds,
                    "mega_ids_per_s": speed / 1e6,
                    "share_of_copy": speed * BYTES_PER_ID / copied,
                }
            )
    report("collate", table, arguments.output, packs_per_call=PACKS, copy_gb_per_s=copied / 1e9)


if __name__ == "__main__":
    main()

"""Which rows share a pack, and in which order packs are trained: the plan of one epoch.

Best-fit decreasing in C++ (csrc/planner): rows are shuffled, sorted by length (the shuffle decides between equal
lengths), each put into the pack with the least room that still holds it, and the packs are shuffled. The plan depends
on (seed, epoch) alone, so any number of ranks, and a resumed run, cut the same list. Cost: O(n log capacity) time and
about 20 bytes a row.

What lengths leak into the order of training: nothing into the order of the packs, every one of which is equally likely,
and so every row's place is uniform. Inside a pack, where order has no effect, rows go from the longest to the shortest;
and rows that fill each other up meet in a pack more often than others, as in any packing that wastes little.

`plan_epoch_ref` is the specification: the same plan from the simplest data structures, for the tests.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

# splitmix64; csrc/planner.cpp holds the same constants.
_STEP = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Plan:
    """Rows of each pack: pack p is `rows[offsets[p]:offsets[p + 1]]`.

    rows: int64 [R] row numbers, each at most once. offsets: int64 [P + 1].
    """

    rows: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pack(self, p: int) -> np.ndarray:
        """Row numbers of pack p, int64."""
        return self.rows[self.offsets[p] : self.offsets[p + 1]]


def plan_epoch(lengths: np.ndarray, capacity: int, seed: int, epoch: int) -> Plan:
    """Pack the rows of `lengths` (integers [N], in ids) into packs of at most `capacity` ids.

    Rows with no ids or more than `capacity` are not in the plan; reporting them is up to the caller. `seed` and
    `epoch` may be any integers (taken modulo 2^64). ValueError: a negative length, a capacity outside 1..2^24.
    """
    from medmax_fast import _csrc

    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    return Plan(*_csrc.plan_packs(lengths, capacity, seed % 2**64, epoch % 2**64))


def plan_epoch_ref(lengths: np.ndarray, capacity: int, seed: int, epoch: int) -> Plan:
    """`plan_epoch` in plain Python: O(n) lists of packs by room and a sorted list of rooms."""
    random = _Random(seed, epoch)
    fitting = [row for row, length in enumerate(lengths) if 0 < length <= capacity]
    random.shuffle(fitting)
    fitting.sort(key=lambda row: -int(lengths[row]))
    packs: list[list[int]] = []
    rooms: list[int] = []
    # Packs of equal room form a stack: the one that came to this room last is filled first.
    packs_by_room: dict[int, list[int]] = {}
    for row in fitting:
        at = bisect_left(rooms, lengths[row])
        if at == len(rooms):
            room, pack = capacity, len(packs)
            packs.append([])
        else:
            room = rooms[at]
            pack = packs_by_room[room].pop()
            if not packs_by_room[room]:
                del rooms[at], packs_by_room[room]
        packs[pack].append(row)
        room -= int(lengths[row])
        if room not in packs_by_room:
            insort(rooms, room)
            packs_by_room[room] = []
        packs_by_room[room].append(pack)
    random.shuffle(packs)
    offsets = np.cumsum([0] + [len(pack) for pack in packs], dtype=np.int64)
    return Plan(np.array([row for pack in packs for row in pack], dtype=np.int64), offsets)


class _Random:
    """splitmix64 of (seed, epoch), with the same draws as the C++."""

    def __init__(self, seed: int, epoch: int):
        with np.errstate(over="ignore"):
            first = np.uint64(seed % 2**64) + _STEP
            second = np.uint64(epoch % 2**64) + np.uint64(2) * _STEP
        self._state = _mix(first) ^ _mix(second)

    def shuffle(self, values: list) -> None:
        """Fisher-Yates from the end, in place."""
        bounds = np.arange(len(values), 1, -1, dtype=np.uint64)
        with np.errstate(over="ignore"):
            states = self._state + _STEP * np.arange(1, len(bounds) + 1, dtype=np.uint64)
            self._state += _STEP * np.uint64(len(bounds))
        draws = (_mix(states) >> np.uint64(32)) * bounds >> np.uint64(32)
        for i, j in zip(range(len(values) - 1, 0, -1), draws.tolist(), strict=True):
            values[i], values[j] = values[j], values[i]


def _mix(x):
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

"""Which rank takes which pack of an optimizer step: equally many each, with about the same to do.

A step is the same packs on any number of ranks; only who works on them is decided here (csrc/balance, which has the
steps of the algorithm). What is evened out is the pair (ids, squared row lengths) that linear layers and attention
cost, within each step and, by carrying a rank's lead over to the next, over the epoch. The whole epoch is one call of
a fraction of a second, so a resumed run gets the same shares without replaying anything in Python.

With as many packs a step as ranks, a step's own imbalance is given by its packs; more packs a step even it out.

`share_packs_ref` is the specification, with Python's integers.
"""

import numpy as np

from medmax_fast.data.packing import Plan

# csrc/balance.hpp holds the same number.
_ROUNDS = 8


def share_packs(plan: Plan, lengths: np.ndarray, packs_per_step: int, world: int) -> np.ndarray:
    """Places within each step of every rank's packs, int32 [steps, world, packs_per_step // world].

    lengths: int64 [N], ids of every row as they were planned. Step s takes packs s * packs_per_step + place; a place
    beyond the last pack of the plan is none. Each step's places are 0..packs_per_step - 1, each once; a single rank
    keeps their order. ValueError: `packs_per_step` is not a multiple of `world`. IndexError: a plan of other lengths.
    """
    from medmax_fast import _csrc

    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    places = _csrc.share_packs(lengths, plan.rows, plan.offsets, packs_per_step, world)
    return places.reshape(-1, world, packs_per_step // world)


def pack_costs(plan: Plan, lengths: np.ndarray) -> np.ndarray:
    """Ids and sum of squared row lengths of every pack, int64 [P, 2]."""
    used = np.asarray(lengths, dtype=np.int64)[plan.rows]
    # Packs are never empty, which reduceat could not do.
    return np.stack([np.add.reduceat(values, plan.offsets[:-1]) for values in (used, used * used)], axis=1)


def share_packs_ref(plan: Plan, lengths: np.ndarray, packs_per_step: int, world: int) -> np.ndarray:
    """`share_packs` in plain Python."""
    micros = packs_per_step // world
    if not len(plan) or world == 1:
        steps = -(-len(plan) // packs_per_step)
        return np.tile(np.arange(packs_per_step, dtype=np.int32).reshape(world, micros), (steps, 1, 1))
    costs = pack_costs(plan, lengths).tolist()
    totals = [sum(cost[part] for cost in costs) for part in (0, 1)]
    costs = [tuple(cost[part] * 65536 * len(plan) // totals[part] for part in (0, 1)) for cost in costs]
    loads, steps = [(0, 0)] * world, list[np.ndarray]()
    for first in range(0, len(costs), packs_per_step):
        step = costs[first : first + packs_per_step]
        step += [(0, 0)] * (packs_per_step - len(step))
        order = sorted(range(packs_per_step), key=lambda place: -sum(step[place]))
        slots = [[0] * world for _ in range(micros)]
        for micro, slot in enumerate(slots):
            ranks = sorted(range(world), key=lambda rank: sum(loads[rank]))
            for rank, place in zip(ranks, order[micro * world :], strict=False):
                slot[rank] = place
                loads[rank] = _add(loads[rank], step[place])
        for _ in range(_ROUNDS):
            if not _trade(slots, step, loads):
                break
        steps.append(np.array(slots, dtype=np.int32).T)
    return np.stack(steps)


def _trade(slots: list[list[int]], costs: list[tuple], loads: list[tuple]) -> bool:
    """One round of trades of packs of one micro-step that lower the sum of the squared loads; whether there was one."""
    traded = False
    for slot in slots:
        for a in range(len(loads)):
            for b in range(a + 1, len(loads)):
                change = _add(costs[slot[b]], costs[slot[a]], -1)
                after = _add(_add(loads[a], loads[b], -1), change)
                if after[0] * change[0] + after[1] * change[1] < 0:
                    slot[a], slot[b] = slot[b], slot[a]
                    loads[a], loads[b] = _add(loads[a], change), _add(loads[b], change, -1)
                    traded = True
    return traded


def _add(one: tuple, other: tuple, sign: int = 1) -> tuple:
    return one[0] + sign * other[0], one[1] + sign * other[1]

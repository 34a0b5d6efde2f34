"""Packed batches of a token store in training order, the same whatever the number of ranks.

An optimizer step consumes `packs_per_step` consecutive packs of the epoch's plan. Pack j of a step goes to micro-step
j // world on rank j % world, so a step holds the same rows on 1, 2 or 8 ranks, and a position in the data is just
(epoch, step): resuming needs nothing else, also with another number of ranks. The last step of an epoch may be short;
its missing packs are None and the rank runs an empty micro-batch, so that every row is seen exactly once an epoch.

No rank reads another rank's packs, except up to each row's first eot to count the step's supervised ids.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from medmax_fast.data.collate import PackedBatch, collate, target_counts
from medmax_fast.data.packing import Plan, plan_epoch
from medmax_fast.runtime import InputError

# The planner keeps one list head per possible room.
MAX_PACK_LENGTH = 2**24


@dataclass(frozen=True)
class Step:
    """One optimizer step of this rank.

    index: step number within the epoch. batches: one per micro-step, None where the epoch has run out of packs.
    target_tokens: supervised ids of the step over the packs of ALL ranks, what the loss is divided by.
    """

    index: int
    batches: list[PackedBatch | None]
    target_tokens: int


class PackedLoader:
    """Iterate over the packs of a token store.

    store: a TokenStore (`.ids`, `.offsets`, `.lengths`, `.layout`). pack_length: ids per pack. packs_per_step: packs
    of one optimizer step over all ranks. max_length: rows with more ids are left out (0: as many as a pack holds);
    `left_out` holds their row numbers, int64, rows without ids among them. `world` ranks share each step.

    InputError: settings that do not fit together, or no row that fits.
    """

    def __init__(
        self,
        store,
        pack_length: int,
        packs_per_step: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        max_length: int = 0,
    ):
        assert 0 <= rank < world, (rank, world)
        if not 1 <= pack_length <= MAX_PACK_LENGTH:
            raise InputError(f"--pack-length {pack_length}: expected 1..{MAX_PACK_LENGTH}")
        if packs_per_step < 1 or packs_per_step % world:
            raise InputError(f"--packs-per-step {packs_per_step}: expected a multiple of the {world} ranks")
        if max_length < 0:
            raise InputError(f"--max-length {max_length}: expected 0 (no limit but the pack) or more")
        self.store = store
        self.pack_length = pack_length
        self.packs_per_step = packs_per_step
        self.seed = seed
        self.rank = rank
        self.world = world
        self.limit = min(max_length or pack_length, pack_length)
        lengths = np.asarray(store.lengths, dtype=np.int64)
        fits = (lengths > 0) & (lengths <= self.limit)
        self.left_out = np.flatnonzero(~fits)
        if not fits.any():
            found = f"{len(lengths)} rows, the shortest of {lengths.min()} ids" if len(lengths) else "no rows"
            raise InputError(f"token store: {found}; expected at least one row of 1..{self.limit} ids")
        # A length of 0 keeps a row out of the plan.
        self._lengths = np.where(fits, lengths, 0)
        self._plan: tuple[int, Plan] | None = None

    def plan(self, epoch: int) -> Plan:
        """The packs of an epoch; the last one asked for is kept."""
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, plan_epoch(self._lengths, self.pack_length, self.seed, epoch))
        return self._plan[1]

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch (epochs differ by a pack or so)."""
        return -(-len(self.plan(epoch)) // self.packs_per_step)

    def epoch_steps(self, epoch: int, start: int = 0) -> Iterator[Step]:
        """This rank's steps of an epoch from step `start` on, as an uninterrupted run would have them."""
        plan = self.plan(epoch)
        for index in range(start, self.steps_per_epoch(epoch)):
            yield self._step(plan, index)

    def _step(self, plan: Plan, index: int) -> Step:
        ids, offsets, eot = self.store.ids, self.store.offsets, self.store.layout.eot
        first = index * self.packs_per_step
        last = min(first + self.packs_per_step, len(plan))
        mine = range(first + self.rank, first + self.packs_per_step, self.world)
        batches = [collate(ids, offsets, plan.pack(p), eot) if p < last else None for p in mine]
        if self.world == 1:
            targets = sum(batch.target_tokens for batch in batches if batch is not None)
        else:
            rows = plan.rows[plan.offsets[first] : plan.offsets[last]]
            targets = int(target_counts(ids, offsets, eot, rows=rows).sum())
        return Step(index, batches, targets)

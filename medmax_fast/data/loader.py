"""Packed batches of a token store in training order, the same whatever the number of ranks.

An optimizer step consumes `packs_per_step` consecutive packs of the epoch's plan, so it holds the same rows on 1, 2 or
8 ranks, and a position in the data is just (epoch, step): resuming needs nothing else, also with another number of
ranks. Which rank takes which of them evens out ids and squared row lengths within the step and over the epoch
(data.balance). The last step of an epoch may be short; its missing packs are None and the rank runs an empty
micro-batch, so that every row is seen exactly once an epoch.

No rank reads another rank's packs, except up to each row's first eot to count the step's supervised ids. With `ahead`
a C++ thread fills packs while the ones before are in use (data.prefetch).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from medmax_fast.data.balance import share_packs
from medmax_fast.data.collate import PackedBatch, collate, target_counts
from medmax_fast.data.long_rows import cut_rows, planned_lengths
from medmax_fast.data.packing import Plan, plan_epoch
from medmax_fast.data.prefetch import prefetch
from medmax_fast.data.store import TokenStore
from medmax_fast.runtime import InputError

# The planner keeps one list head per possible room.
MAX_PACK_LENGTH = 2**24


@dataclass(frozen=True)
class Step:
    """One optimizer step of this rank.

    index: step number within the epoch. batches: one per micro-step, None where the epoch has run out of packs.
    target_tokens: supervised ids of the step over the packs of ALL ranks, what the loss is divided by. places: place of
    each batch among the packs of the step, 0..packs_per_step - 1, the same pack on any number of ranks.
    """

    index: int
    batches: list[PackedBatch | None]
    target_tokens: int
    places: list[int]


class PackedLoader:
    """Iterate over the packs of a token store.

    store: a TokenStore (`.ids`, `.offsets`, `.lengths`, `.layout`). pack_length: ids per pack. packs_per_step: packs
    of one optimizer step over all ranks. max_length: most ids of a row (0: as many as a pack holds); `too_long` says
    what happens to longer ones: `skip` leaves them out, `cut` cuts them (data.long_rows). seed: of the order of rows,
    another one each epoch. rank: this process, of `world` that share each step. labels: one of
    collate.LABEL_POLICIES. ahead: packs filled ahead by a thread; the arrays of a step are then overwritten once the
    next step has been asked for (0: no thread, and every step has arrays of its own). pinned: the thread fills
    page-locked memory, from which copies to a GPU do not block.

    `lengths`: int64 [N] ids of each row as trained, 0 if left out; `left_out`, `cut`: int64 row numbers.

    InputError: settings that do not fit together, or no row that fits.
    """

    def __init__(
        self,
        store: TokenStore,
        pack_length: int,
        packs_per_step: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        max_length: int = 0,
        too_long: str = "skip",
        labels: str = "first-eot",
        ahead: int = 0,
        pinned: bool = False,
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
        self.too_long = too_long
        self.labels = labels
        self.ahead = ahead
        self.pinned = pinned
        # A length of 0 keeps a row out of the plan.
        self.lengths = planned_lengths(store, self.limit, too_long)
        self.left_out = np.flatnonzero(self.lengths == 0)
        self.cut = np.flatnonzero((self.lengths > 0) & (self.lengths < store.lengths))
        if len(self.left_out) == len(self.lengths):
            count = len(self.lengths)
            found = f"{count} rows, the shortest of {store.lengths.min()} ids" if count else "no rows"
            wanted = " or one that keeps part of its response when cut to that" if too_long == "cut" else ""
            raise InputError(f"token store: {found}; expected at least one row of 1..{self.limit} ids{wanted}")
        self._offsets, self._numbers = cut_rows(store.offsets, self.lengths)
        self._epoch: tuple[int, Plan, np.ndarray] | None = None
        self._packs: dict[int, int] = {}

    def plan(self, epoch: int) -> Plan:
        """The packs of an epoch; the last one asked for is kept."""
        return self._planned(epoch)[0]

    def _planned(self, epoch: int) -> tuple[Plan, np.ndarray]:
        """The packs of an epoch, and the places of every rank's packs (share_packs)."""
        if self._epoch is None or self._epoch[0] != epoch:
            plan = plan_epoch(self.lengths, self.pack_length, self.seed, epoch)
            self._epoch = (epoch, plan, share_packs(plan, self.lengths, self.packs_per_step, self.world))
            self._packs[epoch] = len(plan)
        return self._epoch[1:]

    def steps_per_epoch(self, epoch: int) -> int:
        """Optimizer steps of an epoch (epochs differ by a pack or so)."""
        if epoch not in self._packs:
            self._planned(epoch)
        return -(-self._packs[epoch] // self.packs_per_step)

    def epoch_steps(self, epoch: int, start: int = 0) -> Iterator[Step]:
        """This rank's steps of an epoch from step `start` on, as an uninterrupted run would have them."""
        plan, places = self._planned(epoch)
        steps = self.steps_per_epoch(epoch)
        mine = places[start:, self.rank]
        packs = mine + np.arange(min(start, steps), steps)[:, None] * self.packs_per_step
        filled = self._batches(plan, packs[packs < len(plan)])
        for index, (chosen, at) in enumerate(zip(packs, mine, strict=True), start):
            batches = [next(filled) if pack < len(plan) else None for pack in chosen]
            yield Step(index, batches, self._targets(plan, index, batches), at.tolist())

    def _targets(self, plan: Plan, index: int, batches: list[PackedBatch | None]) -> int:
        """Supervised ids of a step over all ranks, of which `batches` are this one's."""
        if self.world == 1:
            return sum(batch.target_tokens for batch in batches if batch is not None)
        first = index * self.packs_per_step
        last = min(first + self.packs_per_step, len(plan))
        return int(self.target_counts(plan.rows[plan.offsets[first] : plan.offsets[last]]).sum())

    def target_counts(self, rows: np.ndarray) -> np.ndarray:
        """Supervised ids, int64, of each of `rows` (int64 row numbers), as they are trained."""
        ids, eot = self.store.ids, self.store.layout.eot
        return target_counts(ids, self._offsets, eot, rows=self._stored(rows), labels=self.labels)

    def _batches(self, plan: Plan, order: np.ndarray) -> Iterator[PackedBatch]:
        """The packs `order` of a plan; by a thread that ends with this generator, or one by one."""
        source = (self.store.ids, self._offsets)
        eot, rows = self.store.layout.eot, self._stored(plan.rows)
        if not self.ahead:
            for pack in order:
                chosen = rows[plan.offsets[pack] : plan.offsets[pack + 1]]
                yield replace(collate(*source, chosen, eot, labels=self.labels), rows=plan.pack(pack))
            return
        keep = self.packs_per_step // self.world
        options: dict[str, Any] = {"labels": self.labels, "depth": self.ahead, "keep": keep, "pinned": self.pinned}
        with prefetch(*source, rows, plan.offsets, order, eot, capacity=self.pack_length, **options) as stream:
            for pack, batch in zip(order, stream, strict=True):
                yield replace(batch, rows=plan.pack(pack))

    def _stored(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of `rows` in the offsets that know of cuts."""
        return rows if self._numbers is None else self._numbers[rows]

    def state(self, epoch: int, step: int) -> dict:
        """The position before step `step` of an epoch, for JSON: `restore` finds the same row on any number of ranks.

        epoch, step; rows: rows of the epoch already taken; and what the order depends on (`lengths` is a sha256 of
        the rows' lengths, not of their ids).
        """
        plan = self.plan(epoch)
        if not 0 <= step <= self.steps_per_epoch(epoch):
            raise InputError(f"step {step} of epoch {epoch}: expected 0..{self.steps_per_epoch(epoch)}")
        rows = int(plan.offsets[min(step * self.packs_per_step, len(plan))])
        return {"epoch": epoch, "step": step, "rows": rows, **self._order()}

    def restore(self, state: dict) -> tuple[int, int]:
        """(epoch, step) of a `state`, for `epoch_steps`; InputError if this loader's order is another one."""
        numbers = [state.get(name) for name in ("epoch", "step", "rows")]
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise InputError(f"loader state: epoch, step, rows = {numbers}, expected what PackedLoader.state returned")
        for name, value in self._order().items():
            if state.get(name) != value:
                raise InputError(f"loader state: made with {name} = {state.get(name)!r}, now {value!r}")
        found = self.state(state["epoch"], state["step"])["rows"]
        if found != state["rows"]:
            raise InputError(
                f"loader state: {state['rows']} rows before step {state['step']} of epoch {state['epoch']}, now {found}"
            )
        return state["epoch"], state["step"]

    def _order(self) -> dict:
        """Everything that the order of rows depends on; the number of ranks is not part of it."""
        names = ("pack_length", "packs_per_step", "seed", "limit", "too_long")
        digest = hashlib.sha256(self.lengths.astype("<i8", copy=False).data).hexdigest()
        return {**{name: getattr(self, name) for name in names}, "lengths": digest}

"""Pages of the cache as bookkeeping: every position of every sequence is where its ids were computed, always."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from medmax_fast.generate.pages import PAGE, PagePool, pages_of


def test_a_common_beginning_is_shared_page_by_page():
    pool = PagePool(100)
    image = list(range(1000, 1000 + 3 * PAGE))
    first = pool.open([*image, 1, 2, 3, 4, 5], 4 * PAGE)
    assert first.cached == 0 and first.copy is None and not first.short
    second = pool.open([*image, 6, 7, 8, 9, 10, 11], 4 * PAGE)
    assert second.pages[:3] == first.pages[:3] and second.pages[3] != first.pages[3]
    assert second.cached == 3 * PAGE and not second.short
    # The last id is always left to compute: its state is what picks the next one.
    third = pool.open(image, 3 * PAGE)
    assert third.cached < len(image)
    assert pool.free == 99 - 4 - 1 - 1


def test_a_page_left_in_the_middle_is_copied_once_it_is_computed():
    pool = PagePool(100)
    ids = list(range(PAGE + 10))
    first = pool.open(ids, PAGE + 10)
    other = [*range(20), 999, 998, 997, 996, 995]
    assert pool.open(other, 100).copy is None, "the pass that fills it has not been launched"
    pool.settle()
    lease = pool.open(other, 100)
    assert lease.copy == (first.pages[0], lease.pages[0]) and lease.cached == 20
    assert pool.open(ids[:21], 100).short
    # A few positions in common are not worth a copy, unless hardly any are left to compute.
    assert pool.open([*range(5), *range(700, 720)], 100).copy is None
    assert pool.open([0, 777], 100).cached == 1


def test_forgotten_passes_leave_nothing_behind():
    pool = PagePool(10)
    ids = list(range(2 * PAGE))
    lease = pool.open(ids, 2 * PAGE)
    pool.drop_unsettled()
    pool.close(lease, [])
    assert pool.open(ids, 2 * PAGE).cached == 0 and pool.free == 9 - 2


def test_the_page_unused_for_longest_goes_first():
    pool = PagePool(5)
    old, new = list(range(2 * PAGE)), list(range(5000, 5000 + PAGE))
    for ids in (old, new):
        lease = pool.open(ids, len(ids))
        pool.settle()
        pool.close(lease, ids)
    assert pool.free == 4
    pool.open(list(range(9000, 9000 + 2 * PAGE)), 2 * PAGE)
    # One blank page and the end of the older sequence went; its beginning and the newer one are known.
    assert pool.open([*new, 1, 2], PAGE + 2).cached == PAGE


@dataclass(eq=False)
class Sequence:
    ids: list[int]
    lease: object
    length: int
    computed: int = 0
    pending: bool = field(default=False)


class Machine(RuleBasedStateMachine):
    """Sequences over few ids come, grow and go; `content` is what a device would hold."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(12)
        self.content: dict[int, list] = {number: [None] * PAGE for number in range(12)}
        self.running: list[Sequence] = []
        self.pending: list[Sequence] = []

    def write(self, sequence: Sequence, start: int, end: int) -> None:
        for position in range(start, end):
            page = sequence.lease.pages[position // PAGE]
            # What a key holds depends on all ids up to its own.
            self.content[page][position % PAGE] = hash(tuple(sequence.ids[: position + 1]))

    @rule(data=st.data(), runs=st.lists(st.tuples(st.integers(0, 1), st.integers(1, 70)), min_size=1, max_size=3))
    def open(self, data, runs):
        ids = [value for value, count in runs for _ in range(count)]
        length = len(ids) + data.draw(st.integers(0, 80))
        needs, free = self.pool.needs(ids, length), self.pool.free
        if free < needs:
            return
        lease = self.pool.open(ids, length)
        assert free - self.pool.free == needs
        assert len(lease.pages) == pages_of(length) and 0 not in lease.pages
        if lease.copy:
            source, target = lease.copy
            self.content[target] = list(self.content[source])
        sequence = Sequence(ids, lease, length, lease.cached)
        self.running.append(sequence)
        self.pending.append(sequence)

    @rule()
    def launch(self):
        """A turn: passes in the order of opening, then decode steps of short ones, then all is settled."""
        for short in (False, True):
            for sequence in self.pending:
                if sequence.lease.short is short:
                    self.write(sequence, sequence.computed, len(sequence.ids))
                    sequence.computed = len(sequence.ids)
        self.pending = []
        self.pool.settle()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), new=st.integers(0, 1), count=st.integers(1, 80))
    def grow(self, data, new, count):
        sequence = data.draw(st.sampled_from(self.running))
        if sequence in self.pending:
            return
        for _ in range(min(count, sequence.length - len(sequence.ids))):
            sequence.ids.append(new)
            self.write(sequence, sequence.computed, len(sequence.ids))
            sequence.computed = len(sequence.ids)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def close(self, data):
        sequence = data.draw(st.sampled_from(self.running))
        if sequence in self.pending:
            return
        self.running.remove(sequence)
        self.pool.close(sequence.lease, sequence.ids[: sequence.computed])

    @rule()
    def abandon(self):
        """A call ends before its passes are launched."""
        self.pool.drop_unsettled()
        for sequence in self.pending:
            self.running.remove(sequence)
            self.pool.close(sequence.lease, sequence.ids[: sequence.computed])
        self.pending = []

    @invariant()
    def every_computed_position_is_right(self):
        for sequence in self.running:
            # What another pass of the same turn computes is not there before it is launched.
            if sequence in self.pending:
                continue
            for position in range(sequence.computed):
                page = sequence.lease.pages[position // PAGE]
                expected = hash(tuple(sequence.ids[: position + 1]))
                assert self.content[page][position % PAGE] == expected, (sequence.ids, position)

    @invariant()
    def no_page_is_lost(self):
        held = {page for sequence in self.running for page in sequence.lease.pages}
        assert len(held) + self.pool.free == self.pool.size


Machine.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
TestPages = Machine.TestCase


@given(st.integers(0, 10_000))
def test_pages_of(length):
    assert (pages_of(length) - 1) * PAGE < length <= pages_of(length) * PAGE or length == 0


def test_there_must_be_room():
    pool = PagePool(3)
    with pytest.raises(AssertionError):
        pool.open([1, 2], 3 * PAGE)

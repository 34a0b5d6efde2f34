"""Which page of the key/value cache holds which ids: allocation, sharing of common beginnings, eviction.

Keys and values of a position depend on the ids up to it and on nothing else, so sequences that begin alike share the
pages of their common beginning: several questions about one image, the streams of guidance, a conversation's next
turn. A full page is known by the page before it and its own ids, compared id by id. Where a sequence leaves a known
page in the middle, that page is copied and continued. Pages that no sequence holds keep what they know until their
place is needed, least recently used first. Everything here is bookkeeping on the host; the cache does the copying.
"""

from collections import OrderedDict
from dataclasses import dataclass

# Positions of a page.
PAGE = 64
# A sequence with so few ids to compute takes part in decode steps with them instead of a prefill.
SHORT = 4
# A page is copied for so many positions in common, or where that leaves a short sequence.
LEAST_COPY = 16


@dataclass
class _Page:
    number: int
    holders: int = 0
    # Once its content is known: the serial of the page before it (0: none), its ids, and a serial of its own.
    parent: int = 0
    ids: tuple[int, ...] = ()
    serial: int = 0
    # Whether the forward pass that fills it has been launched before this turn; until then it must not be copied.
    settled: bool = False


@dataclass
class Lease:
    """The pages of one sequence, in order; the first `cached` positions are there already.

    copy: (page to copy, page to copy it to), to be done before anything is written. short: few ids are left.
    settled: the passes that compute what it shares, and its own, are launched.
    """

    pages: list[int]
    cached: int
    copy: tuple[int, int] | None = None
    short: bool = False
    settled: bool = False


class PagePool:
    """Pages 0..count-1, page 0 left to whoever wants to write what nobody reads."""

    def __init__(self, count: int):
        self._pages = [_Page(number) for number in range(count)]
        self._blank = list(range(count - 1, 0, -1))
        # Known pages without a holder, least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._known: dict[tuple[int, tuple[int, ...]], _Page] = {}
        self._children: dict[int, set[int]] = {}
        self._unsettled: list[_Page] = []
        self._announced: list[Lease] = []
        self._serial = 0

    @property
    def size(self) -> int:
        """Pages that sequences can have together."""
        return len(self._pages) - 1

    @property
    def free(self) -> int:
        """Pages that a new sequence could get."""
        return len(self._blank) + len(self._idle)

    def needs(self, ids: list[int], length: int) -> int:
        """Free pages that `open` would take: all but those that it shares with a sequence that holds them."""
        return pages_of(length) - sum(page.holders > 0 for page in self._match(ids))

    def open(self, ids: list[int], length: int) -> Lease:
        """Pages for a sequence of `length` positions that begins with `ids`; at least the last id is left to compute.

        Unless the lease is short, the ids must be computed by a forward pass that is launched before, or together
        with, that of any sequence opened later: such a one shares their pages at once. There must be
        `needs` free ones.
        """
        assert self.free >= self.needs(ids, length) and length >= len(ids) > 0
        whole = self._match(ids)
        for page in whole:
            self._hold(page)
        parent, start = (whole[-1].serial if whole else 0), len(whole) * PAGE
        missing = pages_of(length) - len(whole)
        source, common = self._longest_child(parent, ids[start:-1])
        if common < LEAST_COPY and len(ids) - start - common > SHORT:
            source, common = None, 0
        if source is not None:
            # Held for a moment, so that it is not one of the pages taken now.
            self._hold(source)
            if self.free < missing:
                self._release(source)
                source, common = None, 0
        fresh = [self._take() for _ in range(missing)]
        lease = Lease([page.number for page in (*whole, *fresh)], start + common)
        if source is not None:
            lease.copy = (source.number, fresh[0].number)
            self._release(source)
        lease.short = len(ids) - lease.cached <= SHORT
        if not lease.short:
            self._learn(lease.pages, ids)
        self._announced.append(lease)
        return lease

    def _match(self, ids: list[int]) -> list[_Page]:
        """Known pages that hold the beginning of a sequence, its last id left out."""
        whole: list[_Page] = []
        while (len(whole) + 1) * PAGE < len(ids):
            start = len(whole) * PAGE
            page = self._known.get((whole[-1].serial if whole else 0, tuple(ids[start : start + PAGE])))
            if page is None:
                break
            whole.append(page)
        return whole

    def close(self, lease: Lease, ids: list[int]) -> None:
        """Give the pages back; `ids` are those whose keys and values have been computed.

        They are remembered, unless the lease's own pass was never launched.
        """
        if lease.settled:
            self._learn(lease.pages, ids, settled=True)
        for number in reversed(lease.pages):
            self._release(self._pages[number])
        lease.pages = []

    def settle(self) -> None:
        """All forward passes announced so far are launched."""
        for page in self._unsettled:
            page.settled = True
        for lease in self._announced:
            lease.settled = True
        self._unsettled, self._announced = [], []

    def drop_unsettled(self) -> None:
        """The passes announced since `settle` will not come: forget what they were to compute."""
        for page in self._unsettled:
            self._forget(page)
        self._unsettled, self._announced = [], []

    def _learn(self, pages: list[int], ids: list[int], settled: bool = False) -> None:
        """Full pages of a sequence become known, unless others with the same ids are."""
        parent = 0
        for index in range(len(ids) // PAGE):
            key = (parent, tuple(ids[index * PAGE : (index + 1) * PAGE]))
            page = self._known.get(key)
            if page is None:
                page = self._pages[pages[index]]
                assert not page.serial
                self._serial += 1
                page.parent, page.ids, page.serial, page.settled = *key, self._serial, settled
                self._known[key] = page
                self._children.setdefault(parent, set()).add(page.number)
                if not settled:
                    self._unsettled.append(page)
            parent = page.serial

    def _longest_child(self, parent: int, ids: list[int]) -> tuple[_Page | None, int]:
        """The settled page after `parent` that shares most beginning ids with `ids`, and how many."""
        best, most = None, 0
        for number in self._children.get(parent, ()) if ids else ():
            page = self._pages[number]
            common = _common(page.ids, ids)
            if page.settled and common > most:
                best, most = page, common
        return best, most

    def _hold(self, page: _Page) -> None:
        page.holders += 1
        self._idle.pop(page.number, None)

    def _release(self, page: _Page) -> None:
        page.holders -= 1
        if page.holders:
            return
        if page.serial:
            self._idle[page.number] = None
        else:
            self._blank.append(page.number)

    def _take(self) -> _Page:
        """A page for new content: a blank one, else the one unused for longest, which is forgotten."""
        if self._blank:
            page = self._pages[self._blank.pop()]
        else:
            page = self._pages[self._idle.popitem(last=False)[0]]
            self._forget(page)
        page.holders = 1
        return page

    def _forget(self, page: _Page) -> None:
        del self._known[page.parent, page.ids]
        siblings = self._children[page.parent]
        siblings.discard(page.number)
        if not siblings:
            del self._children[page.parent]
        page.parent, page.ids, page.serial, page.settled = 0, (), 0, False


def pages_of(length: int) -> int:
    """Pages for so many positions."""
    return -(-length // PAGE)


def _common(a: tuple[int, ...], b: list[int]) -> int:
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))

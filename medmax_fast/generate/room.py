"""Room for running sequences: pages of the cache and slots on the device, and what is kept for later.

A stream gets the pages of its whole length when it is opened, so a request that was begun is never thrown out. What is
kept besides is the worst case of guides that a running sample may come to need. It stays kept while the sample has
them: a page that others share by then would not come back when they are closed.
"""

from medmax_fast.generate.cache import KVCache
from medmax_fast.generate.pages import PAGE, pages_of
from medmax_fast.generate.samples import Stream
from medmax_fast.generate.steps import MAX_STREAMS, Slots
from medmax_fast.runtime import InputError


class Room:
    """Who has which pages and slots of one cache."""

    def __init__(self, cache: KVCache, slots: Slots):
        self._cache, self._pool, self._slots = cache, cache.pool, slots
        self._idle = list(range(MAX_STREAMS, 0, -1))
        # Of running samples by their number: pages and slots.
        self._kept: dict[int, tuple[int, int]] = {}
        # Streams whose prompts no pass has computed yet.
        self._fresh: list[Stream] = []
        # Ids of all prompts, and those of them that needed no pass, as they were cached.
        self.prompt_ids, self.cached_ids = 0, 0

    @property
    def empty(self) -> bool:
        """Whether nothing is held or kept."""
        return self._pool.free == self._pool.size and len(self._idle) == MAX_STREAMS and not self._kept

    def admit(self, number: int, prompt: list[int], length: int, guides: list[int], later: bool) -> bool:
        """Whether there is room now for a stream of `length` positions that begins with `prompt`, and for its guides.

        later: the guides' room is kept from now on until `leave`. InputError if there never is room.
        """
        pages, slots = sum(map(pages_of, guides)), len(guides)
        kept_pages, kept_slots = (sum(pair) for pair in zip((0, 0), *self._kept.values(), strict=True))
        fits = self._pool.needs(prompt, length) + pages <= self._pool.free - kept_pages
        if not fits or 1 + slots > len(self._idle) - kept_slots:
            if self.empty:
                need, have = (pages_of(length) + pages) * PAGE, self._pool.size * PAGE
                raise InputError(f"needs {need} positions of the cache, which holds {have}; lower max_length")
            return False
        if later:
            self._kept[number] = pages, slots
        return True

    def leave(self, number: int, streams: list[Stream]) -> None:
        """A sample has ended."""
        self.close(streams)
        self._kept.pop(number, None)

    def open(self, ids: list[int], length: int) -> Stream:
        """A stream that begins with `ids`; unless few of them are left to compute, it is in what `fresh` gives next."""
        lease = self._pool.open(ids, length)
        self._cache.copy_page(lease)
        stream = Stream(list(ids), self._idle.pop(), lease)
        self._slots.open(stream.slot, lease)
        self.cached_ids += lease.cached
        self.prompt_ids += len(ids)
        if not lease.short:
            self._fresh.append(stream)
        return stream

    def close(self, streams: list[Stream]) -> None:
        """Give pages and slots back; what was computed stays known."""
        for stream in streams:
            self._pool.close(stream.lease, stream.ids[: stream.fed])
            self._idle.append(stream.slot)

    def fresh(self) -> list[Stream]:
        """Streams to be prefilled now, in the order of their opening; call `settle` when that is launched."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def settle(self) -> None:
        """The passes of all streams opened so far are launched."""
        self._pool.settle()

    def drop_fresh(self) -> None:
        """The streams that are not prefilled yet will not be."""
        self._fresh = []
        self._pool.drop_unsettled()

"""Timers as plain data: many keys, one moment each, cheap to move. Pure: the clock is whoever calls.

A binary heap with lazy deletion: moving or dropping a timer leaves its old entry in the heap, which
is thrown away when it surfaces. What is left behind is bounded: when more than half of a heap of
some size is stale, it is rebuilt, so each operation costs O(log n) amortised and the heap never
holds more than about twice the living timers.
"""

import heapq
from typing import Final, Generic, TypeVar

#: Rebuilding a heap smaller than this saves nothing worth the code path.
_REBUILD_MIN: Final = 64

# Keys need an order (equal moments fire in key order) and a hash. A bound to a protocol would say
# no more than the two types in use.
KeyT = TypeVar("KeyT", int, str)


class Timers(Generic[KeyT]):
    """At most one timer for each key."""

    __slots__ = ("_due", "_heap")

    def __init__(self) -> None:
        self._due: dict[KeyT, float] = {}
        #: (moment, key); stale unless `_due` says the same moment.
        self._heap: list[tuple[float, KeyT]] = []

    def __len__(self) -> int:
        return len(self._due)

    @property
    def heap_entries(self) -> int:
        """Entries in the heap, the stale ones included: at most twice the timers, plus 64."""
        return len(self._heap)

    def set(self, key: KeyT, due_at: float) -> None:
        """The key's timer is due at this moment from now on."""
        if self._due.get(key) == due_at:
            return
        self._due[key] = due_at
        heapq.heappush(self._heap, (due_at, key))
        self._rebuild_if_stale()

    def drop(self, key: KeyT) -> None:
        """The key has no timer any more; one that has none is no error."""
        if self._due.pop(key, None) is not None:
            self._rebuild_if_stale()

    def next_at(self) -> float | None:
        """The earliest moment; None without timers."""
        heap, due = self._heap, self._due
        while heap:
            moment, key = heap[0]
            if due.get(key) == moment:
                return moment
            heapq.heappop(heap)
        return None

    def due(self, now: float) -> list[KeyT]:
        """The keys whose moment has come, earliest first; they stay. Costs by their number, not by all timers'."""
        found: dict[tuple[float, KeyT], None] = {}
        # In a heap nothing under an entry is earlier than it: whole branches that are not due are skipped.
        unseen = [0]
        while unseen:
            index = unseen.pop()
            if index >= len(self._heap) or self._heap[index][0] > now:
                continue
            moment, key = self._heap[index]
            if self._due.get(key) == moment:
                found[(moment, key)] = None
            unseen += (2 * index + 1, 2 * index + 2)
        return [key for _, key in sorted(found)]

    def pop_due(self, now: float) -> list[KeyT]:
        """Takes out the timers whose moment has come; their keys, earliest first, equal moments in key order."""
        keys: list[KeyT] = []
        while (moment := self.next_at()) is not None and moment <= now:
            key = heapq.heappop(self._heap)[1]
            del self._due[key]
            keys.append(key)
        return keys

    def _rebuild_if_stale(self) -> None:
        if len(self._heap) > 2 * len(self._due) + _REBUILD_MIN:
            self._heap = [(moment, key) for key, moment in self._due.items()]
            heapq.heapify(self._heap)

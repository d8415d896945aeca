"""Bounded memory: keeps the latest items up to a count and a number of bytes, and hands back what falls off."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class Shelf(Generic[ItemT]):
    """Items by round, oldest first. When there is too much, the oldest fall off, the newest itself at the last."""

    __slots__ = ("_bytes", "_bytes_max", "_count_max", "_items")

    def __init__(self, *, count_max: int, bytes_max: int) -> None:
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._bytes = 0
        #: Round to (item, its bytes), in the order they were put. Not a plain dict: that one walks over
        #: the gaps of what was removed each time it is asked for its oldest.
        self._items: OrderedDict[int, tuple[ItemT, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[int]:
        return iter(self._items)

    @property
    def held_bytes(self) -> int:
        """Bytes of all items, as they were stated."""
        return self._bytes

    def get(self, round_id: int) -> ItemT | None:
        """The item of a round; None where there is none."""
        entry = self._items.get(round_id)
        return None if entry is None else entry[0]

    def put(self, round_id: int, item: ItemT, size_bytes: int) -> list[ItemT]:
        """Adds an item for a round that has none; returns what fell off for it, oldest first."""
        assert round_id not in self._items, "a round is put once"
        self._items[round_id] = (item, size_bytes)
        self._bytes += size_bytes
        fallen: list[ItemT] = []
        while len(self._items) > self._count_max or self._bytes > self._bytes_max:
            _, (oldest, oldest_bytes) = self._items.popitem(last=False)
            self._bytes -= oldest_bytes
            fallen.append(oldest)
        return fallen

    def take(self, round_id: int) -> ItemT | None:
        """Removes and returns the item of a round; None where there is none."""
        entry = self._items.pop(round_id, None)
        if entry is None:
            return None
        self._bytes -= entry[1]
        return entry[0]

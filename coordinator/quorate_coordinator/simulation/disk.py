"""A disk with one list of records: what is written is durable later, or never."""

from collections.abc import Callable
from typing import Any, Final

from quorate_coordinator.simulation.world import World

#: Seconds from the first record that waits to its commit: typical, and when the disk is busy with something else.
_COMMIT_S: Final = (0.001, 0.02)
_SLOW_COMMIT_S: Final = (0.1, 1.5)
_SLOW_SHARE: Final = 0.03

#: Seconds after which a commit is tried again that found the disk full.
_RETRY_S: Final = 0.5


class SimDisk:
    """Append-only; a prefix of it is durable. Survives its coordinator's processes."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = world.stream("disk")
        #: Record n has the number n + 1.
        self.records: list[Any] = []
        #: How many of them, from the first, would be there after a crash.
        self.durable = 0
        #: Faults that fill it; over 0, no commit succeeds.
        self.full = 0
        #: The first round number that no process has reserved; durable at once.
        self.free_round = 1
        #: The newest checkpoint: how many records it covers, and the learner's snapshot.
        self.checkpoint: tuple[int, bytes] | None = None
        self._checkpoints: list[tuple[int, bytes]] = []
        self._is_committing = False
        #: Which process has the disk: a commit of an earlier one comes to nothing.
        self._process = 0
        #: Told when more is durable, that nothing can be, and that it can again. One process at a time.
        self._on_durable: Callable[[int], None] = lambda durable: None
        self._on_failed: Callable[[str], None] = lambda problem: None
        self._on_recovered: Callable[[], None] = lambda: None
        self._has_failed = False

    @property
    def is_full(self) -> bool:
        """Whether a commit would fail now."""
        return self.full > 0

    def open(
        self,
        on_durable: Callable[[int], None],
        on_failed: Callable[[str], None] = lambda problem: None,
        on_recovered: Callable[[], None] = lambda: None,
    ) -> None:
        """A process has the disk from now on."""
        self._process += 1
        self._is_committing = self._has_failed = False
        self._on_durable, self._on_failed, self._on_recovered = on_durable, on_failed, on_recovered

    def append_checkpoint(self, covered: int, snapshot: bytes) -> None:
        """A snapshot that covers so many records; it becomes durable with them."""
        self._checkpoints.append((covered, snapshot))

    def append(self, record: Any) -> int:
        """Adds a record; returns its number. It becomes durable with all before it, in a group."""
        self.records.append(record)
        if not self._is_committing:
            self._begin()
        return len(self.records)

    def crash(self) -> None:
        """The process is gone: what is not durable is lost, but for what was just being written.

        Records may have reached the disk without anybody having been told, up to a torn one, which is dropped.
        """
        waiting = len(self.records) - self.durable
        self.open(lambda durable: None)
        survived = 0 if self.is_full else self._random.randint(0, waiting)
        torn = survived < waiting and self._random.random() < 0.5
        self.durable += survived
        del self.records[self.durable :]
        self._checkpoints.clear()
        if waiting:
            self._world.note(f"disk crash: {survived} of {waiting} waiting records survive{', one torn' * torn}")

    def _begin(self) -> None:
        """Takes what waits into a commit; what comes after this waits for the next."""
        span = _SLOW_COMMIT_S if self._random.random() < _SLOW_SHARE else _COMMIT_S
        self._is_committing = True
        self._world.after(self._random.uniform(*span), self._commit, self._process, len(self.records))

    def _commit(self, process: int, group: int) -> None:
        if process != self._process:
            return  # it is gone
        if self.is_full:
            self._world.after(_RETRY_S, self._commit, process, group)
            if not self._has_failed:
                self._has_failed = True
                self._on_failed("the disk is full")
            return
        self.durable = group
        self._is_committing = False
        for checkpoint in self._checkpoints:
            if checkpoint[0] <= group:
                self.checkpoint = checkpoint
        self._checkpoints = [checkpoint for checkpoint in self._checkpoints if checkpoint[0] > group]
        if self._has_failed:
            self._has_failed = False
            self._on_recovered()
        if group < len(self.records):
            self._begin()
        self._on_durable(group)

"""A disk that stands still: no commit fails, and none comes to an end. All of it on the event loop."""

import asyncio
from collections.abc import Callable
from typing import Final

#: Seconds after which a disk that has taken nothing is told of like one that refuses.
STALLED_S: Final = 10.0

#: A look that comes so many seconds late was held up with the whole process, and its disk with it.
_LATE_S: Final = 1.0


class Stall:
    """Passes on what the thread that commits tells, and tells itself of a disk that stands still.

    Args:
        loop: where all is called.
        progress: tells how many records wait for the disk, and how many it has taken.
        on_committed, on_failed, on_recovered: as in `Journal.start`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        progress: Callable[[], tuple[int, int]],
        on_committed: Callable[[int], None],
        on_failed: Callable[[str], None],
        on_recovered: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._progress = progress
        self._on_committed = on_committed
        self._on_failed = on_failed
        self._on_recovered = on_recovered
        self._timer: asyncio.TimerHandle | None = None
        #: Whether `on_failed` was called last.
        self._has_failed = False

    def watch(self) -> None:
        """Something waits for the disk."""
        if self._timer is None and not self._loop.is_closed():
            _, taken = self._progress()
            self._timer = self._loop.call_later(STALLED_S, self._look, taken, self._loop.time() + STALLED_S)

    def _look(self, taken_before: int, due: float) -> None:
        self._timer = None
        pending, taken = self._progress()
        if not pending:
            return
        if taken == taken_before and not self._has_failed and self._loop.time() - due < _LATE_S:
            self.failed(f"the journal cannot be written: its disk has finished no commit for {STALLED_S:g} s")
        self.watch()

    def committed(self, seq: int) -> None:
        """All up to this record is durable."""
        self.recovered()
        self._on_committed(seq)

    def failed(self, problem: str) -> None:
        """A commit has failed."""
        self._has_failed = True
        self._on_failed(problem)

    def recovered(self) -> None:
        """Commits succeed."""
        if self._has_failed:
            self._has_failed = False
            self._on_recovered()

    def end(self) -> None:
        """Looks no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

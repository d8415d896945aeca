"""An event loop whose time jumps to the next timer, as soon as there is nothing else to do."""

import asyncio
import selectors
from collections.abc import Callable, Mapping
from typing import Any, Final

#: Where the clock begins, in seconds. Not at 0: a moment must not be false.
START_S: Final = 1000.0

#: Seconds of the wall clock that a thread has before the clock jumps over it: some commits of a busy disk.
_PATIENCE_S: Final = 0.05


class _JumpingSelector(selectors.BaseSelector):
    """Looks whether something is ready, and does not wait for it."""

    def __init__(self) -> None:
        self._inner = selectors.DefaultSelector()
        #: Seconds.
        self.now = START_S
        self.is_awaited: Callable[[], bool] = lambda: False

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            return self._inner.select(None)  # nothing but a thread can go on from here
        ready = self._inner.select(0)
        if not ready and timeout > 0 and self.is_awaited():
            ready = self._inner.select(min(timeout, _PATIENCE_S))
        if not ready:
            self.now += max(0.0, timeout)
        return ready

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._inner.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._inner.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._inner.get_map()

    def close(self) -> None:
        self._inner.close()


class VirtualLoop(asyncio.SelectorEventLoop):
    """Nothing but its timers moves its time: sockets and processes have no place on it, and threads little."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Virtual seconds."""
        return self._jumping.now

    def await_threads(self, is_awaited: Callable[[], bool]) -> None:
        """Holds the clock for a moment while a thread has something to do, as long as `is_awaited` says so."""
        self._jumping.is_awaited = is_awaited

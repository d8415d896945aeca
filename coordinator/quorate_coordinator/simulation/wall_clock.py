"""The time of day in a simulation, which can be set; it stands where the real one is asked for."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final

#: The time of day at the start, in Unix seconds.
_TIME_OF_DAY_S: Final = 1.8e9


class WallClock:
    """What the coordinator's machine takes for the time of day: set forwards and backwards while time goes on.

    Args:
        clock: Virtual time, in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._offset_s = _TIME_OF_DAY_S - clock()

    def __call__(self) -> float:
        """Unix time, in seconds."""
        return self._clock() + self._offset_s

    def jump(self, by_s: float) -> None:
        """Somebody sets it; not to before 1970."""
        self._offset_s += max(by_s, -self())

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Makes it what `time.time` says meanwhile, so that whoever asks for the time of day gets this one."""
        real, time.time = time.time, self
        try:
            yield
        finally:
            time.time = real

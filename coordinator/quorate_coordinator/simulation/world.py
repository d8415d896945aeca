"""Virtual time: events in their order, streams of randomness by name, and the trace."""

import heapq
import random
from collections import deque
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, Final

from quorate_coordinator.simulation.wall_clock import WallClock

#: Where the clock begins, in seconds. Not at 0: a moment must not be false.
START_S: Final = 1000.0

#: Lines of the trace that are kept: enough for the last minutes of a thousand agents, and for all of a shortened run.
TRACE_LINES_MAX: Final = 20_000


class World:
    """The clock and what it will bring.

    Args:
        seed: What all streams are drawn from.
    """

    def __init__(self, seed: int) -> None:
        self.seed: Final = seed
        self.now = START_S
        #: The coordinator's; agents' cores have no use for one.
        self.wall: Final = WallClock(lambda: self.now)
        #: Events carried out so far.
        self.events = 0
        #: (moment, order of planning, action, arguments). What is not wanted any more finds that out itself.
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._sequence = 0
        self._trace: deque[str] = deque(maxlen=TRACE_LINES_MAX)
        self._digest = blake2b(digest_size=16)
        #: By round: the fate of the call that asked for it. Round numbers shift when a call is left out, this does not.
        self.fates: dict[int, int] = {}

    def at(self, moment: float, action: Callable[..., None], *arguments: Any) -> None:
        """Plans an action; one for the past comes next. Equal moments come in the order of planning."""
        self._sequence += 1
        heapq.heappush(self._heap, (max(moment, self.now), self._sequence, action, arguments))

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Plans an action in so many seconds."""
        self.at(self.now + delay_s, action, *arguments)

    def run_until(self, end: float, check: Callable[[], None], *, events_max: int | None = None) -> bool:
        """Carries out events until a moment, calling `check` after each. False when there were over `events_max`."""
        heap = self._heap
        left = -1 if events_max is None else events_max
        while heap and heap[0][0] <= end:
            if left == 0:
                return False
            left -= 1
            self.now, _, action, arguments = heapq.heappop(heap)
            self.events += 1
            action(*arguments)
            check()
        self.now = max(self.now, end)
        return True

    def stream(self, subject: str) -> random.Random:
        """Randomness for one subject: always the same for the same seed and subject."""
        # A text seeds through SHA-512, whatever the hash seed is.
        return random.Random(f"{self.seed}/{subject}")  # noqa: S311  repeatable on purpose

    def note(self, text: str) -> None:
        """One line of the trace."""
        line = f"{self.now - START_S:11.4f} {text}"
        self._trace.append(line)
        self._digest.update(line.encode())

    def trace(self, *words: str, lines_max: int | None = None) -> list[str]:
        """The last lines that have one of these words; all of them without words."""
        found = [line for line in self._trace if not words or not {*words}.isdisjoint(line.split())]
        return found if lines_max is None else found[-lines_max:]

    def digest(self) -> str:
        """A digest of all lines so far, the forgotten ones too."""
        return self._digest.hexdigest()

"""How long an event loop keeps waiting what becomes due: each of its turns, noted in a file by the process itself.

A turn is from when the loop knows of events until it asks for more. What becomes due in the middle of one, a frame
that came or a timer, waits for the rest of it. Of that, the time in which the thread could have run and had no
processor is told apart (Linux: /proc/thread-self/schedstat): it says something of the machine and nothing of the
coordinator.
"""

import os
import selectors
import struct
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_TURN: Final = struct.Struct("=ddd")

#: How exactly a quantile is found, in seconds.
_EXACT_S: Final = 1e-6


@dataclass(frozen=True, slots=True)
class LoopTurn:
    """One turn of a loop."""

    #: By `time.perf_counter`, which all processes of a machine share on Linux.
    began_s: float
    length_s: float
    #: Of it, without a processor.
    off_s: float


class WatchedSelector(selectors.DefaultSelector):
    """Notes in a file how long the loop that uses it is away."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._notes = file.open("ab", buffering=0)
        self._schedstat = -1
        self._began_s = 0.0
        self._off_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, Any]]:
        """As that of every selector."""
        if self._schedstat < 0:
            # In the loop's own thread.
            self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        else:
            length_s = time.perf_counter() - self._began_s
            self._notes.write(_TURN.pack(self._began_s, length_s, self._read_off_s() - self._off_s))
        events = super().select(timeout)
        self._off_s = self._read_off_s()
        self._began_s = time.perf_counter()
        return events

    def close(self) -> None:
        """As that of every selector."""
        super().close()
        self._notes.close()
        if self._schedstat >= 0:
            os.close(self._schedstat)

    def _read_off_s(self) -> float:
        # proc(5): time on a processor, time waiting for one, both in nanoseconds, and how often it had one.
        return int(os.pread(self._schedstat, 64, 0).split()[1]) / 1e9


def read_turns(file: Path, began_s: float, ended_s: float) -> list[LoopTurn]:
    """The turns that began between these times."""
    notes = file.read_bytes()
    turns = (LoopTurn(*turn) for turn in _TURN.iter_unpack(notes[: len(notes) // _TURN.size * _TURN.size]))
    return [turn for turn in turns if began_s <= turn.began_s < ended_s]


def wait_quantile(lengths_s: Collection[float], elapsed_s: float, share: float) -> float:
    """How long, at most, such a share of what becomes due waits, when it becomes due at any moment of that time.

    A turn of length L keeps waiting for longer than x whatever becomes due in its first L - x.
    """
    low_s, high_s = 0.0, max(lengths_s, default=0.0)
    while high_s - low_s > _EXACT_S:
        middle_s = (low_s + high_s) / 2
        if _longer_s(lengths_s, middle_s) > (1 - share) * elapsed_s:
            low_s = middle_s
        else:
            high_s = middle_s
    return high_s


def _longer_s(lengths_s: Iterable[float], wait_s: float) -> float:
    return sum(length_s - wait_s for length_s in lengths_s if length_s > wait_s)

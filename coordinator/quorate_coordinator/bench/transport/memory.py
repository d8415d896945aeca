"""How much a process's resident set grows."""

import asyncio
import ctypes
import os
from pathlib import Path
from typing import Final

#: How often it is looked at, in seconds. What grows without a ceiling grows for longer than that.
_PERIOD_S: Final = 0.02
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class MemoryWatch:
    """Keeps the largest resident set since `start`."""

    def __init__(self) -> None:
        self._base_bytes = self._peak_bytes = 0
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """What is resident now is the base."""
        _trim()
        self._base_bytes = self._peak_bytes = resident_bytes()
        self._watching = asyncio.ensure_future(self._watch())

    def stop(self) -> int:
        """Bytes by which the largest was over the base; at least a page, the unit in which it is counted."""
        assert self._watching is not None
        self._watching.cancel()
        self._look()
        return max(_PAGE_BYTES, self.growth_bytes)

    @property
    def growth_bytes(self) -> int:
        """Bytes by which the largest seen so far was over the base."""
        return self._peak_bytes - self._base_bytes

    async def _watch(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(_PERIOD_S)

    def _look(self) -> None:
        self._peak_bytes = max(self._peak_bytes, resident_bytes())


def resident_bytes() -> int:
    """This process's resident set (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def _trim() -> None:
    """Gives back what was freed: growth into it would not be seen."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library: its own growth is measured too small by what it keeps

"""Giving up on a peer that takes nothing of what it is sent."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import Final

from quorate_protocol.transport.api import SendStream

#: Looks in the time that a peer has: it ends up to a quarter too late, never too early.
_LOOKS: Final = 4


@contextlib.asynccontextmanager
async def while_taken(
    stream: SendStream, untaken_s: float | None, *, counts: Callable[[], bool] = lambda: True
) -> AsyncGenerator[None, None]:
    """Gives the block up once the peer's transport has acknowledged nothing of a stream for so many seconds.

    A peer that is slow and goes on taking is waited for, however much there is.

    Args:
        stream: what the block sends on.
        untaken_s: seconds; None waits for ever.
        counts: whether the time counts now.

    Raises:
        TimeoutError: nothing was taken.
    """
    if untaken_s is None:
        yield
        return
    is_taken = True
    try:
        async with asyncio.timeout(None) as end:
            look = _Look(stream, untaken_s / _LOOKS, counts, end)
            del end
            try:
                yield
            finally:
                look.close()
    except TimeoutError:
        is_taken = False
    if not is_taken:
        # Afresh: the timeout's own holds its task, which would hold it in turn, and bodies with it.
        raise TimeoutError


class _Look:
    """Looks at a stream now and then, and ends a timeout."""

    def __init__(self, stream: SendStream, every_s: float, counts: Callable[[], bool], end: asyncio.Timeout) -> None:
        self._stream = stream
        self._every_s = every_s
        self._counts = counts
        self._end: asyncio.Timeout | None = end
        self._unsent_bytes = stream.unsent_bytes
        self._idle = 0
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(every_s, self._look)

    def _look(self) -> None:
        unsent_bytes = self._stream.unsent_bytes
        # More than before is a sign of life, too: there was room for it. None is not: others' bytes may be in the way.
        self._idle = self._idle + 1 if unsent_bytes == self._unsent_bytes and self._counts() else 0
        self._unsent_bytes = unsent_bytes
        if self._idle >= _LOOKS:
            assert self._end is not None, "the timer is cancelled"
            self._end.reschedule(self._loop.time())
        else:
            self._timer = self._loop.call_later(self._every_s, self._look)

    def close(self) -> None:
        """Looks no more."""
        self._timer.cancel()
        self._end = None

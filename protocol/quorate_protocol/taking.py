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
    loop = asyncio.get_running_loop()
    every_s = untaken_s / _LOOKS
    unsent_bytes = stream.unsent_bytes
    idle_looks = 0
    timer: asyncio.TimerHandle

    def look() -> None:
        nonlocal unsent_bytes, idle_looks, timer
        # More than before is a sign of life, too: there was room for it.
        idle_looks = idle_looks + 1 if stream.unsent_bytes == unsent_bytes and counts() else 0
        unsent_bytes = stream.unsent_bytes
        if idle_looks >= _LOOKS:
            end.reschedule(loop.time())
        else:
            timer = loop.call_later(every_s, look)

    async with asyncio.timeout(None) as end:
        timer = loop.call_later(every_s, look)
        try:
            yield
        finally:
            timer.cancel()

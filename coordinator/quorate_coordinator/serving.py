"""What serving a connection takes, whoever is at its other end."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from quorate_protocol.errors import Code, ProtocolError
from quorate_protocol.transport import BiStream, ReceiveStream


async def first_of(*readers: Coroutine[Any, Any, str]) -> str:
    """What the first reader to end returns or raises; the others are cancelled."""
    tasks = [asyncio.create_task(reader) for reader in readers]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    ended = [task for task in tasks if task in done]
    # One end of a link often ends several readers; a fault of the peer's explains it best.
    faults = [task for task in ended if isinstance(task.exception(), ProtocolError)]
    return (faults or ended)[0].result()


async def refuse_streams(
    accept: Callable[[], Awaitable[ReceiveStream]],
    code: Code,
    *,
    count_max: int | None = None,
    on_refused: Callable[[], None] = lambda: None,
) -> str:
    """Stops and resets the streams that `accept` gives; returns after `count_max` of them, never without one.

    Unread streams would hold the peer's bytes in our memory, and use up the window that its other
    streams need.

    Raises:
        ConnectionClosed: the connection is over.
    """
    for _ in itertools.count() if count_max is None else range(count_max):
        stream = await accept()
        stream.stop(code)
        if isinstance(stream, BiStream):
            stream.reset(code)
        on_refused()
    return "opened too many streams"

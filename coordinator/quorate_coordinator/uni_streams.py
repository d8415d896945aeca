"""Unidirectional streams of a peer: the first frame says what each is, and somebody serves it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from quorate_protocol.bulk import HEADER_TIMEOUT_S, read_header
from quorate_protocol.errors import Code, ProtocolError, QuorateError
from quorate_protocol.messages import Message
from quorate_protocol.transport import Connection, ReceiveStream

#: Streams of one connection whose first frame has not come; the others wait to be accepted.
_HEADERS_MAX: Final = 64

#: Seconds that the first frames may take that had come when the connection ended.
_READ_OUT_TIMEOUT_S: Final = 1.0

#: Serves one stream whose first frame has been read, to its end. It raises `ProtocolError` for what the peer broke.
Serve = Callable[[Message, ReceiveStream], Awaitable[None]]


async def serve_uni_streams(connection: Connection, serve: Serve, on_fault: Callable[[ProtocolError], None]) -> str:
    """Serves each stream in a task of its own, until the connection is over.

    Args:
        connection: The peer's.
        serve: Called for each stream.
        on_fault: Told what the peer broke; its other streams go on.

    Raises:
        ConnectionClosed: it is over. Streams that were being served have been given up.
    """
    tasks: set[asyncio.Task[None]] = set()
    beginning: set[asyncio.Task[None]] = set()
    room = asyncio.Semaphore(_HEADERS_MAX)

    async def begin(stream: ReceiveStream) -> None:
        try:
            try:
                async with asyncio.timeout(HEADER_TIMEOUT_S):
                    header = await read_header(stream)
            finally:
                room.release()
            beginning.discard(asyncio.current_task())
            await serve(header, stream)
        except ProtocolError as error:
            stream.stop(error.code)
            on_fault(error)
        except (QuorateError, TimeoutError):
            stream.stop(Code.CANCELLED)
        except asyncio.CancelledError:
            stream.stop(Code.CANCELLED)
            raise

    try:
        while True:
            # To stop more would be to turn away bodies without knowing whose.
            await room.acquire()
            stream = await connection.accept_uni_stream()
            task = asyncio.create_task(begin(stream), name="uni stream")
            for group in (tasks, beginning):
                group.add(task)
                task.add_done_callback(group.discard)
    finally:
        if beginning and connection.is_closed:
            # What had come before the end is there to be read: a body may have come whole.
            await asyncio.wait(set(beginning), timeout=_READ_OUT_TIMEOUT_S)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

"""Reading ahead of a feed, in a thread: a source that is slow (a pipe, a terminal) must not hold up the connection.

The event loop has to run while nothing comes, or the coordinator takes the operator for gone.
"""

import asyncio
import io
import os
import select
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Final, TypeVar

T = TypeVar("T")

#: Items that are read before they are asked for.
_AHEAD_MAX: Final = 64


class Interruption:
    """Ends blocking reads of `InterruptibleFile`s, from any thread. `close` it in the end."""

    def __init__(self) -> None:
        self._reading, self._writing = os.pipe()

    def fileno(self) -> int:
        """A descriptor that becomes readable when it is time to end."""
        return self._reading

    def set(self) -> None:
        """It is time. More calls do nothing."""
        if self._writing >= 0:
            os.close(self._writing)
            self._writing = -1

    def close(self) -> None:
        """Lets go of the descriptors."""
        self.set()
        if self._reading >= 0:
            os.close(self._reading)
            self._reading = -1


class InterruptibleFile(io.RawIOBase):
    """Another file's bytes until its end, or the interruption."""

    def __init__(self, raw: io.FileIO, interruption: Interruption) -> None:
        self._raw = raw
        self._interruption = interruption

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        poll = select.poll()
        poll.register(self._raw.fileno(), select.POLLIN)
        poll.register(self._interruption.fileno(), select.POLLIN)
        if any(descriptor == self._interruption.fileno() for descriptor, _ in poll.poll()):
            return 0
        return self._raw.readinto(buffer)


async def read_ahead(items: Iterator[T], interruption: Interruption) -> AsyncGenerator[T, None]:
    """The items of an iterator that blocks; what it raises is raised in its place.

    Ending this early sets the interruption, which has to end an item that is being waited for.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Queue[tuple[bool, Any]] = asyncio.Queue()
    room = threading.Semaphore(_AHEAD_MAX)
    ended = threading.Event()

    def read() -> None:
        last: Exception | None = None
        try:
            for item in items:
                room.acquire()
                if ended.is_set():
                    return
                loop.call_soon_threadsafe(ready.put_nowait, (True, item))
        except Exception as error:  # noqa: BLE001  it is raised where the item was wanted
            last = error
        loop.call_soon_threadsafe(ready.put_nowait, (False, last))

    thread = threading.Thread(target=read, name="read-ahead")
    thread.start()
    try:
        while True:
            is_item, value = await ready.get()
            if not is_item:
                if value is not None:
                    raise value
                return
            room.release()
            yield value
    finally:
        ended.set()
        interruption.set()
        room.release()
        thread.join()

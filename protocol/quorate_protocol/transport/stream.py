"""Streams of a QUIC connection: the asyncio face of what the engine does with bytes."""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from quorate_protocol.errors import QuorateError
from quorate_protocol.limits import STREAM_WRITE_BYTES_HIGH, STREAM_WRITE_BYTES_LOW
from quorate_protocol.transport.api import BiStream, Priority, ReceiveStream, SendStream

if TYPE_CHECKING:
    from quorate_protocol.transport.connection import QuicConnection

#: Bytes handed to the engine at once by `send`: small enough to stop soon after the watermark,
#: large enough not to matter.
_SLICE_BYTES: Final = 256 << 10


class QuicSendStream(SendStream):
    """The sending half. `_connection` tells it about acknowledgements, stops and the end."""

    def __init__(self, connection: "QuicConnection", stream_id: int, priority: Priority) -> None:
        self._init_send(connection, stream_id, priority)

    def _init_send(self, connection: "QuicConnection", stream_id: int, priority: Priority) -> None:
        self._connection = connection
        self.id = stream_id
        self._priority = priority
        self._send_error: QuorateError | None = None
        self._send_ended = False
        self._send_waiter: asyncio.Future[None] | None = None

    @property
    def priority(self) -> Priority:
        """Sending class; setting it changes what goes first from now on."""
        return self._priority

    @priority.setter
    def priority(self, priority: Priority) -> None:
        self._priority = priority
        if not self._send_ended and self._send_error is None:
            self._connection.engine.set_priority(self.id, priority)

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while True:
            self._check_can_send()
            if self.unsent_bytes >= STREAM_WRITE_BYTES_HIGH:
                await self._wait_below(STREAM_WRITE_BYTES_LOW)
                continue
            self._connection.write(self.id, bytes(view[:_SLICE_BYTES]))
            view = view[_SLICE_BYTES:]
            if not view:
                break
        if self.unsent_bytes >= STREAM_WRITE_BYTES_HIGH:
            await self._wait_below(STREAM_WRITE_BYTES_LOW)

    def send_nowait(self, data: bytes) -> None:
        self._check_can_send()
        self._connection.write(self.id, data)

    @property
    def unsent_bytes(self) -> int:
        return self._connection.engine.unacknowledged_bytes(self.id)

    async def flush(self) -> None:
        while self.unsent_bytes:
            if self._send_error is not None:
                raise self._send_error
            if self._connection.close_error is not None:
                raise self._connection.close_error
            await self._wait_below(0)

    async def finish(self) -> None:
        if self._send_ended or self._send_error is not None:
            return
        self._send_ended = True
        self._connection.write(self.id, b"", end=True)
        self._connection.forget_if_done(self)

    def reset(self, code: int) -> None:
        if self._send_error is not None or self._connection.is_closed:
            return
        self._send_ended = True
        self._connection.reset(self.id, code)
        self._connection.forget_if_done(self)

    @property
    def send_is_over(self) -> bool:
        """Whether nothing more will be handed over."""
        return self._send_ended or self._send_error is not None

    def _check_can_send(self) -> None:
        if self._send_error is not None:
            raise self._send_error
        if self._send_ended:
            raise RuntimeError(f"stream {self.id} was finished or reset: nothing can be sent on it any more")
        if self._connection.close_error is not None:
            raise self._connection.close_error

    async def _wait_below(self, low_bytes: int) -> None:
        if self._send_waiter is not None:
            raise RuntimeError(f"stream {self.id}: two tasks send at once")
        self._send_waiter = asyncio.get_running_loop().create_future()
        self._connection.watch_writes(self, low_bytes)
        try:
            await self._send_waiter
        finally:
            self._send_waiter = None
            self._connection.unwatch_writes(self)

    # From the connection:

    def on_writable(self) -> None:
        if self._send_waiter is not None and not self._send_waiter.done():
            self._send_waiter.set_result(None)

    def on_send_failed(self, error: QuorateError) -> None:
        if self._send_error is None:
            self._send_error = error
        self.on_writable()


class QuicReceiveStream(ReceiveStream):
    """The receiving half: chunks that the engine delivered and nobody has read."""

    def __init__(self, connection: "QuicConnection", stream_id: int) -> None:
        self._init_receive(connection, stream_id)

    def _init_receive(self, connection: "QuicConnection", stream_id: int) -> None:
        self._connection = connection
        self.id = stream_id
        self._unread: deque[bytes] = deque()
        self._receive_ended = False
        self._receive_error: QuorateError | None = None
        self._stopped = False
        self._receive_waiter: asyncio.Future[None] | None = None

    async def receive(self, max_bytes: int = 65_536) -> bytes:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        while not self._unread:
            if self._receive_ended:
                return b""
            if self._receive_error is not None:
                raise self._receive_error
            if self._receive_waiter is not None:
                raise RuntimeError(f"stream {self.id}: two tasks receive at once")
            self._receive_waiter = asyncio.get_running_loop().create_future()
            try:
                await self._receive_waiter
            finally:
                self._receive_waiter = None
        chunk = self._unread.popleft()
        if len(chunk) > max_bytes:
            self._unread.appendleft(chunk[max_bytes:])
            chunk = chunk[:max_bytes]
        self._connection.consumed(self.id, len(chunk))
        return chunk

    def stop(self, code: int) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._drop_unread()
        if not self.receive_is_over:
            self._connection.stop(self.id, code)
        self._receive_ended = True
        self._wake_reader()
        self._connection.forget_if_done(self)

    @property
    def receive_is_over(self) -> bool:
        """Whether nothing more will be delivered."""
        return self._receive_ended or self._receive_error is not None

    def _drop_unread(self) -> None:
        if self._unread:
            self._connection.consumed(self.id, sum(map(len, self._unread)))
            self._unread.clear()

    def _wake_reader(self) -> None:
        if self._receive_waiter is not None and not self._receive_waiter.done():
            self._receive_waiter.set_result(None)

    # From the connection:

    def on_data(self, data: bytes, end: bool) -> None:
        if self._stopped:
            self._connection.consumed(self.id, len(data))
            return
        if data:
            self._unread.append(data)
        if end:
            self._receive_ended = True
        self._wake_reader()

    def on_receive_failed(self, error: QuorateError) -> None:
        if not self._receive_ended and self._receive_error is None:
            self._receive_error = error
        self._wake_reader()


class QuicBiStream(QuicSendStream, QuicReceiveStream, BiStream):
    """Both halves."""

    def __init__(self, connection: "QuicConnection", stream_id: int, priority: Priority) -> None:
        self._init_send(connection, stream_id, priority)
        self._init_receive(connection, stream_id)

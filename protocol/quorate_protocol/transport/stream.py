"""Streams of a QUIC connection: the asyncio face of what the engine does with bytes."""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from quorate_protocol.errors import QuorateError, StoppedByPeer
from quorate_protocol.limits import (
    FRAME_BYTES_MAX,
    FRAME_PREFIX_BYTES,
)
from quorate_protocol.transport.api import BiStream, Buffer, Priority, ReceiveStream, SendStream

if TYPE_CHECKING:
    from quorate_protocol.transport.connection import QuicConnection

#: Bytes handed to the engine at once by `send`. A frame is never more: a `send` of one that is
#: cancelled has sent all of it or nothing, and no other frame gets into its middle.
_SLICE_BYTES: Final = FRAME_PREFIX_BYTES + FRAME_BYTES_MAX

#: Unread chunks smaller than this are joined with what comes next: a peer that sends single bytes
#: would fill the window with objects of fifty times their size.
_SMALL_CHUNK_BYTES: Final = 512

#: Codes are variable-length integers (RFC 9000, 16).
_CODE_MAX: Final = (1 << 62) - 1


def check_code(code: int) -> None:
    """Raises ValueError for what cannot be an error code on the wire."""
    if not 0 <= code <= _CODE_MAX:
        raise ValueError(f"an error code is from 0 to 2**62 - 1, got {code}")


def flat(data: Buffer) -> bytes | memoryview:
    """Its bytes one by one, whatever its items are.

    Raises:
        TypeError: it has none, or they are not contiguous.
    """
    view = memoryview(data)
    if not view.c_contiguous:
        raise TypeError("only contiguous bytes can be sent")
    return view.cast("B") if view.nbytes else b""


class QuicSendStream(SendStream):
    """The sending half. `_connection` tells it about acknowledgements, stops and the end."""

    _send_error: QuorateError | None = None
    _send_failed: "asyncio.Future[QuorateError] | None" = None
    _send_ended = False
    _sending = False
    #: A sleeping `send` has handed over a part of its bytes: nothing else may come between.
    _sending_midway = False

    def __init__(self, connection: "QuicConnection", stream_id: int, priority: Priority) -> None:
        self._init_send(connection, stream_id, priority)

    def _init_send(self, connection: "QuicConnection", stream_id: int, priority: Priority) -> None:
        self._connection = connection
        self.id = stream_id
        self._priority = priority
        #: Tasks that wait for acknowledgements: the unacknowledged bytes at which each goes on, and whether it waits
        #: for the connection's other streams, too.
        self._send_waiters: dict[asyncio.Future[None], tuple[int, bool]] = {}

    @property
    def priority(self) -> Priority:
        """Sending class; setting it changes what goes first from now on."""
        return self._priority

    @priority.setter
    def priority(self, priority: Priority) -> None:
        priority = Priority(priority)
        before, self._priority = self._priority, priority
        if self._send_error is None:
            self._connection.priority_changed(self, before)

    async def send(self, data: Buffer) -> None:
        self._check_can_send()
        payload = data if type(data) is bytes else flat(data)
        if self._sending:
            raise RuntimeError(f"stream {self.id}: two tasks send at once")
        self._sending = True
        try:
            connection = self._connection
            for at in range(0, len(payload) or 1, _SLICE_BYTES):
                while connection.is_write_full(self):
                    await self._wait_for_room()
                    self._check_can_send()
                part = payload if len(payload) <= _SLICE_BYTES else payload[at : at + _SLICE_BYTES]
                connection.write(self, bytes(part))
                self._sending_midway = at + _SLICE_BYTES < len(payload)
                if self._send_error is not None:
                    # The write itself may have met with the end of the connection.
                    raise self._send_error.again()
            if connection.is_write_full(self):
                await self._wait_for_room()
                if self._send_error is not None:
                    raise self._send_error.again()
        finally:
            self._sending = self._sending_midway = False
            part = b""
            if isinstance(payload, memoryview):
                # Whoever catches what is raised here may want to resize what it holds.
                payload.release()

    def send_nowait(self, data: Buffer, *, hurried: bool = True) -> None:
        self._check_can_send()
        payload = data if type(data) is bytes else bytes(flat(data))
        if self._sending_midway:
            raise RuntimeError(f"stream {self.id}: another task is in the middle of sending")
        self._connection.write(self, payload, hurried=hurried)

    @property
    def send_failed(self) -> "asyncio.Future[QuorateError]":
        if self._send_failed is None:
            self._send_failed = asyncio.get_running_loop().create_future()
            self._tell_failed()
        return self._send_failed

    def _tell_failed(self) -> None:
        error = self._send_error
        if self._send_failed is not None and not self._send_failed.done() and error is not None:
            self._send_failed.set_result(error)

    @property
    def unsent_bytes(self) -> int:
        return self._connection.engine.unacknowledged_bytes(self.id)

    async def flush(self, left_bytes: int = 0) -> None:
        while self.unsent_bytes > left_bytes and self._send_error is None:
            self._connection.check_open()
            await self._wait_below(left_bytes)
        # A stopped stream waits for nothing any more, and yet not everything was acknowledged.
        if self._send_error is not None and (
            self.unsent_bytes > left_bytes or isinstance(self._send_error, StoppedByPeer)
        ):
            raise self._send_error.again()

    async def finish(self) -> None:
        if self._send_ended or self._send_error is not None:
            return
        self._send_ended = True
        self._connection.write(self, b"", end=True)
        self._connection.forget_if_done(self)

    def reset(self, code: int) -> None:
        check_code(code)
        if self._send_error is not None or self._connection.is_closed:
            return
        self._send_ended = True
        self._connection.reset(self, code)
        self.on_acknowledged()
        self._connection.forget_if_done(self)

    @property
    def send_is_over(self) -> bool:
        """Whether nothing more will be handed over."""
        return self._send_ended or self._send_error is not None

    def _check_can_send(self) -> None:
        if self._send_error is not None:
            raise self._send_error.again()
        if self._send_ended:
            raise RuntimeError(f"stream {self.id} was finished or reset: nothing can be sent on it any more")
        self._connection.check_open()

    async def _wait_for_room(self) -> None:
        """Sleeps until the stream's own buffer and that of its class are half empty."""
        await self._wait_below(self._connection.engine.write_bytes_high // 2, of_class=True)

    async def _wait_below(self, low_bytes: int, *, of_class: bool = False) -> None:
        if self._send_error is not None:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._send_waiters[waiter] = (low_bytes, of_class)
        self._connection.watch_writes(self, of_class=of_class)
        try:
            await waiter
        finally:
            del self._send_waiters[waiter]
            if not self._send_waiters:
                self._connection.unwatch_writes(self)

    # From the connection:

    def on_acknowledged(self) -> None:
        unsent_bytes = self.unsent_bytes if self._send_error is None else 0
        has_room = self.send_is_over or not self._connection.is_over_write_low(self._priority)
        for waiter, (low_bytes, of_class) in self._send_waiters.items():
            if unsent_bytes <= low_bytes and (has_room or not of_class) and not waiter.done():
                waiter.set_result(None)

    def on_send_failed(self, error: QuorateError) -> None:
        if self._send_error is None:
            self._send_error = error
            self._tell_failed()
        self.on_acknowledged()


class QuicReceiveStream(ReceiveStream):
    """The receiving half: chunks that the engine delivered and nobody has read."""

    _receive_ended = False
    _receive_error: QuorateError | None = None
    _stopped = False
    _receive_waiter: asyncio.Future[None] | None = None

    def __init__(self, connection: "QuicConnection", stream_id: int) -> None:
        self._init_receive(connection, stream_id)

    def _init_receive(self, connection: "QuicConnection", stream_id: int) -> None:
        self._connection = connection
        self.id = stream_id
        self._unread: deque[bytes] = deque()

    async def receive(self, max_bytes: int = 65_536) -> bytes:
        if max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
        while not self._unread:
            if self._receive_ended:
                return b""
            if self._receive_error is not None:
                raise self._receive_error.again()
            if self._receive_waiter is not None:
                raise RuntimeError(f"stream {self.id}: two tasks receive at once")
            self._receive_waiter = asyncio.get_running_loop().create_future()
            try:
                await self._receive_waiter
            finally:
                self._receive_waiter = None
        chunk = self._take(max_bytes)
        self._connection.consumed(self.id, len(chunk))
        return chunk

    def _take(self, max_bytes: int) -> bytes:
        """What is unread, up to so many bytes. Packets are small beside what a reader asks for."""
        unread = self._unread
        chunk = unread.popleft()
        if len(chunk) < max_bytes and unread:
            parts = [chunk]
            room = max_bytes - len(chunk)
            while unread and len(unread[0]) <= room:
                room -= len(unread[0])
                parts.append(unread.popleft())
            return b"".join(parts)
        if len(chunk) > max_bytes:
            unread.appendleft(chunk[max_bytes:])
            chunk = chunk[:max_bytes]
        return chunk

    def stop(self, code: int) -> None:
        check_code(code)
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
            unread = self._unread
            if unread and len(unread[-1]) < _SMALL_CHUNK_BYTES:
                unread[-1] += data
            else:
                unread.append(data)
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

"""A QUIC connection as asyncio sees it: turns what the engine reports into streams and wake-ups.

The endpoint owns the socket and the turn: it feeds datagrams in, then asks every connection that
something happened to, once per loop turn, for what may leave.
"""

import asyncio
import weakref
from collections import deque
from typing import Final, Protocol

from quorate_protocol.errors import (
    Code,
    ConnectionClosed,
    DatagramTooLarge,
    QuorateError,
    ResetByPeer,
    StoppedByPeer,
)
from quorate_protocol.limits import CLASS_WRITE_BYTES_HIGH, DATAGRAM_QUEUE_MAX, STREAM_WRITE_BYTES_HIGH
from quorate_protocol.transport.address import format_address
from quorate_protocol.transport.api import (
    BiStream,
    Buffer,
    Connection,
    ConnectionStats,
    Datagrams,
    Priority,
    ReceiveStream,
    SendStream,
)
from quorate_protocol.transport.engine import Address, Engine
from quorate_protocol.transport.stream import QuicBiStream, QuicReceiveStream, QuicSendStream, check_code, flat

#: How many ids of incoming streams are kept before those of finished streams are looked for.
_HANDED_OUT_MIN: Final = 64


class Driver(Protocol):
    """What a connection needs of its endpoint."""

    def wants_turn(self, connection: "QuicConnection") -> None:
        """Something may have to be sent or a timer armed: serve this connection at the end of the turn."""

    def wants_turn_at_once(self, connection: "QuicConnection") -> None:
        """As `wants_turn`, and the turn may be now, inside the call."""

    def wants_turn_soon(self, connection: "QuicConnection") -> None:
        """As `wants_turn`, but some milliseconds may pass, in which other things to send may come along."""

    def serve_now(self, connection: "QuicConnection") -> None:
        """As `wants_turn`, and the turn is now."""

    def connection_id_issued(self, connection: "QuicConnection", connection_id: bytes) -> None:
        """Route datagrams for this id here."""

    def connection_id_retired(self, connection: "QuicConnection", connection_id: bytes) -> None:
        """Do not any more."""

    def handshake_completed(self, connection: "QuicConnection") -> None:
        """The connection may be handed out."""

    def connection_closed(self, connection: "QuicConnection") -> None:
        """The connection is over for its users; the engine may linger."""


class QuicDatagrams(Datagrams):
    """Bounded on both sides; the oldest is dropped and counted."""

    def __init__(self, connection: "QuicConnection") -> None:
        self._connection = connection
        self._unread: deque[bytes] = deque()
        self.unread_dropped = 0
        self._waiter: asyncio.Future[None] | None = None

    @property
    def max_bytes(self) -> int:
        return self._connection.engine.datagram_bytes_max

    def send(self, data: Buffer) -> None:
        connection = self._connection
        connection.check_open()
        payload = data if type(data) is bytes else bytes(flat(data))
        if len(payload) > self.max_bytes:
            raise DatagramTooLarge(len(payload), self.max_bytes)
        connection.send_datagram(payload)

    async def receive(self) -> bytes:
        while not self._unread:
            self._connection.check_open()
            if self._waiter is not None:
                raise RuntimeError("two tasks receive datagrams at once")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._unread.popleft()

    # From the connection:

    def on_datagram(self, data: bytes) -> None:
        if len(self._unread) >= DATAGRAM_QUEUE_MAX:
            self._unread.popleft()
            self.unread_dropped += 1
            self._connection.count_dropped()
        self._unread.append(data)
        self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class QuicConnection(Connection):
    """Implements `Connection` over an `Engine`; also the engine's `Sink`."""

    def __init__(self, engine: Engine, driver: Driver, address: Address, *, is_client: bool) -> None:
        self.engine = engine
        self.address = address
        self.is_client = is_client
        self.stats = ConnectionStats()
        self.datagrams: QuicDatagrams = QuicDatagrams(self)
        #: Ids under which the endpoint routes to this connection.
        self.connection_ids: set[bytes] = set()
        self.is_established = False
        #: The endpoint's marks: waits for its send pass; the last one ended at its limit.
        self.in_turn = False
        self.has_more_to_send = False
        #: Something was written on a stream over NORMAL since the last pass.
        self.is_urgent = False
        self._driver = driver
        self._protocol = ""
        self._close_error: ConnectionClosed | None = None
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._streams: dict[int, QuicSendStream | QuicReceiveStream] = {}
        self._incoming_bi: deque[QuicBiStream] = deque()
        self._incoming_uni: deque[QuicReceiveStream] = deque()
        #: Tasks that wait for an incoming stream, for the peer's stream limit, or for the handshake.
        self._waiters: set[asyncio.Future[None]] = set()
        #: Streams with tasks that wait for acknowledgements.
        self._writers: dict[int, QuicSendStream] = {}
        #: Those of them that wait until the buffer of their class is half empty, by class.
        self._cap_writers: tuple[dict[int, QuicSendStream], ...] = tuple({} for _ in Priority)
        #: Streams that are over for us and not yet for the peer, as long as somebody holds them: whoever
        #: flushes one has to hear that it was stopped, or that the connection has ended.
        self._ended: weakref.WeakValueDictionary[int, QuicSendStream] = weakref.WeakValueDictionary()
        #: Ids of the streams that the peer opened and that were handed out: an event for one that is
        #: here and not in `_streams` comes after its end for us.
        self._handed_out: set[int] = set()
        self._handed_out_max = _HANDED_OUT_MIN

    # --- Connection ---

    @property
    def peer(self) -> str:
        return format_address(self.address)

    @property
    def protocol(self) -> str:
        return self._protocol

    def __repr__(self) -> str:
        state = "closed" if self.is_closed else "open" if self.is_established else "connecting"
        return f"<{type(self).__name__} to {self.peer}, {state}>"

    async def open_bi_stream(self, priority: Priority = Priority.NORMAL) -> BiStream:
        priority = Priority(priority)
        stream = QuicBiStream(self, await self._open(bidirectional=True, priority=priority), priority)
        self._remember(stream)
        return stream

    async def open_uni_stream(self, priority: Priority = Priority.NORMAL) -> SendStream:
        priority = Priority(priority)
        stream = QuicSendStream(self, await self._open(bidirectional=False, priority=priority), priority)
        self._remember(stream)
        return stream

    async def accept_bi_stream(self) -> BiStream:
        while not self._incoming_bi:
            await self._wait_for_change()
        stream = self._incoming_bi.popleft()
        self._accepted(stream.id)
        return stream

    async def accept_uni_stream(self) -> ReceiveStream:
        while not self._incoming_uni:
            await self._wait_for_change()
        stream = self._incoming_uni.popleft()
        self._accepted(stream.id)
        return stream

    async def close(self, code: int = Code.NO_ERROR, reason: str = "") -> None:
        if self._close_error is None:
            # A stream that was reset just now is more than one that ends with its connection.
            self._driver.serve_now(self)
        self.abort(code, reason)
        # The loop may stop right after this.
        self._driver.serve_now(self)

    def abort(self, code: int = Code.NO_ERROR, reason: str = "") -> None:
        check_code(code)
        if self._close_error is not None:
            return
        self.engine.close(code, reason)
        self.closed(ConnectionClosed(code, reason))
        self._driver.wants_turn(self)

    async def wait_closed(self) -> None:
        await asyncio.shield(self._closed)

    @property
    def is_closed(self) -> bool:
        return self._close_error is not None

    @property
    def close_error(self) -> ConnectionClosed | None:
        return self._close_error

    def check_open(self) -> None:
        """Raises what ended the connection, if it is over."""
        if self._close_error is not None:
            # Without the traces of whoever was told before: they would pile up, and keep their frames.
            raise self._close_error.again()

    async def wait_established(self) -> None:
        """Returns when the handshake is complete.

        Raises:
            ConnectionClosed: it failed.
        """
        while not self.is_established:
            await self._wait_for_change()

    async def _open(self, *, bidirectional: bool, priority: Priority) -> int:
        while True:
            self.check_open()
            if self.engine.can_open_stream(bidirectional=bidirectional):
                return self.engine.open_stream(bidirectional=bidirectional, priority=priority)
            await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        self.check_open()
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    # --- for streams ---

    def write(
        self, stream: QuicSendStream, data: bytes | memoryview, end: bool = False, *, hurried: bool = True
    ) -> None:
        if self._close_error is None:
            self.engine.write(stream.id, data, end)
            if hurried:
                if stream.priority < Priority.NORMAL:
                    self.is_urgent = True
                self._driver.wants_turn_at_once(self)
            else:
                self._driver.wants_turn_soon(self)

    def reset(self, stream: QuicSendStream, code: int) -> None:
        self.engine.reset(stream.id, code)
        # What it held has made room.
        self._wake_writers(stream.priority)
        self._driver.wants_turn(self)

    def stop(self, stream_id: int, code: int) -> None:
        if self._close_error is None:
            self.engine.stop(stream_id, code)
            self._driver.wants_turn(self)

    def consumed(self, stream_id: int, count: int) -> None:
        if self._close_error is None and self.engine.consumed(stream_id, count):
            self._driver.wants_turn(self)

    def send_datagram(self, data: bytes) -> None:
        self.engine.send_datagram(data)
        self.stats.datagrams_sent += 1
        self.count_dropped()
        self._driver.wants_turn_at_once(self)

    def count_dropped(self) -> None:
        self.stats.datagrams_dropped = self.datagrams.unread_dropped + self.engine.datagrams_dropped

    def watch_writes(self, stream: QuicSendStream, *, of_class: bool) -> None:
        self._writers[stream.id] = stream
        if of_class:
            self._cap_writers[stream.priority][stream.id] = stream

    def unwatch_writes(self, stream: QuicSendStream) -> None:
        self._writers.pop(stream.id, None)
        self._cap_writers[stream.priority].pop(stream.id, None)

    def priority_changed(self, stream: QuicSendStream, before: Priority) -> None:
        """Moves a stream to its new class, and with it whoever waits for room in the class."""
        self.engine.set_priority(stream.id, stream.priority)
        if self._cap_writers[before].pop(stream.id, None) is not None:
            self._cap_writers[stream.priority][stream.id] = stream
            stream.on_acknowledged()
        # It has made room where it was.
        self._wake_writers(before)

    def _wake_writers(self, priority: Priority) -> None:
        waiting = self._cap_writers[priority]
        if waiting and not self.is_over_write_low(priority):
            for stream in list(waiting.values()):
                stream.on_acknowledged()

    def is_write_full(self, stream: QuicSendStream) -> bool:
        """Whether a writer of this stream should sleep: its own buffer or that of its class is full."""
        engine = self.engine
        held_bytes = engine.unacknowledged_bytes(stream.id)
        # Above the least mark only: where the path takes more, the stream's mark is higher.
        if held_bytes >= STREAM_WRITE_BYTES_HIGH and held_bytes >= engine.write_bytes_high:
            return True
        return engine.unacknowledged_class_bytes(stream.priority) >= CLASS_WRITE_BYTES_HIGH

    def is_over_write_low(self, priority: Priority) -> bool:
        """Whether the buffer of this class is more than half full."""
        return self.engine.unacknowledged_class_bytes(priority) > CLASS_WRITE_BYTES_HIGH // 2

    def forget_if_done(self, stream: QuicSendStream | QuicReceiveStream) -> None:
        """Drops the stream from the books once both of its halves are over."""
        if (not isinstance(stream, QuicSendStream) or stream.send_is_over) and (
            not isinstance(stream, QuicReceiveStream) or stream.receive_is_over
        ):
            self._streams.pop(stream.id, None)
            self.stats.streams_open = len(self._streams)
            if isinstance(stream, QuicSendStream) and stream.unsent_bytes:
                self._ended[stream.id] = stream

    def _accepted(self, stream_id: int) -> None:
        if self._close_error is None and self.engine.release_stream(stream_id):
            self._driver.wants_turn(self)

    def _remember(self, stream: QuicSendStream | QuicReceiveStream) -> None:
        self._streams[stream.id] = stream
        self.stats.streams_open = len(self._streams)

    # --- for the endpoint ---

    def receive_udp(self, datagram: bytes, address: Address, now: float) -> None:
        """Feeds one UDP datagram to the engine. `after_input` is owed after a batch."""
        stats = self.stats
        stats.udp_datagrams_received += 1
        stats.bytes_received += len(datagram)
        if self.engine.receive(datagram, address, now):
            stats.received_at = now
            self.address = address

    def after_input(self) -> None:
        """Passes on what the engine reports and wakes senders whose bytes were acknowledged."""
        self.engine.report(self)
        self.stats.rtt_s = self.engine.rtt_s
        self.stats.rtt_least_s = self.engine.rtt_least_s
        self.stats.udp_payload_bytes = self.engine.udp_payload_bytes
        for priority, waiting in zip(Priority, self._cap_writers, strict=True):
            if waiting:
                self._wake_writers(priority)

    def after_output(self) -> None:
        """Passes on what a send pass made the engine report: new connection ids, mostly."""
        self.engine.report(self)

    # --- Sink ---

    def handshake_completed(self, protocol: str) -> None:
        self._protocol = protocol
        self.is_established = True
        self._wake()
        self._driver.handshake_completed(self)

    def stream_data_received(self, stream_id: int, data: bytes, end: bool) -> None:
        stream = self._streams.get(stream_id)
        if stream is None:
            stream = self._incoming(stream_id)
        if not isinstance(stream, QuicReceiveStream):
            # We have forgotten it, having stopped it; its bytes still count as consumed.
            self.consumed(stream_id, len(data))
            return
        stream.on_data(data, end)
        if end:
            self.forget_if_done(stream)

    def stream_reset(self, stream_id: int, code: int) -> None:
        stream = self._streams.get(stream_id) or self._incoming(stream_id)
        if isinstance(stream, QuicReceiveStream):
            stream.on_receive_failed(ResetByPeer(code))
            self.forget_if_done(stream)

    def stream_stopped(self, stream_id: int, code: int) -> None:
        stream = self._streams.get(stream_id) or self._ended.get(stream_id) or self._incoming(stream_id)
        if isinstance(stream, QuicSendStream):
            stream.on_send_failed(StoppedByPeer(code))
            self.forget_if_done(stream)

    def stream_acknowledged(self, stream_id: int) -> None:
        if (stream := self._writers.get(stream_id)) is not None:
            stream.on_acknowledged()

    def streams_available(self) -> None:
        self._wake()

    def datagram_received(self, data: bytes) -> None:
        self.stats.datagrams_received += 1
        self.datagrams.on_datagram(data)

    def connection_id_issued(self, connection_id: bytes) -> None:
        self.connection_ids.add(connection_id)
        self._driver.connection_id_issued(self, connection_id)

    def connection_id_retired(self, connection_id: bytes) -> None:
        self.connection_ids.discard(connection_id)
        self._driver.connection_id_retired(self, connection_id)

    def closed(self, error: ConnectionClosed) -> None:
        if self._close_error is not None:
            return
        self._close_error = error
        for stream in (*self._streams.values(), *self._ended.values()):
            self._fail(stream, error)
        self._streams.clear()
        self._writers.clear()
        for waiting in self._cap_writers:
            waiting.clear()
        self.stats.streams_open = 0
        self.datagrams.wake()
        self._wake()
        if not self._closed.done():
            self._closed.set_result(None)
        self._driver.connection_closed(self)

    @staticmethod
    def _fail(stream: QuicSendStream | QuicReceiveStream, error: QuorateError) -> None:
        if isinstance(stream, QuicSendStream):
            stream.on_send_failed(error)
        if isinstance(stream, QuicReceiveStream):
            stream.on_receive_failed(error)

    def _incoming(self, stream_id: int) -> QuicSendStream | QuicReceiveStream | None:
        """The stream that the peer opens with this event; None for one of the past.

        The lowest bits of an id tell who opened the stream and its directions (RFC 9000, 2.1).
        """
        opened_by_client = stream_id & 1 == 0
        if opened_by_client == self.is_client or stream_id in self._handed_out or self._close_error is not None:
            return None
        if len(self._handed_out) >= self._handed_out_max:
            # The engine reports nothing more of a stream that it has dropped.
            self._handed_out = {known for known in self._handed_out if self.engine.has_stream(known)}
            self._handed_out_max = max(_HANDED_OUT_MIN, 2 * len(self._handed_out))
        self._handed_out.add(stream_id)
        self.engine.hold_stream(stream_id)
        stream: QuicBiStream | QuicReceiveStream
        if stream_id & 2 == 0:
            stream = QuicBiStream(self, stream_id, Priority.NORMAL)
            self._incoming_bi.append(stream)
        else:
            stream = QuicReceiveStream(self, stream_id)
            self._incoming_uni.append(stream)
        self._remember(stream)
        self._wake()
        return stream

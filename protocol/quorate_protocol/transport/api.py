"""What a link looks like to everything above it: connections, streams, datagrams, a server.

Links differ in how they move bytes (raw QUIC, WebTransport, WebSocket, memory), never in this.
All of it belongs to one event loop; nothing is thread-safe.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

from quorate_protocol.errors import Code, QuorateError, ServerClosed
from quorate_protocol.limits import UDP_PAYLOAD_BYTES_MIN

#: What can be sent: anything with the buffer protocol whose bytes are contiguous.
Buffer: TypeAlias = bytes | bytearray | memoryview


class Priority(IntEnum):
    """Sending class of a stream. Lower values go first."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How a client decides that the server is who it should be. Verification cannot be turned off."""

    #: PEM file of the authorities to trust; None trusts the system's.
    ca_file: Path | None = None
    #: Name that the certificate must carry; None is the host of the URL, and `localhost` for `memory:NAME`.
    server_name: str | None = None

    def __post_init__(self) -> None:
        if self.ca_file is not None:
            object.__setattr__(self, "ca_file", Path(self.ca_file))


@dataclass(frozen=True, slots=True)
class ServerTls:
    """What a server shows to its clients."""

    #: PEM file: the certificate, then its chain.
    certificate_file: Path
    #: PEM file of the private key.
    key_file: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "certificate_file", Path(self.certificate_file))
        object.__setattr__(self, "key_file", Path(self.key_file))


@dataclass(slots=True)
class ConnectionStats:
    """Counters of one connection; they only grow, except the gauges named so."""

    bytes_sent: int = 0
    bytes_received: int = 0
    udp_datagrams_sent: int = 0
    udp_datagrams_received: int = 0
    datagrams_sent: int = 0
    datagrams_received: int = 0
    #: Application datagrams that were dropped because their queue was full, either direction.
    datagrams_dropped: int = 0
    #: Gauge: streams that are open now.
    streams_open: int = 0
    #: Gauge: smoothed round-trip time in seconds; 0 until measured.
    rtt_s: float = 0.0
    #: Gauge: the least round-trip time that was measured, in seconds; 0 until measured.
    rtt_least_s: float = 0.0
    #: Gauge: largest UDP payload that is sent now: what path MTU discovery has come to.
    udp_payload_bytes: int = UDP_PAYLOAD_BYTES_MIN
    #: Gauge: the loop's time when a packet last came from the peer.
    received_at: float = field(default=0.0)


@dataclass(slots=True)
class ServerStats:
    """Counters of one listening endpoint; they only grow, except the gauges named so."""

    #: Gauge: connections that live now, handshakes included.
    connections: int = 0
    #: Gauge: handshakes that are not complete.
    handshakes: int = 0
    udp_datagrams_received: int = 0
    udp_datagrams_sent: int = 0
    bytes_received: int = 0
    bytes_sent: int = 0
    #: Datagrams for no known connection: scans, garbage, and the tails of connections that are gone.
    udp_datagrams_unknown: int = 0
    #: Of these, those that were told so: their senders went on with a connection of an earlier life (RFC 9000, 10.3).
    stateless_resets_sent: int = 0
    #: Datagrams that the kernel would not take; QUIC sends their content again.
    udp_datagrams_dropped: int = 0
    #: Times that the kernel took no more datagrams for a while, and sending waited.
    udp_send_blocked: int = 0
    #: 1 when the kernel has refused to cut datagrams (UDP_SEGMENT), and they leave one by one.
    udp_segmentation_refused: int = 0
    #: Handshakes turned away because too many were under way, or newcomers had had their share of the time: what
    #: might open a connection, by its size and first bit, and was dropped.
    handshakes_refused: int = 0


class SendStream(ABC):
    """The sending half of a stream."""

    id: int
    priority: Priority

    @abstractmethod
    async def send(self, data: Buffer) -> None:
        """Hands over bytes; returns when they are accepted under the write watermark.

        Raises:
            StoppedByPeer: the peer stopped this stream.
            ConnectionClosed: the connection is over.
            RuntimeError: after `finish` or `reset`, or while another task sends on it (a caller's bug).
            TypeError: not bytes, or bytes that are not contiguous.
        """

    @abstractmethod
    def send_nowait(self, data: Buffer, *, hurried: bool = True) -> None:
        """Hands over bytes without waiting, past the watermark; for messages whose number is bounded elsewhere.

        Args:
            data: what to send.
            hurried: False lets them wait some milliseconds for others to share a packet with.

        Raises: as `send`.
        """

    @property
    @abstractmethod
    def send_failed(self) -> "asyncio.Future[QuorateError]":
        """Done, with `StoppedByPeer` or `ConnectionClosed`, once nothing more can be sent because of either.

        For who waits for something else meanwhile. After `finish` or `reset` it may never be.
        """

    @property
    @abstractmethod
    def unsent_bytes(self) -> int:
        """Bytes handed over and not acknowledged by the peer's transport yet."""

    @abstractmethod
    async def flush(self, left_bytes: int = 0) -> None:
        """Returns when the peer's transport has acknowledged everything sent so far; after `reset`, at once.

        Args:
            left_bytes: so many bytes may still be unacknowledged.

        Raises:
            StoppedByPeer: the peer stopped this stream.
            ConnectionClosed: the connection is over.
        """

    @abstractmethod
    async def finish(self) -> None:
        """Ends the stream after everything sent so far. More calls do nothing."""

    @abstractmethod
    def reset(self, code: int) -> None:
        """Gives up sending: unacknowledged bytes may never arrive."""


class ReceiveStream(ABC):
    """The receiving half of a stream. Iterating yields chunks until the end.

    Whoever does not read to the end has to `stop`: unread bytes hold part of the connection's window.
    """

    id: int

    @abstractmethod
    async def receive(self, max_bytes: int = 65_536) -> bytes:
        """The next bytes, at least one and at most `max_bytes`; b"" at the end, and ever after.

        Bytes that arrived before a reset or the connection's end are returned before it is raised. After `stop`
        there is nothing more to read: b"".

        Raises:
            ResetByPeer: the peer gave up sending.
            ConnectionClosed: the connection ended before the stream.
            RuntimeError: another task receives from it (a caller's bug).
        """

    @abstractmethod
    def stop(self, code: int) -> None:
        """Gives up reading: what is unread is dropped, and the peer is asked to stop."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while data := await self.receive():
            yield data


class BiStream(SendStream, ReceiveStream):
    """Both halves."""


class Datagrams(ABC):
    """Unreliable messages beside the streams (RFC 9221)."""

    @property
    @abstractmethod
    def max_bytes(self) -> int:
        """Largest payload that `send` takes now; 0 when the peer takes none.

        1158 on a new connection. It grows when path MTU discovery finds larger packets, for which it looks once there
        is bulk on streams, and shrinks when the path does.
        """

    @abstractmethod
    def send(self, data: Buffer) -> None:
        """Queues one datagram; it may be lost, and is when the connection is closed at once.

        Raises:
            DatagramTooLarge: over `max_bytes`; nothing else is held up by it.
            ConnectionClosed: the connection is over.
        """

    @abstractmethod
    async def receive(self) -> bytes:
        """The next datagram; the oldest are dropped when nobody reads.

        Raises:
            ConnectionClosed: the connection is over and the queue is empty.
        """


class Connection(ABC):
    """One link to one peer.

    It lives until somebody closes it or nothing has come of the peer for 30 seconds; a client says something after 15
    seconds of silence, so that an idle one stays. Leaving its block (`async with`) closes it at once: `flush` what
    has to arrive before.
    """

    stats: ConnectionStats
    datagrams: Datagrams

    @property
    @abstractmethod
    def peer(self) -> str:
        """The peer's address for people, such as `127.0.0.1:52011` or `[::1]:52011`."""

    @property
    @abstractmethod
    def protocol(self) -> str:
        """The negotiated application protocol, such as `quorate/1`."""

    @abstractmethod
    async def open_bi_stream(self, priority: Priority = Priority.NORMAL) -> BiStream:
        """Opens a stream; waits while the peer's limit on open streams is reached.

        Raises:
            ConnectionClosed: the connection is over.
        """

    @abstractmethod
    async def open_uni_stream(self, priority: Priority = Priority.NORMAL) -> SendStream:
        """As `open_bi_stream`, for sending only."""

    @abstractmethod
    async def accept_bi_stream(self) -> BiStream:
        """The next stream that the peer opened.

        Raises:
            ConnectionClosed: the connection is over.
        """

    @abstractmethod
    async def accept_uni_stream(self) -> ReceiveStream:
        """As `accept_bi_stream`, for receiving only."""

    @abstractmethod
    async def close(self, code: int = Code.NO_ERROR, reason: str = "") -> None:
        """Tells the peer and ends the connection at once: what was not delivered is lost. More calls do nothing.

        Of the codes, the transport itself uses INTERNAL (an exception ended a block), BUSY (nobody accepts) and
        SHUTDOWN (the server was closed); see `quorate_protocol.errors.Code`.
        """

    @abstractmethod
    def abort(self, code: int = Code.NO_ERROR, reason: str = "") -> None:
        """As `close`, for callers that cannot await."""

    @abstractmethod
    async def wait_closed(self) -> None:
        """Returns when the connection is over, whoever ended it. `close_error` tells how."""

    @property
    @abstractmethod
    def is_closed(self) -> bool:
        """Whether the connection is over."""

    @property
    @abstractmethod
    def close_error(self) -> "Exception | None":
        """The `ConnectionClosed` that later calls raise; None while the connection lives."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(Code.NO_ERROR if error is None else Code.INTERNAL)


class Server(ABC):
    """Accepts connections. Iterating yields each one when its handshake is complete."""

    stats: ServerStats

    @property
    @abstractmethod
    def address(self) -> tuple[str, int]:
        """Host and port that are really bound: the port is chosen by the kernel where 0 was asked for."""

    @abstractmethod
    async def accept(self) -> Connection:
        """The next connection whose handshake is complete.

        Raises:
            ServerClosed: by `close`.
        """

    @abstractmethod
    def reload_tls(self, tls: ServerTls) -> None:
        """New connections are shown this certificate from now on; living ones are not touched.

        Raises:
            ConfigurationError: the files cannot be read; the old certificate stays.
        """

    @abstractmethod
    async def close(self, code: int = Code.SHUTDOWN, reason: str = "") -> None:
        """Refuses new connections and closes the living ones."""

    async def __aiter__(self) -> AsyncIterator[Connection]:
        while True:
            try:
                yield await self.accept()
            except ServerClosed:
                return

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

"""The port between our endpoint and a QUIC engine.

An engine is one QUIC connection without sockets, clocks or tasks: datagrams and times go in,
datagrams, a timer and calls to a sink come out. Everything above this port is ours; everything that
knows a particular QUIC library is below it.

The driver owes an engine, after any call that may have changed it: `report` to a sink, then
`datagrams_to_send`, then arming a timer for `timer()`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from quorate_protocol.errors import ConnectionClosed
from quorate_protocol.transport.api import ClientTls, Priority, ServerTls

#: As the socket module has it: `(host, port)` for IPv4, `(host, port, flow, scope)` for IPv6.
Address = Any


class Sink(Protocol):
    """What an engine tells its driver; called only from `Engine.report`."""

    def handshake_completed(self, protocol: str) -> None:
        """TLS is done; the peer is who it says and speaks `protocol` (ALPN)."""

    def stream_data_received(self, stream_id: int, data: bytes, end: bool) -> None:
        """The next bytes of a stream, in order; `end` with the last."""

    def stream_reset(self, stream_id: int, code: int) -> None:
        """The peer gave up sending on a stream."""

    def stream_stopped(self, stream_id: int, code: int) -> None:
        """The peer gave up reading from a stream."""

    def stream_acknowledged(self, stream_id: int) -> None:
        """The peer's transport has acknowledged bytes of a stream: `unacknowledged_bytes` is less than before."""

    def streams_available(self) -> None:
        """The peer allows more streams than before."""

    def datagram_received(self, data: bytes) -> None:
        """An unreliable message came."""

    def connection_id_issued(self, connection_id: bytes) -> None:
        """Datagrams for this id belong to this engine from now on."""

    def connection_id_retired(self, connection_id: bytes) -> None:
        """Datagrams for this id do not belong to it any more."""

    def closed(self, error: ConnectionClosed) -> None:
        """The connection is over: once, and nothing after it. The engine may linger until `is_gone`."""


class Engine(Protocol):
    """One QUIC connection. `now` is always the driver's monotonic clock in seconds."""

    #: Id under which this engine wants its datagrams, from the start.
    initial_connection_id: bytes

    def connect(self, address: Address, now: float) -> None:
        """Client: begin the handshake."""

    def receive(self, datagram: bytes, address: Address, now: float) -> bool:
        """A UDP datagram came. True when it held at least one authentic packet."""

    def was_reset(self, datagram: bytes, now: float) -> bool:
        """Whether a datagram with an unknown id says that the peer does not know this connection; it is over then."""

    def handle_timer(self, now: float) -> None:
        """The time that `timer` gave has come."""

    def timer(self) -> float | None:
        """When `handle_timer` wants to be called; None for never."""

    def datagrams_to_send(self, now: float, count_max: int) -> list[tuple[bytes, Address]]:
        """The UDP datagrams that may leave now, about `count_max` of them at the most.

        As many as that, or more, mean that there may be others: the driver asks again in its next turn.
        """

    def datagram_refused(self, datagram_bytes: int, now: float) -> None:
        """The network would not take a datagram of this size (EMSGSIZE): the path's packets are smaller."""

    def report(self, sink: Sink) -> None:
        """Tells everything that happened since the last call."""

    @property
    def is_established(self) -> bool:
        """Whether any packet of the peer has been authentic: a server forgets the engine otherwise."""

    @property
    def is_gone(self) -> bool:
        """Whether the closing or draining period (RFC 9000, 10.2) is over and the engine can be dropped."""

    @property
    def rtt_s(self) -> float:
        """Smoothed round-trip time, 0 until measured."""

    @property
    def rtt_least_s(self) -> float:
        """The least round-trip time that was measured, 0 until then."""

    def can_open_stream(self, *, bidirectional: bool) -> bool:
        """Whether the peer's limit allows one more stream."""

    def open_stream(self, *, bidirectional: bool, priority: Priority) -> int:
        """Opens a stream and returns its id."""

    def has_stream(self, stream_id: int) -> bool:
        """Whether anything may still be reported of a stream that was opened."""

    def set_priority(self, stream_id: int, priority: Priority) -> None:
        """Changes the sending class of a stream."""

    def write(self, stream_id: int, data: bytes | memoryview, end: bool = False) -> None:
        """Buffers bytes of a stream; the caller watches `unacknowledged_bytes`."""

    def unacknowledged_bytes(self, stream_id: int) -> int:
        """Bytes of a stream that were written and not acknowledged."""

    @property
    def unacknowledged_total_bytes(self) -> int:
        """The same of all the connection's streams together."""

    def unacknowledged_class_bytes(self, priority: Priority) -> int:
        """The same of all its streams of one class."""

    @property
    def write_bytes_high(self) -> int:
        """Unacknowledged bytes of a stream at which its writer should sleep: enough to keep the path full."""

    @property
    def udp_payload_bytes(self) -> int:
        """Largest UDP payload that is sent now, as discovered (RFC 8899)."""

    def reset(self, stream_id: int, code: int) -> None:
        """Gives up sending on a stream."""

    def stop(self, stream_id: int, code: int) -> None:
        """Asks the peer to give up sending on a stream."""

    def consumed(self, stream_id: int, count: int) -> bool:
        """The reader took `count` bytes. True when the peer should hear of it: its window is half used."""

    @property
    def datagram_bytes_max(self) -> int:
        """Largest unreliable message that can be sent now; 0 when the peer takes none."""

    def send_datagram(self, data: bytes) -> None:
        """Queues an unreliable message of at most `datagram_bytes_max` bytes; drops the oldest when too many wait."""

    @property
    def datagrams_dropped(self) -> int:
        """Unreliable messages that were queued and dropped before they were sent, so far."""

    def hold_stream(self, stream_id: int) -> None:
        """A stream of the peer waits to be accepted: until `release_stream`, it counts against the peer's limit."""

    def release_stream(self, stream_id: int) -> bool:
        """It was accepted. True when the peer should hear of it: it has few streams left to open."""

    def close(self, code: int, reason: str) -> None:
        """Ends the connection with an application code; a reason that is too long for a packet is cut."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A datagram for no known connection, as far as its header tells."""

    #: Where the sender wants it to go; it becomes the original destination id of a new connection.
    destination_id: bytes
    #: True when it may open a connection: a client's Initial of the least size (RFC 9000, 14.1).
    opens: bool
    #: A version negotiation packet to answer with, where the version is not ours.
    answer: bytes | None


class EngineFactory(Protocol):
    """Makes the engines of one endpoint."""

    #: Length of the connection ids that engines issue: where a short header's id ends.
    connection_id_bytes: int

    def client(self, tls: ClientTls, server_name: str, protocols: list[str]) -> Engine:
        """A client's engine.

        Raises:
            ConfigurationError: the authorities' file cannot be read.
        """

    def set_server(self, tls: ServerTls, protocols: list[str]) -> None:
        """What `server` shows to clients from now on.

        Raises:
            ConfigurationError: certificate or key cannot be read or do not fit.
        """

    def server(self, arrival: Arrival) -> Engine:
        """A server's engine for a first datagram that `opens`."""

    def reset(self, datagram: bytes) -> bytes | None:
        """What tells the sender of a packet with an unknown id that its connection is not known (RFC 9000, 10.3)."""

    def inspect(self, datagram: bytes) -> Arrival | None:
        """Reads the header of a datagram for no known connection; None for garbage."""

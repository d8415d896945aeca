"""Stock aioquic in the place of one of our engines: a peer that does what ours would not, bad if it has to be."""

import os
from collections.abc import Callable
from typing import Any

from aioquic.buffer import Buffer
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import pull_quic_header

from conformance.harness import World, make_world
from other_quic import restated
from quorate_coordinator.certificates import DevelopmentCredentials
from quorate_protocol.errors import ConnectionClosed
from quorate_protocol.transport import ALPN
from quorate_protocol.transport.engine.port import Arrival


class Peer(QuicConnection):
    """A stock connection with doors for what a well-behaved one would never send."""

    #: Transport parameters that are said instead of the true ones.
    said: dict[str, Any]

    def __init__(self, *, said: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.said = said or {}
        #: Payloads of 1-RTT packets to send, as they are.
        self.payloads: list[bytes] = []
        super().__init__(**kwargs)

    def _serialize_transport_parameters(self) -> bytes:
        return restated(super()._serialize_transport_parameters(), self.said)

    def _write_ping_frame(self, builder: Any, uids: Any = (), comment: str = "") -> None:
        super()._write_ping_frame(builder, uids, comment)
        # Behind the frame that makes the packet one that is acknowledged.
        if self.payloads and uids:
            payload = self.payloads.pop(0)
            builder._buffer.push_bytes(payload[: builder.remaining_flight_space])

    def skip_packet_numbers(self, count: int) -> None:
        """The next packet's number is as much higher as if so many had been lost."""
        self._packet_number += count

    def inject(self, payload: bytes) -> None:
        """Sends a 1-RTT packet of its own whose payload is a PING and these bytes; owed: a send pass."""
        self.payloads.append(payload)


class StockEngine:
    """A stock connection behind what the harness needs of the port."""

    #: Nobody sends it garbage before its first packet.
    is_established = True

    def __init__(self, quic: Peer) -> None:
        self.quic = quic
        self.initial_connection_id = quic.host_cid
        self.connect = quic.connect
        self.timer = quic.get_timer
        self.events: list[events.QuicEvent] = []
        self._is_closed = False

    def receive(self, datagram: bytes, address: Any, now: float) -> bool:
        self.quic.receive_datagram(datagram, address, now)
        return True

    def handle_timer(self, now: float) -> None:
        self.quic.handle_timer(now)

    def datagrams_to_send(self, now: float, count_max: int) -> list[tuple[bytes, Any]]:
        if not self.quic._network_paths:
            return []
        datagrams = self.quic.datagrams_to_send(now)
        while self.quic.payloads:
            self.quic.send_ping(len(self.quic.payloads))
            more = self.quic.datagrams_to_send(now)
            if not more:  # pacing or congestion control: later
                break
            datagrams += more
        return datagrams

    def report(self, sink: Any) -> None:
        while (event := self.quic.next_event()) is not None:
            self.events.append(event)
            if isinstance(event, events.StreamDataReceived):
                sink.stream_data_received(event.stream_id, event.data, event.end_stream)
            elif isinstance(event, events.StreamReset):
                sink.stream_reset(event.stream_id, event.error_code)
            elif isinstance(event, events.StopSendingReceived):
                sink.stream_stopped(event.stream_id, event.error_code)
            elif isinstance(event, events.DatagramFrameReceived):
                sink.datagram_received(event.data)
            elif isinstance(event, events.HandshakeCompleted):
                sink.handshake_completed(event.alpn_protocol)
            elif isinstance(event, events.ConnectionIdIssued):
                sink.connection_id_issued(event.connection_id)
            elif isinstance(event, events.ConnectionIdRetired):
                sink.connection_id_retired(event.connection_id)
            elif isinstance(event, events.ConnectionTerminated) and not self._is_closed:
                self._is_closed = True
                sink.closed(
                    ConnectionClosed(event.error_code, event.reason_phrase, transport=event.frame_type is not None)
                )

    def can_open_stream(self, *, bidirectional: bool) -> bool:
        return True

    def open_stream(self, *, bidirectional: bool, priority: Any) -> int:
        stream_id = self.quic.get_next_available_stream_id(is_unidirectional=not bidirectional)
        self.quic.send_stream_data(stream_id, b"")
        return stream_id

    def write(self, stream_id: int, data: bytes, end: bool = False) -> None:
        self.quic.send_stream_data(stream_id, data, end)

    def consumed(self, stream_id: int, count: int) -> bool:
        return False

    def hold_stream(self, stream_id: int) -> None:
        pass

    def release_stream(self, stream_id: int) -> bool:
        return False


class StockFactory:
    """Serves stock connections."""

    connection_id_bytes = 8

    def __init__(self, configuration: QuicConfiguration, said: dict[str, Any]) -> None:
        self._configuration = configuration
        self._said = said

    def inspect(self, datagram: bytes) -> Arrival:
        header = pull_quic_header(Buffer(data=datagram), host_cid_length=8)
        return Arrival(header.destination_cid, True, None)

    def server(self, arrival: Arrival) -> StockEngine:
        return StockEngine(
            Peer(
                configuration=self._configuration,
                original_destination_connection_id=arrival.destination_id,
                said=self._said,
            )
        )


def stock_world(
    make_factory: Callable[..., Any],
    credentials: DevelopmentCredentials,
    stock: str,
    *,
    said: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **path: Any,
) -> World:
    """A world with one of our engines, and a stock connection as its `"client"` or `"server"`; not connected yet.

    `said` changes the stock end's transport parameters, `options` its configuration.
    """
    configuration = QuicConfiguration(
        is_client=stock == "client",
        alpn_protocols=[ALPN],
        **{"max_datagram_frame_size": 65_536, "server_name": "localhost", **(options or {})},
    )
    if stock == "client":
        configuration.load_verify_locations(str(credentials.ca_file))
        peer = Peer(configuration=configuration, said=said)
        # It would make up an id for the server that is as short as its own (RFC 9000, 7.2: at least eight bytes).
        peer._peer_cid.cid = peer._original_destination_connection_id = os.urandom(8)
        made = {"client": StockEngine(peer)}
    else:
        configuration.load_cert_chain(credentials.tls.certificate_file, credentials.tls.key_file)
        made = {"serving": StockFactory(configuration, said or {})}
    return make_world(make_factory, credentials, **made, **path)


def frame(frame_type: int, *fields: int | bytes) -> bytes:
    """One frame as bytes: its type and integers as variable-length integers, bytes as they are."""
    buffer = Buffer(capacity=65_536)
    buffer.push_uint_var(frame_type)
    for value in fields:
        if isinstance(value, int):
            buffer.push_uint_var(value)
        else:
            buffer.push_bytes(value)
    return buffer.data

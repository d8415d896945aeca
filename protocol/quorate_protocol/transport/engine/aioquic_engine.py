"""aioquic behind the engine port: all reaches into its private names are in this file.

What differs from the stock connection, and why:

- **Read backpressure.** Stock aioquic doubles a window when bytes arrive, read or not, so that a
  sender can fill our memory. Here a stream's limit is what its reader consumed plus a fixed window
  (RFC 9000, 4.1 and 4.2), and likewise the connection's.
- **Stream limits** are stated in the handshake instead of growing one by one.
- **Closing** is told to the driver when it happens, not after the draining period.
- **Acknowledgements ride with data**: when there is something to send, a pending acknowledgement
  does not wait for its own timer and packet.
- **Datagrams** that cannot fit are refused before they are queued; stock aioquic keeps such a one at
  the head of its queue for ever.
"""

import hashlib
import inspect
import logging
from typing import Any, Final

from aioquic import tls as quic_tls
from aioquic._buffer import Buffer
from aioquic.quic import events
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.connection import QuicConnection, QuicConnectionState
from aioquic.quic.packet import QuicPacketType, encode_quic_version_negotiation, pull_quic_header
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.recovery import QuicPacketSpace
from aioquic.quic.stream import QuicStream
from aioquic.tls import CipherSuite
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from quorate_protocol.errors import ConfigurationError, ConnectionClosed
from quorate_protocol.limits import (
    CONNECTION_WINDOW_BYTES,
    STREAM_WINDOW_BYTES,
    STREAMS_MAX,
)
from quorate_protocol.transport.api import ClientTls, Priority, ServerTls
from quorate_protocol.transport.engine.port import Address, Arrival, Sink

#: Idle timeout in seconds (RFC 9000, 10.1). Sessions have leases of their own, shorter than this.
IDLE_TIMEOUT_S: Final = 30.0

#: Largest DATAGRAM frame that we take (RFC 9221, 3).
_DATAGRAM_FRAME_BYTES_MAX: Final = 65_535

#: A 1-RTT packet's header, frame header and tag around one DATAGRAM frame, at the most.
_DATAGRAM_OVERHEAD_BYTES: Final = 30

#: Unsent datagrams; the oldest goes first, because a newer pulse or event says more.
_DATAGRAMS_PENDING_MAX: Final = 256

#: Methods of aioquic that are overridden or whose inner workings the overrides rely on, with the
#: SHA-256 of their source in the pinned release: an upgrade that touches one fails a test.
RELIED_ON: Final = {
    "_unblock_streams": "cfde0b0287e2a38d7b763257535b9b535eb3e294a6fd3c29b8d9bfa012dbea5d",
    "_write_connection_limits": "02c42c5455ae1a31ba5838804b5639588e2f3700e6d714e859e0b87037ff0d39",
    "_write_stream_limits": "398d4a898f7c580f93d42cdb39885641aa8939764da68aabd054beb761df07ce",
}


def relied_on_digests() -> dict[str, str]:
    """SHA-256 of the source of each private method in `RELIED_ON`, as installed."""
    return {
        name: hashlib.sha256(inspect.getsource(getattr(QuicConnection, name)).encode()).hexdigest()
        for name in RELIED_ON
    }


class _Connection(QuicConnection):
    """A stock connection with flow control that follows the reader."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for limit in (self._local_max_streams_bidi, self._local_max_streams_uni):
            limit.value = limit.sent = STREAMS_MAX
        self.streams_were_unblocked = False
        #: Streams whose new limit has to be told to the peer. Only these are looked at.
        self.consumed_bytes: dict[int, int] = {}
        self.consumed_total_bytes = 0

    def _unblock_streams(self, is_unidirectional: bool) -> None:
        super()._unblock_streams(is_unidirectional)
        self.streams_were_unblocked = True

    def _write_connection_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace) -> None:
        # The base class doubles the limit once half of it was received. Told that nothing was
        # received, it does not; and what it then writes is the limit that `consumed` has set.
        max_data = self._local_max_data
        received, max_data.used = max_data.used, 0
        try:
            super()._write_connection_limits(builder, space)
        finally:
            max_data.used = received

    def _write_stream_limits(self, builder: QuicPacketBuilder, space: QuicPacketSpace, stream: QuicStream) -> None:
        # As above: the limit moves in `consumed` alone.
        if stream.max_stream_data_local_sent == stream.max_stream_data_local or stream.receiver.is_finished:
            return
        received, stream.receiver.highest_offset = stream.receiver.highest_offset, 0
        try:
            super()._write_stream_limits(builder, space, stream)
        finally:
            stream.receiver.highest_offset = received


class AioquicEngine:
    """One connection. Implements `Engine`."""

    def __init__(self, connection: _Connection) -> None:
        self._quic = connection
        self.initial_connection_id: bytes = connection.host_cid
        self._wrote = False
        self._close_told = False

    def connect(self, address: Address, now: float) -> None:
        self._quic.connect(address, now)

    def receive(self, datagram: bytes, address: Address, now: float) -> bool:
        before = self._quic._close_at
        self._quic.receive_datagram(datagram, address, now)
        # An authentic packet moves the idle timer; nothing else does here.
        return self._quic._close_at != before

    def handle_timer(self, now: float) -> None:
        self._quic.handle_timer(now)

    def timer(self) -> float | None:
        return self._quic.get_timer()

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Address]]:
        quic = self._quic
        if not quic._network_paths:
            return []
        if self._wrote:
            self._wrote = False
            space = quic._spaces.get(quic_tls.Epoch.ONE_RTT)
            if space is not None and space.ack_at is not None:
                space.ack_at = now
        return quic.datagrams_to_send(now)

    def report(self, sink: Sink) -> None:
        quic = self._quic
        while (event := quic.next_event()) is not None:
            if isinstance(event, events.StreamDataReceived):
                sink.stream_data_received(event.stream_id, event.data, event.end_stream)
            elif isinstance(event, events.DatagramFrameReceived):
                sink.datagram_received(event.data)
            elif isinstance(event, events.StreamReset):
                sink.stream_reset(event.stream_id, event.error_code)
            elif isinstance(event, events.StopSendingReceived):
                sink.stream_stopped(event.stream_id, event.error_code)
            elif isinstance(event, events.HandshakeCompleted):
                sink.handshake_completed(event.alpn_protocol or "")
            elif isinstance(event, events.ConnectionIdIssued):
                sink.connection_id_issued(event.connection_id)
            elif isinstance(event, events.ConnectionIdRetired):
                sink.connection_id_retired(event.connection_id)
        if quic.streams_were_unblocked:
            quic.streams_were_unblocked = False
            sink.streams_available()
        close = quic._close_event
        if close is not None and not self._close_told:
            self._close_told = True
            sink.closed(
                ConnectionClosed(
                    close.error_code,
                    close.reason_phrase,
                    by_peer=quic._state is QuicConnectionState.DRAINING,
                    transport=close.frame_type is not None,
                )
            )

    @property
    def is_established(self) -> bool:
        return self._quic._state is not QuicConnectionState.FIRSTFLIGHT

    @property
    def is_gone(self) -> bool:
        return self._quic._state is QuicConnectionState.TERMINATED

    @property
    def rtt_s(self) -> float:
        loss = self._quic._loss
        return loss._rtt_smoothed if loss._rtt_initialized else 0.0

    def can_open_stream(self, *, bidirectional: bool) -> bool:
        quic = self._quic
        if bidirectional:
            return quic._local_next_stream_id_bidi // 4 < quic._remote_max_streams_bidi
        return quic._local_next_stream_id_uni // 4 < quic._remote_max_streams_uni

    def open_stream(self, *, bidirectional: bool, priority: Priority) -> int:
        stream_id = self._quic.get_next_available_stream_id(is_unidirectional=not bidirectional)
        # Takes the id: a second call must not get the same one.
        self._quic._get_or_create_stream_for_send(stream_id)
        return stream_id

    def has_stream(self, stream_id: int) -> bool:
        return stream_id in self._quic._streams

    def set_priority(self, stream_id: int, priority: Priority) -> None:
        """Kept by the stream; this engine serves streams in turn."""

    def write(self, stream_id: int, data: bytes, end: bool = False) -> None:
        self._quic.send_stream_data(stream_id, data, end)
        self._wrote = True

    def unacknowledged_bytes(self, stream_id: int) -> int:
        stream = self._quic._streams.get(stream_id)
        if stream is None or stream.sender._reset_error_code is not None:
            return 0
        return stream.sender._buffer_stop - stream.sender._buffer_start

    def reset(self, stream_id: int, code: int) -> None:
        self._quic.reset_stream(stream_id, code)
        self._wrote = True

    def stop(self, stream_id: int, code: int) -> None:
        stream = self._quic._streams.get(stream_id)
        if stream is not None and not stream.receiver.is_finished:
            stream.receiver.stop(code)
            self._wrote = True

    def consumed(self, stream_id: int, count: int) -> bool:
        quic = self._quic
        due = False
        quic.consumed_total_bytes += count
        limit = quic._local_max_data
        if quic.consumed_total_bytes + CONNECTION_WINDOW_BYTES - limit.value >= CONNECTION_WINDOW_BYTES // 2:
            limit.value = quic.consumed_total_bytes + CONNECTION_WINDOW_BYTES
            due = True
        stream = quic._streams.get(stream_id)
        if stream is None or stream.receiver.is_finished:
            quic.consumed_bytes.pop(stream_id, None)
            return due
        taken = quic.consumed_bytes[stream_id] = quic.consumed_bytes.get(stream_id, 0) + count
        if taken + STREAM_WINDOW_BYTES - stream.max_stream_data_local >= STREAM_WINDOW_BYTES // 2:
            stream.max_stream_data_local = taken + STREAM_WINDOW_BYTES
            due = True
        return due

    @property
    def datagram_bytes_max(self) -> int:
        remote = self._quic._remote_max_datagram_frame_size
        if not remote:
            return 0
        return max(0, min(remote - 3, self._quic._max_datagram_size - _DATAGRAM_OVERHEAD_BYTES))

    def send_datagram(self, data: bytes) -> None:
        self._quic.send_datagram_frame(data)
        self._wrote = True
        if len(self._quic._datagrams_pending) > _DATAGRAMS_PENDING_MAX:
            self._quic._datagrams_pending.popleft()

    def close(self, code: int, reason: str) -> None:
        self._quic.close(error_code=code, reason_phrase=reason)


class AioquicFactory:
    """Implements `EngineFactory`."""

    connection_id_bytes = 8

    def __init__(self) -> None:
        self._server_configuration: QuicConfiguration | None = None
        # aioquic logs each closed or odd connection by itself; ours are told to their owners.
        logging.getLogger("quic").setLevel(logging.CRITICAL)

    def client(self, tls: ClientTls, server_name: str, protocols: list[str]) -> AioquicEngine:
        configuration = self._configuration(is_client=True, protocols=protocols)
        configuration.server_name = tls.server_name or server_name
        if tls.ca_file is not None:
            try:
                authorities = tls.ca_file.read_bytes()
                quic_tls.load_pem_x509_certificates(authorities)
                configuration.load_verify_locations(cadata=authorities)
            except (OSError, ValueError) as error:
                raise ConfigurationError("ca_file", f"cannot read authorities from {tls.ca_file}: {error}") from error
        return AioquicEngine(_Connection(configuration=configuration))

    def set_server(self, tls: ServerTls, protocols: list[str]) -> None:
        configuration = self._configuration(is_client=False, protocols=protocols)
        try:
            configuration.load_cert_chain(tls.certificate_file, tls.key_file)
        except (OSError, ValueError, IndexError, TypeError) as error:
            raise ConfigurationError(
                "tls", f"cannot read certificate {tls.certificate_file} and key {tls.key_file}: {error}"
            ) from error
        if _public_bytes(configuration.certificate.public_key()) != _public_bytes(
            configuration.private_key.public_key()
        ):
            raise ConfigurationError("tls.key_file", f"{tls.key_file} is not the key of {tls.certificate_file}")
        self._server_configuration = configuration

    def server(self, arrival: Arrival) -> AioquicEngine:
        assert self._server_configuration is not None, "set_server comes first"
        return AioquicEngine(
            _Connection(
                configuration=self._server_configuration,
                original_destination_connection_id=arrival.destination_id,
            )
        )

    def inspect(self, datagram: bytes) -> Arrival | None:
        try:
            header = pull_quic_header(Buffer(data=datagram), host_cid_length=self.connection_id_bytes)
        except ValueError:
            return None
        configuration = self._server_configuration
        if configuration is None or header.packet_type is QuicPacketType.VERSION_NEGOTIATION:
            return Arrival(header.destination_cid, False, None)
        large_enough = len(datagram) >= SMALLEST_MAX_DATAGRAM_SIZE
        if header.version is not None and header.version not in configuration.supported_versions:
            # RFC 9000, 6.1: only an answer to a datagram that could have opened a connection,
            # so that we never send more than we were sent.
            answer = (
                encode_quic_version_negotiation(
                    source_cid=header.destination_cid,
                    destination_cid=header.source_cid,
                    supported_versions=configuration.supported_versions,
                )
                if large_enough
                else None
            )
            return Arrival(header.destination_cid, False, answer)
        return Arrival(header.destination_cid, large_enough and header.packet_type is QuicPacketType.INITIAL, None)

    def _configuration(self, *, is_client: bool, protocols: list[str]) -> QuicConfiguration:
        return QuicConfiguration(
            alpn_protocols=protocols,
            is_client=is_client,
            connection_id_length=self.connection_id_bytes,
            idle_timeout=IDLE_TIMEOUT_S,
            max_data=CONNECTION_WINDOW_BYTES,
            max_stream_data=STREAM_WINDOW_BYTES,
            max_datagram_frame_size=_DATAGRAM_FRAME_BYTES_MAX,
            # AES first: it has instructions of its own in every processor that we meet.
            cipher_suites=[
                CipherSuite.AES_128_GCM_SHA256,
                CipherSuite.AES_256_GCM_SHA384,
                CipherSuite.CHACHA20_POLY1305_SHA256,
            ],
        )


def _public_bytes(key: Any) -> bytes:
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded

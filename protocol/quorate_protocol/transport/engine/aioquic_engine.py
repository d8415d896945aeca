"""aioquic behind the engine port.

`quic_connection` changes how a connection sends and what it lets its peer send; here it is fitted to
the port, and its closing is told to the driver when it happens, not after the draining period.
"""

import logging
import os
import ssl
from typing import Any, Final

from aioquic._buffer import Buffer
from aioquic.quic import events
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.connection import QuicConnectionState
from aioquic.quic.packet import QuicPacketType, encode_quic_version_negotiation, pull_quic_header
from aioquic.tls import CipherSuite
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509 import load_pem_x509_certificates

from quorate_protocol.errors import ConfigurationError, ConnectionClosed
from quorate_protocol.limits import (
    CONNECTION_WINDOW_BYTES,
    STREAM_WINDOW_BYTES,
    STREAM_WRITE_BYTES_HIGH,
    UDP_PAYLOAD_BYTES_MAX,
    UDP_PAYLOAD_BYTES_MIN,
)
from quorate_protocol.transport.api import ClientTls, Priority, ServerTls
from quorate_protocol.transport.engine.port import Address, Arrival, Sink
from quorate_protocol.transport.engine.quic_connection import Connection
from quorate_protocol.transport.engine.receiving import CONNECTION_ID_BYTES
from quorate_protocol.transport.engine.resets import ResetKey
from quorate_protocol.transport.engine.writing import DATAGRAM_OVERHEAD_BYTES

#: Idle timeout in seconds (RFC 9000, 10.1). Sessions have leases of their own, shorter than this.
IDLE_TIMEOUT_S: Final = 30.0

#: Largest DATAGRAM frame that we take (RFC 9221, 3).
_DATAGRAM_FRAME_BYTES_MAX: Final = 65_535

#: Unsent datagrams; the oldest goes first, because a newer pulse or event says more.
_DATAGRAMS_PENDING_MAX: Final = 256

#: Longest reason of a close in UTF-8 bytes: its frame has to fit one packet of the least size.
_REASON_BYTES_MAX: Final = 1000

#: Certificates that fit aioquic's buffer for handshake messages (16 KiB), with what is beside them.
_CHAIN_BYTES_MAX: Final = 14_000

#: Shortest id that a client may make up for a server (RFC 9000, 7.2): of shorter ones, two would be alike.
_MADE_UP_ID_BYTES_MIN: Final = 8


class AioquicEngine:
    """One connection. Implements `Engine`."""

    def __init__(self, connection: Connection) -> None:
        self._quic = connection
        self.initial_connection_id: bytes = connection.host_cid
        self._close_told = False

    def connect(self, address: Address, now: float) -> None:
        self._quic.connect(address, now)

    def receive(self, datagram: bytes, address: Address, now: float) -> bool:
        quic = self._quic
        before = quic.packets_received
        quic.receive_datagram(datagram, address, now)
        quic.note_packet(now)
        return quic.packets_received != before

    def was_reset(self, datagram: bytes, now: float) -> bool:
        return self._quic.was_reset(datagram, now)

    def handle_timer(self, now: float) -> None:
        keepalive_at = self._quic.keepalive_at
        if keepalive_at is not None and keepalive_at <= now:
            self._quic.send_ping(0)
        self._quic.handle_timer(now)

    def timer(self) -> float | None:
        at = self._quic.get_timer()
        keepalive_at = self._quic.keepalive_at
        return at if at is None or keepalive_at is None else min(at, keepalive_at)

    def datagrams_to_send(self, now: float, count_max: int) -> list[tuple[bytes, Address]]:
        quic = self._quic
        if not quic._network_paths or not quic.has_something_to_send(now):
            return []
        return quic.datagrams_to_send(now, count_max)

    def datagram_refused(self, datagram_bytes: int, now: float) -> None:
        self._quic.datagram_refused(datagram_bytes, now)

    def report(self, sink: Sink) -> None:
        quic = self._quic
        waiting = quic._events
        while waiting:
            event = waiting.popleft()
            if isinstance(event, events.StreamDataReceived):
                if event.end_stream:
                    quic.note_end(event.stream_id)
                sink.stream_data_received(event.stream_id, event.data, event.end_stream)
            elif isinstance(event, events.DatagramFrameReceived):
                sink.datagram_received(event.data)
            elif isinstance(event, events.StreamReset):
                quic.note_end(event.stream_id)
                sink.stream_reset(event.stream_id, event.error_code)
            elif isinstance(event, events.StopSendingReceived):
                sink.stream_stopped(event.stream_id, event.error_code)
            elif isinstance(event, events.HandshakeCompleted):
                sink.handshake_completed(event.alpn_protocol or "")
            elif isinstance(event, events.ConnectionIdIssued):
                sink.connection_id_issued(event.connection_id)
            elif isinstance(event, events.ConnectionIdRetired):
                sink.connection_id_retired(event.connection_id)
        if quic.acknowledged_streams:
            acknowledged, quic.acknowledged_streams = quic.acknowledged_streams, set()
            for stream_id in acknowledged:
                sink.stream_acknowledged(stream_id)
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

    @property
    def rtt_least_s(self) -> float:
        loss = self._quic._loss
        return loss._rtt_min if loss._rtt_initialized else 0.0

    def can_open_stream(self, *, bidirectional: bool) -> bool:
        quic = self._quic
        if bidirectional:
            return quic._local_next_stream_id_bidi // 4 < quic._remote_max_streams_bidi
        return quic._local_next_stream_id_uni // 4 < quic._remote_max_streams_uni

    def open_stream(self, *, bidirectional: bool, priority: Priority) -> int:
        return self._quic.open_stream(bidirectional=bidirectional, priority=priority)

    def has_stream(self, stream_id: int) -> bool:
        return stream_id in self._quic._streams

    def set_priority(self, stream_id: int, priority: Priority) -> None:
        self._quic.set_priority(stream_id, priority)

    def write(self, stream_id: int, data: bytes | memoryview, end: bool = False) -> None:
        self._quic.write(stream_id, data, end)

    def unacknowledged_bytes(self, stream_id: int) -> int:
        stream = self._quic._streams.get(stream_id)
        return stream.sender._buffer_stop - stream.sender._buffer_start if stream is not None else 0

    @property
    def unacknowledged_total_bytes(self) -> int:
        return sum(account.held_bytes for account in self._quic.accounts)

    def unacknowledged_class_bytes(self, priority: Priority) -> int:
        return self._quic.accounts[priority].held_bytes

    @property
    def write_bytes_high(self) -> int:
        window = self._quic._loss._cc.congestion_window
        return max(STREAM_WRITE_BYTES_HIGH, window + window // 2)

    @property
    def udp_payload_bytes(self) -> int:
        return self._quic.mtu.size_bytes

    def reset(self, stream_id: int, code: int) -> None:
        self._quic.reset(stream_id, code)

    def stop(self, stream_id: int, code: int) -> None:
        self._quic.stop(stream_id, code)

    def consumed(self, stream_id: int, count: int) -> bool:
        return self._quic.consumed(stream_id, count)

    @property
    def datagram_bytes_max(self) -> int:
        remote = self._quic._remote_max_datagram_frame_size
        if not remote:
            return 0
        return max(0, min(remote - 3, self._quic._max_datagram_size - DATAGRAM_OVERHEAD_BYTES))

    def send_datagram(self, data: bytes) -> None:
        self._quic.send_datagram_frame(data)
        if len(self._quic._datagrams_pending) > _DATAGRAMS_PENDING_MAX:
            self._quic._datagrams_pending.popleft()
            self._quic.datagrams_dropped += 1

    @property
    def datagrams_dropped(self) -> int:
        return self._quic.datagrams_dropped

    def hold_stream(self, stream_id: int) -> None:
        self._quic.hold(stream_id)

    def release_stream(self, stream_id: int) -> bool:
        return self._quic.release(stream_id)

    def close(self, code: int, reason: str) -> None:
        reason = reason.encode(errors="replace")[:_REASON_BYTES_MAX].decode(errors="ignore")
        self._quic.close(error_code=code, reason_phrase=reason)


class AioquicFactory:
    """Implements `EngineFactory`."""

    connection_id_bytes = CONNECTION_ID_BYTES

    def __init__(self, udp_payload_bytes_max: int = UDP_PAYLOAD_BYTES_MAX, *, reset_key: bytes | None = None) -> None:
        """Makes a factory.

        Args:
            udp_payload_bytes_max: where path MTU discovery stops.
            reset_key: a server's secret, from which its stateless resets are made; None makes one.
        """
        if udp_payload_bytes_max not in range(UDP_PAYLOAD_BYTES_MIN, UDP_PAYLOAD_BYTES_MAX + 1):
            raise ConfigurationError(
                "udp_payload_bytes_max",
                f"must be a whole number from {UDP_PAYLOAD_BYTES_MIN} to {UDP_PAYLOAD_BYTES_MAX}, "
                f"is {udp_payload_bytes_max}",
            )
        self._udp_payload_bytes_max = udp_payload_bytes_max
        self._reset_key = ResetKey(reset_key or os.urandom(32))
        self._server_configuration: QuicConfiguration | None = None
        # aioquic logs each closed or odd connection by itself; ours are told to their owners.
        logging.getLogger("quic").setLevel(logging.CRITICAL)

    def client(self, tls: ClientTls, server_name: str, protocols: list[str]) -> AioquicEngine:
        configuration = self._configuration(is_client=True, protocols=protocols)
        configuration.server_name = tls.server_name or server_name
        if tls.ca_file is None:
            # Those of the system, where aioquic would take its own bundle; with none there, it does.
            paths = ssl.get_default_verify_paths()
            configuration.load_verify_locations(cafile=paths.cafile, capath=paths.capath)
        else:
            try:
                authorities = load_pem_x509_certificates(tls.ca_file.read_bytes())
            except (OSError, ValueError) as error:
                raise ConfigurationError("ca_file", f"cannot read authorities from {tls.ca_file}: {error}") from error
            # Written anew, because aioquic's own reader takes neither blank lines nor carriage returns.
            pem = b"".join(authority.public_bytes(Encoding.PEM) for authority in authorities)
            configuration.load_verify_locations(cadata=pem)
        return AioquicEngine(Connection(configuration=configuration, udp_payload_bytes_max=self._udp_payload_bytes_max))

    def set_server(self, tls: ServerTls, protocols: list[str]) -> None:
        configuration = self._configuration(is_client=False, protocols=protocols)
        try:
            certificate, *chain = load_pem_x509_certificates(tls.certificate_file.read_bytes())
            public_key = _public_bytes(certificate.public_key())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise ConfigurationError(
                "tls.certificate_file", f"cannot read a certificate from {tls.certificate_file}: {error}"
            ) from error
        try:
            private_key = load_pem_private_key(tls.key_file.read_bytes(), None)
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise ConfigurationError("tls.key_file", f"cannot read a key from {tls.key_file}: {error}") from error
        if public_key != _public_bytes(private_key.public_key()):
            raise ConfigurationError("tls.key_file", f"{tls.key_file} is not the key of {tls.certificate_file}")
        chain_bytes = sum(len(one.public_bytes(Encoding.DER)) for one in (certificate, *chain))
        if chain_bytes > _CHAIN_BYTES_MAX:
            raise ConfigurationError(
                "tls.certificate_file",
                f"the {len(chain) + 1} certificates in {tls.certificate_file} take {chain_bytes} bytes; "
                f"a handshake carries {_CHAIN_BYTES_MAX}",
            )
        configuration.certificate = certificate
        configuration.certificate_chain = chain
        configuration.private_key = private_key
        self._server_configuration = configuration

    def server(self, arrival: Arrival) -> AioquicEngine:
        assert self._server_configuration is not None, "set_server comes first"
        return AioquicEngine(
            Connection(
                configuration=self._server_configuration,
                original_destination_connection_id=arrival.destination_id,
                udp_payload_bytes_max=self._udp_payload_bytes_max,
                reset_key=self._reset_key,
            )
        )

    def reset(self, datagram: bytes) -> bytes | None:
        return self._reset_key.reset(datagram, datagram[1 : 1 + self.connection_id_bytes])

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
        opens = (
            header.packet_type is QuicPacketType.INITIAL
            and large_enough
            and len(header.destination_cid) >= _MADE_UP_ID_BYTES_MIN
        )
        return Arrival(header.destination_cid, opens, None)

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

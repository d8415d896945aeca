"""The receiving side of a connection: a short way for what nearly all packets are.

In a connection whose handshake is confirmed, nearly every packet is a short header packet for the
current connection id, from the current address, under the current keys, and holds STREAM, ACK and
DATAGRAM frames. Those are handled here with what RFC 9000 and 9001 ask for and nothing else; every
other packet and frame goes the way of aioquic, from its start.
"""

import math
from typing import Any, Final

from aioquic._buffer import Buffer, BufferReadError
from aioquic.quic import events
from aioquic.quic.connection import (
    END_STATES,
    QuicConnection,
    QuicConnectionError,
    QuicConnectionState,
    QuicNetworkPath,
    QuicReceiveContext,
)
from aioquic.quic.packet import QuicErrorCode, QuicFrameType
from aioquic.quic.recovery import MAX_ACK_RANGES
from aioquic.quic.stream import StreamFinishedError
from aioquic.tls import Epoch
from cryptography.exceptions import InvalidTag

from quorate_protocol.transport.engine.recovery import Recovery

#: Length of the connection ids that we issue.
CONNECTION_ID_BYTES: Final = 8

#: Where a short header's packet number begins (RFC 9000, 17.3.1), and the sample for header protection (RFC
#: 9001, 5.4.2).
_NUMBER_AT: Final = 1 + CONNECTION_ID_BYTES
_SAMPLE_AT: Final = _NUMBER_AT + 4
_SHORT_PACKET_BYTES_MIN: Final = _SAMPLE_AT + 16

#: Longest TLS message: a chain of a dozen certificates.
TLS_MESSAGE_BYTES_MAX: Final = 64 << 10

#: RFC 9001, 4.8: the TLS alert unexpected_message as a transport error.
_UNEXPECTED_TLS_MESSAGE: Final = QuicErrorCode.CRYPTO_ERROR + 10


class ReceivingConnection(QuicConnection):
    """See the module."""

    _loss: Recovery

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        #: When the last datagram came or left.
        self.clock = 0.0
        #: Authentic packets; those that came beside another in one datagram are not all counted.
        self.packets_received = 0
        #: Whether the handshake is confirmed and there is one path, which is validated.
        self._is_steady = False
        self._context: QuicReceiveContext | None = None
        #: When the idle timer was last moved: once for all the packets of a batch.
        self._idle_moved_at = -1.0
        #: The first packet of the key phase, and the keys of the one before, until when they serve.
        self._phase_began_at = 0
        self._old_aead: Any = None
        self._old_aead_ends_at = 0.0
        #: Datagrams that came after we closed.
        self._packets_since_close = 0
        #: 1-RTT: the packet number space and its keys.
        self._space: Any = None
        self._crypto: Any = None

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        self._space = self._spaces[Epoch.ONE_RTT]
        self._crypto = self._cryptos[Epoch.ONE_RTT]

    def receive_datagram(self, data: bytes, addr: Any, now: float) -> None:
        """Takes in one UDP datagram."""
        self.clock = now
        if not data:
            return
        if self._state is QuicConnectionState.CLOSING:
            self._packets_since_close += 1
            if addr == self._network_paths[0].addr:
                self._network_paths[0].bytes_received += len(data)
            return
        if self._is_steady and not data[0] & 0x80 and self._receive_short(data, addr, now):
            return
        path = self._network_paths[0] if self._network_paths else None
        before = self._authentic_marks()
        aead = self._crypto.recv.aead if self._crypto is not None else None
        super().receive_datagram(data, addr, now)
        if aead is not None and self._crypto.recv.aead is not aead:
            self._keys_updated(aead, now + 3 * self._loss.get_probe_timeout())
        if self._state is not QuicConnectionState.FIRSTFLIGHT and self._authentic_marks() != before:
            self.packets_received += 1
        paths = self._network_paths
        if path is not None and paths[0] is not path:
            self._path_changed(path, paths[0])
        self._look_whether_steady(now)

    def _keys_updated(self, before: Any, ends_at: float) -> None:
        """Another key phase has begun: packets under the keys before may come until then."""
        self._phase_began_at = self._packet_number
        self._old_aead = before
        self._old_aead_ends_at = ends_at

    def _look_whether_steady(self, now: float) -> None:
        """Whether the handshake is confirmed and the path in use validated, and nothing is to be said on others.

        Those stay known after a change of address; nothing that came from one but is not the peer's may cost the
        connection its short way.
        """
        paths = self._network_paths
        self._is_steady = (
            self._handshake_confirmed
            and self._state is QuicConnectionState.CONNECTED
            and self._quic_logger is None
            and paths[0].is_validated
            and not any(
                other.remote_challenges or not (other.is_validated or other.local_challenge_sent) for other in paths[1:]
            )
        )
        if self._is_steady:
            self._context = QuicReceiveContext(
                epoch=Epoch.ONE_RTT,
                host_cid=self.host_cid,
                network_path=paths[0],
                quic_logger_frames=None,
                time=now,
                version=None,
            )

    def _authentic_marks(self) -> tuple[Any, ...]:
        """What an authentic packet moves: the idle timer, or, at the same time as another, its space."""
        return self._close_at, self._space and self._space.largest_received_packet

    def _idle_timeout(self) -> float:
        """RFC 9000, 10.1: three probe timeouts at the least, which are far below on a path of less than a second."""
        timeout_s = self._configuration.idle_timeout
        if self._remote_max_idle_timeout is not None:
            timeout_s = min(timeout_s, self._remote_max_idle_timeout)
        loss = self._loss
        if timeout_s > 20.0 and loss._rtt_smoothed < 1.0 and loss._rtt_variance < 1.0:
            return timeout_s
        # A peer that acknowledges late must not stretch it at will.
        return max(timeout_s, min(3 * loss.get_probe_timeout(), 2 * timeout_s))

    def _path_changed(self, old: QuicNetworkPath, new: QuicNetworkPath) -> None:
        """The peer has moved to another address."""

    def _receive_short(self, data: bytes, addr: Any, now: float) -> bool:
        """Takes in a short header packet; False, and nothing has changed, when it is not of the usual kind."""
        context = self._context
        assert context is not None
        if (
            data[1:_NUMBER_AT] != self.host_cid
            or addr != context.network_path.addr
            or len(data) < _SHORT_PACKET_BYTES_MIN
            or self._state is not QuicConnectionState.CONNECTED
            or self._close_pending
        ):
            return False
        keys = self._crypto.recv
        mask = keys.hp._mask(data[_SAMPLE_AT:_SHORT_PACKET_BYTES_MIN])
        first = data[0] ^ mask[0] & 0x1F
        # Reserved bits are an error (RFC 9000, 17.3.1).
        if first & 0x18:
            return False
        aead = keys.aead
        is_late = (first >> 2 & 1) != keys.key_phase
        if is_late:
            # Sent before the last key update, or the peer begins another.
            if self._old_aead is None or now >= self._old_aead_ends_at:
                return False
            aead = self._old_aead
        number_bytes = (first & 3) + 1
        payload_at = _NUMBER_AT + number_bytes
        truncated = int.from_bytes(data[_NUMBER_AT:payload_at], "big") ^ int.from_bytes(
            mask[1 : 1 + number_bytes], "big"
        )
        space = self._space
        # RFC 9000, A.3: the number that is closest to the expected one.
        number_window = 1 << 8 * number_bytes
        expected = space.expected_packet_number - (number_window >> 1)
        number = expected + (truncated - expected) % number_window
        if number < 0:
            number += number_window
        try:
            plain = aead._aead.decrypt(
                (aead._iv ^ number).to_bytes(12, "big"),
                data[payload_at:],
                b"%c%b%b" % (first, self.host_cid, truncated.to_bytes(number_bytes, "big")),
            )
        except InvalidTag:
            return not is_late
        if not is_late and self._old_aead_ends_at == math.inf:
            # The peer has followed our update: what it sent before is on its way for a while only (RFC 9001, 6.5).
            self._old_aead_ends_at = now + 3 * self._loss.get_probe_timeout()
        # RFC 9000, 12.3: duplicates are dropped.
        if number in space.received_packets:
            return True
        if number >= space.expected_packet_number:
            space.expected_packet_number = number + 1
        if number > self._spin_highest_pn:
            # RFC 9000, 17.4.
            self._spin_bit = bool(first & 0x20) is not self._is_client
            self._spin_highest_pn = number
        self.packets_received += 1
        context.time = now
        try:
            is_ack_eliciting, _ = self._payload_received(context, plain)
        except QuicConnectionError as error:
            self.close(error_code=error.error_code, frame_type=error.frame_type, reason_phrase=error.reason_phrase)
            return True
        if self._close_pending or self._state in END_STATES:
            return True
        if self._network_paths[0] is not context.network_path:
            # A client has gone over to the server's preferred address (RFC 9000, 9.6).
            self._path_changed(context.network_path, self._network_paths[0])
            self._look_whether_steady(now)
        if now != self._idle_moved_at:
            self._idle_moved_at = now
            self._close_at = now + self._idle_timeout()
        self._ack_eliciting_sent_since_receipt = False
        self._note_received(space, number, now)
        if is_ack_eliciting and space.ack_at is None:
            space.ack_at = now + self._ack_delay
        return True

    @staticmethod
    def _note_received(space: Any, number: int, now: float) -> None:
        """Remembers a packet: to acknowledge it, and to know it when it comes again."""
        if number > space.largest_received_packet:
            space.largest_received_packet = number
            space.largest_received_time = now
        space.received_packets.add(number)
        ranges = space.ack_queue._RangeSet__ranges
        if not ranges:
            ranges.append(range(number, number + 1))
        elif ranges[-1].stop == number:
            ranges[-1] = range(ranges[-1].start, number + 1)
        else:
            space.ack_queue.add(number)
            if len(ranges) > MAX_ACK_RANGES:
                space.ack_queue.shift()

    def _payload_received(
        self, context: QuicReceiveContext, plain: bytes, crypto_frame_required: bool = False
    ) -> tuple[bool, bool]:
        """Handles a packet's frames; whether it wants an acknowledgement, and whether it only probes a path."""
        if context.epoch is not Epoch.ONE_RTT or not plain:
            return self._rare_frames_received(context, plain, crypto_frame_required)
        is_ack_eliciting = False
        buf = Buffer(data=plain)
        end = len(plain)
        at = 0
        kind = plain[0]
        try:
            while at < end:
                kind = plain[at]
                if kind & 0xF8 == QuicFrameType.STREAM_BASE:
                    buf.seek(at + 1)
                    self._receive_stream_frame(context, kind, buf, at, end)
                    is_ack_eliciting = True
                elif kind == QuicFrameType.ACK:
                    buf.seek(at + 1)
                    self._handle_ack_frame(context, kind, buf)
                elif kind == QuicFrameType.DATAGRAM_WITH_LENGTH:
                    buf.seek(at + 1)
                    self._handle_datagram_frame(context, kind, buf)
                    is_ack_eliciting = True
                else:
                    rest_eliciting, is_probing = self._rare_frames_received(context, plain[at:])
                    return is_ack_eliciting or rest_eliciting, is_probing and at == 0
                at = buf.tell()
        except BufferReadError:
            raise QuicConnectionError(
                error_code=QuicErrorCode.FRAME_ENCODING_ERROR,
                frame_type=kind,
                reason_phrase="Failed to parse frame",
            ) from None
        return is_ack_eliciting, False

    def _handle_crypto_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        """A CRYPTO frame (RFC 9000, 19.6), bounded: aioquic's TLS gathers a message of any length, and copies for each
        frame what it has of it."""
        if context.epoch is Epoch.ONE_RTT and not self._is_client:
            # Tickets are for clients, and keys are updated by QUIC (RFC 9001, 6): a client has nothing to say here.
            raise QuicConnectionError(
                error_code=_UNEXPECTED_TLS_MESSAGE,
                frame_type=frame_type,
                reason_phrase="TLS message after the handshake",
            )
        super()._handle_crypto_frame(context, frame_type, buf)
        if len(self.tls._receive_buffer) > TLS_MESSAGE_BYTES_MAX:
            raise QuicConnectionError(
                error_code=QuicErrorCode.CRYPTO_BUFFER_EXCEEDED,
                frame_type=frame_type,
                reason_phrase="TLS message too long",
            )

    def _rare_frames_received(
        self, context: QuicReceiveContext, plain: bytes, crypto_frame_required: bool = False
    ) -> tuple[bool, bool]:
        try:
            return super()._payload_received(context, plain, crypto_frame_required)
        except QuicConnectionError as error:
            unknown: Any = error.frame_type
            if unknown is None:
                # To aioquic's `close` that means an application's code; 0 is a transport's, of no known frame (RFC
                # 9000, 19.19).
                error.frame_type = QuicFrameType.PADDING
            raise

    def _receive_stream_frame(self, context: QuicReceiveContext, kind: int, buf: Buffer, at: int, end: int) -> None:
        """A STREAM frame (RFC 9000, 19.8): the next bytes of a living stream, or aioquic's way for anything else."""
        stream: Any = self._streams.get(buf.pull_uint_var())
        if stream is not None:
            offset = buf.pull_uint_var() if kind & 4 else 0
            length = buf.pull_uint_var() if kind & 2 else end - buf.tell()
            receiver = stream.receiver
            stop = offset + length
            used = self._local_max_data
            if (
                offset == receiver._buffer_start
                and length
                and not receiver.has_gaps
                and not receiver.is_finished
                and receiver._final_size is None
                and stop <= stream.max_stream_data_local
                and used.used + length <= used.value
            ):
                data = buf.pull_bytes(length)
                receiver._buffer_start = receiver.highest_offset = stop
                used.used += length
                is_last = bool(kind & 1)
                if is_last:
                    receiver._final_size = stop
                    receiver.is_finished = True
                self._events.append(
                    events.StreamDataReceived(data=data, end_stream=is_last, stream_id=stream.stream_id)
                )
                return
        buf.seek(at + 1)
        try:
            self._handle_stream_frame(context, kind, buf)
        except StreamFinishedError:
            # It was dropped: a repetition of what we had.
            pass

    def _handle_ack_frame(self, context: QuicReceiveContext, frame_type: int, buf: Buffer) -> None:
        """An ACK frame (RFC 9000, 19.3)."""
        last = buf.pull_uint_var()
        delay = buf.pull_uint_var()
        count = buf.pull_uint_var()
        first = last - buf.pull_uint_var()
        ranges = [(first, last)]
        for _ in range(count):
            last = first - buf.pull_uint_var() - 2
            first = last - buf.pull_uint_var()
            ranges.append((first, last))
        if first < 0:
            raise QuicConnectionError(
                error_code=QuicErrorCode.FRAME_ENCODING_ERROR,
                frame_type=frame_type,
                reason_phrase="ACK range contains a negative packet number",
            )
        if ranges[0][1] >= self._packet_number:
            # RFC 9000, 13.1.
            raise QuicConnectionError(
                error_code=QuicErrorCode.PROTOCOL_VIOLATION,
                frame_type=frame_type,
                reason_phrase="Acknowledged a packet that was not sent",
            )
        if frame_type == QuicFrameType.ACK_ECN:
            for _ in range(3):
                buf.pull_uint_var()
        loss = self._loss
        if not loss.peer_completed_address_validation and context.epoch in (Epoch.HANDSHAKE, Epoch.ONE_RTT):
            loss.peer_completed_address_validation = True
        space = self._space if context.epoch is Epoch.ONE_RTT else self._spaces[context.epoch]
        loss.on_ack_ranges(ranges, (delay << self._remote_ack_delay_exponent) / 1e6, context.time, space)

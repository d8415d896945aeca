"""The sending side of a connection: what a send pass puts into packets, and what becomes of it.

A pass goes through the classes of streams (`lanes`), not through the streams: idle ones cost nothing.
What is rare (acknowledgements, limits, control frames) is looked at once for each pass, and bulk then
only costs its packets. A pass ends when there is nothing more to send, when congestion control, the
pacer or the peer's windows say so, or after as many datagrams as the endpoint wants at once.
"""

from typing import Any, Final

from aioquic._buffer import Buffer
from aioquic.buffer import size_uint_var
from aioquic.quic.connection import END_STATES, Limit, QuicConnectionState, QuicNetworkPath
from aioquic.quic.packet import QuicFrameType, QuicPacketType, pull_quic_transport_parameters
from aioquic.quic.packet_builder import QuicDeliveryState, QuicPacketBuilderStop
from aioquic.tls import Epoch

from quorate_protocol.limits import UDP_PAYLOAD_BYTES_MAX
from quorate_protocol.transport.engine.congestion import ALGORITHM
from quorate_protocol.transport.engine.lanes import Lanes, Stream
from quorate_protocol.transport.engine.mtu import PathMtu
from quorate_protocol.transport.engine.packet_builder import PACKETS_IN_FLIGHT_MAX, PacketBuilder
from quorate_protocol.transport.engine.receiving import ReceivingConnection
from quorate_protocol.transport.engine.recovery import Recovery

#: How long an acknowledgement may wait for something to ride with, in seconds. Below the 25 ms that
#: peers allow for (RFC 9000, 18.2), above the usual time of a small reply.
ACK_DELAY_S: Final = 0.008

#: Packets that may wait for their acknowledgement. A sender in slow start has ten under way.
ACK_EVERY_PACKETS: Final = 10

#: Frame type, stream id and value as longest variable-length integers.
_LIMIT_FRAME_CAPACITY: Final = 1 + 8 + 8

#: Room that an ACK frame of one range needs: type and four numbers.
_ACK_FRAME_CAPACITY: Final = 1 + 4 * 8

#: Around one DATAGRAM frame in a 1-RTT packet, at the most: first byte and packet number 3, the
#: peer's connection id 20 (it may change to a longer one at any time), frame header 3, tag 16.
DATAGRAM_OVERHEAD_BYTES: Final = 42

#: Transport parameter (RFC 9000, 18.2).
_MAX_UDP_PAYLOAD_SIZE: Final = 0x03

#: Timeouts in a row (RFC 9002, 6.2) after which packets larger than the least are taken to be what is lost.
_BLACK_HOLE_TIMEOUTS: Final = 2


class SendingConnection(ReceivingConnection):
    """See the module."""

    def __init__(self, *, udp_payload_bytes_max: int = UDP_PAYLOAD_BYTES_MAX, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._ack_delay = ACK_DELAY_S
        self.mtu = PathMtu(udp_payload_bytes_max)
        self._loss = Recovery(
            mtu=self.mtu,
            congestion_control_algorithm=ALGORITHM,
            initial_rtt=self._configuration.initial_rtt,
            max_datagram_size=self._max_datagram_size,
            peer_completed_address_validation=not self._is_client,
            send_probe=self._send_probe,
        )
        self._lanes = Lanes()
        #: Streams that have bytes to send and no permission to.
        self._held: dict[int, Stream] = {}
        #: Streams whose new limit has to be told to the peer.
        self._limits_due: dict[int, Stream] = {}
        #: Streams that both sides are done with, to be dropped before the next packet.
        self._finished: list[Stream] = []
        #: Streams of which something was acknowledged, or that were stopped, since it was last asked.
        self.acknowledged_streams: set[int] = set()
        #: Datagrams that were dropped before they were sent.
        self.datagrams_dropped = 0
        self._packets_since_ack = 0
        #: What told the peer that we closed, and after how many more of its datagrams it is told again.
        self._last_words: list[tuple[bytes, Any]] = []
        self._close_again_at = 1
        #: Of the pass under way; that of a steady connection is used again and again.
        self._builder: Any = None

    def note_packet(self, now: float) -> None:
        """A datagram was received: see that its acknowledgement does not wait for too long."""
        space = self._space
        if space is None or space.ack_at is None:
            return
        self._packets_since_ack += 1
        if self._packets_since_ack >= ACK_EVERY_PACKETS or len(space.ack_queue) > 1:
            space.ack_at = now

    def has_something_to_send(self, now: float) -> bool:
        """Whether a send pass may yield anything. It may say yes too often, never too rarely."""
        if not self._handshake_confirmed or self._close_pending:
            return True
        if self._state in END_STATES:
            return self._packets_since_close >= self._close_again_at
        if self._lanes or self._datagrams_pending or self._finished or not self._is_steady:
            return True
        ack_at = self._space.ack_at
        if (ack_at is not None and ack_at <= now) or self._has_control():
            return True
        # Whatever held back an earlier pass is gone, or its timer would fire for ever.
        self._pacing_at = None
        return False

    def _has_control(self) -> bool:
        """Whether any of what `_write_control` writes waits to be written."""
        if (
            self._limits_due
            or self._probe_pending
            or self._ping_pending
            or self._handshake_done_pending
            or self._retire_connection_ids
            or self._network_paths[0].remote_challenges
            or not self._crypto_streams[Epoch.ONE_RTT].sender.buffer_is_empty
        ):
            return True
        for limit in (self._local_max_data, self._local_max_streams_bidi, self._local_max_streams_uni):
            if limit.sent - limit.used < limit.value - limit.sent:
                return True
        return any(not connection_id.was_sent for connection_id in self._host_cids)

    # --- a pass ---

    def datagrams_to_send(self, now: float, count_max: int = 64) -> list[tuple[bytes, Any]]:
        """The datagrams that may leave now, some more than `count_max` at the most."""
        self.clock = now
        if self._close_pending:
            self._last_words = super().datagrams_to_send(now)
            return self._last_words
        if self._state is QuicConnectionState.CLOSING:
            return self._close_again()
        if self._state in END_STATES:
            return []
        self._pacing_at = None
        path = self._network_paths[0]
        return self._steady_pass(path, now, count_max) if self._is_steady else self._early_pass(path, now, count_max)

    def _close_again(self) -> list[tuple[bytes, Any]]:
        """Tells a peer that goes on speaking that we closed, ever more rarely (RFC 9000, 10.2.1)."""
        if self._packets_since_close < self._close_again_at:
            return []
        self._close_again_at = 2 * self._packets_since_close
        return self._last_words

    def _steady_pass(self, path: QuicNetworkPath, now: float, count_max: int) -> list[tuple[bytes, Any]]:
        datagram_bytes = self._max_datagram_size
        congestion = self._loss._cc
        room = congestion.congestion_window - congestion.bytes_in_flight
        if room < datagram_bytes:
            if self._probe_pending:
                # RFC 9002, 7: probes may exceed the window.
                room = datagram_bytes
            elif congestion.bytes_in_flight:
                # What is left of the window would make a small packet of a large one.
                room = 0
        if len(self._space.sent_packets) >= PACKETS_IN_FLIGHT_MAX:
            room = 0
        builder = self._builder
        if builder is None:
            builder = self._builder = self._new_builder(datagram_bytes)
        builder.begin_pass(
            packet_number=self._packet_number,
            peer_cid=self._peer_cid.cid,
            spin_bit=self._spin_bit,
            datagram_bytes=datagram_bytes,
            flight_bytes_max=room,
        )
        try:
            self._write_packets(builder, path, now, count_max)
        except QuicPacketBuilderStop:
            pass
        datagrams = self._flush_builder(builder=builder, network_path=path, peer_cid=b"", now=now)
        if (probe_bytes := self.mtu.next_probe_bytes(now)) is not None:
            datagrams += self._write_mtu_probe(probe_bytes, path, now)
        return datagrams

    def _early_pass(self, path: QuicNetworkPath, now: float, count_max: int) -> list[tuple[bytes, Any]]:
        """During the handshake and while the peer's address is not validated."""
        datagram_bytes = self._max_datagram_size
        builder = self._new_builder(datagram_bytes)
        room = self._loss.congestion_window - self._loss.bytes_in_flight
        if room < datagram_bytes and (self._probe_pending or self._handshake_data_stranded()):
            # RFC 9002, 7: probes may exceed the window; so may a handshake that nothing else would wake.
            room = datagram_bytes
        builder.max_flight_bytes = room
        if not path.is_validated:
            builder.max_total_bytes = path.bytes_received * 3 - path.bytes_sent
        try:
            if not self._handshake_confirmed:
                for epoch in (Epoch.INITIAL, Epoch.HANDSHAKE):
                    self._write_handshake(builder, epoch, now)
            self._write_packets(builder, path, now, count_max)
        except QuicPacketBuilderStop:
            pass
        datagrams = self._flush_builder(builder=builder, network_path=path, peer_cid=b"", now=now)
        self._builder = None
        if self._handshake_complete:
            datagrams += self._probe_paths(now)
        return datagrams

    def _new_builder(self, datagram_bytes: int) -> PacketBuilder:
        return PacketBuilder(
            host_cid=self.host_cid,
            is_client=self._is_client,
            max_datagram_size=datagram_bytes,
            packet_number=self._packet_number,
            peer_cid=self._peer_cid.cid,
            peer_token=self._peer_token,
            quic_logger=self._quic_logger,
            spin_bit=self._spin_bit,
            version=self._version or 0,
        )

    def _flush_builder(
        self, builder: Any, network_path: QuicNetworkPath, peer_cid: bytes, now: float
    ) -> list[tuple[bytes, Any]]:
        datagrams, packets = builder.flush()
        if packets:
            self._packet_number = builder.packet_number
            if self._handshake_confirmed:
                self._loss.on_packets_sent(packets, self._space, now)
            else:
                for packet in packets:
                    self._loss.on_packets_sent([packet], self._spaces[packet.epoch], now)
                if self._is_client and any(packet.epoch is Epoch.HANDSHAKE for packet in packets):
                    # RFC 9001, 4.9.1: a client discards Initial keys when it first sends a Handshake packet.
                    self._discard_epoch(Epoch.INITIAL)
            if not self._ack_eliciting_sent_since_receipt:
                for packet in packets:
                    if packet.is_ack_eliciting:
                        # RFC 9000, 10.1: the idle timer begins again with the first such packet since one was received.
                        self._close_at = now + self._idle_timeout()
                        self._ack_eliciting_sent_since_receipt = True
                        break
        address = network_path.addr
        if not network_path.is_validated:
            # Only the limit against amplification asks for it (RFC 9000, 8.1).
            network_path.bytes_sent += sum(map(len, datagrams))
        return [(datagram, address) for datagram in datagrams]

    def _probe_paths(self, now: float) -> list[tuple[bytes, Any]]:
        """Path validation on addresses other than the one in use (RFC 9000, 8.2)."""
        if self._is_client and self._handshake_confirmed and self._remote_preferred_address is not None:
            self._probe_preferred_address()
        datagrams: list[tuple[bytes, Any]] = []
        for path in self._network_paths[1:]:
            if not path.remote_challenges and (path.is_validated or path.local_challenge_sent):
                continue
            if path.peer_cid is None and self._peer_cid_available:
                path.peer_cid = self._peer_cid_available.pop(0)
            # RFC 9000, 9.5: without a connection id of its own nothing may be sent there.
            if path.peer_cid is not None:
                datagrams += self._send_probing_frames(network_path=path, now=now)
        return datagrams

    # --- packets ---

    def _write_packets(self, builder: PacketBuilder, network_path: QuicNetworkPath, now: float, count_max: int) -> None:
        """Fills packets with what there is.

        Raises:
            QuicPacketBuilderStop: the window or the path's allowance is used up.
        """
        is_early = self._crypto is None or not self._crypto.send.is_valid()
        crypto = self._cryptos[Epoch.ZERO_RTT] if is_early else self._crypto
        if not crypto.send.is_valid():
            return
        packet_type = QuicPacketType.ZERO_RTT if is_early else QuicPacketType.ONE_RTT
        if self._finished:
            self._drop_finished()
        pacer = self._loss._pacer
        credit_bytes = self._loss.pacing_credit_bytes(now)
        ack_at = None if is_early else self._space.ack_at
        # An acknowledgement that is due is not paced.
        if credit_bytes <= 0 and (ack_at is None or ack_at > now):
            self._pacing_at = pacer.next_send_time(now, 0)
            return
        self._builder = builder
        builder.start_packet(packet_type, crypto)
        if ack_at is not None and (ack_at <= now or self._lanes or self._datagrams_pending):
            self._write_ack(builder, self._space, now)
        if not self._is_steady or self._has_control():
            self._write_control(builder, network_path, now, is_early)
        while True:
            if self._datagrams_pending:
                self._write_datagrams(builder)
            if self._lanes:
                self._lanes.serve(self._write_stream)
            if builder.packet_is_empty or not (self._lanes or self._datagrams_pending or self._limits_due):
                return
            self.mtu.want()
            if builder.datagrams_built + 1 >= count_max:
                return
            builder.start_packet(packet_type, crypto)
            if builder.bytes_built >= credit_bytes:
                self._pacing_at = pacer.next_send_time(now, builder.bytes_built)
                return
            if self._limits_due:
                self._write_limits(builder)

    def _write_ack(self, builder: PacketBuilder, space: Any, now: float) -> None:
        """An ACK frame (RFC 9000, 19.3)."""
        self._packets_since_ack = 0
        if len(space.ack_queue) != 1:
            self._write_ack_frame(builder=builder, space=space, now=now)
            return
        received = space.ack_queue[0]
        buf = builder.start_ack_frame(
            _ACK_FRAME_CAPACITY, self._on_ack_delivery, (space, space.largest_received_packet)
        )
        buf.push_uint_var(received.stop - 1)
        buf.push_uint_var(int((now - space.largest_received_time) * 1e6) >> self._local_ack_delay_exponent)
        buf.push_uint_var(0)
        buf.push_uint_var(received.stop - 1 - received.start)
        space.ack_at = None

    def _write_control(self, builder: PacketBuilder, network_path: QuicNetworkPath, now: float, is_early: bool) -> None:
        """All that is rare, into the first packet of a pass."""
        if self._handshake_complete:
            self._write_path_frames(builder, network_path, now)
            for connection_id in self._host_cids:
                if not connection_id.was_sent:
                    self._write_new_connection_id_frame(builder=builder, connection_id=connection_id)
            while self._retire_connection_ids:
                self._write_retire_connection_id_frame(builder=builder, sequence_number=self._retire_connection_ids[0])
                self._retire_connection_ids.pop(0)
            for limit in (self._local_max_data, self._local_max_streams_bidi, self._local_max_streams_uni):
                if self._is_due(limit):
                    self._write_limit(builder, limit)
        self._write_limits(builder)
        if self._ping_pending:
            self._write_ping_frame(builder, self._ping_pending)
            self._ping_pending.clear()
        if self._probe_pending:
            self._write_ping_frame(builder, comment="probe")
            self._probe_pending = False
        if not is_early:
            crypto_stream = self._crypto_streams[Epoch.ONE_RTT]
            if not crypto_stream.sender.buffer_is_empty:
                self._write_crypto_frame(builder=builder, space=self._space, stream=crypto_stream)

    def _write_path_frames(self, builder: PacketBuilder, network_path: QuicNetworkPath, now: float) -> None:
        if not (network_path.is_validated or network_path.local_challenge_sent):
            self._write_path_challenge_frame(builder=builder, network_path=network_path)
            if network_path.validation_deadline is None:
                # RFC 9000, 8.2.4: three times the larger of the PTO now and that of a new path.
                network_path.validation_deadline = now + 3 * max(
                    self._loss.get_probe_timeout(), 2 * self._configuration.initial_rtt
                )
        if self._handshake_done_pending:
            self._write_handshake_done_frame(builder=builder)
            self._handshake_done_pending = False
        while network_path.remote_challenges:
            self._write_path_response_frame(builder=builder, challenge=network_path.remote_challenges[0])
            network_path.remote_challenges.popleft()

    def _is_due(self, limit: Limit) -> bool:
        """Whether the peer should be told of a limit: when it has less left than it would get.

        What it has left shrinks when it sends, too: were the limit told only when enough was consumed,
        unread streams could hold the connection's window, and with it the one that is being read.
        """
        return limit.sent - limit.used < limit.value - limit.sent

    def _write_limit(self, builder: PacketBuilder, limit: Limit) -> None:
        buf = builder.start_frame(
            limit.frame_type,
            capacity=_LIMIT_FRAME_CAPACITY,
            handler=self._on_connection_limit_delivery,
            handler_args=(limit,),
        )
        buf.push_uint_var(limit.value)
        limit.sent = limit.value

    def _write_limits(self, builder: PacketBuilder) -> None:
        while self._limits_due:
            stream_id, stream = next(iter(self._limits_due.items()))
            if not stream.receiver.is_finished:
                buf = builder.start_flight_frame(
                    QuicFrameType.MAX_STREAM_DATA, _LIMIT_FRAME_CAPACITY, self._on_max_stream_data_delivery, (stream,)
                )
                buf.push_uint_var(stream_id)
                buf.push_uint_var(stream.max_stream_data_local)
            del self._limits_due[stream_id]

    def _write_datagrams(self, builder: PacketBuilder) -> None:
        while self._datagrams_pending:
            data = self._datagrams_pending[0]
            if len(data) > self._max_datagram_size - DATAGRAM_OVERHEAD_BYTES:
                # It fitted when it was queued: the path's packets have shrunk since.
                self.datagrams_dropped += 1
            else:
                try:
                    self._write_datagram_frame(
                        builder=builder, data=data, frame_type=QuicFrameType.DATAGRAM_WITH_LENGTH
                    )
                except QuicPacketBuilderStop:
                    return
            self._datagrams_pending.popleft()

    def _write_stream(self, stream: Stream) -> bool:
        """Writes what a stream has into the packet; True when that is full and there may be more."""
        stream_id = stream.stream_id
        if stream_id not in self._streams:
            return False
        builder, sender = self._builder, stream.sender
        try:
            if stream.receiver.stop_pending:
                self._write_stop(builder, stream)
            if sender.reset_pending:
                self._write_reset(builder, stream)
        except QuicPacketBuilderStop:
            return True
        while not sender.buffer_is_empty:
            offset = sender.next_offset
            overhead = 3 + size_uint_var(stream_id) + (size_uint_var(offset) if offset else 0)
            room = builder.remaining_flight_space - overhead
            if room < 1:
                return True
            highest_before = sender.highest_offset
            frame = sender.take(
                room,
                min(
                    highest_before + self._remote_max_data - self._remote_max_data_used,
                    stream.max_stream_data_remote,
                ),
            )
            if frame is None:
                if not sender.buffer_is_empty:
                    self._held[stream_id] = stream
                return False
            offset, data, ends = frame
            buf = builder.start_flight_frame(
                0x0A | (4 if offset else 0) | (1 if ends else 0),
                overhead,
                self._on_stream_delivery,
                (stream, offset, offset + len(data), ends),
            )
            buf.push_uint_var(stream_id)
            if offset:
                buf.push_uint_var(offset)
            buf.push_uint16(len(data) | 0x4000)
            buf.push_bytes(data)
            self._remote_max_data_used += sender.highest_offset - highest_before
        return False

    def _write_stop(self, builder: PacketBuilder, stream: Stream) -> None:
        buf = builder.start_flight_frame(
            QuicFrameType.STOP_SENDING, _LIMIT_FRAME_CAPACITY, self._on_stop_delivery, (stream,)
        )
        frame = stream.receiver.get_stop_frame()
        buf.push_uint_var(frame.stream_id)
        buf.push_uint_var(frame.error_code)

    def _write_reset(self, builder: PacketBuilder, stream: Stream) -> None:
        buf = builder.start_flight_frame(
            QuicFrameType.RESET_STREAM, _LIMIT_FRAME_CAPACITY + 8, self._on_reset_delivery, (stream,)
        )
        frame = stream.sender.get_reset_frame()
        buf.push_uint_var(frame.stream_id)
        buf.push_uint_var(frame.error_code)
        buf.push_uint_var(frame.final_size)

    def _drop_finished(self) -> None:
        while self._finished:
            stream_id = self._finished.pop().stream_id
            if self._streams.pop(stream_id, None) is None:
                continue
            self._held.pop(stream_id, None)
            self._limits_due.pop(stream_id, None)
            self._lanes.forget(stream_id)
            self._stream_dropped(stream_id)

    def _stream_dropped(self, stream_id: int) -> None:
        """A stream is over on both sides and forgotten."""

    # --- what became of it ---

    def _on_stream_delivery(
        self, delivery: QuicDeliveryState, stream: Stream, start: int, stop: int, end: bool
    ) -> None:
        sender = stream.sender
        sender.on_data_delivery(delivery, start, stop, end)
        if delivery is not QuicDeliveryState.ACKED:
            if not sender.buffer_is_empty:
                self._lanes.add(stream)
            return
        self.acknowledged_streams.add(stream.stream_id)
        if sender.is_finished and stream.receiver.is_finished:
            self._finished.append(stream)

    def _on_reset_delivery(self, delivery: QuicDeliveryState, stream: Stream) -> None:
        stream.sender.on_reset_delivery(delivery)
        if delivery is not QuicDeliveryState.ACKED:
            self._lanes.add(stream)
        elif stream.is_finished:
            self._finished.append(stream)

    def _on_stop_delivery(self, delivery: QuicDeliveryState, stream: Stream) -> None:
        stream.receiver.on_stop_sending_delivery(delivery)
        if delivery is not QuicDeliveryState.ACKED:
            self._lanes.add(stream)

    def _on_max_stream_data_delivery(self, delivery: QuicDeliveryState, stream: Stream) -> None:
        if delivery is not QuicDeliveryState.ACKED and not stream.receiver.is_finished:
            self._limits_due[stream.stream_id] = stream

    # --- packet size ---

    def datagram_refused(self, datagram_bytes: int, now: float) -> None:
        """The network would not take a datagram of this size."""
        self.mtu.refused(datagram_bytes, now)
        self._follow_mtu()

    def _follow_mtu(self) -> None:
        size_bytes = self.mtu.size_bytes
        if size_bytes != self._max_datagram_size:
            self._max_datagram_size = size_bytes
            self._loss.set_segment(size_bytes)

    def _path_changed(self, old: QuicNetworkPath, new: QuicNetworkPath) -> None:
        self.mtu.begin_path()
        self._max_datagram_size = self.mtu.size_bytes
        # RFC 9000, 9.4: another port of the same address is another door of the same house.
        if old.addr[0] != new.addr[0]:
            self._loss.begin_path(self._max_datagram_size)
        else:
            self._loss.set_segment(self._max_datagram_size)

    def _write_mtu_probe(self, size_bytes: int, network_path: QuicNetworkPath, now: float) -> list[tuple[bytes, Any]]:
        """A datagram of PING and PADDING (RFC 9000, 14.4) that neither congestion control nor the timer counts."""
        builder = self._new_builder(size_bytes)
        builder.start_packet(QuicPacketType.ONE_RTT, self._crypto)
        buf = builder.start_flight_frame(QuicFrameType.PING, 1, self._on_mtu_probe_delivery, (size_bytes,))
        buf.push_bytes(bytes(builder.remaining_flight_space))
        packet = builder._packet
        packet.in_flight = packet.is_ack_eliciting = False
        self.mtu.probe_sent(size_bytes, now)
        return self._flush_builder(builder=builder, network_path=network_path, peer_cid=self._peer_cid.cid, now=now)

    def _on_mtu_probe_delivery(self, delivery: QuicDeliveryState, size_bytes: int) -> None:
        if delivery is QuicDeliveryState.ACKED:
            self.mtu.probe_acknowledged(size_bytes, self.clock)
            self._follow_mtu()
        else:
            self.mtu.probe_lost(size_bytes, self.clock)

    def _parse_transport_parameters(self, data: bytes, from_session_ticket: bool = False) -> None:
        super()._parse_transport_parameters(data, from_session_ticket)
        size_bytes = pull_quic_transport_parameters(Buffer(data=data)).max_udp_payload_size
        if size_bytes is not None:
            self.mtu.limit(size_bytes)

    def _serialize_transport_parameters(self) -> bytes:
        # RFC 9000, 18.2: whoever looks for no larger packets than this wants none either.
        buf = Buffer(16)
        buf.push_uint_var(_MAX_UDP_PAYLOAD_SIZE)
        buf.push_uint_var(size_uint_var(self.mtu.ceiling_bytes))
        buf.push_uint_var(self.mtu.ceiling_bytes)
        return super()._serialize_transport_parameters() + buf.data

    def handle_timer(self, now: float) -> None:
        """The time that `get_timer` gave has come."""
        self.clock = now
        self.mtu.expire(now)
        super().handle_timer(now)
        if self._loss._pto_count >= _BLACK_HOLE_TIMEOUTS:
            self.mtu.black_hole()
        self._follow_mtu()

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to be called."""
        if not self._is_steady or self._state in END_STATES:
            return super().get_timer()
        space, loss = self._space, self._loss
        at: float = self._close_at or 0.0
        loss_at = space.loss_time
        if loss_at is None and space.ack_eliciting_in_flight:
            # RFC 9002, 6.2.1.
            timeout_s = loss.get_probe_timeout() * 2**loss._pto_count
            loss_at = loss._time_of_last_sent_ack_eliciting_packet + timeout_s
        self._loss_at = loss_at
        for other in (loss_at, space.ack_at, self._pacing_at, self.mtu.timer()):
            if other is not None and other < at:
                at = other
        return at

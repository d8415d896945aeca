"""The frames of a connection: what is written into the packets of a pass, and what becomes of it.

What is rare (acknowledgements, limits, control frames) is written once for each pass, into its first packet;
streams write for as long as there is room, in the order of their `lanes`.
"""

from typing import Any, Final

from aioquic.buffer import size_uint_var
from aioquic.quic.connection import Limit, QuicNetworkPath
from aioquic.quic.packet import QuicFrameType
from aioquic.quic.packet_builder import QuicDeliveryState, QuicPacketBuilderStop
from aioquic.tls import Epoch

from quorate_protocol.transport.engine.lanes import Lanes, Stream
from quorate_protocol.transport.engine.packet_builder import PacketBuilder
from quorate_protocol.transport.engine.receiving import ReceivingConnection
from quorate_protocol.transport.engine.recovery import QUIET_PACKETS_MAX

#: Frame type, stream id and value as longest variable-length integers.
_LIMIT_FRAME_CAPACITY: Final = 1 + 8 + 8

#: Room that an ACK frame of one range needs: type and four numbers.
_ACK_FRAME_CAPACITY: Final = 1 + 4 * 8

#: Around one DATAGRAM frame in a 1-RTT packet, at the most: first byte and packet number 3, the
#: peer's connection id 20 (it may change to a longer one at any time), frame header 3, tag 16.
DATAGRAM_OVERHEAD_BYTES: Final = 42


class WritingConnection(ReceivingConnection):
    """See the module."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
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
        #: Whether some of our connection ids may not have been told to the peer.
        self._ids_due = True
        #: Of the pass under way; that of a steady connection is used again and again.
        self._builder: Any = None

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
        data, bidi, uni = self._local_max_data, self._local_max_streams_bidi, self._local_max_streams_uni
        return (
            self._ids_due
            # As `_is_due`, which would be three calls for each packet.
            or 2 * data.sent < data.value + data.used
            or 2 * bidi.sent < bidi.value + bidi.used
            or 2 * uni.sent < uni.value + uni.used
        )

    def _write_ack(self, builder: PacketBuilder, space: Any, now: float) -> None:
        """An ACK frame (RFC 9000, 19.3)."""
        self._packets_since_ack = 0
        if len(space.ack_queue) != 1:
            self._write_ack_frame(builder=builder, space=space, now=now)
            self._ask_now_and_then()
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
        self._ask_now_and_then()

    def _ask_now_and_then(self) -> None:
        """Sees that an end which only acknowledges is acknowledged itself."""
        if self._loss.quiet_packets >= QUIET_PACKETS_MAX and not self._ping_pending:
            self.send_ping(0)

    def _write_control(self, builder: PacketBuilder, network_path: QuicNetworkPath, now: float, is_early: bool) -> None:
        """All that is rare, into the first packet of a pass."""
        if self._handshake_complete:
            self._write_path_frames(builder, network_path, now)
            for connection_id in self._host_cids:
                if not connection_id.was_sent:
                    self._write_new_connection_id_frame(builder=builder, connection_id=connection_id)
            self._ids_due = False
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

    # --- what became of it ---

    def _on_ack_delivery(self, delivery: QuicDeliveryState, space: Any, highest_acked: int) -> None:
        """RFC 9000, 13.2.4: what the peer knows to be acknowledged need not be acknowledged again."""
        if delivery is not QuicDeliveryState.ACKED:
            return
        ranges = space.ack_queue._RangeSet__ranges
        if len(ranges) == 1 and ranges[0].start <= highest_acked < ranges[0].stop:
            ranges[0] = range(highest_acked + 1, ranges[0].stop)
            if not ranges[0]:
                ranges.clear()
        else:
            space.ack_queue.subtract(0, highest_acked + 1)

    def _replenish_connection_ids(self) -> None:
        super()._replenish_connection_ids()
        self._ids_due = True

    def _on_new_connection_id_delivery(self, delivery: QuicDeliveryState, connection_id: Any) -> None:
        super()._on_new_connection_id_delivery(delivery, connection_id)
        self._ids_due = self._ids_due or not connection_id.was_sent

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

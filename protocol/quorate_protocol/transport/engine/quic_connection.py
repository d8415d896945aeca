"""A QUIC connection of aioquic with our own sending side and flow control.

All that reaches into aioquic's private names is here and in `aioquic_engine`; `pins` lists what they
rely on. What differs from the stock connection, and why:

- **Only streams with something to send are looked at.** The stock connection walks all streams for
  every packet, so that idle ones cost as much as busy ones. Here a stream is queued when it gets
  something to send (bytes, a reset, a stop, a loss) and leaves the queue when it has nothing left or
  flow control holds it.
- **Priorities.** Four lanes, served strictly from the highest, in turn inside a lane, packet by
  packet. A lane that was passed over for `_PATIENCE_PACKETS` packets goes first once, so that none
  starves.
- **Read backpressure.** A stock window doubles when bytes arrive, read or not. Here a limit is what
  the reader consumed plus a fixed window (RFC 9000, 4.1 and 4.2).
- **Acknowledgements** ride with data; alone they wait for some milliseconds or packets (RFC 9000,
  13.2.2 leaves that to the receiver), and never when packets are missing.
- **Stream limits** are stated in the handshake instead of growing one by one. A stream of the peer
  keeps its place until it has ended and somebody has accepted it: otherwise a peer could open and end
  streams without bound while nobody looks.
- **Datagrams** that do not fit any more are dropped, instead of blocking all behind them for ever.
"""

from collections import deque
from typing import Any, Final

from aioquic import tls
from aioquic.buffer import size_uint_var
from aioquic.quic import events
from aioquic.quic.connection import Limit, QuicConnection, QuicNetworkPath, QuicReceiveContext
from aioquic.quic.packet import QuicFrameType, QuicPacketType
from aioquic.quic.packet_builder import QuicDeliveryState, QuicPacketBuilder, QuicPacketBuilderStop

from quorate_protocol.limits import CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES, STREAMS_MAX
from quorate_protocol.transport.api import Priority

#: `aioquic.quic.stream.QuicStream`. To the type checker its id may be None, which never happens here.
Stream = Any

#: How long an acknowledgement may wait for something to ride with, in seconds. Below the 25 ms that
#: peers allow for (RFC 9000, 18.2), above the usual time of a small reply.
ACK_DELAY_S: Final = 0.008

#: Packets that may wait for their acknowledgement. A sender in slow start has ten under way.
ACK_EVERY_PACKETS: Final = 10

#: Packets for which a lane may be passed over: a lower lane gets at least this part of the link.
_PATIENCE_PACKETS: Final = (0, 16, 32, 64)

#: Frame type, stream id and value as longest variable-length integers.
_LIMIT_FRAME_CAPACITY: Final = 1 + 8 + 8

#: Around one DATAGRAM frame in a 1-RTT packet, at the most: first byte and packet number 3, the
#: peer's connection id 20 (it may change to a longer one at any time), frame header 3, tag 16.
DATAGRAM_OVERHEAD_BYTES: Final = 42


class Connection(QuicConnection):
    """See the module."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._ack_delay = ACK_DELAY_S
        for limit in (self._local_max_streams_bidi, self._local_max_streams_uni):
            limit.value = limit.sent = STREAMS_MAX
        #: One queue of streams for each class; `_queued` has the ids of all that are in one.
        self._lanes: tuple[deque[Stream], ...] = tuple(deque() for _ in Priority)
        self._queued: set[int] = set()
        #: Packets in a row for which a lane had something to send and was passed over.
        self._passed_over = [0] * len(Priority)
        #: Class of each stream that has another than NORMAL.
        self._priorities: dict[int, Priority] = {}
        #: Streams that have bytes to send and no permission to.
        self._held: dict[int, Stream] = {}
        #: Streams whose new limit has to be told to the peer.
        self._limits_due: dict[int, Stream] = {}
        #: Streams that both sides are done with, to be dropped before the next packet.
        self._finished: list[Stream] = []
        self._consumed_bytes: dict[int, int] = {}
        self._consumed_total_bytes = 0
        self._packets_since_ack = 0
        #: Streams of the peer that nobody has accepted, and whether they have ended.
        self._unaccepted: dict[int, bool] = {}
        self.streams_were_unblocked = False
        #: Datagrams that were dropped before they were sent.
        self.datagrams_dropped = 0

    # --- for the engine ---

    def open_stream(self, *, bidirectional: bool, priority: Priority) -> int:
        """Takes the next id."""
        stream_id = self.get_next_available_stream_id(is_unidirectional=not bidirectional)
        self._get_or_create_stream_for_send(stream_id)
        self.set_priority(stream_id, priority)
        return stream_id

    def set_priority(self, stream_id: int, priority: Priority) -> None:
        """Moves a stream to another lane."""
        before = self._priorities.get(stream_id, Priority.NORMAL)
        if priority is before:
            return
        if priority is Priority.NORMAL:
            del self._priorities[stream_id]
        elif stream_id in self._streams:
            self._priorities[stream_id] = priority
        if stream_id in self._queued:
            stream = self._streams[stream_id]
            self._lanes[before].remove(stream)
            self._lanes[priority].append(stream)

    def write(self, stream_id: int, data: bytes, end: bool) -> None:
        """Buffers bytes."""
        self.send_stream_data(stream_id, data, end)
        stream = self._streams[stream_id]
        if stream_id not in self._held or end:
            self._queue(stream)

    def reset(self, stream_id: int, code: int) -> None:
        """Gives up sending."""
        self.reset_stream(stream_id, code)
        if (stream := self._streams.get(stream_id)) is not None:
            self._queue(stream)

    def stop(self, stream_id: int, code: int) -> None:
        """Gives up receiving."""
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.receiver.is_finished:
            stream.receiver.stop(code)
            self._queue(stream)

    def consumed(self, stream_id: int, count: int) -> bool:
        """A reader took bytes; True when the peer should hear of it."""
        due = self._credit_connection(count)
        stream = self._streams.get(stream_id)
        if stream is None or stream.receiver.is_finished:
            return due
        taken = self._consumed_bytes[stream_id] = self._consumed_bytes.get(stream_id, 0) + count
        if taken + STREAM_WINDOW_BYTES - stream.max_stream_data_local >= STREAM_WINDOW_BYTES // 2:
            stream.max_stream_data_local = taken + STREAM_WINDOW_BYTES
            self._limits_due[stream_id] = stream
            due = True
        return due

    def _credit_connection(self, count: int) -> bool:
        """Opens the connection's window by bytes that are out of our hands; True when the peer should hear of it."""
        self._consumed_total_bytes += count
        self._local_max_data.value = self._consumed_total_bytes + CONNECTION_WINDOW_BYTES
        return self._is_due(self._local_max_data)

    def note_end(self, stream_id: int) -> None:
        """The receiving half of a stream has ended."""
        stream = self._streams.get(stream_id)
        if stream is None:
            return
        # After a reset, bytes that count against the connection's window were not delivered and will not be.
        receiver = stream.receiver
        if undelivered := receiver.highest_offset - receiver.starting_offset():
            self._credit_connection(undelivered)
        if stream.is_finished:
            self._finished.append(stream)

    def hold(self, stream_id: int) -> None:
        """A stream of the peer waits to be accepted."""
        self._unaccepted[stream_id] = False

    def release(self, stream_id: int) -> bool:
        """It was accepted; True when the peer should hear that it may open another."""
        if not self._unaccepted.pop(stream_id, False):
            return False
        limit = self._stream_limit(stream_id)
        limit.value += 1
        return self._is_due(limit)

    @property
    def keepalive_at(self) -> float | None:
        """When a client has to say something lest the server forgets it; None while something is under way.

        RFC 9000, 10.1.2: an application that waits for an answer is not idle. Servers leave that to
        their clients, of which they have many.
        """
        if self._ack_eliciting_sent_since_receipt or not (self._is_client and self._handshake_confirmed):
            return None
        if self._close_at is None or self._close_event is not None:
            return None
        idle_timeout_s = self._configuration.idle_timeout
        if self._remote_max_idle_timeout is not None:
            idle_timeout_s = min(idle_timeout_s, self._remote_max_idle_timeout)
        return self._close_at - idle_timeout_s / 2

    def note_packet(self, now: float) -> None:
        """A datagram was received: see that its acknowledgement does not wait for too long."""
        space = self._spaces.get(tls.Epoch.ONE_RTT)
        if space is None or space.ack_at is None:
            return
        self._packets_since_ack += 1
        if self._packets_since_ack >= ACK_EVERY_PACKETS or len(space.ack_queue) > 1:
            space.ack_at = now

    def has_something_to_send(self, now: float) -> bool:
        """Whether a send pass may yield anything. It may say yes too often, never too rarely."""
        if not self._handshake_confirmed or self._close_pending:
            return True
        if self._queued or self._datagrams_pending or self._limits_due or self._finished:
            return True
        space = self._spaces[tls.Epoch.ONE_RTT]
        path = self._network_paths[0]
        if (
            (space.ack_at is not None and space.ack_at <= now)
            or self._probe_pending
            or self._ping_pending
            or self._handshake_done_pending
            or self._retire_connection_ids
            or path.remote_challenges
            or not path.is_validated
            or len(self._network_paths) > 1
            or not self._crypto_streams[tls.Epoch.ONE_RTT].sender.buffer_is_empty
            or not all(connection_id.was_sent for connection_id in self._host_cids)
            or self._is_due(self._local_max_data)
            or self._is_due(self._local_max_streams_bidi)
            or self._is_due(self._local_max_streams_uni)
        ):
            return True
        # Whatever held back an earlier pass is gone, or its timer would fire for ever.
        self._pacing_at = None
        return False

    def _queue(self, stream: Stream) -> None:
        if stream.stream_id not in self._queued:
            self._queued.add(stream.stream_id)
            self._lanes[self._priorities.get(stream.stream_id, Priority.NORMAL)].append(stream)

    # --- what aioquic tells ---

    def _handle_max_data_frame(self, context: QuicReceiveContext, frame_type: int, buf: Any) -> None:
        super()._handle_max_data_frame(context, frame_type, buf)
        for stream in self._held.values():
            self._queue(stream)
        self._held.clear()

    def _handle_max_stream_data_frame(self, context: QuicReceiveContext, frame_type: int, buf: Any) -> None:
        start = buf.tell()
        stream_id = buf.pull_uint_var()
        buf.seek(start)
        super()._handle_max_stream_data_frame(context, frame_type, buf)
        if (stream := self._held.pop(stream_id, None)) is not None:
            self._queue(stream)

    def _handle_stop_sending_frame(self, context: QuicReceiveContext, frame_type: int, buf: Any) -> None:
        super()._handle_stop_sending_frame(context, frame_type, buf)
        event = self._events[-1]
        assert isinstance(event, events.StopSendingReceived)
        # aioquic has reset the stream in answer (RFC 9000, 3.5): that has to be sent.
        self._held.pop(event.stream_id, None)
        self._queue(self._streams[event.stream_id])

    def _unblock_streams(self, is_unidirectional: bool) -> None:
        blocked = self._streams_blocked_uni if is_unidirectional else self._streams_blocked_bidi
        waiting: list[Stream] = list(blocked)
        super()._unblock_streams(is_unidirectional)
        for stream in waiting:
            if not stream.is_blocked:
                self._held.pop(stream.stream_id, None)
                self._queue(stream)
        self.streams_were_unblocked = True

    def _on_stream_delivery(
        self, delivery: QuicDeliveryState, stream: Stream, start: int, stop: int, end: bool
    ) -> None:
        stream.sender.on_data_delivery(delivery, start, stop, end)
        if delivery is not QuicDeliveryState.ACKED:
            if not stream.sender.buffer_is_empty:
                self._queue(stream)
        elif stream.sender.is_finished and stream.receiver.is_finished:
            self._finished.append(stream)

    def _on_reset_delivery(self, delivery: QuicDeliveryState, stream: Stream) -> None:
        stream.sender.on_reset_delivery(delivery)
        if delivery is not QuicDeliveryState.ACKED:
            self._queue(stream)
        elif stream.is_finished:
            self._finished.append(stream)

    def _on_stop_delivery(self, delivery: QuicDeliveryState, stream: Stream) -> None:
        stream.receiver.on_stop_sending_delivery(delivery)
        if delivery is not QuicDeliveryState.ACKED:
            self._queue(stream)

    def _on_max_stream_data_delivery(self, delivery: QuicDeliveryState, stream: Stream) -> None:
        if delivery is not QuicDeliveryState.ACKED and not stream.receiver.is_finished:
            self._limits_due[stream.stream_id] = stream

    # --- writing packets ---

    def _write_application(self, builder: QuicPacketBuilder, network_path: QuicNetworkPath, now: float) -> None:
        is_early = not self._cryptos[tls.Epoch.ONE_RTT].send.is_valid()
        crypto = self._cryptos[tls.Epoch.ZERO_RTT if is_early else tls.Epoch.ONE_RTT]
        if not crypto.send.is_valid():
            return
        packet_type = QuicPacketType.ZERO_RTT if is_early else QuicPacketType.ONE_RTT
        space: Any = self._spaces[tls.Epoch.ONE_RTT]
        self._drop_finished()
        while True:
            # A pending acknowledgement rides with whatever leaves. One that is due is not paced.
            ack = not is_early and space.ack_at is not None
            if not (ack and space.ack_at <= now):
                self._pacing_at = self._loss._pacer.next_send_time(now=now)
                if self._pacing_at is not None:
                    return
            if ack and space.ack_at > now and not (self._queued or self._datagrams_pending):
                ack = False
            builder.start_packet(packet_type, crypto)
            if ack:
                self._write_ack_frame(builder=builder, space=space, now=now)
                self._packets_since_ack = 0
            if self._handshake_complete:
                self._write_control(builder, network_path, now)
            self._write_limits(builder)
            if self._ping_pending:
                self._write_ping_frame(builder, self._ping_pending)
                self._ping_pending.clear()
            if self._probe_pending:
                self._write_ping_frame(builder, comment="probe")
                self._probe_pending = False
            if not is_early:
                crypto_stream = self._crypto_streams[tls.Epoch.ONE_RTT]
                if not crypto_stream.sender.buffer_is_empty:
                    self._write_crypto_frame(builder=builder, space=space, stream=crypto_stream)
            self._write_datagrams(builder)
            if self._queued:
                self._write_streams(builder)
            if builder.packet_is_empty:
                return
            self._loss._pacer.update_after_send(now=now)
            if not (self._queued or self._datagrams_pending or self._limits_due):
                return

    def _write_control(self, builder: QuicPacketBuilder, network_path: QuicNetworkPath, now: float) -> None:
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
        for connection_id in self._host_cids:
            if not connection_id.was_sent:
                self._write_new_connection_id_frame(builder=builder, connection_id=connection_id)
        while self._retire_connection_ids:
            self._write_retire_connection_id_frame(builder=builder, sequence_number=self._retire_connection_ids[0])
            self._retire_connection_ids.pop(0)
        for limit in (self._local_max_data, self._local_max_streams_bidi, self._local_max_streams_uni):
            if self._is_due(limit):
                buf = builder.start_frame(
                    limit.frame_type,
                    capacity=_LIMIT_FRAME_CAPACITY,
                    handler=self._on_connection_limit_delivery,
                    handler_args=(limit,),
                )
                buf.push_uint_var(limit.value)
                limit.sent = limit.value

    def _is_due(self, limit: Limit) -> bool:
        """Whether the peer should be told of a limit: when it has less left than it would get.

        What it has left shrinks when it sends, too: were the limit told only when enough was consumed,
        unread streams could hold the connection's window, and with it the one that is being read.
        """
        return limit.sent - limit.used < limit.value - limit.sent

    def _write_limits(self, builder: QuicPacketBuilder) -> None:
        while self._limits_due:
            stream_id, stream = next(iter(self._limits_due.items()))
            if not stream.receiver.is_finished:
                buf = builder.start_frame(
                    QuicFrameType.MAX_STREAM_DATA,
                    capacity=_LIMIT_FRAME_CAPACITY,
                    handler=self._on_max_stream_data_delivery,
                    handler_args=(stream,),
                )
                buf.push_uint_var(stream_id)
                buf.push_uint_var(stream.max_stream_data_local)
            del self._limits_due[stream_id]

    def _write_datagrams(self, builder: QuicPacketBuilder) -> None:
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

    def _write_streams(self, builder: QuicPacketBuilder) -> None:
        """Fills the packet: an impatient lane first, then by class."""
        order = [index for index, lane in enumerate(self._lanes) if lane]
        for index in order:
            if self._passed_over[index] >= _PATIENCE_PACKETS[index] > 0:
                order.remove(index)
                order.insert(0, index)
                break
        is_full = False
        for index in order:
            if is_full:
                self._passed_over[index] += 1
                continue
            self._passed_over[index] = 0
            is_full = self._write_lane(builder, self._lanes[index])

    def _write_lane(self, builder: QuicPacketBuilder, lane: deque[Stream]) -> bool:
        """Serves the lane's streams in turn; True when the packet is full."""
        while lane:
            stream = lane[0]
            stream_id = stream.stream_id
            if stream_id in self._streams and self._write_stream(builder, stream):
                lane.rotate(-1)
                return True
            lane.popleft()
            self._queued.discard(stream_id)
        return False

    def _write_stream(self, builder: QuicPacketBuilder, stream: Stream) -> bool:
        """Writes what a stream has; True when the packet is full and there may be more."""
        sender, receiver = stream.sender, stream.receiver
        try:
            if receiver.stop_pending:
                self._write_stop(builder, stream)
            if sender.reset_pending:
                self._write_reset(builder, stream)
        except QuicPacketBuilderStop:
            return True
        while not sender.buffer_is_empty:
            if stream.is_blocked:
                self._held[stream.stream_id] = stream
                return False
            offset = sender.next_offset
            overhead = 3 + size_uint_var(stream.stream_id) + (size_uint_var(offset) if offset else 0)
            room = builder.remaining_flight_space - overhead
            if room < 1:
                return True
            highest_before = sender.highest_offset
            frame = sender.get_frame(
                room,
                min(
                    highest_before + self._remote_max_data - self._remote_max_data_used,
                    stream.max_stream_data_remote,
                ),
            )
            if frame is None:
                if not sender.buffer_is_empty:
                    self._held[stream.stream_id] = stream
                return False
            buf = builder.start_frame(
                QuicFrameType.STREAM_BASE | 2 | (4 if frame.offset else 0) | (1 if frame.fin else 0),
                capacity=overhead,
                handler=self._on_stream_delivery,
                handler_args=(stream, frame.offset, frame.offset + len(frame.data), frame.fin),
            )
            buf.push_uint_var(stream.stream_id)
            if frame.offset:
                buf.push_uint_var(frame.offset)
            buf.push_uint16(len(frame.data) | 0x4000)
            buf.push_bytes(frame.data)
            self._remote_max_data_used += sender.highest_offset - highest_before
        return False

    def _write_stop(self, builder: QuicPacketBuilder, stream: Stream) -> None:
        buf = builder.start_frame(
            QuicFrameType.STOP_SENDING,
            capacity=_LIMIT_FRAME_CAPACITY,
            handler=self._on_stop_delivery,
            handler_args=(stream,),
        )
        frame = stream.receiver.get_stop_frame()
        buf.push_uint_var(frame.stream_id)
        buf.push_uint_var(frame.error_code)

    def _write_reset(self, builder: QuicPacketBuilder, stream: Stream) -> None:
        buf = builder.start_frame(
            QuicFrameType.RESET_STREAM,
            capacity=_LIMIT_FRAME_CAPACITY + 8,
            handler=self._on_reset_delivery,
            handler_args=(stream,),
        )
        frame = stream.sender.get_reset_frame()
        buf.push_uint_var(frame.stream_id)
        buf.push_uint_var(frame.error_code)
        buf.push_uint_var(frame.final_size)

    def _drop_finished(self) -> None:
        # aioquic appends every new stream to the queue that our lanes replace.
        self._streams_queue.clear()
        while self._finished:
            stream = self._finished.pop()
            stream_id = stream.stream_id
            if self._streams.pop(stream_id, None) is None:
                continue
            for book in (self._priorities, self._held, self._limits_due, self._consumed_bytes):
                book.pop(stream_id, None)
            if stream_id in self._unaccepted:
                self._unaccepted[stream_id] = True
            elif (stream_id & 1 == 0) != self._is_client:
                # The peer may open one more for each of its own that is over (RFC 9000, 4.6).
                self._stream_limit(stream_id).value += 1

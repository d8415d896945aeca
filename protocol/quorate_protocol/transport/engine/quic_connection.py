"""A QUIC connection of aioquic with our own data path and flow control.

All that reaches into aioquic's private names is in this folder; `pins` lists what it relies on. The
rooms beside this one have one subject each: `receiving` (packets in), `packet_builder` (packets out),
`recovery` and `congestion` (what was lost, how much may be under way), `mtu` (packet size), `lanes` (who
sends next), `send_buffer` and `windows` (bytes held by us and by the peer). What this one does, and why:

- **Only streams with something to send are looked at.** The stock connection walks all streams for
  every packet, so that idle ones cost as much as busy ones. Here a stream is queued when it gets
  something to send (bytes, a reset, a stop, a loss) and leaves the queue when it has nothing left or
  flow control holds it.
- **Read backpressure.** A stock window doubles when bytes arrive, read or not. Here a limit is what
  the reader consumed plus a window (RFC 9000, 4.1 and 4.2).
- **Acknowledgements** ride with data; alone they wait for some milliseconds or packets (RFC 9000,
  13.2.2 leaves that to the receiver), and never when packets are missing.
- **Stream limits** are stated in the handshake instead of growing one by one. A stream of the peer
  keeps its place until it has ended and somebody has accepted it: otherwise a peer could open and end
  streams without bound while nobody looks.
- **Datagrams** that do not fit any more are dropped, instead of blocking all behind them for ever.
"""

import hmac
from typing import Any, Final

from aioquic.quic import events
from aioquic.quic.connection import QuicConnectionError, QuicReceiveContext
from aioquic.quic.packet import QuicErrorCode, QuicFrameType
from aioquic.quic.stream import StreamFinishedError

from quorate_protocol.limits import (
    CONNECTION_WINDOW_BYTES,
    CONNECTION_WINDOW_BYTES_MAX,
    STREAM_WINDOW_BYTES,
    STREAM_WINDOW_BYTES_MAX,
    STREAMS_MAX,
)
from quorate_protocol.transport.api import Priority
from quorate_protocol.transport.engine.lanes import Stream
from quorate_protocol.transport.engine.receive_buffer import PieceCount
from quorate_protocol.transport.engine.resets import TOKEN_BYTES, ResetKey
from quorate_protocol.transport.engine.send_buffer import Account
from quorate_protocol.transport.engine.sending import SendingConnection
from quorate_protocol.transport.engine.stream_state import StreamState
from quorate_protocol.transport.engine.windows import ReceiveWindow

#: Why a connection is over that the peer does not know any more.
RESET_REASON: Final = "it was restarted and does not know this connection"


class Connection(SendingConnection):
    """See the module."""

    def __init__(self, *, reset_key: ResetKey | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        #: A server's: its connection ids are known again by who has lost everything else.
        self._reset_key = reset_key
        self._mark_connection_ids()
        for limit in (self._local_max_streams_bidi, self._local_max_streams_uni):
            limit.value = limit.sent = STREAMS_MAX
        self._windows: dict[int, ReceiveWindow] = {}
        self._window = ReceiveWindow(CONNECTION_WINDOW_BYTES, CONNECTION_WINDOW_BYTES_MAX)
        #: Streams of the peer that nobody has accepted, and whether they have ended.
        self._unaccepted: dict[int, bool] = {}
        #: What our streams hold together, by class.
        self.accounts = tuple(Account() for _ in Priority)
        #: How many pieces with gaps they keep of what came.
        self._piece_count = PieceCount()
        self.streams_were_unblocked = False

    # --- for the engine ---

    def open_stream(self, *, bidirectional: bool, priority: Priority) -> int:
        """Takes the next id, which the peer's limit has to allow."""
        if bidirectional:
            stream_id, count_max = self._local_next_stream_id_bidi, self._remote_max_streams_bidi
            self._local_next_stream_id_bidi = stream_id + 4
            local_bytes = self._local_max_stream_data_bidi_local
            remote_bytes = self._remote_max_stream_data_bidi_remote
        else:
            stream_id, count_max = self._local_next_stream_id_uni, self._remote_max_streams_uni
            self._local_next_stream_id_uni = stream_id + 4
            local_bytes, remote_bytes = 0, self._remote_max_stream_data_uni
        assert stream_id // 4 < count_max, "can_open_stream comes first"
        stream: Any = StreamState(
            stream_id,
            self.accounts[priority],
            self._piece_count,
            max_stream_data_local=local_bytes,
            max_stream_data_remote=remote_bytes,
            readable=bidirectional,
            writable=True,
        )
        self._streams[stream_id] = stream
        self._lanes.set_priority(stream, priority)
        return stream_id

    def set_priority(self, stream_id: int, priority: Priority) -> None:
        """Moves a stream to another lane."""
        stream: Stream = self._streams.get(stream_id)
        if stream is not None:
            self._lanes.set_priority(stream, priority)
            stream.sender.move_to(self.accounts[priority])

    def write(self, stream_id: int, data: bytes | memoryview, end: bool) -> None:
        """Buffers bytes."""
        stream: Stream = self._streams[stream_id]
        stream.sender.write(data, end)
        if stream_id not in self._held or end:
            self._lanes.add(stream)

    def reset(self, stream_id: int, code: int) -> None:
        """Gives up sending."""
        self.reset_stream(stream_id, code)
        if (stream := self._streams.get(stream_id)) is not None:
            self._lanes.add(stream)

    def stop(self, stream_id: int, code: int) -> None:
        """Gives up receiving."""
        stream = self._streams.get(stream_id)
        if stream is not None and not stream.receiver.is_finished:
            stream.receiver.stop(code)
            self._lanes.add(stream)

    def consumed(self, stream_id: int, count: int) -> bool:
        """A reader took bytes; True when the peer should hear of it."""
        due = self._credit_connection(count)
        stream = self._streams.get(stream_id)
        if stream is None or stream.receiver.is_finished:
            return due
        window = self._windows.get(stream_id)
        if window is None:
            window = self._windows[stream_id] = ReceiveWindow(STREAM_WINDOW_BYTES, STREAM_WINDOW_BYTES_MAX)
        window.consume(count, self.clock, self._loss._rtt_smoothed)
        limit = window.limit_bytes
        if limit - stream.max_stream_data_local >= window.size_bytes // 2:
            stream.max_stream_data_local = limit
            self._limits_due[stream_id] = stream
            # A stream alone must not find the connection's window closed before its own.
            self._window.grow(window.size_bytes + window.size_bytes // 2)
            due = True
        return due

    def _credit_connection(self, count: int) -> bool:
        """Opens the connection's window by bytes that are out of our hands; True when the peer should hear of it."""
        self._window.consume(count, self.clock, self._loss._rtt_smoothed)
        self._local_max_data.value = self._window.limit_bytes
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
        if not self._is_client or self._ack_eliciting_sent_since_receipt or not self._handshake_confirmed:
            return None
        if self._close_at is None or self._close_event is not None or self._ping_pending:
            return None
        idle_timeout_s = self._configuration.idle_timeout
        if self._remote_max_idle_timeout is not None:
            idle_timeout_s = min(idle_timeout_s, self._remote_max_idle_timeout)
        return self._close_at - idle_timeout_s / 2

    def was_reset(self, datagram: bytes, now: float) -> bool:
        """Ends the connection where the peer says that it is not known there any more (RFC 9000, 10.3.1)."""
        token = self._peer_cid.stateless_reset_token
        if not token or self._close_event is not None or not hmac.compare_digest(datagram[-TOKEN_BYTES:], token):
            return False
        self._close_event = events.ConnectionTerminated(
            error_code=QuicErrorCode.NO_ERROR, frame_type=QuicFrameType.PADDING, reason_phrase=RESET_REASON
        )
        self._close_begin(is_initiator=False, now=now)
        return True

    def _mark_connection_ids(self) -> None:
        if self._reset_key is not None:
            for connection_id in self._host_cids:
                connection_id.stateless_reset_token = self._reset_key.token(connection_id.cid)

    # --- what aioquic tells ---

    def _replenish_connection_ids(self) -> None:
        super()._replenish_connection_ids()
        self._mark_connection_ids()

    def _get_or_create_stream(self, frame_type: int, stream_id: int) -> Stream:
        if (stream := self._streams.get(stream_id)) is not None:
            return stream
        if self._stream_is_discarded(stream_id):
            raise StreamFinishedError
        if (stream_id & 1 == 0) == self._is_client:
            raise QuicConnectionError(
                error_code=QuicErrorCode.STREAM_STATE_ERROR,
                frame_type=frame_type,
                reason_phrase="Wrong stream initiator",
            )
        limit = self._stream_limit(stream_id)
        count = stream_id // 4 + 1
        if count > limit.value:
            raise QuicConnectionError(
                error_code=QuicErrorCode.STREAM_LIMIT_ERROR,
                frame_type=frame_type,
                reason_phrase="Too many streams open",
            )
        is_bidirectional = stream_id & 2 == 0
        # A stream opens all those of its kind with lower ids, too (RFC 9000, 2.1).
        for new_id in range(limit.used * 4 + stream_id % 4, stream_id + 4, 4):
            new: Any = StreamState(
                new_id,
                self.accounts[Priority.NORMAL],
                self._piece_count,
                max_stream_data_local=(
                    self._local_max_stream_data_bidi_remote if is_bidirectional else self._local_max_stream_data_uni
                ),
                max_stream_data_remote=self._remote_max_stream_data_bidi_local if is_bidirectional else 0,
                readable=True,
                writable=is_bidirectional,
            )
            self._streams[new_id] = new
        limit.used = count
        return self._streams[stream_id]

    def _handle_max_data_frame(self, context: QuicReceiveContext, frame_type: int, buf: Any) -> None:
        super()._handle_max_data_frame(context, frame_type, buf)
        for stream in self._held.values():
            self._lanes.add(stream)
        self._held.clear()

    def _handle_max_stream_data_frame(self, context: QuicReceiveContext, frame_type: int, buf: Any) -> None:
        start = buf.tell()
        stream_id = buf.pull_uint_var()
        buf.seek(start)
        super()._handle_max_stream_data_frame(context, frame_type, buf)
        if (stream := self._held.pop(stream_id, None)) is not None:
            self._lanes.add(stream)

    def _handle_stop_sending_frame(self, context: QuicReceiveContext, frame_type: int, buf: Any) -> None:
        super()._handle_stop_sending_frame(context, frame_type, buf)
        event = self._events[-1]
        assert isinstance(event, events.StopSendingReceived)
        # aioquic has reset the stream in answer (RFC 9000, 3.5): that has to be sent.
        self._held.pop(event.stream_id, None)
        self._lanes.add(self._streams[event.stream_id])
        self.acknowledged_streams.add(event.stream_id)

    def _unblock_streams(self, is_unidirectional: bool) -> None:
        super()._unblock_streams(is_unidirectional)
        self.streams_were_unblocked = True

    def _stream_dropped(self, stream_id: int) -> None:
        self._windows.pop(stream_id, None)
        if stream_id in self._unaccepted:
            self._unaccepted[stream_id] = True
        elif (stream_id & 1 == 0) != self._is_client:
            # The peer may open one more for each of its own that is over (RFC 9000, 4.6).
            self._stream_limit(stream_id).value += 1

"""What of a stream came before what precedes it.

Stands where aioquic's `QuicStreamReceiver` does, which keeps one buffer as large as the furthest gap and
walks all gaps for each frame: a peer that sends every second byte makes each of its packets dearer than
the last. Here pieces are found by bisection, and too many of them end the connection (RFC 9000, 21.7).
"""

from bisect import bisect_right
from typing import Any, Final

from aioquic.quic import events
from aioquic.quic.connection import QuicConnectionError
from aioquic.quic.packet import QuicErrorCode, QuicFrameType
from aioquic.quic.stream import FinalSizeError, QuicStreamReceiver

#: Pieces with gaps between them, of all the streams of a connection. Every second packet lost of a full window
#: (24 MiB, of 1200 bytes each) makes 10,000.
PIECES_MAX: Final = 16_384

#: A piece that is longer stays one of its own when bytes come that it follows: a peer that sends a window backwards,
#: byte by byte, would have all of it copied for each.
_JOINED_BYTES_MAX: Final = 4096


class PieceCount:
    """How many pieces all the streams of one connection keep together."""

    __slots__ = ("pieces",)

    def __init__(self) -> None:
        self.pieces = 0


class ReceiveBuffer(QuicStreamReceiver):
    """The receiving half of one stream; in-order bytes pass through it unbuffered."""

    # How all begin: opening a stream then sets what differs.
    highest_offset = 0
    stop_pending = False
    #: Offset of the next byte to deliver.
    _buffer_start = 0
    _final_size: int | None = None
    _stop_error_code: int | None = None

    def __init__(self, stream_id: int, readable: bool, count: PieceCount) -> None:
        self._count = count
        self.is_finished = not readable
        self._stream_id: int = stream_id
        #: Pieces beyond it: where they begin, ascending, and their bytes. They do not overlap.
        self._starts: list[int] = []
        self._pieces: list[bytearray] = []

    @property
    def has_gaps(self) -> bool:
        """Whether something came before what precedes it."""
        return bool(self._starts)

    def handle_frame(self, frame: Any) -> events.StreamDataReceived | None:
        """Takes in a STREAM frame.

        Raises:
            FinalSizeError: it contradicts where the stream ends (RFC 9000, 4.5).
            QuicConnectionError: there are too many gaps.
        """
        offset, data = frame.offset, frame.data
        stop = offset + len(data)
        if self._final_size is not None and (stop > self._final_size or (frame.fin and stop != self._final_size)):
            raise FinalSizeError("the stream does not end where it said")
        if frame.fin:
            if stop < self.highest_offset:
                raise FinalSizeError("the stream ends before what came of it")
            self._final_size = stop
        self.highest_offset = max(self.highest_offset, stop)
        if self.is_finished:
            return None
        if offset <= self._buffer_start:
            delivered = data[self._buffer_start - offset :]
            self._buffer_start += len(delivered)
            if self._starts and self._starts[0] <= self._buffer_start:
                delivered = self._join(delivered)
        else:
            delivered = b""
            if data:
                self._keep(offset, data)
        if self._buffer_start == self._final_size:
            self.is_finished = True
        if not delivered and not self.is_finished:
            return None
        return events.StreamDataReceived(data=delivered, end_stream=self.is_finished, stream_id=self._stream_id)

    def handle_reset(self, *, final_size: int, error_code: int = QuicErrorCode.NO_ERROR) -> events.StreamReset | None:
        """Takes in a RESET_STREAM frame; what was not delivered will not be."""
        event = super().handle_reset(final_size=final_size, error_code=error_code)
        self._count.pieces -= len(self._starts)
        self._starts.clear()
        self._pieces.clear()
        return event

    def _join(self, delivered: bytes) -> bytes:
        """Those bytes, and the pieces that they reach."""
        parts: list[bytes | bytearray] = [delivered]
        count = 0
        for start, piece in zip(self._starts, self._pieces, strict=True):
            if start > self._buffer_start:
                break
            count += 1
            if new := piece[self._buffer_start - start :]:
                parts.append(new)
                self._buffer_start += len(new)
        del self._starts[:count], self._pieces[:count]
        self._count.pieces -= count
        return b"".join(parts)

    def _keep(self, offset: int, data: bytes) -> None:
        """Puts bytes among the pieces; those that are there already win."""
        starts, pieces = self._starts, self._pieces
        stop = offset + len(data)
        at = bisect_right(starts, offset)
        if at and (end := starts[at - 1] + len(pieces[at - 1])) >= offset:
            # It continues the piece before, or is in it.
            at -= 1
            pieces[at] += data[end - offset :]
        else:
            starts.insert(at, offset)
            pieces.insert(at, bytearray(data))
            self._count.pieces += 1
            if self._count.pieces > PIECES_MAX:
                raise QuicConnectionError(
                    error_code=QuicErrorCode.INTERNAL_ERROR,
                    frame_type=QuicFrameType.STREAM_BASE,
                    reason_phrase="Too many gaps in streams",
                )
        # What it reaches of those behind it becomes one piece with it, unless that would copy much.
        piece, start = pieces[at], starts[at]
        last = at + 1
        while last < len(starts) and starts[last] <= stop:
            following, begins = pieces[last], starts[last]
            beyond = following[start + len(piece) - begins :]
            if len(beyond) > _JOINED_BYTES_MAX:
                del piece[begins - start :]
                break
            piece += beyond
            last += 1
        del starts[at + 1 : last], pieces[at + 1 : last]
        self._count.pieces -= last - at - 1

"""What a stream has to send and what the peer has not acknowledged.

Stands where aioquic's `QuicStreamSender` does. Nearly all bytes are sent once and acknowledged in
order; that costs two counters here, and sets of ranges only serve what was lost or overtaken.
"""

from collections.abc import Sequence
from typing import Any

from aioquic.quic.packet_builder import QuicDeliveryState
from aioquic.quic.rangeset import RangeSet
from aioquic.quic.stream import QuicStreamSender

#: Slices above this are taken through a memoryview, which saves a copy and costs an object.
_LARGE_SLICE_BYTES = 512


class Account:
    """Bytes that the streams of one class hold together, of one connection."""

    __slots__ = ("held_bytes",)

    def __init__(self) -> None:
        self.held_bytes = 0


class SendBuffer(QuicStreamSender):
    """The sending half of one stream. `highest_offset` is where bytes that were never sent begin."""

    # How all begin: opening a stream then sets what differs. aioquic's own would make two sets of ranges that most
    # streams never need.
    buffer_is_empty = True
    highest_offset = 0
    is_finished = False
    reset_pending = False
    _acked_fin = False
    _buffer_fin: int | None = None
    _buffer_start = 0
    _buffer_stop = 0
    _pending_eof = False
    _reset_error_code: int | None = None
    #: Ranges that were acknowledged before what precedes them, and those that were sent and lost.
    _acked: Any = ()
    _lost: Sequence[range] = ()

    def __init__(self, stream_id: int, account: Account) -> None:
        self._buffer = bytearray()
        self._stream_id = stream_id
        self._account = account

    @property
    def held_bytes(self) -> int:
        """Bytes that were written and not acknowledged."""
        return self._buffer_stop - self._buffer_start

    def move_to(self, account: Account) -> None:
        """From now on its bytes are counted there."""
        self._account.held_bytes -= self.held_bytes
        account.held_bytes += self.held_bytes
        self._account = account

    @property
    def next_offset(self) -> int:
        """Where the next frame begins."""
        return self._lost[0].start if len(self._lost) else self.highest_offset

    def write(self, data: bytes | memoryview, end_stream: bool = False) -> None:
        """Adds bytes, or the end.

        Raises:
            RuntimeError: after the end or a reset.
        """
        if self._buffer_fin is not None or self._reset_error_code is not None:
            raise RuntimeError("nothing can be sent after the end or a reset")
        if data:
            self._buffer += data
            self._buffer_stop += len(data)
            self._account.held_bytes += len(data)
            self.buffer_is_empty = False
        if end_stream:
            self._buffer_fin = self._buffer_stop
            self._pending_eof = True
            self.buffer_is_empty = False

    def take(self, size_max: int, offset_max: int) -> tuple[int, bytes, bool] | None:
        """The next frame: its offset, bytes and whether it ends the stream; None when there is none.

        Args:
            size_max: bytes that fit the packet, at least one.
            offset_max: up to where flow control lets it reach; lost bytes have had that permission.
        """
        if len(self._lost):
            lost = self._lost[0]
            start, stop = lost.start, min(lost.stop, lost.start + size_max)
            assert isinstance(self._lost, RangeSet)
            self._lost.subtract(start, stop)
        else:
            start = self.highest_offset
            stop = min(self._buffer_stop, start + size_max, offset_max)
            if stop <= start:
                if start < self._buffer_stop:
                    return None
                self.buffer_is_empty = True
                if not self._pending_eof:
                    return None
                self._pending_eof = False
                return start, b"", True
            self.highest_offset = stop
        first, last = start - self._buffer_start, stop - self._buffer_start
        if stop - start > _LARGE_SLICE_BYTES:
            with memoryview(self._buffer) as view:
                data = bytes(view[first:last])
        else:
            data = bytes(self._buffer[first:last])
        ends = stop == self._buffer_fin
        if ends:
            self._pending_eof = False
        self.buffer_is_empty = (
            self.highest_offset == self._buffer_stop and not self._pending_eof and not len(self._lost)
        )
        return start, data, ends

    def on_data_delivery(self, delivery: QuicDeliveryState, start: int, stop: int, fin: bool) -> None:
        """What became of a frame."""
        if self._reset_error_code is not None:
            return
        if delivery is not QuicDeliveryState.ACKED:
            start = max(start, self._buffer_start)
            if stop > start:
                self._lost = _with(self._lost, start, stop)
                self.buffer_is_empty = False
            if fin:
                self._pending_eof = True
                self.buffer_is_empty = False
            return
        if stop > start:
            if start == self._buffer_start and not len(self._acked):
                self._release(stop)
            else:
                self._acked = acked = _with(self._acked, start, stop)
                if acked[0].start == self._buffer_start:
                    self._release(acked.shift().stop)
        if fin:
            self._acked_fin = True
        if self._acked_fin and self._buffer_start == self._buffer_fin:
            self.is_finished = True

    def reset(self, error_code: int = 0) -> None:
        """Gives up: nothing is sent again, and nothing is held."""
        super().reset(error_code)
        if self._reset_error_code is not None:
            self.discard()

    def discard(self) -> None:
        """Lets go of all bytes; nothing more is sent."""
        self._account.held_bytes -= self.held_bytes
        self._buffer_start = self._buffer_stop
        self._buffer.clear()
        self._lost = self._acked = ()
        self.buffer_is_empty = True

    def _release(self, stop: int) -> None:
        count = stop - self._buffer_start
        del self._buffer[:count]
        self._buffer_start = stop
        self._account.held_bytes -= count


def _with(ranges: Sequence[range], start: int, stop: int) -> RangeSet:
    """The ranges with one more: the same set, or the first."""
    if not isinstance(ranges, RangeSet):
        ranges = RangeSet()
    ranges.add(start, stop)
    return ranges

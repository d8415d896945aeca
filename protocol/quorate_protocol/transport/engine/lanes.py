"""Which stream sends next: four classes, strict between them but for aging, in turn inside one. Pure."""

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from quorate_protocol.transport.api import Priority

#: `aioquic.quic.stream.QuicStream`. To the type checker its id may be None, which never happens here.
Stream = Any

#: Packets for which a lane may be passed over: a lower lane gets at least this part of the link.
PATIENCE_PACKETS: Final = (0, 16, 32, 64)


class Lanes:
    """One queue of streams for each class; a stream is in one as long as it has something to send."""

    def __init__(self) -> None:
        self._lanes: tuple[deque[Stream], ...] = tuple(deque() for _ in Priority)
        #: Ids of all that are in a lane; for others to look whether there are any.
        self.queued: set[int] = set()
        #: Class of each stream that has another than NORMAL.
        self._priorities: dict[int, Priority] = {}
        #: Packets in a row for which a lane had something to send and was passed over.
        self._passed_over = [0] * len(Priority)

    def __len__(self) -> int:
        return len(self.queued)

    def add(self, stream: Stream) -> None:
        """The stream has something to send."""
        stream_id = stream.stream_id
        if stream_id not in self.queued:
            self.queued.add(stream_id)
            self._lanes[self._priorities.get(stream_id, Priority.NORMAL)].append(stream)

    def set_priority(self, stream: Stream, priority: Priority) -> None:
        """Moves a stream to another lane."""
        stream_id = stream.stream_id
        before = self._priorities.get(stream_id, Priority.NORMAL)
        if priority is before:
            return
        if priority is Priority.NORMAL:
            del self._priorities[stream_id]
        else:
            self._priorities[stream_id] = priority
        if stream_id in self.queued:
            self._lanes[before].remove(stream)
            self._lanes[priority].append(stream)

    def forget(self, stream_id: int) -> None:
        """The stream is over. Should it be in a lane, `write` has to answer False for it."""
        self._priorities.pop(stream_id, None)

    def serve(self, write: Callable[[Stream], bool]) -> None:
        """Fills a packet: an impatient lane first, then by class.

        Args:
            write: writes what a stream has into the packet; True when the packet is full and the stream
                may have more, False when the stream has nothing left to send.
        """
        order = [index for index, lane in enumerate(self._lanes) if lane]
        if len(order) == 1:
            # Nobody is passed over.
            self._serve_lane(order[0], write)
            return
        if order:
            for index in order:
                if self._passed_over[index] >= PATIENCE_PACKETS[index] > 0:
                    order.remove(index)
                    order.insert(0, index)
                    break
        is_full = False
        for index in order:
            if is_full:
                self._passed_over[index] += 1
                continue
            is_full = self._serve_lane(index, write)

    def _serve_lane(self, index: int, write: Callable[[Stream], bool]) -> bool:
        """Serves a lane's streams in turn; True when the packet is full."""
        self._passed_over[index] = 0
        lane = self._lanes[index]
        while lane:
            if write(lane[0]):
                lane.rotate(-1)
                return True
            self.queued.discard(lane.popleft().stream_id)
        return False

"""How much of the bodies of one connection may be under way at once. Pure: numbers and times in, bytes out.

What a congestion window lets through beyond what the path holds waits in queues on the way, and everything behind it
does, whatever its class: on loopback 8 MiB in a socket's buffer, 30 ms. So bodies keep to twice what the path
has been seen to carry in its least round-trip time, as BBR does (Cardwell and others, "BBR: Congestion-Based
Congestion Control", ACM Queue 14/5, 2016). The transport's own windows hold as well.
"""

from collections import deque
from typing import Final

#: Bytes that may always be under way: 2 ms at 250 MB/s, and what a path of 100 ms begins with.
WINDOW_BYTES_MIN: Final = 512 << 10

#: Bytes that each stream may always have under way, however many share the window.
SHARE_BYTES_MIN: Final = 64 << 10

#: The window over what the path carries in its least round-trip time: acknowledgements come in lumps.
_GAIN: Final = 2.0

#: A rate is measured over a round trip, and at least so many seconds: shorter ones are all lumps.
_ROUND_S_MIN: Final = 0.02

#: Rounds of which the fastest counts: a pause of the sender's or of the disk's is not the path's.
_ROUNDS: Final = 10


class Pace:
    """The window of one connection, shared by the streams that send bodies."""

    def __init__(self) -> None:
        self.window_bytes = WINDOW_BYTES_MIN
        #: Streams that send now.
        self.streams = 0
        self._acknowledged_bytes = 0
        self._round_began_at: float | None = None
        self._rates: deque[float] = deque(maxlen=_ROUNDS)

    @property
    def share_bytes(self) -> int:
        """Bytes that one stream may have under way."""
        return max(self.window_bytes // max(self.streams, 1), SHARE_BYTES_MIN)

    def begin(self, now: float) -> None:
        """One more stream sends."""
        if self.streams == 0:
            self._round_began_at, self._acknowledged_bytes = now, 0
        self.streams += 1

    def end(self) -> None:
        """One stream less does."""
        self.streams -= 1

    def acknowledged(self, count: int, now: float, rtt_least_s: float) -> None:
        """So many more bytes have arrived."""
        assert self._round_began_at is not None, "a stream has begun"
        self._acknowledged_bytes += count
        elapsed_s = now - self._round_began_at
        if elapsed_s < max(rtt_least_s, _ROUND_S_MIN):
            return
        self._rates.append(self._acknowledged_bytes / elapsed_s)
        self._round_began_at, self._acknowledged_bytes = now, 0
        self.window_bytes = max(int(_GAIN * max(self._rates) * rtt_least_s), WINDOW_BYTES_MIN)

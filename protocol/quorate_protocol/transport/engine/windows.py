"""How much a peer may send: flow-control windows that follow the reader and the path. Pure.

A limit is what the reader consumed plus a window (RFC 9000, 4.1): bytes that nobody read hold the sender
back. A window is at its least until the reader takes half of it within two round trips, which means
that the window and not the path or the reader is what limits; then it doubles, up to its ceiling.
A reader that does not read never gets a larger one.
"""

from typing import Final

#: Round trips in which half a window has to be read for it to grow: below two, the sender has had to wait.
_ROUND_TRIPS: Final = 2


class ReceiveWindow:
    """Credit of one stream, or of a connection."""

    __slots__ = ("_size_bytes_max", "_told_at", "_told_bytes", "consumed_bytes", "size_bytes")

    def __init__(self, size_bytes: int, size_bytes_max: int) -> None:
        self.size_bytes = size_bytes
        self.consumed_bytes = 0
        self._size_bytes_max = size_bytes_max
        self._told_bytes = 0
        self._told_at = 0.0

    @property
    def limit_bytes(self) -> int:
        """Offset up to which the peer may send now."""
        return self.consumed_bytes + self.size_bytes

    def consume(self, count: int, now: float, rtt_s: float) -> None:
        """The reader took bytes; the window grows if it is what limits."""
        self.consumed_bytes += count
        if self.consumed_bytes - self._told_bytes < self.size_bytes // 2:
            return
        if now - self._told_at < _ROUND_TRIPS * rtt_s:
            self.grow(2 * self.size_bytes)
        self._told_at = now
        self._told_bytes = self.consumed_bytes

    def grow(self, size_bytes: int) -> None:
        """Makes it at least so large, within its ceiling."""
        self.size_bytes = max(self.size_bytes, min(size_bytes, self._size_bytes_max))

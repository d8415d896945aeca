"""Path MTU discovery: which packet size the path carries (RFC 8899, DPLPMTUD). Pure.

Probes are packets with nothing but PING and PADDING (RFC 9000, 14.4). They do not count as in flight,
because their loss tells of their size and not of congestion. The largest size is tried first, since
loopback and jumbo links carry it; then the sizes that paths are known to have, upwards; then halves of
what is left between. Nothing is tried before somebody has more to send than a packet of the size in
use: an agent with small messages costs no probe.

Sizes are UDP payloads in bytes, times seconds.
"""

from typing import Final

from quorate_protocol.limits import UDP_PAYLOAD_BYTES_MIN

#: RFC 8899, 5.1.2 (MAX_PROBES): a size is given up after so many lost probes.
_TRIES_MAX: Final = 3

#: RFC 8899, 5.1.1 (PROBE_TIMER): an unanswered probe is lost, should no later packet tell so before.
_PROBE_TIMEOUT_S: Final = 1.0

#: RFC 8899, 5.1.1 (PMTU_RAISE_TIMER): the path may have become better.
_RAISE_AFTER_S: Final = 600.0

#: Packets over the least size that are lost, and none sent after them acknowledged, where the path has begun to
#: swallow them (RFC 8899, 4.3).
_BLACK_HOLE_PACKETS: Final = 6

#: UDP payloads of links: Ethernet with tunnels in between (1400 and 1420, less 48), with IPv6 and IPv4 (1500 less 48
#: and 28), jumbo frames (9000 likewise).
_PLATEAUS: Final = (1352, 1372, 1452, 1472, 4312, 8952, 8972)

#: The search ends when what is left to gain is less than this part of the size.
_WORTH_IT: Final = 16


class PathMtu:
    """The search on one path. `size_bytes` is what may be used."""

    def __init__(self, ceiling_bytes: int) -> None:
        self.size_bytes = UDP_PAYLOAD_BYTES_MIN
        self.ceiling_bytes = ceiling_bytes
        #: The least size that the path does not carry; sizes from it on are not tried.
        self._too_large_bytes = ceiling_bytes + 1
        self._probing_bytes: int | None = None
        #: Number of the newest probe, and of the last one on an earlier path.
        self._probe = 0
        self._probe_of_old_path = 0
        self._probe_ends_at = 0.0
        self._tries = 0
        self._is_wanted = False
        self._raise_at: float | None = None
        self._lost_in_a_row = 0
        #: The newest packet over the least size that came through.
        self._through = -1

    def limit(self, ceiling_bytes: int) -> None:
        """The peer takes no more than this (its `max_udp_payload_size`)."""
        self.ceiling_bytes = max(UDP_PAYLOAD_BYTES_MIN, min(self.ceiling_bytes, ceiling_bytes))
        self._too_large_bytes = min(self._too_large_bytes, self.ceiling_bytes + 1)

    def want(self) -> None:
        """There is more to send than fits a packet."""
        self._is_wanted = True

    def begin_path(self) -> None:
        """Another path: nothing is known of it."""
        self.size_bytes = UDP_PAYLOAD_BYTES_MIN
        self._probe_of_old_path = self._probe
        self._begin_search(self.ceiling_bytes + 1)

    def next_probe_bytes(self, now: float) -> int | None:
        """Size of the probe that should leave now; None for none."""
        if not self._is_wanted or self._probing_bytes is not None:
            return None
        if self._raise_at is not None and now >= self._raise_at:
            self._begin_search(self.ceiling_bytes + 1)
        return self._candidate()

    def probe_sent(self, size_bytes: int, now: float) -> int:
        """A probe left; returns its number, under which its fate is told, however late."""
        self._probing_bytes = size_bytes
        self._probe_ends_at = now + _PROBE_TIMEOUT_S
        self._tries += 1
        self._probe += 1
        return self._probe

    def probe_acknowledged(self, size_bytes: int, probe: int, now: float) -> None:
        """A path carries this size: this one, unless the probe is older."""
        if probe <= self._probe_of_old_path:
            return
        self._probing_bytes = None
        self._tries = 0
        self._lost_in_a_row = 0
        if self.size_bytes < size_bytes < self._too_large_bytes:
            self.size_bytes = size_bytes
        self._end_search_if_done(now)

    def probe_lost(self, probe: int, now: float) -> None:
        """A probe was lost, or is not answered; of one that was given up before, nothing is new."""
        size_bytes = self._probing_bytes
        if size_bytes is None or probe != self._probe:
            return
        self._probing_bytes = None
        if self._tries >= _TRIES_MAX:
            self._give_up(size_bytes, now)

    def refused(self, size_bytes: int, now: float) -> None:
        """The network would not take a datagram of this size."""
        self._probing_bytes = None
        if size_bytes <= UDP_PAYLOAD_BYTES_MIN:
            return
        if size_bytes <= self.size_bytes:
            self.size_bytes = UDP_PAYLOAD_BYTES_MIN
        self._give_up(size_bytes, now)

    def packet_acknowledged(self, size_bytes: int, number: int) -> None:
        """A packet that was no probe came through."""
        if size_bytes > UDP_PAYLOAD_BYTES_MIN and number > self._through:
            self._through = number
            self._lost_in_a_row = 0

    def packet_lost(self, size_bytes: int, number: int) -> None:
        """A packet that was no probe was lost. Congestion takes some of many: one after it comes through."""
        if size_bytes > UDP_PAYLOAD_BYTES_MIN and number > self._through:
            self._lost_in_a_row += 1
            if self._lost_in_a_row >= _BLACK_HOLE_PACKETS:
                self.black_hole()

    def black_hole(self) -> None:
        """The path carries nothing of the size in use any more: begin again below it."""
        if self.size_bytes > UDP_PAYLOAD_BYTES_MIN:
            size_bytes, self.size_bytes = self.size_bytes, UDP_PAYLOAD_BYTES_MIN
            self._begin_search(size_bytes)

    def expire(self, now: float) -> None:
        """Gives up a probe whose time is over."""
        if self._probing_bytes is not None and now >= self._probe_ends_at:
            self.probe_lost(self._probe, now)

    def timer(self) -> float | None:
        """When `expire` wants to be called; None for never."""
        return self._probe_ends_at if self._probing_bytes is not None else None

    def _begin_search(self, too_large_bytes: int) -> None:
        self._too_large_bytes = too_large_bytes
        self._probing_bytes = None
        self._tries = self._lost_in_a_row = 0
        self._raise_at = None

    def _give_up(self, size_bytes: int, now: float) -> None:
        self._tries = 0
        self._too_large_bytes = min(self._too_large_bytes, size_bytes)
        self._end_search_if_done(now)

    def _end_search_if_done(self, now: float) -> None:
        if self._candidate() is None:
            self._raise_at = now + _RAISE_AFTER_S

    def _candidate(self) -> int | None:
        low, high = self.size_bytes, self._too_large_bytes
        if high > self.ceiling_bytes:
            return self.ceiling_bytes if self.ceiling_bytes > low else None
        for plateau in _PLATEAUS:
            if low < plateau < high:
                return plateau
        gap = high - low
        return low + gap // 2 if gap > max(_WORTH_IT, low // _WORTH_IT) else None

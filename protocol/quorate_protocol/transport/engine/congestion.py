"""How much may be under way: CUBIC (RFC 9438) with an end of slow start by delay (HyStart, RFC 9406), and pacing.

Both are pure. Where they differ from what aioquic ships:

- A window that the application does not fill does not grow (RFC 9002, 7.8): otherwise a connection
  that sends a little for an hour could afterwards send a hundred megabytes at once.
- It has a ceiling, and its segment follows path MTU discovery.
- The pacer lets as much go at once as the loop's timer can be late by: with smaller bursts it would
  wait for the timer, not for the path.
"""

import math
from collections.abc import Iterable
from typing import Any, Final

from aioquic.quic.congestion.base import QuicCongestionControl, register_congestion_control

#: Name under which aioquic finds the controller.
ALGORITHM: Final = "quorate-cubic"

#: RFC 9438, 4.6 and 5: the factor of a decrease, and the scale of growth in segments per second cubed.
_DECREASE: Final = 0.7
_SCALE: Final = 0.4
#: RFC 9438, 4.3: what makes CUBIC grow as fast as Reno where Reno is faster.
_RENO_INCREASE: Final = 3 * (1 - _DECREASE) / (1 + _DECREASE)

#: RFC 9002, 7.2.
INITIAL_SEGMENTS: Final = 10
_MINIMUM_SEGMENTS: Final = 2

#: Ceiling of the window: with a segment of 1200 bytes it is 14,000 packets, half of what packet numbers
#: of two bytes can tell apart; at 100 ms it allows for 168 MB/s.
WINDOW_BYTES_MAX: Final = 16 << 20

#: RFC 9406, 4.2 (MIN_RTT_THRESH, MAX_RTT_THRESH), in seconds: slow start ends when a round's least
#: round-trip time is this much longer than the least ever. The RFC compares with the round before, as Linux does
#: not: on short paths a queue grows by less than that in each round, and to hundreds of milliseconds in all.
_RTT_RISE_S_MIN: Final = 0.004
_RTT_RISE_S_MAX: Final = 0.016
#: Samples that a round needs. RFC 9406 says 8; our peers acknowledge ten packets at a time.
_RTT_SAMPLES: Final = 3


class Cubic(QuicCongestionControl):
    """The congestion controller of one path."""

    def __init__(self, *, max_datagram_size: int) -> None:
        super().__init__(max_datagram_size=max_datagram_size)
        self.segment_bytes = max_datagram_size
        self.congestion_window = INITIAL_SEGMENTS * max_datagram_size
        #: The window as a real number: growth is often less than a byte for each acknowledgement.
        self._window = float(self.congestion_window)
        self._window_before_loss = 0.0
        self._epoch_began_at: float | None = None
        self._epoch_offset_s = 0.0
        self._reno_window = 0.0
        self._recovery_began_at = -math.inf
        self._rtt_s = 0.0
        #: The last packet that was sent while the window was filled: only those up to it let it grow.
        self._filled_up_to = -1
        self._rtt_s_min = math.inf
        self._round_ends_at = 0.0
        self._round_rtt_s = math.inf
        self._round_samples = 0

    def set_segment(self, segment_bytes: int) -> None:
        """Path MTU discovery has found another packet size."""
        self.segment_bytes = segment_bytes
        self._set_window(max(self._window, _MINIMUM_SEGMENTS * segment_bytes))

    def on_packet_sent(self, *, packet: Any) -> None:
        """Counts a packet in flight."""
        in_flight = self.bytes_in_flight = self.bytes_in_flight + packet.sent_bytes
        # Slow start doubles: half a window, acknowledged, fills the next (as Linux's tcp_is_cwnd_limited).
        filled = self.congestion_window // 2 if self.ssthresh is None else self.congestion_window
        if in_flight + 3 * self.segment_bytes > filled:
            self._filled_up_to = packet.packet_number

    def was_filled(self, packet_number: int) -> bool:
        """Whether the window was in use when that packet was sent: what its journey took says something of it."""
        return packet_number <= self._filled_up_to

    def on_packet_acked(self, *, now: float, packet: Any) -> None:
        """Takes a packet out of flight and lets the window grow, if it was in use."""
        sent_bytes = packet.sent_bytes
        self.bytes_in_flight -= sent_bytes
        if packet.sent_time <= self._recovery_began_at:
            return
        if packet.packet_number > self._filled_up_to:
            # RFC 9438, 5.8: time that the application did not use does not count.
            self._epoch_began_at = None
            return
        window = self._window
        if window >= WINDOW_BYTES_MAX:
            return
        if self.ssthresh is None or window < self.ssthresh:
            self._set_window(window + sent_bytes)
        else:
            self._set_window(self._avoid_congestion(now, window, sent_bytes))

    def _avoid_congestion(self, now: float, window: float, sent_bytes: int) -> float:
        """The window after an acknowledgement in congestion avoidance (RFC 9438, 4.2 to 4.5)."""
        segment_bytes = self.segment_bytes
        if self._epoch_began_at is None:
            self._epoch_began_at = now
            self._reno_window = window
            below = self._window_before_loss - window
            if below <= 0:
                self._window_before_loss = window
            self._epoch_offset_s = math.cbrt(max(0.0, below) / segment_bytes / _SCALE)
        elapsed_s = now - self._epoch_began_at
        increase = 1.0 if self._reno_window >= self._window_before_loss else _RENO_INCREASE
        self._reno_window += increase * segment_bytes * sent_bytes / window
        if self._cubic_window(elapsed_s) < self._reno_window:
            return max(window, self._reno_window)
        target = min(max(self._cubic_window(elapsed_s + self._rtt_s), window), 1.5 * window)
        return window + (target - window) * sent_bytes / window

    def _cubic_window(self, elapsed_s: float) -> float:
        grown: float = _SCALE * (elapsed_s - self._epoch_offset_s) ** 3
        return grown * self.segment_bytes + self._window_before_loss

    def on_packets_expired(self, *, packets: Iterable[Any]) -> None:
        """Takes packets out of flight whose fate does not matter."""
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes

    def on_packets_lost(self, *, now: float, packets: Iterable[Any]) -> None:
        """Takes lost packets out of flight; the window shrinks once for all that were sent before it did."""
        sent_last_at = -math.inf
        for packet in packets:
            self.bytes_in_flight -= packet.sent_bytes
            sent_last_at = max(sent_last_at, packet.sent_time)
        if sent_last_at <= self._recovery_began_at:
            return
        self._recovery_began_at = now
        window = self._window
        # RFC 9438, 4.7: who loses before it is back where it was leaves room to newcomers.
        shrinking = window < self._window_before_loss
        self._window_before_loss = window * (1 + _DECREASE) / 2 if shrinking else window
        self._set_window(max(window * _DECREASE, _MINIMUM_SEGMENTS * self.segment_bytes))
        self.ssthresh = self.congestion_window
        self._epoch_began_at = None

    def on_persistent_congestion(self) -> None:
        """Nothing came through for long (RFC 9002, 7.6.2)."""
        self._set_window(_MINIMUM_SEGMENTS * self.segment_bytes)
        self._recovery_began_at = -math.inf
        self._epoch_began_at = None

    def on_rtt_measurement(self, *, now: float, rtt: float) -> None:
        """Ends slow start when a queue builds up."""
        self._rtt_s = rtt
        if self.ssthresh is not None:
            return
        if now >= self._round_ends_at:
            self._round_rtt_s = math.inf
            self._round_samples = 0
            self._round_ends_at = now + rtt
        self._rtt_s_min = least_s = min(self._rtt_s_min, rtt)
        self._round_rtt_s = min(self._round_rtt_s, rtt)
        self._round_samples += 1
        if self._round_samples >= _RTT_SAMPLES:
            rise_s = min(max(least_s / 8, _RTT_RISE_S_MIN), _RTT_RISE_S_MAX)
            if self._round_rtt_s >= least_s + rise_s:
                self.ssthresh = self.congestion_window

    def _set_window(self, window: float) -> None:
        self._window = min(window, WINDOW_BYTES_MAX)
        self.congestion_window = int(self._window)


register_congestion_control(ALGORITHM, Cubic)


#: RFC 9002, 7.7: a little more than the window for each round-trip time, so that pacing is never what limits;
#: twice as much in slow start, whose window doubles meanwhile.
_PACE: Final = 1.25
_PACE_SLOW_START: Final = 2.0

#: What the loop's timer may be late by, in seconds: epoll counts in milliseconds, and rounds up.
_TIMER_S: Final = 0.002


class Pacer:
    """A token bucket in bytes (RFC 9002, 7.7). Before the first round-trip time it lets everything go."""

    def __init__(self, *, max_datagram_size: int) -> None:
        self.segment_bytes = max_datagram_size
        self._rate: float | None = None
        self._burst_bytes = 0.0
        self._credit_bytes = 0.0
        self._credited_at = 0.0

    def credit_bytes(self, now: float) -> float:
        """Bytes that may leave now; none when not positive, and a packet may overdraw it."""
        rate = self._rate
        if rate is None:
            return math.inf
        if now > self._credited_at:
            self._credit_bytes = min(self._burst_bytes, self._credit_bytes + (now - self._credited_at) * rate)
            self._credited_at = now
        return self._credit_bytes

    def next_send_time(self, now: float, spent_bytes: int) -> float:
        """When there is credit again, after the credit and what was spent beyond it since `sent` was told."""
        debt_bytes = spent_bytes - self._credit_bytes
        return now + max(_TIMER_S / 2, debt_bytes / self._rate if self._rate else 0.0)

    def sent(self, sent_bytes: int) -> None:
        """A packet left."""
        self._credit_bytes -= sent_bytes

    def update_rate(self, *, congestion_window: int, smoothed_rtt: float, slow_start: bool = False) -> None:
        """The window or the round-trip time (seconds) has changed."""
        pace = _PACE_SLOW_START if slow_start else _PACE
        rate = pace * congestion_window / max(smoothed_rtt, 1e-6)
        self._burst_bytes = max(INITIAL_SEGMENTS * self.segment_bytes, rate * _TIMER_S)
        if self._rate is None:
            self._credit_bytes = self._burst_bytes
        self._rate = rate

"""Loss recovery (RFC 9002) with work that grows with what was acknowledged, not with what is in flight.

aioquic's own makes a list of all packets in flight for each acknowledgement and looks for losses where
there can be none. What is decided stays the same.
"""

from collections import deque
from typing import Any, Final

from aioquic.quic.packet_builder import QuicDeliveryState
from aioquic.quic.recovery import (
    K_PACKET_THRESHOLD,
    K_TIME_THRESHOLD,
    QuicPacketRecovery,
    QuicPacketSpace,
)

from quorate_protocol.transport.engine.congestion import Cubic, Pacer
from quorate_protocol.transport.engine.mtu import PathMtu

#: Packets in a row that ask for no acknowledgement before one does (RFC 9000, 13.2.4): from the answer we learn
#: which of our acknowledgements have come, and need not be repeated.
QUIET_PACKETS_MAX: Final = 64

#: Records of such packets: what is older than the newest is not asked for any more.
QUIET_PACKETS_KEPT_MAX: Final = 1024


class Recovery(QuicPacketRecovery):
    """Of one connection; tells path MTU discovery what became of packets."""

    _cc: Cubic
    _pacer: Any

    def __init__(self, *, mtu: PathMtu, max_datagram_size: int, **options: Any) -> None:
        super().__init__(max_datagram_size=max_datagram_size, **options)
        self._pacer = Pacer(max_datagram_size=max_datagram_size)
        self._mtu = mtu
        #: Packets in a row that did not ask for an acknowledgement.
        self.quiet_packets = 0
        #: Numbers of the newest of them all, in a row or not.
        self._quiet_numbers: deque[int] = deque()
        #: The window or the round-trip time has changed since the pacer was told.
        self._pace_is_stale = False

    def set_segment(self, segment_bytes: int) -> None:
        """Path MTU discovery has found another packet size."""
        self._cc.set_segment(segment_bytes)
        self._pacer.segment_bytes = segment_bytes
        self._pace_is_stale = True

    def begin_path(self, segment_bytes: int) -> None:
        """The peer is somewhere else: what was learned of the old path does not hold (RFC 9000, 9.4)."""
        in_flight = self._cc.bytes_in_flight
        self._cc = Cubic(max_datagram_size=segment_bytes)
        self._cc.bytes_in_flight = in_flight
        self._pacer = Pacer(max_datagram_size=segment_bytes)
        self._rtt_initialized = False

    @property
    def is_slow_start(self) -> bool:
        """Whether the window doubles."""
        return self._cc.ssthresh is None or self._cc.congestion_window < self._cc.ssthresh

    def on_packets_sent(self, packets: list[Any], space: QuicPacketSpace, now: float) -> None:
        """Packets of one space left, in their order."""
        sent = space.sent_packets
        pacer, congestion = self._pacer, self._cc
        for packet in packets:
            packet.sent_time = now
            sent[packet.packet_number] = packet
            if packet.is_ack_eliciting:
                self.quiet_packets = 0
            else:
                self.quiet_packets += 1
                if space.is_application_data:
                    self._quiet_numbers.append(packet.packet_number)
            if packet.in_flight:
                congestion.on_packet_sent(packet=packet)
                pacer.sent(packet.sent_bytes)
                if packet.is_ack_eliciting:
                    space.ack_eliciting_in_flight += 1
                    # Application data does not arm the timer before the handshake is confirmed (RFC 9002, 6.2.1).
                    if self.handshake_confirmed or not space.is_application_data:
                        self._time_of_last_sent_ack_eliciting_packet = now
            elif packet.is_ack_eliciting:
                space.ack_eliciting_in_flight += 1
        # Nobody acknowledges acknowledgements alone: a peer that acknowledges nothing else must not make us keep them.
        while len(self._quiet_numbers) > QUIET_PACKETS_KEPT_MAX:
            quiet = sent.pop(self._quiet_numbers.popleft(), None)
            if quiet is not None and quiet.in_flight:
                # It was padded.
                congestion.on_packets_expired(packets=[quiet])

    def on_ack_ranges(
        self, ranges: list[tuple[int, int]], ack_delay: float, now: float, space: QuicPacketSpace
    ) -> None:
        """An acknowledgement came (RFC 9002, A.7).

        Args:
            ranges: first and last packet number of each range, the highest first.
            ack_delay: seconds that the peer says it waited.
            now: the time in seconds.
            space: of which packet number space.
        """
        sent = space.sent_packets
        largest_acked = ranges[0][1]
        if largest_acked > space.largest_acked_packet:
            space.largest_acked_packet = largest_acked
        if not sent:
            return
        lowest, highest = next(iter(sent)), next(reversed(sent))
        newest: Any = None
        is_ack_eliciting = False
        congestion, mtu = self._cc, self._mtu
        acked = QuicDeliveryState.ACKED
        for first, last in reversed(ranges):
            # What the peer made up outside of what is in flight costs nothing.
            for number in range(max(first, lowest), min(last, highest) + 1):
                packet: Any = sent.pop(number, None)
                if packet is None:
                    continue
                newest = packet
                if packet.is_ack_eliciting:
                    is_ack_eliciting = True
                    space.ack_eliciting_in_flight -= 1
                if packet.in_flight:
                    congestion.on_packet_acked(now=now, packet=packet)
                    mtu.packet_acknowledged(packet.sent_bytes, number)
                for handler, arguments in packet.delivery_handlers:
                    handler(acked, *arguments)
        if newest is None:
            return
        if newest.packet_number == largest_acked and is_ack_eliciting and newest.sent_time is not None:
            self._sample_rtt(now - newest.sent_time, min(ack_delay, self.max_ack_delay), now)
            if congestion.was_filled(newest.packet_number):
                congestion.on_rtt_measurement(now=now, rtt=self._rtt_latest)
        self._pace_is_stale = True
        self._detect_loss(now=now, space=space)
        if self.peer_completed_address_validation:
            self._pto_count = 0

    def _sample_rtt(self, latest_s: float, ack_delay_s: float, now: float) -> None:
        """RFC 9002, 5.3. Below a millisecond all paths are the same: timers count in those."""
        self._rtt_latest = max(latest_s, 0.001)
        self._rtt_min = min(self._rtt_min, self._rtt_latest)
        if self._rtt_latest > self._rtt_min + ack_delay_s:
            self._rtt_latest -= ack_delay_s
        if not self._rtt_initialized:
            self._rtt_initialized = True
            self._rtt_first_sample_time = now
            self._rtt_smoothed = self._rtt_latest
            self._rtt_variance = self._rtt_latest / 2
        else:
            self._rtt_variance += (abs(self._rtt_smoothed - self._rtt_latest) - self._rtt_variance) / 4
            self._rtt_smoothed += (self._rtt_latest - self._rtt_smoothed) / 8

    def pacing_credit_bytes(self, now: float) -> float:
        """Bytes that the pacer lets leave now."""
        if self._pace_is_stale and self._rtt_initialized:
            self._pace_is_stale = False
            self._pacer.update_rate(
                congestion_window=self._cc.congestion_window,
                smoothed_rtt=self._rtt_smoothed,
                slow_start=self.is_slow_start,
            )
        credit_bytes: float = self._pacer.credit_bytes(now)
        return credit_bytes

    def _detect_loss(self, *, now: float, space: QuicPacketSpace) -> None:
        """RFC 9002, 6.1. The time that is armed and the one that is compared are the same sum: with aioquic's
        difference on one side, rounding can make a timer fire at its own time for ever."""
        space.loss_time = None
        largest_acked = space.largest_acked_packet
        lost: list[Any] = []
        delay_s = 0.0
        # Numbers ascend: nothing behind the largest that was acknowledged is lost.
        for number, packet in space.sent_packets.items():
            if number > largest_acked:
                break
            if not delay_s:
                rtt_s = max(self._rtt_latest, self._rtt_smoothed) if self._rtt_initialized else self._rtt_initial
                delay_s = K_TIME_THRESHOLD * rtt_s
            assert packet.sent_time is not None
            lost_at = packet.sent_time + delay_s
            if number <= largest_acked - K_PACKET_THRESHOLD or lost_at <= now:
                lost.append(packet)
            elif space.loss_time is None or lost_at < space.loss_time:
                space.loss_time = lost_at
        if lost:
            self._on_packets_lost(
                now=now, packets=lost, persistent_congestion=self._in_persistent_congestion(packets=lost), space=space
            )

    def _on_packets_lost(self, *, packets: Any, **options: Any) -> None:
        self._pace_is_stale = True
        packets = list(packets)
        for packet in packets:
            if packet.in_flight:
                self._mtu.packet_lost(packet.sent_bytes, packet.packet_number)
        super()._on_packets_lost(packets=packets, **options)

"""CUBIC and the pacer, with time and packets as arguments."""

from types import SimpleNamespace

import pytest

from quorate_protocol.transport.engine.congestion import WINDOW_BYTES_MAX, Cubic, Pacer

SEGMENT = 1200


class Path:
    """Sends through a controller and tells it what became of the packets, one round trip after the other."""

    def __init__(self, rtt_s: float = 0.05) -> None:
        self.cubic = Cubic(max_datagram_size=SEGMENT)
        self.rtt_s = rtt_s
        self.now = 1.0
        self.number = 0

    def send(self, count: int) -> list[SimpleNamespace]:
        packets = []
        for _ in range(count):
            packet = SimpleNamespace(packet_number=self.number, sent_bytes=SEGMENT, sent_time=self.now)
            self.number += 1
            self.cubic.on_packet_sent(packet=packet)
            packets.append(packet)
        return packets

    def acknowledge(self, packets: list[SimpleNamespace]) -> None:
        for packet in packets:
            self.cubic.on_packet_acked(now=self.now, packet=packet)

    def round_trip(self, count: int | None = None) -> None:
        """A whole window, or so many packets."""
        packets = self.send(self.cubic.congestion_window // SEGMENT if count is None else count)
        self.now += self.rtt_s
        self.cubic.on_rtt_measurement(now=self.now, rtt=self.rtt_s)
        self.acknowledge(packets)

    def lose(self, count: int = 1) -> None:
        packets = self.send(count)
        self.now += self.rtt_s
        self.cubic.on_packets_lost(now=self.now, packets=packets)


def test_slow_start_doubles_the_window_each_round_trip() -> None:
    path = Path()
    for turn in range(5):
        assert path.cubic.congestion_window == 10 * SEGMENT * 2**turn
        path.round_trip()


def test_a_window_that_is_not_filled_does_not_grow() -> None:
    path = Path()
    for _ in range(1000):
        path.round_trip(1)
    assert path.cubic.congestion_window == 10 * SEGMENT


def test_the_window_has_a_ceiling() -> None:
    path = Path()
    for _ in range(14):
        path.round_trip()
    assert path.cubic.congestion_window == WINDOW_BYTES_MAX


def test_a_loss_takes_three_tenths_once_for_what_was_sent_before_it() -> None:
    path = Path()
    for _ in range(4):
        path.round_trip()
    before = path.cubic.congestion_window
    packets = path.send(20)
    path.now += path.rtt_s
    path.cubic.on_packets_lost(now=path.now, packets=packets[:5])
    path.cubic.on_packets_lost(now=path.now + 0.001, packets=packets[5:])
    assert path.cubic.congestion_window == pytest.approx(0.7 * before, abs=2)
    assert path.cubic.bytes_in_flight == 0


def test_after_a_loss_the_window_returns_in_the_time_of_the_cubic_function() -> None:
    """RFC 9438, 4.2: K = cbrt((W_max - cwnd) / C)."""
    path = Path(rtt_s=0.1)
    for _ in range(7):
        path.round_trip()
    full = path.cubic.congestion_window
    path.lose()
    began_at = path.now
    while path.cubic.congestion_window < 0.99 * full:
        path.round_trip()
        assert path.now < began_at + 100
    expected_s = (0.3 * full / SEGMENT / 0.4) ** (1 / 3)
    assert 0.6 * expected_s < path.now - began_at < 1.2 * expected_s


def test_on_short_paths_it_grows_as_fast_as_reno() -> None:
    path = Path(rtt_s=0.001)
    for _ in range(3):
        path.round_trip()
    path.lose()
    before = path.cubic.congestion_window
    for _ in range(100):
        path.round_trip()
    assert path.cubic.congestion_window >= before + 40 * SEGMENT


def test_a_rising_round_trip_time_ends_slow_start() -> None:
    path = Path(rtt_s=0.02)
    for _ in range(3):
        for _ in range(4):
            path.cubic.on_rtt_measurement(now=path.now, rtt=path.rtt_s)
        path.round_trip()
    assert path.cubic.ssthresh is None
    path.rtt_s = 0.04
    for _ in range(3):
        path.round_trip()
        for _ in range(4):
            path.cubic.on_rtt_measurement(now=path.now, rtt=path.rtt_s)
    assert path.cubic.ssthresh is not None


def test_nothing_comes_through_for_long_and_the_window_is_least() -> None:
    path = Path()
    path.round_trip()
    path.cubic.on_persistent_congestion()
    assert path.cubic.congestion_window == 2 * SEGMENT
    path.round_trip()
    assert path.cubic.congestion_window > 2 * SEGMENT


def test_larger_packets_have_a_window_of_two_at_least() -> None:
    path = Path()
    path.cubic.set_segment(16_383)
    assert path.cubic.congestion_window == 2 * 16_383


def test_before_the_first_round_trip_nothing_is_paced() -> None:
    pacer = Pacer(max_datagram_size=SEGMENT)
    pacer.sent(10**9)
    assert pacer.credit_bytes(0.0) > 0


def test_the_pace_is_a_little_above_a_window_for_each_round_trip() -> None:
    pacer = Pacer(max_datagram_size=SEGMENT)
    pacer.update_rate(congestion_window=1_000_000, smoothed_rtt=0.1)
    now, sent = 100.0, 0
    pacer.credit_bytes(now)
    while now < 110.0:
        if pacer.credit_bytes(now) > 0:
            pacer.sent(SEGMENT)
            sent += SEGMENT
        else:
            next_at = pacer.next_send_time(now, 0)
            assert now < next_at < now + 0.1
            now = next_at
    assert sent / 10.0 == pytest.approx(1.25 * 10_000_000, rel=0.05)


def test_an_idle_time_does_not_save_up_more_than_a_burst() -> None:
    pacer = Pacer(max_datagram_size=SEGMENT)
    pacer.update_rate(congestion_window=1_000_000, smoothed_rtt=0.1)
    assert pacer.credit_bytes(1e6) <= max(10 * SEGMENT, 1.25 * 10_000_000 * 0.002) + 1

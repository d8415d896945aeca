"""Flow-control windows: they follow a reader that is faster than the path, and nobody else."""

from quorate_protocol.transport.engine.windows import ReceiveWindow

KIB = 1024


def test_the_limit_is_what_was_read_and_a_window() -> None:
    window = ReceiveWindow(64 * KIB, 1024 * KIB)
    assert window.limit_bytes == 64 * KIB
    window.consume(10, now=5.0, rtt_s=0.01)
    assert window.limit_bytes == 64 * KIB + 10


def test_a_reader_that_never_reads_keeps_the_least_window() -> None:
    window = ReceiveWindow(64 * KIB, 1024 * KIB)
    assert window.limit_bytes == window.size_bytes == 64 * KIB


def test_a_slow_reader_keeps_the_least_window() -> None:
    window = ReceiveWindow(64 * KIB, 1024 * KIB)
    for second in range(1, 100):
        window.consume(32 * KIB, now=float(second), rtt_s=0.1)
    assert window.size_bytes == 64 * KIB


def test_a_window_that_is_read_in_less_than_two_round_trips_doubles_up_to_its_ceiling() -> None:
    window = ReceiveWindow(64 * KIB, 1000 * KIB)
    now, sizes = 10.0, []
    for _ in range(400):
        now += 0.01
        window.consume(32 * KIB, now, rtt_s=0.1)
        sizes.append(window.size_bytes)
    assert sizes == sorted(sizes)
    assert {128 * KIB, 256 * KIB, 512 * KIB} <= set(sizes)
    assert window.size_bytes == 1000 * KIB


def test_bytes_read_one_by_one_count_like_any_others() -> None:
    window = ReceiveWindow(KIB, 64 * KIB)
    now = 1.0
    for _ in range(4 * KIB):
        now += 1e-5
        window.consume(1, now, rtt_s=0.1)
    assert window.consumed_bytes == 4 * KIB
    assert window.size_bytes > KIB

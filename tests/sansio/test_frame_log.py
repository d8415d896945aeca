"""What the coordinator keeps of a session to send again: numbered over all links, bounded by count and bytes."""

import random

import pytest

from quorate_coordinator.links import LOG_BYTES_MAX, LOG_FRAMES_MAX, FrameLog


def test_what_was_not_received_is_sent_again_and_assignments_are_not() -> None:
    log = FrameLog()
    log.keep(b"1")
    log.count()
    log.keep(b"3")
    log.keep(b"4")
    assert (log.sent, len(log), log.size_bytes) == (4, 3, 3)
    assert log.resume(1) == ([b"3", b"4"], False)
    # They are the next after the one that was received: the assignment between them was not sent again.
    assert (log.sent, len(log)) == (3, 2)
    assert log.resume(2) == ([b"4"], False)
    assert log.resume(3) == ([], False)


def test_everything_received_leaves_nothing() -> None:
    log = FrameLog()
    for _ in range(5):
        log.keep(b"x")
    assert log.resume(5) == ([], False)
    assert (log.sent, len(log), log.size_bytes) == (5, 0, 0)


def test_a_peer_that_says_it_has_received_more_than_was_sent_gets_nothing() -> None:
    log = FrameLog()
    log.keep(b"x")
    assert log.resume(1 << 62) == ([], False)
    assert log.sent == 1


@pytest.mark.parametrize(("received", "again", "has_gap"), [(0, 3, True), (1, 3, True), (2, 3, False), (4, 1, False)])
def test_the_oldest_frames_are_dropped_beyond_the_count(received: int, again: int, has_gap: bool) -> None:
    log = FrameLog(frames_max=3)
    for number in range(1, 6):
        log.keep(b"%d" % number)
    assert len(log) == 3
    assert log.resume(received) == ([b"%d" % n for n in range(6 - again, 6)], has_gap)


def test_the_oldest_frames_are_dropped_beyond_the_bytes() -> None:
    log = FrameLog(bytes_max=10)
    log.keep(b"x" * 6)
    log.keep(b"y" * 6)
    assert (len(log), log.size_bytes) == (1, 6)
    log.keep(b"z" * 11)
    assert (len(log), log.size_bytes) == (0, 0)
    assert log.resume(0) == ([], True)
    # Once told, it is known.
    assert log.resume(0) == ([], False)


def test_the_ceilings_hold() -> None:
    log, rng = FrameLog(), random.Random(1)
    for _ in range(5000):
        log.keep(bytes(rng.choice([10, 20_000])))
        assert len(log) <= LOG_FRAMES_MAX
        assert log.size_bytes <= LOG_BYTES_MAX


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lost_the_rest_comes_in_order_and_once(seed: int) -> None:
    """A peer that counts what it receives, over links that break after any number of frames."""
    rng = random.Random(seed)
    log = FrameLog()
    wire: list[bytes] = []
    got: list[bytes] = []
    received = 0
    made = 0
    for _ in range(400):
        step = rng.random()
        if step < 0.4:
            made += 1
            frame = b"%d" % made
            log.keep(frame)
            wire.append(frame)
        elif step < 0.6:
            log.count()
            wire.append(b"")
        elif step < 0.9 and wire:
            received += 1
            got.append(wire.pop(0))
        elif step >= 0.97:
            for _ in range(rng.randrange(3)):  # while there is no link
                made += 1
                log.keep(b"%d" % made)
            wire, has_gap = log.resume(received)
            assert not has_gap
    got += wire
    assert [int(frame) for frame in got if frame] == list(range(1, made + 1))

"""Sending classes: who goes first, who shares, and that nobody starves."""

import pytest

from quorate_protocol.transport import Priority

#: Where the path is the bottleneck: 1 MB/s, and a short queue in front of it.
SLOW = {"rate_bytes_s": 1_000_000, "queue_bytes": 64_000, "delay_s": 0.005}


@pytest.fixture(params=["client", "server"])
def sides(request, connected):
    world = connected(**SLOW)
    writer = getattr(world, request.param)
    return world, writer, world.server if writer is world.client else world.client


def busy(here, ids, bytes_low=300_000):
    """Keeps enough to send in these streams."""
    for stream_id in ids:
        if here.engine.unacknowledged_bytes(stream_id) < bytes_low:
            here.engine.write(stream_id, bytes(bytes_low))


def test_a_critical_message_overtakes_queued_bulk(sides):
    world, here, there = sides
    bulk = [here.open(bytes(500_000)) for _ in range(5)]
    world.rest(0.3)
    critical = here.open(bytes(100_000), priority=Priority.CRITICAL)
    took_s = world.run(lambda: critical in there.seen.ended)
    # 100 ms on the path, behind what is on it already; all of the bulk takes 2.5 s.
    assert took_s < 0.5
    assert not there.seen.ended & set(bulk)
    world.run(lambda: there.seen.ended >= set(bulk))


def test_classes_are_served_in_their_order(sides):
    world, here, there = sides
    classes = [Priority.LOW, Priority.NORMAL, Priority.HIGH, Priority.CRITICAL]
    ids = {priority: here.open(bytes(150_000), priority=priority) for priority in classes}
    order = []

    def look():
        order.extend(
            priority for priority, stream_id in ids.items() if stream_id in there.seen.ended and priority not in order
        )
        return len(order) == len(ids)

    world.run(look)
    assert order == sorted(classes)


@pytest.mark.parametrize("priority", list(Priority))
def test_streams_of_one_class_share_alike_at_any_time(sides, priority):
    world, here, there = sides
    ids = [here.open(bytes(250_000), priority=priority) for _ in range(4)]
    looks = 0

    def look():
        nonlocal looks
        shares = [len(there.seen.data[stream_id]) for stream_id in ids]
        # The turn goes packet by packet, and packets are as large as the path takes.
        if sum(shares) > 400_000 and not there.seen.ended:
            looks += 1
            assert max(shares) <= 2 * min(shares)
        return there.seen.ended >= set(ids)

    world.run(look)
    assert looks > 10


def test_a_stream_that_comes_later_gets_its_share_at_once(sides):
    world, here, there = sides
    early = [here.open(end=False) for _ in range(3)]
    busy(here, early)
    world.rest(0.5)
    late = here.open(bytes(100_000))
    busy(here, early)
    # A quarter of 1 MB/s.
    assert world.run(lambda: busy(here, early) or late in there.seen.ended) < 1.0


def test_the_lowest_class_is_never_starved(sides):
    world, here, there = sides
    above = [
        here.open(end=False, priority=priority) for priority in (Priority.CRITICAL, Priority.HIGH, Priority.NORMAL)
    ]
    busy(here, above)
    world.rest(0.2)
    low = here.open(bytes(20_000), priority=Priority.LOW)
    world.run(lambda: busy(here, above) or low in there.seen.ended, within_s=10.0)
    # It got little, and not the half.
    assert len(there.seen.data[above[0]]) > 20_000 * 4


def test_the_class_can_be_changed_while_bytes_wait(sides):
    world, here, there = sides
    first, second, third = (here.open(bytes(400_000)) for _ in range(3))
    world.rest(0.1)
    here.engine.set_priority(third, Priority.CRITICAL)
    here.engine.set_priority(first, Priority.LOW)
    order = []
    world.run(
        lambda: (
            order.extend(s for s in (first, second, third) if s in there.seen.ended and s not in order)
            or len(order) == 3
        )
    )
    assert order == [third, second, first]


def test_the_class_can_be_changed_at_any_time_of_a_streams_life(sides):
    world, here, there = sides
    stream_id = here.open(end=False)
    for priority in (*Priority, Priority.NORMAL, Priority.NORMAL, Priority.LOW):
        here.engine.set_priority(stream_id, priority)
        here.engine.write(stream_id, b"x" * 1000)
        world.rest(0.05)
    here.engine.write(stream_id, b"", end=True)
    world.run(lambda: stream_id in there.seen.ended)
    assert len(there.seen.data[stream_id]) == 1000 * (len(Priority) + 3)
    there.engine.write(stream_id, b"", end=True)
    world.rest(1.0)
    assert not here.engine.has_stream(stream_id)
    here.engine.set_priority(stream_id, Priority.CRITICAL)
    there.engine.set_priority(stream_id, Priority.CRITICAL)
    other = here.open(b"goes on")
    world.run(lambda: other in there.seen.ended)


def test_an_answer_goes_in_the_class_that_its_sender_gives_it(sides):
    """The peer's classes are its own: a stream that it opened begins as NORMAL here."""
    world, here, there = sides
    questions = [here.open(b"?", priority=Priority.CRITICAL) for _ in range(3)]
    world.run(lambda: there.seen.ended >= set(questions))
    for question in questions[:2]:
        there.engine.write(question, bytes(300_000), end=True)
    there.engine.set_priority(questions[2], Priority.HIGH)
    there.engine.write(questions[2], bytes(300_000), end=True)
    world.run(lambda: here.seen.ended)
    assert here.seen.ended == {questions[2]}

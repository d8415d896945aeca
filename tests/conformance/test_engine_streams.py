"""Streams: ids, order, ends, resets, limits."""

import random

import pytest

from quorate_protocol.limits import STREAMS_MAX
from quorate_protocol.transport import Priority


def noise(count, seed=0):
    return random.Random(seed).randbytes(count)


@pytest.fixture(params=["client", "server"])
def sides(request, world):
    """The world, the end that opens and the end that is met."""
    opener = getattr(world, request.param)
    return world, opener, world.server if opener is world.client else world.client


def test_ids_tell_who_opened_a_stream_and_its_directions(sides):
    """RFC 9000, 2.1."""
    _, here, _ = sides
    first = 0 if here.is_client else 1
    assert [here.open(end=False) for _ in range(3)] == [first, first + 4, first + 8]
    assert [here.open(end=False, bi=False) for _ in range(3)] == [first + 2, first + 6, first + 10]


def test_bytes_come_in_order_and_whole_however_they_were_written(sides):
    world, here, there = sides
    data, position = noise(300_000), 0
    stream_id = here.open(end=False)
    cuts = random.Random(3)
    while position < len(data):
        size = cuts.choice([0, 1, 2, 100, 1199, 1200, 5000, 50_000])
        here.engine.write(stream_id, data[position : position + size])
        position += size
        if cuts.random() < 0.3:
            world.rest(0.005)
    here.engine.write(stream_id, b"", end=True)
    world.run(lambda: stream_id in there.seen.ended)
    assert there.seen.data[stream_id] == data


def test_both_directions_of_a_stream_are_of_their_own(sides):
    world, here, there = sides
    stream_id = here.open(b"question")
    world.run(lambda: stream_id in there.seen.ended)
    assert there.seen.data[stream_id] == b"question"
    assert here.engine.has_stream(stream_id)
    assert there.engine.has_stream(stream_id)
    there.engine.write(stream_id, noise(50_000))
    there.engine.write(stream_id, b"", end=True)
    world.run(lambda: stream_id in here.seen.ended)
    assert here.seen.data[stream_id] == noise(50_000)
    # Nothing can be told of it any more, on either side, once all is acknowledged.
    world.rest(1.0)
    assert not here.engine.has_stream(stream_id)
    assert not there.engine.has_stream(stream_id)


def test_an_end_without_bytes_arrives(sides):
    world, here, there = sides
    ids = [here.open(bi=bi) for bi in (True, False)]
    world.run(lambda: there.seen.ended >= set(ids))
    assert not any(there.seen.data[stream_id] for stream_id in ids)


def test_a_stream_that_was_not_written_to_is_not_told_of(sides):
    world, here, there = sides
    here.open(end=False)
    last = here.open(b"x")
    world.run(lambda: last in there.seen.ended)
    assert there.met == [last]


def test_a_reset_is_told_with_its_code(sides):
    world, here, there = sides
    stream_id = here.open(noise(5000), end=False)
    world.rest(0.2)
    here.engine.reset(stream_id, 77)
    world.run(lambda: there.seen.resets)
    assert there.seen.resets == {stream_id: 77}
    assert here.engine.unacknowledged_bytes(stream_id) == 0
    world.rest(1.0)
    assert stream_id not in there.seen.ended
    assert there.seen.close is None


def test_a_reset_of_a_stream_that_was_never_written_to_is_told(sides):
    world, here, there = sides
    stream_id = here.open(end=False)
    here.engine.reset(stream_id, 5)
    world.run(lambda: there.seen.resets == {stream_id: 5})


def test_after_a_reset_the_other_direction_goes_on(sides):
    world, here, there = sides
    stream_id = here.open(b"hello", end=False)
    world.run(lambda: there.seen.data[stream_id])
    here.engine.reset(stream_id, 1)
    there.engine.write(stream_id, noise(100_000), end=True)
    world.run(lambda: stream_id in here.seen.ended)
    assert here.seen.data[stream_id] == noise(100_000)
    assert there.seen.resets == {stream_id: 1}


def test_a_stop_is_told_with_its_code_and_ends_the_sending(sides):
    world, here, there = sides
    there.reads = False
    stream_id = here.open(noise(3 << 20), end=False)
    world.rest(0.5)
    there.engine.stop(stream_id, 99)
    world.run(lambda: here.seen.stops)
    assert here.seen.stops == {stream_id: 99}
    world.rest(1.0)
    # RFC 9000, 3.5: the sender answers with a reset, and what it had is gone.
    assert here.engine.unacknowledged_bytes(stream_id) == 0
    assert stream_id not in there.seen.ended
    # What was not read of it does not hold up others.
    there.reads = True
    other = here.open(noise(500_000))
    world.run(lambda: other in there.seen.ended)


def test_a_stop_of_a_stream_that_has_ended_does_nothing(sides):
    world, here, there = sides
    stream_id = here.open(b"all")
    world.run(lambda: stream_id in there.seen.ended)
    there.engine.stop(stream_id, 1)
    here.engine.reset(stream_id, 1)
    world.rest(1.0)
    assert not there.seen.resets
    assert world.client.seen.close is None
    assert world.server.seen.close is None


@pytest.mark.parametrize("bi", [True, False], ids=["bidirectional", "unidirectional"])
def test_streams_can_be_opened_up_to_the_limit_and_again_when_some_have_ended(sides, bi):
    world, here, there = sides
    ids = []
    while here.engine.can_open_stream(bidirectional=bi):
        ids.append(here.open(b"x", bi=bi, end=False))
        assert len(ids) <= STREAMS_MAX
    assert len(ids) == STREAMS_MAX
    assert here.engine.can_open_stream(bidirectional=not bi)
    world.run(lambda: len(there.met) == len(ids))
    told = len(here.seen.of("streams_available"))
    ended = ids[: STREAMS_MAX * 3 // 4]
    for stream_id in ended:
        here.engine.write(stream_id, b"", end=True)
        if bi:
            there.engine.write(stream_id, b"", end=True)
    world.run(lambda: here.engine.can_open_stream(bidirectional=bi))
    world.rest(1.0)
    assert len(here.seen.of("streams_available")) > told
    again = 0
    while here.engine.can_open_stream(bidirectional=bi):
        here.open(b"x", bi=bi)
        again += 1
    # The peer may keep a part of the news back; it gives no more than have ended.
    assert len(ended) // 2 <= again <= len(ended)
    world.rest(1.0)
    assert there.seen.close is None


def test_many_more_streams_than_the_limit_go_through_one_after_the_other(sides):
    world, here, there = sides
    for _ in range(2 * STREAMS_MAX // 64 + 8):
        ids = [here.open(b"x", bi=False) for _ in range(64)]
        world.run(lambda ids=ids: there.seen.ended >= set(ids))
        world.rest(0.05)


def test_streams_that_nobody_accepts_count_against_the_limit(sides):
    """Otherwise a peer could open and end them without bound while nobody looks."""
    world, here, there = sides
    there.accepts = False
    ids = []
    for _ in range(STREAMS_MAX // 32 + 5):
        while here.engine.can_open_stream(bidirectional=False) and len(ids) < 2 * STREAMS_MAX:
            ids.append(here.open(b"x", bi=False))
        world.rest(0.5)
    assert len(ids) == STREAMS_MAX
    assert there.seen.ended >= set(ids)
    there.accept(STREAMS_MAX * 3 // 4)
    world.run(lambda: here.engine.can_open_stream(bidirectional=False))
    there.accept()
    there.accepts = True
    world.rest(0.5)
    for _ in range(STREAMS_MAX // 2):
        here.open(b"x", bi=False)


def test_the_limits_of_the_two_ends_are_of_their_own(world):
    for _ in range(STREAMS_MAX):
        world.client.open(b"x", end=False)
    assert not world.client.engine.can_open_stream(bidirectional=True)
    assert world.server.engine.can_open_stream(bidirectional=True)
    world.rest(1.0)
    assert world.server.engine.can_open_stream(bidirectional=True)


def test_streams_of_every_class_arrive(sides):
    world, here, there = sides
    ids = {here.open(noise(30_000, seed=priority), priority=priority): priority for priority in Priority}
    world.run(lambda: there.seen.ended >= set(ids))
    for stream_id, priority in ids.items():
        assert there.seen.data[stream_id] == noise(30_000, seed=priority)


def test_many_streams_at_once_come_whole(sides):
    world, here, there = sides
    ids = {here.open(noise(100 * number, seed=number), bi=number % 2 == 0): number for number in range(300)}
    world.run(lambda: there.seen.ended >= set(ids))
    for stream_id, number in ids.items():
        assert there.seen.data[stream_id] == noise(100 * number, seed=number)

"""What a writer learns of its bytes: how many the peer's transport has not acknowledged."""

import random

import pytest


@pytest.fixture(params=["client", "server"])
def sides(request, connected):
    """A world of long paths, the end that writes and the end that reads."""
    world = connected(delay_s=0.050)
    opener = getattr(world, request.param)
    return world, opener, world.server if opener is world.client else world.client


def test_bytes_are_unacknowledged_from_the_write_on_and_fall_to_nothing(sides):
    world, here, _ = sides
    engine = here.engine
    stream_id = here.open(end=False)
    assert engine.unacknowledged_bytes(stream_id) == 0
    engine.write(stream_id, bytes(300_000))
    assert engine.unacknowledged_bytes(stream_id) == 300_000
    world.rest(0.060)  # they are there, and the acknowledgement is under way
    assert engine.unacknowledged_bytes(stream_id) == 300_000
    waiting = []
    world.run(lambda: waiting.append(engine.unacknowledged_bytes(stream_id)) or waiting[-1] == 0)
    assert waiting == sorted(waiting, reverse=True)
    assert len(set(waiting)) > 5, "all at once: a sleeping writer would let the path run dry"


def test_the_total_is_the_sum_of_all_streams(sides):
    world, here, _ = sides
    engine = here.engine
    assert engine.unacknowledged_total_bytes == 0
    ids = [here.open(bytes(20_000 * number), end=number % 2 == 0, bi=number % 3 == 0) for number in range(1, 8)]

    def total():
        return sum(engine.unacknowledged_bytes(stream_id) for stream_id in ids)

    assert engine.unacknowledged_total_bytes == total() == 20_000 * 28
    looks = 0

    def look():
        nonlocal looks
        looks += 1
        assert engine.unacknowledged_total_bytes == total()
        return total() == 0

    world.run(look)
    assert looks > 5


def test_what_was_given_up_is_not_unacknowledged_any_more(sides):
    world, here, there = sides
    engine = here.engine
    reset, stopped, kept = (here.open(bytes(100_000), end=False) for _ in range(3))
    engine.reset(reset, 1)
    assert engine.unacknowledged_bytes(reset) == 0
    assert engine.unacknowledged_total_bytes == 200_000
    world.rest(0.2)
    engine.write(stopped, bytes(2_000_000))
    there.engine.stop(stopped, 2)
    world.run(lambda: here.seen.stops)
    assert engine.unacknowledged_bytes(stopped) == 0
    assert engine.unacknowledged_total_bytes == engine.unacknowledged_bytes(kept)
    world.rest(3.0)
    assert engine.unacknowledged_total_bytes == 0


def test_a_stream_that_is_over_has_nothing_unacknowledged(sides):
    world, here, there = sides
    stream_id = here.open(bytes(5000))
    world.run(lambda: stream_id in there.seen.ended)
    there.engine.write(stream_id, b"", end=True)
    world.rest(1.0)
    assert not here.engine.has_stream(stream_id)
    assert here.engine.unacknowledged_bytes(stream_id) == 0
    assert here.engine.unacknowledged_total_bytes == 0


def test_each_acknowledgement_is_told_of_its_stream(sides):
    world, here, _ = sides
    engine = here.engine
    ids = [here.open(bytes(size), end=False) for size in (1, 5000, 400_000)]
    quiet = here.open(end=False)
    known = {stream_id: engine.unacknowledged_bytes(stream_id) for stream_id in ids}
    told = dict.fromkeys(ids, 0)

    def look():
        for stream_id in ids:
            waiting = engine.unacknowledged_bytes(stream_id)
            calls = here.seen.acknowledged[stream_id]
            if waiting < known[stream_id]:
                assert calls > told[stream_id], "fewer bytes are unacknowledged, and nobody was told"
            known[stream_id], told[stream_id] = waiting, calls
        return not any(known.values())

    world.run(look)
    assert here.seen.acknowledged[quiet] == 0
    told = sum(here.seen.acknowledged.values())
    world.rest(5.0)
    assert sum(here.seen.acknowledged.values()) == told, "told without any change"


def test_a_loss_in_front_does_not_count_what_was_acknowledged_behind_it_twice(sides):
    """Acknowledgements come in any order; the count falls to nothing once, and never below."""
    world, here, there = sides
    way = world.up if here.is_client else world.down
    first = len(way.offered_bytes)
    way.drop = lambda number, _: number == first
    stream_id = here.open(random.Random(1).randbytes(200_000))
    engine = here.engine
    waiting = []
    world.run(lambda: waiting.append(engine.unacknowledged_bytes(stream_id)) or waiting[-1] == 0)
    assert waiting == sorted(waiting, reverse=True)
    assert stream_id in there.seen.ended
    assert engine.unacknowledged_total_bytes == 0


def test_a_closed_connection_answers_all_the_same(sides):
    world, here, _ = sides
    stream_id = here.open(bytes(100_000))
    here.engine.close(0, "")
    world.rest(20.0)
    assert here.engine.unacknowledged_bytes(stream_id) in range(100_001)
    assert here.engine.unacknowledged_total_bytes in range(100_001)
    assert here.engine.write_bytes_high > 0

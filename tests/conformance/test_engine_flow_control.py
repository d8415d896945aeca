"""Flow control: what is not read holds its sender, what is read fast gets more room (RFC 9000, 4)."""

import random

import pytest

from quorate_protocol import limits
from quorate_protocol.limits import CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES

#: What tuning may make of a window; without tuning, what it is.
STREAM_BYTES_MAX = getattr(limits, "STREAM_WINDOW_BYTES_MAX", STREAM_WINDOW_BYTES)
CONNECTION_BYTES_MAX = getattr(limits, "CONNECTION_WINDOW_BYTES_MAX", CONNECTION_WINDOW_BYTES)


@pytest.fixture(params=["client", "server"])
def sides(request, world):
    """The world, the end that writes and the end that reads."""
    writer = getattr(world, request.param)
    return world, writer, world.server if writer is world.client else world.client


def noise(count, seed=0):
    return random.Random(seed).randbytes(count)


def test_a_stream_that_is_not_read_is_held_at_its_window_and_goes_on_when_it_is(sides):
    world, here, there = sides
    there.reads = False
    data = noise(3 << 20)
    stream_id = here.open(data)
    world.rest(5.0)
    assert len(there.seen.data[stream_id]) == STREAM_WINDOW_BYTES
    world.rest(20.0)
    assert len(there.seen.data[stream_id]) == STREAM_WINDOW_BYTES
    assert here.seen.close is None
    there.reads = True
    world.run(lambda: stream_id in there.seen.ended)
    assert there.seen.data[stream_id] == data


def test_unread_streams_are_held_at_the_connections_window_and_go_on_when_they_are_read(sides):
    world, here, there = sides
    there.reads = False
    count = CONNECTION_WINDOW_BYTES // STREAM_WINDOW_BYTES + 3
    ids = [here.open(bytes(STREAM_WINDOW_BYTES), bi=False) for _ in range(count)]
    world.rest(5.0)
    assert sum(map(len, there.seen.data.values())) == CONNECTION_WINDOW_BYTES
    there.reads = True
    world.run(lambda: there.seen.ended >= set(ids))
    assert {len(there.seen.data[stream_id]) for stream_id in ids} == {STREAM_WINDOW_BYTES}


def test_a_held_stream_does_not_hold_the_others(sides):
    world, here, there = sides
    there.reads = False
    held = here.open(bytes(2 * STREAM_WINDOW_BYTES))
    world.rest(2.0)
    there.engine.consumed(held, 1)
    other = here.open(noise(STREAM_WINDOW_BYTES // 2))
    here.engine.send_datagram(b"not under flow control")
    world.run(lambda: other in there.seen.ended)
    assert there.seen.data[other] == noise(STREAM_WINDOW_BYTES // 2)
    assert there.seen.datagrams == [b"not under flow control"]
    assert len(there.seen.data[held]) <= STREAM_WINDOW_BYTES + 1


def test_the_peer_is_told_when_half_of_a_window_was_read(sides):
    world, here, there = sides
    there.reads = False
    stream_id = here.open(bytes(2 * STREAM_WINDOW_BYTES))
    world.rest(2.0)
    assert not there.engine.consumed(stream_id, 100)
    world.rest(1.0)
    assert len(there.seen.data[stream_id]) <= STREAM_WINDOW_BYTES + 100
    assert there.engine.consumed(stream_id, STREAM_WINDOW_BYTES // 2)
    world.rest(1.0)
    # As much more as was read, at least; a tuned window may be larger than before.
    assert len(there.seen.data[stream_id]) >= STREAM_WINDOW_BYTES + 100 + STREAM_WINDOW_BYTES // 2


@pytest.mark.parametrize("how", ["reset", "stop", "reset in flight"])
def test_streams_that_end_early_give_the_connections_window_back(sides, how):
    """More than the connection's window goes down streams that are never read to their end."""
    world, here, there = sides
    there.reads = False
    for _ in range(CONNECTION_WINDOW_BYTES // STREAM_WINDOW_BYTES + 3):
        stream_id = here.open(bytes(STREAM_WINDOW_BYTES), bi=False, end=False)
        if how != "reset in flight":
            world.run(lambda stream_id=stream_id: len(there.seen.data[stream_id]) == STREAM_WINDOW_BYTES)
        else:
            world.rest(0.015)
        if how == "stop":
            there.engine.stop(stream_id, 1)
            world.run(lambda stream_id=stream_id: stream_id in here.seen.stops)
        else:
            here.engine.reset(stream_id, 1)
            world.run(lambda stream_id=stream_id: stream_id in there.seen.resets)
        # What was delivered is dropped by its reader, and so consumed.
        there.engine.consumed(stream_id, len(there.seen.data[stream_id]))
        there._unconsumed.clear()
        world.rest(0.1)
    there.reads = True
    last = here.open(noise(CONNECTION_WINDOW_BYTES // 4))
    world.run(lambda: last in there.seen.ended)


def test_bytes_that_were_lost_before_a_reset_are_not_lost_to_the_connections_window(sides):
    """A reset stream sends nothing again, and yet all that it ever sent counts against the window."""
    world, here, there = sides
    way = world.up if here.is_client else world.down
    for _ in range(40):
        way.loss = 1.0
        stream_id = here.open(bytes(STREAM_WINDOW_BYTES), bi=False, end=False)
        world.rest(0.005)
        way.loss = 0.0
        here.engine.reset(stream_id, 1)
        world.run(lambda stream_id=stream_id: stream_id in there.seen.resets)
    ids = [here.open(bytes(STREAM_WINDOW_BYTES), bi=False) for _ in range(4)]
    world.run(lambda: there.seen.ended >= set(ids))


def test_a_lost_word_of_more_room_is_said_again(sides):
    world, here, there = sides
    back = world.down if here.is_client else world.up
    there.reads = False
    stream_id = here.open(noise(3 * STREAM_WINDOW_BYTES))
    world.rest(3.0)
    back.loss = 1.0
    there.reads = True
    world.rest(0.3)
    back.loss = 0.0
    world.run(lambda: stream_id in there.seen.ended)


# --- tuning ---


def piled_up(world, here, there, stream_id):
    """How much a writer that has enough to say gets into a reader that has stopped reading."""
    taken = len(there.seen.data[stream_id])
    there.reads = False
    for _ in range(20):
        here.engine.write(stream_id, bytes(STREAM_BYTES_MAX // 10))
        world.rest(0.5)
    return len(there.seen.data[stream_id]) - taken


@pytest.mark.parametrize("opener", ["client", "server"])
def test_a_reader_that_keeps_up_on_a_long_path_gets_a_larger_window_up_to_the_limit(connected, opener):
    """A window of one MiB and 200 ms there and back are 5 MB/s, whatever the path can carry."""
    world = connected(delay_s=0.100)
    here = getattr(world, opener)
    there = world.server if here is world.client else world.client
    stream_id = here.open(end=False)

    def feed():
        if here.engine.unacknowledged_bytes(stream_id) < 4 * STREAM_WINDOW_BYTES:
            here.engine.write(stream_id, bytes(STREAM_WINDOW_BYTES))
        return len(there.seen.data[stream_id]) > 24 * STREAM_WINDOW_BYTES

    world.run(feed)
    unread = piled_up(world, here, there, stream_id)
    assert hasattr(limits, "STREAM_WINDOW_BYTES_MAX"), "windows are not tuned"
    assert 1.5 * STREAM_WINDOW_BYTES < unread <= STREAM_BYTES_MAX
    assert here.seen.close is None


def test_a_slow_reader_keeps_the_window_that_it_has(sides):
    """What it cannot read in time is not worth holding."""
    world, here, there = sides
    there.reads = False
    stream_id = here.open(bytes(6 * STREAM_WINDOW_BYTES))
    taken = 0
    for _ in range(40):
        world.rest(0.5)
        chunk = min(STREAM_WINDOW_BYTES // 10, len(there.seen.data[stream_id]) - taken)
        there.engine.consumed(stream_id, chunk)
        taken += chunk
        assert len(there.seen.data[stream_id]) - taken <= STREAM_WINDOW_BYTES


def test_all_windows_together_stay_under_the_connections_limit(connected):
    world = connected(delay_s=0.100)
    here, there = world.client, world.server
    ids = [here.open(end=False, bi=False) for _ in range(4)]

    def feed():
        for stream_id in ids:
            if here.engine.unacknowledged_bytes(stream_id) < 2 * STREAM_WINDOW_BYTES:
                here.engine.write(stream_id, bytes(STREAM_WINDOW_BYTES))
        return sum(map(len, there.seen.data.values())) > 24 * STREAM_WINDOW_BYTES

    world.run(feed)
    there.reads = False
    taken = sum(map(len, there.seen.data.values()))
    more = CONNECTION_BYTES_MAX // len(ids) + STREAM_WINDOW_BYTES
    for stream_id in ids:
        here.engine.write(stream_id, bytes(more))
    world.rest(10.0)
    assert sum(map(len, there.seen.data.values())) - taken <= CONNECTION_BYTES_MAX
    assert here.seen.close is None

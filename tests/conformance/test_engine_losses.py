"""Bad networks: losses, doubles, disorder, silence for a while. Everything arrives, once, in order, in bounded time."""

import random

import pytest

from conformance.harness import SERVER_ADDRESS
from conformance.stock import stock_world


def noise(count, seed=0):
    return random.Random(seed).randbytes(count)


def exchange(world, count=20_000):
    """A question and an answer down one stream, to its end at both ends."""
    stream_id = world.client.open(noise(count, 1))
    world.run(lambda: stream_id in world.server.seen.ended)
    world.server.engine.write(stream_id, noise(count, 2), end=True)
    world.run(lambda: stream_id in world.client.seen.ended)
    assert world.server.seen.data[stream_id] == noise(count, 1)
    assert world.client.seen.data[stream_id] == noise(count, 2)


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("lost", range(16))
def test_any_one_datagram_may_be_lost(unconnected, direction, lost):
    world = unconnected(**{direction: {"drop": lambda number, _: number == lost}})
    began = world.now
    world.client.engine.connect(SERVER_ADDRESS, world.now)
    world.run(lambda: world.there and world.client.seen.protocol and world.server.seen.protocol)
    exchange(world)
    assert world.now - began < 5.0
    assert world.server.seen.close is world.client.seen.close is None


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_the_first_datagrams_of_a_handshake_may_all_be_lost(unconnected, direction, count):
    world = unconnected(**{direction: {"drop": lambda number, _: number < count}})
    world.client.engine.connect(SERVER_ADDRESS, world.now)
    world.run(lambda: world.there and world.client.seen.protocol and world.server.seen.protocol)
    exchange(world)


@pytest.mark.parametrize("seed", range(1, 9))
def test_a_handshake_gets_through_a_third_of_losses(unconnected, seed):
    world = unconnected(loss=0.33, seed=seed)
    world.client.engine.connect(SERVER_ADDRESS, world.now)
    world.run(lambda: world.there and world.client.seen.protocol and world.server.seen.protocol)
    exchange(world, 2000)


@pytest.mark.parametrize("opener", ["client", "server"])
@pytest.mark.parametrize(("loss", "within_s"), [(0.02, 20.0), (0.10, 60.0)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_megabyte_gets_through_losses_in_bounded_time(connected, opener, loss, within_s, seed):
    """About what RFC 3649's response function gives Reno at 1200 bytes and 20 ms, and room for probe timeouts."""
    world = connected(seed=seed)
    world.up.loss = world.down.loss = loss
    here = getattr(world, opener)
    there = world.server if here is world.client else world.client
    data = noise(1 << 20, seed)
    stream_id = here.open(data)
    world.run(lambda: stream_id in there.seen.ended, within_s=within_s)
    assert there.seen.data[stream_id] == data
    world.run(lambda: here.engine.unacknowledged_total_bytes == 0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_doubles_and_disorder_change_nothing(connected, seed):
    world = connected(doubles=0.3, jitter_s=0.020, seed=seed)
    ids = {world.client.open(noise(60_000, number), bi=number % 2 == 0): number for number in range(5)}
    ids |= {world.server.open(noise(60_000, number), bi=number % 2 == 0): number for number in range(5, 10)}
    world.run(lambda: world.client.seen.ended | world.server.seen.ended == set(ids))
    for stream_id, number in ids.items():
        end = world.client if stream_id & 1 else world.server
        assert end.seen.data[stream_id] == noise(60_000, number)
    world.client.engine.send_datagram(b"once")
    world.rest(2.0)
    assert world.server.seen.datagrams == [b"once"]
    assert world.client.misrouted == world.server.misrouted == 0


@pytest.mark.parametrize("seed", range(1, 6))
def test_ends_resets_and_stops_are_made_good_on_a_bad_network(connected, seed):
    world = connected(seed=seed)
    for way in (world.up, world.down):
        way.loss, way.doubles, way.jitter_s = 0.08, 0.05, 0.010
    rng = random.Random(seed)
    ended, reset, stopped = [], {}, {}
    for number in range(60):
        here, there = rng.sample(world.ends, 2)
        stream_id = here.open(noise(rng.choice([0, 10, 3000, 40_000]), number), end=False, bi=rng.random() < 0.5)
        match number % 3:
            case 0:
                here.engine.write(stream_id, b"", end=True)
                ended.append((there, stream_id))
            case 1:
                world.rest(rng.choice([0.0, 0.03]))
                here.engine.reset(stream_id, number)
                reset[stream_id] = (there, number)
            case 2:
                # It has to be known there before anybody can stop it.
                here.engine.write(stream_id, b"stop me")
                world.run(lambda there=there, stream_id=stream_id: there.seen.data[stream_id])
                there.engine.stop(stream_id, number)
                stopped[stream_id] = (here, number)
    world.run(
        lambda: (
            all(stream_id in there.seen.ended for there, stream_id in ended)
            and all(there.seen.resets.get(stream_id) == code for stream_id, (there, code) in reset.items())
            and all(here.seen.stops.get(stream_id) == code for stream_id, (here, code) in stopped.items())
        )
    )
    world.run(lambda: world.client.engine.unacknowledged_total_bytes == 0)
    exchange(world)


def test_a_link_that_was_cut_for_a_while_goes_on(world):
    stream_id = world.client.open(noise(400_000))
    world.rest(0.030)
    world.up.loss = world.down.loss = 1.0
    world.rest(8.0)
    world.up.loss = world.down.loss = 0.0
    # The next probe comes after as long again at the most (RFC 9002, 6.2.1).
    world.run(lambda: stream_id in world.server.seen.ended, within_s=12.0)
    assert world.server.seen.data[stream_id] == noise(400_000)


def test_a_path_with_a_short_queue_is_filled_and_not_flooded(connected):
    world = connected(rate_bytes_s=1_000_000, queue_bytes=20_000, delay_s=0.020, payload_bytes_max=1472)
    stream_id = world.client.open(bytes(3_000_000))
    took_s = world.run(lambda: stream_id in world.server.seen.ended)
    assert took_s < 6.0, "half of the path is left idle"
    assert world.up.lost < 0.15 * len(world.up.offered_bytes)


@pytest.mark.parametrize("opener", ["client", "server"])
@pytest.mark.parametrize("delay_s", [0.010, 0.013, 0.0217])
def test_timers_move_on_when_they_are_handled(connected, opener, delay_s):
    """A driver whose clock is virtual would be asked to handle the same timer for ever."""
    world = connected(delay_s=delay_s)
    here = getattr(world, opener)
    there = world.server if here is world.client else world.client
    way = world.up if here.is_client else world.down
    for turn in range(60):
        way.loss = 1.0
        stream_id = here.open(bytes(20_000), bi=False, end=False)
        world.rest(0.005)
        way.loss = 0.0
        if turn % 2:
            here.engine.write(stream_id, b"", end=True)
            world.run(lambda stream_id=stream_id: stream_id in there.seen.ended)
        else:
            here.engine.reset(stream_id, 0)
            world.run(lambda stream_id=stream_id: stream_id in there.seen.resets)
    assert world.spins == 0


@pytest.mark.parametrize("count_max", [1, 8, 64])
def test_a_pass_is_about_as_long_as_asked_for(connected, count_max):
    world = connected(count_max=count_max, delay_s=0.050)
    world.pass_datagrams = {True: 0, False: 0}
    stream_id = world.client.open(bytes(4 << 20))
    world.run(lambda: stream_id in world.server.seen.ended)
    assert world.pass_datagrams[True] <= 2 * count_max + 8
    assert world.pass_datagrams[False] <= 2 * count_max + 8


@pytest.mark.parametrize("stock", ["client", "server"])
def test_a_stock_peer_and_ours_exchange_a_megabyte_over_a_bad_network(make_factory, credentials, stock):
    world = stock_world(make_factory, credentials, stock, seed=5).connect()
    for way in (world.up, world.down):
        way.loss, way.jitter_s, way.doubles = 0.02, 0.005, 0.02
    exchange(world, 1 << 20)

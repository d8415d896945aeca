"""Unreliable messages beside the streams (RFC 9221)."""

import random

import pytest

from conformance.stock import stock_world


@pytest.fixture(params=["client", "server"])
def sides(request, world):
    """The world, the end that sends and the end that receives."""
    sender = getattr(world, request.param)
    return world, sender, world.server if sender is world.client else world.client


def test_messages_arrive_whole_and_apart(sides):
    world, here, there = sides
    sent = [random.Random(number).randbytes(number * 10) for number in range(100)]
    for data in sent:
        here.engine.send_datagram(data)
    world.run(lambda: len(there.seen.datagrams) == len(sent))
    assert there.seen.datagrams == sent
    assert here.engine.datagrams_dropped == 0


def test_the_largest_fits_and_one_byte_more_is_not_sent_and_holds_nothing_up(sides):
    world, here, there = sides
    largest = here.engine.datagram_bytes_max
    assert largest > 1100
    here.engine.send_datagram(b"m" * largest)
    here.engine.send_datagram(b"x" * (largest + 1))
    here.engine.send_datagram(b"behind it")
    stream_id = here.open(b"beside it")
    world.run(lambda: stream_id in there.seen.ended and len(there.seen.datagrams) >= 2)
    world.rest(1.0)
    assert [len(data) for data in there.seen.datagrams] == [largest, 9]
    assert here.engine.datagrams_dropped == 1


def test_too_many_that_wait_are_bounded_and_the_oldest_go_and_are_counted(sides):
    world, here, there = sides
    count = 20_000
    for number in range(count):
        here.engine.send_datagram(b"%d" % number)
    world.rest(5.0)
    arrived = [int(data) for data in there.seen.datagrams]
    assert 16 <= len(arrived) <= 4096
    assert here.engine.datagrams_dropped == count - len(arrived)
    assert arrived == list(range(count - len(arrived), count))


def test_what_is_lost_is_not_sent_again(sides):
    world, here, there = sides
    way = world.up if here.is_client else world.down
    way.loss = 1.0
    here.engine.send_datagram(b"lost")
    world.rest(0.005)
    way.loss = 0.0
    here.engine.send_datagram(b"found")
    world.rest(5.0)
    assert there.seen.datagrams == [b"found"]


def test_they_pass_streams_that_are_held(sides):
    world, here, there = sides
    there.reads = False
    here.open(bytes(4 << 20))
    world.rest(3.0)
    here.engine.send_datagram(b"pulse")
    world.run(lambda: there.seen.datagrams == [b"pulse"], within_s=1.0)


def test_they_do_not_wait_behind_bulk(connected):
    world = connected(rate_bytes_s=1_000_000, queue_bytes=64_000, delay_s=0.005)
    world.client.open(bytes(2_000_000))
    world.rest(0.3)
    world.client.engine.send_datagram(b"pulse")
    assert world.run(lambda: world.server.seen.datagrams) < 0.3


@pytest.mark.parametrize("stock", ["client", "server"])
def test_a_peer_that_takes_none_is_not_sent_any(make_factory, credentials, stock):
    world = stock_world(make_factory, credentials, stock, options={"max_datagram_frame_size": None}).connect()
    ours = world.server if stock == "client" else world.client
    assert ours.engine.datagram_bytes_max == 0


@pytest.mark.parametrize("stock", ["client", "server"])
def test_a_peers_limit_for_the_frame_is_heeded(make_factory, credentials, stock):
    world = stock_world(make_factory, credentials, stock, options={"max_datagram_frame_size": 100}).connect()
    ours, theirs = (world.server, world.client) if stock == "client" else (world.client, world.server)
    # The limit counts the whole frame (RFC 9221, 3): type, length, data.
    assert 90 <= ours.engine.datagram_bytes_max <= 98
    ours.engine.send_datagram(bytes(ours.engine.datagram_bytes_max))
    world.run(lambda: theirs.seen.datagrams)


def test_the_largest_fits_whatever_the_length_of_the_peers_ids(make_factory, credentials):
    """Ids of up to 20 bytes stand before the data; one that did not fit would hold up all behind it."""
    for length in (4, 8, 20):
        world = stock_world(make_factory, credentials, "client", options={"connection_id_length": length})
        # Ours routes by its own ids; those of the stock client are of another length here.
        world._route = lambda datagram, to_server, route=world._route, world=world: (
            route(datagram, True) if to_server else world.client
        )
        world.connect()
        largest = world.server.engine.datagram_bytes_max
        world.server.engine.send_datagram(bytes(largest))
        world.server.engine.send_datagram(b"behind it")
        world.run(lambda world=world: len(world.client.seen.datagrams) == 2)

"""Path MTU discovery (RFC 8899): packets grow to what the path carries, and shrink when it carries less."""

import pytest

from conformance.stock import stock_world
from quorate_protocol.limits import UDP_PAYLOAD_BYTES_MAX, UDP_PAYLOAD_BYTES_MIN

#: UDP payloads of paths: loopback, jumbo frames, Ethernet, PPPoE, IPv6 tunnels, the least.
PATHS = {
    "loopback": UDP_PAYLOAD_BYTES_MAX,
    "jumbo": 9000 - 28,
    "ethernet": 1500 - 28,
    "1452": 1452,
    "tunnel": 1400 - 48,
    "least": UDP_PAYLOAD_BYTES_MIN,
}


def both(world, opener):
    here = getattr(world, opener)
    return here, world.server if here is world.client else world.client


def transfer(world, here, there, count=2 << 20, within_s=30.0):
    """Bulk from one end to the other."""
    stream_id = here.open(bytes(count))
    world.run(lambda: stream_id in there.seen.ended, within_s=within_s)
    assert len(there.seen.data[stream_id]) == count


@pytest.mark.parametrize("opener", ["client", "server"])
@pytest.mark.parametrize("path", PATHS)
def test_packets_grow_to_what_the_path_carries(connected, opener, path):
    world = connected(payload_bytes_max=PATHS[path])
    here, there = both(world, opener)
    for _ in range(3):
        transfer(world, here, there)
        world.rest(1.0)
    assert here.engine.udp_payload_bytes <= PATHS[path]
    assert here.engine.udp_payload_bytes >= max(UDP_PAYLOAD_BYTES_MIN, 0.9 * PATHS[path])
    if PATHS[path] >= UDP_PAYLOAD_BYTES_MAX:
        assert here.engine.udp_payload_bytes == UDP_PAYLOAD_BYTES_MAX
    # Larger packets make larger datagrams possible.
    assert here.engine.datagram_bytes_max >= here.engine.udp_payload_bytes - 60
    here.engine.send_datagram(bytes(here.engine.datagram_bytes_max))
    world.run(lambda: there.seen.datagrams)
    way = world.up if here.is_client else world.down
    assert way.largest_bytes <= UDP_PAYLOAD_BYTES_MAX


def test_a_connection_begins_with_the_least(unconnected):
    world = unconnected()
    assert world.client.engine.udp_payload_bytes == UDP_PAYLOAD_BYTES_MIN


def test_bulk_soon_goes_in_large_packets(connected):
    world = connected()
    transfer(world, world.client, world.server, 8 << 20)
    large = sum(size for size in world.up.offered_bytes if size > 16_000)
    assert large > 4 << 20, "more than half of eight megabytes should have gone in packets of 16 KB"


@pytest.mark.parametrize("opener", ["client", "server"])
@pytest.mark.parametrize("limit", [1472, 8972])
def test_what_the_senders_network_refuses_is_heeded(connected, opener, limit):
    world = connected(local_bytes_max=limit)
    here, there = both(world, opener)
    for _ in range(3):
        transfer(world, here, there)
        world.rest(1.0)
    assert 0.9 * limit <= here.engine.udp_payload_bytes <= limit


@pytest.mark.parametrize("opener", ["client", "server"])
@pytest.mark.parametrize("told", [True, False], ids=["and says so", "and swallows the rest"])
@pytest.mark.parametrize("before", [UDP_PAYLOAD_BYTES_MAX, 8972, 1472])
def test_a_path_that_shrinks_is_noticed_and_the_transfer_goes_on(connected, opener, told, before):
    world = connected(payload_bytes_max=before)
    here, there = both(world, opener)
    for _ in range(2):
        transfer(world, here, there)
        world.rest(1.0)
    grown = here.engine.udp_payload_bytes
    assert grown >= 0.9 * before
    stream_id = here.open(bytes(2 << 20))
    world.rest(0.030)
    for way in (world.up, world.down):
        if told:
            way.local_bytes_max = 1300
        else:
            way.payload_bytes_max = 1300
    world.run(lambda: stream_id in there.seen.ended, within_s=30.0)
    assert here.engine.udp_payload_bytes <= 1300
    assert here.seen.close is there.seen.close is None
    # And back, sooner or later, as far as a further search goes; never below the least.
    assert here.engine.udp_payload_bytes >= UDP_PAYLOAD_BYTES_MIN


def test_losses_alone_are_not_taken_for_a_smaller_path_for_ever(connected):
    world = connected()
    transfer(world, world.client, world.server)
    world.up.loss = world.down.loss = 0.05
    transfer(world, world.client, world.server, within_s=60.0)
    world.up.loss = world.down.loss = 0.0
    for _ in range(3):
        transfer(world, world.client, world.server)
        world.rest(1.0)
    # A search may be taken up again after minutes only (RFC 8899, 5.1.1: ten by default).
    world.rest(700.0)
    transfer(world, world.client, world.server)
    world.rest(1.0)
    assert world.client.engine.udp_payload_bytes == UDP_PAYLOAD_BYTES_MAX


@pytest.mark.parametrize("ceiling", [1200, 1452, 5000])
@pytest.mark.parametrize("small", ["client", "server"])
def test_the_ceiling_of_one_end_holds_for_both(connected, ceiling, small):
    """One stops its own search there, the other hears of it (RFC 9000, 18.2: max_udp_payload_size)."""
    world = connected(**{f"{small}_bytes_max": ceiling})
    for _ in range(2):
        transfer(world, world.client, world.server)
        transfer(world, world.server, world.client)
        world.rest(1.0)
    assert world.up.largest_bytes <= ceiling
    assert world.down.largest_bytes <= ceiling
    for end in world.ends:
        assert 0.9 * ceiling <= end.engine.udp_payload_bytes <= ceiling


@pytest.mark.parametrize("said", [1200, 1300, 4000])
@pytest.mark.parametrize("stock", ["client", "server"])
def test_a_stock_peers_ceiling_is_honoured(make_factory, credentials, said, stock):
    world = stock_world(make_factory, credentials, stock, said={"max_udp_payload_size": said}).connect()
    ours, theirs, way = (
        (world.server, world.client, world.down) if stock == "client" else (world.client, world.server, world.up)
    )
    for _ in range(3):
        transfer(world, ours, theirs)
        world.rest(1.0)
    assert way.largest_bytes <= said
    assert ours.engine.udp_payload_bytes >= 0.9 * said


@pytest.mark.parametrize("stock", ["client", "server"])
def test_large_packets_go_to_a_stock_peer_that_takes_them(make_factory, credentials, stock):
    world = stock_world(make_factory, credentials, stock, said={"max_udp_payload_size": 65_527}).connect()
    ours, theirs = (world.server, world.client) if stock == "client" else (world.client, world.server)
    for _ in range(3):
        transfer(world, ours, theirs)
        world.rest(1.0)
    assert ours.engine.udp_payload_bytes == UDP_PAYLOAD_BYTES_MAX


def test_an_idle_connection_does_not_probe_for_ever(world):
    transfer(world, world.client, world.server)
    world.rest(5.0)
    sent = len(world.up.offered_bytes) + len(world.down.offered_bytes)
    world.rest(60.0)
    assert len(world.up.offered_bytes) + len(world.down.offered_bytes) - sent < 40


def test_probes_that_are_lost_do_not_slow_bulk_down(connected):
    """RFC 8899, 3: a probe's loss is no sign of congestion."""
    took_s = {}
    for name, options in (("searching", {}), ("not searching", {"client_bytes_max": UDP_PAYLOAD_BYTES_MIN})):
        world = connected(payload_bytes_max=UDP_PAYLOAD_BYTES_MIN, delay_s=0.020, **options)
        stream_id = world.client.open(bytes(3 << 20))
        took_s[name] = world.run(lambda world=world, stream_id=stream_id: stream_id in world.server.seen.ended)
    assert took_s["searching"] < 1.5 * took_s["not searching"]

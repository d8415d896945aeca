"""Floods of frames: each packet is fine, or nearly, and there are very many of them.

They are borne or closed upon; what they leave behind, and what one more of them costs, does not grow with their
number. All of this a stranger can do who has only finished a handshake.
"""

import sys

import pytest

from conformance.stock import frame, stock_world
from fuzz.held import HELD_BYTES_MAX, TRANSPORT_CODES, held_bytes

FLOODS = {
    "path challenges": lambda n: frame(0x1A, n.to_bytes(8, "big")) * 30,
    "new ids that retire the old": lambda n: frame(
        0x18, 8 + n, 8 + n, b"\x08" + n.to_bytes(8, "big") + n.to_bytes(16, "big")
    ),
    "crypto bytes with gaps": lambda n: frame(0x06, 2 * n, 1, b"x"),
    "bytes of a stream with gaps": lambda n: b"".join(
        frame(0x0E, 0, 10 + 2 * (100 * n + m), 1, b"x") for m in range(100)
    ),
    "streams that are opened and reset": lambda n: b"".join(frame(0x04, 4 * (n % 1024), 1, 0) for _ in range(50)),
    "streams that are opened and ended": lambda n: b"".join(frame(0x0B, 4 * (4 * n + m), 1, b"x") for m in range(4)),
    "limits of all streams": lambda n: b"".join(frame(0x11, 4 * ((8 * n + m) % 1024), n) for m in range(8)),
    "stops of all streams": lambda n: b"".join(frame(0x05, 4 * ((8 * n + m) % 1024), n) for m in range(8)),
    "blocked": lambda n: frame(0x14, n) * 20 + frame(0x16, n) + frame(0x17, n),
    "datagrams": lambda n: frame(0x31, 8, n.to_bytes(8, "big")) * 50,
    "tokens": lambda n: frame(0x07, 8, n.to_bytes(8, "big")) * 20,
    "nothing at all": lambda n: bytes(500),
}


@pytest.fixture(params=["client", "server"])
def sides(request, make_factory, credentials):
    """The world, our end and the hostile one, which is the client or the server."""
    world = stock_world(make_factory, credentials, request.param, delay_s=0.001).connect()
    return (world, world.server, world.client) if request.param == "client" else (world, world.client, world.server)


def lines_run(action) -> int:
    """How many lines of Python run in `action`: the same on every machine."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        if event == "line":
            count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_does_not_pile_up(sides, flood):
    world, ours, peer = sides
    before = held_bytes(ours.engine)
    for number in range(1500):
        peer.engine.quic.inject(FLOODS[flood](number))
        if number % 10 == 9:
            world.rest(0.005)
        if ours.seen.close:
            break
    world.rest(0.2)
    if ours.seen.close:
        assert ours.seen.close.transport
        assert ours.seen.close.code in TRANSPORT_CODES
    assert held_bytes(ours.engine) - before < HELD_BYTES_MAX


@pytest.mark.parametrize("flood", FLOODS)
def test_one_packet_more_costs_the_same_as_one_of_the_first(sides, flood):
    """What grows with what came before is a lever: few bytes a second that keep a coordinator busy."""
    world, ours, peer = sides
    costs = []
    for number in range(50):
        peer.engine.quic.inject(FLOODS[flood](number))
        peer.report()
        ((datagram, _), *_) = peer.engine.datagrams_to_send(world.now, 64) or ((None, None),)
        if datagram is None or ours.seen.close:
            break

        def one_more(datagram=datagram):
            world.deliver(ours, datagram)
            ours.report()

        costs.append(lines_run(one_more))
        world.rest(0.010)
    if len(costs) == 50:
        assert max(costs[-5:]) <= 3 * max(costs[:5])


def test_packets_with_gaps_between_their_numbers_do_not_pile_up(sides):
    """Each gap is a range in the next acknowledgement."""
    world, ours, peer = sides
    before = held_bytes(ours.engine)
    costs = []
    for number in range(1200):
        peer.engine.quic.skip_packet_numbers(1)
        peer.engine.quic.inject(frame(0x01))
        if number in (5, 1195):
            costs.append(lines_run(lambda: world.rest(0.005)))
        elif number % 3 == 2:
            world.rest(0.005)
    assert ours.seen.close is None
    assert costs[1] <= 10 * costs[0]
    assert held_bytes(ours.engine) - before < HELD_BYTES_MAX // 4

"""A server that has lost its memory, and the client that hears of it (RFC 9000, 10.3)."""

import pytest

from conformance.harness import make_world

KEY, OTHER_KEY = b"k" * 32, b"o" * 32


@pytest.fixture
def packet(make_factory, credentials):
    """A world with a server of this key, and a packet that its client has sent."""
    serving = make_factory(reset_key=KEY)
    serving.set_server(credentials.tls, ["quorate/1"])
    world = make_world(make_factory, credentials, serving=serving).connect()
    world.client.open(b"hello")
    ((datagram, _), *_) = world.client.engine.datagrams_to_send(world.now, 64)
    return world, datagram


def test_a_server_that_was_started_again_ends_the_connections_of_its_earlier_life(packet, make_factory):
    world, datagram = packet
    reset = make_factory(reset_key=KEY).reset(datagram)
    assert len(reset) < len(datagram)
    assert reset[0] & 0xC0 == 0x40, "it looks like a packet"
    assert world.client.engine.was_reset(reset, world.now)
    world.client.report()
    error = world.client.seen.close
    assert (error.by_peer, error.transport, error.timed_out) == (True, True, False)
    assert "does not know this connection" in str(error)
    assert world.client.engine.datagrams_to_send(world.now, 64) == [], "a connection that is drained says nothing"
    assert not world.client.engine.was_reset(reset, world.now), "once"


def test_nobody_else_can_end_a_connection(packet, make_factory):
    world, datagram = packet
    reset = make_factory(reset_key=KEY).reset(datagram)
    forged = [
        make_factory(reset_key=OTHER_KEY).reset(datagram),
        make_factory().reset(datagram),
        make_factory(reset_key=KEY).reset(datagram[:1] + bytes(8) + datagram[9:]),
        reset[:-1] + bytes([reset[-1] ^ 1]),
        reset[:-1],
        reset[-15:],
        b"",
    ]
    for one in forged:
        assert not world.client.engine.was_reset(one, world.now)
    world.run(lambda: world.server.seen.ended)
    assert world.client.seen.close is None


def test_every_id_that_the_server_gives_has_its_token(packet, make_factory):
    world, datagram = packet
    again = make_factory(reset_key=KEY)
    given = [bytes(connection_id.cid) for connection_id in world.client.engine._quic._peer_cid_available]
    assert len(given) > 3
    for at, connection_id in enumerate(given):
        world.client.engine._quic.change_connection_id()
        reset = again.reset(datagram[:1] + connection_id + datagram[9:])
        assert world.client.engine.was_reset(reset, world.now) is (at == 0), "and one ends it"


@pytest.mark.parametrize(
    ("size", "answered"), [(9, None), (21, None), (22, 21), (30, 29), (42, 41), (43, 42), (1200, 42)]
)
def test_a_reset_is_shorter_than_what_it_answers(make_factory, size, answered):
    reset = make_factory(reset_key=KEY).reset(bytes([0x40]) + bytes(size - 1))
    assert (None if reset is None else len(reset)) == answered

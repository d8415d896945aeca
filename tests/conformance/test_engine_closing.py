"""How a connection ends: by either end, by silence, by a peer that breaks the rules; and what is left of it."""

import pytest

from conformance.stock import frame, stock_world
from quorate_protocol.errors import Code

#: Codes that the transport itself may close with (RFC 9000, 20.1), TLS alerts included.
TRANSPORT_CODES = {*range(1, 0x11), *range(0x100, 0x200)}

#: Seconds of silence after which a connection is given up: it must outlive a lease, and not by much.
IDLE_S = (15.0, 65.0)


@pytest.fixture(params=["client", "server"])
def sides(request, world):
    """The world, the end that closes and the end that hears of it."""
    closer = getattr(world, request.param)
    return world, closer, world.server if closer is world.client else world.client


def test_both_ends_hear_code_and_reason_once(sides):
    world, here, there = sides
    here.engine.close(Code.BUSY, "come back tomorrow – perhaps")
    world.run(lambda: there.seen.close)
    for end in (here, there):
        error = end.seen.close
        assert (error.code, error.reason, error.transport) == (Code.BUSY, "come back tomorrow – perhaps", False)
        assert error.by_peer is (end is there)
    world.rest(60.0)  # the recorders would object to anything more
    assert len(here.seen.of("closed")) == len(there.seen.of("closed")) == 1


def test_any_code_can_be_given(sides):
    world, here, there = sides
    here.engine.close((1 << 62) - 1, "")
    world.run(lambda: there.seen.close)
    assert there.seen.close.code == (1 << 62) - 1


@pytest.mark.parametrize("reason", ["x" * 100_000, "é" * 5000, "\ud800 lone"], ids=["long", "wide", "not text"])
def test_a_reason_that_is_too_long_for_a_packet_is_cut(sides, reason):
    world, here, there = sides
    here.engine.close(1, reason)
    world.run(lambda: there.seen.close)
    assert there.seen.close.code == 1
    assert len(there.seen.close.reason) <= 1200
    assert reason.startswith(there.seen.close.reason) or "lone" in reason


def test_a_second_close_changes_nothing(sides):
    world, here, there = sides
    here.engine.close(1, "first")
    here.engine.close(2, "second")
    world.run(lambda: there.seen.close)
    here.engine.close(3, "third")
    there.engine.close(4, "fourth")
    world.rest(30.0)
    assert (there.seen.close.code, there.seen.close.reason) == (1, "first")


def test_calls_after_the_end_do_nothing_and_do_not_raise(sides):
    world, here, there = sides
    stream_id = here.open(bytes(100_000), end=False)
    world.rest(0.5)
    here.engine.close(0, "")
    world.run(lambda: there.seen.close)
    for end in (here, there):
        engine = end.engine
        engine.reset(stream_id, 1)
        engine.stop(stream_id, 1)
        engine.consumed(stream_id, 10)
        engine.set_priority(stream_id, 0)
        engine.send_datagram(b"x")
        engine.datagram_refused(1400, world.now)
        assert not engine.receive(b"\x40" + bytes(100), ("192.0.2.9", 9), world.now)
    world.rest(30.0)


def test_the_closing_period_ends_and_nothing_is_left_to_do(sides):
    """RFC 9000, 10.2: three times the probe timeout, in which a late packet is answered by the close."""
    world, here, there = sides
    here.engine.close(0, "")
    world.serve()
    assert not here.engine.is_gone
    world.run(lambda: there.seen.close)
    assert not there.engine.is_gone, "late packets would be taken for those of a stranger"
    world.run(lambda: here.engine.is_gone and there.engine.is_gone, within_s=10.0)
    for end in (here, there):
        assert end.engine.datagrams_to_send(world.now, 64) == []
        assert end.engine.timer() is None or end.engine.timer() > world.now


def test_whoever_did_not_hear_of_the_close_is_told_when_it_speaks(sides):
    world, here, there = sides
    way = world.up if here.is_client else world.down
    way.loss = 1.0
    here.engine.close(7, "lost at first")
    world.serve()
    world.rest(0.005)
    way.loss = 0.0
    there.open(b"are you there?")
    world.run(lambda: there.seen.close, within_s=40.0)
    assert there.seen.close.code == 7, "it was left to the idle timeout"


def test_a_close_before_the_handshake_is_over_ends_it(unconnected):
    world = unconnected()
    world.client.engine.connect(("192.0.2.2", 4433), world.now)
    world.serve()
    world.client.engine.close(3, "changed my mind")
    world.run(lambda: world.client.engine.is_gone, within_s=30.0)
    assert world.client.seen.protocol is None
    assert world.client.seen.close.code == 3


# --- silence ---


def test_silence_ends_a_connection_at_both_ends(world):
    world.rest(1.0)
    world.up.loss = world.down.loss = 1.0
    began = world.now
    ended_s = {}

    def listen():
        for end in world.ends:
            if end.seen.close:
                ended_s.setdefault(end.is_client, world.now - began)
        return len(ended_s) == 2

    world.run(listen, within_s=100.0)
    for end in world.ends:
        assert IDLE_S[0] <= ended_s[end.is_client] <= IDLE_S[1]
        assert not end.seen.close.by_peer
    world.run(lambda: all(end.engine.is_gone for end in world.ends), within_s=60.0)


def test_silence_ends_a_connection_with_bytes_under_way(world):
    world.up.loss = world.down.loss = 1.0
    for end in world.ends:
        end.open(bytes(100_000))
    world.run(lambda: all(end.seen.close for end in world.ends), within_s=100.0)


def test_a_client_without_an_answer_gives_up(unconnected):
    world = unconnected(loss=1.0)
    world.client.engine.connect(("192.0.2.2", 4433), world.now)
    took_s = world.run(lambda: world.client.seen.close, within_s=200.0)
    assert took_s >= 5.0
    assert sum(world.up.offered_bytes) < 100_000, "it is not to hammer at a door that stays shut"


def test_a_client_that_waits_keeps_the_connection_alive(world):
    """RFC 9000, 10.1.2: whoever waits for an answer is not idle."""
    sent = len(world.up.offered_bytes) + len(world.down.offered_bytes)
    world.rest(600.0)
    assert world.client.seen.close is None
    assert world.server.seen.close is None
    assert len(world.up.offered_bytes) + len(world.down.offered_bytes) - sent < 200
    stream_id = world.server.open(b"the answer, at last")
    world.run(lambda: stream_id in world.client.seen.ended, within_s=1.0)


def test_a_client_that_waits_while_its_bytes_are_held_keeps_the_connection_alive(world):
    world.server.reads = False
    stream_id = world.client.open(bytes(4 << 20))
    world.rest(300.0)
    assert world.client.seen.close is None
    world.server.reads = True
    world.run(lambda: stream_id in world.server.seen.ended)


# --- a peer that breaks the rules ---

VIOLATIONS = {
    "an unknown frame": frame(0x3F),
    "a cut frame": frame(0x08),
    "a cut frame type": b"\x40",
    "too many bytes of a stream": frame(0x0C, 0, (1 << 40)) + b"x",
    "a stream over the limit": frame(0x08, 4 * 1_000_000) + b"x",
    "bytes behind the end": frame(0x0B, 0, 5, b"12345") + frame(0x0F, 0, 10, 3, b"abc"),
    "a stream that only we could open": frame(0x08, 4001) + b"x",
    "a limit for a stream that it only reads": frame(0x11, 2, 10),
    "a stop for a stream that only it sends": frame(0x05, 2, 0),
    "an acknowledgement of what was never sent": frame(0x02, 1 << 40, 0, 0, 0),
    "an id that retires more than there are": frame(0x18, 3, 9, b"\x08" + bytes(8) + bytes(16)),
    "an id of no length": frame(0x18, 3, 0, b"\x00" + bytes(16)),
    "a retirement of an id that was never issued": frame(0x19, 1 << 30),
    "a path response out of the blue": frame(0x1B, b"12345678"),
    "that the handshake is done": frame(0x1E),
    "a token": frame(0x07, 4, b"tokn"),
    "a stream limit beyond all streams": frame(0x12, (1 << 60) + 1),
}


@pytest.mark.parametrize("what", VIOLATIONS)
def test_a_client_that_breaks_the_rules_is_closed_with_a_transport_code(make_factory, credentials, what):
    world = stock_world(make_factory, credentials, "client").connect()
    world.client.engine.quic.inject(VIOLATIONS[what])
    world.run(lambda: world.client.seen.close)
    error = world.server.seen.close
    assert error.transport
    assert not error.by_peer
    assert error.code in TRANSPORT_CODES
    assert world.client.seen.close.code == error.code
    world.run(lambda: world.server.engine.is_gone, within_s=10.0)


def test_a_close_by_the_peers_transport_is_told_as_such(make_factory, credentials):
    world = stock_world(make_factory, credentials, "client").connect()
    world.client.engine.quic.inject(frame(0x1C, 0x0A, 0x08, 4, b"what"))
    world.run(lambda: world.server.seen.close)
    error = world.server.seen.close
    assert (error.code, error.reason, error.by_peer, error.transport) == (0x0A, "what", True, True)


def test_ids_are_issued_and_retired_and_every_datagram_goes_to_one_that_is_known(make_factory, credentials):
    world = stock_world(make_factory, credentials, "client").connect()
    ours, theirs = world.server, world.client
    for turn in range(20):
        theirs.engine.quic.change_connection_id()
        stream_id = theirs.open(b"%d" % turn)
        world.run(lambda stream_id=stream_id: stream_id in ours.seen.ended)
        world.rest(0.5)
    assert len(ours.seen.of("connection_id_retired")) == 20
    assert len(ours.seen.of("connection_id_issued")) >= 20
    assert len(ours.ids) <= 16
    assert {len(connection_id) for (connection_id,) in ours.seen.of("connection_id_issued")} == {8}
    assert ours.misrouted == theirs.misrouted == 0

"""What a peer says of itself in the handshake (RFC 9000, 18) is heeded, or refused where it makes no sense."""

import pytest

from conformance.harness import SERVER_ADDRESS
from conformance.stock import frame, stock_world

TRANSPORT_PARAMETER_ERROR = 0x08


@pytest.fixture(params=["client", "server"])
def meet(request, make_factory, credentials):
    """Makes worlds with a stock end that says what it likes: the world, our end, theirs."""

    def make(*, connects=True, **said):
        world = stock_world(make_factory, credentials, request.param, said=said)
        if not connects:
            return world, request.param
        world.connect()
        if request.param == "client":
            return world, world.server, world.client
        return world, world.client, world.server

    return make


@pytest.mark.parametrize(
    "said",
    [
        {"max_udp_payload_size": 1199},
        {"max_udp_payload_size": 0},
        {"ack_delay_exponent": 21},
        {"max_ack_delay": 1 << 14},
        {"active_connection_id_limit": 1},
        {"initial_max_streams_bidi": (1 << 60) + 1},
        {"initial_source_connection_id": b"another"},
    ],
    ids=str,
)
def test_what_is_not_allowed_ends_the_handshake(meet, said):
    """RFC 9000, 18.2 and 7.3."""
    world, stock = meet(connects=False, **said)
    world.client.engine.connect(SERVER_ADDRESS, world.now)
    world.run(lambda: world.there and any(end.seen.close for end in world.ends))
    world.rest(1.0)
    ours = world.server if stock == "client" else world.client
    assert ours.seen.close.transport
    assert not ours.seen.close.by_peer
    assert ours.seen.close.code == TRANSPORT_PARAMETER_ERROR


@pytest.mark.parametrize(
    "said",
    [
        {"max_udp_payload_size": 1200},
        {"max_udp_payload_size": (1 << 62) - 1},
        {"ack_delay_exponent": 20},
        {"max_ack_delay": (1 << 14) - 1},
        {"active_connection_id_limit": (1 << 62) - 1},
        {"initial_max_data": (1 << 62) - 1},
        {"max_idle_timeout": None},
        {"disable_active_migration": True},
    ],
    ids=str,
)
def test_what_is_at_the_edge_of_what_is_allowed_works(meet, said):
    world, ours, theirs = meet(**said)
    stream_id = ours.open(bytes(100_000))
    world.run(lambda: stream_id in theirs.seen.ended)
    back = theirs.open(bytes(100_000))
    world.run(lambda: back in ours.seen.ended)


def test_limits_of_streams_are_heeded_and_heard_of_when_they_rise(meet):
    world, ours, theirs = meet(initial_max_streams_bidi=2, initial_max_streams_uni=0)
    assert not ours.engine.can_open_stream(bidirectional=False)
    ours.open(b"one")
    ours.open(b"two")
    assert not ours.engine.can_open_stream(bidirectional=True)
    told = len(ours.seen.of("streams_available"))
    theirs.engine.quic.inject(frame(0x13, 3))
    world.run(lambda: ours.engine.can_open_stream(bidirectional=False))
    assert len(ours.seen.of("streams_available")) > told
    assert [ours.open(b"x", bi=False) & 2 for _ in range(3)] == [2, 2, 2]
    assert not ours.engine.can_open_stream(bidirectional=False)
    # A limit that falls is an old one that came late.
    theirs.engine.quic.inject(frame(0x13, 1))
    world.rest(0.1)
    assert ours.seen.close is None


def test_small_windows_are_heeded(meet):
    """Stock aioquic raises them as bytes arrive, and ends the connection when one is passed."""
    windows = (
        "initial_max_stream_data_bidi_local",
        "initial_max_stream_data_bidi_remote",
        "initial_max_stream_data_uni",
    )
    world, ours, theirs = meet(initial_max_data=5000, **dict.fromkeys(windows, 3000))
    # What it says is what it holds us to only if it believes it too.
    quic = theirs.engine.quic
    quic._local_max_data.value = 5000
    quic._local_max_stream_data_bidi_local = quic._local_max_stream_data_bidi_remote = 3000
    quic._local_max_stream_data_uni = 3000
    ids = [ours.open(bytes(20_000), bi=number % 2 == 0) for number in range(5)]
    world.run(lambda: theirs.seen.ended >= set(ids))
    assert theirs.seen.close is None


def test_the_shorter_idle_timeout_of_both_holds(meet):
    """RFC 9000, 10.1."""
    world, ours, _ = meet(max_idle_timeout=6000)
    world.up.loss = world.down.loss = 1.0
    assert 3.0 < world.run(lambda: ours.seen.close, within_s=100.0) < 12.0


def test_a_client_that_waits_keeps_a_short_idle_timeout_from_ending_the_connection(make_factory, credentials):
    world = stock_world(make_factory, credentials, "server", options={"idle_timeout": 6.0}).connect()
    world.rest(60.0)
    assert world.client.seen.close is world.server.seen.close is None

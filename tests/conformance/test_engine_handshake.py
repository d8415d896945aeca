"""Engines meet, agree on a protocol, or say why not."""

import pytest

from quorate_coordinator.certificates import ensure_development_credentials
from quorate_protocol.errors import ConfigurationError
from quorate_protocol.limits import UDP_PAYLOAD_BYTES_MIN
from quorate_protocol.transport import ALPN, ClientTls, ServerTls

#: TLS alerts as transport codes (RFC 9001, 4.8).
ALERTS = range(0x100, 0x200)
ALERT_NO_APPLICATION_PROTOCOL = 0x100 + 120


def test_both_ends_hear_once_that_the_handshake_is_complete(unconnected):
    world = unconnected()
    assert not world.client.engine.is_established
    world.connect()
    for end in world.ends:
        assert end.engine.is_established
        assert end.seen.of("handshake_completed") == [[ALPN]]
        assert end.seen.close is None
        assert not end.engine.is_gone


def test_a_handshake_takes_one_round_trip_for_the_client_and_another_half_for_the_server(unconnected):
    world = unconnected(delay_s=0.050)
    heard_s = {}
    began = world.now
    world.client.engine.connect(("192.0.2.2", 4433), began)

    def listen():
        for end in world.ends:
            if end.seen.protocol is not None:
                heard_s.setdefault(end.is_client, world.now - began)
        return len(heard_s) == 2

    world.run(listen)
    assert heard_s[True] == pytest.approx(0.100, abs=0.010)
    assert heard_s[False] == pytest.approx(0.150, abs=0.010)


@pytest.mark.parametrize(
    ("offered", "spoken"),
    [(("quorate/1", "h3"), ("h3",)), (("h3",), ("quorate/1", "h3")), (("quorate/1", "h3"), ("quorate/1", "h3"))],
    ids=["the client has more", "the server has more", "both have both"],
)
def test_a_protocol_that_both_speak_is_chosen(unconnected, offered, spoken):
    world = unconnected(client_protocols=offered, server_protocols=spoken).connect()
    assert world.client.seen.protocol == world.server.seen.protocol
    assert world.client.seen.protocol == next(protocol for protocol in offered if protocol in spoken)


def test_without_a_common_protocol_both_ends_are_closed_with_the_alert(unconnected):
    world = unconnected(client_protocols=("quorate/9",))
    world.client.engine.connect(("192.0.2.2", 4433), world.now)
    world.run(lambda: len([end for end in world.ends if end.seen.close]) == 2)
    for end in world.ends:
        assert end.seen.close.transport
        assert end.seen.close.code == ALERT_NO_APPLICATION_PROTOCOL
        assert end.seen.protocol is None
    assert (world.client.seen.close.by_peer, world.server.seen.close.by_peer) == (True, False)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    """Credentials of an authority that nobody here trusts."""
    return ensure_development_credentials(tmp_path_factory.mktemp("strangers"))


@pytest.mark.parametrize("why", ["authority", "name"])
def test_a_certificate_that_is_not_trusted_ends_the_handshake_with_an_alert_at_both_ends(
    unconnected, credentials, strangers, why
):
    if why == "authority":
        tls = ClientTls(ca_file=strangers.ca_file)
    else:
        tls = ClientTls(ca_file=credentials.ca_file, server_name="other.invalid")
    world = unconnected(tls=tls)
    world.client.engine.connect(("192.0.2.2", 4433), world.now)
    world.run(lambda: len([end for end in world.ends if end.seen.close]) == 2)
    for end in world.ends:
        assert end.seen.close.transport
        assert end.seen.close.code in ALERTS
    assert (world.client.seen.close.by_peer, world.server.seen.close.by_peer) == (False, True)
    assert world.client.seen.protocol is None


def test_files_that_cannot_be_read_are_named(make_factory, credentials, tmp_path):
    missing = tmp_path / "nothing here"
    with pytest.raises(ConfigurationError, match="ca_file"):
        make_factory().client(ClientTls(ca_file=missing), "localhost", [ALPN])
    with pytest.raises(ConfigurationError, match="certificate_file"):
        make_factory().set_server(ServerTls(missing, credentials.tls.key_file), [ALPN])
    with pytest.raises(ConfigurationError, match="key_file"):
        make_factory().set_server(ServerTls(credentials.tls.certificate_file, missing), [ALPN])


def test_a_new_certificate_is_shown_to_the_next_client(unconnected, strangers):
    world = unconnected(tls=ClientTls(ca_file=strangers.ca_file))
    world.factory.set_server(strangers.tls, [ALPN])
    world.connect()


def test_nothing_is_sent_before_connect_and_first_a_full_initial(unconnected):
    engine = unconnected().client.engine
    assert engine.datagrams_to_send(0.0, 64) == []
    engine.connect(("192.0.2.2", 4433), 0.0)
    datagrams = engine.datagrams_to_send(0.0, 64)
    assert datagrams
    for datagram, address in datagrams:
        assert address == ("192.0.2.2", 4433)
        # RFC 9000, 14.1: a client's Initials are padded, and go no further than every path carries.
        assert len(datagram) == UDP_PAYLOAD_BYTES_MIN
        assert datagram[0] & 0x80


def test_the_round_trip_time_is_measured(unconnected):
    world = unconnected(delay_s=0.040)
    assert world.client.engine.rtt_s == 0
    world.connect()
    for end in world.ends:
        stream_id = end.open(b"ping")
        world.run(lambda end=end, stream_id=stream_id: end.engine.unacknowledged_bytes(stream_id) == 0)
        # Acknowledgements may wait a little (RFC 9000, 13.2.1).
        assert 0.079 < end.engine.rtt_s < 0.120


def test_a_server_that_has_heard_nothing_authentic_is_not_established(unconnected):
    world = unconnected()
    world.client.engine.connect(("192.0.2.2", 4433), world.now)
    ((datagram, _), *_) = world.client.engine.datagrams_to_send(world.now, 64)
    damaged = datagram[:-700] + bytes([datagram[-700] ^ 1]) + datagram[-699:]
    arrival = world.factory.inspect(damaged)
    assert arrival.opens
    engine = world.factory.server(arrival)
    assert not engine.receive(damaged, ("192.0.2.1", 1), world.now)
    assert not engine.is_established
    engine = world.factory.server(arrival)
    assert engine.receive(datagram, ("192.0.2.1", 1), world.now)
    assert engine.is_established


def test_until_it_has_heard_from_the_address_a_server_sends_at_most_three_times_as_much(unconnected):
    """RFC 9000, 8.1: whoever forges an address must not turn us on to it."""
    world = unconnected()
    world.client.engine.connect(("192.0.2.2", 4433), world.now)
    world.up.drop = lambda number, _: number > 0
    world.rest(30.0)
    assert sum(world.down.offered_bytes) <= 3 * world.up.offered_bytes[0]

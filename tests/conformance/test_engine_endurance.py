"""What only shows after hours, on other paths, or against a peer that means harm: each was found by an attack."""

import pytest
from aioquic.tls import Epoch

from conformance import harness
from conformance.stock import frame, stock_world
from quorate_protocol.transport import ALPN, ClientTls, ServerTls
from quorate_protocol.transport.engine import sending


def transfer(world, here, there, count=300_000):
    stream_id = here.open(bytes(count), bi=False)
    world.run(lambda: stream_id in there.seen.ended)
    return stream_id


@pytest.mark.parametrize("pulsing", ["client", "server"])
def test_an_end_that_has_only_acknowledged_for_hours_can_still_speak(connected, monkeypatch, pulsing):
    """Its acknowledgements are packets that nobody acknowledges: they neither pile up nor use up what may be sent."""
    monkeypatch.setattr(sending, "PACKETS_IN_FLIGHT_MAX", 100)
    world = connected()
    here, there = (world.client, world.server) if pulsing == "client" else (world.server, world.client)
    transfer(world, there, here)
    for _ in range(1500):
        here.engine.send_datagram(b"pulse")
        world.rest(2.0)
    assert len(there.engine._quic._space.sent_packets) < 200
    stream_id = there.open(b"an assignment", bi=False)
    world.run(lambda: stream_id in here.seen.ended, within_s=2.0)


def test_gaps_between_packet_numbers_do_not_make_us_keep_our_answers(make_factory, credentials):
    world = stock_world(make_factory, credentials, "client", delay_s=0.001).connect()
    for _ in range(6000):
        world.client.engine.quic.skip_packet_numbers(1)
        world.client.engine.quic.inject(frame(0x01))
        world.rest(0.002)
        if world.server.seen.close:
            break
    assert len(world.server.engine._quic._space.sent_packets) < 3000


@pytest.mark.parametrize("hostile", ["client", "server"])
def test_a_tls_message_without_end_is_not_gathered(make_factory, credentials, hostile):
    world = stock_world(make_factory, credentials, hostile, delay_s=0.001).connect()
    peer, ours = (world.client, world.server) if hostile == "client" else (world.server, world.client)
    world.rest(1.0)
    offset = peer.engine.quic._crypto_streams[Epoch.ONE_RTT].sender._buffer_stop if hostile == "server" else 0
    message = b"\x04\xff\xff\xf0" + bytes(1000)
    for _ in range(200):
        peer.engine.quic.inject(frame(0x06, offset, len(message), message))
        offset += len(message)
        message = bytes(1000)
        world.rest(0.01)
        if ours.seen.close:
            break
    assert ours.seen.close.transport
    assert len(ours.engine._quic.tls._receive_buffer) <= (64 << 10) + len(message) + 4


def test_after_a_change_of_address_packets_grow_again_and_take_the_short_way(connected, monkeypatch):
    world = connected(delay_s=0.005)
    transfer(world, world.server, world.client)
    quic = world.server.engine._quic
    assert quic._is_steady
    assert world.server.engine.udp_payload_bytes == 16_383
    monkeypatch.setattr(harness, "CLIENT_ADDRESS", ("192.0.2.1", 55_555))
    world.client.address = harness.CLIENT_ADDRESS
    transfer(world, world.client, world.server)
    transfer(world, world.server, world.client)
    transfer(world, world.server, world.client)
    assert quic._network_paths[0].addr == harness.CLIENT_ADDRESS
    assert quic._is_steady
    assert world.server.engine.udp_payload_bytes == 16_383


def test_a_packet_that_a_stranger_copied_from_elsewhere_costs_nothing_for_long(connected):
    world = connected(delay_s=0.005)
    transfer(world, world.client, world.server)
    world.client.open(b"copied", bi=False)
    ((datagram, _),) = world.client.engine.datagrams_to_send(world.now, 64)
    stranger = ("198.51.100.9", 999)
    world.elsewhere.add(stranger)
    world.deliver(world.server, datagram, stranger)
    world.server.report()
    transfer(world, world.client, world.server)
    transfer(world, world.server, world.client)
    world.rest(5.0)
    transfer(world, world.server, world.client)
    quic = world.server.engine._quic
    assert quic._network_paths[0].addr == harness.CLIENT_ADDRESS
    assert quic._is_steady


def test_keys_are_updated_and_what_is_under_way_is_not_lost(connected, monkeypatch):
    """RFC 9001, 6.6: no key protects more than 2^23 packets; 6.5: packets of the old phase may still come."""
    monkeypatch.setattr(sending, "KEY_PACKETS_MAX", 400)
    world = connected(delay_s=0.02, payload_bytes_max=1300)
    ids = [(end, end.open(bytes(2_000_000), bi=False)) for end in world.ends]
    peers = {world.client: world.server, world.server: world.client}
    world.run(lambda: all(stream_id in peers[end].seen.ended for end, stream_id in ids))
    for end in world.ends:
        quic = end.engine._quic
        assert quic._phase_began_at > 400
        # Losses would have ended slow start and cost packets.
        assert quic._loss._cc.ssthresh is None or quic._loss._cc._recovery_began_at < 0


def test_the_peer_may_update_its_keys(make_factory, credentials):
    world = stock_world(make_factory, credentials, "client", delay_s=0.001).connect()
    for turn in range(4):
        transfer(world, world.client, world.server, 30_000)
        transfer(world, world.server, world.client, 30_000)
        world.rest(1.0)
        assert world.server.engine._quic._crypto.recv.key_phase == turn % 2
        assert world.server.engine._quic._is_steady
        world.client.engine.quic.request_key_update()


def test_an_acknowledgement_of_what_was_not_sent_ends_the_connection(make_factory, credentials):
    world = stock_world(make_factory, credentials, "client", delay_s=0.001).connect()
    world.client.engine.quic.inject(frame(0x02, 1 << 40, 0, 0, 0))
    world.run(lambda: world.server.seen.close)
    assert (world.server.seen.close.transport, world.server.seen.close.code) == (True, 0x0A)


def test_a_close_does_not_exceed_what_an_address_that_is_not_validated_may_be_sent(unconnected):
    """RFC 9000, 8.1: three times what came from there."""
    world = unconnected()
    world.client.engine.connect(harness.SERVER_ADDRESS, world.now)
    ((first, _),) = world.client.engine.datagrams_to_send(world.now, 64)
    server = world.factory.server(world.factory.inspect(first))
    server.receive(first, harness.CLIENT_ADDRESS, world.now)
    sent = 0
    for turn in range(6):
        now = world.now + 2.0 * turn
        server.handle_timer(now)
        if turn == 5:
            server.close(0, "took too long")
        sent += sum(len(datagram) for datagram, _ in server.datagrams_to_send(now, 64))
    assert 0 < sent <= 3 * len(first)


@pytest.mark.parametrize("receiver", ["client", "server"])
def test_an_outage_in_the_middle_of_a_key_update_is_survived(connected, monkeypatch, receiver):
    """An end that only receives begins a phase with acknowledgements: they may all be lost, for long."""
    world = connected(delay_s=0.02, payload_bytes_max=1300)
    here, there = (world.client, world.server) if receiver == "client" else (world.server, world.client)
    back = world.up if receiver == "client" else world.down
    stream_id = there.open(bytes(400_000), bi=False, end=False)
    world.rest(0.2)
    here.engine._quic._phase_began_at = here.engine._quic._packet_number - sending.KEY_PACKETS_MAX
    back.loss = 1.0
    there.engine.write(stream_id, bytes(20_000))
    world.rest(0.05)
    assert here.engine._quic._crypto.send.key_phase == 1
    world.rest(1.0)
    back.loss = 0.0
    there.engine.write(stream_id, bytes(100_000), True)
    world.run(lambda: stream_id in here.seen.ended, within_s=10.0)
    world.run(lambda: there.engine.unacknowledged_bytes(stream_id) == 0, within_s=10.0)


def test_a_peer_that_acknowledges_nothing_does_not_make_us_keep_our_answers(make_factory, credentials, monkeypatch):
    world = stock_world(make_factory, credentials, "client", delay_s=0.001).connect()
    quic = world.client.engine.quic
    monkeypatch.setattr(quic, "_write_ack_frame", lambda builder, space, now: setattr(space, "ack_at", None))
    for _ in range(3000):
        for _ in range(2):
            quic.skip_packet_numbers(1)
            quic.inject(frame(0x01))
        world.rest(0.001)
        if world.server.seen.close:
            break
    assert len(world.server.engine._quic._space.sent_packets) < 2500


def test_a_close_is_not_repeated_beyond_what_an_address_that_is_not_validated_may_be_sent(unconnected):
    world = unconnected()
    world.client.engine.connect(harness.SERVER_ADDRESS, world.now)
    ((first, _),) = world.client.engine.datagrams_to_send(world.now, 64)
    server = world.factory.server(world.factory.inspect(first))
    server.receive(first, harness.CLIENT_ADDRESS, world.now)
    server.close(0, "x" * 1000)
    sent = sum(len(datagram) for datagram, _ in server.datagrams_to_send(world.now, 64))
    received = len(first)
    for _ in range(64):
        server.receive(bytes(10), harness.CLIENT_ADDRESS, world.now)
        received += 10
        sent += sum(len(datagram) for datagram, _ in server.datagrams_to_send(world.now, 64))
    assert sent <= 3 * received


@pytest.mark.parametrize("host", ["192.0.2.1", "192.0.2.77"], ids=["another port", "another address"])
def test_what_was_learned_of_a_path_does_not_hold_for_the_next(connected, monkeypatch, host):
    """RFC 9000, 9.4 and 14.3: packet size always; congestion control unless only the port is another."""
    world = connected(delay_s=0.005)
    for _ in range(3):
        transfer(world, world.server, world.client, 1_000_000)
    quic = world.server.engine._quic
    window_bytes = quic._loss.congestion_window
    assert window_bytes > 300_000
    moved = (host, 55_555)
    monkeypatch.setattr(harness, "CLIENT_ADDRESS", moved)
    world.client.address = moved
    world.client.open(b"here I am", bi=False)
    world.run(lambda: quic._network_paths[0].addr == moved)
    assert world.server.engine.udp_payload_bytes == 1200
    if host == "192.0.2.1":
        assert quic._loss.congestion_window >= window_bytes
    else:
        assert quic._loss.congestion_window <= 10 * 1200


def test_a_long_chain_of_certificates_is_held_to_three_times_what_came(make_factory, credentials, tmp_path):
    """RFC 9000, 8.1: before the address is validated."""
    chain = tmp_path / "chain.pem"
    chain.write_bytes(credentials.certificate_file.read_bytes() * 12)
    factory = make_factory()
    factory.set_server(ServerTls(chain, credentials.key_file), [ALPN])
    client = factory.client(ClientTls(credentials.ca_file), "localhost", [ALPN])
    client.connect(harness.SERVER_ADDRESS, 1.0)
    ((first, _),) = client.datagrams_to_send(1.0, 64)
    server = factory.server(factory.inspect(first))
    server.receive(first, harness.CLIENT_ADDRESS, 1.0)
    sent = sum(len(datagram) for datagram, _ in server.datagrams_to_send(1.0, 64))
    assert 2 * len(first) < sent <= 3 * len(first)

"""What the network and strangers do: noise, handshakes that lead nowhere, losses, addresses that change."""

import asyncio
import contextlib
import random
import socket

import pytest
from aioquic._buffer import Buffer
from aioquic.quic.packet import QuicPacketType, pull_quic_header
from structlog.testing import capture_logs

from links import (
    PATIENCE_S,
    Nat,
    UdpSocket,
    connected,
    digest,
    noise,
    pair,
    ping_pong,
    read_all,
    read_exactly,
    serving,
    until,
    url_of,
)
from quorate_protocol.errors import Code, ConnectFailed, ConnectionClosed, ResetByPeer, StoppedByPeer
from quorate_protocol.transport import ALPN, ClientTls, Priority, connect
from quorate_protocol.transport import endpoint as endpoint_module
from quorate_protocol.transport.engine import AioquicFactory


@pytest.fixture
async def server(credentials):
    async with serving(credentials) as server:
        yield server


@pytest.fixture
async def link(credentials, server):
    """A connection that goes on working, whatever else comes to the same socket."""
    link = await connected(server, url_of(server), credentials)
    # It has told all its ids, and will not take up more room.
    await until(lambda: all(connection_id.was_sent for connection_id in link.there.engine._quic._host_cids))
    await ping_pong(*await pair(link))
    yield link
    await link.here.close()


@pytest.fixture
async def nat(server):
    with contextlib.closing(Nat(server.address)) as nat:
        yield nat


def first_flight(credentials, server, server_id: bytes | None = None) -> bytes:
    """What a client sends first: a real Initial, to an id of the server's that it has made up."""
    engine = AioquicFactory().client(ClientTls(ca_file=credentials.ca_file), "localhost", [ALPN])
    if server_id is not None:
        engine._quic._peer_cid.cid = engine._quic._original_destination_connection_id = server_id
    engine.connect(server.address, 0.0)
    ((datagram, _),) = engine.datagrams_to_send(0.0, 64)
    return datagram


def made_up(*, to: bytes, first_byte: int = 0xC0, version: int = 1, size: int = 1200) -> bytes:
    """A long header as of an Initial without a token, and noise behind it."""
    header = bytes([first_byte]) + version.to_bytes(4, "big") + bytes([len(to)]) + to + b"\x08sourceid\x00"
    rest = size - len(header) - 2
    return header + (rest | 0x4000).to_bytes(2, "big") + noise(rest, seed=size)


def held(server) -> dict[str, int]:
    """What a server holds."""
    endpoint = server._endpoint
    return {
        "connections": server.stats.connections,
        "handshakes": server.stats.handshakes,
        "routes": len(endpoint._routes),
        "timers": len(endpoint._timers),
        "timeouts": len(endpoint._handshakes),
    }


async def settled(server, before: dict[str, int]) -> None:
    """Whatever came, the server holds what it held before."""
    await until(lambda: held(server) == before, f"back to {before}")


# --- noise ---


async def test_noise_is_counted_and_leaves_nothing(credentials, server, link):
    streams = await pair(link)
    await ping_pong(*streams)
    before = held(server)
    unknown_before = server.stats.udp_datagrams_unknown
    rng = random.Random(20)
    real = first_flight(credentials, server)
    rubbish = [
        *(rng.randbytes(size) for size in (0, 1, 5, 8, 9, 20, 100, 1199, 1200, 1500) for _ in range(3)),
        # Long headers with lengths that lie.
        b"\xc0\x00\x00\x00\x01\xff" + bytes(1300),
        b"\xc0\x00\x00\x00\x01\x08",
        b"\xff" * 1200,
        b"\x80" + bytes(1199),
        # A short header for nobody.
        b"\x40" + rng.randbytes(1199),
        # Initials that nothing can decrypt, or that are not allowed.
        *(made_up(to=rng.randbytes(8)) for _ in range(5)),
        made_up(to=rng.randbytes(20), version=0x6B3343CF),
        made_up(to=rng.randbytes(7)),
        made_up(to=b""),
        made_up(to=rng.randbytes(8), size=1199),
        # A real one, damaged.
        real[:600],
        real[:1199],
        real[:200] + bytes([real[200] ^ 1]) + real[201:],
        bytes([real[0] ^ 0x30]) + real[1:],
        # Handshake, 0-RTT, Retry and version negotiation out of the blue.
        *(made_up(to=rng.randbytes(8), first_byte=first_byte) for first_byte in (0xE0, 0xD0, 0xF0)),
        made_up(to=rng.randbytes(8), version=0),
    ]
    received_before = server.stats.udp_datagrams_received
    with UdpSocket(server.address) as stranger:
        for datagram in rubbish:
            stranger.send(datagram)
            await ping_pong(*streams)
        assert server.stats.udp_datagrams_unknown == unknown_before + len(rubbish)
        # Also to ids that are known: nothing of this is authentic.
        for connection_id in list(link.there.connection_ids):
            stranger.send(made_up(to=connection_id))
            stranger.send(b"\x40" + connection_id + noise(1000))
        await ping_pong(*streams, times=3)
        # What looks like a packet of a lost connection is told so, in fewer bytes (RFC 9000, 10.3); else nothing.
        alike = [datagram for datagram in rubbish if datagram[:1] and datagram[0] & 0xC0 == 0x40 and len(datagram) > 21]
        answers = []
        while (answer := stranger.receive_nowait()) is not None:
            answers.append(answer)
        assert [len(answer) for answer in answers] == [min(len(datagram) - 1, 42) for datagram in alike]
        assert server.stats.stateless_resets_sent == len(alike) > 0
    assert server.stats.udp_datagrams_received >= received_before + len(rubbish)
    await settled(server, before)
    assert link.there.peer == f"127.0.0.1:{link.here._driver.address[1]}"
    late = await connected(server, url_of(server), credentials)
    await late.here.close()


async def test_a_client_has_to_make_up_a_long_id(credentials, server):
    """Shorter ones would collide with those of other clients (RFC 9000, 7.2)."""
    with UdpSocket(server.address) as stranger:
        stranger.send(first_flight(credentials, server, b"7 bytes"))
        await until(lambda: server.stats.udp_datagrams_received)
        assert server.stats.udp_datagrams_unknown == 1
        assert server.stats.connections == 0
        stranger.send(first_flight(credentials, server, b"8 bytes."))
        await until(lambda: server.stats.connections)


async def test_an_unknown_version_is_told_ours_and_never_more_than_it_sent(server, link):
    before = held(server)
    with UdpSocket(server.address) as stranger:
        stranger.send(made_up(to=b"destined", version=0x1A2A3A4A, size=1199))
        stranger.send(made_up(to=b"destined", version=0x1A2A3A4A))
        answer = await stranger.receive()
        header = pull_quic_header(Buffer(data=answer))
        assert header.packet_type is QuicPacketType.VERSION_NEGOTIATION
        assert (header.destination_cid, header.source_cid) == (b"sourceid", b"destined")
        assert 1 in header.supported_versions
        assert len(answer) < 100
        await ping_pong(*await pair(link))
        assert stranger.receive_nowait() is None  # the small one was not answered
    await settled(server, before)


async def test_a_server_without_a_common_version_is_named_as_such(credentials):
    with UdpSocket() as other:
        tls = ClientTls(ca_file=credentials.ca_file)
        connecting = asyncio.create_task(connect(f"quic://127.0.0.1:{other.port}", tls=tls, timeout_s=PATIENCE_S))
        datagram, client = await other.receive_from()
        header = pull_quic_header(Buffer(data=datagram))
        ids = b"".join(bytes([len(cid)]) + cid for cid in (header.source_cid, header.destination_cid))
        other.send(b"\x80" + bytes(4) + ids + b"\x1a\x2a\x3a\x4a", client)
        with pytest.raises(ConnectFailed, match="common protocol version"):
            await connecting


async def test_noise_does_not_end_a_clients_handshake(credentials, server, nat):
    """What is not authentic is ignored (RFC 9000, 12.2), though it comes from the right address to the right id."""
    carry = nat.to_client
    disturbed = []

    def disturb(data):
        if not disturbed:
            header = pull_quic_header(Buffer(data=data))
            for rubbish in (made_up(to=header.destination_cid), b"\x40" + header.destination_cid + noise(50)):
                carry(rubbish)
                disturbed.append(rubbish)
            asyncio.get_running_loop().call_later(0.02, carry, data)  # after the client has read the rest
        else:
            carry(data)

    nat.to_client = disturb
    tls = ClientTls(ca_file=credentials.ca_file, server_name="localhost")
    async with asyncio.timeout(PATIENCE_S), await connect(f"quic://127.0.0.1:{nat.port}", tls=tls):
        await server.accept()
    assert len(disturbed) == 2


# --- handshakes that lead nowhere ---


async def test_a_handshake_that_is_never_completed_is_given_up(credentials, server, link, monkeypatch):
    monkeypatch.setattr(endpoint_module, "HANDSHAKE_TIMEOUT_S", 0.4)
    before = held(server)
    with UdpSocket(server.address) as stranger:
        stranger.send(first_flight(credentials, server))
        await until(lambda: server.stats.handshakes == 1)
        assert server.stats.connections == before["connections"] + 1
        await until(lambda: server.stats.handshakes == 0)
        await ping_pong(*await pair(link))
        await settled(server, before)


async def test_a_flood_of_handshakes_is_bounded_and_counted(credentials, server, link, monkeypatch):
    monkeypatch.setattr(endpoint_module, "HANDSHAKES_MAX", 3)
    monkeypatch.setattr(endpoint_module, "HANDSHAKE_TIMEOUT_S", 0.4)
    before = held(server)
    with UdpSocket(server.address) as stranger:
        for _ in range(5):
            stranger.send(first_flight(credentials, server))
        await until(lambda: server.stats.handshakes_refused == 2)
        assert server.stats.handshakes == 3
        await ping_pong(*await pair(link))
        await settled(server, before)
    # There is room again.
    late = await connected(server, url_of(server), credentials)
    await late.here.close()


async def test_too_many_connections_are_refused(credentials, server, link, monkeypatch):
    monkeypatch.setattr(endpoint_module, "CONNECTIONS_MAX", 1)
    with pytest.raises(ConnectFailed, match="no answer"):
        await connect(url_of(server), tls=ClientTls(ca_file=credentials.ca_file), timeout_s=0.1)
    assert server.stats.handshakes_refused >= 1
    await ping_pong(*await pair(link))


async def test_clients_that_go_away_in_their_handshake_leave_nothing(credentials, server, link):
    before = held(server)
    tls = ClientTls(ca_file=credentials.ca_file)
    connecting = [asyncio.create_task(connect(url_of(server), tls=tls)) for _ in range(5)]
    await until(lambda: server.stats.connections > before["connections"])
    for task in connecting:
        task.cancel()
    await asyncio.wait(connecting)
    for task in connecting:
        if not task.cancelled():  # it was faster
            await task.result().close()
    await settled(server, before)


async def test_a_closed_connection_is_forgotten_after_its_draining_period(credentials, server):
    before = held(server)
    for closer in ("here", "there"):
        link = await connected(server, url_of(server), credentials)
        await ping_pong(*await pair(link))
        await getattr(link, closer).close()
        await settled(server, before)


# --- an engine with a bug ---


@pytest.mark.parametrize("where", ["datagrams_to_send", "receive", "report", "handle_timer"])
async def test_an_engine_that_raises_ends_its_own_connection_and_no_other(credentials, server, link, where):
    streams = await pair(link)
    broken = await connected(server, url_of(server), credentials)
    here, there = await pair(broken)
    before = held(server)

    def fail(*args):
        raise IndexError("a bug of the engine")

    with capture_logs() as logs:
        setattr(broken.there.engine, where, fail)
        if where == "handle_timer":
            broken.there.engine.timer = lambda: 0.0
        if where == "datagrams_to_send":
            there.send_nowait(b"trigger")
        else:
            here.send_nowait(b"trigger")
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(ConnectionClosed) as caught:
                await read_exactly(there, 100)
        assert caught.value.code == Code.INTERNAL
    assert [entry["event"] for entry in logs] == ["engine_failed"]
    await ping_pong(*streams)
    assert server.stats.connections == before["connections"] - 1
    await broken.here.close()
    await ping_pong(*streams)


# --- losses, and addresses that change ---


async def test_the_server_follows_a_client_to_a_new_address(credentials, server, nat):
    link = await connected(server, f"quic://127.0.0.1:{nat.port}", credentials)
    here, there = await pair(link)
    for _ in range(3):
        assert link.there.peer == f"127.0.0.1:{nat.outside_port}"
        nat.rebind()
        assert link.there.peer != f"127.0.0.1:{nat.outside_port}"
        await ping_pong(here, there, times=3)
        await until(lambda: link.there.peer == f"127.0.0.1:{nat.outside_port}")
        # The server may send much only when the client has answered from there.
        there.send_nowait(noise(300_000))
        assert len(await read_exactly(here, 300_000)) == 300_000
    assert server.stats.connections == 1
    await link.here.close()


async def test_a_link_that_was_cut_for_a_while_goes_on(credentials, server, nat):
    link = await connected(server, f"quic://127.0.0.1:{nat.port}", credentials)
    here, there = await pair(link)
    nat.is_cut = True
    here.send_nowait(b"through the tunnel")
    await until(lambda: nat.swallowed >= 2, "sent, and sent again")
    assert not there._unread
    nat.is_cut = False
    assert await read_exactly(there, 18) == b"through the tunnel"
    await ping_pong(here, there)
    await link.here.close()


@pytest.mark.parametrize("seed", [1, 2])
async def test_losses_and_disorder_are_made_good_and_leave_nothing(credentials, server, nat, seed):
    """Streams that end as they should, that are reset and that are stopped, over a bad network."""
    rng = random.Random(seed)
    loop = asyncio.get_running_loop()

    def disturbed(carry):
        def disturb(data):
            fate = rng.random()
            if fate < 0.05:
                loop.call_later(0.005 * rng.random(), carry, data)
            elif fate > 0.08:
                carry(data)

        return disturb

    def content(number):
        return b"%04d" % number + noise(20_000 * (number % 5), seed=number)

    async def give(opener, number):
        stream = await opener.open_uni_stream(Priority(number % len(Priority)))
        await stream.send(content(number))
        match number % 3:
            case 0:
                await stream.finish()
                await stream.flush()
            case 1:
                stream.reset(number)
            case 2:
                await until(lambda: stream.send_is_over)
                with pytest.raises(StoppedByPeer) as stopped:
                    await stream.flush()
                assert stopped.value.code == number

    async def take(accepter):
        stream = await accepter.accept_uni_stream()
        try:
            number = int(await read_exactly(stream, 4))
        except ResetByPeer as reset:
            assert reset.code % 3 == 1
            return
        match number % 3:
            case 0:
                assert digest(b"%04d" % number + await read_all(stream)) == digest(content(number))
            case 1:
                with pytest.raises(ResetByPeer) as reset:
                    await read_all(stream)
                assert reset.value.code == number
            case 2:
                stream.stop(number)

    nat.to_client, nat.to_server = disturbed(nat.to_client), disturbed(nat.to_server)
    link = await connected(server, f"quic://127.0.0.1:{nat.port}", credentials)
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        for opener, accepter in ((link.here, link.there), (link.there, link.here)):
            for number in range(24):
                tasks.create_task(give(opener, number))
                tasks.create_task(take(accepter))
    for end in (link.here, link.there):
        quic = end.engine._quic
        await until(lambda: not quic._streams)  # noqa: B023  awaited here
        assert end.stats.streams_open == 0
        # What came and what was given back of the connection's window is the same.
        assert quic._window.consumed_bytes == quic._local_max_data.used
    await link.here.close()


async def test_a_flood_of_newcomers_leaves_time_to_those_who_are_in(credentials, server, link, monkeypatch):
    """Handshakes get a share of the time; the Initials beyond it are dropped before they cost anything."""
    # However fast the machine is, six hundred are more than may be saved up.
    monkeypatch.setattr(endpoint_module, "_HANDSHAKE_BURST_S", 0.05)
    initials = [first_flight(credentials, server) for _ in range(600)]
    stream = await pair(link)
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        for number, datagram in enumerate(initials):
            sock.sendto(datagram, server.address)
            if number % 50 == 0:
                await ping_pong(*stream)
    await until(lambda: server.stats.handshakes_refused > 0)
    await ping_pong(*stream)
    # Who goes on trying gets in.
    newcomer = await connected(server, url_of(server), credentials, timeout_s=PATIENCE_S)
    await newcomer.here.close()


async def test_a_flood_of_garbage_leaves_time_to_those_who_are_in(credentials, server, link, monkeypatch):
    """It is paid from the same share as handshakes, and what is beyond that is dropped unread."""
    monkeypatch.setattr(endpoint_module, "_HANDSHAKE_SHARE", 0.02)
    monkeypatch.setattr(endpoint_module, "_HANDSHAKE_BURST_S", 0.01)
    rng = random.Random(21)
    kinds = [
        lambda: made_up(to=rng.randbytes(8)),
        lambda: made_up(to=rng.randbytes(8), first_byte=0xE0),
        lambda: made_up(to=b"destined", version=0x1A2A3A4A),
        lambda: b"\xc0" + rng.randbytes(60),
        lambda: b"\x40" + rng.randbytes(60),
        lambda: b"",
    ]
    inspect, inspected = server._factory.inspect, 0

    def counted(datagram):
        nonlocal inspected
        inspected += 1
        return inspect(datagram)

    monkeypatch.setattr(server._factory, "inspect", counted)
    streams = await pair(link)
    unknown_before = server.stats.udp_datagrams_unknown
    count = 12_000
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sock:
        for number in range(count):
            sock.sendto(kinds[number % len(kinds)](), server.address)
            if number % 200 == 0:
                await ping_pong(*streams)
    await ping_pong(*streams)
    # The kernel may have dropped some, in its hurry.
    assert count // 2 < server.stats.udp_datagrams_unknown - unknown_before <= count
    assert server.stats.handshakes_refused > 0
    # Two thirds have long headers.
    assert 0 < inspected < count // 2
    assert server.stats.connections == 1
    assert not link.there.is_closed


async def test_beyond_their_share_nothing_that_strangers_send_is_read(credentials, server, link, monkeypatch):
    endpoint = server._endpoint
    monkeypatch.setattr(endpoint_module, "_HANDSHAKE_SHARE", 0.0)
    monkeypatch.setattr(server._factory, "inspect", lambda datagram: 1 / 0)
    endpoint._handshake_credit_s = 0.0
    unknown_before = server.stats.udp_datagrams_unknown
    with UdpSocket(server.address) as stranger:
        stranger.send(first_flight(credentials, server))
        stranger.send(made_up(to=b"destined", first_byte=0xE0))
        stranger.send(made_up(to=b"destined", size=100))
        stranger.send(b"\x40" + noise(100))
        await until(lambda: server.stats.udp_datagrams_unknown == unknown_before + 4)
    # Those that might have opened a connection.
    assert server.stats.handshakes_refused == 2
    await ping_pong(*await pair(link))


async def test_a_handshake_that_is_fed_with_garbage_waits_with_the_others(credentials, server, link, monkeypatch):
    """Whoever has begun one has an id that is routed, and could have everything decrypted that he sends to it."""
    endpoint = server._endpoint
    streams = await pair(link)
    with UdpSocket(server.address) as stranger:
        stranger.send(first_flight(credentials, server))
        await until(lambda: server.stats.handshakes == 1)
        (half_open,) = endpoint._handshakes
        connection_id = half_open.engine.initial_connection_id
        received = half_open.stats.udp_datagrams_received
        # A debt that handshakes which have begun may make.
        monkeypatch.setattr(endpoint_module, "_HANDSHAKE_SHARE", 0.0)
        endpoint._handshake_credit_s = -0.5 * endpoint_module._HANDSHAKE_DEBT_S
        stranger.send(b"\x40" + connection_id + noise(1000))
        await until(lambda: half_open.stats.udp_datagrams_received == received + 1)
        assert endpoint._handshake_credit_s < -0.5 * endpoint_module._HANDSHAKE_DEBT_S
        # And one that they may not.
        endpoint._handshake_credit_s = -endpoint_module._HANDSHAKE_DEBT_S
        before = server.stats.udp_datagrams_received
        for _ in range(20):
            stranger.send(b"\x40" + connection_id + noise(1000))
        await until(lambda: server.stats.udp_datagrams_received >= before + 20)
        await ping_pong(*streams)
        assert half_open.stats.udp_datagrams_received == received + 1
        assert endpoint._handshake_credit_s == -endpoint_module._HANDSHAKE_DEBT_S

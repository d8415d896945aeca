"""How connections end, what a server owes to those who wait, and that nothing is left behind."""

import asyncio
import gc
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from links import (
    PATIENCE_S,
    UdpSocket,
    connected,
    free_port,
    linked,
    pair,
    ping_pong,
    read_all,
    serving,
    until,
    url_of,
)
from quorate_coordinator.certificates import ensure_development_credentials
from quorate_protocol.errors import Code, ConfigurationError, ConnectFailed, ConnectionClosed, ServerClosed
from quorate_protocol.limits import STREAMS_MAX
from quorate_protocol.transport import ClientTls, ServerTls, connect, listen
from quorate_protocol.transport.engine import aioquic_engine


@pytest.fixture
async def server(credentials):
    async with serving(credentials) as server:
        yield server


@pytest.fixture
def tls(credentials):
    return ClientTls(ca_file=credentials.ca_file)


# --- the end ---


@pytest.mark.parametrize("closer", ["client", "server"])
async def test_close_tells_both_ends_who_why_and_with_what_code(credentials, closer):
    async with linked(credentials) as link:
        closing, other = (link.here, link.there) if closer == "client" else (link.there, link.here)
        assert closing.close_error is None
        assert not other.is_closed
        await closing.close(Code.LEASE_EXPIRED, "gone fishing")
        await closing.close(Code.BUSY, "too late to change anything")
        async with asyncio.timeout(PATIENCE_S):
            await closing.wait_closed()
            await other.wait_closed()
        for end, by_peer in ((closing, False), (other, True)):
            error = end.close_error
            assert isinstance(error, ConnectionClosed)
            assert (error.code, error.reason) == (Code.LEASE_EXPIRED, "gone fishing")
            assert (error.by_peer, error.transport) == (by_peer, False)
            assert end.is_closed
            assert end.stats.streams_open == 0
        assert str(other.close_error) == "connection closed by the peer: LEASE_EXPIRED (0xb): gone fishing"


@pytest.mark.parametrize("closer", ["client", "server"])
async def test_everything_that_waits_hears_of_the_end(credentials, closer):
    async with linked(credentials) as link:
        # The streams' ends at the side that does not close, and which therefore has to hear of it.
        side = 1 if closer == "client" else 0
        closing, other = (link.here, link.there) if closer == "client" else (link.there, link.here)
        reading, writing, flushing = [(await pair(link))[side] for _ in range(3)]
        carrier = await pair(link)
        flushing.send_nowait(bytes(2 << 20))
        opened = [await other.open_uni_stream() for _ in range(STREAMS_MAX)]
        waiting = [
            asyncio.create_task(waits)
            for waits in (
                reading.receive(),
                writing.send(bytes(8 << 20)),
                flushing.flush(),
                other.open_uni_stream(),
                other.accept_bi_stream(),
                other.accept_uni_stream(),
                other.datagrams.receive(),
                other.wait_closed(),
            )
        ]
        await ping_pong(*carrier, times=10)
        assert not any(task.done() for task in waiting)
        await closing.close(Code.SHUTDOWN, "enough")
        async with asyncio.timeout(PATIENCE_S):
            *results, closed = await asyncio.gather(*waiting, return_exceptions=True)
        assert closed is None
        for result in results:
            assert isinstance(result, ConnectionClosed), results
            assert (result.code, result.by_peer) == (Code.SHUTDOWN, True)
        # And whoever comes later.
        for late in (reading.receive, other.open_bi_stream, other.accept_bi_stream, other.accept_uni_stream):
            with pytest.raises(ConnectionClosed):
                await late()
        with pytest.raises(ConnectionClosed):
            await opened[0].send(b"x")
        with pytest.raises(ConnectionClosed):
            opened[0].send_nowait(b"x")
        # Giving up is no error when there is nothing left to give up.
        reading.reset(Code.CANCELLED)
        reading.stop(Code.CANCELLED)
        await opened[1].finish()


async def test_bytes_that_came_before_the_end_can_be_read_after_it(credentials):
    async with linked(credentials) as link:
        here, there = await pair(link)
        finished = await link.here.open_uni_stream()
        await here.send(b"last words")
        await finished.send(b"whole")
        await finished.finish()
        await here.flush()
        await finished.flush()
        await link.here.close()
        async with asyncio.timeout(PATIENCE_S):
            await link.there.wait_closed()
            assert await there.receive() == b"last words"
            with pytest.raises(ConnectionClosed):
                await there.receive()
            assert await read_all(await link.there.accept_uni_stream()) == b"whole"


async def test_the_error_of_a_closed_connection_does_not_pile_up_traces(credentials):
    def depth(error):
        count, trace = 0, error.__traceback__
        while trace is not None:
            count, trace = count + 1, trace.tb_next
        return count

    async with linked(credentials) as link:
        here, _ = await pair(link)
        await link.here.close()

        async def send_datagram():
            link.here.datagrams.send(b"x")

        for call in (lambda: here.send(b"x"), here.receive, send_datagram, link.here.open_bi_stream):
            for _ in range(50):
                with pytest.raises(ConnectionClosed) as caught:
                    await call()
            assert depth(caught.value) < 10


async def test_a_reason_too_long_for_a_packet_is_cut_and_nobody_else_suffers(credentials, server):
    link = await connected(server, url_of(server), credentials)
    other = await connected(server, url_of(server), credentials)
    await link.there.close(Code.SHUTDOWN, "ä€" * 4_000)
    async with asyncio.timeout(PATIENCE_S):
        await link.here.wait_closed()
    error = link.here.close_error
    assert error.code == Code.SHUTDOWN
    assert 900 <= len(error.reason.encode()) <= 1000
    assert set(error.reason) == {"ä", "€"}
    await ping_pong(*await pair(other))
    await other.here.close()


async def test_close_has_told_the_peer_when_it_returns(credentials, server):
    """So that a program may end right after it."""
    link = await connected(server, url_of(server), credentials)
    sock = link.here._driver._port._sock
    assert sock.fileno() >= 0
    await link.here.close()
    assert sock.fileno() == -1
    await until(lambda: link.there.is_closed)
    link = await connected(server, url_of(server), credentials)
    sent_before = server.stats.udp_datagrams_sent
    await link.there.close()
    assert server.stats.udp_datagrams_sent > sent_before
    await until(lambda: link.here.is_closed)


async def test_leaving_a_connections_block_closes_it(server, tls):
    async with await connect(url_of(server), tls=tls) as connection:
        there = await server.accept()
    assert connection.is_closed
    await until(lambda: there.is_closed)
    assert there.close_error.code == Code.NO_ERROR

    async def fail_inside():
        nonlocal there
        async with await connect(url_of(server), tls=tls):
            there = await server.accept()
            raise KeyError

    with pytest.raises(KeyError):
        await fail_inside()
    await until(lambda: there.is_closed)
    assert there.close_error.code == Code.INTERNAL


async def test_a_silent_peer_is_given_up_after_the_idle_timeout(credentials, server, monkeypatch):
    monkeypatch.setattr(aioquic_engine, "IDLE_TIMEOUT_S", 0.5)
    link = await connected(server, url_of(server), credentials)
    waiting = asyncio.create_task(link.here.accept_uni_stream())
    link.here._driver._port.send = lambda datagrams: None  # the network loses all that the client sends
    server._endpoint._port.send = lambda datagrams: None
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ConnectionClosed, match="Idle timeout") as caught:
            await waiting
    assert caught.value.transport
    assert not caught.value.by_peer


async def test_a_client_that_waits_for_an_answer_is_not_idle(credentials, monkeypatch):
    monkeypatch.setattr(aioquic_engine, "IDLE_TIMEOUT_S", 0.8)
    async with linked(credentials) as link:
        here, there = await pair(link)
        waiting = asyncio.create_task(here.receive())
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + 2.5 * aioquic_engine.IDLE_TIMEOUT_S
        await until(lambda: loop.time() > ends_at or link.here.is_closed or link.there.is_closed)
        assert link.there.close_error is None
        # It costs little: a few packets for each half of the timeout.
        assert link.there.stats.udp_datagrams_received < 50
        await there.send(b"at last")
        async with asyncio.timeout(PATIENCE_S):
            assert await waiting == b"at last"


# --- the server ---


async def test_server_close_ends_waiting_accepts_and_living_connections(credentials, server, tls):
    link = await connected(server, url_of(server), credentials)
    unaccepted = await connect(url_of(server), tls=tls)
    await until(lambda: server._ready)
    assert not (await server.accept()).is_closed
    accepting = [asyncio.create_task(server.accept()) for _ in range(2)]
    await asyncio.sleep(0)
    await server.close(Code.SHUTDOWN, "that is all")
    await server.close()
    async with asyncio.timeout(PATIENCE_S):
        results = await asyncio.gather(*accepting, return_exceptions=True)
        assert [type(result) for result in results] == [ServerClosed, ServerClosed]
        for connection in (link.here, unaccepted):
            await connection.wait_closed()
            assert (connection.close_error.code, connection.close_error.reason) == (Code.SHUTDOWN, "that is all")
    assert link.there.is_closed
    with pytest.raises(ServerClosed):
        await server.accept()
    assert [connection async for connection in server] == []
    assert server.stats.connections == server.stats.handshakes == 0


async def test_the_address_is_free_again_after_close(credentials):
    async with serving(credentials) as server:
        host, port = server.address
        assert port != 0
    async with await listen(f"{host}:{port}", tls=credentials.tls) as again:
        assert again.address == (host, port)


async def test_iterating_a_server_yields_each_connection_once(server, tls):
    clients = [await connect(url_of(server), tls=tls) for _ in range(3)]
    peers = []
    async with asyncio.timeout(PATIENCE_S):
        async for connection in server:
            peers.append(connection.peer)
            if len(peers) == len(clients):
                break
    assert len(set(peers)) == 3
    for client in clients:
        await client.close()


async def test_a_cancelled_accept_loses_no_connection(server, tls):
    """Also when it is cancelled at the very moment at which a connection was given to it."""
    endpoint = server._endpoint
    tell = endpoint._on_connection
    accepting = [asyncio.create_task(server.accept()) for _ in range(3)]
    await asyncio.sleep(0)

    def tell_and_cancel(connection):
        tell(connection)
        accepting[0].cancel()

    endpoint._on_connection = tell_and_cancel
    clients = [await connect(url_of(server), tls=tls) for _ in range(2)]
    async with asyncio.timeout(PATIENCE_S):
        results = await asyncio.gather(*accepting, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert len({connection.peer for connection in results[1:]}) == 2
    for client in clients:
        await client.close()


async def test_a_full_backlog_turns_away_as_busy_and_the_dead_do_not_fill_it(credentials, tls):
    async with serving(credentials, backlog=2) as server:
        waiting = [await connect(url_of(server), tls=tls) for _ in range(2)]
        await until(lambda: len(server._ready) == 2)
        refused = await connect(url_of(server), tls=tls)
        async with asyncio.timeout(PATIENCE_S):
            await refused.wait_closed()
        assert (refused.close_error.code, refused.close_error.by_peer) == (Code.BUSY, True)
        dead = list(server._ready)
        for connection in waiting:
            await connection.close()
        await until(lambda: all(connection.is_closed for connection in dead))
        late = await connect(url_of(server), tls=tls)
        await until(lambda: late.is_closed or not any(connection in dead for connection in server._ready))
        assert not late.is_closed
        assert (await server.accept()).peer.startswith("127.0.0.1:")
        await late.close()


async def test_an_address_in_use_or_not_ours(credentials, server):
    for address, reason in ((f"127.0.0.1:{server.address[1]}", "in use"), ("192.0.2.1:0", "assign")):
        with pytest.raises(ConfigurationError, match=reason) as caught:
            await listen(address, tls=credentials.tls)
        assert caught.value.path == "listen"
        assert address in str(caught.value)


async def test_one_server_for_both_versions_of_ip(credentials):
    async with serving(credentials, "[::]") as server:
        port = server.address[1]
        for host in ("127.0.0.1", "[::1]"):
            link = await connected(server, f"quic://{host}:{port}", credentials)
            assert link.there.peer.startswith(f"{host}:")
            await ping_pong(*await pair(link))
            await link.here.close()


# --- certificates ---


async def test_reload_tls_is_for_new_connections_and_living_ones_stay(credentials, server, tmp_path, tls):
    old = await connected(server, url_of(server), credentials)
    other = ensure_development_credentials(tmp_path)
    server.reload_tls(other.tls)
    new = await connected(server, url_of(server), other)
    await ping_pong(*await pair(old))
    await ping_pong(*await pair(new))
    with pytest.raises(ConnectFailed, match="not trusted"):
        await connect(url_of(server), tls=tls)
    await old.here.close()
    await new.here.close()


def _encrypted_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


#: What is wrong with the certificate's or the key's file: its content (None where there is none, "" for a
#: directory), and a part of the text.
BAD_FILES = {
    "no certificate": ("certificate", None, "No such file"),
    "empty certificate": ("certificate", b"", "certificate"),
    "garbage certificate": (
        "certificate",
        b"-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n",
        "certificate",
    ),
    "directory for a certificate": ("certificate", "", "directory"),
    "no key": ("key", None, "No such file"),
    "garbage key": ("key", b"\x00" * 100, "key"),
    "encrypted key": ("key", _encrypted_key(), "encrypted"),
    "another key": (
        "key",
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        "is not the key of",
    ),
}


@pytest.mark.parametrize("bad", BAD_FILES)
async def test_a_bad_file_is_named_and_the_old_certificate_stays(credentials, server, tmp_path, bad):
    which, content, text = BAD_FILES[bad]
    path = tmp_path / "bad.pem"
    if content == "":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    tls = ServerTls(
        path if which == "certificate" else credentials.certificate_file,
        path if which == "key" else credentials.key_file,
    )
    with pytest.raises(ConfigurationError, match=text) as caught:
        server.reload_tls(tls)
    assert caught.value.path == f"tls.{which}_file"
    assert str(path) in str(caught.value)
    link = await connected(server, url_of(server), credentials)
    await link.here.close()
    with pytest.raises(ConfigurationError):
        await listen("127.0.0.1:0", tls=tls)


async def test_certificates_with_blank_lines_and_carriage_returns_are_read(credentials, tmp_path):
    """As people make them: with an editor on another system, or with `cat` and `echo`."""
    chain = credentials.certificate_file.read_bytes() + b"\n" + credentials.ca_file.read_bytes() + b"\n\n"
    chain_file, ca_file = tmp_path / "chain.pem", tmp_path / "ca.pem"
    chain_file.write_bytes(chain.replace(b"\n", b"\r\n"))
    ca_file.write_bytes(b"# ours\r\n" + chain.replace(b"\n", b"\r\n"))
    async with await listen("127.0.0.1:0", tls=ServerTls(chain_file, credentials.key_file)) as server:
        for trusted in (credentials.ca_file, ca_file):
            async with await connect(url_of(server), tls=ClientTls(ca_file=trusted)):
                await server.accept()


# --- nothing is left ---


async def test_sockets_tasks_and_timers_are_given_back(credentials, tls):
    def held():
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir())), len(asyncio.all_tasks())

    before = held()
    for _ in range(5):
        async with serving(credentials) as server:
            link = await connected(server, url_of(server), credentials)
            await ping_pong(*await pair(link))
            await link.here.close()
            dropped = await connected(server, url_of(server), credentials)  # closed by the server
            with UdpSocket() as silent, pytest.raises(ConnectFailed):
                await connect(f"quic://127.0.0.1:{silent.port}", tls=tls, timeout_s=0.02)
            with pytest.raises(ConnectFailed):
                await connect(f"quic://127.0.0.1:{free_port()}", tls=tls)
            connecting = asyncio.create_task(connect(url_of(server), tls=tls))
            await asyncio.sleep(0)
            connecting.cancel()
            await asyncio.wait([connecting])
        await until(lambda: dropped.here.is_closed)  # noqa: B023  awaited here
    await until(lambda: held() == before, "the descriptors and tasks of before")
    assert [timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()] == []


async def test_a_chain_that_no_handshake_carries_is_refused_with_its_size(credentials, tmp_path):
    chain = tmp_path / "chain.pem"
    chain.write_bytes(credentials.certificate_file.read_bytes() * 60)
    with pytest.raises(ConfigurationError, match=r"take \d{5} bytes; a handshake carries 14000"):
        await listen("127.0.0.1:0", tls=ServerTls(chain, credentials.key_file))


# --- a server that dies without a word ---


async def test_a_client_hears_of_it_as_soon_as_the_server_is_there_again(credentials):
    async with serving(credentials, reset_key=b"k" * 32) as server:
        address, port = server.address
        link = await connected(server, url_of(server), credentials)
        here = link.here
        stream = await here.open_bi_stream()
        await stream.send(b"before")
        server._endpoint._release()  # as the kernel does it for who was killed: the socket is gone, nobody is told
        async with serving(credentials, reset_key=b"k" * 32, host=f"{address}", port=port) as again:
            began = asyncio.get_running_loop().time()
            with pytest.raises(ConnectionClosed, match="was restarted and does not know this connection"):
                while True:
                    await stream.send(b"after")
                    await asyncio.sleep(0.01)
            assert asyncio.get_running_loop().time() - began < aioquic_engine.IDLE_TIMEOUT_S / 2
            assert again.stats.stateless_resets_sent >= 1
            assert again.stats.connections == 0


async def test_so_many_resets_and_no_more(credentials, server):
    """A flood for connections that nobody has: it is answered for a while, and living ones are not disturbed."""
    link = await connected(server, url_of(server), credentials)
    streams = await pair(link)
    with UdpSocket(server.address) as stranger:
        for _ in range(30):
            for _ in range(100):
                stranger.send(b"\x40" + bytes(50))
            await ping_pong(*streams)
        await until(lambda: server.stats.udp_datagrams_unknown > 1000)
    assert 500 <= server.stats.stateless_resets_sent < 1000
    await link.here.close()

"""Connecting that fails: soon, with a text that names what is wrong."""

import asyncio
import socket
import ssl

import pytest

from links import UdpSocket, connected, free_port, serving, until, url_of
from quorate_coordinator.certificates import ensure_development_credentials
from quorate_protocol.errors import ConfigurationError, ConnectFailed
from quorate_protocol.transport import ALPN, ClientTls, connect
from quorate_protocol.transport.udp import UdpPort


@pytest.fixture
async def server(credentials):
    async with serving(credentials) as server:
        yield server


@pytest.fixture
def tls(credentials):
    return ClientTls(ca_file=credentials.ca_file)


async def why(url, tls=None, **options):
    """Why connecting fails, which must not take long."""
    loop = asyncio.get_running_loop()
    started_at = loop.time()
    with pytest.raises(ConnectFailed) as caught:
        await connect(url, tls=tls, **options)
    assert caught.value.url == url
    assert str(caught.value) == f"cannot connect to {url}: {caught.value.problem}"
    assert loop.time() - started_at < 5
    return caught.value.problem


# --- trust ---


async def test_an_untrusted_certificate(server, tmp_path):
    other = ensure_development_credentials(tmp_path)
    problem = await why(url_of(server), ClientTls(ca_file=other.ca_file))
    assert problem.startswith(f"the server's certificate is not trusted by the authorities in {other.ca_file}: ")
    await until(lambda: server.stats.handshakes == 0)


async def test_a_certificate_that_the_systems_authorities_do_not_know(server):
    problem = await why(url_of(server))
    assert problem.startswith("the server's certificate is not trusted by the system's authorities: ")


async def test_the_systems_authorities_are_those_of_the_system(credentials, server, monkeypatch):
    monkeypatch.setenv(ssl.get_default_verify_paths().openssl_cafile_env, str(credentials.ca_file))
    async with await connect(url_of(server)) as connection:
        assert connection.protocol == ALPN


@pytest.mark.parametrize("name", ["elsewhere.example", "192.0.2.1"])
async def test_a_certificate_for_another_host(server, credentials, name):
    problem = await why(url_of(server), ClientTls(ca_file=credentials.ca_file, server_name=name))
    assert problem.startswith("the server's certificate is for another host: ")
    assert name in problem
    assert "localhost" in problem


async def test_another_name_may_be_asked_for(server, credentials):
    tls = ClientTls(ca_file=credentials.ca_file, server_name="localhost")
    async with await connect(url_of(server), tls=tls) as connection:
        assert not connection.is_closed


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
async def test_authorities_that_cannot_be_read(server, tmp_path, content):
    ca_file = tmp_path / "ca.pem"
    if content is not None:
        ca_file.write_bytes(content)
    with pytest.raises(ConfigurationError, match="cannot read authorities") as caught:
        await connect(url_of(server), tls=ClientTls(ca_file=ca_file))
    assert str(ca_file) in str(caught.value)


# --- protocol ---


async def test_another_protocol(server, tls):
    problem = await why(url_of(server), tls, protocols=("quorate/999", "h3"))
    assert problem == "the server speaks none of quorate/999, h3"


async def test_the_first_common_protocol_is_taken(credentials, server):
    link = await connected(server, url_of(server), credentials, protocols=("quorate/999", ALPN))
    assert link.here.protocol == link.there.protocol == ALPN
    await link.here.close()


# --- nobody there ---


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_nothing_listens(tls, host):
    problem = await why(f"quic://{host}:{free_port()}", tls, timeout_s=30)
    assert problem == "connection refused: nothing listens there"


async def test_a_refusal_is_noticed_however_the_kernel_tells_it(tls, monkeypatch):
    """Where a second packet leaves before the socket is read, sending it takes the news away."""
    send = UdpPort.send

    def send_twice(self, datagrams):
        for _ in range(2):
            for datagram in datagrams:
                send(self, [datagram])

    monkeypatch.setattr(UdpPort, "send", send_twice)
    problem = await why(f"quic://127.0.0.1:{free_port()}", tls, timeout_s=30)
    assert problem == "connection refused: nothing listens there"


@pytest.mark.parametrize("host", ["a..b", "[fe80::1%no-such-interface]", "x" * 64])
async def test_a_name_that_cannot_be_resolved(tls, host):
    problem = await why(f"quic://{host}:4433", tls)
    assert problem.startswith(f"the host name {host.strip('[]')!r} cannot be resolved (")


@pytest.mark.parametrize("url", ["https://localhost:4433", "localhost:4433", "quic://", "quic://localhost:0"])
async def test_what_is_no_address(tls, url):
    with pytest.raises(ConfigurationError, match="an address looks like quic://"):
        await connect(url, tls=tls)


async def test_no_answer_in_time(tls):
    with UdpSocket() as silent:
        problem = await why(f"quic://127.0.0.1:{silent.port}", tls, timeout_s=0.2)
        assert problem.startswith("no answer within 0.2 s; is the coordinator running")
        assert f"port {silent.port}" in problem
        assert len(await silent.receive()) >= 1200


async def test_a_silent_address_leaves_time_for_the_next(server, tls, monkeypatch):
    """A name with several addresses, the first of which swallows everything."""
    with UdpSocket() as silent:
        found = [
            (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", silent.port)),
            (socket.AF_INET, socket.SOCK_DGRAM, 17, "", server.address),
        ]

        async def getaddrinfo(*args, **kwargs):
            return found

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        async with await connect("quic://localhost:1", tls=tls, timeout_s=1.0):
            await server.accept()
        # When none works, each says why.
        found[1] = (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", free_port()))
        problem = await why("quic://localhost:1", tls, timeout_s=0.3)
        assert f"127.0.0.1:{silent.port}: no answer within 0.3 s" in problem
        assert "nothing listens there" in problem


async def test_the_wildcard_address_reaches_this_machine(server, credentials):
    tls = ClientTls(ca_file=credentials.ca_file, server_name="localhost")
    async with await connect(f"quic://0.0.0.0:{server.address[1]}", tls=tls) as connection:
        assert connection.peer == f"127.0.0.1:{server.address[1]}"

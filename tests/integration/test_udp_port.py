"""The UDP port on real sockets: batches, segmentation and its refusal, full buffers, sizes that do not fit."""

import asyncio
import contextlib
import errno
import os
import random
import socket
import struct
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from links import PATIENCE_S, connected, noise, pair, ping_pong, read_exactly, serving, until, url_of
from quorate_protocol.errors import ConnectionClosed
from quorate_protocol.transport import ServerStats
from quorate_protocol.transport import udp as udp_module
from quorate_protocol.transport.udp import BATCH_DATAGRAMS_MAX, SOCKET_BUFFER_BYTES, UdpPort, bind_udp

LOOPBACK = ("127.0.0.1", 0)


class Recorder:
    """A `PacketReceiver` that keeps what it hears."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[bytes, object]]] = []
        self.refusals = 0
        self.too_large: list[int] = []
        self.writable_again = 0

    @property
    def datagrams(self) -> list[bytes]:
        return [datagram for batch in self.batches for datagram, _ in batch]

    def datagrams_received(self, datagrams) -> None:
        self.batches.append(list(datagrams))

    def refused(self) -> None:
        self.refusals += 1

    def datagram_too_large(self, datagram_bytes, address) -> None:
        self.too_large.append(datagram_bytes)

    def writable(self) -> None:
        self.writable_again += 1


class End:
    """A port on loopback with its receiver and its counters."""

    def __init__(self, sock: socket.socket) -> None:
        self.port = UdpPort(sock)
        self.heard = Recorder()
        self.stats = ServerStats()
        self.port.attach(self.heard, self.stats)


class Wrapped:
    """A socket whose calls a test may replace: those of `socket.socket` itself cannot be."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def __getattr__(self, name):
        return getattr(self._sock, name)


@pytest.fixture
async def ends():
    """Two ports; closed at the end."""
    found = [End(bind_udp(socket.AF_INET, LOOPBACK)) for _ in range(2)]
    yield found
    for end in found:
        end.port.close()


def failing(code: int, times: int = 1 << 30):
    """A stand-in for a system call that fails so often, and what counts its calls."""
    calls: list[tuple] = []

    def fail(*args):
        calls.append(args)
        raise OSError(code, os.strerror(code))

    return fail, calls


def cut(*sizes: int) -> list[bytes]:
    return [noise(size, seed=number) for number, size in enumerate(sizes)]


# --- receiving ---


@pytest.mark.parametrize("merges", [True, False])
async def test_what_was_sent_in_any_way_arrives_whole_and_in_order(ends, merges):
    a, b = ends
    if not merges:
        b.port._merges = b.port._sock.setsockopt(17, 104, 0) or False
    sizes = [1200] * 100 + [700, 16_000, 16_000, 16_000, 16_000, 16_000, 10, 0, 0, 1, 1, 65_507, 1200, 1201, 1201, 9]
    sent = cut(*sizes)
    a.port.send([(datagram, b.port.address) for datagram in sent])
    await until(lambda: len(b.heard.datagrams) == len(sent))
    assert b.heard.datagrams == sent
    assert {address for batch in b.heard.batches for _, address in batch} == {a.port.address}
    for count, total in (
        (a.stats.udp_datagrams_sent, a.stats.bytes_sent),
        (b.stats.udp_datagrams_received, b.stats.bytes_received),
    ):
        assert (count, total) == (len(sent), sum(sizes))
    assert a.stats.udp_segmentation_refused == a.stats.udp_datagrams_dropped == 0


async def test_a_batch_is_bounded(ends):
    a, b = ends
    for _ in range(50):
        a.port.send([(bytes(100), b.port.address)] * 60)
    await until(lambda: len(b.heard.datagrams) == 3000)
    # What was merged comes in one piece, which may be the last of a batch.
    assert max(map(len, b.heard.batches)) < BATCH_DATAGRAMS_MAX + 64


@pytest.mark.parametrize("seed", [1, 2])
async def test_many_peers_are_told_apart(ends, seed):
    _, b = ends
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(contextlib.closing(bind_udp(socket.AF_INET, LOOPBACK))) for _ in range(20)]
        for _ in range(300):
            sock = rng.choice(others)
            sock.sendto(b"%d" % sock.getsockname()[1], b.port.address)
        await until(lambda: len(b.heard.datagrams) == 300)
        for batch in b.heard.batches:
            for datagram, address in batch:
                assert int(datagram) == address[1]


async def test_a_dual_stack_socket_serves_both(ends):
    a, _ = ends
    dual = End(bind_udp(socket.AF_INET6, ("::", 0)))
    port = dual.port.address[1]
    a.port.send([(bytes(1200), ("127.0.0.1", port))] * 3)
    await until(lambda: len(dual.heard.datagrams) == 3)
    (_, back), *_ = dual.heard.batches[0]
    dual.port.send([(bytes(1300), back)] * 3)
    await until(lambda: len(a.heard.datagrams) == 3)
    assert dual.stats.udp_segmentation_refused == 0
    dual.port.close()


# --- sending ---


async def test_equal_datagrams_leave_in_one_system_call(ends):
    a, b = ends
    calls: list[tuple[int, int]] = []
    sock = a.port._sock = Wrapped(a.port._sock)

    def sendmsg(buffers, ancillary, flags, address):
        ((_, _, packed),) = ancillary
        calls.append((len(buffers), *struct.unpack("=H", packed)))
        return sock._sock.sendmsg(buffers, ancillary, flags, address)

    def sendto(datagram, address):
        calls.append((1, len(datagram)))
        return sock._sock.sendto(datagram, address)

    sock.sendmsg, sock.sendto = sendmsg, sendto
    sizes = [1200] * 60 + [100] * 65 + [50] + [16_000] * 5 + [300, 301]
    sent = cut(*sizes)
    a.port.send([(datagram, b.port.address) for datagram in sent])
    await until(lambda: len(b.heard.datagrams) == len(sent))
    assert b.heard.datagrams == sent
    # At most 64, at most 65,000 bytes; a shorter one is the last of its call.
    assert calls == [(54, 1200), (7, 1200), (64, 100), (1, 50), (4, 16_000), (2, 16_000), (1, 301)]
    calls.clear()
    # One of them to somebody else.
    a.port.send([(sent[0], b.port.address), (sent[1], b.port.address), (sent[2], a.port.address)])
    assert calls == [(2, 1200), (1, 1200)]


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL, errno.ENOPROTOOPT, errno.EOPNOTSUPP])
async def test_where_the_kernel_does_not_cut_each_leaves_alone(ends, code):
    a, b = ends
    sock = a.port._sock = Wrapped(a.port._sock)
    sock.sendmsg, calls = failing(code)
    with capture_logs() as logs:
        for _ in range(3):
            a.port.send([(bytes(1200), b.port.address)] * 20)
    await until(lambda: len(b.heard.datagrams) == 60)
    assert len(calls) == 1
    assert a.stats.udp_segmentation_refused == 1
    assert [entry["event"] for entry in logs] == ["udp_segmentation_refused"]
    assert (a.stats.udp_datagrams_sent, a.stats.udp_datagrams_dropped) == (60, 0)


async def test_a_kernel_that_does_not_know_the_option(ends, monkeypatch):
    """The real call with an option that no kernel takes: a segment size without bytes."""
    a, b = ends
    monkeypatch.setattr(udp_module, "struct", type("", (), {"pack": staticmethod(lambda form, size: b"\x01")}))
    with capture_logs() as logs:
        a.port.send([(bytes(1200), b.port.address)] * 20)
    await until(lambda: len(b.heard.datagrams) == 20)
    assert [entry["event"] for entry in logs] == ["udp_segmentation_refused"]


async def test_segments_that_are_too_large_do_not_end_segmentation(ends):
    """Older kernels say EINVAL to them as well."""
    a, b = ends
    for code in (errno.EINVAL, errno.EMSGSIZE):
        sock = a.port._sock = Wrapped(a.port._sock)
        sock.sendmsg, _ = failing(code)
        sock.sendto, _ = failing(errno.EMSGSIZE)
        a.port.send([(bytes(1400), b.port.address)] * 3)
        a.port._sock = sock._sock
    assert a.heard.too_large == [1400] * 6
    assert a.stats.udp_segmentation_refused == 0
    assert a.stats.udp_datagrams_dropped == 6
    a.port.send([(bytes(1400), b.port.address)] * 3)
    await until(lambda: len(b.heard.datagrams) == 3)


async def test_a_datagram_that_fits_no_packet_is_reported(ends):
    a, b = ends
    a.port.send([(bytes(65_508), b.port.address), (b"next", b.port.address)])
    await until(lambda: b.heard.datagrams == [b"next"])
    assert a.heard.too_large == [65_508]
    assert (a.stats.udp_datagrams_sent, a.stats.udp_datagrams_dropped) == (1, 1)


async def test_packets_are_not_split_and_hearsay_about_the_path_does_not_count():
    for family, options in (
        (socket.AF_INET, [(socket.IPPROTO_IP, 10)]),
        (socket.AF_INET6, [(socket.IPPROTO_IP, 10), (socket.IPPROTO_IPV6, 23)]),
    ):
        with bind_udp(family, None) as sock:
            for level, option in options:
                assert sock.getsockopt(level, option) == 3


# --- full ---


@pytest.fixture
async def full():
    """A port whose socket takes no more, into a peer that a test has to read from."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    here.setblocking(False)
    there.setblocking(False)
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    end = End(here)
    end.port._is_connected, end.port._segments = True, False
    with contextlib.closing(there):
        yield end, there
        end.port.close()


def drain(sock: socket.socket) -> list[bytes]:
    got = []
    with contextlib.suppress(BlockingIOError):
        while True:
            got.append(sock.recv(65_536))
    return got


async def test_what_a_full_socket_does_not_take_is_kept_once_and_sent_later(full):
    end, peer = full
    sent = [b"%04d" % number for number in range(200)]
    end.port.send([(datagram, None) for datagram in sent])
    assert not end.port.is_writable
    assert end.stats.udp_send_blocked == 1
    # Nobody has to keep more than what one call gave.
    end.port.send([(b"more", None)] * 10)
    assert end.stats.udp_datagrams_dropped == 10
    got = drain(peer)
    while len(got) < len(sent):
        await asyncio.sleep(0)
        got += drain(peer)
    assert got == sent
    await until(lambda: end.heard.writable_again)
    assert end.heard.writable_again == 1
    assert end.port.is_writable
    assert end.stats.udp_datagrams_sent == 200
    end.port.send([(b"on", None)])
    assert peer.recv(10) == b"on"


async def test_closing_forgets_what_was_kept(full):
    end, _ = full
    end.port.send([(bytes(10), None)] * 200)
    assert not end.port.is_writable
    end.port.close()
    end.port.close()
    end.port.send([(b"", None)])
    await asyncio.sleep(0)
    assert end.heard.writable_again == 0


async def test_a_full_device_is_tried_again_soon(ends):
    a, b = ends
    sock = a.port._sock = Wrapped(a.port._sock)
    sock.sendto, calls = failing(errno.ENOBUFS)
    a.port.send([(b"1", b.port.address)])
    await until(lambda: len(calls) > 2)
    assert not a.port.is_writable
    a.port._sock = sock._sock
    await until(lambda: a.heard.writable_again)
    await until(lambda: b.heard.datagrams == [b"1"])


# --- buffers ---


def granting(monkeypatch, granted_bytes: int, *, forced: bool = False) -> None:
    """Lets `udp` meet a kernel that grants a buffer of so many bytes."""

    class Sparing(socket.socket):
        def setsockopt(self, level, option, value):
            if option in (32, 33) and not forced:
                raise PermissionError(errno.EPERM, "not permitted")
            if option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                value = min(value, granted_bytes)
            super().setsockopt(level, option, value)

    monkeypatch.setattr(udp_module.socket, "socket", Sparing)
    monkeypatch.setattr(udp_module, "_small_buffers_told", False)


def test_small_buffers_are_told_once_and_what_limits_them(monkeypatch):
    granting(monkeypatch, 212_992)
    with capture_logs() as logs:
        for _ in range(3):
            bind_udp(socket.AF_INET, None).close()
    (entry,) = logs
    assert entry["event"] == "udp_buffer_small"
    assert entry["log_level"] == "warning"
    assert entry["wanted_bytes"] == SOCKET_BUFFER_BYTES
    assert entry["granted_bytes"] == 212_992
    assert entry["sysctl"] == "net.core.rmem_max, net.core.wmem_max"


def test_half_of_what_was_asked_for_is_enough(monkeypatch):
    limits = [int(Path(f"/proc/sys/net/core/{name}").read_text()) for name in ("rmem_max", "wmem_max")]
    if min(limits) < SOCKET_BUFFER_BYTES // 2:
        pytest.skip("this machine grants less")
    granting(monkeypatch, SOCKET_BUFFER_BYTES // 2)
    with capture_logs() as logs:
        bind_udp(socket.AF_INET, None).close()
    assert logs == []


def test_who_may_gets_large_buffers_whatever_the_limit_is(monkeypatch):
    granting(monkeypatch, 1000, forced=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, 33, SOCKET_BUFFER_BYTES)
        except PermissionError:
            pytest.skip("needs CAP_NET_ADMIN")
    with capture_logs() as logs, bind_udp(socket.AF_INET, None) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * SOCKET_BUFFER_BYTES
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * SOCKET_BUFFER_BYTES
    assert logs == []


# --- with an endpoint on it ---


async def test_an_engine_hears_what_size_was_refused(credentials):
    async with serving(credentials) as server:
        link = await connected(server, url_of(server), credentials)
        here, there = await pair(link)
        refused: list[int] = []
        link.here.engine.datagram_refused = lambda size, now: refused.append(size)
        port = link.here._driver._port
        sock = port._sock = Wrapped(port._sock)
        sock.send, _ = failing(errno.EMSGSIZE)
        here.send_nowait(b"once")
        await until(lambda: refused)
        port._sock = sock._sock
        assert await read_exactly(there, 4) == b"once"  # sent again
        assert 4 < refused[0] < 100
        # An engine that raises at that ends its own connection.
        link.here.engine.datagram_refused = lambda size, now: 1 / 0
        port._sock = sock
        with capture_logs() as logs:
            here.send_nowait(b"once")
            await until(lambda: link.here.is_closed)
        assert [entry["event"] for entry in logs] == ["engine_failed"]


async def test_while_the_socket_is_full_nothing_piles_up_and_all_arrives_later(credentials):
    async with serving(credentials) as server:
        link = await connected(server, url_of(server), credentials)
        other = await connected(server, url_of(server), credentials)
        streams, others = await pair(link), await pair(other)
        endpoint = server._endpoint
        port = endpoint._port
        sock = port._sock = Wrapped(port._sock)
        passes: list[int] = []
        for connection in (link.there, other.there):
            engine = connection.engine

            def ask(now, count_max, ask=engine.datagrams_to_send):
                passes.append(len(datagrams := ask(now, count_max)))
                return datagrams

            engine.datagrams_to_send = ask
        for name in ("sendto", "sendmsg"):
            setattr(sock, name, failing(errno.EAGAIN)[0])
        # The loop must not find it writable all the time, as it is.
        endpoint._loop.add_writer = lambda fd, callback: None
        data = noise(400_000)
        streams[1].send_nowait(data)
        others[1].send_nowait(b"behind")
        await until(lambda: not port.is_writable)
        asked = len(passes)
        # The client's packets go on coming in, and timers fire; no pass is made for them.
        for number in range(20):
            streams[0].send_nowait(b"%02d" % number)
            await read_exactly(streams[1], 2)
        assert len(passes) == asked
        assert len(port._unsent) == sum(passes)
        del endpoint._loop.add_writer
        port._sock = sock._sock
        port._on_writable()
        assert await read_exactly(streams[0], len(data)) == data
        assert await read_exactly(others[0], 6) == b"behind"
        await ping_pong(*streams)
        await ping_pong(*others)
        for client in (link.here, other.here):
            await client.close()


async def test_a_socket_that_stays_full_does_not_keep_the_loop_busy_nor_a_connection_alive(credentials, monkeypatch):
    monkeypatch.setattr("quorate_protocol.transport.engine.aioquic_engine.IDLE_TIMEOUT_S", 0.5)
    async with serving(credentials) as server:
        link = await connected(server, url_of(server), credentials)
        here, _ = await pair(link)
        endpoint = link.here._driver
        port = endpoint._port
        sock = port._sock = Wrapped(port._sock)
        sock.send = sock.sendmsg = failing(errno.EAGAIN)[0]
        endpoint._loop.add_writer = lambda fd, callback: None
        fired = 0
        on_timer = endpoint._on_timer

        def count(connection):
            nonlocal fired
            fired += 1
            on_timer(connection)

        monkeypatch.setattr(endpoint, "_on_timer", count)
        here.send_nowait(bytes(100_000))
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(ConnectionClosed, match="Idle timeout"):
                await here.receive()
        del endpoint._loop.add_writer
        assert fired < 60
        await until(lambda: endpoint._gone.done())


async def test_closing_a_server_whose_socket_takes_nothing_ends_soon_and_whole_even_when_cancelled(credentials):
    async with serving(credentials) as server:
        links = [await connected(server, url_of(server), credentials) for _ in range(5)]
        endpoint = server._endpoint
        port = endpoint._port
        sock = port._sock = Wrapped(port._sock)
        for name in ("send", "sendto", "sendmsg"):
            setattr(sock, name, failing(errno.EAGAIN)[0])
        endpoint._loop.add_writer = lambda fd, callback: None
        closing = asyncio.create_task(server.close())
        await until(lambda: not port.is_writable)
        closing.cancel()
        await asyncio.wait((closing,))
        async with asyncio.timeout(PATIENCE_S):
            await server.close()
        del endpoint._loop.add_writer
        assert port._is_closed
        assert not endpoint._connections
        for link in links:
            await link.here.close()


async def test_a_close_that_finds_room_again_leaves_nobody_behind(credentials):
    """It sends what was kept itself, and the loop does not tell any more that there is room."""
    async with serving(credentials) as server:
        links = [await connected(server, url_of(server), credentials) for _ in range(3)]
        streams = [await pair(link) for link in links]
        endpoint = server._endpoint
        port = endpoint._port
        sock = port._sock = Wrapped(port._sock)
        for name in ("send", "sendto", "sendmsg"):
            setattr(sock, name, failing(errno.EAGAIN)[0])
        endpoint._loop.add_writer = lambda fd, callback: None
        for _, there in streams:
            there.send_nowait(b"waits")
        await until(lambda: not port.is_writable)
        del endpoint._loop.add_writer
        port._sock = sock._sock
        await links[1].there.close()
        for here, _ in (streams[0], streams[2]):
            assert await read_exactly(here, 5) == b"waits"
        for link in links:
            await link.here.close()

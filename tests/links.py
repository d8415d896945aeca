"""Real links over loopback for the transport's tests: a server, a client, and what stands between them."""

import asyncio
import contextlib
import hashlib
import random
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quorate_coordinator.certificates import DevelopmentCredentials
from quorate_protocol.transport import BiStream, ClientTls, ReceiveStream, connect, listen
from quorate_protocol.transport.connection import QuicConnection
from quorate_protocol.transport.quic import QuicServer

#: Over anything that happens in time; a test that waits so long has failed.
PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class Link:
    """One connection, seen from both ends."""

    server: QuicServer
    #: The server's end.
    there: QuicConnection
    #: The client's end.
    here: QuicConnection


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Returns when the condition holds; it is looked at every few milliseconds."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110  nobody tells of it
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"did not come about: {what or condition}") from None


async def connected(server: QuicServer, url: str, credentials: DevelopmentCredentials, **options: Any) -> Link:
    """Connects a client and accepts it."""
    async with asyncio.timeout(PATIENCE_S):
        here = await connect(url, tls=ClientTls(ca_file=credentials.ca_file), **options)
        there = await server.accept()
    assert isinstance(here, QuicConnection)
    assert isinstance(there, QuicConnection)
    return Link(server, there, here)


def url_of(server: QuicServer) -> str:
    host, port = server.address
    return f"quic://[{host}]:{port}" if ":" in host else f"quic://{host}:{port}"


@contextlib.asynccontextmanager
async def serving(
    credentials: DevelopmentCredentials, host: str = "127.0.0.1", port: int = 0, **options: Any
) -> AsyncIterator[QuicServer]:
    """A server on a free port, or one that was free; closed at the end."""
    server = await listen(f"{host}:{port}", tls=credentials.tls, **options)
    try:
        yield server
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def linked(credentials: DevelopmentCredentials, host: str = "127.0.0.1") -> AsyncIterator[Link]:
    """A server with one client; both closed at the end."""
    async with serving(credentials, host) as server:
        link = await connected(server, url_of(server), credentials)
        try:
            yield link
        finally:
            await link.here.close()


async def read_all(stream: ReceiveStream, max_bytes: int = 65_536) -> bytes:
    """Everything until the end of the stream."""
    chunks = []
    async with asyncio.timeout(PATIENCE_S):
        while chunk := await stream.receive(max_bytes):
            assert len(chunk) <= max_bytes
            chunks.append(chunk)
    return b"".join(chunks)


async def read_exactly(stream: ReceiveStream, count: int) -> bytes:
    """The next `count` bytes."""
    data = b""
    async with asyncio.timeout(PATIENCE_S):
        while len(data) < count:
            chunk = await stream.receive(count - len(data))
            assert chunk, f"the stream ended {count - len(data)} bytes early"
            data += chunk
    return data


async def pair(link: Link) -> tuple[BiStream, BiStream]:
    """A bidirectional stream that the client opened, here and there, and that has carried one byte and its receipt."""
    async with asyncio.timeout(PATIENCE_S):
        here = await link.here.open_bi_stream()
        await here.send(b"!")
        there = await link.there.accept_bi_stream()
        assert await there.receive() == b"!"
        await here.flush()
    return here, there


async def ping_pong(here: BiStream, there: BiStream, times: int = 1) -> None:
    """Round trips over one stream: the connection lives, and time has passed for everything else on it."""
    async with asyncio.timeout(PATIENCE_S):
        for turn in range(times):
            await here.send(b"%08d" % turn)
            assert await read_exactly(there, 8) == b"%08d" % turn
            await there.send(b"%08d" % turn)
            assert await read_exactly(here, 8) == b"%08d" % turn


def noise(count: int, seed: int = 0) -> bytes:
    """Bytes that differ everywhere, the same for the same seed."""
    return random.Random(seed).randbytes(count)


def digest(data: bytes) -> str:
    """For comparing megabytes without printing them when they differ."""
    return f"{len(data)} bytes {hashlib.sha256(data).hexdigest()}"


def open_files() -> list[str]:
    """What the descriptors of this process lead to, deleted files among them."""
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            targets.append(str(link.readlink()))
        except FileNotFoundError:
            continue  # the one of the listing itself
    return targets


def unread_bytes(stream: Any) -> int:
    """Bytes that were delivered to a stream and that nobody has read."""
    return sum(map(len, stream._unread))


def sizes(connection: QuicConnection) -> dict[str, int]:
    """How much a connection and its engine hold, by the name of the container."""
    quic: Any = connection.engine._quic  # type: ignore[attr-defined]
    owners = {"connection": connection, "quic": quic, "loss": quic._loss}
    owners |= {f"space_{epoch.name}": space for epoch, space in quic._spaces.items()}
    return {
        f"{owner_name}.{name}": len(value)
        for owner_name, owner in owners.items()
        for name, value in vars(owner).items()
        if hasattr(value, "__len__") and not isinstance(value, str | bytes)
    }


class UdpSocket:
    """A bare UDP socket on loopback, for what no QUIC client would send."""

    def __init__(self, peer: tuple[str, int] | None = None) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._peer = peer

    def send(self, data: bytes, peer: tuple[str, int] | None = None) -> None:
        self._socket.sendto(data, peer or self._peer)

    async def receive(self) -> bytes:
        return (await self.receive_from())[0]

    async def receive_from(self) -> tuple[bytes, tuple[str, int]]:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.get_running_loop().sock_recvfrom(self._socket, 65_536)

    def receive_nowait(self) -> bytes | None:
        try:
            return self._socket.recv(65_536)
        except BlockingIOError:
            return None

    def __enter__(self) -> "UdpSocket":
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()


def free_port() -> int:
    """A UDP port on loopback where nothing listens."""
    with UdpSocket() as sock:
        return sock.port


class Nat:
    """Stands between one client and a server, as a home router does.

    `rebind` gives the client a new outside port, without its knowing. `to_client` and `to_server` carry
    what comes; a test may put something of its own in their place.
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = server
        self._client: Any = None
        #: Swallows everything while it is set.
        self.is_cut = False
        #: Datagrams that were.
        self.swallowed = 0
        self.to_client = self._to_client
        self.to_server = self._to_server
        self._inside = self._bind(self._from_client)
        self._outside = self._bind(self._from_server)
        self.port: int = self._inside.getsockname()[1]

    @property
    def outside_port(self) -> int:
        """Where the server sees the client."""
        port: int = self._outside.getsockname()[1]
        return port

    def rebind(self) -> None:
        """From now on the client has another port outside; what was under way to the old one is lost."""
        old, self._outside = self._outside, self._bind(self._from_server)
        self._loop.remove_reader(old)
        old.close()

    def close(self) -> None:
        for sock in (self._inside, self._outside):
            self._loop.remove_reader(sock)
            sock.close()

    def _bind(self, reader: Callable[[], None]) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind(("127.0.0.1", 0))
        self._loop.add_reader(sock, reader)
        return sock

    def _to_client(self, data: bytes) -> None:
        self._inside.sendto(data, self._client)

    def _to_server(self, data: bytes) -> None:
        self._outside.sendto(data, self._server)

    def _from_client(self) -> None:
        data, self._client = self._inside.recvfrom(65_536)
        self._carry(data, self.to_server)

    def _from_server(self) -> None:
        self._carry(self._outside.recv(65_536), self.to_client)

    def _carry(self, data: bytes, onwards: Callable[[bytes], None]) -> None:
        if self.is_cut:
            self.swallowed += 1
        else:
            onwards(data)

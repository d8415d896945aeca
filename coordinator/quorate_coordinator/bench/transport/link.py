"""The narrow face that both transports show to the work they are measured with."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """How a link is made; both ends get the same."""

    #: Largest UDP payload in bytes; None leaves it to the transport: discovery (ours), 1200 (stock).
    udp_payload_bytes: int | None = None
    #: Bidirectional streams that the client may have open; None leaves it to the transport: 1024, or 128 at first.
    streams_max: int | None = None


DEFAULTS: Final = LinkOptions()


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Who the server is, in PEM."""

    #: What the client trusts.
    ca: Path
    certificate: Path
    key: Path


class Pipe(Protocol):
    """A bidirectional stream."""

    async def send(self, data: bytes) -> None:
        """Hands over bytes, and waits as long as the transport wants its caller to."""

    async def receive(self, max_bytes: int = ...) -> bytes:
        """The next bytes; b"" at the end."""

    async def finish(self) -> None:
        """Ends the sending half."""


class Link(Protocol):
    """The client's end of a connection."""

    @property
    def sends(self) -> int:
        """A count that grows when what was written is handed to the kernel."""

    @property
    def udp_payload_bytes(self) -> int:
        """Largest UDP payload that is sent now."""

    async def open(self, *, critical: bool = False) -> Pipe:
        """Opens a stream; critical where the transport has a word for it."""

    def send_datagram(self, data: bytes) -> None:
        """Sends an unreliable message."""

    async def receive_datagram(self) -> bytes:
        """The next unreliable message."""

    async def close(self) -> None:
        """Ends the connection."""


class Listener(Protocol):
    """A server. It echoes unreliable messages."""

    @property
    def port(self) -> int:
        """UDP port on 127.0.0.1, chosen by the kernel."""

    async def close(self) -> None:
        """Ends it and its connections."""


#: What a server does with a stream that was opened to it.
Service = Callable[[Pipe], Awaitable[None]]


class Side(Protocol):
    """One of the two transports."""

    async def listen(self, tls: TlsFiles, options: LinkOptions, service: Service) -> Listener:
        """Listens on loopback."""

    async def connect(self, port: int, tls: TlsFiles, options: LinkOptions) -> Link:
        """Connects to a listener; returns when the handshake is complete."""


class Tasks:
    """Tasks that nobody awaits: kept while they run, ended together."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Awaitable[None]) -> None:
        """Runs it; the end of its connection ends it without a word."""
        task = asyncio.ensure_future(work)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Ends them."""
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

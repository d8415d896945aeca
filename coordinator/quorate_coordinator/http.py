"""HTTP beside QUIC, on TCP: metrics for Prometheus, and what supervisors look at.

`/healthz` says that the process serves; `/readyz` that it takes rounds (not while it drains, nor while none can be
recorded).
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Final

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from quorate_protocol.errors import ConfigurationError
from quorate_protocol.transport.address import join_host_port

#: Connections that may wait to be accepted: scrapers and supervisors are few.
_BACKLOG: Final = 128


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Signals are the daemon's: it drains first.
        yield


class HttpServer:
    """Serves until `close`."""

    def __init__(self, registry: CollectorRegistry, is_ready: Callable[[], bool]) -> None:
        self._registry = registry
        self._is_ready = is_ready
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None
        self._address: tuple[str, int] | None = None

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port that are really bound; None before `start`."""
        return self._address

    async def start(self, host: str, port: int) -> None:
        """Binds and serves.

        Raises:
            ConfigurationError: the address is taken or not ours.
        """
        sock = _bind_tcp(host, port)
        self._address = sock.getsockname()[:2]
        app = Starlette(
            routes=[
                Route("/metrics", self._metrics),
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
            ]
        )
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2, server_header=False
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[sock]), name="http")

    async def close(self) -> None:
        """Stops serving; open requests get two seconds."""
        if self._server is not None and self._task is not None:
            self._server.should_exit = True
            await self._task
            self._task = None

    async def _metrics(self, request: Request) -> Response:
        # Not with prometheus_client's ASGI app: that computes in a thread, and our state belongs to this loop.
        encoder, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encoder(self._registry), headers={"content-type": content_type})

    async def _healthz(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _readyz(self, request: Request) -> Response:
        if self._is_ready():
            return PlainTextResponse("ready\n")
        return PlainTextResponse("not ready\n", status_code=503)


def _bind_tcp(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            # With SO_REUSEADDR it is only now that a second listener is turned away.
            sock.listen(_BACKLOG)
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
    except OSError as error:
        raise ConfigurationError(
            "http", f"cannot listen on {join_host_port(host, port)}: {error.strerror or error}"
        ) from error
    return sock

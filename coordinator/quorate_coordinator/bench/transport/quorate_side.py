"""Our transport behind the benchmark's face."""

import contextlib
from typing import Any, cast

from quorate_coordinator.bench.transport.link import Link, LinkOptions, Listener, Pipe, Service, Tasks, TlsFiles
from quorate_protocol.errors import QuorateError
from quorate_protocol.limits import UDP_PAYLOAD_BYTES_MAX
from quorate_protocol.transport import ClientTls, Connection, Priority, ServerTls, connect, listen
from quorate_protocol.transport.quic import QuicServer


class QuorateLink:
    """Implements `Link`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stats = connection.stats

    @property
    def sends(self) -> int:
        return self._stats.udp_datagrams_sent

    @property
    def udp_payload_bytes(self) -> int:
        return cast(int, cast(Any, self._connection).engine.udp_payload_bytes)

    async def open(self, *, critical: bool = False) -> Pipe:
        return await self._connection.open_bi_stream(Priority.CRITICAL if critical else Priority.NORMAL)

    def send_datagram(self, data: bytes) -> None:
        self._connection.datagrams.send(data)

    async def receive_datagram(self) -> bytes:
        return await self._connection.datagrams.receive()

    async def close(self) -> None:
        await self._connection.close()


class QuorateListener:
    """Implements `Listener`."""

    def __init__(self, server: QuicServer, options: LinkOptions, service: Service) -> None:
        self._server = server
        self._options = options
        self._service = service
        self._tasks = Tasks()
        self._tasks.start(self._accept())

    @property
    def port(self) -> int:
        return self._server.address[1]

    async def close(self) -> None:
        await self._server.close()
        await self._tasks.stop()

    async def _accept(self) -> None:
        async for connection in self._server:
            if self._options.streams_max is not None:
                _let_open(connection, self._options.streams_max)
            self._tasks.start(self._accept_streams(connection))
            self._tasks.start(self._echo_datagrams(connection))

    async def _accept_streams(self, connection: Connection) -> None:
        with contextlib.suppress(QuorateError):
            while True:
                self._tasks.start(self._serve(await connection.accept_bi_stream()))

    async def _echo_datagrams(self, connection: Connection) -> None:
        with contextlib.suppress(QuorateError):
            while True:
                connection.datagrams.send(await connection.datagrams.receive())

    async def _serve(self, pipe: Pipe) -> None:
        with contextlib.suppress(QuorateError):
            await self._service(pipe)


class QuorateSide:
    """Implements `Side`."""

    async def listen(self, tls: TlsFiles, options: LinkOptions, service: Service) -> Listener:
        server = await listen(
            "127.0.0.1:0",
            tls=ServerTls(tls.certificate, tls.key),
            udp_payload_bytes_max=options.udp_payload_bytes or UDP_PAYLOAD_BYTES_MAX,
        )
        return QuorateListener(server, options, service)

    async def connect(self, port: int, tls: TlsFiles, options: LinkOptions) -> Link:
        connection = await connect(
            f"quic://127.0.0.1:{port}",
            tls=ClientTls(tls.ca),
            udp_payload_bytes_max=options.udp_payload_bytes or UDP_PAYLOAD_BYTES_MAX,
        )
        if options.streams_max is not None:
            _may_open(connection, options.streams_max)
        return QuorateLink(connection)


def _let_open(connection: Connection, streams_max: int) -> None:
    """Takes more streams than the transport's ceiling lets a peer open.

    Under the engine port, where the benchmark has no business otherwise: the ceiling is no setting, and the cost
    of idle streams is promised for more of them. The stock's is raised in the same way.
    """
    limit = cast(Any, connection).engine._quic._local_max_streams_bidi
    limit.value = limit.sent = streams_max


def _may_open(connection: Connection, streams_max: int) -> None:
    """The other end of `_let_open`."""
    cast(Any, connection).engine._quic._remote_max_streams_bidi = streams_max

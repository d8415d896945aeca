"""Stock aioquic's asyncio API behind the benchmark's face: what somebody gets who uses the library as it is.

Its configuration is the default one, apart from what a link cannot do without (certificates, the application
protocol) and what a row is about. Where the API leaves a choice, it is the one that is best for the stock: its
server echoes an unreliable message in the event that brings it, without a task in between.
"""

import asyncio
import contextlib
from typing import Any, Final

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer, serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import DatagramFrameReceived, QuicEvent

from quorate_coordinator.bench.transport.link import Link, LinkOptions, Listener, Pipe, Service, Tasks, TlsFiles
from quorate_protocol.transport import ALPN

#: Without it there are no unreliable messages (RFC 9221, 3).
_DATAGRAM_FRAME_BYTES_MAX: Final = 65_535


class StockPipe:
    """Implements `Pipe`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def receive(self, max_bytes: int = 65_536) -> bytes:
        return await self._reader.read(max_bytes)

    async def finish(self) -> None:
        self._writer.write_eof()


class _Protocol(QuicConnectionProtocol):
    """The stock protocol; counts its send passes and keeps or echoes unreliable messages."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passes = 0
        self.unread: asyncio.Queue[bytes] = asyncio.Queue()

    def transmit(self) -> None:
        super().transmit()
        self.passes += 1

    def quic_event_received(self, event: QuicEvent) -> None:
        if not isinstance(event, DatagramFrameReceived):
            super().quic_event_received(event)
        elif self._quic.configuration.is_client:
            self.unread.put_nowait(event.data)
        else:
            # The send pass follows when all of the packet's events have been handled.
            self._quic.send_datagram_frame(event.data)


class StockLink:
    """Implements `Link`."""

    def __init__(self, protocol: _Protocol, closing: contextlib.AsyncExitStack) -> None:
        self._protocol = protocol
        self._closing = closing

    @property
    def sends(self) -> int:
        return self._protocol.passes

    @property
    def udp_payload_bytes(self) -> int:
        return self._protocol._quic.configuration.max_datagram_size

    async def open(self, *, critical: bool = False) -> Pipe:
        return StockPipe(*await self._protocol.create_stream())

    def send_datagram(self, data: bytes) -> None:
        self._protocol._quic.send_datagram_frame(data)
        self._protocol.transmit()

    async def receive_datagram(self) -> bytes:
        return await self._protocol.unread.get()

    async def close(self) -> None:
        await self._closing.aclose()


class StockListener:
    """Implements `Listener`."""

    def __init__(self, server: QuicServer, tasks: Tasks) -> None:
        assert server._transport is not None
        self._server = server
        self._tasks = tasks
        self.port: int = server._transport.get_extra_info("sockname")[1]

    async def close(self) -> None:
        self._server.close()
        await self._tasks.stop()


class StockSide:
    """Implements `Side`."""

    async def listen(self, tls: TlsFiles, options: LinkOptions, service: Service) -> Listener:
        configuration = _configuration(options, is_client=False)
        configuration.load_cert_chain(str(tls.certificate), str(tls.key))
        tasks = Tasks()

        def create(*args: Any, **kwargs: Any) -> _Protocol:
            protocol = _Protocol(*args, **kwargs)
            if options.streams_max is not None:
                limit = protocol._quic._local_max_streams_bidi
                limit.value = limit.sent = options.streams_max
            return protocol

        server = await serve(
            "127.0.0.1",
            0,
            configuration=configuration,
            create_protocol=create,
            stream_handler=lambda reader, writer: tasks.start(_serve(service, StockPipe(reader, writer))),
        )
        return StockListener(server, tasks)

    async def connect(self, port: int, tls: TlsFiles, options: LinkOptions) -> Link:
        configuration = _configuration(options, is_client=True)
        configuration.load_verify_locations(str(tls.ca))
        configuration.server_name = "localhost"
        closing = contextlib.AsyncExitStack()
        protocol = await closing.enter_async_context(
            connect("127.0.0.1", port, configuration=configuration, create_protocol=_Protocol)
        )
        assert isinstance(protocol, _Protocol)
        if options.streams_max is not None:
            protocol._quic._remote_max_streams_bidi = options.streams_max
        return StockLink(protocol, closing)


def _configuration(options: LinkOptions, *, is_client: bool) -> QuicConfiguration:
    configuration = QuicConfiguration(
        is_client=is_client, alpn_protocols=[ALPN], max_datagram_frame_size=_DATAGRAM_FRAME_BYTES_MAX
    )
    if options.udp_payload_bytes is not None:
        configuration.max_datagram_size = options.udp_payload_bytes
    return configuration


async def _serve(service: Service, pipe: Pipe) -> None:
    # Writing on a stream whose connection is gone is an error of no interest here.
    with contextlib.suppress(ConnectionError, AssertionError):
        await service(pipe)

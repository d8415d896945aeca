"""QUIC implementations that are not ours, as clients and servers for the tests: stock aioquic and qh3.

Their asyncio faces are alike; what differs is what their configurations take.
"""

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import aioquic.asyncio
import aioquic.quic.configuration
import qh3.asyncio
import qh3.quic.configuration
from aioquic.buffer import Buffer
from aioquic.quic.packet import pull_quic_transport_parameters, push_quic_transport_parameters

from links import Nat, until
from quorate_coordinator.certificates import DevelopmentCredentials
from quorate_protocol.transport import ALPN

#: RFC 9000 and RFC 9369.
VERSION_1 = 1
VERSION_2 = 0x6B3343CF


class Talker:
    """Mixed into a library's protocol: keeps events by name, and as a server echoes streams and datagrams."""

    _quic: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: dict[str, list[Any]] = defaultdict(list)
        self.data: dict[int, bytearray] = defaultdict(bytearray)
        self.ended: set[int] = set()
        self.echoes = True

    def quic_event_received(self, event: Any) -> None:
        name = type(event).__name__
        self.seen[name].append(event)
        echoes = self.echoes and not self._quic.configuration.is_client
        if name == "StreamDataReceived":
            self.data[event.stream_id] += event.data
            if event.end_stream:
                self.ended.add(event.stream_id)
            if echoes and not event.stream_id & 2:
                self._quic.send_stream_data(event.stream_id, event.data, event.end_stream)
        elif name == "DatagramFrameReceived" and echoes:
            self._quic.send_datagram_frame(event.data)

    def send(self, data: bytes, *, end: bool = True, uni: bool = False) -> int:
        """Opens a stream that begins with this; returns its id."""
        stream_id: int = self._quic.get_next_available_stream_id(is_unidirectional=uni)
        self._quic.send_stream_data(stream_id, data, end)
        self.transmit()  # type: ignore[attr-defined]
        return stream_id

    async def receive_all(self, stream_id: int) -> bytes:
        await until(lambda: stream_id in self.ended, f"the end of stream {stream_id}")
        return bytes(self.data[stream_id])


class AioquicTalker(Talker, aioquic.asyncio.QuicConnectionProtocol):
    """Stock aioquic."""


class Qh3Talker(Talker, qh3.asyncio.QuicConnectionProtocol):
    """qh3, whose packets are made in Rust."""


@dataclass(frozen=True)
class Library:
    """One implementation."""

    name: str
    asyncio: ModuleType
    configuration: Any
    talker: Any

    def configure(
        self, credentials: DevelopmentCredentials, *, is_client: bool, versions: tuple[int, ...], **options: Any
    ) -> Any:
        """A configuration that speaks these versions, the first of them first."""
        made = self.configuration(
            is_client=is_client,
            alpn_protocols=[ALPN],
            **{"max_datagram_frame_size": 65_536, "supported_versions": list(versions), **options},
        )
        if is_client:
            made.load_verify_locations(str(credentials.ca_file))
            made.server_name = "localhost"
        else:
            made.load_cert_chain(str(credentials.tls.certificate_file), str(credentials.tls.key_file))
        return made

    def connect(
        self,
        credentials: DevelopmentCredentials,
        port: int,
        *,
        versions: tuple[int, ...] = (VERSION_1,),
        host: str = "127.0.0.1",
        **options: Any,
    ) -> Any:
        """Connects as a client: an asynchronous context manager of a `Talker`."""
        made = self.configure(credentials, is_client=True, versions=versions, **options)
        return self.asyncio.connect(host, port, configuration=made, create_protocol=self.talker)

    @contextlib.asynccontextmanager
    async def serve(
        self, credentials: DevelopmentCredentials, *, versions: tuple[int, ...] = (VERSION_1,), **options: Any
    ) -> AsyncIterator[tuple[int, list[Any]]]:
        """Serves on a free port; yields the port and the connections, which fill as clients come."""
        connections: list[Any] = []

        def create(*args: Any, **kwargs: Any) -> Any:
            connections.append(self.talker(*args, **kwargs))
            return connections[-1]

        retry = options.pop("retry", False)
        made = self.configure(credentials, is_client=False, versions=versions, **options)
        server = await self.asyncio.serve("127.0.0.1", 0, configuration=made, create_protocol=create, retry=retry)
        try:
            yield server._transport.get_extra_info("sockname")[1], connections
        finally:
            server.close()


AIOQUIC = Library("aioquic", aioquic.asyncio, aioquic.quic.configuration.QuicConfiguration, AioquicTalker)
QH3 = Library("qh3", qh3.asyncio, qh3.quic.configuration.QuicConfiguration, Qh3Talker)


def restated(parameters: bytes, said: dict[str, Any]) -> bytes:
    """Transport parameters (RFC 9000, 18) with some of them changed; aioquic's names for them."""
    made = pull_quic_transport_parameters(Buffer(data=parameters))
    for name, value in said.items():
        setattr(made, name, value)
    buffer = Buffer(capacity=4096)
    push_quic_transport_parameters(buffer, made)
    return buffer.data


def saying(**said: Any) -> Library:
    """Stock aioquic that states these transport parameters in the place of the true ones."""

    class Liar(AioquicTalker):
        def __init__(self, quic: Any, *args: Any, **kwargs: Any) -> None:
            serialize = quic._serialize_transport_parameters
            quic._serialize_transport_parameters = lambda: restated(serialize(), said)
            super().__init__(quic, *args, **kwargs)

    return dataclasses.replace(AIOQUIC, talker=Liar)


class Sniffer(Nat):
    """A relay that notes what passes: the versions in long headers, and the sizes, each way."""

    def __init__(self, server: tuple[str, int]) -> None:
        super().__init__(server)
        self.versions: dict[str, list[int]] = {"up": [], "down": []}
        self.largest_bytes = {"up": 0, "down": 0}
        up, down = self.to_server, self.to_client
        self.to_server = lambda data: self._note("up", data, up)
        self.to_client = lambda data: self._note("down", data, down)

    def _note(self, way: str, data: bytes, onwards: Any) -> None:
        if data[0] & 0x80:
            self.versions[way].append(int.from_bytes(data[1:5], "big"))
        self.largest_bytes[way] = max(self.largest_bytes[way], len(data))
        onwards(data)

    @property
    def agreed_version(self) -> int:
        """The version of the last long header that each side sent."""
        assert self.versions["up"][-1] == self.versions["down"][-1]
        return self.versions["up"][-1]

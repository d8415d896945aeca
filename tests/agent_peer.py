"""A coordinator's end of the wire, played by hand: what an agent's tests talk to over a real socket."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeVar

from quorate_coordinator.certificates import DevelopmentCredentials, ensure_development_credentials
from quorate_protocol.bodies import decode_body, encode_body
from quorate_protocol.errors import ConnectionClosed
from quorate_protocol.frames import FrameDecoder
from quorate_protocol.messages import (
    Assignment,
    Cancellation,
    CoordinationOpened,
    Drain,
    Feedback,
    Goodbye,
    Hello,
    Message,
    Reply,
    Welcome,
    parse_message,
)
from quorate_protocol.transport import BiStream, ClientTls, Connection, Server, listen

T = TypeVar("T", bound=Message)

#: Over anything that happens in time; a test that waits so long has failed.
PATIENCE_S = 20.0


class MessageReader:
    """Reads a stream message by message."""

    def __init__(self, stream: BiStream) -> None:
        self._stream = stream
        self._decoder = FrameDecoder()
        self._ready: deque[Message] = deque()

    async def next(self, kind: type[T]) -> T:
        """The next message, which must be of this kind. Raises EOFError at the end of the stream."""
        async with asyncio.timeout(PATIENCE_S):
            while not self._ready:
                data = await self._stream.receive()
                if not data:
                    self._decoder.finish()
                    raise EOFError
                self._ready.extend(parse_message(raw) for raw in self._decoder.feed(data))
        message = self._ready.popleft()
        assert isinstance(message, kind), message
        return message

    async def end(self) -> None:
        """Waits for the end of the stream; nothing may come before it."""
        with contextlib.suppress(EOFError):
            raise AssertionError(await self.next(Message))


class PeerSession:
    """One agent that has connected."""

    def __init__(self, connection: Connection, control: BiStream) -> None:
        self.connection = connection
        self.control = control
        self.from_control = MessageReader(control)
        self.hello: Hello
        self.coordination: BiStream
        self.replies: MessageReader

    async def read_hello(self) -> Hello:
        self.hello = await self.from_control.next(Hello)
        return self.hello

    async def welcome(
        self, session: str = "s-1", *, pulse_s: float = 0.05, lease_s: float = 30.0, **resumption: Any
    ) -> None:
        """Lets the agent in and takes its coordination stream. Without a `secret` its session dies with this link."""
        welcome = Welcome(session=session, pulse_s=pulse_s, lease_s=lease_s, software="peer", **resumption)
        self.send(self.control, welcome)
        async with asyncio.timeout(PATIENCE_S):
            self.coordination = await self.connection.accept_bi_stream()
        self.replies = MessageReader(self.coordination)
        assert (await self.replies.next(CoordinationOpened)).session == session

    def send(self, stream: BiStream, message: Message) -> None:
        stream.send_nowait(message.to_frame())

    def ask(self, round_id: int, body: Any, *, task: str = "classify", deadline_s: float = 60.0) -> None:
        self.send(
            self.coordination, Assignment(round=round_id, task=task, body=encode_body(body), deadline_s=deadline_s)
        )

    def tell(self, round_id: int, truth: Any, *, task: str = "classify") -> None:
        self.send(self.coordination, Feedback(round=round_id, task=task, truth=encode_body(truth)))

    def cancel(self, round_id: int) -> None:
        self.send(self.coordination, Cancellation(round=round_id, reason="over"))

    def drain(self, reason: str = "") -> None:
        self.send(self.control, Drain(reason=reason))

    async def reply(self) -> Reply:
        return await self.replies.next(Reply)

    async def answer(self) -> Any:
        reply = await self.reply()
        assert reply.status == "replied", reply
        assert reply.body is not None
        return decode_body(reply.body)

    async def expect_goodbye(self) -> Goodbye:
        """The agent's `goodbye`, which comes after the end of its coordination stream."""
        await self.replies.end()
        goodbye = await self.from_control.next(Goodbye)
        await self.from_control.end()
        return goodbye

    async def wait_closed(self) -> ConnectionClosed:
        async with asyncio.timeout(PATIENCE_S):
            await self.connection.wait_closed()
        error = self.connection.close_error
        assert isinstance(error, ConnectionClosed)
        return error


class Peer:
    """Listens as a coordinator does; the test decides what is answered."""

    def __init__(self, server: Server, credentials: DevelopmentCredentials) -> None:
        self.server = server
        self.credentials = credentials
        self.port = server.address[1]

    @property
    def url(self) -> str:
        return f"quic://localhost:{self.port}"

    @property
    def tls(self) -> ClientTls:
        return ClientTls(ca_file=self.credentials.ca_file)

    async def connected(self) -> PeerSession:
        """The next agent that connects, its hello read and unanswered."""
        async with asyncio.timeout(PATIENCE_S):
            connection = await self.server.accept()
            session = PeerSession(connection, await connection.accept_bi_stream())
            await session.read_hello()
        return session

    async def joined(self, **welcome: Any) -> PeerSession:
        """The next agent that connects, welcomed."""
        session = await self.connected()
        await session.welcome(**welcome)
        return session


@contextlib.asynccontextmanager
async def listening_peer(state_dir: Path, *, port: int = 0) -> AsyncIterator[Peer]:
    """A peer with development credentials of its own in `state_dir`, on a free port where none is said."""
    credentials = ensure_development_credentials(state_dir)
    server = await listen(f"127.0.0.1:{port}", tls=credentials.tls)
    try:
        yield Peer(server, credentials)
    finally:
        await server.close()


class UdpRelay(asyncio.DatagramProtocol):
    """Stands between clients and a server on loopback; while `is_cut`, it swallows everything, both ways."""

    def __init__(self, server_port: int) -> None:
        self.is_cut = False
        self._is_closed = False
        self.port = 0
        self._server_address = ("127.0.0.1", server_port)
        self._transport: asyncio.DatagramTransport
        #: By client: the socket that stands for it towards the server.
        self._outside: dict[Any, asyncio.DatagramTransport] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self.port = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, client: Any) -> None:
        if self.is_cut:
            return
        if client in self._outside:
            self._outside[client].sendto(data, self._server_address)
            return
        task = asyncio.create_task(self._open(data, client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open(self, data: bytes, client: Any) -> None:
        relay = self

        class Back(asyncio.DatagramProtocol):
            def datagram_received(self, data: bytes, address: Any) -> None:
                if not relay.is_cut:
                    relay._transport.sendto(data, client)

        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Back, local_addr=("127.0.0.1", 0))
        if self._is_closed or client in self._outside:
            # One datagram of the same client more has opened another meanwhile.
            transport.close()
        else:
            self._outside[client] = transport
        if not self._is_closed:
            self._outside[client].sendto(data, self._server_address)

    def close(self) -> None:
        self._is_closed = True
        for transport in (self._transport, *self._outside.values()):
            transport.close()


@contextlib.asynccontextmanager
async def udp_relay(server_port: int) -> AsyncIterator[UdpRelay]:
    """A relay to a server on this machine, on a free port."""
    relay = UdpRelay(server_port)
    await asyncio.get_running_loop().create_datagram_endpoint(lambda: relay, local_addr=("127.0.0.1", 0))
    try:
        yield relay
    finally:
        relay.close()

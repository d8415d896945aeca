"""`connect` and `listen` for raw QUIC links, over UDP and inside one process."""

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final

from quorate_protocol.errors import Code, ConfigurationError, ConnectFailed, ConnectionClosed, ServerClosed
from quorate_protocol.limits import UDP_PAYLOAD_BYTES_MAX
from quorate_protocol.transport.address import (
    MEMORY_PREFIX,
    LinkUrl,
    format_address,
    join_host_port,
    parse_listen_address,
    parse_memory_name,
    parse_url,
)
from quorate_protocol.transport.api import ClientTls, Connection, Server, ServerTls
from quorate_protocol.transport.connection import QuicConnection
from quorate_protocol.transport.endpoint import Endpoint
from quorate_protocol.transport.engine import AioquicFactory
from quorate_protocol.transport.memory import MemoryNetwork, process_network
from quorate_protocol.transport.packets import PacketPort
from quorate_protocol.transport.udp import UdpPort, bind_udp

#: Application protocol of agents and operators (RFC 7301).
ALPN: Final = "quorate/1"

#: Transport codes 0x100 to 0x1ff are TLS alerts (RFC 9001, 4.8).
_ALERT_FIRST: Final = 0x100
_ALERT_NO_APPLICATION_PROTOCOL: Final = _ALERT_FIRST + 120
_ALERT_CERTIFICATE_EXPIRED: Final = _ALERT_FIRST + 45
_ALERTS_CERTIFICATE: Final = frozenset(_ALERT_FIRST + alert for alert in (42, 43, 44, 45, 46, 48))


async def connect(
    url: str,
    *,
    tls: ClientTls | None = None,
    timeout_s: float = 10.0,
    protocols: tuple[str, ...] = (ALPN,),
    udp_payload_bytes_max: int = UDP_PAYLOAD_BYTES_MAX,
    network: MemoryNetwork | None = None,
) -> Connection:
    """Opens a link to a coordinator; returns when the handshake is complete.

    Args:
        url: `quic://HOST[:PORT]`, or `memory:NAME` inside this process. Where a host has several addresses, each is
            tried in turn.
        tls: whom to trust; None trusts the system's authorities.
        timeout_s: seconds for all of it; with several addresses, an equal share of what is left for each.
        protocols: application protocols to offer, best first.
        udp_payload_bytes_max: where path MTU discovery (RFC 8899) stops, from 1200 (none) to 16,383.
        network: what carries a link in memory; None is the process's own, which is perfect.

    Raises:
        ConfigurationError: `url` is not an address, or the authorities' file cannot be read.
        ConnectFailed: nobody there, not trusted, or another protocol.
    """
    parsed = parse_url(url)
    _check_protocols(protocols)
    factory = AioquicFactory(udp_payload_bytes_max)
    loop = asyncio.get_running_loop()
    ends_at = loop.time() + timeout_s
    if parsed.scheme == "memory":
        wire = network or process_network()
        try:
            async with asyncio.timeout_at(ends_at):
                return await _connect_to(
                    parsed, wire.bind, (parsed.host, 0), factory, tls or ClientTls(), list(protocols)
                )
        except TimeoutError:
            raise ConnectFailed(url, f"no answer within {timeout_s:g} s") from None
    _refuse_network(network)
    silence = (
        f"no answer within {timeout_s:g} s; is the coordinator running, and does the network let UDP "
        f"port {parsed.port} through?"
    )
    try:
        async with asyncio.timeout_at(ends_at):
            found = await loop.getaddrinfo(parsed.host, parsed.port, type=socket.SOCK_DGRAM)
    except TimeoutError:
        raise ConnectFailed(url, f"the host name {parsed.host!r} was not resolved within {timeout_s:g} s") from None
    except (OSError, UnicodeError) as error:
        raise ConnectFailed(url, f"the host name {parsed.host!r} cannot be resolved ({error})") from error
    problems: dict[str, str] = {}
    for tried, (family, _, _, _, address) in enumerate(found):
        # An address that is silent must leave time for the others.
        share_s = (ends_at - loop.time()) / (len(found) - tried)
        try:
            async with asyncio.timeout(share_s):
                return await _connect_to(
                    parsed, partial(_udp_port, family), address, factory, tls or ClientTls(), list(protocols)
                )
        except ConnectFailed as error:
            problems.setdefault(error.problem, format_address(address))
        except TimeoutError:
            problems.setdefault(silence, format_address(address))
    if len(problems) == 1:
        raise ConnectFailed(url, *problems)
    raise ConnectFailed(url, "; ".join(f"{address}: {problem}" for problem, address in problems.items()))


async def _connect_to(
    url: LinkUrl,
    make_port: Callable[[], PacketPort],
    address: tuple[object, ...],
    factory: AioquicFactory,
    tls: ClientTls,
    protocols: list[str],
) -> Connection:
    # Names in memory are no hosts; this is the one that development certificates carry, and this process's own.
    engine = factory.client(tls, "localhost" if url.scheme == "memory" else url.host, protocols)
    try:
        endpoint = Endpoint(make_port(), factory)
    except OSError as error:
        raise ConnectFailed(str(url), str(error)) from error
    try:
        connection = endpoint.connect(engine, address)
        await connection.wait_established()
    except ConnectionClosed as error:
        await endpoint.close(Code.NO_ERROR, "")
        raise ConnectFailed(str(url), _explain(error, tls, protocols)) from None
    except OSError as error:
        await endpoint.close(Code.NO_ERROR, "")
        raise ConnectFailed(str(url), error.strerror or str(error)) from error
    except BaseException:
        await endpoint.close(Code.NO_ERROR, "")
        raise
    return connection


def _check_protocols(protocols: object) -> None:
    if isinstance(protocols, str) or not protocols:
        raise ConfigurationError("protocols", f'must be some names, such as ("{ALPN}",), is {protocols!r}')


def _udp_port(family: int) -> PacketPort:
    return UdpPort(bind_udp(family, None))


def _refuse_network(network: MemoryNetwork | None) -> None:
    if network is not None:
        raise ConfigurationError("network", "is for memory:NAME; real networks have faults of their own")


def _explain(error: ConnectionClosed, tls: ClientTls, protocols: list[str]) -> str:
    if not error.transport:
        return error.reason or str(error)
    if error.code == _ALERT_NO_APPLICATION_PROTOCOL:
        hint = "; is it a Quorate coordinator of this version?" if protocols == [ALPN] else ""
        return f"the server speaks none of {', '.join(protocols)}{hint}"
    if error.code in _ALERTS_CERTIFICATE and not error.by_peer:
        if "doesn't match" in error.reason:
            return f"the server's certificate is for another host: {error.reason}"
        if error.code == _ALERT_CERTIFICATE_EXPIRED:
            return f"the server's certificate is out of date: {error.reason}"
        trusted = f"the authorities in {tls.ca_file}" if tls.ca_file else "the system's authorities"
        return f"the server's certificate is not trusted by {trusted}: {error.reason}"
    return str(error)


class QuicServer(Server):
    """A listening endpoint."""

    def __init__(self, port: PacketPort, factory: AioquicFactory, protocols: list[str], backlog: int) -> None:
        self._factory = factory
        self._protocols = protocols
        self._backlog = backlog
        self._ready: deque[QuicConnection] = deque()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._closed = False
        self._endpoint = Endpoint(port, factory, on_connection=self._on_connection)
        self.stats = self._endpoint.stats

    @property
    def address(self) -> tuple[str, int]:
        host, port, *_ = self._endpoint.address
        return host, port

    async def accept(self) -> Connection:
        while True:
            while self._ready:
                connection = self._ready.popleft()
                if not connection.is_closed:
                    return connection
            if self._closed:
                raise ServerClosed("the server was closed")
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter.done() and not waiter.cancelled():
                    self._wake_one()
                raise
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

    def reload_tls(self, tls: ServerTls) -> None:
        self._factory.set_server(tls, self._protocols)

    async def close(self, code: int = Code.SHUTDOWN, reason: str = "") -> None:
        self._closed = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        await self._endpoint.close(code, reason)

    def _on_connection(self, connection: QuicConnection) -> None:
        if len(self._ready) >= self._backlog:
            self._ready = deque(waiting for waiting in self._ready if not waiting.is_closed)
        if len(self._ready) >= self._backlog:
            connection.abort(Code.BUSY, "too many connections wait to be accepted")
            return
        self._ready.append(connection)
        self._wake_one()

    def _wake_one(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return


async def listen(
    address: str,
    *,
    tls: ServerTls,
    protocols: tuple[str, ...] = (ALPN,),
    backlog: int = 1024,
    udp_payload_bytes_max: int = UDP_PAYLOAD_BYTES_MAX,
    network: MemoryNetwork | None = None,
    reset_key: bytes | None = None,
) -> QuicServer:
    """Listens for links.

    Args:
        address: `HOST:PORT` or `[IPV6]:PORT`, where port 0 lets the kernel choose; or `memory:NAME`.
        tls: certificate and key to show.
        protocols: application protocols to accept, best first.
        backlog: connections that may wait to be accepted; more are turned away as busy.
        udp_payload_bytes_max: where path MTU discovery (RFC 8899) stops, from 1200 (none) to 16,383.
        network: what carries links in memory; None is the process's own, which is perfect.
        reset_key: a secret of 16 to 64 bytes. A server that is started again with it tells the clients of its earlier
            life at once that their connections are no more (RFC 9000, 10.3); None makes a new one.

    Raises:
        ConfigurationError: not an address, the address is taken or not ours, certificate or key
            cannot be read.
    """
    _check_protocols(protocols)
    factory = AioquicFactory(udp_payload_bytes_max, reset_key=reset_key)
    if address.startswith(MEMORY_PREFIX):
        name = parse_memory_name(address, "listen")
        factory.set_server(tls, list(protocols))
        return QuicServer((network or process_network()).bind(name), factory, list(protocols), backlog)
    _refuse_network(network)
    host, port = parse_listen_address(address)
    factory.set_server(tls, list(protocols))
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)
        family, _, _, _, socket_address = found[0]
        sock = bind_udp(family, socket_address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError("listen", f"cannot listen on {join_host_port(host, port)}: {reason}") from error
    return QuicServer(UdpPort(sock), factory, list(protocols), backlog)

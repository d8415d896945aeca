"""The endpoint: one UDP socket and all the connections that live on it.

Theory of operation. The socket becomes readable: up to a batch of datagrams is read, each is routed
by its destination connection id (RFC 9000, 5.2) and fed to its engine. Then every connection that
got something reports, which wakes the tasks that waited for it. What these tasks write, and whatever
else asked for a turn, leaves in one send pass at the end of the loop's turn: the pass is scheduled
behind the wake-ups, so that an acknowledgement rides with the answer instead of alone.

A timer of the loop is kept per connection and only moved forward when it must fire earlier; one that
fires too early looks again. Most packets push the engine's timer back, and re-arming the loop's each
time would cost more than the packet.
"""

import asyncio
import errno
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import structlog

from quorate_protocol.errors import Code, ConnectionClosed
from quorate_protocol.limits import CONNECTIONS_MAX, HANDSHAKES_MAX
from quorate_protocol.transport.api import ServerStats
from quorate_protocol.transport.connection import QuicConnection
from quorate_protocol.transport.engine import Address, Engine, EngineFactory

log = structlog.get_logger()

#: Datagrams read in one turn: enough to empty the socket after a fan-in of hundreds of agents, small
#: enough that timers and other sockets get their turn (about 10 ms of engine work).
_BATCH_DATAGRAMS: Final = 256

#: Larger than any UDP payload.
_UDP_BYTES_MAX: Final = 65_536

#: What we ask the kernel to hold for us in each direction while the loop is busy.
SOCKET_BUFFER_BYTES: Final = 4 << 20

#: Datagrams that wait for a full socket buffer to drain; beyond it they are dropped, and QUIC's loss
#: recovery sends their content again.
_UNSENT_DATAGRAMS_MAX: Final = 4096

#: Passes of the loop's ready queue before a send pass. A reply usually goes through two or three
#: tasks before it is written; without this its acknowledgement would leave alone. A pass costs
#: microseconds, and the loop reads what has come meanwhile.
_TURN_HOPS: Final = 3

#: Share of the time that new connections' handshakes may take, so that a flood of them leaves the rest to those
#: who are in; and how much of it may be saved up, in seconds: some hundred agents that join at once. Beyond it
#: an Initial is dropped unread, and its sender tries again.
_HANDSHAKE_SHARE: Final = 0.25
_HANDSHAKE_BURST_S: Final = 0.5

#: How long bytes that are in no hurry wait for others to share a packet with, in seconds.
UNHURRIED_DELAY_S: Final = 0.005

#: A server's handshake that is not complete by then is given up.
HANDSHAKE_TIMEOUT_S: Final = 10.0


class Endpoint:
    """Drives engines over one socket; serves both sides. Implements `Driver`."""

    def __init__(
        self,
        sock: socket.socket,
        factory: EngineFactory,
        *,
        on_connection: Callable[[QuicConnection], None] | None = None,
    ) -> None:
        self._sock = sock
        self._factory = factory
        self._on_connection = on_connection
        self._loop = asyncio.get_running_loop()
        self._connected_socket = False
        self._routes: dict[bytes, QuicConnection] = {}
        self._connections: set[QuicConnection] = set()
        #: Server side: handshakes that are not complete, and when they are given up.
        self._handshakes: dict[QuicConnection, asyncio.TimerHandle] = {}
        self._turn: list[QuicConnection] = []
        self._turn_scheduled = False
        #: Seconds that handshakes may cost now; see `_HANDSHAKE_SHARE`.
        self._handshake_credit_s = _HANDSHAKE_BURST_S
        self._credited_at = self._loop.time()
        #: Connections with something to send that can wait for company.
        self._unhurried: dict[QuicConnection, None] = {}
        self._unhurried_timer: asyncio.TimerHandle | None = None
        self._timers: dict[QuicConnection, asyncio.TimerHandle] = {}
        self._unsent: deque[tuple[bytes, Address | None]] = deque()
        self._accepting = on_connection is not None
        self._closing = False
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self.stats = ServerStats()
        self._cid_bytes = factory.connection_id_bytes
        self._loop.add_reader(sock.fileno(), self._on_readable)

    @property
    def address(self) -> Address:
        """What the socket is bound to."""
        return self._sock.getsockname()

    def connect(self, engine: Engine, address: Address) -> QuicConnection:
        """Client side: begins a handshake. The socket is tied to that one peer."""
        self._sock.connect(address)
        self._connected_socket = True
        # Packets must come from the address that the handshake began with: 0.0.0.0 answers as 127.0.0.1.
        address = self._sock.getpeername()
        connection = QuicConnection(engine, self, address, is_client=True)
        self._add(connection)
        engine.connect(address, self._loop.time())
        self.wants_turn(connection)
        return connection

    def stop_accepting(self) -> None:
        """Datagrams that would open a connection are ignored from now on."""
        self._accepting = False

    async def close(self, code: int, reason: str) -> None:
        """Closes all connections, sends what says so, and lets go of the socket."""
        if self._closing:
            await asyncio.shield(self._gone)
            return
        self._closing = True
        self._accepting = False
        for connection in list(self._connections):
            connection.abort(code, reason)
        self._serve_turn()
        self._release()

    # --- Driver ---

    def wants_turn(self, connection: QuicConnection) -> None:
        if connection.in_turn:
            return
        connection.in_turn = True
        self._turn.append(connection)
        if not self._turn_scheduled:
            self._turn_scheduled = True
            self._loop.call_soon(self._await_turn, _TURN_HOPS)

    def wants_turn_soon(self, connection: QuicConnection) -> None:
        self._unhurried[connection] = None
        if self._unhurried_timer is None:
            self._unhurried_timer = self._loop.call_later(UNHURRIED_DELAY_S, self._serve_unhurried)

    def _serve_unhurried(self) -> None:
        self._unhurried_timer = None
        waiting, self._unhurried = self._unhurried, {}
        for connection in waiting:
            self.wants_turn(connection)

    def serve_now(self, connection: QuicConnection) -> None:
        if connection in self._connections:
            self._serve(connection, self._loop.time())

    def connection_id_issued(self, connection: QuicConnection, connection_id: bytes) -> None:
        self._routes[connection_id] = connection

    def connection_id_retired(self, connection: QuicConnection, connection_id: bytes) -> None:
        if self._routes.get(connection_id) is connection:
            del self._routes[connection_id]

    def handshake_completed(self, connection: QuicConnection) -> None:
        if self._end_handshake(connection) and self._on_connection is not None:
            self._on_connection(connection)

    def connection_closed(self, connection: QuicConnection) -> None:
        self._end_handshake(connection)
        self.wants_turn(connection)

    # --- reading ---

    def _on_readable(self) -> None:
        now = self._loop.time()
        self._handshake_credit_s = min(
            _HANDSHAKE_BURST_S, self._handshake_credit_s + (now - self._credited_at) * _HANDSHAKE_SHARE
        )
        self._credited_at = now
        touched: dict[QuicConnection, None] = {}
        for _ in range(_BATCH_DATAGRAMS):
            try:
                datagram, address = self._sock.recvfrom(_UDP_BYTES_MAX)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                # An ICMP answer to something that we sent earlier. Anyone can forge one, so that it
                # ends no connection that exists (RFC 9000, 14.2.1), only the wait for one.
                if error.errno == errno.ECONNREFUSED and self._refuse():
                    return
                continue
            self.stats.udp_datagrams_received += 1
            self.stats.bytes_received += len(datagram)
            connection = self._route(datagram, address, now)
            if connection is not None:
                began = 0.0 if connection.is_established else time.perf_counter()
                try:
                    connection.receive_udp(datagram, address, now)
                except Exception:
                    log.exception("engine_failed", peer=connection.peer)
                    self._give_up(connection)
                    if self._gone.done():
                        return
                if began and not connection.is_client:
                    self._handshake_credit_s -= time.perf_counter() - began
                touched[connection] = None
        for connection in touched:
            if connection not in self._connections:
                continue
            if not connection.is_client and not connection.engine.is_established:
                # Nothing in the datagram that opened it was authentic.
                self.stats.udp_datagrams_unknown += 1
                connection.closed(ConnectionClosed(Code.NO_ERROR, "not a QUIC handshake"))
                self._drop(connection)
                continue
            self._after_input(connection)

    def _after_input(self, connection: QuicConnection) -> None:
        try:
            connection.after_input()
        except Exception:
            log.exception("engine_failed", peer=connection.peer)
            self._give_up(connection)
        else:
            self.wants_turn(connection)

    def _refuse(self) -> bool:
        """Gives up a client's handshake: nobody listens there. False when there is none."""
        for connection in self._connections:
            if connection.is_client and not connection.is_established:
                connection.closed(ConnectionClosed(Code.NO_ERROR, "connection refused: nothing listens there"))
                self._drop(connection)
                return True
        return False

    def _route(self, datagram: bytes, address: Address, now: float) -> QuicConnection | None:
        if len(datagram) < 1 + self._cid_bytes:
            self.stats.udp_datagrams_unknown += 1
            return None
        if datagram[0] & 0x80:
            # A long header carries the length of its destination id (RFC 9000, 17.2).
            end = 6 + datagram[5]
            connection = self._routes.get(datagram[6:end]) if len(datagram) >= 6 else None
        else:
            connection = self._routes.get(datagram[1 : 1 + self._cid_bytes])
        if connection is None:
            connection = self._accept(datagram, address)
            if connection is None:
                self.stats.udp_datagrams_unknown += 1
        return connection

    def _accept(self, datagram: bytes, address: Address) -> QuicConnection | None:
        if not self._accepting or not datagram[0] & 0x80:
            return None
        arrival = self._factory.inspect(datagram)
        if arrival is None:
            return None
        if arrival.answer is not None:
            self._send(arrival.answer, address)
        if not arrival.opens:
            return None
        if (
            self._handshake_credit_s <= 0
            or len(self._handshakes) >= HANDSHAKES_MAX
            or len(self._connections) >= CONNECTIONS_MAX
        ):
            self.stats.handshakes_refused += 1
            return None
        connection = QuicConnection(self._factory.server(arrival), self, address, is_client=False)
        self._add(connection)
        # The client goes on using the id that it made up until it has our answer.
        connection.connection_ids.add(arrival.destination_id)
        self._routes[arrival.destination_id] = connection
        self._handshakes[connection] = self._loop.call_later(
            HANDSHAKE_TIMEOUT_S, connection.abort, Code.NO_ERROR, "handshake took too long"
        )
        self.stats.handshakes = len(self._handshakes)
        return connection

    # --- sending ---

    def _await_turn(self, hops: int) -> None:
        """Lets the tasks that were woken, and those that they wake in turn, have their say first."""
        if hops:
            self._loop.call_soon(self._await_turn, hops - 1)
        else:
            self._serve_turn()

    def _serve_turn(self) -> None:
        self._turn_scheduled = False
        turn, self._turn = self._turn, []
        now = self._loop.time()
        for connection in turn:
            connection.in_turn = False
            # One that was dropped meanwhile must not come back by its timer.
            if connection in self._connections:
                self._serve(connection, now)

    def _serve(self, connection: QuicConnection, now: float) -> None:
        engine = connection.engine
        stats = connection.stats
        try:
            for datagram, address in engine.datagrams_to_send(now, 64):
                stats.udp_datagrams_sent += 1
                stats.bytes_sent += len(datagram)
                self._send(datagram, address)
            # A send pass may end a connection (path validation) or issue connection ids.
            connection.after_output()
        except Exception:
            log.exception("engine_failed", peer=connection.peer)
            self._give_up(connection)
            return
        if engine.is_gone or (connection.is_client and connection.is_closed):
            # What a server lingers for (RFC 9000, 10.2) a client need not: the socket is its own.
            self._drop(connection)
        else:
            self._arm(connection, engine.timer(), now)

    def _send(self, datagram: bytes, address: Address) -> None:
        if self._unsent:
            self._keep_unsent(datagram, address)
            return
        try:
            if self._connected_socket:
                self._sock.send(datagram)
            else:
                self._sock.sendto(datagram, address)
            self.stats.udp_datagrams_sent += 1
            self.stats.bytes_sent += len(datagram)
        except (BlockingIOError, InterruptedError):
            self._keep_unsent(datagram, address)
            self._loop.add_writer(self._sock.fileno(), self._on_writable)
        except OSError as error:
            # No route, an ICMP error, an address that went away: for QUIC a lost packet.
            self.stats.udp_datagrams_dropped += 1
            if error.errno == errno.ECONNREFUSED:
                # The kernel tells it once, to whoever asks first: reading will not hear of it any more.
                self._loop.call_soon(self._refuse)

    def _keep_unsent(self, datagram: bytes, address: Address) -> None:
        if len(self._unsent) >= _UNSENT_DATAGRAMS_MAX:
            self._unsent.popleft()
            self.stats.udp_datagrams_dropped += 1
        self._unsent.append((datagram, address))

    def _on_writable(self) -> None:
        waiting, self._unsent = self._unsent, deque()
        self._loop.remove_writer(self._sock.fileno())
        for datagram, address in waiting:
            self._send(datagram, address)

    # --- timers ---

    def _arm(self, connection: QuicConnection, at: float | None, now: float) -> None:
        armed = self._timers.get(connection)
        if armed is not None:
            if at is not None and armed.when() <= at:
                return
            armed.cancel()
        if at is None:
            self._timers.pop(connection, None)
        else:
            self._timers[connection] = self._loop.call_at(max(at, now), self._on_timer, connection)

    def _on_timer(self, connection: QuicConnection) -> None:
        self._timers.pop(connection, None)
        engine = connection.engine
        now = self._loop.time()
        at = engine.timer()
        if at is None:
            return
        if at > now:
            self._arm(connection, at, now)
            return
        try:
            engine.handle_timer(now)
        except Exception:
            log.exception("engine_failed", peer=connection.peer)
            self._give_up(connection)
        else:
            self._after_input(connection)

    # --- bookkeeping ---

    def _give_up(self, connection: QuicConnection) -> None:
        """Its engine has raised, which is a bug of the engine's: the other connections of this socket go on."""
        connection.closed(ConnectionClosed(Code.INTERNAL, "the transport failed"))
        self._drop(connection)

    def _end_handshake(self, connection: QuicConnection) -> bool:
        """Stops the clock of a server's handshake; False when none was running."""
        timeout = self._handshakes.pop(connection, None)
        if timeout is None:
            return False
        timeout.cancel()
        self.stats.handshakes = len(self._handshakes)
        return True

    def _add(self, connection: QuicConnection) -> None:
        self._connections.add(connection)
        self.stats.connections = len(self._connections)
        connection.connection_ids.add(connection.engine.initial_connection_id)
        self._routes[connection.engine.initial_connection_id] = connection

    def _drop(self, connection: QuicConnection) -> None:
        self._connections.discard(connection)
        self.stats.connections = len(self._connections)
        timer = self._timers.pop(connection, None)
        if timer is not None:
            timer.cancel()
        self._end_handshake(connection)
        for connection_id in connection.connection_ids:
            if self._routes.get(connection_id) is connection:
                del self._routes[connection_id]
        connection.connection_ids.clear()
        if self._connected_socket and not self._closing:
            # A client's socket has one connection and ends with it.
            self._closing = True
            self._release()

    def _release(self) -> None:
        for connection in list(self._connections):
            self._drop(connection)
        self._loop.remove_reader(self._sock.fileno())
        if self._unhurried_timer is not None:
            self._unhurried_timer.cancel()
        self._unhurried.clear()
        if self._unsent:
            self._loop.remove_writer(self._sock.fileno())
            self._unsent.clear()
        self._sock.close()
        if not self._gone.done():
            self._gone.set_result(None)


def bind_udp(family: int, address: Address | None) -> socket.socket:
    """A non-blocking UDP socket with large buffers; bound, unless `address` is None.

    Raises:
        OSError: the address is taken or not ours.
    """
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        if family == socket.AF_INET6:
            # `::` serves IPv4 too.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if address is not None:
            sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock

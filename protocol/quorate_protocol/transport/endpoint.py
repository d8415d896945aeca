"""The endpoint: one packet port and all the connections that live on it.

Theory of operation. The port hands over a batch of datagrams: each is routed by its destination
connection id (RFC 9000, 5.2) and fed to its engine. Then every connection that got something
reports, which wakes the tasks that waited for it. What these tasks write, and whatever else asked
for a turn, leaves in one send pass at the end of the loop's turn: the pass is scheduled behind the
wake-ups, so that an acknowledgement rides with the answer instead of alone.

Fairness. A pass of one connection is bounded, and so are all passes of one turn together; who has
more to send gets another turn after the others had theirs, and after what has come meanwhile was
read. Who has something urgent to say, on a stream over NORMAL, goes before who has not: behind a body
on its way to a hundred agents, a question to another would wait for 25 MiB. One of the others has its
pass in every turn all the same. While the port takes nothing, there are no passes at all: nothing
piles up below the streams.

A timer of the loop is kept per connection and only moved forward when it must fire earlier; one that
fires too early looks again. Most packets push the engine's timer back, and re-arming the loop's each
time would cost more than the packet.

Strangers. Whatever a datagram for no known connection makes us do (reading its header, answering it,
a handshake until it is complete) is paid from one credit, which grows by a quarter of the time that
passes. While there is none, such datagrams are dropped after one look into a dictionary; while the
handshakes under way are deep in debt, theirs are too. So strangers have 25 % of the loop's time, plus
the cost of reading and dropping their datagrams: 1.1 µs each where a forged Initial costs 270, or 11 %
of the loop's time at 100,000 in a second. What the loop cannot read the kernel drops, whomever it
meets: living connections send again.
"""

import asyncio
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from quorate_protocol.errors import Code, ConnectionClosed
from quorate_protocol.limits import CONNECTIONS_MAX, HANDSHAKES_MAX, UDP_PAYLOAD_BYTES_MIN
from quorate_protocol.transport.api import ServerStats
from quorate_protocol.transport.connection import QuicConnection
from quorate_protocol.transport.engine import Address, Engine, EngineFactory
from quorate_protocol.transport.packets import Packet, PacketPort

log = structlog.get_logger()

#: Datagrams that one connection sends in one turn: what one system call takes (`udp._SEGMENTS_MAX`), and about a
#: millisecond of work. It bounds what a full socket leaves on our hands, too.
PASS_DATAGRAMS_MAX: Final = 64

#: The same in bytes: 16 of the largest packets, half a millisecond of work. What is to be sent before the bulk waits
#: for no longer, and packets are still in the processor's cache when the kernel copies them: with four times as much,
#: bulk over loopback was a fifth slower, and a critical message behind it waited 6 ms instead of 1.5.
PASS_BYTES_MAX: Final = 256 << 10

#: Bytes of a pass that is before others' because something urgent was written: that is sent first (`lanes`), and the
#: bulk that the connection has as well waits behind the others, or a word to each of a hundred would send their bodies.
_URGENT_BYTES_MAX: Final = 64 << 10

#: Of those who have something urgent to say, how many go before the first of the others: they leave it a part of the
#: turn, however many they are and however much they have.
_URGENT_FIRST: Final = 4

#: Datagrams that all connections together send in one turn, about 4 ms of work: as many as are read in one. Large ones
#: count as one for each so many bytes.
_TURN_DATAGRAMS_MAX: Final = 256
_WORK_BYTES: Final = 4096

#: Passes of the loop's ready queue between what came and the send pass, at the most. A reply usually goes
#: through two or three tasks before it is written; without this its acknowledgement would leave alone.
#: When nobody else waits for the loop, nobody has anything to add, and the pass is at once; so it is
#: when nothing came that wants an answer.
_TURN_HOPS: Final = 3

#: Share of the time that strangers may take, so that a flood of them leaves the rest to those who are in; and how
#: much of it may be saved up, in seconds: a handshake takes 2 to 3 ms, so that is some seven hundred agents at once, as
#: after a restart. Beyond it an Initial is dropped unread, and its sender tries again.
_HANDSHAKE_SHARE: Final = 0.25
_HANDSHAKE_BURST_S: Final = 2.0

#: Debt up to which handshakes that have begun go on, in seconds: they are better finished than begun anew. Beyond it
#: they wait as well, or one that is never finished could be fed with garbage without bound.
_HANDSHAKE_DEBT_S: Final = 0.25

#: Stateless resets in a second, and at once: a thousand agents hear within a second or two that the coordinator was
#: restarted, and a flood of packets with ids that are nobody's costs a hundredth of the time.
_RESETS_PER_S: Final = 500
_RESETS_BURST: Final = 500

#: While the port takes nothing, timers fire this often at the most, in seconds: nothing that they want could be sent.
_BLOCKED_TIMER_S: Final = 0.05

#: How long closing waits for a full socket, in seconds: whoever is not told by then will be by a timer of its own.
_CLOSE_PATIENCE_S: Final = 0.25

#: How long bytes that are in no hurry wait for others to share a packet with, in seconds.
UNHURRIED_DELAY_S: Final = 0.005

#: A server's handshake that is not complete by then is given up.
HANDSHAKE_TIMEOUT_S: Final = 10.0


class Endpoint:
    """Drives engines over one port; serves both sides. Implements `Driver` and `PacketReceiver`."""

    def __init__(
        self,
        port: PacketPort,
        factory: EngineFactory,
        *,
        on_connection: Callable[[QuicConnection], None] | None = None,
    ) -> None:
        self._port = port
        self._factory = factory
        self._on_connection = on_connection
        self._loop = asyncio.get_running_loop()
        #: A client's endpoint: it has one connection, and ends with it.
        self._is_client = False
        self._routes: dict[bytes, QuicConnection] = {}
        # Dictionaries instead of sets: what is iterated over has an order, so that a seed repeats a run.
        self._connections: dict[QuicConnection, None] = {}
        #: Server side: handshakes that are not complete, and when they are given up.
        self._handshakes: dict[QuicConnection, asyncio.TimerHandle] = {}
        #: Connections that wait for their send pass, in order.
        self._turn: deque[QuicConnection] = deque()
        #: Passes of the loop's ready queue that the turn still waits for.
        self._turn_hops = 0
        self._turn_scheduled = False
        #: Who closes the endpoint waits for this.
        self._writable: asyncio.Future[None] | None = None
        #: The connection whose datagrams are being sent.
        self._serving: QuicConnection | None = None
        #: Seconds that strangers may cost now; see `_HANDSHAKE_SHARE`.
        self._handshake_credit_s = _HANDSHAKE_BURST_S
        self._credited_at = self._loop.time()
        #: Stateless resets that may be sent now; see `_RESETS_PER_S`.
        self._resets_left = float(_RESETS_BURST)
        self._resets_at = self._credited_at
        #: Connections with something to send that can wait for company.
        self._unhurried: dict[QuicConnection, None] = {}
        self._unhurried_timer: asyncio.TimerHandle | None = None
        self._timers: dict[QuicConnection, asyncio.TimerHandle] = {}
        self._accepting = on_connection is not None
        self._closing = False
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self.stats = ServerStats()
        self._cid_end = 1 + factory.connection_id_bytes
        port.attach(self, self.stats)

    @property
    def address(self) -> Address:
        """What the port is bound to."""
        return self._port.address

    def connect(self, engine: Engine, address: Address) -> QuicConnection:
        """Client side: begins a handshake. The port is tied to that one peer.

        Raises:
            OSError: the address cannot be reached.
        """
        # Packets must come from the address that the handshake began with.
        address = self._port.connect(address)
        self._is_client = True
        connection = QuicConnection(engine, self, address, is_client=True)
        self._add(connection)
        engine.connect(address, self._loop.time())
        self.wants_turn(connection)
        return connection

    def stop_accepting(self) -> None:
        """Datagrams that would open a connection are ignored from now on."""
        self._accepting = False

    async def close(self, code: int, reason: str) -> None:
        """Closes all connections, sends what says so, and lets go of the port."""
        if self._closing:
            await asyncio.shield(self._gone)
            return
        self._closing = True
        self._accepting = False
        for connection in list(self._connections):
            connection.abort(code, reason)
        now = self._loop.time()
        try:
            for connection in list(self._connections):
                self._serve(connection, now)
                if not self._port.is_writable:
                    await self._drained(now + _CLOSE_PATIENCE_S)
        finally:
            self._release()

    # --- Driver ---

    def wants_turn(self, connection: QuicConnection) -> None:
        if connection.in_turn:
            return
        connection.in_turn = True
        self._turn.append(connection)
        if not self._turn_scheduled:
            self._schedule_turn()

    def wants_turn_at_once(self, connection: QuicConnection) -> None:
        if self._turn_scheduled or not self._port.is_writable or self._others_wait():
            self.wants_turn(connection)
            return
        # Nobody else wants anything, and nothing came that this could be an answer to: waiting would bring no company.
        # What else is written before the loop goes on waits for that, and leaves together.
        self._serve(connection, self._loop.time())
        if connection in self._connections:
            self.wants_turn(connection)

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

    # --- PacketReceiver ---

    def datagrams_received(self, datagrams: Sequence[Packet]) -> None:
        now = self._loop.time()
        self._handshake_credit_s = min(
            _HANDSHAKE_BURST_S, self._handshake_credit_s + (now - self._credited_at) * _HANDSHAKE_SHARE
        )
        self._credited_at = now
        routes, cid_end = self._routes, self._cid_end
        touched: dict[QuicConnection, None] = {}
        for datagram, address in datagrams:
            if len(datagram) < cid_end:
                connection = None
            elif datagram[0] & 0x80:
                # A long header carries the length of its destination id (RFC 9000, 17.2).
                connection = routes.get(datagram[6 : 6 + datagram[5]])
            else:
                connection = routes.get(datagram[1:cid_end])
            if connection is None:
                connection = self._meet(datagram, address)
                if connection is None:
                    self.stats.udp_datagrams_unknown += 1
                    continue
            if connection.is_established or connection.is_client:
                self._feed(connection, datagram, address, now)
            elif self._handshake_credit_s > -_HANDSHAKE_DEBT_S:
                clock = self._port.work_clock
                began = clock()
                self._feed(connection, datagram, address, now)
                self._handshake_credit_s -= clock() - began
            touched[connection] = None
        self._turn_hops = _TURN_HOPS
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

    def refused(self) -> None:
        # It ends no connection that exists (RFC 9000, 14.2.1), only the wait for one: nobody listens there.
        for connection in self._connections:
            if connection.is_client and not connection.is_established:
                connection.closed(ConnectionClosed(Code.NO_ERROR, "connection refused: nothing listens there"))
                self._drop(connection)
                return

    def datagram_too_large(self, datagram_bytes: int, address: Address) -> None:
        now = self._loop.time()
        if self._serving is not None:
            concerned = [self._serving]
        else:
            # The rest of an earlier pass. It is rare, and so is the search.
            concerned = [connection for connection in self._connections if connection.address == address]
        for connection in concerned:
            try:
                connection.engine.datagram_refused(datagram_bytes, now)
            except Exception:  # noqa: BLE001  told by _give_up
                self._give_up(connection)
            else:
                self.wants_turn(connection)

    async def _drained(self, ends_at: float) -> None:
        """Waits until the port takes more, or that time."""
        self._writable = self._loop.create_future()
        try:
            async with asyncio.timeout_at(ends_at):
                await self._writable
        except TimeoutError:
            pass
        finally:
            self._writable = None

    def writable(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        if self._turn and not self._turn_scheduled:
            self._schedule_turn()

    # --- input ---

    def _feed(self, connection: QuicConnection, datagram: bytes, address: Address, now: float) -> None:
        try:
            connection.receive_udp(datagram, address, now)
        except Exception:  # noqa: BLE001  told by _give_up
            self._give_up(connection)

    def _after_input(self, connection: QuicConnection) -> None:
        try:
            connection.after_input()
        except Exception:  # noqa: BLE001  told by _give_up
            self._give_up(connection)
        else:
            self.wants_turn(connection)

    def _meet(self, datagram: bytes, address: Address) -> QuicConnection | None:
        """A datagram for no known connection: the one that it opens or ends, or None."""
        if self._is_client:
            return self._find_reset(datagram)
        if not self._accepting or len(datagram) < self._cid_end:
            return None
        if not datagram[0] & 0x80:
            if datagram[0] & 0x40:  # as every packet has it (RFC 9000, 17.3.1)
                self._reset(datagram, address)
            return None
        if self._handshake_credit_s <= 0:
            # Unread, so that nobody knows what it was; the size is all that can be told for nothing.
            if len(datagram) >= UDP_PAYLOAD_BYTES_MIN:
                self.stats.handshakes_refused += 1
            return None
        clock = self._port.work_clock
        began = clock()
        connection = self._accept(datagram, address)
        self._handshake_credit_s -= clock() - began
        return connection

    def _find_reset(self, datagram: bytes) -> QuicConnection | None:
        """Client side: the connection that the server does not know any more, if that is what it says."""
        now = self._loop.time()
        for connection in self._connections:
            if connection.engine.was_reset(datagram, now):
                return connection
        return None

    def _reset(self, datagram: bytes, address: Address) -> None:
        """Tells who goes on with a connection of an earlier life that there is none."""
        now = self._loop.time()
        self._resets_left = min(_RESETS_BURST, self._resets_left + (now - self._resets_at) * _RESETS_PER_S)
        self._resets_at = now
        if self._resets_left >= 1 and (answer := self._factory.reset(datagram)) is not None:
            self._resets_left -= 1
            self.stats.stateless_resets_sent += 1
            self._port.send([(answer, address)])

    def _accept(self, datagram: bytes, address: Address) -> QuicConnection | None:
        arrival = self._factory.inspect(datagram)
        if arrival is None:
            return None
        if arrival.answer is not None:
            self._port.send([(arrival.answer, address)])
        if not arrival.opens:
            return None
        if len(self._handshakes) >= HANDSHAKES_MAX or len(self._connections) >= CONNECTIONS_MAX:
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

    def _schedule_turn(self) -> None:
        self._turn_scheduled = True
        self._loop.call_soon(self._await_turn)

    def _await_turn(self) -> None:
        """Lets the tasks that were woken, and those that they wake in turn, have their say first."""
        if self._turn_hops and self._others_wait():
            self._turn_hops -= 1
            self._loop.call_soon(self._await_turn)
        else:
            self._turn_hops = 0
            self._serve_turn()

    def _others_wait(self) -> bool:
        """Whether callbacks wait for the loop; True where the loop does not tell."""
        return bool(getattr(self._loop, "_ready", True))

    def _serve_turn(self) -> None:
        turn, port = self._turn, self._port
        now = self._loop.time()
        left = _TURN_DATAGRAMS_MAX
        unfinished: list[QuicConnection] = []
        self._put_urgent_first()
        while turn and left > 0 and port.is_writable:
            connection = turn.popleft()
            connection.in_turn = False
            # One that was dropped meanwhile must not come back by its timer.
            if connection in self._connections:
                left -= self._serve(connection, now)
                if connection.has_more_to_send:
                    unfinished.append(connection)
        self._turn_scheduled = False
        for connection in unfinished:
            if connection in self._connections and not connection.in_turn:
                connection.in_turn = True
                turn.append(connection)
        if turn:
            if port.is_writable:
                self._schedule_turn()
            else:
                for connection in list(turn):
                    self._settle(connection, now)

    def _put_urgent_first(self) -> None:
        turn = self._turn
        urgent = [connection for connection in turn if connection.is_urgent]
        if urgent and len(urgent) < len(turn):
            first, *others = [connection for connection in turn if not connection.is_urgent]
            turn.clear()
            turn.extend((*urgent[:_URGENT_FIRST], first, *urgent[_URGENT_FIRST:], *others))

    def _serve(self, connection: QuicConnection, now: float) -> int:
        """One send pass of one connection; returns its work in datagrams: large ones count more, none as one."""
        work = 1
        bytes_max = _URGENT_BYTES_MAX if connection.is_urgent and self._turn else PASS_BYTES_MAX
        self._serving = connection
        connection.has_more_to_send = connection.is_urgent = False
        try:
            count_max = min(PASS_DATAGRAMS_MAX, bytes_max // connection.engine.udp_payload_bytes)
            datagrams = connection.engine.datagrams_to_send(now, count_max)
            if datagrams:
                count, sent_bytes = len(datagrams), 0
                for datagram, _ in datagrams:
                    sent_bytes += len(datagram)
                connection.stats.udp_datagrams_sent += count
                connection.stats.bytes_sent += sent_bytes
                connection.has_more_to_send = count >= count_max
                work = max(count, sent_bytes // _WORK_BYTES)
                self._port.send(datagrams)
            # A send pass may end a connection (path validation) or issue connection ids.
            connection.after_output()
            self._settle(connection, now)
        except Exception:  # noqa: BLE001  told by _give_up
            self._give_up(connection)
            return work
        finally:
            self._serving = None
        return work

    def _settle(self, connection: QuicConnection, now: float) -> None:
        """After all else: drops a connection that is gone, and sets the clock of one that is not."""
        if connection not in self._connections:
            return
        engine = connection.engine
        if engine.is_gone or (connection.is_client and connection.is_closed):
            # What a server lingers for (RFC 9000, 10.2) a client need not: the port is its own.
            self._drop(connection)
        else:
            self._arm(connection, engine.timer(), now)

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
            earliest = now if self._port.is_writable else now + _BLOCKED_TIMER_S
            self._timers[connection] = self._loop.call_at(max(at, earliest), self._on_timer, connection)

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
        except Exception:  # noqa: BLE001  told by _give_up
            self._give_up(connection)
        else:
            self._after_input(connection)
            if not self._port.is_writable and connection in self._connections:
                # There will be no pass soon that sets the clock again.
                self._settle(connection, now)

    # --- bookkeeping ---

    def _give_up(self, connection: QuicConnection) -> None:
        """Its engine has raised, which is a bug of the engine's: the other connections of this socket go on.

        The trace is told as text: whoever shows exceptions with the values of their variables would show what was sent.
        """
        log.error("engine_failed", peer=connection.peer, trace=traceback.format_exc())
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
        self._connections[connection] = None
        self.stats.connections = len(self._connections)
        connection.connection_ids.add(connection.engine.initial_connection_id)
        self._routes[connection.engine.initial_connection_id] = connection

    def _drop(self, connection: QuicConnection) -> None:
        self._connections.pop(connection, None)
        self.stats.connections = len(self._connections)
        timer = self._timers.pop(connection, None)
        if timer is not None:
            timer.cancel()
        self._end_handshake(connection)
        for connection_id in connection.connection_ids:
            if self._routes.get(connection_id) is connection:
                del self._routes[connection_id]
        connection.connection_ids.clear()
        if self._is_client and not self._closing:
            # A client's port has one connection and ends with it.
            self._closing = True
            self._release()

    def _release(self) -> None:
        for connection in list(self._connections):
            self._drop(connection)
        if self._unhurried_timer is not None:
            self._unhurried_timer.cancel()
        self._unhurried.clear()
        self._turn.clear()
        self._port.close()
        if not self._gone.done():
            self._gone.set_result(None)

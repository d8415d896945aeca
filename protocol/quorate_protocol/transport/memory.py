"""A network inside one process: the packet port for links that need no sockets, and for simulation.

Endpoint, engine, TLS and all above are the real ones; only the wire is not. The network loses, delays,
doubles and reorders datagrams as it is told, drawing from one seeded generator, and knows no clock but
the loop's: under virtual time hours pass in seconds, and the same seed gives the same fates. A fate
depends on a datagram's place in the order of sending, never on its content: sizes of TLS signatures,
and with them those of some handshake packets, differ by a byte or two from run to run.

What holds the place of addresses is `(NAME, 0)`, written `memory:NAME`. A listener has the name it
asked for; clients are called `client-1`, `client-2` and so on, in the order in which they connect.
"""

import asyncio
import contextlib
import errno
import heapq
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Final

from quorate_protocol.errors import ConfigurationError
from quorate_protocol.limits import UDP_PAYLOAD_BYTES_MIN
from quorate_protocol.transport.api import ServerStats
from quorate_protocol.transport.engine import Address
from quorate_protocol.transport.packets import Packet, PacketPort, PacketReceiver

#: Bytes under way to one port; more are dropped, as by a router whose queue is full. As much as a socket
#: holds (`udp.SOCKET_BUFFER_BYTES`).
PORT_QUEUE_BYTES_MAX: Final = 8 << 20

#: What a datagram counts beside its payload: the objects that carry it, so that small ones are bounded as well.
_DATAGRAM_OVERHEAD_BYTES: Final = 256

#: Datagrams handed over in one turn of the loop, as by a socket (`udp.BATCH_DATAGRAMS_MAX`).
_BATCH_DATAGRAMS_MAX: Final = 256

#: Loops run timers this much early at the most, in seconds.
_CLOCK_SLACK_S: Final = 1e-6


class Fate(Enum):
    """What becomes of a datagram."""

    DELIVERED = "delivered"
    #: Delivered, and once more later.
    DUPLICATED = "duplicated"
    #: Held back, so that later ones overtake it.
    REORDERED = "reordered"
    LOST = "lost"
    #: Swallowed by a partition.
    PARTITIONED = "partitioned"
    #: Over `mtu_bytes`.
    TOO_LARGE = "too large"
    #: The receiver's queue was full.
    OVERFLOWED = "overflowed"
    #: Nobody has the address any more.
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, slots=True)
class Transit:
    """One datagram and its fate."""

    #: The loop's time when it was sent, in seconds.
    sent_at: float
    source: str
    destination: str
    #: Payload bytes.
    datagram_bytes: int
    fate: Fate
    #: When it arrives, for the first time; None when it does not.
    arrives_at: float | None


class MemoryNetwork:
    """Carries datagrams between the ports of one event loop, with faults that may be changed at any time."""

    def __init__(
        self,
        seed: int = 0,
        *,
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
        loss: float = 0.0,
        duplication: float = 0.0,
        reordering: float = 0.0,
        mtu_bytes: int = 65_507,
        silent: bool = False,
        on_transit: Callable[[Transit], None] | None = None,
    ) -> None:
        """Everything but the seed may be changed later, as an attribute.

        Args:
            seed: what the fates are drawn from.
            delay_s: seconds that every datagram takes, one way.
            jitter_s: seconds beyond that, at random up to this; they change no order.
            loss: probability, from 0 to 1, of a datagram's being lost.
            duplication: of its arriving twice.
            reordering: of its being held back, so that others overtake it.
            mtu_bytes: largest datagram; a larger one is reported to its sender.
            silent: a larger one is swallowed instead: a black hole.
            on_transit: is told of each datagram when it is sent. `fates` counts them.

        Raises:
            ConfigurationError: a value that makes no sense.
        """
        for name, value in (("delay_s", delay_s), ("jitter_s", jitter_s)):
            if not 0 <= value < math.inf:
                raise ConfigurationError(name, f"must be a number of seconds, not negative, is {value}")
        for name, value in (("loss", loss), ("duplication", duplication), ("reordering", reordering)):
            if not 0 <= value <= 1:
                raise ConfigurationError(name, f"is a probability, from 0 to 1, and not {value}")
        if mtu_bytes < UDP_PAYLOAD_BYTES_MIN:
            raise ConfigurationError(
                "mtu_bytes", f"must be at least {UDP_PAYLOAD_BYTES_MIN}, which QUIC needs, is {mtu_bytes}"
            )
        self._random = random.Random(seed)  # noqa: S311  repeatable on purpose
        #: Seconds that every datagram takes, one way.
        self.delay_s = delay_s
        #: Seconds beyond that, at random up to this. They change no order: that is `reordering`.
        self.jitter_s = jitter_s
        #: Probabilities, from 0 to 1, of a datagram's being lost, arriving twice, or being held back for up to
        #: `delay_s` and `jitter_s` together (at least a millisecond), in which others overtake it.
        self.loss = loss
        self.duplication = duplication
        self.reordering = reordering
        #: Largest datagram; what is larger is reported to its sender or, where the network is `silent`, a black hole.
        self.mtu_bytes = mtu_bytes
        self.silent = silent
        #: Is told of each datagram when it is sent.
        self.on_transit = on_transit
        #: How many datagrams had which fate so far.
        self.fates: dict[Fate, int] = dict.fromkeys(Fate, 0)
        self._ports: dict[str, MemoryPort] = {}
        #: Pairs of names that do not reach each other; None stands for everybody else.
        self._partitions: dict[tuple[str, str | None], None] = {}
        self._clients = 0
        self._sequence = 0
        #: When the last datagram of each direction that was not held back arrives.
        self._last_at: dict[tuple[str, str], float] = {}

    def partition(self, a: str, b: str | None = None) -> None:
        """Cuts the wire between two names, in both directions; without `b`, between `a` and everybody.

        What is under way arrives.
        """
        self._partitions[a, b] = None

    def heal(self) -> None:
        """Mends all wires that `partition` has cut."""
        self._partitions.clear()

    def is_cut(self, a: str, b: str) -> bool:
        """Whether a partition is between two names."""
        cut = self._partitions
        return bool(cut) and ((a, b) in cut or (b, a) in cut or (a, None) in cut or (b, None) in cut)

    def bind(self, name: str | None = None) -> "MemoryPort":
        """A port under this name; None gives a client's.

        Raises:
            ConfigurationError: the name is in use.
        """
        if name is None:
            self._clients += 1
            name = f"client-{self._clients}"
        if self.listens(name):
            raise ConfigurationError("listen", f"cannot listen on memory:{name}: the name is in use")
        port = self._ports[name] = MemoryPort(self, name)
        return port

    def listens(self, name: str) -> bool:
        """Whether somebody has this name. The ports of a loop that was closed without closing them do not count."""
        port = self._ports.get(name)
        return port is not None and not port.loop.is_closed()

    def _unbind(self, port: "MemoryPort") -> None:
        if self._ports.get(port.name) is port:
            del self._ports[port.name]
        for direction in [direction for direction in self._last_at if port.name in direction]:
            del self._last_at[direction]

    def _carry(self, source: "MemoryPort", destination: str, datagram: bytes, now: float) -> Fate:
        """Decides and begins what becomes of a datagram."""
        fate, arrives_at = self._decide(source, destination, datagram, now)
        self.fates[fate] += 1
        if self.on_transit is not None:
            self.on_transit(Transit(now, source.name, destination, len(datagram), fate, arrives_at))
        return fate

    def _decide(self, source: "MemoryPort", destination: str, datagram: bytes, now: float) -> tuple[Fate, float | None]:
        draw = self._random.random
        # Always as many draws for each, so that a fault that is switched on or off does not shift the others.
        lost, doubled, held, jitter, again = draw(), draw(), draw(), draw(), draw()
        port = self._ports.get(destination)
        if len(datagram) > self.mtu_bytes:
            return Fate.TOO_LARGE, None
        if self.is_cut(source.name, destination):
            return Fate.PARTITIONED, None
        if lost < self.loss:
            return Fate.LOST, None
        if port is None or port.loop is not source.loop:
            return Fate.UNREACHABLE, None
        at = now + self.delay_s + jitter * self.jitter_s
        hold_s = max(self.delay_s + self.jitter_s, 0.001)
        fate = Fate.DELIVERED
        if held < self.reordering:
            fate = Fate.REORDERED
            at += again * hold_s
        else:
            direction = source.name, destination
            at = self._last_at[direction] = max(at, self._last_at.get(direction, 0.0))
        if not self._put(port, at, datagram, source.address):
            return Fate.OVERFLOWED, None
        if doubled < self.duplication:
            fate = Fate.DUPLICATED
            self._put(port, at + again * hold_s, datagram, source.address)
        return fate, at

    def _put(self, port: "MemoryPort", at: float, datagram: bytes, source: Address) -> bool:
        self._sequence += 1
        return port.put(at, self._sequence, datagram, source)


class MemoryPort(PacketPort):
    """One end of the network; made by `MemoryNetwork.bind`. Implements `PacketPort`."""

    # What happens is the seed's business alone, not this machine's. There are no strangers in a process.
    work_clock = staticmethod(lambda: 0.0)

    def __init__(self, network: MemoryNetwork, name: str) -> None:
        self.name = name
        self.loop = asyncio.get_running_loop()
        self._network = network
        self._receiver: PacketReceiver | None = None
        self._stats = ServerStats()
        self._is_closed = False
        #: What is under way to here: when it arrives, the order among those that arrive together, what, from where.
        self._queue: list[tuple[float, int, bytes, Address]] = []
        self._queued_bytes = 0
        self._wake: asyncio.Handle | None = None
        self._wakes_at = 0.0

    def attach(self, receiver: PacketReceiver, stats: ServerStats) -> None:
        self._receiver = receiver
        self._stats = stats

    @property
    def address(self) -> Address:
        return self.name, 0

    def connect(self, address: Address) -> Address:
        if not self._network.listens(address[0]):
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens at memory:{address[0]}")
        return address

    def send(self, datagrams: Sequence[Packet]) -> None:
        if self._is_closed:
            return
        now = self.loop.time()
        stats = self._stats
        for datagram, (destination, _) in datagrams:
            fate = self._network._carry(self, destination, datagram, now)
            if fate is Fate.TOO_LARGE and not self._network.silent:
                stats.udp_datagrams_dropped += 1
                assert self._receiver is not None
                self._receiver.datagram_too_large(len(datagram), (destination, 0))
                continue
            stats.udp_datagrams_sent += 1
            stats.bytes_sent += len(datagram)
            if fate is Fate.UNREACHABLE:
                self.loop.call_soon(self._tell_refused)

    @property
    def is_writable(self) -> bool:
        return True

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._network._unbind(self)
        self._queue.clear()
        if self._wake is not None:
            self._wake.cancel()

    def put(self, at: float, sequence: int, datagram: bytes, source: Address) -> bool:
        """Lets a datagram arrive at a time; False when too much is under way already."""
        size = len(datagram) + _DATAGRAM_OVERHEAD_BYTES
        if self._queued_bytes + size > PORT_QUEUE_BYTES_MAX:
            return False
        self._queued_bytes += size
        heapq.heappush(self._queue, (at, sequence, datagram, source))
        self._arm()
        return True

    def _arm(self) -> None:
        if not self._queue:
            return
        at = self._queue[0][0]
        if self._wake is not None:
            if self._wakes_at <= at:
                return
            self._wake.cancel()
        self._wakes_at = at
        if at <= self.loop.time():
            self._wake = self.loop.call_soon(self._deliver)
        else:
            self._wake = self.loop.call_at(at, self._deliver)

    def _deliver(self) -> None:
        self._wake = None
        due = self.loop.time() + _CLOCK_SLACK_S
        queue = self._queue
        batch: list[Packet] = []
        while queue and queue[0][0] <= due and len(batch) < _BATCH_DATAGRAMS_MAX:
            _, _, datagram, source = heapq.heappop(queue)
            batch.append((datagram, source))
        received_bytes = sum(len(datagram) for datagram, _ in batch)
        self._queued_bytes -= received_bytes + len(batch) * _DATAGRAM_OVERHEAD_BYTES
        self._arm()
        if batch:
            self._stats.udp_datagrams_received += len(batch)
            self._stats.bytes_received += received_bytes
            assert self._receiver is not None
            self._receiver.datagrams_received(batch)

    def _tell_refused(self) -> None:
        if not self._is_closed:
            assert self._receiver is not None
            self._receiver.refused()


@cache
def _perfect_network() -> MemoryNetwork:
    return MemoryNetwork()


_named: ContextVar[MemoryNetwork | None] = ContextVar("network", default=None)


def process_network() -> MemoryNetwork:
    """The network that links use where none is named: this context's, or the perfect one of the whole process."""
    return _named.get() or _perfect_network()


@contextlib.contextmanager
def using_network(network: MemoryNetwork) -> Iterator[None]:
    """Gives links of this context, and of tasks made in it, another network where none is named."""
    token = _named.set(network)
    try:
        yield
    finally:
        _named.reset(token)

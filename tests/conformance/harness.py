"""Two engines, a network between them and a clock that only moves when nothing is left to do.

The harness drives engines as the port's docstring asks it: `report`, then `datagrams_to_send`, then
the timer. It holds them to what the port says of every call while it does so: nothing is reported after
`closed`, bytes of a stream come in order and end once, timers do not spin, datagrams go to ids that
were issued.
"""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from conformance.path import Path
from quorate_coordinator.certificates import DevelopmentCredentials
from quorate_protocol.errors import ConnectionClosed
from quorate_protocol.transport import ALPN, ClientTls, Priority
from quorate_protocol.transport.engine import AioquicFactory

#: Every engine that has to hold the contract: one line for one more. Each takes a ceiling for the
#: size of UDP payloads (`udp_payload_bytes_max`) and a server's secret (`reset_key`), and its defaults without.
FACTORIES: dict[str, Callable[..., Any]] = {"aioquic": AioquicFactory}

CLIENT_ADDRESS = ("192.0.2.1", 40_001)
SERVER_ADDRESS = ("192.0.2.2", 4433)

#: Datagrams for one pass, as the endpoint asks for them.
PASS_DATAGRAMS = 64

#: Virtual seconds after which a test that waits has failed; everything here is over in less.
PATIENCE_S = 60.0

#: Rounds at one time after which an engine is said to spin: it wants its timer handled, and again.
_ROUNDS_MAX = 100

#: By how much the clock is moved then. A real one would have moved by itself, and the test goes on.
_NUDGE_S = 1e-6

#: Passes at one time after which an engine is said to send for ever.
_PASSES_MAX = 20_000


class Recorder:
    """A `Sink` that keeps everything, and looks at the order in which it is told."""

    def __init__(self, end: "End") -> None:
        self._end = end
        #: All calls in order: name and arguments.
        self.calls: list[tuple[Any, ...]] = []
        self.protocol: str | None = None
        self.data: dict[int, bytearray] = defaultdict(bytearray)
        self.ended: set[int] = set()
        self.resets: dict[int, int] = {}
        self.stops: dict[int, int] = {}
        self.acknowledged: dict[int, int] = defaultdict(int)
        self.datagrams: list[bytes] = []
        self.close: ConnectionClosed | None = None
        self._retired: set[bytes] = set()

    def of(self, name: str) -> list[tuple[Any, ...]]:
        """The arguments of all calls of one name."""
        return [arguments for called, *arguments in self.calls if called == name]

    def _note(self, *call: Any) -> None:
        assert self._end.is_reporting, f"{call[0]} outside of report"
        assert self.close is None, f"{call[0]} after closed"
        self.calls.append(call)

    def handshake_completed(self, protocol: str) -> None:
        self._note("handshake_completed", protocol)
        assert self.protocol is None, "the handshake was completed twice"
        self.protocol = protocol

    def stream_data_received(self, stream_id: int, data: bytes, end: bool) -> None:
        self._note("stream_data_received", stream_id, len(data), end)
        assert isinstance(data, bytes)
        assert stream_id not in self.ended, "data after the end"
        assert stream_id not in self.resets, "data after the reset"
        self._end.meets(stream_id)
        self.data[stream_id] += data
        if end:
            self.ended.add(stream_id)
        self._end.takes(stream_id, len(data))

    def stream_reset(self, stream_id: int, code: int) -> None:
        self._note("stream_reset", stream_id, code)
        assert stream_id not in self.ended, "a reset after the end"
        assert stream_id not in self.resets, "two resets"
        self._end.meets(stream_id)
        self.resets[stream_id] = code

    def stream_stopped(self, stream_id: int, code: int) -> None:
        self._note("stream_stopped", stream_id, code)
        self._end.meets(stream_id)
        self.stops.setdefault(stream_id, code)

    def stream_acknowledged(self, stream_id: int) -> None:
        self._note("stream_acknowledged", stream_id)
        self.acknowledged[stream_id] += 1

    def streams_available(self) -> None:
        self._note("streams_available")

    def datagram_received(self, data: bytes) -> None:
        self._note("datagram_received", len(data))
        self.datagrams.append(bytes(data))

    def connection_id_issued(self, connection_id: bytes) -> None:
        self._note("connection_id_issued", connection_id)
        # More than once is no harm: the frame that tells the peer of it may have to be sent again.
        assert connection_id not in self._retired, "an id was issued again after it was retired"
        self._end.ids.add(connection_id)

    def connection_id_retired(self, connection_id: bytes) -> None:
        self._note("connection_id_retired", connection_id)
        assert connection_id in self._end.ids, "an id was retired that was never issued"
        self._end.ids.discard(connection_id)
        self._retired.add(connection_id)

    def closed(self, error: ConnectionClosed) -> None:
        self._note("closed", error.code, error.reason)
        self.close = error


class End:
    """One end of the link: an engine, what it told, and how its streams are read."""

    def __init__(self, engine: Any, address: Any, *, is_client: bool) -> None:
        self.engine = engine
        self.address = address
        self.is_client = is_client
        #: Ids under which it gets datagrams now.
        self.ids: set[bytes] = {engine.initial_connection_id}
        #: Datagrams for other ids: a driver cannot route them.
        self.misrouted = 0
        self.is_reporting = False
        #: Whether bytes are consumed, and the peer's streams accepted, as soon as they come.
        self.reads = True
        self.accepts = True
        #: Streams of the peer in the order in which they came.
        self.met: list[int] = []
        self.seen = Recorder(self)
        self._met: set[int] = set()
        self._unreleased: list[int] = []
        self._unconsumed: list[tuple[int, int]] = []

    def open(
        self, data: bytes = b"", *, end: bool = True, bi: bool = True, priority: Priority = Priority.NORMAL
    ) -> int:
        """Opens a stream that begins with `data`; returns its id."""
        assert self.engine.can_open_stream(bidirectional=bi)
        stream_id: int = self.engine.open_stream(bidirectional=bi, priority=priority)
        if data or end:
            self.engine.write(stream_id, data, end)
        return stream_id

    def report(self) -> None:
        """As the driver does: hears everything, then reads and accepts."""
        self.is_reporting = True
        try:
            self.engine.report(self.seen)
        finally:
            self.is_reporting = False
        if self.reads and self._unconsumed:
            unconsumed, self._unconsumed = self._unconsumed, []
            for stream_id, count in unconsumed:
                self.engine.consumed(stream_id, count)
        if self.accepts:
            self.accept()

    def accept(self, count: int | None = None) -> None:
        """Accepts streams that wait for it."""
        accepted = self._unreleased[:count]
        del self._unreleased[:count]
        for stream_id in accepted:
            self.engine.release_stream(stream_id)

    # From the recorder:

    def meets(self, stream_id: int) -> None:
        if (stream_id & 1 == 0) != self.is_client and stream_id not in self._met:
            self._met.add(stream_id)
            self.met.append(stream_id)
            self.engine.hold_stream(stream_id)
            self._unreleased.append(stream_id)

    def takes(self, stream_id: int, count: int) -> None:
        if count:
            self._unconsumed.append((stream_id, count))


class World:
    """A client's engine, a factory that serves, two paths, one clock."""

    def __init__(
        self,
        client: Any,
        factory: Any,
        up: Path,
        down: Path,
        *,
        started_at: float = 1000.0,
        count_max: int = PASS_DATAGRAMS,
    ) -> None:
        self.now = started_at
        self.factory = factory
        #: From the client to the server, and back.
        self.up = up
        self.down = down
        self.client = End(client, CLIENT_ADDRESS, is_client=True)
        #: None until a datagram opens the connection.
        self.there: End | None = None
        self.count_max = count_max
        #: What a stranger on the path sends beside each datagram, first and last: from whether it goes to the
        #: server, and its bytes.
        self.strange: Callable[[bool, bytes], tuple[list[bytes], list[bytes]]] = lambda to_server, datagram: ([], [])
        #: Most datagrams that one pass gave, for each end.
        self.pass_datagrams = {True: 0, False: 0}
        #: How often a timer asked to be handled again and again without the clock's moving.
        self.spins = 0
        #: Other addresses that an end may have been made to write to; what it writes there is lost.
        self.elsewhere: set[Any] = set()
        self._order = itertools.count()
        self._under_way: list[tuple[float, int, bool, bytes]] = []

    @property
    def server(self) -> End:
        assert self.there is not None, "the server has heard nothing"
        return self.there

    @property
    def ends(self) -> list[End]:
        return [self.client] if self.there is None else [self.client, self.there]

    def connect(self) -> "World":
        """Handshakes, and lets the ends tell each other what follows it."""
        self.client.engine.connect(SERVER_ADDRESS, self.now)
        self.run(lambda: all(end.seen.protocol for end in self.ends) and self.there is not None)
        self.rest(1.0)
        return self

    def run(self, condition: Callable[[], Any], within_s: float = PATIENCE_S) -> float:
        """Lets time go by until the condition holds; returns the seconds that it took."""
        began = self.now
        assert self._run(condition, began + within_s), (
            f"did not come about in {within_s} virtual seconds; {self.up}; {self.down}"[:2000]
        )
        return self.now - began

    def rest(self, seconds: float) -> None:
        """Lets so much time go by."""
        ends_at = self.now + seconds
        self._run(lambda: False, ends_at)
        self.now = ends_at

    def deliver(self, end: End, datagram: bytes, address: Any = None) -> bool:
        """Feeds a datagram to an engine now, whatever its header says."""
        return bool(end.engine.receive(datagram, address or self._peer_address(end), self.now))

    def serve(self) -> None:
        """One turn of both ends: what they tell is heard, what they want to send is sent."""
        for end in self.ends:
            self._serve(end)

    def _run(self, condition: Callable[[], Any], ends_at: float) -> bool:
        rounds, since = 0, self.now
        while True:
            self.serve()
            if condition():
                return True
            at = self._next_at()
            if at is None or at > ends_at:
                return False
            self.now = max(self.now, at)
            rounds = rounds + 1 if self.now - since < 1e-9 else 0
            if rounds == 0:
                since = self.now
            if rounds >= _ROUNDS_MAX:
                self.spins += 1
                self.now += _NUDGE_S
            self._carry()
            for end in self.ends:
                timer = end.engine.timer()
                if timer is not None and timer <= self.now:
                    end.engine.handle_timer(self.now)

    def _next_at(self) -> float | None:
        times = [timer for end in self.ends if (timer := end.engine.timer()) is not None]
        if self._under_way:
            times.append(self._under_way[0][0])
        return min(times, default=None)

    def _carry(self) -> None:
        while self._under_way and self._under_way[0][0] <= self.now:
            _, _, to_server, datagram = heapq.heappop(self._under_way)
            end = self._route(datagram, to_server)
            if end is not None:
                self.deliver(end, datagram)
                if end is self.there and not end.engine.is_established:
                    # Nothing in the datagram that opened it was authentic: a driver forgets it.
                    self.there = None

    def _route(self, datagram: bytes, to_server: bool) -> End | None:
        if len(datagram) <= self.factory.connection_id_bytes:
            return None
        if to_server and self.there is None:
            arrival = self.factory.inspect(datagram)
            if arrival is None or not arrival.opens:
                return None
            self.there = End(self.factory.server(arrival), SERVER_ADDRESS, is_client=False)
            # The client goes on using the id that it made up until it has an answer.
            self.there.ids.add(arrival.destination_id)
        end = self.server if to_server else self.client
        if destination_id(datagram, self.factory.connection_id_bytes) not in end.ids:
            end.misrouted += 1
            return None
        return end

    def _serve(self, end: End) -> None:
        end.report()
        path = self.up if end.is_client else self.down
        for _ in range(_PASSES_MAX):
            batch = end.engine.datagrams_to_send(self.now, self.count_max)
            self.pass_datagrams[end.is_client] = max(self.pass_datagrams[end.is_client], len(batch))
            for datagram, address in batch:
                if address in self.elsewhere:
                    continue
                assert address == self._peer_address(end)
                if len(datagram) > path.local_bytes_max:
                    end.engine.datagram_refused(len(datagram), self.now)
                    continue
                for at in path.arrivals(datagram, self.now):
                    before, after = self.strange(end.is_client, datagram)
                    for sent in (*before, datagram, *after):
                        heapq.heappush(self._under_way, (at, next(self._order), end.is_client, sent))
            end.report()
            if len(batch) < self.count_max:
                return
        raise AssertionError("an engine sends for ever at one time")

    @staticmethod
    def _peer_address(end: End) -> Any:
        return SERVER_ADDRESS if end.is_client else CLIENT_ADDRESS


def destination_id(datagram: bytes, connection_id_bytes: int) -> bytes:
    """Where a datagram wants to go: a long header has the length of the id (RFC 9000, 17.2), a short one has not."""
    if len(datagram) < 6:
        return b""
    return datagram[6 : 6 + datagram[5]] if datagram[0] & 0x80 else datagram[1 : 1 + connection_id_bytes]


def make_world(
    make_factory: Callable[..., Any],
    credentials: DevelopmentCredentials,
    *,
    up: dict[str, Any] | None = None,
    down: dict[str, Any] | None = None,
    client_protocols: tuple[str, ...] = (ALPN,),
    server_protocols: tuple[str, ...] = (ALPN,),
    client_bytes_max: int | None = None,
    server_bytes_max: int | None = None,
    client: Any = None,
    serving: Any = None,
    tls: ClientTls | None = None,
    count_max: int = PASS_DATAGRAMS,
    **path: Any,
) -> World:
    """A world that has not begun its handshake.

    Options of `Path` hold for both directions; `up` and `down` have those of one. The ends' seeds differ.
    `client` (an engine) and `serving` (a factory that is set up) stand in for those of `make_factory`.
    """
    path.setdefault("seed", 1)
    ceilings = [
        {} if most is None else {"udp_payload_bytes_max": most} for most in (client_bytes_max, server_bytes_max)
    ]
    if serving is None:
        serving = make_factory(**ceilings[1])
        serving.set_server(credentials.tls, list(server_protocols))
    if client is None:
        client = make_factory(**ceilings[0]).client(
            tls or ClientTls(ca_file=credentials.ca_file), "localhost", list(client_protocols)
        )
    return World(
        client,
        serving,
        Path(**path | (up or {})),
        Path(**path | {"seed": path["seed"] + 1_000_000} | (down or {})),
        count_max=count_max,
    )

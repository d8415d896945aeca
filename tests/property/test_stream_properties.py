"""Streams over a bad network, whatever is done to them: each is delivered whole and in order, or its end is told.

Real connections over a network in memory, under virtual time. Hypothesis writes the programs: what is sent, read,
reset, stopped and reprioritised on several streams at once, in both directions, with windows from small to tiny. A
program that does not end is a deadlock.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from links import Link, noise, unread_bytes
from quorate_coordinator.certificates import DevelopmentCredentials, ensure_development_credentials
from quorate_protocol.errors import ResetByPeer, StoppedByPeer
from quorate_protocol.transport import MemoryNetwork, Priority
from quorate_protocol.transport import connection as connection_module
from quorate_protocol.transport.engine import aioquic_engine, quic_connection
from virtual import memory_linked, run_virtually

#: Virtual seconds in which every program ends. The slowest have tiny windows and lose every eighth packet.
ENDS_WITHIN_S = 600.0

CHUNK_BYTES_MAX = 20_000

#: What any direction of any stream sends is a beginning of this.
CONTENT = noise(5 * CHUNK_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class Sending:
    """What one end does with a sending half."""

    #: Bytes to send, seconds to wait, or a class to change to; in this order.
    steps: tuple[int | float | Priority, ...]
    #: The code of a reset at the end; None finishes.
    reset_code: int | None

    @property
    def content(self) -> bytes:
        return CONTENT[: sum(step for step in self.steps if type(step) is int)]


@dataclass(frozen=True, slots=True)
class Receiving:
    """What one end does with a receiving half."""

    max_bytes: int
    #: Seconds between reads.
    pause_s: float
    #: Stops after so many bytes; None never.
    stop_after_bytes: int | None
    stop_code: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One stream."""

    by_client: bool
    priority: Priority
    #: Opener to accepter.
    out: tuple[Sending, Receiving]
    #: Back; None for a unidirectional stream.
    back: tuple[Sending, Receiving] | None


@dataclass(frozen=True, slots=True)
class Windows:
    """Ceilings of an engine, in bytes."""

    stream: int
    connection: int
    #: How many times the first two they may grow to.
    growth: int
    stream_write: int
    class_write: int


PAUSES_S = st.sampled_from([0.0, 0.001, 0.02, 0.3])
CODES = st.integers(0, 2**62 - 1)
PRIORITIES = st.sampled_from(Priority)

SENDINGS = st.builds(
    Sending,
    st.lists(
        st.one_of(st.sampled_from([0, 1, 100, 1200, 5000, CHUNK_BYTES_MAX]), PAUSES_S, PRIORITIES), max_size=5
    ).map(tuple),
    st.none() | st.none() | CODES,
)
RECEIVINGS = st.builds(
    Receiving,
    st.sampled_from([100, 1000, 65_536]),
    PAUSES_S.map(lambda pause_s: pause_s / 10),
    st.none() | st.none() | st.sampled_from([0, 1, 1000, 10_000]),
    CODES,
)
DIRECTIONS = st.tuples(SENDINGS, RECEIVINGS)
PLANS = st.lists(st.builds(Plan, st.booleans(), PRIORITIES, DIRECTIONS, st.none() | DIRECTIONS), min_size=1, max_size=6)
WINDOWS = st.builds(
    Windows,
    stream=st.sampled_from([500, 2000, 30_000, 1 << 20]),
    connection=st.sampled_from([500, 3000, 40_000, 8 << 20]),
    growth=st.sampled_from([1, 4]),
    stream_write=st.sampled_from([1, 3000, 2 << 20]),
    class_write=st.sampled_from([1, 5000, 24 << 20]),
)
FAULTS = st.fixed_dictionaries(
    {
        "delay_s": st.sampled_from([0.0, 0.005, 0.05]),
        "jitter_s": st.sampled_from([0.0, 0.01]),
        "loss": st.sampled_from([0.0, 0.02, 0.12]),
        "duplication": st.sampled_from([0.0, 0.1]),
        "reordering": st.sampled_from([0.0, 0.1]),
        "mtu_bytes": st.sampled_from([1200, 1452, 9000]),
    }
)


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> DevelopmentCredentials:
    return ensure_development_credentials(tmp_path_factory.mktemp("credentials"))


@contextmanager
def limited(windows: Windows) -> Iterator[None]:
    """Lets engines made inside have these ceilings."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (aioquic_engine, quic_connection, connection_module):
            for name, value in (
                ("CONNECTION_WINDOW_BYTES", windows.connection),
                ("CONNECTION_WINDOW_BYTES_MAX", windows.connection * windows.growth),
                ("STREAM_WINDOW_BYTES", windows.stream),
                ("STREAM_WINDOW_BYTES_MAX", windows.stream * windows.growth),
                ("STREAM_WRITE_BYTES_HIGH", windows.stream_write),
            ):
                if hasattr(module, name):
                    patch.setattr(module, name, value)
        patch.setattr(connection_module, "CLASS_WRITE_BYTES_HIGH", windows.class_write)
        yield


class Program:
    """Runs plans over one link, and holds on the way what must always hold."""

    def __init__(self, link: Link, plans: list[Plan], windows: Windows) -> None:
        self.link = link
        self.plans = plans
        self.windows = windows
        #: By whether the client opened it, and its id.
        self.opened: dict[tuple[bool, int], Plan] = {}
        self.streams_max = len(plans)
        #: Marks of writers so far, by end: they sink with the congestion window, and what was accepted before stays.
        self.write_bytes_high: dict[int, int] = {}

    async def run(self) -> None:
        async with asyncio.timeout(ENDS_WITHIN_S), asyncio.TaskGroup() as tasks:
            for plan in self.plans:
                tasks.create_task(self.open(plan))
                tasks.create_task(self.accept(plan.by_client, bidirectional=plan.back is not None))

    async def open(self, plan: Plan) -> None:
        opener = self.link.here if plan.by_client else self.link.there
        stream: Any = await (opener.open_bi_stream if plan.back else opener.open_uni_stream)(plan.priority)
        self.opened[plan.by_client, stream.id] = plan
        await self.use(stream, plan.out[0], plan.back and plan.back[1], plan)

    async def accept(self, by_client: bool, *, bidirectional: bool) -> None:
        accepter = self.link.there if by_client else self.link.here
        stream: Any = await (accepter.accept_bi_stream if bidirectional else accepter.accept_uni_stream)()
        plan = self.opened[by_client, stream.id]
        await self.use(stream, plan.back and plan.back[0], plan.out[1], plan)

    async def use(self, stream: Any, sending: Sending | None, receiving: Receiving | None, plan: Plan) -> None:
        to_us = plan.out if sending is None or sending is not plan.out[0] else plan.back
        from_us = plan.out if sending is plan.out[0] else plan.back
        async with asyncio.TaskGroup() as tasks:
            if sending is not None:
                assert from_us is not None
                tasks.create_task(self.send(stream, sending, from_us[1]))
            if receiving is not None:
                assert to_us is not None
                tasks.create_task(self.receive(stream, receiving, to_us[0]))

    async def send(self, stream: Any, sending: Sending, peer: Receiving) -> None:
        at = 0
        try:
            for step in sending.steps:
                if isinstance(step, Priority):
                    stream.priority = step
                elif isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    await stream.send(CONTENT[at : at + step])
                    at += step
                self.check()
            if sending.reset_code is None:
                await stream.finish()
                await stream.flush()
                assert stream.unsent_bytes == 0
            else:
                stream.reset(sending.reset_code)
        except StoppedByPeer as stopped:
            assert peer.stop_after_bytes is not None
            assert stopped.code == peer.stop_code

    async def receive(self, stream: Any, receiving: Receiving, peer: Sending) -> None:
        got = bytearray()
        try:
            while receiving.stop_after_bytes is None or len(got) < receiving.stop_after_bytes:
                chunk = await stream.receive(receiving.max_bytes)
                assert len(chunk) <= receiving.max_bytes
                self.check()
                if not chunk:
                    assert peer.reset_code is None
                    assert bytes(got) == peer.content
                    return
                got += chunk
                if receiving.pause_s:
                    await asyncio.sleep(receiving.pause_s)
            stream.stop(receiving.stop_code)
        except ResetByPeer as reset:
            assert reset.code == peer.reset_code
        # Nothing that was delivered before its end is out of order, or made up.
        assert peer.content.startswith(got)

    def check(self) -> None:
        """The ceilings."""
        windows = self.windows
        for end in (self.link.here, self.link.there):
            unread = [unread_bytes(stream) for stream in end._streams.values() if hasattr(stream, "_unread")]
            assert max(unread, default=0) <= windows.stream * windows.growth
            assert sum(unread) <= windows.connection * windows.growth
            engine = end.engine
            unsent = [engine.unacknowledged_bytes(stream_id) for stream_id in end._streams]
            # One `send` of less than a frame may pass the mark of its stream and that of its class.
            high = max(self.write_bytes_high.get(id(end), 0), engine.write_bytes_high)
            self.write_bytes_high[id(end)] = high
            assert max(unsent, default=0) <= high + CHUNK_BYTES_MAX
            assert sum(unsent) <= len(Priority) * windows.class_write + self.streams_max * CHUNK_BYTES_MAX
            assert sum(map(engine.unacknowledged_class_bytes, Priority)) >= sum(unsent)

    async def settle(self) -> None:
        """Both ends let go of all streams, and have given back all of the connection's window."""

        def is_settled(end: Any) -> bool:
            quic = end.engine._quic
            return (
                not quic._streams
                and end.stats.streams_open == 0
                and quic._window.consumed_bytes == quic._local_max_data.used
            )

        async with asyncio.timeout(ENDS_WITHIN_S):
            while not (is_settled(self.link.here) and is_settled(self.link.there)):  # noqa: ASYNC110  nobody tells of it
                await asyncio.sleep(0.1)


@settings(max_examples=60)
@given(plans=PLANS, windows=WINDOWS, faults=FAULTS, seed=st.integers(0, 2**32 - 1))
def test_every_stream_is_delivered_whole_and_in_order_or_its_end_is_told(credentials, plans, windows, faults, seed):
    async def main() -> None:
        network = MemoryNetwork(seed)
        async with memory_linked(credentials, network) as link:
            for name, value in faults.items():
                setattr(network, name, value)
            program = Program(link, plans, windows)
            await program.run()
            await program.settle()
            assert link.here.close_error is None
            assert link.there.close_error is None

    with limited(windows):
        run_virtually(main())

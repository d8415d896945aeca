"""Sessions that outlive their links: the fleet's shell and workers over a network in memory, in virtual time."""

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import structlog

from quorate_agent import Agent
from quorate_agent.events import EndingKind
from quorate_agent.worker import Worker
from quorate_coordinator.certificates import DevelopmentCredentials
from quorate_coordinator.fleet import Fleet
from quorate_protocol.blobs import make_private_store
from quorate_protocol.bodies import decode_body, encode_body
from quorate_protocol.channel import Channel
from quorate_protocol.errors import Code, QuorateError
from quorate_protocol.messages import Assignment, Feedback, Hello, Message, Reply
from quorate_protocol.transport import ClientTls, ReceiveStream, Server, listen
from quorate_protocol.transport.memory import process_network
from virtual import virtual_time

#: Virtual seconds.
PATIENCE_S = 120.0

_names = itertools.count(1)


class Desk:
    """A fleet, and the least of rounds: what was asked is asked again until it is answered."""

    def __init__(self, name: str, *, lease_s: float, pulse_s: float) -> None:
        self.name = name
        self.fleet = Fleet(
            lease_s=lease_s,
            pulse_s=pulse_s,
            open_timeout_s=5.0,
            on_reply=self._on_reply,
            on_reachable=self._on_reachable,
            on_lost=self._on_lost,
            serve_stream=self._serve_stream,
            awaits_s=lambda agent, round_id, attempt: 0.0,
            store=make_private_store(),
            bodies_refused_total=Counter(),
            handshakes_total=Counter(),
            protocol_errors_total=Counter(),
        )
        #: What the fleet told of its agent, in order.
        self.events: list[str] = []
        #: Replies in the order of their coming: round and answer.
        self.replies: list[tuple[int, Any]] = []
        self._outstanding: dict[int, bytes] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def _serve_stream(self, agent: str, header: Message, stream: ReceiveStream) -> None:
        raise AssertionError("nobody opens one here")

    def ask(self, round_id: int, body: Any) -> None:
        frame = Assignment(round=round_id, task="t", body=encode_body(body), deadline_s=1000.0).to_frame()
        self._outstanding[round_id] = frame
        self.fleet.send(["a"], frame, is_assignment=True)

    def tell(self, round_id: int) -> None:
        frame = Feedback(round=round_id, task="t", truth=encode_body(round_id)).to_frame()
        self.fleet.send(["a"], frame, hurried=False)

    @property
    def session(self) -> str | None:
        return self.fleet.registry.session_of("a")

    @property
    def state(self) -> tuple[str, bool]:
        (member,) = self.fleet.registry.agents()
        return member.state, member.has_link

    def break_link(self) -> None:
        """Ends the link in a moment, for both ends."""
        link = self.fleet._link_of("a")
        if link is not None:
            link.close(Code.INTERNAL, "test")

    async def answers(self, *rounds: int) -> None:
        """Waits until these are answered."""
        await until(lambda: set(rounds) <= {round_id for round_id, _ in self.replies})

    def _on_reply(self, agent: str, reply: Reply) -> None:
        assert reply.status == "replied", reply
        assert reply.body is not None
        self.replies.append((reply.round, decode_body(reply.body)))
        self._outstanding.pop(reply.round, None)

    def _on_reachable(self, agent: str) -> None:
        self.events.append("reachable")
        for frame in list(self._outstanding.values()):
            self.fleet.send([agent], frame, is_assignment=True)

    def _on_lost(self, agent: str, reason: str) -> None:
        self.events.append("lost")

    async def accept(self, server: Server) -> None:
        with contextlib.suppress(QuorateError):
            while True:
                task = asyncio.create_task(self._serve(await server.accept()))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: Any) -> None:
        with contextlib.suppress(QuorateError):
            channel = Channel(await connection.accept_bi_stream())
            hello = await channel.expect(Hello)
            assert isinstance(hello, Hello)
            await self.fleet.serve(connection, channel, hello)
        connection.abort()


class Trained:
    """An agent that answers with what it was asked and how many truths it had been told, and keeps their order."""

    def __init__(self) -> None:
        self.agent = Agent("a")
        self.truths: list[int] = []
        self.worked: list[int] = []

        @self.agent.task("t")
        async def work(body: dict[str, Any]) -> Any:
            self.worked.append(body["n"])
            await asyncio.sleep(body.get("for_s", 0.0))
            return [body["n"], len(self.truths)]

        @self.agent.feedback("t")
        async def learn(body: dict[str, Any], truth: int) -> None:
            assert body["n"] == truth
            self.truths.append(truth)


@contextlib.asynccontextmanager
async def at_a_desk(
    credentials: DevelopmentCredentials, *, lease_s: float, pulse_s: float = 0.25, **options: Any
) -> AsyncIterator[tuple[Desk, Trained, Worker, Callable[[], None]]]:
    """A desk with one agent that has joined, its worker, and what cuts the network between them."""
    name = f"desk-{next(_names)}"
    network = process_network()
    server = await listen(f"memory:{name}", tls=credentials.tls)
    desk = Desk(name, lease_s=lease_s, pulse_s=pulse_s)
    accepting = asyncio.create_task(desk.accept(server))
    trained = Trained()
    tls = ClientTls(ca_file=credentials.ca_file, server_name="localhost")
    options = {"rng": random.Random(1), **options}
    worker = Worker(trained.agent, f"memory:{name}", agent_id="a", token="t", tls=tls, **options)
    running = asyncio.create_task(worker.run())
    try:
        await until(lambda: desk.events == ["reachable"])
        yield desk, trained, worker, lambda: network.partition(name)
    finally:
        network.heal()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await desk.fleet.close("over")
        await server.close()
        accepting.cancel()
        await asyncio.gather(accepting, *desk._tasks, return_exceptions=True)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  time is virtual
            await asyncio.sleep(0.05)


def heal() -> None:
    process_network().heal()


@virtual_time
@pytest.mark.parametrize(
    ("cut_s", "lease_s", "is_resumed"), [(3.0, 30.0, False), (3.0, 4.5, True), (8.0, 10.0, True), (25.0, 30.0, True)]
)
async def test_a_cut_shorter_than_the_lease_loses_nothing(
    credentials: DevelopmentCredentials, cut_s: float, lease_s: float, is_resumed: bool
) -> None:
    async with at_a_desk(credentials, lease_s=lease_s) as (desk, trained, worker, cut):
        session = desk.session
        for number in (1, 2, 3):
            desk.ask(number, {"n": number})
        await desk.answers(1, 2, 3)
        desk.tell(1)
        desk.ask(4, {"n": 4, "for_s": 2.0})
        await until(lambda: 4 in trained.worked)
        cut()
        # These meet with a link that carries nothing, or with none.
        desk.tell(2)
        desk.ask(5, {"n": 5})
        await asyncio.sleep(cut_s)
        desk.tell(3)
        heal()
        desk.ask(6, {"n": 6})
        await desk.answers(4, 5, 6)
        assert desk.session == session
        assert desk.state == ("connected", True)
        assert dict(desk.replies[:4]) == {1: [1, 0], 2: [2, 0], 3: [3, 0], 4: [4, 1]}
        assert sorted(round_id for round_id, _ in desk.replies) == [1, 2, 3, 4, 5, 6], "each once"
        assert sorted(trained.worked) == [1, 2, 3, 4, 5, 6], "and worked on once"
        await until(lambda: trained.truths == [1, 2, 3])
        assert dict(desk.replies)[6] == [6, 3], "what was told before it was asked, it knew"
        assert (worker.counts.sessions, worker.counts.lost) == (1, 0)
        assert (worker.counts.resumed > 0) == is_resumed
        assert "lost" not in desk.events


@virtual_time
async def test_a_link_that_breaks_is_made_again_at_once(credentials: DevelopmentCredentials) -> None:
    async with at_a_desk(credentials, lease_s=10.0) as (desk, trained, worker, _):
        session = desk.session
        await asyncio.sleep(20.0)
        desk.ask(1, {"n": 1, "for_s": 5.0})
        await until(lambda: trained.worked == [1])
        began = asyncio.get_running_loop().time()
        desk.break_link()
        await until(lambda: desk.events == ["reachable", "reachable"])
        assert asyncio.get_running_loop().time() - began < 0.5
        await desk.answers(1)
        assert (desk.session, desk.replies, trained.worked) == (session, [(1, [1, 0])], [1])
        assert worker.counts.duplicates == 1, "it was asked again, and knew"


@virtual_time
async def test_a_cut_longer_than_the_lease_ends_the_session(credentials: DevelopmentCredentials) -> None:
    async with at_a_desk(credentials, lease_s=4.0) as (desk, trained, worker, cut):
        session = desk.session
        desk.ask(1, {"n": 1, "for_s": 60.0})
        await until(lambda: trained.worked == [1])
        cut()
        await until(lambda: desk.state == ("lost", False))
        desk._outstanding.clear()
        heal()
        await until(lambda: desk.state == ("connected", True))
        assert desk.session not in (None, session)
        assert desk.events == ["reachable", "lost", "reachable"]
        assert (worker.counts.sessions, worker.counts.resumed, worker.counts.lost) == (2, 0, 1)
        desk.ask(2, {"n": 2})
        await desk.answers(2)
        assert desk.replies == [(2, [2, 0])]


@virtual_time
async def test_replies_that_had_arrived_count_although_the_link_is_over(credentials: DevelopmentCredentials) -> None:
    """What was acknowledged is forgotten by the agent: the coordinator must have read it."""
    async with at_a_desk(credentials, lease_s=10.0) as (desk, _, worker, _):
        for turn in range(1, 30):
            desk.ask(turn, {"n": turn})
            # In whatever moment it comes.
            for _ in range(turn % 10):
                await asyncio.sleep(0)
            desk.break_link()
            await desk.answers(turn)
        assert [round_id for round_id, _ in desk.replies] == list(range(1, 30))
        assert worker.counts.replies_lost == 0


@virtual_time
@pytest.mark.parametrize("seed", range(6))
async def test_on_a_bad_network_each_is_answered_once_and_told_in_order(
    credentials: DevelopmentCredentials, seed: int
) -> None:
    rng = random.Random(seed)
    network = process_network()
    async with at_a_desk(credentials, lease_s=12.0) as (desk, trained, worker, cut):
        network.delay_s, network.jitter_s, network.loss = 0.01, 0.005, 0.02
        session = desk.session
        told: list[int] = []
        try:
            for number in range(1, 301):
                desk.ask(number, {"n": number, "for_s": rng.random() * 0.2})
                await asyncio.sleep(rng.random() * 0.3)
                answered = [round_id for round_id, _ in desk.replies if round_id not in told]
                if answered and rng.random() < 0.7:
                    told.append(answered[0])
                    desk.tell(answered[0])
                fate = rng.random()
                if fate < 0.02:
                    cut()
                    await asyncio.sleep(rng.random() * 5.0)
                    heal()
                elif fate < 0.06:
                    desk.break_link()
            await desk.answers(*range(1, 301))
            await until(lambda: len(trained.truths) == len(told))
        finally:
            network.delay_s = network.jitter_s = network.loss = 0.0
        assert desk.session == session, "no cut was as long as a lease"
        assert sorted(round_id for round_id, _ in desk.replies) == list(range(1, 301))
        assert sorted(trained.worked) == list(range(1, 301))
        assert trained.truths == told
        assert worker.counts.resumed > 3


# --- stopping ------------------------------------------------------------------------------------


@virtual_time
async def test_an_agent_that_is_stopped_while_away_delivers_and_says_goodbye(
    credentials: DevelopmentCredentials,
) -> None:
    async with at_a_desk(credentials, lease_s=10.0, drain_timeout_s=30.0) as (desk, trained, worker, cut):
        desk.ask(1, {"n": 1, "for_s": 1.0})
        await until(lambda: trained.worked == [1])
        cut()
        await asyncio.sleep(6.0)
        worker.request_stop("SIGTERM")
        await asyncio.sleep(1.0)
        heal()
        await desk.answers(1)
        await until(lambda: desk.state == ("left", False))
        assert desk.replies == [(1, [1, 0])]
        assert worker._ending is not None
        assert worker._ending.kind is EndingKind.STOPPED


@virtual_time
async def test_an_agent_that_is_stopped_while_away_ends_without_a_coordinator(
    credentials: DevelopmentCredentials,
) -> None:
    async with at_a_desk(credentials, lease_s=10.0, drain_timeout_s=12.0) as (desk, trained, worker, cut):
        desk.ask(1, {"n": 1, "for_s": 1.0})
        await until(lambda: trained.worked == [1])
        cut()
        await asyncio.sleep(6.0)
        began = asyncio.get_running_loop().time()
        worker.request_stop("SIGTERM")
        await until(lambda: worker._ending is not None)
        assert 11.9 < asyncio.get_running_loop().time() - began < 13.0
        assert worker._ending is not None
        assert worker._ending.kind is EndingKind.STOPPED


@virtual_time
@pytest.mark.parametrize("is_away", [False, True])
async def test_an_operator_drains_an_agent_for_good(credentials: DevelopmentCredentials, is_away: bool) -> None:
    async with at_a_desk(credentials, lease_s=10.0) as (desk, trained, worker, cut):
        assert not desk.fleet.drain("stranger", "no such agent")
        desk.ask(1, {"n": 1, "for_s": 3.0})
        await until(lambda: trained.worked == [1])
        if is_away:
            cut()
            desk.break_link()
            await until(lambda: desk.state == ("suspect", False))
        assert desk.fleet.drain("a", "scaling down")
        assert desk.state == ("draining", not is_away)
        heal()
        await desk.answers(1)
        await until(lambda: desk.state == ("left", False))
        assert worker._ending is not None
        assert (worker._ending.kind, worker._ending.message) == (EndingKind.STOPPED, "scaling down")
        # It does not come back.
        await asyncio.sleep(60.0)
        assert desk.state == ("left", False)
        assert not desk.fleet.drain("a", "again")


@virtual_time
async def test_secrets_are_not_logged(credentials: DevelopmentCredentials) -> None:
    with structlog.testing.capture_logs() as entries:
        async with at_a_desk(credentials, lease_s=10.0) as (desk, _, _, _):
            desk.break_link()
            await until(lambda: desk.events.count("reachable") == 2)
            secret = desk.fleet._members["a"].secret
    assert len(secret) >= 32
    assert any(entry["event"] == "agent_resumed" for entry in entries)
    assert secret not in str(entries)

"""The worker against a coordinator's end of the wire: real sockets, real TLS, in one event loop."""

import asyncio
import contextlib
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from agent_peer import PATIENCE_S, Peer, listening_peer, udp_relay
from quorate_agent import Agent, AgentInvalid, Context, Declined
from quorate_agent import backoff as backoff_module
from quorate_agent import session as session_module
from quorate_agent.events import EndingKind
from quorate_agent.worker import Ending, Worker
from quorate_protocol.errors import Code, ConfigurationError, ConnectionClosed, LocalError, Refused
from quorate_protocol.limits import BODY_BYTES_MAX, FRAME_BYTES_MAX
from quorate_protocol.messages import PULSE, Drain, Goodbye, Refusal, Resume
from quorate_protocol.transport import ClientTls


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[Peer]:
    async with listening_peer(tmp_path / "state") as peer:
        yield peer


@pytest.fixture(autouse=True)
def logged() -> Any:
    with structlog.testing.capture_logs() as entries:
        yield entries


class Running:
    """A worker that runs beside the test."""

    def __init__(self, agent: Agent, peer: Peer, **options: Any) -> None:
        options = {"agent_id": "agent-1", "token": "tok", "tls": peer.tls, "rng": random.Random(1), **options}
        self.worker = Worker(agent, options.pop("url", peer.url), **options)
        self.task = asyncio.create_task(self.worker.run())

    async def ending(self) -> Ending:
        async with asyncio.timeout(PATIENCE_S):
            return await self.task


@contextlib.asynccontextmanager
async def running(agent: Agent, peer: Peer, **options: Any) -> AsyncIterator[Running]:
    """Runs a worker, and stops it if the test has not."""
    running = Running(agent, peer, **options)
    try:
        yield running
    finally:
        running.task.cancel()
        await asyncio.gather(running.task, return_exceptions=True)
    leftover = [task for task in asyncio.all_tasks() if task.get_name() in ("session", "control", "coordination")]
    assert not leftover


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  what it asks tells nobody
            await asyncio.sleep(0.002)


def make_agent(**options: Any) -> Agent:
    """Counts: answers with what it was asked and how often it was told the truth before."""
    agent = Agent(**options)
    truths: list[Any] = []

    @agent.task("classify")
    def classify(body: Any) -> Any:
        return [body, len(truths)]

    @agent.feedback("classify")
    def learn(body: Any, truth: Any) -> None:
        truths.append((body, truth))

    return agent


# --- joining and working -------------------------------------------------------------------------


async def test_the_hello_says_who_comes(peer: Peer) -> None:
    agent = make_agent(labels={"zone": "a", "kind": "tree"})
    async with running(agent, peer, labels={"zone": "b"}):
        session = await peer.connected()
    hello = session.hello
    assert (hello.role, hello.id, hello.token) == ("agent", "agent-1", "tok")
    assert hello.labels == {"zone": "b", "kind": "tree"}
    assert hello.tasks == ["classify"]
    assert len(hello.instance) == 16
    assert hello.software.startswith("quorate-agent/")


async def test_assignments_are_answered_and_feedback_comes_before_the_next(peer: Peer) -> None:
    async with running(make_agent(), peer) as agent:
        session = await peer.joined()
        for round_id in range(1, 6):
            session.ask(round_id, {"x": round_id})
            session.tell(round_id, "truth")
        for round_id in range(1, 6):
            reply = await session.reply()
            assert (reply.round, reply.attempt, reply.status) == (round_id, 1, "replied")
            assert reply.compute_s < 1
        session.ask(6, "last")
        assert await session.answer() == ["last", 5]
        assert agent.worker.counts.feedback == 5


async def test_waiting_behind_another_handler_is_reported(peer: Peer) -> None:
    agent = Agent()
    release = threading.Event()

    @agent.task("slow")
    def slow(body: None) -> None:
        release.wait(PATIENCE_S)

    async with running(agent, peer):
        session = await peer.joined()
        session.ask(1, None, task="slow")
        session.ask(2, None, task="slow")
        await asyncio.to_thread(release.wait, 0.05)
        release.set()
        first, second = await session.reply(), await session.reply()
    assert first.waited_s == 0.0
    assert first.compute_s >= 0.03
    assert second.waited_s >= 0.03
    assert second.compute_s < first.compute_s


async def test_heartbeats_go_on_while_a_sync_handler_computes(peer: Peer) -> None:
    agent = Agent()
    release = threading.Event()
    agent.task("slow")(lambda body: release.wait(PATIENCE_S))
    async with running(agent, peer):
        session = await peer.joined(pulse_s=0.02)
        session.ask(1, None, task="slow")
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(5):
                assert await session.connection.datagrams.receive() == PULSE
        release.set()
        assert await session.answer() is True


async def test_a_failing_handler_fails_its_reply_and_the_next_is_answered(peer: Peer) -> None:
    agent = Agent()

    @agent.task("classify")
    def classify(body: str) -> Any:
        if body == "raise":
            raise ValueError("no such class\nsecond line")
        if body == "decline":
            raise Declined("not mine")
        if body == "set":
            return {1, 2}
        return body

    async with running(agent, peer):
        session = await peer.joined()
        expected = [
            ("raise", "failed", "ValueError: no such class"),
            ("decline", "declined", "not mine"),
            ("set", "failed", "the answer cannot be sent: body cannot be sent: a set has no msgpack form"),
        ]
        for round_id, (body, status, error) in enumerate(expected, start=1):
            session.ask(round_id, body)
            reply = await session.reply()
            assert (reply.round, reply.status, reply.error, reply.body) == (round_id, status, error, None)
        session.ask(9, None, task="paint")
        reply = await session.reply()
        assert (reply.status, reply.error) == ("declined", "this agent has no task 'paint'")
        session.ask(10, "fine")
        assert await session.answer() == "fine"


async def test_the_largest_answers_travel(peer: Peer) -> None:
    agent = Agent()
    agent.task("large")(lambda body: b"x" * (BODY_BYTES_MAX - 5))
    async with running(agent, peer):
        session = await peer.joined()
        for round_id in (1, 2, 3):
            session.ask(round_id, None, task="large")
        for _ in range(3):
            assert len(await session.answer()) == BODY_BYTES_MAX - 5


async def test_a_cancelled_round_interrupts_an_async_handler_and_sends_no_reply(peer: Peer) -> None:
    agent = Agent()
    began, interrupted = asyncio.Event(), asyncio.Event()

    @agent.task("wait")
    async def wait(body: Any, context: Context) -> Any:
        if body == "quick":
            return body
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            assert context.cancelled.is_set()
            interrupted.set()
            raise

    async with running(agent, peer) as agent_running:
        session = await peer.joined()
        session.ask(1, None, task="wait")
        session.ask(2, None, task="wait")
        session.ask(3, "quick", task="wait")
        async with asyncio.timeout(PATIENCE_S):
            await began.wait()
            session.cancel(2)
            session.cancel(1)
            await interrupted.wait()
        reply = await session.reply()
        assert reply.round == 3
        assert agent_running.worker.counts.cancelled == 2


async def test_a_cancelled_round_tells_a_thread(peer: Peer) -> None:
    agent = Agent()
    seen: list[bool] = []
    agent.task("wait")(lambda body, context: seen.append(context.cancelled.wait(PATIENCE_S)))
    async with running(agent, peer) as agent_running:
        session = await peer.joined()
        session.ask(1, None, task="wait")
        session.cancel(1)
        await until(lambda: seen == [True])
        assert agent_running.worker.counts.replied == 0


async def test_concurrent_assignments_run_at_once(peer: Peer) -> None:
    agent = Agent()
    barrier = threading.Barrier(3)
    agent.task("meet")(lambda body: barrier.wait(PATIENCE_S) >= 0)
    async with running(agent, peer, concurrency=3):
        session = await peer.joined()
        for round_id in (1, 2, 3):
            session.ask(round_id, None, task="meet")
        assert [await session.answer() for _ in range(3)] == [True, True, True]


async def test_feedback_of_a_round_that_is_not_remembered_is_counted(peer: Peer, logged: list[dict[str, Any]]) -> None:
    async with running(make_agent(), peer) as agent:
        session = await peer.joined()
        session.tell(77, "truth")
        session.ask(1, "x")
        assert await session.answer() == ["x", 0]
        assert agent.worker.counts.feedback_forgotten == 1
    assert any(entry.get("round") == 77 and entry["log_level"] == "warning" for entry in logged)


# --- reconnecting --------------------------------------------------------------------------------


async def test_a_session_that_cannot_be_resumed_is_over_with_its_link(peer: Peer) -> None:
    agent = Agent()
    started, release = threading.Event(), threading.Event()

    @agent.task("classify")
    def classify(body: str) -> str:
        if body == "slow":
            started.set()
            release.wait(PATIENCE_S)
        return body

    async with running(agent, peer) as agent_running:
        first = await peer.joined(session="s-1")
        first.ask(1, "slow")
        await asyncio.to_thread(started.wait, PATIENCE_S)
        await first.connection.close(Code.INTERNAL, "crash")
        second = await peer.joined(session="s-2")
        assert second.hello == first.hello, "the same process says so"
        second.ask(2, "quick")
        release.set()
        reply = await second.reply()
        assert reply.round == 2
        assert agent_running.worker.counts.lost == 1


async def test_a_session_with_a_secret_goes_on_over_another_link(peer: Peer) -> None:
    agent = Agent()
    started, release = threading.Event(), threading.Event()

    @agent.task("classify")
    def classify(body: str) -> str:
        if body == "slow":
            started.set()
            release.wait(PATIENCE_S)
        return body

    async with running(agent, peer) as agent_running:
        first = await peer.joined(session="s-1", secret="key")
        assert first.hello.resume is None
        first.ask(1, "quick")
        assert await first.answer() == "quick"
        first.ask(2, "slow")
        first.ask(3, "after it")
        await asyncio.to_thread(started.wait, PATIENCE_S)
        await until(lambda: agent_running.worker.counts.assignments == 3)
        await first.connection.close(Code.INTERNAL, "crash")
        second = await peer.connected()
        assert second.hello.resume == Resume(session="s-1", secret="key", received=3)
        assert second.hello.model_copy(update={"resume": None}) == first.hello, "the same process says so"
        # This coordinator has the first reply.
        await second.welcome("s-1", secret="key", resumed=True, received=1)
        second.ask(2, "slow")
        second.ask(3, "after it")
        second.ask(4, "new")
        release.set()
        assert [(await second.reply()).round for _ in range(3)] == [2, 3, 4]
        await second.connection.close(Code.INTERNAL, "crash")
        third = await peer.connected()
        assert third.hello.resume is not None
        assert third.hello.resume.received == 6
        # It says that it has none after the second: the others are sent again.
        await third.welcome("s-1", secret="key", resumed=True, received=2)
        assert [(await third.reply()).round for _ in range(2)] == [3, 4]
        counts = agent_running.worker.counts
        assert (counts.sessions, counts.resumed, counts.lost, counts.duplicates) == (1, 2, 0, 2)


async def test_a_session_that_the_coordinator_does_not_know_is_over(peer: Peer) -> None:
    agent = Agent()
    began = asyncio.Event()

    @agent.task("classify")
    async def classify(body: str) -> str:
        if body == "slow":
            began.set()
            await asyncio.Event().wait()
        return body

    async with running(agent, peer) as agent_running:
        first = await peer.joined(session="s-1", secret="key")
        first.ask(1, "slow")
        await asyncio.wait_for(began.wait(), PATIENCE_S)
        await first.connection.close(Code.INTERNAL, "crash")
        second = await peer.joined(session="s-2", secret="another")
        assert second.hello.resume is not None
        second.ask(1, "of the new session")
        assert await second.answer() == "of the new session"
        counts = agent_running.worker.counts
        assert (counts.sessions, counts.resumed, counts.lost) == (2, 0, 1)


async def test_a_silent_link_is_given_up_while_the_session_can_be_resumed(
    peer: Peer, logged: list[dict[str, Any]]
) -> None:
    async with udp_relay(peer.port) as relay, running(make_agent(), peer, url=f"quic://localhost:{relay.port}"):
        await peer.joined(pulse_s=0.1, lease_s=4.0, secret="key")
        relay.is_cut = True
        await until(lambda: any("nothing heard from the coordinator" in e.get("reason", "") for e in logged))
        reason = next(e["reason"] for e in logged if "nothing heard" in e.get("reason", ""))
        assert 2.0 <= float(reason.split()[-2]) < 4.0, "half of the lease"
        relay.is_cut = False
        again = await peer.connected()
        assert again.hello.resume == Resume(session="s-1", secret="key", received=0)
        await again.welcome("s-1", secret="key", resumed=True)
        again.ask(1, "x")
        assert await again.answer() == ["x", 0]


async def test_a_link_is_not_given_up_between_two_rare_pulses(peer: Peer) -> None:
    async with running(make_agent(), peer) as agent:
        session = await peer.joined(pulse_s=0.2, lease_s=0.3, secret="key")
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(5):
                await session.connection.datagrams.receive()
        assert (agent.worker.counts.sessions, agent.worker.counts.resumed) == (1, 0)
        assert not session.connection.is_closed


async def test_a_process_that_ends_closes_in_an_order_that_ends_its_session(peer: Peer) -> None:
    async with running(make_agent(), peer) as agent:
        session = await peer.joined(secret="key")
        agent.task.cancel()
        assert (await session.wait_closed()).code == Code.NO_ERROR


async def test_a_drain_for_good_ends_the_agent(peer: Peer) -> None:
    async with running(make_agent(), peer) as agent:
        session = await peer.joined(secret="key")
        session.ask(1, "x")
        session.send(session.control, Drain(reason="scaling down", stop=True))
        assert (await session.reply()).round == 1
        assert (await session.expect_goodbye()).reason == "scaling down"
        ending = await agent.ending()
    assert (ending.kind, ending.message) == (EndingKind.STOPPED, "scaling down")


async def test_an_agent_waits_for_a_coordinator_that_is_not_there_yet(
    tmp_path: Path, logged: list[dict[str, Any]]
) -> None:
    async with listening_peer(tmp_path / "state") as before:
        port = before.port
    async with running(make_agent(), before, url=f"quic://localhost:{port}"):
        await until(lambda: any(entry["event"] == "cannot_connect" for entry in logged))
        async with listening_peer(tmp_path / "state", port=port) as peer:
            session = await peer.joined()
            session.ask(1, "x")
            assert await session.answer() == ["x", 0]
    entry = next(entry for entry in logged if entry["event"] == "cannot_connect")
    assert f"quic://localhost:{port}, retrying in 0." in entry["message"]
    assert entry["reason"]
    assert 0 <= entry["retry_in_s"] <= backoff_module.BASE_S


async def test_an_untrusted_coordinator_is_not_joined(peer: Peer, tmp_path: Path, logged: list[dict[str, Any]]) -> None:
    async with listening_peer(tmp_path / "other") as other:
        stranger = ClientTls(ca_file=other.credentials.ca_file)
    async with running(make_agent(), peer, tls=stranger, max_wait_s=0.5) as agent:
        ending = await agent.ending()
    assert ending.kind is EndingKind.UNREACHABLE
    assert "not trusted" in ending.message
    assert any("not trusted" in entry.get("reason", "") for entry in logged)


async def test_giving_up_when_nobody_was_reached_in_time(tmp_path: Path) -> None:
    async with listening_peer(tmp_path / "state") as gone:
        pass
    async with running(make_agent(), gone, max_wait_s=0.3) as agent:
        ending = await agent.ending()
    assert ending.kind is EndingKind.UNREACHABLE
    assert "within 0.3 s" in ending.message
    assert gone.url in ending.message


async def test_a_coordinator_that_falls_silent_is_left(peer: Peer, logged: list[dict[str, Any]]) -> None:
    async with udp_relay(peer.port) as relay, running(make_agent(), peer, url=f"quic://localhost:{relay.port}"):
        session = await peer.joined(pulse_s=0.02, lease_s=0.2)
        session.ask(1, "x")
        assert await session.answer() == ["x", 0]
        relay.is_cut = True
        await until(lambda: any("nothing heard from the coordinator" in e.get("reason", "") for e in logged))
        relay.is_cut = False
        again = await peer.joined()
        again.ask(2, "y")
        assert await again.answer() == ["y", 0]


async def test_a_quiet_session_is_kept_by_its_heartbeats(peer: Peer) -> None:
    async with running(make_agent(), peer) as agent:
        session = await peer.joined(pulse_s=0.02, lease_s=0.1)
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(20):
                await session.connection.datagrams.receive()
        assert agent.worker.counts.sessions == 1
        session.ask(1, "x")
        assert await session.answer() == ["x", 0]


# --- refusals and the end of an id ---------------------------------------------------------------


async def test_a_wrong_token_is_the_end(peer: Peer) -> None:
    async with running(make_agent(), peer) as agent:
        session = await peer.connected()
        session.send(session.control, Refusal(reason="unauthenticated", message="wrong token"))
        ending = await agent.ending()
    assert (ending.kind, ending.refusal, ending.message) == (EndingKind.REFUSED, "unauthenticated", "wrong token")
    with pytest.raises(Refused, match="wrong token"):
        ending.raise_if_error()


async def test_a_refusal_for_now_is_tried_again(peer: Peer) -> None:
    async with running(make_agent(), peer):
        session = await peer.connected()
        session.send(session.control, Refusal(reason="draining", message="back soon", retry=True))
        again = await peer.joined()
        again.ask(1, "x")
        assert await again.answer() == ["x", 0]


async def test_a_refusal_is_read_although_the_connection_is_closed_behind_it(peer: Peer) -> None:
    async with running(make_agent(), peer) as agent:
        session = await peer.connected()
        session.send(session.control, Refusal(reason="forbidden", message="not you"))
        await until(lambda: session.control.unsent_bytes == 0 or session.connection.is_closed)
        await session.connection.close(Code.REFUSED, "not you")
        assert (await agent.ending()).kind is EndingKind.REFUSED


async def test_being_replaced_is_the_end(peer: Peer) -> None:
    async with running(make_agent(), peer) as agent:
        session = await peer.joined()
        await session.connection.close(Code.REPLACED, "")
        ending = await agent.ending()
    assert (ending.kind, ending.message) == (EndingKind.REPLACED, "another agent took the id agent-1")
    with pytest.raises(ConnectionClosed) as caught:
        ending.raise_if_error()
    assert caught.value.code == Code.REPLACED


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\x00\x00\x00\x01\xc1", Code.FRAME_MALFORMED),
        ((FRAME_BYTES_MAX + 1).to_bytes(4, "big"), Code.FRAME_TOO_LARGE),
        (b"\x00\x00\x00\x0c\x81\xa4type\xa5zebra", Code.UNKNOWN_TYPE),
        (b"\x00\x00\x00\x11\x81\xa4type\xaaassignment", Code.MESSAGE_INVALID),
        (Goodbye().to_frame(), Code.UNEXPECTED_MESSAGE),
    ],
    ids=["malformed", "large", "unknown", "invalid", "unexpected"],
)
async def test_a_coordinator_that_breaks_the_protocol_is_left_with_the_code_and_joined_again(
    peer: Peer, frame: bytes, code: Code
) -> None:
    async with running(make_agent(), peer):
        session = await peer.joined()
        session.coordination.send_nowait(frame)
        closed = await session.wait_closed()
        assert (closed.code, closed.reason) == (code, ""), "the code and never the text of an exception"
        again = await peer.joined()
        again.ask(1, "x")
        assert await again.answer() == ["x", 0]


async def test_a_frame_cut_short_ends_the_session(peer: Peer) -> None:
    async with running(make_agent(), peer):
        session = await peer.joined()
        session.coordination.send_nowait(b"\x00\x00\x00\x10\x81")
        await session.coordination.finish()
        assert (await session.wait_closed()).code == Code.FRAME_TRUNCATED
        await peer.joined()


async def test_a_coordinator_that_does_not_read_the_replies_is_left(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, logged: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(session_module, "UNSENT_BYTES_MAX", 3 << 20)
    agent = Agent()
    agent.task("large")(lambda body: b"x" * 1_000_000)
    async with running(agent, peer):
        session = await peer.joined()
        for round_id in range(1, 9):
            session.ask(round_id, None, task="large")
        await session.wait_closed()
        await peer.joined()
    assert any("does not read the replies" in entry.get("reason", "") for entry in logged)


async def test_something_else_than_a_welcome_is_left(peer: Peer) -> None:
    async with running(make_agent(), peer):
        session = await peer.connected()
        session.send(session.control, Goodbye())
        assert (await session.wait_closed()).code == Code.UNEXPECTED_MESSAGE
        await peer.joined()


# --- leaving -------------------------------------------------------------------------------------


async def test_stopping_drains_says_goodbye_and_ends(peer: Peer) -> None:
    agent = Agent()
    started, release = threading.Event(), threading.Event()

    @agent.task("slow")
    def slow(body: int) -> int:
        started.set()
        release.wait(PATIENCE_S)
        return body

    async with running(agent, peer) as agent_running:
        session = await peer.joined()
        session.ask(1, 11, task="slow")
        session.ask(2, 22, task="slow")
        await asyncio.to_thread(started.wait, PATIENCE_S)
        await until(lambda: agent_running.worker.counts.assignments == 2)
        agent_running.worker.request_stop("SIGTERM")
        agent_running.worker.request_stop("SIGTERM")
        assert (await session.from_control.next(Drain)).reason == "SIGTERM"
        session.ask(3, 33, task="slow")
        late = await session.reply()
        assert (late.round, late.status) == (3, "declined")
        release.set()
        assert [await session.answer(), await session.answer()] == [11, 22]
        assert (await session.expect_goodbye()).reason == "SIGTERM"
        assert (await session.wait_closed()).code == Code.NO_ERROR
        ending = await agent_running.ending()
    assert ending.kind is EndingKind.STOPPED
    ending.raise_if_error()


async def test_large_replies_arrive_before_the_goodbye(peer: Peer) -> None:
    agent = Agent()
    agent.task("large")(lambda body: b"x" * 900_000)
    async with running(agent, peer) as agent_running:
        session = await peer.joined()
        for round_id in range(1, 5):
            session.ask(round_id, None, task="large")
        await until(lambda: agent_running.worker.counts.replied == 4)
        agent_running.worker.request_stop("SIGTERM")
        for _ in range(4):
            assert len(await session.answer()) == 900_000
        await session.from_control.next(Drain)
        await session.expect_goodbye()
        assert (await agent_running.ending()).kind is EndingKind.STOPPED


async def test_a_handler_that_does_not_end_holds_up_nothing_beyond_the_drain_timeout(
    peer: Peer, logged: list[dict[str, Any]]
) -> None:
    agent = Agent()
    started, cancelled = threading.Event(), threading.Event()

    @agent.task("stuck")
    def stuck(body: None, context: Context) -> None:
        started.set()
        if context.cancelled.wait(PATIENCE_S):
            cancelled.set()

    async with running(agent, peer, drain_timeout_s=0.1) as agent_running:
        session = await peer.joined()
        session.ask(1, None, task="stuck")
        await asyncio.to_thread(started.wait, PATIENCE_S)
        agent_running.worker.request_stop("SIGTERM")
        ending = await agent_running.ending()
        assert await asyncio.to_thread(cancelled.wait, PATIENCE_S)
    assert ending.kind is EndingKind.STOPPED
    assert any(entry["event"] == "drain_timed_out" for entry in logged)


async def test_a_draining_coordinator_is_left_after_the_work_and_joined_again(peer: Peer) -> None:
    async with running(make_agent(), peer):
        session = await peer.joined()
        session.ask(1, "x")
        await session.answer()
        session.drain("upgrade")
        assert (await session.expect_goodbye()).reason == "upgrade"
        await session.wait_closed()
        again = await peer.joined()
        again.ask(2, "y")
        assert await again.answer() == ["y", 0]


async def test_a_coordinator_that_says_goodbye_is_joined_again(peer: Peer) -> None:
    async with running(make_agent(), peer):
        session = await peer.joined()
        session.send(session.control, Goodbye(reason="restart"))
        await session.wait_closed()
        await peer.joined()


class LongestPauses(random.Random):
    """Always draws the upper end."""

    def uniform(self, a: float, b: float) -> float:
        return b


@pytest.mark.parametrize("when", ["connecting", "pausing", "joining"])
async def test_stopping_without_a_session_ends_at_once(peer: Peer, when: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.setblocking(False)
        port = silent.getsockname()[1]
        if when == "pausing":
            silent.close()
        url = peer.url if when == "joining" else f"quic://127.0.0.1:{port}"
        async with running(make_agent(), peer, url=url, rng=LongestPauses()) as agent:
            agent.worker._backoff.failures = 10
            if when == "joining":
                await peer.connected()
            elif when == "pausing":
                await until(lambda: agent.worker._backoff.failures > 10)
            else:
                await asyncio.get_running_loop().sock_recv(silent, 1)  # something came, and nobody answers
            agent.worker.request_stop("SIGTERM")
            async with asyncio.timeout(2):
                assert (await agent.task).kind is EndingKind.STOPPED


async def test_a_stop_ends_it_in_whatever_moment_it_comes(peer: Peer) -> None:
    accepting = asyncio.create_task(_welcome_all(peer))
    for turns in range(0, 120, 4):
        async with running(make_agent(), peer) as agent:
            for _ in range(turns):
                await asyncio.sleep(0)
            agent.worker.request_stop("SIGTERM")
            async with asyncio.timeout(2):
                assert (await agent.task).kind is EndingKind.STOPPED
    accepting.cancel()


async def _welcome_all(peer: Peer) -> None:
    while True:
        with contextlib.suppress(ConnectionClosed, EOFError, TimeoutError):
            await peer.joined()


# --- embedded ------------------------------------------------------------------------------------


async def test_an_agent_runs_inside_a_program_until_cancelled(peer: Peer) -> None:
    agent = make_agent(name="embedded")
    task = asyncio.create_task(agent.run(peer.url, token="tok", tls=peer.tls))
    session = await peer.joined()
    assert session.hello.id == "embedded"
    session.ask(1, "x")
    assert await session.answer() == ["x", 0]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await session.wait_closed()).code == Code.NO_ERROR


async def test_an_embedded_agent_that_is_refused_raises(peer: Peer) -> None:
    task = asyncio.create_task(make_agent().run(peer.url, token="tok", tls=peer.tls, id="chosen"))
    session = await peer.connected()
    assert session.hello.id == "chosen"
    session.send(session.control, Refusal(reason="unauthenticated", message="wrong token"))
    with pytest.raises(Refused) as caught:
        await task
    assert caught.value.reason == "unauthenticated"


async def test_what_cannot_run_is_told_at_once(peer: Peer) -> None:
    with pytest.raises(AgentInvalid, match="no tasks"):
        Worker(Agent(), peer.url, agent_id="a", token="t")
    with pytest.raises(AgentInvalid, match="agent id"):
        Worker(make_agent(), peer.url, agent_id="two words", token="t")
    with pytest.raises(AgentInvalid, match="token: ") as caught:
        Worker(make_agent(), peer.url, agent_id="a", token="secret" * 1000)
    assert "secret" not in str(caught.value)
    with pytest.raises(LocalError, match="shorten them"):
        Worker(make_agent(), peer.url, agent_id="a", token="t", labels={f"k{n}": "x" * 4000 for n in range(60)})
    with pytest.raises(ConfigurationError, match="quic://"):
        await Worker(make_agent(), "http://localhost", agent_id="a", token="t").run()

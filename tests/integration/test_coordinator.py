"""The coordinator with real agents and operators over real QUIC: rounds, how they go wrong, and how all of it ends."""

import asyncio
import contextlib
import datetime
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from agent_peer import udp_relay
from coordination import PATIENCE_S, Fleet, coordinating, until
from quorate_agent import Agent, Declined
from quorate_agent import backoff as backoff_module
from quorate_agent.states import State
from quorate_agent.worker import Worker
from quorate_coordinator.certificates import ensure_development_credentials
from quorate_coordinator.learner.api import Answer, ClosedRound, Report
from quorate_coordinator.learner.vote import VoteLearner
from quorate_coordinator.round_numbers import RoundNumbers
from quorate_coordinator.service import Coordinator
from quorate_coordinator.settings import Settings
from quorate_protocol.channel import Channel
from quorate_protocol.errors import (
    CallFailed,
    Code,
    ConfigurationError,
    ConnectionClosed,
    Refused,
)
from quorate_protocol.messages import (
    Ask,
    Assignment,
    Cancellation,
    Drain,
    Goodbye,
    Hello,
    Outcome,
    Reply,
    Reveal,
)
from quorate_protocol.messages import Fleet as FleetListing


@pytest.fixture(autouse=True)
def logged() -> Iterator[Any]:
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with coordinating(tmp_path / "state", rounds={"deadline_s": 15.0}) as fleet:
        yield fleet


def echo(name: str, answer: Any = None, **options: Any) -> Agent:
    """Answers with what it was asked, or with `answer`."""
    agent = Agent(name, **options)

    @agent.task("echo")
    async def reply(body: Any) -> Any:
        return body if answer is None else answer

    return agent


class Gated:
    """An agent whose handler waits until it is let go."""

    def __init__(self, name: str, *, concurrency: int = 1, **options: Any) -> None:
        self.agent = Agent(name, concurrency=concurrency, **options)
        self.gate = asyncio.Event()
        self.begun = 0
        self.cancelled = 0

        @self.agent.task("echo")
        async def reply(body: Any) -> Any:
            self.begun += 1
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            return body


async def ended(task: "asyncio.Task[Any]") -> Any:
    async with asyncio.timeout(PATIENCE_S):
        return await task


def by_agent(outcome: Outcome) -> dict[str, str]:
    return {result.agent: result.status for result in outcome.results}


# --- rounds --------------------------------------------------------------------------------------


async def test_ask_combines_and_reveal_moves_the_weights(fleet: Fleet) -> None:
    await fleet.join(echo("a", "yes"), echo("b", "yes"), echo("c", "no"))
    operator = await fleet.operator()
    outcome = await operator.ask("echo", {"x": 1.5}, quorum=1.0)
    assert (outcome.state, outcome.value, outcome.quorum, outcome.reason) == ("complete", "yes", 3, "")
    assert [(result.agent, result.status, result.value) for result in outcome.results] == [
        ("a", "replied", "yes"),
        ("b", "replied", "yes"),
        ("c", "replied", "no"),
    ]
    assert outcome.support == pytest.approx(2 / 3)
    assert all(result.weight == pytest.approx(1 / 3) for result in outcome.results)
    for result in outcome.results:
        assert result.latency_s is not None
        assert 0 < result.latency_s <= outcome.duration_s
    revealed = await operator.reveal(outcome.round, "no")
    assert (revealed.correct, revealed.right) == (False, {"a": False, "b": False, "c": True})
    assert revealed.weights["c"] > revealed.weights["a"] == revealed.weights["b"]
    later = await operator.ask("echo", None)
    assert {result.agent: result.weight for result in later.results} == pytest.approx(dict(revealed.weights))
    assert later.round == outcome.round + 1


async def test_bodies_travel_as_they_are(fleet: Fleet) -> None:
    await fleet.join(echo("a"))
    operator = await fleet.operator()
    for value in (None, True, 0, -(1 << 63), 1.5, "ü", b"\0\xff", [1, [2]], {"a": {"b": None}}, {}, "", "x" * 900_000):
        assert (await operator.ask("echo", value)).value == value


async def test_feedback_comes_before_the_next_assignment(fleet: Fleet) -> None:
    seen: dict[str, list[Any]] = {"a": [], "b": []}

    def learner(name: str) -> Agent:
        agent = Agent(name)

        @agent.task("classify")
        def classify(body: int) -> int:
            seen[name].append(("asked", body))
            return body

        @agent.feedback("classify")
        def learn(body: int, truth: int) -> None:
            seen[name].append(("told", body, truth))

        return agent

    await fleet.join(learner("a"), learner("b"))
    operator = await fleet.operator()
    for number in range(20):
        outcome = await operator.ask("classify", number, quorum=1.0)
        await operator.reveal(outcome.round, -number)
    await operator.ask("classify", 20, quorum=1.0)
    expected = [step for n in range(20) for step in (("asked", n), ("told", n, -n))] + [("asked", 20)]
    assert seen == {"a": expected, "b": expected}


async def test_fifty_asks_at_once_get_their_own_answers(fleet: Fleet) -> None:
    await fleet.join(*(echo(f"agent-{n}", concurrency=8) for n in range(3)))
    operator, other = await fleet.operator(), await fleet.operator()
    outcomes = await asyncio.gather(*((operator, other)[n % 2].ask("echo", {"n": n}, quorum=1.0) for n in range(50)))
    assert [outcome.value for outcome in outcomes] == [{"n": n} for n in range(50)]
    assert {outcome.state for outcome in outcomes} == {"complete"}
    assert sorted(outcome.round for outcome in outcomes) == list(range(1, 51))
    truths = await asyncio.gather(*(operator.reveal(outcome.round, {"n": 7}) for outcome in outcomes))
    assert [revealed.correct for revealed in truths] == [n == 7 for n in range(50)]


async def test_labels_choose_whom_to_ask(fleet: Fleet) -> None:
    await fleet.join(
        echo("a", labels={"zone": "a", "kind": "tree"}), echo("b", labels={"zone": "b", "kind": "tree"}), echo("c")
    )
    operator = await fleet.operator()
    assert list(by_agent(await operator.ask("echo", 1, quorum=1.0, labels={"zone": "b"}))) == ["b"]
    assert list(by_agent(await operator.ask("echo", 1, quorum=1.0, labels={"kind": "tree"}))) == ["a", "b"]
    with pytest.raises(CallFailed, match="no connected agent with labels zone=c does the task 'echo'") as caught:
        await operator.ask("echo", 1, labels={"zone": "c"})
    assert (caught.value.reason, caught.value.retry) == ("no-agents", True)


async def test_nobody_to_ask_is_told_at_once(fleet: Fleet) -> None:
    operator = await fleet.operator()
    with pytest.raises(CallFailed, match="no connected agent does the task 'echo'") as caught:
        await operator.ask("echo", 1)
    assert (caught.value.reason, caught.value.retry) == ("no-agents", True)
    await fleet.join(echo("a"))
    with pytest.raises(CallFailed, match="no connected agent does the task 'paint'"):
        await operator.ask("paint", 1)


@pytest.mark.parametrize(
    ("quorum", "needed"), [(1, 1), (3, 3), (4, 4), (0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (1.0, 4)], ids=str
)
async def test_quorum_as_count_and_as_share(fleet: Fleet, quorum: int | float, needed: int) -> None:
    gated = [Gated(f"g{n}") for n in range(4)]
    await fleet.join(*(one.agent for one in gated))
    operator = await fleet.operator()
    asking = asyncio.create_task(operator.ask("echo", 1, quorum=quorum, grace_s=0.0))
    await until(lambda: all(one.begun for one in gated))
    for one in gated[: needed - 1]:
        one.gate.set()
    # The question and each reply are one byte long.
    await until(lambda: fleet.coordinator._gatherer.book.held_bytes == 1 + needed - 1)
    assert not asking.done()
    gated[needed - 1].gate.set()
    outcome = await ended(asking)
    assert outcome.quorum == needed
    assert outcome.state == ("complete" if needed == 4 else "quorate")
    statuses = list(by_agent(outcome).values())
    assert (statuses.count("replied"), statuses.count("cancelled")) == (needed, 4 - needed)


@pytest.mark.parametrize(
    ("options", "problem", "retry"),
    [
        ({"quorum": 3}, "quorum: 3 is over the 2 selected", True),  # more may come
        ({"grace_s": 2.0, "deadline_s": 1.0}, "grace_s: 2 s is past the deadline of 1 s", False),
        ({"grace_s": 16.0}, "grace_s: 16 s is past the deadline of 15 s", False),
    ],
    ids=["quorum", "grace", "grace-default"],
)
async def test_a_policy_that_contradicts_itself_is_refused(
    fleet: Fleet, options: Any, problem: str, retry: bool
) -> None:
    await fleet.join(echo("a"), echo("b"))
    operator = await fleet.operator()
    with pytest.raises(CallFailed, match=problem) as caught:
        await operator.ask("echo", 1, **options)
    assert (caught.value.reason, caught.value.retry) == ("bad-request", retry)
    assert (await operator.agents()).rounds_closed == {}


async def test_quorum_both_ways_is_refused(fleet: Fleet) -> None:
    await fleet.join(echo("a"))
    operator = await fleet.operator()
    request = Ask(task="echo", body=b"\xc0", quorum=1, quorum_fraction=0.5)
    with pytest.raises(CallFailed, match="given both as a count and as a fraction"):
        await operator._call(request, Outcome)


async def test_grace_is_what_stragglers_get(fleet: Fleet) -> None:
    slow = Gated("slow")
    await fleet.join(echo("a"), echo("b"), slow.agent)
    operator = await fleet.operator()
    outcome = await operator.ask("echo", 1, quorum=2, grace_s=0.05)
    assert (outcome.state, by_agent(outcome)) == ("quorate", {"a": "replied", "b": "replied", "slow": "cancelled"})
    assert outcome.duration_s >= 0.05
    await until(lambda: slow.cancelled == 1)
    asking = asyncio.create_task(operator.ask("echo", 1, quorum=2, grace_s=10.0))
    await until(lambda: slow.begun == 2)
    slow.gate.set()
    assert (await ended(asking)).state == "complete"


async def test_the_deadline_ends_the_wait_for_an_agent_that_hangs(fleet: Fleet) -> None:
    hanging = Gated("hanging")
    await fleet.join(echo("a"), hanging.agent)
    operator = await fleet.operator()
    expired = await operator.ask("echo", 1, quorum=2, deadline_s=0.1)
    assert (expired.state, expired.answer, expired.support) == ("expired", None, None)
    assert expired.reason == "1 of 2 replies needed had come at the deadline of 0.1 s"
    assert by_agent(expired) == {"a": "replied", "hanging": "late"}
    quorate = await operator.ask("echo", 2, quorum=1, grace_s=0.1, deadline_s=0.1)
    assert (quorate.state, quorate.value) == ("quorate", 2)
    # It was told to stop, has stopped, and is as good as ever.
    await until(lambda: hanging.cancelled == hanging.begun >= 1)
    assert sorted(fleet.connected) == ["a", "hanging"]
    hanging.gate.set()
    assert by_agent(await operator.ask("echo", 3, quorum=1.0)) == {"a": "replied", "hanging": "replied"}


async def test_an_agent_that_raises_or_declines_spoils_its_own_part_only(fleet: Fleet) -> None:
    raising, declining = Agent("raising"), Agent("declining")

    @raising.task("echo")
    def fail(body: Any) -> Any:
        raise ValueError("no such class\nand more")

    @declining.task("echo")
    def decline(body: Any) -> Any:
        raise Declined("not mine")

    await fleet.join(echo("a"), raising, declining)
    operator = await fleet.operator()
    outcome = await operator.ask("echo", 1, quorum=1)
    assert (outcome.state, outcome.value) == ("quorate", 1)
    assert [(result.agent, result.status, result.error) for result in outcome.results] == [
        ("a", "replied", ""),
        ("declining", "declined", "not mine"),
        ("raising", "failed", "ValueError: no such class"),
    ]
    failed = await operator.ask("echo", 1, quorum=2)
    assert (failed.state, failed.answer) == ("failed", None)
    assert failed.reason.startswith("quorum of 2 is out of reach: of 3 selected")
    assert failed.duration_s < 5
    assert sorted(fleet.connected) == ["a", "declining", "raising"]


async def test_an_agent_that_dies_is_lost_and_the_round_goes_on(fleet: Fleet) -> None:
    dying, living = Gated("dying"), Gated("living")
    await fleet.join(dying.agent, living.agent)
    operator = await fleet.operator()
    asking = asyncio.create_task(operator.ask("echo", 1, quorum=1))
    await until(lambda: dying.begun and living.begun)
    await fleet.stop("dying")
    await until(lambda: "dying" not in fleet.connected)
    assert not asking.done()
    living.gate.set()
    outcome = await ended(asking)
    assert (outcome.state, outcome.value) == ("quorate", 1)
    assert by_agent(outcome) == {"dying": "lost", "living": "replied"}
    assert "connection closed by the peer" in outcome.results[0].error


async def test_when_all_die_the_round_fails_at_once(fleet: Fleet) -> None:
    gated = [Gated("a"), Gated("b")]
    await fleet.join(*(one.agent for one in gated))
    operator = await fleet.operator()
    asking = asyncio.create_task(operator.ask("echo", 1, deadline_s=1000.0))
    await until(lambda: all(one.begun for one in gated))
    await fleet.stop("a")
    await fleet.stop("b")
    outcome = await ended(asking)
    assert (outcome.state, outcome.reason) == ("failed", "quorum of 1 is out of reach: of 2 selected 2 lost")


async def test_an_agent_that_is_silent_beyond_its_lease_is_lost(tmp_path: Path) -> None:
    async with coordinating(tmp_path, sessions={"pulse_s": 0.05, "lease_s": 0.4}) as fleet:
        peer = await fleet.peer()
        await peer.join("silent")
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        outcome = await operator.ask("echo", 1, quorum=2)
        assert (outcome.state, by_agent(outcome)) == ("failed", {"a": "replied", "silent": "lost"})
        assert "not heard for 0." in outcome.results[1].error
        # The one that pulses stays.
        assert fleet.connected == ["a"]
        assert fleet.infos()["silent"].state == "lost"
        closed = await peer.closed()
        assert closed.code == Code.LEASE_EXPIRED


# --- identity and trust --------------------------------------------------------------------------


async def test_a_second_agent_of_the_same_id_takes_over(fleet: Fleet) -> None:
    first = Gated("twin")
    await fleet.join(first.agent)
    operator = await fleet.operator()
    asking = asyncio.create_task(operator.ask("echo", 1))
    await until(lambda: first.begun)
    old = fleet.agents.pop("twin")
    await fleet.join(echo("twin", "second"), wait=False)
    outcome = await ended(asking)
    assert (outcome.state, by_agent(outcome)) == ("failed", {"twin": "lost"})
    assert outcome.results[0].error == "replaced by a new link"
    with pytest.raises(ConnectionClosed, match="another agent took the id twin") as caught:
        await ended(old)
    assert caught.value.code == Code.REPLACED
    assert (await operator.ask("echo", 1)).value == "second"
    assert fleet.connected == ["twin"]


async def test_a_wrong_token_is_refused_and_told_why(fleet: Fleet) -> None:
    with pytest.raises(Refused, match="the token is not this coordinator's") as caught:
        await fleet.operator(token="wrong")
    assert (caught.value.reason, caught.value.retry) == ("unauthenticated", False)
    with pytest.raises(Refused) as caught:
        await ended(asyncio.create_task(echo("a").run(fleet.url, token=fleet.token[:-1], tls=fleet.tls)))
    assert caught.value.reason == "unauthenticated"
    assert fleet.infos() == {}
    assert fleet.metrics()["quorate_handshakes_total", "unauthenticated"] == 2


async def test_the_token_is_never_logged(fleet: Fleet, logged: list[dict[str, Any]]) -> None:
    await fleet.join(echo("a"))
    with pytest.raises(Refused):
        await fleet.operator(token="not-this-one")
    await fleet.operator()
    text = repr(logged)
    assert "unauthenticated" in text
    assert fleet.token not in text
    assert "not-this-one" not in text


async def test_a_refused_client_that_stays_is_closed(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quorate_coordinator.service._REFUSAL_TIMEOUT_S", 0.05)
    peer = await fleet.peer()
    control = Channel(await peer.open())
    await control.send(Hello(role="operator", id="x", token="wrong"))
    assert (await peer.closed()).code == Code.REFUSED


async def test_who_says_nothing_is_closed(tmp_path: Path) -> None:
    async with coordinating(tmp_path, sessions={"hello_timeout_s": 0.1}) as fleet:
        silent, hesitant = await fleet.peer(), await fleet.peer()
        await Channel(await hesitant.open()).stream.send(b"\0\0")
        for peer in (silent, hesitant):
            closed = await peer.closed()
            assert (closed.code, closed.reason) == (Code.REFUSED, "no hello within 0.1 s")
        assert fleet.metrics()["quorate_handshakes_total", "timeout"] == 2


async def test_an_agent_that_never_opens_its_stream_is_closed(tmp_path: Path) -> None:
    async with coordinating(tmp_path, sessions={"hello_timeout_s": 0.1}) as fleet:
        peer = await fleet.peer()
        await peer.hello("half")
        assert (await peer.closed()).code == Code.UNEXPECTED_MESSAGE
        await until(lambda: fleet.infos()["half"].state == "lost")


async def test_an_observer_may_only_look(fleet: Fleet) -> None:
    await fleet.join(echo("a"))
    observer = await fleet.operator(role="observer")
    assert [info.agent for info in (await observer.agents()).agents] == ["a"]
    for call in (observer.ask("echo", 1), observer.reveal(1, 1)):
        with pytest.raises(CallFailed, match="an observer may not") as caught:
            await call
        assert (caught.value.reason, caught.value.retry) == ("forbidden", False)
    metrics = fleet.metrics()
    assert metrics["quorate_calls_total", "ask", "forbidden"] == 1
    assert metrics["quorate_calls_total", "agents", "ok"] == 1


async def test_more_agents_than_there_may_be_are_refused_for_now(fleet: Fleet) -> None:
    fleet.coordinator._fleet.registry._agents_max = 1  # type: ignore[misc]  # as if thousands had come
    await fleet.join(echo("a"))
    peer = await fleet.peer()
    control = Channel(await peer.open())
    await control.send(Hello(id="b", token=fleet.token))
    refusal = await control.receive()
    assert refusal is not None
    assert refusal.model_dump() == {
        "reason": "full",
        "message": "1 agents are connected, as many as there may be",
        "retry": True,
    }
    await peer.leave()
    metrics = fleet.metrics()
    assert metrics["quorate_handshakes_total", "full"] == 1
    assert metrics["quorate_handshakes_total", "welcome"] == 1


# --- reveal --------------------------------------------------------------------------------------


async def test_a_truth_is_told_once_and_of_rounds_that_are_over(fleet: Fleet) -> None:
    gated = Gated("a")
    await fleet.join(gated.agent)
    operator = await fleet.operator()

    async def reason(round_id: int, truth: Any = 1) -> tuple[str, bool]:
        with pytest.raises(CallFailed) as caught:
            await operator.reveal(round_id, truth)
        return caught.value.reason, caught.value.retry

    assert await reason(1) == ("unknown-round", False)
    asking = asyncio.create_task(operator.ask("echo", 1))
    await until(lambda: gated.begun)
    assert await reason(1) == ("still-open", True)
    gated.gate.set()
    assert (await ended(asking)).round == 1
    assert (await operator.reveal(1, 1)).correct is True
    assert await reason(1) == ("already-revealed", False)
    with pytest.raises(CallFailed, match="truth: body is not one msgpack value") as caught:
        await operator._call(Reveal(round=1, truth=b"\xc1"), Outcome)
    assert caught.value.reason == "bad-request"


async def test_the_truth_of_a_round_without_an_answer_teaches_and_has_none(fleet: Fleet) -> None:
    asked: list[int] = []
    told: list[Any] = []
    agent = Agent("a")

    @agent.task("classify")
    async def classify(body: int) -> int:
        asked.append(body)
        if len(asked) == 1:
            raise Declined("not yet")
        return body

    @agent.feedback("classify")
    async def learn(body: int, truth: int) -> None:
        told.append((body, truth))

    await fleet.join(agent)
    operator = await fleet.operator()
    outcome = await operator.ask("classify", 5)
    assert outcome.state == "failed"
    revealed = await operator.reveal(outcome.round, 6)
    assert (revealed.correct, revealed.right, revealed.weights) == (None, {}, {})
    await operator.ask("classify", 7)
    assert told == [(5, 6)]


async def test_only_so_many_rounds_wait_for_their_truth(tmp_path: Path) -> None:
    async with coordinating(tmp_path, rounds={"remembered_max": 2}) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        rounds = [(await operator.ask("echo", n)).round for n in range(3)]
        with pytest.raises(CallFailed, match="round 1 is not remembered any more") as caught:
            await operator.reveal(rounds[0], 0)
        assert caught.value.reason == "unknown-round"
        assert [(await operator.reveal(round_id, 1)).correct for round_id in rounds[1:]] == [True, False]
        assert fleet.coordinator._gatherer.ledger.answers == 0


# --- operators who leave -------------------------------------------------------------------------


async def test_an_operator_that_leaves_takes_its_rounds_along(fleet: Fleet) -> None:
    gated = Gated("a", concurrency=4)
    await fleet.join(gated.agent)
    staying, leaving = await fleet.operator(), await fleet.operator()
    kept = asyncio.create_task(staying.ask("echo", "kept"))
    given_up = [asyncio.create_task(leaving.ask("echo", n)) for n in range(2)]
    await until(lambda: gated.begun == 3)
    await leaving.close()
    for task in given_up:
        with pytest.raises(ConnectionClosed):
            await ended(task)
    await until(lambda: gated.cancelled == 2)
    gated.gate.set()
    assert (await ended(kept)).value == "kept"
    assert (await staying.agents()).rounds_closed == {"cancelled": 2, "complete": 1}
    assert fleet.metrics()["quorate_calls_total", "ask", "withdrawn"] == 2


async def test_an_operator_that_resets_its_call_withdraws_it(fleet: Fleet) -> None:
    gated = Gated("a")
    await fleet.join(gated.agent)
    operator = await fleet.operator()
    asking = asyncio.create_task(operator.ask("echo", 1))
    await until(lambda: gated.begun)
    asking.cancel()
    await until(lambda: gated.cancelled)
    gated.gate.set()
    assert (await operator.ask("echo", 2)).value == 2
    assert (await operator.agents()).rounds_closed == {"cancelled": 1, "complete": 1}
    assert (await operator.reveal(1, 1)).right == {}


async def test_an_operator_may_finish_its_side_and_go_on_listening(fleet: Fleet) -> None:
    gated = Gated("a")
    await fleet.join(gated.agent)
    peer = await fleet.peer()
    await peer.hello("op", role="operator")
    call = Channel(await peer.open())
    await call.send(Ask(task="echo", body=b"\x01"))
    await call.finish()
    await until(lambda: gated.begun)
    gated.gate.set()
    assert (await peer.take(call, Outcome)).value == 1
    assert await call.receive() is None
    await peer.leave()


async def test_an_operator_that_ends_its_control_stream_has_left(fleet: Fleet) -> None:
    gated = Gated("a")
    await fleet.join(gated.agent)
    for word in (None, Goodbye(reason="done")):
        peer = await fleet.peer()
        await peer.hello("op", role="operator")
        call = Channel(await peer.open())
        await call.send(Ask(task="echo", body=b"\x01"))
        begun = gated.begun
        await until(lambda begun=begun: gated.begun > begun)
        if word is not None:
            await peer.control.send(word)
        await peer.control.finish()
        assert (await peer.closed()).code == Code.NO_ERROR
    await until(lambda: gated.cancelled == 2)


async def test_calls_over_the_ceiling_are_refused_as_busy(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quorate_coordinator.operators.CALLS_MAX", 2)
    gated = Gated("a", concurrency=4)
    await fleet.join(gated.agent)
    operator = await fleet.operator()
    kept = [asyncio.create_task(operator.ask("echo", n)) for n in range(2)]
    await until(lambda: gated.begun == 2)
    with pytest.raises(CallFailed, match="2 calls of this connection are under way") as caught:
        await operator.ask("echo", 2)
    assert (caught.value.reason, caught.value.retry) == ("busy", True)
    gated.gate.set()
    assert [(await ended(task)).value for task in kept] == [0, 1]
    assert (await operator.ask("echo", 3)).value == 3


# --- bounds --------------------------------------------------------------------------------------


async def test_rounds_over_the_ceiling_are_refused_as_busy(tmp_path: Path) -> None:
    async with coordinating(tmp_path, rounds={"in_flight_max": 2}) as fleet:
        gated = Gated("a", concurrency=4)
        await fleet.join(gated.agent)
        operator = await fleet.operator()
        kept = [asyncio.create_task(operator.ask("echo", n)) for n in range(2)]
        await until(lambda: gated.begun == 2)
        with pytest.raises(CallFailed, match="2 rounds are in flight, as many as there may be") as caught:
            await operator.ask("echo", 2)
        assert (caught.value.reason, caught.value.retry) == ("busy", True)
        gated.gate.set()
        assert [(await ended(task)).value for task in kept] == [0, 1]
        assert (await operator.ask("echo", 3)).value == 3
        assert fleet.metrics()["quorate_calls_total", "ask", "busy"] == 1


async def test_a_clock_that_is_set_back_does_not_hide_the_fleet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with coordinating(tmp_path) as fleet:
        operator = await fleet.operator()
        monkeypatch.setattr("time.time", lambda: 1e9)
        assert 0.0 <= (await operator.agents()).uptime_s < PATIENCE_S


async def test_an_agent_that_owes_too_much_is_left_out(tmp_path: Path) -> None:
    async with coordinating(tmp_path, rounds={"in_flight_per_agent_max": 2}) as fleet:
        slow = Gated("slow")
        await fleet.join(slow.agent)
        operator = await fleet.operator()
        kept = [asyncio.create_task(operator.ask("echo", n)) for n in range(2)]
        await until(lambda: fleet.coordinator.list_fleet().rounds_open == 2)
        with pytest.raises(CallFailed, match="every agent that does 'echo' has 2 rounds waiting") as caught:
            await operator.ask("echo", 2)
        assert (caught.value.reason, caught.value.retry) == ("busy", True)
        await fleet.join(echo("quick"))
        assert by_agent(await operator.ask("echo", 2)) == {"quick": "replied"}
        slow.gate.set()
        assert [(await ended(task)).value for task in kept] == [0, 1]


async def test_an_outcome_that_is_over_a_frame_comes_whole(fleet: Fleet) -> None:
    large = {"a": "x" * 500_000, "b": "x" * 500_000, "c": "y" * 300_000, "d": "small"}
    await fleet.join(*(echo(name, answer) for name, answer in large.items()))
    operator = await fleet.operator()
    outcome = await operator.ask("echo", 1, quorum=1.0)
    assert (outcome.state, outcome.value) == ("complete", large["a"])
    told = {result.agent: (result.status, result.value, result.error) for result in outcome.results}
    assert told == {name: ("replied", answer, "") for name, answer in large.items()}
    assert [result.agent for result in outcome.results if result.bulk is not None] == ["a", "b"]
    assert (await operator.reveal(outcome.round, large["a"])).right == {"a": True, "b": True, "c": False, "d": False}
    assert "quorate_protocol_errors_total" not in {key[0] for key, value in fleet.metrics().items() if value}


async def test_agents_with_very_many_labels_do_not_hide_the_others(fleet: Fleet) -> None:
    labels = {f"k{n}": "v" * 3000 for n in range(20)}
    await fleet.join(*(echo(f"agent-{n:02}", labels=labels) for n in range(18)), echo("slim"))
    operator = await fleet.operator()
    listing = await operator.agents()
    # Of 60 kB each, 17 have room; any that takes less has, too.
    assert (len(listing.agents), listing.left_out, listing.agents[-1].agent) == (18, 1, "slim")
    assert len((await operator.ask("echo", 1, quorum=1.0)).results) == 19


# --- the learner's faults ------------------------------------------------------------------------


class FaultyLearner(VoteLearner):
    """A learner with a bug in it."""

    def combine(self, outcome: ClosedRound) -> Answer:
        if outcome.replies[0].body == b"\x0d":
            raise ZeroDivisionError("combine")
        return super().combine(outcome)

    def learn(self, outcome: ClosedRound, truth: bytes) -> Report:
        if truth == b"\x0d":
            raise ZeroDivisionError("learn")
        return super().learn(outcome, truth)


async def test_a_learner_that_raises_costs_the_answer_and_not_the_round(
    tmp_path: Path, logged: list[dict[str, Any]]
) -> None:
    settings = Settings(listen="127.0.0.1:0", http="", state_dir=tmp_path)
    async with Coordinator(settings, learner=FaultyLearner()) as coordinator:
        fleet = Fleet(coordinator, tmp_path)
        try:
            await fleet.join(echo("a"))
            operator = await fleet.operator()
            outcome = await operator.ask("echo", 13)
            assert (outcome.state, outcome.answer, by_agent(outcome)) == ("complete", None, {"a": "replied"})
            assert (await operator.reveal(outcome.round, 13 + 1)).correct is None
            outcome = await operator.ask("echo", 1)
            with pytest.raises(CallFailed, match=f"the learner failed to learn from round {outcome.round}") as caught:
                await operator.reveal(outcome.round, 13)
            assert caught.value.reason == "internal"
            assert (await operator.ask("echo", 2)).value == 2
            assert fleet.connected == ["a"]
        finally:
            await fleet.close()
    events = [entry["event"] for entry in logged]
    assert "learner_failed_to_combine" in events
    assert "learner_failed_to_learn" in events


async def test_a_disk_that_is_full_costs_no_outcome(
    fleet: Fleet, logged: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(numbers: RoundNumbers, number: int) -> None:
        raise ConfigurationError("state_dir", "cannot write: No space left on device")

    monkeypatch.setattr(RoundNumbers, "use", use)
    await fleet.join(echo("a"))
    operator = await fleet.operator()
    outcome = await operator.ask("echo", 1)
    assert (outcome.state, outcome.value) == ("complete", 1)
    assert (await operator.reveal(outcome.round, 1)).correct is True
    assert "round_numbers_not_reserved" in [entry["event"] for entry in logged]


# --- the end -------------------------------------------------------------------------------------


async def test_draining_refuses_what_is_new_and_finishes_what_is_not(fleet: Fleet) -> None:
    gated = Gated("a")
    await fleet.join(gated.agent)
    operator = await fleet.operator()
    asking = asyncio.create_task(operator.ask("echo", "last"))
    await until(lambda: gated.begun)
    draining = asyncio.create_task(fleet.coordinator.drain())
    await until(lambda: not fleet.coordinator.is_ready)
    with pytest.raises(CallFailed, match="draining") as caught:
        await operator.ask("echo", "new")
    assert (caught.value.reason, caught.value.retry) == ("draining", True)
    # To look is when one wants most.
    assert (await (await fleet.operator(role="observer")).agents()).draining
    assert not draining.done()
    gated.gate.set()
    assert (await ended(asking)).value == "last"
    assert await ended(draining) is True


async def test_a_truth_may_be_told_while_draining(fleet: Fleet) -> None:
    gated = Gated("a")
    await fleet.join(gated.agent, echo("b"))
    operator = await fleet.operator()
    first = await operator.ask("echo", 1, quorum=1, grace_s=0.0)
    asking = asyncio.create_task(operator.ask("echo", 2, quorum=2))
    await until(lambda: fleet.coordinator.list_fleet().rounds_open)
    draining = asyncio.create_task(fleet.coordinator.drain())
    await until(lambda: not fleet.coordinator.is_ready)
    assert (await operator.reveal(first.round, 1)).correct is True
    gated.gate.set()
    await ended(asking)
    await ended(draining)


async def test_what_does_not_finish_in_time_is_interrupted_and_told(fleet: Fleet) -> None:
    gated = Gated("a")
    await fleet.join(gated.agent, echo("b"))
    operator = await fleet.operator()
    asking = asyncio.create_task(operator.ask("echo", 1, quorum=2))
    await until(lambda: gated.begun)
    assert await fleet.coordinator.drain(0.05) is False
    outcome = await ended(asking)
    assert (outcome.state, outcome.reason) == ("interrupted", "the coordinator was stopped")
    assert by_agent(outcome) == {"a": "cancelled", "b": "replied"}


async def test_closing_tells_operators_their_outcome_and_agents_goodbye(fleet: Fleet) -> None:
    gated = Gated("a")
    await fleet.join(gated.agent)
    peer = await fleet.peer()
    await peer.join("raw")
    operator = await fleet.operator()
    asking = asyncio.create_task(operator.ask("echo", 1))
    await until(lambda: gated.begun)
    await peer.take(peer.coordination, Assignment)
    closing = asyncio.create_task(fleet.coordinator.close())
    assert (await ended(asking)).state == "interrupted"
    await peer.take(peer.coordination, Cancellation)
    assert (await peer.take(peer.control, Goodbye)).reason == "the coordinator stops"
    assert (await peer.closed()).code == Code.SHUTDOWN
    await ended(closing)
    with pytest.raises(ConnectionClosed) as caught:
        await operator.agents()
    assert caught.value.code == Code.SHUTDOWN


async def test_closing_does_not_wait_for_who_does_not_listen(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as fleet, udp_relay(fleet.port) as relay:
        deaf = await fleet.peer(port=relay.port)
        await deaf.join("deaf")
        await until(lambda: fleet.connected == ["deaf"])
        operator = await fleet.peer()
        await operator.hello("op", role="operator")
        await (await operator.open()).send(b"\0")  # a call without a request
        relay.is_cut = True
        async with asyncio.timeout(5):
            await fleet.coordinator.close()
        await deaf.leave()


async def test_a_coordinator_that_never_started_can_be_closed(tmp_path: Path) -> None:
    await Coordinator(Settings(listen="127.0.0.1:0", http="", state_dir=tmp_path)).close()


async def test_an_address_that_is_taken_is_named(fleet: Fleet, tmp_path: Path) -> None:
    listen = f"127.0.0.1:{fleet.port}"
    with pytest.raises(ConfigurationError, match=f"listen: cannot listen on {listen}: Address already in use"):
        async with Coordinator(Settings(listen=listen, http="", state_dir=tmp_path)):
            pass


async def test_agents_come_back_by_themselves_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff_module.compute_delay_s, "__kwdefaults__", {"base_s": 0.05, "max_s": 0.1})
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(coordinating(tmp_path))
        agents = [echo("a"), echo("b")]
        running = [
            asyncio.create_task(agent.run(first.url, token=first.token, tls=first.tls), name=str(agent))
            for agent in agents
        ]
        try:
            await until(lambda: len(first.connected) == 2)
            await first.coordinator.close()
            async with Coordinator(
                Settings(listen=f"127.0.0.1:{first.port}", http="", state_dir=tmp_path)
            ) as coordinator:
                again = Fleet(coordinator, tmp_path)
                await until(lambda: len(again.connected) == 2)
                operator = await again.operator()
                outcome = await operator.ask("echo", "again", quorum=1.0)
                assert (outcome.state, outcome.value, len(outcome.results)) == ("complete", "again", 2)
                await again.close()
        finally:
            for task in running:
                task.cancel()
            await asyncio.wait(running)


# --- agents who leave ----------------------------------------------------------------------------


async def test_an_agent_that_drains_gets_nothing_new_and_finishes_what_it_has(fleet: Fleet) -> None:
    peer = await fleet.peer()
    await peer.join("leaving")
    await fleet.join(echo("staying"))
    operator = await fleet.operator()
    asking = asyncio.create_task(operator.ask("echo", 1, quorum=2))
    assignment = await peer.take(peer.coordination, Assignment)
    await peer.control.send(Drain(reason="upgrade"))
    await until(lambda: fleet.infos()["leaving"].state == "draining")
    assert by_agent(await operator.ask("echo", 2)) == {"staying": "replied"}
    await peer.coordination.send(Reply(round=assignment.round, body=b"\x01"))
    assert (await ended(asking)).state == "complete"
    await peer.coordination.finish()
    await peer.control.send(Goodbye(reason="upgrade"))
    await peer.control.finish()
    closed = await peer.closed()
    assert closed.code == Code.NO_ERROR
    assert fleet.infos()["leaving"].state == "left"


async def test_a_goodbye_does_not_swallow_the_replies_that_it_overtakes(fleet: Fleet) -> None:
    peer = await fleet.peer()
    await peer.join("leaving")
    operator = await fleet.operator()
    asking = asyncio.create_task(operator.ask("echo", 1))
    assignment = await peer.take(peer.coordination, Assignment)
    # In one go: the control stream goes first on the wire.
    await peer.control.send(Goodbye())
    await until(lambda: fleet.infos()["leaving"].state == "draining")
    await peer.coordination.send(Reply(round=assignment.round, body=b"\x07"))
    await peer.coordination.finish()
    assert (await ended(asking)).value == 7
    await until(lambda: fleet.infos()["leaving"].state == "left")
    await peer.closed()


async def test_an_agent_that_ends_its_stream_without_goodbye_is_lost(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quorate_coordinator.fleet.LEAVE_TIMEOUT_S", 0.05)
    peer = await fleet.peer()
    await peer.join("odd")
    await peer.coordination.finish()
    await peer.closed()
    await until(lambda: fleet.infos()["odd"].state == "lost")


async def test_agents_that_stop_are_seen_to_have_left(fleet: Fleet) -> None:
    worker = Worker(echo("a"), fleet.url, agent_id="a", token=fleet.token, tls=fleet.tls)
    running = asyncio.create_task(worker.run())
    await until(lambda: worker.state is State.ACTIVE)
    worker.request_stop("enough")
    ending = await ended(running)
    assert ending.kind.value == "stopped"
    await until(lambda: fleet.infos()["a"].state == "left")


# --- the certificate -----------------------------------------------------------------------------


async def test_the_certificate_is_renewed_while_it_runs(
    tmp_path: Path, logged: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quorate_coordinator.service._CERTIFICATE_CHECK_S", 0.02)

    def events() -> list[str]:
        return [entry["event"] for entry in logged]

    async with coordinating(tmp_path) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        before = contents(tmp_path, "certificate.pem")
        # Another coordinator of this directory has renewed it.
        ensure_development_credentials(tmp_path, now=datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=9))
        assert contents(tmp_path, "certificate.pem") != before
        await until(lambda: events().count("certificate_renewed") == 1)
        remove(tmp_path, "certificate.pem")
        await until(lambda: events().count("certificate_renewed") == 2)
        # It cannot be renewed: those who are there stay, those who come are shown the old one.
        remove(tmp_path, "certificate.pem")
        authority = replace(tmp_path, "ca.pem", b"garbage")
        await until(lambda: "certificate_not_renewed" in events())
        replace(tmp_path, "ca.pem", authority)
        await until(lambda: events().count("certificate_renewed") == 3)
        assert (await operator.ask("echo", 1)).state == "complete"
        assert (await (await fleet.operator()).ask("echo", 2)).value == 2


def contents(directory: Path, name: str) -> bytes:
    return (directory / name).read_bytes()


def replace(directory: Path, name: str, content: bytes) -> bytes:
    before = contents(directory, name)
    (directory / name).write_bytes(content)
    return before


def remove(directory: Path, name: str) -> None:
    (directory / name).unlink()


# --- the listing ---------------------------------------------------------------------------------


async def test_the_listing_tells_how_everybody_does(fleet: Fleet) -> None:
    await fleet.join(echo("a", labels={"zone": "x"}), echo("b", "wrong"))
    operator = await fleet.operator()
    for n in range(4):
        outcome = await operator.ask("echo", n, quorum=1.0)
        await operator.reveal(outcome.round, n)
    await fleet.stop("b")
    await until(lambda: fleet.infos()["b"].state == "lost")
    listing = await operator.agents()
    assert isinstance(listing, FleetListing)
    assert (listing.rounds_open, listing.rounds_closed, listing.draining) == (0, {"complete": 4}, False)
    a, b = listing.agents
    assert (a.agent, a.state, a.labels, a.tasks) == ("a", "connected", {"zone": "x"}, ["echo"])
    assert (a.assignments, a.replies, b.replies) == (4, 4, 4)
    assert a.address.startswith("127.0.0.1:")
    assert a.software.startswith("quorate-agent/")
    assert a.latency_p50_s is not None
    assert a.latency_p99_s is not None
    assert 0 < a.latency_p50_s <= a.latency_p99_s
    assert a.weights["echo"] > 0.6 > b.weights["echo"]
    assert (b.state, b.connected_s) == ("lost", 0.0)
    assert a.connected_s > 0
    assert a.last_seen_s < 5

"""Scatter and gather from Python: replies as they come, many questions, whom to ask and how often, draining agents."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_making import Gated, echo
from coordination import PATIENCE_S, Fleet, coordinating, until
from quorate_agent import Agent
from quorate_protocol.bodies import encode_body
from quorate_protocol.channel import Channel
from quorate_protocol.client import Replies
from quorate_protocol.errors import ArgumentInvalid, CallFailed, Code, ConnectionClosed, LocalError
from quorate_protocol.fields import BodyRef
from quorate_protocol.messages import AgentResult, Ask, Assignment, Cancellation, Opened, Outcome, Reply


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with coordinating(tmp_path / "state", rounds={"deadline_s": 15.0}) as fleet:
        yield fleet


def closed(fleet: Fleet) -> dict[str, int]:
    return fleet.coordinator.list_fleet().rounds_closed


async def all_of(replies: Replies) -> list[AgentResult]:
    async with asyncio.timeout(PATIENCE_S):
        return [result async for result in replies]


# --- streamed ------------------------------------------------------------------------------------


async def test_replies_are_told_as_they_come(fleet: Fleet) -> None:
    gated = [Gated("b"), Gated("c")]
    await fleet.join(echo("a"), *(one.agent for one in gated))
    operator = await fleet.operator()
    seen = []
    async with operator.ask_stream("echo", {"x": 1.5}, quorum=1.0) as replies:
        assert (replies.opened, replies.round) == (None, None)
        with pytest.raises(RuntimeError, match="when all replies have been iterated over"):
            _ = replies.outcome
        async for result in replies:
            seen.append((result.agent, result.status, result.value))
            assert replies.opened is not None
            assert (replies.opened.selected, replies.opened.quorum) == (["a", "b", "c"], 3)
            assert fleet.coordinator.list_fleet().rounds_open == (1 if len(seen) < 3 else 0)
            if gated:
                gated.pop().gate.set()
    assert seen == [(agent, "replied", {"x": 1.5}) for agent in "acb"]
    outcome = replies.outcome
    assert (outcome.state, outcome.value, outcome.round) == ("complete", {"x": 1.5}, replies.round)
    assert [result.agent for result in outcome.results] == ["a", "b", "c"]
    with pytest.raises(RuntimeError, match="iterated over once"):
        aiter(replies)


async def test_each_agent_is_told_once_also_those_that_the_end_ended(fleet: Fleet) -> None:
    hanging = Gated("c")
    await fleet.join(echo("a"), echo("b"), hanging.agent)
    operator = await fleet.operator()
    replies = operator.ask_stream("echo", 1, quorum=2, grace_s=0.05)
    seen = [(result.agent, result.status) for result in await all_of(replies)]
    assert sorted(seen[:2]) == [("a", "replied"), ("b", "replied")]
    assert seen[2:] == [("c", "cancelled")]
    assert replies.outcome.state == "quorate"
    await until(lambda: hanging.cancelled == 1)


@pytest.mark.parametrize("how", ["break", "raise", "cancel"])
async def test_leaving_early_cancels_the_round_and_its_handlers(fleet: Fleet, how: str) -> None:
    hanging = Gated("b")
    await fleet.join(echo("a"), hanging.agent)
    operator = await fleet.operator()
    first = asyncio.Event()

    async def ask() -> None:
        async with operator.ask_stream("echo", 1, quorum=1.0) as replies:
            async for _ in replies:
                first.set()
                if how == "break":
                    break
                if how == "raise":
                    raise ZeroDivisionError

    asking = asyncio.create_task(ask())
    async with asyncio.timeout(PATIENCE_S):
        await first.wait()
        if how == "cancel":
            await until(lambda: hanging.begun == 1)
            asking.cancel()
        [ended] = await asyncio.gather(asking, return_exceptions=True)
    assert isinstance(ended, {"break": type(None), "raise": ZeroDivisionError, "cancel": asyncio.CancelledError}[how])
    await until(lambda: closed(fleet) == {"cancelled": 1})
    # The handler may not have begun when its cancellation came.
    await until(lambda: hanging.running == 0)
    assert hanging.cancelled == hanging.begun
    # The agents and the connection are still there.
    hanging.gate.set()
    assert (await operator.ask("echo", 2, quorum=1.0)).value == 2


async def test_an_operator_that_reads_slowly_holds_nobody_up(fleet: Fleet) -> None:
    large = b"x" * 700_000
    names = [f"a{number}" for number in range(8)]
    await fleet.join(*(echo(name, large) for name in names))
    slow, other = await fleet.operator(), await fleet.operator()
    async with slow.ask_stream("echo", 1, quorum=1.0) as replies:
        iterator = aiter(replies)
        seen = [await anext(iterator)]
        # Over 5 MiB are for the operator, who takes 1 MiB or so: the round ends all the same.
        await until(lambda: closed(fleet) == {"complete": 1})
        assert (await other.ask("echo", 2, count=1)).state == "complete"
        seen += [result async for result in iterator]
    assert sorted(result.agent for result in seen) == names
    # The last reply ends the round, and its outcome has no room for what is large.
    assert sum(result.value == large for result in seen if not result.error) >= 7
    assert replies.outcome.value == large


async def test_several_streams_at_once_get_their_own_replies(fleet: Fleet) -> None:
    await fleet.join(echo("a", concurrency=8), echo("b", concurrency=8))
    operator = await fleet.operator()
    asked = [operator.ask_stream("echo", number, quorum=1.0) for number in range(30)]
    seen = await asyncio.gather(*(all_of(replies) for replies in asked))
    for number, (replies, results) in enumerate(zip(asked, seen, strict=True)):
        assert sorted(result.agent for result in results) == ["a", "b"]
        assert {result.value for result in results} == {number} == {replies.outcome.value}
    assert len({replies.round for replies in asked}) == 30


async def test_errors_come_before_any_reply(fleet: Fleet) -> None:
    operator = await fleet.operator()
    for replies, reason in (
        (operator.ask_stream("echo", 1), "no-agents"),
        (operator.ask_stream("echo", 1, key="k"), "no-agents"),
    ):
        with pytest.raises(CallFailed) as caught:
            await all_of(replies)
        assert (caught.value.reason, replies.opened) == (reason, None)
        with pytest.raises(RuntimeError):
            _ = replies.outcome
    await fleet.join(echo("a"))
    with pytest.raises(CallFailed, match="quorum: 5 is over the 1 selected"):
        await all_of(operator.ask_stream("echo", 1, quorum=5))
    # The call is made when the iteration begins: nothing has come of this one.
    async with operator.ask_stream("echo", 1):
        pass
    assert closed(fleet) == {}


async def test_a_connection_that_ends_ends_the_stream(fleet: Fleet) -> None:
    hanging = Gated("b")
    await fleet.join(echo("a"), hanging.agent)
    operator = await fleet.operator()
    with pytest.raises(ConnectionClosed):
        async with operator.ask_stream("echo", 1, quorum=1.0) as replies:
            async for _ in replies:
                await operator.close()
    await until(lambda: closed(fleet) == {"cancelled": 1})


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
async def test_stopping_a_calls_stream_withdraws_it(fleet: Fleet, streamed: bool, finished: bool) -> None:
    """Who has finished its side has no other way, but to close the connection."""
    gated = Gated("a")
    await fleet.join(gated.agent)
    peer = await fleet.peer()
    await peer.hello("op", role="operator", tasks=())
    stream = await peer.open()
    call = Channel(stream)
    await call.send(Ask(task="echo", body=encode_body(1), stream=streamed))
    if finished:
        await call.finish()
    if streamed:
        await peer.take(call, Opened)
    await until(lambda: gated.running == 1)
    stream.stop(Code.CANCELLED)
    await until(lambda: closed(fleet) == {"cancelled": 1})
    await until(lambda: gated.cancelled == 1)
    # The connection goes on.
    again = Channel(await peer.open())
    gated.gate.set()
    await again.send(Ask(task="echo", body=encode_body(1)))
    await again.finish()
    assert (await peer.take(again, Outcome)).state == "complete"
    await peer.leave()


async def test_stopping_a_calls_stream_withdraws_it_before_its_body_has_come(fleet: Fleet) -> None:
    await fleet.join(echo("a"))
    peer = await fleet.peer()
    await peer.hello("op", role="operator", tasks=())
    stream = await peer.open()
    call = Channel(stream)
    await call.send(Ask(task="echo", bulk=BodyRef(size=1 << 20, digest=bytes(32))))
    await call.finish()
    await until(lambda: fleet.coordinator._operators._owed)
    stream.stop(Code.CANCELLED)
    await until(lambda: not fleet.coordinator._operators._owed)
    assert fleet.metrics()["quorate_calls_total", "ask", "withdrawn"] == 1
    await peer.leave()


# --- many ----------------------------------------------------------------------------------------


async def test_outcomes_come_in_the_order_of_the_values_and_only_so_many_are_under_way(fleet: Fleet) -> None:
    gated = Gated("a")
    await fleet.join(gated.agent)
    operator = await fleet.operator()
    taken = []

    def values() -> Iterator[int]:
        for number in range(40):
            taken.append(number)
            yield number

    outcomes = operator.ask_many("echo", values(), in_flight=5)
    first = asyncio.ensure_future(anext(outcomes))
    await until(lambda: gated.running == 5)
    gated.gate.set()
    async with asyncio.timeout(PATIENCE_S):
        seen = [(await first).value] + [outcome.value async for outcome in outcomes]
    assert seen == taken == list(range(40))
    assert gated.running_max == 5


async def test_values_may_come_slowly_and_outcomes_do_not_wait_for_them(fleet: Fleet) -> None:
    await fleet.join(echo("a"))
    operator = await fleet.operator()
    queue: asyncio.Queue[int | None] = asyncio.Queue()

    async def values() -> AsyncIterator[int]:
        while (value := await queue.get()) is not None:
            yield value

    queue.put_nowait(1)
    seen: list[Any] = []
    async with asyncio.timeout(PATIENCE_S):
        async for outcome in operator.ask_many("echo", values(), in_flight=4):
            seen.append(outcome.value)
            # Each question is made of the answer before it.
            queue.put_nowait(outcome.value * 2 if len(seen) < 5 else None)
    assert seen == [1, 2, 4, 8, 16]


async def test_where_the_coordinator_is_busy_it_is_asked_again(tmp_path: Path) -> None:
    async with coordinating(tmp_path, rounds={"in_flight_max": 2}) as fleet:
        await fleet.join(echo("a", concurrency=16))
        operator = await fleet.operator()
        async with asyncio.timeout(PATIENCE_S):
            seen = [outcome.value async for outcome in operator.ask_many("echo", range(30), in_flight=8)]
        assert seen == list(range(30))
        assert fleet.metrics()["quorate_calls_total", "ask", "busy"] > 0


@pytest.mark.parametrize("wrong", ["value", "source", "left"])
async def test_one_that_fails_ends_the_others(fleet: Fleet, wrong: str) -> None:
    gated = Gated("a")
    await fleet.join(gated.agent)
    operator = await fleet.operator()
    closed_source = False

    async def values() -> AsyncIterator[Any]:
        nonlocal closed_source
        try:
            yield 0
            yield 1
            await until(lambda: gated.running == 2)
            if wrong == "source":
                raise ZeroDivisionError
            if wrong == "value":
                gated.gate.set()
                yield object()
            await asyncio.Event().wait()
        finally:
            closed_source = True

    seen = []

    async def ask() -> None:
        async for outcome in operator.ask_many("echo", values(), in_flight=8):
            seen.append(outcome.value)  # noqa: PERF401  those before the one that fails

    asking = asyncio.create_task(ask())
    if wrong == "left":
        await until(lambda: gated.running == 2)
        asking.cancel()
    async with asyncio.timeout(PATIENCE_S):
        [ended] = await asyncio.gather(asking, return_exceptions=True)
    expected = {"value": LocalError, "source": ZeroDivisionError, "left": asyncio.CancelledError}[wrong]
    assert isinstance(ended, expected)
    assert seen == ([0, 1] if wrong == "value" else [])
    await until(lambda: fleet.coordinator.list_fleet().rounds_open == 0)
    await until(lambda: gated.running == 0)
    assert closed(fleet) == ({"complete": 2} if wrong == "value" else {"cancelled": 2})
    assert closed_source


async def test_at_least_one_must_be_under_way(fleet: Fleet) -> None:
    operator = await fleet.operator()
    with pytest.raises(ArgumentInvalid, match="in_flight: at least one"):
        await anext(operator.ask_many("echo", [1], in_flight=0))
    assert [outcome async for outcome in operator.ask_many("echo", [])] == []


# --- whom, and how often -------------------------------------------------------------------------


async def test_of_so_many_the_best_are_asked(fleet: Fleet) -> None:
    await fleet.join(echo("a", "no"), echo("b", "yes"), echo("c", "yes"))
    operator = await fleet.operator()
    outcome = await operator.ask("echo", 1, count=2, quorum=1.0)
    assert [result.agent for result in outcome.results] == ["a", "b"]
    await operator.reveal(outcome.round, "yes")
    outcome = await operator.ask("echo", 1, count=1)
    assert ([result.agent for result in outcome.results], outcome.value, outcome.quorum) == (["b"], "yes", 1)
    assert len((await operator.ask("echo", 1, count=50, quorum=1.0)).results) == 3


async def test_an_agent_that_failed_is_asked_again_where_attempts_are_left(fleet: Fleet) -> None:
    calls = []
    agent = Agent("a")

    @agent.task("echo")
    async def stumble(body: Any) -> Any:
        calls.append(body)
        if len(calls) % 2:
            raise ValueError("not today")
        return body

    await fleet.join(agent)
    operator = await fleet.operator()
    outcome = await operator.ask("echo", "x", attempts=2)
    assert (outcome.state, outcome.value, calls) == ("complete", "x", ["x", "x"])
    once = await operator.ask("echo", "y")
    assert (once.state, once.results[0].status, once.results[0].error) == ("failed", "failed", "ValueError: not today")
    assert calls == ["x", "x", "y"]


async def test_one_operator_leaves_room_for_the_others(tmp_path: Path) -> None:
    async with coordinating(tmp_path, rounds={"in_flight_per_operator_max": 2}) as fleet:
        gated = Gated("a")
        await fleet.join(gated.agent)
        greedy, modest = await fleet.operator(), await fleet.operator()
        held = [asyncio.create_task(greedy.ask("echo", number)) for number in range(2)]
        await until(lambda: gated.running == 2)
        with pytest.raises(CallFailed, match="2 rounds of this operator are in flight") as caught:
            await greedy.ask("echo", 3)
        assert (caught.value.reason, caught.value.retry) == ("busy", True)
        other = asyncio.create_task(modest.ask("echo", 4))
        await until(lambda: gated.running == 3)
        gated.gate.set()
        async with asyncio.timeout(PATIENCE_S):
            assert [outcome.value for outcome in await asyncio.gather(*held, other)] == [0, 1, 4]
        assert (await greedy.ask("echo", 5)).value == 5


async def test_late_replies_move_their_agents_latency(fleet: Fleet) -> None:
    await fleet.join(echo("fast"))
    slow = await fleet.peer()
    await slow.join("slow")
    await until(lambda: "slow" in fleet.connected)
    operator = await fleet.operator()
    outcome = await operator.ask("echo", 1, quorum=1, grace_s=0.0)
    assert {result.agent: result.status for result in outcome.results} == {"fast": "replied", "slow": "cancelled"}
    assert fleet.infos()["slow"].latency_p50_s is None
    assignment = await slow.take(slow.coordination, Assignment)
    await slow.take(slow.coordination, Cancellation)
    await slow.coordination.send(Reply(round=assignment.round, status="replied", body=assignment.body))
    await until(lambda: fleet.infos()["slow"].latency_p50_s is not None)
    latency_s = fleet.infos()["slow"].latency_p50_s
    assert latency_s is not None
    assert latency_s > outcome.duration_s
    # The outcome stays, and the truth is scored without it.
    assert (await operator.reveal(outcome.round, 1)).right == {"fast": True}
    await slow.leave()


# --- draining an agent ---------------------------------------------------------------------------


async def test_an_agent_that_is_drained_finishes_and_leaves(fleet: Fleet) -> None:
    gated = Gated("a")
    await fleet.join(gated.agent, echo("b"))
    operator = await fleet.operator()
    asking = asyncio.create_task(operator.ask("echo", 1, quorum=1.0))
    await until(lambda: gated.running == 1)
    await operator.drain("a", "its machine is needed")
    await until(lambda: fleet.infos()["a"].state == "draining")
    # It is not asked any more, and finishes what it has.
    assert [result.agent for result in (await operator.ask("echo", 2)).results] == ["b"]
    gated.gate.set()
    async with asyncio.timeout(PATIENCE_S):
        assert {result.status for result in (await asking).results} == {"replied"}
        await asyncio.wait([fleet.agents["a"]])
    assert fleet.agents["a"].exception() is None
    await until(lambda: fleet.infos()["a"].state == "left")
    await operator.drain("b")
    await until(lambda: fleet.infos()["b"].state == "left")


async def test_an_agent_that_is_not_there_cannot_be_drained(fleet: Fleet) -> None:
    operator = await fleet.operator()
    with pytest.raises(CallFailed, match="there is no agent 'nobody' in the fleet") as caught:
        await operator.drain("nobody")
    assert (caught.value.reason, caught.value.retry) == ("unknown-agent", False)
    observer = await fleet.operator(role="observer")
    with pytest.raises(CallFailed, match="an observer may not drain-agent"):
        await observer.drain("nobody")

"""An operator that does not read what its streamed rounds are told: the rounds go on, and nothing piles up."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_making import Gated
from coordination import PATIENCE_S, Fleet, coordinating, until
from quorate_agent import Agent
from quorate_coordinator import operators, telling
from quorate_coordinator.certificates import DevelopmentCredentials
from quorate_coordinator.telling import AllUntaken, Told, Untaken
from quorate_protocol.bodies import encode_body
from quorate_protocol.channel import Channel
from quorate_protocol.errors import CallFailed, Code
from quorate_protocol.messages import AgentResult, Ask, Opened, Outcome, Part
from quorate_protocol.taking import while_taken
from virtual import memory_linked, virtual_time


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with coordinating(tmp_path) as fleet:
        yield fleet


async def test_parts_are_left_out_once_the_outcome_is_there() -> None:
    untaken = Untaken(AllUntaken(2 << 30))
    told = Told(untaken)
    told.put(Opened(round=1, selected=["a", "b"], quorum=1, deadline_s=1.0))
    for agent in ("a", "b"):
        told.put(Part(round=1, result=AgentResult(agent=agent, status="replied", body=b"\x01")))
    assert len(told) == 3
    assert untaken.memory_bytes > 0
    told.end()
    assert (len(told), untaken.memory_bytes) == (1, 0)


async def test_parts_that_have_no_room_are_left_out() -> None:
    untaken = Untaken(AllUntaken(2 << 30))
    told = Told(untaken)
    part = Part(round=1, result=AgentResult(agent="a", status="replied", body=bytes(1_000_000)))
    for _ in range(100):
        told.put(part)
    assert len(told) == 68
    with pytest.raises(CallFailed, match="wait for this connection's operator to take them") as caught:
        untaken.check_room()
    assert (caught.value.reason, caught.value.retry) == ("busy", True)
    told.close()
    assert (untaken.memory_bytes, untaken.is_full) == (0, False)


async def test_an_opening_that_still_waits_at_the_end_counts_until_it_is_sent() -> None:
    everybody = AllUntaken(2 << 30)
    untaken = Untaken(everybody)
    told = Told(untaken)
    told.put(Opened(round=1, selected=["a"], quorum=1, deadline_s=1.0))
    told.end()
    assert (len(told), everybody.holders) == (1, 1)
    told.close()
    assert (len(told), everybody.holders) == (0, 0)


def test_the_largest_answer_does_not_count() -> None:
    """Who asks one question after the other may have taken all of an answer before the coordinator knows."""
    untaken = Untaken(AllUntaken(2 << 30))
    large_one, other = bytes(100 << 20), bytes(65 << 20)
    with untaken.holding(large_one):
        untaken.check_room()
        with untaken.holding(other), pytest.raises(CallFailed, match="wait for this connection's operator"):
            untaken.check_room()
        untaken.check_room()
    assert untaken.memory_bytes == 0


def test_where_all_together_hold_too_much_those_over_their_share_are_refused() -> None:
    everybody = AllUntaken(1 << 30)
    hogs = [Untaken(everybody) for _ in range(6)]
    honest = Untaken(everybody)
    with contextlib.ExitStack() as held:
        for hog in hogs:
            for _ in range(12):
                held.enter_context(hog.holding(bytes(5 << 20)))
        assert everybody.is_full
        for hog in hogs:
            with pytest.raises(CallFailed, match="wait for this connection's operator"):
                hog.check_room()
        with honest.holding(bytes(5 << 20)):
            honest.check_room()
        honest.check_room()
    assert (everybody.memory_bytes, everybody.is_full) == (0, False)
    hogs[0].check_room()


def test_who_holds_less_than_its_share_is_served_whatever_the_others_hold() -> None:
    everybody = AllUntaken(1 << 30)
    hog, honest = Untaken(everybody), Untaken(everybody)
    with contextlib.ExitStack() as held:
        for _ in range(30):
            held.enter_context(hog.holding(bytes(10 << 20)))
        for _ in range(8):
            held.enter_context(honest.holding(bytes(4 << 20)))
        assert everybody.is_full
        honest.check_room()
        with pytest.raises(CallFailed, match=r"and of 348127232 bytes for all operators together"):
            hog.check_room()
    assert (everybody.memory_bytes, everybody.holders) == (0, 0)


async def test_one_answer_that_many_calls_wait_for_is_there_once(fleet: Fleet) -> None:
    """Under one key; its operator reads nothing."""
    gated = Gated("a")
    await fleet.join(gated.agent)
    peer = await fleet.peer()
    await peer.hello("deaf", role="operator", tasks=())
    body = encode_body("x" * 900_000)
    gatherer, served = fleet.coordinator._gatherer, fleet.coordinator._operators
    for number in range(100):
        await Channel(await peer.open()).send(Ask(task="echo", body=body, key="k"))
        await until(lambda number=number: len(gatherer.shelf) == 0 and gatherer.repeated_total == number)
    gated.gate.set()
    await until(lambda: served.calls_total["ask", "ok"] == 100)
    # The outcome and its frame; an answer is in them twice, once as an agent's.
    assert len(body) < served._untaken.memory_bytes < 5 * len(body)
    await peer.leave()
    await until(lambda: served._untaken.memory_bytes == 0)


def large(name: str, size_bytes: int) -> Agent:
    """An agent that answers with so many bytes, others each time."""
    agent = Agent(name)

    @agent.task("large")
    async def answer(_: Any) -> bytes:
        return os.urandom(size_bytes)

    return agent


def calls(fleet: Fleet, result: str) -> float:
    return fleet.metrics().get(("quorate_calls_total", "ask", result), 0.0)


async def test_who_reads_nothing_is_refused_and_then_given_up(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection goes on; and others are served all the while."""
    monkeypatch.setattr(telling, "UNTAKEN_BYTES_MAX", 4 << 20)
    monkeypatch.setattr(telling, "UNTAKEN_S", 1.0)
    monkeypatch.setattr(operators, "_ACKNOWLEDGE_TIMEOUT_S", 1.0)
    await fleet.join(large("a", 900_000))
    other, peer = await fleet.operator(), await fleet.peer()
    await peer.hello("deaf", role="operator", tasks=())
    unread = []
    async with asyncio.timeout(PATIENCE_S):
        # What the transport holds comes before: windows, and a class of streams.
        while not calls(fleet, "busy"):
            unread.append(Channel(await peer.open()))
            asked = calls(fleet, "ok") + calls(fleet, "busy")
            await unread[-1].send(Ask(task="large", body=encode_body(1), stream=len(unread) % 2 == 0))
            await until(lambda asked=asked: calls(fleet, "ok") + calls(fleet, "busy") > asked)
    assert (await other.ask("large", 1)).state == "complete"
    await until(lambda: not fleet.coordinator._operators._owed)
    assert calls(fleet, "untaken") > 0
    for channel in unread:
        channel.abort(Code.CANCELLED)
    again = Channel(await peer.open())
    await again.send(Ask(task="large", body=encode_body(1)))
    assert (await peer.take(again, Outcome)).state == "complete"
    await peer.leave()


@pytest.mark.parametrize("streamed", [False, True])
async def test_large_bodies_that_nobody_takes_are_let_go_of(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    monkeypatch.setattr(telling, "UNTAKEN_S", 1.0)
    await fleet.join(large("a", 12 << 20), large("b", 12 << 20))
    peer = await fleet.peer()
    await peer.hello("deaf", role="operator", tasks=())
    for number in range(1, 3):
        call = Channel(await peer.open())
        await call.send(Ask(task="large", body=encode_body(1), quorum_fraction=1.0, stream=streamed))
        await until(lambda number=number: fleet.coordinator.list_fleet().rounds_closed == {"complete": number})
    budget = fleet.coordinator._operators._store.budget
    assert budget.disk_bytes > 0
    await until(lambda: budget.disk_bytes == 0)
    assert calls(fleet, "untaken") == 2
    assert not peer.connection.is_closed
    await peer.leave()


@virtual_time
async def test_who_takes_slowly_is_waited_for_and_who_takes_nothing_is_not(credentials: DevelopmentCredentials) -> None:
    loop = asyncio.get_running_loop()
    async with memory_linked(credentials) as link:
        stream = await link.there.open_uni_stream()

        async def send() -> None:
            async with while_taken(stream, 10.0):
                await stream.send(bytes(8 << 20))
                await stream.finish()
                await stream.flush()

        began = loop.time()
        sending = asyncio.create_task(send())
        reading = await link.here.accept_uni_stream()
        for _ in range(6):
            for _ in range(16):
                await reading.receive(1 << 16)
            await asyncio.sleep(9.0)
        assert not sending.done()
        assert loop.time() - began > 50.0
        stopped = loop.time()
        with pytest.raises(TimeoutError):
            await sending
        assert 1.0 <= loop.time() - stopped <= 5.0  # of ten seconds nine were over; it is looked at now and then


async def test_each_agent_is_told_once_however_slow_the_reader(fleet: Fleet) -> None:
    body = "x" * 900_000
    for number in range(6):
        agent = Agent(f"a{number}")

        @agent.task("large")
        async def answer(_: Any) -> str:
            return body

        await fleet.join(agent)
    operator = await fleet.operator()
    told: list[str] = []
    async with operator.ask_stream("large", 1, quorum=1.0) as replies:
        async for result in replies:
            if not told:
                # The round ends while this one is looked at.
                await until(lambda: fleet.coordinator.list_fleet().rounds_closed == {"complete": 1})
            assert result.value == body
            told.append(result.agent)
    assert sorted(told) == [f"a{number}" for number in range(6)]
    assert replies.outcome.state == "complete"

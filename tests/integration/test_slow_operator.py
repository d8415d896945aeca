"""An operator that does not read what its streamed rounds are told: the rounds go on, and nothing piles up."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from coordination import Fleet, coordinating, until
from quorate_agent import Agent
from quorate_coordinator.telling import Told, Untaken
from quorate_protocol.messages import AgentResult, Opened, Part


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with coordinating(tmp_path) as fleet:
        yield fleet


async def test_parts_are_left_out_once_the_outcome_is_there() -> None:
    untaken = Untaken(1 << 30)
    told = Told(untaken)
    told.put(Opened(round=1, selected=["a", "b"], quorum=1, deadline_s=1.0))
    for agent in ("a", "b"):
        told.put(Part(round=1, result=AgentResult(agent=agent, status="replied", body=b"\x01")))
    assert len(told) == 3
    assert untaken.memory_bytes > 0
    told.end()
    assert (len(told), untaken.memory_bytes) == (1, 0)


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

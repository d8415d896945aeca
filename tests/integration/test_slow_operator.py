"""An operator that does not read what its streamed rounds are told: the rounds go on, and nothing piles up."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from coordination import Fleet, coordinating, until
from quorate_agent import Agent
from quorate_coordinator.operators import _skip_parts
from quorate_protocol.messages import AgentResult, Opened, Part


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with coordinating(tmp_path) as fleet:
        yield fleet


def test_parts_are_left_out_once_the_outcome_is_there() -> None:
    told: asyncio.Queue[Opened | Part | None] = asyncio.Queue()
    opened = Opened(round=1, selected=["a", "b"], quorum=1, deadline_s=1.0)
    told.put_nowait(opened)
    for agent in ("a", "b"):
        told.put_nowait(Part(round=1, result=AgentResult(agent=agent, status="replied", body=b"\x01")))
    _skip_parts(told)
    assert [told.get_nowait() for _ in range(told.qsize())] == [opened]


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

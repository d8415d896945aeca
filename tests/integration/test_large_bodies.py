"""Bodies over the inline limit, through the whole system: questions, answers, outcomes, parts, truths."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from coordination import Fleet, coordinating, until
from quorate_agent import Agent

MIB = 1 << 20


def noise(size_bytes: int, seed: int = 0) -> Any:
    return numpy.random.default_rng(seed).integers(0, 256, size_bytes, dtype=numpy.uint8)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with coordinating(tmp_path) as fleet:
        yield fleet
        await until(lambda: fleet.coordinator._gatherer.shelf.held_bytes == 0)
        assert list((tmp_path / "spool").iterdir()) == []


class TestValues:
    async def test_arrays_go_both_ways_bit_for_bit(self, fleet: Fleet) -> None:
        """64 MiB there and back, and the feedback as large."""
        learned: list[Any] = []
        agent = Agent("a")

        @agent.task("flip")
        def flip(array: Any) -> Any:
            assert not array.flags.writeable
            return {"flipped": array[::-1]}

        @agent.feedback("flip")
        def learn(array: Any, truth: Any) -> None:
            learned.append((array.copy(), truth.copy()))

        await fleet.join(agent)
        client = await fleet.operator()
        question = noise(64 * MIB).view("f4")
        outcome = await client.ask("flip", question, deadline_s=60.0)
        assert outcome.state == "complete", outcome
        assert outcome.bulk is not None
        value = outcome.value["flipped"]
        assert value.tobytes() == question[::-1].tobytes()
        assert not value.flags.writeable
        assert outcome.results[0].value["flipped"].tobytes() == value.tobytes()
        revealed = await client.reveal(outcome.round, outcome.value)
        assert revealed.correct is True
        await until(lambda: learned)
        assert learned[0][0].tobytes() == question.tobytes()
        assert learned[0][1]["flipped"].tobytes() == value.tobytes() if isinstance(learned[0][1], dict) else True

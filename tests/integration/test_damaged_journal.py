"""A journal whose bits have flipped: what hangs on them is said, and the rest goes on."""

import sqlite3
from pathlib import Path

import pytest

from coordination import coordinating
from quorate_agent import Agent
from quorate_coordinator.journal.errors import JournalDamaged
from quorate_coordinator.journal.schema import JOURNAL_NAME
from quorate_protocol.errors import CallFailed


def flip(state_dir: Path, where: str) -> None:
    """Changes one payload as a disk would: its digest stays."""
    with sqlite3.connect(state_dir / JOURNAL_NAME) as connection:
        changed = connection.execute(
            f"UPDATE records SET payload = CAST(payload || x'00' AS BLOB) WHERE {where}"  # noqa: S608  the test's own
        )
        assert changed.rowcount == 1
    connection.close()


def echo() -> Agent:
    agent = Agent("a")

    @agent.task("echo")
    async def reply(body: object) -> object:
        return body

    return agent


async def test_a_round_before_the_checkpoint_costs_itself_alone(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as fleet:
        await fleet.join(echo())
        operator = await fleet.operator()
        rounds = [(await operator.ask("echo", number, key=f"k{number}")).round for number in range(3)]
    flip(tmp_path, f"round = {rounds[1]} AND kind = 'closed'")
    async with coordinating(tmp_path) as fleet:
        await fleet.join(echo())
        operator = await fleet.operator()
        # The checkpoint at the end covers them all: the learner lacks nothing.
        assert (await operator.reveal(rounds[0], 0)).correct
        with pytest.raises(CallFailed, match="not remembered"):
            await operator.reveal(rounds[1], 1)
        assert (await operator.reveal(rounds[2], 2)).correct
        with pytest.raises(CallFailed, match="is damaged") as caught:
            await operator.ask("echo", 1, key="k1")
        assert caught.value.reason == "not-recorded"
        assert (await operator.ask("echo", 3, key="k3")).value == 3
        assert fleet.metrics()["quorate_journal_damaged_total",] == 3


async def test_what_the_learner_needs_must_be_whole(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as fleet:
        await fleet.join(echo())
        operator = await fleet.operator()
        number = (await operator.ask("echo", 1)).round
    with sqlite3.connect(tmp_path / JOURNAL_NAME) as connection:
        connection.execute("DELETE FROM checkpoints")
    connection.close()
    flip(tmp_path, f"round = {number} AND kind = 'closed'")
    with pytest.raises(JournalDamaged, match="quorate journal verify"):
        async with coordinating(tmp_path):
            pass

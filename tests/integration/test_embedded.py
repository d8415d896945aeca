"""A coordinator in one's own process: agents, operators and no network."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from agent_making import Gated, echo
from coordination import PATIENCE_S, expect_nothing_left, open_descriptors, until
from journal_making import read_journal
from quorate_agent import Agent
from quorate_coordinator.journal.records import TruthTold
from quorate_coordinator.service import Coordinator
from quorate_coordinator.settings import Settings


def settings(state_dir: Path, **sections: Any) -> Settings:
    return Settings(listen="memory:here", http="", state_dir=state_dir, **sections)


@pytest.mark.parametrize("sync", ["full", "off"])
async def test_agents_and_operators_of_one_process_need_no_socket(
    tmp_path: Path, sync: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_socket(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a datagram socket was opened")

    monkeypatch.setattr(asyncio.get_running_loop(), "create_datagram_endpoint", no_socket)
    tasks, descriptors = asyncio.all_tasks(), open_descriptors()
    taught = []
    agent = Agent("b")

    @agent.task("echo")
    def reply(body: Any) -> Any:
        return body

    @agent.feedback("echo")
    def learn(body: Any, truth: Any) -> None:
        taught.append((body, truth))

    gated = Gated("c")
    async with Coordinator(settings(tmp_path, journal={"sync": sync})) as coordinator:
        assert coordinator.url == "memory:here"
        joined = [
            asyncio.create_task(one.run(coordinator.url, **coordinator.credentials))
            for one in (echo("a"), agent, gated.agent)
        ]
        async with await coordinator.client(name="me") as client:
            async with asyncio.timeout(PATIENCE_S):
                while len((await client.agents()).agents) < 3:
                    pass
            replies = client.ask_stream("echo", {"x": 1}, quorum=2, grace_s=0.0)
            seen = [(result.agent, result.status) async for result in replies]
            assert sorted(seen[:2]) == [("a", "replied"), ("b", "replied")]
            assert seen[2:] == [("c", "cancelled")]
            outcome = replies.outcome
            assert (outcome.state, outcome.value) == ("quorate", {"x": 1})
            assert (await client.reveal(outcome.round, {"x": 1})).correct is True
            await until(lambda: taught == [({"x": 1}, {"x": 1})])
            gated.gate.set()
            assert [one.value async for one in client.ask_many("echo", range(20), quorum=1.0)] == list(range(20))
            assert open_descriptors()["socket"] == descriptors["socket"]
            await client.drain("a")
            async with asyncio.timeout(PATIENCE_S):
                await joined[0]
        for task in joined[1:]:
            task.cancel()
        await asyncio.wait(joined)
    await expect_nothing_left(tasks, descriptors)
    if sync == "full":
        records = [record for _, _, record in read_journal(tmp_path / "journal.sqlite3")]
        assert [record for record in records if isinstance(record, TruthTold)] == [TruthTold(1, b"\x81\xa1x\x01")]


async def test_a_close_that_is_cancelled_lets_the_port_and_the_journal_go(tmp_path: Path) -> None:
    settings = Settings(listen="memory:cancelled", http="", state_dir=tmp_path)
    coordinator = Coordinator(settings)
    await coordinator.start()
    async with await coordinator.client():
        # An operator that is told goodbye has a moment to go: the close is in the middle of that.
        closing = asyncio.create_task(coordinator.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
    async with Coordinator(settings) as another:
        assert another.is_ready

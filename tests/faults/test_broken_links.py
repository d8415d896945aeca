"""A link that dies while an agent works: processes as a user starts them, with the agent's packets in our hands."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_peer import UdpRelay, udp_relay
from processes import PATIENCE_S, CoordinatorProcess, Ended, Process, clean_environment, coordinator_process
from quorate_protocol.client import Client
from quorate_protocol.transport import ClientTls

AGENT = """
import asyncio, pathlib
from quorate_agent import Agent

agent = Agent("worker", concurrency=4)
folder = pathlib.Path(__file__).parent

@agent.task("slow")
async def slow(body):
    with open(folder / "began", "a") as began:
        began.write(f"{body}\\n")
    while not (folder / f"go-{body}").exists():
        await asyncio.sleep(0.01)
    return body
"""

#: Half a lease of silence, and the agent looks for another link; the whole of it, and it is lost.
LEASE_S = 6.0


class Cut:
    """A coordinator and an agent, each a process, and the relay between them."""

    def __init__(self, folder: Path, coordinator: CoordinatorProcess, relay: UdpRelay, agent: Process) -> None:
        self.folder = folder
        self.coordinator = coordinator
        self.relay = relay
        self.agent = agent

    async def client(self) -> Client:
        state_dir = self.coordinator.state_dir
        token = (state_dir / "token").read_text().strip()
        return await Client.connect(self.coordinator.url, token=token, tls=ClientTls(state_dir / "ca.pem"))

    @property
    def began(self) -> list[str]:
        """What the agent has begun to work on."""
        path = self.folder / "began"
        return path.read_text().split() if path.exists() else []

    def let_go(self, *bodies: int) -> None:
        for body in bodies:
            (self.folder / f"go-{body}").touch()

    def logged(self, event: str) -> int:
        """How often the agent has logged this so far."""
        return sum(json.loads(line)["event"] == event for line in self.agent.err_so_far.splitlines() if line[:1] == "{")


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture
async def cut(tmp_path: Path) -> AsyncIterator[Cut]:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "my_agent.py").write_text(AGENT)
    sessions = {"QUORATE_SESSIONS__PULSE_S": "0.2", "QUORATE_SESSIONS__LEASE_S": str(LEASE_S)}
    async with (
        coordinator_process(tmp_path / "state", **sessions) as coordinator,
        udp_relay(int(coordinator.listen.rpartition(":")[2])) as relay,
    ):
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("quorate-agent")),
            "run",
            "my_agent:agent",
            "--log-format",
            "json",
            cwd=folder,
            env=clean_environment(
                QUORATE_STATE_DIR=str(coordinator.state_dir), QUORATE_COORDINATOR=f"quic://localhost:{relay.port}"
            ),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        started = Cut(folder, coordinator, relay, Process(process))
        try:
            await until(lambda: started.logged("joined"))
            yield started
        finally:
            if process.returncode is None:
                process.kill()
            await started.agent.end()


async def test_an_answer_arrives_although_the_link_died_under_its_handler(cut: Cut) -> None:
    async with await cut.client() as client:
        asking = asyncio.create_task(client.ask("slow", 1, deadline_s=PATIENCE_S))
        await until(lambda: cut.began == ["1"])
        cut.relay.is_cut = True
        # It has given the link up; its attempts to come back are swallowed, too.
        await until(lambda: cut.logged("session_ended"))
        cut.let_go(1)
        cut.relay.is_cut = False
        async with asyncio.timeout(PATIENCE_S):
            outcome = await asking
        assert (outcome.state, outcome.value) == ("complete", 1)
        assert cut.began == ["1"], "worked on once"
        assert (cut.logged("joined"), cut.logged("rejoined")) == (1, 1)
        # The session goes on: it is asked as before.
        cut.let_go(2)
        async with asyncio.timeout(PATIENCE_S):
            assert (await client.ask("slow", 2)).value == 2


async def test_an_assignment_that_the_link_lost_is_delivered_again(cut: Cut) -> None:
    async with await cut.client() as client:
        cut.relay.is_cut = True
        asking = asyncio.create_task(client.ask("slow", 1, deadline_s=2.5 * LEASE_S))
        await until(lambda: cut.logged("session_ended"))
        cut.relay.is_cut = False
        cut.let_go(1)
        async with asyncio.timeout(PATIENCE_S):
            outcome = await asking
        assert (outcome.state, outcome.value) == ("complete", 1)
        assert cut.began == ["1"]


async def test_an_agent_that_is_stopped_without_a_link_comes_back_to_deliver(cut: Cut) -> None:
    async with await cut.client() as client:
        asking = asyncio.create_task(client.ask("slow", 1, deadline_s=PATIENCE_S))
        await until(lambda: cut.began == ["1"])
        cut.relay.is_cut = True
        await until(lambda: cut.logged("session_ended"))
        os.kill(cut.agent.pid, signal.SIGTERM)
        cut.let_go(1)
        cut.relay.is_cut = False
        async with asyncio.timeout(PATIENCE_S):
            assert (await asking).value == 1
        ended: Ended = await cut.agent.end()
        assert ended.code == 0
        (info,) = (await client.agents()).agents
        assert info.state == "left"

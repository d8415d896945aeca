"""A coordinator as a process that is killed and started again, on the same directory and port; its journal audited."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Self

from processes import CoordinatorProcess, Ended, coordinator_process
from quorate_agent import Agent
from quorate_coordinator.journal.reader import JournalReader
from quorate_coordinator.journal.records import Record, RoundClosed, TruthTold
from quorate_coordinator.journal.schema import JOURNAL_NAME
from quorate_coordinator.learner.vote import VoteLearner
from quorate_coordinator.ledger import Ledger
from quorate_coordinator.recovery import Recovered, recover
from quorate_protocol.client import Client
from quorate_protocol.credentials import find_token
from quorate_protocol.transport import ClientTls

#: So that a coordinator that died is noticed soon, and checkpoints are met.
QUICK = {
    "QUORATE_SESSIONS__PULSE_S": "0.2",
    "QUORATE_SESSIONS__LEASE_S": "2",
    "QUORATE_JOURNAL__CHECKPOINT_ROUNDS": "7",
}


class Restarting:
    """One coordinator after the other."""

    def __init__(self, state_dir: Path, **environ: str) -> None:
        self.state_dir = state_dir
        self.journal = state_dir / JOURNAL_NAME
        self._environ = {**QUICK, **environ}
        self._stack = contextlib.AsyncExitStack()
        self._listen = "127.0.0.1:0"
        self.running: CoordinatorProcess | None = None

    async def start(self) -> None:
        assert self.running is None
        self.running = await self._stack.enter_async_context(
            coordinator_process(self.state_dir, listen=self._listen, **self._environ)
        )
        self._listen = self.running.listen

    async def kill(self) -> None:
        """With SIGKILL."""
        assert self.running is not None
        running, self.running = self.running, None
        running.process.send_signal(signal.SIGKILL)
        await running.process.end()
        await self._stack.aclose()

    async def stop(self) -> Ended:
        """Properly."""
        assert self.running is not None
        running, self.running = self.running, None
        running.process.send_signal(signal.SIGTERM)
        ended = await running.process.end()
        await self._stack.aclose()
        assert ended.code == 0, ended.err
        return ended

    @property
    def url(self) -> str:
        return f"quic://{self._listen}"

    @property
    def token(self) -> str:
        return find_token(self.state_dir / "token", environ={})

    @property
    def tls(self) -> ClientTls:
        return ClientTls(self.state_dir / "ca.pem")

    @property
    def environ(self) -> dict[str, str]:
        """For the commands of an operator."""
        return {"QUORATE_STATE_DIR": str(self.state_dir), "QUORATE_COORDINATOR": self.url}

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with await Client.connect(self.url, token=self.token, tls=self.tls) as client:
            yield client

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()


async def joined(client: Client, *agents: str, patience_s: float = 60.0) -> None:
    """Waits until these are connected."""
    async with asyncio.timeout(patience_s):
        while not set(agents) <= {info.agent for info in (await client.agents()).agents if info.state == "connected"}:
            pass


def recovered(journal: Path) -> Recovered:
    """What a coordinator that starts now would know."""
    with JournalReader(journal) as reader:
        return recover(reader, VoteLearner, VoteLearner.restore, remembered_max=10_000)


def replay_all(journal: Path) -> bytes:
    """The state of a learner that lived through all of it without interruption."""
    ledger = Ledger(VoteLearner())
    closed: dict[int, RoundClosed] = {}
    with JournalReader(journal) as reader:
        for _, _, record in reader.records():
            if isinstance(record, TruthTold):
                ledger.replay_truth(closed[record.round], record)
                continue
            if isinstance(record, RoundClosed):
                closed[record.round] = record
            ledger.replay(record)
    return ledger.learner.snapshot()


def last_state(journal: Path) -> bytes:
    """The learner's state that the last coordinator left at its proper end, after all records."""
    with JournalReader(journal) as reader:
        checkpoint = reader.checkpoint()
        assert checkpoint is not None
        assert checkpoint.seq == reader.last_seq()
        return checkpoint.snapshot


def records_in(journal: Path) -> list[Record]:
    with JournalReader(journal) as reader:
        return [record for _, _, record in reader.records()]


@contextlib.asynccontextmanager
async def agents(restarting: Restarting, *made: Agent) -> AsyncIterator[None]:
    """Agents of this process; they join, and come back, by themselves."""
    tasks = [
        asyncio.create_task(agent.run(restarting.url, token=restarting.token, tls=restarting.tls)) for agent in made
    ]
    try:
        async with restarting.client() as client:
            await joined(client, *(agent.name or "" for agent in made))
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

"""A whole fleet in one event loop: a real coordinator, real agents and operators, over real QUIC on loopback."""

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client.parser import text_string_to_metric_families

from quorate_agent import Agent
from quorate_coordinator.learner.api import Learner
from quorate_coordinator.service import Coordinator
from quorate_coordinator.settings import Settings
from quorate_protocol.channel import Channel
from quorate_protocol.client import Client
from quorate_protocol.errors import ConnectionClosed
from quorate_protocol.fields import Role
from quorate_protocol.messages import AgentInfo, CoordinationOpened, Hello, Message, Resume, Welcome
from quorate_protocol.transport import BiStream, ClientTls, Connection, Priority, connect

#: Over anything that happens in time; a test that waits so long has failed.
PATIENCE_S = 20.0

M = TypeVar("M", bound=Message)


async def until(condition: Callable[[], Any], *, patience_s: float = PATIENCE_S, every_s: float = 0.002) -> None:
    """Waits for what nobody announces."""
    async with asyncio.timeout(patience_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(every_s)


class Fleet:
    """A coordinator and whoever has come to it."""

    def __init__(self, coordinator: Coordinator, state_dir: Path) -> None:
        self.coordinator = coordinator
        self.state_dir = state_dir
        self.token = (state_dir / "token").read_text().strip()
        self.tls = ClientTls(state_dir / "ca.pem")
        self.port = coordinator.address[1]
        self.url = f"quic://127.0.0.1:{self.port}"
        #: By agent: what runs it.
        self.agents: dict[str, asyncio.Task[None]] = {}
        self._clients: list[Client] = []

    async def join(self, *agents: Agent, wait: bool = True) -> None:
        """Runs agents; returns when they are members."""
        for agent in agents:
            assert agent.name is not None
            self.agents[agent.name] = asyncio.create_task(
                agent.run(self.url, token=self.token, tls=self.tls), name=f"agent {agent.name}"
            )
        if wait:
            await until(lambda: {agent.name for agent in agents} <= set(self.connected))

    async def stop(self, name: str) -> None:
        """Ends an agent as a killed process would end, but that the coordinator hears of it."""
        task = self.agents.pop(name)
        task.cancel()
        await asyncio.wait([task])

    async def operator(self, *, role: Role = "operator", token: str | None = None) -> Client:
        client = await Client.connect(self.url, token=token or self.token, tls=self.tls, role=role)
        self._clients.append(client)
        return client

    async def peer(self, *, port: int | None = None) -> "RawPeer":
        """A connection that says nothing by itself."""
        url = f"quic://127.0.0.1:{port or self.port}"
        return RawPeer(await connect(url, tls=self.tls), self.token)

    async def close(self) -> None:
        for client in self._clients:
            await client.close()
        for name in list(self.agents):
            await self.stop(name)

    @property
    def connected(self) -> list[str]:
        return [info.agent for info in self.infos().values() if info.state == "connected"]

    def infos(self) -> dict[str, AgentInfo]:
        return {info.agent: info for info in self.coordinator.list_fleet().agents}

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Every sample: (name, label values in the order of the labels' names) to value."""
        from prometheus_client import generate_latest

        return parse_metrics(generate_latest(self.coordinator.metrics.registry).decode())


def parse_metrics(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class RawPeer:
    """A client's end of the wire, played by hand."""

    def __init__(self, connection: Connection, token: str) -> None:
        self.connection = connection
        self.token = token
        self.control: Channel
        self.coordination: Channel

    async def open(self) -> BiStream:
        return await self.connection.open_bi_stream(Priority.HIGH)

    async def hello(
        self,
        id: str = "raw",
        *,
        role: Role = "agent",
        tasks: tuple[str, ...] = ("echo",),
        resume: Resume | None = None,
    ) -> Welcome:
        """Says hello and reads the welcome."""
        self.control = Channel(await self.open())
        await self.control.send(Hello(role=role, id=id, token=self.token, tasks=list(tasks), resume=resume))
        return await self.take(self.control, Welcome)

    async def join(
        self, id: str = "raw", *, tasks: tuple[str, ...] = ("echo",), resume: Resume | None = None
    ) -> Welcome:
        """Becomes an agent with its coordination stream open."""
        welcome = await self.hello(id, tasks=tasks, resume=resume)
        self.coordination = Channel(await self.open())
        await self.coordination.send(CoordinationOpened(session=welcome.session))
        return welcome

    @staticmethod
    async def take(channel: Channel, kind: type[M]) -> M:
        """The next message, which must be of this kind."""
        async with asyncio.timeout(PATIENCE_S):
            message = await channel.receive()
        assert isinstance(message, kind), message
        return message

    async def closed(self) -> ConnectionClosed:
        """How the coordinator ended the connection."""
        async with asyncio.timeout(PATIENCE_S):
            await self.connection.wait_closed()
        error = self.connection.close_error
        assert isinstance(error, ConnectionClosed)
        assert error.by_peer, error
        assert not error.transport, error
        return error

    async def leave(self) -> None:
        await self.connection.close()


@contextlib.asynccontextmanager
async def coordinating(
    state_dir: Path, *, listen: str = "127.0.0.1:0", learner: Learner | None = None, **sections: Any
) -> AsyncIterator[Fleet]:
    """A coordinator on a free port. Sections of settings are dictionaries: `rounds={"deadline_s": 1.0}`.

    At the end nothing may be left of it: no task, no open descriptor.
    """
    loop_tasks = asyncio.all_tasks()
    descriptors = open_descriptors()
    settings = Settings(**{"listen": listen, "http": "", "state_dir": state_dir, **sections})
    async with Coordinator(settings, learner=learner) as coordinator:
        fleet = Fleet(coordinator, state_dir)
        try:
            yield fleet
        finally:
            await fleet.close()
    await expect_nothing_left(loop_tasks, descriptors)


def open_descriptors() -> Counter[str]:
    """What this process has open: sockets and files, by what they are."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  the listing itself is one of them
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
            found[target.split(":")[0] if target.startswith("socket:") else target] += 1
    return found


async def expect_nothing_left(tasks: set[asyncio.Task[Any]], descriptors: Counter[str]) -> None:
    """All that was begun since has ended."""

    def left() -> list[str]:
        sockets = open_descriptors()["socket"] - descriptors["socket"]
        return [repr(task) for task in asyncio.all_tasks() - tasks - {asyncio.current_task()}] + ["socket"] * sockets

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(5):
            while left():  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    assert not left()

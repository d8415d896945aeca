"""The processes: a watched coordinator, agents for the large body, one for small questions, and who moves bytes."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from quorate_coordinator.bench.bodies.loop_watch import LoopTurn, read_turns
from quorate_coordinator.bench.bodies.moving import DEADLINE_S, TASK
from quorate_coordinator.bench.bodies.plan import PERIOD_S
from quorate_coordinator.certificates import DevelopmentCredentials
from quorate_coordinator.demo.examples import examples_directory
from quorate_coordinator.demo.processes import (
    DemoFailed,
    Processes,
    clean_environ,
    ready_socket,
    wait_joined,
    wait_ready,
)
from quorate_protocol.client import Client
from quorate_protocol.credentials import find_token
from quorate_protocol.transport import ClientTls

#: What the agent beside the body is asked.
_SMALL_TASK: Final = "small"
_QUESTION: Final = {"x": 1.5}
_DEADLINE_S: Final = 60.0

#: How often memory is looked at, in seconds.
_LOOK_S: Final = 0.05

_MOVING: Final = ("-m", "quorate_coordinator.bench.bodies.moving")


@dataclass(slots=True)
class Turn:
    """Small rounds for a while, and what was beside them."""

    #: Seconds of each round that began in that time.
    times_s: list[float]
    elapsed_s: float
    #: Of the coordinator's loop.
    loop_turns: list[LoopTurn]
    #: Bytes by which each process that has to do with the body grew.
    growth_bytes: dict[str, int] = field(default_factory=dict)


class Side:
    """See `side`."""

    def __init__(self, client: Client, processes: Processes, directory: Path, url: str, env: dict[str, str]) -> None:
        self._client = client
        self._processes = processes
        self._directory = directory
        self._url = url
        self._env = env

    async def alone(self, seconds: float) -> Turn:
        """Small rounds and nothing else."""
        async with self._asking() as asked:
            began_s = time.perf_counter()
            await asyncio.sleep(seconds)
            ended_s = time.perf_counter()
        return self._turn(asked, began_s, ended_s)

    async def beside_body(self, size_bytes: int) -> Turn:
        """Small rounds while a body goes to an agent and comes back.

        Raises:
            DemoFailed: it did not come back as it was.
        """
        movers = Processes(self._directory)
        looks: list[tuple[float, dict[str, int]]] = []
        try:
            await movers.start("operator", *_MOVING, "operate", self._url, str(size_bytes), env=self._env, piped=True)
            pids = {
                "coordinator": self._processes.pid("coordinator"),
                "agents": self._processes.pid("large"),
                "operator": movers.pid("operator"),
            }
            async with self._asking() as asked, _looking(pids, looks):
                began_s, ended_s = await _moved(movers, "operator")
        finally:
            await movers.stop()
        turn = self._turn(asked, began_s, ended_s)
        # What they had before the round is not the body's doing.
        first = [look for at, look in looks if at < began_s][-1:]
        during = [look for at, look in looks if began_s <= at < ended_s]
        for name in pids if first else ():
            turn.growth_bytes[name] = max((look[name] for look in during), default=0) - first[0][name]
        return turn

    async def beside_relay(self, size_bytes: int, credentials: DevelopmentCredentials) -> Turn:
        """Small rounds while three other processes move as many bytes the same way, by TLS over TCP.

        Raises:
            DemoFailed: one of them ended.
        """
        movers = Processes(self._directory)
        certificate, key = str(credentials.certificate_file), str(credentials.key_file)
        ca = str(credentials.ca_file)
        try:
            await movers.start("relay", *_MOVING, "relay", certificate, key, env=self._env, piped=True)
            port = str(json.loads(await movers.line("relay"))["port"])
            await movers.start("echo", *_MOVING, "echo", port, ca, env=self._env)
            async with self._asking() as asked:
                await movers.start("send", *_MOVING, "send", port, ca, str(size_bytes), env=self._env, piped=True)
                began_s, ended_s = await _moved(movers, "send")
        finally:
            await movers.stop()
        return self._turn(asked, began_s, ended_s)

    @contextlib.asynccontextmanager
    async def _asking(self) -> AsyncIterator[list[tuple[float, float]]]:
        """Asks a small question every `PERIOD_S`; when each was asked, and the seconds to its outcome."""
        asked: list[tuple[float, float]] = []

        async def ask() -> None:
            next_s = time.perf_counter()
            while True:
                began_s = time.perf_counter()
                outcome = await self._client.ask(_SMALL_TASK, _QUESTION, quorum=1.0, deadline_s=_DEADLINE_S)
                if outcome.state != "complete":
                    raise DemoFailed(f"a small round is {outcome.state}: {outcome.reason or 'its agent has failed'}")
                asked.append((began_s, time.perf_counter() - began_s))
                next_s = max(next_s + PERIOD_S, time.perf_counter())
                await asyncio.sleep(next_s - time.perf_counter())

        asking = asyncio.create_task(ask())
        try:
            yield asked
        finally:
            asking.cancel()
            await asyncio.wait((asking,))
        if not asking.cancelled():
            asking.result()

    def _turn(self, asked: list[tuple[float, float]], began_s: float, ended_s: float) -> Turn:
        times_s = [took_s for at_s, took_s in asked if began_s <= at_s < ended_s]
        if not times_s:
            raise DemoFailed("no small round began in that time: the body is too small")
        return Turn(times_s, ended_s - began_s, read_turns(_notes_in(self._directory), began_s, ended_s))


@contextlib.asynccontextmanager
async def side(directory: Path, credentials: DevelopmentCredentials, agents: int) -> AsyncIterator[Side]:
    """A coordinator with a journal, an agent for small questions and so many for the body, in a process of theirs.

    The directory is there and empty.

    Raises:
        DemoFailed: a process did not start or ended early.
    """
    processes = Processes(directory)
    token = find_token(credentials.token_file)
    # One that is ended before its time leaves its spool's directory, which is empty, and goes with ours.
    env = clean_environ(QUORATE_TOKEN=token, QUORATE_CA=str(credentials.ca_file), TMPDIR=str(directory))
    try:
        with ready_socket(directory) as (ready, notify_env):
            settings = {
                "QUORATE_LISTEN": "127.0.0.1:0",
                "QUORATE_HTTP": "",
                "QUORATE_STATE_DIR": str(directory / "state"),
                "QUORATE_TLS__CERTIFICATE_FILE": str(credentials.certificate_file),
                "QUORATE_TLS__KEY_FILE": str(credentials.key_file),
            }
            command = ("-m", "quorate_coordinator.bench.bodies.coordinator", str(_notes_in(directory)))
            await processes.start("coordinator", *command, env={**env, **notify_env, **settings})
            url = f"quic://{(await wait_ready(ready, processes))['X_QUORATE_LISTEN']}"
        crowd = str(examples_directory() / "crowd.py")
        for name, task, count in (("large", TASK, agents), ("small", _SMALL_TASK, 1)):
            given = ("--coordinator", url, "--agents", str(count), "--name", name, "--task", task)
            await processes.start(name, crowd, *given, env=env)
        async with await Client.connect(url, token=token, tls=ClientTls(credentials.ca_file), name="bench") as client:
            await wait_joined(client, ["small-0", *(f"large-{number}" for number in range(agents))], processes)
            yield Side(client, processes, directory, url, env)
    finally:
        await processes.stop()


async def _moved(movers: Processes, name: str) -> tuple[float, float]:
    """When a process that moves the bytes began and ended, by its own word."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            said = json.loads(await movers.line(name))
    except TimeoutError:
        raise DemoFailed(f"{name} has not moved the body within {DEADLINE_S:g} s") from None
    return said["began_s"], said["ended_s"]


@contextlib.asynccontextmanager
async def _looking(pids: dict[str, int], looks: list[tuple[float, dict[str, int]]]) -> AsyncIterator[None]:
    """Looks at the memory of processes again and again."""

    async def look() -> None:
        while True:
            looks.append((time.perf_counter(), {name: _own_bytes(pid) for name, pid in pids.items()}))
            await asyncio.sleep(_LOOK_S)

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.wait((looking,))


def _own_bytes(pid: int) -> int:
    """A process's resident memory, without pages of files: the page cache has those anyway. 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def _notes_in(directory: Path) -> Path:
    return directory / "loop"

"""Where the fleet's processes run, as tasks: what starts them, stops them, and starts them again."""

import asyncio
import random
import time
from contextvars import copy_context
from typing import Any, Final

from quorate_agent import Agent, Context, Declined
from quorate_agent.worker import Worker
from quorate_coordinator.journal.schema import JOURNAL_NAME
from quorate_coordinator.quic_simulation.history import History
from quorate_coordinator.quic_simulation.network import COORDINATOR_NAME, FleetNetwork, place
from quorate_coordinator.service import Coordinator
from quorate_coordinator.settings import Settings
from quorate_coordinator.simulation.tasks import tasks_of

URL: Final = f"memory:{COORDINATOR_NAME}"

#: Seconds that rounds in flight have when the coordinator drains.
_DRAIN_S: Final = 15.0

#: Seconds of the wall clock that a commit takes at the most.
_COMMIT_S_MAX: Final = 5.0

#: Seconds until a supervisor starts an agent again that has ended by itself.
_RESTART_S: Final = (0.5, 5.0)

#: Labels that agents answer with.
_LABELS: Final = range(4)


class CoordinatorPlace:
    """The coordinator's machine: its directory, and one process after the other."""

    def __init__(self, settings: Settings, network: FleetNetwork) -> None:
        self.settings: Final = settings
        self._network = network
        self.current: Coordinator | None = None
        self._changing = asyncio.Lock()

    @property
    def is_recording(self) -> bool:
        """Whether its journal's thread has something to do."""
        return self.current is not None and self.current.is_recording

    async def start(self) -> None:
        """Starts a process, which reads the journal of the last one."""
        coordinator = Coordinator(self.settings)
        await coordinator.start()
        self.current = coordinator

    async def restart(self, down_s: float, *, drain: bool) -> None:
        """Ends the process, as `kill -9` would or when its rounds are over, and starts another after a while."""
        async with self._changing:
            if self.current is not None and drain:
                await self.current.drain(_DRAIN_S)
                await self.current.close()
            elif self.current is not None:
                await self._kill(self.current)
            self.current = None
            await asyncio.sleep(down_s)
            await self.start()

    async def _kill(self, process: Coordinator) -> None:
        """From here on nobody hears of it, and what it writes is not there: its tasks may end in order."""
        self._network.is_coordinator_gone = True
        files = [self.settings.state_dir / name for name in (JOURNAL_NAME, f"{JOURNAL_NAME}-wal")]
        # Its thread is not ours to stop: what it writes is written first, and nobody was told of it.
        ends_at = time.perf_counter() + _COMMIT_S_MAX
        while process.is_recording and time.perf_counter() < ends_at:
            time.sleep(0.001)  # noqa: ASYNC251  the loop must not go on
        left = {file: file.read_bytes() for file in files if file.exists()}
        await process.close()
        for file in (*files, files[0].with_name(f"{JOURNAL_NAME}-shm")):
            file.unlink(missing_ok=True)
        for file, content in left.items():
            file.write_bytes(content)
        self._network.is_coordinator_gone = False

    async def stop(self) -> None:
        """For good."""
        async with self._changing:
            if self.current is not None:
                await self.current.close()
                self.current = None


class AgentPlace:
    """One agent's machine."""

    def __init__(self, seed: int, number: int, credentials: dict[str, Any], history: History) -> None:
        self.name: Final = f"agent-{number:04d}"
        self.tasks: Final = tasks_of(number)
        self._random = random.Random(f"{seed}/{self.name}")  # noqa: S311  repeatable on purpose
        self._credentials = credentials
        self._history = history
        self._skill = self._random.uniform(0.4, 0.98)
        self._processes = 0
        #: Kills that have not started it again.
        self._downs = 0
        self._worker: Worker | None = None
        self._task: asyncio.Task[Any] | None = None
        #: Handlers that start before this moment hang until it.
        self.hangs_until = 0.0
        self._context = copy_context()
        self._context.run(place.set, self.name)

    def start(self) -> None:
        """Starts its process."""
        if self._downs or self._task is not None:
            return
        self._processes += 1
        draw = random.Random(self._random.random())  # noqa: S311
        worker = self._worker = Worker(
            self._make_agent(f"{self.name}.{self._processes}", draw), URL, agent_id=self.name, rng=draw,
            **self._credentials,
        )  # fmt: skip
        task = self._task = asyncio.create_task(worker.run(), name=self.name, context=self._context)
        task.add_done_callback(self._ended)

    def _make_agent(self, process: str, draw: random.Random) -> Agent:
        agent = Agent(self.name, concurrency=draw.choice((1, 2, 4)))

        async def answer(question: int, context: Context) -> int:
            self._history.handler_started(process, context.round, context.attempt)
            compute_s = draw.expovariate(10.0)
            if draw.random() < 0.05:
                compute_s += draw.uniform(1.0, 20.0)
            now = asyncio.get_running_loop().time()
            await asyncio.sleep(max(compute_s, self.hangs_until - now))
            fate = draw.random()
            if fate < 0.05:
                raise Declined("not today")
            if fate < 0.1:
                raise ValueError("as it is")
            said = question if draw.random() < self._skill else draw.choice(_LABELS)
            self._history.said.setdefault((self.name, context.round), []).append(said)
            return said

        async def learn(question: int, truth: int) -> None:
            await asyncio.sleep(draw.expovariate(100.0))

        for task in self.tasks:
            agent.task(task)(answer)
            agent.feedback(task)(learn)
        return agent

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        if self._task is not task:
            return  # it was killed
        self._task = self._worker = None
        asyncio.get_running_loop().call_later(self._random.uniform(*_RESTART_S), self.start)

    def kill(self, down_s: float) -> None:
        """Its process ends without a goodbye, and another starts after a while."""
        self.end()
        self._downs += 1
        asyncio.get_running_loop().call_later(down_s, self._up)

    def _up(self) -> None:
        self._downs -= 1
        self.start()

    def end(self) -> "asyncio.Task[Any] | None":
        """Its process ends. Returns what to wait for."""
        task, self._task, self._worker = self._task, None, None
        if task is not None:
            task.cancel()
        return task

    def close(self) -> None:
        """Its process ends, and none is started any more."""
        self._downs += 1
        self.end()

    def ask_to_stop(self) -> None:
        """SIGTERM; its supervisor starts it again."""
        if self._worker is not None:
            self._worker.request_stop("SIGTERM")

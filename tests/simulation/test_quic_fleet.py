"""A small fleet of real shells over the real QUIC engine, on a bad network in memory, under virtual time.

What the simulation's models of the shells and of the network leave out is in here: streams, datagrams, the engine's
timers, the loop's tasks. It is slower by far, and so there are few agents and minutes.
"""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import quorate_protocol.transport.quic
from quorate_agent import Agent, Declined
from quorate_agent.worker import Worker
from quorate_coordinator.service import Coordinator
from quorate_coordinator.settings import Settings
from quorate_protocol.client import Client
from quorate_protocol.errors import QuorateError
from quorate_protocol.messages import Outcome
from quorate_protocol.transport import ClientTls, MemoryNetwork
from quorate_protocol.transport.memory import Fate
from virtual import run_virtually

URL = "memory:coordinator"

AGENTS = 6

#: Virtual seconds in which things go wrong, and in which all has to come back.
BUSY_S = 90.0
QUIET_S = 60.0

#: Virtual seconds that an outcome may take beyond its round's deadline: it travels over a bad network, too.
TRAVEL_S = 30.0


@dataclass
class History:
    """What was seen from outside."""

    #: (agent, question): the answers that its handlers gave.
    said: dict[tuple[str, int], list[str]] = field(default_factory=dict)
    outcomes: list[tuple[int, Outcome]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    started: Counter[tuple[int, str, int, int]] = field(default_factory=Counter)


class Place:
    """Where one agent runs: starts its process, kills it, starts it again."""

    def __init__(self, name: str, seed: int, state_dir: Path, history: History) -> None:
        self.name = name
        self.random = random.Random(f"{seed}/{name}")
        self.token = (state_dir / "token").read_text().strip()
        self.tls = ClientTls(state_dir / "ca.pem", server_name="localhost")
        self.history = history
        self.task: asyncio.Task[object] | None = None
        self.processes = 0

    def start(self) -> None:
        self.processes += 1
        process = self.processes
        agent = Agent(self.name)

        @agent.task("answer")
        async def answer(question: int, context: object) -> str:
            self.history.started[process, self.name, context.round, context.attempt] += 1  # type: ignore[attr-defined]
            await asyncio.sleep(self.random.expovariate(20.0))
            fate = self.random.random()
            if fate < 0.1:
                raise Declined("not today")
            if fate < 0.15:
                await asyncio.sleep(30.0)
            said = self.random.choice(("yes", "no"))
            self.history.said.setdefault((self.name, question), []).append(said)
            return said

        @agent.feedback("answer")
        async def learn(question: int, truth: str) -> None:
            await asyncio.sleep(0.01)

        worker = Worker(
            agent, URL, agent_id=self.name, token=self.token, tls=self.tls, rng=random.Random(self.random.random())
        )
        self.task = asyncio.create_task(worker.run(), name=self.name)

    async def kill(self) -> None:
        if self.task is not None:
            task, self.task = self.task, None
            task.cancel()
            await asyncio.wait([task])


async def ask_on(number: int, draw: random.Random, state_dir: Path, history: History, ends_at: float) -> None:
    """An operator that asks and reveals until it is time, and connects again when it has to."""
    loop = asyncio.get_running_loop()
    token = (state_dir / "token").read_text().strip()
    tls = ClientTls(state_dir / "ca.pem", server_name="localhost")
    question = 10_000 * number  # no two operators ask the same
    while loop.time() < ends_at:
        try:
            async with await Client.connect(URL, token=token, tls=tls) as client:
                while loop.time() < ends_at:
                    question += 1
                    deadline_s = draw.choice((0.2, 1.0, 3.0))
                    began_at = loop.time()
                    outcome = await client.ask(
                        "answer", question, quorum=draw.choice((1, 2, 0.5)), deadline_s=deadline_s
                    )
                    assert outcome.duration_s <= deadline_s + 1e-3
                    assert loop.time() - began_at < deadline_s + TRAVEL_S
                    history.outcomes.append((question, outcome))
                    if draw.random() < 0.7:
                        await client.reveal(outcome.round, draw.choice(("yes", "no")))
                    await asyncio.sleep(draw.expovariate(2.0))
        except QuorateError as error:
            history.errors[getattr(error, "reason", type(error).__name__)] += 1
            await asyncio.sleep(draw.uniform(0.1, 2.0))


async def spoil(draw: random.Random, network: MemoryNetwork, places: list[Place], ends_at: float) -> None:
    """Lets things go wrong until it is time, and mends them."""
    loop = asyncio.get_running_loop()
    while loop.time() < ends_at:
        network.loss = draw.choice((0.0, 0.02, 0.1, 0.3))
        network.duplication = draw.choice((0.0, 0.2))
        network.reordering = draw.choice((0.0, 0.3))
        match draw.randrange(4):
            case 0:
                network.partition("coordinator", f"client-{draw.randrange(1, 3 * AGENTS)}")
                await asyncio.sleep(draw.uniform(0.5, 15.0))
                network.heal()
            case 1:
                network.partition("coordinator")
                await asyncio.sleep(draw.uniform(0.5, 15.0))
                network.heal()
            case 2:
                place = draw.choice(places)
                await place.kill()
                await asyncio.sleep(draw.uniform(0.1, 3.0))
                place.start()
        await asyncio.sleep(draw.uniform(0.5, 5.0))
    network.heal()
    network.loss = network.duplication = network.reordering = 0.0


async def live(seed: int, network: MemoryNetwork, state_dir: Path) -> History:
    """A fleet's life."""
    loop = asyncio.get_running_loop()
    history = History()
    draw = random.Random(f"{seed}/faults")
    settings = Settings(http="", state_dir=state_dir).model_copy(update={"listen": URL})
    async with Coordinator(settings) as coordinator:
        places = [Place(f"agent-{number}", seed, state_dir, history) for number in range(AGENTS)]
        for place in places:
            place.start()
        await asyncio.sleep(2.0)
        ends_at = loop.time() + BUSY_S
        async with asyncio.TaskGroup() as group:
            for number in range(2):
                operator = random.Random(f"{seed}/operator {number}")
                group.create_task(ask_on(number, operator, state_dir, history, ends_at))
            group.create_task(spoil(draw, network, places, ends_at))
        await asyncio.sleep(QUIET_S)
        fleet = coordinator.list_fleet()
        assert {info.agent: info.state for info in fleet.agents} == {place.name: "connected" for place in places}
        assert fleet.rounds_open == 0
        for place in places:
            await place.kill()
    return history


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_real_shells_on_a_bad_network(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = MemoryNetwork(seed, delay_s=0.01, jitter_s=0.005)
    # Every link of this process, and no other's.
    monkeypatch.setattr(quorate_protocol.transport.quic, "process_network", lambda: network)
    history = run_virtually(live(seed, network, tmp_path))
    assert len(history.outcomes) > 20, history.errors
    for question, outcome in history.outcomes:
        names = [result.agent for result in outcome.results]
        assert names == sorted(set(names)), "one status for each selected agent"
        replied = [result for result in outcome.results if result.status == "replied"]
        assert (len(replied) >= outcome.quorum) == (outcome.state in ("complete", "quorate"))
        assert (outcome.state == "complete") == (len(replied) == len(names))
        for result in replied:
            assert result.value in history.said[result.agent, question], "a reply is its agent's own"
    assert max(history.started.values()) == 1, "no assignment runs twice in a process"
    assert min(network.fates[fate] for fate in (Fate.LOST, Fate.DUPLICATED, Fate.REORDERED, Fate.PARTITIONED)) > 0

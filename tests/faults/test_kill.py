"""Coordinator and agents killed with SIGKILL at random, under load, and then the journal against what operators saw.

`QUORATE_KILL_SECONDS` says how long (12; `make kill` takes a minute and more), `QUORATE_KILL_SEED` which run: that one
draws the same, but processes are as fast as they are.
"""

import asyncio
import contextlib
import os
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from processes import PATIENCE_S, clean_environment
from quorate_coordinator.journal.records import RoundClosed, RoundOpened, TruthTold
from quorate_coordinator.journal.verify import verify
from quorate_coordinator.ledger import outcome_of
from quorate_protocol.client import Client
from quorate_protocol.errors import CallFailed, LinkError
from quorate_protocol.messages import Outcome
from restarting import Restarting, joined, last_state, records_in, recovered, replay_all

T = TypeVar("T")

KILL_SECONDS = float(os.environ.get("QUORATE_KILL_SECONDS", "12"))
AGENTS = tuple(f"agent-{number}" for number in range(6))
OPERATORS = 4

#: Calls of one operator at once.
CALLS = 3

#: Over any call: it ends in an outcome or an error, whatever dies.
CALL_S = 30.0

AGENT = """
import asyncio, random
from quorate_agent import Agent

agent = Agent(concurrency=16)

@agent.task("sum")
async def add(body):
    await asyncio.sleep(random.random() * 0.02)
    if random.random() < 0.05:
        raise ValueError("not today")
    return sum(body) if random.random() < 0.9 else -1

@agent.feedback("sum")
async def learn(body, truth):
    pass
"""


class AgentProcess:
    """`quorate-agent run`, again after each of its deaths."""

    def __init__(self, name: str, file: Path, restarting: Restarting) -> None:
        self._command = (str(Path(sys.executable).with_name("quorate-agent")), "run", f"{file}:agent", "--id", name)
        self._environ = clean_environment(**restarting.environ)
        self._log = file.with_name(f"{name}.log")
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, env=self._environ, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )

    async def kill(self) -> None:
        assert self._process is not None
        # It must not have ended by itself, whatever its coordinator did.
        assert self._process.returncode is None, self._log.read_text()[-2000:]
        self._process.kill()
        await self._process.wait()

    async def end(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


@dataclass
class Seen:
    """What operators were told."""

    #: By key.
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    #: Questions by key: another operator asks them again.
    questions: dict[str, list[int]] = field(default_factory=dict)
    #: Truths whose answer came, by round; and those that were told to an earlier run that died before it answered.
    revealed: dict[int, int] = field(default_factory=dict)
    #: How calls ended.
    ends: Counter[str] = field(default_factory=Counter)


class Operator:
    """Asks with keys until it has the outcome, tells truths, and asks again what others have asked."""

    def __init__(self, name: str, draw: random.Random, restarting: Restarting, seen: Seen) -> None:
        self._name = name
        self._draw = draw
        self._restarting = restarting
        self._seen = seen
        self._client: Client | None = None
        self._connecting = asyncio.Lock()
        self._asked = 0

    async def work(self, is_over: Callable[[], bool]) -> None:
        async def go_on() -> None:
            while not is_over():
                await self._ask_and_tell()
                await asyncio.sleep(self._draw.random() * 0.02)

        try:
            await asyncio.gather(*(go_on() for _ in range(CALLS)))
        finally:
            await self._drop(self._client)

    async def _ask_and_tell(self) -> None:
        seen, draw = self._seen, self._draw
        if seen.outcomes and draw.random() < 0.2:
            key = draw.choice(list(seen.outcomes))
            again = await self._ask(key, seen.questions[key])
            assert again == seen.outcomes[key], f"{key} has two outcomes"
            return
        self._asked += 1
        key = f"{self._name}-{self._asked}"
        question = seen.questions[key] = [draw.randrange(1000) for _ in range(draw.choice([1, 5, 500]))]
        outcome = seen.outcomes[key] = await self._ask(key, question)
        assert outcome.state in ("complete", "quorate", "expired", "failed"), outcome
        seen.ends[f"round {outcome.state}"] += 1
        if draw.random() < 0.7:
            await self._reveal(outcome.round, sum(question))

    async def _ask(self, key: str, question: list[int]) -> Outcome:
        is_streamed = key[-1] in "369"

        async def ask(client: Client) -> Outcome:
            options: dict[str, Any] = {"key": key, "quorum": 2, "grace_s": 0.05, "deadline_s": 3.0}
            if not is_streamed:
                return await client.ask("sum", question, **options)
            async with client.ask_stream("sum", question, **options) as replies:
                agents = [result.agent async for result in replies]
                assert sorted(agents) == [result.agent for result in replies.outcome.results]
                return replies.outcome

        if self._draw.random() < 0.15 and self._client is not None:
            # Withdrawn after a moment; asked again at once, it may be the same round or another.
            with contextlib.suppress(TimeoutError, LinkError, CallFailed):
                async with asyncio.timeout(self._draw.random() * 0.02):
                    return await ask(self._client)
            self._seen.ends["withdrawn"] += 1
        return await self._until_done(ask)

    async def _reveal(self, number: int, truth: int) -> None:
        async def reveal(client: Client) -> None:
            try:
                await client.reveal(number, truth)
            except CallFailed as error:
                # An earlier try was taken, and its answer lost.
                if error.reason != "already-revealed":
                    raise

        await self._until_done(reveal)
        self._seen.revealed[number] = truth

    async def _until_done(self, call: Callable[[Client], Awaitable[T]]) -> T:
        """Calls again as the errors say that one may."""
        while True:
            client = self._client
            try:
                async with asyncio.timeout(CALL_S):
                    client = await self._connected()
                    done = await call(client)
            except CallFailed as error:
                self._seen.ends[f"error {error.reason}"] += 1
                assert error.retry, error
            except LinkError as error:
                self._seen.ends[type(error).__name__] += 1
                await self._drop(client)
            else:
                self._seen.ends["done"] += 1
                return done
            await asyncio.sleep(0.02 + self._draw.random() * 0.1)

    async def _connected(self) -> Client:
        async with self._connecting:
            if self._client is None:
                restarting = self._restarting
                self._client = await Client.connect(
                    restarting.url, token=restarting.token, tls=restarting.tls, name=self._name, timeout_s=5.0
                )
            return self._client

    async def _drop(self, client: Client | None) -> None:
        if client is not None and client is self._client:
            self._client = None
            await client.close()


def audit(restarting: Restarting, seen: Seen) -> None:
    """What operators saw is in the journal, once, and the learner is what the journal says."""
    records = records_in(restarting.journal)
    closed: dict[int, RoundClosed] = {}
    for record in records:
        if isinstance(record, RoundClosed):
            assert record.round not in closed, f"round {record.round} is closed twice"
            closed[record.round] = record
    opened = [record for record in records if isinstance(record, RoundOpened)]
    assert len({record.round for record in opened}) == len(opened)
    assert {record.round for record in opened} == set(closed), "a round has no end"
    for key, outcome in seen.outcomes.items():
        assert outcome_of(closed[outcome.round]) == outcome, key
        assert closed[outcome.round].key == key
    final = Counter(record.key for record in closed.values() if record.state not in ("interrupted", "cancelled"))
    assert final == Counter(dict.fromkeys(seen.outcomes, 1))
    truths = [record for record in records if isinstance(record, TruthTold)]
    assert len({record.round for record in truths}) == len(truths), "a truth was learned twice"
    assert {record.round for record in truths} == set(seen.revealed)
    assert verify(restarting.journal).problems == []
    assert recovered(restarting.journal).ledger.learner.snapshot() == replay_all(restarting.journal)
    assert last_state(restarting.journal) == replay_all(restarting.journal)


@pytest.mark.timeout(KILL_SECONDS + 180)
async def test_killed_at_random_nothing_that_was_told_is_lost(tmp_path: Path) -> None:
    seed = int(os.environ.get("QUORATE_KILL_SEED", "0")) or random.randrange(1, 1 << 32)
    print(f"QUORATE_KILL_SEED={seed}")  # noqa: T201  shown with a failure
    draw = random.Random(seed)
    file = tmp_path / "summing.py"
    file.write_text(AGENT)
    seen = Seen()
    kills: Counter[str] = Counter()
    over = asyncio.Event()
    quick = {"QUORATE_SESSIONS__PULSE_S": "0.1", "QUORATE_SESSIONS__LEASE_S": "1.5", "QUORATE_LOG__LEVEL": "warning"}

    async def wait(seconds: float) -> bool:
        """Whether it goes on after that."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(over.wait(), seconds)
        return not over.is_set()

    async with Restarting(tmp_path / "state", **quick) as restarting, contextlib.AsyncExitStack() as stack:
        agents = [AgentProcess(name, file, restarting) for name in AGENTS]
        for agent in agents:
            stack.push_async_callback(agent.end)
            await agent.start()
        async with restarting.client() as client:
            await joined(client, *AGENTS)

        async def kill_coordinator() -> None:
            while await wait(draw.uniform(2.0, 4.0)):
                await restarting.kill()
                kills["coordinator"] += 1
                await restarting.start()

        async def kill_agents() -> None:
            while await wait(1.0):
                agent = draw.choice(agents)
                await agent.kill()
                kills["agents"] += 1
                await agent.start()

        operators = [
            Operator(f"operator-{number}", random.Random(draw.random()), restarting, seen)
            for number in range(OPERATORS)
        ]
        async with asyncio.TaskGroup() as group:
            group.create_task(kill_coordinator())
            group.create_task(kill_agents())
            for operator in operators:
                group.create_task(operator.work(over.is_set))
            await asyncio.sleep(KILL_SECONDS)  # this is how long the run is
            over.set()
        # All calls have ended. The agents come back by themselves, and rounds go on.
        async with restarting.client() as client:
            await joined(client, *AGENTS, patience_s=PATIENCE_S)
            outcome = await client.ask("sum", [1, 2], key="last", quorum=1)
            seen.outcomes["last"] = outcome
            assert len(outcome.results) == len(AGENTS)
        ended = await restarting.stop()
    print(f"{KILL_SECONDS:g} s: kills {dict(kills)}, calls {dict(seen.ends)}, {len(seen.outcomes)} keys")  # noqa: T201  and by make kill
    assert "Traceback" not in ended.err
    assert kills["coordinator"] >= 1
    assert kills["agents"] >= 1
    assert seen.ends["done"] > 20
    audit(restarting, seen)

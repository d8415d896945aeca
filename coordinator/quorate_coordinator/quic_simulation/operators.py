"""Operators with real clients: they ask, leave, connect again, ask again under the same key, and tell truths."""

import asyncio
import contextlib
import random
from typing import Any, Final

from quorate_coordinator.quic_simulation.history import History, fail
from quorate_coordinator.quic_simulation.network import place
from quorate_coordinator.quic_simulation.places import URL
from quorate_coordinator.simulation.plan import CallPlan, RevealPlan
from quorate_protocol.client import Client
from quorate_protocol.errors import CallFailed, QuorateError
from quorate_protocol.messages import Outcome

#: Tries of a call, and the seconds between them: beyond, an operator gives up.
_TRIES_MAX: Final = 12
_RETRY_S: Final = (0.2, 5.0)

#: Seconds after which a try without an answer counts as failed: over any deadline and what an outcome takes to travel.
_PATIENCE_S: Final = 90.0

#: Right answers.
_LABELS: Final = range(4)


class Operator:
    """One, with a connection at a time for all its calls."""

    def __init__(self, seed: int, number: int, credentials: dict[str, Any], history: History) -> None:
        self._random = random.Random(f"{seed}/operator {number}")  # noqa: S311  repeatable on purpose
        self._credentials = credentials
        self._history = history
        #: Whose ports those of its connections are.
        self.name: Final = f"operator-{number}"
        self._client: Client | None = None
        self._connecting = asyncio.Lock()
        #: Calls whose outcome was told for good, by key, with their question.
        self._told: dict[str, tuple[CallPlan, int]] = {}

    async def make(self, call: CallPlan, start_s: float) -> None:
        """Makes a call when it is time, and tells its truth.

        Raises:
            NotHeld: what it is told cannot be.
        """
        place.set(self.name)
        loop = asyncio.get_running_loop()
        question = self._random.choice(_LABELS)
        await asyncio.sleep(max(0.0, start_s + call.at_s - loop.time()))
        try:
            async with asyncio.timeout(call.cancel_after_s):
                outcome = await self._ask(call, question)
        except TimeoutError:
            self._history.calls["left"] += 1
            return
        if outcome is None:
            return
        self._history.told(call, outcome)
        self._history.calls[outcome.state] += 1
        if call.keyed and call.key in self._history.outcomes:
            self._told[call.key] = call, question
        if call.reveal is not None:
            for _ in range(call.reveal.times):
                await self._reveal(outcome.round, question, call.reveal)

    async def make_again(self) -> None:
        """Makes all calls again that were answered: who has a key gets the same answer.

        Raises:
            NotHeld: it is another one.
        """
        for key, (call, question) in self._told.items():
            outcome = await self._ask(call, question)
            if outcome is None:
                fail("announced stays found", f"{key} is not answered any more")
            self._history.told_again(key, outcome)

    async def close(self) -> None:
        """Ends its connection."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(QuorateError):
                await client.close()

    async def _ask(self, call: CallPlan, question: int) -> Outcome | None:
        """The outcome; None, counted, when the coordinator does not want the call or is not there for long."""
        problem = ""
        for number in range(_TRIES_MAX):
            if number:
                await asyncio.sleep(self._random.uniform(*_RETRY_S) * min(number, 4))
            client: Client | None = None
            try:
                client = await self._connected()
                async with asyncio.timeout(_PATIENCE_S):
                    return await client.ask(
                        call.task,
                        question,
                        quorum=call.quorum if call.quorum is not None else call.quorum_fraction,
                        grace_s=call.grace_s,
                        deadline_s=call.deadline_s,
                        attempts=call.attempts,
                        count=call.count,
                        key=call.key if call.keyed else None,
                    )
            except CallFailed as error:
                problem = error.reason
                if not error.retry:
                    self._history.calls[problem] += 1
                    return None
            except TimeoutError:
                problem = "no answer"
            except QuorateError:
                problem = "link broke"
                await self._drop(client)
        self._history.calls[f"gave up: {problem}"] += 1
        return None

    async def _reveal(self, round_id: int, truth: int, plan: RevealPlan) -> None:
        await asyncio.sleep(plan.after_s)
        client: Client | None = None
        try:
            client = await self._connected()
            async with asyncio.timeout(_PATIENCE_S):
                await client.reveal(round_id + plan.off_by if round_id + plan.off_by > 0 else round_id, truth)
            self._history.calls["reveal: revealed"] += 1
        except CallFailed as error:
            self._history.calls[f"reveal: {error.reason}"] += 1
        except (QuorateError, TimeoutError):
            self._history.calls["reveal: link broke"] += 1
            await self._drop(client)

    async def _connected(self) -> Client:
        async with self._connecting:
            if self._client is None:
                self._client = await Client.connect(URL, **self._credentials)
            return self._client

    async def _drop(self, client: Client | None) -> None:
        if client is not None and self._client is client:
            await self.close()

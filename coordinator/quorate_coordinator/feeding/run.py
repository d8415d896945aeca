"""The prequential loop: ask, count, reveal, and so on."""

import time
from collections.abc import AsyncIterable, Callable
from dataclasses import dataclass
from typing import Any

from quorate_coordinator.feeding.tally import Tally
from quorate_protocol.client import Client
from quorate_protocol.messages import Outcome


@dataclass(frozen=True, slots=True)
class AskOptions:
    """What every round of a run shall be like; None leaves it to the coordinator."""

    quorum: int | float | None = None
    grace_s: float | None = None
    deadline_s: float | None = None
    labels: dict[str, str] | None = None


async def feed(
    client: Client,
    task: str,
    instances: AsyncIterable[tuple[Any, Any, bool]],
    tally: Tally,
    *,
    options: AskOptions,
    on_outcome: Callable[[Outcome], None],
) -> None:
    """Asks for each instance in turn and reveals its truth before the next.

    Args:
        client: connected.
        task: what the agents are asked to do.
        instances: (what they are asked, the truth, whether there is one).
        tally: counted into as it goes, so that an interrupted run still has its counts.
        options: of each round.
        on_outcome: called after each instance.

    Raises:
        CallFailed: a round could not be opened, or a truth was not taken.
        ConnectionClosed: the coordinator went.
    """
    async for value, truth, has_truth in instances:
        began = time.perf_counter()
        outcome = await client.ask(
            task,
            value,
            quorum=options.quorum,
            grace_s=options.grace_s,
            deadline_s=options.deadline_s,
            labels=options.labels,
        )
        tally.add_outcome(outcome, time.perf_counter() - began)
        if has_truth:
            tally.add_truth(await client.reveal(outcome.round, truth))
        on_outcome(outcome)

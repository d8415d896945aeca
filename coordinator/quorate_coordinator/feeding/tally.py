"""Counts of a prequential run: each instance is asked first, scored, then learned from. Pure."""

import math
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final

from quorate_protocol.messages import Outcome, Revealed

#: Newest times of which quantiles are taken: all of the demo's data sets, and no end of memory for a feed
#: without end.
TIMES_MAX: Final = 100_000


def _times() -> deque[float]:
    return deque(maxlen=TIMES_MAX)


@dataclass(slots=True)
class AgentTally:
    """One agent's part."""

    asked: int = 0
    replies: int = 0
    #: Replies whose truth was told, and those of them that were right.
    scored: int = 0
    right: int = 0
    #: Learner's weight after the last truth.
    weight: float | None = None
    latencies_s: deque[float] = field(default_factory=_times)
    #: How its other parts ended: status to count.
    others: Counter[str] = field(default_factory=Counter)

    @property
    def accuracy(self) -> float | None:
        """Share of scored replies that were right."""
        return self.right / self.scored if self.scored else None


class Tally:
    """Adds up outcomes and truths."""

    def __init__(self) -> None:
        self.instances = 0
        #: Instances whose truth was told, and those of them whose combined answer was right. An
        #: instance without an answer counts as wrong.
        self.scored = 0
        self.right = 0
        self.states: Counter[str] = Counter()
        self.agents: dict[str, AgentTally] = {}
        self.rounds_s = _times()
        self.overheads_s = _times()

    def add_outcome(self, outcome: Outcome, round_s: float) -> None:
        """A round has ended; `round_s` is how long its operator waited, in seconds."""
        self.instances += 1
        self.states[outcome.state] += 1
        self.rounds_s.append(round_s)
        slowest_s = 0.0
        for result in outcome.results:
            agent = self.agents.setdefault(result.agent, AgentTally())
            agent.asked += 1
            slowest_s = max(slowest_s, result.compute_s + result.waited_s)
            if result.weight is not None:
                agent.weight = result.weight
            if result.status == "replied":
                agent.replies += 1
                if result.latency_s is not None:
                    agent.latencies_s.append(result.latency_s)
            else:
                agent.others[result.status] += 1
        self.overheads_s.append(max(0.0, round_s - slowest_s))

    def add_truth(self, revealed: Revealed) -> None:
        """The truth of a round was told."""
        self.scored += 1
        self.right += revealed.correct is True
        for name, right in revealed.right.items():
            agent = self.agents.setdefault(name, AgentTally())
            agent.scored += 1
            agent.right += right
        for name, weight in revealed.weights.items():
            if name in self.agents:
                self.agents[name].weight = weight

    @property
    def answered(self) -> int:
        """Rounds that met their quorum."""
        return self.states["complete"] + self.states["quorate"]

    @property
    def accuracy(self) -> float | None:
        """Share of scored instances whose combined answer was right."""
        return self.right / self.scored if self.scored else None

    def as_json(self, elapsed_s: float) -> dict[str, Any]:
        """What was counted and measured; times in milliseconds."""
        return {
            "instances": self.instances,
            "ensemble": {"accuracy": self.accuracy},
            "agents": {
                name: {
                    "accuracy": agent.accuracy,
                    "weight": agent.weight,
                    "replies": agent.replies,
                    "latency_p50_ms": _ms(quantile(agent.latencies_s, 0.5)),
                    "latency_p99_ms": _ms(quantile(agent.latencies_s, 0.99)),
                }
                for name, agent in sorted(self.agents.items())
            },
            "rounds_per_s": self.instances / elapsed_s if elapsed_s > 0 else None,
            "round_p50_ms": _ms(quantile(self.rounds_s, 0.5)),
            "round_p99_ms": _ms(quantile(self.rounds_s, 0.99)),
            "overhead_p50_ms": _ms(quantile(self.overheads_s, 0.5)),
        }


def quantile(values: Collection[float], q: float) -> float | None:
    """The smallest value that at least a share `q` of the values do not exceed; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)

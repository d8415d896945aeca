"""What the coordinator sees of a learner. No learner is imported here.

The service's shell translates between these and the events of the rounds' core, which knows no
learner. A learner has one writer, and gets closed rounds and truths in the order of the journal: the
same calls in the same order give the same state, bit for bit.
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, Self

from quorate_protocol.errors import LocalError
from quorate_protocol.fields import Body, BodyRef
from quorate_protocol.limits import BODY_BYTES_MAX


class SnapshotInvalid(LocalError):
    """A snapshot cannot be restored: it is damaged, another learner's, or of a version this one does not know."""


@dataclass(frozen=True, slots=True)
class Request:
    """A round about to be opened."""

    task: str
    #: What the agents are asked, as its maker packed it, or a reference to it.
    body: Body
    #: Agents that can do the task and are free for it.
    candidates: tuple[str, ...]
    #: How many of them to ask at most; None asks as many as the learner likes.
    count: int | None = None
    #: With `count`: rounds that each candidate owes a reply in now.
    load: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Coordination:
    """How a round shall go. None leaves what the operator or the settings fixed.

    Raises:
        TypeError, ValueError: no round can go so.
    """

    #: Whom to ask: a part of the candidates.
    agents: tuple[str, ...]
    #: Replies needed.
    quorum: int | None = None
    #: Seconds left to stragglers once quorum is met.
    grace_s: float | None = None
    #: Seconds until the hard end.
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if not all(isinstance(agent, str) for agent in self.agents):
            raise TypeError(f"agents: {self.agents!r:.80} are not ids")
        if self.quorum is not None and (isinstance(self.quorum, bool) or operator.index(self.quorum) < 1):
            raise ValueError(f"quorum: {self.quorum!r} is no count of replies")
        for name, seconds in (("grace_s", self.grace_s), ("deadline_s", self.deadline_s)):
            if seconds is not None and (isinstance(seconds, bool) or not math.isfinite(seconds) or seconds < 0):
                raise ValueError(f"{name}: {seconds!r} is no time")
        if self.deadline_s == 0:
            raise ValueError("deadline_s: 0 leaves no time")


@dataclass(frozen=True, slots=True)
class AgentReply:
    """One agent's answer in a closed round. Those who declined, failed or were late have none."""

    agent: str
    #: The answer as the agent packed it, or a reference to it; it may be anything, even no msgpack at all.
    body: Body
    #: Seconds from sending the assignment to receiving the reply, by the coordinator's clock.
    latency_s: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise ValueError(f"the latency of {self.agent} is {self.latency_s} s")


@dataclass(frozen=True, slots=True)
class ClosedRound:
    """A closed round as a learner sees it: who answered what.

    To `combine` it comes without `answer`; to `learn`, with the one that was announced.
    """

    round: int
    task: str
    #: At most one of each agent, in any order: no result may depend on the order of arrival.
    replies: tuple[AgentReply, ...]
    #: The combined answer that the operator got; None where there was none.
    answer: Body | None = None

    def __post_init__(self) -> None:
        if len({reply.agent for reply in self.replies}) != len(self.replies):
            raise ValueError(f"round {self.round} has two replies of one agent")


@dataclass(frozen=True, slots=True)
class LateReply:
    """An answer that came after its agent's part in a round had ended; the outcome was without it."""

    round: int
    task: str
    reply: AgentReply


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer from many replies.

    Raises:
        TypeError, ValueError: it is none that could be told or recorded.
    """

    #: One of the replies' bodies, as it came; None where no reply could be read.
    body: Body | None = None
    #: Share of the weight of all who replied that stands behind the answer, 0 to 1; None without one.
    support: float | None = None
    #: Weight of each agent that replied, a part of the task's whole weight of 1.
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.body, bytes | BodyRef | None):
            raise TypeError(f"the answer is neither bytes nor a reference but a {type(self.body).__name__}")
        if isinstance(self.body, bytes) and len(self.body) > BODY_BYTES_MAX:
            raise ValueError(
                f"the answer has {len(self.body)} bytes, over the {BODY_BYTES_MAX} that any reply may have"
            )
        if self.support is not None and not 0 <= self.support <= 1:
            raise ValueError(f"the support is {self.support}, not within 0 and 1")
        _check_weights(self.weights)


@dataclass(frozen=True, slots=True)
class Experience:
    """What an agent told on its telemetry stream, outside any round."""

    agent: str
    topic: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Report:
    """What a learner took from a truth or an experience.

    Raises:
        TypeError, ValueError: it is none that could be told.
    """

    #: Whether the combined answer was right; None where there was none.
    correct: bool | None = None
    #: Whether each agent that replied was right.
    agents: Mapping[str, bool] = field(default_factory=dict)
    #: Their weights after learning, parts of the task's whole weight of 1.
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_weights(self.weights)


@dataclass(frozen=True, slots=True)
class AgentScore:
    """How one agent does at one task."""

    #: Part of the task's whole weight of 1.
    weight: float
    #: Share of its answers that were right, 0 to 1.
    accuracy: float
    #: Its answers whose truth is known.
    answers: int


@dataclass(frozen=True, slots=True)
class TaskScore:
    """How a task goes."""

    task: str
    #: Share of the combined answers that were right, 0 to 1; None before the first truth.
    accuracy: float | None
    #: Combined answers whose truth is known.
    answers: int
    #: Sorted by agent.
    agents: Mapping[str, AgentScore]


@dataclass(frozen=True, slots=True)
class Latency:
    """Quantiles of an agent's recent reply latencies."""

    p50_s: float
    p99_s: float


class Learner(Protocol):
    """State that is shaped by rounds and shapes the next. Not thread-safe: one writer."""

    def compute_coordination(self, request: Request) -> Coordination:
        """Whom to ask and how long to wait. Changes nothing."""
        ...

    def combine(self, outcome: ClosedRound) -> Answer:
        """One answer from the replies. To be called at most once for a closed round: it counts their latencies."""
        ...

    def learn(self, outcome: ClosedRound, truth: Body) -> Report:
        """Scores a round's agents once its truth is known, however late.

        Raises:
            FrameMalformed: the truth is not one msgpack value. Nothing has changed.
        """
        ...

    def take_late(self, late: LateReply) -> None:
        """Takes an answer that came too late for its round: how slow its agent is, say."""
        ...

    def process_message(self, experience: Experience) -> Report | None:
        """Takes what an agent tells of its own accord; None where that changed nothing, and is not to be recorded."""
        ...

    def snapshot(self) -> bytes:
        """All state, for `restore`. Equal states give equal bytes."""
        ...

    @classmethod
    def restore(cls, snapshot: bytes) -> Self:
        """The learner that `snapshot` was taken of; it goes on bit for bit as that one would.

        Raises:
            SnapshotInvalid: not a snapshot of this kind of learner. Nothing in it is ever executed.
        """
        ...

    def weights(self, task: str) -> Mapping[str, float]:
        """Weight of each agent known for the task, sorted by agent, in all 1. Empty for an unknown task."""
        ...

    def scores(self) -> tuple[TaskScore, ...]:
        """How each task and its agents do, sorted by task."""
        ...

    def latency(self, agent: str) -> Latency | None:
        """Reply latency of an agent; None when it has not been heard."""
        ...


def _check_weights(weights: Mapping[str, float]) -> None:
    for agent, weight in weights.items():
        if not isinstance(agent, str):
            raise TypeError(f"a weight is of {agent!r}, which is no agent's id")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight of {agent} is {weight}")

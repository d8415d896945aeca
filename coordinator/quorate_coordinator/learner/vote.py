"""The learner that ships: a weighted vote whose weights follow the truths by fixed share.

Every task has a vote of its own. An answer has the weight of all agents that gave it (`answers` says
when two bodies are the same answer); the heaviest wins. When the truth is known, whoever was wrong
loses weight (`fixed_share`). Agents that did not reply are asleep: they neither win nor lose. A reply
that cannot be read votes for nothing and counts as wrong.

Accuracies and latency quantiles are River's.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from typing import Any, Final, Self

import msgpack
from river import metrics, stats

from quorate_coordinator.learner.answers import answer_key
from quorate_coordinator.learner.api import (
    AgentReply,
    AgentScore,
    Answer,
    ClosedRound,
    Coordination,
    Experience,
    Latency,
    LateReply,
    Report,
    Request,
    SnapshotInvalid,
    TaskScore,
)
from quorate_coordinator.learner.fixed_share import LEARNING_RATE, SHARE, FixedShare
from quorate_protocol.errors import FrameMalformed
from quorate_protocol.fields import Body
from quorate_protocol.limits import CONNECTIONS_MAX

#: Agents whose latency is remembered, the least recently heard go first: as many as may be
#: connected at once. One takes about 8 KiB.
AGENTS_MAX: Final = CONNECTIONS_MAX

#: Agents with a weight, summed over the tasks; the least recently scored go first. Two tasks of the
#: greatest fleet, or a hundred of a fleet of 300. One takes about 2 KiB.
PAIRS_MAX: Final = 2 * CONNECTIONS_MAX

#: Newest latencies from which an agent's quantiles are taken: enough for a p99 that means something,
#: few enough to follow a network that changes.
LATENCIES_MAX: Final = 128

_FORMAT: Final = "quorate.vote"
_VERSION: Final = 1


class VoteLearner:
    """A `Learner` that votes.

    Args:
        learning_rate: How hard a wrong answer costs weight; over 0.
        share: Part of its weight that each agent gives away after a truth; from 0, below 1.
        agents_max: Agents whose latency is remembered.
        pairs_max: Pairs of task and agent with a weight.

    Raises:
        ValueError: a number is out of its bounds.
    """

    def __init__(
        self,
        *,
        learning_rate: float = LEARNING_RATE,
        share: float = SHARE,
        agents_max: int = AGENTS_MAX,
        pairs_max: int = PAIRS_MAX,
    ) -> None:
        if agents_max < 1 or pairs_max < 1:
            raise ValueError("a learner must remember at least one agent")
        self._newcomers = FixedShare(learning_rate, share)  # never learns: checks the numbers, weighs unknown tasks
        self._agents_max = agents_max
        self._pairs_max = pairs_max
        self._tasks: dict[str, _Task] = {}
        #: Both in the order of last use, least recent first.
        self._pairs: OrderedDict[tuple[str, str], _Accuracy] = OrderedDict()
        self._latencies: OrderedDict[str, _Latencies] = OrderedDict()

    def compute_coordination(self, request: Request) -> Coordination:
        """All candidates, for as long as the settings say; of too many, those with the greatest weight.

        Among equals, those that owe least now go first, then by name.
        """
        agents = request.candidates
        if request.count is not None and request.count < len(agents):
            weights = self._weights_of(request.task, agents)
            by_worth = sorted(agents, key=lambda agent: (-weights[agent], request.load.get(agent, 0), agent))
            agents = tuple(by_worth[: request.count])
        return Coordination(agents=tuple(sorted(agents)))

    def combine(self, outcome: ClosedRound) -> Answer:
        """The heaviest answer. Counts the replies' latencies, so it is called at most once for a closed round.

        Of two answers with the same weight, the one with the smaller key wins. The body is that of the
        heaviest agent behind the answer, by name the first of those.
        """
        replies = sorted(outcome.replies, key=lambda reply: reply.agent)
        for reply in replies:
            self._count_latency(reply)
        self._forget()
        if not replies:
            return Answer()
        weights = self._weights_of(outcome.task, (reply.agent for reply in replies))
        bodies = {reply.agent: reply.body for reply in replies}
        behind: dict[bytes, list[str]] = {}
        for agent, key in _keys(bodies).items():
            if key is not None:
                behind.setdefault(key, []).append(agent)
        if not behind:
            return Answer(weights=weights)
        sums = {key: math.fsum(weights[agent] for agent in agents) for key, agents in behind.items()}
        best = min(sums, key=lambda key: (-sums[key], key))
        speaker = min(behind[best], key=lambda agent: (-weights[agent], agent))
        support = min(1.0, sums[best] / math.fsum(weights.values()))
        return Answer(body=bodies[speaker], support=support, weights=weights)

    def learn(self, outcome: ClosedRound, truth: Body) -> Report:
        """Moves the weights of the agents that replied. The replies may be a part of those that were combined.

        Raises:
            FrameMalformed: the truth is not one msgpack value. Nothing has changed.
        """
        truth_key = answer_key(truth)
        bodies = {reply.agent: reply.body for reply in outcome.replies}
        right = {agent: key == truth_key for agent, key in sorted(_keys(bodies).items())}
        correct = None if outcome.answer is None else _keys({"": outcome.answer})[""] == truth_key
        if right:
            task = self._tasks.get(outcome.task)
            if task is None:
                task = self._tasks[outcome.task] = _Task(self._newcomers)
            task.share.update({agent: 0.0 if was_right else 1.0 for agent, was_right in right.items()})
            if correct is not None:
                task.accuracy.count(correct)
            for agent, was_right in right.items():
                pair = (outcome.task, agent)
                accuracy = self._pairs.get(pair)
                if accuracy is None:
                    accuracy = self._pairs[pair] = _Accuracy()
                accuracy.count(was_right)
                self._pairs.move_to_end(pair)
            self._forget()
        return Report(correct=correct, agents=right, weights=self._weights_of(outcome.task, right))

    def take_late(self, late: LateReply) -> None:
        """Counts its latency: quantiles of those alone who came in time would be too good."""
        self._count_latency(late.reply)
        self._forget()

    def process_message(self, experience: Experience) -> None:
        """Nothing: a vote learns from truths alone."""

    def weights(self, task: str) -> Mapping[str, float]:
        """Weight of each agent known for the task, sorted by agent, in all 1. Empty for an unknown task."""
        known = self._tasks.get(task)
        return known.share.weights() if known else {}

    def scores(self) -> tuple[TaskScore, ...]:
        """How each task and its agents do, sorted by task."""
        return tuple(self._score(name, task) for name, task in sorted(self._tasks.items()))

    def latency(self, agent: str) -> Latency | None:
        """Quantiles of the agent's newest replies, over all tasks; None when it is not remembered."""
        latencies = self._latencies.get(agent)
        return latencies.quantiles() if latencies else None

    def snapshot(self) -> bytes:
        """All state as one msgpack map; the order of the lists is the order of last use."""
        state = {
            "format": _FORMAT,
            "version": _VERSION,
            "learning_rate": self._newcomers.learning_rate,
            "share": self._newcomers.share,
            "tasks": [[name, task.accuracy.counts()] for name, task in sorted(self._tasks.items())],
            "pairs": [
                [task, agent, accuracy.counts(), self._tasks[task].share.raw_weights[agent]]
                for (task, agent), accuracy in self._pairs.items()
            ],
            "latencies": [[agent, list(latencies.newest_s)] for agent, latencies in self._latencies.items()],
        }
        return msgpack.packb(state, use_bin_type=True)  # type: ignore[no-any-return]

    @classmethod
    def restore(
        cls,
        snapshot: bytes,
        *,
        learning_rate: float | None = None,
        share: float | None = None,
        agents_max: int = AGENTS_MAX,
        pairs_max: int = PAIRS_MAX,
    ) -> Self:
        """The learner that `snapshot` was taken of, with its rate and share unless others are given.

        The ceilings are settings, not state: under lower ones than the snapshot's learner had, the least
        recently heard are forgotten.

        Raises:
            SnapshotInvalid: not a snapshot of a vote, or of a version that this one does not know.
            ValueError: a number that was given is out of its bounds.
        """
        try:
            state = msgpack.unpackb(snapshot, raw=False)
            if state["format"] != _FORMAT or state["version"] != _VERSION:
                raise SnapshotInvalid(f"a snapshot of {state['format']}, version {state['version']}, is not known here")
            saved = cls(learning_rate=state["learning_rate"], share=state["share"])
            saved._load(state)
        except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
            raise SnapshotInvalid(f"not a vote's snapshot: {type(error).__name__}") from error
        learner = cls(
            learning_rate=saved._newcomers.learning_rate if learning_rate is None else learning_rate,
            share=saved._newcomers.share if share is None else share,
            agents_max=agents_max,
            pairs_max=pairs_max,
        )
        for name, task in saved._tasks.items():
            learner._tasks[name] = _Task(learner._newcomers, task.share.raw_weights, task.accuracy)
        learner._pairs, learner._latencies = saved._pairs, saved._latencies
        learner._forget()
        return learner

    def _load(self, state: dict[str, Any]) -> None:
        weights: dict[str, dict[str, float]] = {}
        for task, agent, counts, weight in state["pairs"]:
            self._pairs[str(task), str(agent)] = _Accuracy(*counts)
            weights.setdefault(task, {})[agent] = weight
        for name, counts in state["tasks"]:
            self._tasks[name] = _Task(self._newcomers, weights.pop(name), _Accuracy(*counts))
        if weights:
            raise ValueError("agents of a task that is not there")
        for agent, newest_s in state["latencies"]:
            self._latencies[str(agent)] = _Latencies(newest_s)

    def _count_latency(self, reply: AgentReply) -> None:
        latencies = self._latencies.get(reply.agent)
        if latencies is None:
            latencies = self._latencies[reply.agent] = _Latencies()
        latencies.count(reply.latency_s)
        self._latencies.move_to_end(reply.agent)

    def _weights_of(self, task: str, agents: Iterable[str]) -> dict[str, float]:
        known = self._tasks.get(task)
        return (known.share if known else self._newcomers).weights_of(agents)

    def _score(self, name: str, task: "_Task") -> TaskScore:
        agents = {}
        for agent, weight in task.share.weights().items():
            accuracy = self._pairs[name, agent]
            agents[agent] = AgentScore(weight=weight, accuracy=accuracy.value(), answers=accuracy.answers)
        answers = task.accuracy.answers
        return TaskScore(name, task.accuracy.value() if answers else None, answers, agents)

    def _forget(self) -> None:
        while len(self._latencies) > self._agents_max:
            self._latencies.popitem(last=False)
        forgotten: dict[str, list[str]] = {}
        while len(self._pairs) > self._pairs_max:
            (task, agent), _ = self._pairs.popitem(last=False)
            forgotten.setdefault(task, []).append(agent)
        for task, agents in forgotten.items():
            share = self._tasks[task].share
            share.forget(agents)
            if not share:
                del self._tasks[task]


class _Accuracy:
    """River's accuracy of what is right or wrong, with its two counts at hand for snapshots."""

    __slots__ = ("_metric", "answers", "right")

    def __init__(self, right: int = 0, answers: int = 0) -> None:
        if not 0 <= right <= answers:
            raise ValueError(f"{right} of {answers} cannot be right")
        self.right = right
        self.answers = answers
        self._metric = metrics.Accuracy()  # type: ignore[no-untyped-call]
        # The metric holds the counts as floats, which are exact up to 2**53: one step or many is the same.
        if right:
            self._metric.update(True, True, w=float(right))
        if answers > right:
            self._metric.update(True, False, w=float(answers - right))

    def count(self, right: bool) -> None:
        self.right += right
        self.answers += 1
        self._metric.update(True, right)

    def counts(self) -> list[int]:
        return [self.right, self.answers]

    def value(self) -> float:
        return float(self._metric.get())  # type: ignore[no-untyped-call]


class _Latencies:
    """River's rolling quantiles of an agent's latencies."""

    __slots__ = ("_p50", "_p99", "newest_s")

    def __init__(self, newest_s: Iterable[float] = ()) -> None:
        # River's window cannot be read back; this one is what a snapshot holds.
        self.newest_s: deque[float] = deque(maxlen=LATENCIES_MAX)
        self._p50 = stats.RollingQuantile(0.50, LATENCIES_MAX)
        self._p99 = stats.RollingQuantile(0.99, LATENCIES_MAX)
        for latency_s in newest_s:
            if not math.isfinite(latency_s):  # River would panic
                raise ValueError(f"a latency of {latency_s} s")
            self.count(latency_s)

    def count(self, latency_s: float) -> None:
        self.newest_s.append(latency_s)
        self._p50.update(latency_s)
        self._p99.update(latency_s)

    def quantiles(self) -> Latency | None:
        p50_s, p99_s = self._p50.get(), self._p99.get()
        return None if p50_s is None or p99_s is None else Latency(p50_s, p99_s)


class _Task:
    """A task's weights, and how its combined answers do."""

    __slots__ = ("accuracy", "share")

    def __init__(
        self, like: FixedShare, weights: Mapping[str, float] | None = None, accuracy: _Accuracy | None = None
    ) -> None:
        self.share = FixedShare(like.learning_rate, like.share, weights)
        self.accuracy = accuracy or _Accuracy()


def _keys(bodies: Mapping[str, Body]) -> dict[str, bytes | None]:
    """The answer that each agent gave; None for a body that cannot be read. Equal bodies are read once."""
    read: dict[Body, bytes | None] = {}
    for body in bodies.values():
        if body not in read:
            try:
                read[body] = answer_key(body)
            except FrameMalformed:
                read[body] = None
    return {agent: read[body] for agent, body in bodies.items()}

"""What stands between rounds, learner and disk: an outcome is told when its record is durable.

The simplest thing that keeps that promise, until the coordinator's own ledger takes its place here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from quorate_coordinator.learner.api import AgentReply, ClosedRound, Learner, Report
from quorate_coordinator.rounds.instructions import Outcome

#: Records between two checkpoints: few, so that most replays begin at one.
_CHECKPOINT_EVERY: Final = 16


@dataclass(frozen=True, slots=True)
class ClosedRecord:
    """A round is over."""

    key: str
    outcome: Outcome
    #: What the learner combined, with the answer that came of it.
    seen: ClosedRound
    #: Whether the learner combined it.
    has_quorum: bool


@dataclass(frozen=True, slots=True)
class TruthRecord:
    """A round's truth was told."""

    round: int
    truth: bytes


Record = ClosedRecord | TruthRecord


def apply_record(learner: Learner, record: Record, closed: dict[int, ClosedRecord]) -> None:
    """Lets a learner live through one record; `closed` holds the rounds of the records before it."""
    if isinstance(record, ClosedRecord):
        closed[record.outcome.round] = record
        if record.has_quorum:
            learner.combine(record.seen)
    else:
        learner.learn(closed[record.round].seen, record.truth)


class LedgerModel:
    """One process's."""

    def __init__(
        self,
        learner: Learner,
        records: Sequence[Record],
        *,
        covered: int,
        append: Callable[[Record], int],
        checkpoint: Callable[[int, bytes], None],
    ) -> None:
        """Replays what is durable.

        Args:
            learner: As a checkpoint had it.
            records: All durable ones.
            covered: How many of them the checkpoint has seen.
            append: Writes a record; returns its number.
            checkpoint: Keeps a snapshot that covers so many records.
        """
        self.learner: Final = learner
        self._append = append
        self._checkpoint = checkpoint
        self._checkpointed = covered
        self._last = len(records)
        self._closed: dict[int, ClosedRecord] = {}
        #: By key: rounds that are over and durable.
        self._found: dict[str, tuple[int, ClosedRecord]] = {}
        for number, record in enumerate(records, start=1):
            if isinstance(record, ClosedRecord):
                self._found[record.key] = number, record
            if number <= covered:
                if isinstance(record, ClosedRecord):
                    self._closed[record.outcome.round] = record
            else:
                apply_record(learner, record, self._closed)
        #: In the order of their records: what is to be done when one is durable.
        self._held: list[tuple[int, Callable[[int], None]]] = []

    @property
    def held(self) -> int:
        """Announcements that wait."""
        return len(self._held)

    def find(self, key: str) -> tuple[int, ClosedRecord] | None:
        """The durable round that was asked for under a key, with its record's number."""
        return self._found.get(key)

    def close(self, key: str, outcome: Outcome, announce: Callable[[int, ClosedRecord], None]) -> None:
        """Combines and records a closed round; it is announced when that is durable."""
        has_quorum = outcome.state in ("complete", "quorate")
        seen = _as_learner_sees(outcome)
        if has_quorum:
            answer = self.learner.combine(seen)
            seen = _as_learner_sees(outcome, answer.body)
        record = ClosedRecord(key, outcome, seen, has_quorum)
        self._closed[outcome.round] = record

        def tell(number: int) -> None:
            self._found[key] = number, record
            announce(number, record)

        self._hold(record, tell)

    def learn(self, round_id: int, truth: bytes, announce: Callable[[int, Report], None]) -> None:
        """Learns and records a truth; likewise."""
        report = self.learner.learn(self._closed[round_id].seen, truth)
        self._hold(TruthRecord(round_id, truth), lambda number: announce(number, report))

    def durable(self, number: int) -> None:
        """All records up to this one are durable."""
        due = [tell for record, tell in self._held if record <= number]
        due_numbers = [record for record, _ in self._held if record <= number]
        del self._held[: len(due)]
        for record, tell in zip(due_numbers, due, strict=True):
            tell(record)
        if number == self._last and number - self._checkpointed >= _CHECKPOINT_EVERY:
            self._checkpointed = number
            self._checkpoint(number, self.learner.snapshot())

    def _hold(self, record: Record, tell: Callable[[int], None]) -> None:
        self._last = self._append(record)
        self._held.append((self._last, tell))


def _as_learner_sees(outcome: Outcome, answer: bytes | None = None) -> ClosedRound:
    return ClosedRound(
        round=outcome.round,
        task=outcome.task,
        replies=tuple(
            AgentReply(result.agent, result.body, result.latency_s or 0.0)
            for result in outcome.results
            if result.status == "replied" and result.body is not None
        ),
        answer=answer,
    )

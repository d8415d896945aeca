"""Between rounds, learner and journal: what is recorded, in which order, and what may be said when. A pure core.

Theory of operation. Whatever changes the learner (a closed round, a truth, a late reply, an experience) goes
through here, one at a time: the learner takes it, a record is made of it, and what is to be announced because
of it is held. The shell appends the record to its journal, tells under which number (`hold`), and tells
when records have become durable (`committed`): only then are announcements let go, in the order of the
records. So what anybody was told is always found again.

The order of the records is the order of the learner's calls. `replay` makes the same calls from records;
over the state of the last checkpoint, it gives the state of an uninterrupted run, bit for bit.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from quorate_coordinator.journal.records import (
    ExperienceTaken,
    Record,
    RecordedResult,
    ReplyLate,
    RoundClosed,
    RoundOpened,
    TruthTold,
)
from quorate_coordinator.learner.api import AgentReply, Answer, ClosedRound, Experience, LateReply, Learner, Report
from quorate_coordinator.rounds.instructions import AgentResult as BookResult
from quorate_coordinator.rounds.instructions import LearnTruth, OfferLateReply, OpenRound
from quorate_coordinator.rounds.instructions import Outcome as BookOutcome
from quorate_protocol.errors import CallFailed
from quorate_protocol.fields import Body, place
from quorate_protocol.messages import AgentResult, Outcome, Revealed, clip_text

log = structlog.get_logger()

#: States in which a round has an answer.
ANSWERED: Final = ("complete", "quorate")


@dataclass(frozen=True, slots=True)
class Question:
    """What an operator says of an `ask` beside the round itself: under which key it may ask it again."""

    key: str | None = None
    #: Tells whether the same key asks the same; with a key.
    digest: bytes | None = None


@dataclass(frozen=True, slots=True)
class Announcement:
    """What the call with this number is answered, now that it is durable."""

    request_id: int
    answer: Outcome | Revealed | CallFailed


class Ledger:
    """See the module. One writer."""

    def __init__(self, learner: Learner) -> None:
        self.learner: Final = learner
        #: Announced answers of rounds whose truth may come; the book says when to let go of one.
        self._answers: dict[int, Body] = {}
        #: (record, announcement) that wait for durability, in the records' order.
        self._held: deque[tuple[int, Announcement]] = deque()

    @property
    def held(self) -> int:
        """Announcements that wait."""
        return len(self._held)

    @property
    def answers(self) -> int:
        """Rounds whose announced answer is kept for their truth."""
        return len(self._answers)

    # --- what is recorded ---

    def open(self, opened: OpenRound, question: Question) -> RoundOpened:
        """The record of a round that opens."""
        return RoundOpened(
            round=opened.round,
            task=opened.task,
            body=opened.body,
            selected=opened.selected,
            quorum=opened.policy.quorum,
            grace_s=opened.policy.grace_s,
            deadline_s=opened.policy.deadline_s,
            operator=opened.operator,
            key=question.key,
            digest=question.digest,
        )

    def close(self, closed: BookOutcome, question: Question) -> tuple[RoundClosed, Outcome]:
        """Combines the replies of a closed round: the record, and the outcome to announce once that is durable."""
        answer = self._combine(closed.round, closed.task, closed.state, closed.results)
        record = RoundClosed(
            round=closed.round,
            task=closed.task,
            state=closed.state,
            quorum=closed.quorum,
            results=tuple(
                RecordedResult(
                    result.agent,
                    result.status,
                    result.body,
                    clip_text(result.error),
                    result.latency_s,
                    result.compute_s,
                    result.waited_s,
                )
                for result in closed.results
            ),
            duration_s=closed.duration_s,
            reason=clip_text(closed.reason),
            answer=answer.body,
            support=answer.support,
            weights=answer.weights,
            key=question.key,
            digest=question.digest,
        )
        return record, outcome_of(record)

    def learn(self, told: LearnTruth) -> tuple[TruthTold, Revealed | None]:
        """Scores a round's agents: the record, and what to announce once that is durable.

        A learner that raises has nothing to announce. The truth is recorded all the same: it was told, and what the
        learner made of it before it failed is part of its state, which replay makes again.
        """
        closed = told.outcome
        revealed = self._learn(closed.round, closed.task, closed.results, told.truth)
        return TruthTold(closed.round, told.truth), revealed

    def take_late(self, late: OfferLateReply) -> ReplyLate:
        """Offers a late reply to the learner."""
        record = ReplyLate(late.round, late.task, late.agent, late.body, late.latency_s, late.compute_s, late.waited_s)
        self._offer(record)
        return record

    def experience(self, experience: Experience) -> tuple[ExperienceTaken, Report | None]:
        """Hands the learner what an agent told of its own accord; without a report there is nothing to record."""
        record = ExperienceTaken(experience.agent, experience.topic, experience.body)
        return record, self._process(record)

    def forget(self, round_id: int) -> None:
        """The truth of a round will not come."""
        self._answers.pop(round_id, None)

    # --- what may be said ---

    def hold(self, seq: int, announcement: Announcement) -> None:
        """Keeps what is to be announced until record `seq` is durable."""
        assert not self._held or seq >= self._held[-1][0], "records go up"
        self._held.append((seq, announcement))

    def committed(self, seq: int) -> list[Announcement]:
        """All records up to `seq` are durable: what may be said now, in order."""
        free: list[Announcement] = []
        while self._held and self._held[0][0] <= seq:
            free.append(self._held.popleft()[1])
        return free

    def unannounced(self) -> list[Announcement]:
        """What is held, in order. It stays: records that cannot be written now may still become durable."""
        return [announcement for _, announcement in self._held]

    # --- recovery ---

    def replay(self, record: Record) -> None:
        """Makes the learner's call that made this record."""
        match record:
            case RoundClosed():
                self._combine(record.round, record.task, record.state, record.results)
                self.recall(record)
            case TruthTold():
                raise AssertionError("a truth is replayed with its round: `replay_truth`")
            case ReplyLate():
                self._offer(record)
            case ExperienceTaken():
                self._process(record)
            case RoundOpened():
                pass

    def replay_truth(self, closed: RoundClosed, told: TruthTold) -> None:
        """Makes the learner's call that made the record `told`."""
        self.recall(closed)
        self._learn(closed.round, closed.task, closed.results, told.truth)

    def recall(self, closed: RoundClosed) -> None:
        """Remembers the answer that was announced of a round, whose truth may come."""
        self._answers.pop(closed.round, None)
        if closed.answer is not None:
            self._answers[closed.round] = closed.answer

    def recalled(self, awaiting: Iterable[RoundClosed]) -> None:
        """The replay is over: only the truths of these rounds may still come."""
        self._answers.clear()
        for closed in awaiting:
            self.recall(closed)

    # --- the learner ---

    def _combine(self, round_id: int, task: str, state: str, results: Iterable[BookResult | RecordedResult]) -> Answer:
        if state not in ANSWERED:
            return Answer()
        try:
            combined = self.learner.combine(_as_learner_sees(round_id, task, results))
            # Plain values, whatever the learner reckons with (NumPy's cannot be packed).
            support = None if combined.support is None else float(combined.support)
            answer = Answer(combined.body, support, _floats(combined.weights))
        except Exception:
            # The round is over and its operator waits: a fault of the learner's costs the answer alone.
            log.exception("learner_failed_to_combine", round=round_id, task=task)
            return Answer()
        if answer.body is not None:
            self._answers[round_id] = answer.body
        return answer

    def _learn(
        self, round_id: int, task: str, results: Iterable[BookResult | RecordedResult], truth: Body
    ) -> Revealed | None:
        """What the learner says, in plain values as in `_combine`; None where it raised."""
        seen = _as_learner_sees(round_id, task, results, self._answers.pop(round_id, None))
        try:
            report = self.learner.learn(seen, truth)
            return Revealed(
                round=round_id,
                correct=None if report.correct is None else bool(report.correct),
                right={agent: bool(was_right) for agent, was_right in report.agents.items()},
                weights=_floats(report.weights),
            )
        except Exception:
            log.exception("learner_failed_to_learn", round=round_id, task=task)
            return None

    def _offer(self, late: ReplyLate) -> None:
        try:
            self.learner.take_late(LateReply(late.round, late.task, AgentReply(late.agent, late.body, late.latency_s)))
        except Exception:
            log.exception("learner_failed_to_take_late", round=late.round, task=late.task)

    def _process(self, taken: ExperienceTaken) -> Report | None:
        try:
            return self.learner.process_message(Experience(taken.agent, taken.topic, taken.body))
        except Exception:
            log.exception("learner_failed_to_process", agent=taken.agent, topic=taken.topic)
            return Report()


def _floats(weights: Mapping[str, float]) -> dict[str, float]:
    return {agent: float(weight) for agent, weight in weights.items()}


def outcome_of(closed: RoundClosed) -> Outcome:
    """The outcome that was announced of a recorded round."""
    return Outcome(
        round=closed.round,
        task=closed.task,
        state=closed.state,
        quorum=closed.quorum,
        **place(closed.answer, "answer"),
        support=closed.support,
        results=[as_told(result, closed.weights.get(result.agent)) for result in closed.results],
        duration_s=closed.duration_s,
        reason=closed.reason,
    )


def as_told(result: BookResult | RecordedResult, weight: float | None = None) -> AgentResult:
    """One agent's part as an operator is told it."""
    return AgentResult(
        agent=result.agent,
        status=result.status,
        **place(result.body),
        error=clip_text(result.error),
        latency_s=result.latency_s,
        compute_s=result.compute_s,
        waited_s=result.waited_s,
        weight=weight,
    )


def book_outcome_of(closed: RoundClosed) -> BookOutcome:
    """A recorded round as the book of rounds knew it."""
    return BookOutcome(
        round=closed.round,
        request_id=0,
        task=closed.task,
        state=closed.state,
        quorum=closed.quorum,
        selected=tuple(result.agent for result in closed.results),
        results=tuple(
            BookResult(
                result.agent,
                result.status,
                result.body,
                result.error,
                result.latency_s,
                result.compute_s,
                result.waited_s,
            )
            for result in closed.results
        ),
        duration_s=closed.duration_s,
        reason=closed.reason,
    )


def interrupt(opened: RoundOpened, reason: str) -> RoundClosed:
    """The end of a round that was open when the coordinator died. What its agents answered is not known."""
    return RoundClosed(
        round=opened.round,
        task=opened.task,
        state="interrupted",
        quorum=opened.quorum,
        results=tuple(RecordedResult(agent, "cancelled") for agent in sorted(opened.selected)),
        duration_s=0.0,
        reason=reason,
        answer=None,
        support=None,
        weights={},
        key=opened.key,
        digest=opened.digest,
    )


def without_answers(closed: BookOutcome, question: Question) -> RoundClosed:
    """The end of a round whose answers cannot be recorded. It has failed, under its key as well."""
    reason = "what its agents answered cannot be recorded"
    return RoundClosed(
        round=closed.round,
        task=closed.task,
        state="failed",
        quorum=closed.quorum,
        results=tuple(
            RecordedResult(result.agent, "failed", error=reason)
            if result.status == "replied"
            else RecordedResult(result.agent, result.status)
            for result in closed.results
        ),
        duration_s=closed.duration_s,
        reason=reason,
        key=question.key,
        digest=question.digest,
    )


def _as_learner_sees(
    round_id: int, task: str, results: Iterable[BookResult | RecordedResult], answer: Body | None = None
) -> ClosedRound:
    return ClosedRound(
        round=round_id,
        task=task,
        replies=tuple(
            AgentReply(result.agent, result.body, result.latency_s or 0.0)
            for result in results
            if result.status == "replied" and result.body is not None
        ),
        answer=answer,
    )

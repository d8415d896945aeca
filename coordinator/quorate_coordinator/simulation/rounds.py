"""The coordinator's rounds: the real book, planner, keys, learner and ledger in a model of their shell (`gather`).

The only file here that knows the book's events and instructions.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Protocol

from quorate_coordinator.idempotency import Keys, digest_of, is_final
from quorate_coordinator.journal.records import Record, RoundClosed
from quorate_coordinator.learner.api import Learner
from quorate_coordinator.ledger import Announcement, Ledger, Question, book_outcome_of, interrupt, outcome_of
from quorate_coordinator.planning import Candidates, Planner
from quorate_coordinator.rounds import events as rd
from quorate_coordinator.rounds import instructions as ri
from quorate_coordinator.rounds.book import BookLimits, RoundBook
from quorate_coordinator.rounds.policy import RoundPolicy
from quorate_coordinator.simulation.auditor import Auditor, ClosedFacts, OpenedFacts
from quorate_coordinator.simulation.disk import MakeLearner, SimDisk
from quorate_coordinator.simulation.draws import fate_of
from quorate_coordinator.simulation.plan import CallPlan, operator_of
from quorate_coordinator.simulation.process import Process
from quorate_protocol.errors import CallFailed
from quorate_protocol.messages import (
    Ask,
    Assignment,
    Cancellation,
    Feedback,
    Message,
    Outcome,
    Reply,
    Revealed,
    clip_text,
)

MakeBook = Callable[..., RoundBook]
MakeLedger = Callable[[Learner], Ledger]
MakeKeys = Callable[[], Keys]

#: What an ask gets that does not say.
POLICY: Final = RoundPolicy(deadline_s=10.0, grace_s=0.25, quorum_fraction=0.5)

#: Small enough that a burst fills them.
LIMITS: Final = BookLimits(
    in_flight_max=64,
    in_flight_per_agent_max=8,
    in_flight_per_operator_max=24,
    held_bytes_max=4096,
    remembered_max=100,
    traces_max=50,
)

#: Round numbers reserved at once.
_BLOCK: Final = 1000

#: Rounds between two checkpoints: few, so that most replays begin at one.
_CHECKPOINT_ROUNDS: Final = 8


@dataclass(frozen=True, slots=True)
class Told:
    """The answer to an ask, or to a reveal."""

    #: 0 with an error that names no round.
    round: int
    state: str
    #: Of all that the operator sees: the same outcome has the same.
    digest: str = ""
    #: With an error: why, and whether the same call may succeed later.
    error: str = ""
    retry: bool = False


Answer = Callable[[Told], None]


@dataclass(slots=True)
class Asked:
    """A call whose outcome has not been told."""

    call: CallPlan
    question: Question
    #: Who waits for it, by the number of the operator's try.
    answers: "dict[int, Answer]"
    #: 0 until it is open.
    round: int = 0
    #: Of the record of its end; 0 until then.
    record: int = 0


class FleetFace(Protocol):
    """What rounds need of the fleet."""

    def select(self, task: str) -> tuple[str, ...]:
        """Agents that can be asked, sorted."""

    def select_away(self, task: str) -> tuple[str, ...]:
        """Agents that could be asked if they had a link, sorted."""

    def send(self, agents: tuple[str, ...], message: Message) -> None:
        """Sends one message to each of these agents; those who are away get all but assignments when they return."""


class Rounds:
    """In one process of the coordinator."""

    def __init__(
        self,
        process: Process,
        disk: SimDisk,
        auditor: Auditor,
        *,
        make_book: MakeBook,
        make_learner: MakeLearner,
        make_ledger: MakeLedger,
        make_keys: MakeKeys,
    ) -> None:
        self._process = process
        self._world = process.world
        self._disk = disk
        self._auditor = auditor
        self.fleet: FleetFace
        first = disk.free_round
        disk.free_round += _BLOCK
        self.book: Final = make_book(LIMITS, first_round=first)
        self._recovered = disk.recover(make_learner, LIMITS.remembered_max)
        self.ledger: Final = make_ledger(self._recovered.ledger.learner)
        self.ledger.recalled(self._recovered.awaiting)
        self._planner: Final = Planner(self.book, self.ledger.learner, POLICY, lambda agent, size_bytes: False)
        self._keys: Final = make_keys()
        self._rounds_since_checkpoint = 0
        self._problem = ""
        disk.open(
            lambda number: process.call(self._committed, number),
            lambda problem: process.call(self._recording_failed, problem),
            lambda: process.call(self._recording_recovered),
        )
        self._timer_at = math.inf
        self._request_ids = itertools.count(1)
        #: Calls that wait, by request.
        self._asks: dict[int, Asked] = {}
        self._reveals: dict[int, tuple[int, Answer]] = {}
        self._on_drained: Callable[[], None] = lambda: None
        self.strays: Counter[str] = Counter()

    def recover(self) -> None:
        """Takes up what an earlier process left."""
        for closed in self._recovered.awaiting:
            for instruction in self.book.recall(book_outcome_of(closed)):
                self._carry_out(instruction)
        for cut_off in self._recovered.cut_off:
            self._record(interrupt(cut_off, "the coordinator died while it was open"))

    def find_round(self, key: str) -> int | None:
        """The round that answers a key for good, as far as its record is durable."""
        closed = self._disk.find_key(key)
        return None if closed is None or not is_final(outcome_of(closed)) else closed.round

    def prune(self) -> None:
        """Lets the disk forget what is old."""
        self._disk.prune(self.book.awaiting(), self._pruned)

    def _pruned(self, rounds: frozenset[int], now_s: float) -> None:
        self._auditor.pruned(rounds, self.book.awaiting(), now_s)

    # --- calls ---

    def ask(self, call: CallPlan, body: bytes, number: int, answer: Answer) -> None:
        """Opens a round, or joins the one under its key; `answer` is called at its end, or at once with an error.

        Args:
            number: Of the operator's try.
        """
        ask = Ask(
            task=call.task,
            body=body,
            quorum=call.quorum,
            quorum_fraction=call.quorum_fraction,
            grace_s=call.grace_s,
            deadline_s=call.deadline_s,
            attempts=call.attempts,
            count=call.count,
            key=call.key if call.keyed else None,
        )
        question = Question(call.key, digest_of(ask)) if call.keyed else Question()
        if self._join(question, number, answer):
            return
        if self._problem:
            answer(Told(0, "", error="not-recorded", retry=True))
            return
        request_id = next(self._request_ids)
        candidates = Candidates(self.fleet.select(call.task), self.fleet.select_away(call.task))
        try:
            operator = f"operator-{operator_of(call.key)}"
            request = self._planner.plan(ask, candidates, request_id=request_id, operator=operator)
        except CallFailed as error:
            answer(Told(0, "", error=error.reason, retry=error.retry))
            return
        self._asks[request_id] = Asked(call, question, {number: answer})
        if question.key is not None and question.digest is not None:
            self._keys.open(question.key, question.digest, request_id)
        self._handle(request)

    def _join(self, question: Question, number: int, answer: Answer) -> bool:
        """Whether there is a round under this key: in flight, so that both wait for the one round, or over."""
        if question.key is None or question.digest is None:
            return False
        keyed = self._keys.find(question.key, question.digest)
        if keyed is not None and keyed.request_id is not None:
            asked = self._asks[keyed.request_id]
            asked.answers[number] = answer
            self._auditor.operator_joined(asked.round, number)
            return True
        outcome = keyed.outcome if keyed is not None else None
        if outcome is None:
            closed = self._disk.find_key(question.key)
            outcome = None if closed is None else outcome_of(closed)
        if outcome is None or not is_final(outcome):
            return False
        self._tell([answer], question.key, None, outcome)
        return True

    def leave(self, call: CallPlan, number: int, *, withdraws: bool) -> None:
        """A try of an operator is over: withdrawn, or its link broke. As in the shell (`asking`)."""
        self._auditor.operator_leaves(call.key, number, withdraws=withdraws)
        for asked in list(self._asks.values()):
            if asked.call.key == call.key and asked.answers.pop(number, None) is not None:
                cancels = withdraws or not call.keyed
                if cancels and not asked.answers and asked.round:
                    self._handle(rd.RoundCancelled(asked.round, "its operator left"))
        self._auditor.operator_left(call.key)

    def reveal(self, round_id: int, truth: bytes, answer: Answer) -> None:
        """Scores a round's agents."""
        if self._problem:
            answer(Told(0, "", error="not-recorded", retry=True))
            return
        request_id = next(self._request_ids)
        self._reveals[request_id] = round_id, answer
        self._handle(rd.TruthRevealed(request_id, round_id, truth))

    # --- events ---

    def reply_received(self, agent: str, reply: Reply) -> None:
        """An agent's reply came in."""
        self._world.note(f"{agent} r{reply.round} {reply.status} attempt {reply.attempt}")
        self._auditor.reply_received(agent, reply.round)
        self._handle(
            rd.ReplyReceived(
                round=reply.round,
                agent=agent,
                attempt=reply.attempt,
                status=reply.status,
                body=reply.body if reply.status == "replied" else None,
                error=reply.error,
                compute_s=reply.compute_s,
                waited_s=reply.waited_s,
            )
        )

    def agent_reachable(self, agent: str) -> None:
        """An agent has a link it had not: it gets what it owes."""
        self._handle(rd.AgentReachable(agent))

    def agent_lost(self, agent: str, reason: str) -> None:
        """What an agent worked on will not come."""
        self._handle(rd.AgentLost(agent, reason))
        self._auditor.check_waiting(agent, self.book.in_flight_of(agent))

    def drain(self, on_drained: Callable[[], None]) -> None:
        """Opens no new rounds; says when none is in flight."""
        self._on_drained = on_drained
        self._handle(rd.DrainRequested())

    def stop(self, reason: str) -> None:
        """Closes what is in flight as interrupted."""
        self._handle(rd.CoordinatorStopped(reason))

    def _handle(self, event: rd.Event) -> None:
        book = self.book
        for instruction in book.handle(event, self._process.now):
            self._carry_out(instruction)
        limits = book.limits
        if book.in_flight > limits.in_flight_max or book.held_bytes > limits.held_bytes_max:
            message = f"{book.in_flight} rounds in flight hold {book.held_bytes} bytes"
            self._auditor.fail("queues are bounded", message)
        if book.remembered > limits.remembered_max or book.traces > limits.traces_max:
            message = f"{book.remembered} closed rounds and {book.traces} traces are remembered"
            self._auditor.fail("queues are bounded", message)
        self._auditor.check_in_flight(book.in_flight)
        self._arm()

    def _carry_out(self, instruction: ri.Instruction) -> None:
        match instruction:
            case ri.OpenRound():
                self._open(instruction)
            case ri.SendAssignment(round_id, agents, task, body, attempt, deadline_s):
                self._auditor.assigned(round_id, agents, attempt)
                assert isinstance(body, bytes), "what is asked here is small"
                self.fleet.send(
                    agents,
                    Assignment(round=round_id, task=task, body=body, attempt=attempt, deadline_s=deadline_s),
                )
            case ri.TellPart():
                pass  # nobody listens
            case ri.SendCancellation(round_id, agents, reason):
                self.fleet.send(agents, Cancellation(round=round_id, reason=clip_text(reason)))
            case ri.CloseRound(outcome):
                self._close(outcome)
            case ri.SendFeedback(round_id, agents, task, truth):
                assert isinstance(truth, bytes), "and so is the truth"
                self.fleet.send(agents, Feedback(round=round_id, task=task, truth=truth))
            case ri.LearnTruth(request_id, outcome, _):
                self._auditor.truth_learned(outcome.round)
                record, revealed = self.ledger.learn(instruction)
                assert revealed is not None, "this learner learns from any truth"
                self._record(record, Announcement(request_id, revealed))
            case ri.RejectRequest():
                self._reject(instruction)
            case ri.NoteStray(kind, round_id, agent):
                self.strays[kind] += 1
                self._world.note(f"{agent} r{round_id} stray {kind}")
            case ri.AnnounceDrained():
                self._auditor.check_in_flight(0)
                self._on_drained()
            case ri.OfferLateReply():
                self._auditor.late_offered(instruction.agent, instruction.round)
                self._record(self.ledger.take_late(instruction))
            case ri.NoteForgotten(round_id):
                self.ledger.forget(round_id)

    def _open(self, opening: ri.OpenRound) -> None:
        asked = self._asks[opening.request_id]
        asked.round = opening.round
        call = asked.call
        self._world.fates[opening.round] = fate_of(self._world.seed, call.key)
        self._world.note(f"r{opening.round} opens for {call.key}: {opening.task}, {len(opening.selected)} selected")
        self._record(self.ledger.open(opening, asked.question))
        self._auditor.round_opened(
            OpenedFacts(
                round=opening.round,
                key=call.key,
                selected=opening.selected,
                opened_at=self._process.now,
                deadline_s=opening.policy.deadline_s,
                quorum=call.quorum,
                quorum_fraction=call.quorum_fraction or (None if call.quorum else POLICY.quorum_fraction),
                attempts=opening.policy.attempts,
                is_keyed=call.keyed,
                waiters=frozenset(asked.answers),
            )
        )

    def _close(self, outcome: ri.Outcome) -> None:
        if outcome.round + _BLOCK // 10 >= self._disk.free_round:
            self._disk.free_round += _BLOCK
        asked = self._asks[outcome.request_id]
        self._world.note(f"r{outcome.round} closes {outcome.state}")
        self._auditor.round_closed(
            ClosedFacts(
                round=outcome.round,
                key=asked.call.key,
                state=outcome.state,
                quorum=outcome.quorum,
                results=tuple((result.agent, result.status, result.body) for result in outcome.results),
                duration_s=outcome.duration_s,
            )
        )
        record, told = self.ledger.close(outcome, asked.question)
        if asked.question.key is not None and not is_final(told):
            self._keys.drop(asked.question.key, outcome.request_id)
        asked.record = self._record(record, Announcement(outcome.request_id, told))

    # --- recording ---

    def _record(self, record: Record, announcement: Announcement | None = None) -> int:
        number = self._disk.append(record)
        self._rounds_since_checkpoint += isinstance(record, RoundClosed)
        if announcement is not None:
            self.ledger.hold(number, announcement)
            if self._problem:
                self._answer_unrecorded(announcement)
        if self._rounds_since_checkpoint >= _CHECKPOINT_ROUNDS:
            self._rounds_since_checkpoint = 0
            self._disk.append_checkpoint(number, self.ledger.learner.snapshot())
        return number

    def _committed(self, number: int) -> None:
        for announcement in self.ledger.committed(number):
            self._announce(announcement)
        self._auditor.check_announced(number, self.ledger.held)

    def _recording_failed(self, problem: str) -> None:
        self._problem = problem
        for announcement in self.ledger.unannounced():
            self._answer_unrecorded(announcement)

    def _recording_recovered(self) -> None:
        self._problem = ""

    def _answer_unrecorded(self, announcement: Announcement) -> None:
        said = _said(announcement)
        told = Told(said.round, "", error="not-recorded", retry=True)
        if isinstance(said, Revealed):
            _, answer = self._reveals.pop(announcement.request_id, (0, None))
            if answer is not None:
                answer(told)
        elif (asked := self._asks.get(announcement.request_id)) is not None:
            answers, asked.answers = asked.answers, {}
            for answer in answers.values():
                answer(told)

    def _announce(self, announcement: Announcement) -> None:
        said = _said(announcement)
        if isinstance(said, Revealed):
            self._auditor.truth_announced(said.round, self._disk.durable)
            _, answer = self._reveals.pop(announcement.request_id, (0, None))
            if answer is not None:
                answer(Told(said.round, "revealed", repr(said.correct)))
            return
        asked = self._asks.pop(announcement.request_id)
        if asked.question.key is not None:
            self._keys.keep(asked.question.key, announcement.request_id, said)
        self._tell(asked.answers.values(), asked.question.key, asked.record, said)

    def _tell(self, answers: Iterable[Answer], key: str | None, number: int | None, outcome: Outcome) -> None:
        digest = blake2b(outcome.to_frame(), digest_size=8).hexdigest()
        if is_final(outcome):
            self._auditor.announced(key, outcome.round, digest, number)
        self._world.note(f"r{outcome.round} announced to {key or 'who asked'}")
        for answer in answers:
            answer(Told(outcome.round, outcome.state, digest))

    def _reject(self, rejection: ri.RejectRequest) -> None:
        told = Told(0, "", error=rejection.reason, retry=rejection.retry)
        asked = self._asks.pop(rejection.request_id, None)
        if asked is None:
            self._reveals.pop(rejection.request_id)[1](told)
            return
        if asked.question.key is not None:
            self._keys.drop(asked.question.key, rejection.request_id)
        for answer in asked.answers.values():
            answer(told)

    # --- the timer and the disk ---

    def _arm(self) -> None:
        at = self.book.next_timer()
        if at is not None and at < self._timer_at:
            self._timer_at = at
            self._process.at(at, self._on_timer, at)

    def _on_timer(self, at: float) -> None:
        if at == self._timer_at:
            self._timer_at = math.inf
            self._handle(rd.TimerFired())

    def audit(self, is_member: Callable[[str], bool]) -> None:
        """A full look at the book beside what is known from outside."""
        self._auditor.check_in_flight(self.book.in_flight)
        for agent in sorted({agent for opened in self._auditor.in_flight for agent in opened.selected}):
            if not is_member(agent):
                self._auditor.check_waiting(agent, self.book.in_flight_of(agent))

    def rest(self, agents: Iterable[str]) -> str:
        """What is there that should not be when all is quiet; empty when nothing is."""
        found = [f"rounds that wait for {agent}" for agent in agents if self.book.in_flight_of(agent)]
        if self.book.in_flight:
            found.append(f"{self.book.in_flight} rounds in flight")
        if self.book.held_bytes:
            found.append(f"{self.book.held_bytes} bytes of replies held")
        if self.ledger.held:
            found.append(f"{self.ledger.held} announcements held")
        if self._asks or self._reveals:
            found.append(f"{len(self._asks)} asks and {len(self._reveals)} reveals wait")
        return ", ".join(found)


def _said(announcement: Announcement) -> Outcome | Revealed:
    assert not isinstance(announcement.answer, CallFailed), "this learner does not fail"
    return announcement.answer

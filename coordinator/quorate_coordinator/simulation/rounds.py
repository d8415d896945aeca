"""The coordinator's rounds: the real book, learner and ledger in a model of their shell (`gather`).

The only file here that knows the book's events and instructions.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Protocol

from quorate_coordinator.learner.api import Learner, Report, Request
from quorate_coordinator.rounds import events as rd
from quorate_coordinator.rounds import instructions as ri
from quorate_coordinator.rounds.book import BookLimits, RoundBook
from quorate_coordinator.rounds.policy import RoundPolicy
from quorate_coordinator.simulation.auditor import Auditor, ClosedFacts, OpenedFacts
from quorate_coordinator.simulation.disk import SimDisk
from quorate_coordinator.simulation.draws import fate_of
from quorate_coordinator.simulation.ledger_model import ClosedRecord, LedgerModel
from quorate_coordinator.simulation.plan import CallPlan
from quorate_coordinator.simulation.process import Process
from quorate_protocol.messages import Assignment, Cancellation, Feedback, Message, Reply, clip_text

MakeBook = Callable[..., RoundBook]
MakeLearner = Callable[[bytes | None], Learner]
MakeLedger = Callable[..., LedgerModel]

#: What an ask gets that does not say.
POLICY: Final = RoundPolicy(deadline_s=10.0, grace_s=0.25, quorum_fraction=0.5)

#: Small enough that a burst fills them.
LIMITS: Final = BookLimits(
    in_flight_max=64,
    in_flight_per_agent_max=8,
    reply_bytes_max=4096,
    remembered_max=100,
    traces_max=50,
)

#: Round numbers reserved at once.
_BLOCK: Final = 1000

#: Announcements that wait for a full disk; no rounds are opened beyond.
_HELD_MAX: Final = 200


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


class FleetFace(Protocol):
    """What rounds need of the fleet."""

    def select(self, task: str) -> tuple[str, ...]:
        """Agents that can be asked, sorted."""

    def send(self, agents: tuple[str, ...], message: Message) -> None:
        """Sends one message to each of these agents that has a link."""


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
    ) -> None:
        self._process = process
        self._world = process.world
        self._disk = disk
        self._auditor = auditor
        self.fleet: FleetFace
        first = disk.free_round
        disk.free_round += _BLOCK
        self.book: Final = make_book(LIMITS, first_round=first)
        covered, snapshot = disk.checkpoint or (0, None)
        self.ledger: Final = make_ledger(
            make_learner(snapshot),
            disk.records,
            covered=covered,
            append=disk.append,
            checkpoint=self._keep_checkpoint,
        )
        disk.open(lambda number: process.call(self.ledger.durable, number))
        self._timer_at = math.inf
        self._request_ids = itertools.count(1)
        #: Calls that wait, by request.
        self._asks: dict[int, tuple[CallPlan, Answer]] = {}
        self._reveals: dict[int, Answer] = {}
        self._requests_of: dict[str, int] = {}
        self._round_of: dict[int, int] = {}
        self._on_drained: Callable[[], None] = lambda: None
        self.strays: Counter[str] = Counter()

    # --- calls ---

    def ask(self, call: CallPlan, body: bytes, answer: Answer) -> None:
        """Opens a round; `answer` is called at its end, or at once with an error."""
        found = self.ledger.find(call.key)
        if found is not None:
            self._announce(call, answer, *found)
            return
        if call.key in self._requests_of:
            # Asked again while the first is in flight: both wait for the one round.
            waiting, first = self._asks[self._requests_of[call.key]]
            self._asks[self._requests_of[call.key]] = waiting, _both(first, answer)
            return
        if self._disk.is_full or self.ledger.held >= _HELD_MAX:
            answer(Told(0, "", error="disk-full", retry=True))
            return
        candidates = self.fleet.select(call.task)
        per_agent_max = self.book.limits.in_flight_per_agent_max
        free = tuple(agent for agent in candidates if self.book.in_flight_of(agent) < per_agent_max)
        if not free:
            answer(Told(0, "", error="busy" if candidates else "no-agents", retry=True))
            return
        plan = self.ledger.learner.compute_coordination(Request(task=call.task, body=body, candidates=free))
        policy = POLICY.override(
            quorum=call.quorum,
            quorum_fraction=call.quorum_fraction,
            grace_s=call.grace_s,
            deadline_s=call.deadline_s,
        )
        request_id = next(self._request_ids)
        self._asks[request_id] = call, answer
        self._requests_of[call.key] = request_id
        self._handle(
            rd.RoundRequested(
                request_id=request_id,
                task=call.task,
                body=body,
                selected=plan.agents,
                unavailable=(),
                policy=policy,
            )
        )

    def withdraw(self, key: str) -> None:
        """The operator has left."""
        request_id = self._requests_of.get(key)
        round_id = self._round_of.get(request_id or 0)
        if round_id is not None:
            self._handle(rd.RoundCancelled(round_id, "its operator left"))

    def reveal(self, round_id: int, truth: bytes, answer: Answer) -> None:
        """Scores a round's agents."""
        request_id = next(self._request_ids)
        self._reveals[request_id] = answer
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

    def agent_lost(self, agent: str, reason: str) -> None:
        """What an agent worked on will not come."""
        self._handle(rd.AgentLost(agent, reason))

    def drain(self, on_drained: Callable[[], None]) -> None:
        """Opens no new rounds; says when none is in flight."""
        self._on_drained = on_drained
        self._handle(rd.DrainRequested())

    def stop(self, reason: str) -> None:
        """Closes what is in flight as interrupted."""
        self._handle(rd.CoordinatorStopped(reason))

    def _handle(self, event: rd.Event) -> None:
        book = self.book
        for instruction in book.handle(event, self._world.now):
            self._carry_out(instruction)
        limits = book.limits
        if book.in_flight > limits.in_flight_max or book.held_bytes > limits.reply_bytes_max:
            message = f"{book.in_flight} rounds in flight hold {book.held_bytes} bytes"
            self._auditor.fail("queues are bounded", message)
        if book.remembered > limits.remembered_max or book.traces > limits.traces_max:
            message = f"{book.remembered} closed rounds and {book.traces} traces are remembered"
            self._auditor.fail("queues are bounded", message)
        self._arm()

    def _carry_out(self, instruction: ri.Instruction) -> None:
        match instruction:
            case ri.BroadcastAssignment():
                self._open(instruction)
            case ri.SendCancellation(round_id, agents, reason):
                self.fleet.send(agents, Cancellation(round=round_id, reason=clip_text(reason)))
            case ri.CloseRound(outcome):
                self._close(outcome)
            case ri.SendFeedback(round_id, agents, task, truth):
                self.fleet.send(agents, Feedback(round=round_id, task=task, truth=truth))
            case ri.LearnTruth(request_id, outcome, truth):
                self._auditor.truth_learned(outcome.round)
                self.ledger.learn(
                    outcome.round,
                    truth,
                    lambda number, report: self._announce_truth(request_id, outcome.round, number, report),
                )
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
            case ri.NoteForgotten():
                pass

    def _open(self, opening: ri.BroadcastAssignment) -> None:
        self._round_of[opening.request_id] = opening.round
        call = self._asks[opening.request_id][0]
        self._world.fates[opening.round] = fate_of(self._world.seed, call.key)
        self._world.note(f"r{opening.round} opens for {call.key}: {opening.task}, {len(opening.agents)} asked")
        self._auditor.round_opened(
            OpenedFacts(
                round=opening.round,
                key=call.key,
                selected=opening.agents,
                opened_at=self._world.now,
                deadline_s=opening.deadline_s,
                quorum=call.quorum,
                quorum_fraction=call.quorum_fraction or (None if call.quorum else POLICY.quorum_fraction),
            )
        )
        self.fleet.send(
            opening.agents,
            Assignment(
                round=opening.round,
                task=opening.task,
                body=opening.body,
                attempt=opening.attempt,
                deadline_s=opening.deadline_s,
            ),
        )

    def _close(self, outcome: ri.Outcome) -> None:
        if outcome.round + _BLOCK // 10 >= self._disk.free_round:
            self._disk.free_round += _BLOCK
        call, answer = self._asks.pop(outcome.request_id)
        self._world.note(f"r{outcome.round} closes {outcome.state}")
        self._auditor.round_closed(
            ClosedFacts(
                round=outcome.round,
                key=call.key,
                state=outcome.state,
                quorum=outcome.quorum,
                results=tuple((result.agent, result.status, result.body) for result in outcome.results),
                duration_s=outcome.duration_s,
            )
        )
        self._round_of.pop(outcome.request_id, None)
        request_id = self._requests_of[call.key]

        def announce(number: int, record: ClosedRecord) -> None:
            self._requests_of.pop(call.key, None)
            _, late = self._asks.pop(request_id, (call, answer))
            self._announce(call, late, number, record)

        # Until the record is durable, whoever asks again waits as well.
        self._asks[request_id] = call, answer
        self.ledger.close(call.key, outcome, announce)

    def _announce(self, call: CallPlan, answer: Answer, number: int, record: ClosedRecord) -> None:
        outcome = record.outcome
        digest = blake2b(repr((outcome, record.seen.answer)).encode(), digest_size=8).hexdigest()
        self._auditor.announced(call.key, outcome.round, digest, number)
        self._world.note(f"r{outcome.round} announced to {call.key}")
        answer(Told(outcome.round, outcome.state, digest))

    def _announce_truth(self, request_id: int, round_id: int, number: int, report: Report) -> None:
        self._auditor.truth_announced(round_id, number)
        answer = self._reveals.pop(request_id, None)
        if answer is not None:
            answer(Told(round_id, "revealed", repr(report.correct)))

    def _reject(self, rejection: ri.RejectRequest) -> None:
        told = Told(0, "", error=rejection.reason, retry=rejection.retry)
        waiting = self._asks.pop(rejection.request_id, None)
        if waiting is not None:
            self._requests_of.pop(waiting[0].key, None)
            waiting[1](told)
        else:
            self._reveals.pop(rejection.request_id)(told)

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

    def _keep_checkpoint(self, covered: int, snapshot: bytes) -> None:
        self._disk.checkpoint = covered, snapshot

    def audit(self, is_member: Callable[[str], bool]) -> None:
        """A full look at the book beside what is known from outside."""
        self._auditor.check_in_flight(self.book.in_flight)
        for opened in self._auditor.in_flight:
            for agent in opened.selected:
                if self.book.in_flight_of(agent) and not is_member(agent):
                    message = f"{self.book.in_flight_of(agent)} rounds wait for {agent}, which is no member"
                    self._auditor.fail("no round waits for who is gone", message, agent=agent, round=opened.round)

    def rest(self, agents: Iterable[str]) -> str:
        """What is there that should not be when all is quiet; empty when nothing is."""
        found = [f"rounds that wait for {agent}" for agent in agents if self.book.in_flight_of(agent)]
        if self.book.in_flight:
            found.append(f"{self.book.in_flight} rounds in flight")
        if self.book.held_bytes:
            found.append(f"{self.book.held_bytes} bytes of replies held")
        if self.ledger.held:
            found.append(f"{self.ledger.held} announcements held")
        if self._asks or self._reveals or self._requests_of or self._round_of:
            found.append(f"{len(self._asks)} asks and {len(self._reveals)} reveals wait")
        return ", ".join(found)


def _both(first: Answer, second: Answer) -> Answer:
    def answer(told: Told) -> None:
        first(told)
        second(told)

    return answer

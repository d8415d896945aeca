"""Drives rounds: the shell round the book of rounds and the learner.

The book decides; this carries out: it sends frames, keeps the loop's timer, lets the learner combine
and learn, and answers who asked. One writer: everything happens on the event loop, in the order of
the book's instructions.
"""

import asyncio
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol, assert_never

import structlog

from quorate_coordinator.learner.api import AgentReply, Answer, ClosedRound, Learner, Request
from quorate_coordinator.round_numbers import RoundNumbers
from quorate_coordinator.rounds.book import BookLimits, RoundBook
from quorate_coordinator.rounds.events import (
    AgentLost,
    CoordinatorStopped,
    DrainRequested,
    Event,
    ReplyReceived,
    RoundCancelled,
    RoundRequested,
    TimerFired,
    TruthRevealed,
)
from quorate_coordinator.rounds.instructions import (
    AnnounceDrained,
    BroadcastAssignment,
    CloseRound,
    Instruction,
    LearnTruth,
    NoteForgotten,
    NoteStray,
    OfferLateReply,
    RejectRequest,
    SendCancellation,
    SendFeedback,
)
from quorate_coordinator.rounds.instructions import Outcome as BookOutcome
from quorate_coordinator.rounds.policy import RoundPolicy
from quorate_protocol.bodies import decode_body
from quorate_protocol.errors import CallFailed, ConfigurationError, FrameMalformed
from quorate_protocol.limits import CONNECTIONS_MAX
from quorate_protocol.messages import (
    AgentResult,
    Ask,
    Assignment,
    Cancellation,
    Feedback,
    Outcome,
    Reply,
    Reveal,
    Revealed,
    clip_text,
)

log = structlog.get_logger()

#: Agents whose replies are counted one by one, the least recently counted go first: ids may be new with every
#: process of an agent. More than may be connected.
AGENTS_COUNTED_MAX: Final = 2 * CONNECTIONS_MAX


class Fleet(Protocol):
    """What rounds need of the fleet."""

    def select(self, task: str, labels: Mapping[str, str]) -> tuple[str, ...]:
        """Agents that can be asked, sorted."""

    def is_behind(self, agent: str, more_bytes: int) -> bool:
        """Whether an agent has so much to take in that it should not be sent so many bytes more."""

    def send(self, agents: Iterable[str], frame: bytes, *, hurried: bool = True, is_assignment: bool = False) -> None:
        """Sends one frame to each of these agents that has a session; an assignment only to who has a link."""


class Gatherer:
    """Opens rounds, gathers replies, answers calls."""

    def __init__(
        self,
        fleet: Fleet,
        learner: Learner,
        *,
        policy: RoundPolicy,
        limits: BookLimits,
        numbers: RoundNumbers,
        observe_duration: Callable[[str, float], None],
    ) -> None:
        self.book: Final = RoundBook(limits, first_round=numbers.first)
        self.learner: Final = learner
        self._fleet = fleet
        self._policy = policy
        self._numbers = numbers
        self._observe_duration = observe_duration
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._request_ids = itertools.count(1)
        self._asks: dict[int, asyncio.Future[Outcome]] = {}
        self._reveals: dict[int, asyncio.Future[Revealed]] = {}
        self._round_of: dict[int, int] = {}
        #: Combined answers of rounds whose truth may come; the book says when to let go of one.
        self._answers: dict[int, bytes] = {}
        self._drained: asyncio.Future[None] = self._loop.create_future()
        #: (task, state), (task, status), (agent, status), task, kind: totals since the start.
        self.rounds_total: Counter[tuple[str, str]] = Counter()
        self.replies_total: Counter[tuple[str, str]] = Counter()
        self.agent_replies_total: Counter[tuple[str, str]] = Counter()
        self.feedback_total: Counter[str] = Counter()
        #: The agents in `agent_replies_total` and their statuses there, least recently counted first.
        self._counted: OrderedDict[str, set[str]] = OrderedDict()

    # --- calls ---

    async def ask(self, ask: Ask) -> Outcome:
        """Opens a round and waits for its end. Cancelling this cancels the round.

        Raises:
            CallFailed: there was no round.
        """
        candidates = self._fleet.select(ask.task, ask.labels)
        if not candidates:
            such = f" with labels {', '.join(f'{k}={v}' for k, v in ask.labels.items())}" if ask.labels else ""
            raise CallFailed("no-agents", f"no connected agent{such} does the task {ask.task!r}", retry=True)
        per_agent_max = self.book.limits.in_flight_per_agent_max
        # One slow agent must not turn away what the others could answer.
        free = tuple(
            agent
            for agent in candidates
            if self.book.in_flight_of(agent) < per_agent_max and not self._fleet.is_behind(agent, len(ask.body))
        )
        if not free:
            raise CallFailed(
                "busy",
                f"every agent that does {ask.task!r} has {per_agent_max} rounds waiting, or has not taken in "
                "what it was sent before",
                retry=True,
            )
        plan = self.learner.compute_coordination(Request(task=ask.task, body=ask.body, candidates=free))
        policy = self._policy
        if plan.quorum is not None or plan.grace_s is not None or plan.deadline_s is not None:
            policy = policy.override(quorum=plan.quorum, grace_s=plan.grace_s, deadline_s=plan.deadline_s)
        policy = policy.override(
            quorum=ask.quorum,
            quorum_fraction=ask.quorum_fraction,
            grace_s=ask.grace_s,
            deadline_s=ask.deadline_s,
        )
        request_id = next(self._request_ids)
        future: asyncio.Future[Outcome] = self._loop.create_future()
        self._asks[request_id] = future
        try:
            self.handle(
                RoundRequested(
                    request_id=request_id,
                    task=ask.task,
                    body=ask.body,
                    selected=plan.agents,
                    unavailable=(),
                    policy=policy,
                )
            )
            return await future
        except asyncio.CancelledError:
            round_id = self._round_of.get(request_id)
            if round_id is not None:
                self.handle(RoundCancelled(round_id, "its operator left"))
            raise
        finally:
            self._asks.pop(request_id, None)
            self._round_of.pop(request_id, None)

    def reveal(self, reveal: Reveal) -> Revealed:
        """Scores a round's agents by its truth, and tells them.

        Raises:
            CallFailed: no such round, still open, or told before.
        """
        try:
            decode_body(reveal.truth)
        except FrameMalformed as error:
            raise CallFailed("bad-request", f"truth: {error}") from None
        request_id = next(self._request_ids)
        future: asyncio.Future[Revealed] = self._loop.create_future()
        self._reveals[request_id] = future
        self.handle(TruthRevealed(request_id, reveal.round, reveal.truth))
        # The book answers a reveal at once, never later.
        del self._reveals[request_id]
        return future.result()

    # --- events ---

    def reply_received(self, agent: str, reply: Reply) -> None:
        """An agent's reply came in."""
        self.handle(
            ReplyReceived(
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
        self.handle(AgentLost(agent, reason))

    def agent_reachable(self, agent: str) -> None:
        """An agent has a link, its first or a new one: what it has not answered may be sent again."""
        log.debug("agent_reachable", agent=agent)  # the rounds' core takes it from here

    def agent_away(self, agent: str, reason: str) -> None:
        """An agent has no link now; what it works on may still come."""
        log.debug("agent_away", agent=agent, reason=reason)  # the rounds' core takes it from here

    async def drain(self) -> None:
        """Opens no new rounds; returns when none is in flight."""
        self.handle(DrainRequested())
        await asyncio.shield(self._drained)

    def stop(self, reason: str) -> None:
        """Closes what is in flight as interrupted."""
        self.handle(CoordinatorStopped(reason))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def handle(self, event: Event) -> None:
        """Hands an event to the book and carries out what it says."""
        for instruction in self.book.handle(event, self._loop.time()):
            try:
                self._carry_out(instruction)
            except Exception:
                # One that fails must take neither the others with it nor who waits for it.
                log.exception("instruction_failed", instruction=type(instruction).__name__)
                self._fail_request(instruction)
        self._arm()

    def _fail_request(self, instruction: Instruction) -> None:
        """Answers who waits for an instruction that could not be carried out."""
        source = instruction.outcome if isinstance(instruction, CloseRound) else instruction
        request_id = getattr(source, "request_id", None)
        if request_id is not None:
            self._answer_error(request_id, CallFailed("internal", "the coordinator failed; its log says more"))

    def _answer_error(self, request_id: int, error: CallFailed) -> None:
        future = self._asks.get(request_id) or self._reveals.get(request_id)
        if future is not None and not future.done():
            future.set_exception(error)

    def _arm(self) -> None:
        at = self.book.next_timer()
        if self._timer is not None:
            if at is not None and self._timer.when() <= at:
                # Fires too early at worst, and is then set anew: cheaper than moving it each time.
                return
            self._timer.cancel()
        self._timer = None if at is None else self._loop.call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.handle(TimerFired())

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case BroadcastAssignment():
                self._round_of[instruction.request_id] = instruction.round
                frame = Assignment(
                    round=instruction.round,
                    task=instruction.task,
                    body=instruction.body,
                    attempt=instruction.attempt,
                    deadline_s=instruction.deadline_s,
                ).to_frame()
                self._fleet.send(instruction.agents, frame, is_assignment=True)
            case SendCancellation():
                frame = Cancellation(round=instruction.round, reason=clip_text(instruction.reason)).to_frame()
                self._fleet.send(instruction.agents, frame)
            case CloseRound(outcome):
                self._close(outcome)
            case SendFeedback():
                self.feedback_total[instruction.task] += 1
                frame = Feedback(round=instruction.round, task=instruction.task, truth=instruction.truth).to_frame()
                # The next assignment usually follows at once: both in one packet wake an agent once.
                self._fleet.send(instruction.agents, frame, hurried=False)
            case LearnTruth():
                self._learn(instruction)
            case RejectRequest():
                self._reject(instruction)
            case NoteStray(kind, round_id, agent):
                log.debug("stray_reply", kind=kind, round=round_id, agent=agent)
            case OfferLateReply():
                pass  # counted as a stray; the vote learns from rounds as they were closed
            case NoteForgotten(round_id):
                self._answers.pop(round_id, None)
            case AnnounceDrained():
                if not self._drained.done():
                    self._drained.set_result(None)
            case _:
                assert_never(instruction)

    def _close(self, closed: BookOutcome) -> None:
        try:
            self._numbers.use(closed.round)
        except ConfigurationError as error:
            # The round is over and its operator waits; a later run may use its number again.
            log.error("round_numbers_not_reserved", problem=str(error))
        has_quorum = closed.state in ("complete", "quorate")
        answer = self._combine(closed) if has_quorum else None
        if answer is not None and answer.body is not None:
            self._answers[closed.round] = answer.body
        weights = answer.weights if answer is not None else {}
        for result in closed.results:
            self.replies_total[closed.task, result.status] += 1
            self._count_reply(result.agent, result.status)
        self.rounds_total[closed.task, closed.state] += 1
        self._observe_duration(closed.task, closed.duration_s)
        log.debug(
            "round_closed", round=closed.round, task=closed.task, state=closed.state, duration_s=closed.duration_s
        )
        future = self._asks.get(closed.request_id)
        if future is None or future.done():
            return
        future.set_result(
            Outcome(
                round=closed.round,
                task=closed.task,
                state=closed.state,
                quorum=closed.quorum,
                answer=answer.body if answer is not None else None,
                support=answer.support if answer is not None else None,
                results=[
                    AgentResult(
                        agent=result.agent,
                        status=result.status,
                        body=result.body,
                        error=clip_text(result.error),
                        latency_s=result.latency_s,
                        compute_s=result.compute_s,
                        waited_s=result.waited_s,
                        weight=weights.get(result.agent),
                    )
                    for result in closed.results
                ],
                duration_s=closed.duration_s,
                reason=clip_text(closed.reason),
            )
        )

    def _count_reply(self, agent: str, status: str) -> None:
        self.agent_replies_total[agent, status] += 1
        self._counted.setdefault(agent, set()).add(status)
        self._counted.move_to_end(agent)
        if len(self._counted) > AGENTS_COUNTED_MAX:
            forgotten, statuses = self._counted.popitem(last=False)
            for old in statuses:
                del self.agent_replies_total[forgotten, old]

    def _combine(self, closed: BookOutcome) -> Answer | None:
        try:
            return self.learner.combine(_as_learner_sees(closed))
        except Exception:
            # The round is over and its operator waits: a fault of the learner's costs the answer alone.
            log.exception("learner_failed_to_combine", round=closed.round, task=closed.task)
            return None

    def _learn(self, instruction: LearnTruth) -> None:
        closed = instruction.outcome
        future = self._reveals.get(instruction.request_id)
        seen = _as_learner_sees(closed, self._answers.pop(closed.round, None))
        try:
            report = self.learner.learn(seen, instruction.truth)
        except Exception:
            log.exception("learner_failed_to_learn", round=closed.round, task=closed.task)
            if future is not None and not future.done():
                message = f"the learner failed to learn from round {closed.round}; the coordinator's log says more"
                future.set_exception(CallFailed("internal", message))
            return
        if future is not None and not future.done():
            future.set_result(
                Revealed(
                    round=closed.round,
                    correct=report.correct,
                    right=dict(report.agents),
                    weights=dict(report.weights),
                )
            )

    def _reject(self, instruction: RejectRequest) -> None:
        self._answer_error(
            instruction.request_id, CallFailed(instruction.reason, instruction.message, retry=instruction.retry)
        )


def _as_learner_sees(closed: BookOutcome, answer: bytes | None = None) -> ClosedRound:
    return ClosedRound(
        round=closed.round,
        task=closed.task,
        replies=tuple(
            AgentReply(result.agent, result.body, result.latency_s or 0.0)
            for result in closed.results
            if result.status == "replied" and result.body is not None
        ),
        answer=answer,
    )

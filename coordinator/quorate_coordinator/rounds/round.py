"""One round as a state machine: who was asked, who answered, and when it is over.

How each selected agent ends. Exactly one status each, decided at one moment and never changed:

- `replied`, `declined`, `failed`: what its last reply said, if that came while the round was in flight.
- `lost`: its session ended before it answered, while the round was in flight, and it was not asked again.
- `unavailable`: it had no link when the round opened, and did not return in time: it was never asked.
- `late`: the round came to its deadline, and the agent, which had all the time there was, had not answered.
- `cancelled`: the round closed before its deadline (quorum and grace, quorum out of reach, cancelled,
  interrupted), and the agent was stopped at work.

Attempts. An agent whose reply is `failed` is asked again while the policy leaves it attempts, and so is one
that was lost and came back as a new session: each time under the next number. Until then the round waits
for it, as for one that was never asked; without attempts left, the end of its session ends its part. A
link that breaks and comes back within its session changes no number: what is owed is delivered again, and
the agent tells by round and attempt what it knows already.

A reply that comes after its agent's part has ended without one (late, cancelled or lost) is a late
reply: it is counted and offered, and changes neither the status nor the outcome.

Time goes first. An event at or after the moment when grace or the deadline ends finds the round
closed by it, whether or not a `TimerFired` came in between: what counts does not depend on the order
in which a loop ran its callbacks.
"""

import math
from bisect import bisect_left
from typing import Final, Literal, Self, assert_never, cast

from quorate_coordinator.rounds.events import (
    AgentLost,
    AgentReachable,
    CoordinatorStopped,
    ReplyReceived,
    RoundCancelled,
    RoundRequested,
    TimerFired,
    TruthRevealed,
)
from quorate_coordinator.rounds.instructions import (
    AgentResult,
    CloseRound,
    Instruction,
    LearnTruth,
    NoteStray,
    OfferLateReply,
    OpenRound,
    Outcome,
    RejectRequest,
    SendAssignment,
    SendCancellation,
    SendFeedback,
    StrayKind,
    TellPart,
)
from quorate_coordinator.rounds.policy import ResolvedPolicy, RoundPolicy
from quorate_coordinator.rounds.table import CLOSED, NEXT, Phase, Trigger
from quorate_protocol.fields import Body, RoundState, Status, inline_bytes

#: The events that concern one round.
RoundEvent = (
    ReplyReceived | AgentReachable | AgentLost | RoundCancelled | TruthRevealed | TimerFired | CoordinatorStopped
)

#: How a closed round stands with its truth: it may come, it came, or it came too late to be kept for.
TruthState = Literal["awaited", "revealed", "forgotten"]

#: What agents still at work are told, where it is not the outcome's reason.
_CANCELLATION: Final = {
    Trigger.GRACE_ELAPSED: "enough replies",
    Trigger.DEADLINE: "deadline",
    Trigger.QUORUM_UNREACHABLE: "quorum out of reach",
}


class Round:
    """One round, from its request until it is forgotten."""

    __slots__ = (
        "_asked",
        "_attempts",
        "_body",
        "_is_streamed",
        "_owing",
        "_policy",
        "_replies",
        "_request_id",
        "_results",
        "_selected",
        "_task",
        "_unreached",
        "_working",
        "deadline_at",
        "due_at",
        "id",
        "opened_at",
        "operator",
        "outcome",
        "phase",
        "truth",
    )

    def __init__(self, round_id: int, request: RoundRequested, now: float) -> None:
        """A round that nobody knows of yet: `open` comes next.

        No agent may be named twice in `request`.

        Raises:
            PolicyConflict: the policy cannot be kept with so many selected; NobodySelected with none.
        """
        self.id: Final = round_id
        self.opened_at: Final = now
        self.operator: Final = request.operator
        self._request_id: Final = request.request_id
        self._task: Final = request.task
        self._policy: Final[ResolvedPolicy] = request.policy.resolve(len(request.selected) + len(request.away))
        self._is_streamed: Final = request.is_streamed
        #: Kept while the round is in flight, for agents that return.
        self._body: Body = request.body
        #: Sorted. The same tuple where it can be: many rounds share few.
        selected = request.selected
        self._selected: Final = tuple(sorted(selected + request.away if request.away else selected))
        #: Sorted: once the round is closed, the agents that were given the assignment.
        self._asked = self._selected
        #: Agents whose part has not ended. Empty once the round is closed.
        self._working = set(self._selected)
        #: Of those, the ones that have no link to be asked over, and why they lost it; empty where they never had one.
        self._unreached = dict.fromkeys(request.away, "")
        #: Agents that have not answered what they were asked last, whether or not their part has ended.
        self._owing = set(selected)
        #: The number that an agent's reply must carry, where it is not 1.
        self._attempts: dict[str, int] = {}
        #: Parts that have ended; given away to the outcome when the round closes.
        self._results: dict[str, AgentResult] = {}
        self._replies = 0
        self.phase: Phase = "open"
        #: The hard end.
        self.deadline_at: Final = now + self._policy.deadline_s
        #: When time moves the round next: the end of grace, or the deadline; never, once closed.
        self.due_at = self.deadline_at
        #: How it ended; None while in flight, and again once its truth is no longer awaited.
        self.outcome: Outcome | None = None
        self.truth: TruthState = "awaited"

    @classmethod
    def recall(cls, outcome: Outcome) -> Self:
        """A round that an earlier run has closed, and whose truth may still come. Nobody owes it a reply."""
        policy = RoundPolicy(deadline_s=1.0, grace_s=0.0, quorum=1)  # over, and of no effect any more
        request = RoundRequested(outcome.request_id, outcome.task, b"", outcome.selected, (), policy)
        round_ = cls(outcome.round, request, 0.0)
        round_.phase = outcome.state
        round_.due_at = math.inf
        round_.outcome = outcome
        round_._asked = _asked_in(outcome)
        round_._working, round_._owing = set(), set()
        return round_

    @property
    def asked(self) -> tuple[str, ...]:
        """Who the assignment is for; once closed, who was given it. Sorted."""
        return self._asked

    @property
    def is_closed(self) -> bool:
        """Whether the outcome stands."""
        return self.phase in CLOSED

    @property
    def body_bytes(self) -> int:
        """Bytes of the question that it keeps; a reference takes none."""
        return inline_bytes(self._body)

    def awaits(self, agent: str, attempt: int | None) -> bool:
        """Whether a reply of an agent to this attempt, or to any, would count."""
        is_asked = agent in self._working and agent in self._owing
        return is_asked and attempt in (None, self._attempts.get(agent, 1))

    def is_working(self, agent: str) -> bool:
        """Whether an agent's part has not ended."""
        return agent in self._working

    def open(self) -> list[Instruction]:
        """Records the round and sends the assignment. To be called once, before any event."""
        opened = OpenRound(
            self._request_id, self.id, self._selected, self._task, self._body, self._policy, self.operator
        )
        reachable = tuple(agent for agent in self._selected if agent not in self._unreached)
        return [opened, *self._assign(reachable, 1, self.opened_at)]

    def handle(self, event: RoundEvent, now: float) -> list[Instruction]:
        """Takes one event that concerns this round; `now` is monotonic seconds."""
        instructions = self._follow(now) if now >= self.due_at else []  # at rest, only time can move it
        match event:
            case ReplyReceived():
                instructions += self._take_reply(event, now)
            case AgentReachable(agent):
                if agent in self._working:
                    instructions += self._reach(agent, now)
            case AgentLost(agent, reason):
                if agent in self._working:
                    instructions += self._lose(agent, reason)
            case RoundCancelled(_, reason):
                if not self.is_closed:
                    instructions += self._move(Trigger.CANCELLED, now, reason)
            case CoordinatorStopped(reason):
                if not self.is_closed:
                    instructions += self._move(Trigger.INTERRUPTED, now, reason)
            case TruthRevealed():
                instructions += self._take_truth(event)
            case TimerFired():
                pass  # `_follow` has seen to it
            case _:
                assert_never(event)
        return instructions + self._follow(now)

    def forget(self) -> None:
        """The truth is not awaited any more: the outcome is let go. Replies are still told apart."""
        assert self.outcome is not None and self.truth == "awaited"
        self.outcome = None
        self.truth = "forgotten"

    # --- what events do ---

    def _take_reply(self, event: ReplyReceived, now: float) -> list[Instruction]:
        agent = event.agent
        if event.attempt != self._attempts.get(agent, 1) or agent not in self._owing:
            return [NoteStray(self._name_stray(event), self.id, agent)]
        status: Status = event.status
        error = event.error
        if status == "replied" and event.body is None:
            status, error = "failed", "the reply has no body"
        if agent in self._working and status == "failed" and self._has_attempts_left(agent):
            if agent not in self._unreached:
                return self._ask_again(agent, now)
            self._owing.discard(agent)  # it is lost: the next attempt is for its return
            return []
        self._owing.discard(agent)
        body = event.body if status == "replied" else None
        latency_s = now - self.opened_at
        if agent in self._working:
            return self._end_part(AgentResult(agent, status, body, error, latency_s, event.compute_s, event.waited_s))
        late: list[Instruction] = [NoteStray("late", self.id, agent)]
        if body is not None:
            late.append(OfferLateReply(self.id, self._task, agent, body, latency_s, event.compute_s, event.waited_s))
        return late

    def _name_stray(self, event: ReplyReceived) -> StrayKind:
        place = bisect_left(self._asked, event.agent)
        if self._asked[place : place + 1] != (event.agent,) or not self._was_asked(event.agent):
            return "not-asked"
        return "wrong-attempt" if event.agent in self._owing else "duplicate"

    def _reach(self, agent: str, now: float) -> list[Instruction]:
        """The agent has a link: it is given what it owes."""
        was_lost = self._unreached.pop(agent, "")
        if was_lost:
            return self._ask_again(agent, now)
        self._owing.add(agent)
        return self._assign((agent,), self._attempts.get(agent, 1), now)

    def _lose(self, agent: str, reason: str) -> list[Instruction]:
        was_asked = self._was_asked(agent)
        if self._has_attempts_left(agent):
            if was_asked:
                self._unreached[agent] = reason or "lost"
            return []
        return self._end_part(AgentResult(agent, "lost" if was_asked else "unavailable", error=reason))

    def _was_asked(self, agent: str) -> bool:
        """Whether an agent of `_asked` was given the assignment."""
        if agent in self._unreached:
            return bool(self._unreached[agent])
        return agent not in self._results or self._results[agent].status != "unavailable"

    def _has_attempts_left(self, agent: str) -> bool:
        return self._attempts.get(agent, 1) < self._policy.attempts

    def _ask_again(self, agent: str, now: float) -> list[Instruction]:
        attempt = self._attempts[agent] = self._attempts.get(agent, 1) + 1
        self._owing.add(agent)
        return self._assign((agent,), attempt, now)

    def _assign(self, agents: tuple[str, ...], attempt: int, now: float) -> list[Instruction]:
        left_s = self.deadline_at - now
        if not agents or left_s <= 0:
            return []
        return [SendAssignment(self.id, agents, self._task, self._body, attempt, left_s)]

    def _take_truth(self, event: TruthRevealed) -> list[Instruction]:
        if not self.is_closed:
            message = f"round {self.id} is still open: its truth can be told once it has closed"
            return [RejectRequest(event.request_id, "still-open", message, retry=True)]
        if self.truth == "revealed":
            message = f"the truth of round {self.id} has been told before"
            return [RejectRequest(event.request_id, "already-revealed", message, retry=False)]
        if self.outcome is None:
            message = f"round {self.id} is not remembered any more: its truth comes too late"
            return [RejectRequest(event.request_id, "unknown-round", message, retry=False)]
        outcome, self.outcome, self.truth = self.outcome, None, "revealed"
        learn = LearnTruth(event.request_id, outcome, event.truth)
        if not self._asked:
            return [learn]
        # The agents first: they can learn while the coordinator does.
        return [SendFeedback(self.id, self._asked, self._task, event.truth), learn]

    # --- the table ---

    def _follow(self, now: float) -> list[Instruction]:
        """Moves as long as something moves it."""
        instructions: list[Instruction] = []
        while (trigger := self._find_trigger(now)) is not None:
            instructions += self._move(trigger, now, "")
        return instructions

    def _find_trigger(self, now: float) -> Trigger | None:
        """What moves the round on, as it stands at this moment; None when it rests."""
        if self.phase == "open":
            if self._replies == len(self._selected):
                return Trigger.ALL_REPLIED
            if self._replies >= self._policy.quorum:
                return Trigger.QUORUM_MET
            if self._replies + len(self._working) < self._policy.quorum:
                return Trigger.QUORUM_UNREACHABLE
        elif self.phase == "grace":
            if self._replies == len(self._selected):
                return Trigger.ALL_REPLIED
            # Grace is for those who were asked: one that has no link must not slow every round down meanwhile.
            if len(self._working) == len(self._unreached):
                return Trigger.ALL_ENDED
        else:
            return None
        if now < self.due_at:
            return None
        return Trigger.DEADLINE if self.due_at >= self.deadline_at else Trigger.GRACE_ELAPSED

    def _move(self, trigger: Trigger, now: float, reason: str) -> list[Instruction]:
        self.phase = NEXT[self.phase, trigger]
        if self.phase == "grace":
            if self._policy.grace_s is not None:
                self.due_at = min(now + self._policy.grace_s, self.deadline_at)
            return []
        return self._close(trigger, now, reason)

    def _end_part(self, result: AgentResult) -> list[Instruction]:
        self._working.discard(result.agent)
        self._unreached.pop(result.agent, None)
        self._results[result.agent] = result
        self._replies += result.status == "replied"
        return [TellPart(self._request_id, self.id, result)] if self._is_streamed else []

    def _close(self, trigger: Trigger, now: float, reason: str) -> list[Instruction]:
        self.due_at = math.inf
        state = cast("RoundState", self.phase)  # every phase but open and grace is one
        reason = reason or self._explain(trigger)  # before the parts below are ended by this
        told = tuple(sorted(self._working - self._unreached.keys()))
        for agent in sorted(self._working):
            self._end_part(self._end_at_close(agent, trigger))
        results = tuple(self._results[agent] for agent in self._selected)
        # What stays of a closed round is small: a set keeps the room of all it ever held, a copy does not.
        self._results, self._working, self._unreached, self._owing = {}, set(), {}, set(self._owing)
        self._body = b""
        self.outcome = Outcome(
            round=self.id,
            request_id=self._request_id,
            task=self._task,
            state=state,
            quorum=self._policy.quorum,
            selected=self._selected,
            results=results,
            duration_s=now - self.opened_at,
            reason=reason,
        )
        self._asked = _asked_in(self.outcome)
        closing: list[Instruction] = [CloseRound(self.outcome)]
        if told:
            # First: whatever the shell does with the outcome, the agents' time is not wasted meanwhile.
            closing.insert(0, SendCancellation(self.id, told, _CANCELLATION.get(trigger, reason)))
        return closing

    def _end_at_close(self, agent: str, trigger: Trigger) -> AgentResult:
        """How the part of an agent ends that was still at work, or awaited."""
        lost = self._unreached.get(agent)
        if lost is None:
            return AgentResult(agent, "late" if trigger is Trigger.DEADLINE else "cancelled")
        if lost:
            return AgentResult(agent, "lost", error=lost)
        return AgentResult(agent, "unavailable", error="it had no link")

    def _explain(self, trigger: Trigger) -> str:
        """What went wrong, for an operator; nothing when nothing did."""
        quorum = self._policy.quorum
        if trigger is Trigger.QUORUM_UNREACHABLE:
            ended = [result.status for result in self._results.values()]
            counts = [
                f"{ended.count(status)} {status}"
                for status in ("replied", "declined", "failed", "lost", "unavailable")
                if status in ended
            ]
            return f"quorum of {quorum} is out of reach: of {len(self._selected)} selected {', '.join(counts)}"
        if trigger is Trigger.DEADLINE and self._replies < quorum:
            return (
                f"{self._replies} of {quorum} replies needed had come at the deadline of {self._policy.deadline_s:g} s"
            )
        return str(trigger) if self.phase in ("cancelled", "interrupted") else ""


def _asked_in(outcome: Outcome) -> tuple[str, ...]:
    """The agents that were given the assignment, sorted: all but the unavailable."""
    asked = tuple(result.agent for result in outcome.results if result.status != "unavailable")
    return outcome.selected if len(asked) == len(outcome.selected) else asked

"""One round as a state machine: who was asked, who answered, and when it is over.

How each selected agent ends. Exactly one status each, decided at one moment and never changed:

- `replied`, `declined`, `failed`: what its first reply said, if that came while the round was in flight.
- `lost`: it was gone before it answered, while the round was in flight.
- `unavailable`: it was selected but could not be asked.
- `late`: the round came to its deadline, and the agent, which had all the time there was, had not answered.
- `cancelled`: the round closed before its deadline (quorum and grace, quorum out of reach, cancelled,
  interrupted), and the agent was stopped at work; or not even asked, where quorum was out of reach
  from the start.

A reply that comes after its agent's part has ended without one (late, cancelled or lost) is a late
reply: it is counted and offered, and changes neither the status nor the outcome.

Time goes first. An event at or after the moment when grace or the deadline ends finds the round
closed by it, whether or not a `TimerFired` came in between: what counts does not depend on the order
in which a loop ran its callbacks.
"""

import math
from bisect import bisect_left
from typing import Final, Literal, assert_never, cast

from quorate_coordinator.rounds.events import (
    AgentLost,
    CoordinatorStopped,
    ReplyReceived,
    RoundCancelled,
    RoundRequested,
    TimerFired,
    TruthRevealed,
)
from quorate_coordinator.rounds.instructions import (
    AgentResult,
    BroadcastAssignment,
    CloseRound,
    Instruction,
    LearnTruth,
    NoteStray,
    OfferLateReply,
    Outcome,
    RejectRequest,
    SendCancellation,
    SendFeedback,
    StrayKind,
)
from quorate_coordinator.rounds.table import CLOSED, NEXT, Phase, Trigger
from quorate_protocol.messages import RoundState, Status

#: The events that concern one round.
RoundEvent = ReplyReceived | AgentLost | RoundCancelled | TruthRevealed | TimerFired | CoordinatorStopped

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
        "_owing",
        "_policy",
        "_replies",
        "_request_id",
        "_results",
        "_selected",
        "_task",
        "_working",
        "attempt",
        "deadline_at",
        "due_at",
        "id",
        "opened_at",
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
        self._request_id: Final = request.request_id
        self._task: Final = request.task
        self._policy: Final = request.policy.resolve(len(request.selected) + len(request.unavailable))
        #: Sorted: the agents that get the assignment.
        self._asked = tuple(sorted(request.selected))
        #: Sorted: `_asked` and the unavailable. The same tuple where it can be: many rounds share few.
        self._selected: Final = tuple(sorted(self._asked + request.unavailable)) if request.unavailable else self._asked
        #: Agents whose part has not ended. Empty once the round is closed.
        self._working = set(self._asked)
        #: Agents asked that never sent a reply. Holds `_working`.
        self._owing = set(self._asked)
        #: Parts that have ended; given away to the outcome when the round closes.
        self._results = {agent: AgentResult(agent, "unavailable") for agent in request.unavailable}
        self._replies = 0
        #: The number that a reply must carry.
        self.attempt: Final = 1
        self.phase: Phase = "open"
        #: The hard end.
        self.deadline_at: Final = now + self._policy.deadline_s
        #: When time moves the round next: the end of grace, or the deadline; never, once closed.
        self.due_at = self.deadline_at
        #: How it ended; None while in flight, and again once its truth is no longer awaited.
        self.outcome: Outcome | None = None
        self.truth: TruthState = "awaited"

    @property
    def asked(self) -> tuple[str, ...]:
        """The agents that the assignment went to, sorted."""
        return self._asked

    @property
    def is_closed(self) -> bool:
        """Whether the outcome stands."""
        return self.phase in CLOSED

    def is_working(self, agent: str) -> bool:
        """Whether an agent's part has not ended."""
        return agent in self._working

    def open(self, body: bytes) -> list[Instruction]:
        """Sends the assignment; or closes at once, nobody asked, where quorum is out of reach from the start.

        To be called once, before any event.
        """
        closing = self._follow(self.opened_at)
        if self.is_closed:
            # Nobody was told: nobody is to be told to stop, owes a reply, or has a use for the truth.
            self._asked, self._owing = (), set()
            return [instruction for instruction in closing if not isinstance(instruction, SendCancellation)]
        return [
            BroadcastAssignment(
                self._request_id,
                self.id,
                self._asked,
                self._task,
                body,
                self.attempt,
                self._policy.deadline_s,
            )
        ]

    def handle(self, event: RoundEvent, now: float) -> list[Instruction]:
        """Takes one event that concerns this round; `now` is monotonic seconds."""
        instructions = self._follow(now) if now >= self.due_at else []  # at rest, only time can move it
        match event:
            case ReplyReceived():
                instructions += self._take_reply(event, now)
            case AgentLost(agent, reason):
                if agent in self._working:
                    self._end_part(AgentResult(agent, "lost", error=reason))
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
        if event.attempt != self.attempt or agent not in self._owing:
            return [NoteStray(self._name_stray(event), self.id, agent)]
        self._owing.discard(agent)
        status: Status = event.status
        error = event.error
        if status == "replied" and event.body is None:
            status, error = "failed", "the reply has no body"
        body = event.body if status == "replied" else None
        latency_s = now - self.opened_at
        if agent in self._working:
            self._end_part(AgentResult(agent, status, body, error, latency_s, event.compute_s, event.waited_s))
            return []
        late: list[Instruction] = [NoteStray("late", self.id, agent)]
        if body is not None:
            late.append(OfferLateReply(self.id, self._task, agent, body, latency_s, event.compute_s, event.waited_s))
        return late

    def _name_stray(self, event: ReplyReceived) -> StrayKind:
        place = bisect_left(self._asked, event.agent)
        if self._asked[place : place + 1] != (event.agent,):
            return "not-asked"
        return "wrong-attempt" if event.attempt != self.attempt else "duplicate"

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
            if not self._working:
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

    def _end_part(self, result: AgentResult) -> None:
        self._working.discard(result.agent)
        self._results[result.agent] = result
        self._replies += result.status == "replied"

    def _close(self, trigger: Trigger, now: float, reason: str) -> list[Instruction]:
        self.due_at = math.inf
        state = cast("RoundState", self.phase)  # every phase but open and grace is one
        reason = reason or self._explain(trigger)  # before the parts below are ended by this
        working = tuple(sorted(self._working))
        for agent in working:
            self._end_part(AgentResult(agent, "late" if trigger is Trigger.DEADLINE else "cancelled"))
        results = tuple(self._results[agent] for agent in self._selected)
        # What stays of a closed round is small: a set keeps the room of all it ever held, a copy does not.
        self._results, self._working, self._owing = {}, set(), set(self._owing)
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
        closing: list[Instruction] = [CloseRound(self.outcome)]
        if working:
            # First: whatever the shell does with the outcome, the agents' time is not wasted meanwhile.
            closing.insert(0, SendCancellation(self.id, working, _CANCELLATION.get(trigger, reason)))
        return closing

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

"""The agent's core: a state machine without asyncio, sockets, threads or a clock.

Theory of operation. The shell tells the core what happened (`handle`) and does what it is told.
Two things live here:

*The membership*, a table of states (`TRANSITIONS`)::

    connecting ─LinkUp─> joining ─WelcomeReceived─> active ─DrainReceived or StopRequested─> draining
        ^                   │                          │                                        │
        └──── LinkDown ─────┴──────────────────────────┴── drained, when not asked to stop ─────┤
                                                                                                v
      from anywhere: refused for good, replaced, stopped and drained ─────────────────────────> gone

*The order of work.* Assignments and feedback wait in one queue, in the order of the stream. The head
of the queue starts as soon as it may, and nothing overtakes it: an assignment when fewer than
`concurrency` assignments and no feedback run, feedback when nothing runs. So a model is never trained
while it predicts, and each assignment sees exactly the feedback that came before it.

A cancelled handler keeps its place until it has really ended: a thread cannot be stopped, and feedback
must not run beside it.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Literal

from quorate_agent import events as ev
from quorate_agent.backlog import BacklogLimits, RememberedBodies, Work, WorkQueue
from quorate_protocol.messages import clip_text


class State(Enum):
    """Where the agent stands with its coordinator."""

    CONNECTING = "connecting"
    JOINING = "joining"
    ACTIVE = "active"
    DRAINING = "draining"
    GONE = "gone"


#: Events that move the membership: state × event → states it may lead to. What is not here changes nothing.
TRANSITIONS: Final[dict[tuple[State, type], tuple[State, ...]]] = {
    (State.CONNECTING, ev.ConnectFailed): (State.CONNECTING,),
    (State.CONNECTING, ev.ConnectGivenUp): (State.GONE,),
    (State.CONNECTING, ev.LinkUp): (State.JOINING,),
    (State.CONNECTING, ev.StopRequested): (State.DRAINING, State.GONE),
    (State.JOINING, ev.WelcomeReceived): (State.ACTIVE,),
    (State.JOINING, ev.RefusalReceived): (State.CONNECTING, State.GONE),
    (State.JOINING, ev.LinkDown): (State.CONNECTING, State.GONE),
    (State.JOINING, ev.StopRequested): (State.DRAINING, State.GONE),
    (State.ACTIVE, ev.LinkDown): (State.CONNECTING, State.GONE),
    (State.ACTIVE, ev.DrainReceived): (State.DRAINING, State.CONNECTING),
    (State.ACTIVE, ev.StopRequested): (State.DRAINING, State.GONE),
    (State.DRAINING, ev.LinkDown): (State.DRAINING, State.CONNECTING, State.GONE),
    (State.DRAINING, ev.StopRequested): (State.DRAINING, State.GONE),
    (State.DRAINING, ev.DrainTimedOut): (State.CONNECTING, State.GONE),
    (State.DRAINING, ev.HandlerReturned): (State.DRAINING, State.CONNECTING, State.GONE),
    (State.DRAINING, ev.HandlerDeclined): (State.DRAINING, State.CONNECTING, State.GONE),
    (State.DRAINING, ev.HandlerFailed): (State.DRAINING, State.CONNECTING, State.GONE),
    (State.DRAINING, ev.CancellationReceived): (State.DRAINING, State.CONNECTING, State.GONE),
}

#: Events about work: they may come in any state, and move the membership only by what the table says of draining.
_WORK_EVENTS: Final = frozenset(
    {
        ev.AssignmentReceived,
        ev.CancellationReceived,
        ev.FeedbackReceived,
        ev.HandlerReturned,
        ev.HandlerDeclined,
        ev.HandlerFailed,
    }
)


@dataclass(slots=True)
class Counts:
    """What happened since the start; only grows."""

    assignments: int = 0
    replied: int = 0
    declined: int = 0
    failed: int = 0
    #: Assignments whose reply nobody waited for: the round was cancelled or its deadline passed in the queue.
    cancelled: int = 0
    #: Work that died with its session or with the agent.
    lost: int = 0
    #: Feedback that its handler has finished.
    feedback: int = 0
    feedback_failed: int = 0
    #: Feedback whose body was not remembered any more, or never there.
    feedback_forgotten: int = 0
    #: Feedback over the ceiling of what may wait.
    feedback_dropped: int = 0
    #: Bodies that made room for newer ones.
    bodies_forgotten: int = 0
    sessions: int = 0


class AgentCore:
    """See the module. `now` is in seconds of any clock that does not go back.

    Args:
        tasks: Tasks that have a handler; others are declined.
        feedback_tasks: Tasks that have a feedback handler; other feedback is let go.
        concurrency: Assignments that may run at once.
        limits: Ceilings of what waits and is remembered.
    """

    def __init__(
        self,
        *,
        tasks: Iterable[str],
        feedback_tasks: Iterable[str] = (),
        concurrency: int = 1,
        limits: BacklogLimits | None = None,
    ) -> None:
        limits = limits or BacklogLimits()
        self.state = State.CONNECTING
        self.counts = Counts()
        self._tasks = frozenset(tasks)
        self._feedback_tasks = frozenset(feedback_tasks)
        self._concurrency = concurrency
        self._queue = WorkQueue(limits)
        self._remembered = RememberedBodies(limits)
        self._running: dict[int, Work] = {}
        self._work_ids = itertools.count(1)
        #: Whether a session exists, so that replies have somewhere to go.
        self._is_linked = False
        #: Why this agent is to end for good; None while it is not.
        self._stop_reason: str | None = None
        self._drain_reason = ""

    @property
    def queued(self) -> int:
        """Work that waits."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Handlers that have not ended, cancelled ones too."""
        return len(self._running)

    @property
    def remembered(self) -> int:
        """Rounds whose body is kept for feedback."""
        return len(self._remembered)

    def handle(self, event: ev.Event, now: float) -> list[ev.Instruction]:
        """Takes in what happened. Returns what to do, in this order.

        An event that cannot happen in the present state (late news of a link that is over, say)
        changes nothing.
        """
        instructions: list[ev.Instruction] = []
        kind = type(event)
        if self.state is not State.GONE and (kind in _WORK_EVENTS or (self.state, kind) in TRANSITIONS):
            _HANDLERS[kind](self, event, now, instructions)
        return instructions

    # --- membership ------------------------------------------------------------------------------

    def _on_connect_failed(self, event: ev.ConnectFailed, now: float, out: list[ev.Instruction]) -> None:
        out.append(ev.Reconnect(event.problem))

    def _on_connect_given_up(self, event: ev.ConnectGivenUp, now: float, out: list[ev.Instruction]) -> None:
        self._end(ev.EndingKind.UNREACHABLE, event.problem, out)

    def _on_link_up(self, event: ev.LinkUp, now: float, out: list[ev.Instruction]) -> None:
        self.state = State.JOINING
        out.append(ev.SendHello())

    def _on_welcome(self, event: ev.WelcomeReceived, now: float, out: list[ev.Instruction]) -> None:
        self.state = State.ACTIVE
        self._is_linked = True
        self.counts.sessions += 1
        out.append(ev.OpenCoordination(event.session))

    def _on_refusal(self, event: ev.RefusalReceived, now: float, out: list[ev.Instruction]) -> None:
        if event.retry:
            self.state = State.CONNECTING
            out.append(ev.Reconnect(f"refused ({event.reason}): {event.message}"))
        else:
            self._end(ev.EndingKind.REFUSED, event.message, out, refusal=event.reason)

    def _on_link_down(self, event: ev.LinkDown, now: float, out: list[ev.Instruction]) -> None:
        if self.state is State.DRAINING and not self._is_linked:
            return
        self._is_linked = False
        self.counts.lost += self._abandon(lambda work: not work.is_feedback, out)
        if event.replaced:
            self._end(ev.EndingKind.REPLACED, event.reason, out)
        elif self._stop_reason is None:
            self.state = State.CONNECTING
            out.append(ev.Reconnect(event.reason))
        self._continue(now, out)

    def _on_drain(self, event: ev.DrainReceived, now: float, out: list[ev.Instruction]) -> None:
        self.state = State.DRAINING
        self._drain_reason = event.reason
        out.append(ev.Log("info", "coordinator_drains", {"reason": event.reason}))
        self._continue(now, out)

    def _on_stop(self, event: ev.StopRequested, now: float, out: list[ev.Instruction]) -> None:
        if self._stop_reason is not None:
            return
        self._stop_reason = event.reason
        if self._is_linked:
            out.append(ev.SendDrain(event.reason))
        elif self.state is State.JOINING:
            out.append(ev.CloseLink())
        self.state = State.DRAINING
        self._continue(now, out)

    def _on_drain_timed_out(self, event: ev.DrainTimedOut, now: float, out: list[ev.Instruction]) -> None:
        unfinished = {"running": len(self._running), "queued": len(self._queue)}
        out.append(ev.Log("warning", "drain_timed_out", unfinished))
        self.counts.lost += self._abandon(lambda work: self._stop_reason is not None or not work.is_feedback, out)
        self._depart(out)

    def _depart(self, out: list[ev.Instruction]) -> None:
        """Drained: leaves the session, for good when asked to stop, otherwise to come back later."""
        reason = self._stop_reason if self._stop_reason is not None else self._drain_reason
        if self._is_linked:
            out.append(ev.Leave(reason))
            self._is_linked = False
        if self._stop_reason is not None:
            self._end(ev.EndingKind.STOPPED, reason, out)
        else:
            self.state = State.CONNECTING
            out.append(ev.Reconnect(f"coordinator drains: {reason}" if reason else "coordinator drains"))

    def _end(self, kind: ev.EndingKind, reason: str, out: list[ev.Instruction], *, refusal: str = "") -> None:
        self.state = State.GONE
        self._is_linked = False
        self.counts.lost += self._abandon(lambda work: True, out)
        out.append(ev.Stop(kind, reason, refusal))

    # --- work ------------------------------------------------------------------------------------

    def _on_assignment(self, event: ev.AssignmentReceived, now: float, out: list[ev.Instruction]) -> None:
        if not self._is_linked:
            return
        self.counts.assignments += 1
        if event.task not in self._tasks:
            self._decline(event, f"this agent has no task {event.task!r}", out)
            return
        if event.task in self._feedback_tasks:
            self.counts.bodies_forgotten += self._remembered.put(event.round, event.task, event.body)
        work = Work(
            id=next(self._work_ids),
            round=event.round,
            task=event.task,
            body=event.body,
            received_at=now,
            attempt=event.attempt,
            deadline=now + event.deadline_s,
        )
        if self.state is State.DRAINING:
            self._decline(event, "this agent is draining", out)
        elif not self._queue.has_room(work):
            self._decline(event, f"queue full: {len(self._queue)} wait", out)
        else:
            self._queue.push(work)
            self._continue(now, out)

    def _on_cancellation(self, event: ev.CancellationReceived, now: float, out: list[ev.Instruction]) -> None:
        if self._is_linked:
            self.counts.cancelled += self._abandon(lambda work: work.round == event.round and not work.is_feedback, out)
            self._continue(now, out)

    def _on_feedback(self, event: ev.FeedbackReceived, now: float, out: list[ev.Instruction]) -> None:
        if not self._is_linked or event.task not in self._feedback_tasks:
            return
        body = self._remembered.take(event.round, event.task)
        fields = {"round": event.round, "task": event.task}
        if body is None:
            self.counts.feedback_forgotten += 1
            out.append(ev.Log("warning", "feedback_forgotten", fields))
            return
        work = Work(
            id=next(self._work_ids), round=event.round, task=event.task, body=body, received_at=now, truth=event.truth
        )
        if not self._queue.has_room(work):
            self.counts.feedback_dropped += 1
            out.append(ev.Log("warning", "feedback_dropped", fields))
            return
        self._queue.push(work)
        self._continue(now, out)

    def _on_handler_ended(
        self,
        event: ev.HandlerReturned | ev.HandlerDeclined | ev.HandlerFailed,
        now: float,
        out: list[ev.Instruction],
    ) -> None:
        work = self._running.pop(event.work, None)
        if work is None:
            return
        if work.is_feedback:
            if isinstance(event, ev.HandlerReturned):
                self.counts.feedback += 1
            else:
                self.counts.feedback_failed += 1
        elif not work.is_abandoned:
            out.append(self._reply_of(work, event))
        self._continue(now, out)

    def _reply_of(self, work: Work, event: ev.HandlerReturned | ev.HandlerDeclined | ev.HandlerFailed) -> ev.SendReply:
        waited_s = max(0.0, work.started_at - work.received_at)
        if isinstance(event, ev.HandlerReturned):
            self.counts.replied += 1
            return ev.SendReply(
                work.round,
                work.attempt,
                "replied",
                body=event.body,
                compute_s=event.compute_s,
                waited_s=waited_s,
            )
        status: Literal["declined", "failed"]
        if isinstance(event, ev.HandlerDeclined):
            self.counts.declined += 1
            status, text = "declined", event.reason
        else:
            self.counts.failed += 1
            status, text = "failed", event.error
        return ev.SendReply(
            work.round,
            work.attempt,
            status,
            error=clip_text(text),
            compute_s=event.compute_s,
            waited_s=waited_s,
        )

    def _decline(self, event: ev.AssignmentReceived, reason: str, out: list[ev.Instruction]) -> None:
        self.counts.declined += 1
        out.append(ev.SendReply(event.round, event.attempt, "declined", error=clip_text(reason)))

    def _abandon(self, predicate: Callable[[Work], bool], out: list[ev.Instruction]) -> int:
        """Drops queued work and cancels running work for which the predicate holds; returns how much of it."""
        count = len(self._queue.remove(predicate))
        for work in self._running.values():
            if not work.is_abandoned and predicate(work):
                work.is_abandoned = True
                out.append(ev.CancelHandler(work.id))
                count += 1
        return count

    def _continue(self, now: float, out: list[ev.Instruction]) -> None:
        """Starts what may start; leaves when all is done and it is time to leave."""
        while (head := self._queue.head()) is not None:
            if head.is_feedback:
                if self._running:
                    break
            elif head.deadline <= now:
                # The round is over at the coordinator too: its deadline began earlier than ours.
                self._queue.pop()
                self.counts.cancelled += 1
                continue
            elif len(self._running) >= self._concurrency or any(w.is_feedback for w in self._running.values()):
                break
            self._start(self._queue.pop(), now, out)
        if self.state is State.DRAINING and not self._running and not self._queue:
            self._depart(out)

    def _start(self, work: Work, now: float, out: list[ev.Instruction]) -> None:
        work.started_at = now
        self._running[work.id] = work
        if work.truth is not None:
            out.append(ev.StartFeedback(work.id, work.round, work.task, work.body, work.truth))
        else:
            out.append(ev.StartAssignment(work.id, work.round, work.attempt, work.task, work.body, work.deadline))


_HANDLERS: Final[dict[type, Callable[[AgentCore, Any, float, list[ev.Instruction]], None]]] = {
    ev.ConnectFailed: AgentCore._on_connect_failed,
    ev.ConnectGivenUp: AgentCore._on_connect_given_up,
    ev.LinkUp: AgentCore._on_link_up,
    ev.LinkDown: AgentCore._on_link_down,
    ev.WelcomeReceived: AgentCore._on_welcome,
    ev.RefusalReceived: AgentCore._on_refusal,
    ev.AssignmentReceived: AgentCore._on_assignment,
    ev.CancellationReceived: AgentCore._on_cancellation,
    ev.FeedbackReceived: AgentCore._on_feedback,
    ev.DrainReceived: AgentCore._on_drain,
    ev.HandlerReturned: AgentCore._on_handler_ended,
    ev.HandlerDeclined: AgentCore._on_handler_ended,
    ev.HandlerFailed: AgentCore._on_handler_ended,
    ev.StopRequested: AgentCore._on_stop,
    ev.DrainTimedOut: AgentCore._on_drain_timed_out,
}

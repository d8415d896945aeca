"""The agent's core: a state machine without asyncio, sockets, threads or a clock.

Theory of operation. The shell tells the core what happened (`handle`) and does what it is told.
Three things live here:

*The membership*, a table of states (`states.TRANSITIONS`)::

    connecting ─LinkUp─> joining ─WelcomeReceived─> active ─DrainReceived or StopRequested─> draining
        ^                   │                          │                                        │
        └──── LinkDown ─────┴──────────────────────────┴── drained, when not asked to stop ─────┤
                                                                                                v
      from anywhere: refused for good, replaced, stopped and drained ─────────────────────────> gone

*The session*, which outlives its links. When a link breaks the session is suspended: handlers go on, the
queue goes on, replies are kept. The next hello wants to resume it. Where it goes on, the replies that the
coordinator does not have are sent again, in their order; assignments that come again and are known, by
round and attempt, are not worked on twice. Where it does not, all that was under way is abandoned. An agent
that is asked to stop while it is away finishes what it has and comes back to deliver it, until
`DrainTimedOut`; `wants_link` says so.

*The order of work.* Assignments and feedback wait in one queue, in the order of the stream. The head
of the queue starts as soon as it may, and nothing overtakes it: an assignment when fewer than
`concurrency` assignments and no feedback run, feedback when nothing runs. So a model is never trained
while it predicts, and each assignment sees exactly the feedback that came before it.

*Large bodies* come on streams of their own, after the frame that announces them: the work goes to the end of
the queue when its body is there. So an assignment with a large body may be worked on after feedback that was
told later, and a large truth be learned after assignments that were asked later; nothing else waits for them.

A cancelled handler keeps its place until it has really ended: a thread cannot be stopped, and feedback
must not run beside it.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from quorate_agent import events as ev
from quorate_agent.backlog import BacklogLimits, RememberedBodies, Work, WorkQueue
from quorate_agent.counts import Counts
from quorate_agent.reply_log import ReplyLog
from quorate_agent.states import TRANSITIONS, WORK_EVENTS, State
from quorate_protocol.fields import Body
from quorate_protocol.messages import clip_text


@dataclass(slots=True)
class _Session:
    """A membership, with a link or suspended."""

    name: str
    #: Empty where it cannot be resumed.
    secret: str = field(repr=False)
    #: Frames that came on its coordination streams.
    received: int = 0


@dataclass(frozen=True, slots=True)
class _Awaited:
    """Work whose body has not come."""

    announced: ev.AssignmentAnnounced | ev.FeedbackAnnounced
    #: With an assignment: when its round ends.
    deadline: float = 0.0


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
        self._replies = ReplyLog(limits)
        self._running: dict[int, Work] = {}
        #: Assignments that wait or run and that somebody waits for: round to attempt.
        self._attempts: dict[int, int] = {}
        #: What waits for its body.
        self._awaited: dict[tuple[ev.BodyOf, int], _Awaited] = {}
        self._work_ids = itertools.count(1)
        self._session: _Session | None = None
        #: Whether there is a link, welcomed or not.
        self._has_link = False
        #: Whether the session has a link, so that replies have somewhere to go.
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

    @property
    def is_suspended(self) -> bool:
        """Whether there is a session that has lost its link and may go on."""
        return self._session is not None and not self._is_linked

    @property
    def wants_link(self) -> bool:
        """Whether the shell is to connect: there is no link, and something to do with one."""
        if self.state is State.DRAINING:
            return not self._has_link and self._has_business()
        return self.state is State.CONNECTING

    def handle(self, event: ev.Event, now: float) -> list[ev.Instruction]:
        """Takes in what happened. Returns what to do, in this order.

        An event that cannot happen in the present state (late news of a link that is over, say)
        changes nothing.
        """
        instructions: list[ev.Instruction] = []
        kind = type(event)
        if self.state is not State.GONE and (kind in WORK_EVENTS or (self.state, kind) in TRANSITIONS):
            _HANDLERS[kind](self, event, now, instructions)
        return instructions

    # --- membership ------------------------------------------------------------------------------

    def _on_connect_failed(self, event: ev.ConnectFailed, now: float, out: list[ev.Instruction]) -> None:
        if not self._has_link:
            out.append(ev.Reconnect(event.problem))

    def _on_connect_given_up(self, event: ev.ConnectGivenUp, now: float, out: list[ev.Instruction]) -> None:
        if self._stop_reason is not None:
            self._end(ev.EndingKind.STOPPED, self._stop_reason, out)
        else:
            self._end(ev.EndingKind.UNREACHABLE, event.problem, out)

    def _on_link_up(self, event: ev.LinkUp, now: float, out: list[ev.Instruction]) -> None:
        if not self.wants_link:
            return
        self._has_link = True
        if self.state is State.CONNECTING:
            self.state = State.JOINING
        session = self._session
        resume = None if session is None else ev.Resume(session.name, session.secret, session.received)
        out.append(ev.SendHello(resume))

    def _on_welcome(self, event: ev.WelcomeReceived, now: float, out: list[ev.Instruction]) -> None:
        if not self._has_link or self._is_linked:
            return
        if self.state is State.JOINING:
            self.state = State.ACTIVE
        self._is_linked = True
        out.append(ev.OpenCoordination(event.session))
        if event.resumed and self._session is not None:
            self.counts.resumed += 1
            again, missing = self._replies.resume(event.received)
            if missing:
                self.counts.replies_lost += missing
                out.append(ev.Log("warning", "replies_not_kept", {"count": missing}))
            out += again
            # Assignments are announced again; truths that were announced are not, but their bodies come.
            out += [_receive_of(waiting, now) for waiting in self._awaited.values()]
        else:
            self._forget_session(out)
            self.counts.sessions += 1
            self._session = _Session(event.session, event.secret)
        if self._stop_reason is not None:
            out.append(ev.SendDrain(self._stop_reason))
        self._continue(now, out)

    def _on_refusal(self, event: ev.RefusalReceived, now: float, out: list[ev.Instruction]) -> None:
        if not self._has_link or self._is_linked:
            return
        self._has_link = False
        if event.retry:
            if self.state is State.JOINING:
                self.state = State.CONNECTING
            out.append(ev.Reconnect(f"refused ({event.reason}): {event.message}"))
        elif self._stop_reason is not None:
            self._end(ev.EndingKind.STOPPED, self._stop_reason, out)
        else:
            self._end(ev.EndingKind.REFUSED, event.message, out, refusal=event.reason)

    def _on_link_down(self, event: ev.LinkDown, now: float, out: list[ev.Instruction]) -> None:
        if not self._has_link:
            return
        is_over = self._is_linked and (event.is_over or self._session is None or not self._session.secret)
        self._has_link = self._is_linked = False
        self._awaited = {key: waiting for key, waiting in self._awaited.items() if key[0] == "feedback"}
        if is_over:
            self._forget_session(out)
        if event.replaced:
            self._end(ev.EndingKind.REPLACED, event.reason, out)
            return
        if self._stop_reason is None:
            self.state = State.CONNECTING
        if self.wants_link:
            out.append(ev.Reconnect(event.reason))
        self._continue(now, out)

    def _on_drain(self, event: ev.DrainReceived, now: float, out: list[ev.Instruction]) -> None:
        if self.state is State.DRAINING and (not event.stop or not self._is_linked or self._stop_reason is not None):
            return
        self.state = State.DRAINING
        self._drain_reason = event.reason
        if event.stop:
            self._stop_reason = event.reason or "an operator drained this agent"
            out.append(ev.Log("info", "told_to_stop", {"reason": event.reason}))
        else:
            out.append(ev.Log("info", "coordinator_drains", {"reason": event.reason}))
        self._continue(now, out)

    def _on_stop(self, event: ev.StopRequested, now: float, out: list[ev.Instruction]) -> None:
        if self._stop_reason is not None:
            return
        self._stop_reason = event.reason
        if self._is_linked:
            out.append(ev.SendDrain(event.reason))
        elif self._has_link and not self._has_business():
            self._has_link = False
            out.append(ev.CloseLink())
        self.state = State.DRAINING
        self._continue(now, out)

    def _on_drain_timed_out(self, event: ev.DrainTimedOut, now: float, out: list[ev.Instruction]) -> None:
        unfinished = {"running": len(self._running), "queued": len(self._queue), "replies": len(self._replies)}
        out.append(ev.Log("warning", "drain_timed_out", unfinished))
        self.counts.lost += self._abandon(lambda work: self._stop_reason is not None or not work.is_feedback, out)
        self._depart(out)

    def _has_business(self) -> bool:
        """Whether the session, where it can be resumed, has or will have replies that may not have been delivered."""
        can_resume = self._session is not None and bool(self._session.secret)
        return can_resume and bool(self._attempts or len(self._replies) or self._replies.bodies_under_way)

    def _depart(self, out: list[ev.Instruction]) -> None:
        """Drained: leaves the session, for good when asked to stop, otherwise to come back later."""
        reason = self._stop_reason if self._stop_reason is not None else self._drain_reason
        if self._is_linked:
            out.append(ev.Leave(reason))
        self._has_link = self._is_linked = False
        self._session = None
        self._replies.begin()
        self._awaited.clear()
        if self._stop_reason is not None:
            self._end(ev.EndingKind.STOPPED, reason, out)
        else:
            self.state = State.CONNECTING
            out.append(ev.Reconnect(f"coordinator drains: {reason}" if reason else "coordinator drains"))

    def _forget_session(self, out: list[ev.Instruction]) -> None:
        """The session is over, and nobody waits for what was under way in it."""
        self.counts.lost += self._abandon(lambda work: not work.is_feedback, out)
        self._session = None
        self._replies.begin()
        self._awaited.clear()

    def _end(self, kind: ev.EndingKind, reason: str, out: list[ev.Instruction], *, refusal: str = "") -> None:
        self.state = State.GONE
        self._has_link = self._is_linked = False
        self.counts.lost += self._abandon(lambda work: True, out)
        out.append(ev.Stop(kind, reason, refusal))

    # --- work ------------------------------------------------------------------------------------

    def _on_assignment(self, event: ev.AssignmentReceived, now: float, out: list[ev.Instruction]) -> None:
        if not self._count_frame() or self._is_known(event):
            return
        self._abandon_earlier(event.round, out)
        if self.state is State.DRAINING and event.task in self._tasks:
            self.counts.assignments += 1
            self._remember(event, event.body)
            self._decline(event, "this agent is draining", out)
        else:
            self._take(event, event.body, now, now + event.deadline_s, out)
        # One that was abandoned may have been all that there was to finish.
        self._continue(now, out)

    def _on_assignment_announced(self, event: ev.AssignmentAnnounced, now: float, out: list[ev.Instruction]) -> None:
        if not self._count_frame():
            return
        if self._is_known(event):
            out.append(ev.RefuseBody("assignment", event.round, event.body))
            return
        self._abandon_earlier(event.round, out)
        problem = ""
        if event.task not in self._tasks:
            problem = f"this agent has no task {event.task!r}"
        elif self.state is State.DRAINING:
            problem = "this agent is draining"
        if problem:
            self.counts.assignments += 1
            self._decline(event, problem, out)
            out.append(ev.RefuseBody("assignment", event.round, event.body))
        else:
            waiting = self._awaited["assignment", event.round] = _Awaited(event, now + event.deadline_s)
            out.append(_receive_of(waiting, now))
        self._continue(now, out)

    def _is_known(self, event: ev.AssignmentReceived | ev.AssignmentAnnounced) -> bool:
        """Whether an assignment was delivered before. A reply that is kept has been sent over this link."""
        if self._attempts.get(event.round, 0) >= event.attempt or self._replies.has(event.round, event.attempt):
            self.counts.duplicates += 1
            return True
        return False

    def _abandon_earlier(self, round_id: int, out: list[ev.Instruction]) -> None:
        """Another attempt takes the place of what is known of a round."""
        if round_id in self._attempts:
            self.counts.cancelled += self._abandon(lambda work: work.round == round_id and not work.is_feedback, out)

    def _on_body_received(self, event: ev.BodyReceived, now: float, out: list[ev.Instruction]) -> None:
        waiting = self._awaited.pop((event.of, event.round), None)
        if waiting is None:
            return
        if isinstance(waiting.announced, ev.FeedbackAnnounced):
            self._take_truth(event.round, waiting.announced.task, event.body, now, out)
        else:
            self._take(waiting.announced, event.body, now, waiting.deadline, out)
        self._continue(now, out)

    def _on_body_failed(self, event: ev.BodyFailed, now: float, out: list[ev.Instruction]) -> None:
        waiting = self._awaited.pop((event.of, event.round), None)
        if waiting is None:
            return
        announced = waiting.announced
        if isinstance(announced, ev.FeedbackAnnounced):
            self.counts.feedback_dropped += 1
            fields = {"round": event.round, "task": announced.task, "problem": event.error}
            out.append(ev.Log("warning", "feedback_dropped", fields))
        else:
            self.counts.assignments += 1
            self.counts.failed += 1
            self._reply(ev.SendReply(event.round, announced.attempt, "failed", error=clip_text(event.error)), out)
        self._continue(now, out)

    def _count_frame(self) -> bool:
        """A frame came on the coordination stream; False when there is none."""
        if not self._is_linked or self._session is None:
            return False
        self._session.received += 1
        return True

    def _remember(self, event: ev.AssignmentReceived | ev.AssignmentAnnounced, body: Body) -> None:
        if event.task in self._feedback_tasks:
            self.counts.bodies_forgotten += self._remembered.put(event.round, event.task, body)

    def _take(
        self,
        event: ev.AssignmentReceived | ev.AssignmentAnnounced,
        body: Body,
        now: float,
        deadline: float,
        out: list[ev.Instruction],
    ) -> None:
        """An assignment that is not known is there, with its body."""
        self.counts.assignments += 1
        if event.task not in self._tasks:
            self._decline(event, f"this agent has no task {event.task!r}", out)
            return
        self._remember(event, body)
        work = Work(
            id=next(self._work_ids),
            round=event.round,
            task=event.task,
            body=body,
            received_at=now,
            attempt=event.attempt,
            deadline=deadline,
        )
        if not self._queue.has_room(work):
            self._decline(event, f"queue full: {len(self._queue)} wait", out)
        else:
            self._queue.push(work)
            self._attempts[work.round] = work.attempt

    def _on_cancellation(self, event: ev.CancellationReceived, now: float, out: list[ev.Instruction]) -> None:
        if self._count_frame():
            self.counts.cancelled += self._abandon(lambda work: work.round == event.round and not work.is_feedback, out)
            was_awaited = self._awaited.pop(("assignment", event.round), None) is not None
            self.counts.cancelled += was_awaited
            if self._replies.drop_bodies(event.round) or was_awaited:
                out.append(ev.StopBodies(event.round))
            self._continue(now, out)

    def _on_feedback(self, event: ev.FeedbackReceived, now: float, out: list[ev.Instruction]) -> None:
        if self._count_frame() and event.task in self._feedback_tasks:
            self._take_truth(event.round, event.task, event.truth, now, out)

    def _on_feedback_announced(self, event: ev.FeedbackAnnounced, now: float, out: list[ev.Instruction]) -> None:
        if not self._count_frame():
            return
        if event.task in self._feedback_tasks:
            waiting = self._awaited["feedback", event.round] = _Awaited(event)
            out.append(_receive_of(waiting, now))
        else:
            out.append(ev.RefuseBody("feedback", event.round, event.truth))

    def _take_truth(self, round_id: int, task: str, truth: Body, now: float, out: list[ev.Instruction]) -> None:
        """A truth is there."""
        body = self._remembered.take(round_id, task)
        fields = {"round": round_id, "task": task}
        if body is None:
            self.counts.feedback_forgotten += 1
            out.append(ev.Log("warning", "feedback_forgotten", fields))
            return
        work = Work(id=next(self._work_ids), round=round_id, task=task, body=body, received_at=now, truth=truth)
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
            del self._attempts[work.round]
            self._reply(self._reply_of(work, event), out)
        self._continue(now, out)

    def _on_replies_delivered(self, event: ev.RepliesDelivered, now: float, out: list[ev.Instruction]) -> None:
        if self._is_linked:
            self._replies.delivered()

    def _on_reply_body_delivered(self, event: ev.ReplyBodyDelivered, now: float, out: list[ev.Instruction]) -> None:
        self._replies.body_delivered(event.round, event.attempt)
        self._continue(now, out)

    def _reply(self, reply: ev.SendReply, out: list[ev.Instruction]) -> None:
        """Sends a reply now, or when the session has a link again."""
        self._replies.put(reply)
        if self._is_linked:
            out.append(reply)

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

    def _decline(
        self, event: ev.AssignmentReceived | ev.AssignmentAnnounced, reason: str, out: list[ev.Instruction]
    ) -> None:
        self.counts.declined += 1
        self._reply(ev.SendReply(event.round, event.attempt, "declined", error=clip_text(reason)), out)

    def _abandon(self, predicate: Callable[[Work], bool], out: list[ev.Instruction]) -> int:
        """Drops queued work and cancels running work for which the predicate holds; returns how much of it."""
        abandoned = self._queue.remove(predicate)
        for work in self._running.values():
            if not work.is_abandoned and predicate(work):
                work.is_abandoned = True
                out.append(ev.CancelHandler(work.id))
                abandoned.append(work)
        for work in abandoned:
            if not work.is_feedback:
                del self._attempts[work.round]
        return len(abandoned)

    def _continue(self, now: float, out: list[ev.Instruction]) -> None:
        """Starts what may start; leaves when all is done and it is time to leave."""
        while (head := self._queue.head()) is not None:
            if head.is_feedback:
                if self._running:
                    break
            elif head.deadline <= now:
                # The round is over at the coordinator too: its deadline began earlier than ours.
                del self._attempts[self._queue.pop().round]
                self.counts.cancelled += 1
                continue
            elif len(self._running) >= self._concurrency or any(w.is_feedback for w in self._running.values()):
                break
            self._start(self._queue.pop(), now, out)
        if self._is_linked and (self._awaited or self._replies.bodies_under_way):
            return
        is_drained = self.state is State.DRAINING and not self._running and not self._queue
        if is_drained and (self._is_linked or not self._has_business()):
            self._depart(out)

    def _start(self, work: Work, now: float, out: list[ev.Instruction]) -> None:
        work.started_at = now
        self._running[work.id] = work
        if work.truth is not None:
            out.append(ev.StartFeedback(work.id, work.round, work.task, work.body, work.truth))
        else:
            out.append(ev.StartAssignment(work.id, work.round, work.attempt, work.task, work.body, work.deadline))


def _receive_of(waiting: _Awaited, now: float) -> ev.ReceiveBody:
    announced = waiting.announced
    if isinstance(announced, ev.FeedbackAnnounced):
        return ev.ReceiveBody("feedback", announced.round, announced.truth, None)
    return ev.ReceiveBody("assignment", announced.round, announced.body, max(0.0, waiting.deadline - now))


_HANDLERS: Final[dict[type, Callable[[AgentCore, Any, float, list[ev.Instruction]], None]]] = {
    ev.ConnectFailed: AgentCore._on_connect_failed,
    ev.ConnectGivenUp: AgentCore._on_connect_given_up,
    ev.LinkUp: AgentCore._on_link_up,
    ev.LinkDown: AgentCore._on_link_down,
    ev.WelcomeReceived: AgentCore._on_welcome,
    ev.RefusalReceived: AgentCore._on_refusal,
    ev.AssignmentReceived: AgentCore._on_assignment,
    ev.AssignmentAnnounced: AgentCore._on_assignment_announced,
    ev.CancellationReceived: AgentCore._on_cancellation,
    ev.FeedbackReceived: AgentCore._on_feedback,
    ev.FeedbackAnnounced: AgentCore._on_feedback_announced,
    ev.BodyReceived: AgentCore._on_body_received,
    ev.BodyFailed: AgentCore._on_body_failed,
    ev.ReplyBodyDelivered: AgentCore._on_reply_body_delivered,
    ev.DrainReceived: AgentCore._on_drain,
    ev.RepliesDelivered: AgentCore._on_replies_delivered,
    ev.HandlerReturned: AgentCore._on_handler_ended,
    ev.HandlerDeclined: AgentCore._on_handler_ended,
    ev.HandlerFailed: AgentCore._on_handler_ended,
    ev.StopRequested: AgentCore._on_stop,
    ev.DrainTimedOut: AgentCore._on_drain_timed_out,
}

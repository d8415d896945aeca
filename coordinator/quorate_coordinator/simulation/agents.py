"""Agents' processes: the real core and backoff in a model of their shell. The only file here that knows `AgentCore`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from quorate_agent import events as ev
from quorate_agent.backlog import BacklogLimits
from quorate_agent.backoff import Backoff
from quorate_agent.core import AgentCore
from quorate_agent.states import State
from quorate_coordinator.simulation.auditor import Auditor
from quorate_coordinator.simulation.draws import Draws, fate_of, mix
from quorate_coordinator.simulation.network import Link, Path, Sent, StreamEnded, StreamName
from quorate_coordinator.simulation.process import Process
from quorate_coordinator.simulation.tasks import ANSWERS, tasks_of
from quorate_coordinator.simulation.world import World
from quorate_protocol.messages import (
    Assignment,
    Cancellation,
    CoordinationOpened,
    Drain,
    Feedback,
    Goodbye,
    Hello,
    Refusal,
    Reply,
    Resume,
    Welcome,
)

MakeAgentCore = Callable[..., AgentCore]

#: As in the shell (`worker`, `session`): seconds for a handshake, from there to the welcome, and to leave.
CONNECT_TIMEOUT_S: Final = 10.0
RESUME_TIMEOUT_S: Final = 2.0
#: What a pause may be of a lease that runs.
RESUME_PAUSE_SHARE: Final = 1 / 8
_JOIN_TIMEOUT_S: Final = 10.0
_LEAVE_TIMEOUT_S: Final = 2.0

#: Seconds that handlers may go on when an agent is asked to stop.
_DRAIN_TIMEOUT_S: Final = 30.0

#: Seconds until an async handler has ended that was cancelled.
_CANCEL_S: Final = 0.005

#: What a machine's monotonic clock may show when a process starts: some seconds after it was switched on, up to months.
CLOCK_S: Final = (5.0, 1e7)

#: A few small backlogs among the fleet, so that they are full at times.
_SMALL_BACKLOG: Final = BacklogLimits(assignments_max=4, feedback_max=8, remembered_max=16)

Connect = Callable[["AgentProcess", float, Callable[[Link | None, str], None]], None]


@dataclass(frozen=True, slots=True)
class Nature:
    """What an agent is like, whatever happens to it."""

    tasks: tuple[str, ...]
    feedback_tasks: tuple[str, ...]
    concurrency: int
    backlog: BacklogLimits | None
    #: Median seconds of a handler.
    compute_s: float
    #: Whether a cancellation ends its handlers.
    is_async: bool
    #: Shares of its handlers that take far too long, decline, fail; and of its answers that are right.
    slow: float
    declines: float
    fails: float
    skill: float


class AgentHost:
    """One agent's place in the fleet: its machine, and the supervisor that starts its process again."""

    def __init__(
        self, world: World, number: int, *, connect: Connect, auditor: Auditor, make_core: MakeAgentCore
    ) -> None:
        self.world = world
        self.number: Final = number
        self.name: Final = f"agent-{number:04d}"
        self.path: Final = Path(world, self.name)
        self.connect = connect
        self.auditor = auditor
        self.make_core = make_core
        self.nature: Final = self._draw_nature()
        self.random: Final = world.stream(f"life {self.name}")
        self.clocks: Final = world.stream(f"clock {self.name}")
        self.fate: Final = fate_of(world.seed, f"work {self.name}")
        self.process: AgentProcess | None = None
        self._instances = 0
        #: Supervisors that wait; over 0, it stays down.
        self._downs = 0
        #: Handlers that start before this moment hang until it, cancelled or not.
        self.hangs_until = 0.0

    def _draw_nature(self) -> Nature:
        draw = self.world.stream(f"nature {self.name}")
        tasks = tasks_of(self.number)
        learns = draw.random() < 0.7
        return Nature(
            tasks=tasks,
            feedback_tasks=tasks if learns else (),
            concurrency=draw.choice((1, 1, 2, 4)),
            backlog=_SMALL_BACKLOG if draw.random() < 0.1 else None,
            compute_s=math.exp(draw.uniform(math.log(0.003), math.log(0.5))),
            is_async=draw.random() < 0.5,
            slow=draw.choice((0.0, 0.01, 0.1)),
            declines=draw.choice((0.0, 0.01, 0.1)),
            fails=draw.choice((0.0, 0.01, 0.1)),
            skill=draw.uniform(0.4, 0.98),
        )

    def start(self) -> None:
        """Starts its process, a new instance."""
        if self.process is None and not self._downs:
            self._instances += 1
            self.process = AgentProcess(self, f"{self.name}.{self._instances}")
            self.process.begin()

    def kill(self, down_s: float) -> None:
        """Its process is gone without a word, and comes again after a while."""
        if self.process is not None:
            process, self.process = self.process, None
            process.die()
        self._restart(down_s)

    def ended(self, why: str, *, restart_s: float) -> None:
        """Its process has ended by itself."""
        self.world.note(f"{self.name} ends: {why}")
        self.process = None
        self._restart(restart_s)

    def _restart(self, down_s: float) -> None:
        self._downs += 1
        self.world.after(down_s, self._up)

    def _up(self) -> None:
        self._downs -= 1
        self.start()


class AgentProcess:
    """From its start to its end."""

    def __init__(self, host: AgentHost, instance: str) -> None:
        self.host = host
        self.name: Final = host.name
        self.instance: Final = instance
        self.process: Final = Process(host.world, clock_s=host.clocks.uniform(*CLOCK_S))
        self.core = host.make_core(
            tasks=host.nature.tasks,
            feedback_tasks=host.nature.feedback_tasks,
            concurrency=host.nature.concurrency,
            limits=host.nature.backlog,
        )
        self._limits = host.nature.backlog or BacklogLimits()
        self._backoff = Backoff(host.random)
        self.link: Link | None = None
        self._welcomed_at: float | None = None
        #: The link that is being left, and what comes after: another one, or nothing.
        self._leaving: Link | None = None
        self._is_ending = False
        self._ended = ""
        #: Handlers that run: the session, round and attempt whose reply they are to give; None with those of truths.
        self._running: dict[int, tuple[str, int, int] | None] = {}
        #: The session it is in, or would resume; empty when there is none.
        self._session = ""
        #: Rounds that do not want a reply of this process any more.
        self._cancelled: set[int] = set()
        #: Rounds and attempts that it has answered.
        self._made: set[tuple[int, int]] = set()
        self._is_drain_timed = False
        self._hello = Hello(
            id=self.name,
            token="simulated",  # noqa: S106  there is nobody to keep out
            instance=instance,
            tasks=list(host.nature.tasks),
            software="quorate-agent/simulated",
        )
        #: Until when the session that has lost its link may be resumed, at the coordinator's latest.
        self._lease_s = 0.0
        self._lease_ends_at = 0.0
        #: Replies sent over the present link: round and attempt.
        self._sent: list[tuple[int, int]] = []

    @property
    def is_idle(self) -> bool:
        """Whether it has a session and nothing to do."""
        return self.core.state is State.ACTIVE and not self.core.running and not self.core.queued

    def describe(self) -> str:
        """For a violation."""
        return f"{self.core.state.value}, {self.core.running} running, {self.core.queued} queued"

    def begin(self) -> None:
        self.process.after(self.host.random.uniform(0.0, 0.2), self._connect)

    def die(self) -> None:
        """kill -9."""
        self.process.die()
        for link in (self.link, self._leaving):
            if link is not None:
                link.abandon(agent=True)

    def stop(self, reason: str) -> None:
        """SIGTERM."""
        self._apply(ev.StopRequested(reason))

    # --- connecting ---

    def _connect(self) -> None:
        if self.core.wants_link and self.link is None:
            timeout_s = RESUME_TIMEOUT_S if self._is_awaited else CONNECT_TIMEOUT_S
            self.host.connect(self, timeout_s, self._connected)

    def _connected(self, link: Link | None, problem: str) -> None:
        if link is None:
            self._apply(ev.ConnectFailed(problem))
        elif not self.core.wants_link or self.link is not None:
            link.close_up("the agent ends", is_final=True)
        else:
            self.link = link
            self._sent = []
            self._welcomed_at = None
            self._apply(ev.LinkUp())
            self.process.after(_JOIN_TIMEOUT_S, self._join_timed_out, link)

    def _join_timed_out(self, link: Link) -> None:
        if self.link is link and self._welcomed_at is None:
            self.link_closed(link, "the coordinator did not answer the hello", False)

    def link_closed(self, link: Link, reason: str, replaced: bool, is_over: bool = False) -> None:
        """The link is over, and with `is_over` its session is."""
        link.close_up(reason)
        if link is self._leaving:
            self._left(link)
        elif link is self.link:
            self.link = None
            self.host.world.note(f"{self.name} link down: {reason}")
            self._apply(ev.LinkDown(reason, replaced=replaced, is_over=is_over))

    def _pause(self) -> None:
        began_at, self._welcomed_at = self._welcomed_at, None
        now = self.process.now
        if began_at is None:
            delay_s = self._backoff.fail()
        else:
            self._lease_ends_at = now + self._lease_s
            delay_s = self._backoff.end_session(now - began_at, at_once=self.core.is_suspended)
        if self._is_awaited:
            delay_s = min(delay_s, self._lease_s * RESUME_PAUSE_SHARE)
        self.process.after(delay_s, self._connect)

    @property
    def _is_awaited(self) -> bool:
        """Whether there is a session that may still be resumed."""
        return self.core.is_suspended and self.process.now < self._lease_ends_at

    # --- messages ---

    def receive(self, link: Link, stream: StreamName, message: Sent) -> None:
        """What the coordinator says."""
        if link is not self.link:
            return
        if isinstance(message, Cancellation | Feedback):
            self.host.auditor.frame_came(self.name, self._session, message.wire_type, message.round)
        match message:
            case Assignment():
                assert message.body is not None, "what is asked here is small"
                self._apply(
                    ev.AssignmentReceived(
                        message.round, message.task, message.body, message.deadline_s, message.attempt
                    )
                )
            case Feedback():
                assert message.truth is not None, "and so is the truth"
                self._apply(ev.FeedbackReceived(message.round, message.task, message.truth))
            case Cancellation():
                self._cancelled.add(message.round)
                self._apply(ev.CancellationReceived(message.round))
            case Welcome():
                self._welcomed_at = self.process.now
                self._lease_s = message.lease_s
                link.joined(message.pulse_s, max(message.lease_s / 2, min(message.lease_s, 2 * message.pulse_s)))
                self._session = message.session
                self._apply(ev.WelcomeReceived(message.session, message.resumed, message.received, message.secret))
                if message.resumed:
                    self.host.auditor.session_resumed(self.name, message.session, message.received, [*self._sent])
            case Refusal():
                self._apply(ev.RefusalReceived(message.reason, message.message, message.retry))
            case Drain():
                self._apply(ev.DrainReceived(message.reason, message.stop))
            case Goodbye():
                self.link_closed(link, f"the coordinator said goodbye: {message.reason}", False, is_over=True)
            case _:
                raise AssertionError(f"{self.name} got {message}")

    # --- the core ---

    def _apply(self, event: ev.Event) -> None:
        for instruction in self.core.handle(event, self.process.now):
            self._execute(instruction)
        if self.core.queued > self._limits.assignments_max + self._limits.feedback_max:
            self.host.auditor.fail("queues are bounded", f"{self.name} has {self.core.queued} queued", agent=self.name)
        if self.core.running > max(1, self.host.nature.concurrency):
            message = f"{self.name} runs {self.core.running} handlers, may run {self.host.nature.concurrency}"
            self.host.auditor.fail("handlers are bounded", message, agent=self.name)
        if self.core.state is State.DRAINING and not self._is_drain_timed:
            self._is_drain_timed = True
            self.process.after(_DRAIN_TIMEOUT_S, self._drain_timed_out)
        elif self.core.state is not State.DRAINING:
            self._is_drain_timed = False
        if self._ended and self._leaving is None and not self._is_ending:
            self._exit()

    def _drain_timed_out(self) -> None:
        if self._is_drain_timed:
            self._session = ""  # left in what follows
            self._apply(ev.DrainTimedOut())

    def _execute(self, instruction: ev.Instruction) -> None:
        match instruction:
            case ev.SendReply():
                self._send_reply(instruction)
            case ev.StartAssignment():
                self.host.auditor.handler_started(self.instance, self.name, instruction.round, instruction.attempt)
                self._start(instruction)
            case ev.StartFeedback():
                self._start_feedback(instruction)
            case ev.CancelHandler(work):
                if self.host.nature.is_async and self.host.world.now >= self.host.hangs_until:
                    self.process.after(_CANCEL_S, self._end, work, ev.HandlerFailed(work, "cancelled"))
            case ev.Reconnect(reason):
                self._reconnect(reason)
            case ev.Leave(reason):
                self._leave(reason)
            case ev.Stop(kind, reason):
                self._ended = f"{kind.value}: {reason}"
            case ev.Log():
                pass
            case _:
                self._send(instruction)

    def _send(self, instruction: Any) -> None:
        link = self.link
        if link is None:
            return
        match instruction:
            case ev.SendHello(resume):
                again = None
                if resume is not None:
                    again = Resume(session=resume.session, secret=resume.secret, received=resume.received)
                link.send_up("control", self._hello.model_copy(update={"resume": again}))
            case ev.OpenCoordination(session):
                link.send_up("coordination", CoordinationOpened(session=session))
            case ev.SendDrain(reason):
                link.send_up("control", Drain(reason=reason))
            case ev.CloseLink():
                link.close_up("nothing of worth is on it", is_final=True)
                self.link = None
            case _:
                raise AssertionError(f"the agent's core says {instruction}")

    def _send_reply(self, reply: ev.SendReply) -> None:
        assert reply.body is None or isinstance(reply.body, bytes), "answers here are small"
        message = Reply(
            round=reply.round,
            attempt=reply.attempt,
            status=reply.status,
            body=reply.body,
            error=reply.error,
            compute_s=reply.compute_s,
            waited_s=reply.waited_s,
        )
        is_new = (reply.round, reply.attempt) not in self._made
        self._made.add((reply.round, reply.attempt))
        if is_new and reply.round in self._cancelled:
            problem = f"{self.name} answers round {reply.round}, which it was told to stop"
            self.host.auditor.fail("who is told to stop does", problem, agent=self.name, round=reply.round)
        self.host.auditor.reply_finished(self._session, reply.round, reply.attempt)
        self.host.auditor.reply_made(self.name, reply.round, reply.attempt, reply.status, reply.body)
        link = self.link
        if link is None:
            return
        arrives_at = link.send_up("coordination", message)
        self._sent.append((reply.round, reply.attempt))
        if arrives_at is not None:
            self._at(arrives_at + link.path.latency_s, self._acknowledged, link, len(self._sent))

    def _at(self, moment: float, action: Callable[..., None], *arguments: Any) -> None:
        """Something reaches it at a moment of the world's."""
        self.host.world.at(moment, self.process.call, action, *arguments)

    def _acknowledged(self, link: Link, sent: int) -> None:
        """The coordinator's transport has so many replies of a link. The shell looks at each pulse."""
        is_read = link.coordinator_is_open and link.coordinator.process.is_running
        if link is self.link and sent == len(self._sent) and is_read and not link.path.cuts_up:
            self._apply(ev.RepliesDelivered())

    def _reconnect(self, reason: str) -> None:
        if self._leaving is not None:
            return  # when it has left
        if self.link is not None:
            self.link.close_up(reason)
            self.link = None
        self._pause()

    # --- leaving ---

    def _leave(self, reason: str) -> None:
        link = self._leaving = self.link
        self.link = None
        assert link is not None, "the core leaves sessions that stand"
        arrives_at = link.send_up("coordination", StreamEnded())
        if arrives_at is not None:
            self._at(arrives_at + link.path.latency_s, self._say_goodbye, link, reason)
        self.process.after(_LEAVE_TIMEOUT_S, self._left, link)

    def _say_goodbye(self, link: Link, reason: str) -> None:
        if self._leaving is link:
            arrives_at = link.send_up("control", Goodbye(reason=reason))
            if arrives_at is not None:
                self._at(arrives_at + link.path.latency_s, self._left, link)

    def _left(self, link: Link) -> None:
        if self._leaving is not link:
            return
        self._leaving = None
        link.close_up("left", is_final=True)
        if self._ended:
            self._exit()
        else:
            self._pause()

    def _exit(self) -> None:
        self._is_ending = True
        if self.link is not None:
            self.link.close_up("the agent ends", is_final=True)
        self.process.die()
        self.host.ended(self._ended, restart_s=self.host.random.uniform(0.5, 5.0))

    # --- handlers ---

    def _draws_for(self, round_id: int, kind: int) -> Draws:
        return Draws(mix(self.host.world.fates.get(round_id, round_id), self.host.fate + kind))

    def _start(self, start: ev.StartAssignment) -> None:
        nature, work, draw = self.host.nature, start.work, self._draws_for(start.round, start.attempt)
        compute_s = draw.log_normal(nature.compute_s, 0.5)
        if draw.random() < nature.slow:
            compute_s += draw.uniform(1.0, 20.0)
        fate = draw.random()
        answer = start.body if draw.random() < nature.skill else draw.choice(ANSWERS)
        ended: ev.Event
        if fate < nature.declines:
            ended = ev.HandlerDeclined(work, "not today", compute_s)
        elif fate < nature.declines + nature.fails:
            ended = ev.HandlerFailed(work, "ValueError: as it is", compute_s)
        else:
            ended = ev.HandlerReturned(work, answer, compute_s)
        self._run(work, compute_s, ended, (self._session, start.round, start.attempt))

    def _start_feedback(self, start: ev.StartFeedback) -> None:
        compute_s = 0.2 * self._draws_for(start.round, 0).log_normal(self.host.nature.compute_s, 0.5)
        self._run(start.work, compute_s, ev.HandlerReturned(start.work))

    def _run(self, work: int, compute_s: float, ended: ev.Event, reply: tuple[str, int, int] | None = None) -> None:
        self._running[work] = reply
        self.process.after(max(compute_s, self.host.hangs_until - self.host.world.now), self._end, work, ended)

    def _end(self, work: int, ended: ev.Event) -> None:
        if work in self._running:
            reply = self._running.pop(work)
            # Nobody waits for what was cancelled, or begun in a session that is over.
            if reply is not None and reply[0] == self._session and reply[1] not in self._cancelled:
                self.host.auditor.reply_finished(*reply)
            self._apply(ended)

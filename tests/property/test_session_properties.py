"""A session over links that break at any moment: the coordinator's core and log at one end, the agent's at the other.

No reply is lost and none is handed on twice, no assignment is worked on twice, and feedback comes once and in order.
The shells between the cores are played here, in the order in which the real ones act.
"""

from collections import deque
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quorate_agent import events as ev
from quorate_agent.core import AgentCore
from quorate_coordinator.links import FrameLog
from quorate_coordinator.membership import (
    AdmitAgent,
    AgentJoined,
    DeclareAway,
    DeclareLost,
    Instruction,
    LinkBroken,
    PacketSeen,
    ReplaceLink,
    ResumeSession,
    TimerFired,
)
from quorate_coordinator.registry import Registry

LEASE_S = 10.0

#: What travels to the agent: kind, round and attempt.
Frame = tuple[str, int, int]


@dataclass
class Link:
    """One connection. What is on a wire may be lost; what has arrived at the coordinator is acknowledged."""

    to_agent: deque[Frame] = field(default_factory=deque)
    to_coordinator: deque[ev.SendReply] = field(default_factory=deque)
    arrived: deque[ev.SendReply] = field(default_factory=deque)
    #: With one that resumes: how many frames the agent had. Until the coordination stream is there nothing is sent.
    resumed_after: int | None = None
    is_open: bool = False
    agent_holds: bool = True


class SessionMachine(RuleBasedStateMachine):
    """One agent, its coordinator, and a bad network."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.registry = Registry(lease_s=LEASE_S)
        self.core = AgentCore(tasks=["t"], feedback_tasks=["t"], concurrency=2)
        #: The link as the coordinator sees it, and as the agent does.
        self.here: Link | None = None
        self.there: Link | None = None
        self.sessions = 0
        self.session = ""
        self.log = FrameLog()
        self.received = 0
        self.joining: Link | None = None
        # The least of rounds.
        self.rounds = 0
        self.outstanding: dict[int, int] = {}
        self.handed_on: list[tuple[int, int]] = []
        self.answered: list[int] = []
        self.told: list[int] = []
        # The agent's handlers.
        self.running: dict[int, ev.StartAssignment | ev.StartFeedback] = {}
        self.worked_on: list[tuple[int, int]] = []
        self.learned: list[int] = []
        self.reconnect()

    # --- the coordinator ---

    @rule()
    def ask(self) -> None:
        self.rounds += 1
        self.outstanding[self.rounds] = 1
        self._send(("ask", self.rounds, 1))

    @precondition(lambda self: self.outstanding)
    @rule(number=st.integers(0, 10**6))
    def ask_anew(self, number: int) -> None:
        """A round that was asked has another attempt."""
        chosen = sorted(self.outstanding)[number % len(self.outstanding)]
        self.outstanding[chosen] += 1
        self._send(("ask", chosen, self.outstanding[chosen]))

    @precondition(lambda self: self.outstanding)
    @rule(number=st.integers(0, 10**6))
    def cancel(self, number: int) -> None:
        chosen = sorted(self.outstanding)[number % len(self.outstanding)]
        del self.outstanding[chosen]
        self._send(("cancel", chosen, 0))

    @precondition(lambda self: self.answered)
    @rule(number=st.integers(0, 10**6))
    def tell(self, number: int) -> None:
        chosen = self.answered.pop(number % len(self.answered))
        self.told.append(chosen)
        self._send(("tell", chosen, 0))

    @rule(count=st.integers(1, 5))
    def read(self, count: int) -> None:
        if self.here is not None:
            self._read(self.here, count)

    @precondition(lambda self: self.here is not None)
    @rule()
    def coordinator_notices(self) -> None:
        """The coordinator finds that a link is over, which the agent has left."""
        assert self.here is not None
        if not self.here.agent_holds:
            self._end_link(self.here)

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        if self.here is not None and self.here.agent_holds:
            self._registry(PacketSeen("a", self.session))
        at = self.registry.next_timer()
        if at is not None and at <= self.now:
            self._registry(TimerFired())

    def _send(self, frame: Frame) -> None:
        is_assignment = frame[0] == "ask"
        if self.here is None or not (self.here.is_open or self.here.resumed_after is None):
            if not is_assignment:
                self.log.keep(repr(frame).encode())
            return
        if is_assignment:
            self.log.count()
        else:
            self.log.keep(repr(frame).encode())
        self.here.to_agent.append(frame)

    def _read(self, link: Link, count: int) -> None:
        while link.arrived and count:
            count -= 1
            reply = link.arrived.popleft()
            self.received += 1
            key = (reply.round, reply.attempt)
            assert key not in self.handed_on, "handed on twice"
            self.handed_on.append(key)
            if self.outstanding.get(reply.round) == reply.attempt:
                del self.outstanding[reply.round]
                self.answered.append(reply.round)

    def _end_link(self, link: Link) -> None:
        """Reads a link to its end; then it is over."""
        self._read(link, len(link.arrived))
        self._registry(LinkBroken("a", self.session, "broken"))

    def _registry(self, event: object) -> None:
        for instruction in self.registry.handle(event, self.now):  # type: ignore[arg-type]
            self._carry_out(instruction)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case AdmitAgent(_, session):
                self.session, self.log, self.received, self.here = session, FrameLog(), 0, self.joining
                self.handed_on.clear()
                self.worked_on.clear()
            case ResumeSession(_, session):
                assert session == self.session
                assert self.here is None, "the old link was read to its end"
                self.here = self.joining
            case DeclareAway():
                self.here = None
            case DeclareLost():
                self.here = None
                # What the agent worked on is lost, and what it was not told is not told any more.
                self.outstanding.clear()
                self.answered.clear()
                self.told = list(self.learned)
            case ReplaceLink():
                raise AssertionError("the shell has ended it before")

    # --- the network and the agent ---

    @rule(count=st.integers(1, 5))
    def deliver_to_agent(self, count: int) -> None:
        link = self.there
        while link is not None and link.to_agent and count:
            count -= 1
            kind, round_id, attempt = link.to_agent.popleft()
            if kind == "ask":
                self._apply(ev.AssignmentReceived(round_id, "t", b"%d" % round_id, 1e9, attempt))
            elif kind == "tell":
                self._apply(ev.FeedbackReceived(round_id, "t", b""))
            else:
                self._apply(ev.CancellationReceived(round_id))

    @rule(count=st.integers(1, 5))
    def deliver_to_coordinator(self, count: int) -> None:
        link = self.there
        while link is not None and link.to_coordinator and count:
            count -= 1
            link.arrived.append(link.to_coordinator.popleft())

    @rule()
    def all_is_acknowledged(self) -> None:
        if self.there is not None and not self.there.to_coordinator:
            self._apply(ev.RepliesDelivered())

    @precondition(lambda self: self.running)
    @rule(number=st.integers(0, 10**6))
    def handler_ends(self, number: int) -> None:
        work = sorted(self.running)[number % len(self.running)]
        del self.running[work]
        self._apply(ev.HandlerReturned(work, b""))

    @rule(notices=st.booleans())
    def break_link(self, notices: bool) -> None:
        """What is on the wires is lost; the coordinator may find out now or later."""
        link, self.there = self.there, None
        if link is None:
            return
        link.agent_holds = False
        if link is self.here and notices:
            self._end_link(link)
        self._apply(ev.LinkDown("broken"))

    @rule(reaches=st.sampled_from(["all", "all", "hello", "welcome"]))
    def reconnect(self, reaches: str = "all") -> None:
        """The agent comes back. The link may break after the hello, or after the welcome."""
        if self.there is not None:
            return
        (hello,) = self.core.handle(ev.LinkUp(), self.now)
        assert isinstance(hello, ev.SendHello)
        link = self.joining = Link()
        resume = None if hello.resume is None else (hello.resume.session, hello.resume.secret)
        if self.registry.can_resume("a", resume) and self.here is not None:
            self._end_link(self.here)
        self.sessions += 1
        name = f"s{self.sessions}"
        event = AgentJoined("a", name, "", {}, ("t",), "", "", secret=f"key of {name}", resume=resume)
        if self.registry.session_of("a") is not None and not self.registry.can_resume("a", resume):
            self.here = None  # closed as replaced
        self.registry_joins(event)
        is_resumed = self.session != name
        if is_resumed:
            assert hello.resume is not None
            link.resumed_after = hello.resume.received
        received = self.received
        if reaches == "hello":
            link.agent_holds = False
            self._apply(ev.LinkDown("broken before the welcome"))
            return
        self.there = link
        self._apply(ev.WelcomeReceived(self.session, is_resumed, received, f"key of {self.session}"))
        if reaches == "welcome":
            self.break_link(False)
            return
        link.is_open = True
        if is_resumed:
            assert link.resumed_after is not None
            frames, has_gap = self.log.resume(link.resumed_after)
            assert not has_gap
            link.to_agent.extend(eval(frame) for frame in frames)  # noqa: S307  our own
        # Reachable: the rounds send again what is not answered.
        for round_id, attempt in sorted(self.outstanding.items()):
            self._send(("ask", round_id, attempt))

    @rule(notices=st.booleans(), ended=st.integers(0, 3), delivered=st.integers(0, 3))
    def work_and_break(self, notices: bool, ended: int, delivered: int) -> None:
        """What came is worked on, some of the replies arrive, and there is another link."""
        self.deliver_to_agent(5)
        while self.running and ended:
            ended -= 1
            self.handler_ends(0)
        self.deliver_to_coordinator(delivered)
        self.break_link(notices)
        self.reconnect("all")

    def registry_joins(self, event: AgentJoined) -> None:
        for instruction in self.registry.handle(event, self.now):
            if not isinstance(instruction, ReplaceLink):
                self._carry_out(instruction)

    def _apply(self, event: ev.Event) -> None:
        for instruction in self.core.handle(event, self.now):
            match instruction:
                case ev.StartAssignment(work, round_id, attempt):
                    assert (round_id, attempt) not in self.worked_on, "worked on twice"
                    self.worked_on.append((round_id, attempt))
                    self.running[work] = instruction
                case ev.StartFeedback(work, round_id):
                    self.learned.append(round_id)
                    self.running[work] = instruction
                case ev.SendReply():
                    assert self.there is not None
                    self.there.to_coordinator.append(instruction)

    # --- what holds ---

    @invariant()
    def feedback_comes_once_and_in_order(self) -> None:
        assert self.learned == self.told[: len(self.learned)]

    @invariant()
    def nothing_was_kept_for_too_short(self) -> None:
        assert self.core.counts.replies_lost == 0
        assert self.core.counts.feedback_forgotten == 0

    def teardown(self) -> None:
        self.work_and_break(True, 2, 1)
        # The network is good from now on.
        for _ in range(4 * (self.rounds + len(self.told) + 10)):
            self.reconnect()
            self.deliver_to_agent(10**6)
            while self.running:
                self.handler_ends(0)
            self.deliver_to_coordinator(10**6)
            self.read(10**6)
        assert self.outstanding == {}, "every assignment that is wanted is answered"
        assert self.learned == self.told
        assert self.core.queued == self.core.running == 0


TestSessions = SessionMachine.TestCase
TestSessions.settings = settings(
    max_examples=200, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

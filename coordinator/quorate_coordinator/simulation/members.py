"""The coordinator's links: the real registry in a model of its shell (`fleet`). The only file here that knows it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from quorate_coordinator import membership as ms
from quorate_coordinator.links import FrameLog
from quorate_coordinator.registry import Registry
from quorate_coordinator.simulation.auditor import Auditor
from quorate_coordinator.simulation.network import Doubled, Link, Sent, StreamEnded, StreamName
from quorate_coordinator.simulation.process import Process
from quorate_protocol.messages import (
    Assignment,
    Cancellation,
    CoordinationOpened,
    Drain,
    Feedback,
    Goodbye,
    Hello,
    Message,
    Refusal,
    Reply,
    Welcome,
)

MakeRegistry = Callable[..., Registry]

_FRAME: Final = bytes(32)

#: Few enough that a long break loses some at times.
_LOG_FRAMES_MAX: Final = 32
_LOG_BYTES_MAX: Final = 4096

#: As in the settings and the shell.
PULSE_S: Final = 2.0
LEASE_S: Final = 10.0
_OPEN_TIMEOUT_S: Final = 5.0
_LEAVE_TIMEOUT_S: Final = 2.0

#: Leases are looked at this often at the most, in seconds: the shell may be late, and a thousand agents' leases
#: looked at one by one would be most of a run's work.
_LEASE_STEP_S: Final = 0.5


class Frame(bytes):
    """A message as the log of frames keeps it."""

    message: Message

    @classmethod
    def of(cls, message: Message) -> "Frame":
        """One whose size is that of a small frame."""
        frame = cls(_FRAME)
        frame.message = message
        return frame


@dataclass(slots=True)
class Session:
    """What is kept of an agent's session, with a link or without."""

    agent: str
    name: str
    secret: str
    link: Link | None
    log: FrameLog = field(default_factory=lambda: FrameLog(_LOG_FRAMES_MAX, _LOG_BYTES_MAX))
    #: Replies that came, over all links.
    received: int = 0


class Members:
    """Sessions and their links, in one process of the coordinator."""

    def __init__(
        self,
        process: Process,
        registry: Registry,
        auditor: Auditor,
        *,
        name: str,
        on_reply: Callable[[str, Reply], None],
        on_reachable: Callable[[str], None],
        on_lost: Callable[[str, str], None],
    ) -> None:
        self.registry: Final = registry
        self._process = process
        self._world = process.world
        self._auditor = auditor
        self._name = name
        self._on_reply = on_reply
        self._on_reachable = on_reachable
        self._on_lost = on_lost
        #: All that are open, those without a session too.
        self._open: dict[Link, None] = {}
        #: By agent: those who have a session; and the links of those who have one.
        self._members: dict[str, Session] = {}
        self.links: dict[str, Link] = {}
        #: While the registry decides over a hello: its link and the secret of a new session.
        self._joining: tuple[Link, str] | None = None
        self._is_refused = False
        self._count = 0
        self._timer_at = math.inf

    # --- what rounds need ---

    def select(self, task: str) -> tuple[str, ...]:
        """Agents that can be asked, sorted."""
        return self.registry.select(task)

    def select_away(self, task: str) -> tuple[str, ...]:
        """Agents that could be asked if they had a link, sorted."""
        return self.registry.select_away(task)

    def send(self, agents: Iterable[str], message: Message) -> None:
        """Sends one message to each of these agents; those who are away get all but assignments when they return."""
        is_assignment = isinstance(message, Assignment)
        for agent in agents:
            member = self._members.get(agent)
            if member is None:
                continue
            if not is_assignment:
                self._auditor.frame_sent(member.name, *_frame_of(message))
            link = member.link
            if link is None or (link.resumed_after is not None and not link.is_opened):
                if not is_assignment:
                    member.log.keep(Frame.of(message))
                continue
            if is_assignment:
                member.log.count()
            else:
                member.log.keep(Frame.of(message))
            if link.is_opened:
                link.send_down("coordination", message)
            else:
                link.early.append(message)

    # --- links ---

    def accepted(self, link: Link) -> None:
        """A link is there, and has said nothing."""
        self._open[link] = None
        self._process.after(_OPEN_TIMEOUT_S, self._close_silent, link)

    def _close_silent(self, link: Link) -> None:
        if not link.is_opened and link.coordinator_is_open and not link.goodbye:
            self._ended(link, "the coordination stream was not opened")

    def receive(self, link: Link, stream: StreamName, message: Sent) -> None:
        """What an agent says."""
        name = link.agent.name
        match message:
            case Reply():
                member = self._members.get(name)
                if member is not None and member.link is link:
                    member.received += 1
                    self._auditor.reply_came(name, member.name, member.received, message.round, message.attempt)
                    self._on_reply(name, message)
            case Doubled():
                member = self._members.get(name)
                if member is not None and member.link is link:
                    self._on_reply(name, message.reply)
            case Hello():
                self._greet(link, message)
            case CoordinationOpened():
                if message.session != link.session:
                    self._auditor.fail("the session is the one that was welcomed", f"{message}", agent=name)
                self._opened(link)
            case Drain():
                self._drains(link)
            case Goodbye():
                link.goodbye = message.reason
                self._drains(link)
                if link.replies_ended:
                    self._ended(link, "said goodbye")
                else:
                    self._process.after(_LEAVE_TIMEOUT_S, self._ended, link, "said goodbye")
            case StreamEnded():
                link.replies_ended = True
                if link.goodbye is not None:
                    self._ended(link, "said goodbye")
                    return
                self._drains(link)
                self._process.after(_LEAVE_TIMEOUT_S, self._ended, link, "finished its coordination stream", True)
            case _:
                raise AssertionError(f"{name} sent {message}")

    def _drains(self, link: Link) -> None:
        if self.links.get(link.agent.name) is link:
            self._handle(ms.AgentDraining(link.agent.name, link.session))

    def can_resume(self, hello: Hello) -> bool:
        """Whether a hello goes on with a session that lives."""
        return self.registry.can_resume(hello.id, _resume_of(hello))

    def _greet(self, link: Link, hello: Hello) -> None:
        if self.can_resume(hello) and (old := self.links.get(hello.id)) is not None:
            self._ended(old, "its session goes on over another link")
        self._count += 1
        self._joining = (link, f"secret-{self._count}")
        self._is_refused = False
        self._handle(
            ms.AgentJoined(
                agent=hello.id,
                session=f"{self._name}.{self._count}",
                instance=hello.instance,
                labels=hello.labels,
                tasks=tuple(hello.tasks),
                address="simulated",
                software=hello.software,
                secret=self._joining[1],
                resume=_resume_of(hello),
            )
        )
        self._joining = None
        if self._is_refused:
            self.refuse(link, "full")
            return
        member = self._members[hello.id]
        if hello.resume is not None and member.name == hello.resume.session:
            link.resumed_after = hello.resume.received
        link.session = member.name
        link.lease_s, link.pulse_s = LEASE_S, PULSE_S
        link.send_down(
            "control",
            Welcome(
                session=member.name,
                pulse_s=PULSE_S,
                lease_s=LEASE_S,
                secret=member.secret,
                resumed=link.resumed_after is not None,
                received=member.received,
            ),
        )

    def _opened(self, link: Link) -> None:
        """The agent can be asked: it gets what the last link did not deliver, and then what the rounds have for it."""
        link.is_opened = True
        for message in link.early:
            link.send_down("coordination", message)
        link.early.clear()
        member = self._members.get(link.agent.name)
        if member is None or member.link is not link:
            return
        if link.resumed_after is not None:
            frames, has_gap = member.log.resume(link.resumed_after)
            if has_gap:
                self._world.note(f"{member.agent} misses frames that were not kept")
                self._auditor.frames_dropped(member.name)
            for frame in frames:
                assert isinstance(frame, Frame)
                link.send_down("coordination", frame.message)
        self._on_reachable(member.agent)

    def refuse(self, link: Link, reason: str) -> None:
        """Sends a refusal; the agent closes the link."""
        link.send_down("control", Refusal(reason=reason, message=reason, retry=True))

    def link_closed(self, link: Link, reason: str, is_final: bool) -> None:
        """The agent closed it."""
        self._ended(link, reason, is_final)

    def _ended(self, link: Link, reason: str, is_final: bool = False) -> None:
        """The link's end, from whatever side."""
        if not link.coordinator_is_open:
            return
        name = link.agent.name
        if self.links.get(name) is link:
            if link.goodbye is not None:
                self._handle(ms.AgentLeft(name, link.session, link.goodbye))
            else:
                self._handle(ms.LinkBroken(name, link.session, reason, is_final))
        self._forget(link)
        link.close_down(reason)

    def _forget(self, link: Link) -> None:
        self._open.pop(link, None)
        if self.links.get(link.agent.name) is link:
            del self.links[link.agent.name]

    # --- the registry ---

    def _handle(self, event: ms.Event) -> None:
        instructions = self.registry.handle(event, self._process.now)
        for instruction in instructions:
            self._carry_out(instruction)
        if instructions:
            self._check(instructions)
        self._arm()

    def _check(self, instructions: list[ms.Instruction]) -> None:
        """After an event: as many members as there are sessions, and what the registry says of those it was about."""
        counts = self.registry.counts()
        live = counts["connected"] + counts["suspect"] + counts["draining"]
        if live != len(self._members):
            self._auditor.fail("the registry counts right", f"{counts} counted, {len(self._members)} have a session")
        for agent in {instruction.agent: None for instruction in instructions}:
            member, session = self._members.get(agent), self.registry.session_of(agent)
            if session != (None if member is None else member.name):
                message = f"the registry has {agent} in {session}, and its session is {member}"
                self._auditor.fail("members have links", message, agent=agent)

    def _carry_out(self, instruction: ms.Instruction) -> None:
        match instruction:
            case ms.AdmitAgent(agent, session):
                assert self._joining is not None
                link, secret = self._joining
                self._members[agent] = Session(agent, session, secret, link)
                self.links[agent] = link
                self._auditor.session_began(agent, session)
                self._world.note(f"{agent} joins as {session}")
            case ms.ResumeSession(agent, session):
                assert self._joining is not None
                self._members[agent].link = self.links[agent] = self._joining[0]
                self._world.note(f"{agent} resumes {session}")
            case ms.RefuseAgent():
                self._is_refused = True
            case ms.ReplaceLink(agent, _):
                old = self.links.get(agent)
                if old is not None:
                    self._forget(old)
                    old.close_down("replaced", replaced=True)
            case ms.DeclareSuspect(agent, _):
                self._world.note(f"{agent} is suspect")
            case ms.DeclareAway(agent, _, reason):
                self._world.note(f"{agent} is away: {reason}")
                self._members[agent].link = None
                self.links.pop(agent, None)
            case ms.DeclareReturned(agent, _):
                self._world.note(f"{agent} returned")
            case ms.DeclareLost(agent, session, reason):
                self._world.note(f"{agent} is lost: {reason}")
                self._auditor.session_over(agent, session)
                self._part(agent, reason)
                self._on_lost(agent, reason)
            case ms.DeclareLeft(agent, session, reason):
                self._world.note(f"{agent} left: {reason}")
                self._auditor.session_over(agent, session)
                self._part(agent, reason)
                self._on_lost(agent, "left")

    def _part(self, agent: str, reason: str) -> None:
        link = self._members.pop(agent).link
        if link is None or self.links.get(agent) is not link:
            return
        if reason.startswith("not heard"):
            heard_at = self._process.clock_at(link.heard_by_coordinator(self._read_until))
            self._auditor.agent_expired(agent, self._process.now - heard_at, LEASE_S)
        self._forget(link)
        link.close_down(f"session is over: {reason}")

    def _arm(self) -> None:
        at = self.registry.next_timer()
        if at is not None and at < self._timer_at:
            at = math.ceil(at / _LEASE_STEP_S) * _LEASE_STEP_S
            if at < self._timer_at:
                self._timer_at = at
                self._process.at(at, self._on_timer, at)

    @property
    def _read_until(self) -> float:
        """Until when the sockets have been read."""
        read_until = self._process.read_until
        return self._world.now if read_until is None else read_until

    def _on_timer(self, at: float) -> None:
        if at != self._timer_at:
            return  # an earlier one was set since
        self._timer_at = math.inf
        links, read_until, clock_at = self.links, self._read_until, self._process.clock_at
        heard = {
            agent: clock_at(links[agent].heard_by_coordinator(read_until))
            for agent in self.registry.lease_due(self._process.now)
            if agent in links
        }
        self._handle(ms.LeaseChecked(heard))

    # --- the end, and what must hold ---

    def all_links(self) -> list[Link]:
        """All that are open here."""
        return list(self._open)

    def goodbye(self, reason: str) -> None:
        """The coordinator stops: says so to everybody."""
        for link in list(self.links.values()):
            link.send_down("control", Goodbye(reason=reason))

    def audit(self) -> None:
        """A full look at the registry beside the links."""
        counts = self.registry.counts()
        live = counts["connected"] + counts["suspect"] + counts["draining"]
        #: Task to who can be asked, and who could be if it had a link.
        askable: dict[str, tuple[set[str], set[str]]] = {}
        for member in self.registry.agents():
            if member.state in ("lost", "left"):
                continue
            link = self.links.get(member.agent)
            if (link is not None) != member.has_link or (link is not None and link.session != member.session):
                message = f"{member.agent} is {member.state} in {member.session}, {member.has_link=}, link {link}"
                self._auditor.fail("members have links", message, agent=member.agent)
            live -= 1
            if member.state != "draining":
                for task in member.tasks:
                    askable.setdefault(task, (set(), set()))[not member.has_link].add(member.agent)
        for session in self._members.values():
            if len(session.log) > _LOG_FRAMES_MAX or session.log.size_bytes > _LOG_BYTES_MAX:
                message = f"{len(session.log)} frames of {session.log.size_bytes} bytes are kept for {session.agent}"
                self._auditor.fail("queues are bounded", message, agent=session.agent)
        if live:
            self._auditor.fail("the registry counts right", f"{counts} counted, {live} more than there are")
        for task in self.registry.tasks():
            here, away = askable.pop(task, (set(), set()))
            if set(self.registry.select(task)) != here or set(self.registry.select_away(task)) != away:
                self._auditor.fail("members can be asked", f"the registry selects others for {task} than it has")
        if askable:
            self._auditor.fail("members can be asked", f"nobody is selected for {sorted(askable)}")

    def audit_replies(self) -> None:
        """When all is quiet: what was finished in the sessions that stand has come."""
        for member in self._members.values():
            self._auditor.replies_at_rest(member.agent, member.name, member.received)

    def is_member(self, agent: str) -> bool:
        """Whether an agent has a session."""
        return self.registry.session_of(agent) is not None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of these agents that are not connected."""
        connected = {member.agent for member in self.registry.agents() if member.state == "connected"}
        return [name for name in names if name not in connected or name not in self.links]

    def abandon(self) -> None:
        """The process is gone: its links are, without a word."""
        for link in list(self._open):
            link.abandon(agent=False)


def _frame_of(message: Message) -> tuple[str, int]:
    """What is sent beside assignments: its kind and its round."""
    assert isinstance(message, Cancellation | Feedback)
    return message.wire_type, message.round


def _resume_of(hello: Hello) -> tuple[str, str] | None:
    return None if hello.resume is None else (hello.resume.session, hello.resume.secret)

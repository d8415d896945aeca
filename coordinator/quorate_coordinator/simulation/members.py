"""The coordinator's links: the real registry in a model of its shell (`fleet`). The only file here that knows it."""

import math
from collections.abc import Callable, Iterable
from typing import Final

from quorate_coordinator import membership as ms
from quorate_coordinator.registry import Registry
from quorate_coordinator.simulation.auditor import Auditor
from quorate_coordinator.simulation.network import Link, Sent, StreamEnded, StreamName
from quorate_coordinator.simulation.process import Process
from quorate_protocol.messages import CoordinationOpened, Drain, Goodbye, Hello, Message, Refusal, Reply, Welcome

MakeRegistry = Callable[..., Registry]

#: As in the settings and the shell.
PULSE_S: Final = 2.0
LEASE_S: Final = 10.0
_OPEN_TIMEOUT_S: Final = 5.0
_LEAVE_TIMEOUT_S: Final = 2.0

#: Leases are looked at this often at the most, in seconds: the shell may be late, and a thousand agents' leases
#: looked at one by one would be most of a run's work.
_LEASE_STEP_S: Final = 0.5


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
        on_lost: Callable[[str, str], None],
    ) -> None:
        self.registry: Final = registry
        self._process = process
        self._world = process.world
        self._auditor = auditor
        self._name = name
        self._on_reply = on_reply
        self._on_lost = on_lost
        #: All that are open, those without a session too.
        self._open: dict[Link, None] = {}
        self._sessions: dict[str, Link] = {}
        #: By agent: the current one.
        self.links: dict[str, Link] = {}
        self._refused: set[str] = set()
        self._count = 0
        self._timer_at = math.inf

    # --- what rounds need ---

    def select(self, task: str) -> tuple[str, ...]:
        """Agents that can be asked, sorted."""
        return self.registry.select(task)

    def send(self, agents: Iterable[str], message: Message) -> None:
        """Sends one message to each of these agents that has a link."""
        for agent in agents:
            link = self.links.get(agent)
            if link is None:
                continue
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
        match message:
            case Reply():
                if self.links.get(link.agent.name) is link:
                    self._on_reply(link.agent.name, message)
            case Hello():
                self._greet(link, message)
            case CoordinationOpened():
                if message.session != link.session:
                    self._auditor.fail("the session is the one that was welcomed", f"{message}", agent=link.agent.name)
                link.is_opened = True
                for frame in link.early:
                    link.send_down("coordination", frame)
                link.early.clear()
            case Drain():
                self._handle(ms.AgentDraining(link.agent.name, link.session))
            case Goodbye():
                link.goodbye = message.reason
                self._handle(ms.AgentDraining(link.agent.name, link.session))
                if link.replies_ended:
                    self._ended(link, "said goodbye")
                else:
                    self._process.after(_LEAVE_TIMEOUT_S, self._ended, link, "said goodbye")
            case StreamEnded():
                link.replies_ended = True
                if link.goodbye is not None:
                    self._ended(link, "said goodbye")
                    return
                self._handle(ms.AgentDraining(link.agent.name, link.session))
                self._process.after(_LEAVE_TIMEOUT_S, self._ended, link, "finished its coordination stream")
            case _:
                raise AssertionError(f"{link.agent.name} sent {message}")

    def _greet(self, link: Link, hello: Hello) -> None:
        self._count += 1
        link.session = f"{self._name}.{self._count}"
        self._sessions[link.session] = link
        self._handle(
            ms.AgentJoined(
                agent=hello.id,
                session=link.session,
                instance=hello.instance,
                labels=hello.labels,
                tasks=tuple(hello.tasks),
                address="simulated",
                software=hello.software,
            )
        )
        if link.session in self._refused:
            self._refused.discard(link.session)
            self.refuse(link, "full")
            return
        link.lease_s, link.pulse_s = LEASE_S, PULSE_S
        link.send_down("control", Welcome(session=link.session, pulse_s=PULSE_S, lease_s=LEASE_S))

    def refuse(self, link: Link, reason: str) -> None:
        """Sends a refusal; the agent closes the link."""
        link.send_down("control", Refusal(reason=reason, message=reason, retry=True))
        self._sessions.pop(link.session, None)

    def link_closed(self, link: Link, reason: str) -> None:
        """The agent closed it."""
        self._ended(link, reason)

    def _ended(self, link: Link, reason: str) -> None:
        """The session's end, from whatever side."""
        if not link.coordinator_is_open:
            return
        if link.session:
            if link.goodbye is not None:
                self._handle(ms.AgentLeft(link.agent.name, link.session, link.goodbye))
            else:
                self._handle(ms.LinkBroken(link.agent.name, link.session, reason))
        self._forget(link)
        link.close_down(reason)

    def _forget(self, link: Link) -> None:
        self._open.pop(link, None)
        self._sessions.pop(link.session, None)
        if self.links.get(link.agent.name) is link:
            del self.links[link.agent.name]

    # --- the registry ---

    def _handle(self, event: ms.Event) -> None:
        for instruction in self.registry.handle(event, self._world.now):
            self._carry_out(instruction)
        self._arm()

    def _carry_out(self, instruction: ms.Instruction) -> None:
        match instruction:
            case ms.AdmitAgent(agent, session):
                self._auditor.session_began(agent, session)
                self.links[agent] = self._sessions[session]
                self._world.note(f"{agent} joins as {session}")
            case ms.RefuseAgent():
                self._refused.add(instruction.session)
            case ms.ReplaceLink(agent, old_session):
                old = self._sessions.get(old_session)
                if old is not None:
                    self._forget(old)
                    old.close_down("replaced", replaced=True)
            case ms.DeclareSuspect(agent, _):
                self._world.note(f"{agent} is suspect")
            case ms.DeclareReturned(agent, _):
                self._world.note(f"{agent} returned")
            case ms.DeclareLost(agent, session, reason):
                self._world.note(f"{agent} is lost: {reason}")
                self._auditor.session_over(agent, session)
                self._part(agent, session, reason)
                self._on_lost(agent, reason)
            case ms.DeclareLeft(agent, session, reason):
                self._world.note(f"{agent} left: {reason}")
                self._auditor.session_over(agent, session)
                self._part(agent, session, reason)
                self._on_lost(agent, "left")

    def _part(self, agent: str, session: str, reason: str) -> None:
        link = self._sessions.get(session)
        if link is None:
            return
        if reason.startswith("not heard"):
            self._auditor.agent_expired(agent, link.heard_by_coordinator(self._read_until), LEASE_S)
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
        links, read_until = self.links, self._read_until
        heard = {
            agent: links[agent].heard_by_coordinator(read_until)
            for agent in self.registry.lease_due(self._world.now)
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
        askable: dict[str, set[str]] = {}
        for member in self.registry.agents():
            if member.state in ("lost", "left"):
                continue
            link = self.links.get(member.agent)
            if link is None or link.session != member.session:
                message = f"{member.agent} is {member.state} in session {member.session} without a link"
                self._auditor.fail("members have links", message, agent=member.agent)
            live -= 1
            if member.state != "draining":
                for task in member.tasks:
                    askable.setdefault(task, set()).add(member.agent)
        if live:
            self._auditor.fail("the registry counts right", f"{counts} counted, {live} more than there are")
        for task in self.registry.tasks():
            if set(self.registry.select(task)) != askable.pop(task, None):
                self._auditor.fail("members can be asked", f"the registry selects others for {task} than it has")
        if askable:
            self._auditor.fail("members can be asked", f"nobody is selected for {sorted(askable)}")

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

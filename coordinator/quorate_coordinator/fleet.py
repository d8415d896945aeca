"""The fleet's links: the shell round the registry of members.

One `AgentLink` per agent that has a session; the registry decides who is a member, this opens, feeds
and closes the links.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final, assert_never

import structlog

from quorate_coordinator.membership import (
    AdmitAgent,
    AgentDraining,
    AgentJoined,
    AgentLeft,
    DeclareLeft,
    DeclareLost,
    DeclareReturned,
    DeclareSuspect,
    Event,
    Instruction,
    LeaseChecked,
    LinkBroken,
    Member,
    RefuseAgent,
    ReplaceLink,
)
from quorate_coordinator.registry import Registry
from quorate_coordinator.serving import first_of, refuse_streams
from quorate_protocol import __version__
from quorate_protocol.channel import Channel
from quorate_protocol.errors import (
    Code,
    MessageInvalid,
    ProtocolError,
    QuorateError,
    Refused,
    UnexpectedMessage,
)
from quorate_protocol.messages import CoordinationOpened, Drain, Goodbye, Hello, Reply, Welcome, clip_text
from quorate_protocol.transport import BiStream, Connection, Priority

log = structlog.get_logger()

#: Bytes that may wait for one agent to acknowledge them. An agent that is further behind does not
#: read: its link is closed, and it may come back.
UNSENT_BYTES_MAX: Final = 16 << 20

#: Seconds between the two ways in which an agent that leaves says so: the end of its coordination stream
#: and its goodbye, which may overtake it.
LEAVE_TIMEOUT_S: Final = 2.0

#: With what a stream is refused that an agent has no use for.
_SURPLUS: Final = Code.UNEXPECTED_MESSAGE


#: An agent with more than this to take in is not asked until it has: far enough below the above that
#: feedback and cancellations still fit.
_BEHIND_BYTES: Final = UNSENT_BYTES_MAX // 2


class AgentLink:
    """One session of one agent on one connection."""

    def __init__(self, connection: Connection, control: Channel, hello: Hello, session: str) -> None:
        self.connection = connection
        self.control = control
        self.agent = hello.id
        self.session = session
        #: Set once whoever serves this link is about to close it, with a code of their own.
        self.is_ending = False
        #: Set when the coordination stream is there, and at its end: no reply will come then.
        self.has_opened = asyncio.Event()
        self.replies_ended = asyncio.Event()
        #: Why the agent leaves, once it has said so.
        self.goodbye: str | None = None
        self._stream: BiStream | None = None
        #: Frames for an agent that was welcomed and has not opened its stream yet. Bounded: by the
        #: rounds that one agent may owe, and the seconds that it has to open it.
        self._early: list[bytes] = []
        self._early_bytes = 0
        #: Since when it has too much to take in without taking in any of it, on the loop's clock; and how much.
        self.behind_since: float | None = None
        self.behind_bytes = 0

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the agent has not taken in."""
        return self._early_bytes if self._stream is None else self._stream.unsent_bytes

    def send(self, frame: bytes, *, hurried: bool = True) -> None:
        """Queues a frame; an agent that is too far behind, or gone, gets nothing more."""
        if self.connection.is_closed:
            return
        unsent_bytes = self.unsent_bytes + len(frame)
        if self._stream is None:
            self._early.append(frame)
            self._early_bytes += len(frame)
        if unsent_bytes > UNSENT_BYTES_MAX:
            log.warning("agent_too_far_behind", agent=self.agent, unsent_bytes=unsent_bytes)
            self.close(Code.BUSY, "too far behind: not reading")
            return
        if self._stream is not None:
            try:
                self._stream.send_nowait(frame, hurried=hurried)
            except QuorateError:
                # It stopped the stream: an agent that cannot be asked must not be waited for.
                self.close(Code.BUSY, "not reading")

    def opened(self, stream: BiStream) -> None:
        """The agent has opened its coordination stream."""
        stream.priority = Priority.HIGH
        self._stream = stream
        self.has_opened.set()
        for frame in self._early:
            stream.send_nowait(frame)
        self._early.clear()

    def close(self, code: Code, reason: str) -> None:
        """Ends the connection at once."""
        self.connection.abort(code, reason)


class Fleet:
    """Members and their links."""

    def __init__(
        self,
        *,
        lease_s: float,
        pulse_s: float,
        open_timeout_s: float,
        on_reply: Callable[[str, Reply], None],
        on_lost: Callable[[str, str], None],
        handshakes_total: Counter[str],
        protocol_errors_total: Counter[str],
    ) -> None:
        self.registry: Final = Registry(lease_s=lease_s)
        self._lease_s = lease_s
        self._pulse_s = pulse_s
        self._open_timeout_s = open_timeout_s
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._handshakes_total = handshakes_total
        self._protocol_errors_total = protocol_errors_total
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        #: By session: every link that is served. By agent: the current one.
        self._sessions: dict[str, AgentLink] = {}
        self._links: dict[str, AgentLink] = {}
        self._refusals: dict[str, RefuseAgent] = {}

    # --- what rounds need ---

    def select(self, task: str, labels: Mapping[str, str]) -> tuple[str, ...]:
        """Agents that can be asked, sorted."""
        return self.registry.select(task, labels)

    def send(self, agents: Iterable[str], frame: bytes, *, hurried: bool = True) -> None:
        """Sends one frame to each of these agents that is connected."""
        links = self._links
        for agent in agents:
            link = links.get(agent)
            if link is not None:
                link.send(frame, hurried=hurried)

    def is_behind(self, agent: str, more_bytes: int) -> bool:
        """Whether an agent has so much to take in that it should not be sent so many bytes more."""
        link = self._links.get(agent)
        if link is None:
            return False
        unsent_bytes = link.unsent_bytes
        if unsent_bytes + more_bytes <= _BEHIND_BYTES:
            link.behind_since = None
            return False
        now = self._loop.time()
        if link.behind_since is None or unsent_bytes < link.behind_bytes:
            link.behind_since, link.behind_bytes = now, unsent_bytes
        elif now - link.behind_since > self._lease_s:
            # It lives, and it does not read.
            log.warning("agent_too_far_behind", agent=agent, unsent_bytes=unsent_bytes)
            link.close(Code.BUSY, "too far behind: not reading")
        return True

    def last_seen_at(self, member: Member) -> float:
        """When an agent was last heard, on the loop's clock."""
        link = self._links.get(member.agent)
        return max(member.last_seen_at, link.connection.stats.received_at if link is not None else 0.0)

    # --- one agent ---

    async def serve(self, connection: Connection, control: Channel, hello: Hello) -> None:
        """An authenticated agent's session, from its welcome to its end.

        Raises:
            Refused: there is no room for it.
            ProtocolError: it broke the protocol; the connection is to be closed.
        """
        link = AgentLink(connection, control, hello, secrets.token_hex(8))
        self._sessions[link.session] = link
        try:
            self._handle(
                AgentJoined(
                    agent=hello.id,
                    session=link.session,
                    instance=hello.instance,
                    labels=hello.labels,
                    tasks=tuple(hello.tasks),
                    address=connection.peer,
                    software=hello.software,
                )
            )
            refusal = self._refusals.pop(link.session, None)
            if refusal is not None:
                raise Refused(refusal.reason, refusal.message, retry=refusal.retry)
            self._handshakes_total["welcome"] += 1
            self._end_session(link, await self._serve_session(link))
        except BaseException as error:
            self._end_session(link, str(error) or type(error).__name__)
            raise
        finally:
            del self._sessions[link.session]
            if self._links.get(link.agent) is link:
                del self._links[link.agent]

    def _end_session(self, link: AgentLink, reason: str) -> None:
        link.is_ending = True
        reason = clip_text(reason)
        if link.goodbye is not None:
            self._handle(AgentLeft(link.agent, link.session, link.goodbye))
        else:
            self._handle(LinkBroken(link.agent, link.session, reason))

    async def _serve_session(self, link: AgentLink) -> str:
        """Reads what the agent says until its link ends; returns why it did.

        Raises:
            ProtocolError: it broke the protocol.
        """
        try:
            await link.control.send(
                Welcome(
                    session=link.session,
                    software=f"quorate/{__version__}",
                    pulse_s=self._pulse_s,
                    lease_s=self._lease_s,
                )
            )
            return await first_of(
                self._read_control(link),
                self._read_coordination(link),
                self._read_pulses(link),
                self._refuse_uni_streams(link),
                self._refuse_bi_streams(link),
            )
        except ProtocolError:
            raise
        except QuorateError as error:
            return str(link.connection.close_error or error)

    async def _read_control(self, link: AgentLink) -> str:
        while (message := await link.control.receive()) is not None:
            if isinstance(message, Drain):
                log.info("agent_draining", agent=link.agent, reason=message.reason)
                self._handle(AgentDraining(link.agent, link.session))
            elif isinstance(message, Goodbye):
                link.goodbye = message.reason
                await self._take_last_replies(link)
                return "said goodbye"
            else:
                raise UnexpectedMessage(message.wire_type, "on the control stream")
        return "finished its control stream"

    async def _take_last_replies(self, link: AgentLink) -> None:
        """Waits for the end of the coordination stream, which a goodbye may have overtaken."""
        self._handle(AgentDraining(link.agent, link.session))
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await link.replies_ended.wait()
        except TimeoutError:
            log.debug("agent_left_its_replies_open", agent=link.agent)

    async def _read_coordination(self, link: AgentLink) -> str:
        try:
            async with asyncio.timeout(self._open_timeout_s):
                stream = await link.connection.accept_bi_stream()
                channel = Channel(stream)
                opened = await channel.expect(CoordinationOpened)
        except TimeoutError:
            raise UnexpectedMessage(
                "no", f"within {self._open_timeout_s:g} s: the coordination stream was not opened"
            ) from None
        assert isinstance(opened, CoordinationOpened)
        if opened.session != link.session:
            raise MessageInvalid("coordination", "session: not the one that was welcomed")
        link.opened(stream)
        while (message := await channel.receive()) is not None:
            if not isinstance(message, Reply):
                raise UnexpectedMessage(message.wire_type, "on the coordination stream")
            if self._links.get(link.agent) is link:
                self._on_reply(link.agent, message)
        link.replies_ended.set()
        # It is about to say goodbye, or else it broke off.
        self._handle(AgentDraining(link.agent, link.session))
        await asyncio.sleep(LEAVE_TIMEOUT_S)
        return "finished its coordination stream"

    async def _read_pulses(self, link: AgentLink) -> str:
        # A pulse says nothing but that it came: the transport has noted that.
        while True:
            await link.connection.datagrams.receive()

    async def _refuse_uni_streams(self, link: AgentLink) -> str:
        return await refuse_streams(link.connection.accept_uni_stream, _SURPLUS, on_refused=self._count_surplus)

    async def _refuse_bi_streams(self, link: AgentLink) -> str:
        await link.has_opened.wait()
        return await refuse_streams(link.connection.accept_bi_stream, _SURPLUS, on_refused=self._count_surplus)

    def _count_surplus(self) -> None:
        self._protocol_errors_total[_SURPLUS.name] += 1

    # --- registry ---

    def _handle(self, event: Event) -> None:
        for instruction in self.registry.handle(event, self._loop.time()):
            self._carry_out(instruction)
        self._arm()

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case AdmitAgent(agent, session):
                link = self._sessions[session]
                self._links[agent] = link
                log.info("agent_joined", agent=agent, session=session, address=link.connection.peer)
            case RefuseAgent():
                self._refusals[instruction.session] = instruction
            case ReplaceLink(agent, old_session):
                old = self._sessions.get(old_session)
                if old is not None:
                    log.warning("agent_replaced", agent=agent, old_address=old.connection.peer)
                    old.close(Code.REPLACED, f"another agent took the id {agent}")
            case DeclareSuspect(agent, _):
                log.warning("agent_suspect", agent=agent)
            case DeclareReturned(agent, _):
                log.info("agent_returned", agent=agent)
            case DeclareLost(agent, session, reason):
                log.warning("agent_lost", agent=agent, reason=reason)
                self._part(agent, session)
                self._on_lost(agent, reason)
            case DeclareLeft(agent, session, reason):
                log.info("agent_left", agent=agent, reason=reason)
                self._part(agent, session)
                self._on_lost(agent, "left")
            case _:
                assert_never(instruction)

    def _part(self, agent: str, session: str) -> None:
        link = self._sessions.get(session)
        if link is not None:
            if not link.is_ending:
                link.close(Code.LEASE_EXPIRED, "session is over")
            if self._links.get(agent) is link:
                del self._links[agent]

    def _arm(self) -> None:
        at = self.registry.next_timer()
        if self._timer is not None:
            if at is not None and self._timer.when() <= at:
                return
            self._timer.cancel()
        self._timer = None if at is None else self._loop.call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        due = self.registry.lease_due(self._loop.time())
        self._handle(
            LeaseChecked(
                {
                    agent: link.connection.stats.received_at
                    for agent in due
                    if (link := self._links.get(agent)) is not None
                }
            )
        )

    # --- the end ---

    async def close(self, reason: str) -> None:
        """Says goodbye to every agent and closes the links."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        links = list(self._links.values())
        for link in links:
            try:
                link.control.send_nowait(Goodbye(reason=reason))
                await link.control.finish()
            except QuorateError:
                continue
        # What was said arrives before the connection's end, or the agent is not listening.
        try:
            async with asyncio.timeout(1.0):
                await asyncio.gather(*(link.control.stream.flush() for link in links), return_exceptions=True)
        except TimeoutError:
            log.warning("agents_did_not_hear_goodbye")
        for link in links:
            link.close(Code.SHUTDOWN, reason)

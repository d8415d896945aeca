"""The fleet's links: the shell round the registry of members.

One `AgentSession` per member, with its `AgentLink` while it has one; the registry decides who is a member,
this opens, feeds and closes the links.

A link is read to its end before it counts as ended: what had arrived is handed on although the connection is
over. So the number of replies that a returning agent is told is exact, and agents may forget what the
transport has acknowledged.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, assert_never

import structlog

from quorate_coordinator.agent_bodies import AgentBodies, BodyDesk, KeptTruths
from quorate_coordinator.links import UNSENT_BYTES_MAX, AgentLink, AgentSession
from quorate_coordinator.membership import (
    AdmitAgent,
    AgentDraining,
    AgentJoined,
    AgentLeft,
    DeclareAway,
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
    ResumeSession,
)
from quorate_coordinator.registry import Registry
from quorate_coordinator.serving import first_of, refuse_streams
from quorate_coordinator.uni_streams import serve_uni_streams
from quorate_protocol import __version__
from quorate_protocol.blobs import Blob, BlobStore
from quorate_protocol.channel import Channel
from quorate_protocol.errors import (
    Code,
    MessageInvalid,
    ProtocolError,
    QuorateError,
    Refused,
    UnexpectedMessage,
)
from quorate_protocol.messages import (
    Bulk,
    CoordinationOpened,
    Drain,
    Goodbye,
    Hello,
    Message,
    Reply,
    Welcome,
    clip_text,
)
from quorate_protocol.transport import Connection, ReceiveStream

log = structlog.get_logger()

#: Seconds between the two ways in which an agent that leaves says so: the end of its coordination stream
#: and its goodbye, which may overtake it.
LEAVE_TIMEOUT_S: Final = 2.0

#: Seconds that reading a closed link to its end may take: what is there is read in a few turns of the loop.
_READ_OUT_TIMEOUT_S: Final = 1.0

#: With what a stream is refused that an agent has no use for.
_SURPLUS: Final = Code.UNEXPECTED_MESSAGE

#: An agent with more than this to take in is not asked until it has: far enough below the above that
#: feedback and cancellations still fit.
_BEHIND_BYTES: Final = UNSENT_BYTES_MAX // 2


class Fleet:
    """Members and their links.

    Args:
        lease_s: Seconds of silence, or of being away, after which an agent is lost.
        pulse_s: Seconds between the pulses that agents are told to send.
        open_timeout_s: Seconds from the welcome to the coordination stream.
        on_reply: Takes each reply, with its agent; one with a large body when that is all there.
        on_reachable: Called when an agent's coordination stream is there: with each link, the first and every later
            one. What it sends follows what the last link did not deliver.
        on_lost: Called when a session is over, with the reason.
        serve_stream: Serves what an agent sends on a unidirectional stream, given its first message.
        awaits_s: Seconds for which a round would take a reply of an agent to this attempt, or to any (None); 0 when it
            would not. For large bodies.
        store: Where large bodies go.
        bodies_refused_total: Counted on: bodies that were not taken, by reason (`agent_bodies.REFUSALS`).
        handshakes_total: Counted on: hellos by how they ended.
        protocol_errors_total: Counted on: errors of peers by their code's name.
    """

    def __init__(
        self,
        *,
        lease_s: float,
        pulse_s: float,
        open_timeout_s: float,
        on_reply: Callable[[str, Reply], None],
        on_reachable: Callable[[str], None],
        on_lost: Callable[[str, str], None],
        serve_stream: Callable[[str, Message, ReceiveStream], Awaitable[None]],
        awaits_s: Callable[[str, int, int | None], float],
        store: BlobStore,
        bodies_refused_total: Counter[str],
        handshakes_total: Counter[str],
        protocol_errors_total: Counter[str],
    ) -> None:
        self.registry: Final = Registry(lease_s=lease_s)
        #: Sessions that were resumed, and those of them whose log did not reach back; totals since the start.
        self.resumed_total = 0
        self.resumed_with_gap_total = 0
        self._lease_s = lease_s
        self._pulse_s = pulse_s
        self._open_timeout_s = open_timeout_s
        self._on_reply = on_reply
        self._on_reachable = on_reachable
        self._on_lost = on_lost
        self._serve_stream = serve_stream
        self._desk = BodyDesk(store, bodies_refused_total, on_reply, awaits_s, KeptTruths(store.budget))
        self._handshakes_total = handshakes_total
        self._protocol_errors_total = protocol_errors_total
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        #: By agent: those who have a session.
        self._members: dict[str, AgentSession] = {}
        #: While the registry decides over a hello: its link and the secret of a new session.
        self._joining: tuple[AgentLink, str] | None = None
        self._refusal: RefuseAgent | None = None

    # --- what rounds need ---

    def select(self, task: str, labels: Mapping[str, str]) -> tuple[str, ...]:
        """Agents that can be asked now, sorted."""
        return self.registry.select(task, labels)

    def select_away(self, task: str, labels: Mapping[str, str]) -> tuple[str, ...]:
        """Agents that could be asked if they had a link, sorted: `on_reachable` says when they have."""
        return self.registry.select_away(task, labels)

    def send(self, agents: Iterable[str], frame: bytes, *, hurried: bool = True, is_assignment: bool = False) -> None:
        """Sends one frame to each of these agents that has a session.

        Those who are away get it when they return; not an assignment, which `on_reachable` is the time to send again.
        """
        members = self._members
        for agent in agents:
            member = members.get(agent)
            if member is not None:
                member.send(frame, hurried=hurried, is_assignment=is_assignment)

    def send_body(self, agents: Iterable[str], blob: Blob, header: Bulk) -> None:
        """Sends each of these agents the body that the frame before refers to, beside everything else."""
        for agent in agents:
            member = self._members.get(agent)
            if member is not None:
                member.bodies.send(member.link, blob, header)

    def stop_bodies(self, agents: Iterable[str], round_id: int) -> None:
        """Gives up the bodies of a round on their way to and from these agents, whose part in it is over."""
        for agent in agents:
            member = self._members.get(agent)
            if member is not None:
                member.bodies.stop(round_id)

    def is_behind(self, agent: str, more_bytes: int) -> bool:
        """Whether an agent has so much to take in that it should not be sent so many bytes more."""
        link = self._link_of(agent)
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
            link.expel("too far behind: not reading")
        return True

    # --- what operators need ---

    def last_seen_at(self, member: Member) -> float:
        """When an agent was last heard, on the loop's clock."""
        link = self._link_of(member.agent)
        return max(member.last_seen_at, link.connection.stats.received_at if link is not None else 0.0)

    def drain(self, agent: str, reason: str) -> bool:
        """Asks an agent to finish what it has, to leave, and to end for good.

        It is asked nothing more. One that is away is told when it returns.

        Returns:
            False when no agent of this id has a session.
        """
        member = self._members.get(agent)
        if member is None:
            return False
        log.info("agent_told_to_stop", agent=agent, reason=reason)
        member.stop_reason = reason
        if member.link is not None:
            self._tell_to_stop(member, member.link)
        self._handle(AgentDraining(agent, member.name))
        return True

    def can_resume(self, hello: Hello) -> bool:
        """Whether a hello goes on with a session that lives."""
        return self.registry.can_resume(hello.id, _resume_of(hello))

    # --- one agent ---

    async def serve(self, connection: Connection, control: Channel, hello: Hello) -> None:
        """An authenticated agent's link, from its welcome to its end.

        Raises:
            Refused: there is no room for it.
            ProtocolError: it broke the protocol; the connection is closed.
        """
        link = AgentLink(connection, control, hello.id)
        await self._end_old_link(hello)
        member = self._join(link, hello)
        self._handshakes_total["welcome"] += 1
        reason = "cancelled"
        try:
            reason = await self._serve_link(link, member)
        except BaseException as error:
            reason = str(error) or type(error).__name__
            raise
        finally:
            self._link_ended(link, member, clip_text(reason))
            link.has_ended.set()

    async def _end_old_link(self, hello: Hello) -> None:
        """Before a session is resumed: closes a link of it that still stands, and waits until that was read out."""
        while self.can_resume(hello) and (old := self._link_of(hello.id)) is not None:
            old.close(Code.REPLACED, "its session goes on over another link")
            try:
                async with asyncio.timeout(_READ_OUT_TIMEOUT_S):
                    await old.has_ended.wait()
            except TimeoutError:
                log.warning("old_link_not_read_out", agent=hello.id)
                return

    def _join(self, link: AgentLink, hello: Hello) -> AgentSession:
        """Lets the registry decide over a hello.

        Raises:
            Refused: it is no member.
        """
        self._joining = (link, secrets.token_urlsafe(32))
        self._refusal = None
        self._handle(
            AgentJoined(
                agent=hello.id,
                session=secrets.token_hex(8),
                instance=hello.instance,
                labels=hello.labels,
                tasks=tuple(hello.tasks),
                address=link.connection.peer,
                software=hello.software,
                secret=self._joining[1],
                resume=_resume_of(hello),
            )
        )
        self._joining = None
        if self._refusal is not None:
            raise Refused(self._refusal.reason, self._refusal.message, retry=self._refusal.retry)
        member = self._members[hello.id]
        if hello.resume is not None and member.name == hello.resume.session:
            link.resumed_after = hello.resume.received
        return member

    async def _serve_link(self, link: AgentLink, member: AgentSession) -> str:
        """Reads what the agent says until its link ends, and what has arrived by then; returns why it ended.

        Raises:
            ProtocolError: it broke the protocol.
        """
        replies = asyncio.create_task(self._read_coordination(link, member))
        fault: ProtocolError | None = None
        reason = "cancelled"
        try:
            await self._welcome(link, member)
            reason = await first_of(
                self._read_control(link, member, replies),
                self._await_goodbye(link, member, replies),
                self._read_pulses(link),
                self._serve_uni_streams(link, member),
                self._refuse_bi_streams(link),
            )
        except ProtocolError as error:
            fault = error
        except QuorateError as error:
            reason = str(link.connection.close_error or error)
        finally:
            link.connection.abort(*((Code.NO_ERROR, "") if fault is None else (fault.code, fault.code.name)))
            # What had arrived counts; of a closed connection nothing more comes, and the reader ends by itself.
            await asyncio.wait([replies], timeout=_READ_OUT_TIMEOUT_S)
            replies.cancel()
            await asyncio.wait([replies])
            await member.bodies.end_link(link, _READ_OUT_TIMEOUT_S)
            unread = None if replies.cancelled() else replies.exception()
        if isinstance(unread, ProtocolError):
            fault = fault or unread
        elif unread is not None and not isinstance(unread, QuorateError):
            raise unread
        if fault is not None:
            # One that resumed and did not get as far as its stream may have lost its link again.
            link.ends_session |= link.resumed_after is None or link.has_opened.is_set()
            raise fault
        return reason

    async def _welcome(self, link: AgentLink, member: AgentSession) -> None:
        await link.control.send(
            Welcome(
                session=member.name,
                software=f"quorate/{__version__}",
                pulse_s=self._pulse_s,
                lease_s=self._lease_s,
                secret=member.secret,
                resumed=link.resumed_after is not None,
                received=member.received,
            )
        )
        if member.stop_reason is not None:
            self._tell_to_stop(member, link)

    def _tell_to_stop(self, member: AgentSession, link: AgentLink) -> None:
        try:
            link.control.send_nowait(Drain(reason=clip_text(member.stop_reason or ""), stop=True))
        except QuorateError as error:
            # It is told again over its next link.
            log.debug("agent_not_told_to_stop", agent=member.agent, reason=str(error))

    def _link_ended(self, link: AgentLink, member: AgentSession, reason: str) -> None:
        if member.link is not link:
            return
        if link.goodbye is not None:
            self._handle(AgentLeft(member.agent, member.name, link.goodbye))
        else:
            is_final = link.ends_session or link.was_closed_for_good
            self._handle(LinkBroken(member.agent, member.name, reason, is_final))

    async def _read_control(self, link: AgentLink, member: AgentSession, replies: asyncio.Task[None]) -> str:
        while (message := await link.control.receive()) is not None:
            if isinstance(message, Drain):
                log.info("agent_draining", agent=link.agent, reason=message.reason)
                self._drains(link, member)
            elif isinstance(message, Goodbye):
                link.goodbye = message.reason
                # The goodbye may have overtaken the end of the coordination stream.
                self._drains(link, member)
                done, _ = await asyncio.wait([replies], timeout=LEAVE_TIMEOUT_S)
                if not done:
                    log.debug("agent_left_its_replies_open", agent=link.agent)
                await member.bodies.settle(link, LEAVE_TIMEOUT_S)
                return "said goodbye"
            else:
                raise UnexpectedMessage(message.wire_type, "on the control stream")
        link.ends_session = True
        return "finished its control stream"

    def _drains(self, link: AgentLink, member: AgentSession) -> None:
        if member.link is link:
            self._handle(AgentDraining(member.agent, member.name))

    async def _await_goodbye(self, link: AgentLink, member: AgentSession, replies: asyncio.Task[None]) -> str:
        """After the end of the coordination stream: a goodbye has to come, or else the agent broke off."""
        await asyncio.shield(replies)
        link.ends_session = True
        self._drains(link, member)
        await asyncio.sleep(LEAVE_TIMEOUT_S)
        return "finished its coordination stream"

    async def _read_coordination(self, link: AgentLink, member: AgentSession) -> None:
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
        if opened.session != member.name:
            raise MessageInvalid("coordination", "session: not the one that was welcomed")
        link.opened(stream)
        if member.link is link:
            self._go_on(link, member)
        while (message := await channel.receive()) is not None:
            if not isinstance(message, Reply):
                raise UnexpectedMessage(message.wire_type, "on the coordination stream")
            if member.link is link:
                member.received += 1
                if message.bulk is None:
                    self._on_reply(link.agent, message)
                else:
                    member.bodies.take_reply(link, message)

    def _go_on(self, link: AgentLink, member: AgentSession) -> None:
        """The agent can be asked: it gets what the last link did not deliver, and then what the rounds have for it."""
        if link.resumed_after is not None:
            frames, has_gap = member.log.resume(link.resumed_after)
            if has_gap:
                self.resumed_with_gap_total += 1
                log.warning("frames_not_kept", agent=link.agent, received=link.resumed_after)
            for frame in frames:
                link.send(frame)
            member.bodies.resume(link)
        self._on_reachable(link.agent)

    async def _read_pulses(self, link: AgentLink) -> str:
        # A pulse says nothing but that it came: the transport has noted that.
        while True:
            await link.connection.datagrams.receive()

    async def _serve_uni_streams(self, link: AgentLink, member: AgentSession) -> str:
        async def serve(message: Message, stream: ReceiveStream) -> None:
            if isinstance(message, Bulk):
                member.bodies.take_stream(link, stream, message)
            else:
                await self._serve_stream(link.agent, message, stream)

        return await serve_uni_streams(link.connection, serve, lambda error: self._count_fault(link, error))

    def _count_fault(self, link: AgentLink, error: ProtocolError) -> None:
        self._protocol_errors_total[error.code.name] += 1
        log.warning("stream_broke_protocol", agent=link.agent, problem=str(error))

    async def _refuse_bi_streams(self, link: AgentLink) -> str:
        await link.has_opened.wait()
        return await refuse_streams(link.connection.accept_bi_stream, _SURPLUS, on_refused=self._count_surplus)

    def _count_surplus(self) -> None:
        self._protocol_errors_total[_SURPLUS.name] += 1

    def _link_of(self, agent: str) -> AgentLink | None:
        member = self._members.get(agent)
        return None if member is None else member.link

    # --- registry ---

    def _handle(self, event: Event) -> None:
        for instruction in self.registry.handle(event, self._loop.time()):
            self._carry_out(instruction)
        self._arm()

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case AdmitAgent(agent, session):
                assert self._joining is not None, "agents are admitted when they say hello"
                link, secret = self._joining
                self._members[agent] = AgentSession(agent, session, secret, link, AgentBodies(agent, self._desk))
                log.info("agent_joined", agent=agent, session=session, address=link.connection.peer)
            case ResumeSession(agent, session):
                assert self._joining is not None, "sessions are resumed by a hello"
                self._members[agent].link = link = self._joining[0]
                self.resumed_total += 1
                log.info("agent_resumed", agent=agent, session=session, address=link.connection.peer)
            case RefuseAgent():
                self._refusal = instruction
            case ReplaceLink(agent, _):
                old = self._link_of(agent)
                if old is not None:
                    log.warning("agent_replaced", agent=agent, old_address=old.connection.peer)
                    old.close(Code.REPLACED, f"another agent took the id {agent}")
            case DeclareSuspect(agent, _):
                log.warning("agent_suspect", agent=agent)
            case DeclareAway(agent, _, reason):
                self._log_gone("agent_away", agent, reason)
                self._members[agent].link = None
            case DeclareReturned(agent, _):
                log.info("agent_returned", agent=agent)
            case DeclareLost(agent, _, reason):
                self._log_gone("agent_lost", agent, reason)
                self._part(agent)
                self._on_lost(agent, reason)
            case DeclareLeft(agent, _, reason):
                log.info("agent_left", agent=agent, reason=reason)
                self._part(agent)
                self._on_lost(agent, "left")
            case _:
                assert_never(instruction)

    def _log_gone(self, event: str, agent: str, reason: str) -> None:
        """A warning, but where it is the coordinator that goes."""
        if self._is_closed:
            log.debug(event, agent=agent, reason="the coordinator stops")
        else:
            log.warning(event, agent=agent, reason=reason)

    def _part(self, agent: str) -> None:
        member = self._members.pop(agent)
        member.bodies.close()
        link, member.link = member.link, None
        if link is not None:
            link.close(Code.LEASE_EXPIRED, "session is over")

    def _arm(self) -> None:
        at = None if self._is_closed else self.registry.next_timer()
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
                    if (link := self._link_of(agent)) is not None
                }
            )
        )

    # --- the end ---

    async def close(self, reason: str) -> None:
        """Says goodbye to every agent and closes the links."""
        self._is_closed = True
        self._arm()
        links = [member.link for member in self._members.values() if member.link is not None]
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


def _resume_of(hello: Hello) -> tuple[str, str] | None:
    return None if hello.resume is None else (hello.resume.session, hello.resume.secret)

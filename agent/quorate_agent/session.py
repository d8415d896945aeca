"""A session's time on one connection: its streams, and what comes and goes on them."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, Final

import structlog

from quorate_agent import events as ev
from quorate_agent.session_bodies import SessionBodies
from quorate_protocol.blobs import BlobStore
from quorate_protocol.errors import Code, ConnectionClosed, LinkError, ProtocolError, StreamError, UnexpectedMessage
from quorate_protocol.fields import BodyRef, place
from quorate_protocol.frames import FrameDecoder
from quorate_protocol.messages import (
    PULSE,
    Assignment,
    Cancellation,
    CoordinationOpened,
    Drain,
    Feedback,
    Goodbye,
    Message,
    Refusal,
    Reply,
    Welcome,
    body_of,
    parse_message,
)
from quorate_protocol.transport import BiStream, Connection, Priority

log = structlog.get_logger()

#: Seconds from the handshake to `welcome`.
JOIN_TIMEOUT_S: Final = 10.0
#: Seconds that delivering the last replies and `goodbye` may take.
LEAVE_TIMEOUT_S: Final = 2.0
#: Bytes of replies that the coordinator has not taken: beyond, it is broken. Sixty-four of the largest.
UNSENT_BYTES_MAX: Final = 64 << 20
#: Seconds between two looks at whether they were delivered.
_LEAVE_POLL_S: Final = 0.005
#: Seconds to wait for the news why, after a stream failed.
_CLOSE_NEWS_TIMEOUT_S: Final = 0.5

#: What the core asks of a session.
SessionInstruction = (
    ev.SendHello
    | ev.OpenCoordination
    | ev.SendReply
    | ev.ReceiveBody
    | ev.RefuseBody
    | ev.StopBodies
    | ev.SendDrain
    | ev.Leave
    | ev.CloseLink
)


class _SessionEnded(Exception):
    """The link is to end for a reason that is no error of the transport.

    Args:
        is_over: Whether the session ends with it.
    """

    def __init__(self, reason: str, *, code: Code = Code.LEASE_EXPIRED, is_over: bool = False) -> None:
        super().__init__(reason)
        self.code = code
        self.is_over = is_over


class Session:
    """What an agent does with a connection, from the handshake until it is over.

    It is closed with NO_ERROR when this agent does not want the session any more. Every other code leaves the
    session to be resumed.

    Args:
        connection: Fresh; closed by `run`.
        make_hello: Makes the frame to begin with, given what to resume.
        agent_id: For logs.
        store: Where large bodies go.
        apply: Takes the events of this session.
        welcomed: Called with the welcome when the session stands.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        make_hello: Callable[[ev.Resume | None], bytes],
        agent_id: str,
        store: BlobStore,
        apply: Callable[[ev.Event], None],
        welcomed: Callable[[Welcome], None],
    ) -> None:
        self._connection = connection
        self._make_hello = make_hello
        self._agent_id = agent_id
        self._apply = apply
        self._welcomed = welcomed
        self._bodies = SessionBodies(connection, store, agent_id, self._body_moved)
        self._control: BiStream | None = None
        self._coordination: BiStream | None = None
        #: Done when the session ends from this side: with the reason to say goodbye with, with None to go
        #: without a word, or with the failure of a send.
        self._ending: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Works until the session is over, and tells the core how it ended. Closes the connection."""
        code = Code.NO_ERROR
        down = ev.LinkDown("the session ended")
        try:
            await self._hold_until_ending()
        except ProtocolError as error:
            code = error.code
            down = ev.LinkDown(f"the coordinator broke the protocol: {error}", is_over=True)
        except (LinkError, StreamError) as error:
            code = Code.LEASE_EXPIRED
            down = await self._explain(error)
        except _SessionEnded as ended:
            code = ended.code
            down = ev.LinkDown(str(ended), is_over=ended.is_over)
        finally:
            await self._connection.close(code)
        self._apply(down)

    def execute(self, instruction: SessionInstruction) -> None:
        """Does what the core asks of a session. A failure to send ends the session, and the core hears of that."""
        match instruction:
            case ev.SendReply():
                self._send_reply(instruction)
            case ev.ReceiveBody() | ev.RefuseBody() | ev.StopBodies():
                self._bodies.execute(instruction)
            case ev.SendHello(resume):
                self._send(self._control, self._make_hello(resume))
            case ev.OpenCoordination(session):
                self._send(self._coordination, CoordinationOpened(session=session).to_frame())
            case ev.SendDrain(reason):
                self._send(self._control, Drain(reason=reason).to_frame())
            case ev.Leave(reason):
                self._end(reason)
            case ev.CloseLink():
                self._end(None)

    def _send_reply(self, reply: ev.SendReply) -> None:
        message = Reply(
            round=reply.round,
            attempt=reply.attempt,
            status=reply.status,
            **place(reply.body),
            error=reply.error,
            compute_s=reply.compute_s,
            waited_s=reply.waited_s,
        )
        self._send(self._coordination, message.to_frame())
        if isinstance(reply.body, BodyRef):
            self._bodies.send(reply.round, reply.attempt, reply.body)

    def _body_moved(self, event: ev.Event) -> None:
        self._apply(event)
        coordination = self._coordination
        if not isinstance(event, ev.ReplyBodyDelivered) or coordination is None or self._connection.is_closed:
            return
        if not coordination.unsent_bytes:
            # A large answer is not to be kept until the next pulse.
            self._apply(ev.RepliesDelivered())

    def _end(self, reason: str | None) -> None:
        if not self._ending.done():
            self._ending.set_result(reason)

    def _send(self, stream: BiStream | None, frame: bytes) -> None:
        assert stream is not None, "the core sends on streams that are open"
        # Without waiting: a coordinator bounds what it asks of an agent, and so the replies.
        error: Exception | None = None
        try:
            stream.send_nowait(frame)
            if stream.unsent_bytes > UNSENT_BYTES_MAX:
                error = _SessionEnded("the coordinator asks but does not read the replies", code=Code.BUSY)
        except (LinkError, StreamError) as failed:
            error = failed
        if error is not None and not self._ending.done():
            self._ending.set_exception(error)

    # --- the session ---

    async def _hold_until_ending(self) -> None:
        holding = asyncio.create_task(self._hold(), name="session")
        try:
            either: set[asyncio.Future[Any]] = {holding, self._ending}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not self._ending.done():
                holding.result()
                return
        finally:
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)
            if not self._ending.done():
                self._ending.cancel()
            elif not self._ending.cancelled():
                self._ending.exception()  # looked at, so that asyncio does not complain when we were cancelled
        reason = self._ending.result()
        if reason is not None:
            await self._leave(reason)

    async def _hold(self) -> None:
        self._control = await self._connection.open_bi_stream(Priority.CRITICAL)
        self._apply(ev.LinkUp())
        async with contextlib.aclosing(_read_messages(self._control)) as control_messages:
            welcome = await self._join(control_messages)
            if welcome is None:
                return
            self._coordination = await self._connection.open_bi_stream(Priority.HIGH)
            self._welcomed(welcome)
            self._apply(ev.WelcomeReceived(welcome.session, welcome.resumed, welcome.received, welcome.secret))
            tasks = [
                asyncio.create_task(self._read_control(control_messages), name="control"),
                asyncio.create_task(self._read_coordination(self._coordination), name="coordination"),
                asyncio.create_task(self._pulse(welcome), name="pulse"),
                asyncio.create_task(self._bodies.serve(), name="bodies"),
            ]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await self._bodies.end()

    async def _join(self, messages: AsyncIterator[Message]) -> Welcome | None:
        """The coordinator's welcome; None after a refusal, which the core was told."""
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                answer = await anext(messages)
        except TimeoutError:
            raise _SessionEnded(f"the coordinator did not answer the hello within {JOIN_TIMEOUT_S:g} s") from None
        except StopAsyncIteration:
            raise _SessionEnded("the coordinator ended the control stream without a welcome") from None
        if isinstance(answer, Refusal):
            self._apply(ev.RefusalReceived(answer.reason, answer.message, answer.retry))
            return None
        if not isinstance(answer, Welcome):
            raise UnexpectedMessage(answer.wire_type, "instead of a welcome")
        return answer

    async def _read_control(self, messages: AsyncIterator[Message]) -> None:
        async for message in messages:
            if isinstance(message, Drain):
                self._apply(ev.DrainReceived(message.reason, message.stop))
            elif isinstance(message, Goodbye):
                reason = f"the coordinator said goodbye{': ' if message.reason else ''}{message.reason}"
                raise _SessionEnded(reason, is_over=True)
            else:
                raise UnexpectedMessage(message.wire_type, "on the control stream")
        raise _SessionEnded("the coordinator ended the control stream", is_over=True)

    async def _read_coordination(self, stream: BiStream) -> None:
        async for message in _read_messages(stream):
            if isinstance(message, Assignment | Feedback):
                self._apply(_work_event(message))
            elif isinstance(message, Cancellation):
                self._apply(ev.CancellationReceived(message.round))
            else:
                raise UnexpectedMessage(message.wire_type, "on the coordination stream")
        raise _SessionEnded("the coordinator ended the coordination stream", is_over=True)

    async def _pulse(self, welcome: Welcome) -> None:
        """Says that this agent lives, and notices when the coordinator does not, and what it has taken."""
        assert self._coordination is not None, "opened before this begins"
        loop = asyncio.get_running_loop()
        connection = self._connection
        patience_s = welcome.lease_s
        if welcome.secret:
            # There is to be time in the lease to resume the session; and one lost pulse is no reason.
            patience_s = max(patience_s / 2, min(patience_s, 2 * welcome.pulse_s))
        warned = False
        while True:
            due_at = loop.time() + welcome.pulse_s
            await asyncio.sleep(welcome.pulse_s)
            if connection.datagrams.max_bytes >= len(PULSE):
                connection.datagrams.send(PULSE)
            elif not warned:
                warned = True
                log.warning("no_heartbeats", agent=self._agent_id, reason="the coordinator takes no datagrams")
            if not connection.is_closed and not self._coordination.unsent_bytes:
                self._apply(ev.RepliesDelivered())
            # Each pulse is acknowledged, so a coordinator that lives is heard. Where we were late ourselves
            # (a handler blocked the loop, the machine slept) its packets may not have been read yet.
            now = loop.time()
            silent_s = now - connection.stats.received_at
            if silent_s > patience_s and now - due_at < welcome.pulse_s:
                raise _SessionEnded(f"nothing heard from the coordinator for {silent_s:.1f} s")

    async def _leave(self, reason: str) -> None:
        """Sees that the last replies arrive before `goodbye` does, which has the right of way otherwise."""
        assert self._control is not None, "the core leaves sessions that stand"
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                if self._coordination is not None:
                    await self._coordination.finish()
                    await self._wait_delivered(self._coordination)
                self._control.send_nowait(Goodbye(reason=reason).to_frame())
                await self._control.finish()
                await self._wait_delivered(self._control)
        except TimeoutError:
            log.warning("goodbye_not_acknowledged", agent=self._agent_id)
        except (LinkError, StreamError) as error:
            log.debug("goodbye_not_sent", agent=self._agent_id, reason=str(error))

    async def _wait_delivered(self, stream: BiStream) -> None:
        """Returns when the peer's transport has acknowledged all that was sent, or the connection is over."""
        while stream.unsent_bytes and not self._connection.is_closed:  # noqa: ASYNC110  streams tell nobody of it
            await asyncio.sleep(_LEAVE_POLL_S)

    async def _explain(self, error: Exception) -> ev.LinkDown:
        """What ended the connection: the news may come a moment after a stream has failed for it."""
        try:
            async with asyncio.timeout(_CLOSE_NEWS_TIMEOUT_S):
                await self._connection.wait_closed()
        except TimeoutError:
            return ev.LinkDown(str(error))
        closed = self._connection.close_error
        if not isinstance(closed, ConnectionClosed):
            return ev.LinkDown(str(closed or error))
        if closed.by_peer and not closed.transport and closed.code == Code.REPLACED:
            return ev.LinkDown(f"another agent took the id {self._agent_id}", replaced=True)
        return ev.LinkDown(str(closed))


def _work_event(message: Assignment | Feedback) -> ev.Event:
    """Work that has come; or that was announced, where its body is on a stream of its own."""
    body = body_of(message)
    assert body is not None, "messages of work have bodies"
    if isinstance(message, Feedback):
        if isinstance(body, BodyRef):
            return ev.FeedbackAnnounced(message.round, message.task, body)
        return ev.FeedbackReceived(message.round, message.task, body)
    if isinstance(body, BodyRef):
        return ev.AssignmentAnnounced(message.round, message.task, body, message.deadline_s, message.attempt)
    return ev.AssignmentReceived(message.round, message.task, body, message.deadline_s, message.attempt)


async def _read_messages(stream: BiStream) -> AsyncGenerator[Message, None]:
    """The messages of a stream until its end.

    Raises:
        ProtocolError: one of them is wrong, or the stream ends within one.
    """
    decoder = FrameDecoder()
    async for chunk in stream:
        for raw in decoder.feed(chunk):
            yield parse_message(raw)
    decoder.finish()

"""Operators' calls: each on a stream of its own, answered by one message."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import structlog

from quorate_coordinator.agent_bodies import explain_refusal, refusal_of
from quorate_coordinator.asking import Asking, Listener
from quorate_coordinator.blob_shelf import contents_of
from quorate_coordinator.gather import Gatherer
from quorate_coordinator.serving import first_of, refuse_streams
from quorate_protocol import __version__
from quorate_protocol.blobs import Blob, BlobStore, make_blob
from quorate_protocol.bulk import BulkInbox, header_for, patience_s, ref_to, send_blob
from quorate_protocol.channel import Channel
from quorate_protocol.errors import (
    BodyNotReceived,
    BodyTooLarge,
    CallFailed,
    Code,
    FrameTooLarge,
    ProtocolError,
    QuorateError,
    SpoolError,
    StoppedByPeer,
    StreamError,
    UnexpectedMessage,
)
from quorate_protocol.fields import BodyRef
from quorate_protocol.limits import BODY_BYTES_MAX, STREAMS_MAX
from quorate_protocol.messages import (
    Agents,
    Ask,
    Bulk,
    BulkOf,
    CallError,
    DrainAgent,
    Draining,
    Fleet,
    Goodbye,
    Hello,
    Message,
    Opened,
    Outcome,
    Part,
    Reveal,
    Welcome,
    clip_text,
)
from quorate_protocol.transport import BiStream, Connection, Priority

log = structlog.get_logger()

#: How long an operator may take to acknowledge an answer, in seconds. Its stream is given up then: longer than a
#: connection lives without a word, so that an answer outlasts every break that its connection does.
_ACKNOWLEDGE_TIMEOUT_S: Final = 35.0

#: Calls of one operator that may be under way; one more is refused as busy. As many as the transport lets
#: a peer have open at first.
CALLS_MAX: Final = STREAMS_MAX

#: With what a stream is refused that an operator has no use for.
_SURPLUS: Final = Code.UNEXPECTED_MESSAGE

#: Characters of an agent's error that stay where an outcome has no room for all.
_ERROR_CHARS_LEFT: Final = 200

#: What a reference takes in a frame in place of a body, in bytes, at the most.
_REFERENCE_BYTES: Final = 80

T = TypeVar("T")
RequestT = TypeVar("RequestT", Ask, Reveal)


@dataclass(slots=True)
class _Call:
    """One call and whoever makes it."""

    connection: Connection
    channel: Channel
    caller: Hello
    #: The large bodies that its operator sends.
    inbox: BulkInbox
    #: Digests of the large bodies that it has been sent.
    sent: set[bytes] = field(default_factory=set)


class Operators:
    """Serves operators and observers."""

    def __init__(
        self,
        gatherer: Gatherer,
        list_fleet: Callable[[], Fleet],
        drain_agent: Callable[[str, str], None],
        *,
        store: BlobStore,
        bodies_refused_total: Counter[str],
        pulse_s: float,
        lease_s: float,
        handshakes_total: Counter[str],
        protocol_errors_total: Counter[str],
    ) -> None:
        self._gatherer = gatherer
        self._list_fleet = list_fleet
        self._drain_agent = drain_agent
        self._store = store
        self._bodies_refused_total = bodies_refused_total
        self._pulse_s = pulse_s
        self._lease_s = lease_s
        self._handshakes_total = handshakes_total
        self._protocol_errors_total = protocol_errors_total
        #: Calls whose request has come: what is owed.
        self._owed: set[asyncio.Task[None]] = set()
        #: (call, result): totals since the start. The result is `ok`, `withdrawn` or the error's reason.
        self.calls_total: Counter[tuple[str, str]] = Counter()

    async def serve(self, connection: Connection, control: Channel, hello: Hello) -> None:
        """An authenticated operator's connection, until it is closed.

        Raises:
            ProtocolError: it broke the protocol on its control stream; the connection is to be closed.
        """
        self._handshakes_total["welcome"] += 1
        reason = ""
        calls: set[asyncio.Task[None]] = set()
        inbox = BulkInbox(
            self._store,
            is_wanted=self._is_wanted,
            on_fault=self._count_fault,
            on_unclaimed=lambda ref: self._bodies_refused_total.update(("unreferenced",)),
        )
        try:
            await control.send(
                Welcome(
                    session=f"{hello.role}:{hello.id}"[:255],
                    software=f"quorate/{__version__}",
                    pulse_s=self._pulse_s,
                    lease_s=self._lease_s,
                )
            )
            log.info("operator_joined", operator=hello.id, role=hello.role, address=connection.peer)
            reason = await first_of(
                _read_control(control),
                self._accept_calls(connection, hello, inbox, calls),
                self._accept_bodies(connection, hello, inbox),
            )
        except ProtocolError as error:
            reason = str(error)
            raise
        except QuorateError as error:
            reason = str(connection.close_error or error)
        finally:
            log.info("operator_left", operator=hello.id, reason=reason)
            # Nobody is there to hear an answer: its rounds are cancelled.
            for call in calls:
                call.cancel()
            inbox.close()

    async def finish(self, timeout_s: float) -> None:
        """Waits until the calls under way are answered and the answers have arrived."""
        if self._owed:
            await asyncio.wait(self._owed, timeout=timeout_s)

    async def _accept_bodies(self, connection: Connection, hello: Hello, inbox: BulkInbox) -> str:
        if hello.role == "observer":
            return await refuse_streams(connection.accept_uni_stream, _SURPLUS, on_refused=self._count_surplus)
        await inbox.serve(connection)
        return "the connection is over"

    def _is_wanted(self, header: Bulk) -> bool:
        return header.of in ("ask", "reveal") and header.size <= self._store.size_bytes_max

    def _count_fault(self, error: ProtocolError) -> None:
        self._protocol_errors_total[error.code.name] += 1
        log.warning("stream_broke_protocol", problem=str(error))

    async def _accept_calls(
        self, connection: Connection, hello: Hello, inbox: BulkInbox, calls: set[asyncio.Task[None]]
    ) -> str:
        unanswered: set[int] = set()
        while True:
            stream = await connection.accept_bi_stream()
            if len(unanswered) >= CALLS_MAX:
                await _answer_busy(stream)
                continue
            unanswered.add(stream.id)
            made = _Call(connection, Channel(stream), hello, inbox)
            call = asyncio.create_task(self._serve_call(made, unanswered), name=f"call {stream.id}")
            calls.add(call)
            call.add_done_callback(calls.discard)

    def _count_surplus(self) -> None:
        self._protocol_errors_total[_SURPLUS.name] += 1

    async def _serve_call(self, call: _Call, unanswered: set[int]) -> None:
        channel = call.channel
        stream = channel.stream
        stream.priority = Priority.HIGH
        this = asyncio.current_task()
        assert this is not None
        try:
            request = await channel.receive()
            if request is None:
                raise UnexpectedMessage("no", "on a call stream")
            self._owed.add(this)
            answer, frame = await _fit(await self._answer(call, request))
            await stream.send(frame)
            if isinstance(answer, Outcome):
                await _send_contents(call, answer)
            await channel.finish()
            unanswered.discard(stream.id)
            async with asyncio.timeout(_ACKNOWLEDGE_TIMEOUT_S):
                await channel.receive()
        except ProtocolError as error:
            self._protocol_errors_total[error.code.name] += 1
            log.warning("call_broke_protocol", problem=str(error))
            channel.abort(error.code)
        except (QuorateError, TimeoutError) as error:
            log.debug("call_ended_early", reason=str(error))
            channel.abort(Code.CANCELLED)
        except Exception:
            log.exception("call_failed")
            channel.abort(Code.INTERNAL)
        finally:
            self._owed.discard(this)
            unanswered.discard(stream.id)

    async def _answer(self, made: _Call, request: Message) -> Message:
        """The answer to a request; an error where it cannot be done.

        Raises:
            UnexpectedMessage: no request, or more than one.
            StreamError, LinkError: it was withdrawn.
        """
        call = request.wire_type
        if not isinstance(request, Ask | Reveal | Agents | DrainAgent):
            raise UnexpectedMessage(call, "on a call stream")
        try:
            if made.caller.role == "observer" and not isinstance(request, Agents):
                raise CallFailed("forbidden", f"an observer may not {call}")
            match request:
                case Ask():
                    answer: Message = await self._ask(made, request)
                case Reveal():
                    answer = await self._gatherer.reveal(await self._with_body(made, request))
                case DrainAgent(agent=agent, reason=reason):
                    self._drain_agent(agent, reason)
                    answer = Draining(agent=agent)
                case Agents():
                    answer = self._list_fleet()
        except CallFailed as error:
            self.calls_total[call, error.reason] += 1
            return CallError(reason=error.reason, message=clip_text(error.message), retry=error.retry)
        except (QuorateError, asyncio.CancelledError):
            self.calls_total[call, "withdrawn"] += 1
            raise
        except Exception:
            log.exception("call_failed", call=call)
            self.calls_total[call, "internal"] += 1
            return CallError(reason="internal", message=f"the coordinator failed to {call}; its log says more")
        self.calls_total[call, "ok"] += 1
        return answer

    async def _with_body(self, made: _Call, request: RequestT) -> RequestT:
        """A request whose body is here, once it is.

        Raises:
            CallFailed: it is not what was announced, or there is no room for it.
            StreamError, LinkError: it was withdrawn.
        """
        ref = request.bulk
        if ref is None:
            return request
        try:
            if ref.size > self._store.size_bytes_max:
                raise BodyTooLarge(ref.size, self._store.size_bytes_max)
            blob = await made.inbox.get(ref, patience_s(ref))
        except (ProtocolError, SpoolError, BodyNotReceived) as error:
            self._bodies_refused_total[refusal_of(error)] += 1
            log.warning("body_refused", operator=made.caller.id, call=request.wire_type, reason=str(error))
            is_ours = isinstance(error, SpoolError)
            raise CallFailed("busy" if is_ours else "bad-request", explain_refusal(error, ref), retry=is_ours) from None
        if ref.size > BODY_BYTES_MAX:
            return request.model_copy(update={"bulk": ref.with_content(blob)})
        key = "truth" if isinstance(request, Reveal) else "body"
        return request.model_copy(update={key: bytes(blob.view()), "bulk": None})

    async def _ask(self, made: _Call, ask: Ask) -> Message:
        """A round, from its question to its outcome; its operator may give it up before."""
        watching = asyncio.ensure_future(made.channel.receive())
        try:
            told: asyncio.Queue[Opened | Part | None] = asyncio.Queue()  # bounded by the round's agents
            listener = told.put_nowait if ask.stream else None
            asking = None
            if ask.bulk is not None:
                # What was asked before need not be sent once more.
                asking = await self._gatherer.find_asked(ask, listener)
                if asking is not None:
                    made.inbox.refuse(ask.bulk)
                else:
                    ask = await _unless_withdrawn(watching, self._with_body(made, ask))
            if asking is None:
                asking = await self._gatherer.ask(ask, made.caller.id, listener)
            # Whatever is raised from here on holds this frame: not the question with it.
            del ask
            return await _follow(made, asking, told, watching, listener)
        finally:
            watching.cancel()
            await asyncio.wait((watching,))
            if not watching.cancelled():
                watching.exception()


async def _follow(
    made: _Call,
    asking: Asking,
    told: "asyncio.Queue[Opened | Part | None]",
    watching: "asyncio.Future[Message | None]",
    listener: Listener | None,
) -> Outcome:
    """The outcome of a round that was joined, after all that a streamed call is told before."""
    telling = asyncio.ensure_future(_tell(made, told))
    try:
        await asyncio.wait((asking.outcome, watching, telling), return_when=asyncio.FIRST_COMPLETED)
        if not asking.outcome.done():
            _check_not_withdrawn(watching)
            if telling.done():
                telling.result()
        outcome = await asyncio.shield(asking.outcome)
        _skip_parts(told)
        told.put_nowait(None)
        await telling
        return outcome
    finally:
        # First of all: the connection's end cancels this once more while it waits. Who resets the call
        # withdraws it, also where the connection ends right after.
        if _is_withdrawn(watching, telling):
            asking.withdraw(listener)
        else:
            asking.leave(listener)
        telling.cancel()
        await asyncio.wait((telling,))
        if not telling.cancelled():
            telling.exception()


def _skip_parts(told: "asyncio.Queue[Opened | Part | None]") -> None:
    """Leaves out what a slow reader has not got to. The outcome has it again, and no round's bound holds it now."""
    waiting = [told.get_nowait() for _ in range(told.qsize())]
    for message in waiting:
        if isinstance(message, Opened):
            told.put_nowait(message)


def _check_not_withdrawn(watching: "asyncio.Future[Message | None]") -> None:
    """An operator may finish its side early and go on listening; a reset raises here."""
    if not watching.done():
        return
    error = watching.exception()
    if error is not None:
        # Afresh: the future keeps its own, which would keep all frames from here up.
        raise error.again() if isinstance(error, QuorateError) else error
    if watching.result() is not None:
        raise UnexpectedMessage("second", "on a call stream")


def _is_withdrawn(watching: "asyncio.Future[Message | None]", telling: "asyncio.Future[None]") -> bool:
    """Whether the operator has reset or stopped the call's stream, or broken the protocol on it."""
    for task in (watching, telling):
        if task.done() and not task.cancelled():
            error = task.exception()
            if isinstance(error, StreamError | ProtocolError) or (error is None and task.result() is not None):
                return True
    return False


async def _unless_withdrawn(watching: "asyncio.Future[Message | None]", work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is given up when the call is.

    Raises:
        StreamError, LinkError: it was withdrawn.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task, watching), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            _check_not_withdrawn(watching)
        return await task
    finally:
        task.cancel()
        await asyncio.wait((task,))
        if not task.cancelled():
            task.exception()


async def _tell(made: _Call, told: "asyncio.Queue[Opened | Part | None]") -> None:
    """Sends what a streamed call is told, as fast as its operator reads, up to a None.

    Raises:
        StreamError, LinkError: nobody reads.
    """
    while (message := await told.get()) is not None:
        try:
            frame = message.to_frame()
        except FrameTooLarge:
            if not isinstance(message, Opened):
                raise
            frame = message.model_copy(update={"selected": []}).to_frame()  # very many agents: the outcome names them
        await made.channel.stream.send(frame)
        if isinstance(message, Part) and (ref := message.result.bulk) is not None and isinstance(ref.content, Blob):
            await _send_content(made, ref, ref.content, "part", message.round)


async def _send_contents(made: _Call, outcome: Outcome) -> None:
    """Sends the large bodies of an outcome that were not sent before; less, when its operator has had enough.

    Raises:
        StreamError, LinkError: nobody reads.
    """
    contents = contents_of(outcome, made.sent)
    if not contents:
        return

    async def send_all() -> None:
        for ref, blob in contents.items():
            await _send_content(made, ref, blob, "outcome", outcome.round)

    watching = asyncio.ensure_future(made.channel.receive())
    sending = asyncio.ensure_future(send_all())
    try:
        await asyncio.wait((watching, sending), return_when=asyncio.FIRST_COMPLETED)
        (sending if sending.done() else watching).result()
    finally:
        for task in (watching, sending):
            task.cancel()
        await asyncio.wait((watching, sending))
        for task in (watching, sending):
            if not task.cancelled():
                task.exception()


async def _send_content(made: _Call, ref: BodyRef, blob: Blob, of: BulkOf, round_id: int) -> None:
    made.sent.add(ref.digest)
    try:
        async with asyncio.timeout(patience_s(ref)):
            await send_blob(made.connection, blob, header_for(blob, of, round=round_id))
    except TimeoutError:
        raise
    except StoppedByPeer as error:
        log.debug("body_not_wanted", operator=made.caller.id, round=round_id, reason=str(error))
    except OSError as error:
        log.error("body_not_read", round=round_id, problem=str(error))


async def _read_control(control: Channel) -> str:
    while (message := await control.receive()) is not None:
        if not isinstance(message, Goodbye):
            raise UnexpectedMessage(message.wire_type, "on the control stream")
        return "said goodbye"
    return "finished its control stream"


async def _answer_busy(stream: BiStream) -> None:
    """Answers a call without looking at it."""
    message = f"{CALLS_MAX} calls of this connection are under way, as many as may be"
    try:
        stream.send_nowait(CallError(reason="busy", message=message, retry=True).to_frame())
        await stream.finish()
        stream.stop(Code.BUSY)
    except QuorateError as error:
        log.debug("call_ended_early", reason=str(error))


async def _fit(answer: Message) -> tuple[Message, bytes]:
    """The answer as it is told, and its frame. What does not fit inline goes on streams of its own."""
    try:
        return answer, answer.to_frame()
    except FrameTooLarge as error:
        if isinstance(answer, Outcome):
            return await _move_out(answer)
        message = f"the answer of {error.frame_bytes} bytes is over the {error.frame_bytes_max} that a frame may have"
        failure = CallError(reason="internal", message=message)
        return failure, failure.to_frame()


async def _move_out(outcome: Outcome) -> tuple[Message, bytes]:
    """The outcome with its largest inline bodies on streams of their own, as many as have to go."""
    results = [result.model_copy(update={"error": result.error[:_ERROR_CHARS_LEFT]}) for result in outcome.results]
    outcome = outcome.model_copy(update={"results": results})
    excess_bytes = _excess_bytes(outcome)
    moved: dict[bytes, BodyRef] = {}
    bodies = {body for body in (outcome.answer, *(result.body for result in results)) if body}
    for body in sorted(bodies, key=len, reverse=True):
        if excess_bytes <= 0 or len(body) <= _REFERENCE_BYTES:
            break
        blob = await make_blob([body])
        moved[body] = ref_to(blob).with_content(blob)
        places = (outcome.answer == body) + sum(result.body == body for result in results)
        excess_bytes -= places * (len(body) - _REFERENCE_BYTES)
    for at, result in enumerate(results):
        if result.body in moved:
            results[at] = result.model_copy(update={"body": None, "bulk": moved[result.body]})
    if outcome.answer in moved:
        outcome = outcome.model_copy(update={"answer": None, "bulk": moved[outcome.answer]})
    try:
        return outcome, outcome.to_frame()
    except FrameTooLarge:
        message = f"round {outcome.round} is {outcome.state}, but its {len(results)} results are over one frame"
        failure = CallError(reason="internal", message=message)
        return failure, failure.to_frame()


def _excess_bytes(outcome: Outcome) -> int:
    try:
        outcome.to_frame()
    except FrameTooLarge as error:
        return error.frame_bytes - error.frame_bytes_max
    return 0

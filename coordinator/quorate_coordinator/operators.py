"""Operators' calls: each on a stream of its own, answered by one message."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, TypeVar

import structlog

from quorate_coordinator.agent_bodies import explain_refusal, refusal_of
from quorate_coordinator.asking import Asking
from quorate_coordinator.fitting import fit
from quorate_coordinator.gather import Gatherer
from quorate_coordinator.serving import first_of, refuse_streams
from quorate_coordinator.telling import AllUntaken, Call, Told, Untaken, end, result_of, send_answer
from quorate_protocol import __version__
from quorate_protocol.blobs import BlobStore
from quorate_protocol.bulk import BulkInbox, patience_s
from quorate_protocol.channel import Channel
from quorate_protocol.errors import (
    BodyNotReceived,
    BodyTooLarge,
    CallFailed,
    Code,
    ProtocolError,
    QuorateError,
    SpoolError,
    StreamError,
    UnexpectedMessage,
)
from quorate_protocol.limits import BODY_BYTES_MAX, STREAMS_MAX
from quorate_protocol.messages import (
    Agents,
    Ask,
    Bulk,
    CallError,
    DrainAgent,
    Draining,
    Fleet,
    Goodbye,
    Hello,
    Message,
    Reveal,
    Welcome,
    clip_text,
)
from quorate_protocol.taking import while_taken
from quorate_protocol.transport import BiStream, Connection, Priority

log = structlog.get_logger()

#: How long an operator may take nothing of an answer, and not acknowledge it, in seconds. Its stream is given up then:
#: longer than a connection lives without a word, so that an answer outlasts every break that its connection does.
_ACKNOWLEDGE_TIMEOUT_S: Final = 35.0

#: Calls of one operator that may be under way; one more is refused as busy. As many as the transport lets
#: a peer have open at first.
CALLS_MAX: Final = STREAMS_MAX

#: With what a stream is refused that an operator has no use for.
_SURPLUS: Final = Code.UNEXPECTED_MESSAGE

#: All connections together may hold so large a part of the spool, untaken: half of what one agent may, whose answers
#: they may all be.
_UNTAKEN_SHARE: Final = 4

T = TypeVar("T")
RequestT = TypeVar("RequestT", Ask, Reveal)


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
        self._untaken = AllUntaken(store.budget.disk_bytes_max // _UNTAKEN_SHARE)
        self._bodies_refused_total = bodies_refused_total
        self._pulse_s = pulse_s
        self._lease_s = lease_s
        self._handshakes_total = handshakes_total
        self._protocol_errors_total = protocol_errors_total
        #: Calls whose request has come: what is owed.
        self._owed: set[asyncio.Task[None]] = set()
        #: (call, result): totals since the start. The result is `ok`, `withdrawn` or the error's reason; and `untaken`,
        #: once more, of answers that were given up because their operators did not take them.
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
            self._store.for_peer(),
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
        untaken = Untaken(self._untaken)
        while True:
            stream = await connection.accept_bi_stream()
            if len(unanswered) >= CALLS_MAX:
                await _answer_busy(stream)
                continue
            unanswered.add(stream.id)
            made = Call(connection, Channel(stream), hello, inbox, untaken)
            call = asyncio.create_task(self._serve_call(made, unanswered), name=f"call {stream.id}")
            calls.add(call)
            call.add_done_callback(calls.discard)

    def _count_surplus(self) -> None:
        self._protocol_errors_total[_SURPLUS.name] += 1

    async def _serve_call(self, call: Call, unanswered: set[int]) -> None:
        channel = call.channel
        stream = channel.stream
        stream.priority = Priority.HIGH
        this = asyncio.current_task()
        assert this is not None
        request: Message | None = None
        try:
            request = await channel.receive()
            if request is None:
                raise UnexpectedMessage("no", "on a call stream")
            self._owed.add(this)
            await _give(call, await self._answer(call, request))
            unanswered.discard(stream.id)
            async with while_taken(stream, _ACKNOWLEDGE_TIMEOUT_S):
                await channel.receive()
        except ProtocolError as error:
            self._protocol_errors_total[error.code.name] += 1
            log.warning("call_broke_protocol", problem=str(error))
            channel.abort(error.code)
        except QuorateError as error:
            log.debug("call_ended_early", reason=str(error))
            channel.abort(Code.CANCELLED)
        except TimeoutError:
            self.calls_total["" if request is None else request.wire_type, "untaken"] += 1
            log.warning("answer_not_taken", operator=call.caller.id)
            channel.abort(Code.CANCELLED)
        except Exception:
            log.exception("call_failed")
            channel.abort(Code.INTERNAL)
        finally:
            self._owed.discard(this)
            unanswered.discard(stream.id)

    async def _answer(self, made: Call, request: Message) -> Message | Asking:
        """The answer to a request, or the round that has it; an error where it cannot be done.

        Raises:
            UnexpectedMessage: no request, or more than one.
            StreamError, LinkError: it was withdrawn.
            TimeoutError: its operator took nothing of what it was told before the answer.
        """
        call = request.wire_type
        if not isinstance(request, Ask | Reveal | Agents | DrainAgent):
            raise UnexpectedMessage(call, "on a call stream")
        try:
            if made.caller.role == "observer" and not isinstance(request, Agents):
                raise CallFailed("forbidden", f"an observer may not {call}")
            with _refusing_body(made, request):
                made.untaken.check_room()
            match request:
                case Ask():
                    answer: Message | Asking = await self._ask(made, request)
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
        except TimeoutError:
            raise
        except Exception:
            log.exception("call_failed", call=call)
            self.calls_total[call, "internal"] += 1
            return CallError(reason="internal", message=f"the coordinator failed to {call}; its log says more")
        self.calls_total[call, "ok"] += 1
        return answer

    async def _with_body(self, made: Call, request: RequestT) -> RequestT:
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
            blob = await made.inbox.get(ref, patience_s(ref), call=made.id)
        except (ProtocolError, SpoolError, BodyNotReceived) as error:
            self._bodies_refused_total[refusal_of(error)] += 1
            log.warning("body_refused", operator=made.caller.id, call=request.wire_type, reason=str(error))
            is_ours = isinstance(error, SpoolError)
            raise CallFailed("busy" if is_ours else "bad-request", explain_refusal(error, ref), retry=is_ours) from None
        if ref.size > BODY_BYTES_MAX:
            return request.model_copy(update={"bulk": ref.with_content(blob)})
        key = "truth" if isinstance(request, Reveal) else "body"
        return request.model_copy(update={key: bytes(blob.view()), "bulk": None})

    async def _ask(self, made: Call, ask: Ask) -> Asking:
        """A round, from its question to its outcome; its operator may give it up before."""
        watch = _Watch(made.channel)
        told = Told(made.untaken) if ask.stream else None
        listener = None if told is None else told.put
        try:
            asking = None
            if ask.bulk is not None:
                # What was asked before need not be sent once more, nor what cannot be asked now.
                with _refusing_body(made, ask):
                    asking = await self._gatherer.find_asked(ask, listener)
                if asking is not None:
                    made.inbox.refuse(ask.bulk, call=made.id)
                else:
                    ask = await watch.unless_withdrawn(self._with_body(made, ask))
            if asking is None:
                asking = await self._gatherer.ask(ask, made.caller.id, listener)
            # Whatever is raised from here on holds this frame: not the question with it.
            del ask
            await _follow(made, asking, told, watch)
            return asking
        finally:
            if told is not None:
                told.close()
            await watch.close()


@contextlib.contextmanager
def _refusing_body(call: Call, request: Message) -> Iterator[None]:
    """A request that fails in here does so before its body is taken: what comes of it is stopped."""
    try:
        yield
    except CallFailed:
        if isinstance(request, Ask | Reveal) and request.bulk is not None:
            call.inbox.refuse(request.bulk, call=call.id)
        raise


async def _give(call: Call, what: Message | Asking) -> None:
    """Sends an answer; it counts as untaken from when it is there."""
    with call.untaken.holding(what.outcome.result() if isinstance(what, Asking) else what):
        answer, frame = await (what.fitted() if isinstance(what, Asking) else fit(what))
        with call.untaken.holding(frame):
            await send_answer(call, answer, frame)
            await call.channel.finish()


async def _follow(call: Call, asking: Asking, told: Told | None, watch: "_Watch") -> None:
    """A round that was joined, up to its outcome, and all that a streamed call is told before that."""
    telling = None if told is None else asyncio.ensure_future(told.send(call))
    try:
        if asking.outcome.done():
            # Told again, it may be large; it can be asked for later.
            call.untaken.check_room()
        await watch.until(asking.outcome, *([] if telling is None else [telling]))
        outcome = await asyncio.shield(asking.outcome)
        if told is not None and telling is not None:
            told.end()
            with call.untaken.holding(outcome):
                await asyncio.wait((telling,))
            result_of(telling)
    finally:
        # First of all: the connection's end cancels this once more while it waits. Who resets or stops the call
        # withdraws it, also where the connection ends right after.
        listener = None if told is None else told.put
        if watch.is_withdrawn:
            asking.withdraw(listener)
        else:
            asking.leave(listener)
        if telling is not None:
            await end(telling)


class _Watch:
    """Whether an operator still wants its call: it withdraws it by resetting or stopping the stream.

    It may finish its side early, and go on listening.
    """

    def __init__(self, channel: Channel) -> None:
        self._reading = asyncio.ensure_future(channel.receive())
        self._stopped = channel.stream.send_failed

    @property
    def is_withdrawn(self) -> bool:
        """Whether it has, or has broken the protocol on the stream; the end of its connection is neither."""
        if self._stopped.done() and isinstance(self._stopped.result(), StreamError):
            return True
        if not self._reading.done() or self._reading.cancelled():
            return False
        error = self._reading.exception()
        return isinstance(error, StreamError | ProtocolError) or (error is None and self._reading.result() is not None)

    async def until(self, wanted: "asyncio.Future[Any]", *others: "asyncio.Future[Any]") -> None:
        """Returns when something has come to an end, however.

        Raises:
            StreamError, LinkError: the call was withdrawn.
            UnexpectedMessage: a second request came.
            And what the others raise.
        """
        while not wanted.done():
            self._check()
            for other in others:
                if other.done():
                    result_of(other)
            waiting = [one for one in (wanted, self._reading, self._stopped, *others) if not one.done()]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

    async def unless_withdrawn(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, which is given up when the call is. Raises: as `until`."""
        task = asyncio.ensure_future(work)
        try:
            await self.until(task)
            return task.result()
        finally:
            await end(task)

    async def close(self) -> None:
        """Looks no more."""
        await end(self._reading)

    def _check(self) -> None:
        if self._stopped.done():
            raise self._stopped.result().again()
        if self._reading.done() and result_of(self._reading) is not None:
            raise UnexpectedMessage("second", "on a call stream")


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

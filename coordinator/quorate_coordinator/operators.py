"""Operators' calls: each on a stream of its own, answered by one message."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog

from quorate_coordinator.gather import Gatherer
from quorate_coordinator.serving import first_of, refuse_streams
from quorate_protocol import __version__
from quorate_protocol.channel import Channel
from quorate_protocol.errors import (
    CallFailed,
    Code,
    FrameTooLarge,
    ProtocolError,
    QuorateError,
    StreamError,
    UnexpectedMessage,
)
from quorate_protocol.limits import STREAMS_MAX
from quorate_protocol.messages import (
    Agents,
    Ask,
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

#: How long an operator may take to acknowledge an answer, in seconds. Its stream is given up then.
_ACKNOWLEDGE_TIMEOUT_S: Final = 5.0

#: Calls of one operator that may be under way; one more is refused as busy. As many as the transport lets
#: a peer have open at first.
CALLS_MAX: Final = STREAMS_MAX

#: With what a stream is refused that an operator has no use for.
_SURPLUS: Final = Code.UNEXPECTED_MESSAGE

#: Characters of an agent's error that stay where an outcome has no room for all.
_ERROR_CHARS_LEFT: Final = 200

#: More than the keys and lengths of one result's body and error take in a frame.
_RESULT_KEYS_BYTES: Final = 32


class Operators:
    """Serves operators and observers."""

    def __init__(
        self,
        gatherer: Gatherer,
        list_fleet: Callable[[], Fleet],
        drain_agent: Callable[[str, str], None],
        *,
        pulse_s: float,
        lease_s: float,
        handshakes_total: Counter[str],
        protocol_errors_total: Counter[str],
    ) -> None:
        self._gatherer = gatherer
        self._list_fleet = list_fleet
        self._drain_agent = drain_agent
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
                self._accept_calls(connection, hello, calls),
                refuse_streams(connection.accept_uni_stream, _SURPLUS, on_refused=self._count_surplus),
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

    async def finish(self, timeout_s: float) -> None:
        """Waits until the calls under way are answered and the answers have arrived."""
        if self._owed:
            await asyncio.wait(self._owed, timeout=timeout_s)

    async def _accept_calls(self, connection: Connection, hello: Hello, calls: set[asyncio.Task[None]]) -> str:
        unanswered: set[int] = set()
        while True:
            stream = await connection.accept_bi_stream()
            if len(unanswered) >= CALLS_MAX:
                await _answer_busy(stream)
                continue
            unanswered.add(stream.id)
            call = asyncio.create_task(self._serve_call(stream, hello, unanswered), name=f"call {stream.id}")
            calls.add(call)
            call.add_done_callback(calls.discard)

    def _count_surplus(self) -> None:
        self._protocol_errors_total[_SURPLUS.name] += 1

    async def _serve_call(self, stream: BiStream, caller: Hello, unanswered: set[int]) -> None:
        channel = Channel(stream)
        stream.priority = Priority.HIGH
        this = asyncio.current_task()
        assert this is not None
        try:
            request = await channel.receive()
            if request is None:
                raise UnexpectedMessage("no", "on a call stream")
            self._owed.add(this)
            answer = await self._answer(channel, request, caller)
            await stream.send(_fit(answer))
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

    async def _answer(self, channel: Channel, request: Message, caller: Hello) -> Message:
        """The answer to a request; an error where it cannot be done.

        Raises:
            UnexpectedMessage: no request, or more than one.
            StreamError, LinkError: it was withdrawn.
        """
        call = request.wire_type
        if not isinstance(request, Ask | Reveal | Agents | DrainAgent):
            raise UnexpectedMessage(call, "on a call stream")
        try:
            if caller.role == "observer" and not isinstance(request, Agents):
                raise CallFailed("forbidden", f"an observer may not {call}")
            match request:
                case Ask():
                    answer: Message = await self._ask(channel, request, caller.id)
                case Reveal():
                    answer = await self._gatherer.reveal(request)
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

    async def _ask(self, channel: Channel, ask: Ask, operator: str) -> Message:
        """A round, from its opening to its outcome; its operator may give it up before."""
        told: asyncio.Queue[Opened | Part | None] = asyncio.Queue()  # bounded by the round's agents
        listener = told.put_nowait if ask.stream else None
        asking = self._gatherer.ask(ask, operator, listener)
        telling = asyncio.ensure_future(_tell(channel, told))
        watching = asyncio.ensure_future(channel.receive())
        try:
            await asyncio.wait((asking.outcome, watching, telling), return_when=asyncio.FIRST_COMPLETED)
            if not asking.outcome.done():
                # It may finish its side early and go on listening; a reset raises here.
                if watching.done() and watching.result() is not None:
                    raise UnexpectedMessage("second", "on a call stream")
                if telling.done():
                    telling.result()
            outcome = await asyncio.shield(asking.outcome)
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
            for task in (watching, telling):
                task.cancel()
            await asyncio.wait((watching, telling))
            for task in (watching, telling):
                if not task.cancelled():
                    task.exception()


def _is_withdrawn(watching: "asyncio.Future[Message | None]", telling: "asyncio.Future[None]") -> bool:
    """Whether the operator has reset or stopped the call's stream, or broken the protocol on it."""
    for task in (watching, telling):
        if task.done() and not task.cancelled():
            error = task.exception()
            if isinstance(error, StreamError | ProtocolError) or (error is None and task.result() is not None):
                return True
    return False


async def _tell(channel: Channel, told: "asyncio.Queue[Opened | Part | None]") -> None:
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
        await channel.stream.send(frame)


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


def _fit(answer: Message) -> bytes:
    """The answer's frame. What does not fit is told without the details: a round that has been is not lost."""
    try:
        return answer.to_frame()
    except FrameTooLarge as error:
        if isinstance(answer, Outcome):
            return _trim(answer)
        message = f"the answer of {error.frame_bytes} bytes is over the {error.frame_bytes_max} that a frame may have"
        return CallError(reason="internal", message=message).to_frame()


def _trim(outcome: Outcome) -> bytes:
    """The outcome without the largest of its agents' bodies, as many as have to go; the combined answer stays."""
    results = [result.model_copy(update={"error": result.error[:_ERROR_CHARS_LEFT]}) for result in outcome.results]
    excess_bytes = 0
    try:
        return outcome.model_copy(update={"results": results}).to_frame()
    except FrameTooLarge as error:
        excess_bytes = error.frame_bytes - error.frame_bytes_max
    for size_bytes, place in sorted(((len(result.body or b""), i) for i, result in enumerate(results)), reverse=True):
        why = f"its answer of {size_bytes} bytes is left out: the outcome has no room for it"
        saved_bytes = size_bytes - len(why) - _RESULT_KEYS_BYTES
        if excess_bytes <= 0 or saved_bytes <= 0:
            break
        results[place] = results[place].model_copy(update={"body": None, "error": why})
        excess_bytes -= saved_bytes
    try:
        return outcome.model_copy(update={"results": results}).to_frame()
    except FrameTooLarge:
        message = f"round {outcome.round} is {outcome.state}, but its {len(results)} results are over one frame"
        return CallError(reason="internal", message=message).to_frame()

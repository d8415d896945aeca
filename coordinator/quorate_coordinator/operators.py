"""Operators' calls: each on a stream of its own, answered by one message."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog

from quorate_coordinator.gather import Gatherer
from quorate_protocol import __version__
from quorate_protocol.channel import Channel
from quorate_protocol.errors import (
    CallFailed,
    Code,
    LinkError,
    ProtocolError,
    QuorateError,
    StreamError,
    UnexpectedMessage,
)
from quorate_protocol.messages import Agents, Ask, CallError, Fleet, Hello, Message, Reveal, Role, Welcome
from quorate_protocol.transport import BiStream, Connection, Priority

log = structlog.get_logger()

#: How long an operator may take to acknowledge an answer, in seconds. Its stream is given up then.
_ACKNOWLEDGE_TIMEOUT_S: Final = 5.0


class Operators:
    """Serves operators and observers."""

    def __init__(self, gatherer: Gatherer, list_fleet: Callable[[], Fleet], *, pulse_s: float, lease_s: float) -> None:
        self._gatherer = gatherer
        self._list_fleet = list_fleet
        self._pulse_s = pulse_s
        self._lease_s = lease_s
        self._calls: set[asyncio.Task[None]] = set()
        #: (call, result): totals since the start. The result is `ok` or the error's reason.
        self.calls_total: Counter[tuple[str, str]] = Counter()
        #: By wire code: calls that broke the format.
        self.protocol_errors_total: Counter[str] = Counter()

    async def serve(self, connection: Connection, control: Channel, hello: Hello) -> None:
        """An authenticated operator's connection, until it is closed."""
        await control.send(
            Welcome(
                session=f"{hello.role}:{hello.id}"[:255],
                software=f"quorate/{__version__}",
                pulse_s=self._pulse_s,
                lease_s=self._lease_s,
            )
        )
        log.info("operator_joined", operator=hello.id, role=hello.role, address=connection.peer)
        mine: set[asyncio.Task[None]] = set()
        try:
            while True:
                stream = await connection.accept_bi_stream()
                call = asyncio.create_task(self._serve_call(stream, hello.role), name=f"call {stream.id}")
                for calls in (mine, self._calls):
                    calls.add(call)
                    call.add_done_callback(calls.discard)
        except LinkError as error:
            log.info("operator_left", operator=hello.id, reason=str(error))
        finally:
            # Nobody is there to hear an answer: its rounds are cancelled.
            for call in mine:
                call.cancel()

    async def finish(self, timeout_s: float) -> None:
        """Waits until the calls under way are answered and the answers have arrived."""
        if self._calls:
            await asyncio.wait(self._calls, timeout=timeout_s)

    async def _serve_call(self, stream: BiStream, role: Role) -> None:
        channel = Channel(stream)
        stream.priority = Priority.HIGH
        try:
            request = await channel.receive()
            if request is None:
                raise UnexpectedMessage("no", "on a call stream")
            answer = await self._answer(channel, request, role)
            await channel.send(answer)
            await channel.finish()
            async with asyncio.timeout(_ACKNOWLEDGE_TIMEOUT_S):
                await channel.receive()
        except ProtocolError as error:
            self.protocol_errors_total[error.code.name] += 1
            log.warning("call_broke_protocol", problem=str(error))
            channel.abort(error.code)
        except (QuorateError, TimeoutError) as error:
            log.debug("call_ended_early", reason=str(error))
            channel.abort(Code.CANCELLED)
        except Exception:
            log.exception("call_failed")
            channel.abort(Code.INTERNAL)

    async def _answer(self, channel: Channel, request: Message, role: Role) -> Message:
        call = request.wire_type
        try:
            if role == "observer" and not isinstance(request, Agents):
                raise CallFailed("forbidden", f"an observer may not {call}")
            match request:
                case Ask():
                    answer: Message = await self._ask(channel, request)
                case Reveal():
                    answer = self._gatherer.reveal(request)
                case Agents():
                    answer = self._list_fleet()
                case _:
                    raise UnexpectedMessage(call, "on a call stream")
        except CallFailed as error:
            self.calls_total[call, error.reason] += 1
            return CallError(reason=error.reason, message=error.message, retry=error.retry)
        self.calls_total[call, "ok"] += 1
        return answer

    async def _ask(self, channel: Channel, ask: Ask) -> Message:
        """A round; withdrawn when the operator gives the stream up before its end."""
        asking = asyncio.ensure_future(self._gatherer.ask(ask))
        watching = asyncio.ensure_future(channel.receive())
        try:
            await asyncio.wait((asking, watching), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                try:
                    if watching.result() is not None:
                        raise UnexpectedMessage("second", "on a call stream")
                except StreamError:
                    raise
                # It finished its side early; it still listens.
            return await asking
        finally:
            asking.cancel()
            watching.cancel()
            await asyncio.wait((asking, watching))
            if not asking.cancelled():
                asking.exception()
            if not watching.cancelled():
                watching.exception()

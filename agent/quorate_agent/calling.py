"""Calls one handler: unpacks what came, measures the handler alone, packs what it returned, names how it ended."""

import time
from typing import Any

import structlog

from quorate_agent.agent import Context
from quorate_agent.events import HandlerDeclined, HandlerFailed, HandlerReturned, StartAssignment, StartFeedback
from quorate_agent.handlers import Declined, Handler
from quorate_protocol.blobs import Blob, blob_of, make_blob
from quorate_protocol.bodies import decode_body, encode_body_parts
from quorate_protocol.bulk import ref_to
from quorate_protocol.errors import FrameMalformed, LocalError
from quorate_protocol.fields import Body
from quorate_protocol.limits import BODY_BYTES_MAX, BULK_BYTES_MAX

log = structlog.get_logger()

#: How a handler ended.
Ended = HandlerReturned | HandlerDeclined | HandlerFailed
Start = StartAssignment | StartFeedback


def call(handler: Handler, start: Start, context: Context) -> Ended:
    """Runs a sync handler to its end, in the thread that calls this. Never raises."""
    clock = Stopwatch()
    try:
        arguments = _arguments(handler, start, context)
        clock.start()
        result = handler.function(*arguments)
        clock.stop()
        if hasattr(result, "__await__"):
            if hasattr(result, "close"):
                result.close()
            raise TypeError("the handler returned an awaitable; declare it with async def")
        parts = _encode(handler, result)
        return _returned(start, parts if isinstance(parts, bytes) else blob_of(parts), clock)
    except BaseException as error:  # noqa: BLE001  sys.exit() in a handler ends the handler, not its thread or process
        return _raised(handler, start, error, clock)


async def call_async(handler: Handler, start: Start, context: Context) -> Ended:
    """Runs an async handler to its end. Raises nothing but `CancelledError`."""
    clock = Stopwatch()
    try:
        arguments = _arguments(handler, start, context)
        clock.start()
        result = await handler.function(*arguments)
        clock.stop()
        parts = _encode(handler, result)
        return _returned(start, parts if isinstance(parts, bytes) else await make_blob(parts), clock)
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it is, it is the handler's
        return _raised(handler, start, error, clock)
    finally:
        if context.cancelled.is_set():
            for stream in context.opened:
                stream.give_up()


class Stopwatch:
    """Measures the handler alone, without unpacking, packing and changing threads."""

    def __init__(self) -> None:
        self._started: float | None = None
        self.elapsed_s = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        if self._started is not None:
            self.elapsed_s = time.perf_counter() - self._started
            self._started = None


def _arguments(handler: Handler, start: Start, context: Context) -> list[Any]:
    arguments = [_unpack("body", start.body)]
    if isinstance(start, StartFeedback):
        arguments.append(_unpack("truth", start.truth))
    if handler.wants_context:
        arguments.append(context)
    return arguments


def _unpack(what: str, body: Body) -> Any:
    try:
        if isinstance(body, bytes):
            return decode_body(body)
        assert body.content is not None, "work starts when its bodies are there"
        return decode_body(body.content.view())
    except FrameMalformed as error:
        raise Unusable(f"the {what} that came cannot be unpacked: {error}") from error
    except OSError as error:
        raise Unusable(f"the {what} that came cannot be read: {error}") from error


class Unusable(Exception):
    """What came or is to go cannot travel; told as it is, without a traceback."""


def _encode(handler: Handler, result: Any) -> bytes | list[bytes | memoryview]:
    """A small answer; or the parts of a large one, which are the memory of its arrays."""
    if handler.kind == "feedback":
        return b""
    try:
        parts = encode_body_parts(result)
    except LocalError as error:
        raise Unusable(f"the answer cannot be sent: {error}") from error
    size_bytes = sum(map(len, parts))
    if size_bytes > BULK_BYTES_MAX:
        raise Unusable(f"the answer of {size_bytes} bytes is over the {BULK_BYTES_MAX} that can travel")
    return parts if size_bytes > BODY_BYTES_MAX else b"".join(parts)


def _returned(start: Start, answer: bytes | Blob, clock: Stopwatch) -> Ended:
    body: Body = answer if isinstance(answer, bytes) else ref_to(answer).with_content(answer)
    return HandlerReturned(start.work, body, clock.elapsed_s)


def _raised(handler: Handler, start: Start, error: BaseException, clock: Stopwatch) -> Ended:
    clock.stop()
    if isinstance(error, Declined) and handler.kind == "task":
        return HandlerDeclined(start.work, error.reason, clock.elapsed_s)
    text = str(error) if isinstance(error, Unusable) else describe(error)
    log.error(
        "handler_failed",
        kind=handler.kind,
        task=start.task,
        round=start.round,
        error=text,
        exc_info=None if isinstance(error, Unusable) else error,
    )
    return HandlerFailed(start.work, text, clock.elapsed_s)


def describe(error: BaseException) -> str:
    """An exception in one line: its type and the first line of its text."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:  # noqa: BLE001  a __str__ that raises must not hide the error
        lines = []
    name = type(error).__qualname__
    return f"{name}: {lines[0]}" if lines else name

"""Runs handlers: sync ones in threads, async ones as tasks, and turns how they end into events."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import structlog

from quorate_agent.agent import Agent, Context
from quorate_agent.events import HandlerDeclined, HandlerFailed, HandlerReturned, StartAssignment, StartFeedback
from quorate_agent.handlers import Declined, Handler, inspect_handler
from quorate_agent.streams import StreamsSource
from quorate_agent.threads import HandlerThreads
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


class HandlerRunner:
    """Runs the handlers of one agent in the running event loop. `emit` is called in the loop, once for each start."""

    def __init__(
        self,
        agent: Agent,
        agent_id: str,
        threads_max: int,
        emit: Callable[[Ended], None],
        streams: StreamsSource,
    ) -> None:
        self._agent_id = agent_id
        self._streams = streams
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        self._task_handlers = {
            task: inspect_handler(function, task=task, kind="task") for task, function in agent.handlers.items()
        }
        self._feedback_handlers = {
            task: inspect_handler(function, task=task, kind="feedback")
            for task, function in agent.feedback_handlers.items()
        }
        self._threads = HandlerThreads(threads_max)
        #: By work id, while it runs.
        self._flags: dict[int, threading.Event] = {}
        self._tasks: dict[int, asyncio.Task[Ended]] = {}
        self._closed = False

    def start(self, start: Start) -> None:
        """Runs the handler of an assignment or a feedback whose task has one."""
        flag = self._flags[start.work] = threading.Event()
        if isinstance(start, StartAssignment):
            handler = self._task_handlers[start.task]
            context = Context(
                start.round, start.task, self._agent_id, start.attempt, start.deadline, flag, streams=self._streams
            )
        else:
            handler = self._feedback_handlers[start.task]
            context = Context(start.round, start.task, self._agent_id, cancelled=flag, streams=self._streams)
        if handler.is_async:
            task = self._loop.create_task(
                _run_async(handler, start, context), name=f"{handler.kind} {start.task} of round {start.round}"
            )
            self._tasks[start.work] = task
            task.add_done_callback(lambda done: self._finish(_ended_of(done, start)))
        else:
            self._threads.submit(lambda: self._run_in_thread(handler, start, context))

    def cancel(self, work: int) -> None:
        """Tells a running handler that nobody waits for it; an async one gets `CancelledError`."""
        if (flag := self._flags.get(work)) is not None:
            flag.set()
        if (task := self._tasks.get(work)) is not None:
            task.cancel()

    async def close(self) -> None:
        """Cancels what runs and waits for the async handlers to end. Threads are told and left alone."""
        self._closed = True
        for flag in self._flags.values():
            flag.set()
        self._threads.close()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _finish(self, ended: Ended) -> None:
        self._flags.pop(ended.work, None)
        self._tasks.pop(ended.work, None)
        if not self._closed:
            self._emit(ended)

    def _run_in_thread(self, handler: Handler, start: Start, context: Context) -> None:
        clock = _Stopwatch()
        ended: Ended
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
            ended = _returned(start, parts if isinstance(parts, bytes) else blob_of(parts), clock)
        except BaseException as error:  # noqa: BLE001  sys.exit() in a handler ends the handler, not its thread
            ended = _raised(handler, start, error, clock)
        try:
            self._loop.call_soon_threadsafe(self._finish, ended)
        except RuntimeError:
            log.debug("handler_outlived_its_loop", task=start.task, round=start.round)


async def _run_async(handler: Handler, start: Start, context: Context) -> Ended:
    clock = _Stopwatch()
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


def _ended_of(task: asyncio.Task[Ended], start: Start) -> Ended:
    # Also when the task was cancelled before its first step, in which none of its code ran.
    if task.cancelled():
        return HandlerFailed(start.work, "the handler was cancelled")
    error = task.exception()
    return task.result() if error is None else HandlerFailed(start.work, describe(error))


class _Stopwatch:
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
        raise _Unusable(f"the {what} that came cannot be unpacked: {error}") from error
    except OSError as error:
        raise _Unusable(f"the {what} that came cannot be read: {error}") from error


class _Unusable(Exception):
    """What came or is to go cannot travel; told as it is, without a traceback."""


def _encode(handler: Handler, result: Any) -> bytes | list[bytes | memoryview]:
    """A small answer; or the parts of a large one, which are the memory of its arrays."""
    if handler.kind == "feedback":
        return b""
    try:
        parts = encode_body_parts(result)
    except LocalError as error:
        raise _Unusable(f"the answer cannot be sent: {error}") from error
    size_bytes = sum(map(len, parts))
    if size_bytes > BULK_BYTES_MAX:
        raise _Unusable(f"the answer of {size_bytes} bytes is over the {BULK_BYTES_MAX} that can travel")
    return parts if size_bytes > BODY_BYTES_MAX else b"".join(parts)


def _returned(start: Start, answer: bytes | Blob, clock: _Stopwatch) -> Ended:
    body: Body = answer if isinstance(answer, bytes) else ref_to(answer).with_content(answer)
    return HandlerReturned(start.work, body, clock.elapsed_s)


def _raised(handler: Handler, start: Start, error: BaseException, clock: _Stopwatch) -> Ended:
    clock.stop()
    if isinstance(error, Declined) and handler.kind == "task":
        return HandlerDeclined(start.work, error.reason, clock.elapsed_s)
    text = str(error) if isinstance(error, _Unusable) else describe(error)
    log.error(
        "handler_failed",
        kind=handler.kind,
        task=start.task,
        round=start.round,
        error=text,
        exc_info=None if isinstance(error, _Unusable) else error,
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

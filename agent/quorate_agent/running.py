"""Runs handlers: async ones as tasks, sync ones in threads or, where the agent has them, in processes."""

import asyncio
import threading
from collections.abc import Callable

import structlog

from quorate_agent.agent import Agent, Context
from quorate_agent.calling import Ended, Start, call, call_async, describe
from quorate_agent.events import HandlerFailed, StartAssignment
from quorate_agent.handlers import AgentInvalid, Handler, inspect_handler
from quorate_agent.processes import ProcessPool
from quorate_agent.source import find_source
from quorate_agent.streams import StreamsSource
from quorate_agent.threads import HandlerThreads

log = structlog.get_logger()


class HandlerRunner:
    """Runs the handlers of one agent in the running event loop.

    Args:
        agent: Whose; checked.
        agent_id: What handlers are told that they are.
        concurrency: Assignments that may run at once.
        emit: Called in the loop, once for each start, later than that.
        streams: Gives handlers the streams of the present link.
        queued: How much work waits for what runs to end.

    Raises:
        AgentInvalid: more processes than may work at once, or a process could not find the agent again.
    """

    def __init__(
        self,
        agent: Agent,
        agent_id: str,
        concurrency: int,
        emit: Callable[[Ended], None],
        streams: StreamsSource,
        queued: Callable[[], int] = lambda: 0,
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
        self._threads = HandlerThreads(concurrency)
        self._pool: ProcessPool | None = None
        if agent.processes:
            if concurrency < agent.processes:
                raise AgentInvalid(
                    f"concurrency is {concurrency}, so that of {agent.processes} processes some would never work: "
                    "raise the one or lower the other"
                )
            self._pool = ProcessPool(
                agent,
                find_source(agent),
                agent_id=agent_id,
                # What learns later than the others knows less: copies that learn begin together.
                eager=agent.processes if agent.feedback_handlers else 1,
                emit=self._finish,
                queued=queued,
            )
        #: By work id, while it runs here and not in a process.
        self._flags: dict[int, threading.Event] = {}
        self._tasks: dict[int, asyncio.Task[Ended]] = {}
        self._closed = False

    async def open(self) -> None:
        """Starts the first process, where the agent has processes; returns when its copy of the agent is loaded.

        Raises:
            AgentInvalid: it could not be loaded there; the text says why.
        """
        if self._pool is not None:
            await self._pool.open()

    def start(self, start: Start) -> None:
        """Runs the handler of an assignment or a feedback whose task has one."""
        is_assignment = isinstance(start, StartAssignment)
        handler = (self._task_handlers if is_assignment else self._feedback_handlers)[start.task]
        if self._pool is not None and not handler.is_async:
            self._pool.start(start)
            return
        flag = self._flags[start.work] = threading.Event()
        context = Context.of(start, self._agent_id, flag, self._streams)
        if handler.is_async:
            task = self._loop.create_task(
                call_async(handler, start, context), name=f"{handler.kind} {start.task} of round {start.round}"
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
        if self._pool is not None:
            self._pool.cancel(work)

    async def close(self) -> None:
        """Cancels what runs; waits for the async handlers to end, and a bounded time for the processes.

        Threads are told and left alone.
        """
        self._closed = True
        for flag in self._flags.values():
            flag.set()
        self._threads.close()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        try:
            if tasks:
                await asyncio.wait(tasks)
        finally:
            if self._pool is not None:
                await self._pool.close()

    def _finish(self, ended: Ended) -> None:
        self._flags.pop(ended.work, None)
        self._tasks.pop(ended.work, None)
        if not self._closed:
            self._emit(ended)

    def _run_in_thread(self, handler: Handler, start: Start, context: Context) -> None:
        ended = call(handler, start, context)
        try:
            self._loop.call_soon_threadsafe(self._finish, ended)
        except RuntimeError:
            log.debug("handler_outlived_its_loop", task=start.task, round=start.round)


def _ended_of(task: asyncio.Task[Ended], start: Start) -> Ended:
    # Also when the task was cancelled before its first step, in which none of its code ran.
    if task.cancelled():
        return HandlerFailed(start.work, "the handler was cancelled")
    error = task.exception()
    return task.result() if error is None else HandlerFailed(start.work, describe(error))

"""Processes for sync handlers: the parent's side.

A child is a fresh interpreter (nothing forked: no event loop, thread or socket of the parent's lives on in
it) that loads the agent again and runs one handler at a time. Feedback goes to all children, because each
has its own copy of what learns.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import structlog

from quorate_agent.agent import Agent
from quorate_agent.calling import Ended, Start
from quorate_agent.events import CancelHandler, HandlerFailed, StartFeedback
from quorate_agent.handlers import AgentInvalid, inspect_handler
from quorate_agent.process_messages import Load, Loaded, LoadingFailed, ToChild, Unpacker, pack
from quorate_agent.source import Source
from quorate_protocol import logs
from quorate_protocol.errors import FrameMalformed, LocalError

log = structlog.get_logger()

#: Seconds that a handler may ignore its cancellation while other work waits; then its process is killed.
CANCEL_GRACE_S: Final = 5.0
#: Seconds after which a handler that still runs then is looked at again.
_CANCEL_CHECK_S: Final = 0.5

#: Seconds before a child that died is replaced; doubled for each that died since one last finished a job.
PAUSE_S: Final = 0.1
PAUSE_MAX_S: Final = 10.0

#: Seconds that children have to end by themselves when the pool is closed.
CLOSE_GRACE_S: Final = 2.0
#: Seconds in which the kernel ends a process that was killed; one that hangs in a driver must not hold us up.
_KILL_S: Final = 5.0

#: Seconds that a child may live on without its end of the socket.
_DEAF_S: Final = 1.0

#: Bytes of one read: more than a socket pair holds at once.
_READ_BYTES: Final = 1 << 18

#: The path first: the child must find the same modules as this process. With -P nothing is put before it.
_BOOTSTRAP: Final = (
    "import sys; sys.path[:] = {path!r}; from quorate_agent.process_child import main; main({number}, {pid})"
)

_BLOCKED: Final = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True, eq=False)
class _Job:
    start: Start
    #: Children that run it.
    children: set["_Process"] = field(default_factory=set)
    #: The first end that was told, or the first that was no success.
    ended: Ended | None = None
    #: Runs after a cancellation.
    timer: asyncio.TimerHandle | None = None


class ProcessPool:
    """At most `agent.processes` children. To be used in the running event loop.

    Args:
        agent: Whose handlers.
        source: What the children load.
        agent_id: What handlers are told that they are.
        eager: Children that start with `open`; others start when there is work for them.
        emit: Called once for each start, later than that.
        queued: How much work waits elsewhere for what runs here to end.
    """

    def __init__(
        self,
        agent: Agent,
        source: Source,
        *,
        agent_id: str,
        eager: int,
        emit: Callable[[Ended], None],
        queued: Callable[[], int],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._processes_max = agent.processes
        self._source = source
        self._load = Load(
            target=source.target,
            settings=dict(source.settings),
            tasks=[
                task
                for task, function in agent.handlers.items()
                if not inspect_handler(function, task=task, kind="task").is_async
            ],
            feedback_tasks=[
                task
                for task, function in agent.feedback_handlers.items()
                if not inspect_handler(function, task=task, kind="feedback").is_async
            ],
            agent_id=agent_id,
            argv=list(sys.argv),
            log=list(logs.configured() or ()),
        )
        self._emit = emit
        self._queued = queued
        self._children: set[_Process] = set()
        #: Children that there should be: grows with the work, up to the maximum.
        self._wanted = eager
        self._waiting: deque[_Job] = deque()
        #: By work id, until it was told.
        self._jobs: dict[int, _Job] = {}
        #: Children that died since one last finished a job.
        self._deaths = 0
        self._pause: asyncio.TimerHandle | None = None
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """Of the children that live."""
        return [child.pid for child in self._children]

    async def open(self) -> None:
        """Starts the first children. Returns when one of them is ready.

        Raises:
            AgentInvalid: it cannot load the agent; the text says why.
        """
        self._fill()
        await self._opened

    def start(self, start: Start) -> None:
        """Runs a handler: of an assignment in the next child that is idle, of feedback in all children."""
        job = self._jobs[start.work] = _Job(start)
        self._waiting.append(job)
        self._dispatch()

    def cancel(self, work: int) -> None:
        """Tells the handler that nobody waits for it. One that has not begun does not begin."""
        job = self._jobs.get(work)
        if job is None or job.timer is not None:
            return
        if not job.children:
            self._waiting.remove(job)
            self._tell(job, HandlerFailed(work, "the handler was cancelled"))
            return
        for child in job.children:
            child.send(CancelHandler(work))
        job.timer = self._loop.call_later(CANCEL_GRACE_S, self._insist, job)

    async def close(self) -> None:
        """Ends the children: those that run something have `CLOSE_GRACE_S` for it, and are killed then."""
        self._closed = True
        for timer in (self._pause, *(job.timer for job in self._jobs.values())):
            if timer is not None:
                timer.cancel()
        if self._opened.done() and not self._opened.cancelled():
            self._opened.exception()  # whoever opened may have gone before it heard
        self._opened.cancel()
        children = list(self._children)
        for child in children:
            child.end()
        try:
            await _until_gone(children, CLOSE_GRACE_S)
        finally:
            for child in self._children:
                child.kill()
            await _until_gone(list(self._children), _KILL_S)

    # --- children ---

    def _fill(self) -> None:
        """Starts what is missing, unless the last ones died a moment ago."""
        while len(self._children) < self._wanted and self._pause is None and not self._closed:
            try:
                child = _Process(self._loop, self._on_message, self._on_exit)
            except OSError as error:
                self._on_death(f"no process can be started: {error.strerror or error}", could_load=False)
                return
            self._children.add(child)
            child.send(self._load)

    def _on_message(self, child: "_Process", message: Any) -> None:
        match message:
            case Loaded():
                child.is_ready = True
                if not self._opened.done():
                    self._opened.set_result(None)
                self._dispatch()
            case LoadingFailed(problem):
                child.problem = problem
            case _:
                self._deaths = 0
                if message.work in child.works:
                    self._settle(self._jobs[message.work], child, message)
                    self._dispatch()

    def _on_exit(self, child: "_Process", code: int) -> None:
        self._children.discard(child)
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if child.problem:
            problem = f"the handler's process cannot load the agent: {child.problem}"
        elif child.is_ready:
            problem = f"the handler's process died ({how})"
        else:
            problem = f"the handler's process died while it loaded {self._source.target} ({how})"
        for work in list(child.works):
            self._settle(self._jobs[work], child, HandlerFailed(work, problem))
        if self._closed:
            return
        if child.was_killed:
            self._fill()
            self._dispatch()
        else:
            log.error("handler_process_died", message=problem, pid=child.pid)
            self._on_death(problem, could_load=child.is_ready)

    def _on_death(self, problem: str, *, could_load: bool) -> None:
        """A child is gone, or did not come to be."""
        if not self._opened.done():
            self._opened.set_exception(AgentInvalid(problem))
        if not could_load and not self._children:
            # Nobody can tell when there will be one that can: better a failure now than silence until the deadline.
            while self._waiting:
                job = self._waiting.popleft()
                self._tell(job, HandlerFailed(job.start.work, problem))
        pause_s = min(PAUSE_MAX_S, PAUSE_S * 2.0 ** min(self._deaths, 10))
        self._deaths += 1
        if self._pause is None and not self._closed:
            self._pause = self._loop.call_later(pause_s, self._on_pause_over)
        self._dispatch()

    def _on_pause_over(self) -> None:
        self._pause = None
        self._fill()
        self._dispatch()

    # --- jobs ---

    def _dispatch(self) -> None:
        """Gives what waits to children that are idle, in order, and asks for more children where there are too few."""
        while self._waiting and not self._closed:
            job = self._waiting[0]
            if isinstance(job.start, StartFeedback):
                # Nothing else runs then. A child that still loads is told too, and will have learned when it works.
                takers = list(self._children)
            else:
                takers = [child for child in self._children if child.is_ready and not child.works][:1]
            if not takers:
                break
            self._waiting.popleft()
            self._give(job, takers)
        loading = sum(not child.is_ready for child in self._children)
        if len(self._waiting) > loading and self._wanted < self._processes_max:
            self._wanted += 1
            self._fill()

    def _give(self, job: _Job, takers: list["_Process"]) -> None:
        try:
            frame = pack(job.start)
        except LocalError as error:
            self._tell(job, HandlerFailed(job.start.work, f"it cannot be given to a process: {error}"))
            return
        for child in takers:
            job.children.add(child)
            child.works.add(job.start.work)
            child.send_frame(frame)

    def _settle(self, job: _Job, child: "_Process", ended: Ended) -> None:
        """One child is done with a job; when all are, it is told. A failure anywhere is the job's."""
        child.works.discard(job.start.work)
        job.children.discard(child)
        if job.ended is None or (isinstance(ended, HandlerFailed) and not isinstance(job.ended, HandlerFailed)):
            job.ended = ended
        if not job.children:
            self._tell(job, job.ended)

    def _tell(self, job: _Job, ended: Ended) -> None:
        del self._jobs[job.start.work]
        if job.timer is not None:
            job.timer.cancel()
        # Not from within `start` or `cancel`, whose caller is not done with its own turn.
        self._loop.call_soon(self._emit, ended)

    def _insist(self, job: _Job) -> None:
        """Kills what ignores its cancellation, where it is in the way of other work.

        Not where it is not: the child's copy of the agent, with all that it has learned, would go for nothing.
        """
        if not self._waiting and not self._queued():
            job.timer = self._loop.call_later(_CANCEL_CHECK_S, self._insist, job)
            return
        for child in job.children:
            log.warning(
                "handler_process_killed",
                message=f"a handler of {job.start.task} ignored its cancellation while other work waits",
                task=job.start.task,
                round=job.start.round,
                pid=child.pid,
            )
            child.kill()


async def _until_gone(children: list["_Process"], timeout_s: float) -> None:
    if children:
        await asyncio.wait([child.gone for child in children], timeout=timeout_s)


class _Process:
    """One child: its process, its socket, what it was given."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[["_Process", Any], None],
        on_exit: Callable[["_Process", int], None],
    ) -> None:
        """Starts it.

        Raises:
            OSError: no process or no socket is to be had.
        """
        self._loop = loop
        self._on_message = on_message
        self._on_exit = on_exit
        self._unpacker = Unpacker()
        #: What the socket did not take yet.
        self._unsent = bytearray()
        self.is_ready = False
        #: Why it could not load the agent.
        self.problem = ""
        #: By this side, and so nothing that was wrong with the child.
        self.was_killed = False
        #: Ids of the work that it was given and has not ended.
        self.works: set[int] = set()
        self.gone: asyncio.Future[None] = loop.create_future()
        self._socket, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = _spawn(theirs)
            except OSError:
                self._socket.close()
                raise
        self.pid = self._process.pid
        self._socket.setblocking(False)
        loop.add_reader(self._socket, self._on_readable)
        threading.Thread(target=self._wait, name=f"child-{self.pid}", daemon=True).start()

    def send(self, message: ToChild) -> None:
        """Sends a message after those before it. To a child that has gone, nothing."""
        self.send_frame(pack(message))

    def send_frame(self, frame: bytes) -> None:
        """Sends a packed message."""
        if self.gone.done():
            return
        if self._unsent:
            self._unsent += frame
            return
        sent = self._try_send(frame)
        if sent < len(frame):
            self._unsent += memoryview(frame)[sent:]
            self._loop.add_writer(self._socket, self._on_writable)

    def end(self) -> None:
        """Asks it to end: its handler is told that it is cancelled, and nothing more comes."""
        if not self.gone.done():
            self._loop.remove_writer(self._socket)
            try:
                self._socket.shutdown(socket.SHUT_WR)
            except OSError:
                pass

    def kill(self) -> None:
        """Ends it at once. What it was given is settled when it has gone."""
        if not self.gone.done():
            self.was_killed = True
            self._process.kill()

    def _try_send(self, data: bytes | bytearray) -> int:
        """How much of it was taken; of what a dead child will never read, all."""
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            return len(data)

    def _on_writable(self) -> None:
        del self._unsent[: self._try_send(self._unsent)]
        if not self._unsent:
            self._loop.remove_writer(self._socket)

    def _on_readable(self) -> None:
        if not self._read():
            # It ends, or has closed all its descriptors and cannot tell us anything any more.
            self._loop.remove_reader(self._socket)
            self._loop.call_later(_DEAF_S, self._kill_deaf)

    def _kill_deaf(self) -> None:
        if not self.gone.done():
            self._process.kill()

    def _read(self) -> bool:
        """Whether there may be more, now or later."""
        try:
            data = self._socket.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        try:
            for message in self._unpacker.feed(data):
                self._on_message(self, message)
        except (FrameMalformed, KeyError, TypeError) as error:
            log.error("handler_process_garbled", pid=self.pid, error=str(error))
            self._process.kill()
            return False
        return bool(data)

    def _wait(self) -> None:
        # In a thread, because the end of the socket tells less: a handler may have forked, and given it on.
        code = self._process.wait()
        try:
            self._loop.call_soon_threadsafe(self._on_gone, code)
        except RuntimeError:
            pass  # the loop has closed before

    def _on_gone(self, code: int) -> None:
        # What it told before it ended counts.
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.setblocking(False)
        while _has_data(self._socket) and self._read():
            pass
        self._socket.close()
        self.gone.set_result(None)
        self._on_exit(self, code)


def _has_data(pipe: socket.socket) -> bool:
    try:
        return bool(pipe.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False


def _spawn(pipe: socket.socket) -> subprocess.Popen[bytes]:
    """A fresh interpreter with this end of a socket pair.

    In this thread, because the child ends with the thread that started it.
    """
    code = _BOOTSTRAP.format(path=sys.path, number=pipe.fileno(), pid=os.getpid())
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # as multiprocessing does
    # Until the child has its own handlers, an interrupt from the terminal would end it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    try:
        return subprocess.Popen(  # noqa: S603  our own interpreter
            [sys.executable, *flags, "-P", "-c", code], stdin=subprocess.DEVNULL, pass_fds=[pipe.fileno()]
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

"""A process that runs handlers for an agent: the child's side.

The main thread loads the agent and runs one handler after the other, so that handlers may use signals and
libraries that want the main thread. Another thread reads the socket meanwhile: cancellations, and its end.
When it ends, or the parent does, so does this process.
"""

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Final

import structlog

from quorate_agent.agent import Agent, Context, become_child
from quorate_agent.calling import Ended, Start, call
from quorate_agent.events import CancelHandler, HandlerDeclined, HandlerFailed, StartFeedback
from quorate_agent.handlers import Handler, inspect_handler
from quorate_agent.loading import LoadFailed, load_agent
from quorate_agent.process_messages import FromChild, Load, Loaded, LoadingFailed, Unpacker, pack
from quorate_protocol import logs
from quorate_protocol.messages import clip_text

log = structlog.get_logger()

#: Of a child whose agent cannot be loaded.
EXIT_UNLOADABLE: Final = 2

#: Seconds for a handler to end when nobody is there any more to hear of it.
_ORPHAN_S: Final = 5.0

#: Bytes of one read: more than a socket pair holds at once.
_READ_BYTES: Final = 1 << 18

#: Of <sys/prctl.h>: the signal that this process gets when the thread that started it ends.
_PR_SET_PDEATHSIG: Final = 1


def main(socket_number: int, parent_pid: int) -> None:
    """What `processes` starts in a fresh interpreter. Returns when there is nothing more to do."""
    _die_with(parent_pid)
    # A terminal's Ctrl-C and a supervisor's SIGTERM go to all processes; it is the parent's to decide what
    # becomes of the handlers. Not SIG_IGN, which programs that a handler starts would inherit.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _do_nothing)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    os.set_inheritable(socket_number, False)
    become_child()
    with socket.socket(fileno=socket_number) as pipe:
        try:
            code = _Child(pipe).run()
        except OSError:
            code = 0  # the parent is gone, and with it who would want to hear of it
    if code:
        sys.exit(code)


def _die_with(parent_pid: int) -> None:
    """Not even a parent that was killed leaves children behind that compute for nobody."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)  # it ended in the meantime


def _do_nothing(number: int, frame: FrameType | None) -> None:
    return


class _Child:
    def __init__(self, pipe: socket.socket) -> None:
        self._pipe = pipe
        self._unpacker = Unpacker()
        self._jobs: queue.SimpleQueue[Load | Start | None] = queue.SimpleQueue()
        #: By work id, from when it came until its handler ended.
        self._flags: dict[int, threading.Event] = {}
        self._has_loaded = False
        self._task_handlers: dict[str, Handler] = {}
        self._feedback_handlers: dict[str, Handler] = {}
        self._agent_id = ""

    def run(self) -> int:
        """Loads, works, and returns the exit code."""
        threading.Thread(target=self._read, name="pipe", daemon=True).start()
        while (job := self._jobs.get()) is not None:
            if isinstance(job, Load):
                try:
                    self._load(job)
                except LoadFailed as error:
                    self._send(LoadingFailed(clip_text(str(error))))
                    return EXIT_UNLOADABLE
                self._send(Loaded())
            else:
                self._send(self._handle(job))
            # Not holding on to the last job's body until the next one comes.
            del job
        return 0

    def _load(self, load: Load) -> None:
        sys.argv = list(load.argv)
        if load.log:
            logs.configure(*load.log)
        self._agent_id = load.agent_id
        agent = load_agent(load.target, load.settings)
        self._task_handlers = {
            task: inspect_handler(function, task=task, kind="task") for task, function in agent.handlers.items()
        }
        self._feedback_handlers = {
            task: inspect_handler(function, task=task, kind="feedback")
            for task, function in agent.feedback_handlers.items()
        }
        _expect(load, agent)
        self._has_loaded = True

    def _handle(self, start: Start) -> Ended:
        handlers = self._feedback_handlers if isinstance(start, StartFeedback) else self._task_handlers
        ended = call(handlers[start.task], start, Context.of(start, self._agent_id, self._flags[start.work]))
        self._flags.pop(start.work)
        # Other text than what can be encoded travels neither here nor on the wire.
        if isinstance(ended, HandlerFailed):
            return HandlerFailed(ended.work, _clean(ended.error), ended.compute_s)
        if isinstance(ended, HandlerDeclined):
            return HandlerDeclined(ended.work, _clean(ended.reason), ended.compute_s)
        return ended

    def _send(self, message: FromChild) -> None:
        self._pipe.sendall(pack(message))

    # --- in the reading thread ---

    def _read(self) -> None:
        try:
            while data := self._pipe.recv(_READ_BYTES):
                for message in self._unpacker.feed(data):
                    if isinstance(message, CancelHandler):
                        if (flag := self._flags.get(message.work)) is not None:
                            flag.set()
                        continue
                    if not isinstance(message, Load):
                        self._flags[message.work] = threading.Event()
                    self._jobs.put(message)
        except OSError:
            pass
        if not self._has_loaded:
            os._exit(0)  # nothing that could be finished
        for flag in list(self._flags.values()):
            flag.set()
        self._jobs.put(None)
        time.sleep(_ORPHAN_S)
        os._exit(1)


def _expect(load: Load, agent: Agent) -> None:
    for wanted, there, what in (
        (load.tasks, agent.handlers, "task"),
        (load.feedback_tasks, agent.feedback_handlers, "feedback handler for"),
    ):
        for task in wanted:
            if task not in there:
                raise LoadFailed(
                    f"{load.target} has no {what} {task!r} when it is loaded in a process of its own: register "
                    "handlers where the module is imported, not under a condition"
                )


def _clean(text: str) -> str:
    return clip_text(text).encode("utf-8", "backslashreplace").decode()

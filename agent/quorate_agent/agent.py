"""The SDK: an agent is a name, labels, and a handler for each task that it can do.

::

    agent = Agent("tree-1", labels={"zone": "a"})

    @agent.task("classify")
    def classify(features):
        return model.predict_one(features)

    @agent.feedback("classify")
    def learn(features, label):
        model.learn_one(features, label)

A feedback handler never runs while another handler of the same agent runs, so a model needs no lock.
Sync handlers run in threads, so that heartbeats go on, or in processes of their own (`processes`), so that
they go on whatever the handlers do; async ones run on the event loop and must not block it.
"""

import inspect
import math
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pydantic import TypeAdapter, ValidationError

from quorate_agent.events import StartAssignment, StartFeedback
from quorate_agent.handlers import AgentInvalid, HandlerFunction, inspect_handler
from quorate_agent.source import Source
from quorate_protocol.errors import Code, ConnectionClosed
from quorate_protocol.fields import Name
from quorate_protocol.limits import LABELS_MAX, TASKS_MAX, TEXT_CHARS_MAX
from quorate_protocol.logs import configure_embedded

if TYPE_CHECKING:
    # With all their cryptography, which defining an agent does not need.
    from quorate_agent.streams import Background, OwnStream, StreamsSource
    from quorate_protocol.transport import ClientTls, Priority

F = TypeVar("F", bound=HandlerFunction)
B = TypeVar("B", bound="Background")

_NAME: TypeAdapter[str] = TypeAdapter(Name)

#: Handlers of one agent that may run at once: each sync one needs a thread.
CONCURRENCY_MAX = 256

#: Processes of one agent: each holds an interpreter and a copy of all that the agent's module loads.
PROCESSES_MAX: Final = 64


def _no_link() -> Any:
    raise ConnectionClosed(Code.NO_ERROR, "there is no link to the coordinator now")


@dataclass(frozen=True, slots=True)
class Context:
    """What a handler may want to know about the work it was given, beside the body."""

    #: Round that asks, or whose truth this is.
    round: int
    task: str
    #: Identity under which this agent joined.
    agent: str
    #: Counts from 1; more when the coordinator asks again in the same round.
    attempt: int = 1
    #: `time.monotonic()` when the round ends at the latest; infinite for feedback.
    deadline: float = math.inf
    #: Set when nobody waits for the answer any more. A sync handler that runs long looks at it now
    #: and then (`context.cancelled.is_set()`); an async one gets `asyncio.CancelledError` as well.
    cancelled: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)
    #: Streams that were opened by this context.
    opened: "list[OwnStream]" = field(default_factory=list, repr=False, compare=False)
    #: Gives the streams of the present link.
    streams: "StreamsSource" = field(default=_no_link, repr=False, compare=False)

    async def open_stream(self, topic: str, *, priority: "Priority | None" = None) -> "OwnStream":
        """Opens a stream of this agent's own that goes along with the round. For async handlers alone.

        It is given up when the round is cancelled. `priority` is its sending class; None is NORMAL.

        Raises:
            ConnectionClosed: there is no link now.
        """
        stream = await self.streams().open_stream(topic, priority=priority, round=self.round)
        self.opened.append(stream)
        return stream

    @classmethod
    def of(
        cls,
        start: StartAssignment | StartFeedback,
        agent_id: str,
        cancelled: threading.Event,
        streams: "StreamsSource" = _no_link,
    ) -> "Context":
        """What the handler of this work is told."""
        if isinstance(start, StartFeedback):
            return cls(start.round, start.task, agent_id, cancelled=cancelled, streams=streams)
        return cls(start.round, start.task, agent_id, start.attempt, start.deadline, cancelled, streams=streams)

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline, not below 0."""
        return max(0.0, self.deadline - time.monotonic())


class Agent:
    """Tasks and their handlers. Holds no connection: `run` or `quorate-agent run` joins a coordinator with it.

    Args:
        name: Identity in the fleet; None lets who runs the agent choose. Two agents of one name push
            each other out.
        labels: What operators select agents by.
        concurrency: Assignments whose handlers may run at once; None means one for each process, or one.
        processes: Processes that run the sync handlers; with 0, threads do. Each loads the agent again from its
            module and has its own copy of all there is in it. Feedback runs in each; one that had to be
            replaced knows nothing of what came before: an agent that must not forget takes 1 and survives as
            long as that one does. A program that calls `run` does so under `if __name__ == "__main__"`, because
            the processes import its module.

    Raises:
        AgentInvalid: a name, label or number is out of bounds.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        concurrency: int | None = None,
        processes: int = 0,
    ) -> None:
        if name is not None:
            check_name("agent name", name)
        self.name = name
        self.labels: Mapping[str, str] = MappingProxyType(check_labels(labels or {}))
        self.processes = check_processes(processes)
        self.concurrency = max(1, processes) if concurrency is None else check_concurrency(concurrency)
        #: How it was loaded; None when it was not by `load_agent`.
        self.source: Source | None = None
        self._handlers: dict[str, HandlerFunction] = {}
        self._feedback_handlers: dict[str, HandlerFunction] = {}
        self._backgrounds: list[Background] = []

    def __repr__(self) -> str:
        return f"Agent({self.name!r}, tasks={list(self._handlers)})"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of registration."""
        return tuple(self._handlers)

    @property
    def handlers(self) -> Mapping[str, HandlerFunction]:
        """Task → the function that was registered, as it was written. Read-only."""
        return MappingProxyType(self._handlers)

    @property
    def feedback_handlers(self) -> Mapping[str, HandlerFunction]:
        """Task → the feedback function that was registered, as it was written. Read-only."""
        return MappingProxyType(self._feedback_handlers)

    @property
    def backgrounds(self) -> "tuple[Background, ...]":
        """What runs beside the handlers while there is a link."""
        return tuple(self._backgrounds)

    def task(self, name: str) -> Callable[[F], F]:
        """Registers a handler of `(body)` or `(body, context)`, sync or async, whose return value is the answer.

        The decorated function is returned as it is. `Declined` raised by it declines the assignment;
        any other exception fails it.

        Raises:
            AgentInvalid: the name or the signature is wrong, or the task has a handler.
        """
        _check_task("task", name)

        def register(function: F) -> F:
            inspect_handler(function, task=name, kind="task")
            if name in self._handlers:
                raise AgentInvalid(f"task {name!r} already has the handler {_name_of(self._handlers[name])}")
            if len(self._handlers) >= TASKS_MAX:
                raise AgentInvalid(f"task {name!r} is one more than the {TASKS_MAX} that an agent may have")
            self._handlers[name] = function
            return function

        return register

    def feedback(self, name: str) -> Callable[[F], F]:
        """Registers what to do with the truth of a task, once known: `(body, truth)` or `(body, truth, context)`.

        It gets the body that the task was asked with, and runs before the next assignment. What it
        returns is ignored.

        Raises:
            AgentInvalid: the name or the signature is wrong, or the task has a feedback handler.
        """
        _check_task("feedback", name)

        def register(function: F) -> F:
            inspect_handler(function, task=name, kind="feedback")
            if name in self._feedback_handlers:
                other = _name_of(self._feedback_handlers[name])
                raise AgentInvalid(f"task {name!r} already has the feedback handler {other}")
            self._feedback_handlers[name] = function
            return function

        return register

    def set_processes(self, processes: int) -> None:
        """Another number of processes; concurrency rises to it where it is lower.

        Raises:
            AgentInvalid: the number is out of bounds.
        """
        self.processes = check_processes(processes)
        self.concurrency = max(self.concurrency, processes)

    def background(self, function: B) -> B:
        """Registers an async function of `(streams)` that runs while there is a link: sensors, say.

        It is started anew with each link and cancelled at its end::

            @agent.background
            async def camera(streams):
                async with await streams.open_stream("video", priority=Priority.LOW) as stream:
                    while True:
                        await stream.send(await grab())

        Raises:
            AgentInvalid: it is no async function of one argument.
        """
        is_async = inspect.iscoroutinefunction(function)
        if not is_async or len(inspect.signature(function).parameters) != 1:
            raise AgentInvalid(f"background {_name_of(function)} must be an async function of one argument, (streams)")
        self._backgrounds.append(function)
        return function

    def check(self) -> None:
        """Whether the agent can start.

        Raises:
            AgentInvalid: it has no task, or feedback for a task that it does not have, or its handlers
                cannot run in the processes that it wants.
        """
        if not self._handlers:
            raise AgentInvalid('the agent has no tasks: decorate a function with @agent.task("name")')
        for name, function in self._feedback_handlers.items():
            if name not in self._handlers:
                known = ", ".join(repr(task) for task in self._handlers)
                raise AgentInvalid(
                    f"feedback handler {_name_of(function)} is for {name!r}, which is no task of this agent ({known})"
                )
        if self.processes:
            self._check_for_processes()

    def _check_for_processes(self) -> None:
        is_async = {
            task: inspect_handler(function, task=task, kind="task").is_async
            for task, function in self._handlers.items()
        }
        if all(is_async.values()):
            raise AgentInvalid(
                f"processes is {self.processes}, but all tasks have async handlers, which run on the event loop: "
                "make those that compute plain functions"
            )
        for task, function in self._feedback_handlers.items():
            if inspect_handler(function, task=task, kind="feedback").is_async != is_async[task]:
                raise AgentInvalid(
                    f"of task {task!r} one of handler and feedback handler is async and the other is not: with "
                    "processes they would not share a model; make both plain functions"
                )

    async def run(
        self,
        url: str,
        *,
        token: str,
        tls: "ClientTls | None" = None,
        id: str | None = None,
        drain_timeout_s: float = 30.0,
    ) -> None:
        """Joins the coordinator at `url` and works until cancelled; reconnects by itself, endlessly.

        Cancelling it closes the connection at once and cancels what runs; sync handlers that do not
        look at `context.cancelled` finish in their threads, unheard; processes get two seconds for it.

        Args:
            url: Such as `quic://coordinator.example:4433`.
            token: What the coordinator expects of its agents.
            tls: Whom to trust; None trusts the system's authorities.
            id: Identity instead of the agent's name.
            drain_timeout_s: How long handlers may finish after the coordinator began to drain.

        Raises:
            AgentInvalid: see `check`; or there is neither an id nor a name; or processes cannot load the agent.
            Refused: the coordinator does not let this agent in, and will not later (a wrong token).
            ConnectionClosed: with code `REPLACED`: another agent took the id.
        """
        if _is_child:
            raise AgentInvalid(
                "this program runs its agent whenever it is imported, which each process of the agent does: put the "
                'call of run(...) under if __name__ == "__main__":'
            )
        from quorate_agent.worker import Worker  # the shell needs the agent's types, not the other way round

        chosen = id if id is not None else self.name
        if chosen is None:
            raise AgentInvalid("the agent has no name: give one to Agent(...) or an id to run(...)")
        configure_embedded()
        worker = Worker(self, url, agent_id=chosen, token=token, tls=tls, drain_timeout_s=drain_timeout_s)
        (await worker.run()).raise_if_error()


def check_name(what: str, value: object) -> str:
    """`value`, when it may be an identifier on the wire.

    Raises:
        AgentInvalid: it may not; the text names `what`.
    """
    try:
        return _NAME.validate_python(value, strict=True)
    except ValidationError:
        raise AgentInvalid(
            f"{what} is {value!r}; it must be 1 to 255 ASCII letters, digits and . _ : @ / + -, and begin with "
            "a letter or digit"
        ) from None


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """A copy of `labels`, when they may travel.

    Raises:
        AgentInvalid: too many of them, or a key or value is wrong; the text names it.
    """
    if len(labels) > LABELS_MAX:
        raise AgentInvalid(f"{len(labels)} labels are over the {LABELS_MAX} that an agent may carry")
    for key, value in labels.items():
        check_name("label key", key)
        if not isinstance(value, str) or len(value) > TEXT_CHARS_MAX:
            raise AgentInvalid(f"label {key} is {value!r}; it must be text of at most {TEXT_CHARS_MAX} characters")
    return dict(labels)


def check_concurrency(value: object) -> int:
    """`value`, when it may be a number of handlers to run at once.

    Raises:
        AgentInvalid: it may not.
    """
    if type(value) is not int or not 1 <= value <= CONCURRENCY_MAX:
        raise AgentInvalid(f"concurrency is {value!r}; it must be a whole number from 1 to {CONCURRENCY_MAX}")
    return value


def check_processes(value: object) -> int:
    """`value`, when it may be a number of processes for handlers.

    Raises:
        AgentInvalid: it may not.
    """
    if type(value) is not int or not 0 <= value <= PROCESSES_MAX:
        raise AgentInvalid(f"processes is {value!r}; it must be a whole number from 0 (threads) to {PROCESSES_MAX}")
    return value


#: Whether this process runs the handlers of an agent that another process is.
_is_child = False


def become_child() -> None:
    """From now on no agent runs in this process by itself, or each child would start children of its own."""
    global _is_child
    _is_child = True


def make_name(text: str) -> str:
    """An identifier made of any text: what may not stand in one becomes `-`."""
    return re.sub(r"[^A-Za-z0-9._:@/+-]+", "-", text).lstrip("._:@/+-")[:255] or "agent"


def _check_task(decorator: str, name: object) -> None:
    if callable(name):
        raise AgentInvalid(f'@agent.{decorator} needs the task\'s name: write @agent.{decorator}("name")')
    check_name("task name", name)


def _name_of(function: HandlerFunction) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__

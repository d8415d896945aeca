"""What may be a handler: checked when it is registered, so that a mistake shows at start and not in a round."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from quorate_protocol.errors import LocalError

#: Any callable that `inspect_handler` has let through.
HandlerFunction = Callable[..., Any]

Kind = Literal["task", "feedback"]

#: What a handler is called with, before the optional context.
_ARGUMENTS: dict[Kind, tuple[str, ...]] = {"task": ("body",), "feedback": ("body", "truth")}


class AgentInvalid(LocalError):
    """An agent is put together wrongly: a bad name, a handler with the wrong signature, a task given twice."""


class Declined(Exception):
    """Raised by a task's handler: this agent does not answer this assignment. Not a failure.

    The reason reaches the operator who asked.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Handler:
    """A checked handler and how to call it."""

    function: HandlerFunction
    task: str
    kind: Kind
    #: Whether calling it gives a coroutine: it then runs on the event loop, otherwise in a thread.
    is_async: bool
    #: Whether it takes the context after its other arguments.
    wants_context: bool


def inspect_handler(function: object, *, task: str, kind: Kind) -> Handler:
    """Checks that `function` can be called as a handler of `kind`.

    The context is passed where the signature has one more required positional parameter, or one
    named `context`. Other parameters need a default and are left alone.

    Raises:
        AgentInvalid: it cannot be called with the handler's arguments, or it is a generator. The
            text names the handler and what is wrong.
    """
    arguments = _ARGUMENTS[kind]
    wanted = f"({', '.join(arguments)}) or ({', '.join(arguments)}, context)"
    if not callable(function):
        raise AgentInvalid(f"{kind} handler for {task!r} is {function!r}, which cannot be called")
    where = f"{kind} handler {_describe(function)} for {task!r}"
    if _is(function, inspect.isgeneratorfunction) or _is(function, inspect.isasyncgenfunction):
        raise AgentInvalid(f"{where} is a generator; it must return its answer once")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise AgentInvalid(f"{where} has no signature that can be read; wrap it in a function of {wanted}") from None
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise AgentInvalid(
                f"{where} takes *{parameter.name}: whether it wants the context cannot be told; it must take {wanted}"
            )
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            raise AgentInvalid(
                f"{where} needs the keyword argument {parameter.name!r}, which nobody passes; it must take {wanted}"
            )
    if len(positional) < len(arguments) or len(required) > len(arguments) + 1:
        names = ", ".join(p.name for p in positional)
        raise AgentInvalid(f"{where} takes ({names}); it must take {wanted}")
    after = positional[len(arguments)] if len(positional) > len(arguments) else None
    return Handler(
        function=function,
        task=task,
        kind=kind,
        is_async=_is(function, inspect.iscoroutinefunction),
        wants_context=after is not None and (after.default is after.empty or after.name == "context"),
    )


def _is(function: Callable[..., Any], predicate: Callable[[object], bool]) -> bool:
    """Whether the predicate holds for the function or, of an object, its `__call__`."""
    while isinstance(function, functools.partial):
        function = function.func
    return predicate(function) or predicate(getattr(type(function), "__call__", None))  # noqa: B004  the method is wanted


def _describe(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code is not None else str(name)

"""Where an agent came from, so that another process can load it again."""

import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from quorate_agent.handlers import AgentInvalid, HandlerFunction

if TYPE_CHECKING:
    from quorate_agent.agent import Agent

_HELP = (
    "processes load the agent again, by its name: make it at the top level of a module or script "
    '(agent = Agent(...)), or leave making it to "quorate-agent run FILE.py:FUNCTION"'
)


@dataclass(frozen=True, slots=True)
class Source:
    """What `load_agent` takes."""

    #: `MODULE:ATTRIBUTE`; a file's path is absolute.
    target: str
    settings: Mapping[str, str] = field(default_factory=dict)


def find_source(agent: "Agent") -> Source:
    """How to load `agent` again: as it was loaded, or else from the module of its handlers that has it.

    Raises:
        AgentInvalid: no such module has the agent, or it is one that cannot be loaded again (what was typed
            into an interpreter, say). The text says what to do.
    """
    if agent.source is not None:
        return agent.source
    names = list(dict.fromkeys([*_modules_of(agent), "__main__"]))
    for name in names:
        module = sys.modules.get(name)
        for attribute, value in list(vars(module).items()) if module is not None else []:
            if value is agent and module is not None:
                return Source(f"{_load_name(module)}:{attribute}")
    looked_at = ", ".join(names)
    raise AgentInvalid(f"the agent is no attribute of a module (looked at {looked_at}); {_HELP}")


def _modules_of(agent: "Agent") -> Iterator[str]:
    for function in (*agent.handlers.values(), *agent.feedback_handlers.values()):
        yield _module_of(function)


def _module_of(function: HandlerFunction) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    found = getattr(inspect.unwrap(function), "__module__", None)
    return found if isinstance(found, str) else type(function).__module__


def _load_name(module: ModuleType) -> str:
    """What another process imports to have this module."""
    if module.__name__ != "__main__":
        return module.__name__
    spec = module.__spec__
    if spec is not None and spec.name != "__main__":
        return spec.name  # python -m
    file = getattr(module, "__file__", None)
    if file is None or not file.endswith(".py") or not Path(file).is_file():
        raise AgentInvalid(f"the agent was made in a program that is no .py file (__main__ is {file}); {_HELP}")
    return str(Path(file).resolve())

"""Finds the agent that a command line names: `MODULE:ATTRIBUTE`, with arguments for a function that makes it."""

import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from quorate_agent.agent import Agent
from quorate_agent.calling import describe
from quorate_agent.handlers import AgentInvalid
from quorate_agent.source import Source


class LoadFailed(Exception):
    """What was named is not there, or is no agent. The text is one line for people."""


def load_agent(target: str, settings: Mapping[str, str] | None = None) -> Agent:
    """The agent that `target` names, checked.

    Args:
        target: `MODULE:ATTRIBUTE`. MODULE is a dotted name, looked for in the working directory first, or
            the path of a `.py` file. ATTRIBUTE is an `Agent`, or something callable that returns one.
        settings: Keyword arguments for the callable, as text. What reads as JSON is passed as the value
            that it is (`3`, `true`, `[1, 2]`), unless the parameter is annotated `str`.

    Raises:
        LoadFailed: see its text; an exception of the user's own code is its `__cause__`.
    """
    module_name, attribute = split_target(target)
    module = _import(module_name)
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise LoadFailed(f"{module_name} has no attribute {attribute!r}{_hint(module)}") from None
    if isinstance(found, Agent):
        if settings:
            raise LoadFailed(f"{target} is an Agent already: --set is for functions that make one")
        agent = found
    elif callable(found):
        agent = _call(target, found, settings or {})
    else:
        raise LoadFailed(
            f"{target} is of type {type(found).__name__}; it must be an Agent or a function that returns one"
        )
    try:
        agent.check()
    except AgentInvalid as error:
        raise LoadFailed(f"{target}: {error}") from error
    if module_name.endswith(".py"):
        module_name = str(Path(module_name).resolve())  # the user's module may change the directory
    agent.source = Source(f"{module_name}:{attribute}", dict(settings or {}))
    return agent


def split_target(target: str) -> tuple[str, str]:
    """`MODULE:ATTRIBUTE` in its two parts.

    Raises:
        LoadFailed: it has no colon, or nothing on one side of it.
    """
    module_name, colon, attribute = target.rpartition(":")
    if not colon or not module_name or not attribute:
        raise LoadFailed(f"{target!r} is not MODULE:ATTRIBUTE, such as my_agents.tree:agent or tree.py:agent")
    return module_name, attribute


def parse_settings(pairs: list[str], option: str) -> dict[str, str]:
    """`NAME=VALUE` of a repeated option, by name.

    Raises:
        LoadFailed: one has no `=` or no name, or a name is given twice.
    """
    settings: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise LoadFailed(f"{option} {pair!r} is not NAME=VALUE")
        if name in settings:
            raise LoadFailed(f"{option} {name!r} is given twice")
        settings[name] = value
    return settings


def _import(name: str) -> ModuleType:
    if name.endswith(".py"):
        return _import_file(Path(name))
    directory = str(Path.cwd())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Missing is the module itself or a package that holds it; not something that it imports.
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise LoadFailed(
                f"there is no module {name!r}, neither in {directory} nor where Python looks; "
                "a file is named by its path, such as agents/tree.py:agent"
            ) from None
        raise _own_error(f"{name} cannot be imported", error) from error
    except (Exception, SystemExit) as error:
        raise _own_error(f"{name} cannot be imported", error) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise LoadFailed(f"there is no file {path}")
    directory = str(path.resolve().parent)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    # Under its own name, so that what it defines can be pickled; unless another module has that name.
    name = path.stem if path.stem not in sys.modules else f"quorate_agent_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise LoadFailed(f"{path} cannot be read as a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _own_error(f"{path} cannot be imported", error) from error
    return module


def _call(target: str, make: Any, settings: Mapping[str, str]) -> Agent:
    try:
        parameters = dict(inspect.signature(make).parameters)
    except (TypeError, ValueError):
        parameters = {}  # written in C, say: it will tell itself what it does not take
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    keywords = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name in settings:
        if name not in keywords and not takes_any:
            known = f"it takes {', '.join(keywords)}" if keywords else "it takes no arguments"
            raise LoadFailed(f"{target} has no argument {name!r}; {known}")
    for name, parameter in parameters.items():
        optional = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if not optional and name not in settings:
            raise LoadFailed(f"{target} needs the argument {name!r}: give --set {name}=VALUE")
    values = {
        name: text if name in keywords and keywords[name].annotation in (str, "str") else _value(text)
        for name, text in settings.items()
    }
    try:
        agent = make(**values)
    except (Exception, SystemExit) as error:
        raise _own_error(f"{target} could not make an agent", error) from error
    if not isinstance(agent, Agent):
        raise LoadFailed(f"{target} returned a {type(agent).__name__}; it must return an Agent")
    return agent


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _own_error(what: str, error: BaseException) -> LoadFailed:
    """An exception of the user's code, with the place that raised it."""
    if isinstance(error, SyntaxError) and error.filename:
        return LoadFailed(f"{what}: SyntaxError: {error.msg} ({error.filename}:{error.lineno})")
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.startswith("<frozen") and frame.filename != __file__]
    where = f" ({outside[-1].filename}:{outside[-1].lineno})" if outside else ""
    return LoadFailed(f"{what}: {describe(error)}{where}")


def _hint(module: ModuleType) -> str:
    agents = sorted(name for name, value in vars(module).items() if isinstance(value, Agent))
    return f"; it has the agents {', '.join(agents)}" if agents else ""

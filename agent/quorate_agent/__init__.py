"""Quorate's agent: the SDK to write one, and the worker that runs it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quorate_agent.agent import Agent, Context
    from quorate_agent.handlers import AgentInvalid, Declined
else:
    # Imported on first use: the command is a module of this package, and must come to see to Ctrl-C at once.
    _HOMES = {"Agent": "agent", "Context": "agent", "AgentInvalid": "handlers", "Declined": "handlers"}

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = ["Agent", "AgentInvalid", "Context", "Declined"]

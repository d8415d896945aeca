"""Quorate's agent: the SDK to write one, and the worker that runs it."""

from quorate_agent.agent import Agent, Context
from quorate_agent.handlers import AgentInvalid, Declined

__all__ = ["Agent", "AgentInvalid", "Context", "Declined"]

"""Agents for tests: one that answers at once, one that waits until it is let go."""

import asyncio
from typing import Any

from quorate_agent import Agent


def echo(name: str, answer: Any = None, **options: Any) -> Agent:
    """Answers with what it was asked, or with `answer`."""
    agent = Agent(name, **options)

    @agent.task("echo")
    async def reply(body: Any) -> Any:
        return body if answer is None else answer

    return agent


class Gated:
    """An agent whose handler waits until it is let go; then it answers with what it was asked."""

    def __init__(self, name: str, *, concurrency: int = 64, **options: Any) -> None:
        self.agent = Agent(name, concurrency=concurrency, **options)
        self.gate = asyncio.Event()
        self.begun = 0
        self.cancelled = 0
        #: Handlers that run now, and the most there ever were.
        self.running = 0
        self.running_max = 0

        @self.agent.task("echo")
        async def reply(body: Any) -> Any:
            self.begun += 1
            self.running += 1
            self.running_max = max(self.running, self.running_max)
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.running -= 1
            return body

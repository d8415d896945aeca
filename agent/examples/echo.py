"""The smallest agent: it answers with what it was asked."""

from typing import Any

from quorate_agent import Agent

agent = Agent("echo")


@agent.task("echo")
async def echo(body: Any) -> Any:
    return body

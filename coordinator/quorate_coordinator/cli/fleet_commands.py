"""`quorate status` and `drain`: the fleet. They need the base dependencies alone."""

import asyncio
import time
from collections.abc import Sequence
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.text import Text

from quorate_coordinator.cli import common
from quorate_coordinator.cli.common import (
    DEFAULT_COORDINATOR,
    CaOption,
    CoordinatorOption,
    JsonOption,
    TokenFileOption,
)
from quorate_coordinator.tables import fitted_table
from quorate_protocol.client import Client
from quorate_protocol.messages import AgentInfo, Fleet

#: Seconds between two looks at whether an agent has left.
_LEFT_POLL_S: Final = 0.2


def status(
    coordinator: CoordinatorOption = DEFAULT_COORDINATOR,
    json_output: JsonOption = False,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
) -> None:
    """Show the coordinator and its agents."""

    async def call() -> Fleet:
        async with await common.connect(coordinator, token_file, ca) as client:
            return await client.agents()

    fleet = common.run(call())
    if json_output:
        common.print_json(fleet.model_dump())
    else:
        _print_fleet(coordinator, fleet)


def drain(
    agent: Annotated[str, typer.Argument(metavar="AGENT", help="Id of the agent, as `quorate status` shows.")],
    reason: Annotated[str, typer.Option(metavar="TEXT", help="What its log shall say.")] = "drained by an operator",
    wait: Annotated[str, typer.Option(metavar="TIME", help="How long to wait until it has left; 0 does not.")] = "60s",
    coordinator: CoordinatorOption = DEFAULT_COORDINATOR,
    json_output: JsonOption = False,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
) -> None:
    """Have an agent finish what it does and end: it gets no more questions.

    Waits until it has left; exit code 1 when it has not in time, and then it is still draining. Its process ends with
    exit code 0, so that a supervisor that restarts after failures leaves it alone.
    """
    with common.errors_shown():
        wait_s = common.parse_duration("--wait", wait) or 0.0

    async def call() -> str:
        async with await common.connect(coordinator, token_file, ca) as client:
            await client.drain(agent, reason)
            return await _await_leaving(client, agent, wait_s)

    state = common.run(call())
    if json_output:
        common.print_json({"agent": agent, "state": state})
    elif state in _GONE:
        typer.echo(f"{agent} has {'left' if state == 'left' else 'gone without a goodbye'}")
    elif not wait_s:
        typer.echo(f"{agent} is {state}")
    if wait_s and state not in _GONE:
        common.fail(f"{agent} has not left within {wait_s:g} s; it is {state}", common.EXIT_OTHER)


#: States of an agent that has no session any more; `unknown` is one that is not even remembered.
_GONE: Final = ("left", "lost", "unknown")


async def _await_leaving(client: Client, agent: str, wait_s: float) -> str:
    """The agent's state once it has left, or after so many seconds."""
    ends_at = time.monotonic() + wait_s
    while True:
        fleet = await client.agents()
        # One that has no room in the listing may be there still.
        unlisted = "draining" if fleet.left_out else "unknown"
        state: str = next((info.state for info in fleet.agents if info.agent == agent), unlisted)
        if state in _GONE or time.monotonic() >= ends_at:
            return state
        await asyncio.sleep(_LEFT_POLL_S)


def _print_fleet(coordinator: str, fleet: Fleet) -> None:
    console = Console()
    closed = sum(fleet.rounds_closed.values())
    states = ", ".join(f"{count} {state}" for state, count in sorted(fleet.rounds_closed.items()))
    draining = " · draining" if fleet.draining else ""
    console.print(
        f"{coordinator} · {fleet.software} · up {_age(fleet.uptime_s)} · {fleet.rounds_open} rounds open, "
        f"{closed} closed{f' ({states})' if states else ''}{draining}",
        highlight=False,
        markup=False,
        soft_wrap=not console.is_terminal,
    )
    if not fleet.agents and not fleet.left_out:
        console.print("no agents have joined yet; start one with: quorate-agent run MODULE:ATTRIBUTE", style="yellow")
        return
    if fleet.left_out:
        typer.echo(f"{fleet.left_out} agents more have no room in one listing; metrics tell of all", err=True)
    if not console.is_terminal:
        typer.echo("agent\tstate\ttasks\tlabels\treplies\tlatency_p50_ms\tlatency_p99_ms\tweight\tseen")
        for agent in fleet.agents:
            labels = ",".join(f"{key}={value}" for key, value in agent.labels.items())
            seen = f"{_age(agent.last_seen_s)} ago"
            row = [agent.agent, agent.state, ",".join(agent.tasks), labels, *_numbers(agent), seen]
            typer.echo("\t".join(common.one_line(cell) for cell in row))
        return
    _print_table(console, fleet.agents)


def _print_table(console: Console, agents: Sequence[AgentInfo]) -> None:
    headings = ["agent", "state", "tasks", "labels", "replies", "p50/p99 ms", "weight"]
    rows = [_cells(agent) for agent in agents]
    if not any(agent.labels for agent in agents):
        headings.remove("labels")
        rows = [[*row[:3], *row[4:]] for row in rows]
    cells = [[Text(cell) for cell in row] for row in rows]
    table = fitted_table(console.width, headings, cells, left=len(headings) - 3)
    for agent, row in zip(agents, cells, strict=True):
        row[1].style = {"connected": "green", "lost": "red"}.get(agent.state, "yellow")
        table.add_row(*row)
    console.print(table)


def _cells(agent: AgentInfo) -> list[str]:
    replies, p50_ms, p99_ms, weights = _numbers(agent)
    state = agent.state if agent.state == "connected" else f"{agent.state} {_age(agent.last_seen_s)} ago"
    labels = " ".join(f"{key}={value}" for key, value in agent.labels.items())
    latency = "-" if p50_ms == "-" else f"{p50_ms}/{p99_ms}"
    return [
        common.one_line(one) for one in (agent.agent, state, " ".join(agent.tasks), labels, replies, latency, weights)
    ]


def _numbers(agent: AgentInfo) -> list[str]:
    weights = [
        f"{weight:.3f}" if len(agent.weights) == 1 else f"{task} {weight:.3f}" for task, weight in agent.weights.items()
    ]
    return [
        f"{agent.replies}/{agent.assignments}",
        "-" if agent.latency_p50_s is None else f"{agent.latency_p50_s * 1000:.1f}",
        "-" if agent.latency_p99_s is None else f"{agent.latency_p99_s * 1000:.1f}",
        " ".join(weights) or "-",
    ]


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"

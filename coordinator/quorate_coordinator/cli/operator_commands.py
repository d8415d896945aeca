"""`quorate ask`, `reveal`, `status`, `feed`: what operators do. They need the base dependencies alone."""

import asyncio
import contextlib
import itertools
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any, Final

import typer
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from quorate_coordinator.cli import common
from quorate_coordinator.cli.common import (
    DEFAULT_COORDINATOR,
    CaOption,
    CoordinatorOption,
    DeadlineOption,
    GraceOption,
    JsonOption,
    LabelOption,
    QuorumOption,
    TokenFileOption,
)
from quorate_coordinator.feeding.ahead import Interruption, read_ahead
from quorate_coordinator.feeding.report import LiveProgress, print_report
from quorate_coordinator.feeding.run import AskOptions
from quorate_coordinator.feeding.run import feed as feed_instances
from quorate_coordinator.feeding.sources import FileFormat, Instance, SourceInvalid, read_instances
from quorate_coordinator.feeding.tally import Tally
from quorate_protocol.errors import ConfigurationError, FrameMalformed, QuorateError
from quorate_protocol.messages import AgentInfo, AgentResult, Fleet, Outcome

_ANSWERED = ("complete", "quorate")


def ask(
    task: Annotated[str, typer.Argument(metavar="TASK", help="What the agents shall do.")],
    body: Annotated[str, typer.Argument(metavar="JSON", help="What they are asked; - reads it from standard input.")],
    coordinator: CoordinatorOption = DEFAULT_COORDINATOR,
    quorum: QuorumOption = None,
    grace: GraceOption = None,
    deadline: DeadlineOption = None,
    label: LabelOption = None,
    json_output: JsonOption = False,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
) -> None:
    """Ask the fleet and print the combined answer as JSON.

    On a terminal, what each agent answered is shown as well.
    """

    with common.errors_shown():
        options = _options(quorum, grace, deadline, label)
        value = common.read_json("JSON", body)

    async def call() -> Outcome:
        async with await common.connect(coordinator, token_file, ca) as client:
            return await client.ask(
                task,
                value,
                quorum=options.quorum,
                grace_s=options.grace_s,
                deadline_s=options.deadline_s,
                labels=options.labels,
            )

    outcome = common.run(call())
    if json_output:
        common.print_json(_outcome_json(outcome))
    elif sys.stdout.isatty():
        _print_outcome(outcome)
    elif outcome.state in _ANSWERED:
        with common.errors_shown():
            common.print_json(common.as_json(outcome.value))
    if outcome.state not in _ANSWERED:
        # The table and the JSON object have told it already.
        is_told = json_output or sys.stdout.isatty()
        missing = [
            f"{result.agent} {result.status}{': ' if result.error else ''}{result.error}"
            for result in outcome.results
            if result.status != "replied" and not is_told
        ]
        reason = f"round {outcome.round} {outcome.state}: {outcome.reason}"
        common.fail(reason, common.EXIT_NO_ANSWER, details=missing)


def reveal(
    round: Annotated[
        int, typer.Argument(metavar="ROUND", help="Number of the round, as `quorate ask --json` tells.", min=1)
    ],
    truth: Annotated[str, typer.Argument(metavar="JSON", help="The right answer; - reads it from standard input.")],
    coordinator: CoordinatorOption = DEFAULT_COORDINATOR,
    json_output: JsonOption = False,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
) -> None:
    """Tell the truth of a round: weights move, and its agents get it as feedback."""

    with common.errors_shown():
        value = common.read_json("JSON", truth)

    async def call() -> dict[str, Any]:
        async with await common.connect(coordinator, token_file, ca) as client:
            revealed = await client.reveal(round, value)
            return revealed.model_dump()

    result = common.run(call())
    if json_output:
        common.print_json(result)
        return
    judged = {True: "was right", False: "was wrong", None: "had no answer"}[result["correct"]]
    typer.echo(f"round {round} {judged}")
    for agent, weight in sorted(result["weights"].items()):
        right = result["right"].get(agent)
        mark = "" if right is None else ("right" if right else "wrong")
        typer.echo(f"  {agent}  {mark}  weight {weight:.3f}")


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


def feed(
    file: Annotated[str, typer.Argument(metavar="FILE", help="CSV or JSON lines; - is standard input.")],
    task: Annotated[str, typer.Option(metavar="TASK", help="What the agents shall do with each row.")],
    target: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column (or key) with the truth, revealed after each answer.")
    ] = None,
    file_format: Annotated[
        str | None, typer.Option("--format", metavar="csv|jsonl", help="Instead of going by the file's name.")
    ] = None,
    skip: Annotated[
        int, typer.Option(metavar="N", help="Leave out the first N rows: those fed before, say.", min=0)
    ] = 0,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Feed at most N rows.", min=1)] = None,
    coordinator: CoordinatorOption = DEFAULT_COORDINATOR,
    quorum: QuorumOption = None,
    grace: GraceOption = None,
    deadline: DeadlineOption = None,
    label: LabelOption = None,
    json_output: JsonOption = False,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
) -> None:
    """Feed a file row by row: ask, compare with the target, reveal it, go on.

    Prints the accuracy of each agent and of their combined answer. In CSV, numbers are read as numbers,
    true and false as such, and an empty value is left out.
    """
    with common.errors_shown():
        if file_format not in (None, "csv", "jsonl"):
            raise ConfigurationError("--format", f"{file_format!r} is neither csv nor jsonl")
        options = _options(quorum, grace, deadline, label)
    chosen: FileFormat | None = "csv" if file_format == "csv" else "jsonl" if file_format == "jsonl" else None
    tally = Tally()
    line = 0
    began = time.monotonic()

    async def instances(
        rows: Iterator[Instance], interruption: Interruption
    ) -> AsyncGenerator[tuple[Any, Any, bool], None]:
        nonlocal line
        async with contextlib.aclosing(read_ahead(rows, interruption)) as ahead:
            async for row in ahead:
                line = row.line
                yield row.features, row.truth, row.has_truth

    async def call(rows: Iterator[Instance], interruption: Interruption) -> None:
        nonlocal began
        async with await common.connect(coordinator, token_file, ca) as client:
            began = time.monotonic()
            with LiveProgress(f"feed {file}", tally, limit) as progress:
                async with contextlib.aclosing(instances(rows, interruption)) as fed:
                    await feed_instances(
                        client, task, fed, tally, options=options, on_outcome=lambda outcome: progress.update()
                    )

    problem, code = "", 0
    with contextlib.closing(Interruption()) as interruption:
        rows = read_instances(file, target=target, file_format=chosen, interruption=interruption)
        try:
            # What is wrong with the file shows before anybody is connected to.
            first = list(itertools.islice(rows, skip, skip + 1))
            asyncio.run(call(itertools.islice(itertools.chain(first, rows), limit), interruption))
        except (QuorateError, ValidationError, KeyboardInterrupt) as error:
            problem, code = common.explain(error)
            if line and not isinstance(error, SourceInvalid | KeyboardInterrupt):
                problem = f"{file}, line {line}: {problem}"
    elapsed_s = time.monotonic() - began
    # What was answered before an error is not lost.
    if not problem or tally.instances:
        if json_output:
            ended = {"error": common.one_line(problem)} if problem else {}
            common.print_json({"file": file, "states": dict(tally.states), **tally.as_json(elapsed_s), **ended})
        else:
            print_report(f"{file} (up to the error)" if problem else file, tally, elapsed_s)
    if problem:
        common.fail(problem, code)
    if tally.instances and not tally.answered:
        common.fail("no round brought an answer", common.EXIT_NO_ANSWER)


def _options(quorum: str | None, grace: str | None, deadline: str | None, label: list[str] | None) -> AskOptions:
    return AskOptions(
        quorum=common.parse_quorum(quorum),
        grace_s=common.parse_duration("--grace", grace),
        deadline_s=common.parse_duration("--deadline", deadline),
        labels=common.parse_labels(label),
    )


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "round": outcome.round,
        "task": outcome.task,
        "state": outcome.state,
        "reason": outcome.reason,
        "quorum": outcome.quorum,
        "answer": common.as_json(outcome.value),
        "support": outcome.support,
        "duration_ms": _ms(outcome.duration_s),
        "results": [
            {
                "agent": result.agent,
                "status": result.status,
                "answer": answer,
                "error": error,
                "weight": result.weight,
                "latency_ms": None if result.latency_s is None else _ms(result.latency_s),
                "compute_ms": _ms(result.compute_s),
            }
            for result in outcome.results
            for answer, error in [_answer_of(result)]
        ],
    }


def _answer_of(result: AgentResult) -> tuple[Any, str]:
    """What an agent answered, as JSON has it, and its error: also that of an answer that cannot be read."""
    try:
        return common.as_json(result.value), result.error
    except FrameMalformed as error:
        return None, f"its answer cannot be read: {error}"


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _print_outcome(outcome: Outcome) -> None:
    console = Console()
    if outcome.state in _ANSWERED:
        with common.errors_shown():
            console.print(Text(_json_line(common.as_json(outcome.value)), style="bold green"))
    table = _table()
    table.add_column("agent", overflow="fold", min_width=12)
    table.add_column("status", no_wrap=True)
    table.add_column("answer", overflow="fold")
    for heading in ("weight", "latency ms", "compute ms"):
        table.add_column(heading, justify="right")
    for result in outcome.results:
        answered = result.status == "replied"
        answer, error = _answer_of(result)
        table.add_row(
            result.agent,
            Text(result.status, style="" if answered else "yellow"),
            Text(common.one_line(error)) if error else Text(_json_line(answer) if answered else ""),
            "-" if result.weight is None else f"{result.weight:.3f}",
            "-" if result.latency_s is None else f"{result.latency_s * 1000:.1f}",
            f"{result.compute_s * 1000:.1f}" if answered else "-",
        )
    console.print(table)
    support = "" if outcome.support is None else f" · support {outcome.support:.0%}"
    replied = sum(result.status == "replied" for result in outcome.results)
    console.print(
        f"round {outcome.round} {outcome.state} in {outcome.duration_s * 1000:.1f} ms · "
        f"{replied} of {len(outcome.results)} replied, quorum {outcome.quorum}{support}",
        highlight=False,
        style="dim",
    )


def _json_line(value: Any) -> str:
    return common.json_text(value)


#: Columns that a table of the fleet needs beside the agents' names.
_FLEET_WIDTH: Final = 70


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
        soft_wrap=True,
    )
    if not fleet.agents:
        console.print("no agents have joined yet; start one with: quorate-agent run MODULE:ATTRIBUTE", style="yellow")
        return
    if not console.is_terminal:
        typer.echo("agent\tstate\ttasks\tlabels\treplies\tlatency_p50_ms\tlatency_p99_ms\tweight\tseen")
        for agent in fleet.agents:
            labels = ",".join(f"{key}={value}" for key, value in agent.labels.items())
            seen = f"{_age(agent.last_seen_s)} ago"
            row = [agent.agent, agent.state, ",".join(agent.tasks), labels, *_numbers(agent), seen]
            typer.echo("\t".join(common.one_line(cell) for cell in row))
        return
    has_labels = any(agent.labels for agent in fleet.agents)
    table = _table()
    # Of a fixed width, or it would be the first to be squeezed.
    width = min(max(len(agent.agent) for agent in fleet.agents), max(12, console.width - _FLEET_WIDTH))
    table.add_column("agent", overflow="fold", width=width)
    for heading in ("state", "tasks", "labels") if has_labels else ("state", "tasks"):
        table.add_column(heading, overflow="fold")
    for heading in ("replies", "p50/p99 ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("weight", justify="right", overflow="fold")
    for agent in fleet.agents:
        replies, p50_ms, p99_ms, weights = _numbers(agent)
        is_here = agent.state == "connected"
        state = agent.state if is_here else f"{agent.state} {_age(agent.last_seen_s)} ago"
        labels = " ".join(f"{key}={value}" for key, value in agent.labels.items())
        style = "green" if is_here else "red" if agent.state == "lost" else "yellow"
        table.add_row(
            agent.agent,
            Text(state, style=style),
            Text(" ".join(agent.tasks)),
            *([Text(common.one_line(labels))] if has_labels else []),
            replies,
            "-" if p50_ms == "-" else f"{p50_ms}/{p99_ms}",
            weights,
        )
    console.print(table)


def _table() -> Table:
    return Table(header_style="bold", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))


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

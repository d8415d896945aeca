"""`quorate ask`, `reveal`, `status`, `feed`: what operators do. They need the base dependencies alone."""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any

import typer

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
from quorate_protocol.command import interruptible
from quorate_protocol.errors import CallFailed, ConfigurationError, LinkError, QuorateError


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
        int,
        typer.Option(
            metavar="N", help="Leave out the first N rows: those fed before, say.", min=0, max=common.COUNT_MAX
        ),
    ] = 0,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Feed at most N rows.", min=1, max=common.COUNT_MAX)
    ] = None,
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
            with interruptible():
                first = list(itertools.islice(rows, skip, skip + 1))
                asyncio.run(call(itertools.islice(itertools.chain(first, rows), limit), interruption))
        except (QuorateError, KeyboardInterrupt) as error:
            problem, code = common.explain(error)
            if line and not isinstance(error, SourceInvalid | KeyboardInterrupt):
                problem = f"{file}, line {line}: {problem}"
            if tally.instances and (isinstance(error, LinkError) or (isinstance(error, CallFailed) and error.retry)):
                problem += f"; to go on from there: --skip {skip + tally.instances}"
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

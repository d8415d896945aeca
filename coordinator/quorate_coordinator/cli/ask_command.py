"""`quorate ask`: one round, from its question to what each agent said. It needs the base dependencies alone."""

import asyncio
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final

import typer
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
from quorate_coordinator.tables import fitted_table
from quorate_protocol.client import Replies
from quorate_protocol.errors import BodyMissing, CallFailed, FrameMalformed, LinkError, Refused
from quorate_protocol.fields import BodyRef
from quorate_protocol.limits import BODY_BYTES_MAX
from quorate_protocol.messages import AgentResult, Outcome

#: States in which there is an answer.
ANSWERED: Final = ("complete", "quorate")

#: Seconds before a question is asked again, at first and at most.
_RETRY_PAUSE_S: Final = 0.25
_RETRY_PAUSE_S_MAX: Final = 5.0


def ask(
    task: Annotated[str, typer.Argument(metavar="TASK", help="What the agents shall do.")],
    body: Annotated[str, typer.Argument(metavar="JSON", help="What they are asked; - reads it from standard input.")],
    coordinator: CoordinatorOption = DEFAULT_COORDINATOR,
    quorum: QuorumOption = None,
    grace: GraceOption = None,
    deadline: DeadlineOption = None,
    label: LabelOption = None,
    count: Annotated[
        int | None, typer.Option(metavar="N", help="Ask at most N agents, those with the greatest weight.", min=1)
    ] = None,
    attempts: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Ask one agent up to N times: again when it failed or came back.", min=1, max=100
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Show each agent's answer as it comes; as JSON lines when piped or --json.")
    ] = False,
    key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Idempotency key: asked again under it, the round's outcome is told again."),
    ] = None,
    retry: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Ask again, for so long, when the coordinator is busy or cannot be reached. Without --key, under a "
            "key of its own: it stays one round.",
        ),
    ] = None,
    json_output: JsonOption = False,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
) -> None:
    """Ask the fleet and print the combined answer as JSON.

    On a terminal, what each agent answered is shown as well.
    """

    with common.errors_shown():
        retry_s = common.parse_duration("--retry", retry) or 0.0
        if retry_s and key is None:
            key = f"ask-{secrets.token_hex(8)}"  # however often it is asked, it is one round
        wanted: dict[str, Any] = {
            "quorum": common.parse_quorum(quorum),
            "grace_s": common.parse_duration("--grace", grace),
            "deadline_s": common.parse_duration("--deadline", deadline),
            "labels": common.parse_labels(label),
            "count": count,
            "attempts": attempts,
            "key": key,
        }
        value = common.read_json("JSON", body)

    aloud = _Aloud(as_json=json_output or not sys.stdout.isatty())

    async def call() -> Outcome:
        async with await common.connect(coordinator, token_file, ca) as client:
            if stream:
                return await aloud.ask(client.ask_stream(task, value, **wanted))
            return await client.ask(task, value, **wanted)

    outcome = common.run(_retry(call, retry_s))
    _show(outcome, json_output=json_output, was_streamed=stream)
    if outcome.state not in ANSWERED:
        # The table and the JSON object have told it already.
        is_told = json_output or stream or sys.stdout.isatty()
        missing = [
            f"{result.agent} {result.status}{': ' if result.error else ''}{result.error}"
            for result in outcome.results
            if result.status != "replied" and not is_told
        ]
        reason = f"round {outcome.round} {outcome.state}: {outcome.reason}"
        common.fail(reason, common.EXIT_NO_ANSWER, details=missing)


async def _retry(call: Callable[[], Awaitable[Outcome]], retry_s: float) -> Outcome:
    """The outcome of a call that is made again while what went wrong may be over later, and there is time."""
    ends_at = time.monotonic() + retry_s
    pause_s = _RETRY_PAUSE_S
    while True:
        try:
            return await call()
        except (LinkError, CallFailed, Refused) as error:
            may_pass = isinstance(error, LinkError) or error.retry
            if not may_pass or time.monotonic() + pause_s > ends_at:
                raise
            typer.echo(f"quorate: {common.one_line(str(error))}; asking again in {pause_s:g} s", err=True)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _RETRY_PAUSE_S_MAX)


class _Aloud:
    """Shows each part of a round as it ends; once, however often the round is asked for."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._began_at = time.monotonic()
        self._round: int | None = None
        self._shown: set[str] = set()

    async def ask(self, asked: Replies) -> Outcome:
        async with asked as replies:
            async for result in replies:
                if replies.round != self._round:
                    self._round, self._shown = replies.round, set()
                if result.agent not in self._shown:
                    self._shown.add(result.agent)
                    self._show(result)
            return replies.outcome

    def _show(self, result: AgentResult) -> None:
        if self._as_json:
            typer.echo(common.json_text({"round": self._round, "part": _result_json(result)}))
        else:
            _print_part(result, time.monotonic() - self._began_at)


def _print_part(result: AgentResult, elapsed_s: float) -> None:
    answer, error = _answer_of(result)
    said = common.one_line(error) if error else common.json_text(answer) if result.status == "replied" else ""
    line = Text(f"{elapsed_s * 1000:9.1f} ms  ", style="dim")
    line.append(f"{result.agent}  ")
    line.append(result.status, style="green" if result.status == "replied" else "yellow")
    line.append(f"  {said}")
    Console().print(line, soft_wrap=True)


def _show(outcome: Outcome, *, json_output: bool, was_streamed: bool) -> None:
    if was_streamed and (json_output or not sys.stdout.isatty()):
        typer.echo(common.json_text({"outcome": _outcome_json(outcome)}))
    elif json_output:
        common.print_json(_outcome_json(outcome))
    elif sys.stdout.isatty():
        _print_outcome(outcome, has_table=not was_streamed)
    elif outcome.state in ANSWERED:
        with common.errors_shown():
            is_large = outcome.bulk is not None and _is_large(outcome.bulk)
            common.print_json(_answer_json(outcome) if is_large else _shown(outcome))


def _answer_json(answered: Outcome | AgentResult) -> dict[str, Any]:
    """An answer under its name; of a large one, under that name with `_ref`, size, digest and what it is.

    Raises:
        FrameMalformed: it cannot be read.
    """
    ref = answered.bulk
    if ref is None or not _is_large(ref):
        return {"answer": _shown(answered)}
    return {"answer": None, "answer_ref": {"size": ref.size, "digest": ref.digest.hex(), "is": _shown(answered)}}


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "round": outcome.round,
        "task": outcome.task,
        "state": outcome.state,
        "reason": outcome.reason,
        "quorum": outcome.quorum,
        **_answer_json(outcome),
        "support": outcome.support,
        "duration_ms": _ms(outcome.duration_s),
        "results": [_result_json(result) for result in outcome.results],
        "left_out": outcome.left_out,
    }


def _result_json(result: AgentResult) -> dict[str, Any]:
    try:
        answer, error = _answer_json(result), result.error
    except FrameMalformed as malformed:
        answer, error = {"answer": None}, _unreadable(malformed)
    return {
        "agent": result.agent,
        "status": result.status,
        **answer,
        "error": error,
        "weight": result.weight,
        "latency_ms": None if result.latency_s is None else _ms(result.latency_s),
        "compute_ms": _ms(result.compute_s),
    }


def _answer_of(result: AgentResult) -> tuple[Any, str]:
    """What an agent answered, as JSON has it, and its error: also that of an answer that cannot be read."""
    try:
        return _shown(result), result.error
    except FrameMalformed as error:
        return None, _unreadable(error)


def _unreadable(error: FrameMalformed) -> str:
    return f"its answer cannot be read: {error}"


def _is_large(ref: BodyRef) -> bool:
    """Whether nobody wants to see all of it. One that travelled by itself for want of room beside others is not."""
    return ref.size > BODY_BYTES_MAX or ref.content is None


def _shown(answered: Outcome | AgentResult) -> Any:
    """An answer as JSON has it; of a large one, in words what it is: nobody reads millions of numbers.

    Raises:
        FrameMalformed: it cannot be read.
    """
    ref = answered.bulk
    if ref is None or not _is_large(ref):
        return common.as_json(answered.value)
    try:
        value = answered.value
    except BodyMissing as error:
        return str(error)
    kind = type(value).__name__
    if hasattr(value, "dtype"):
        kind = f"array of {value.dtype}, {' x '.join(map(str, value.shape))}"
    elif isinstance(value, list | dict | str | bytes):
        kind += f" of {len(value)}"
    return f"{kind} ({ref.size} bytes)"


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _print_outcome(outcome: Outcome, *, has_table: bool = True) -> None:
    console = Console()
    if outcome.state in ANSWERED:
        with common.errors_shown():
            console.print(Text(common.json_text(_shown(outcome)), style="bold green"))
    if has_table:
        console.print(_table_of(outcome, console.width))
    support = "" if outcome.support is None else f" · support {outcome.support:.0%}"
    replied = sum(result.status == "replied" for result in outcome.results)
    left_out = f" · {outcome.left_out} more agents are left out" if outcome.left_out else ""
    console.print(
        f"round {outcome.round} {outcome.state} in {outcome.duration_s * 1000:.1f} ms · "
        f"{replied} of {len(outcome.results)} replied, quorum {outcome.quorum}{support}{left_out}",
        highlight=False,
        style="dim",
    )


def _table_of(outcome: Outcome, width: int) -> Table:
    """A line for each agent."""
    rows = []
    for result in outcome.results:
        answered = result.status == "replied"
        answer, error = _answer_of(result)
        rows.append(
            [
                Text(result.agent),
                Text(result.status, style="" if answered else "yellow"),
                Text(common.one_line(error) if error else common.json_text(answer) if answered else ""),
                Text("-" if result.weight is None else f"{result.weight:.3f}"),
                Text("-" if result.latency_s is None else f"{result.latency_s * 1000:.1f}"),
                Text(f"{result.compute_s * 1000:.1f}" if answered else "-"),
            ]
        )
    headings = ("agent", "status", "answer", "weight", "latency ms", "compute ms")
    table = fitted_table(width, headings, rows, left=3)
    for row in rows:
        table.add_row(*row)
    return table

"""The command `quorate-agent`: run an agent, or look at one.

Exit codes: 0 ended as asked; 1 something else; 2 the command line, a file it names or the agent is
wrong; 3 the coordinator refused the agent; 4 another agent took its id; 5 no coordinator was reached in
time; 130 interrupted twice.
"""

import os
import socket
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from quorate_agent.agent import Agent, check_concurrency, check_name, make_name
from quorate_agent.events import EndingKind
from quorate_agent.loading import LoadFailed, load_agent, parse_settings, split_target
from quorate_protocol import __version__, logs
from quorate_protocol.credentials import find_ca, find_token
from quorate_protocol.errors import LocalError

EXIT_OTHER: Final = 1
EXIT_USAGE: Final = 2
EXIT_REFUSED: Final = 3
EXIT_REPLACED: Final = 4
EXIT_UNREACHABLE: Final = 5

_EXIT_CODES: Final = {
    EndingKind.STOPPED: 0,
    EndingKind.REFUSED: EXIT_REFUSED,
    EndingKind.REPLACED: EXIT_REPLACED,
    EndingKind.UNREACHABLE: EXIT_UNREACHABLE,
}


class LogLevel(StrEnum):
    """Choices of `--log-level`."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


class LogFormat(StrEnum):
    """Choices of `--log-format`."""

    auto = "auto"
    json = "json"
    console = "console"


app = typer.Typer(
    name="quorate-agent",
    help="Run an agent of a Quorate fleet.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:ATTRIBUTE",
        help="Module (dotted, or the path of a .py file) and in it the Agent, or a function that returns one.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Argument for the function that makes the agent; numbers, true, false and other JSON are read as such. "
        "Repeatable.",
    ),
]


@app.callback(invoke_without_command=True)
def callback(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"quorate-agent {__version__}")
        raise typer.Exit


@app.command()
def run(
    target: TargetArgument,
    coordinator: Annotated[
        str,
        typer.Option(envvar="QUORATE_COORDINATOR", metavar="URL", help="Address of the coordinator."),
    ] = "quic://localhost:4433",
    agent_id: Annotated[
        str | None,
        typer.Option(
            "--id",
            envvar="QUORATE_AGENT_ID",
            metavar="NAME",
            help="Identity in the fleet, instead of the agent's own name; without either, one made of host, agent and "
            "process.",
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Label, beside the agent's own. Repeatable."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File that holds the token (mode 0600). Otherwise QUORATE_TOKEN, the file QUORATE_TOKEN_FILE, or "
            "that of a coordinator on this machine.",
        ),
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="PEM file of the authorities to trust. Otherwise the file QUORATE_CA, that of a coordinator on this "
            "machine, or the system's.",
        ),
    ] = None,
    settings: SetOption = None,
    concurrency: Annotated[
        int | None,
        typer.Option(metavar="N", help="Assignments to work on at once, instead of the agent's own number.", min=1),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Processes that run plain (not async) handlers, instead of the agent's own number; 0 runs them in "
            "threads. For handlers that compute for seconds. Each has its own copy of the agent, and learns from all "
            "feedback; at least N assignments are worked on at once.",
            min=0,
        ),
    ] = None,
    drain_timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="How long handlers may finish after SIGTERM or SIGINT.", min=0),
    ] = 30.0,
    max_wait: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", help="Give up (exit code 5) after so long without a coordinator; otherwise never.", min=0
        ),
    ] = None,
    log_level: Annotated[LogLevel, typer.Option(envvar="QUORATE_LOG_LEVEL")] = LogLevel.info,
    log_format: Annotated[
        LogFormat, typer.Option(envvar="QUORATE_LOG_FORMAT", help="auto: console on a terminal, otherwise JSON lines.")
    ] = LogFormat.auto,
) -> None:
    """Join a coordinator and answer its assignments until told to stop.

    Connects again by itself whenever the coordinator is away. SIGTERM and SIGINT let running handlers
    finish first; a second SIGINT does not.
    """
    logs.configure(log_level.value, log_format.value)
    agent = _load(target, settings, debug=log_level is LogLevel.debug)
    from quorate_agent.service import serve  # the transport and its cryptography take a moment to import
    from quorate_agent.worker import Worker
    from quorate_protocol.transport import ClientTls
    from quorate_protocol.transport.address import parse_url

    try:
        if processes is not None:
            agent.set_processes(processes)
        worker = Worker(
            agent,
            str(parse_url(coordinator)),
            agent_id=_choose_id(agent_id, agent, target),
            token=find_token(token_file),
            tls=ClientTls(ca_file=find_ca(ca)),
            labels=parse_settings(label or [], "--label"),
            concurrency=None if concurrency is None else check_concurrency(concurrency),
            drain_timeout_s=drain_timeout,
            max_wait_s=max_wait,
        )
        ending = serve(worker)
    except (LoadFailed, LocalError) as error:
        _fail(str(error), EXIT_USAGE)
    code = _EXIT_CODES[ending.kind]
    if code:
        _fail(
            ending.message
            if ending.kind is not EndingKind.REFUSED
            else _explain_refusal(ending.refusal, ending.message),
            code,
        )


@app.command()
def check(target: TargetArgument, settings: SetOption = None) -> None:
    """Load an agent and list its tasks, without connecting."""
    agent = _load(target, settings)
    typer.echo(f"name: {agent.name or '(chosen when it runs)'}")
    typer.echo(f"concurrency: {agent.concurrency}")
    typer.echo(f"processes: {agent.processes or 'none, plain functions run in threads'}")
    for key, value in agent.labels.items():
        typer.echo(f"label: {key}={value}")
    for task in agent.tasks:
        typer.echo(f"task: {task}{' (learns from feedback)' if task in agent.feedback_handlers else ''}")


def _load(target: str, settings: list[str] | None, *, debug: bool = False) -> Agent:
    try:
        return load_agent(target, parse_settings(settings or [], "--set"))
    except LoadFailed as error:
        if debug and error.__cause__ is not None:
            import traceback

            typer.echo("".join(traceback.format_exception(error.__cause__)), err=True, nl=False)
        _fail(str(error), EXIT_USAGE)


def _choose_id(given: str | None, agent: Agent, target: str) -> str:
    if given is not None:
        return check_name("--id", given)
    if agent.name is not None:
        return agent.name
    module_name, attribute = split_target(target)
    # `agent` in `tree.py` is the tree; a telling name stands for itself.
    module = Path(module_name).stem if module_name.endswith(".py") else module_name.rpartition(".")[2]
    part = attribute if attribute not in ("agent", "make_agent", "create_agent", "build") else module
    return make_name(f"{socket.gethostname()}-{part}-{os.getpid()}")


def _explain_refusal(reason: str, message: str) -> str:
    text = f"the coordinator refused this agent ({reason}): {message}"
    if reason == "unauthenticated":
        text += "; is the token that of this coordinator? See --token-file"
    return text


def _fail(message: str, code: int) -> NoReturn:
    # One line, whatever a peer or a file put into the text.
    typer.echo(f"quorate-agent: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)

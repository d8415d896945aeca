"""The command `quorate`: the coordinator, the operator's commands, the demo, the benchmarks.

Exit codes: 0 done; 1 something else; 2 the command line, a file it names or a setting is wrong, or an
extra is not installed; 3 the coordinator refused us; 5 no coordinator was reached; 6 the coordinator could
not do what it was asked: a round was not opened or brought no answer, there is no such agent; 130 interrupted.

Modules that need an extra are imported by the command that needs them, so that the others work with
the base dependencies alone.
"""

from typing import Annotated

import typer

from quorate_coordinator.cli import (
    ask_command,
    fleet_commands,
    journal_commands,
    operator_commands,
    service_commands,
    simulate_command,
)
from quorate_protocol import __version__

app = typer.Typer(
    name="quorate",
    help="Coordinate a fleet of agents: ask them all, combine their answers, learn whom to trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def callback(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"quorate {__version__}")
        raise typer.Exit


# The short texts fit one line of the listing.
app.command("coordinator", short_help="Run the coordinator.")(service_commands.coordinator)
app.command("ask", short_help="Ask the fleet; print the combined answer.")(ask_command.ask)
app.command("reveal", short_help="Tell the truth of a round.")(operator_commands.reveal)
app.command("status", short_help="Show the coordinator and its agents.")(fleet_commands.status)
app.command("drain", short_help="Have an agent finish and leave.")(fleet_commands.drain)
app.command("feed", short_help="Feed a file row by row; report accuracy.")(operator_commands.feed)
app.command("demo", short_help="See six agents at work on real data.")(service_commands.demo)
app.command("simulate", short_help="Search for bugs under virtual time.")(simulate_command.simulate)
app.add_typer(journal_commands.journal, name="journal", short_help="Check, export or prune the journal.")
app.add_typer(service_commands.bench, name="bench")

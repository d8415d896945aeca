"""`quorate simulate`: a fleet under virtual time, with every fault that we know."""

import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from quorate_coordinator.cli import common
from quorate_protocol.errors import ConfigurationError


def simulate(
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="What all is drawn from; any, and printed.", min=0)
    ] = None,
    agents: Annotated[int, typer.Option(metavar="N", help="Agents in the fleet.", min=1)] = 50,
    hours: Annotated[float, typer.Option(metavar="H", help="Virtual hours.", min=0.0)] = 0.5,
    faults: Annotated[
        str, typer.Option(metavar="KINDS", help="What goes wrong: all, none, or a list such as loss,partition.")
    ] = "all",
    seeds: Annotated[
        int | None, typer.Option(metavar="K", help="Run so many seeds in a row, from --seed up.", min=1)
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Run one seed after the other until this time is over: 60s, 5m.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Play this plan, as a run that failed has written it.")
    ] = None,
    json_output: common.JsonOption = False,
) -> None:
    """Run the cores of coordinator and agents under virtual time, and check what must hold after every event.

    Messages are lost, held up and doubled, agents and the coordinator crash, hang and stand still, the disk is full.
    The same seed gives the same run, byte for byte. A run that violates an invariant is shortened, its plan written to
    simulation-SEED.json, and the exit code is 1.
    """
    common.require_extra("coordinator")
    from quorate_coordinator.bench.report import showing_progress
    from quorate_coordinator.simulation.report import Totals, as_json, as_text
    from quorate_coordinator.simulation.run import Simulation
    from quorate_coordinator.simulation.shorten import shorten

    totals = Totals()
    with common.errors_shown(), showing_progress("simulate") as progress:
        for wanted in _plans(seed, agents, hours, faults, seeds, budget, plan):
            title = f"seed {wanted.seed}"

            def show(what: float | str, title: str = title) -> None:
                progress(f"{title}  {what:.0%}" if isinstance(what, float) else f"{title} shortened: {what}")

            report = Simulation(wanted).run(show)
            totals.add(report)
            if report.violation is not None:
                typer.echo(f"seed {wanted.seed} fails; looking for a shorter run that does", err=True)
                shorter = shorten(report, progress=show)
                command = _keep(shorter.plan)
                if json_output:
                    common.print_json(as_json(report, shorter, command))
                else:
                    typer.echo(as_text(report, shorter, command))
                raise typer.Exit(common.EXIT_OTHER)
            if totals.runs > 1 and not json_output:
                typer.echo(f"{title}: {report.events} events, {sum(report.rounds.values())} rounds", err=True)
    if json_output:
        common.print_json(totals.as_json())
    else:
        typer.echo(totals.as_text())


def _keep(plan: Any) -> str:
    """Writes the plan of a run that failed; the command that plays it, or why there is none."""
    file = Path(f"simulation-{plan.seed}.json")
    try:
        file.write_text(plan.to_json(), encoding="utf-8")
    except OSError as error:
        return f"its plan could not be written to {file}: {error.strerror}"
    return f"quorate simulate --plan {file}"


def _plans(
    seed: int | None,
    agents: int,
    hours: float,
    faults: str,
    seeds: int | None,
    budget: str | None,
    file: Path | None,
) -> Iterator[Any]:
    """The plans to play, one after the other.

    Raises:
        ConfigurationError: an option makes no sense, or not with another one.
    """
    from quorate_coordinator.simulation.plan import Plan
    from quorate_coordinator.simulation.planning import make_plan, parse_kinds

    if file is not None:
        if seed is not None or seeds is not None or budget is not None:
            raise ConfigurationError("--plan", "has its own seed: leave --seed, --seeds and --budget out")
        try:
            yield Plan.from_json(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError("--plan", f"cannot read {file}: {error}") from None
        return
    if seeds is not None and budget is not None:
        raise ConfigurationError("--budget", "says when to stop; --seeds does, too: only one of them")
    kinds = parse_kinds(faults)
    budget_s = common.parse_duration("--budget", budget)
    first = secrets.randbelow(1 << 31) if seed is None else seed
    ends_at = None if budget_s is None else time.monotonic() + budget_s
    number = 0
    while number < (seeds or 1) or (ends_at is not None and time.monotonic() < ends_at):
        yield make_plan(first + number, agents=agents, hours=hours, kinds=kinds)
        number += 1

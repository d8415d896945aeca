"""`quorate simulate`: a fleet under virtual time, with every fault that we know."""

import io
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from quorate_coordinator.cli import common
from quorate_protocol.errors import ConfigurationError


def simulate(
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="What all is drawn from; any, and printed.", min=0)
    ] = None,
    agents: Annotated[int, typer.Option(metavar="N", help="Agents in the fleet, 1 to 16384.")] = 50,
    hours: Annotated[float, typer.Option(metavar="H", help="Virtual hours, 0.06 to 1000.")] = 0.5,
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
    engine: Annotated[
        str,
        typer.Option(
            metavar="ENGINE",
            help="model: the cores in models of their shells; quic: all that is real, with up to 100 agents.",
        ),
    ] = "model",
    json_output: common.JsonOption = False,
) -> None:
    """Run the cores of coordinator and agents under virtual time, and check what must hold after every event.

    Messages are lost, held up and doubled, agents and the coordinator crash, hang and stand still, links break, clocks
    are set, the disk is full; up to 100 agents it is a real journal, torn at crashes. The same seed gives the same run,
    byte for byte. A run that violates an invariant is shortened, its plan written to simulation-SEED.json, and the exit
    code is 1.

    After every event: deadlines. At every event of a round, a member or an agent: all that it concerns, and ceilings.
    At every commit, pruning, crash and restart: what is durable, announced and learned. Every 60 virtual seconds: all
    members and who can be asked. At the end: that all is at rest.

    With --engine quic the same plan is played by real coordinators, workers and clients over QUIC in memory; what
    happens then is not the same to the byte, and is not shortened.
    """
    common.require_extra("coordinator")
    from quorate_coordinator.bench.report import showing_progress
    from quorate_coordinator.simulation.report import Totals, as_json, as_text
    from quorate_coordinator.simulation.run import Simulation
    from quorate_coordinator.simulation.shorten import shorten
    from quorate_protocol import logs

    # What goes wrong here is meant to.
    logs.configure("error", "json", stream=_Nowhere())
    totals = Totals()
    with common.errors_shown(), showing_progress("simulate") as progress:
        for wanted in _plans(seed, agents, hours, faults, seeds, budget, plan, engine):
            title = f"seed {wanted.seed}"

            def show(what: float | str, title: str = title) -> None:
                progress(f"{title}  {what:.0%}" if isinstance(what, float) else f"{title} shortened: {what}")

            report = _play_quic(wanted, show) if engine == "quic" else Simulation(wanted).run(show)
            totals.add(report)
            if report.violation is not None:
                shorter = report
                if engine == "model":
                    typer.echo(f"seed {wanted.seed} fails; looking for a shorter run that does", err=True)
                    shorter = shorten(report, progress=show)
                command = _keep(shorter.plan, engine)
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


class _Nowhere(io.StringIO):
    """Keeps nothing of what is written."""

    def write(self, text: str) -> int:
        return len(text)


def _play_quic(plan: Any, show: Callable[[float | str], None]) -> Any:
    from quorate_coordinator.quic_simulation.run import simulate_quic

    return simulate_quic(plan, show)


def _keep(plan: Any, engine: str) -> str:
    """Writes the plan of a run that failed; the command that plays it, or why there is none."""
    file = Path(f"simulation-{plan.seed}.json")
    try:
        file.write_text(plan.to_json(), encoding="utf-8")
    except OSError as error:
        return f"its plan could not be written to {file}: {error.strerror}"
    return f"quorate simulate --plan {file}{'' if engine == 'model' else f' --engine {engine}'}"


def _playable(plan: Any, kinds: Iterable[str]) -> Any:
    from quorate_coordinator.quic_simulation.run import playable

    return playable(plan, kinds)


def _plans(
    seed: int | None,
    agents: int,
    hours: float,
    faults: str,
    seeds: int | None,
    budget: str | None,
    file: Path | None,
    engine: str,
) -> Iterator[Any]:
    """The plans to play, one after the other.

    Raises:
        ConfigurationError: an option makes no sense, or not with another one.
    """
    from quorate_coordinator.simulation.plan import Plan
    from quorate_coordinator.simulation.planning import make_plan, parse_kinds

    if engine not in ("model", "quic"):
        raise ConfigurationError("--engine", f"is model or quic, and not {engine!r}")
    if file is not None:
        if seed is not None or seeds is not None or budget is not None:
            raise ConfigurationError("--plan", "has its own seed: leave --seed, --seeds and --budget out")
        try:
            plan = Plan.from_json(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigurationError("--plan", f"cannot read {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigurationError("--plan", f"{file} is not UTF-8 text (at byte {error.start})") from None
        yield plan if engine == "model" else _playable(plan, [fault.kind for fault in plan.faults])
        return
    if seeds is not None and budget is not None:
        raise ConfigurationError("--budget", "says when to stop; --seeds does, too: only one of them")
    kinds = parse_kinds(faults)
    budget_s = common.parse_duration("--budget", budget)
    first = secrets.randbelow(1 << 31) if seed is None else seed
    ends_at = None if budget_s is None else time.monotonic() + budget_s
    number = 0
    while number < (seeds or 1) or (ends_at is not None and time.monotonic() < ends_at):
        plan = make_plan(first + number, agents=agents, hours=hours, kinds=kinds)
        yield plan if engine == "model" else _playable(plan, () if faults == "all" else kinds)
        number += 1

"""`quorate simulate`: a fleet under virtual time, with every fault that we know."""

import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quorate_coordinator.cli import common
from quorate_protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from quorate_coordinator.simulation.plan import Plan
    from quorate_coordinator.simulation.run import Report


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
    from quorate_coordinator.simulation.run import Simulation
    from quorate_coordinator.simulation.shorten import shorten

    with common.errors_shown(), showing_progress("simulate") as progress:
        totals = _Totals()
        for wanted in _plans(seed, agents, hours, faults, seeds, budget, plan):
            title = f"seed {wanted.seed}"

            def show(share: float, title: str = title) -> None:
                progress(f"{title}  {share:.0%}")

            report = Simulation(wanted).run(show)
            totals.add(report)
            if report.violation is not None:
                if not json_output:
                    typer.echo(f"seed {wanted.seed} fails; looking for a shorter run that does", err=True)
                shorter = shorten(report, progress=lambda text, title=title: progress(f"{title} shortened: {text}"))  # type: ignore[misc]
                _show_violation(report, shorter, json_output)
                raise typer.Exit(common.EXIT_OTHER)
            if not json_output and totals.runs > 1:
                typer.echo(f"{title}: {report.events} events, {sum(report.rounds.values())} rounds", err=True)
    if json_output:
        common.print_json(totals.as_json())
    else:
        typer.echo(totals.as_text())


def _plans(
    seed: int | None,
    agents: int,
    hours: float,
    faults: str,
    seeds: int | None,
    budget: str | None,
    file: Path | None,
) -> "Iterator[Plan]":
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


class _Totals:
    """What all runs come to."""

    def __init__(self) -> None:
        self._reports: list[dict[str, Any]] = []
        self._agent_hours = self._elapsed_s = 0.0
        self._events = 0
        self._counts: dict[str, Counter[str]] = {
            name: Counter() for name in ("rounds", "statuses", "faults", "strays", "calls")
        }

    @property
    def runs(self) -> int:
        return len(self._reports)

    def add(self, report: "Report") -> None:
        self._reports.append(report.as_json())
        self._agent_hours += report.agent_hours
        self._elapsed_s += report.elapsed_s
        self._events += report.events
        for name, counts in self._counts.items():
            counts.update(getattr(report, name))

    def as_json(self) -> dict[str, Any]:
        return {"runs": self._reports}

    def as_text(self) -> str:
        first, last = self._reports[0], self._reports[-1]
        which = f"seed {first['seed']}" if self.runs == 1 else f"seeds {first['seed']} to {last['seed']}"
        speed = self._agent_hours / self._elapsed_s if self._elapsed_s else 0.0
        lines = [
            f"{which}: {first['agents']} agents, {first['hours']:g} h: every invariant held",
            f"{'events':10} {self._events:,} in {self._elapsed_s:.1f} s: {speed:,.0f} agent-hours per second",
        ]
        for name, counts in self._counts.items():
            shown = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
            lines.append(f"{name:10} {shown or 'none'}")
        if self.runs == 1:
            lines.append(f"{'trace':10} {first['trace_digest']}")
        return "\n".join(lines)


def _show_violation(report: "Report", shorter: "Report", json_output: bool) -> None:
    violation = shorter.violation
    assert violation is not None
    plan = report.plan
    file = Path(f"simulation-{plan.seed}.json")
    try:
        file.write_text(shorter.plan.to_json(), encoding="utf-8")
        again = f"quorate simulate --plan {file}"
    except OSError as error:
        again = f"its plan could not be written to {file}: {error.strerror}"
    whole = f"quorate simulate --seed {plan.seed} --agents {plan.agents} --hours {plan.hours:g}"
    if json_output:
        common.print_json(
            {"runs": [report.as_json()], "shortened": shorter.as_json(), "command": again, "whole": whole}
        )
        return
    small = shorter.plan
    write: Callable[[str], None] = typer.echo
    write(f"violated: {violation.invariant}")
    write(f"  {violation.message}")
    write(f"  seed {plan.seed}, {violation.at_s:.3f} virtual seconds after the start")
    write(
        f"shortened from {len(plan.faults)} faults, {len(plan.calls)} calls, {plan.agents} agents, {plan.hours:g} h "
        f"to {len(small.faults)} faults, {len(small.calls)} calls, {small.agents} agents, {small.hours:.3g} h"
    )
    for fault in small.faults:
        write(f"  {fault.at_s:11.3f} {fault.kind} of {fault.targets} for {fault.duration_s:g} s {fault.detail or ''}")
    write("the last that concerns it:")
    for line in violation.trace:
        write(f"  {line}")
    write(f"again, shortened: {again}")
    write(f"again, whole:     {whole}")

"""The whole benchmark: crowd after crowd, both sides in turn, and the rows."""

import contextlib
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from quorate_coordinator.bench.result import Result, Row, describe_machine, is_selected
from quorate_coordinator.bench.rounds.plan import CROWDS, IN_FLIGHT, JOURNAL_COST_PERCENT, QUICK, Plan
from quorate_coordinator.bench.rounds.side import Journal, Side, Turn, side
from quorate_coordinator.certificates import ensure_development_credentials
from quorate_coordinator.feeding.tally import quantile
from quorate_coordinator.sigterm import raised_by_sigterm
from quorate_protocol.errors import ConfigurationError

_PEER: Final = "journal off"

_ON: Final[Journal] = "on"
_OFF: Final[Journal] = "off"


@dataclass(frozen=True, slots=True)
class Scenario:
    """A crowd, and how many rounds at a time it is asked."""

    agents: int
    in_flight: int

    def name(self, what: str) -> str:
        """A row's name."""
        return f"{what}, {self.agents} agents, {self.in_flight} in flight"

    @property
    def names(self) -> list[str]:
        """Of all its rows, in their order."""
        return [row.name for row in self.rows([_NOTHING], [_NOTHING])]

    def rows(self, on: Sequence[Turn], off: Sequence[Turn]) -> list[Row]:
        """What the turns say; those of both sides at the same place were neighbours in time."""

        def compared(what: str, unit: str, of: Callable[[Turn], float], *, lower_is_better: bool = True) -> Row:
            ours, theirs = median(map(of, on)), median(map(of, off))
            return Row(self.name(what), unit, ours, _PEER, theirs, lower_is_better=lower_is_better)

        def a_round(what: str, unit: str, of: Callable[[Turn], float]) -> Row:
            rounds = sum(len(turn.times_s) for turn in on)
            return Row(self.name(what), unit, sum(map(of, on)) / rounds)

        rows = [
            compared("rounds", "1/s", lambda turn: turn.rounds_per_s, lower_is_better=False),
            compared("round p50", "ms", lambda turn: 1000 * (quantile(turn.times_s, 0.5) or 0.0)),
            compared("round p99", "ms", lambda turn: 1000 * (quantile(turn.times_s, 0.99) or 0.0)),
            compared("CPU of a reply", "µs", lambda turn: 1e6 * turn.cpu_s / len(turn.times_s) / self.agents),
        ]
        if self.in_flight > 1:
            # Of neighbours: what else the machine does changes from turn to turn.
            costs = [100 * (1 - one.rounds_per_s / other.rounds_per_s) for one, other in zip(on, off, strict=True)]
            rows += [
                Row(self.name("journal's cost"), "%", median(costs), target=JOURNAL_COST_PERCENT),
                a_round("records of a round", "", lambda turn: turn.records),
                a_round("commits of a round", "", lambda turn: turn.commits),
                a_round("written of a round", "KB", lambda turn: turn.written_bytes / 1000),
            ]
        return rows


#: Stands for a turn where only the names of rows are wanted.
_NOTHING: Final = Turn([1.0], 1.0)

SCENARIOS: Final = tuple(Scenario(agents, in_flight) for agents in CROWDS for in_flight in IN_FLIGHT)


async def measure_rounds(plan: Plan, only: Collection[str], progress: Callable[[str], None]) -> Result:
    """Measures what was asked for, one crowd after the other.

    Args:
        plan: how long and how often.
        only: texts; rows whose name holds one of them are measured, all without texts.
        progress: told what is being measured.

    Raises:
        ConfigurationError: there is no such row.
        DemoFailed: a process did not start or ended early, or a round did not bring all answers.
        EndedBySigterm: SIGTERM came.
    """
    wanted = [one for one in SCENARIOS if any(is_selected(name, only) for name in one.names)]
    if not wanted:
        names = "; ".join(name for one in SCENARIOS for name in one.names)
        raise ConfigurationError("--only", f"no row has {' or '.join(map(repr, only))} in its name; there are: {names}")
    rows: list[Row] = []
    with raised_by_sigterm(), tempfile.TemporaryDirectory(prefix="quorate-bench-") as name:
        directory = Path(name)
        credentials = ensure_development_credentials(directory / "credentials")
        for agents, hosts in CROWDS.items():
            scenarios = [one for one in wanted if one.agents == agents]
            if not scenarios:
                continue
            progress(f"{agents} agents: starting")
            async with contextlib.AsyncExitStack() as started:
                on, off = [
                    await started.enter_async_context(
                        side(journal, agents, hosts, Path(tempfile.mkdtemp(dir=directory)), credentials)
                    )
                    for journal in (_ON, _OFF)
                ]
                for scenario in scenarios:
                    progress(f"{agents} agents, {scenario.in_flight} in flight")
                    turns = await _take_turns(plan, scenario, on, off)
                    rows += [row for row in scenario.rows(*turns) if is_selected(row.name, only)]
    # A quick run's numbers must not be taken for those of a whole one.
    return Result("rounds", rows, {**describe_machine(), "quick": plan is QUICK}, subject="journal on")


async def _take_turns(plan: Plan, scenario: Scenario, on: Side, off: Side) -> tuple[list[Turn], list[Turn]]:
    """Asks both in turn; who goes first changes, so that what comes after the other is no one's lot."""
    taken: dict[str, list[Turn]] = {_ON: [], _OFF: []}
    for one in (on, off):
        await one.ask_for(plan.warm_up_s, scenario.agents, scenario.in_flight)
    for number in range(plan.turns):
        for one in (on, off) if number % 2 == 0 else (off, on):
            taken[one.journal].append(await one.ask_for(plan.turn_s, scenario.agents, scenario.in_flight))
    return taken[_ON], taken[_OFF]

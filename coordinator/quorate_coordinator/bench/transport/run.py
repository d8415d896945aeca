"""The whole benchmark: processes, scenarios, progress."""

import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from quorate_coordinator.bench.result import Result, Row, describe_machine, is_selected
from quorate_coordinator.bench.transport.children import Children
from quorate_coordinator.bench.transport.plan import QUICK, Plan
from quorate_coordinator.bench.transport.scenarios import SCENARIOS, Bench, selected
from quorate_coordinator.certificates import ensure_development_credentials
from quorate_coordinator.sigterm import raised_by_sigterm
from quorate_protocol.errors import ConfigurationError


async def measure_transport(plan: Plan, only: Collection[str], progress: Callable[[str], None]) -> Result:
    """Measures what was asked for, one scenario after the other.

    Args:
        plan: how long and how often.
        only: texts; rows whose name holds one of them are measured, all without texts.
        progress: told what is being measured.

    Raises:
        ConfigurationError: there is no such row.
        BenchFailed: a process ended early or could not do its part.
        EndedBySigterm: SIGTERM came.
    """
    scenarios = selected(only)
    if not scenarios:
        rows = "; ".join(name for scenario in SCENARIOS for name in scenario.names)
        raise ConfigurationError("--only", f"no row has {' or '.join(map(repr, only))} in its name; there are: {rows}")
    rows_measured: list[Row] = []
    with raised_by_sigterm(), tempfile.TemporaryDirectory(prefix="quorate-bench-") as name:
        directory = Path(name)
        children = Children(directory, ensure_development_credentials(directory / "state"))
        try:
            for number, scenario in enumerate(scenarios, 1):
                progress(f"{number}/{len(scenarios)} {scenario.title}")
                rows_measured += [
                    row for row in await scenario.measure(Bench(children, plan)) if is_selected(row.name, only)
                ]
        finally:
            await children.stop()
    # A quick run's numbers must not be taken for those of a whole one.
    return Result("transport", rows_measured, {**describe_machine(), "quick": plan is QUICK})

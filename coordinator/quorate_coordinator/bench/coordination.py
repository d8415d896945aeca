"""What a round costs beyond the agents' own work: the demo's fleet on the demo's data."""

from collections.abc import Collection
from typing import Final

from quorate_coordinator.bench.result import Result, Row
from quorate_coordinator.demo.run import run_fleet
from quorate_coordinator.feeding.tally import Tally, quantile

#: Part 1's promise: the median overhead of a round with six agents on two cores, in milliseconds.
OVERHEAD_P50_MS_TARGET: Final = 5.0


async def measure_coordination(instances: int) -> Result:
    """Feeds image-segments to the six models and looks at where the time of a round goes.

    Raises:
        DemoFailed: a process did not start or ended early.
    """
    tally, elapsed_s = await run_fleet("image-segments", limit=instances, seed=42, title="bench coordination")
    return Result("coordination", list(_rows(tally, elapsed_s)))


def _rows(tally: Tally, elapsed_s: float) -> list[Row]:
    def ms(values: Collection[float], q: float) -> float:
        return (quantile(values, q) or 0.0) * 1000

    return [
        Row("coordination overhead p50", "ms", ms(tally.overheads_s, 0.5), target=OVERHEAD_P50_MS_TARGET),
        Row("coordination overhead p99", "ms", ms(tally.overheads_s, 0.99)),
        Row("round p50", "ms", ms(tally.rounds_s, 0.5)),
        Row("round p99", "ms", ms(tally.rounds_s, 0.99)),
        Row("rounds", "1/s", tally.instances / elapsed_s, lower_is_better=False),
    ]

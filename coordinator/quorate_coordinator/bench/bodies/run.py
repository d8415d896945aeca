"""The whole benchmark: small rounds alone, beside a body and beside the relay, in turn, and the rows."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from quorate_coordinator.bench.bodies.loop_watch import wait_quantile
from quorate_coordinator.bench.bodies.plan import DELAY_MS, GROWTH_MIB, Plan
from quorate_coordinator.bench.bodies.side import Side, Turn, side
from quorate_coordinator.bench.result import Result, Row, describe_machine
from quorate_coordinator.certificates import DevelopmentCredentials, ensure_development_credentials
from quorate_coordinator.feeding.tally import quantile
from quorate_coordinator.sigterm import raised_by_sigterm

_PEER: Final = "TLS relay"

_DELAY_NOTE: Final = (
    "by how much the p99 beside the body is over the one alone; beside the relay, rounds wait for processors only"
)
_LOOP_NOTE: Final = (
    "how long, at most, 99 of 100 frames that come at any moment wait until the coordinator's loop is free, less the "
    "time in which it had no processor"
)
_WAIT_NOTE: Final = "the same with the time in which it had no processor"


@dataclass(slots=True)
class Turns:
    """All turns; those at the same place were neighbours in time."""

    alone: list[Turn] = field(default_factory=list)
    body: list[Turn] = field(default_factory=list)
    relay: list[Turn] = field(default_factory=list)

    def rows(self, plan: Plan) -> list[Row]:
        """Medians over the turns."""
        beside_what = f"{plan.size_bytes >> 20} MiB" + (f" for {plan.agents} agents" if plan.agents > 1 else "")
        rows = []
        for what, of in _TIMES.items():
            rows.append(Row(f"small round alone, {what}", "ms", _median(of, self.alone)))
        for what, of in _TIMES.items():
            values = _median(of, self.body), _median(of, self.relay)
            rows.append(Row(f"small round beside {beside_what}, {what}", "ms", values[0], _PEER, values[1]))
        delays = [
            median(_p99_ms(beside) - _p99_ms(alone) for beside, alone in zip(turns, self.alone, strict=True))
            for turns in (self.body, self.relay)
        ]
        rows.append(Row("delay of a small round, p99", "ms", delays[0], _PEER, delays[1], DELAY_MS, note=_DELAY_NOTE))
        own, own_beside = (_median(_held_up_ms(of_its_own=True), turns) for turns in (self.body, self.relay))
        rows.append(Row("coordinator's loop busy, p99", "ms", own, _PEER, own_beside, DELAY_MS, note=_LOOP_NOTE))
        all_in_all, beside = (_median(_held_up_ms(of_its_own=False), turns) for turns in (self.body, self.relay))
        rows.append(Row("coordinator's loop busy or waiting, p99", "ms", all_in_all, _PEER, beside, note=_WAIT_NOTE))
        longest = [_median(_longest_ms, turns) for turns in (self.body, self.relay)]
        rows.append(Row("coordinator's loop busy, longest", "ms", longest[0], _PEER, longest[1]))
        rates = [
            _median(lambda turn: 2 * plan.moved_bytes / turn.elapsed_s / 1e6, turns)
            for turns in (self.body, self.relay)
        ]
        rows.append(Row("body, both ways together", "MB/s", rates[0], _PEER, rates[1], lower_is_better=False))
        for name in self.body[0].growth_bytes:
            grown = _median(lambda turn, name=name: turn.growth_bytes[name] / (1 << 20), self.body)  # type: ignore[misc]
            target = GROWTH_MIB if name == "coordinator" else None
            rows.append(Row(f"memory growth, {name}", "MiB", grown, target=target))
        return rows


def _p99_ms(turn: Turn) -> float:
    return 1000 * (quantile(turn.times_s, 0.99) or 0.0)


_TIMES: Final[dict[str, Callable[[Turn], float]]] = {
    "p50": lambda turn: 1000 * (quantile(turn.times_s, 0.5) or 0.0),
    "p99": _p99_ms,
    "max": lambda turn: 1000 * max(turn.times_s),
}


def _held_up_ms(*, of_its_own: bool) -> Callable[[Turn], float]:
    def held_up_ms(turn: Turn) -> float:
        lengths_s = [one.length_s - (one.off_s if of_its_own else 0.0) for one in turn.loop_turns]
        return 1000 * wait_quantile(lengths_s, turn.elapsed_s, 0.99)

    return held_up_ms


def _longest_ms(turn: Turn) -> float:
    return 1000 * max((one.length_s - one.off_s for one in turn.loop_turns), default=0.0)


def _median(of: Callable[[Turn], float], turns: Sequence[Turn]) -> float:
    return median(map(of, turns))


async def measure_bodies(plan: Plan, progress: Callable[[str], None]) -> Result:
    """Measures all of it.

    Args:
        plan: how much and how often.
        progress: told what is being measured.

    Raises:
        DemoFailed: a process did not start or ended early, or a round failed.
        EndedBySigterm: SIGTERM came.
    """
    turns = Turns()
    with raised_by_sigterm(), tempfile.TemporaryDirectory(prefix="quorate-bench-") as name:
        directory = Path(name)
        credentials = ensure_development_credentials(directory / "credentials")
        progress("starting")
        async with side(Path(tempfile.mkdtemp(dir=directory)), credentials, plan.agents) as started:
            for number in range(plan.turns):
                await _take_turn(plan, number, started, credentials, turns, progress)
    machine = {**describe_machine(), "quick": plan.is_quick}
    return Result("bodies", turns.rows(plan), machine, subject="beside a body")


async def _take_turn(
    plan: Plan,
    number: int,
    started: Side,
    credentials: DevelopmentCredentials,
    turns: Turns,
    progress: Callable[[str], None],
) -> None:
    of_all = f"{number + 1} of {plan.turns}"
    progress(f"{of_all}: small rounds alone")
    turns.alone.append(await started.alone(plan.alone_s))
    # Who goes first changes, so that what comes after the other is no one's lot.
    for is_body in (True, False) if number % 2 == 0 else (False, True):
        if is_body:
            progress(f"{of_all}: beside a body")
            turns.body.append(await started.beside_body(plan.size_bytes))
        else:
            progress(f"{of_all}: beside the relay")
            turns.relay.append(await started.beside_relay(plan.moved_bytes, credentials))

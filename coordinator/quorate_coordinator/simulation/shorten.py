"""Makes a plan that fails as small as it can while it still fails in the same way."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final, TypeVar

from quorate_coordinator.simulation.coordinator import Cores
from quorate_coordinator.simulation.plan import Plan
from quorate_coordinator.simulation.planning import HOURS_MIN, QUIET_S
from quorate_coordinator.simulation.run import Report, Violation, simulate

ItemT = TypeVar("ItemT")

#: Seconds of the wall clock that it may take where nobody says.
SHORTEN_S: Final = 60.0


class _TimeIsOver(Exception):
    """What was found so far has to do."""


class _Shortening:
    """The search for a smaller plan.

    Source of the search in lists: A. Zeller, R. Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", IEEE
    Transactions on Software Engineering 28 (2002), doi:10.1109/32.988498; complements only.
    """

    def __init__(self, report: Report, cores: Cores | None, ends_at: float, progress: Callable[[str], None]) -> None:
        assert report.violation is not None
        self._invariant = report.violation.invariant
        self._cores = cores
        self._ends_at = ends_at
        self._progress = progress
        #: The smallest run that fails.
        self.best = report

    @property
    def plan(self) -> Plan:
        return self.best.plan

    @property
    def violation(self) -> Violation:
        assert self.best.violation is not None
        return self.best.violation

    def try_plan(self, plan: Plan) -> bool:
        """Whether a plan fails in the same way; it is the best one then."""
        if time.perf_counter() > self._ends_at:
            raise _TimeIsOver
        report = simulate(plan, self._cores)
        if report.violation is None or report.violation.invariant != self._invariant:
            return False
        self.best = report
        self._progress(f"{len(plan.faults)} faults, {len(plan.calls)} calls, {plan.agents} agents, {plan.hours:.2g} h")
        return True

    def run(self) -> None:
        """Until nothing more can be left out."""
        self._drop_the_future()
        size = None
        while size != (size := (self.plan.size, self.plan.agents, self.plan.hours)):
            self._drop_items(self.plan.faults, lambda faults: self.plan.only(faults=tuple(faults)))
            self._drop_items(self.plan.calls, lambda calls: self.plan.only(calls=tuple(calls)))
            self._drop_agents()
            self._drop_targets()
            self._drop_time()

    def _drop_the_future(self) -> None:
        """What comes after the violation has no part in it; with one at the end, there is no such thing."""
        at_s = self.violation.at_s
        calls = tuple(call for call in self.plan.calls if call.at_s <= at_s)
        faults = tuple(fault for fault in self.plan.faults if fault.at_s <= at_s)
        if len(calls) + len(faults) < self.plan.size:
            self.try_plan(self.plan.only(calls=calls, faults=faults))

    def _drop_items(self, items: Sequence[ItemT], make: Callable[[list[ItemT]], Plan]) -> None:
        left = list(items)
        chunk = len(left)
        while chunk >= 1 and left:
            start = 0
            while start < len(left):
                without = left[:start] + left[start + chunk :]
                if self.try_plan(make(without)):
                    left = without
                else:
                    start += chunk
            chunk //= 2

    def _drop_agents(self) -> None:
        least = 0
        while self.plan.agents - least > 1:
            middle = (least + self.plan.agents) // 2
            if not self.try_plan(replace(self.plan, agents=middle)):
                least = middle

    def _drop_targets(self) -> None:
        """Of faults that hit many, what one target alone does."""
        for place, fault in enumerate(self.plan.faults):
            targets = [target for target in fault.targets if target < self.plan.agents]
            if len(fault.targets) <= 1:
                continue

            def with_targets(wanted: list[int], place: int = place) -> Plan:
                faults = list(self.plan.faults)
                faults[place] = replace(faults[place], targets=tuple(wanted))
                return self.plan.only(faults=tuple(faults))

            if targets == list(fault.targets) or self.try_plan(with_targets(targets)):
                self._drop_items(targets, with_targets)

    def _drop_time(self) -> None:
        ends = [fault.at_s + fault.duration_s for fault in self.plan.faults]
        ends += [call.at_s + (call.reveal.after_s if call.reveal else 0.0) for call in self.plan.calls]
        hours = max(HOURS_MIN, (max(ends, default=0.0) + QUIET_S) / 3600.0)
        if hours < self.plan.hours:
            self.try_plan(replace(self.plan, hours=hours))


def shorten(
    report: Report,
    cores: Cores | None = None,
    *,
    seconds: float = SHORTEN_S,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """The run of the smallest plan found that violates the same invariant as this one's.

    Args:
        report: Of a run with a violation.
        cores: Those of that run.
        seconds: Of the wall clock; what was found by then has to do.
        progress: Told what is left.
    """
    shortening = _Shortening(report, cores, time.perf_counter() + seconds, progress)
    try:
        shortening.run()
    except _TimeIsOver:
        pass
    return shortening.best

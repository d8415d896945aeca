"""Plays one plan from its start to its quiet end."""

import gc
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from quorate_coordinator.simulation.agents import AgentHost
from quorate_coordinator.simulation.auditor import Auditor, InvariantViolated
from quorate_coordinator.simulation.coordinator import CoordinatorHost, Cores
from quorate_coordinator.simulation.disk import SimDisk
from quorate_coordinator.simulation.faults import Faults
from quorate_coordinator.simulation.operators import Operators
from quorate_coordinator.simulation.plan import Plan
from quorate_coordinator.simulation.planning import QUIET_S
from quorate_coordinator.simulation.world import START_S, World

#: Virtual seconds between two full looks.
_LOOK_EVERY_S: Final = 60.0

#: Agents start within this time, in seconds.
_START_S: Final = 2.0

#: Of the trace, what is shown of a violation.
_TRACE_LINES: Final = 40


@dataclass(frozen=True, slots=True)
class Violation:
    """What did not hold."""

    invariant: str
    message: str
    #: Virtual seconds after the start.
    at_s: float
    #: The last lines of the trace that concern it.
    trace: tuple[str, ...]


@dataclass(slots=True)
class Report:
    """What happened in one run."""

    plan: Plan
    #: None when everything held.
    violation: Violation | None = None
    #: What played it: `model`, or `quic`, where an event is a datagram, and there is no trace and no digest.
    engine: str = "model"
    events: int = 0
    #: Seconds of the wall clock that it took.
    elapsed_s: float = 0.0
    #: Of the whole trace.
    digest: str = ""
    #: By state, status, kind, how they ended.
    rounds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    strays: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    handlers: int = 0
    announcements: int = 0

    @property
    def agent_hours(self) -> float:
        """Agents times virtual hours."""
        return self.plan.agents * self.plan.hours

    @property
    def agent_hours_per_s(self) -> float:
        """The simulation's speed."""
        return self.agent_hours / self.elapsed_s if self.elapsed_s > 0 else 0.0

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "seed": self.plan.seed,
            "engine": self.engine,
            "agents": self.plan.agents,
            "hours": self.plan.hours,
            "events": self.events,
            "elapsed_s": round(self.elapsed_s, 3),
            "agent_hours_per_s": round(self.agent_hours_per_s, 1),
            "trace_digest": self.digest,
            "rounds": dict(sorted(self.rounds.items())),
            "statuses": dict(sorted(self.statuses.items())),
            "faults": dict(sorted(self.faults.items())),
            "strays": dict(sorted(self.strays.items())),
            "calls": dict(sorted(self.calls.items())),
            "handlers": self.handlers,
            "announcements": self.announcements,
            "violation": None
            if self.violation is None
            else {
                "invariant": self.violation.invariant,
                "message": self.violation.message,
                "at_s": round(self.violation.at_s, 3),
                "trace": list(self.violation.trace),
            },
        }


class Simulation:
    """One world with everything in it.

    Args:
        plan: What happens.
        cores: What decides; a test may give broken ones.
    """

    def __init__(self, plan: Plan, cores: Cores | None = None) -> None:
        cores = cores or Cores()
        self.plan: Final = plan
        self.world: Final = World(plan.seed)
        self._directory = tempfile.TemporaryDirectory(prefix="quorate-simulate-") if plan.disk == "journal" else None
        self._disk = disk = SimDisk(self.world) if self._directory is None else self._make_journal(self._directory.name)
        self.auditor: Final = Auditor(self.world, disk)
        self.coordinator: Final = CoordinatorHost(self.world, disk, self.auditor, cores)
        self.hosts: Final = [
            AgentHost(self.world, number, connect=self.coordinator.connect, auditor=self.auditor, make_core=cores.agent)
            for number in range(plan.agents)
        ]
        self.operators: Final = Operators(self.world, self.coordinator)
        self.faults: Final = Faults(self.world, self.hosts, self.coordinator, self.operators)

    def run(self, progress: Callable[[float], None] = lambda share: None) -> Report:
        """Plays it; never raises for a violation, which is in the report.

        Args:
            progress: Told the share of the virtual time that is over, 0 to 1.
        """
        # Reference counting frees all but cycles, and what is made here lives to the end.
        had_gc = gc.isenabled()
        gc.disable()
        began_at = time.perf_counter()
        report = Report(self.plan)
        try:
            with self.world.wall.shown():
                self._play(progress)
        except InvariantViolated as violated:
            lines = self.world.trace(*violated.words, lines_max=_TRACE_LINES)
            report.violation = Violation(violated.invariant, violated.message, violated.at_s - START_S, tuple(lines))
        except Exception as error:  # noqa: BLE001  whatever a core raises is a finding, and is shortened as one
            report.violation = self._raised(error)
        finally:
            if had_gc:
                gc.enable()
            self._disk.close()
            if self._directory is not None:
                self._directory.cleanup()
        report.elapsed_s = time.perf_counter() - began_at
        report.events = self.world.events
        report.digest = self.world.digest()
        report.rounds, report.statuses = self.auditor.rounds, self.auditor.statuses
        report.faults, report.calls = self.faults.counts, self.operators.ended
        report.strays = self.coordinator.strays
        report.handlers, report.announcements = self.auditor.handlers, self.auditor.announcements
        return report

    def _make_journal(self, directory: str) -> SimDisk:
        # SQLite takes its time to be loaded, and great fleets do without.
        from quorate_coordinator.simulation.journal_disk import JournalDisk

        return JournalDisk(self.world, Path(directory))

    def _raised(self, error: Exception) -> Violation:
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = type(error).__name__
        return Violation(
            f"nothing raises ({kind} in {place.name})",
            f"{kind}: {error} ({Path(place.filename).name}, line {place.lineno})",
            self.world.now - START_S,
            tuple(self.world.trace(lines_max=_TRACE_LINES)),
        )

    def _play(self, progress: Callable[[float], None]) -> None:
        world = self.world
        for call in self.plan.calls:
            self.operators.plan(call)
        for fault in self.plan.faults:
            self.faults.plan(fault)
        self.coordinator.start()
        starts = world.stream("starts")
        for host in self.hosts:
            world.after(starts.uniform(0.0, _START_S), host.start)
        end = START_S + self.plan.hours * 3600.0
        check = self.auditor.check
        while world.now < end:
            world.run_until(min(end, world.now + _LOOK_EVERY_S), check)
            self._look()
            progress((world.now - START_S) / (end - START_S))
        self._end()

    def _look(self) -> None:
        """A full look, every so often."""
        current = self.coordinator.current
        if current is not None and current.process.is_running:
            current.members.audit()
            current.rounds.audit(current.members.is_member)

    def _end(self) -> None:
        """All faults were over for a while: everything must be at rest."""
        fail, current = self.auditor.fail, self.coordinator.current
        if current is None or not current.process.is_running:
            fail("the coordinator comes back", "it is not there at the end")
        self._look()
        self.coordinator.check_learner()
        rest = current.rounds.rest(host.name for host in self.hosts)
        if rest:
            fail("all comes to rest", f"at the end there are {rest}")
        if self.operators.waiting:
            fail("every call is answered", f"{', '.join(self.operators.waiting[:5])} still wait")
        current.members.audit_replies()
        missing = current.members.missing(host.name for host in self.hosts)
        if missing:
            message = f"{len(missing)} agents are not connected {QUIET_S:g} s after the last fault, {missing[0]} first"
            fail("agents come back", message, agent=missing[0])
        for host in self.hosts:
            if host.process is None or not host.process.is_idle:
                what = "not there" if host.process is None else host.process.describe()
                fail("all comes to rest", f"{host.name} is {what} at the end", agent=host.name)


def simulate(plan: Plan, cores: Cores | None = None) -> Report:
    """Plays a plan."""
    return Simulation(plan, cores).run()

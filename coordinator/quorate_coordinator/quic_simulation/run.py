"""Plays one plan with real shells."""

import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from quorate_coordinator.journal.schema import JOURNAL_NAME
from quorate_coordinator.quic_simulation.faults import PLAYED, Faults
from quorate_coordinator.quic_simulation.history import History, NotHeld, fail
from quorate_coordinator.quic_simulation.network import FleetNetwork
from quorate_coordinator.quic_simulation.operators import Operator
from quorate_coordinator.quic_simulation.places import URL, AgentPlace, CoordinatorPlace
from quorate_coordinator.quic_simulation.virtual_loop import START_S, VirtualLoop
from quorate_coordinator.settings import JournalSettings, Settings
from quorate_coordinator.simulation.plan import OPERATORS, Plan, operator_of
from quorate_coordinator.simulation.planning import QUIET_S
from quorate_coordinator.simulation.run import Report, Violation
from quorate_coordinator.simulation.wall_clock import WallClock
from quorate_protocol.errors import ConfigurationError
from quorate_protocol.transport.memory import using_network

#: Agents in one process and loop: more play at less than the speed of the clock on the wall.
AGENTS_MAX: Final = 100

#: Days for which the journal keeps rounds: more than clocks are set forwards.
_KEEP_DAYS: Final = 36_500.0

#: Agents start within this time, in seconds.
_START_S: Final = 2.0


def playable(plan: Plan, kinds: Iterable[str] | None = None) -> Plan:
    """A plan with the faults that can be played with real shells.

    Args:
        kinds: Faults that were asked for by name, and have to be among them.

    Raises:
        ConfigurationError: one of these cannot be played, or there are too many agents.
    """
    missing = sorted({*(kinds or ())} - PLAYED)
    if missing:
        raise ConfigurationError(
            "--faults", f"{missing[0]!r} needs --engine model: real shells share one process and its disk"
        )
    if plan.agents > AGENTS_MAX:
        raise ConfigurationError("--agents", f"must be at most {AGENTS_MAX} with --engine quic, is {plan.agents}")
    return plan.only(faults=tuple(fault for fault in plan.faults if fault.kind in PLAYED))


def simulate_quic(plan: Plan, progress: Callable[[float], None] = lambda share: None) -> Report:
    """Plays a plan; never raises for a violation, which is in the report. Not to be called in an event loop."""
    began_at = time.perf_counter()
    report = Report(plan, engine="quic")
    history = History()
    loop = VirtualLoop()
    network = FleetNetwork(plan.seed)
    wall = WallClock(loop.time)
    with tempfile.TemporaryDirectory(prefix="quorate-simulate-") as directory, using_network(network):
        state_dir = Path(directory)
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner, wall.shown():
                runner.run(_Fleet(plan, loop, network, wall, state_dir, history, report).live(progress))
            history.check_journal(state_dir / JOURNAL_NAME, plan.calls)
        except* Exception as group:  # noqa: BLE001  whatever a shell raises is a finding
            report.violation = _violation_of(group, loop.time() - START_S)
    report.elapsed_s = time.perf_counter() - began_at
    report.events = sum(network.fates.values())
    report.rounds, report.statuses, report.calls = history.rounds, history.statuses, history.calls
    report.handlers, report.announcements = len(history.started), history.announcements
    return report


def _violation_of(group: BaseExceptionGroup[BaseException], at_s: float) -> Violation:
    """What went wrong, of all that is in a group: an invariant first."""
    held, others = group.split(NotHeld)
    first: BaseException = held or others or group
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, NotHeld):
        return Violation(first.invariant, first.message, at_s, ())
    kind = type(first).__name__
    return Violation(f"nothing raises ({kind})", f"{kind}: {first}", at_s, ())


class _Fleet:
    """One run's."""

    def __init__(
        self,
        plan: Plan,
        loop: VirtualLoop,
        network: FleetNetwork,
        wall: WallClock,
        state_dir: Path,
        history: History,
        report: Report,
    ) -> None:
        self.plan = plan
        self.loop = loop
        self.network = network
        self.wall = wall
        self.history = history
        self.report = report
        # Whatever the time of day is said to be: what was announced is asked for again at the end.
        journal = JournalSettings(keep_days=_KEEP_DAYS)
        settings = Settings(http="", state_dir=state_dir, journal=journal).model_copy(update={"listen": URL})
        self.coordinator = CoordinatorPlace(settings, network)
        self.hosts: list[AgentPlace] = []

    async def live(self, progress: Callable[[float], None]) -> None:
        """From the start to the quiet end.

        Raises:
            NotHeld: something that must hold does not.
        """
        try:
            await self._live(progress)
        except BaseException:
            # Agents would start again while the rest ends, and the journal's thread go on. What else fails now is no
            # finding.
            for host in self.hosts:
                host.close()
            with contextlib.suppress(Exception):
                await self.coordinator.stop()
            raise

    async def _live(self, progress: Callable[[float], None]) -> None:
        plan, loop = self.plan, self.loop
        loop.await_threads(lambda: self.coordinator.is_recording)
        await self.coordinator.start()
        assert self.coordinator.current is not None
        credentials: dict[str, Any] = {**self.coordinator.current.credentials}
        hosts = self.hosts = [AgentPlace(plan.seed, number, credentials, self.history) for number in range(plan.agents)]
        operators = [Operator(plan.seed, number, credentials, self.history) for number in range(OPERATORS)]
        faults = Faults(loop, hosts, self.coordinator, self.network, operators, self.wall)
        self.report.faults = faults.counts
        draw = random.Random(f"{plan.seed}/starts")  # noqa: S311  repeatable on purpose
        for host in hosts:
            loop.call_later(draw.uniform(0.0, _START_S), host.start)
        end = START_S + plan.hours * 3600.0
        async with asyncio.TaskGroup() as group:
            for call in plan.calls:
                group.create_task(operators[operator_of(call.key)].make(call, START_S), name=call.key)
            for fault in plan.faults:
                group.create_task(faults.play(fault, START_S), name=fault.kind)
            while loop.time() < end:
                await asyncio.sleep(min(10.0, end - loop.time()))
                self.history.check()
                progress((loop.time() - START_S) / (end - START_S))
        self._check_rest(hosts)
        for operator in operators:
            await operator.make_again()
            await operator.close()
        ending = [task for host in hosts if (task := host.end()) is not None]
        if ending:
            await asyncio.wait(ending)
        await self.coordinator.stop()

    def _check_rest(self, hosts: list[AgentPlace]) -> None:
        """All faults were over for a while: everything must be at rest."""
        if self.coordinator.current is None:
            fail("the coordinator comes back", "it is not there at the end")
        fleet = self.coordinator.current.list_fleet()
        states = {info.agent: info.state for info in fleet.agents}
        missing = [host.name for host in hosts if states.get(host.name) != "connected"]
        if missing:
            message = f"{len(missing)} agents are not connected {QUIET_S:g} s after the last fault: {missing[:5]}"
            fail("agents come back", message)
        if fleet.rounds_open:
            fail("all comes to rest", f"at the end {fleet.rounds_open} rounds are in flight")

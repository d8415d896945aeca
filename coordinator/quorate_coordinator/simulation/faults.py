"""What goes wrong: carries out a plan's faults."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from quorate_coordinator.simulation.agents import AgentHost
from quorate_coordinator.simulation.coordinator import CoordinatorHost
from quorate_coordinator.simulation.network import Path
from quorate_coordinator.simulation.operators import Operators
from quorate_coordinator.simulation.plan import Fault
from quorate_coordinator.simulation.process import Process
from quorate_coordinator.simulation.world import START_S, World

#: Stands for the coordinator among a fault's targets.
COORDINATOR: Final = -1


class Faults:
    """Does to a world what a plan says. Faults of one kind may overlap: each is undone by itself."""

    def __init__(
        self, world: World, hosts: list[AgentHost], coordinator: CoordinatorHost, operators: Operators
    ) -> None:
        self._world = world
        self._hosts = hosts
        self._coordinator = coordinator
        self._operators = operators
        #: How many were carried out, by kind.
        self.counts: Counter[str] = Counter()

    def plan(self, fault: Fault) -> None:
        """A fault that will happen."""
        self._world.at(START_S + fault.at_s, self._begin, fault)

    def _targets(self, fault: Fault) -> list[AgentHost]:
        # A smaller fleet has fewer to hit.
        return [self._hosts[number] for number in fault.targets if 0 <= number < len(self._hosts)]

    def _begin(self, fault: Fault) -> None:
        self.counts[fault.kind] += 1
        of = "operators" if fault.kind == "operator-break" else "agents"
        who = "coordinator" if COORDINATOR in fault.targets else f"{len(fault.targets)} {of}"
        self._world.note(f"fault {fault.kind} {who} for {fault.duration_s:.1f} s {fault.detail or ''}")
        _BEGIN[fault.kind](self, fault)

    def _change_paths(self, fault: Fault, begin: Callable[[Path], None], end: Callable[[Path], None]) -> None:
        """Does something to the targets' paths, and undoes it after the fault's duration."""
        paths = [host.path for host in self._targets(fault)]
        self._apply(paths, begin)
        self._world.after(fault.duration_s, self._apply, paths, end)

    def _apply(self, paths: list[Path], change: Callable[[Path], None]) -> None:
        for path in paths:
            path.freeze()
            change(path)
            path.update()

    # --- the network ---

    def _lose(self, fault: Fault) -> None:
        loss = float(fault.detail["loss"])

        def begin(path: Path) -> None:
            path.loss = min(0.9, path.loss + loss)

        def end(path: Path) -> None:
            path.loss = path.loss - loss if path.loss - loss > 1e-9 else 0.0

        self._change_paths(fault, begin, end)

    def _reorder(self, fault: Fault) -> None:
        spread_s = float(fault.detail["spread_s"])

        def begin(path: Path) -> None:
            path.reordering_s += spread_s

        def end(path: Path) -> None:
            path.reordering_s = path.reordering_s - spread_s if path.reordering_s - spread_s > 1e-9 else 0.0

        self._change_paths(fault, begin, end)

    def _duplicate(self, fault: Fault) -> None:
        share = float(fault.detail["share"])

        def begin(path: Path) -> None:
            path.duplication += share

        def end(path: Path) -> None:
            path.duplication = path.duplication - share if path.duplication - share > 1e-9 else 0.0

        self._change_paths(fault, begin, end)

    def _partition(self, fault: Fault) -> None:
        self._cut(fault, int(fault.detail["up"]), int(fault.detail["down"]))

    def _cut(self, fault: Fault, up: int, down: int) -> None:
        def begin(path: Path) -> None:
            path.cuts_up += up
            path.cuts_down += down

        def end(path: Path) -> None:
            path.cuts_up -= up
            path.cuts_down -= down

        self._change_paths(fault, begin, end)

    def _break_links(self, fault: Fault) -> None:
        """Links end at once, without a goodbye and with all that is under way; the way may stay shut for a while."""
        for host in self._targets(fault):
            process = host.process
            if process is not None and process.link is not None:
                process.process.call(process.link_closed, process.link, "the link broke", False)
        if fault.duration_s > 0.0:
            self._cut(fault, 1, 1)

    # --- processes ---

    def _crash_agents(self, fault: Fault) -> None:
        for host in self._targets(fault):
            self._world.note(f"{host.name} is killed")
            host.kill(fault.duration_s)

    def _hang_agents(self, fault: Fault) -> None:
        for host in self._targets(fault):
            host.hangs_until = max(host.hangs_until, self._world.now + fault.duration_s)

    def _crash_coordinator(self, fault: Fault) -> None:
        self._coordinator.crash(fault.duration_s, in_commit=bool(fault.detail["commit"]))

    def _fill_disk(self, fault: Fault) -> None:
        self._coordinator.disk.full += 1
        self._world.after(fault.duration_s, self._empty_disk)

    def _empty_disk(self) -> None:
        self._coordinator.disk.full -= 1

    def _suspend(self, fault: Fault) -> None:
        with_clock = bool(fault.detail["clock"])
        hosts = self._targets(fault)
        if with_clock:
            # A machine that sleeps hears nothing either.
            cut = self._hosts if COORDINATOR in fault.targets else hosts
            self._cut(replace(fault, targets=tuple(host.number for host in cut)), 1, 1)
        if COORDINATOR in fault.targets:
            self._coordinator.suspend(fault.duration_s, with_clock=with_clock)
        for host in hosts:
            if host.process is not None and host.process.process.is_running:
                process = host.process.process
                host.path.freeze()
                process.suspend()
                host.path.update()
                self._world.note(f"{host.name} is suspended for {fault.duration_s:.1f} s")
                self._world.after(fault.duration_s, self._resume_agent, host, process, fault)

    def _resume_agent(self, host: AgentHost, process: Process, fault: Fault) -> None:
        if host.process is not None and host.process.process is process:
            self._world.note(f"{host.name} goes on")
            if fault.detail["clock"]:
                process.set_back(fault.duration_s)
            process.resume(timers_first=bool(fault.detail["timers"]))
            host.path.freeze()
            host.path.update()

    def _jump(self, fault: Fault) -> None:
        """The time of day is another one; it stays so, until somebody sets it again."""
        self._world.wall.jump(float(fault.detail["by_s"]))

    # --- operators ---

    def _break_operators(self, fault: Fault) -> None:
        for number in fault.targets:
            self._operators.link_broke(number, fault.duration_s)

    def _drain(self, fault: Fault) -> None:
        if COORDINATOR in fault.targets and self._coordinator.current is not None:
            current = self._coordinator.current
            current.process.call(current.drain)
        for host in self._targets(fault):
            if host.process is not None:
                self._world.note(f"{host.name} is asked to stop")
                host.process.process.call(host.process.stop, "SIGTERM")

    def _burst(self, fault: Fault) -> None:
        """Nothing: a burst's calls are among the plan's calls, so that they can be left out one by one."""


_BEGIN: Final[dict[str, Callable[[Faults, Fault], None]]] = {
    "loss": Faults._lose,
    "reorder": Faults._reorder,
    "duplicate": Faults._duplicate,
    "partition": Faults._partition,
    "agent-crash": Faults._crash_agents,
    "agent-hang": Faults._hang_agents,
    "coordinator-crash": Faults._crash_coordinator,
    "disk-full": Faults._fill_disk,
    "suspend": Faults._suspend,
    "clock-jump": Faults._jump,
    "drain": Faults._drain,
    "burst": Faults._burst,
    "link-break": Faults._break_links,
    "operator-break": Faults._break_operators,
}

"""What goes wrong with real shells: carries out a plan's faults."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Final

from quorate_coordinator.quic_simulation.network import FleetNetwork
from quorate_coordinator.quic_simulation.operators import Operator
from quorate_coordinator.quic_simulation.places import AgentPlace, CoordinatorPlace
from quorate_coordinator.simulation.faults import COORDINATOR
from quorate_coordinator.simulation.plan import FAULT_KINDS, Fault
from quorate_coordinator.simulation.wall_clock import WallClock

#: Not those that stop one process of several, or its disk: here they are tasks of one process.
PLAYED: Final = frozenset(FAULT_KINDS) - {"suspend", "disk-full"}

#: Probability of a datagram's loss that the network has at most. Above it, handshakes are a matter of luck.
_LOSS_MAX: Final = 0.4

#: Seconds that the coordinator is away between two processes after a drain.
_DRAINED_S: Final = 2.0


class Faults:
    """Faults of one kind may overlap: each is undone by itself.

    Loss, reordering and duplication are of the network as a whole, whomever the plan names: its wires are one.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        hosts: list[AgentPlace],
        coordinator: CoordinatorPlace,
        network: FleetNetwork,
        operators: list[Operator],
        wall: WallClock,
    ) -> None:
        self._loop = loop
        self._hosts = hosts
        self._coordinator = coordinator
        self._network = network
        self._operators = operators
        self._wall = wall
        self._loss: list[float] = []
        self._duplication: list[float] = []
        self._reordering = 0
        #: How many were carried out, by kind.
        self.counts: Counter[str] = Counter()

    async def play(self, fault: Fault, start_s: float) -> None:
        """Waits for a fault's time, carries it out, and undoes it."""
        await asyncio.sleep(max(0.0, start_s + fault.at_s - self._loop.time()))
        self.counts[fault.kind] += 1
        hosts = [self._hosts[number] for number in fault.targets if 0 <= number < len(self._hosts)]
        match fault.kind:
            case "loss" | "duplicate" | "reorder":
                await self._disturb(fault)
            case "partition":
                await self._cut(fault, hosts, int(fault.detail["up"]), int(fault.detail["down"]))
            case "link-break":
                for host in hosts:
                    self._network.break_links(host.name)
                await self._cut(fault, hosts, 1, 1)
            case "agent-crash":
                for host in hosts:
                    host.kill(fault.duration_s)
            case "agent-hang":
                for host in hosts:
                    host.hangs_until = max(host.hangs_until, self._loop.time() + fault.duration_s)
            case "coordinator-crash":
                await self._coordinator.restart(fault.duration_s, drain=False)
            case "drain":
                for host in hosts:
                    host.ask_to_stop()
                if COORDINATOR in fault.targets:
                    await self._coordinator.restart(_DRAINED_S, drain=True)
            case "operator-break":
                for number in fault.targets:
                    if fault.duration_s:  # the coordinator hears nothing, and finds that out itself
                        self._network.break_links(self._operators[number].name)
                    await self._operators[number].close()
            case "clock-jump":
                self._wall.jump(float(fault.detail["by_s"]))
            case "burst":
                pass  # its calls are among the plan's

    async def _cut(self, fault: Fault, hosts: list[AgentPlace], up: int, down: int) -> None:
        self._for_each(hosts, lambda name: self._network.cut(name, up, down))
        await asyncio.sleep(fault.duration_s)
        self._for_each(hosts, lambda name: self._network.cut(name, -up, -down))

    def _for_each(self, hosts: list[AgentPlace], do: Callable[[str], None]) -> None:
        for host in hosts:
            do(host.name)

    async def _disturb(self, fault: Fault) -> None:
        if fault.kind == "reorder":
            self._reordering += 1
            self._set()
            await asyncio.sleep(fault.duration_s)
            self._reordering -= 1
        else:
            shares = self._loss if fault.kind == "loss" else self._duplication
            share = float(fault.detail["loss" if fault.kind == "loss" else "share"])
            shares.append(share)
            self._set()
            await asyncio.sleep(fault.duration_s)
            shares.remove(share)
        self._set()

    def _set(self) -> None:
        self._network.loss = min(_LOSS_MAX, max(self._loss, default=0.0))
        self._network.duplication = max(self._duplication, default=0.0)
        self._network.reordering = 0.3 if self._reordering else 0.0

"""The network in memory with faults for each agent: whose port is whose, and which way is shut."""

from collections import Counter
from contextvars import ContextVar
from typing import Final

from quorate_protocol.transport import MemoryNetwork
from quorate_protocol.transport.memory import MemoryPort

#: The coordinator's name on the network.
COORDINATOR_NAME: Final = "coordinator"

#: Who runs in this context: ports bound here are theirs.
place: ContextVar[str] = ContextVar("place", default="operator")


class FleetNetwork(MemoryNetwork):
    """Ports have the names of their places, so that faults may hit one agent whatever link it has."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, delay_s=0.01, jitter_s=0.005)
        self._bound = 0
        #: By place: its ports that may be in use.
        self._names: dict[str, list[str]] = {}
        #: Faults that shut a way: (place, whether it leads up to the coordinator).
        self._cuts: Counter[tuple[str, bool]] = Counter()
        #: Ports that nothing comes to or from any more.
        self._dead: set[str] = set()
        #: While the coordinator's process is gone, and its shells still say goodbye to each other.
        self.is_coordinator_gone = False

    def bind(self, name: str | None = None) -> MemoryPort:
        """As in the base; a client's port is named after its place."""
        if name is None:
            self._bound += 1
            name = f"{place.get()}/{self._bound}"
            self._names.setdefault(place.get(), []).append(name)
        return super().bind(name)

    def is_cut(self, a: str, b: str) -> bool:
        """Whether what `a` sends to `b` is swallowed."""
        if a in self._dead or b in self._dead or super().is_cut(a, b):
            return True
        if self.is_coordinator_gone and COORDINATOR_NAME in (a, b):
            return True
        is_up = b == COORDINATOR_NAME
        return self._cuts[(a if is_up else b).partition("/")[0], is_up] > 0

    def cut(self, name: str, up: int, down: int) -> None:
        """Adds to what shuts the ways of a place; negative numbers take away."""
        self._cuts[name, True] += up
        self._cuts[name, False] += down

    def break_links(self, name: str) -> None:
        """The ports that a place has are dead; it has to bind another."""
        self._dead.update(self._names.pop(name, ()))

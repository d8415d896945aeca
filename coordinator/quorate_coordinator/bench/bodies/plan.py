"""How large the body is, how often it is moved, and what is promised."""

from dataclasses import dataclass
from typing import Final

#: Milliseconds by which a body may delay the control frames of another round, 99 times out of 100.
DELAY_MS: Final = 5.0

#: MiB by which a body may let the coordinator grow: what one connection may hold unread, or unacknowledged.
GROWTH_MIB: Final = 24.0

#: Seconds from one small question to the next.
PERIOD_S: Final = 0.01


#: MiB that all bodies of one turn may have together, in each direction: a quarter of what the spool takes by default.
MIB_MAX: Final = 4000


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. What is measured is the same in every plan."""

    size_bytes: int
    #: How many are asked the body, all at once.
    agents: int
    #: Seconds of small rounds alone, each time.
    alone_s: float
    #: How often each is measured, in turn.
    turns: int
    is_quick: bool = False

    @property
    def moved_bytes(self) -> int:
        """Of all agents, each way."""
        return self.size_bytes * self.agents


def whole(size_bytes: int, agents: int) -> Plan:
    """As it is meant."""
    return Plan(size_bytes, agents, alone_s=5.0, turns=3)


def quick(size_bytes: int, agents: int) -> Plan:
    """For tests and a first look: too little to believe in."""
    return Plan(size_bytes, agents, alone_s=0.5, turns=1, is_quick=True)

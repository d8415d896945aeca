"""How large the crowds are, how long and how often they are asked, and what is promised."""

from dataclasses import dataclass
from typing import Final

#: Rounds a second that the journal may cost with sixteen in flight, in percent.
JOURNAL_COST_PERCENT: Final = 15.0

#: Agents in a crowd, and the processes that host them.
CROWDS: Final = {6: 1, 50: 2, 200: 2}

#: Rounds in flight.
IN_FLIGHT: Final = (1, 16)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. What is measured is the same in every plan."""

    #: Seconds for which one coordinator is asked before it is the other's turn.
    turn_s: float
    #: Seconds of a first turn that does not count.
    warm_up_s: float
    #: Turns of each.
    turns: int


WHOLE: Final = Plan(turn_s=1.0, warm_up_s=0.5, turns=7)

#: For tests and a first look: too little to believe in.
QUICK: Final = Plan(turn_s=0.15, warm_up_s=0.1, turns=2)

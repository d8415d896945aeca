"""The states of a round and what moves it, as data: the core follows this table and the docs' diagram is drawn from it.

`complete` means that every selected agent replied, whenever the last one did: also in grace.
"""

from enum import StrEnum
from typing import Final, Literal, NamedTuple, get_args

from quorate_protocol.fields import RoundState

#: Where a round stands: in flight (`open`, `grace`), or closed, in which of the six ways.
Phase = Literal["open", "grace"] | RoundState

CLOSED: Final[frozenset[str]] = frozenset(get_args(RoundState))


class Trigger(StrEnum):
    """What moves a round. The text is for people: it stands in the diagram."""

    ALL_REPLIED = "every selected agent has replied"
    QUORUM_MET = "replies ≥ quorum"
    QUORUM_UNREACHABLE = "quorum out of reach"
    ALL_ENDED = "nobody is working any more"
    GRACE_ELAPSED = "grace elapsed"
    DEADLINE = "deadline"
    CANCELLED = "cancelled by its operator"
    INTERRUPTED = "coordinator stops"


class Transition(NamedTuple):
    """One row of the table."""

    source: Phase
    trigger: Trigger
    target: Phase


#: The whole table. A pair of phase and trigger that is not in it cannot happen.
TRANSITIONS: Final = (
    Transition("open", Trigger.ALL_REPLIED, "complete"),
    Transition("open", Trigger.QUORUM_MET, "grace"),
    Transition("open", Trigger.QUORUM_UNREACHABLE, "failed"),
    Transition("open", Trigger.DEADLINE, "expired"),
    Transition("open", Trigger.CANCELLED, "cancelled"),
    Transition("open", Trigger.INTERRUPTED, "interrupted"),
    Transition("grace", Trigger.ALL_REPLIED, "complete"),
    Transition("grace", Trigger.ALL_ENDED, "quorate"),
    Transition("grace", Trigger.GRACE_ELAPSED, "quorate"),
    Transition("grace", Trigger.DEADLINE, "quorate"),
    Transition("grace", Trigger.CANCELLED, "cancelled"),
    Transition("grace", Trigger.INTERRUPTED, "interrupted"),
)

#: The same, for looking up.
NEXT: Final[dict[tuple[Phase, Trigger], Phase]] = {(row.source, row.trigger): row.target for row in TRANSITIONS}

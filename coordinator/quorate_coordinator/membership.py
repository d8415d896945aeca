"""What the fleet's registry speaks in: an agent's states and what moves them, events, instructions, members.

Moments and times are seconds, on the clock of the registry's `now`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal, NamedTuple

#: `connected` members have a link, `suspect` and `draining` ones may be without (away); `lost` and `left` ones are
#: remembered for a while.
MemberState = Literal["connected", "suspect", "draining", "lost", "left"]


class Change(StrEnum):
    """What moves a membership. The text is for people: it stands in the diagram."""

    JOINED = "hello with a new session"
    RESUMED = "hello that resumes"
    SILENT = "silent for suspect_after_s"
    HEARD = "heard again"
    LEASE_EXPIRED = "silent or away for lease_s"
    LINK_BROKEN = "link broken"
    BROKEN_OFF = "broken off"
    DRAINING = "drain"
    LEFT = "goodbye"


class Transition(NamedTuple):
    """One row of the table."""

    source: MemberState
    change: Change
    target: MemberState


#: The whole table; what is not in it changes nothing.
TRANSITIONS: Final = (
    Transition("connected", Change.SILENT, "suspect"),
    Transition("connected", Change.LINK_BROKEN, "suspect"),
    Transition("connected", Change.JOINED, "connected"),
    Transition("connected", Change.RESUMED, "connected"),
    Transition("connected", Change.DRAINING, "draining"),
    Transition("connected", Change.BROKEN_OFF, "lost"),
    Transition("connected", Change.LEFT, "left"),
    Transition("suspect", Change.HEARD, "connected"),
    Transition("suspect", Change.LINK_BROKEN, "suspect"),
    Transition("suspect", Change.JOINED, "connected"),
    Transition("suspect", Change.RESUMED, "connected"),
    Transition("suspect", Change.DRAINING, "draining"),
    Transition("suspect", Change.LEASE_EXPIRED, "lost"),
    Transition("suspect", Change.BROKEN_OFF, "lost"),
    Transition("suspect", Change.LEFT, "left"),
    Transition("draining", Change.LINK_BROKEN, "draining"),
    Transition("draining", Change.JOINED, "connected"),
    Transition("draining", Change.RESUMED, "draining"),
    Transition("draining", Change.LEASE_EXPIRED, "lost"),
    Transition("draining", Change.BROKEN_OFF, "lost"),
    Transition("draining", Change.LEFT, "left"),
    Transition("lost", Change.JOINED, "connected"),
    Transition("left", Change.JOINED, "connected"),
)

#: The same, for looking up.
NEXT: Final[dict[tuple[MemberState, Change], MemberState]] = {
    (row.source, row.change): row.target for row in TRANSITIONS
}


# --- events ---


@dataclass(frozen=True, slots=True)
class AgentJoined:
    """A hello was authenticated and awaits its welcome."""

    agent: str
    #: Made by the shell, never used before.
    session: str
    #: The agent's process, as it says.
    instance: str
    labels: Mapping[str, str]
    tasks: tuple[str, ...]
    #: Where it connects from, for people.
    address: str
    #: The agent's software and version, for people.
    software: str
    #: Of the new session, if it becomes one; made by the shell, hard to guess.
    secret: str = field(default="", repr=False)
    #: The session that the agent wants to go on with, and its secret.
    resume: tuple[str, str] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class PacketSeen:
    """Something came from an agent just now."""

    agent: str
    session: str


@dataclass(frozen=True, slots=True)
class LeaseChecked:
    """When agents were last heard, as their links' transport knows it; leases that are over then end.

    The agents are those of `lease_due`, each by its current session's link.
    """

    #: Agent to the moment, on the clock of `now`. One left out was not heard since it was last reported.
    last_seen_at: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The moment of `next_timer` has come, and there is nothing to report: `LeaseChecked` of nobody."""


@dataclass(frozen=True, slots=True)
class LinkBroken:
    """The session's link ended without a goodbye. Not of a link that another has replaced."""

    agent: str
    session: str
    reason: str = ""
    #: Whether the session ends with it: one side broke it off, and nobody will resume it.
    is_final: bool = False


@dataclass(frozen=True, slots=True)
class AgentDraining:
    """An agent wants no more assignments (its own `drain`), or an operator wants it to have none."""

    agent: str
    session: str


@dataclass(frozen=True, slots=True)
class AgentLeft:
    """An agent said goodbye."""

    agent: str
    session: str
    reason: str = ""


Event = AgentJoined | PacketSeen | LeaseChecked | TimerFired | LinkBroken | AgentDraining | AgentLeft


# --- instructions ---


@dataclass(frozen=True, slots=True)
class AdmitAgent:
    """Welcome this session: the agent may be asked from now on."""

    agent: str
    session: str


@dataclass(frozen=True, slots=True)
class ResumeSession:
    """Welcome the agent back: its old session goes on over the link that said hello."""

    agent: str
    session: str


@dataclass(frozen=True, slots=True)
class RefuseAgent:
    """Answer this session's hello with a refusal. It is no member."""

    agent: str
    session: str
    #: As in the wire's `refusal`.
    reason: Literal["full"]
    message: str
    #: Whether the same hello may be accepted later.
    retry: bool


@dataclass(frozen=True, slots=True)
class ReplaceLink:
    """Close the session's link as replaced; a new one has taken over. `DeclareLost` or `ResumeSession` follows."""

    agent: str
    old_session: str


@dataclass(frozen=True, slots=True)
class DeclareSuspect:
    """Report an agent as silent for too long; nothing else changes for it."""

    agent: str
    session: str


@dataclass(frozen=True, slots=True)
class DeclareAway:
    """Report an agent as without a link: nothing can be sent to it, and its session waits for another."""

    agent: str
    session: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeclareReturned:
    """Report a suspect agent as heard again over its link."""

    agent: str
    session: str


@dataclass(frozen=True, slots=True)
class DeclareLost:
    """This session is over: tell the rounds that the agent is lost, and close the session's link if it lives."""

    agent: str
    session: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeclareLeft:
    """This session is over by the agent's own will: for rounds it is as lost, and no fault."""

    agent: str
    session: str
    reason: str


Instruction = (
    AdmitAgent
    | ResumeSession
    | RefuseAgent
    | ReplaceLink
    | DeclareSuspect
    | DeclareAway
    | DeclareReturned
    | DeclareLost
    | DeclareLeft
)


@dataclass(frozen=True, slots=True)
class Member:
    """One agent as it stands; a copy. Moments are on the clock of `now`."""

    agent: str
    session: str
    instance: str
    state: MemberState
    labels: Mapping[str, str]
    #: Sorted.
    tasks: tuple[str, ...]
    address: str
    software: str
    #: When this session began.
    joined_at: float
    #: When it was last heard, as far as reported.
    last_seen_at: float
    #: When it came to its state.
    state_since: float
    #: Whether there is a link. Members without one are away (suspect or draining), lost or left.
    has_link: bool
    #: With lost, left and away: why.
    reason: str

"""What can happen to rounds: the only input of the core. Times are seconds."""

from dataclasses import dataclass
from typing import Literal

from quorate_coordinator.rounds.policy import RoundPolicy
from quorate_protocol.fields import Body

ReplyStatus = Literal["replied", "declined", "failed"]


@dataclass(frozen=True, slots=True)
class RoundRequested:
    """Somebody wants a round."""

    #: The shell's own name for the request; comes back in what answers it.
    request_id: int
    task: str
    #: What the agents are asked, packed, or a reference to it; passed on untouched.
    body: Body
    #: Agents to ask, each reachable now.
    selected: tuple[str, ...]
    #: Agents that belong to the round and have no link now: they are asked when they return, and end as
    #: `unavailable` when they do not.
    away: tuple[str, ...]
    policy: RoundPolicy
    #: Who wants it, for the bound on what one may have in flight; empty is nobody's.
    operator: str = ""
    #: Whether each part that ends is to be told as it does (`TellPart`).
    is_streamed: bool = False


@dataclass(frozen=True, slots=True)
class ReplyReceived:
    """An agent answered an assignment, or said why it does not."""

    round: int
    agent: str
    attempt: int
    status: ReplyStatus
    #: The answer, packed, or a reference to it; with `replied`.
    body: Body | None
    #: With `declined` and `failed`: why.
    error: str = ""
    #: Seconds that the agent's handler ran, as the agent says.
    compute_s: float = 0.0
    #: Seconds that the assignment waited at the agent, as the agent says.
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class AgentReachable:
    """An agent has a link it had not: it resumed its session, or joined anew.

    What it owes is delivered to it (again, where it may have come already: agents tell by round and attempt).
    """

    agent: str


@dataclass(frozen=True, slots=True)
class AgentLost:
    """An agent's session is over (its lease ended, or it left): what it worked on will not come.

    Where the policy leaves it attempts, it is asked again when it returns.
    """

    agent: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RoundCancelled:
    """Its operator does not want the round any more. One that is closed or unknown is not touched."""

    round: int
    reason: str


@dataclass(frozen=True, slots=True)
class TruthRevealed:
    """Somebody knows the right answer of a round."""

    #: The shell's own name for the call.
    request_id: int
    round: int
    #: Packed, or a reference to it; passed on untouched.
    truth: Body


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The moment of `next_timer` has come."""


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """No new rounds from now on; those in flight go on to their end. More of these change nothing."""


@dataclass(frozen=True, slots=True)
class CoordinatorStopped:
    """The coordinator ends without waiting: what is in flight closes as `interrupted`, nothing new is opened."""

    reason: str


Event = (
    RoundRequested
    | ReplyReceived
    | AgentReachable
    | AgentLost
    | RoundCancelled
    | TruthRevealed
    | TimerFired
    | DrainRequested
    | CoordinatorStopped
)

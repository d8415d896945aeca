"""What the shell has to do, in the order given: the only output of the core. Times are seconds.

Every text in here may be shown to an operator.
"""

from dataclasses import dataclass
from typing import Literal

from quorate_coordinator.rounds.policy import ResolvedPolicy
from quorate_protocol.fields import Body, RoundState, Status

#: Why a reply did not count: `unknown` (no such round, or not remembered any more), `not-asked` (an
#: agent that the round did not ask), `duplicate` (its agent had answered), `wrong-attempt` (it had not, and
#: was asked under another number), `late` (its agent's part had ended without an answer).
StrayKind = Literal["unknown", "not-asked", "wrong-attempt", "duplicate", "late"]

#: As in the wire's `error` message.
RejectReason = Literal[
    "bad-request", "no-agents", "busy", "draining", "unknown-round", "already-revealed", "still-open"
]


@dataclass(frozen=True, slots=True)
class AgentResult:
    """One selected agent's part in an outcome."""

    agent: str
    status: Status
    #: The answer, packed; with `replied` alone.
    body: Body | None = None
    #: With any other status: why, as far as known.
    error: str = ""
    #: Seconds from opening the round to receiving the reply; None without a reply in time.
    latency_s: float | None = None
    #: Seconds, as the agent says.
    compute_s: float = 0.0
    #: Seconds, as the agent says.
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a round ended. Never changes."""

    round: int
    request_id: int
    task: str
    state: RoundState
    #: Replies that were needed.
    quorum: int
    #: All who were selected, sorted, the unavailable among them.
    selected: tuple[str, ...]
    #: One for each of `selected`, in the same order.
    results: tuple[AgentResult, ...]
    #: Seconds from opening to closing.
    duration_s: float
    #: With a state other than complete and quorate: what went wrong.
    reason: str = ""


@dataclass(frozen=True, slots=True)
class OpenRound:
    """The round is open: record it, and tell its operator where it wants to know. `SendAssignment` follows."""

    request_id: int
    round: int
    #: All who were selected, sorted, those without a link among them.
    selected: tuple[str, ...]
    task: str
    body: Body
    policy: ResolvedPolicy
    operator: str


@dataclass(frozen=True, slots=True)
class SendAssignment:
    """Send one assignment to all these agents: encode it once."""

    round: int
    #: Sorted; never empty.
    agents: tuple[str, ...]
    task: str
    body: Body
    #: The number that their replies must carry.
    attempt: int
    #: Seconds left until the hard end.
    deadline_s: float


@dataclass(frozen=True, slots=True)
class TellPart:
    """One agent's part has ended, and the round has not: for an operator that wants replies as they come."""

    request_id: int
    round: int
    result: AgentResult


@dataclass(frozen=True, slots=True)
class SendCancellation:
    """Tell these agents to stop working on a round; their links stay."""

    round: int
    #: Sorted; never empty.
    agents: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class CloseRound:
    """The round is over: combine, record, and answer its request. Exactly once for each round."""

    outcome: Outcome


@dataclass(frozen=True, slots=True)
class SendFeedback:
    """Tell these agents the truth of a round that they were asked in; skip those that are not connected now."""

    round: int
    #: Sorted.
    agents: tuple[str, ...]
    task: str
    truth: Body


@dataclass(frozen=True, slots=True)
class LearnTruth:
    """Score the round's agents, and answer the call that revealed the truth. At most once for each round."""

    request_id: int
    outcome: Outcome
    truth: Body


@dataclass(frozen=True, slots=True)
class RejectRequest:
    """Answer a request for a round, or a reveal, with an error: it changed nothing."""

    request_id: int
    reason: RejectReason
    message: str
    #: Whether the same request may succeed later.
    retry: bool


@dataclass(frozen=True, slots=True)
class NoteStray:
    """Count (and log) a reply that changed nothing."""

    kind: StrayKind
    round: int
    agent: str


@dataclass(frozen=True, slots=True)
class OfferLateReply:
    """An answer that came after its agent's part had ended; the outcome stays. For whoever learns from it."""

    round: int
    task: str
    agent: str
    body: Body
    #: Seconds from opening the round to receiving this.
    latency_s: float
    #: Seconds, as the agent says.
    compute_s: float
    #: Seconds, as the agent says.
    waited_s: float


@dataclass(frozen=True, slots=True)
class NoteForgotten:
    """Count a closed round that was dropped before its truth came, because too much is waiting."""

    round: int


@dataclass(frozen=True, slots=True)
class AnnounceDrained:
    """After `DrainRequested`: nothing is in flight any more. Once."""


Instruction = (
    OpenRound
    | SendAssignment
    | TellPart
    | SendCancellation
    | CloseRound
    | SendFeedback
    | LearnTruth
    | RejectRequest
    | NoteStray
    | OfferLateReply
    | NoteForgotten
    | AnnounceDrained
)

"""What can happen to an agent's core (events) and what it asks of its shell (instructions).

Bodies and truths are opaque here: msgpack bytes, or references that carry what they stand for, and let go of it when
the core lets go of them. The core never looks into either.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from quorate_protocol.fields import Body, BodyRef

#: What a body that comes on a stream of its own belongs to.
BodyOf = Literal["assignment", "feedback"]


class EndingKind(Enum):
    """Why an agent stopped for good."""

    #: It was asked to, and finished what it had or ran out of time for it.
    STOPPED = "stopped"
    #: The coordinator does not let it in and will not later.
    REFUSED = "refused"
    #: Another agent took its id.
    REPLACED = "replaced"
    #: No coordinator could be reached for as long as it was told to try.
    UNREACHABLE = "unreachable"


# --- events --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ConnectFailed:
    """An attempt to connect came to nothing."""

    problem: str


@dataclass(frozen=True, slots=True)
class ConnectGivenUp:
    """Connecting has failed for as long as this agent was told to try."""

    problem: str


@dataclass(frozen=True, slots=True)
class LinkUp:
    """A connection is there and its control stream is open."""


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The connection is over, or is to be treated so."""

    reason: str
    #: The peer closed it with the code `REPLACED`.
    replaced: bool = False
    #: Whether the session is over with it: the coordinator said goodbye, or broke the protocol.
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class WelcomeReceived:
    """The coordinator let the agent in."""

    session: str
    #: Whether this is the session that the hello wanted to resume.
    resumed: bool = False
    #: Replies of the session that the coordinator has.
    received: int = 0
    #: With what the session is resumed; empty where it cannot be.
    secret: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class RefusalReceived:
    """The coordinator did not let the agent in."""

    reason: str
    message: str
    retry: bool


@dataclass(frozen=True, slots=True)
class AssignmentReceived:
    """A round asks this agent."""

    round: int
    task: str
    body: Body
    #: Seconds left until the round's end when it was received, at most.
    deadline_s: float
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class AssignmentAnnounced:
    """A round asks this agent, and its body comes on a stream of its own."""

    round: int
    task: str
    body: BodyRef
    #: As in `AssignmentReceived`.
    deadline_s: float
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class CancellationReceived:
    """A round does not want this agent's reply any more."""

    round: int


@dataclass(frozen=True, slots=True)
class FeedbackReceived:
    """The truth of a round became known."""

    round: int
    task: str
    truth: Body


@dataclass(frozen=True, slots=True)
class FeedbackAnnounced:
    """The truth of a round became known, and comes on a stream of its own."""

    round: int
    task: str
    truth: BodyRef


@dataclass(frozen=True, slots=True)
class BodyReceived:
    """A body that was to come on a stream of its own is there."""

    of: BodyOf
    round: int
    body: Body


@dataclass(frozen=True, slots=True)
class BodyFailed:
    """A body did not come as it was announced, or there is no room for it. Not when the link broke."""

    of: BodyOf
    round: int
    #: What to tell the operator.
    error: str


@dataclass(frozen=True, slots=True)
class ReplyBodyDelivered:
    """The coordinator has the body of a reply, or does not want it."""

    round: int
    attempt: int


@dataclass(frozen=True, slots=True)
class DrainReceived:
    """The coordinator sends no more assignments in this session."""

    reason: str = ""
    #: Whether this agent is to end for good.
    stop: bool = False


@dataclass(frozen=True, slots=True)
class RepliesDelivered:
    """The coordinator's transport has acknowledged every reply that was sent over this link."""


@dataclass(frozen=True, slots=True)
class HandlerReturned:
    """A handler is done; every started one ends with one of Returned, Declined, Failed, also when cancelled."""

    work: int
    #: The packed answer; empty for feedback.
    body: Body = b""
    #: Seconds that the handler ran.
    compute_s: float = 0.0


@dataclass(frozen=True, slots=True)
class HandlerDeclined:
    """A task's handler raised `Declined`."""

    work: int
    reason: str
    compute_s: float = 0.0


@dataclass(frozen=True, slots=True)
class HandlerFailed:
    """A handler raised, or its answer cannot travel."""

    work: int
    #: What to tell the operator: the exception's type and the first line of its text.
    error: str
    compute_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The process is asked to end: finish what is there, then leave."""

    reason: str


@dataclass(frozen=True, slots=True)
class DrainTimedOut:
    """What was there has not finished in time."""


Event = (
    ConnectFailed
    | ConnectGivenUp
    | LinkUp
    | LinkDown
    | WelcomeReceived
    | RefusalReceived
    | AssignmentReceived
    | AssignmentAnnounced
    | CancellationReceived
    | FeedbackReceived
    | FeedbackAnnounced
    | BodyReceived
    | BodyFailed
    | ReplyBodyDelivered
    | DrainReceived
    | RepliesDelivered
    | HandlerReturned
    | HandlerDeclined
    | HandlerFailed
    | StopRequested
    | DrainTimedOut
)


# --- instructions --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resume:
    """The session to go on with."""

    session: str
    secret: str = field(repr=False)
    #: Frames that came on the session's coordination streams.
    received: int


@dataclass(frozen=True, slots=True)
class SendHello:
    """Send `hello` on the control stream."""

    resume: Resume | None = None


@dataclass(frozen=True, slots=True)
class OpenCoordination:
    """Open the coordination stream of this session."""

    session: str


@dataclass(frozen=True, slots=True)
class SendReply:
    """Send `reply` on the coordination stream; then its body on one of its own, where that is a reference."""

    round: int
    attempt: int
    status: Literal["replied", "declined", "failed"]
    body: Body | None = None
    error: str = ""
    #: Seconds that the handler ran.
    compute_s: float = 0.0
    #: Seconds that the assignment waited because other handlers ran.
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ReceiveBody:
    """Wait for a body, and tell how that ended, unless the link breaks."""

    of: BodyOf
    round: int
    body: BodyRef
    #: Seconds; None for as long as it may reasonably take.
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class RefuseBody:
    """Nobody here wants this body: stop its stream, when it comes."""

    of: BodyOf
    round: int
    body: BodyRef


@dataclass(frozen=True, slots=True)
class StopBodies:
    """The round is over: give up its question that comes and its answer that goes."""

    round: int


@dataclass(frozen=True, slots=True)
class StartAssignment:
    """Run the task's handler."""

    work: int
    round: int
    attempt: int
    task: str
    body: Body
    #: When the round ends, in the core's time.
    deadline: float


@dataclass(frozen=True, slots=True)
class StartFeedback:
    """Run the task's feedback handler."""

    work: int
    round: int
    task: str
    body: Body
    truth: Body


@dataclass(frozen=True, slots=True)
class CancelHandler:
    """Nobody waits for this handler: cancel it, or tell it. Its end is still an event."""

    work: int


@dataclass(frozen=True, slots=True)
class SendDrain:
    """Send `drain` on the control stream: no more assignments, please."""

    reason: str


@dataclass(frozen=True, slots=True)
class Leave:
    """See that all replies are delivered, then send `goodbye` and close the connection."""

    reason: str


@dataclass(frozen=True, slots=True)
class CloseLink:
    """Close the connection: nothing of worth is on it."""


@dataclass(frozen=True, slots=True)
class Reconnect:
    """Close what is left of the connection, wait, and connect again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """This agent is done; after `Leave` where both are given."""

    kind: EndingKind
    reason: str
    #: With REFUSED: the refusal's short reason, such as `unauthenticated`.
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Log:
    """Tell the operator of this agent."""

    level: Literal["debug", "info", "warning", "error"]
    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)


Instruction = (
    SendHello
    | OpenCoordination
    | SendReply
    | ReceiveBody
    | RefuseBody
    | StopBodies
    | StartAssignment
    | StartFeedback
    | CancelHandler
    | SendDrain
    | Leave
    | CloseLink
    | Reconnect
    | Stop
    | Log
)

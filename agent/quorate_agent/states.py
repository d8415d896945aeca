"""Where an agent stands with its coordinator, and what moves it."""

from enum import Enum
from typing import Final

from quorate_agent import events as ev


class State(Enum):
    """Where the agent stands with its coordinator."""

    #: No link. With a session that a break has suspended, its work goes on.
    CONNECTING = "connecting"
    JOINING = "joining"
    ACTIVE = "active"
    #: Finishes what it has; with a link, or without one and on its way back when it was asked to stop while away.
    DRAINING = "draining"
    GONE = "gone"


#: Events that move the membership: state × event → states it may lead to. What is not here changes nothing.
TRANSITIONS: Final[dict[tuple[State, type], tuple[State, ...]]] = {
    (State.CONNECTING, ev.ConnectFailed): (State.CONNECTING,),
    (State.CONNECTING, ev.ConnectGivenUp): (State.GONE,),
    (State.CONNECTING, ev.LinkUp): (State.JOINING,),
    (State.CONNECTING, ev.StopRequested): (State.DRAINING, State.GONE),
    (State.JOINING, ev.WelcomeReceived): (State.ACTIVE,),
    (State.JOINING, ev.RefusalReceived): (State.CONNECTING, State.GONE),
    (State.JOINING, ev.LinkDown): (State.CONNECTING, State.GONE),
    (State.JOINING, ev.StopRequested): (State.DRAINING, State.GONE),
    (State.ACTIVE, ev.LinkDown): (State.CONNECTING, State.GONE),
    (State.ACTIVE, ev.DrainReceived): (State.DRAINING, State.CONNECTING, State.GONE),
    (State.ACTIVE, ev.StopRequested): (State.DRAINING, State.GONE),
    (State.DRAINING, ev.ConnectFailed): (State.DRAINING,),
    (State.DRAINING, ev.ConnectGivenUp): (State.GONE,),
    (State.DRAINING, ev.LinkUp): (State.DRAINING,),
    (State.DRAINING, ev.WelcomeReceived): (State.DRAINING, State.GONE),
    (State.DRAINING, ev.RefusalReceived): (State.DRAINING, State.GONE),
    (State.DRAINING, ev.LinkDown): (State.DRAINING, State.CONNECTING, State.GONE),
    (State.DRAINING, ev.DrainReceived): (State.DRAINING, State.GONE),
    (State.DRAINING, ev.StopRequested): (State.DRAINING, State.GONE),
    (State.DRAINING, ev.DrainTimedOut): (State.CONNECTING, State.GONE),
    (State.DRAINING, ev.AssignmentReceived): (State.DRAINING, State.CONNECTING, State.GONE),
    (State.DRAINING, ev.AssignmentAnnounced): (State.DRAINING, State.CONNECTING, State.GONE),
    (State.DRAINING, ev.BodyReceived): (State.DRAINING, State.CONNECTING, State.GONE),
    (State.DRAINING, ev.BodyFailed): (State.DRAINING, State.CONNECTING, State.GONE),
    (State.DRAINING, ev.ReplyBodyDelivered): (State.DRAINING, State.CONNECTING, State.GONE),
    (State.DRAINING, ev.HandlerReturned): (State.DRAINING, State.CONNECTING, State.GONE),
    (State.DRAINING, ev.HandlerDeclined): (State.DRAINING, State.CONNECTING, State.GONE),
    (State.DRAINING, ev.HandlerFailed): (State.DRAINING, State.CONNECTING, State.GONE),
    (State.DRAINING, ev.CancellationReceived): (State.DRAINING, State.CONNECTING, State.GONE),
}

#: Events about work: they may come in any state, and move the membership only by what the table says of draining.
WORK_EVENTS: Final = frozenset(
    {
        ev.AssignmentReceived,
        ev.AssignmentAnnounced,
        ev.CancellationReceived,
        ev.FeedbackReceived,
        ev.FeedbackAnnounced,
        ev.BodyReceived,
        ev.BodyFailed,
        ev.ReplyBodyDelivered,
        ev.HandlerReturned,
        ev.HandlerDeclined,
        ev.HandlerFailed,
        ev.RepliesDelivered,
    }
)

"""The agent's core: membership, order of work, what it remembers. No I/O, no clock."""

from typing import TypeVar

import pytest

from quorate_agent import events as ev
from quorate_agent.backlog import BacklogLimits
from quorate_agent.core import AgentCore
from quorate_agent.states import TRANSITIONS, State
from quorate_protocol.limits import TEXT_CHARS_MAX

T = TypeVar("T", bound=ev.Instruction)


def make_core(*, concurrency: int = 1, limits: BacklogLimits | None = None) -> AgentCore:
    return AgentCore(tasks=["classify", "count"], feedback_tasks=["classify"], concurrency=concurrency, limits=limits)


def make_active(*, concurrency: int = 1, limits: BacklogLimits | None = None) -> AgentCore:
    core = make_core(concurrency=concurrency, limits=limits)
    join(core)
    return core


def join(core: AgentCore, now: float = 0.0) -> None:
    assert core.handle(ev.LinkUp(), now) == [ev.SendHello()]
    assert core.handle(ev.WelcomeReceived("s-1"), now) == [ev.OpenCoordination("s-1")]
    assert core.state is State.ACTIVE


def ask(round_id: int, *, task: str = "classify", body: bytes = b"", deadline_s: float = 10.0) -> ev.AssignmentReceived:
    return ev.AssignmentReceived(round_id, task, body or b"body %d" % round_id, deadline_s)


def tell(round_id: int, *, task: str = "classify") -> ev.FeedbackReceived:
    return ev.FeedbackReceived(round_id, task, b"truth %d" % round_id)


def started(instructions: list[ev.Instruction]) -> list[ev.StartAssignment | ev.StartFeedback]:
    return [i for i in instructions if isinstance(i, ev.StartAssignment | ev.StartFeedback)]


def only(instructions: list[ev.Instruction], kind: type[T]) -> T:
    found = [i for i in instructions if isinstance(i, kind)]
    assert len(found) == 1, instructions
    return found[0]


# --- replies -------------------------------------------------------------------------------------


def test_an_assignment_is_run_and_its_answer_sent() -> None:
    core = make_active()
    start = only(core.handle(ask(7, body=b"x", deadline_s=5.0), 100.0), ev.StartAssignment)
    assert (start.round, start.attempt, start.task, start.body, start.deadline) == (7, 1, "classify", b"x", 105.0)
    assert core.handle(ev.HandlerReturned(start.work, b"answer", 0.25), 100.5) == [
        ev.SendReply(7, 1, "replied", body=b"answer", compute_s=0.25, waited_s=0.0)
    ]
    assert core.running == core.queued == 0
    assert core.counts.replied == 1


def test_waiting_behind_another_handler_is_measured() -> None:
    core = make_active()
    first = only(core.handle(ask(1), 100.0), ev.StartAssignment)
    assert core.handle(ask(2), 101.0) == []
    out = core.handle(ev.HandlerReturned(first.work, b"a", 3.0), 103.0)
    assert [type(i) for i in out] == [ev.SendReply, ev.StartAssignment]
    second = only(out, ev.StartAssignment)
    reply = only(core.handle(ev.HandlerReturned(second.work, b"b", 0.5), 104.0), ev.SendReply)
    assert (reply.round, reply.waited_s, reply.compute_s) == (2, 2.0, 0.5)


def test_declined_and_failed_carry_their_text() -> None:
    core = make_active(concurrency=2)
    one = only(core.handle(ask(1), 0.0), ev.StartAssignment)
    two = only(core.handle(ask(2), 0.0), ev.StartAssignment)
    assert core.handle(ev.HandlerDeclined(one.work, "not mine", 0.1), 1.0) == [
        ev.SendReply(1, 1, "declined", error="not mine", compute_s=0.1)
    ]
    assert core.handle(ev.HandlerFailed(two.work, "ValueError: no", 0.2), 1.0) == [
        ev.SendReply(2, 1, "failed", error="ValueError: no", compute_s=0.2)
    ]
    assert (core.counts.declined, core.counts.failed) == (1, 1)


def test_an_error_text_is_cut_to_what_may_travel() -> None:
    core = make_active()
    start = only(core.handle(ask(1), 0.0), ev.StartAssignment)
    reply = only(core.handle(ev.HandlerFailed(start.work, "x" * 10_000), 0.0), ev.SendReply)
    assert len(reply.error) == TEXT_CHARS_MAX


def test_an_unknown_task_is_declined() -> None:
    core = make_active()
    reply = only(core.handle(ask(1, task="paint"), 0.0), ev.SendReply)
    assert reply.status == "declined"
    assert "paint" in reply.error
    assert core.running == 0


def test_an_assignment_over_the_ceiling_is_declined() -> None:
    core = make_active(limits=BacklogLimits(assignments_max=2))
    out = [core.handle(ask(n), 0.0) for n in range(1, 5)]
    assert [len(started(o)) for o in out] == [1, 0, 0, 0]
    reply = only(out[3], ev.SendReply)
    assert (reply.round, reply.status) == (4, "declined")
    assert "queue full" in reply.error
    assert core.queued == 2


def test_an_assignment_over_the_bytes_is_declined_but_a_single_one_never() -> None:
    core = make_active(limits=BacklogLimits(queued_bytes_max=100))
    core.handle(ask(1, body=b"x"), 0.0)
    assert core.handle(ask(2, body=b"x" * 500), 0.0) == []
    assert only(core.handle(ask(3, body=b"x"), 0.0), ev.SendReply).status == "declined"


def test_an_assignment_whose_deadline_passed_in_the_queue_is_not_run() -> None:
    core = make_active()
    first = only(core.handle(ask(1, deadline_s=100.0), 0.0), ev.StartAssignment)
    core.handle(ask(2, deadline_s=1.0), 0.0)
    core.handle(ask(3, deadline_s=100.0), 0.0)
    out = core.handle(ev.HandlerReturned(first.work), 2.0)
    assert [start.round for start in started(out)] == [3]
    assert core.counts.cancelled == 1


# --- cancellation --------------------------------------------------------------------------------


def test_cancelling_drops_what_is_queued() -> None:
    core = make_active()
    first = only(core.handle(ask(1), 0.0), ev.StartAssignment)
    core.handle(ask(2), 0.0)
    assert core.handle(ev.CancellationReceived(2), 0.0) == []
    assert core.queued == 0
    assert started(core.handle(ev.HandlerReturned(first.work), 0.0)) == []
    assert core.counts.cancelled == 1


def test_a_cancelled_handler_keeps_its_place_until_it_ends_and_is_not_heard() -> None:
    core = make_active()
    first = only(core.handle(ask(1), 0.0), ev.StartAssignment)
    core.handle(ask(2), 0.0)
    assert core.handle(ev.CancellationReceived(1), 0.0) == [ev.CancelHandler(first.work)]
    assert core.handle(ev.CancellationReceived(1), 0.0) == [], "cancelled once is enough"
    assert core.running == 1
    out = core.handle(ev.HandlerReturned(first.work, b"late"), 1.0)
    assert [type(i) for i in out] == [ev.StartAssignment]
    assert core.counts.cancelled == 1
    assert core.counts.replied == 0


def test_feedback_comes_also_for_a_cancelled_round() -> None:
    core = make_active()
    first = only(core.handle(ask(1), 0.0), ev.StartAssignment)
    core.handle(ev.CancellationReceived(1), 0.0)
    assert core.handle(tell(1), 0.0) == [], "the handler has not ended yet"
    feedback = only(core.handle(ev.HandlerFailed(first.work, "cancelled"), 0.0), ev.StartFeedback)
    assert (feedback.body, feedback.truth) == (b"body 1", b"truth 1")


# --- order of work -------------------------------------------------------------------------------


def test_assignments_run_at_once_up_to_the_concurrency() -> None:
    core = make_active(concurrency=3)
    out = [started(core.handle(ask(n), 0.0)) for n in range(1, 6)]
    assert [len(o) for o in out] == [1, 1, 1, 0, 0]
    after = core.handle(ev.HandlerReturned(out[1][0].work), 0.0)
    assert [start.round for start in started(after)] == [4]


def test_feedback_runs_alone_between_what_came_before_and_after() -> None:
    core = make_active(concurrency=2)
    first, second = (only(core.handle(ask(n), 0.0), ev.StartAssignment) for n in (1, 2))
    done = only(core.handle(ev.HandlerReturned(first.work), 0.0), ev.SendReply)
    assert done.round == 1
    assert core.handle(tell(1), 0.0) == [], "round 2 is still predicting"
    assert core.handle(ask(3), 0.0) == [], "a place is free, but feedback came first"
    feedback = only(core.handle(ev.HandlerReturned(second.work), 0.0), ev.StartFeedback)
    assert (feedback.round, feedback.task, feedback.body, feedback.truth) == (1, "classify", b"body 1", b"truth 1")
    assert core.handle(ask(4), 0.0) == [], "nothing runs beside feedback"
    out = core.handle(ev.HandlerReturned(feedback.work), 0.0)
    assert [start.round for start in started(out)] == [3, 4]
    assert core.counts.feedback == 1


def test_failed_feedback_is_counted_and_work_goes_on() -> None:
    core = make_active()
    first = only(core.handle(ask(1), 0.0), ev.StartAssignment)
    core.handle(ev.HandlerReturned(first.work), 0.0)
    feedback = only(core.handle(tell(1), 0.0), ev.StartFeedback)
    core.handle(ask(2), 0.0)
    out = core.handle(ev.HandlerFailed(feedback.work, "boom"), 0.0)
    assert [type(i) for i in out] == [ev.StartAssignment]
    assert core.counts.feedback_failed == 1


# --- bodies --------------------------------------------------------------------------------------


def run_round(core: AgentCore, round_id: int, **kwargs: object) -> None:
    start = only(core.handle(ask(round_id, **kwargs), 0.0), ev.StartAssignment)  # type: ignore[arg-type]
    core.handle(ev.HandlerReturned(start.work), 0.0)


def test_the_oldest_bodies_are_forgotten_beyond_the_count() -> None:
    core = make_active(limits=BacklogLimits(remembered_max=2))
    for n in (1, 2, 3):
        run_round(core, n)
    assert (core.remembered, core.counts.bodies_forgotten) == (2, 1)
    log = only(core.handle(tell(1), 0.0), ev.Log)
    assert log.fields["round"] == 1
    assert core.counts.feedback_forgotten == 1
    assert core.state is State.ACTIVE
    assert only(core.handle(tell(3), 0.0), ev.StartFeedback).body == b"body 3"


def test_the_oldest_bodies_are_forgotten_beyond_the_bytes() -> None:
    core = make_active(limits=BacklogLimits(remembered_bytes_max=100))
    for n in (1, 2, 3):
        run_round(core, n, body=b"x" * 40)
    assert (core.remembered, core.counts.bodies_forgotten) == (2, 1)


def test_a_body_is_remembered_once_for_a_round_asked_twice() -> None:
    core = make_active(limits=BacklogLimits(remembered_bytes_max=100))
    for attempt in range(1, 6):
        event = ev.AssignmentReceived(1, "classify", b"x" * 90, 10.0, attempt)
        core.handle(ev.HandlerReturned(only(core.handle(event, 0.0), ev.StartAssignment).work), 0.0)
    assert (core.remembered, core.counts.bodies_forgotten) == (1, 0)


def test_feedback_for_another_task_of_the_round_is_not_mixed_up() -> None:
    core = AgentCore(tasks=["a", "b"], feedback_tasks=["a", "b"])
    join(core)
    start = only(core.handle(ask(1, task="a"), 0.0), ev.StartAssignment)
    core.handle(ev.HandlerReturned(start.work), 0.0)
    assert started(core.handle(tell(1, task="b"), 0.0)) == []
    assert core.counts.feedback_forgotten == 1


def test_feedback_comes_once() -> None:
    core = make_active()
    run_round(core, 1)
    feedback = only(core.handle(tell(1), 0.0), ev.StartFeedback)
    core.handle(ev.HandlerReturned(feedback.work), 0.0)
    assert started(core.handle(tell(1), 0.0)) == []
    assert core.counts.feedback_forgotten == 1


def test_without_a_feedback_handler_nothing_is_remembered_and_feedback_is_let_go() -> None:
    core = make_active()
    run_round(core, 1, task="count")
    assert core.remembered == 0
    assert core.handle(tell(1, task="count"), 0.0) == []
    assert core.counts.feedback_forgotten == 0


def test_feedback_over_the_ceiling_is_dropped_and_counted() -> None:
    core = make_active(limits=BacklogLimits(feedback_max=1))
    for n in (1, 2, 3):
        run_round(core, n)
    assert len(started(core.handle(tell(1), 0.0))) == 1
    assert core.handle(tell(2), 0.0) == []
    assert [type(i) for i in core.handle(tell(3), 0.0)] == [ev.Log]
    assert core.counts.feedback_dropped == 1


# --- membership ----------------------------------------------------------------------------------


def test_failing_to_connect_asks_to_connect_again() -> None:
    core = make_core()
    assert core.handle(ev.ConnectFailed("nobody there"), 0.0) == [ev.Reconnect("nobody there")]
    assert core.state is State.CONNECTING
    stop = only(core.handle(ev.ConnectGivenUp("too long"), 0.0), ev.Stop)
    assert stop.kind is ev.EndingKind.UNREACHABLE
    assert core.state is State.GONE


def test_a_refusal_for_now_is_tried_again_and_one_for_good_is_not() -> None:
    core = make_core()
    core.handle(ev.LinkUp(), 0.0)
    retry = only(core.handle(ev.RefusalReceived("draining", "back soon", retry=True), 0.0), ev.Reconnect)
    assert "back soon" in retry.reason
    core.handle(ev.LinkUp(), 0.0)
    assert core.handle(ev.RefusalReceived("unauthenticated", "wrong token", retry=False), 0.0) == [
        ev.Stop(ev.EndingKind.REFUSED, "wrong token", "unauthenticated")
    ]
    assert core.state is State.GONE


def test_a_broken_link_drops_the_sessions_work_and_asks_to_connect_again() -> None:
    core = make_active()
    first = only(core.handle(ask(1), 0.0), ev.StartAssignment)
    core.handle(ask(2), 0.0)
    assert core.handle(ev.LinkDown("gone"), 0.0) == [ev.CancelHandler(first.work), ev.Reconnect("gone")]
    assert core.counts.lost == 2
    assert core.handle(ev.LinkDown("gone again"), 0.0) == [], "it is known"
    join(core)
    assert core.handle(ask(3), 0.0) == [], "the old handler has not ended yet"
    out = core.handle(ev.HandlerReturned(first.work, b"of the old session"), 0.0)
    assert [type(i) for i in out] == [ev.StartAssignment], "and its answer is not sent"


def test_feedback_outlives_the_link() -> None:
    core = make_active()
    run_round(core, 1)
    start = only(core.handle(ask(2), 0.0), ev.StartAssignment)
    core.handle(tell(1), 0.0)
    core.handle(ev.LinkDown("gone"), 0.0)
    feedback = only(core.handle(ev.HandlerFailed(start.work, "cancelled"), 0.0), ev.StartFeedback)
    assert feedback.round == 1


def test_a_running_feedback_is_not_cancelled_by_a_broken_link() -> None:
    core = make_active()
    run_round(core, 1)
    core.handle(tell(1), 0.0)
    assert core.handle(ev.LinkDown("gone"), 0.0) == [ev.Reconnect("gone")]


def test_work_of_no_session_is_ignored() -> None:
    core = make_core()
    for event in (ask(1), tell(1), ev.CancellationReceived(1)):
        assert core.handle(event, 0.0) == []
    assert core.counts.assignments == 0


def test_replaced_is_the_end() -> None:
    core = make_active()
    first = only(core.handle(ask(1), 0.0), ev.StartAssignment)
    out = core.handle(ev.LinkDown("another took the id", replaced=True), 0.0)
    assert out == [ev.CancelHandler(first.work), ev.Stop(ev.EndingKind.REPLACED, "another took the id")]
    assert core.handle(ev.LinkUp(), 0.0) == []


# --- draining ------------------------------------------------------------------------------------


def test_an_idle_agent_leaves_at_once_when_asked_to_stop() -> None:
    core = make_active()
    assert core.handle(ev.StopRequested("SIGTERM"), 0.0) == [
        ev.SendDrain("SIGTERM"),
        ev.Leave("SIGTERM"),
        ev.Stop(ev.EndingKind.STOPPED, "SIGTERM"),
    ]
    assert core.state is State.GONE
    assert core.handle(ev.LinkDown("closed"), 0.0) == []


def test_stopping_finishes_what_is_there_and_declines_what_comes() -> None:
    core = make_active()
    first = only(core.handle(ask(1), 0.0), ev.StartAssignment)
    core.handle(ask(2), 0.0)
    assert core.handle(ev.StopRequested("SIGTERM"), 0.0) == [ev.SendDrain("SIGTERM")]
    assert only(core.handle(ask(3), 0.0), ev.SendReply).status == "declined"
    out = core.handle(ev.HandlerReturned(first.work, b"a"), 0.0)
    assert [type(i) for i in out] == [ev.SendReply, ev.StartAssignment]
    out = core.handle(ev.HandlerReturned(only(out, ev.StartAssignment).work, b"b"), 0.0)
    assert [type(i) for i in out] == [ev.SendReply, ev.Leave, ev.Stop], "the reply goes before the goodbye"
    assert core.handle(ev.StopRequested("again"), 0.0) == []


def test_stopping_waits_no_longer_than_the_drain_timeout() -> None:
    core = make_active()
    first = only(core.handle(ask(1), 0.0), ev.StartAssignment)
    core.handle(ask(2), 0.0)
    core.handle(ev.StopRequested("SIGTERM"), 0.0)
    out = core.handle(ev.DrainTimedOut(), 30.0)
    assert out[0] == ev.Log("warning", "drain_timed_out", {"running": 1, "queued": 1, "replies": 0})
    assert out[1:] == [
        ev.CancelHandler(first.work),
        ev.Leave("SIGTERM"),
        ev.Stop(ev.EndingKind.STOPPED, "SIGTERM"),
    ]


def test_a_round_cancelled_while_stopping_does_not_hold_it_up() -> None:
    core = make_active(concurrency=2)
    first = only(core.handle(ask(1), 0.0), ev.StartAssignment)
    core.handle(ask(2), 0.0)
    core.handle(ev.StopRequested("SIGTERM"), 0.0)
    out = core.handle(ev.HandlerReturned(first.work), 0.0)
    assert not any(isinstance(i, ev.Stop) for i in out)
    core.handle(ev.CancellationReceived(2), 0.0)
    assert core.state is State.DRAINING, "its handler has not ended"


def test_stopping_without_a_link_needs_no_goodbye() -> None:
    core = make_core()
    assert core.handle(ev.StopRequested("SIGINT"), 0.0) == [ev.Stop(ev.EndingKind.STOPPED, "SIGINT")]


def test_stopping_while_joining_closes_the_link() -> None:
    core = make_core()
    core.handle(ev.LinkUp(), 0.0)
    out = core.handle(ev.StopRequested("SIGINT"), 0.0)
    assert out == [ev.CloseLink(), ev.Stop(ev.EndingKind.STOPPED, "SIGINT")]


def test_stopping_without_a_link_waits_for_what_runs() -> None:
    core = make_active()
    run_round(core, 1)
    feedback = only(core.handle(tell(1), 0.0), ev.StartFeedback)
    core.handle(ev.LinkDown("gone"), 0.0)
    assert core.handle(ev.StopRequested("SIGTERM"), 0.0) == []
    assert core.state is State.DRAINING
    assert only(core.handle(ev.HandlerReturned(feedback.work), 0.0), ev.Stop).kind is ev.EndingKind.STOPPED


def test_a_link_that_breaks_while_stopping_is_not_made_again() -> None:
    core = make_active()
    first = only(core.handle(ask(1), 0.0), ev.StartAssignment)
    core.handle(ev.StopRequested("SIGTERM"), 0.0)
    assert core.handle(ev.LinkDown("gone"), 0.0) == [ev.CancelHandler(first.work)]
    out = core.handle(ev.HandlerFailed(first.work, "cancelled"), 0.0)
    assert out == [ev.Stop(ev.EndingKind.STOPPED, "SIGTERM")]


def test_a_draining_coordinator_is_left_when_work_is_done_and_joined_again() -> None:
    core = make_active()
    first = only(core.handle(ask(1), 0.0), ev.StartAssignment)
    assert [type(i) for i in core.handle(ev.DrainReceived("upgrade"), 0.0)] == [ev.Log]
    assert core.state is State.DRAINING
    out = core.handle(ev.HandlerReturned(first.work, b"a"), 0.0)
    assert [type(i) for i in out] == [ev.SendReply, ev.Leave, ev.Reconnect]
    assert core.state is State.CONNECTING
    join(core)


def test_a_draining_coordinator_that_goes_away_is_joined_again() -> None:
    core = make_active()
    core.handle(ask(1), 0.0)
    core.handle(ev.DrainReceived(), 0.0)
    out = core.handle(ev.LinkDown("gone"), 0.0)
    assert [type(i) for i in out] == [ev.CancelHandler, ev.Reconnect]
    assert core.state is State.CONNECTING


def test_a_drain_of_the_coordinator_that_takes_too_long_drops_the_session_but_not_feedback() -> None:
    core = make_active()
    run_round(core, 1)
    first = only(core.handle(ask(2), 0.0), ev.StartAssignment)
    core.handle(tell(1), 0.0)
    core.handle(ev.DrainReceived("upgrade"), 0.0)
    out = core.handle(ev.DrainTimedOut(), 0.0)
    assert [type(i) for i in out] == [ev.Log, ev.CancelHandler, ev.Leave, ev.Reconnect]
    assert only(core.handle(ev.HandlerFailed(first.work, "x"), 0.0), ev.StartFeedback).round == 1


def test_being_asked_to_stop_while_the_coordinator_drains_is_the_end() -> None:
    core = make_active()
    first = only(core.handle(ask(1), 0.0), ev.StartAssignment)
    core.handle(ev.DrainReceived("upgrade"), 0.0)
    assert core.handle(ev.StopRequested("SIGTERM"), 0.0) == [ev.SendDrain("SIGTERM")]
    out = core.handle(ev.HandlerReturned(first.work, b"a"), 0.0)
    assert [type(i) for i in out] == [ev.SendReply, ev.Leave, ev.Stop]


# --- the table -----------------------------------------------------------------------------------

_MEMBERSHIP_EVENTS: list[ev.Event] = [
    ev.ConnectFailed("x"),
    ev.ConnectGivenUp("x"),
    ev.LinkUp(),
    ev.LinkDown("x"),
    ev.WelcomeReceived("s"),
    ev.RefusalReceived("full", "x", retry=True),
    ev.DrainReceived(),
    ev.DrainReceived(stop=True),
    ev.RepliesDelivered(),
    ev.DrainTimedOut(),
]


def reach(state: State) -> AgentCore:
    core = make_core()
    if state is State.JOINING:
        core.handle(ev.LinkUp(), 0.0)
    elif state is State.ACTIVE:
        join(core)
    elif state is State.DRAINING:
        join(core)
        core.handle(ask(1), 0.0)
        core.handle(ev.StopRequested("x"), 0.0)
    elif state is State.GONE:
        core.handle(ev.StopRequested("x"), 0.0)
    assert core.state is state
    return core


@pytest.mark.parametrize("event", _MEMBERSHIP_EVENTS, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
def test_the_table_says_where_each_event_leads(state: State, event: ev.Event) -> None:
    core = reach(state)
    out = core.handle(event, 0.0)
    allowed = TRANSITIONS.get((state, type(event)))
    if isinstance(event, ev.RepliesDelivered):
        assert (core.state, out) == (state, [])
    elif allowed is None:
        assert (core.state, out) == (state, []), "an illegal move changes nothing"
    else:
        assert core.state in allowed

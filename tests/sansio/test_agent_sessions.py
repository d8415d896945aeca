"""The agent's core when links break: sessions are suspended and resumed, replies kept, assignments known."""

from typing import TypeVar

import pytest

from quorate_agent import events as ev
from quorate_agent.backlog import BacklogLimits
from quorate_agent.core import AgentCore
from quorate_agent.reply_log import ReplyLog
from quorate_agent.session import UNSENT_BYTES_MAX
from quorate_agent.states import State

T = TypeVar("T", bound=ev.Instruction)


def make_core(*, concurrency: int = 1, limits: BacklogLimits | None = None) -> AgentCore:
    return AgentCore(tasks=["classify"], feedback_tasks=["classify"], concurrency=concurrency, limits=limits)


def make_active(*, concurrency: int = 1, limits: BacklogLimits | None = None) -> AgentCore:
    """A core in the session `s-1`, which can be resumed."""
    core = make_core(concurrency=concurrency, limits=limits)
    core.handle(ev.LinkUp(), 0.0)
    core.handle(ev.WelcomeReceived("s-1", secret="key"), 0.0)
    return core


def break_link(core: AgentCore, now: float = 0.0) -> list[ev.Instruction]:
    return core.handle(ev.LinkDown("broken"), now)


def come_back(core: AgentCore, received: int, now: float = 0.0) -> list[ev.Instruction]:
    """A new link, over which the session goes on; the coordinator has so many replies."""
    (hello,) = core.handle(ev.LinkUp(), now)
    assert isinstance(hello, ev.SendHello)
    assert hello.resume is not None
    assert (hello.resume.session, hello.resume.secret) == ("s-1", "key")
    opening, *rest = core.handle(ev.WelcomeReceived("s-1", resumed=True, received=received, secret="key"), now)
    assert opening == ev.OpenCoordination("s-1")
    return rest


def ask(round_id: int, *, attempt: int = 1, deadline_s: float = 10.0) -> ev.AssignmentReceived:
    return ev.AssignmentReceived(round_id, "classify", b"body %d" % round_id, deadline_s, attempt)


def only(instructions: list[ev.Instruction], kind: type[T]) -> T:
    found = [i for i in instructions if isinstance(i, kind)]
    assert len(found) == 1, instructions
    return found[0]


def kinds(instructions: list[ev.Instruction]) -> list[type]:
    return [type(i) for i in instructions]


def start(core: AgentCore, round_id: int, *, attempt: int = 1) -> int:
    return only(core.handle(ask(round_id, attempt=attempt), 0.0), ev.StartAssignment).work


def answer(core: AgentCore, round_id: int, body: bytes = b"answer") -> list[ev.Instruction]:
    return core.handle(ev.HandlerReturned(start(core, round_id), body), 0.0)


def replies(instructions: list[ev.Instruction]) -> list[tuple[int, int]]:
    return [(i.round, i.attempt) for i in instructions if isinstance(i, ev.SendReply)]


# --- suspended -----------------------------------------------------------------------------------


def test_a_broken_link_suspends_the_session_and_its_work_goes_on() -> None:
    core = make_active()
    first = start(core, 1)
    core.handle(ask(2), 0.0)
    assert break_link(core) == [ev.Reconnect("broken")]
    assert (core.state, core.is_suspended, core.wants_link, core.counts.lost) == (State.CONNECTING, True, True, 0)
    out = core.handle(ev.HandlerReturned(first, b"a"), 0.0)
    assert kinds(out) == [ev.StartAssignment], "the reply waits, the queue does not"
    assert core.counts.replied == 1


def test_the_replies_that_the_coordinator_does_not_have_are_sent_again_in_order() -> None:
    core = make_active(concurrency=3)
    for round_id in (1, 2, 3):
        answer(core, round_id)
    running = start(core, 4)
    break_link(core)
    core.handle(ev.HandlerReturned(running, b"d"), 0.0)
    again = come_back(core, received=1)
    assert replies(again) == [(2, 1), (3, 1), (4, 1)]
    assert again[-1] == ev.SendReply(4, 1, "replied", body=b"d")
    assert (core.state, core.counts.resumed, core.counts.sessions) == (State.ACTIVE, 1, 1)
    # A second break: all of them may have been lost again, and count on from the first.
    break_link(core)
    assert replies(come_back(core, received=3)) == [(4, 1)]
    break_link(core)
    assert come_back(core, received=4) == []


def test_the_hello_says_how_many_frames_came_over_all_links() -> None:
    core = make_active()
    core.handle(ask(1), 0.0)
    core.handle(ev.CancellationReceived(99), 0.0)
    core.handle(ev.FeedbackReceived(98, "unheard-of", b""), 0.0)
    break_link(core)
    (hello,) = core.handle(ev.LinkUp(), 0.0)
    assert hello == ev.SendHello(ev.Resume("s-1", "key", 3))
    core.handle(ev.WelcomeReceived("s-1", resumed=True, secret="key"), 0.0)
    core.handle(ask(1), 0.0)  # delivered again: a frame all the same
    break_link(core)
    assert core.handle(ev.LinkUp(), 0.0) == [ev.SendHello(ev.Resume("s-1", "key", 4))]


def test_a_session_that_does_not_go_on_is_abandoned() -> None:
    core = make_active(concurrency=2)
    answer(core, 1)
    running = start(core, 2)
    core.handle(ask(3), 0.0)
    core.handle(ask(4), 0.0)
    break_link(core)
    core.handle(ev.LinkUp(), 0.0)
    out = core.handle(ev.WelcomeReceived("s-2", secret="other"), 0.0)
    assert kinds(out) == [ev.OpenCoordination, ev.CancelHandler, ev.CancelHandler]
    assert (core.counts.lost, core.counts.sessions, core.queued) == (3, 2, 0)
    assert replies(core.handle(ev.HandlerReturned(running, b"of the old session"), 0.0)) == []
    # The new session begins at nought, and knows nothing of the old one's rounds.
    break_link(core)
    assert core.handle(ev.LinkUp(), 0.0) == [ev.SendHello(ev.Resume("s-2", "other", 0))]
    assert replies(core.handle(ev.WelcomeReceived("s-2", resumed=True, secret="other"), 0.0)) == []


def test_a_session_without_a_secret_dies_with_its_link() -> None:
    core = make_core()
    core.handle(ev.LinkUp(), 0.0)
    core.handle(ev.WelcomeReceived("s-1"), 0.0)
    work = start(core, 1)
    assert break_link(core) == [ev.CancelHandler(work), ev.Reconnect("broken")]
    assert core.handle(ev.LinkUp(), 0.0) == [ev.SendHello(None)]


def test_a_session_that_the_coordinator_ended_dies_with_its_link() -> None:
    core = make_active()
    work = start(core, 1)
    out = core.handle(ev.LinkDown("goodbye", is_over=True), 0.0)
    assert out == [ev.CancelHandler(work), ev.Reconnect("goodbye")]
    assert not core.is_suspended
    assert core.handle(ev.LinkUp(), 0.0) == [ev.SendHello(None)]


def test_attempts_that_come_to_nothing_leave_the_session_as_it_is() -> None:
    core = make_active()
    work = start(core, 1)
    break_link(core)
    core.handle(ev.ConnectFailed("nobody"), 0.0)
    core.handle(ev.LinkUp(), 0.0)
    assert core.handle(ev.LinkDown("no welcome", is_over=True), 0.0) == [ev.Reconnect("no welcome")]
    core.handle(ev.LinkUp(), 0.0)
    assert kinds(core.handle(ev.RefusalReceived("full", "later", retry=True), 0.0)) == [ev.Reconnect]
    core.handle(ev.HandlerReturned(work, b"a"), 0.0)
    assert replies(come_back(core, received=0)) == [(1, 1)]


def test_queued_work_whose_deadline_passes_while_away_is_dropped() -> None:
    core = make_active()
    work = start(core, 1)
    core.handle(ask(2, deadline_s=5.0), 0.0)
    core.handle(ask(3, deadline_s=50.0), 0.0)
    break_link(core)
    out = core.handle(ev.HandlerReturned(work, b"late, and still sent"), 11.0)
    assert only(out, ev.StartAssignment).round == 3
    assert core.counts.cancelled == 1
    assert replies(come_back(core, received=0, now=12.0)) == [(1, 1)]


def test_the_secret_is_in_no_text() -> None:
    core = make_core()
    core.handle(ev.LinkUp(), 0.0)
    welcome = ev.WelcomeReceived("s-1", secret="hush")
    core.handle(welcome, 0.0)
    break_link(core)
    hello = core.handle(ev.LinkUp(), 0.0)
    assert "hush" not in repr(welcome) + repr(hello) + repr(core._session)


# --- known assignments ---------------------------------------------------------------------------


def test_an_assignment_that_is_known_is_not_worked_on_twice() -> None:
    core = make_active()
    answered = start(core, 1)
    core.handle(ev.HandlerReturned(answered, b"a"), 0.0)
    running = start(core, 2)
    core.handle(ask(3), 0.0)
    break_link(core)
    assert replies(come_back(core, received=0)) == [(1, 1)]
    for round_id in (1, 2, 3):
        assert core.handle(ask(round_id), 0.0) == []
    assert (core.counts.duplicates, core.counts.assignments) == (3, 3)
    out = core.handle(ev.HandlerReturned(running, b"b"), 0.0)
    assert (replies(out), only(out, ev.StartAssignment).round) == ([(2, 1)], 3)


def test_an_assignment_that_comes_after_its_reply_was_delivered_is_known() -> None:
    """It was sent again when the session was resumed, and overtaken by the handler's end."""
    core = make_active()
    running = start(core, 1)
    break_link(core)
    come_back(core, received=0)
    core.handle(ev.HandlerReturned(running, b"a"), 0.0)
    core.handle(ev.RepliesDelivered(), 0.0)
    assert core.handle(ask(1), 0.0) == []
    assert core.counts.duplicates == 1


def test_an_assignment_that_was_lost_with_the_link_is_worked_on_when_it_comes_again() -> None:
    core = make_active()
    break_link(core)
    come_back(core, received=0)
    assert only(core.handle(ask(1), 0.0), ev.StartAssignment).round == 1


@pytest.mark.parametrize("where", ["queued", "running", "answered"])
def test_a_newer_attempt_takes_the_place_of_the_one_before(where: str) -> None:
    core = make_active()
    first = start(core, 7 if where == "queued" else 1)
    if where == "queued":
        core.handle(ask(1), 0.0)
    elif where == "answered":
        core.handle(ev.HandlerFailed(first, "boom"), 0.0)
    out = core.handle(ask(1, attempt=2), 0.0)
    if where == "running":
        assert out == [ev.CancelHandler(first)]
        out = core.handle(ev.HandlerReturned(first, b"of the first attempt"), 0.0)
    elif where == "queued":
        assert out == []
        out = core.handle(ev.HandlerReturned(first, b"of another round"), 0.0)
    started = only(out, ev.StartAssignment)
    assert (started.round, started.attempt) == (1, 2)
    assert core.handle(ask(1, attempt=1), 0.0) == [], "the older one is over"
    assert replies(core.handle(ev.HandlerReturned(started.work, b"x"), 0.0)) == [(1, 2)]
    assert core.counts.cancelled == (0 if where == "answered" else 1)


def test_a_cancelled_assignment_that_comes_again_is_worked_on() -> None:
    core = make_active()
    first = start(core, 1)
    core.handle(ev.CancellationReceived(1), 0.0)
    assert core.handle(ask(1), 0.0) == [], "the cancelled handler has not ended"
    assert only(core.handle(ev.HandlerReturned(first), 0.0), ev.StartAssignment).round == 1


# --- what is kept --------------------------------------------------------------------------------


def test_delivered_replies_are_forgotten() -> None:
    core = make_active()
    answer(core, 1)
    answer(core, 2)
    core.handle(ev.RepliesDelivered(), 0.0)
    answer(core, 3)
    break_link(core)
    assert replies(come_back(core, received=2)) == [(3, 1)]
    assert core.counts.replies_lost == 0


def test_delivery_is_not_believed_without_a_link() -> None:
    core = make_active()
    work = start(core, 1)
    break_link(core)
    core.handle(ev.HandlerReturned(work, b"a"), 0.0)
    core.handle(ev.RepliesDelivered(), 0.0)
    assert replies(come_back(core, received=0)) == [(1, 1)]


def test_replies_beyond_the_ceiling_are_lost_and_told() -> None:
    core = make_active(limits=BacklogLimits(replies_max=2))
    for round_id in (1, 2, 3, 4):
        answer(core, round_id)
    break_link(core)
    out = come_back(core, received=1)
    assert only(out, ev.Log).fields == {"count": 1}
    assert replies(out) == [(3, 1), (4, 1)]
    assert core.counts.replies_lost == 1
    # They are the second and third now.
    break_link(core)
    assert replies(come_back(core, received=2)) == [(4, 1)]


def reply(round_id: int, size: int = 1) -> ev.SendReply:
    return ev.SendReply(round_id, 1, "replied", body=b"x" * size)


def test_the_log_is_bounded_by_count_and_bytes() -> None:
    log = ReplyLog(BacklogLimits(replies_max=3, replies_bytes_max=100))
    for round_id in range(1, 6):
        log.put(reply(round_id))
    assert (len(log), log.size_bytes) == (3, 3)
    assert [log.has(round_id, 1) for round_id in range(1, 6)] == [False, False, True, True, True], (
        "what was dropped may never have arrived"
    )
    log.put(reply(6, 99))
    assert (len(log), log.size_bytes) == (2, 100)
    log.put(reply(7, 500))
    assert (len(log), log.size_bytes) == (1, 500), "the newest is kept whatever its size"
    assert log.resume(6) == ([reply(7, 500)], 0)
    log.delivered()
    assert (len(log), log.size_bytes) == (0, 0)
    assert log.resume(7) == ([], 0)
    for round_id in range(8, 100):
        log.put(reply(round_id))
        log.delivered()
    assert [round_id for round_id in range(1, 100) if log.has(round_id, 1)] == list(range(94, 100))
    log.begin()
    assert not log.has(99, 1)


# --- stopping while away -------------------------------------------------------------------------


def test_stopping_while_away_finishes_comes_back_and_says_goodbye() -> None:
    core = make_active()
    work = start(core, 1)
    core.handle(ask(2), 0.0)
    break_link(core)
    assert core.handle(ev.StopRequested("SIGTERM"), 0.0) == []
    assert (core.state, core.wants_link) == (State.DRAINING, True)
    second = only(core.handle(ev.HandlerReturned(work, b"a"), 0.0), ev.StartAssignment)
    assert core.handle(ev.HandlerReturned(second.work, b"b"), 0.0) == [], "there are replies to deliver"
    assert core.handle(ev.ConnectFailed("nobody"), 0.0) == [ev.Reconnect("nobody")]
    out = come_back(core, received=0)
    assert kinds(out) == [ev.SendReply, ev.SendReply, ev.SendDrain, ev.Leave, ev.Stop]
    assert only(out, ev.Stop) == ev.Stop(ev.EndingKind.STOPPED, "SIGTERM")


def test_stopping_while_away_may_come_back_before_the_work_is_done() -> None:
    core = make_active()
    work = start(core, 1)
    break_link(core)
    core.handle(ev.StopRequested("SIGTERM"), 0.0)
    assert come_back(core, received=0) == [ev.SendDrain("SIGTERM")]
    assert core.state is State.DRAINING
    assert only(core.handle(ask(2), 0.0), ev.SendReply).status == "declined"
    assert kinds(core.handle(ev.HandlerReturned(work, b"a"), 0.0)) == [ev.SendReply, ev.Leave, ev.Stop]


def test_stopping_while_the_link_breaks_comes_back() -> None:
    core = make_active()
    work = start(core, 1)
    core.handle(ev.StopRequested("SIGTERM"), 0.0)
    assert break_link(core) == [ev.Reconnect("broken")]
    assert (core.state, core.wants_link) == (State.DRAINING, True)
    core.handle(ev.HandlerReturned(work, b"a"), 0.0)
    assert kinds(come_back(core, received=0)) == [ev.SendReply, ev.SendDrain, ev.Leave, ev.Stop]


def test_stopping_while_away_with_nothing_to_deliver_ends_at_once() -> None:
    core = make_active()
    answer(core, 1)
    core.handle(ev.RepliesDelivered(), 0.0)
    break_link(core)
    assert core.handle(ev.StopRequested("SIGTERM"), 0.0) == [ev.Stop(ev.EndingKind.STOPPED, "SIGTERM")]


def test_stopping_while_joining_with_something_to_deliver_goes_on_joining() -> None:
    core = make_active()
    answer(core, 1)
    break_link(core)
    core.handle(ev.LinkUp(), 0.0)
    assert core.handle(ev.StopRequested("SIGTERM"), 0.0) == []
    out = core.handle(ev.WelcomeReceived("s-1", resumed=True, secret="key"), 0.0)
    assert kinds(out) == [ev.OpenCoordination, ev.SendReply, ev.SendDrain, ev.Leave, ev.Stop]


def test_without_a_coordinator_it_ends_at_the_drain_timeout() -> None:
    core = make_active()
    answer(core, 1)
    running = start(core, 2)
    break_link(core)
    core.handle(ev.StopRequested("SIGTERM"), 0.0)
    out = core.handle(ev.DrainTimedOut(), 30.0)
    assert out == [
        ev.Log("warning", "drain_timed_out", {"running": 1, "queued": 0, "replies": 1}),
        ev.CancelHandler(running),
        ev.Stop(ev.EndingKind.STOPPED, "SIGTERM"),
    ]


@pytest.mark.parametrize(
    "event",
    [
        ev.ConnectGivenUp("too long"),
        ev.RefusalReceived("unauthenticated", "wrong token", retry=False),
        ev.WelcomeReceived("s-2", secret="other"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_stopping_while_away_ends_when_the_session_cannot_go_on(event: ev.Event) -> None:
    core = make_active()
    answer(core, 1)
    break_link(core)
    core.handle(ev.StopRequested("SIGTERM"), 0.0)
    if not isinstance(event, ev.ConnectGivenUp):
        core.handle(ev.LinkUp(), 0.0)
    assert only(core.handle(event, 0.0), ev.Stop).kind is ev.EndingKind.STOPPED


# --- drained by an operator ----------------------------------------------------------------------


def test_a_drain_for_good_finishes_says_goodbye_and_ends() -> None:
    core = make_active()
    work = start(core, 1)
    assert kinds(core.handle(ev.DrainReceived("scaling down", stop=True), 0.0)) == [ev.Log]
    assert core.state is State.DRAINING
    assert core.handle(ev.DrainReceived("scaling down", stop=True), 0.0) == [], "once is enough"
    out = core.handle(ev.HandlerReturned(work, b"a"), 0.0)
    assert out[1:] == [ev.Leave("scaling down"), ev.Stop(ev.EndingKind.STOPPED, "scaling down")]


def test_a_drain_for_good_without_a_reason_says_who() -> None:
    core = make_active()
    assert "operator" in only(core.handle(ev.DrainReceived(stop=True), 0.0), ev.Stop).reason


def test_a_drain_for_good_overrules_one_for_now() -> None:
    core = make_active()
    work = start(core, 1)
    core.handle(ev.DrainReceived("upgrade"), 0.0)
    core.handle(ev.DrainReceived("scaling down", stop=True), 0.0)
    assert kinds(core.handle(ev.HandlerReturned(work, b"a"), 0.0)) == [ev.SendReply, ev.Leave, ev.Stop]


def test_a_drain_for_good_that_loses_its_link_is_remembered() -> None:
    core = make_active()
    work = start(core, 1)
    core.handle(ev.DrainReceived("scaling down", stop=True), 0.0)
    break_link(core)
    core.handle(ev.HandlerReturned(work, b"a"), 0.0)
    assert kinds(come_back(core, received=0)) == [ev.SendReply, ev.SendDrain, ev.Leave, ev.Stop]


def test_a_coordinator_that_drains_and_breaks_off_is_come_back_to() -> None:
    core = make_active()
    work = start(core, 1)
    core.handle(ev.DrainReceived("upgrade"), 0.0)
    assert break_link(core) == [ev.Reconnect("broken")]
    assert core.state is State.CONNECTING
    core.handle(ev.HandlerReturned(work, b"a"), 0.0)
    assert replies(come_back(core, received=0)) == [(1, 1)]
    assert core.state is State.ACTIVE


def test_all_that_is_kept_may_be_sent_again_at_once() -> None:
    """Beyond the ceiling of what waits to be sent, a session takes its coordinator for one that does not read."""
    limits = BacklogLimits()
    assert limits.replies_bytes_max + limits.replies_max * 1024 < UNSENT_BYTES_MAX

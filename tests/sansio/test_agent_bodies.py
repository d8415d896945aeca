"""The agent's core and large bodies: work that waits for its body, answers that go on streams of their own."""

from quorate_agent import events as ev
from quorate_agent.backlog import BacklogLimits, RememberedBodies
from quorate_agent.core import AgentCore
from quorate_agent.states import State
from quorate_protocol.fields import BodyRef

QUESTION = BodyRef(size=1 << 30, digest=b"q" * 32)
ANSWER = BodyRef(size=1 << 29, digest=b"a" * 32)
TRUTH = BodyRef(size=1 << 28, digest=b"t" * 32)


class OnDisk:
    """What a reference stands for."""

    is_on_disk = True

    def view(self) -> memoryview:
        raise AssertionError("a core looks into no body")


def make_active() -> AgentCore:
    core = AgentCore(tasks=["t"], feedback_tasks=["t"])
    core.handle(ev.LinkUp(), 0.0)
    core.handle(ev.WelcomeReceived("s-1", secret="key"), 0.0)
    return core


def announced(round_id: int = 1, attempt: int = 1, task: str = "t") -> ev.AssignmentAnnounced:
    return ev.AssignmentAnnounced(round_id, task, QUESTION, 10.0, attempt)


def come_back(core: AgentCore, received: int) -> list[ev.Instruction]:
    core.handle(ev.LinkDown("broken"), 2.0)
    (hello,) = core.handle(ev.LinkUp(), 3.0)
    assert isinstance(hello, ev.SendHello)
    opening, *rest = core.handle(ev.WelcomeReceived("s-1", resumed=True, received=received, secret="key"), 3.0)
    assert opening == ev.OpenCoordination("s-1")
    return rest


def answer(core: AgentCore, round_id: int = 1) -> ev.SendReply:
    """Has a round asked and answered, both large."""
    core.handle(announced(round_id), 0.0)
    (start,) = core.handle(ev.BodyReceived("assignment", round_id, QUESTION), 0.0)
    assert isinstance(start, ev.StartAssignment)
    (reply,) = core.handle(ev.HandlerReturned(start.work, ANSWER), 1.0)
    assert isinstance(reply, ev.SendReply)
    assert reply.body is ANSWER
    return reply


def test_work_starts_when_its_body_is_there_and_nothing_waits_for_it() -> None:
    core = make_active()
    assert core.handle(announced(1), 0.0) == [ev.ReceiveBody("assignment", 1, QUESTION, 10.0)]
    (small,) = core.handle(ev.AssignmentReceived(2, "t", b"x", 10.0), 1.0)
    assert isinstance(small, ev.StartAssignment)
    assert core.handle(ev.BodyReceived("assignment", 1, QUESTION), 4.0) == []
    _, large = core.handle(ev.HandlerReturned(small.work, b"y"), 5.0)
    assert isinstance(large, ev.StartAssignment)
    assert (large.round, large.body, large.deadline) == (1, QUESTION, 10.0)


def test_what_is_not_wanted_is_refused() -> None:
    core = make_active()
    declined, refused = core.handle(announced(1, task="other"), 0.0)
    assert isinstance(declined, ev.SendReply)
    assert (declined.status, refused) == ("declined", ev.RefuseBody("assignment", 1, QUESTION))
    answer(core, 2)
    assert core.handle(announced(2), 1.0) == [ev.RefuseBody("assignment", 2, QUESTION)]
    assert core.handle(ev.FeedbackAnnounced(2, "other", TRUTH), 1.0) == [ev.RefuseBody("feedback", 2, TRUTH)]


def test_a_body_that_does_not_come_fails_the_reply() -> None:
    core = make_active()
    core.handle(announced(), 0.0)
    (reply,) = core.handle(ev.BodyFailed("assignment", 1, "no room"), 1.0)
    assert reply == ev.SendReply(1, 1, "failed", error="no room")
    assert core.handle(ev.BodyReceived("assignment", 1, QUESTION), 1.0) == []


def test_a_cancelled_round_stops_its_bodies() -> None:
    core = make_active()
    core.handle(announced(1), 0.0)
    assert core.handle(ev.CancellationReceived(1), 1.0) == [ev.StopBodies(1)]
    assert core.handle(ev.BodyReceived("assignment", 1, QUESTION), 1.0) == []
    answer(core, 2)
    assert core.handle(ev.CancellationReceived(2), 1.0) == [ev.StopBodies(2)]
    assert core.handle(ev.CancellationReceived(2), 1.0) == []


def test_a_truth_is_learned_when_it_is_there() -> None:
    core = make_active()
    answer(core)
    assert core.handle(ev.FeedbackAnnounced(1, "t", TRUTH), 1.0) == [ev.ReceiveBody("feedback", 1, TRUTH, None)]
    (start,) = core.handle(ev.BodyReceived("feedback", 1, TRUTH), 2.0)
    assert isinstance(start, ev.StartFeedback)
    assert (start.body, start.truth) == (QUESTION, TRUTH)


def test_over_the_next_link_a_truth_is_awaited_again_and_an_assignment_announced_again() -> None:
    core = make_active()
    answer(core, 1)
    core.handle(ev.ReplyBodyDelivered(1, 1), 1.0)
    core.handle(ev.FeedbackAnnounced(1, "t", TRUTH), 1.0)
    core.handle(announced(2), 1.0)
    assert come_back(core, received=1) == [ev.ReceiveBody("feedback", 1, TRUTH, None)]
    assert core.handle(ev.BodyReceived("assignment", 2, QUESTION), 3.0) == []
    assert core.handle(announced(2), 3.0) == [ev.ReceiveBody("assignment", 2, QUESTION, 10.0)]


def test_a_reply_is_sent_again_until_its_body_is_delivered() -> None:
    core = make_active()
    reply = answer(core)
    core.handle(ev.RepliesDelivered(), 1.5)
    assert come_back(core, received=1) == [reply], "the frame had come, and not the body"
    assert come_back(core, received=1) == [reply], "nor had the second"
    core.handle(ev.ReplyBodyDelivered(1, 1), 4.0)
    assert come_back(core, received=3) == []


def test_replies_go_in_their_order_and_are_numbered_anew() -> None:
    core = make_active()
    large = answer(core, 1)
    (start,) = core.handle(ev.AssignmentReceived(2, "t", b"x", 10.0), 1.0)
    assert isinstance(start, ev.StartAssignment)
    (small,) = core.handle(ev.HandlerReturned(start.work, b"y"), 1.0)
    assert come_back(core, received=1) == [large, small]
    # Now three frames have been sent of which the coordinator has all: 1 before, and these two.
    core.handle(ev.ReplyBodyDelivered(1, 1), 4.0)
    assert come_back(core, received=3) == []


def test_another_session_wants_none_of_them() -> None:
    core = make_active()
    answer(core)
    core.handle(ev.FeedbackAnnounced(1, "t", TRUTH), 1.0)
    core.handle(ev.LinkDown("broken"), 2.0)
    core.handle(ev.LinkUp(), 3.0)
    assert core.handle(ev.WelcomeReceived("s-2", secret="key"), 3.0) == [ev.OpenCoordination("s-2")]


def test_an_agent_leaves_when_its_bodies_have_been_delivered() -> None:
    core = make_active()
    core.handle(announced(1), 0.0)
    core.handle(ev.StopRequested("enough"), 0.0)
    (start,) = core.handle(ev.BodyReceived("assignment", 1, QUESTION), 1.0)
    assert isinstance(start, ev.StartAssignment)
    core.handle(ev.HandlerReturned(start.work, ANSWER), 2.0)
    assert core.state is State.DRAINING
    leave, *_ = core.handle(ev.ReplyBodyDelivered(1, 1), 3.0)
    assert leave == ev.Leave("enough")


def test_remembered_bodies_are_bounded_in_memory_and_on_disk() -> None:
    remembered = RememberedBodies(BacklogLimits(remembered_bytes_max=10, remembered_disk_bytes_max=2 << 30))
    on_disk = QUESTION.with_content(OnDisk())
    assert [remembered.put(round_id, "t", on_disk) for round_id in (1, 2, 3)] == [0, 0, 1]
    assert remembered.put(4, "t", bytes(10)) == 0
    assert remembered.put(5, "t", b"x") == 3, "the oldest go first, whatever they are"
    assert remembered.take(5, "t") == b"x"

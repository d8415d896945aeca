"""All rounds: numbering, rejections, strays, agents that return, timers, truths, draining, and what an event costs."""

import gc
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import pytest

from quorate_coordinator.rounds.book import BookLimits, RoundBook
from quorate_coordinator.rounds.events import (
    AgentLost,
    AgentReachable,
    CoordinatorStopped,
    DrainRequested,
    Event,
    ReplyReceived,
    RoundCancelled,
    TimerFired,
    TruthRevealed,
)
from quorate_coordinator.rounds.instructions import (
    AnnounceDrained,
    CloseRound,
    Instruction,
    LearnTruth,
    NoteForgotten,
    NoteStray,
    OfferLateReply,
    OpenRound,
    RejectRequest,
    SendAssignment,
    SendCancellation,
    SendFeedback,
)
from sansio.round_making import make_policy, make_reply, make_request, only, outcome_in, statuses


def open_many(book: RoundBook, count: int, agents: Sequence[str] = ("a", "b", "c"), now: float = 0.0) -> None:
    """Opens this many rounds of the same agents; all of them must be let in."""
    for _ in range(count):
        only(SendAssignment, book.handle(make_request(agents), now))


def rejection(instructions: list[Instruction]) -> tuple[str, bool]:
    """Reason and retry of a rejection that is alone."""
    assert len(instructions) == 1
    rejected = only(RejectRequest, instructions)
    assert rejected.request_id == 7
    assert rejected.message
    return rejected.reason, rejected.retry


# --- opening ---


def test_rounds_are_numbered_from_one_without_gaps_for_rejected_requests() -> None:
    book = RoundBook()
    assert only(SendAssignment, book.handle(make_request(), 0.0)).round == 1
    assert rejection(book.handle(make_request(policy=make_policy(9)), 0.0)) == ("bad-request", True)
    assert only(SendAssignment, book.handle(make_request(), 0.0)).round == 2
    assert only(OpenRound, book.handle(make_request((), make_policy(1), away=("z",)), 0.0)).round == 3
    assert only(SendAssignment, book.handle(make_request(), 0.0)).round == 4


def test_one_assignment_for_all_agents() -> None:
    agents = tuple(f"agent-{n:04}" for n in range(1000))
    assignment = only(SendAssignment, RoundBook().handle(make_request(agents), 0.0))
    assert assignment.agents == agents


def test_nobody_to_ask_is_rejected() -> None:
    assert rejection(RoundBook().handle(make_request(()), 0.0)) == ("no-agents", True)


@pytest.mark.parametrize(("selected", "away"), [(("a", "b", "a"), ()), (("a", "b"), ("b",)), (("a",), ("z", "z"))])
def test_an_agent_named_twice_is_rejected(selected: tuple[str, ...], away: tuple[str, ...]) -> None:
    book = RoundBook()
    assert rejection(book.handle(make_request(selected, away=away), 0.0)) == ("bad-request", False)
    assert (book.in_flight, book.held_bytes, book.in_flight_of("a")) == (0, 0, 0)


def test_a_policy_that_contradicts_itself_is_rejected_with_its_words() -> None:
    rejected = only(
        RejectRequest, RoundBook().handle(make_request(policy=make_policy(grace_s=3.0, deadline_s=2.0)), 0.0)
    )
    assert (rejected.reason, rejected.retry) == ("bad-request", False)
    assert "grace_s: 3 s is past the deadline of 2 s" in rejected.message


def test_only_agents_that_are_away_are_waited_for_until_the_deadline() -> None:
    book = RoundBook()
    opened = only(OpenRound, book.handle(make_request((), make_policy(0.5), away=("z", "y")), 0.0))
    assert opened.selected == ("y", "z")
    assert (book.in_flight, book.next_timer(), book.in_flight_of("y")) == (1, 10.0, 1)
    instructions = book.handle(TimerFired(), 10.0)
    assert statuses(outcome_in(instructions)) == {"y": "unavailable", "z": "unavailable"}
    assert len(instructions) == 1, "nobody is at work to be told to stop"
    assert (book.in_flight, book.next_timer(), book.closed_counts["expired"]) == (0, None, 1)


# --- agents that return ---


def test_an_agent_that_is_reachable_is_given_what_it_owes_in_the_order_of_its_rounds() -> None:
    book = RoundBook()
    for selected, away in ((("a",), ("b",)), (("a", "b"), ()), (("a",), ()), ((), ("b",))):
        book.handle(make_request(selected, make_policy(1, grace_s=None), away=away), 0.0)
    book.handle(make_reply("b", 2), 1.0)
    sent = book.handle(AgentReachable("b"), 2.0)
    assert sent == [SendAssignment(n, ("b",), "classify", b"question", 1, 8.0) for n in (1, 4)]
    assert book.handle(AgentReachable("b"), 3.0) == [
        SendAssignment(n, ("b",), "classify", b"question", 1, 7.0) for n in (1, 4)
    ]
    assert book.handle(AgentReachable("stranger"), 3.0) == []


@pytest.mark.parametrize("end", [RoundCancelled(1, "no need"), TimerFired(), CoordinatorStopped("going down")])
@pytest.mark.parametrize("lost", [False, True])
def test_a_round_that_ends_without_an_agent_that_was_awaited_owes_it_nothing(end: Event, lost: bool) -> None:
    """Also where the agent was never asked, and so is none of those that were."""
    book = RoundBook()
    selected, away = (("a", "z"), ()) if lost else (("a",), ("z",))
    book.handle(make_request(selected, make_policy(1.0, attempts=2), away=away), 0.0)
    if lost:
        assert book.handle(AgentLost("z", "gone"), 1.0) == []
    assert book.in_flight_of("z") == 1
    outcome = outcome_in(book.handle(end, 10.0 if isinstance(end, TimerFired) else 2.0))
    assert statuses(outcome)["z"] == ("lost" if lost else "unavailable")
    assert (book.in_flight_of("z"), book.in_flight_of("a")) == (0, 0)
    assert book.handle(AgentReachable("z"), 11.0) == []
    assert book.handle(AgentLost("z"), 11.0) == []


def test_a_lost_agent_with_attempts_left_is_kept_and_asked_again() -> None:
    book = RoundBook()
    book.handle(make_request(("a", "b"), make_policy(1.0, attempts=2)), 0.0)
    assert book.handle(AgentLost("a", "gone"), 1.0) == []
    assert book.in_flight_of("a") == 1
    assert only(SendAssignment, book.handle(AgentReachable("a"), 2.0)).attempt == 2
    assert book.handle(make_reply("a"), 3.0) == [NoteStray("wrong-attempt", 1, "a")]
    assert book.stray_counts == {"wrong-attempt": 1}
    book.handle(make_reply("b"), 3.0)
    assert outcome_in(book.handle(make_reply("a", attempt=2), 4.0)).state == "complete"
    assert book.in_flight_of("a") == 0


def test_an_attempt_that_failed_is_no_stray_and_the_part_goes_on() -> None:
    book = RoundBook(BookLimits(in_flight_per_agent_max=1))
    book.handle(make_request(("a",), make_policy(1, attempts=2)), 0.0)
    again = book.handle(make_reply("a", status="failed"), 1.0)
    assert again == [SendAssignment(1, ("a",), "classify", b"question", 2, 9.0)]
    assert (book.in_flight_of("a"), book.held_bytes, book.next_timer()) == (1, len(b"question"), 10.0)
    assert not book.stray_counts


# --- replies ---


def test_replies_go_to_their_round() -> None:
    book = RoundBook()
    open_many(book, 2)
    for round_id, agent in ((1, "a"), (2, "b"), (1, "c"), (2, "a"), (1, "b")):
        last = book.handle(make_reply(agent, round_id, body=f"{agent}{round_id}".encode()), 1.0)
    outcome = outcome_in(last)
    assert (outcome.round, outcome.state) == (1, "complete")
    assert [result.body for result in outcome.results] == [b"a1", b"b1", b"c1"]
    assert (book.in_flight, book.in_flight_of("a"), book.in_flight_of("c")) == (1, 0, 1)


def test_strays_are_counted_and_change_nothing() -> None:
    book = RoundBook()
    open_many(book, 1)
    book.handle(make_reply("a"), 1.0)
    strays: list[tuple[str, ReplyReceived]] = [
        ("unknown", make_reply("a", 2)),
        ("unknown", make_reply("a", 0)),
        ("not-asked", make_reply("x")),
        ("wrong-attempt", make_reply("b", attempt=2)),
        ("duplicate", make_reply("a", status="failed")),
    ]
    for kind, event in strays:
        assert book.handle(event, 1.0) == [NoteStray(kind, event.round, event.agent)]  # type: ignore[arg-type]
    assert book.stray_counts == {"unknown": 2, "not-asked": 1, "wrong-attempt": 1, "duplicate": 1}
    outcome = outcome_in(book.handle(TimerFired(), 10.0))
    assert statuses(outcome) == {"a": "replied", "b": "late", "c": "late"}


def test_late_replies_are_told_from_duplicates_as_long_as_the_round_is_known() -> None:
    book = RoundBook(BookLimits(remembered_max=1, traces_max=1))
    open_many(book, 3)
    book.handle(make_reply("a", 1), 1.0)
    book.handle(TimerFired(), 10.0)
    # Round 3 awaits its truth, 2 is known by its agents, 1 is not known any more.
    assert [one.round for one in (book.handle(make_reply("a", n), 11.0)[0] for n in (1, 2, 3))] == [1, 2, 3]  # type: ignore[union-attr]
    assert book.stray_counts == {"unknown": 1, "late": 2}
    assert isinstance(book.handle(make_reply("b", 2), 11.0)[1], OfferLateReply)
    assert book.handle(make_reply("b", 2), 11.0) == [NoteStray("duplicate", 2, "b")]
    assert book.handle(make_reply("x", 2), 11.0) == [NoteStray("not-asked", 2, "x")]


# --- losing, cancelling, stopping ---


def test_a_lost_agent_ends_its_part_in_its_own_rounds_in_their_order() -> None:
    book = RoundBook()
    for agents in (("a", "b"), ("b", "c"), ("a", "c"), ("b", "d")):
        only(SendAssignment, book.handle(make_request(agents), 0.0))
    instructions = book.handle(AgentLost("b", "gone"), 1.0)
    closed = [one.outcome for one in instructions if isinstance(one, CloseRound)]
    assert [(outcome.round, outcome.state) for outcome in closed] == [(1, "failed"), (2, "failed"), (4, "failed")]
    assert all(result.error == "gone" for outcome in closed for result in outcome.results if result.agent == "b")
    assert (book.in_flight, book.in_flight_of("b"), book.in_flight_of("a")) == (1, 0, 1)
    assert book.handle(AgentLost("b"), 1.0) == []
    assert book.handle(AgentLost("stranger"), 1.0) == []


def test_a_lost_agent_may_come_back_and_be_asked() -> None:
    book = RoundBook(BookLimits(in_flight_per_agent_max=1))
    book.handle(make_request(("a", "b"), make_policy(1, grace_s=None)), 0.0)
    book.handle(AgentLost("a"), 1.0)
    only(SendAssignment, book.handle(make_request(("a",), make_policy(1)), 2.0))
    assert outcome_in(book.handle(make_reply("a", 2), 3.0)).state == "complete"
    assert statuses(outcome_in(book.handle(make_reply("b", 1), 3.0))) == {"a": "lost", "b": "replied"}


def test_cancelling_reaches_one_round_alone() -> None:
    book = RoundBook()
    open_many(book, 2)
    instructions = book.handle(RoundCancelled(1, "no need"), 1.0)
    assert instructions[0] == SendCancellation(1, ("a", "b", "c"), "no need")
    assert (outcome_in(instructions).state, outcome_in(instructions).reason) == ("cancelled", "no need")
    assert book.in_flight == 1
    assert book.handle(RoundCancelled(1, "again"), 1.0) == []
    assert book.handle(RoundCancelled(99, "which?"), 1.0) == []


def test_stopping_interrupts_what_is_in_flight_and_opens_nothing_new() -> None:
    book = RoundBook()
    open_many(book, 2)
    instructions = book.handle(CoordinatorStopped("host goes down"), 1.0)
    closed = [one.outcome for one in instructions if isinstance(one, CloseRound)]
    assert [(outcome.round, outcome.state, outcome.reason) for outcome in closed] == [
        (1, "interrupted", "host goes down"),
        (2, "interrupted", "host goes down"),
    ]
    assert instructions[-1] == AnnounceDrained()
    assert rejection(book.handle(make_request(), 2.0)) == ("draining", True)
    assert book.next_timer() is None


def test_draining_lets_rounds_finish_and_says_once_when_the_last_has() -> None:
    book = RoundBook()
    open_many(book, 1)
    assert book.handle(DrainRequested(), 1.0) == []
    assert book.is_draining
    assert rejection(book.handle(make_request(), 1.0)) == ("draining", True)
    book.handle(make_reply("a"), 1.0)
    book.handle(make_reply("b"), 1.0)
    instructions = book.handle(make_reply("c"), 1.5)
    assert outcome_in(instructions).state == "complete"
    assert instructions[-1] == AnnounceDrained()
    assert book.handle(DrainRequested(), 3.0) == []
    # The truth may still be told.
    only(LearnTruth, book.handle(TruthRevealed(8, 1, b"truth"), 3.0))


def test_draining_an_idle_book_is_done_at_once() -> None:
    assert RoundBook().handle(DrainRequested(), 0.0) == [AnnounceDrained()]


# --- time ---


def test_next_timer_is_the_earliest_end_and_moves_with_the_rounds() -> None:
    book = RoundBook()
    assert book.next_timer() is None
    book.handle(make_request(policy=make_policy(2, deadline_s=10.0)), 0.0)
    book.handle(make_request(policy=make_policy(2, deadline_s=5.0)), 1.0)
    assert book.next_timer() == 6.0
    book.handle(make_reply("a", 1), 2.0)
    book.handle(make_reply("b", 1), 2.0)
    assert book.next_timer() == 3.0, "grace of the first round"
    assert outcome_in(book.handle(TimerFired(), 3.0)).round == 1
    assert book.next_timer() == 6.0
    assert book.handle(TimerFired(), 5.9) == []
    assert outcome_in(book.handle(TimerFired(), 6.0)).round == 2
    assert book.next_timer() is None


def test_any_event_finds_the_rounds_closed_whose_time_is_over() -> None:
    book = RoundBook()
    for deadline_s in (5.0, 4.0, 20.0):
        book.handle(make_request(policy=make_policy(deadline_s=deadline_s)), 0.0)
    instructions = book.handle(make_reply("a", 1), 6.0)
    closed = [one.outcome.round for one in instructions if isinstance(one, CloseRound)]
    assert closed == [2, 1], "in the order of their ends"
    assert [one.kind for one in instructions if isinstance(one, NoteStray)] == ["late"]
    assert book.next_timer() == 20.0


def test_time_does_not_run_backwards() -> None:
    book = RoundBook()
    book.handle(make_request(("a",), make_policy(1)), 5.0)
    assert outcome_in(book.handle(make_reply("a"), 4.0)).duration_s == 0.0


# --- truths ---


def close_rounds(book: RoundBook, count: int, *, body: bytes = b"answer", now: float = 0.0) -> list[Instruction]:
    """Opens and completes rounds of one agent, one after the other; what their closing said."""
    said: list[Instruction] = []
    for _ in range(count):
        assignment = only(SendAssignment, book.handle(make_request(("a",), make_policy(1)), now))
        said += book.handle(make_reply("a", assignment.round, body=body), now)
    return said


def test_the_truth_goes_to_agents_and_learner_with_the_outcome_that_was_announced() -> None:
    book = RoundBook()
    outcome = outcome_in(close_rounds(book, 1))
    assert book.handle(TruthRevealed(8, 1, b"truth"), 1.0) == [
        SendFeedback(1, ("a",), "classify", b"truth"),
        LearnTruth(8, outcome, b"truth"),
    ]
    assert (book.remembered, book.remembered_bytes, book.traces) == (0, 0, 1)


def test_each_truth_that_cannot_be_told_has_an_answer_of_its_own() -> None:
    book = RoundBook(BookLimits(remembered_max=2, traces_max=2))
    close_rounds(book, 6)
    open_many(book, 1)
    book.handle(TruthRevealed(7, 6, b"truth"), 1.0)
    answers = {}
    for round_id in (0, 1, 4, 5, 6, 7, 8):
        instructions = book.handle(TruthRevealed(7, round_id, b"truth"), 2.0)
        answers[round_id] = None if len(instructions) > 1 else only(RejectRequest, instructions)
    assert answers.pop(5) is None, "the one that is still awaited"
    assert {n: (one.reason, one.retry) for n, one in answers.items() if one is not None} == {
        0: ("unknown-round", False),
        1: ("unknown-round", False),
        4: ("unknown-round", False),
        6: ("already-revealed", False),
        7: ("still-open", True),
        8: ("unknown-round", False),
    }
    words = {n: one.message for n, one in answers.items() if one is not None}
    assert words[0] == "there is no round 0"
    assert words[8] == "there is no round 8"
    assert "not remembered any more" in words[1]
    assert "not remembered any more" in words[4]


def test_rounds_that_await_their_truth_are_bounded_by_count() -> None:
    book = RoundBook(BookLimits(remembered_max=3))
    said = close_rounds(book, 5)
    assert [one.round for one in said if isinstance(one, NoteForgotten)] == [1, 2]
    assert (book.remembered, book.forgotten_count) == (3, 2)
    # One that was told makes room: nothing is forgotten for the next.
    book.handle(TruthRevealed(8, 4, b"truth"), 1.0)
    assert not [one for one in close_rounds(book, 1) if isinstance(one, NoteForgotten)]


def test_rounds_that_await_their_truth_are_bounded_by_bytes() -> None:
    book = RoundBook(BookLimits(remembered_bytes_max=100_000))
    said = close_rounds(book, 5, body=b"x" * 30_000)
    assert [one.round for one in said if isinstance(one, NoteForgotten)] == [1, 2]
    assert 90_000 < book.remembered_bytes <= 100_000
    # One over the bound by itself is announced, and forgotten at once with all before it.
    said = close_rounds(book, 1, body=b"x" * 200_000)
    assert outcome_in(said).results[0].body == b"x" * 200_000
    assert [one.round for one in said if isinstance(one, NoteForgotten)] == [3, 4, 5, 6]
    assert (book.remembered, book.remembered_bytes) == (0, 0)


def test_what_is_known_of_told_rounds_is_bounded() -> None:
    book = RoundBook(BookLimits(traces_max=3))
    close_rounds(book, 10)
    for round_id in range(1, 11):
        book.handle(TruthRevealed(8, round_id, b"truth"), 1.0)
    assert (book.traces, book.forgotten_count) == (3, 0)
    book = RoundBook(BookLimits(traces_bytes_max=4000))
    close_rounds(book, 10)
    for round_id in range(1, 11):
        book.handle(TruthRevealed(8, round_id, b"truth"), 1.0)
    assert 0 < book.traces < 10


def test_feedback_follows_the_truths_and_comes_before_assignments_asked_for_later() -> None:
    book = RoundBook()
    close_rounds(book, 3)
    said: list[Instruction] = []
    for round_id in (1, 3, 2):
        said += book.handle(TruthRevealed(8, round_id, b"truth"), 1.0)
    said += book.handle(make_request(("a",), make_policy(1)), 1.0)
    sent = [one for one in said if isinstance(one, SendFeedback | SendAssignment)]
    assert [(type(one), one.round) for one in sent] == [
        (SendFeedback, 1),
        (SendFeedback, 3),
        (SendFeedback, 2),
        (SendAssignment, 4),
    ]


# --- cost ---


def count_steps(do: Callable[[], object]) -> int:
    """Lines of the coordinator run by `do`: the same work is the same number, on any machine."""
    steps = 0

    def trace(frame: FrameType, _event: str, _argument: Any) -> Any:
        nonlocal steps
        if not frame.f_globals.get("__name__", "").startswith("quorate_coordinator"):
            return None  # what else the interpreter has to do just then, such as finalizers of earlier tests
        steps += 1
        return trace

    before = sys.gettrace()
    gc.disable()  # its callbacks, where a plugin has hung some in, would be counted
    sys.settrace(trace)
    try:
        do()
    finally:
        sys.settrace(before)
        gc.enable()
    return steps


COSTS: list[tuple[str, Event]] = [
    ("reply", make_reply("a", 1)),
    ("stray", make_reply("x", 1)),
    ("lost", AgentLost("a")),
    ("lost stranger", AgentLost("stranger")),
    ("reachable", AgentReachable("a")),
    ("failed", make_reply("a", 1, status="failed")),
    ("timer, nothing due", TimerFired()),
    ("cancelled", RoundCancelled(1, "no need")),
    ("request", make_request(("a", "b"))),
    ("truth", TruthRevealed(7, 1, b"truth")),
]


@pytest.mark.parametrize("event", [event for _, event in COSTS], ids=[name for name, _ in COSTS])
def test_what_an_event_costs_does_not_grow_with_the_rounds_in_flight(event: Event) -> None:
    def steps_with(others: int) -> int:
        book = RoundBook(BookLimits(in_flight_max=10_000))
        book.handle(make_request(("a", "b")), 0.0)
        for number in range(others):
            book.handle(make_request((f"agent-{number}", f"other-{number}")), 1.0)
        return count_steps(lambda: (book.handle(event, 2.0), book.next_timer()))

    few, many = steps_with(10), steps_with(2000)
    assert few > 5, "something was counted"
    assert many == few


def test_a_due_round_costs_the_same_among_many() -> None:
    def steps_with(others: int) -> int:
        book = RoundBook(BookLimits(in_flight_max=10_000))
        book.handle(make_request(("a", "b"), make_policy(deadline_s=5.0)), 0.0)
        for number in range(others):
            book.handle(make_request((f"agent-{number}", f"other-{number}")), 1.0)
        return count_steps(lambda: (book.handle(TimerFired(), 5.0), book.next_timer()))

    assert steps_with(2000) == steps_with(10)

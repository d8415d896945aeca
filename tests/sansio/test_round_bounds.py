"""What rounds may hold: in flight in all, for an agent, for an operator, and in bytes; and that it is given back."""

from collections.abc import Sequence

import pytest

from quorate_coordinator.rounds.book import BookLimits, RoundBook
from quorate_coordinator.rounds.events import (
    AgentLost,
    AgentReachable,
    CoordinatorStopped,
    DrainRequested,
    Event,
    RoundCancelled,
    TimerFired,
    TruthRevealed,
)
from quorate_coordinator.rounds.instructions import Instruction, NoteStray, OpenRound, RejectRequest, SendAssignment
from sansio.round_making import make_policy, make_reply, make_request, only, outcome_in, statuses


def open_many(book: RoundBook, count: int, agents: Sequence[str] = ("a", "b", "c"), now: float = 0.0) -> None:
    """Opens this many rounds of the same agents; all of them must be let in."""
    for _ in range(count):
        only(OpenRound, book.handle(make_request(agents), now))


def busy(instructions: list[Instruction]) -> str:
    """What is said of being busy; asserts that nothing else is."""
    assert len(instructions) == 1
    rejected = only(RejectRequest, instructions)
    assert (rejected.request_id, rejected.reason, rejected.retry) == (7, "busy", True)
    return rejected.message


#: Each way in which a round of a, b and c (quorum 2 of 3, grace 1 s, deadline 10 s, opened at 0) can end.
ENDS: dict[str, list[tuple[Event, float]]] = {
    "complete": [(make_reply(agent), 1.0) for agent in "abc"],
    "all-ended": [(make_reply("a"), 1.0), (make_reply("b", status="declined"), 1.0), (make_reply("c"), 1.0)],
    "grace-elapsed": [(make_reply("a"), 1.0), (make_reply("b"), 1.0), (TimerFired(), 2.0)],
    "expired": [(make_reply("a"), 1.0), (TimerFired(), 10.0)],
    "unreachable": [(make_reply("a", status="declined"), 1.0), (AgentLost("b"), 1.0)],
    "cancelled": [(make_reply("a"), 1.0), (RoundCancelled(1, "no need"), 1.0)],
    "interrupted": [(make_reply("a"), 1.0), (CoordinatorStopped("going down"), 1.0)],
    "found over by another event": [(make_reply("a"), 1.0), (AgentReachable("x"), 50.0)],
}

each_end = pytest.mark.parametrize("end", list(ENDS.values()), ids=list(ENDS))


# --- in flight ---


def test_over_the_bound_in_all_is_busy_until_a_round_ends() -> None:
    book = RoundBook(BookLimits(in_flight_max=3))
    open_many(book, 3)
    assert busy(book.handle(make_request(("x",), make_policy(1)), 0.0)) == (
        "3 rounds are in flight, as many as there may be"
    )
    book.handle(RoundCancelled(2, "enough"), 1.0)
    only(OpenRound, book.handle(make_request(("x",), make_policy(1)), 1.0))


def test_over_the_bound_of_one_agent_is_busy_until_its_part_ends() -> None:
    book = RoundBook(BookLimits(in_flight_per_agent_max=2))
    open_many(book, 2)
    assert "agent c" in busy(book.handle(make_request(("c", "d")), 0.0))
    only(OpenRound, book.handle(make_request(("d", "e")), 0.0))
    # Its part in the first round ends, though the round goes on.
    assert book.handle(make_reply("c", 1), 1.0) == []
    assert (book.in_flight_of("c"), book.in_flight_of("a")) == (1, 2)
    only(OpenRound, book.handle(make_request(("c", "d")), 1.0))


def test_an_agent_that_is_away_counts_towards_its_bound() -> None:
    book = RoundBook(BookLimits(in_flight_per_agent_max=1))
    only(OpenRound, book.handle(make_request(("a",), make_policy(1), away=("z",)), 0.0))
    assert "agent z" in busy(book.handle(make_request(("b",), make_policy(1), away=("z",)), 0.0))
    assert book.handle(AgentLost("z"), 1.0) == [], "its part ends, and the round waits for a"
    only(OpenRound, book.handle(make_request(("b",), make_policy(1), away=("z",)), 1.0))


def test_over_the_bound_of_one_operator_is_busy_for_that_one_alone() -> None:
    book = RoundBook(BookLimits(in_flight_per_operator_max=2))
    for _ in range(2):
        only(OpenRound, book.handle(make_request(operator="ann"), 0.0))
    assert "of this operator" in busy(book.handle(make_request(operator="ann"), 0.0))
    assert only(OpenRound, book.handle(make_request(operator="bob"), 0.0)).operator == "bob"
    # What nobody wants by name has no bound of this kind.
    for _ in range(3):
        assert only(OpenRound, book.handle(make_request(), 0.0)).operator == ""


@each_end
def test_an_operators_place_is_given_back_however_its_round_ends(end: list[tuple[Event, float]]) -> None:
    book = RoundBook(BookLimits(in_flight_per_operator_max=2))
    assert not book._in_flight_of_operator
    for _ in range(2):
        only(OpenRound, book.handle(make_request(operator="ann"), 0.0))
    ended_at = 0.0
    for event, ended_at in end:
        book.handle(event, ended_at)
    left = book.in_flight
    assert book._in_flight_of_operator == ({"ann": left} if left else {}), "no operator without a round is kept"
    if not book.is_draining:
        for _ in range(2 - left):
            only(OpenRound, book.handle(make_request(("x",), make_policy(1), operator="ann"), ended_at))
        busy(book.handle(make_request(("x",), make_policy(1), operator="ann"), ended_at))


def test_a_rejected_request_takes_no_place_of_its_operator() -> None:
    book = RoundBook(BookLimits(in_flight_per_operator_max=1, in_flight_max=1))
    book.handle(make_request(policy=make_policy(9), operator="ann"), 0.0)
    only(OpenRound, book.handle(make_request(operator="bob"), 0.0))
    busy(book.handle(make_request(operator="ann"), 0.0))
    book.handle(RoundCancelled(1, "no need"), 1.0)
    only(OpenRound, book.handle(make_request(operator="ann"), 1.0))


def test_what_is_in_the_way_of_a_request() -> None:
    """As few as it takes, the first of those that may go; none where it would be of no use."""
    book = RoundBook(BookLimits(in_flight_max=3, held_bytes_max=100, in_flight_per_operator_max=2))
    request = make_request(body=b"q" * 10, operator="ann")
    assert book.in_the_way(request, [], 0.0) == []
    for size, operator in ((10, "bob"), (50, "bob"), (20, "carl")):
        only(OpenRound, book.handle(make_request(body=b"q" * size, operator=operator), 0.0))
    assert book.in_the_way(request, iter([3, 1, 2]), 1.0) == [3]
    assert book.in_the_way(make_request(body=b"q" * 40), [1, 3, 2], 1.0) == [1, 3]
    assert book.in_the_way(make_request(body=b"q" * 90), [1, 3, 2], 1.0) == [1, 3, 2]
    assert book.in_the_way(make_request(body=b"q" * 90), [1, 3], 1.0) == [], "the other holds too much"
    assert book.in_the_way(make_request(body=b"q" * 101), [1, 3, 2], 1.0) == [], "it has no place ever"
    for useless in (
        make_request(policy=make_policy(9)),
        make_request((), make_policy(1)),
        make_request(("a", "a"), make_policy(1)),
        make_request(operator="bob"),
    ):
        busy_or_not = book.handle(useless, 1.0)
        assert only(RejectRequest, busy_or_not)
        assert book.in_the_way(useless, [1, 2, 3], 1.0) == []
    book.handle(RoundCancelled(1, "no need"), 2.0)
    assert book.in_the_way(request, [2, 3], 2.0) == []
    book.handle(DrainRequested(), 3.0)
    assert book.in_the_way(make_request(body=b"q" * 40), [2, 3], 3.0) == []


# --- bytes ---


def test_replies_beyond_the_bytes_that_may_be_held_fail_and_their_rounds_go_on() -> None:
    book = RoundBook(BookLimits(held_bytes_max=120))
    for _ in range(2):
        book.handle(make_request(body=b"q" * 10), 0.0)
    book.handle(make_reply("a", 1, body=b"x" * 60), 1.0)
    book.handle(make_reply("a", 2, body=b"x" * 60), 1.0)
    assert book.held_bytes == 80
    book.handle(make_reply("b", 2, body=b"x" * 40), 1.0)
    assert book.held_bytes == 120
    assert busy(book.handle(make_request(body=b"q"), 1.0)) == "rounds in flight hold 120 bytes, and may hold 120"
    outcome = outcome_in(book.handle(make_reply("b", 1, body=b"x"), 1.0) + book.handle(TimerFired(), 10.0)[:2])
    assert outcome.round == 1
    assert statuses(outcome) == {"a": "replied", "b": "failed", "c": "late"}
    assert "no room" in outcome.results[1].error
    assert (book.held_bytes, book.in_flight) == (0, 0)
    only(OpenRound, book.handle(make_request(), 11.0))


def test_replies_beyond_what_one_round_may_hold_fail_so_that_its_end_can_be_recorded() -> None:
    book = RoundBook(BookLimits(round_bytes_max=100))
    for _ in range(2):
        book.handle(make_request(body=b"q" * 10), 0.0)
    book.handle(make_reply("a", 1, body=b"x" * 60), 1.0)
    book.handle(make_reply("b", 1, body=b"x" * 31), 1.0)
    book.handle(make_reply("b", 2, body=b"x" * 90), 1.0)  # another round has its own
    outcome = outcome_in(book.handle(make_reply("c", 1, body=b"x" * 30), 1.0))
    assert statuses(outcome) == {"a": "replied", "b": "failed", "c": "replied"}
    assert "the round has no room" in outcome.results[1].error


def test_a_reply_without_room_is_asked_for_again_while_attempts_are_left() -> None:
    book = RoundBook(BookLimits(held_bytes_max=20))
    book.handle(make_request(("a",), make_policy(1, attempts=2), body=b"q" * 10), 0.0)
    assert only(SendAssignment, book.handle(make_reply("a", body=b"x" * 11), 1.0)).attempt == 2
    assert book.held_bytes == 10
    assert outcome_in(book.handle(make_reply("a", attempt=2, body=b"x" * 10), 2.0)).state == "complete"


def test_questions_count_as_long_as_their_rounds_are_in_flight() -> None:
    book = RoundBook(BookLimits(held_bytes_max=100))
    only(OpenRound, book.handle(make_request(body=b"q" * 60), 0.0))
    busy(book.handle(make_request(body=b"q" * 41), 0.0))
    assert book.held_bytes == 60, "what is rejected is not held"
    only(OpenRound, book.handle(make_request(body=b"q" * 40), 0.0))
    assert book.held_bytes == 100
    only(OpenRound, book.handle(make_request(body=b""), 0.0))
    book.handle(RoundCancelled(1, "no need"), 1.0)
    assert book.held_bytes == 40
    only(OpenRound, book.handle(make_request(body=b"q" * 60), 1.0))


@each_end
def test_bytes_are_given_back_exactly_however_a_round_ends(end: list[tuple[Event, float]]) -> None:
    book = RoundBook()
    book.handle(make_request(body=b"q" * 10, policy=make_policy(2)), 0.0)
    book.handle(make_request(("x", "y"), make_policy(1, grace_s=None, deadline_s=100.0), body=b"q" * 7), 0.0)
    book.handle(make_reply("x", 2, body=b"x" * 5), 0.5)
    assert book.held_bytes == 22
    for event, now in end:
        book.handle(event, now)
    assert book.held_bytes == (12 if book.in_flight else 0)
    assert book.in_flight == (0 if book.is_draining else 1)
    assert len(book._held_bytes_of) == book.in_flight


def test_an_attempt_that_failed_holds_no_bytes_and_the_last_one_does() -> None:
    book = RoundBook()
    book.handle(make_request(("a", "b"), make_policy(1.0, attempts=2), body=b"q" * 10), 0.0)
    book.handle(make_reply("a", status="failed"), 1.0)
    assert book.held_bytes == 10
    book.handle(make_reply("b", body=b"x" * 3), 1.0)
    assert book.held_bytes == 13
    book.handle(make_reply("a", attempt=2, status="failed"), 1.0)
    assert (book.held_bytes, book.in_flight) == (0, 0)


def test_a_stray_holds_no_bytes() -> None:
    book = RoundBook()
    book.handle(make_request(body=b"", away=("z",)), 0.0)
    for stray in (make_reply("x"), make_reply("z"), make_reply("a", attempt=2), make_reply("a", 99)):
        assert isinstance(book.handle(stray, 1.0)[0], NoteStray)
    assert book.held_bytes == 0
    assert (book.in_flight_of("a"), book.in_flight_of("z")) == (1, 1)


# --- rounds of an earlier run ---


def test_recalled_rounds_hold_nothing_that_rounds_in_flight_may_hold() -> None:
    earlier = RoundBook()
    earlier.handle(make_request(operator="ann"), 0.0)
    outcome = outcome_in(earlier.handle(RoundCancelled(1, "no need"), 1.0))
    limits = BookLimits(in_flight_max=1, in_flight_per_agent_max=1, in_flight_per_operator_max=1, held_bytes_max=8)
    book = RoundBook(limits, first_round=2)
    assert book.recall(outcome) == []
    assert (book.in_flight, book.in_flight_of("a"), book.held_bytes, book.next_timer()) == (0, 0, 0, None)
    assert only(OpenRound, book.handle(make_request(operator="ann"), 0.0)).round == 2
    book.handle(TruthRevealed(8, 1, b"truth"), 1.0)
    assert (book.in_flight, book.held_bytes) == (1, 8)

"""Rounds that an earlier run has closed: their truth may still come, and a reply to them is a stray."""

import pytest

from quorate_coordinator.rounds.book import BookLimits, RoundBook
from quorate_coordinator.rounds.events import (
    AgentLost,
    AgentReachable,
    CoordinatorStopped,
    DrainRequested,
    RoundCancelled,
    TimerFired,
    TruthRevealed,
)
from quorate_coordinator.rounds.instructions import (
    AnnounceDrained,
    LearnTruth,
    NoteForgotten,
    NoteStray,
    OpenRound,
    Outcome,
    RejectRequest,
    SendFeedback,
)
from sansio.round_making import make_policy, make_reply, make_request, only, outcome_in, statuses


def close_earlier(count: int = 1) -> list[Outcome]:
    """The outcomes of an earlier run's rounds 1, 2, ...: a replied, b was lost, c was late, z was not reached."""
    earlier = RoundBook()
    outcomes = []
    for number in range(1, count + 1):
        now = 100.0 * number
        earlier.handle(make_request(("a", "b", "c"), make_policy(2), away=("z",)), now)
        earlier.handle(make_reply("a", number), now + 1)
        earlier.handle(AgentLost("b"), now + 2)
        outcomes.append(outcome_in(earlier.handle(TimerFired(), now + 10)))
    assert statuses(outcomes[0]) == {"a": "replied", "b": "lost", "c": "late", "z": "unavailable"}
    return outcomes


def recall(outcomes: list[Outcome], limits: BookLimits | None = None) -> RoundBook:
    """A book that goes on after them, and remembers them all."""
    book = RoundBook(limits, first_round=len(outcomes) + 1)
    for outcome in outcomes:
        assert book.recall(outcome) == []
    return book


def test_a_recalled_round_awaits_its_truth_and_is_not_in_flight() -> None:
    book = recall(close_earlier(2))
    assert (book.remembered, book.traces, book.in_flight, book.next_timer()) == (2, 0, 0, None)
    assert not book.closed_counts, "that was an earlier run's"
    assert only(OpenRound, book.handle(make_request(), 0.0)).round == 3


def test_its_truth_goes_to_those_it_asked_and_to_the_learner_once() -> None:
    outcomes = close_earlier(2)
    book = recall(outcomes)
    assert book.handle(TruthRevealed(8, 2, b"truth"), 1.0) == [
        SendFeedback(2, ("a", "b", "c"), "classify", b"truth"),
        LearnTruth(8, outcomes[1], b"truth"),
    ]
    assert (book.remembered, book.traces) == (1, 1)
    again = only(RejectRequest, book.handle(TruthRevealed(9, 2, b"truth"), 1.0))
    assert (again.reason, again.retry) == ("already-revealed", False)


def test_a_reply_to_it_is_a_duplicate_or_of_one_not_asked_whether_or_not_the_truth_came() -> None:
    book = recall(close_earlier())
    for _ in range(2):
        for attempt in (1, 2):
            assert [book.handle(make_reply(agent, attempt=attempt), 1.0) for agent in "abczx"] == [
                [NoteStray(kind, 1, agent)]  # type: ignore[arg-type]
                for agent, kind in zip("abczx", ["duplicate"] * 3 + ["not-asked"] * 2, strict=True)
            ]
        book.handle(TruthRevealed(8, 1, b"truth"), 1.0)
    assert book.stray_counts == {"duplicate": 12, "not-asked": 8}
    assert (book.held_bytes, book.in_flight_of("a")) == (0, 0)


def test_nothing_else_touches_it() -> None:
    book = recall(close_earlier())
    for event in (AgentReachable("a"), AgentReachable("z"), AgentLost("c"), RoundCancelled(1, "no"), TimerFired()):
        assert book.handle(event, 1e9) == []
    assert book.remembered == 1
    assert book.handle(DrainRequested(), 1e9) == [AnnounceDrained()], "it is not waited for"
    assert book.handle(CoordinatorStopped("going down"), 1e9) == []
    only(LearnTruth, book.handle(TruthRevealed(8, 1, b"truth"), 1e9))


@pytest.mark.parametrize("limits", [BookLimits(remembered_max=2), BookLimits(remembered_bytes_max=4500)])
def test_recalled_rounds_are_bounded_and_the_oldest_forgotten(limits: BookLimits) -> None:
    outcomes = close_earlier(3)
    book = RoundBook(limits, first_round=4)
    assert [book.recall(outcome) for outcome in outcomes] == [[], [], [NoteForgotten(1)]]
    assert (book.remembered, book.traces, book.forgotten_count) == (2, 1, 1)
    assert 2 * 2048 < book.remembered_bytes <= 4500
    assert only(RejectRequest, book.handle(TruthRevealed(8, 1, b"truth"), 1.0)).reason == "unknown-round"
    assert book.handle(make_reply("a", 1), 1.0) == [NoteStray("duplicate", 1, "a")]
    # And they make room for this run's as these do for each other.
    book.handle(make_request(("a",), make_policy(1)), 2.0)
    assert NoteForgotten(2) in book.handle(make_reply("a", 4), 2.0)


def test_one_that_was_not_recalled_is_said_to_be_of_an_earlier_run() -> None:
    book = RoundBook(first_round=4)
    rejected = only(RejectRequest, book.handle(TruthRevealed(8, 3, b"truth"), 1.0))
    assert rejected.reason == "unknown-round"
    assert rejected.message == "round 3 is of an earlier run of the coordinator, and is not remembered"
    assert "there is no round 4" in only(RejectRequest, book.handle(TruthRevealed(8, 4, b"truth"), 1.0)).message


def test_rounds_of_this_run_are_not_recalled() -> None:
    with pytest.raises(AssertionError, match="rounds of this run"):
        RoundBook().recall(close_earlier()[0])

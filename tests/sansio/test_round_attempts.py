"""One round and agents that come and go: who is asked, how often, under which number, and how each part ends."""

from dataclasses import dataclass

import pytest

from quorate_coordinator.rounds.events import (
    AgentLost,
    AgentReachable,
    CoordinatorStopped,
    ReplyReceived,
    RoundCancelled,
    TimerFired,
    TruthRevealed,
)
from quorate_coordinator.rounds.instructions import (
    CloseRound,
    Instruction,
    LearnTruth,
    NoteStray,
    OfferLateReply,
    OpenRound,
    SendAssignment,
    SendCancellation,
    SendFeedback,
    TellPart,
)
from quorate_coordinator.rounds.round import RoundEvent
from sansio.round_making import make_reply, only, open_round, outcome_in, statuses

LOST = AgentLost("z", "gone")
BACK = AgentReachable("z")
CANCELLED = RoundCancelled(1, "no need")
STOPPED = CoordinatorStopped("going down")


def z(status: str, attempt: int = 1) -> ReplyReceived:
    """What z replies."""
    return make_reply("z", status=status, attempt=attempt)  # type: ignore[arg-type]


def again(attempt: int, left_s: float) -> list[Instruction]:
    """The assignment, for z alone."""
    return [SendAssignment(1, ("z",), "classify", b"question", attempt, left_s)]


@dataclass(frozen=True)
class Case:
    """What happens to z in a round of a, b, c and z, each a second after the other, and how its part ends."""

    name: str
    events: tuple[RoundEvent, ...]
    #: How z's part ends when the deadline, its operator or the coordinator ends the round: three statuses, or one
    #: where it has ended before.
    ends: str
    attempts: int = 1
    is_away: bool = False
    #: The numbers under which z is given the assignment.
    asked: tuple[int, ...] = (1,)


CASES = (
    Case("linked", (), "late cancelled cancelled"),
    Case("linked, link renewed", (BACK,), "late cancelled cancelled", asked=(1, 1)),
    Case("linked, lost", (LOST,), "lost"),
    Case("linked, lost, back too late", (LOST, BACK), "lost"),
    Case("linked, failed", (z("failed"),), "failed"),
    Case("linked, declined", (z("declined"),), "declined"),
    Case("linked, declined is no failure", (z("declined"),), "declined", 3),
    Case("linked, replied, lost", (z("replied"), LOST, BACK), "replied", 3),
    # Away.
    Case("away", (), "unavailable", is_away=True, asked=()),
    Case("away, attempts left", (), "unavailable", 3, is_away=True, asked=()),
    Case("away, lost", (LOST,), "unavailable", is_away=True, asked=()),
    Case("away, lost, back too late", (LOST, BACK), "unavailable", is_away=True, asked=()),
    Case("away, lost, attempts left", (LOST,), "unavailable", 2, is_away=True, asked=()),
    Case("away, lost twice, attempts left", (LOST, LOST), "unavailable", 2, is_away=True, asked=()),
    Case("away, lost, asked for the first time", (LOST, BACK), "late cancelled cancelled", 2, is_away=True),
    Case("away, back", (BACK,), "late cancelled cancelled", is_away=True),
    Case("away, back, back", (BACK, BACK), "late cancelled cancelled", is_away=True, asked=(1, 1)),
    Case("away, back, replied", (BACK, z("replied")), "replied", is_away=True),
    Case("away, back, failed", (BACK, z("failed")), "failed", is_away=True),
    Case("away, back, lost", (BACK, LOST), "lost", is_away=True),
    Case("away, back, lost, back", (BACK, LOST, BACK), "late cancelled cancelled", 2, True, (1, 2)),
    Case("away, back, failed, lost", (BACK, z("failed"), LOST), "lost", 2, True, (1, 2)),
    Case("away, replied unasked", (z("replied"),), "unavailable", is_away=True, asked=()),
    Case("away, lost, replied unasked", (LOST, z("replied")), "unavailable", is_away=True, asked=()),
    Case("away, failed unasked, back", (z("failed"), BACK), "late cancelled cancelled", 2, True),
    # Asked again after a failure.
    Case("failed, two attempts", (z("failed"),), "late cancelled cancelled", 2, asked=(1, 2)),
    Case("failed twice, two attempts", (z("failed"), z("failed", 2)), "failed", 2, asked=(1, 2)),
    Case("failed twice, three attempts", (z("failed"), z("failed", 2)), "late cancelled cancelled", 3, asked=(1, 2, 3)),
    Case("failed thrice", (z("failed"), z("failed", 2), z("failed", 3)), "failed", 3, asked=(1, 2, 3)),
    Case("failed, then replied", (z("failed"), z("replied", 2)), "replied", 2, asked=(1, 2)),
    Case("failed, then declined", (z("failed"), z("declined", 2)), "declined", 3, asked=(1, 2)),
    Case("failed, said twice", (z("failed"), z("failed")), "late cancelled cancelled", 3, asked=(1, 2)),
    Case("failed, then the first answered", (z("failed"), z("replied")), "late cancelled cancelled", 3, asked=(1, 2)),
    Case("failed, link renewed", (z("failed"), BACK), "late cancelled cancelled", 2, asked=(1, 2, 2)),
    Case("failed, lost", (z("failed"), LOST), "lost", 2, asked=(1, 2)),
    Case(
        "no body is a failure",
        (ReplyReceived(1, "z", 1, "replied", None),),
        "late cancelled cancelled",
        2,
        False,
        (1, 2),
    ),
    # Asked again after a return.
    Case("lost, attempts left", (LOST,), "lost", 2),
    Case("lost twice, attempts left", (LOST, LOST), "lost", 2),
    Case("lost, back", (LOST, BACK), "late cancelled cancelled", 2, asked=(1, 2)),
    Case("lost, back, link renewed", (LOST, BACK, BACK), "late cancelled cancelled", 3, asked=(1, 2, 2)),
    Case("lost, back, lost", (LOST, BACK, LOST), "lost", 2, asked=(1, 2)),
    Case("lost, back, lost, back", (LOST, BACK, LOST, BACK), "late cancelled cancelled", 3, asked=(1, 2, 3)),
    Case("lost, back, replied", (LOST, BACK, z("replied", 2)), "replied", 2, asked=(1, 2)),
    Case("lost, back, failed", (LOST, BACK, z("failed", 2)), "failed", 2, asked=(1, 2)),
    Case("lost, back, the first answered", (LOST, BACK, z("replied")), "late cancelled cancelled", 2, asked=(1, 2)),
    # What a session said may be read when it is over.
    Case("lost, replied", (LOST, z("replied")), "replied", 2),
    Case("lost, replied, back", (LOST, z("replied"), BACK), "replied", 2),
    Case("lost, declined", (LOST, z("declined")), "declined", 2),
    Case("lost, failed", (LOST, z("failed")), "lost", 2),
    Case("lost, failed, back", (LOST, z("failed"), BACK), "late cancelled cancelled", 2, asked=(1, 2)),
    Case("lost, failed, back, failed", (LOST, z("failed"), BACK, z("failed", 2)), "failed", 2, asked=(1, 2)),
    Case("lost, failed, replied", (LOST, z("failed"), z("replied")), "lost", 2),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("end", "place"), [(TimerFired(), 0), (CANCELLED, 1), (STOPPED, 2)])
def test_how_a_part_ends(case: Case, end: RoundEvent, place: int) -> None:
    # Quorum neither needs z nor comes with it: whatever becomes of z, the round goes on.
    linked, away = (("a", "b", "c"), ("z",)) if case.is_away else (("a", "b", "c", "z"), ())
    round_, said = open_round(linked, away=away, quorum=2, attempts=case.attempts, is_streamed=True)
    for number, event in enumerate(case.events, start=1):
        said += round_.handle(event, 100.0 + number)
    assert round_.phase == "open"
    ended_before = not round_.is_working("z")
    said += round_.handle(end, 110.0 if isinstance(end, TimerFired) else 109.0)
    ends = case.ends.split()
    status = ends[place] if len(ends) > 1 else ends[0]
    outcome = outcome_in(said)
    assert statuses(outcome)["z"] == status
    sent = [one for one in said if isinstance(one, SendAssignment) and "z" in one.agents]
    assert tuple(one.attempt for one in sent) == case.asked
    assert (status == "unavailable") == (case.asked == ())
    # Told as it ended, if it ended before the round; told to stop, if it was at work then.
    told = [one.result for one in said if isinstance(one, TellPart)]
    result = next(one for one in outcome.results if one.agent == "z")
    assert told == ([result] if ended_before else [])
    stopped = only(SendCancellation, said).agents
    assert stopped == (("a", "b", "c", "z") if status in ("late", "cancelled") else ("a", "b", "c"))


def test_no_case_stands_twice() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert len({(case.events, case.attempts, case.is_away) for case in CASES}) == len(CASES)


# --- away ---


def test_who_is_away_is_selected_and_not_asked_until_it_returns() -> None:
    round_, instructions = open_round(("c", "a"), away=("b",), quorum=1.0)
    assert only(OpenRound, instructions).selected == ("a", "b", "c")
    assert instructions[1:] == [SendAssignment(1, ("a", "c"), "classify", b"question", 1, 10.0)]
    assert round_.handle(AgentReachable("b"), 104.0) == [SendAssignment(1, ("b",), "classify", b"question", 1, 6.0)], (
        "with the time that is left"
    )
    for agent in "ab":
        assert round_.handle(make_reply(agent), 105.0) == []
    outcome = outcome_in(round_.handle(make_reply("c"), 106.0))
    assert (outcome.state, outcome.quorum) == ("complete", 3)


def test_the_reply_of_one_that_was_never_asked_is_a_stray_in_flight_and_afterwards() -> None:
    stray = [NoteStray("not-asked", 1, "z")]
    round_, _ = open_round(("a",), away=("z",), quorum=1)
    assert round_.handle(make_reply("z"), 101.0) == stray
    assert round_.handle(make_reply("z", attempt=2), 101.0) == stray
    assert round_.handle(AgentLost("z"), 102.0) == []
    assert round_.handle(make_reply("z"), 103.0) == stray
    outcome = outcome_in(round_.handle(make_reply("a"), 104.0))
    assert (outcome.state, statuses(outcome)["z"]) == ("quorate", "unavailable")
    assert round_.handle(make_reply("z"), 105.0) == stray


def test_the_truth_goes_to_those_who_were_asked() -> None:
    round_, _ = open_round(("a",), away=("y", "z"), quorum=1, grace_s=None)
    round_.handle(AgentReachable("y"), 101.0)
    round_.handle(make_reply("a"), 102.0)
    outcome = outcome_in(round_.handle(TimerFired(), 110.0))
    assert statuses(outcome) == {"a": "replied", "y": "late", "z": "unavailable"}
    assert round_.asked == ("a", "y")
    told = round_.handle(TruthRevealed(9, 1, b"truth"), 111.0)
    assert told == [SendFeedback(1, ("a", "y"), "classify", b"truth"), LearnTruth(9, outcome, b"truth")]


def test_the_truth_of_a_round_that_nobody_was_asked_in_is_the_learners_alone() -> None:
    round_, instructions = open_round((), away=("y", "z"), quorum=1)
    assert [type(one) for one in instructions] == [OpenRound]
    outcome = outcome_in(round_.handle(TimerFired(), 110.0))
    assert (outcome.state, round_.asked) == ("expired", ())
    assert "0 of 1 replies" in outcome.reason
    assert round_.handle(TruthRevealed(9, 1, b"truth"), 111.0) == [LearnTruth(9, outcome, b"truth")]


def test_quorum_counts_on_those_who_may_still_be_asked_until_they_are_lost() -> None:
    round_, _ = open_round(("a",), away=("y", "z"), quorum=2)
    assert round_.handle(AgentLost("y"), 101.0) == []
    outcome = outcome_in(round_.handle(AgentLost("z"), 102.0))
    assert outcome.state == "failed"
    assert statuses(outcome) == {"a": "cancelled", "y": "unavailable", "z": "unavailable"}
    assert "2 unavailable" in outcome.reason


def test_quorum_counts_on_those_who_have_attempts_left() -> None:
    round_, _ = open_round(("a", "b"), quorum=2, attempts=2)
    assert round_.handle(AgentLost("a"), 101.0) == []
    assert round_.handle(make_reply("b", status="failed"), 101.0) != []
    assert round_.phase == "open"
    assert round_.handle(AgentReachable("a"), 102.0) != []
    outcome = outcome_in(round_.handle(AgentLost("a"), 103.0))
    assert outcome.state == "failed"
    assert statuses(outcome) == {"a": "lost", "b": "cancelled"}


# --- grace ---


@pytest.mark.parametrize("grace_s", [0.5, None])
def test_grace_does_not_wait_for_who_is_away(grace_s: float | None) -> None:
    round_, _ = open_round(("a", "b"), away=("z",), quorum=2, grace_s=grace_s)
    round_.handle(make_reply("a"), 101.0)
    outcome = outcome_in(round_.handle(make_reply("b"), 102.0))
    assert (outcome.state, statuses(outcome)["z"]) == ("quorate", "unavailable")


def test_grace_does_not_wait_for_who_is_lost_and_may_be_asked_again() -> None:
    round_, _ = open_round(("a", "b", "z"), quorum=2, grace_s=None, attempts=2)
    round_.handle(make_reply("a"), 101.0)
    assert round_.handle(make_reply("b"), 102.0) == []
    outcome = outcome_in(round_.handle(AgentLost("z", "gone"), 103.0))
    assert (outcome.state, outcome.duration_s) == ("quorate", 3.0)
    assert (outcome.results[2].status, outcome.results[2].error) == ("lost", "gone")


def test_grace_waits_for_one_at_work_and_takes_in_who_returns_meanwhile() -> None:
    round_, _ = open_round(("a", "b"), away=("z",), quorum=1, grace_s=5.0)
    assert round_.handle(make_reply("a"), 101.0) == []
    assert round_.phase == "grace"
    assert round_.handle(BACK, 102.0) == again(1, 8.0)
    assert round_.handle(make_reply("b", status="declined"), 103.0) == [], "z is at work now"
    outcome = outcome_in(round_.handle(z("replied"), 104.0))
    assert statuses(outcome) == {"a": "replied", "b": "declined", "z": "replied"}


def test_grace_waits_for_who_failed_and_was_asked_again() -> None:
    round_, _ = open_round(("a", "z"), quorum=1, grace_s=5.0, attempts=2)
    round_.handle(make_reply("a"), 101.0)
    assert round_.handle(z("failed"), 102.0) == again(2, 8.0)
    outcome = outcome_in(round_.handle(z("failed", 2), 103.0))
    assert (outcome.state, statuses(outcome)["z"]) == ("quorate", "failed")


def test_grace_that_elapses_stops_who_was_asked_and_not_who_was_not() -> None:
    round_, _ = open_round(("a", "b", "y"), away=("z",), quorum=1, attempts=2)
    round_.handle(AgentLost("y", "gone"), 100.5)
    round_.handle(make_reply("a"), 101.0)
    instructions = round_.handle(TimerFired(), 102.0)
    assert instructions[0] == SendCancellation(1, ("b",), "enough replies")
    assert statuses(outcome_in(instructions)) == {"a": "replied", "b": "cancelled", "y": "lost", "z": "unavailable"}


# --- attempts ---


def test_who_is_told_why_it_was_lost_or_not_reached() -> None:
    round_, _ = open_round(("a", "y"), away=("x", "z"), quorum=1, attempts=2)
    round_.handle(AgentLost("a"), 101.0)
    round_.handle(AgentLost("y", "lease expired"), 101.0)
    outcome = outcome_in(round_.handle(TimerFired(), 110.0))
    assert [one.error for one in outcome.results] == ["lost", "it had no link", "lease expired", "it had no link"]


def test_each_attempt_has_the_time_that_is_left_and_latency_counts_from_the_opening() -> None:
    round_, _ = open_round(("z",), quorum=1, attempts=3)
    assert round_.handle(z("failed"), 102.0) == again(2, 8.0)
    assert round_.handle(LOST, 103.0) == []
    assert round_.handle(BACK, 105.0) == again(3, 5.0)
    assert outcome_in(round_.handle(z("replied", 3), 107.5)).results[0].latency_s == 7.5


def test_replies_under_another_number_are_strays_before_and_after_the_end() -> None:
    round_, _ = open_round(("z",), quorum=1, attempts=2)
    round_.handle(z("failed"), 101.0)
    for attempt in (1, 3):
        assert round_.handle(z("replied", attempt), 102.0) == [NoteStray("wrong-attempt", 1, "z")]
    outcome_in(round_.handle(TimerFired(), 110.0))
    for attempt in (1, 3):
        assert round_.handle(z("replied", attempt), 111.0) == [NoteStray("wrong-attempt", 1, "z")]
    assert [type(one) for one in round_.handle(z("replied", 2), 111.0)] == [NoteStray, OfferLateReply]
    assert round_.handle(z("replied", 2), 111.0) == [NoteStray("duplicate", 1, "z")]


def test_a_late_failure_is_not_asked_again() -> None:
    round_, _ = open_round(("z",), quorum=1, attempts=3)
    outcome_in(round_.handle(TimerFired(), 110.0))
    assert round_.handle(z("failed"), 111.0) == [NoteStray("late", 1, "z")]
    assert round_.handle(BACK, 112.0) == []


@pytest.mark.parametrize("event", [BACK, z("failed")], ids=["reachable", "failed"])
def test_time_goes_first_and_nobody_is_asked_at_the_deadline(event: RoundEvent) -> None:
    round_, _ = open_round(("a", "z"), quorum=1, attempts=3)
    instructions = round_.handle(event, 110.0)
    assert outcome_in(instructions).state == "expired"
    assert not [one for one in instructions if isinstance(one, SendAssignment)]


def test_an_agent_that_the_round_did_not_select_is_given_nothing() -> None:
    round_, _ = open_round(("a",), away=("z",), quorum=1)
    assert round_.handle(AgentReachable("x"), 101.0) == []


# --- streaming ---


def test_parts_are_told_as_they_end_and_never_at_the_close() -> None:
    round_, said = open_round(("a", "b", "c", "d"), away=("z",), quorum=2, is_streamed=True)
    assert not [one for one in said if isinstance(one, TellPart)]
    told: list[TellPart] = []
    for event in (make_reply("a"), make_reply("b", status="failed"), LOST):
        told += [only(TellPart, round_.handle(event, 101.0))]
    assert [(one.request_id, one.round, one.result.agent, one.result.status) for one in told] == [
        (7, 1, "a", "replied"),
        (7, 1, "b", "failed"),
        (7, 1, "z", "unavailable"),
    ]
    closing = round_.handle(CANCELLED, 102.0)
    assert [type(one) for one in closing] == [SendCancellation, CloseRound]
    assert [one.result for one in told] == [one for one in outcome_in(closing).results if one.agent in "abz"]


def test_the_part_that_ends_the_round_is_told_before_the_outcome() -> None:
    round_, _ = open_round(("a", "b"), quorum=2, is_streamed=True)
    round_.handle(make_reply("a"), 101.0)
    assert [type(one) for one in round_.handle(make_reply("b"), 102.0)] == [TellPart, CloseRound]


def test_nothing_is_told_of_an_attempt_that_is_followed_by_another() -> None:
    round_, _ = open_round(("z",), quorum=1, attempts=2, is_streamed=True)
    assert round_.handle(z("failed"), 101.0) == again(2, 9.0)
    assert round_.handle(BACK, 101.0) == again(2, 9.0)
    assert only(TellPart, round_.handle(z("replied", 2), 102.0)).result.status == "replied"

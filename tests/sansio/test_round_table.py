"""One round: every row of its table, how each agent's part ends, and that illegal moves change nothing."""

import itertools
from collections.abc import Callable
from typing import get_args

import pytest

from quorate_coordinator.rounds.events import (
    AgentLost,
    CoordinatorStopped,
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
    RejectRequest,
    SendAssignment,
    SendCancellation,
    SendFeedback,
)
from quorate_coordinator.rounds.policy import ResolvedPolicy
from quorate_coordinator.rounds.round import Round
from quorate_coordinator.rounds.table import CLOSED, TRANSITIONS, Phase, Trigger
from quorate_protocol.fields import RoundState
from sansio.round_making import make_reply, only, open_round, outcome_in, statuses

Driven = tuple[Round, list[Instruction]]


def drive_to_grace(grace_s: float | None = 1.0) -> Round:
    """A round of a, b, c opened at 100 with quorum 2, that a and b have answered by 102."""
    round_, _ = open_round(grace_s=grace_s)
    assert round_.handle(make_reply("a"), 101.0) == []
    assert round_.phase == "open"
    assert round_.handle(make_reply("b"), 102.0) == []
    assert round_.phase == "grace"
    return round_


def _open_all_replied() -> Driven:
    round_, _ = open_round(quorum=3)
    round_.handle(make_reply("a"), 101.0)
    round_.handle(make_reply("b"), 101.0)
    return round_, round_.handle(make_reply("c"), 101.5)


def _open_quorum_met() -> Driven:
    return drive_to_grace(), []


def _open_quorum_unreachable() -> Driven:
    round_, _ = open_round()
    assert round_.handle(make_reply("a", status="declined"), 101.0) == []
    return round_, round_.handle(AgentLost("b", "lease expired"), 102.0)


def _open_deadline() -> Driven:
    round_, _ = open_round()
    round_.handle(make_reply("a"), 101.0)
    assert round_.handle(TimerFired(), 109.9) == []
    return round_, round_.handle(TimerFired(), 110.0)


def _open_cancelled() -> Driven:
    round_, _ = open_round()
    return round_, round_.handle(RoundCancelled(1, "changed my mind"), 101.0)


def _open_interrupted() -> Driven:
    round_, _ = open_round()
    return round_, round_.handle(CoordinatorStopped("going down"), 101.0)


def _grace_all_replied() -> Driven:
    round_ = drive_to_grace()
    return round_, round_.handle(make_reply("c"), 102.5)


def _grace_all_ended() -> Driven:
    round_ = drive_to_grace()
    return round_, round_.handle(make_reply("c", status="failed"), 102.5)


def _grace_elapsed() -> Driven:
    round_ = drive_to_grace()
    assert round_.due_at == 103.0
    assert round_.handle(TimerFired(), 102.9) == []
    return round_, round_.handle(TimerFired(), 103.0)


def _grace_deadline() -> Driven:
    round_ = drive_to_grace(grace_s=None)
    assert round_.due_at == 110.0
    return round_, round_.handle(TimerFired(), 110.0)


def _grace_cancelled() -> Driven:
    round_ = drive_to_grace()
    return round_, round_.handle(RoundCancelled(1, "changed my mind"), 102.5)


def _grace_interrupted() -> Driven:
    round_ = drive_to_grace()
    return round_, round_.handle(CoordinatorStopped("going down"), 102.5)


#: Each row: how to get there, and how the agents' parts have ended then.
ROWS: dict[tuple[Phase, Trigger], tuple[Callable[[], Driven], str]] = {
    ("open", Trigger.ALL_REPLIED): (_open_all_replied, "replied replied replied"),
    ("open", Trigger.QUORUM_MET): (_open_quorum_met, ""),
    ("open", Trigger.QUORUM_UNREACHABLE): (_open_quorum_unreachable, "declined lost cancelled"),
    ("open", Trigger.DEADLINE): (_open_deadline, "replied late late"),
    ("open", Trigger.CANCELLED): (_open_cancelled, "cancelled cancelled cancelled"),
    ("open", Trigger.INTERRUPTED): (_open_interrupted, "cancelled cancelled cancelled"),
    ("grace", Trigger.ALL_REPLIED): (_grace_all_replied, "replied replied replied"),
    ("grace", Trigger.ALL_ENDED): (_grace_all_ended, "replied replied failed"),
    ("grace", Trigger.GRACE_ELAPSED): (_grace_elapsed, "replied replied cancelled"),
    ("grace", Trigger.DEADLINE): (_grace_deadline, "replied replied late"),
    ("grace", Trigger.CANCELLED): (_grace_cancelled, "replied replied cancelled"),
    ("grace", Trigger.INTERRUPTED): (_grace_interrupted, "replied replied cancelled"),
}


def test_every_row_of_the_table_is_driven_here() -> None:
    assert set(ROWS) == {(row.source, row.trigger) for row in TRANSITIONS}
    assert len(TRANSITIONS) == len(ROWS), "a row stands twice"


def test_the_table_ends_where_the_wire_says() -> None:
    assert set(get_args(RoundState)) == CLOSED
    assert {row.target for row in TRANSITIONS} == CLOSED | {"grace"}
    assert not {row.source for row in TRANSITIONS} & CLOSED


@pytest.mark.parametrize("row", TRANSITIONS, ids=lambda row: f"{row.source}-{row.trigger.name}")
def test_row(row: tuple[Phase, Trigger, Phase]) -> None:
    source, trigger, target = row
    drive, ends = ROWS[source, trigger]
    round_, instructions = drive()
    assert round_.phase == target
    if target == "grace":
        assert round_.outcome is None
        return
    outcome = outcome_in(instructions)
    assert outcome is round_.outcome
    assert round_.body_bytes == 0, "nobody is asked any more: the question is let go"
    assert outcome.state == target
    assert statuses(outcome) == dict(zip("abc", ends.split(), strict=True))
    # Those still at work, and nobody else, are told to stop, before the outcome is dealt with.
    stopped = tuple(result.agent for result in outcome.results if result.status in ("late", "cancelled"))
    cancellations = [one for one in instructions if isinstance(one, SendCancellation)]
    assert [one.agents for one in cancellations] == ([stopped] if stopped else [])
    assert isinstance(instructions[-1], CloseRound)
    # An operator is told what went wrong exactly when something did.
    assert bool(outcome.reason) == (target not in ("complete", "quorate"))


# --- opening ---


def test_opening_is_told_and_the_assignment_goes_once_to_all_sorted() -> None:
    round_, instructions = open_round(("c", "a", "b"), deadline_s=4.0)
    assert instructions == [
        OpenRound(7, 1, ("a", "b", "c"), "classify", b"question", ResolvedPolicy(2, 1.0, 4.0), ""),
        SendAssignment(1, ("a", "b", "c"), "classify", b"question", 1, 4.0),
    ]
    assert (round_.phase, round_.due_at) == ("open", 104.0)


# --- how rounds end ---


def test_an_outcome_holds_what_was_said_and_when() -> None:
    round_, _ = open_round(quorum=1)
    round_.handle(make_reply("b", body=b"yes"), 100.5)
    round_.handle(make_reply("c", status="declined"), 101.0)
    outcome = outcome_in(round_.handle(AgentLost("a", "link broken"), 101.25))
    assert (outcome.round, outcome.request_id, outcome.task) == (1, 7, "classify")
    assert (outcome.state, outcome.quorum, outcome.duration_s, outcome.reason) == ("quorate", 1, 1.25, "")
    a, b, c = outcome.results
    assert (a.status, a.error, a.body, a.latency_s) == ("lost", "link broken", None, None)
    assert (b.status, b.body, b.latency_s, b.compute_s, b.waited_s) == ("replied", b"yes", 0.5, 0.25, 0.125)
    assert (c.status, c.body, c.error, c.latency_s) == ("declined", None, "c declined", 1.0)


def test_no_grace_closes_at_quorum() -> None:
    round_, _ = open_round(grace_s=0.0)
    assert round_.handle(make_reply("a"), 101.0) == []
    outcome = outcome_in(round_.handle(make_reply("c"), 102.0))
    assert outcome.state == "quorate"
    assert statuses(outcome) == {"a": "replied", "b": "cancelled", "c": "replied"}


def test_no_grace_and_everybody_in_at_quorum_is_complete() -> None:
    round_, _ = open_round(("a",), quorum=1, grace_s=0.0)
    assert outcome_in(round_.handle(make_reply("a"), 101.0)).state == "complete"


@pytest.mark.parametrize("others", list(itertools.permutations(("declined", "failed", "lost"))))
def test_quorum_met_when_everybody_else_has_ended_closes_at_once(others: tuple[str, ...]) -> None:
    round_, _ = open_round(("a", "b", "c", "d"), quorum=1, grace_s=None)
    for agent, how in zip("bcd", others, strict=True):
        event = AgentLost(agent) if how == "lost" else make_reply(agent, status=how)
        assert round_.handle(event, 101.0) == []
    outcome = outcome_in(round_.handle(make_reply("a"), 102.0))
    assert outcome.state == "quorate"
    assert statuses(outcome) == {"a": "replied", **dict(zip("bcd", others, strict=True))}


def test_grace_never_reaches_past_the_deadline() -> None:
    round_, _ = open_round(grace_s=5.0, deadline_s=10.0)
    round_.handle(make_reply("a"), 101.0)
    round_.handle(make_reply("b"), 108.0)
    assert (round_.phase, round_.due_at) == ("grace", 110.0)
    outcome = outcome_in(round_.handle(TimerFired(), 110.0))
    assert outcome.state == "quorate"
    assert statuses(outcome)["c"] == "late"


def test_a_straggler_ends_grace_at_once_by_going_away() -> None:
    round_ = drive_to_grace(grace_s=None)
    outcome = outcome_in(round_.handle(AgentLost("c"), 103.0))
    assert (outcome.state, statuses(outcome)["c"]) == ("quorate", "lost")


def test_losing_one_who_has_replied_changes_nothing() -> None:
    round_, _ = open_round()
    round_.handle(make_reply("a"), 101.0)
    assert round_.handle(AgentLost("a"), 101.5) == []
    round_.handle(AgentLost("c"), 102.0)
    outcome = outcome_in(round_.handle(make_reply("b"), 102.5))
    assert statuses(outcome) == {"a": "replied", "b": "replied", "c": "lost"}


def test_a_reply_without_a_body_is_a_failed_one() -> None:
    round_, _ = open_round(("a",), quorum=1)
    outcome = outcome_in(round_.handle(make_reply("a", body=None), 101.0))
    assert outcome.state == "failed"
    assert (outcome.results[0].status, outcome.results[0].error) == ("failed", "the reply has no body")


@pytest.mark.parametrize("event", [make_reply("b"), AgentLost("b"), RoundCancelled(1, "late wish"), TimerFired()])
def test_time_goes_first(event: object) -> None:
    """What comes at or after the end of the time finds the round closed, timer or no timer."""
    round_, _ = open_round()
    round_.handle(make_reply("a"), 101.0)
    outcome = outcome_in(round_.handle(event, 110.0))  # type: ignore[arg-type]
    assert outcome.state == "expired"
    assert statuses(outcome) == {"a": "replied", "b": "late", "c": "late"}


def test_grace_that_elapsed_first_ends_the_round_even_when_seen_after_the_deadline() -> None:
    round_ = drive_to_grace()
    outcome = outcome_in(round_.handle(TimerFired(), 200.0))
    assert (outcome.state, statuses(outcome)["c"]) == ("quorate", "cancelled")


# --- what does not count ---


def test_replies_that_do_not_count_are_told_apart_and_change_nothing() -> None:
    round_, _ = open_round()
    round_.handle(make_reply("a"), 101.0)
    assert round_.handle(make_reply("a"), 101.1) == [NoteStray("duplicate", 1, "a")]
    assert round_.handle(make_reply("a", status="failed"), 101.1) == [NoteStray("duplicate", 1, "a")]
    assert round_.handle(make_reply("x"), 101.2) == [NoteStray("not-asked", 1, "x")]
    assert round_.handle(make_reply("b", attempt=2), 101.3) == [NoteStray("wrong-attempt", 1, "b")]
    assert round_.phase == "open"
    outcome = outcome_in(round_.handle(TimerFired(), 110.0))
    assert outcome.results[0].latency_s == 1.0
    assert statuses(outcome) == {"a": "replied", "b": "late", "c": "late"}


def test_a_late_reply_is_offered_once_and_the_outcome_stays() -> None:
    round_ = drive_to_grace()
    outcome = outcome_in(round_.handle(TimerFired(), 103.0))
    assert round_.handle(make_reply("c", body=b"slow"), 105.0) == [
        NoteStray("late", 1, "c"),
        OfferLateReply(1, "classify", "c", b"slow", 5.0, 0.25, 0.125),
    ]
    assert round_.handle(make_reply("c"), 106.0) == [NoteStray("duplicate", 1, "c")]
    assert round_.handle(make_reply("a"), 106.0) == [NoteStray("duplicate", 1, "a")]
    assert round_.outcome is outcome


def test_a_late_refusal_is_counted_and_there_is_nothing_to_offer() -> None:
    round_ = drive_to_grace()
    round_.handle(TimerFired(), 103.0)
    assert round_.handle(make_reply("c", status="declined"), 105.0) == [NoteStray("late", 1, "c")]


def test_a_lost_agents_reply_is_late_though_the_round_is_open() -> None:
    round_, _ = open_round()
    assert round_.handle(AgentLost("a"), 101.0) == []
    late = round_.handle(make_reply("a"), 102.0)
    assert [type(one) for one in late] == [NoteStray, OfferLateReply]
    round_.handle(make_reply("b"), 103.0)
    assert statuses(outcome_in(round_.handle(make_reply("c"), 104.0))) == {"a": "lost", "b": "replied", "c": "replied"}


@pytest.mark.parametrize("row", [row for row in TRANSITIONS if row.target in CLOSED], ids=lambda row: row.target)
def test_nothing_moves_a_closed_round(row: tuple[Phase, Trigger, Phase]) -> None:
    round_, instructions = ROWS[row[0], row[1]][0]()
    outcome = outcome_in(instructions)
    for event in (RoundCancelled(1, "no"), CoordinatorStopped("no"), AgentLost("a"), AgentLost("c"), TimerFired()):
        assert round_.handle(event, 500.0) == []
    for agent in "abcx":
        strays = round_.handle(make_reply(agent), 501.0)
        assert all(isinstance(one, NoteStray | OfferLateReply) for one in strays)
    assert (round_.phase, round_.outcome) == (row[2], outcome)


# --- the truth ---


def test_the_truth_reaches_agents_and_learner_once() -> None:
    round_ = drive_to_grace()
    outcome = outcome_in(round_.handle(TimerFired(), 103.0))
    assert round_.handle(TruthRevealed(8, 1, b"truth"), 104.0) == [
        SendFeedback(1, ("a", "b", "c"), "classify", b"truth"),
        LearnTruth(8, outcome, b"truth"),
    ]
    again = only(RejectRequest, round_.handle(TruthRevealed(9, 1, b"truth"), 105.0))
    assert (again.request_id, again.reason, again.retry) == (9, "already-revealed", False)


def test_the_truth_of_an_open_round_is_asked_to_wait() -> None:
    round_, _ = open_round()
    early = only(RejectRequest, round_.handle(TruthRevealed(8, 1, b"truth"), 101.0))
    assert (early.request_id, early.reason, early.retry) == (8, "still-open", True)
    assert round_.phase == "open"


def test_the_truth_of_a_forgotten_round_comes_too_late() -> None:
    round_ = drive_to_grace()
    round_.handle(TimerFired(), 103.0)
    round_.forget()
    refused = only(RejectRequest, round_.handle(TruthRevealed(8, 1, b"truth"), 104.0))
    assert (refused.reason, refused.retry) == ("unknown-round", False)
    assert round_.handle(make_reply("a"), 105.0) == [NoteStray("duplicate", 1, "a")]

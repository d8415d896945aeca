"""Whom a round asks: those who are free, as many as wanted, those who are away in the places left."""

from collections.abc import Callable
from typing import Any

import pytest

from quorate_coordinator.learner.api import Coordination, Request
from quorate_coordinator.learner.vote import VoteLearner
from quorate_coordinator.planning import Candidates, Planner
from quorate_coordinator.rounds.book import BookLimits, RoundBook
from quorate_coordinator.rounds.events import RoundRequested
from quorate_coordinator.rounds.instructions import RejectRequest
from quorate_coordinator.rounds.policy import RoundPolicy
from quorate_protocol.errors import CallFailed
from quorate_protocol.messages import Ask
from sansio.round_making import make_policy, make_request, only

POLICY = RoundPolicy(deadline_s=10.0, grace_s=1.0, quorum_fraction=0.5, attempts=2)


class Planned:
    """A planner and what it stands on."""

    def __init__(
        self,
        learner: VoteLearner | None = None,
        *,
        is_behind: Callable[[str, int], bool] = lambda agent, more_bytes: False,
        per_agent_max: int = 2,
    ) -> None:
        self.book = RoundBook(BookLimits(in_flight_per_agent_max=per_agent_max))
        self.planner = Planner(self.book, learner or VoteLearner(), POLICY, is_behind)

    def load(self, *agents: str) -> None:
        """One more round that waits for these."""
        self.book.handle(make_request(agents, make_policy(1)), 0.0)

    def plan(self, *reachable: str, away: tuple[str, ...] = (), **asked: Any) -> RoundRequested:
        ask = Ask(task="classify", body=b"\xc0", **asked)
        return self.planner.plan(ask, Candidates(reachable, away), request_id=5, operator="ops")


def test_everybody_is_asked_as_the_settings_say() -> None:
    request = Planned().plan("a", "b", away=("c",))
    assert (request.selected, request.away, request.policy) == (("a", "b"), ("c",), POLICY)
    assert (request.request_id, request.operator, request.is_streamed, request.body) == (5, "ops", False, b"\xc0")


def test_the_operator_goes_over_the_learner_and_that_over_the_settings() -> None:
    class Opinionated(VoteLearner):
        def compute_coordination(self, request: Request) -> Coordination:
            return Coordination(request.candidates[:2], quorum=2, grace_s=0.5, deadline_s=3.0)

    planned = Planned(Opinionated())
    request = planned.plan("a", "b", "c")
    assert request.selected == ("a", "b")
    assert request.policy == RoundPolicy(deadline_s=3.0, grace_s=0.5, quorum=2, attempts=2)
    request = planned.plan("a", "b", "c", quorum=1, deadline_s=0.25, attempts=7, stream=True)
    # A grace that somebody else wanted is cut to the operator's deadline.
    assert request.policy == RoundPolicy(deadline_s=0.25, grace_s=0.25, quorum=1, attempts=7)
    assert request.is_streamed
    assert planned.plan("a", quorum_fraction=1.0).policy.quorum is None


def test_nobody_is_told_with_the_labels_that_were_asked_for() -> None:
    with pytest.raises(CallFailed, match="no connected agent does the task 'classify'") as caught:
        Planned().plan()
    assert (caught.value.reason, caught.value.retry) == ("no-agents", True)
    with pytest.raises(CallFailed, match="with labels rack=1, zone=x does"):
        Planned().plan(labels={"rack": "1", "zone": "x"})


def test_those_who_owe_too_much_are_left_out() -> None:
    planned = Planned()
    planned.load("a", "b")
    planned.load("a", "z")
    assert planned.plan("a", "b", "c").selected == ("b", "c")
    planned.load("b", "z")
    with pytest.raises(CallFailed, match="every agent that does 'classify' has 2 rounds waiting") as caught:
        planned.plan("a", "b")
    assert (caught.value.reason, caught.value.retry) == ("busy", True)
    # Away, and owing as much: no better.
    with pytest.raises(CallFailed, match="every agent"):
        planned.plan("a", away=("z",))


def test_those_who_have_not_taken_in_what_they_were_sent_are_left_out() -> None:
    asked: list[tuple[str, int]] = []

    def is_behind(agent: str, more_bytes: int) -> bool:
        asked.append((agent, more_bytes))
        return agent == "slow"

    planned = Planned(is_behind=is_behind)
    assert planned.plan("a", "slow", away=("b",)).selected == ("a",)
    assert asked == [("a", 1), ("slow", 1), ("b", 0)]


def test_of_so_many_those_with_the_greatest_weight_and_then_the_least_load() -> None:
    planned = Planned(per_agent_max=5)
    assert planned.plan("a", "b", "c", count=2).selected == ("a", "b")
    planned.load("a", "b")
    assert planned.plan("a", "b", "c", count=2).selected == ("a", "c")
    assert planned.plan("a", "b", "c", count=9).selected == ("a", "b", "c")


def test_those_who_are_away_fill_the_places_that_are_left() -> None:
    planned = Planned()
    for count, selected, away in (
        (1, ("a",), ()),
        (2, ("a", "b"), ()),
        (3, ("a", "b"), ("x",)),
        (9, ("a", "b"), ("x", "y")),
    ):
        request = planned.plan("a", "b", away=("x", "y"), count=count)
        assert (request.selected, request.away) == (selected, away)


def test_where_all_are_away_the_learner_is_not_asked() -> None:
    class Unasked(VoteLearner):
        def compute_coordination(self, request: Request) -> Coordination:
            raise AssertionError

    request = Planned(Unasked()).plan(away=("x", "y"), count=1)
    assert (request.selected, request.away, request.policy) == ((), ("x",), POLICY)


def test_a_quorum_over_those_who_are_asked_at_most_is_refused_for_good() -> None:
    with pytest.raises(CallFailed, match="quorum: 3 is over the 2 that are asked at most") as caught:
        Planned().plan("a", "b", "c", count=2, quorum=3)
    assert (caught.value.reason, caught.value.retry) == ("bad-request", False)


def test_a_quorum_over_those_who_are_there_may_be_met_later() -> None:
    planned = Planned()
    rejected = only(RejectRequest, planned.book.handle(planned.plan("a", quorum=2), 0.0))
    assert rejected == RejectRequest(5, "bad-request", "quorum: 2 is over the 1 selected", True)
    wrong = only(RejectRequest, planned.book.handle(planned.plan("a", grace_s=11.0), 0.0))
    assert (wrong.reason, wrong.retry) == ("bad-request", False)

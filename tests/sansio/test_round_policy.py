"""What a round's policy comes to for a number of agents, and what of it contradicts itself."""

import math

import pytest

from quorate_coordinator.rounds.policy import ATTEMPTS_MAX, NobodySelected, PolicyConflict, ResolvedPolicy, RoundPolicy
from quorate_protocol.errors import LocalError


@pytest.mark.parametrize(
    ("fraction", "selected", "quorum"),
    [
        (0.5, 6, 3),
        (0.5, 7, 4),
        (1.0, 6, 6),
        (0.01, 6, 1),
        (1e-12, 3, 1),
        # In binary these products are a hair over the whole number that they are.
        (0.1, 30, 3),
        (0.1 + 0.2, 10, 3),
        (0.07, 100, 7),
        # And these a hair under.
        (1 / 3, 3, 1),
        (2 / 3, 3, 2),
        (2 / 3, 4, 3),
        (0.5, 16_383, 8192),
    ],
)
def test_a_fraction_is_rounded_up(fraction: float, selected: int, quorum: int) -> None:
    policy = RoundPolicy(deadline_s=2.0, grace_s=None, quorum_fraction=fraction)
    assert policy.resolve(selected) == ResolvedPolicy(quorum, None, 2.0)


@pytest.mark.parametrize("selected", [1, 2, 3, 10, 1000])
def test_a_whole_fraction_is_everybody_and_never_more(selected: int) -> None:
    assert RoundPolicy(deadline_s=1.0, grace_s=0.0, quorum_fraction=1.0).resolve(selected).quorum == selected


def test_a_count_stands_as_it_is() -> None:
    assert RoundPolicy(deadline_s=2.0, grace_s=2.0, quorum=3).resolve(3) == ResolvedPolicy(3, 2.0, 2.0)


@pytest.mark.parametrize(
    ("policy", "selected", "field", "words"),
    [
        (RoundPolicy(2.0, 0.5, quorum=4), 3, "quorum", "4 is over the 3 selected"),
        (RoundPolicy(2.0, 0.5, quorum=0), 3, "quorum", "0 is less than one reply"),
        (RoundPolicy(2.0, 0.5, quorum=2, quorum_fraction=0.5), 3, "quorum", "both"),
        (RoundPolicy(2.0, 0.5), 3, "quorum", "neither"),
        (RoundPolicy(2.0, 0.5, quorum_fraction=0.0), 3, "quorum_fraction", "0 is not over 0"),
        (RoundPolicy(2.0, 0.5, quorum_fraction=1.5), 3, "quorum_fraction", "1.5 is not"),
        (RoundPolicy(2.0, 0.5, quorum_fraction=math.nan), 3, "quorum_fraction", "nan is not"),
        (RoundPolicy(2.0, 3.0, quorum=1), 3, "grace_s", "3 s is past the deadline of 2 s"),
        (RoundPolicy(2.0, -1.0, quorum=1), 3, "grace_s", "-1 s is not a time"),
        (RoundPolicy(2.0, math.nan, quorum=1), 3, "grace_s", "nan s is not a time"),
        (RoundPolicy(0.0, None, quorum=1), 3, "deadline_s", "0 s is not a time over 0 and up to a year"),
        (RoundPolicy(31536001.0, None, quorum=1), 3, "deadline_s", "3.1536e+07 s is not"),
        (RoundPolicy(math.inf, None, quorum=1), 3, "deadline_s", "inf s is not"),
        (RoundPolicy(math.nan, None, quorum=1), 3, "deadline_s", "nan s is not"),
        (RoundPolicy(2.0, 0.5, quorum=1, attempts=0), 3, "attempts", "0 is not from 1 to 100"),
        (RoundPolicy(2.0, 0.5, quorum=1, attempts=ATTEMPTS_MAX + 1), 3, "attempts", "101 is not from 1 to 100"),
    ],
)
def test_a_conflict_names_what_conflicts(policy: RoundPolicy, selected: int, field: str, words: str) -> None:
    with pytest.raises(PolicyConflict) as caught:
        policy.resolve(selected)
    assert isinstance(caught.value, LocalError)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("attempts", [1, 2, ATTEMPTS_MAX])
def test_attempts_stand_as_they_are(attempts: int) -> None:
    policy = RoundPolicy(deadline_s=2.0, grace_s=2.0, quorum=3, attempts=attempts)
    assert policy.resolve(3) == ResolvedPolicy(3, 2.0, 2.0, attempts)


def test_nobody_is_asked_twice_where_nothing_is_said() -> None:
    assert RoundPolicy(deadline_s=2.0, grace_s=2.0, quorum=3).resolve(3).attempts == 1


def test_nobody_selected_is_a_conflict_of_its_own() -> None:
    with pytest.raises(NobodySelected) as caught:
        RoundPolicy(2.0, 0.5, quorum=1).resolve(0)
    assert caught.value.field == "selected"


DEFAULT = RoundPolicy(deadline_s=10.0, grace_s=0.5, quorum_fraction=0.5)


def test_what_a_request_does_not_state_is_the_default() -> None:
    assert DEFAULT.override() == DEFAULT
    assert DEFAULT.override(grace_s=0.0) == RoundPolicy(10.0, 0.0, quorum_fraction=0.5)
    assert DEFAULT.override(attempts=3) == RoundPolicy(10.0, 0.5, quorum_fraction=0.5, attempts=3)
    assert DEFAULT.override(attempts=3).override(quorum=1).attempts == 3


def test_a_quorum_replaces_the_default_in_its_other_form() -> None:
    assert DEFAULT.override(quorum=2) == RoundPolicy(10.0, 0.5, quorum=2)
    assert RoundPolicy(10.0, 0.5, quorum=2).override(quorum_fraction=0.9) == RoundPolicy(10.0, 0.5, quorum_fraction=0.9)


def test_a_default_grace_yields_to_a_shorter_deadline_but_a_stated_one_conflicts() -> None:
    assert DEFAULT.override(deadline_s=0.2).grace_s == 0.2
    assert DEFAULT.override(deadline_s=0.2).resolve(3).grace_s == 0.2
    with pytest.raises(PolicyConflict, match="grace_s"):
        DEFAULT.override(deadline_s=0.2, grace_s=0.3).resolve(3)

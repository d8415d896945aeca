"""Waiting between attempts to connect."""

import random

import pytest

from quorate_agent.backoff import BASE_S, MAX_S, STABLE_SESSION_S, Backoff, compute_delay_s


class HighestRandom(random.Random):
    """Always draws the upper end."""

    def uniform(self, a: float, b: float) -> float:
        assert a == 0.0
        return b


def test_the_ceiling_doubles_up_to_a_maximum() -> None:
    ceilings = [compute_delay_s(n, HighestRandom(), base_s=0.25, max_s=5.0) for n in range(1, 9)]
    assert ceilings == [0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0]


@pytest.mark.parametrize("failures", [100, 5_000, 10**9])
def test_years_of_failures_do_not_overflow(failures: int) -> None:
    assert compute_delay_s(failures, HighestRandom()) == MAX_S


def test_the_jitter_is_full() -> None:
    rng = random.Random(5)
    drawn = [compute_delay_s(3, rng, base_s=1.0, max_s=60.0) for _ in range(2000)]
    assert min(drawn) < 0.05
    assert max(drawn) > 3.95
    assert 1.85 < sum(drawn) / len(drawn) < 2.15


def test_the_same_seed_waits_the_same() -> None:
    first, second = (Backoff(random.Random(3)) for _ in range(2))
    assert [first.fail() for _ in range(10)] == [second.fail() for _ in range(10)]


def test_a_session_that_lived_begins_anew_and_a_short_one_does_not() -> None:
    backoff = Backoff(HighestRandom())
    for _ in range(4):
        backoff.fail()
    assert backoff.end_session(STABLE_SESSION_S - 0.1) == pytest.approx(BASE_S * 16)
    assert backoff.end_session(STABLE_SESSION_S) == BASE_S
    assert backoff.failures == 1


def test_a_session_that_waits_for_its_link_is_tried_for_at_once_but_not_again_and_again() -> None:
    backoff = Backoff(HighestRandom())
    assert backoff.end_session(1.0, at_once=True) == 0.0
    assert backoff.fail() == 2 * BASE_S
    assert backoff.end_session(1.0, at_once=True) == 4 * BASE_S, "the link before lived too shortly"
    assert backoff.end_session(STABLE_SESSION_S, at_once=True) == 0.0

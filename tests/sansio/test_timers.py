"""Timers: order, moving, dropping, and that what is stale does not pile up."""

import random

from quorate_coordinator.timers import Timers


def test_the_earliest_is_next_and_equal_moments_go_by_key() -> None:
    timers: Timers[int] = Timers()
    assert timers.next_at() is None
    for key, due_at in ((3, 2.0), (1, 2.0), (2, 1.0), (4, 9.0)):
        timers.set(key, due_at)
    assert timers.next_at() == 1.0
    assert timers.due(2.0) == [2, 1, 3]
    assert timers.pop_due(2.0) == [2, 1, 3]
    assert timers.next_at() == 9.0
    assert timers.pop_due(8.9) == []
    assert len(timers) == 1


def test_a_moved_timer_fires_once_and_where_it_was_moved_to() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", 1.0)
    timers.set("a", 5.0)
    assert timers.pop_due(4.0) == []
    timers.set("a", 2.0)
    timers.set("a", 5.0)
    timers.set("a", 2.0)
    assert timers.due(10.0) == ["a"]
    assert timers.pop_due(10.0) == ["a"]
    assert timers.pop_due(10.0) == []
    assert timers.next_at() is None


def test_a_dropped_timer_does_not_fire() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", 1.0)
    timers.set("b", 2.0)
    timers.drop("a")
    timers.drop("a")
    timers.drop("nobody")
    assert timers.next_at() == 2.0
    assert timers.due(3.0) == ["b"]


def test_rounds_that_end_early_leave_no_pile() -> None:
    timers: Timers[int] = Timers()
    for key in range(10_000):
        timers.set(key, 3600.0 + key)
        timers.drop(key)
        assert timers.heap_entries <= 2 * len(timers) + 64
    for step in range(10_000):
        timers.set(1, float(step))
        assert timers.heap_entries <= 2 * len(timers) + 64


def test_as_a_plain_dict_would() -> None:
    rng = random.Random(20_260_101)
    timers: Timers[int] = Timers()
    plain: dict[int, float] = {}
    for _ in range(5000):
        key, moment = rng.randrange(40), float(rng.randrange(100))
        match rng.randrange(4):
            case 0 | 1:
                timers.set(key, moment)
                plain[key] = moment
            case 2:
                timers.drop(key)
                plain.pop(key, None)
            case _:
                now = moment / 4
                expected = sorted((due_at, k) for k, due_at in plain.items() if due_at <= now)
                assert timers.due(now) == [k for _, k in expected]
                assert timers.pop_due(now) == [k for _, k in expected]
                for _, k in expected:
                    del plain[k]
        assert timers.next_at() == min(plain.values(), default=None)
        assert len(timers) == len(plain)

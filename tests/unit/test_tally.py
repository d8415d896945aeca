"""Prequential counts and quantiles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorate_coordinator.feeding import tally as tally_module
from quorate_coordinator.feeding.report import _summary
from quorate_coordinator.feeding.tally import Tally, quantile
from quorate_protocol.messages import AgentResult, Outcome, Revealed


def result(agent: str, status: str = "replied", **keys: object) -> AgentResult:
    return AgentResult.model_validate({"agent": agent, "status": status, **keys})


def outcome(round_id: int, *results: AgentResult, state: str = "complete") -> Outcome:
    return Outcome.model_validate(
        {
            "round": round_id,
            "task": "t",
            "state": state,
            "quorum": 1,
            "results": [one.model_dump() for one in results],
            "duration_s": 0.01,
        }
    )


def revealed(round_id: int, correct: bool | None, right: dict[str, bool], weights: dict[str, float]) -> Revealed:
    return Revealed(round=round_id, correct=correct, right=right, weights=weights)


def test_nothing_is_none_and_not_zero() -> None:
    tally = Tally()
    assert tally.accuracy is None
    assert tally.as_json(0.0) == {
        "instances": 0,
        "ensemble": {"accuracy": None},
        "agents": {},
        "rounds_per_s": None,
        "round_p50_ms": None,
        "round_p99_ms": None,
        "overhead_p50_ms": None,
    }
    assert _summary(tally, 0.0) == "0 rounds in 0.0 s"


def test_agents_and_ensemble_are_counted_apart() -> None:
    tally = Tally()
    tally.add_outcome(outcome(1, result("a", latency_s=0.002, weight=0.5), result("b", latency_s=0.004)), 0.010)
    tally.add_truth(revealed(1, True, {"a": True, "b": False}, {"a": 0.75, "b": 0.25}))
    tally.add_outcome(outcome(2, result("a", latency_s=0.006), result("b", "declined", error="no")), 0.020)
    tally.add_truth(revealed(2, False, {"a": False}, {"a": 0.6}))
    assert (tally.instances, tally.scored, tally.right, tally.accuracy, tally.answered) == (2, 2, 1, 0.5, 2)
    a, b = tally.agents["a"], tally.agents["b"]
    assert (a.asked, a.replies, a.scored, a.right, a.accuracy, a.weight) == (2, 2, 2, 1, 0.5, 0.6)
    assert (b.asked, b.replies, b.scored, b.right, b.accuracy, b.weight) == (2, 1, 1, 0, 0.0, 0.25)
    assert b.others == {"declined": 1}
    assert tally.as_json(2.0) == {
        "instances": 2,
        "ensemble": {"accuracy": 0.5},
        "agents": {
            "a": {"accuracy": 0.5, "weight": 0.6, "replies": 2, "latency_p50_ms": 2.0, "latency_p99_ms": 6.0},
            "b": {"accuracy": 0.0, "weight": 0.25, "replies": 1, "latency_p50_ms": 4.0, "latency_p99_ms": 4.0},
        },
        "rounds_per_s": 1.0,
        "round_p50_ms": 10.0,
        "round_p99_ms": 20.0,
        "overhead_p50_ms": 10.0,
    }


def test_an_instance_without_an_answer_counts_as_wrong() -> None:
    tally = Tally()
    tally.add_outcome(outcome(1, result("a", "failed", error="x"), state="failed"), 0.01)
    tally.add_truth(revealed(1, None, {}, {}))
    assert (tally.accuracy, tally.states, tally.answered) == (0.0, {"failed": 1}, 0)
    assert tally.agents["a"].accuracy is None
    assert _summary(tally, 1.0) == "1 rounds in 1.0 s · 1.0 rounds/s · coordination overhead p50 10.00 ms · " + (
        "without an answer: 1 failed, counted as wrong"
    )


def test_overhead_is_the_round_less_the_slowest_agent() -> None:
    tally = Tally()
    slow = result("slow", compute_s=0.003, waited_s=0.004)
    tally.add_outcome(outcome(1, result("quick", compute_s=0.005), slow), 0.010)
    tally.add_outcome(outcome(2, slow), 0.005)  # clocks differ a little: never below 0
    assert list(tally.overheads_s) == pytest.approx([0.003, 0.0])


def test_times_are_bounded_and_counts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tally_module.TIMES_MAX >= 58_000  # the largest of the demo's data sets
    monkeypatch.setattr(tally_module, "TIMES_MAX", 3)
    tally = Tally()
    for number in range(1, 11):
        tally.add_outcome(outcome(number, result("a", latency_s=float(number))), float(number))
    assert tally.instances == tally.agents["a"].replies == 10
    assert list(tally.rounds_s) == list(tally.agents["a"].latencies_s) == [8.0, 9.0, 10.0]
    assert len(tally.overheads_s) == 3


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([], 0.5, None),
        ([7.0], 0.0, 7.0),
        ([7.0], 1.0, 7.0),
        ([1.0, 2.0], 0.5, 1.0),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([1.0, 2.0, 3.0, 4.0], 0.75, 3.0),
        ([float(n) for n in range(1, 101)], 0.99, 99.0),
        ([float(n) for n in range(1, 1001)], 0.99, 990.0),
    ],
)
def test_quantiles_are_values_that_were_there(values: list[float], q: float, expected: float | None) -> None:
    assert quantile(values, q) == expected


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_quantile_is_the_smallest_value_that_enough_do_not_exceed(values: list[float], q: float) -> None:
    found = quantile(values, q)
    assert found in values
    need = q * len(values) - 1e-9
    assert sum(value <= found for value in values) >= need
    assert sum(value < found for value in values) < need + 1 - 1e-12 or found == min(values)

"""The vote: who wins, what is learned, what is forgotten, and that a restored learner goes on bit for bit."""

import copy
import itertools
import math
import random
from typing import Any

import msgpack
import pytest

from quorate_coordinator.learner.api import (
    AgentReply,
    ClosedRound,
    Experience,
    LateReply,
    Learner,
    Report,
    Request,
    SnapshotInvalid,
)
from quorate_coordinator.learner.vote import VoteLearner
from quorate_protocol.bodies import encode_body
from quorate_protocol.errors import FrameMalformed

GARBAGE = b"\xc1"
_rounds = itertools.count(1)


def closed(answers: dict[str, Any], *, task: str = "classify", answer: bytes | None = None) -> ClosedRound:
    """A round in which agents answered values; bytes stand for a body as it came."""
    bodies = {agent: value if isinstance(value, bytes) else encode_body(value) for agent, value in answers.items()}
    replies = tuple(AgentReply(agent, body, 0.001) for agent, body in bodies.items())
    return ClosedRound(next(_rounds), task, replies, answer)


def teach(
    learner: VoteLearner, answers: dict[str, Any], truth: Any, *, times: int = 1, task: str = "classify"
) -> Report:
    """Combines and learns a round, again and again."""
    for _ in range(times):
        outcome = closed(answers, task=task)
        answer = learner.combine(outcome).body
        report = learner.learn(ClosedRound(outcome.round, task, outcome.replies, answer), encode_body(truth))
    return report


def history(seed: int, rounds: int) -> list[tuple[ClosedRound, bytes | None]]:
    """Rounds of agents that come and go, some with a truth."""
    random_ = random.Random(seed)
    agents = [f"agent-{n}" for n in range(9)]
    made = []
    for number in range(1, rounds + 1):
        present = random_.sample(agents, random_.randint(0, len(agents)))
        bodies = {
            agent: random_.choice([encode_body(random_.choice("abc")), encode_body(1), GARBAGE]) for agent in present
        }
        replies = tuple(AgentReply(agent, body, random_.random()) for agent, body in bodies.items())
        truth = encode_body(random_.choice("abc")) if random_.random() < 0.8 else None
        made.append((ClosedRound(number, random_.choice(["one", "other"]), replies), truth))
    return made


def play(learner: VoteLearner, rounds: list[tuple[ClosedRound, bytes | None]]) -> list[object]:
    """Everything that a learner says to rounds and truths."""
    said: list[object] = []
    for outcome, truth in rounds:
        answer = learner.combine(outcome)
        said.append(answer)
        if truth is not None:
            outcome = ClosedRound(outcome.round, outcome.task, outcome.replies, answer.body)
            said.append(learner.learn(outcome, truth))
    return said


class TestCombine:
    def test_majority_of_strangers(self) -> None:
        answer = VoteLearner().combine(closed({"a": "x", "b": "y", "c": "x"}))
        assert answer.body == encode_body("x")
        assert answer.support == pytest.approx(2 / 3)
        assert answer.weights == pytest.approx({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})

    def test_weight_beats_number(self) -> None:
        learner = VoteLearner()
        teach(learner, {"a": "x", "b": "y", "c": "y"}, "x", times=50)
        answer = learner.combine(closed({"a": "x", "b": "y", "c": "y"}))
        assert answer.body == encode_body("x")
        assert answer.support == pytest.approx(answer.weights["a"])

    def test_no_replies_no_answer(self) -> None:
        answer = VoteLearner().combine(closed({}))
        assert (answer.body, answer.support, answer.weights) == (None, None, {})

    def test_only_garbage_no_answer(self) -> None:
        answer = VoteLearner().combine(closed({"a": GARBAGE, "b": b""}))
        assert (answer.body, answer.support) == (None, None)
        assert answer.weights == {"a": 0.5, "b": 0.5}

    def test_garbage_takes_support_away_but_does_not_vote(self) -> None:
        answer = VoteLearner().combine(closed({"a": GARBAGE, "b": GARBAGE, "c": "x"}))
        assert answer.body == encode_body("x")
        assert answer.support == pytest.approx(1 / 3)

    def test_one_number_packed_in_two_ways_is_one_answer(self) -> None:
        answer = VoteLearner().combine(closed({"a": 1, "b": 1.0, "c": True, "d": True, "e": 1}))
        assert answer.support == pytest.approx(3 / 5)
        assert answer.body == encode_body(1)

    def test_the_heaviest_agent_speaks_for_its_answer(self) -> None:
        learner = VoteLearner()
        teach(learner, {"a": "no", "b": 1.0}, 1, times=3)
        assert learner.combine(closed({"a": 1, "b": 1.0})).body == encode_body(1.0)

    def test_lists_maps_and_nan_can_win(self) -> None:
        for value in ([1, [2]], {"k": [1]}, math.nan, None):
            answer = VoteLearner().combine(closed({"a": value, "b": value, "c": "other"}))
            assert answer.body == encode_body(value)
            assert answer.support == pytest.approx(2 / 3)

    def test_a_tie_does_not_depend_on_who_came_first(self) -> None:
        answers = {"a": "x", "b": "y", "c": "z"}
        bodies = {VoteLearner().combine(closed(dict(order))).body for order in itertools.permutations(answers.items())}
        assert bodies == {encode_body("x")}

    def test_weights_are_those_of_the_task(self) -> None:
        learner = VoteLearner()
        teach(learner, {"a": "x", "b": "y"}, "x", times=50, task="one")
        assert learner.combine(closed({"a": "x", "b": "y"}, task="other")).weights == {"a": 0.5, "b": 0.5}

    def test_all_the_candidates_are_asked(self) -> None:
        plan = VoteLearner().compute_coordination(Request("classify", b"", ("b", "a")))
        assert plan.agents == ("a", "b")
        assert (plan.quorum, plan.grace_s, plan.deadline_s) == (None, None, None)


class TestLearn:
    def test_report(self) -> None:
        learner = VoteLearner()
        report = teach(learner, {"b": "y", "a": "x", "c": GARBAGE, "d": 1.0, "e": "x"}, "x")
        assert report.correct is True
        assert report.agents == {"a": True, "b": False, "c": False, "d": False, "e": True}
        assert report.weights == learner.weights("classify")
        assert report.weights["a"] > report.weights["c"] == report.weights["b"]

    def test_the_announced_answer_is_judged_not_a_new_vote(self) -> None:
        learner = VoteLearner()
        outcome = closed({"a": "x", "b": "y", "c": "y"})
        announced = learner.combine(outcome).body
        teach(learner, {"a": "x", "b": "y", "c": "y"}, "x", times=50)
        late = ClosedRound(outcome.round, outcome.task, outcome.replies, announced)
        assert learner.learn(late, encode_body("x")).correct is False

    def test_without_an_answer_there_is_nothing_to_judge(self) -> None:
        learner = VoteLearner()
        assert learner.learn(closed({"a": GARBAGE}), encode_body("x")).correct is None
        assert learner.learn(closed({}), encode_body("x")) == Report()
        assert learner.scores()[0].accuracy is None

    def test_a_part_of_the_replies(self) -> None:
        learner = VoteLearner()
        outcome = closed({"a": "x", "b": "y", "c": "z"})
        answer = learner.combine(outcome).body
        report = learner.learn(ClosedRound(outcome.round, outcome.task, outcome.replies[:2], answer), encode_body("x"))
        assert set(report.agents) == {"a", "b"}
        assert set(learner.weights("classify")) == {"a", "b"}

    def test_who_did_not_reply_neither_wins_nor_loses(self) -> None:
        learner = VoteLearner()
        teach(learner, {"a": "x", "b": "x", "c": "y"}, "x", times=5)
        before = learner.weights("classify")["c"]
        teach(learner, {"a": "x", "b": "y"}, "x", times=20)
        assert learner.weights("classify")["c"] == pytest.approx(before)

    def test_follows_the_best_when_it_changes(self) -> None:
        learner = VoteLearner()
        teach(learner, {"a": "x", "b": "y"}, "x", times=300)
        assert learner.weights("classify")["a"] > 0.9
        teach(learner, {"a": "x", "b": "y"}, "y", times=40)
        assert learner.weights("classify")["b"] > 0.9

    @pytest.mark.parametrize("truth", [GARBAGE, b"", b"\x01\x01"])
    def test_a_truth_that_cannot_be_read_changes_nothing(self, truth: bytes) -> None:
        learner = VoteLearner()
        teach(learner, {"a": "x", "b": "y"}, "x")
        before = learner.snapshot()
        with pytest.raises(FrameMalformed):
            learner.learn(closed({"a": "x", "c": "y"}), truth)
        assert learner.snapshot() == before

    def test_telemetry_changes_nothing(self) -> None:
        learner = VoteLearner()
        before = learner.snapshot()
        assert learner.process_message(Experience("a", "load", GARBAGE)) is None
        assert learner.snapshot() == before


class TestScores:
    def test_accuracies(self) -> None:
        learner = VoteLearner()
        teach(learner, {"a": "x", "b": "x", "c": "y"}, "x", times=3)
        teach(learner, {"a": "x", "b": "x"}, "y")
        (score,) = learner.scores()
        assert (score.task, score.accuracy, score.answers) == ("classify", 0.75, 4)
        assert {agent: (one.accuracy, one.answers) for agent, one in score.agents.items()} == {
            "a": (0.75, 4),
            "b": (0.75, 4),
            "c": (0.0, 3),
        }
        assert {agent: one.weight for agent, one in score.agents.items()} == learner.weights("classify")

    def test_latency_quantiles(self) -> None:
        learner = VoteLearner()
        assert learner.latency("a") is None
        for n in range(101):
            learner.combine(ClosedRound(n + 1, "t", (AgentReply("a", b"\x01", n / 1000),)))
        latency = learner.latency("a")
        assert latency is not None
        assert latency.p50_s == pytest.approx(0.050)
        assert latency.p99_s == pytest.approx(0.099)

    def test_latency_follows_the_newest(self) -> None:
        learner = VoteLearner()
        for n in range(400):
            learner.combine(ClosedRound(n + 1, "t", (AgentReply("a", b"\x01", 9.0 if n < 200 else 1.0),)))
        latency = learner.latency("a")
        assert latency is not None
        assert (latency.p50_s, latency.p99_s) == (1.0, 1.0)

    def test_late_replies_move_the_quantiles_and_nothing_else(self) -> None:
        learner = VoteLearner(agents_max=2)
        teach(learner, {"a": "yes", "b": "no"}, "yes")
        before = learner.scores()
        for number in range(3):
            learner.take_late(LateReply(number, "classify", AgentReply("a", GARBAGE, 5.0)))
        latency = learner.latency("a")
        assert latency is not None
        assert (latency.p50_s, latency.p99_s) == (5.0, 5.0)
        assert learner.scores() == before
        assert VoteLearner.restore(learner.snapshot()).latency("a") == latency
        # One more agent than there is room for: who was heard least recently goes.
        learner.take_late(LateReply(9, "classify", AgentReply("c", GARBAGE, 1.0)))
        assert (learner.latency("b"), learner.latency("a")) == (None, latency)

    def test_unknown_task(self) -> None:
        assert VoteLearner().weights("never asked") == {}
        assert VoteLearner().scores() == ()


class TestSelection:
    """Whom a round asks."""

    def select(self, learner: VoteLearner, count: int | None, load: dict[str, int] | None = None) -> tuple[str, ...]:
        request = Request("classify", encode_body(1), ("a", "b", "c", "d"), count, load or {})
        before = learner.snapshot()
        plan = learner.compute_coordination(request)
        assert (plan.quorum, plan.grace_s, plan.deadline_s) == (None, None, None)
        assert learner.snapshot() == before
        return plan.agents

    def test_all_where_no_number_is_given_or_it_is_large(self) -> None:
        for count in (None, 4, 99):
            assert self.select(VoteLearner(), count) == ("a", "b", "c", "d")

    def test_the_heaviest_first(self) -> None:
        learner = VoteLearner()
        teach(learner, {"a": "no", "b": "no", "c": "yes", "d": "yes"}, "yes", times=3)
        teach(learner, {"c": "no", "d": "yes"}, "yes")
        assert self.select(learner, 1) == ("d",)
        # Sorted by name, and the weight goes over the load.
        assert self.select(learner, 2, {"c": 50, "d": 50}) == ("c", "d")
        assert self.select(learner, 3) == ("a", "c", "d")

    def test_among_equals_who_owes_least_then_by_name(self) -> None:
        assert self.select(VoteLearner(), 2) == ("a", "b")
        assert self.select(VoteLearner(), 2, {"a": 2, "b": 1, "c": 1}) == ("b", "d")

    def test_a_stranger_weighs_as_a_newcomer(self) -> None:
        learner = VoteLearner()
        teach(learner, {"a": "no", "b": "yes"}, "yes", times=5)
        assert self.select(learner, 3) == ("b", "c", "d")


class TestGeneric:
    """What every learner must hold, whatever it learns."""

    def test_is_a_learner(self) -> None:
        learner: Learner = VoteLearner()
        assert learner.scores() == ()

    def test_inputs_are_unmutated(self) -> None:
        rounds = history(seed=1, rounds=50)
        before = copy.deepcopy(rounds)
        play(VoteLearner(), rounds)
        assert rounds == before

    def test_arrival_order_does_not_matter(self) -> None:
        rounds = history(seed=2, rounds=200)
        shuffled = random.Random(7)
        other = [
            (ClosedRound(o.round, o.task, tuple(shuffled.sample(o.replies, len(o.replies)))), truth)
            for o, truth in rounds
        ]
        one_learner, other_learner = VoteLearner(), VoteLearner()
        assert play(one_learner, rounds) == play(other_learner, other)
        assert one_learner.snapshot() == other_learner.snapshot()

    @pytest.mark.parametrize("cut", [0, 1, 100, 299])
    def test_a_restored_learner_goes_on_bit_for_bit(self, cut: int) -> None:
        rounds = history(seed=3, rounds=300)
        uninterrupted = VoteLearner(learning_rate=0.3, share=0.02)
        play(uninterrupted, rounds[:cut])
        restored = VoteLearner.restore(uninterrupted.snapshot())
        assert restored.snapshot() == uninterrupted.snapshot()
        assert play(restored, rounds[cut:]) == play(uninterrupted, rounds[cut:])
        assert restored.snapshot() == uninterrupted.snapshot()
        assert restored.scores() == uninterrupted.scores()
        for agent in uninterrupted.weights("one"):
            assert restored.latency(agent) == uninterrupted.latency(agent)

    def test_a_snapshot_is_not_alive(self) -> None:
        learner = VoteLearner()
        play(learner, history(seed=4, rounds=20))
        snapshot = learner.snapshot()
        restored = VoteLearner.restore(snapshot)
        play(restored, history(seed=5, rounds=20))
        assert learner.snapshot() == snapshot

    def test_agents_appear_and_vanish(self) -> None:
        learner = VoteLearner()
        teach(learner, {"a": "x", "b": "y"}, "x", times=20)
        teach(learner, {"c": "x", "d": "y"}, "x", times=20)
        weights = learner.weights("classify")
        assert math.fsum(weights.values()) == pytest.approx(1)
        assert weights["c"] == pytest.approx(weights["a"])
        teach(learner, {"a": "y", "c": "x"}, "x", times=30)
        assert learner.weights("classify")["c"] > learner.weights("classify")["a"]


class TestRestore:
    def test_other_settings_over_the_saved(self) -> None:
        learner = VoteLearner(learning_rate=0.3, share=0.02)
        teach(learner, {"a": "x", "b": "y"}, "x", times=10)
        restored = VoteLearner.restore(learner.snapshot(), learning_rate=5.0, share=0.0)
        assert restored.weights("classify") == learner.weights("classify")
        teach(restored, {"a": "x", "b": "y"}, "y", times=2)
        assert restored.weights("classify")["b"] > 0.99

    def test_under_a_lower_ceiling_the_oldest_are_forgotten(self) -> None:
        learner = VoteLearner()
        for agent in "abcd":
            teach(learner, {agent: "x"}, "x")
        restored = VoteLearner.restore(learner.snapshot(), agents_max=1, pairs_max=2)
        assert set(restored.weights("classify")) == {"c", "d"}
        assert restored.latency("c") is None
        assert restored.latency("d") is not None

    def damaged(self) -> list[bytes]:
        learner = VoteLearner()
        teach(learner, {"a": "x", "b": "y"}, "x", times=3)
        good = learner.snapshot()
        state = msgpack.unpackb(good)
        made = [b"", b"\xc1", b"\x01", b"\x80", msgpack.packb([1]), good[:-1], good + b"\x00"]
        changes: list[dict[str, Any]] = [
            {"format": "other"},
            {"version": 2},
            {"learning_rate": -1.0},
            {"share": None},
            {"tasks": []},
            {"tasks": [["classify", [3, 1]]]},
            {"tasks": [*state["tasks"], ["other", [0, 0]]]},
            {"pairs": [["classify", "a", [1, 1], math.nan]]},
            {"pairs": [["classify", "a", [1], "heavy"]]},
            {"latencies": [["a", [math.nan]]]},
            {"latencies": 7},
        ]
        made += [msgpack.packb(state | change) for change in changes]
        return [*made, *(msgpack.packb({k: v for k, v in state.items() if k != missing}) for missing in state)]

    def test_damage_is_told(self) -> None:
        for snapshot in self.damaged():
            with pytest.raises(SnapshotInvalid):
                VoteLearner.restore(snapshot)

    def test_a_wrong_setting_is_not_the_snapshots_fault(self) -> None:
        with pytest.raises(ValueError, match="learning rate"):
            VoteLearner.restore(VoteLearner().snapshot(), learning_rate=0.0)


class TestCeilings:
    def test_pairs(self) -> None:
        learner = VoteLearner(pairs_max=4)
        teach(learner, {"a": "x", "b": "y"}, "x", task="first")
        teach(learner, {"a": "x", "b": "y", "c": "x"}, "x", task="second")
        assert set(learner.weights("first")) == {"b"}
        assert set(learner.weights("second")) == {"a", "b", "c"}
        teach(learner, {"d": "x"}, "x", task="second")
        assert [score.task for score in learner.scores()] == ["second"]

    def test_use_keeps_alive(self) -> None:
        learner = VoteLearner(pairs_max=2)
        for _ in range(3):
            teach(learner, {"a": "x"}, "x")
            teach(learner, {f"stranger-{next(_rounds)}": "x"}, "x")
        assert "a" in learner.weights("classify")

    def test_a_round_over_the_ceiling(self) -> None:
        learner = VoteLearner(pairs_max=2)
        report = teach(learner, {"a": "x", "b": "x", "c": "y"}, "x")
        assert set(report.weights) == {"a", "b", "c"}
        assert len(learner.weights("classify")) == 2

    def test_latencies(self) -> None:
        learner = VoteLearner(agents_max=2)
        learner.combine(closed({"a": 1, "b": 1, "c": 1}))
        assert learner.latency("a") is None
        assert learner.latency("c") is not None

    def test_state_does_not_grow_with_rounds(self) -> None:
        learner = VoteLearner(agents_max=16, pairs_max=32)
        sizes = []
        for generation in range(4):
            for n in range(200):
                teach(learner, {f"{generation}-{n}": "x", f"{generation}-{n + 1}": "y"}, "x", task=f"t{n % 7}")
            sizes.append(len(learner.snapshot()))
        assert max(sizes) < 1.2 * min(sizes)

    @pytest.mark.parametrize("ceiling", ["agents_max", "pairs_max"])
    def test_at_least_one(self, ceiling: str) -> None:
        with pytest.raises(ValueError, match="at least one"):
            VoteLearner(**{ceiling: 0})  # type: ignore[arg-type]


class TestTypes:
    @pytest.mark.parametrize("latency_s", [-0.001, math.nan, math.inf])
    def test_impossible_latency(self, latency_s: float) -> None:
        with pytest.raises(ValueError, match="latency of a"):
            AgentReply("a", b"", latency_s)

    def test_two_replies_of_one_agent(self) -> None:
        with pytest.raises(ValueError, match="two replies"):
            ClosedRound(1, "t", (AgentReply("a", b"1", 0.0), AgentReply("a", b"2", 0.0)))

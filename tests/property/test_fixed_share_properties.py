"""Fixed share and the vote on anything: a distribution always, never far behind the best switching sequence."""

import math
import struct
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorate_coordinator.learner.answers import answer_key
from quorate_coordinator.learner.api import AgentReply, ClosedRound
from quorate_coordinator.learner.fixed_share import FixedShare
from quorate_coordinator.learner.vote import VoteLearner
from quorate_protocol.bodies import EXT_NDARRAY, encode_body
from quorate_protocol.errors import FrameMalformed

EXPERTS = "abcdef"
learning_rates = st.floats(1e-3, 1e3)
shares = st.floats(0, 0.999)
losses = st.dictionaries(st.sampled_from(EXPERTS), st.floats(0, 1))
histories = st.lists(losses, max_size=40)


def trained(learning_rate: float, share: float, history: list[dict[str, float]]) -> FixedShare:
    shares = FixedShare(learning_rate, share)
    for one in history:
        shares.update(one)
    return shares


@given(learning_rates, shares, histories)
def test_weights_are_a_distribution(learning_rate: float, share: float, history: list[dict[str, float]]) -> None:
    one = trained(learning_rate, share, history)
    weights = one.weights()
    assert set(weights) == {expert for losses in history for expert in losses}
    assert list(weights) == sorted(weights)
    assert all(0 < weight <= 1 for weight in weights.values())
    assert not weights or math.fsum(weights.values()) == pytest.approx(1, abs=1e-12)
    everybody = one.weights_of(EXPERTS)
    assert math.fsum(everybody.values()) == pytest.approx(1, abs=1e-12)
    assert all(weight > 0 for weight in everybody.values())


@given(learning_rates, shares, histories, st.randoms(use_true_random=False))
def test_the_order_of_experts_does_not_matter(
    learning_rate: float, share: float, history: list[dict[str, float]], random: Any
) -> None:
    shuffled = [dict(random.sample(list(losses.items()), len(losses))) for losses in history]
    assert trained(learning_rate, share, history).weights() == trained(learning_rate, share, shuffled).weights()


@given(learning_rates, shares, histories, histories)
def test_raw_weights_continue_bit_for_bit(
    learning_rate: float, share: float, before: list[dict[str, float]], after: list[dict[str, float]]
) -> None:
    one = trained(learning_rate, share, before)
    other = FixedShare(learning_rate, share, one.raw_weights)
    for losses in after:
        one.update(losses)
        other.update(losses)
    assert dict(one.raw_weights) == dict(other.raw_weights)


@given(learning_rates, shares, histories, losses)
def test_sleepers_keep_their_weight_and_the_awake_their_sum(
    learning_rate: float, share: float, history: list[dict[str, float]], last: dict[str, float]
) -> None:
    one = trained(learning_rate, share, history)
    before = dict(one.raw_weights)
    one.update(last)
    after = one.raw_weights
    assert {e: w for e, w in after.items() if e not in last} == {e: w for e, w in before.items() if e not in last}
    if last and set(last) <= set(before):
        awake = math.fsum(before[expert] for expert in last)
        assert math.fsum(after[expert] for expert in last) == pytest.approx(awake, rel=1e-12)


@st.composite
def trials(draw: st.DrawFn) -> list[list[int]]:
    """Which of some experts were wrong (1), trial by trial."""
    experts = draw(st.integers(2, 5))
    return draw(st.lists(st.lists(st.integers(0, 1), min_size=experts, max_size=experts), min_size=1, max_size=60))


def best_with_switches(wrong: list[list[int]]) -> list[int]:
    """For k = 0, 1, ...: fewest mistakes of a sequence of experts that switches k times."""
    experts = range(len(wrong[0]))
    kept = [[float(wrong[0][e]) for e in experts]]
    for row in wrong[1:]:
        grown: list[list[float]] = []
        for k in range(len(kept) + 1):
            stay = kept[k] if k < len(kept) else [math.inf for _ in experts]
            switch = [
                min((kept[k - 1][other] for other in experts if other != e), default=math.inf) if k else math.inf
                for e in experts
            ]
            grown.append([min(stay[e], switch[e]) + row[e] for e in experts])
        kept = grown
    return [int(min(row)) for row in kept if min(row) < math.inf]


def cost_of_switches(experts: int, times: int, switches: int, share: float) -> float:
    """-ln of the prior weight that fixed share gives to a sequence with that many switches."""
    stays = times - 1 - switches
    return math.log(experts) + switches * math.log((experts - 1) / share) - stays * math.log(1 - share)


@given(trials(), st.floats(0.05, 3), st.floats(0.001, 0.3))
def test_never_far_behind_the_best_switching_sequence(
    wrong: list[list[int]], learning_rate: float, share: float
) -> None:
    # Herbster and Warmuth 1998, section 4: for every sequence of experts, the mix loss is at most the
    # sequence's loss plus the cost of its switches over the learning rate. A weighted vote errs only
    # while half the weight is wrong, which costs the mix at least ln(2 / (1 + exp(-learning_rate))).
    names = [f"expert-{n}" for n in range(len(wrong[0]))]
    shares = FixedShare(learning_rate, share)
    mix_loss = 0.0
    mistakes = 0
    for row in wrong:
        weights = shares.weights_of(names)
        heavy_wrong = math.fsum(weight for weight, is_wrong in zip(weights.values(), row, strict=True) if is_wrong)
        mistakes += heavy_wrong > 0.5
        mix_loss -= math.log(1 - heavy_wrong * (1 - math.exp(-learning_rate)))
        shares.update(dict(zip(names, map(float, row), strict=True)))
    for switches, loss in enumerate(best_with_switches(wrong)):
        bound = learning_rate * loss + cost_of_switches(len(names), len(wrong), switches, share)
        assert mix_loss <= bound + 1e-6
        assert mistakes * math.log(2 / (1 + math.exp(-learning_rate))) <= bound + 1e-6


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)
arrays = st.builds(
    lambda dtype, items, raw: msgpack.packb(
        msgpack.ExtType(EXT_NDARRAY, msgpack.packb([dtype, [items], (raw * 64)[: items * int(dtype[2:3])]]))
    ),
    st.sampled_from(["<f8", ">f4", "<f2", "<i8", ">u8", "|u1", "|b1", "<c8", "<m8[s]", "<M8[us]", "|S4", "<U1"]),
    st.integers(0, 6),
    st.binary(min_size=1, max_size=16),
)
bodies = st.binary(max_size=40) | values.map(encode_body) | arrays


@given(bodies)
def test_any_body_has_a_key_or_is_malformed(body: bytes) -> None:
    try:
        assert answer_key(body) == answer_key(bytes(body))
    except FrameMalformed:
        pass


@given(st.lists(values, max_size=6))
def test_a_value_has_one_key_however_numbers_are_packed(items: list[Any]) -> None:
    def as_floats(value: Any) -> Any:
        if type(value) is int and abs(value) <= 2**53:
            return float(value)
        if isinstance(value, list):
            return [as_floats(item) for item in value]
        if isinstance(value, dict):
            return {key: as_floats(value[key]) for key in reversed(value)}
        return value

    assert answer_key(encode_body(items)) == answer_key(encode_body(as_floats(items)))


@given(
    st.lists(st.tuples(st.dictionaries(st.sampled_from(EXPERTS), bodies), bodies), max_size=12),
    st.randoms(use_true_random=False),
)
def test_the_vote_takes_anything_in_any_order(rounds: list[tuple[dict[str, bytes], bytes]], random: Any) -> None:
    learners = VoteLearner(), VoteLearner()
    for number, (answers, truth) in enumerate(rounds, 1):
        said = []
        for learner in learners:
            items = random.sample(list(answers.items()), len(answers))
            closed = ClosedRound(number, "task", tuple(AgentReply(agent, body, 0.1) for agent, body in items))
            answer = learner.combine(closed)
            if answer.body is None:
                assert answer.support is None
            else:
                assert answer.body in answers.values()
                assert answer.support is not None
                assert 0 < answer.support <= 1
            try:
                report = learner.learn(ClosedRound(number, "task", closed.replies, answer.body), truth)
            except FrameMalformed:
                report = None
            said.append((answer, report))
        assert said[0] == said[1]
    assert learners[0].snapshot() == learners[1].snapshot() == VoteLearner.restore(learners[0].snapshot()).snapshot()
    weights = learners[0].weights("task")
    assert not weights or math.fsum(weights.values()) == pytest.approx(1, abs=1e-12)


def test_bodies_of_the_same_number_in_every_width() -> None:
    packed = [b"\x07", b"\xcc\x07", b"\xcd\x00\x07", b"\xd0\x07", b"\xca" + struct.pack(">f", 7)]
    assert len({answer_key(body) for body in packed}) == 1

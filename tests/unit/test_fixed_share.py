"""Fixed share: who gains, who loses, who sleeps, and that no weight is ever lost."""

import math

import pytest

from quorate_coordinator.learner.fixed_share import FixedShare

RIGHT, WRONG = 0.0, 1.0


def train(shares: FixedShare, losses: dict[str, float], times: int) -> FixedShare:
    for _ in range(times):
        shares.update(losses)
    return shares


class TestUpdate:
    def test_one_step_by_hand(self) -> None:
        # Herbster and Warmuth 1998, Figure 1: the loss update, then the share update, of three equal experts.
        shares = FixedShare(learning_rate=math.log(2), share=0.1)
        shares.update({"a": RIGHT, "b": WRONG, "c": 0.5})
        after_loss = [1.0, 0.5, 0.5**0.5]
        total = sum(after_loss)
        v = [weight / total for weight in after_loss]
        expected = [0.9 * one + 0.1 / 2 * (1 - one) for one in v]
        assert list(shares.weights().values()) == pytest.approx(expected, rel=1e-14)

    def test_the_best_takes_over_and_is_overtaken(self) -> None:
        shares = train(FixedShare(), {"a": RIGHT, "b": WRONG}, 300)
        assert shares.weights()["a"] > 0.9
        train(shares, {"a": WRONG, "b": RIGHT}, 40)
        assert shares.weights()["b"] > 0.9

    def test_without_a_share_the_past_weighs_for_ever(self) -> None:
        shares = train(FixedShare(share=0), {"a": RIGHT, "b": WRONG}, 100)
        train(shares, {"a": WRONG, "b": RIGHT}, 90)
        assert shares.weights()["a"] > 0.5

    @pytest.mark.parametrize("share", [0.0, 1e-9, 0.005])
    @pytest.mark.parametrize("learning_rate", [0.2, 50.0, 1e6])
    def test_no_weight_falls_to_nothing(self, learning_rate: float, share: float) -> None:
        shares = train(FixedShare(learning_rate, share), {"a": RIGHT, "b": WRONG, "c": WRONG}, 5_000)
        weights = shares.weights()
        assert all(weight > 0 for weight in weights.values())
        assert math.fsum(weights.values()) == pytest.approx(1, abs=1e-12)
        train(shares, {"a": WRONG, "b": RIGHT, "c": WRONG}, 200)
        assert max(shares.weights(), key=shares.weights().__getitem__) == "b"

    def test_when_all_are_wrong_nobody_loses(self) -> None:
        shares = FixedShare(learning_rate=1e6)
        shares.update({"a": WRONG, "b": WRONG})
        assert shares.weights() == {"a": 0.5, "b": 0.5}

    def test_nothing_learned_from_nobody(self) -> None:
        shares = FixedShare()
        shares.update({})
        assert len(shares) == 0
        assert shares.weights() == {}

    @pytest.mark.parametrize("loss", [-0.1, 1.1, math.nan, math.inf])
    def test_wrong_loss_changes_nothing(self, loss: float) -> None:
        shares = FixedShare(weights={"a": 1.0, "b": 3.0})
        with pytest.raises(ValueError, match="loss of b"):
            shares.update({"a": 0.0, "b": loss})
        assert shares.weights() == {"a": 0.25, "b": 0.75}

    def test_losses_are_not_changed(self) -> None:
        losses = {"b": WRONG, "a": RIGHT}
        FixedShare().update(losses)
        assert list(losses.items()) == [("b", WRONG), ("a", RIGHT)]


class TestComingAndGoing:
    def test_sleepers_keep_their_weight(self) -> None:
        shares = train(FixedShare(), {"a": RIGHT, "b": WRONG, "c": RIGHT, "d": WRONG}, 10)
        before = shares.raw_weights["c"], shares.raw_weights["d"]
        train(shares, {"a": WRONG, "b": RIGHT}, 50)
        assert (shares.raw_weights["c"], shares.raw_weights["d"]) == before
        assert shares.weights()["c"] == pytest.approx(before[0] / 4, rel=1e-12)

    def test_awake_alone_one_neither_wins_nor_loses(self) -> None:
        shares = FixedShare(weights={"a": 1.0, "b": 1.0})
        train(shares, {"a": WRONG}, 100)
        assert shares.weights() == pytest.approx({"a": 0.5, "b": 0.5})

    def test_a_newcomer_has_the_mean_weight(self) -> None:
        shares = train(FixedShare(), {"a": RIGHT, "b": WRONG}, 100)
        assert shares.weights_of(["c"]) == {"c": pytest.approx(1 / 3)}
        assert "c" not in shares
        shares.update({"c": RIGHT})
        assert shares.weights()["c"] == pytest.approx(1 / 3)

    def test_newcomers_are_alike(self) -> None:
        weights = FixedShare(weights={"a": 5.0}).weights_of(["c", "a", "b"])
        assert list(weights) == ["a", "b", "c"]
        assert list(weights.values()) == pytest.approx([1 / 3] * 3)

    def test_the_forgotten_leave_the_relations_of_the_rest(self) -> None:
        shares = FixedShare(weights={"a": 1.0, "b": 3.0, "c": 6.0})
        shares.forget(["c", "never seen"])
        assert shares.weights() == {"a": 0.25, "b": 0.75}
        shares.forget(["a", "b"])
        assert len(shares) == 0
        assert shares.weights_of(["a"]) == {"a": 1.0}

    def test_losing_the_heaviest_again_and_again_does_not_underflow(self) -> None:
        shares = FixedShare(learning_rate=100.0, share=0)
        for generation in range(200):
            train(shares, {"heavy": RIGHT, "light": WRONG, f"other{generation}": WRONG}, 30)
            shares.forget(["heavy", f"other{generation}"])
        assert shares.weights() == {"light": 1.0}
        assert shares.raw_weights["light"] == pytest.approx(1)


class TestBounds:
    @pytest.mark.parametrize("learning_rate", [0.0, -1.0, math.nan, math.inf])
    def test_learning_rate(self, learning_rate: float) -> None:
        with pytest.raises(ValueError, match="learning rate"):
            FixedShare(learning_rate)

    @pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
    def test_share(self, share: float) -> None:
        with pytest.raises(ValueError, match="share"):
            FixedShare(0.2, share)

    @pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
    def test_weights(self, weight: float) -> None:
        with pytest.raises(ValueError, match="weight of a"):
            FixedShare(weights={"a": weight})

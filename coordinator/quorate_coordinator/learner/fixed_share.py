"""Fixed share: the weighted vote that follows the best expert, also when the best one changes.

Source: M. Herbster, M. K. Warmuth, "Tracking the Best Expert", Machine Learning 32 (1998), 151–178,
doi:10.1023/A:1007424614876. After each truth an expert's weight is multiplied by
exp(-learning_rate · loss); then each gives the part `share` of its weight away, in equal parts to the
others. Who was wrong for long comes back after a few good rounds, because it never falls to nothing.

Experts may appear, vanish, and sleep through rounds. Those that sleep keep their weight: losses and
shares move weight only between those awake, whose weight in all stays what it was (Freund, Schapire,
Singer, Warmuth, "Using and Combining Predictors that Specialize", STOC 1997,
doi:10.1145/258533.258616). One who appears gets the mean weight.

Nothing depends on the order of experts in a mapping: sums are correctly rounded (`math.fsum`).
"""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

#: Default learning rate, for losses from 0 to 1. With `SHARE` it was found on four of River's data sets
#: with six models, one pair for all; from 0.1 to 0.5 the accuracies stay within 0.01.
LEARNING_RATE: Final = 0.2

#: Default share: the best expert is expected to change about every 200 truths. From 0.001 to 0.01 the
#: accuracies stay within 0.01.
SHARE: Final = 0.005

#: Least weight, as a part of the mean weight of those awake. Without a share, or with a tiny one, a
#: weight would fall to 0, from where no factor brings it back. It is far below what decides a vote.
_WEIGHT_MIN: Final = 1e-12


class FixedShare:
    """Weights of named experts.

    Args:
        learning_rate: How hard a loss costs weight; over 0.
        share: Part of its weight that each expert awake gives away after a truth; from 0, below 1.
        weights: Experts to begin with; only the relations between weights matter.

    Raises:
        ValueError: a number is out of its bounds.
    """

    def __init__(
        self,
        learning_rate: float = LEARNING_RATE,
        share: float = SHARE,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if not (math.isfinite(learning_rate) and learning_rate > 0):
            raise ValueError(f"learning rate is {learning_rate}; it must be a number over 0")
        if not 0 <= share < 1:
            raise ValueError(f"share is {share}; it must be from 0 to below 1")
        self.learning_rate = learning_rate
        self.share = share
        # Not normalised: the mean is about 1, so that experts can come without touching the others.
        self._weights: dict[str, float] = dict(weights or {})
        for expert, weight in self._weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"weight of {expert} is {weight}; it must be a number over 0")

    def __len__(self) -> int:
        return len(self._weights)

    def __contains__(self, expert: object) -> bool:
        return expert in self._weights

    @property
    def raw_weights(self) -> Mapping[str, float]:
        """Weights as they are kept, not normalised: a new `FixedShare` with them goes on bit for bit. Read-only."""
        return MappingProxyType(self._weights)

    def weights(self) -> dict[str, float]:
        """Weight of each expert, over 0 and in all 1, sorted by expert."""
        total = math.fsum(self._weights.values())
        return {expert: weight / total for expert, weight in sorted(self._weights.items())}

    def weights_of(self, experts: Iterable[str]) -> dict[str, float]:
        """Weights of some experts, sorted; one that is unknown weighs what it would if it appeared now.

        The weights of all the known experts and these are in all 1.
        """
        newcomer = self._mean()
        chosen = {expert: self._weights.get(expert, newcomer) for expert in sorted(experts)}
        unknown = [weight for expert, weight in chosen.items() if expert not in self._weights]
        total = math.fsum([*self._weights.values(), *unknown])
        return {expert: weight / total for expert, weight in chosen.items()}

    def update(self, losses: Mapping[str, float]) -> None:
        """Learns the losses, from 0 (right) to 1 (wrong), of the experts that were awake; unknown ones appear.

        Raises:
            ValueError: a loss is not from 0 to 1. Nothing has changed.
        """
        for expert, loss in losses.items():
            if not 0 <= loss <= 1:
                raise ValueError(f"loss of {expert} is {loss}; it must be from 0 to 1")
        if not losses:
            return
        newcomer = self._mean()
        awake = {expert: self._weights.get(expert, newcomer) for expert in losses}
        mass = math.fsum(awake.values())
        # Relative to the least loss, the best factor is 1: the sum cannot underflow, whatever the rate.
        least = min(losses.values())
        for expert, loss in losses.items():
            awake[expert] *= math.exp(-self.learning_rate * (loss - least))
        total = math.fsum(awake.values())
        floor = _WEIGHT_MIN * mass / len(awake)
        others = max(1, len(awake) - 1)
        for expert, weight in awake.items():
            kept = weight * (mass / total)
            shared = (1 - self.share) * kept + self.share * max(0.0, mass - kept) / others if len(awake) > 1 else kept
            awake[expert] = max(floor, shared)
        scale = mass / math.fsum(awake.values())
        self._weights.update((expert, weight * scale) for expert, weight in awake.items())

    def forget(self, experts: Iterable[str]) -> None:
        """Lets experts vanish; the others keep their relations. Unknown ones are ignored."""
        for expert in experts:
            self._weights.pop(expert, None)
        if self._weights:
            # Back to a mean of 1: if those with all the weight went again and again, the rest would underflow.
            mean = self._mean()
            self._weights = {expert: weight / mean for expert, weight in self._weights.items()}

    def _mean(self) -> float:
        return math.fsum(self._weights.values()) / len(self._weights) if self._weights else 1.0

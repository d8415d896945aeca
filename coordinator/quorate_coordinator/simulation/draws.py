"""Random numbers that depend on what they are for, and not on what was drawn before.

A fate is a number of 64 bits made from a seed and a subject: an agent's work on one call, a message's way, one pulse.
Leaving out a call leaves all others' fates as they were, which is what lets a failing plan be shortened.

Source of the generator: G. L. Steele, D. Lea, C. H. Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA
2014, doi:10.1145/2660193.2660195 (SplitMix64).
"""

import math
from hashlib import blake2b
from typing import Final, TypeVar

T = TypeVar("T")

_WORD: Final = (1 << 64) - 1
_STEP: Final = 0x9E3779B97F4A7C15


def fate_of(seed: int, subject: str) -> int:
    """The fate of a subject that has a name."""
    return int.from_bytes(blake2b(f"{seed}/{subject}".encode(), digest_size=8).digest(), "big")


def mix(fate: int, number: int) -> int:
    """The fate of one of many things that share a fate."""
    mixed = (fate + number * _STEP) & _WORD
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _WORD
    return mixed ^ (mixed >> 31)


class Draws:
    """The numbers that one fate has in store."""

    __slots__ = ("_fate", "_number")

    def __init__(self, fate: int) -> None:
        self._fate = fate
        self._number = 0

    def random(self) -> float:
        """From 0 to below 1."""
        self._number += 1
        return (mix(self._fate, self._number) >> 11) / (1 << 53)

    def uniform(self, low: float, high: float) -> float:
        """Between two numbers."""
        return low + (high - low) * self.random()

    def exponential(self, mean: float) -> float:
        """Over 0."""
        return -mean * math.log(1.0 - self.random())

    def log_normal(self, median: float, sigma: float) -> float:
        """Over 0; its logarithm is normal with this deviation."""
        radius = math.sqrt(-2.0 * math.log(1.0 - self.random()))
        return median * math.exp(sigma * radius * math.cos(2.0 * math.pi * self.random()))

    def choice(self, items: tuple[T, ...]) -> T:
        """One of them."""
        return items[int(self.random() * len(items))]

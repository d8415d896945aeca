"""How long to wait before connecting again. Pure: the random generator is an argument."""

import math
import random
from typing import Final

#: Ceiling of the first wait: a coordinator that restarts at once is back by then.
BASE_S: Final = 0.25

#: Ceiling of any wait. A fleet comes back within seconds of its coordinator, and a coordinator that is
#: down costs an agent a few packets per second at most.
MAX_S: Final = 5.0

#: A session that lived this long counts as a success: the next break starts from the shortest wait.
#: Shorter ones do not, or a coordinator that lets agents in and drops them would be hammered.
STABLE_SESSION_S: Final = 10.0


def compute_delay_s(failures: int, rng: random.Random, *, base_s: float = BASE_S, max_s: float = MAX_S) -> float:
    """Seconds to wait after `failures` failures in a row (at least 1): exponential backoff with full jitter.

    Uniform between 0 and min(max_s, base_s · 2^(failures − 1)): full jitter spreads a fleet that lost
    its coordinator in one moment better than jitter around the exponential (Brooker, "Exponential
    Backoff and Jitter", 2015).
    """
    doublings = min(failures - 1, max(0, math.ceil(math.log2(max_s / base_s))))  # 2.0 ** 1100 would overflow
    return rng.uniform(0.0, min(max_s, base_s * 2.0**doublings))


class Backoff:
    """Counts failures in a row."""

    def __init__(self, rng: random.Random, *, base_s: float = BASE_S, max_s: float = MAX_S) -> None:
        self._rng = rng
        self._base_s = base_s
        self._max_s = max_s
        self.failures = 0

    def fail(self) -> float:
        """One more failure. Returns the seconds to wait."""
        self.failures += 1
        return compute_delay_s(self.failures, self._rng, base_s=self._base_s, max_s=self._max_s)

    def end_session(self, lived_s: float, *, at_once: bool = False) -> float:
        """A session's link ended after `lived_s` seconds. Returns the seconds to wait.

        With `at_once` that is none after the first failure: rounds wait for who can resume its session.
        """
        if lived_s >= STABLE_SESSION_S:
            self.failures = 0
        delay_s = self.fail()
        return 0.0 if at_once and self.failures == 1 else delay_s

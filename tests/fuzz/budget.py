"""How long to look for trouble: some seconds in a normal run, as long as asked for in `make fuzz`."""

import os
import time
from collections.abc import Callable
from typing import Final

from hypothesis import HealthCheck, Phase, settings

#: Seconds for each test; 0 for one round of examples, as in a normal run.
FUZZ_SECONDS: Final = float(os.environ.get("QUORATE_FUZZ_SECONDS", "0") or 0)


def fuzz(check: Callable[[], None], examples: int) -> None:
    """Runs a `given` function: one round of so many examples, and more of them while there is time.

    What fails is shrunk and printed, with a line that reproduces it.
    """
    ends_at = time.monotonic() + FUZZ_SECONDS
    run = settings(
        max_examples=examples,
        # The function is made anew for each test: what a database has for it is not for it.
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
    )(check)
    rounds = 0
    while True:
        run()
        rounds += 1
        if time.monotonic() >= ends_at:
            break
    print(f"{rounds} rounds of {examples} examples")  # noqa: T201

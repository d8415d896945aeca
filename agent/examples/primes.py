"""Counts the primes below a number: plain Python that computes for seconds, and so runs in a process of its own.

A process has an interpreter to itself. Whatever is computed there, the agent's own process has time for its
heartbeats and for the next question.
"""

from quorate_agent import Agent, Context, Declined

#: The sieve has a byte for each number.
LIMIT_MAX = 1_000_000_000

#: Primes between two looks at whether anybody still waits.
STRIDE = 64

agent = Agent("primes", processes=1)


@agent.task("count_primes")
def count_primes(limit: int, context: Context) -> int:
    """How many primes are smaller than `limit`: the sieve of Eratosthenes."""
    if type(limit) is not int or not 0 <= limit <= LIMIT_MAX:
        raise Declined(f"a whole number from 0 to {LIMIT_MAX} is wanted")
    is_prime = bytearray([1]) * limit
    is_prime[:2] = bytes(min(limit, 2))
    for number in range(2, int(limit**0.5) + 1):
        if is_prime[number]:
            is_prime[number * number :: number] = bytes(len(range(number * number, limit, number)))
        if number % STRIDE == 0 and context.cancelled.is_set():
            break  # nobody waits for it any more
    return sum(is_prime)

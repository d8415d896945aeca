"""Garbage for a server's port, at a bounded rate."""

import asyncio
import random
import socket
import time
from typing import Final

#: As large as a client's first datagram has to be (RFC 9000, 14.1): nothing is refused for its size alone.
_DATAGRAM_BYTES: Final = 1200
#: Different datagrams, sent in turn.
_VARIANTS: Final = 64
#: Long header and fixed bit, type Initial (RFC 9000, 17.2).
_FIRST_BYTE: Final = b"\xc0"
#: Between bursts, in seconds: what the loop's timers can do.
_PERIOD_S: Final = 0.001


async def flood(port: int, per_s: int, seconds: float) -> int:
    """Sends random datagrams that look like Initials to 127.0.0.1; returns how many."""
    rng = random.Random(7)  # noqa: S311  reproducible garbage, no secret
    garbage = [_FIRST_BYTE + rng.randbytes(_DATAGRAM_BYTES - 1) for _ in range(_VARIANTS)]
    sent = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(("127.0.0.1", port))
        began = time.monotonic()
        while (elapsed_s := time.monotonic() - began) < seconds:
            # A burst that the machine had no time for is not made up for beyond a few: the rate is a ceiling.
            due = min(int(elapsed_s * per_s) - sent, int(5 * per_s * _PERIOD_S))
            for _ in range(due):
                try:
                    sock.send(garbage[sent % _VARIANTS])
                except OSError:
                    break  # the buffer is full, or the port's owner is gone
                sent += 1
            await asyncio.sleep(_PERIOD_S)
    return sent

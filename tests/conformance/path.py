"""One direction of a network, as a function of what goes in: delay, loss, doubles, disorder, sizes, a rate."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Path:
    """What becomes of the datagrams of one direction.

    Random fates come from `seed` alone, in the order in which datagrams enter: the same run gives the
    same fates. All of it may be changed while datagrams are under way.
    """

    #: Seconds that every datagram is under way.
    delay_s: float = 0.010
    #: At most so many seconds more, drawn for each: more than the gap between two makes disorder.
    jitter_s: float = 0.0
    #: Share of datagrams that is lost, and that arrives twice.
    loss: float = 0.0
    doubles: float = 0.0
    #: Largest UDP payload that is carried, in bytes; a larger one vanishes, and nobody is told (a black hole).
    payload_bytes_max: int = 65_527
    #: Largest that the sender's own network takes; of a larger one the sender is told (EMSGSIZE).
    local_bytes_max: int = 65_527
    #: Bytes a second, and bytes that may queue for them; what comes on top is lost. None for no limit.
    rate_bytes_s: float | None = None
    queue_bytes: int = 1 << 20
    seed: int = 0
    #: Asked for each datagram by its number in this direction (from 0) and its bytes: whether to lose it.
    drop: Callable[[int, bytes], bool] | None = None
    #: Sizes of all datagrams that were offered, carried or not.
    offered_bytes: list[int] = field(default_factory=list, repr=False)
    #: How many vanished, for whatever reason.
    lost: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._busy_until = 0.0

    def arrivals(self, datagram: bytes, now: float) -> list[float]:
        """When a datagram that is sent now arrives: never, once or twice."""
        number = len(self.offered_bytes)
        self.offered_bytes.append(len(datagram))
        fate, again, *extra = (self._random.random() for _ in range(4))
        is_lost = fate < self.loss or len(datagram) > self.payload_bytes_max
        if self.drop is not None and self.drop(number, datagram):
            is_lost = True
        leaves = now
        if self.rate_bytes_s is not None and not is_lost:
            leaves = max(now, self._busy_until)
            if (leaves - now) * self.rate_bytes_s > self.queue_bytes:
                is_lost = True
            else:
                leaves += len(datagram) / self.rate_bytes_s
                self._busy_until = leaves
        if is_lost:
            self.lost += 1
            return []
        count = 2 if again < self.doubles else 1
        return [leaves + self.delay_s + self.jitter_s * share for share in extra[:count]]

    @property
    def largest_bytes(self) -> int:
        """The largest datagram that was offered."""
        return max(self.offered_bytes, default=0)

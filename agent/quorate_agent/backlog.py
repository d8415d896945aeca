"""What an agent has been given and not finished, in stream order, and the bodies it may need again. Pure."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from quorate_protocol.fields import Body


@dataclass(frozen=True, slots=True)
class BacklogLimits:
    """Ceilings of what an agent holds in memory; both ends need not agree on them."""

    #: Assignments that wait; the next one is declined. A coordinator that is this far ahead of the
    #: handlers gains nothing from a longer queue: the deadlines run.
    assignments_max: int = 1024
    #: Feedback that waits; more is dropped and counted. Higher, because dropping it loses learning.
    feedback_max: int = 8192
    #: Bytes of bodies and truths that wait, of each of the two kinds.
    queued_bytes_max: int = 64 << 20
    #: Rounds whose body is kept for feedback; the oldest are forgotten beyond it. The truth may come
    #: a long time and many rounds after the question.
    remembered_max: int = 16_384
    #: Bytes of those bodies in memory; and on disk: a quarter of what may be there, so that more may come.
    remembered_bytes_max: int = 64 << 20
    remembered_disk_bytes_max: int = 4 << 30
    #: Replies kept to be sent again over another link; the oldest are forgotten beyond it. Between two
    #: pulses, when those that were delivered are forgotten, a fast agent makes some thousands: the oldest
    #: of them have long arrived.
    replies_max: int = 4096
    #: Bytes of those replies: half of what may wait to be sent (`session.UNSENT_BYTES_MAX`), so that sending
    #: all of them at once does not look like a coordinator that does not read.
    replies_bytes_max: int = 32 << 20


def memory_bytes(body: Body | None) -> int:
    """Bytes that a body takes in memory."""
    if isinstance(body, bytes):
        return len(body)
    return 0 if body is None or body.content is None or body.content.is_on_disk else body.size


def disk_bytes(body: Body) -> int:
    """Bytes that a body takes on disk."""
    return 0 if isinstance(body, bytes) else body.size - memory_bytes(body)


@dataclass(slots=True)
class Work:
    """An assignment or a feedback, from its arrival until its handler has ended."""

    id: int
    round: int
    task: str
    body: Body
    received_at: float
    #: None for an assignment.
    truth: Body | None = None
    attempt: int = 1
    deadline: float = 0.0
    started_at: float = 0.0
    #: Nobody waits for the result: cancelled, or of a session that is over.
    is_abandoned: bool = False

    @property
    def is_feedback(self) -> bool:
        return self.truth is not None

    @property
    def size_bytes(self) -> int:
        return memory_bytes(self.body) + memory_bytes(self.truth)


class WorkQueue:
    """Work that has not started, first in, first out."""

    def __init__(self, limits: BacklogLimits) -> None:
        self._limits = limits
        self._queue: deque[Work] = deque()
        #: Count and bytes, by `is_feedback`.
        self._counts = [0, 0]
        self._bytes = [0, 0]

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Work]:
        return iter(self._queue)

    def has_room(self, work: Work) -> bool:
        """Whether `push` may be called with it. One work is let in whatever its size."""
        kind = work.is_feedback
        count_max = self._limits.feedback_max if kind else self._limits.assignments_max
        if self._counts[kind] == 0:
            return count_max > 0
        return self._counts[kind] < count_max and self._bytes[kind] + work.size_bytes <= self._limits.queued_bytes_max

    def push(self, work: Work) -> None:
        self._queue.append(work)
        self._counts[work.is_feedback] += 1
        self._bytes[work.is_feedback] += work.size_bytes

    def head(self) -> Work | None:
        return self._queue[0] if self._queue else None

    def pop(self) -> Work:
        work = self._queue.popleft()
        self._counts[work.is_feedback] -= 1
        self._bytes[work.is_feedback] -= work.size_bytes
        return work

    def remove(self, predicate: Callable[[Work], bool]) -> list[Work]:
        """Takes out all work for which the predicate holds, and returns it."""
        removed = [work for work in self._queue if predicate(work)]
        if removed:
            self._queue = deque(work for work in self._queue if not predicate(work))
            for work in removed:
                self._counts[work.is_feedback] -= 1
                self._bytes[work.is_feedback] -= work.size_bytes
        return removed


class RememberedBodies:
    """Bodies of rounds whose truth may still come, bounded by count and bytes."""

    def __init__(self, limits: BacklogLimits) -> None:
        self._limits = limits
        self._bodies: OrderedDict[int, tuple[str, Body]] = OrderedDict()
        self._bytes = 0
        self._disk_bytes = 0

    def __len__(self) -> int:
        return len(self._bodies)

    @property
    def size_bytes(self) -> int:
        return self._bytes

    def put(self, round_id: int, task: str, body: Body) -> int:
        """Remembers a body as the newest. Returns how many of the oldest were forgotten for it."""
        self._discard(round_id)
        self._bodies[round_id] = (task, body)
        self._bytes += memory_bytes(body)
        self._disk_bytes += disk_bytes(body)
        forgotten = 0
        while (
            len(self._bodies) > self._limits.remembered_max
            or self._bytes > self._limits.remembered_bytes_max
            or self._disk_bytes > self._limits.remembered_disk_bytes_max
        ):
            self._discard(next(iter(self._bodies)))
            forgotten += 1
        return forgotten

    def take(self, round_id: int, task: str) -> Body | None:
        """The body of the round, forgotten from now on; None when it is not there or was another task's."""
        known = self._bodies.get(round_id)
        if known is None or known[0] != task:
            return None
        self._discard(round_id)
        return known[1]

    def _discard(self, round_id: int) -> None:
        known = self._bodies.pop(round_id, None)
        if known is not None:
            self._bytes -= memory_bytes(known[1])
            self._disk_bytes -= disk_bytes(known[1])

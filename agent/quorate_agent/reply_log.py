"""The replies of a session that the coordinator may not have. Pure."""

from collections import deque

from quorate_agent.backlog import BacklogLimits
from quorate_agent.events import SendReply


class ReplyLog:
    """Numbers the replies of a session and keeps them until they are known to have been delivered.

    A reply may be forgotten once the coordinator's transport has acknowledged it: a coordinator reads what
    has arrived over a link before it lets the session go on over the next one. That it was given is
    remembered for longer: the assignment may be under way once more, sent before the reply was there.
    """

    def __init__(self, limits: BacklogLimits) -> None:
        self._limits = limits
        self._replies: deque[SendReply] = deque()
        self._bytes = 0
        #: Round and attempt of those that are kept or were delivered, the oldest first.
        self._known: dict[tuple[int, int], None] = {}
        #: The number of the first that is kept; of the next one when none is.
        self._first = 1

    def __len__(self) -> int:
        return len(self._replies)

    @property
    def size_bytes(self) -> int:
        """Bytes of the answers and errors that are kept."""
        return self._bytes

    def has(self, round_id: int, attempt: int) -> bool:
        """Whether the reply to this assignment is kept or was delivered, not too long ago."""
        return (round_id, attempt) in self._known

    def put(self, reply: SendReply) -> None:
        """Keeps a reply as the newest; the oldest make room. The newest is kept whatever its size."""
        self._replies.append(reply)
        self._known[reply.round, reply.attempt] = None
        if len(self._known) > 2 * self._limits.replies_max:
            del self._known[next(iter(self._known))]
        self._bytes += _size_bytes(reply)
        while len(self._replies) > max(1, self._limits.replies_max) or (
            self._bytes > self._limits.replies_bytes_max and len(self._replies) > 1
        ):
            lost = self._forget_first()
            # It may never have arrived: the assignment, if it comes again, is to be worked on.
            self._known.pop((lost.round, lost.attempt), None)

    def delivered(self) -> None:
        """All that are kept have been delivered."""
        self._first += len(self._replies)
        self._replies.clear()
        self._bytes = 0

    def resume(self, received: int) -> tuple[list[SendReply], int]:
        """What to send again to a coordinator that has so many replies of the session, and how many are missing before.

        They are numbered anew, as the next after those that were received.
        """
        while self._replies and self._first <= received:
            self._forget_first()
        missing = max(0, self._first - received - 1)
        self._first = received + 1
        return list(self._replies), missing

    def begin(self) -> None:
        """Another session: nothing is kept, and the numbers begin anew."""
        self._replies.clear()
        self._known.clear()
        self._bytes = 0
        self._first = 1

    def _forget_first(self) -> SendReply:
        reply = self._replies.popleft()
        self._bytes -= _size_bytes(reply)
        self._first += 1
        return reply


def _size_bytes(reply: SendReply) -> int:
    return len(reply.body or b"") + len(reply.error)

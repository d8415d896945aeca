"""The replies of a session that the coordinator may not have. Pure."""

from collections import deque

from quorate_agent.backlog import BacklogLimits
from quorate_agent.events import SendReply
from quorate_protocol.fields import BodyRef, inline_bytes


class ReplyLog:
    """Numbers the replies of a session and keeps them until they are known to have been delivered.

    A reply may be forgotten once the coordinator's transport has acknowledged it: a coordinator reads what
    has arrived over a link before it lets the session go on over the next one. That it was given is
    remembered for longer: the assignment may be under way once more, sent before the reply was there.

    A reply whose body travels on a stream of its own is kept until that was delivered, too: over the next link it is
    sent again, as another reply, with its body.
    """

    def __init__(self, limits: BacklogLimits) -> None:
        self._limits = limits
        self._replies: deque[SendReply] = deque()
        self._bytes = 0
        #: By round and attempt, those whose body has not been delivered.
        self._under_way: dict[tuple[int, int], SendReply] = {}
        #: Round and attempt of those that are kept or were delivered, the oldest first.
        self._known: dict[tuple[int, int], None] = {}
        #: The number of the first that is kept; of the next one when none is.
        self._first = 1

    def __len__(self) -> int:
        return len(self._replies)

    @property
    def bodies_under_way(self) -> int:
        """Replies whose body is on a stream of its own and has not been delivered."""
        return len(self._under_way)

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
        if isinstance(reply.body, BodyRef):
            self._under_way[reply.round, reply.attempt] = reply
        if len(self._known) > 2 * self._limits.replies_max:
            del self._known[next(iter(self._known))]
        self._bytes += _size_bytes(reply)
        while len(self._replies) > max(1, self._limits.replies_max) or (
            self._bytes > self._limits.replies_bytes_max and len(self._replies) > 1
        ):
            lost = self._forget_first()
            # It may never have arrived: the assignment, if it comes again, is to be worked on.
            self._known.pop((lost.round, lost.attempt), None)
            self._under_way.pop((lost.round, lost.attempt), None)

    def body_delivered(self, round_id: int, attempt: int) -> None:
        """The body of a reply has been delivered."""
        self._under_way.pop((round_id, attempt), None)

    def drop_bodies(self, round_id: int) -> bool:
        """Nobody waits for the bodies of a round; returns whether one was under way."""
        dropped = [known for known in self._under_way if known[0] == round_id]
        for known in dropped:
            del self._under_way[known]
        return bool(dropped)

    def delivered(self) -> None:
        """All frames of those that are kept have been delivered."""
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
        kept = {id(reply) for reply in self._replies}
        cut_off = [reply for reply in self._under_way.values() if id(reply) not in kept]
        self._replies.extendleft(reversed(cut_off))
        self._bytes += sum(map(_size_bytes, cut_off))
        return list(self._replies), missing

    def begin(self) -> None:
        """Another session: nothing is kept, and the numbers begin anew."""
        self._replies.clear()
        self._known.clear()
        self._under_way.clear()
        self._bytes = 0
        self._first = 1

    def _forget_first(self) -> SendReply:
        reply = self._replies.popleft()
        self._bytes -= _size_bytes(reply)
        self._first += 1
        return reply


def _size_bytes(reply: SendReply) -> int:
    # What a reference stands for is bounded by the rounds that one agent may owe.
    return inline_bytes(reply.body) + len(reply.error)

"""One agent's session and its link, as the fleet's shell holds them.

A session outlives its links. What was sent in it is numbered, whatever link it went over, and what is
not an assignment is kept for a while: a new link begins with what the old one did not deliver.
"""

import asyncio
from collections import deque
from typing import Final

import structlog

from quorate_coordinator.agent_bodies import AgentBodies
from quorate_protocol.bulk import BulkInbox
from quorate_protocol.channel import Channel
from quorate_protocol.errors import Code, ConnectionClosed, QuorateError
from quorate_protocol.transport import BiStream, Connection, Priority

log = structlog.get_logger()

#: Bytes that may wait for one agent to acknowledge them. An agent that is further behind does not
#: read: its session is over, and it may come back.
UNSENT_BYTES_MAX: Final = 16 << 20

#: Frames kept of one session to be sent again: feedback and cancellations of a lease's time. At a hundred rounds a
#: second they go back five seconds, half of the default lease; what is missed costs learning, never an answer.
LOG_FRAMES_MAX: Final = 1024

#: Their bytes. A truth is small; four of the largest. The frames are shared between all agents that got them.
LOG_BYTES_MAX: Final = 4 << 20


class FrameLog:
    """Numbers the frames of a session and keeps those that may have to be sent again. Pure.

    Args:
        frames_max: Frames kept; the oldest are dropped beyond it.
        bytes_max: Their bytes, likewise.
    """

    __slots__ = (
        "_before",
        "_bytes",
        "_bytes_max",
        "_dropped_up_to",
        "_frames",
        "_frames_max",
        "_kept",
        "_steps",
        "sent",
    )

    def __init__(self, frames_max: int = LOG_FRAMES_MAX, bytes_max: int = LOG_BYTES_MAX) -> None:
        #: Frames numbered so far: the number of the last one.
        self.sent = 0
        self._frames_max = frames_max
        self._bytes_max = bytes_max
        self._frames: deque[bytes] = deque()
        #: How much higher each frame's number is than that of the one before it. Small numbers cost nothing, and
        #: there is a log for each of thousands of agents.
        self._steps: deque[int] = deque()
        #: What the first step counts from, and the number of the last frame that was kept.
        self._before = 0
        self._kept = 0
        self._bytes = 0
        #: The highest number of a frame that was to be kept and is not any more.
        self._dropped_up_to = 0

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def size_bytes(self) -> int:
        """Bytes of the frames that are kept."""
        return self._bytes

    def count(self) -> None:
        """Numbers a frame that need not be kept: an assignment, which the rounds remember."""
        self.sent += 1

    def keep(self, frame: bytes) -> None:
        """Numbers a frame and keeps it."""
        self.sent += 1
        self._frames.append(frame)
        self._steps.append(self.sent - self._kept)
        self._kept = self.sent
        self._bytes += len(frame)
        while len(self._frames) > self._frames_max or self._bytes > self._bytes_max:
            self._dropped_up_to = self._forget_first()

    def resume(self, received: int) -> tuple[list[bytes], bool]:
        """What to send again to a peer that has received so many frames, and whether anything before it is missing.

        The frames are numbered anew, as the next after those that were received.
        """
        received = min(received, self.sent)
        has_gap = self._dropped_up_to > received
        while self._steps and self._before + self._steps[0] <= received:
            self._forget_first()
        self._steps = deque([1] * len(self._frames))
        self._before = received
        self._kept = self.sent = received + len(self._frames)
        self._dropped_up_to = 0
        return list(self._frames), has_gap

    def _forget_first(self) -> int:
        self._bytes -= len(self._frames.popleft())
        self._before += self._steps.popleft()
        return self._before


class AgentLink:
    """One connection of an agent."""

    def __init__(self, connection: Connection, control: Channel, agent: str) -> None:
        self.connection = connection
        self.control = control
        self.agent = agent
        #: With a link that resumes a session: how many frames the agent has received in it.
        self.resumed_after: int | None = None
        #: Set when the coordination stream is there.
        self.has_opened = asyncio.Event()
        #: Set when nothing that came over this link is unread any more.
        self.has_ended = asyncio.Event()
        #: Whether the session ends with this link, without a goodbye.
        self.ends_session = False
        #: Why the agent leaves, once it has said so.
        self.goodbye: str | None = None
        #: For large bodies; made when one comes.
        self.inbox: BulkInbox | None = None
        self._stream: BiStream | None = None
        #: Frames for an agent that was welcomed and has not opened its first stream yet. Bounded: by the
        #: rounds that one agent may owe, and the seconds that it has to open it.
        self._early: list[bytes] = []
        self._early_bytes = 0
        #: Since when it has too much to take in without taking in any of it, on the loop's clock; and how much.
        self.behind_since: float | None = None
        self.behind_bytes = 0

    @property
    def is_taking(self) -> bool:
        """Whether frames may be sent: a link that resumes begins with what the one before it did not deliver."""
        return self.resumed_after is None or self._stream is not None

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the agent has not taken in."""
        return self._early_bytes if self._stream is None else self._stream.unsent_bytes

    def send(self, frame: bytes, *, hurried: bool = True) -> None:
        """Queues a frame; an agent that is too far behind, or gone, gets nothing more."""
        if self.connection.is_closed:
            return
        unsent_bytes = self.unsent_bytes + len(frame)
        if self._stream is None:
            self._early.append(frame)
            self._early_bytes += len(frame)
        if unsent_bytes > UNSENT_BYTES_MAX:
            log.warning("agent_too_far_behind", agent=self.agent, unsent_bytes=unsent_bytes)
            self.expel("too far behind: not reading")
            return
        if self._stream is not None:
            try:
                self._stream.send_nowait(frame, hurried=hurried)
            except QuorateError:
                # It stopped the stream: an agent that cannot be asked must not be waited for.
                self.expel("not reading")

    def opened(self, stream: BiStream) -> None:
        """The agent has opened its coordination stream."""
        stream.priority = Priority.HIGH
        self._stream = stream
        self.has_opened.set()
        early, self._early = self._early, []
        for frame in early:
            self.send(frame)

    def expel(self, reason: str) -> None:
        """Ends the connection and the session: the agent does not read."""
        self.ends_session = True
        self.close(Code.BUSY, reason)

    def close(self, code: Code, reason: str) -> None:
        """Ends the connection at once."""
        self.connection.abort(code, reason)

    @property
    def was_closed_for_good(self) -> bool:
        """Whether the agent closed the connection in an order that says that it does not come back."""
        closed = self.connection.close_error
        return (
            isinstance(closed, ConnectionClosed)
            and closed.by_peer
            and not closed.transport
            and closed.code == Code.NO_ERROR
        )


class AgentSession:
    """What is kept of an agent's session, with a link or without."""

    __slots__ = ("agent", "bodies", "link", "log", "name", "received", "secret", "stop_reason")

    def __init__(self, agent: str, name: str, secret: str, link: AgentLink, bodies: AgentBodies) -> None:
        self.agent = agent
        self.name = name
        self.secret = secret
        #: The present link; None while the agent is away.
        self.link: AgentLink | None = link
        self.log = FrameLog()
        #: What it asks and answers beside its frames.
        self.bodies = bodies
        #: Replies that came, over all links.
        self.received = 0
        #: Set when an operator wants the agent to end.
        self.stop_reason: str | None = None

    def send(self, frame: bytes, *, hurried: bool, is_assignment: bool) -> None:
        """Sends a frame now, or keeps it for the next link; an assignment is not kept."""
        link = self.link
        if link is None or not link.is_taking:
            if not is_assignment:
                self.log.keep(frame)
            return
        if is_assignment:
            self.log.count()
        else:
            self.log.keep(frame)
        link.send(frame, hurried=hurried)

"""What an agent sends of its own accord, beside replies: streams with a topic, and experiences for the learner."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from types import TracebackType
from typing import Any, Final, Self

from quorate_protocol.arguments import arguments_checked
from quorate_protocol.bodies import encode_body
from quorate_protocol.errors import Code, QuorateError, StoppedByPeer
from quorate_protocol.messages import ExperienceTold, Modality, Telemetry
from quorate_protocol.transport.api import Buffer, Connection, Priority, SendStream


class OwnStream:
    """A stream of this agent's own to whoever takes its topic at the coordinator.

    As a context manager it is finished at the end of the block, and given up when the block raises.
    """

    def __init__(self, topic: str, stream: SendStream) -> None:
        self.topic: Final = topic
        self._stream = stream

    @property
    def priority(self) -> Priority:
        """Its sending class; may be changed at any time."""
        return self._stream.priority

    @priority.setter
    def priority(self, priority: Priority) -> None:
        self._stream.priority = priority

    async def send(self, data: Buffer) -> None:
        """Sends bytes; sleeps while too much is under way, because the network or the consumer is slower.

        Raises:
            StoppedByPeer: nobody takes the topic (code `NOT_WANTED`), or its consumer has had enough.
            ConnectionClosed: the link broke; open the stream again on the next.
        """
        with self._explained():
            await self._stream.send(data)

    async def flush(self) -> None:
        """Returns when the coordinator's transport has everything that was sent.

        Raises: as `send`.
        """
        with self._explained():
            await self._stream.flush()

    async def finish(self) -> None:
        """Ends the stream after what was sent.

        Raises: as `send`.
        """
        with self._explained():
            await self._stream.finish()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except StoppedByPeer as error:
            raise StoppedByPeer(error.code, _why_stopped(error.code, self.topic)) from None

    def give_up(self) -> None:
        """Ends the stream at once: what was not delivered may never be."""
        self._stream.reset(Code.CANCELLED)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await self.finish()
        else:
            self.give_up()


class OwnStreams:
    """The streams of one link. What opens them: handlers by their context, and background functions.

    Args:
        connection: The link.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._telemetry: dict[str, SendStream] = {}
        #: One experience after the other, whoever tells them.
        self._telling = asyncio.Lock()

    async def open_stream(self, topic: str, *, priority: Priority | None = None, round: int = 0) -> OwnStream:
        """Opens a stream for a topic.

        Args:
            topic: Names who takes it at the coordinator.
            priority: Its sending class; NORMAL, which None is too, goes in turn with bodies, LOW after them, HIGH with
                assignments.
            round: The round that it is about; 0 is none.

        Raises:
            ConnectionClosed: the link broke.
            ArgumentInvalid: the topic is no name.
        """
        with arguments_checked():
            header = Modality(topic=topic, round=round).to_frame()
        stream = await self._connection.open_uni_stream(Priority.NORMAL if priority is None else priority)
        await stream.send(header)
        return OwnStream(topic, stream)

    async def tell(self, topic: str, value: Any) -> None:
        """Tells the learner of an experience.

        Raises:
            LocalError: the value cannot travel.
            StoppedByPeer: the coordinator does not take it.
            ConnectionClosed: the link broke.
        """
        frame = ExperienceTold(body=encode_body(value)).to_frame()
        async with self._telling:
            stream = self._telemetry.get(topic)
            if stream is None:
                frame = Telemetry(topic=topic).to_frame() + frame
                stream = self._telemetry[topic] = await self._connection.open_uni_stream(Priority.LOW)
            try:
                await stream.send(frame)
            except QuorateError:
                del self._telemetry[topic]
                raise


def _why_stopped(code: int, topic: str) -> str:
    match code:
        case Code.NOT_WANTED:
            return f"the coordinator has no consumer for the topic {topic!r} (its setting `consumers`)"
        case Code.INTERNAL:
            return f"the coordinator's consumer of the topic {topic!r} failed; the coordinator's log says more"
        case Code.BUSY:
            return f"the coordinator has too many streams of this agent open, and takes no further one of {topic!r}"
    return f"the coordinator's consumer of the topic {topic!r} has had enough"


#: Gives the streams of the present link; raises `ConnectionClosed` when there is none.
StreamsSource = Callable[[], OwnStreams]

#: Runs beside the handlers while there is a link.
Background = Callable[[OwnStreams], Awaitable[None]]

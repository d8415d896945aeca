"""Messages over one bidirectional stream: frames in, frames out."""

from collections import deque
from typing import Any

from quorate_protocol.errors import ProtocolError, UnexpectedMessage
from quorate_protocol.frames import FrameDecoder
from quorate_protocol.limits import FRAME_BYTES_MAX
from quorate_protocol.messages import Message, parse_message
from quorate_protocol.transport.api import BiStream


class Channel:
    """Sends and receives messages in order.

    When the peer breaks the wire format, `receive` has told its code to the peer (as a reset and a
    stop of this stream) before it raises.
    """

    def __init__(self, stream: BiStream, *, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self.stream = stream
        self._decoder = FrameDecoder(frame_bytes_max=frame_bytes_max)
        self._maps: deque[dict[str, Any]] = deque()
        self._ended = False

    def allow(self, frame_bytes_max: int) -> None:
        """Takes frames of up to this size from now on."""
        self._decoder.frame_bytes_max = frame_bytes_max

    async def send(self, message: Message) -> None:
        """Sends under the stream's watermark.

        Raises:
            FrameTooLarge: over the frame ceiling; nothing was sent.
            StoppedByPeer, ConnectionClosed: nobody listens any more.
        """
        await self.stream.send(message.to_frame())

    def send_nowait(self, message: Message) -> None:
        """As `send`, without waiting for the watermark."""
        self.stream.send_nowait(message.to_frame())

    async def receive(self) -> Message | None:
        """The next message; None once the peer has finished the stream.

        Raises:
            ProtocolError: the peer broke the format.
            ResetByPeer, ConnectionClosed: the stream ended early.
        """
        try:
            while not self._maps:
                if self._ended:
                    return None
                # What is wrong behind the last good frame must not wait for the peer's next bytes.
                self._decoder.feed(b"")
                data = await self.stream.receive()
                if data:
                    self._maps.extend(self._decoder.feed(data))
                else:
                    self._decoder.finish()
                    self._ended = True
            return parse_message(self._maps.popleft())
        except ProtocolError as error:
            self.abort(error.code)
            raise

    async def expect(self, *types: type[Message]) -> Message:
        """The next message, which has to be of one of these types.

        Raises:
            UnexpectedMessage: another one, or the end of the stream.
            And as `receive`.
        """
        message = await self.receive()
        if not isinstance(message, types):
            unexpected = UnexpectedMessage(
                "no" if message is None else message.wire_type, f"on stream {self.stream.id}"
            )
            self.abort(unexpected.code)
            raise unexpected
        return message

    async def finish(self) -> None:
        """Nothing more will be sent."""
        await self.stream.finish()

    def abort(self, code: int) -> None:
        """Gives up both directions."""
        self.stream.stop(code)
        self.stream.reset(code)

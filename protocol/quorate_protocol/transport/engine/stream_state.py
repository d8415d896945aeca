"""A stream as the engine holds it: aioquic's `QuicStream`, made of our parts and in slots."""

from aioquic.quic.stream import QuicStreamSender

from quorate_protocol.transport.engine.receive_buffer import PieceCount, ReceiveBuffer
from quorate_protocol.transport.engine.send_buffer import Account, SendBuffer


class StreamState:
    """Both halves of a stream; the one that a unidirectional stream lacks is finished from the start."""

    __slots__ = (
        "max_stream_data_local",
        "max_stream_data_remote",
        "receiver",
        "sender",
        "stream_id",
    )

    def __init__(
        self,
        stream_id: int,
        account: Account,
        count: PieceCount,
        *,
        max_stream_data_local: int,
        max_stream_data_remote: int,
        readable: bool,
        writable: bool,
    ) -> None:
        self.stream_id = stream_id
        self.max_stream_data_local = max_stream_data_local
        self.max_stream_data_remote = max_stream_data_remote
        self.receiver = ReceiveBuffer(stream_id, readable, count)
        self.sender = SendBuffer(stream_id, account) if writable else QuicStreamSender(stream_id, False)

    @property
    def is_finished(self) -> bool:
        """Whether both halves are over."""
        return self.receiver.is_finished and self.sender.is_finished

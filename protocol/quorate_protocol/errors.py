"""Every error that Quorate raises on purpose.

::

    QuorateError
    ├── LocalError                the caller's fault: nothing was sent
    │   ├── FrameTooLarge         a message over the frame ceiling (also raised for a peer's)
    │   ├── DatagramTooLarge      a datagram over what the path or the peer takes
    │   ├── BodyMissing           a body is looked at that is not here
    │   └── ConfigurationError    a setting is wrong; carries its path
    ├── LinkError                 the network or the connection
    │   ├── ConnectFailed         no connection came about
    │   ├── ConnectionClosed      it ended; carries code and reason
    │   └── ServerClosed          a listening endpoint was closed
    ├── StreamError               one stream ended early; its connection lives
    │   ├── ResetByPeer           the peer gave up sending
    │   └── StoppedByPeer         the peer gave up reading
    ├── ProtocolError             the peer broke the wire format
    │   ├── FrameTruncated
    │   ├── FrameMalformed
    │   ├── UnknownType
    │   ├── MessageInvalid
    │   ├── UnexpectedMessage
    │   ├── BodyTooLarge          a body over the ceiling, or more bytes than its header said (also raised for our own)
    │   ├── BodyTruncated
    │   └── BodyDigestWrong
    ├── SpoolError                a body cannot be held here now; the same body may be taken later
    │   ├── SpoolFull             bodies hold as many bytes as they may
    │   └── SpoolFailed           the disk is full or broken
    ├── BodyNotReceived           the body that a message refers to did not come in time
    ├── Refused                   the coordinator would not let us in
    └── CallFailed                an operator's call came back as an error

A `ProtocolError` and its kin carry the wire code that ends the stream or connection. A peer is sent
that code and never the text of an exception of ours.
"""

from enum import IntEnum
from typing import Self


class Code(IntEnum):
    """Application error codes of ALPN `quorate/1`, for CONNECTION_CLOSE, RESET_STREAM and STOP_SENDING."""

    NO_ERROR = 0x00
    INTERNAL = 0x01
    FRAME_MALFORMED = 0x02
    FRAME_TOO_LARGE = 0x03
    FRAME_TRUNCATED = 0x04
    UNKNOWN_TYPE = 0x05
    MESSAGE_INVALID = 0x06
    UNEXPECTED_MESSAGE = 0x07
    REFUSED = 0x08
    REPLACED = 0x09
    SHUTDOWN = 0x0A
    LEASE_EXPIRED = 0x0B
    CANCELLED = 0x0C
    BUSY = 0x0D
    BODY_INVALID = 0x0E
    NOT_WANTED = 0x0F


class QuorateError(Exception):
    """Root of the tree."""

    def again(self) -> Self:
        """The same, to be raised where it is kept to be raised again.

        The one that is raised holds the frames that it passes, and so bodies; kept, it would hold them for as long.
        """
        same = type(self).__new__(type(self), *self.args)
        same.__dict__.update(self.__dict__)
        return same


class LocalError(QuorateError):
    """The caller asked for what cannot be done; nothing was sent."""


class ArgumentInvalid(LocalError):
    """An argument is out of range, or of a kind that it cannot be. `argument` names it as the caller does."""

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument}: {problem}")
        self.argument = argument
        self.problem = problem


class ConfigurationError(LocalError):
    """A setting is wrong. `path` names it as in the file, such as `rounds.deadline_s`."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path
        self.problem = problem


class DatagramTooLarge(LocalError):
    """A datagram is over what the path or the peer takes. It was not queued."""

    def __init__(self, size_bytes: int, max_bytes: int) -> None:
        super().__init__(f"datagram of {size_bytes} bytes is over the {max_bytes} that the connection takes")
        self.size_bytes = size_bytes
        self.max_bytes = max_bytes


class BodyMissing(LocalError):
    """A body is looked at that is not here: a reference to it is. `is_gone` says that nobody has it any more."""

    def __init__(self, size_bytes: int, *, is_gone: bool) -> None:
        why = "the coordinator does not keep it any more" if is_gone else "it was not received with its message"
        super().__init__(f"the body of {size_bytes} bytes is not here: {why}")
        self.size_bytes = size_bytes
        self.is_gone = is_gone


class LinkError(QuorateError):
    """The network or the connection failed."""


class ConnectFailed(LinkError):
    """No connection came about: the name, the network, TLS or the protocol negotiation failed."""

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(f"cannot connect to {url}: {problem}")
        self.url = url
        self.problem = problem


class ConnectionClosed(LinkError):
    """The connection has ended. `code` is an application code, or a transport code of RFC 9000, 20.1."""

    def __init__(self, code: int, reason: str = "", *, by_peer: bool = False, transport: bool = False) -> None:
        who = "the peer" if by_peer else "this end"
        super().__init__(f"connection closed by {who}: {_code_name(code, transport)}{': ' + reason if reason else ''}")
        self.code = code
        self.reason = reason
        self.by_peer = by_peer
        self.transport = transport

    @property
    def timed_out(self) -> bool:
        """Whether it ended because nothing came of the peer for too long (RFC 9000, 10.1)."""
        return self.transport and not self.by_peer and self.reason == "Idle timeout"


class ServerClosed(LinkError):
    """The listening endpoint was closed: no connection will come."""


class StreamError(QuorateError):
    """One stream ended before its end; its connection lives on."""

    _what = "the stream ended early"

    def __init__(self, code: int, why: str = "") -> None:
        super().__init__(f"{why or self._what}: {_code_name(code, False)}")
        self.code = code


class ResetByPeer(StreamError):
    """The peer reset its sending half (RESET_STREAM, RFC 9000, 19.4)."""

    _what = "the peer gave the stream up"


class StoppedByPeer(StreamError):
    """The peer does not want our bytes any more (STOP_SENDING, RFC 9000, 19.5)."""

    _what = "the peer reads no more of the stream"


class ProtocolError(QuorateError):
    """The peer broke the wire format."""

    code: Code = Code.FRAME_MALFORMED


class FrameTooLarge(ProtocolError, LocalError):
    """A frame's length is over the ceiling. Nothing was allocated for it."""

    code = Code.FRAME_TOO_LARGE

    def __init__(self, frame_bytes: int, frame_bytes_max: int) -> None:
        super().__init__(f"frame of {frame_bytes} bytes is over the ceiling of {frame_bytes_max}")
        self.frame_bytes = frame_bytes
        self.frame_bytes_max = frame_bytes_max


class FrameTruncated(ProtocolError):
    """The stream ended in the middle of a frame."""

    code = Code.FRAME_TRUNCATED

    def __init__(self, missing_bytes: int) -> None:
        super().__init__(f"stream ended {missing_bytes} bytes before the end of a frame")
        self.missing_bytes = missing_bytes


class FrameMalformed(ProtocolError):
    """A payload is not the msgpack map it has to be, or holds something that may not travel."""


class UnknownType(ProtocolError):
    """A message of a type that this version does not know."""

    code = Code.UNKNOWN_TYPE

    def __init__(self, type_: object) -> None:
        super().__init__(f"unknown message type {str(type_)[:64]!r}")
        self.type = type_


class MessageInvalid(ProtocolError):
    """A message of a known type whose keys or values are wrong. `problem` names the key."""

    code = Code.MESSAGE_INVALID

    def __init__(self, type_: str, problem: str) -> None:
        super().__init__(f"invalid {type_} message: {problem}")
        self.type = type_
        self.problem = problem


class UnexpectedMessage(ProtocolError):
    """A valid message where the protocol does not allow it."""

    code = Code.UNEXPECTED_MESSAGE

    def __init__(self, type_: str, where: str) -> None:
        super().__init__(f"unexpected {type_} message {where}")
        self.type = type_


class BodyTooLarge(ProtocolError, LocalError):
    """A body is over the ceiling, or goes on after the bytes that its header announced."""

    code = Code.BODY_INVALID

    def __init__(self, size_bytes: int, size_bytes_max: int, *, announced: bool = False) -> None:
        what = "that were announced" if announced else "of the ceiling"
        super().__init__(f"body of {size_bytes} bytes is over the {size_bytes_max} {what}")
        self.size_bytes = size_bytes
        self.size_bytes_max = size_bytes_max


class BodyTruncated(ProtocolError):
    """A body ended before the bytes that its header announced."""

    code = Code.BODY_INVALID

    def __init__(self, size_bytes: int, expected_bytes: int) -> None:
        super().__init__(f"body ended after {size_bytes} bytes of {expected_bytes}")
        self.size_bytes = size_bytes
        self.expected_bytes = expected_bytes


class BodyDigestWrong(ProtocolError):
    """The bytes of a body are not those that its header announced."""

    code = Code.BODY_INVALID

    def __init__(self, digest: bytes, expected: bytes) -> None:
        super().__init__(f"body has the SHA-256 digest {digest.hex()}, expected {expected.hex()}")
        self.digest = digest
        self.expected = expected


class SpoolError(QuorateError):
    """A body cannot be held here now. The peer is told `BUSY`."""

    code: Code = Code.BUSY


class SpoolFull(SpoolError):
    """Bodies hold as many bytes as they may in this process. Later there may be room."""

    def __init__(self, where: str, size_bytes: int, held_bytes: int, bytes_max: int) -> None:
        super().__init__(f"no room for a body of {size_bytes} bytes {where}: {held_bytes} of {bytes_max} are taken")
        self.size_bytes = size_bytes
        self.held_bytes = held_bytes
        self.bytes_max = bytes_max


class SpoolFailed(SpoolError):
    """The spool directory does not take a body: no space, no permission, a broken disk. Nothing of it is left there."""

    def __init__(self, directory: object, size_bytes: int, problem: str) -> None:
        super().__init__(f"cannot spool a body of {size_bytes} bytes in {directory}: {problem}")
        self.directory = directory
        self.size_bytes = size_bytes
        self.problem = problem


class BodyNotReceived(QuorateError):
    """The body that a message refers to did not come, or not whole, in the time there was.

    `received_bytes` where it was given up because nothing came for so long after so many of its bytes, else None.
    """

    def __init__(self, size_bytes: int, timeout_s: float, received_bytes: int | None = None) -> None:
        if received_bytes is None:
            text = f"body of {size_bytes} bytes has not come within {timeout_s:g} s"
        else:
            text = f"body of {size_bytes} bytes: nothing has come for {timeout_s:g} s after {received_bytes} of them"
        super().__init__(text)
        self.size_bytes = size_bytes
        self.timeout_s = timeout_s
        self.received_bytes = received_bytes


class Refused(QuorateError):
    """The coordinator answered `hello` with `refusal`. `retry` says whether it may let us in later."""

    def __init__(self, reason: str, message: str, *, retry: bool = False) -> None:
        super().__init__(f"refused ({reason}): {message}")
        self.reason = reason
        self.message = message
        self.retry = retry


class CallFailed(QuorateError):
    """An operator's call was answered with an error. `retry` says whether the same call may succeed later."""

    def __init__(self, reason: str, message: str, *, retry: bool = False) -> None:
        super().__init__(f"{message} ({reason})")
        self.reason = reason
        self.message = message
        self.retry = retry


def _code_name(code: int, transport: bool) -> str:
    if not transport:
        try:
            return f"{Code(code).name} (0x{code:x})"
        except ValueError:
            pass
    return f"{'transport ' if transport else ''}code 0x{code:x}"

"""Frames: a 4-byte big-endian length, then one msgpack map with text keys. Pure: bytes in, maps out.

A length over the ceiling is refused when its four bytes are there, before anything is allocated for
the payload.
"""

import struct
from typing import Any, Final

import msgpack

from quorate_protocol.errors import FrameMalformed, FrameTooLarge, FrameTruncated, LocalError
from quorate_protocol.limits import FRAME_BYTES_MAX, FRAME_PREFIX_BYTES

_PREFIX: Final = struct.Struct(">I")


def encode_frame(message: dict[str, Any], *, frame_bytes_max: int = FRAME_BYTES_MAX) -> bytes:
    """One frame, prefix and payload, for a message map.

    Raises:
        FrameTooLarge: the payload is over `frame_bytes_max`.
        LocalError: the message holds something that cannot travel.
    """
    try:
        payload: bytes = msgpack.packb(message, use_bin_type=True)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise LocalError(f"message cannot be sent: {error}") from error
    if len(payload) > frame_bytes_max:
        raise FrameTooLarge(len(payload), frame_bytes_max)
    return _PREFIX.pack(len(payload)) + payload


class FrameDecoder:
    """Cuts a byte stream into message maps.

    >>> decoder = FrameDecoder()
    >>> frame = encode_frame({"type": "goodbye"})
    >>> decoder.feed(frame[:3])
    []
    >>> decoder.feed(frame[3:])
    [{'type': 'goodbye'}]
    >>> decoder.finish()

    After an error the decoder stays broken: the frame boundary is lost, and every later call raises
    the same error. `frame_bytes_max` may be raised between calls, after a hello was accepted.
    """

    def __init__(self, *, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self.frame_bytes_max = frame_bytes_max
        self._buffer = bytearray()
        self._error: FrameMalformed | FrameTooLarge | None = None

    @property
    def buffered_bytes(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Takes the next bytes of the stream and returns the messages that they complete, in order.

        When a bad frame follows good ones in the same bytes, the good ones are returned and the
        next call raises: nothing that arrived whole is lost.

        Raises:
            FrameTooLarge: a length prefix is over the ceiling.
            FrameMalformed: a payload is not a msgpack map with text keys.
        """
        if self._error is not None:
            raise self._error
        buffer = self._buffer
        buffer += data
        messages: list[dict[str, Any]] = []
        position = 0
        try:
            while len(buffer) - position >= FRAME_PREFIX_BYTES:
                (length,) = _PREFIX.unpack_from(buffer, position)
                if length > self.frame_bytes_max:
                    raise FrameTooLarge(length, self.frame_bytes_max)
                start = position + FRAME_PREFIX_BYTES
                if len(buffer) < start + length:
                    break
                messages.append(_decode_payload(bytes(buffer[start : start + length])))
                position = start + length
        except (FrameMalformed, FrameTooLarge) as error:
            self._error = error
            buffer.clear()
            if not messages:
                raise
            return messages
        del buffer[:position]
        return messages

    def finish(self) -> None:
        """The stream has ended.

        Raises:
            FrameTruncated: in the middle of a frame.
            FrameTooLarge, FrameMalformed: an error that `feed` held back.
        """
        if self._error is not None:
            raise self._error
        if self._buffer:
            wanted = FRAME_PREFIX_BYTES
            if len(self._buffer) >= FRAME_PREFIX_BYTES:
                wanted += _PREFIX.unpack_from(self._buffer)[0]
            raise FrameTruncated(wanted - len(self._buffer))


def _decode_payload(payload: bytes) -> dict[str, Any]:
    try:
        # Text keys only: CPython hashes text with a secret, so that a peer cannot choose collisions.
        value = msgpack.unpackb(payload, raw=False, strict_map_key=True)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise FrameMalformed(f"payload is not msgpack: {type(error).__name__}") from error
    if not isinstance(value, dict):
        raise FrameMalformed(f"payload is a msgpack {type(value).__name__}, not a map")
    for key in value:
        if type(key) is not str:  # msgpack's strict keys may be bytes too
            raise FrameMalformed("payload has a key that is not text")
    return value

"""Stateless resets: an end that has lost a connection, with the rest of its memory, says so (RFC 9000, 10.3). Pure.

A server's tokens are a keyed hash of its connection ids: who keeps the key knows them again, whatever else is lost. So
a client hears at once that its connection is no more, where it would have waited for silence to grow long.
"""

import hashlib
import os
from typing import Final

TOKEN_BYTES: Final = 16

#: Bits that look like a packet's beside the token: 38 at the least, in whole bytes (RFC 9000, 10.3).
_RANDOM_BYTES_MIN: Final = 5

#: A reset is as long as a small packet, so that those on the path do not tell it by its length.
_RESET_BYTES_MAX: Final = 42


class ResetKey:
    """Makes the tokens of one server's connections."""

    def __init__(self, secret: bytes) -> None:
        """Keeps the secret: 16 to 64 bytes."""
        assert 16 <= len(secret) <= 64
        self._secret: Final = secret

    def token(self, connection_id: bytes) -> bytes:
        """The token of a connection id, 16 bytes."""
        return hashlib.blake2b(connection_id, key=self._secret, digest_size=TOKEN_BYTES).digest()

    def reset(self, datagram: bytes, connection_id: bytes) -> bytes | None:
        """What to answer a packet for a connection that is not known; None to one that is too small.

        It is shorter than what it answers, so that two ends that know nothing do not go on for ever (RFC 9000, 10.3.3).
        """
        length = min(len(datagram) - 1, _RESET_BYTES_MAX)
        if length < _RANDOM_BYTES_MIN + TOKEN_BYTES:
            return None
        random = bytearray(os.urandom(length - TOKEN_BYTES))
        random[0] = random[0] & 0x3F | 0x40  # as a short header begins
        return bytes(random) + self.token(connection_id)

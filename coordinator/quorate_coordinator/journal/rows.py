"""A record as it lies in the file, with the digest that tells whether it is as it was written."""

import struct
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from quorate_coordinator.journal.errors import JournalDamaged, RecordInvalid
from quorate_coordinator.journal.records import Record, RoundOpened, decode_record

#: 128 bits: against what disks and memory do, not against people.
_DIGEST_BYTES: Final = 16

#: seq, round (0 for none), at.
_HEAD: Final = struct.Struct(">QQd")

#: Columns, in the order of `Row`.
COLUMNS: Final = "seq, kind, round, at, key, digest, payload"


def compute_digest(seq: int, kind: str, round: int | None, at: float, payload: bytes) -> bytes:
    """BLAKE2b over all that a row says. Checkpoints and the mark of pruning are kinds of their own."""
    digest = blake2b(_HEAD.pack(seq, round or 0, at) + kind.encode() + b"\0", digest_size=_DIGEST_BYTES)
    digest.update(payload)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Row:
    """One row of `records`, unchecked: any value may be of any type when the file is damaged."""

    seq: int
    kind: Any
    round: Any
    at: Any
    key: Any
    digest: Any
    payload: Any

    def read(self, file: Path) -> Record:
        """The record, when it is as it was written.

        Raises:
            JournalDamaged: it is not.
        """
        if not matches(self.digest, self.seq, self.kind, self.round, self.at, self.payload):
            raise JournalDamaged(file, "its digest does not match", self.seq)
        try:
            record = decode_record(self.kind, self.payload)
        except RecordInvalid as error:
            raise JournalDamaged(file, str(error), self.seq) from error
        if record.round != self.round:
            raise JournalDamaged(file, f"it is of round {record.round} and filed under {self.round}", self.seq)
        if self.key != (record.key if isinstance(record, RoundOpened) else None):
            raise JournalDamaged(file, "it is filed under another key than it has", self.seq)
        return record


def matches(digest: object, seq: Any, kind: Any, round: Any, at: Any, payload: Any) -> bool:
    """Whether the digest is that of the rest, whatever types they have."""
    try:
        return bool(compute_digest(seq, kind, round, at, payload) == digest)
    except (TypeError, ValueError, AttributeError, struct.error):
        return False

"""Reading a journal: at the start of the coordinator, for an idempotency key, and by the commands.

A reader sees what is committed at each call, and holds nothing up: it takes no lock for longer than one short query.
"""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from quorate_coordinator.journal.database import connect_to_read, damage_told
from quorate_coordinator.journal.errors import JournalDamaged
from quorate_coordinator.journal.records import Record, ReplyLate, RoundClosed, RoundOpened, TruthTold
from quorate_coordinator.journal.rows import COLUMNS, Row, matches

#: Rows of one query. While a query is read, the write-ahead log cannot begin anew; this many take milliseconds.
_PAGE_ROWS: Final = 256


@dataclass(slots=True)
class KnownRound:
    """What the journal has about one round."""

    round: int
    opened: RoundOpened | None = None
    closed: RoundClosed | None = None
    truth: TruthTold | None = None
    #: In the order in which they came.
    late: list[ReplyLate] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The learner's state after all records up to `seq`."""

    seq: int
    #: Unix time.
    at: float
    snapshot: bytes


@dataclass(frozen=True, slots=True)
class Pruned:
    """How far records have been taken away: some of those up to these numbers, none after."""

    seq: int
    round: int


class JournalReader:
    """An open journal. Not thread-safe.

    Every method raises `JournalDamaged` for what it meets that is not as it was written, and `JournalUnusable` when
    the file cannot be read now.

    Raises:
        JournalTooNew, JournalDamaged, JournalUnusable: what is wrong with the file.
    """

    def __init__(self, file: Path) -> None:
        self.file: Final = file
        #: Checkpoints that `checkpoint` has passed over because they are damaged, by record number.
        self.damaged_checkpoints: tuple[int, ...] = ()
        self._connection = connect_to_read(file)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def last_seq(self) -> int:
        """Number of the last record; 0 when there has been none. The next one's is one more."""
        last = self._rows("ORDER BY seq DESC LIMIT 1")
        for row in last:
            row.read(self.file)
        newest = self._fetch("SELECT max(seq) FROM checkpoints")[0][0]
        return max(last[0].seq if last else 0, self.pruned().seq, newest or 0)

    def next_round(self) -> int:
        """One more than the highest number that a round has had."""
        last = self._rows("WHERE round IS NOT NULL ORDER BY round DESC LIMIT 1")
        for row in last:
            row.read(self.file)
        return max(last[0].round if last else 0, self.pruned().round) + 1

    def checkpoint(self) -> Checkpoint | None:
        """The newest that is as it was written; those newer ones that are not are in `damaged_checkpoints`."""
        damaged: list[int] = []
        found = None
        for seq in self.checkpoint_seqs():
            try:
                found = self.read_checkpoint(seq)
                break
            except JournalDamaged:
                damaged.append(seq)
        self.damaged_checkpoints = tuple(damaged)
        return found

    def checkpoint_seqs(self) -> list[int]:
        """Which checkpoints there are, the newest first."""
        return [seq for (seq,) in self._fetch("SELECT seq FROM checkpoints ORDER BY seq DESC")]

    def read_checkpoint(self, seq: int) -> Checkpoint:
        """One that there is."""
        rows = self._fetch("SELECT at, digest, snapshot FROM checkpoints WHERE seq = ?", seq)
        if not rows or not matches(rows[0][1], seq, "checkpoint", None, rows[0][0], rows[0][2]):
            raise JournalDamaged(self.file, f"the checkpoint after record {seq}: its digest does not match")
        return Checkpoint(seq, rows[0][0], rows[0][2])

    def records(self, after_seq: int = 0) -> Iterator[tuple[int, float, Record]]:
        """Number, Unix time and content of the records after one, in order; also of those that come meanwhile."""
        for row in self.rows(after_seq):
            yield row.seq, row.at, row.read(self.file)

    def rows(self, after_seq: int = 0, where: str = "") -> Iterator[Row]:
        """The same, unchecked, for who goes on after a damaged one."""
        while page := self._rows(f"WHERE seq > ? {where} ORDER BY seq LIMIT {_PAGE_ROWS}", after_seq):
            yield from page
            after_seq = page[-1].seq

    def newest_of(self, key: str) -> int | None:
        """Number of the newest round that was opened with this idempotency key, as the index has it: unchecked."""
        found = self._fetch("SELECT round FROM records WHERE key = ? ORDER BY seq DESC LIMIT 1", key)
        return found[0][0] if found else None

    def find_key(self, key: str) -> KnownRound | None:
        """The newest round that was opened with this idempotency key."""
        number = self.newest_of(key)
        if number is None:
            return None
        known = self.find_round(number)
        if known is None or known.opened is None or known.opened.key != key:
            raise JournalDamaged(self.file, "the index of keys leads to another one's")
        return known

    def find_round(self, round: int) -> KnownRound | None:
        """What is known about a round; None when that is nothing."""
        known = KnownRound(round)
        rows = self._rows("WHERE round = ? ORDER BY seq", round)
        for row in rows:
            match row.read(self.file):
                case RoundOpened() as record:
                    known.opened = record
                case RoundClosed() as record:
                    known.closed = record
                case TruthTold() as record:
                    known.truth = record
                case ReplyLate() as record:
                    known.late.append(record)
        return known if rows else None

    def open_rounds(self) -> list[int]:
        """Numbers of rounds that were opened and never closed, in order: the coordinator ended before they did."""
        found = self._fetch(
            "SELECT round FROM records WHERE round IS NOT NULL GROUP BY round "
            "HAVING max(kind = 'opened') AND NOT max(kind = 'closed') ORDER BY round"
        )
        return [number for (number,) in found]

    def awaiting_truth(self, count_max: int) -> list[int]:
        """Numbers of the newest rounds that were closed and whose truth was not told, in order."""
        found = self._fetch(
            "SELECT round FROM records WHERE round IS NOT NULL GROUP BY round "
            "HAVING max(kind = 'closed') AND NOT max(kind = 'truth') ORDER BY round DESC LIMIT ?",
            count_max,
        )
        return [number for (number,) in reversed(found)]

    def pruned(self) -> Pruned:
        """How far records have been taken away; zeros when none has been."""
        rows = self._fetch("SELECT seq, round, digest FROM pruned")
        if not rows:
            return Pruned(0, 0)
        last_seq, last_round, digest = rows[0]
        if not matches(digest, last_seq, "pruned", last_round, 0.0, b""):
            raise JournalDamaged(self.file, "the mark of pruning: its digest does not match")
        return Pruned(last_seq, last_round)

    def _rows(self, clauses: str, *values: object) -> list[Row]:
        # The clauses are this module's and those of its callers in the package, never anybody's input.
        return [Row(*columns) for columns in self._fetch(f"SELECT {COLUMNS} FROM records {clauses}", *values)]  # noqa: S608

    def _fetch(self, statement: str, *values: object) -> list[Any]:
        with damage_told(self.file):
            return self._connection.execute(statement, values).fetchall()

    @property
    def connection(self) -> sqlite3.Connection:
        """For who asks SQLite itself: the check of the file."""
        return self._connection

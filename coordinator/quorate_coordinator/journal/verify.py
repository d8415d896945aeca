"""Whether a journal says what was written, and whether what it says can be true.

From the ground up: SQLite's own structures, each row's digest, numbers without gaps, and what rounds may do. The check
sees the journal as it was at one moment, also while a coordinator writes it.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from quorate_coordinator.journal.database import damage_told, size_bytes
from quorate_coordinator.journal.errors import JournalDamaged
from quorate_coordinator.journal.reader import JournalReader, Pruned
from quorate_coordinator.journal.records import Record, ReplyLate, RoundClosed, RoundOpened, TruthTold
from quorate_coordinator.journal.rows import COLUMNS, Row

#: As many are told; a file that is all damage has nothing more to say.
PROBLEMS_MAX: Final = 1000


@dataclass(slots=True)
class Verification:
    """What the check found."""

    file: str
    #: In words; empty when all is well. At most `PROBLEMS_MAX`.
    problems: list[str] = field(default_factory=list)
    #: Records that could be read, by kind.
    records: dict[str, int] = field(default_factory=dict)
    #: Closed rounds by state, and those that are `open`.
    rounds: dict[str, int] = field(default_factory=dict)
    checkpoints: int = 0
    #: 0 in a journal without records.
    first_seq: int = 0
    last_seq: int = 0
    #: Up to which number records have been taken away, some or all; 0 for none.
    pruned_seq: int = 0
    #: Of the file and its write-ahead log.
    file_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        return {"ok": not self.problems, **asdict(self)}


def verify(file: Path) -> Verification:
    """Checks a journal. Damage is what it reports, and no error.

    Raises:
        JournalTooNew, JournalUnusable: it cannot be checked.
    """
    found = Verification(str(file))
    checks = _Checks(found)
    try:
        with JournalReader(file) as reader, damage_told(file):
            # One transaction, and so one moment.
            reader.connection.execute("BEGIN")
            found.file_bytes = size_bytes(file)
            checks.run(reader)
    except JournalDamaged as error:
        checks.note(error.damage)
    except OSError as error:
        checks.note(str(error))
    return found


def check_round(round: int, records: Sequence[Record], pruned_round: int = 0) -> Iterator[str]:
    """What cannot be true of all the records of one round, in their order.

    Args:
        pruned_round: up to this number rounds may be gone; what was told about them later may be left.
    """
    opened: RoundOpened | None = None
    closed: RoundClosed | None = None
    has_truth = False
    earlier: list[ReplyLate] = []
    for record in records:
        match record:
            case RoundOpened():
                if opened or closed:
                    yield "opened twice" if opened else "opened after it was closed"
                opened = record
            case RoundClosed():
                if closed:
                    yield "closed twice"
                elif opened is None:
                    yield "closed and never opened"
                else:
                    yield from _compare(opened, record)
                yield from _check_outcome(record)
                closed = record
            case TruthTold():
                if has_truth:
                    yield "its truth was told twice"
                elif not closed and round > pruned_round:
                    yield "its truth was told before it was closed"
                has_truth = True
            case ReplyLate():
                if record in earlier:
                    yield f"the same late reply of {record.agent} twice"
                earlier.append(record)
                if opened is None:
                    if round > pruned_round:
                        yield f"a late reply of {record.agent}, and it was never opened"
                elif record.agent not in opened.selected:
                    yield f"a late reply of {record.agent}, which was not selected"


def _compare(opened: RoundOpened, closed: RoundClosed) -> Iterator[str]:
    for name in ("task", "quorum", "key", "digest"):
        if getattr(opened, name) != getattr(closed, name):
            yield f"opened and closed with different {name}"
    agents = [result.agent for result in closed.results]
    if sorted(agents) != sorted(opened.selected):
        yield f"selected were {', '.join(opened.selected)}; results are of {', '.join(agents)}"


def _check_outcome(closed: RoundClosed) -> Iterator[str]:
    agents = [result.agent for result in closed.results]
    replies = sum(result.status == "replied" for result in closed.results)
    yield from (f"{count} results of {agent}" for agent, count in Counter(agents).items() if count > 1)
    yield from (
        f"{result.agent} is {result.status} and has {'no' if result.body is None else 'an'} answer"
        for result in closed.results
        if (result.body is not None) != (result.status == "replied")
    )
    if closed.state == "complete" and replies < len(agents):
        yield f"complete with {replies} replies of {len(agents)} agents"
    if closed.state in ("complete", "quorate") and replies < closed.quorum:
        yield f"{closed.state} with {replies} replies, and {closed.quorum} were needed"
    if closed.state in ("expired", "failed") and replies >= closed.quorum:
        yield f"{closed.state} with {replies} replies, and {closed.quorum} were enough"


class _Checks:
    """The parts, in order; each goes on after what it finds, as far as it can."""

    def __init__(self, found: Verification) -> None:
        self._found = found

    def note(self, problem: str) -> None:
        problems = self._found.problems
        if len(problems) < PROBLEMS_MAX:
            problems.append(problem)
        elif len(problems) == PROBLEMS_MAX:
            problems[-1] = f"and more: only the first {PROBLEMS_MAX - 1} are told"

    def run(self, reader: JournalReader) -> None:
        connection = reader.connection
        for (line,) in connection.execute(f"PRAGMA integrity_check({PROBLEMS_MAX})"):
            if line != "ok":
                self.note(f"SQLite: {line}")
        pruned = Pruned(0, 0)
        try:
            pruned = reader.pruned()
        except JournalDamaged as error:
            self.note(error.damage)
        self._found.pruned_seq = pruned.seq
        self._numbers(connection, pruned)
        self._checkpoints(reader)
        self._rounds(reader, pruned)
        self._others(reader)

    def _numbers(self, connection: sqlite3.Connection, pruned: Pruned) -> None:
        first, last = connection.execute("SELECT min(seq), max(seq) FROM records").fetchone()
        self._found.first_seq, self._found.last_seq = first or 0, last or 0
        if last is None:
            return
        (count,) = connection.execute("SELECT count(*) FROM records WHERE seq > ?", (pruned.seq,)).fetchone()
        if first < 1 or count != max(last - pruned.seq, 0):
            expected = pruned.seq
            for (seq,) in connection.execute("SELECT seq FROM records WHERE seq > ? ORDER BY seq", (pruned.seq,)):
                if seq != expected + 1:
                    self.note(f"records {expected + 1} to {seq - 1} are missing")
                expected = seq

    def _checkpoints(self, reader: JournalReader) -> None:
        for seq in reader.checkpoint_seqs():
            try:
                reader.read_checkpoint(seq)
                self._found.checkpoints += 1
            except JournalDamaged as error:
                self.note(error.damage)
            if seq > max(self._found.last_seq, self._found.pruned_seq):
                self.note(f"the checkpoint after record {seq} is of a record that is not there")

    def _rounds(self, reader: JournalReader, pruned: Pruned) -> None:
        """Rounds, one after the other, whatever their number: only one is in memory."""
        rows = reader.connection.execute(
            f"SELECT {COLUMNS} FROM records WHERE round IS NOT NULL ORDER BY round, seq"  # noqa: S608
        )
        for number, group in groupby((Row(*columns) for columns in rows), key=lambda row: row.round):
            records: list[Record] = []
            is_whole = True
            for row in group:
                record = self._read(reader, row)
                is_whole &= record is not None
                if record is not None:
                    records.append(record)
            closed = [record.state for record in records if isinstance(record, RoundClosed)]
            if closed or any(isinstance(record, RoundOpened) for record in records):
                state = closed[0] if closed else "open"
                self._found.rounds[state] = self._found.rounds.get(state, 0) + 1
            if is_whole:  # what is missing is told already
                for problem in check_round(number, records, pruned.round):
                    self.note(f"round {number}: {problem}")

    def _others(self, reader: JournalReader) -> None:
        rows = reader.connection.execute(f"SELECT {COLUMNS} FROM records WHERE round IS NULL ORDER BY seq")  # noqa: S608
        for columns in rows:
            self._read(reader, Row(*columns))

    def _read(self, reader: JournalReader, row: Row) -> Record | None:
        try:
            record = row.read(reader.file)
        except JournalDamaged as error:
            self.note(error.damage)
            return None
        self._found.records[record.kind] = self._found.records.get(record.kind, 0) + 1
        return record

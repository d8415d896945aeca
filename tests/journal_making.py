"""Journals for tests: records of believable rounds, and a journal written in a call."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from quorate_coordinator.journal.reader import JournalReader
from quorate_coordinator.journal.records import (
    ExperienceTaken,
    Record,
    RecordedResult,
    ReplyLate,
    RoundClosed,
    RoundOpened,
    TruthTold,
)
from quorate_coordinator.journal.writer import Journal
from quorate_protocol.bodies import encode_body

AGENTS = ("ant", "bee", "cat")

#: Unix time of the first record.
EPOCH_S = 1_700_000_000.0

#: Over anything that the thread does in time on a busy machine.
PATIENCE_S = 60.0


def opened(round: int, *, key: str | None = None, digest: bytes | None = None, size: int = 0) -> RoundOpened:
    """A round that three agents are asked in, two of whom must answer; `size` bytes go along."""
    body = encode_body({"x": round, "padding": b"\0" * size})
    return RoundOpened(round, "classify", body, AGENTS, 2, 0.25, 10.0, "operator-1", key, digest)


def closed(round: int, *, key: str | None = None, digest: bytes | None = None) -> RoundClosed:
    """The same round, with two replies and an agent that was lost."""
    replies = [RecordedResult(agent, "replied", encode_body("yes"), "", 0.1 + 0.2, 0.1, 1e-9) for agent in AGENTS[:2]]
    return RoundClosed(
        round,
        "classify",
        "quorate",
        2,
        (*replies, RecordedResult(AGENTS[2], "lost", error="link broken")),
        1 / 3,
        answer=encode_body("yes"),
        support=1.0,
        weights={"ant": 0.1 + 0.2, "bee": 0.7},
        key=key,
        digest=digest,
    )


def late(round: int) -> ReplyLate:
    return ReplyLate(round, "classify", AGENTS[2], encode_body("no"), 11.5, 0.25, 0.125)


def truth(round: int) -> TruthTold:
    return TruthTold(round, encode_body("yes"))


def experience(number: int = 0) -> ExperienceTaken:
    return ExperienceTaken("ant", "reward", encode_body(number))


def whole(round: int) -> list[Record]:
    """All that can be said of a round."""
    return [opened(round), closed(round), late(round), truth(round)]


def rounds(count: int, first: int = 1) -> list[Record]:
    return [record for number in range(first, first + count) for record in whole(number)]


@dataclass
class Heard:
    """What a journal has told its loop."""

    committed: list[int] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    recovered: int = 0
    #: Set by whatever is told.
    on_change: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self, journal: Journal) -> None:
        journal.start(asyncio.get_running_loop(), self._on_committed, self._on_failed, self._on_recovered)

    async def until(self, *, committed: int = 0, failed: int = 0, recovered: int = 0) -> None:
        """Waits for that much."""
        async with asyncio.timeout(PATIENCE_S):
            while max(self.committed, default=0) < committed or len(self.failed) < failed or self.recovered < recovered:
                self.on_change.clear()
                await self.on_change.wait()

    def _on_committed(self, seq: int) -> None:
        self.committed.append(seq)
        self.on_change.set()

    def _on_failed(self, problem: str) -> None:
        self.failed.append(problem)
        self.on_change.set()

    def _on_recovered(self) -> None:
        self.recovered += 1
        self.on_change.set()


@asynccontextmanager
async def journalling(file: Path) -> AsyncIterator[tuple[Journal, Heard]]:
    """A journal that runs."""
    journal, heard = Journal.open(file), Heard()
    heard.start(journal)
    try:
        yield journal, heard
    finally:
        journal.close(PATIENCE_S)


def write_journal(
    file: Path, records: Iterable[Record], checkpoints: Iterable[int] = (), *, ahead_s: float = 0.0
) -> None:
    """Writes a journal, a second between its records; a checkpoint after each of those numbers."""
    journal, loop = Journal.open(file), asyncio.new_event_loop()
    journal.start(loop, lambda seq: None, lambda problem: None, lambda: None)
    last = journal.last_seq
    for number, record in enumerate(records, start=1):
        journal.append(record, at=EPOCH_S + ahead_s + last + number)
        if number in checkpoints:
            journal.append_checkpoint(journal.last_seq, b"state %d" % journal.last_seq, at=EPOCH_S + number)
    assert journal.close(PATIENCE_S)
    loop.close()


def read_journal(file: Path) -> list[tuple[int, float, Record]]:
    with JournalReader(file) as reader:
        return list(reader.records())


def execute(file: Path, statement: str, *values: object) -> None:
    """What nobody should do to a journal."""
    connection = sqlite3.connect(file, isolation_level=None)
    try:
        connection.execute(statement, values)
    finally:
        connection.close()


def record_at(seq: int) -> Record:
    """The record with this number in an endless journal of whole rounds."""
    rounds_before, part = divmod(seq - 1, 4)
    return whole(rounds_before + 1)[part]

"""A disk that is the real journal: SQLite's file, written by its writer's code, torn at a crash, and really recovered.

When the process is gone, its write-ahead log is cut at a byte that the seed says, somewhere in what was being written
since the last commit that anybody was told of: the commit under way, and perhaps one more behind it, arrive from the
first byte to the one where the cut is; what follows is what was there before, or garbage, or nothing.
"""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

from quorate_coordinator.journal.prune import Retention, prune
from quorate_coordinator.journal.reader import JournalReader
from quorate_coordinator.journal.records import RoundClosed
from quorate_coordinator.journal.schema import JOURNAL_NAME
from quorate_coordinator.journal.stall import Stall
from quorate_coordinator.journal.writer import Journal, _Committer
from quorate_coordinator.recovery import Recovered, recover
from quorate_coordinator.simulation.disk import KEEP_S, MakeLearner, OnPruned, SimDisk
from quorate_coordinator.simulation.world import World

#: Bytes of garbage behind a cut: a sector.
_SECTOR_BYTES: Final = 512

#: Of a write-ahead log: its header, and a page with the header that it has there (https://sqlite.org/walformat.html).
_HEADER_BYTES: Final = 32
_FRAME_BYTES: Final = 24 + 4096


class _AtOnce:
    """Stands for the loop that the journal's thread talks to: there is no thread."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *arguments: object) -> None:
        callback(*arguments)


class JournalDisk(SimDisk):
    """See the module.

    Args:
        world: Where it is.
        directory: Empty; one journal after the other is in it, each as the crash of the one before has left it.
    """

    def __init__(self, world: World, directory: Path) -> None:
        super().__init__(world)
        self._directory = directory
        self._tearing = world.stream("torn journal")
        self._crashes = 0
        #: Rounds that were pruned.
        self._pruned: set[int] = set()
        #: What is to be pruned once so many records are durable: how many, what is kept, the time of day, who is told.
        self._pruning: tuple[int, Retention, float, OnPruned] | None = None
        self._open_journal()

    def _open_journal(self) -> None:
        self._file = self._directory / f"{self._crashes}" / JOURNAL_NAME
        self._journal = Journal.open(self._file)
        # Nobody pulls the plug on the machine that simulates.
        self._journal._connection.execute("PRAGMA synchronous = OFF")
        self._reader = JournalReader(self._file)
        loop: Any = _AtOnce()
        self._committer = _Committer(self._journal, loop, Stall(loop, lambda: (0, 0), _ignore, _raise, _ignore))

    @property
    def _wal(self) -> Path:
        return self._file.with_name(self._file.name + "-wal")

    def _write(self, group: int, checkpoints: list[tuple[int, bytes]]) -> None:
        for number in range(self._journal.last_seq, group):
            self._journal.append(self.records[number], at=self.made_at[number])
        for covered, snapshot in checkpoints:
            self._journal.append_checkpoint(covered, snapshot, at=self._world.wall())
        if not self._committer._commit(self._committer._take_group(wait=False)):
            raise AssertionError("the journal does not close while it is written")
        if self._pruning is not None and self._pruning[0] <= group:
            self._prune(*self._pruning[1:])

    def _survive(self, waiting: int) -> int:
        self._pruning = None
        before, durable = self._wal.read_bytes() if self._wal.exists() else b"", self._journal.last_seq
        content = self._file.read_bytes()
        if waiting and not self.is_full:
            # What is synced in a commit is the log alone: it moves to the file itself afterwards.
            self._journal._connection.execute("PRAGMA wal_autocheckpoint = 0")
            if self._group > durable:
                self._write(self._group, [one for one in self._checkpoints if one[0] <= self._group])
            if len(self.records) > self._group and self._tearing.random() < 0.5:
                self._write(len(self.records), [one for one in self._checkpoints if one[0] > self._group])
        after = self._wal.read_bytes() if self._wal.exists() else b""
        self._let_go()
        self._crashes += 1
        file = self._directory / f"{self._crashes}" / JOURNAL_NAME
        file.parent.mkdir()
        file.write_bytes(content)
        file.with_name(file.name + "-wal").write_bytes(self._tear(before, after))
        shutil.rmtree(self._file.parent)
        self._open_journal()
        self._check()
        with JournalReader(self._file) as reader:
            checkpoint = reader.checkpoint()
        self.checkpoint = None if checkpoint is None else (checkpoint.seq, checkpoint.snapshot)
        return self._journal.last_seq - self.durable

    def _check(self) -> None:
        """What is in the journal is what was appended, from the first record on, but for what was pruned."""
        with JournalReader(self._file) as reader:
            found = {number: record for number, _, record in reader.records()}
        last = self._journal.last_seq
        if last < self.durable:
            self.on_loss(f"{self.durable} records were durable, and {last} are there after the crash")
        for number, record in enumerate(self.records[:last], start=1):
            there = found.pop(number, None)
            if there != record and not (there is None and record.round in self._pruned):
                self.on_loss(f"record {number} of {last} was {record}, and is {there} after the crash")
        if found:
            self.on_loss(f"nobody has made records {sorted(found)}")

    def _tear(self, before: bytes, after: bytes) -> bytes:
        """What of a log has reached the disk that was `before` and would have become `after`."""
        if before == after:
            return after
        draw, first = self._tearing, _common_bytes(before, after)
        cut = len(after) if draw.random() < 0.1 else draw.randint(first, len(after))
        self._world.note(f"the journal's log is cut after {cut} of {len(after)} bytes")
        garbage = draw.randbytes(draw.choice((0, _SECTOR_BYTES))) if cut < len(after) else b""
        return after[:cut] + garbage + before[cut + len(garbage) :]

    def find_key(self, key: str) -> RoundClosed | None:
        known = self._reader.find_key(key)
        return None if known is None else known.closed

    def recover(self, make_learner: MakeLearner, remembered_max: int) -> Recovered:
        with JournalReader(self._file) as reader:
            return recover(reader, lambda: make_learner(None), make_learner, remembered_max=remembered_max)

    def prune(self, awaiting: Collection[int], on_pruned: OnPruned) -> None:
        # Behind all that was queued before it, as in the writer.
        retention, now_s = Retention(keep_s=KEEP_S, rounds=awaiting), self._world.wall()
        if self._journal.last_seq == len(self.records):
            self._prune(retention, now_s, on_pruned)
        elif self._pruning is None:
            self._pruning = len(self.records), retention, now_s, on_pruned

    def _prune(self, retention: Retention, now_s: float, on_pruned: OnPruned) -> None:
        self._pruning = None
        before = self._rounds()
        for _ in prune(self._journal._connection, retention, now_s):
            pass
        pruned = before - self._rounds()
        self._pruned |= pruned
        on_pruned(pruned, now_s)

    def _rounds(self) -> frozenset[int]:
        found = self._reader.connection.execute("SELECT DISTINCT round FROM records WHERE round IS NOT NULL")
        return frozenset(number for (number,) in found)

    def _let_go(self) -> None:
        self._reader.close()
        self._journal.close(0.0)

    def close(self) -> None:
        self._let_go()


def _common_bytes(before: bytes, after: bytes) -> int:
    """Bytes from the first on that two logs share: whole frames, since there are random numbers in each."""
    first, end = 0, _HEADER_BYTES
    while end <= len(before) and before[first:end] == after[first:end]:
        first, end = end, end + _FRAME_BYTES
    return first


def _ignore(*arguments: object) -> None:
    """Durable means that `_commit` has returned."""


def _raise(problem: str) -> None:
    raise AssertionError(problem)

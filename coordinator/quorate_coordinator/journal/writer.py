"""Writing the journal: records are numbered and packed where they are appended, and committed in groups on a thread.

The thread takes all that is queued, writes it in one transaction, and tells the event loop up to which record
everything is durable. While it waits for the disk, more queues up: the slower the disk, the larger the groups. A commit
that fails loses nothing: the group is kept and tried again until it succeeds.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import structlog

from quorate_coordinator.journal.database import Lock, OpenFiles, Sync, connect_to_write, damage_told, explain
from quorate_coordinator.journal.errors import JournalUnusable, RecordInvalid
from quorate_coordinator.journal.prune import PruneReport, Retention, prune
from quorate_coordinator.journal.reader import JournalReader
from quorate_coordinator.journal.records import Record, RoundOpened
from quorate_coordinator.journal.rows import compute_digest
from quorate_coordinator.journal.stall import Stall

T = TypeVar("T")

_log = structlog.get_logger(__name__)

#: What may wait for the disk: what a slow one writes in a second, and some minutes of small records at a hundred a
#: second. Whoever opens rounds looks at `is_full` before; those that are open may still be closed.
PENDING_BYTES_MAX: Final = 64 << 20
PENDING_RECORDS_MAX: Final = 65_536

#: Largest record. SQLite's own limit for a blob is 1e9 bytes, and one that it refused would stop the queue for good.
RECORD_BYTES_MAX: Final = 256 << 20

#: One transaction takes no more than this and one record: it is what an append behind it waits for.
_GROUP_BYTES: Final = 8 << 20

#: Seconds before a failed commit is tried again: at first, and at most.
_RETRY_S: Final = 0.5
_RETRY_S_MAX: Final = 5.0

#: Seconds between two looks whether the files are still those that were opened, while nothing is written.
_LOOK_S: Final = 1.0

#: Seconds that a record which nobody waits for may be held back.
_HELD_S: Final = 0.01

#: The newest, and one to fall back on.
_CHECKPOINTS_KEPT: Final = 2

#: A row as it is handed over: seq, kind, round, at, key, payload.
_Queued = tuple[int, str, int | None, float, str | None, bytes]


@dataclass(frozen=True, slots=True)
class _Snapshot:
    seq: int
    at: float
    snapshot: bytes


@dataclass(slots=True)
class _Pruning:
    retention: Retention
    now_s: float
    up_to_seq: int
    done: "asyncio.Future[PruneReport]"
    report: PruneReport = field(default_factory=PruneReport)


@dataclass(slots=True)
class _Group:
    """What one transaction writes, and what is to be done after it."""

    rows: list[_Queued] = field(default_factory=list)
    snapshots: list[_Snapshot] = field(default_factory=list)
    flushes: "list[asyncio.Future[None]]" = field(default_factory=list)
    prunings: list[_Pruning] = field(default_factory=list)
    bytes: int = 0
    is_last: bool = False


class Journal:
    """The journal as its one writer has it. All methods are for the thread of the event loop."""

    def __init__(self, file: Path, lock: Lock, connection: sqlite3.Connection, last_seq: int) -> None:
        """See `open`."""
        self.file: Final = file
        self._lock = lock
        self._connection = connection
        self._files = OpenFiles(file, lock)
        self._queue: queue.SimpleQueue[_Queued | _Snapshot | _Pruning | asyncio.Future[None] | None] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None
        self._stall: Stall | None = None
        self._closing = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        #: Records that nobody waits for: they ride with the next one that somebody does, or go by themselves a little
        #: later. A commit of their own would hold up that one.
        self._held: list[_Queued] = []
        self._release_timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._last_seq = last_seq
        #: Bytes of the records that were appended since it was opened.
        self.record_bytes = 0
        # Each counter has one thread that writes it; what is pending is their difference.
        self._queued_bytes = 0
        self._queued_records = 0
        self._done_bytes = 0
        self._done_records = 0

    @classmethod
    def open(cls, file: Path, *, sync: Sync = "full") -> Self:
        """Opens it to write; makes it, and its directory, where there is none.

        Raises:
            JournalInUse: another process writes it.
            JournalTooNew, JournalDamaged, JournalUnusable: what is wrong with the file.
            ConfigurationError: the directory or the lock file cannot be made.
        """
        try:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise JournalUnusable(file, f"its directory cannot be made: {error.strerror or error}") from error
        with contextlib.ExitStack() as undone:
            lock = undone.enter_context(Lock(file))
            connection = undone.enter_context(contextlib.closing(connect_to_write(file, sync)))
            with JournalReader(file) as reader:
                last_seq = reader.last_seq()
            undone.pop_all()
        return cls(file, lock, connection, last_seq)

    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        on_committed: Callable[[int], None],
        on_failed: Callable[[str], None],
        on_recovered: Callable[[], None],
    ) -> None:
        """Starts the thread. What was appended before is committed now.

        Args:
            loop: where these are called:
            on_committed: everything up to this record is durable; once for each commit.
            on_failed: a commit failed or would be lost, or has taken `STALLED_S`, and why, for an operator; it is being
                tried again. Once until it recovers, or once more with another reason.
            on_recovered: commits succeed again.
        """
        assert self._thread is None
        self._loop = loop
        self._stall = Stall(
            loop, lambda: (self.pending_records, self._done_records), on_committed, on_failed, on_recovered
        )
        self._thread = threading.Thread(target=_Committer(self, loop, self._stall).run, name="journal", daemon=True)
        self._thread.start()
        if self.pending_records:
            self._stall.watch()

    def append(self, record: Record, *, at: float, hurried: bool = True) -> int:
        """Queues a record.

        Args:
            at: Unix time.
            hurried: False lets it wait some milliseconds for another to share a commit with.

        Returns:
            Its number: one more than the last one's. It is durable once `on_committed` says so.

        Raises:
            RecordInvalid: it cannot be packed, or is too large. No number was used.
        """
        payload = record.encode()
        if len(payload) > RECORD_BYTES_MAX:
            raise RecordInvalid(
                record.kind, f"it has {len(payload)} bytes, over the {RECORD_BYTES_MAX} that one may have"
            )
        seq = self._last_seq = self._last_seq + 1
        key = record.key if isinstance(record, RoundOpened) else None
        self.record_bytes += len(payload)
        self._queued_bytes += len(payload)
        self._queued_records += 1
        if self._stall is not None:
            self._stall.watch()
        row = (seq, record.kind, record.round, at, key, payload)
        if hurried or self._loop is None:
            self._put(row)
        else:
            self._held.append(row)
            if self._release_timer is None:
                self._release_timer = self._loop.call_later(_HELD_S, self._release)
        return seq

    def _put(self, item: "_Queued | _Snapshot | _Pruning | asyncio.Future[None] | None") -> None:
        """Queues something behind the records that were held back."""
        self._release()
        self._queue.put(item)

    def _release(self) -> None:
        if self._release_timer is not None:
            self._release_timer.cancel()
            self._release_timer = None
        held, self._held = self._held, []
        for row in held:
            self._queue.put(row)

    def append_checkpoint(self, seq: int, snapshot: bytes, *, at: float) -> None:
        """Queues the learner's state after all records up to `seq`, which must be there or queued. The newest two stay.

        Raises:
            RecordInvalid: it is too large.
        """
        assert 0 <= seq <= self._last_seq
        if len(snapshot) > RECORD_BYTES_MAX:
            raise RecordInvalid("checkpoint", f"it has {len(snapshot)} bytes, over the {RECORD_BYTES_MAX} allowed")
        self._queued_bytes += len(snapshot)
        self._queued_records += 1
        self._put(_Snapshot(seq, at, snapshot))

    def prune(self, retention: Retention, *, now_s: float) -> "asyncio.Future[PruneReport]":
        """Takes away what is old, in steps between commits.

        Args:
            now_s: Unix time.

        Returns:
            What was taken; fails with `JournalUnusable`, and is cancelled when the journal closes first.
        """
        done = asyncio.get_running_loop().create_future()
        # The caller knows which rounds it needs as of now: what comes while this waits for its turn is no part of it.
        self._put(_Pruning(retention, now_s, self._last_seq, done))
        return done

    async def flush(self) -> None:
        """Waits until all that was appended before is durable: without end while commits fail."""
        done = asyncio.get_running_loop().create_future()
        self._put(done)
        await done

    def close(self, timeout_s: float) -> bool:
        """Commits what is queued, and lets the file go. Blocks for `timeout_s` at most.

        A commit that fails is tried once more and not again.

        Returns:
            Whether all that was appended is durable.
        """
        if not self._is_closed:
            self._is_closed = True
            self._put(None)
            self._closing.set()
            if self._stall is not None:
                self._stall.end()
            if self._thread is None:
                self._connection.close()
                self._lock.release()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self.pending_records == 0

    @property
    def last_seq(self) -> int:
        """Number of the record that was appended last, now or in an earlier run; 0 before the first."""
        return self._last_seq

    @property
    def pending_bytes(self) -> int:
        """Of payloads that are not durable yet."""
        return self._queued_bytes - self._done_bytes

    @property
    def pending_records(self) -> int:
        """Records and checkpoints that are not durable yet."""
        return self._queued_records - self._done_records

    @property
    def is_full(self) -> bool:
        """Whether so much waits for the disk that no round should be opened."""
        return self._fills(1)

    @property
    def is_half_full(self) -> bool:
        """Whether so much waits for the disk that the rest of the room should be left to rounds."""
        return self._fills(2)

    def _fills(self, parts: int) -> bool:
        return self.pending_bytes >= PENDING_BYTES_MAX // parts or self.pending_records >= PENDING_RECORDS_MAX // parts


class _Committer:
    """What the thread does."""

    def __init__(self, journal: Journal, loop: asyncio.AbstractEventLoop, told: Stall) -> None:
        self._journal = journal
        self._connection = journal._connection
        self._loop = loop
        self._on_committed = told.committed
        self._on_failed = told.failed
        self._on_recovered = told.recovered
        self._prunings: deque[tuple[_Pruning, Iterator[PruneReport]]] = deque()
        self._files = journal._files
        #: Whether `on_failed` was called last.
        self._has_failed = False
        #: Whether the group that is being written may be there, although the last commit has failed.
        self._may_be_there = False

    def run(self) -> None:
        waiting: list[asyncio.Future[Any]] = []
        try:
            is_last = False
            while not is_last:
                group = self._take_group(wait=not self._prunings)
                is_last = group.is_last
                waiting = [*group.flushes, *(one.done for one in group.prunings)]
                if group.rows or group.snapshots:
                    if not self._commit(group):
                        return
                else:
                    self._look()
                for flush in group.flushes:
                    self._tell(_resolve, flush, None)
                waiting = []
                self._prunings += [
                    (one, prune(self._connection, one.retention, one.now_s, up_to_seq=one.up_to_seq))
                    for one in group.prunings
                ]
                if self._prunings and not is_last:
                    self._prune()
        except Exception:  # noqa: BLE001  nobody else would hear of it
            _log.exception("journal_thread_failed")
            self._tell(self._on_failed, "the journal's thread has ended, which is a mistake in Quorate; see its log")
        finally:
            for future in [*waiting, *(pruning.done for pruning, _ in self._prunings), *self._left_waiting()]:
                self._tell(future.cancel)
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._journal._lock.release()

    def _left_waiting(self) -> Iterator["asyncio.Future[Any]"]:
        """What waits behind a group that could not be written."""
        with contextlib.suppress(queue.Empty):
            while True:
                match self._journal._queue.get_nowait():
                    case _Pruning(done=done) | (asyncio.Future() as done):
                        yield done

    def _take_group(self, *, wait: bool) -> _Group:
        """All that is queued, up to the ceiling of one transaction; waits for the first, but not for ever."""
        group = _Group()
        take = self._journal._queue.get
        try:
            item = take(wait, _LOOK_S)
            while True:
                match item:
                    case tuple():
                        group.rows.append(item)
                        group.bytes += len(item[5])
                    case _Snapshot():
                        group.snapshots.append(item)
                        group.bytes += len(item.snapshot)
                    case _Pruning():
                        group.prunings.append(item)
                    case None:
                        group.is_last = True
                        break
                    case _:
                        group.flushes.append(item)
                if group.bytes >= _GROUP_BYTES:
                    break
                item = take(False)
        except queue.Empty:
            pass
        return group

    def _commit(self, group: _Group) -> bool:
        """Until it succeeds, or the journal closes and once more was not enough."""
        rows = [
            (seq, kind, number, at, key, compute_digest(seq, kind, number, at, payload), payload)
            for seq, kind, number, at, key, payload in group.rows
        ]
        pause_s = 0.0
        while True:
            is_closing = self._journal._closing.is_set()
            try:
                self._files.check()
                self._write(rows, group.snapshots)
                self._files.check()
                break
            except (sqlite3.Error, JournalUnusable) as error:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.rollback()
                self._failed(error)
                if is_closing:
                    return False
                pause_s = min(pause_s * 2 or _RETRY_S, _RETRY_S_MAX)
                self._journal._closing.wait(pause_s)
        self._journal._done_bytes += group.bytes
        self._journal._done_records += len(group.rows) + len(group.snapshots)
        self._may_be_there = False
        self._recovered()
        if group.rows:
            self._tell(self._on_committed, group.rows[-1][0])
        else:
            # A checkpoint alone: the disk may have been told of as one that stands still.
            self._tell(self._on_recovered)
        return True

    def _look(self) -> None:
        """Whether what would be written now could be found again."""
        try:
            self._files.check()
        except JournalUnusable as error:
            self._failed(error)
        else:
            self._recovered()

    def _failed(self, error: sqlite3.Error | JournalUnusable) -> None:
        if not self._has_failed:
            self._has_failed = True
            file = self._journal.file
            problem = str(error) if isinstance(error, JournalUnusable) else explain(error, file)
            _log.error("journal_commit_failed", file=str(file), error=str(error))
            self._tell(self._on_failed, f"the journal cannot be written: {problem}")

    def _recovered(self) -> None:
        if self._has_failed:
            self._has_failed = False
            _log.info("journal_recovered", file=str(self._journal.file))
            self._tell(self._on_recovered)

    def _write(self, rows: Sequence[tuple[object, ...]], snapshots: list[_Snapshot]) -> None:
        # REPLACE only where a commit of the same group has failed half-way: what is there otherwise is another's.
        verb = "INSERT OR REPLACE" if self._may_be_there else "INSERT"
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            f"{verb} INTO records (seq, kind, round, at, key, digest, payload) VALUES (?, ?, ?, ?, ?, ?, ?)",
            rows,
        )
        for one in snapshots:
            digest = compute_digest(one.seq, "checkpoint", None, one.at, one.snapshot)
            connection.execute(
                "INSERT OR REPLACE INTO checkpoints (seq, at, digest, snapshot) VALUES (?, ?, ?, ?)",
                (one.seq, one.at, digest, one.snapshot),
            )
            connection.execute(
                "DELETE FROM checkpoints WHERE seq NOT IN (SELECT seq FROM checkpoints ORDER BY seq DESC LIMIT ?)",
                (_CHECKPOINTS_KEPT,),
            )
        self._may_be_there = True
        connection.execute("COMMIT")
        self._files.wrote()

    def _prune(self) -> None:
        """One step of the pruning that was asked for first."""
        pruning, steps = self._prunings[0]
        try:
            with damage_told(self._journal.file):
                self._files.check()
                try:
                    report = next(steps, None)
                finally:
                    self._files.wrote()
        except JournalUnusable as error:
            self._prunings.popleft()
            self._tell(_fail, pruning.done, error)
            return
        if report is not None:
            pruning.report = report
        else:
            self._prunings.popleft()
            self._tell(_resolve, pruning.done, pruning.report)

    def _tell(self, callback: Callable[..., object], *arguments: object) -> None:
        # The loop may be gone before the thread is: then nobody listens any more.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)


def _resolve(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[T]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)

"""The journal as the service has it: opened, recovered from, written by the gatherer, pruned now and then."""

import asyncio
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, Self

import structlog

from quorate_coordinator.journal.database import Lock, size_bytes
from quorate_coordinator.journal.errors import JournalDamaged, JournalUnusable
from quorate_coordinator.journal.prune import Retention
from quorate_coordinator.journal.reader import JournalReader, KnownRound
from quorate_coordinator.journal.records import ExperienceTaken, Record, RoundClosed
from quorate_coordinator.journal.schema import JOURNAL_NAME
from quorate_coordinator.journal.writer import Journal
from quorate_coordinator.learner.api import Learner
from quorate_coordinator.ledger import interrupt
from quorate_coordinator.recovery import Recovered, recover
from quorate_coordinator.settings import Settings
from quorate_protocol.errors import CallFailed, ConfigurationError

log = structlog.get_logger()

#: Seconds between two looks for what is too old, and whether the journal has become far too large.
PRUNE_INTERVAL_S: Final = 600.0
PRUNE_SIZE_INTERVAL_S: Final = 10.0

#: Far too large is this much over `journal.keep_bytes`, as a part of it.
_PRUNE_EXCESS: Final = 0.25

#: Experiences that are a restart's work like one round.
_EXPERIENCES_PER_ROUND: Final = 10

#: Bytes of records after which the learner's state is written down, whatever they are: nothing can be pruned that no
#: checkpoint covers, and what is replayed is read.
CHECKPOINT_BYTES: Final = 16 << 20

#: Seconds that the last records may take to become durable when the coordinator ends.
CLOSE_TIMEOUT_S: Final = 5.0

#: Rounds that are read at once for who asks again: each may take some hundred MiB of memory.
_READS_MAX: Final = 2


def lock_state_dir(settings: Settings) -> Lock | None:
    """Keeps a second coordinator out of a state directory that has no journal: one that has is locked with it.

    Raises:
        ConfigurationError: another coordinator uses it, or it cannot be made.
    """
    if settings.journal.sync != "off":
        return None
    try:
        settings.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError("state_dir", f"cannot be made: {error.strerror or error}") from error
    return Lock(settings.state_dir / JOURNAL_NAME)


class Recording:
    """A journal that is open for writing."""

    def __init__(
        self, journal: Journal, reader: JournalReader, first_seq: int, recovered: Recovered, checkpoint_rounds: int
    ) -> None:
        """See `open`."""
        self.journal: Final = journal
        #: Number of the first record of this run.
        self.first_seq: Final = first_seq
        self._reader = reader
        # What a restart would replay, in experiences, and from how many bytes on. What no checkpoint of earlier runs
        # covers counts as rounds: however often a coordinator dies, it must not pile up.
        self._checkpoint_work = checkpoint_rounds * _EXPERIENCES_PER_ROUND
        self._work = recovered.replayed * _EXPERIENCES_PER_ROUND
        self._checkpoint_bytes = 0
        self._reading = asyncio.Semaphore(_READS_MAX)
        #: Times that something was read that is not as it was written.
        self.damaged_total = len(recovered.damaged)

    @classmethod
    def open(
        cls,
        settings: Settings,
        make_learner: Callable[[], Learner],
        restore_learner: Callable[[bytes], Learner],
    ) -> tuple[Self, Recovered] | None:
        """Opens the journal that the settings name, and recovers what it holds. Blocks while it reads.

        Returns:
            The journal, and what it says of earlier runs; None where the settings want no journal.

        Raises:
            JournalUnusable: it is damaged, of a later version, or another learner's.
            ConfigurationError: another coordinator uses it, or its directory cannot be written.
        """
        if settings.journal.sync == "off":
            return None
        began_at = time.monotonic()
        journal = Journal.open(settings.state_dir / JOURNAL_NAME, sync=settings.journal.sync)
        first_seq = journal.last_seq + 1
        reader: JournalReader | None = None
        try:
            reader = JournalReader(journal.file)
            recovered = recover(reader, make_learner, restore_learner, remembered_max=settings.rounds.remembered_max)
            for opened in recovered.cut_off:
                journal.append(interrupt(opened, "the coordinator died while it was open"), at=time.time())
        except BaseException:
            if reader is not None:
                reader.close()
            journal.close(0.0)
            raise
        for problem in recovered.damaged:
            log.error("journal_damaged", problem=problem)
        log.info(
            "journal_read",
            file=str(journal.file),
            last_record=journal.last_seq,
            replayed=recovered.replayed,
            awaiting_truth=len(recovered.awaiting),
            interrupted=len(recovered.cut_off),
            seconds=round(time.monotonic() - began_at, 3),
        )
        return cls(journal, reader, first_seq, recovered, settings.journal.checkpoint_rounds), recovered

    @property
    def file_bytes(self) -> int:
        """Size of the journal and of its write-ahead log."""
        return size_bytes(self.journal.file)

    # --- what the gatherer needs ---

    @property
    def is_full(self) -> bool:
        """Whether so much waits to be written that nothing more should."""
        return self.journal.is_full

    @property
    def is_half_full(self) -> bool:
        """Whether what waits leaves room for rounds alone."""
        return self.journal.is_half_full

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether a restart would replay so much that the learner's state should be written down."""
        return (
            self._work >= self._checkpoint_work
            or self.journal.record_bytes - self._checkpoint_bytes >= CHECKPOINT_BYTES
        )

    def append(self, record: Record, at: float, *, hurried: bool) -> int:
        """Queues a record, made at `at` (Unix seconds); returns its number."""
        seq = self.journal.append(record, at=at, hurried=hurried)
        if isinstance(record, RoundClosed):
            self._work += _EXPERIENCES_PER_ROUND
        elif isinstance(record, ExperienceTaken):
            self._work += 1
        return seq

    def append_checkpoint(self, seq: int, take_snapshot: Callable[[], bytes]) -> None:
        """Queues the learner's state after all records up to `seq`; it is not due any more, even if that raises."""
        self._work, self._checkpoint_bytes = 0, self.journal.record_bytes
        snapshot = take_snapshot()
        if not isinstance(snapshot, bytes):
            raise TypeError(f"the learner's snapshot is not bytes but a {type(snapshot).__name__}")
        self.journal.append_checkpoint(seq, snapshot, at=time.time())

    def find_key(self, key: str) -> int | None:
        """Number of the last round that was opened under a key.

        Raises:
            CallFailed: the journal cannot be read.
        """
        try:
            return self._reader.newest_of(key)
        except JournalUnusable as error:
            raise self._unreadable(key, error) from error

    async def read_key(self, key: str) -> RoundClosed | None:
        """How that round was closed; None where it was not. Read in a thread: it may be large.

        Raises:
            CallFailed: the journal cannot be read.
        """
        try:
            async with self._reading:
                reading = asyncio.ensure_future(asyncio.to_thread(_find_key, self.journal.file, key))
                try:
                    known = await asyncio.shield(reading)
                finally:
                    # A thread cannot be stopped: until it has ended it is one of those that there may be.
                    await asyncio.wait((reading,))
        except JournalUnusable as error:
            raise self._unreadable(key, error) from error
        return None if known is None else known.closed

    def _unreadable(self, key: str, error: JournalUnusable) -> CallFailed:
        self._note(error)
        is_damaged = isinstance(error, JournalDamaged)
        message = f"whether {key!r} was asked before cannot be told: {error}"
        return CallFailed("not-recorded", message, retry=not is_damaged)

    def _note(self, error: JournalUnusable) -> None:
        if isinstance(error, JournalDamaged):
            self.damaged_total += 1
            log.error("journal_damaged", problem=str(error))
        else:  # too many files are open, say
            log.error("journal_not_read", problem=str(error))

    def has_truth(self, round_id: int) -> bool:
        """Whether the truth of a round is recorded; False also where the journal cannot be read."""
        try:
            known = self._reader.find_round(round_id)
        except JournalUnusable as error:
            self._note(error)
            return False
        return known is not None and known.truth is not None

    # --- life ---

    async def prune_for_ever(self, settings: Settings, awaiting: Callable[[], Collection[int]]) -> None:
        """Takes away what is too old or too much, now and then.

        Args:
            settings: how much that is.
            awaiting: tells the rounds whose truth may come: they stay.
        """
        loop = asyncio.get_running_loop()
        pruned_at = loop.time()
        while True:
            await asyncio.sleep(PRUNE_SIZE_INTERVAL_S)
            is_large = self.file_bytes > settings.journal.keep_bytes * (1 + _PRUNE_EXCESS)
            if not is_large and loop.time() < pruned_at + PRUNE_INTERVAL_S:
                continue
            pruned_at = loop.time()
            keep = Retention(
                keep_s=settings.journal.keep_days * 86_400.0,
                keep_bytes=settings.journal.keep_bytes,
                rounds=awaiting(),
            )
            try:
                report = await self.journal.prune(keep, now_s=time.time())
            except JournalUnusable as error:
                log.error("journal_not_pruned", problem=str(error))
                continue
            if report.records:
                log.info("journal_pruned", records=report.records, rounds=report.rounds, bytes=report.bytes)

    async def flush(self) -> None:
        """Waits until what was appended is durable, or the time for that is over."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.journal.flush()
        except TimeoutError:
            log.error("journal_not_flushed", records=self.journal.pending_records)

    async def close(self) -> None:
        """Lets the journal go; what was appended is durable before, or it is logged that it is not."""
        if not await asyncio.to_thread(self.journal.close, CLOSE_TIMEOUT_S):
            log.error("journal_not_flushed", records=self.journal.pending_records)
        self._reader.close()


def _find_key(file: Path, key: str) -> KnownRound | None:
    """With a reader of its own: those of SQLite are for one thread at a time."""
    with JournalReader(file) as reader:
        return reader.find_key(key)

"""A disk with one list of records: what is written is durable later, or never."""

from collections.abc import Callable, Collection
from typing import Final

from quorate_coordinator.journal.records import Record, RoundClosed, RoundOpened, TruthTold
from quorate_coordinator.learner.api import Learner
from quorate_coordinator.ledger import Ledger
from quorate_coordinator.recovery import Recovered
from quorate_coordinator.simulation.world import World

#: Seconds for which rounds are kept, by the time of day: less than a run takes.
KEEP_S: Final = 240.0

MakeLearner = Callable[[bytes | None], Learner]

#: Seconds from the first record that waits to its commit: typical, and when the disk is busy with something else.
_COMMIT_S: Final = (0.001, 0.02)
_SLOW_COMMIT_S: Final = (0.1, 1.5)
_SLOW_SHARE: Final = 0.03

#: Where in a slow commit a crash comes that was meant for one: late, so that more waits behind it.
_LATE_SHARE: Final = 0.9

#: Seconds after which a commit is tried again that found the disk full.
_RETRY_S: Final = 0.5

#: Rounds that are gone, and the time of day by which they were old.
OnPruned = Callable[[frozenset[int], float], None]


class SimDisk:
    """Append-only; a prefix of it is durable. Survives its coordinator's processes."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._random = world.stream("disk")
        #: Record n has the number n + 1. All that were ever durable stay here, also where the disk has pruned them.
        self.records: list[Record] = []
        #: The time of day at which each was made, in Unix seconds.
        self.made_at: list[float] = []
        #: How many of them, from the first, would be there after a crash.
        self.durable = 0
        #: Faults that fill it; over 0, no commit succeeds.
        self.full = 0
        #: The first round number that no process has reserved; durable at once.
        self.free_round = 1
        #: The newest checkpoint: how many records it covers, and the learner's snapshot.
        self.checkpoint: tuple[int, bytes] | None = None
        self._checkpoints: list[tuple[int, bytes]] = []
        #: By key: the number of the record that closed its last round.
        self._closed_under: dict[str, int] = {}
        self._is_committing = False
        #: Up to which record the commit under way goes.
        self._group = 0
        #: Which process has the disk: a commit of an earlier one comes to nothing.
        self._process = 0
        #: Told when more is durable, that nothing can be, and that it can again. One process at a time.
        self._on_durable: Callable[[int], None] = lambda durable: None
        self._on_failed: Callable[[str], None] = lambda problem: None
        self._on_recovered: Callable[[], None] = lambda: None
        self._has_failed = False
        #: Called once, in the next commit.
        self.in_commit: Callable[[], None] | None = None
        #: Told what is not there after a crash and should be.
        self.on_loss: Callable[[str], None] = lambda problem: None
        #: Told that a checkpoint has become durable.
        self.on_checkpoint: Callable[[int, bytes], None] = lambda covered, snapshot: None

    @property
    def is_full(self) -> bool:
        """Whether a commit would fail now."""
        return self.full > 0

    def open(
        self,
        on_durable: Callable[[int], None],
        on_failed: Callable[[str], None] = lambda problem: None,
        on_recovered: Callable[[], None] = lambda: None,
    ) -> None:
        """A process has the disk from now on."""
        self._process += 1
        self._is_committing = self._has_failed = False
        self._on_durable, self._on_failed, self._on_recovered = on_durable, on_failed, on_recovered

    def append_checkpoint(self, covered: int, snapshot: bytes) -> None:
        """A snapshot that covers so many records; it becomes durable with them."""
        self._checkpoints.append((covered, snapshot))

    def append(self, record: Record) -> int:
        """Adds a record; returns its number. It becomes durable with all before it, in a group."""
        self.records.append(record)
        self.made_at.append(self._world.wall())
        self._note_key(len(self.records), record)
        if not self._is_committing:
            self._begin()
        return len(self.records)

    def crash(self) -> None:
        """The process is gone: what is not durable is lost, but for what was just being written.

        Records may have reached the disk without anybody having been told, up to a torn one, which is dropped.
        """
        waiting = len(self.records) - self.durable
        self.open(lambda durable: None)
        survived = self._survive(waiting)
        self.durable += survived
        del self.records[self.durable :]
        del self.made_at[self.durable :]
        self._checkpoints.clear()
        self._closed_under.clear()
        for number, record in enumerate(self.records, start=1):
            self._note_key(number, record)
        if waiting:
            self._world.note(f"disk crash: {survived} of {waiting} waiting records survive")

    def _survive(self, waiting: int) -> int:
        """How many of the records that were waiting are there after a crash, from the first on."""
        return 0 if self.is_full else self._random.randint(0, waiting)

    # --- what is read ---

    def find_key(self, key: str) -> RoundClosed | None:
        """The last round that was closed under a key, as far as its record is durable."""
        number = self._closed_under.get(key, 0)
        if not 0 < number <= self.durable:
            return None
        record = self.records[number - 1]
        assert isinstance(record, RoundClosed)
        return record

    def recover(self, make_learner: MakeLearner, remembered_max: int) -> Recovered:
        """What a process knows again of what is durable."""
        covered, snapshot = self.checkpoint or (0, None)
        ledger = Ledger(make_learner(snapshot))
        opened: dict[int, RoundOpened] = {}
        closed: dict[int, RoundClosed] = {}
        truths: set[int] = set()
        for number, record in enumerate(self.records, start=1):
            match record:
                case RoundOpened():
                    opened[record.round] = record
                case RoundClosed():
                    opened.pop(record.round, None)
                    closed[record.round] = record
                case TruthTold():
                    truths.add(record.round)
            if number <= covered:
                continue
            if isinstance(record, TruthTold):
                ledger.replay_truth(closed[record.round], record)
            else:
                ledger.replay(record)
        awaiting = [one for number, one in closed.items() if number not in truths][-remembered_max:]
        return Recovered(
            ledger=ledger,
            awaiting=tuple(awaiting),
            cut_off=tuple(opened.values()),
            next_round=self.free_round,
            replayed=len(self.records) - covered,
        )

    def prune(self, awaiting: Collection[int], on_pruned: OnPruned) -> None:
        """Takes away what is older than KEEP_S, and tells which rounds are gone. This disk keeps everything."""

    def close(self) -> None:
        """The run is over."""

    def _note_key(self, number: int, record: Record) -> None:
        if isinstance(record, RoundClosed) and record.key is not None:
            self._closed_under[record.key] = number

    def _begin(self) -> None:
        """Takes what waits into a commit; what comes after this waits for the next."""
        span = _SLOW_COMMIT_S if self._random.random() < _SLOW_SHARE or self.in_commit is not None else _COMMIT_S
        self._is_committing = True
        self._group = len(self.records)
        took_s = self._random.uniform(*span)
        self._world.after(took_s, self._commit, self._process, self._group)
        if self.in_commit is not None:
            in_commit, self.in_commit = self.in_commit, None
            self._world.after(_LATE_SHARE * took_s, in_commit)

    def _commit(self, process: int, group: int) -> None:
        if process != self._process:
            return  # it is gone
        if self.is_full:
            self._world.after(_RETRY_S, self._commit, process, group)
            if not self._has_failed:
                self._has_failed = True
                self._on_failed("the disk is full")
            return
        checkpoints = [checkpoint for checkpoint in self._checkpoints if checkpoint[0] <= group]
        self._checkpoints = [checkpoint for checkpoint in self._checkpoints if checkpoint[0] > group]
        self._write(group, checkpoints)
        self.durable = group
        self._is_committing = False
        for checkpoint in checkpoints:
            self.checkpoint = checkpoint
            self.on_checkpoint(*checkpoint)
        if self._has_failed:
            self._has_failed = False
            self._on_recovered()
        if group < len(self.records):
            self._begin()
        self._on_durable(group)

    def _write(self, group: int, checkpoints: list[tuple[int, bytes]]) -> None:
        """Makes the records up to one durable, and checkpoints that they cover."""

"""What a coordinator knows again after it died: the learner's state, rounds that await their truth, rounds cut off."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from quorate_coordinator.journal.errors import JournalDamaged, JournalUnusable
from quorate_coordinator.journal.reader import JournalReader, KnownRound
from quorate_coordinator.journal.records import RoundClosed, RoundOpened, TruthTold
from quorate_coordinator.learner.api import Learner, SnapshotInvalid
from quorate_coordinator.ledger import Ledger, book_outcome_of
from quorate_coordinator.rounds.book import BookLimits, estimate_bytes
from quorate_coordinator.rounds.shelf import Shelf

_REMEMBERED_BYTES_MAX: Final = BookLimits().remembered_bytes_max


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a journal says of earlier runs."""

    ledger: Ledger
    #: Closed rounds whose truth may come, oldest first.
    awaiting: tuple[RoundClosed, ...]
    #: Rounds that were open at the end.
    cut_off: tuple[RoundOpened, ...]
    #: One more than the highest number in use.
    next_round: int
    #: Records that the learner was given again, over the checkpoint.
    replayed: int
    #: What is not as it was written, of rounds that are left out for it, and truths of rounds that have no end.
    damaged: tuple[str, ...] = ()


def recover(
    reader: JournalReader,
    make_learner: Callable[[], Learner],
    restore_learner: Callable[[bytes], Learner],
    *,
    remembered_max: int,
    remembered_bytes_max: int = _REMEMBERED_BYTES_MAX,
) -> Recovered:
    """Reads a journal from its last checkpoint on.

    Args:
        reader: The journal.
        make_learner: A learner that knows nothing.
        restore_learner: A learner from its snapshot.
        remembered_max: Rounds to remember for their truth; the newest.
        remembered_bytes_max: Memory that they may take, as the book of rounds estimates it.

    Raises:
        JournalUnusable, JournalDamaged: it cannot be read; or its checkpoint is another learner's.
    """
    checkpoint = reader.checkpoint()
    if checkpoint is None:
        if reader.damaged_checkpoints or reader.pruned().seq:
            raise JournalUnusable(
                reader.file,
                "has no checkpoint that can be read, and the records before are pruned: what was learned is lost; "
                "move the file away to begin anew",
            )
        learner, seq = make_learner(), 0
    else:
        try:
            learner, seq = restore_learner(checkpoint.snapshot), checkpoint.seq
        except SnapshotInvalid as error:
            raise JournalUnusable(
                reader.file,
                f"its checkpoint after record {checkpoint.seq} is not this learner's: {error}; "
                "set learner.kind as it was, or move the file away to begin anew",
            ) from error
    ledger = Ledger(learner)
    replayed = 0
    damaged: list[str] = []
    #: Closed since the checkpoint: their truth usually follows soon.
    closed: Shelf[RoundClosed] = Shelf(count_max=remembered_max, bytes_max=remembered_bytes_max)
    for _, _, record in reader.records(seq):
        replayed += 1
        if isinstance(record, TruthTold):
            told_of = closed.take(record.round) or _find_closed(reader, record.round)
            if told_of is None:
                damaged.append(f"{reader.file}: has the truth of round {record.round} and not its end: it is left out")
            else:
                ledger.replay_truth(told_of, record)
            continue
        ledger.replay(record)
        if isinstance(record, RoundClosed):
            closed.take(record.round)
            for old in closed.put(record.round, record, _estimate_bytes(record)):
                ledger.forget(old.round)
    awaiting = _find_awaiting(reader, remembered_max, remembered_bytes_max, damaged)
    ledger.recalled(awaiting)
    cut_off = [known.opened for known in _find_all(reader, reader.open_rounds(), damaged)]
    return Recovered(
        ledger=ledger,
        awaiting=awaiting,
        cut_off=tuple(one for one in cut_off if one is not None),
        next_round=reader.next_round(),
        replayed=replayed,
        damaged=tuple(damaged),
    )


def _find_all(reader: JournalReader, rounds: Iterable[int], damaged: list[str]) -> Iterator[KnownRound]:
    """What is known of rounds that the learner's state does not hang on: one that is damaged costs itself alone."""
    for number in rounds:
        try:
            known = reader.find_round(number)
        except JournalDamaged as error:
            damaged.append(str(error))
            continue
        if known is not None:
            yield known


def _find_awaiting(
    reader: JournalReader, count_max: int, bytes_max: int, damaged: list[str]
) -> tuple[RoundClosed, ...]:
    """The newest rounds that await their truth, oldest first, as far as they find room."""
    found: list[RoundClosed] = []
    room_bytes = bytes_max
    for known in _find_all(reader, reversed(reader.awaiting_truth(count_max)), damaged):
        if known.closed is None:
            continue
        room_bytes -= _estimate_bytes(known.closed)
        if room_bytes < 0:
            break
        found.append(known.closed)
    return tuple(reversed(found))


def _find_closed(reader: JournalReader, round_id: int) -> RoundClosed | None:
    known = reader.find_round(round_id)
    return None if known is None else known.closed


def _estimate_bytes(closed: RoundClosed) -> int:
    return estimate_bytes(book_outcome_of(closed))

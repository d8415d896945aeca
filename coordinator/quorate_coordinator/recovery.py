"""What a coordinator knows again after it died: the learner's state, rounds that await their truth, rounds cut off."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from quorate_coordinator.journal.errors import JournalDamaged, JournalUnusable
from quorate_coordinator.journal.reader import JournalReader, KnownRound
from quorate_coordinator.journal.records import RoundClosed, RoundOpened, TruthTold
from quorate_coordinator.learner.api import Learner, SnapshotInvalid
from quorate_coordinator.ledger import Ledger


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
    #: What is not as it was written, of rounds that are left out for it.
    damaged: tuple[str, ...] = ()


def recover(
    reader: JournalReader,
    make_learner: Callable[[], Learner],
    restore_learner: Callable[[bytes], Learner],
    *,
    remembered_max: int,
) -> Recovered:
    """Reads a journal from its last checkpoint on.

    Args:
        reader: The journal.
        make_learner: A learner that knows nothing.
        restore_learner: A learner from its snapshot.
        remembered_max: Rounds to remember for their truth; the newest.

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
    #: Closed since the checkpoint: their truth usually follows soon.
    closed: dict[int, RoundClosed] = {}
    for _, _, record in reader.records(seq):
        replayed += 1
        if isinstance(record, TruthTold):
            told_of = closed.pop(record.round, None) or _find_closed(reader, record.round)
            ledger.replay_truth(told_of, record)
            continue
        if isinstance(record, RoundClosed):
            closed[record.round] = record
        ledger.replay(record)
    damaged: list[str] = []
    awaiting = [known.closed for known in _find_all(reader, reader.awaiting_truth(remembered_max), damaged)]
    ledger.recalled([one for one in awaiting if one is not None])
    cut_off = [known.opened for known in _find_all(reader, reader.open_rounds(), damaged)]
    return Recovered(
        ledger=ledger,
        awaiting=tuple(one for one in awaiting if one is not None),
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


def _find_closed(reader: JournalReader, round_id: int) -> RoundClosed:
    known = reader.find_round(round_id)
    if known is None or known.closed is None:
        raise JournalUnusable(reader.file, f"has the truth of round {round_id} and not its end")
    return known.closed

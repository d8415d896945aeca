"""What is asked of a journal, and what pruning leaves of it."""

import asyncio
from collections.abc import Collection
from pathlib import Path

import pytest

from journal_making import (
    EPOCH_S,
    PATIENCE_S,
    Heard,
    closed,
    execute,
    experience,
    journalling,
    late,
    opened,
    read_journal,
    rounds,
    truth,
    write_journal,
)
from quorate_coordinator.journal.database import connect_to_write
from quorate_coordinator.journal.errors import JournalDamaged
from quorate_coordinator.journal.prune import PruneReport, Retention, prune
from quorate_coordinator.journal.reader import Checkpoint, JournalReader, Pruned
from quorate_coordinator.journal.records import Record
from quorate_coordinator.journal.verify import verify
from quorate_coordinator.journal.writer import Journal


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite3"


def rounds_in(file: Path) -> list[int]:
    return sorted({record.round for _, _, record in read_journal(file) if record.round is not None})


def prune_file(file: Path, retention: Retention, now_s: float, *, dry_run: bool = False) -> PruneReport:
    connection = connect_to_write(file, "normal")
    try:
        return list(prune(connection, retention, now_s, dry_run=dry_run))[-1]
    finally:
        connection.close()


# --- reading -------------------------------------------------------------------------------------


def test_an_empty_journal(file: Path) -> None:
    write_journal(file, [])
    with JournalReader(file) as reader:
        assert (reader.last_seq(), reader.next_round(), reader.checkpoint()) == (0, 1, None)
        assert (list(reader.records()), reader.open_rounds(), reader.find_round(1)) == ([], [], None)
        assert reader.pruned() == Pruned(0, 0)
    assert verify(file).problems == []


def test_records_after_one(file: Path) -> None:
    records = rounds(300)  # more than a page
    write_journal(file, records)
    with JournalReader(file) as reader:
        assert [record for _, _, record in reader.records()] == records
        assert [record for _, _, record in reader.records(1000)] == records[1000:]
        assert list(reader.records(1200)) == []


def test_what_is_known_about_a_round(file: Path) -> None:
    write_journal(file, [opened(1), opened(2), closed(1), late(1), truth(1)])
    with JournalReader(file) as reader:
        known = reader.find_round(1)
        assert known is not None
        assert (known.opened, known.closed, known.late, known.truth) == (opened(1), closed(1), [late(1)], truth(1))
        known = reader.find_round(2)
        assert known is not None
        assert (known.opened, known.closed, known.late, known.truth) == (opened(2), None, [], None)
        assert reader.find_round(3) is None


def test_the_newest_round_of_a_key(file: Path) -> None:
    write_journal(file, [opened(1, key="k"), closed(1, key="k"), opened(2, key="other"), opened(3, key="k"), opened(4)])
    with JournalReader(file) as reader:
        for key, number in (("k", 3), ("other", 2)):
            known = reader.find_key(key)
            assert known is not None
            assert known.opened == opened(number, key=key)
        assert reader.find_key("absent") is None


def test_open_rounds_and_the_next_number(file: Path) -> None:
    write_journal(file, [*rounds(3), opened(7), opened(5), closed(5), opened(4), experience()])
    with JournalReader(file) as reader:
        assert reader.open_rounds() == [4, 7]
        assert [known.opened for number in (4, 7) if (known := reader.find_round(number))] == [opened(4), opened(7)]
        assert reader.next_round() == 8
        assert reader.last_seq() == 17


def test_a_damaged_checkpoint_is_passed_over_and_told(file: Path) -> None:
    write_journal(file, rounds(3), checkpoints=[4, 8])
    with JournalReader(file) as reader:
        assert reader.checkpoint() == Checkpoint(8, EPOCH_S + 8, b"state 8")
        assert reader.damaged_checkpoints == ()
        execute(file, "UPDATE checkpoints SET at = 0 WHERE seq = 8")
        assert reader.checkpoint() == Checkpoint(4, EPOCH_S + 4, b"state 4")
        assert reader.damaged_checkpoints == (8,)
        execute(file, "UPDATE checkpoints SET at = 0")
        assert reader.checkpoint() is None
        assert reader.damaged_checkpoints == (8, 4)


def test_a_damaged_record_is_named(file: Path) -> None:
    write_journal(file, rounds(3))
    execute(file, "UPDATE records SET payload = zeroblob(10) WHERE seq = 6")
    with JournalReader(file) as reader:
        records = reader.records(4)
        assert next(records)[0] == 5
        with pytest.raises(JournalDamaged) as caught:
            next(records)
        assert (caught.value.file, caught.value.seq) == (file, 6)
        assert str(caught.value).startswith(f"{file}: is damaged: record 6: its digest does not match; ")
        assert [row.seq for row in reader.rows(4)] == list(range(5, 13))


# --- pruning -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep_s", "needed", "left"),
    [
        (1e9, (), [1, 2, 3, 4, 5, 6]),
        (0.0, (), [4, 6]),  # 4 is open, and of 6 the checkpoint knows nothing yet
        (0.0, (2, 3), [2, 3, 4, 6]),
        (14.0, (), [2, 3, 4, 5, 6]),
        (13.0, (), [3, 4, 5, 6]),
        (8.0, (), [4, 5, 6]),
    ],
)
def test_old_rounds_go_whole(file: Path, keep_s: float, needed: Collection[int], left: list[int]) -> None:
    # Records 1 to 12, 13, 14 to 17, 18, 19 to 22; the checkpoint is after 18. Now is at record 22.
    write_journal(file, [*rounds(3), opened(4), *rounds(1, 5), experience(), *rounds(1, 6)], checkpoints=[18])
    before = {number: [record for _, _, record in read_journal(file) if record.round == number] for number in left}
    retention = Retention(keep_s=keep_s, rounds=needed)
    planned = prune_file(file, retention, EPOCH_S + 22, dry_run=True)
    assert rounds_in(file) == [1, 2, 3, 4, 5, 6]
    report = prune_file(file, retention, EPOCH_S + 22)
    assert report == planned
    assert rounds_in(file) == left
    assert report.rounds == 6 - len(left)
    assert report.records == 22 - len(read_journal(file))
    for number in left:
        assert [record for _, _, record in read_journal(file) if record.round == number] == before[number]
    assert verify(file).problems == []
    with JournalReader(file) as reader:
        assert (reader.next_round(), reader.last_seq()) == (7, 22)


def test_records_from_a_clock_that_was_ahead_hold_up_nobody(file: Path) -> None:
    write_journal(file, rounds(1), ahead_s=1e9)
    write_journal(file, rounds(5, 2), checkpoints=[20])
    prune_file(file, Retention(keep_s=3.5), EPOCH_S + 24)
    assert rounds_in(file) == [1, 6], "how old the first is, nobody can tell"


def test_late_replies_of_rounds_that_have_gone_go_too(file: Path) -> None:
    write_journal(file, rounds(3), checkpoints=[12])
    prune_file(file, Retention(keep_s=0), EPOCH_S * 2)
    write_journal(file, [late(2), late(3), opened(4)], checkpoints=[2, 3])
    assert rounds_in(file) == [2, 3, 4]
    prune_file(file, Retention(keep_s=0), EPOCH_S * 2)
    assert rounds_in(file) == [4], "what is open stays"
    assert verify(file).problems == []


def test_nothing_goes_that_no_checkpoint_covers(file: Path) -> None:
    write_journal(file, rounds(10))
    assert prune_file(file, Retention(keep_s=0, keep_bytes=0), EPOCH_S * 2) == PruneReport()
    assert rounds_in(file) == list(range(1, 11))


def test_the_older_checkpoint_stays_good_to_fall_back_on(file: Path) -> None:
    write_journal(file, rounds(10), checkpoints=[20, 40])
    prune_file(file, Retention(keep_s=0), EPOCH_S * 2)
    assert rounds_in(file) == [6, 7, 8, 9, 10]
    execute(file, "UPDATE checkpoints SET at = 0 WHERE seq = 20")  # of no use any more
    prune_file(file, Retention(keep_s=0), EPOCH_S * 2)
    assert rounds_in(file) == []


def test_a_round_whose_truth_came_after_the_checkpoint_stays(file: Path) -> None:
    write_journal(file, [opened(1), closed(1), *rounds(2, 2), truth(1)], checkpoints=[10])
    prune_file(file, Retention(keep_s=0), EPOCH_S * 2)
    assert rounds_in(file) == [1]
    assert verify(file).problems == []


def test_numbers_go_on_when_all_is_gone(file: Path) -> None:
    write_journal(file, [*rounds(10), experience()], checkpoints=[41])
    report = prune_file(file, Retention(keep_s=0), EPOCH_S * 2)
    assert (report.rounds, report.records, read_journal(file)) == (10, 41, [])
    with JournalReader(file) as reader:
        assert (reader.next_round(), reader.last_seq(), reader.pruned()) == (11, 41, Pruned(41, 10))
    write_journal(file, rounds(1, 11))
    found = verify(file)
    assert (found.problems, found.first_seq, found.pruned_seq) == ([], 42, 41)


def test_a_journal_that_is_too_large_shrinks(file: Path) -> None:
    records: list[Record] = []
    for number in range(1, 301):
        records += [opened(number, size=20_000), closed(number)]
    write_journal(file, records, checkpoints=[600])
    before = file.stat().st_size
    report = prune_file(file, Retention(keep_bytes=2_000_000), EPOCH_S)
    after = file.stat().st_size
    assert before > 6_000_000
    assert 1_500_000 < after <= 2_000_000
    assert report.bytes == pytest.approx(before - after, rel=0.2)
    left = rounds_in(file)
    assert left == list(range(301 - len(left), 301))
    assert verify(file).problems == []


def test_one_large_round_leaves_no_free_pages_behind(file: Path) -> None:
    write_journal(file, [opened(1, size=10_000_000), closed(1)], checkpoints=[2])
    prune_file(file, Retention(keep_s=0), EPOCH_S * 2)
    assert file.stat().st_size < 100_000


async def test_pruning_goes_on_beside_appending(file: Path) -> None:
    async with journalling(file) as (journal, heard):
        for record in rounds(2000):
            journal.append(record, at=EPOCH_S)
        journal.append_checkpoint(8000, b"state", at=EPOCH_S)
        first = journal.prune(Retention(keep_s=1, rounds={7}), now_s=EPOCH_S + 2)
        second = journal.prune(Retention(keep_s=1), now_s=EPOCH_S + 2)
        appended = 0
        while not first.done():
            appended = journal.append(experience(), at=EPOCH_S)
            await heard.until(committed=appended)
        assert appended > 8005  # each a commit between two steps
        report = await asyncio.wait_for(first, PATIENCE_S)
        assert (report.records, report.rounds) == (4 * 1999, 1999)
        assert (await asyncio.wait_for(second, PATIENCE_S)).rounds == 1
        assert not heard.failed
    assert rounds_in(file) == []
    assert verify(file).problems == []


async def test_closing_ends_pruning_between_two_steps(file: Path) -> None:
    async with journalling(file) as (journal, _):
        for record in rounds(2000):
            journal.append(record, at=EPOCH_S)
        journal.append_checkpoint(8000, b"state", at=EPOCH_S)
        pruning = journal.prune(Retention(keep_s=1), now_s=EPOCH_S + 2)
        assert journal.close(PATIENCE_S)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(pruning, PATIENCE_S)
    assert verify(file).problems == []


async def test_what_came_after_pruning_was_asked_for_stays(file: Path) -> None:
    """Whoever asks names the rounds that it needs as of then."""
    journal, heard = Journal.open(file), Heard()
    for record in rounds(3):
        journal.append(record, at=EPOCH_S)
    pruning = journal.prune(Retention(keep_bytes=0, rounds={2}), now_s=EPOCH_S)
    for record in [opened(4), closed(4), *rounds(1, 5)]:
        journal.append(record, at=EPOCH_S)
    journal.append_checkpoint(journal.last_seq, b"state", at=EPOCH_S)
    heard.start(journal)  # with all of it in the queue, as behind a slow disk
    assert (await asyncio.wait_for(pruning, PATIENCE_S)).rounds == 2
    assert journal.close(PATIENCE_S)
    assert rounds_in(file) == [2, 4, 5]


@pytest.mark.parametrize("ahead", [1, 200])
async def test_records_from_a_clock_that_was_ahead_do_not_keep_older_ones(file: Path, ahead: int) -> None:
    async with journalling(file) as (journal, _):
        for record in rounds(ahead):
            journal.append(record, at=EPOCH_S * 2)
        for record in [experience(), *rounds(200, ahead + 1)]:
            journal.append(record, at=EPOCH_S)
        for record in rounds(1, ahead + 201):
            journal.append(record, at=EPOCH_S + 2)
        journal.append_checkpoint(journal.last_seq, b"state", at=EPOCH_S)
        report = await journal.prune(Retention(keep_s=1), now_s=EPOCH_S + 2)
        assert (report.rounds, report.records) == (200, 801)
    assert rounds_in(file) == [*range(1, ahead + 1), ahead + 201]

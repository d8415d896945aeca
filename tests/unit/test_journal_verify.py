"""What the check of a journal finds: untruths, gaps, and any bit that is not as it was written."""

import contextlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from journal_making import (
    AGENTS,
    EPOCH_S,
    closed,
    execute,
    experience,
    late,
    opened,
    read_journal,
    rounds,
    truth,
    whole,
    write_journal,
)
from quorate_coordinator.journal.database import connect_to_write, damage_told
from quorate_coordinator.journal.errors import JournalUnusable
from quorate_coordinator.journal.prune import Retention, prune
from quorate_coordinator.journal.reader import JournalReader
from quorate_coordinator.journal.records import Record, RecordedResult, RoundClosed
from quorate_coordinator.journal.rows import compute_digest
from quorate_coordinator.journal.verify import PROBLEMS_MAX, check_round, verify
from quorate_coordinator.journal.writer import Journal
from quorate_protocol.fields import RoundState

REPLIED = RecordedResult("ant", "replied", b"\1")
SECOND = RecordedResult("bee", "replied", b"\1")
LOST = RecordedResult("cat", "lost")


def closed_with(state: RoundState, *results: RecordedResult, quorum: int = 2) -> RoundClosed:
    return replace(closed(1), state=state, results=results, quorum=quorum)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "journal.sqlite3"
    write_journal(file, [*rounds(5), experience(), opened(6)], checkpoints=[8, 16])
    return file


@pytest.mark.parametrize(
    "records",
    [
        whole(1),
        [opened(1)],
        [opened(1), late(1), closed(1)],
        [opened(1, key="k", digest=b"\1"), closed(1, key="k", digest=b"\1")],
        [opened(1), closed_with("complete", REPLIED, SECOND, replace(LOST, status="replied", body=b""))],
        [opened(1), closed_with("cancelled", *(RecordedResult(agent, "cancelled") for agent in AGENTS))],
        [opened(1), closed_with("interrupted", REPLIED, SECOND, LOST)],
        [opened(1), closed_with("expired", REPLIED, replace(SECOND, status="late", body=None), LOST)],
        [opened(1), closed(1), late(1), replace(late(1), body=b"\1")],
    ],
)  # fmt: skip
def test_what_can_be_true(records: Sequence[Record]) -> None:
    assert list(check_round(1, records)) == []


@pytest.mark.parametrize(
    ("records", "problems"),
    [
        ([opened(1), opened(1)], ["opened twice"]),
        ([closed(1), opened(1)], ["closed and never opened", "opened after it was closed"]),
        ([opened(1), closed(1), closed(1)], ["closed twice"]),
        ([truth(1)], ["its truth was told before it was closed"]),
        ([opened(1), truth(1), closed(1)], ["its truth was told before it was closed"]),
        ([*whole(1), truth(1)], ["its truth was told twice"]),
        ([*whole(1), late(1)], ["the same late reply of cat twice"]),
        ([late(1)], ["a late reply of cat, and it was never opened"]),
        ([opened(1), closed(1), replace(late(1), agent="dog")], ["a late reply of dog, which was not selected"]),
        ([opened(1, key="k"), closed(1)], ["opened and closed with different key"]),
        ([replace(opened(1), task="x"), closed(1)], ["opened and closed with different task"]),
        ([replace(opened(1), quorum=1), closed(1)], ["opened and closed with different quorum"]),
        (
            [opened(1), closed_with("quorate", REPLIED, SECOND)],
            ["selected were ant, bee, cat; results are of ant, bee"],
        ),
        (
            [opened(1), closed_with("quorate", REPLIED, SECOND, LOST, LOST)],
            ["selected were ant, bee, cat; results are of ant, bee, cat, cat", "2 results of cat"],
        ),
        (
            [opened(1), closed_with("quorate", REPLIED, SECOND, replace(LOST, body=b""))],
            ["cat is lost and has an answer"],
        ),
        (
            [opened(1), closed_with("quorate", REPLIED, replace(SECOND, body=None), LOST)],
            ["bee is replied and has no answer"],
        ),
        (
            [opened(1), closed_with("complete", REPLIED, SECOND, LOST)],
            ["complete with 2 replies of 3 agents"],
        ),
        (
            [replace(opened(1), quorum=3), closed_with("quorate", REPLIED, SECOND, LOST, quorum=3)],
            ["quorate with 2 replies, and 3 were needed"],
        ),
        ([opened(1), closed_with("expired", REPLIED, SECOND, LOST)], ["expired with 2 replies, and 2 were enough"]),
        ([opened(1), closed_with("failed", REPLIED, SECOND, LOST)], ["failed with 2 replies, and 2 were enough"]),
    ],
)
def test_what_cannot_be_true(records: Sequence[Record], problems: list[str]) -> None:
    assert list(check_round(1, records)) == problems


def test_what_comes_late_for_a_round_that_was_pruned_is_no_problem() -> None:
    assert list(check_round(3, [truth(3), late(3)], pruned_round=3)) == []
    assert list(check_round(4, [truth(4)], pruned_round=3)) == ["its truth was told before it was closed"]


def test_a_good_journal(file: Path) -> None:
    found = verify(file)
    assert found.problems == []
    assert found.records == {"opened": 6, "closed": 5, "late": 5, "truth": 5, "experience": 1}
    assert found.rounds == {"quorate": 5, "open": 1}
    assert (found.first_seq, found.last_seq, found.pruned_seq, found.checkpoints) == (1, 22, 0, 2)
    assert found.as_json()["ok"] is True


def test_an_untruth_is_told_with_its_round(tmp_path: Path) -> None:
    file = tmp_path / "journal.sqlite3"
    write_journal(file, [opened(1), opened(2), closed(2), closed(2), truth(1)])
    assert verify(file).problems == [
        "round 1: its truth was told before it was closed",
        "round 2: closed twice",
    ]


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE records SET payload = x'80' WHERE seq = 7", "record 7: its digest does not match"),
        ("UPDATE records SET at = at + 1 WHERE seq = 7", "record 7: its digest does not match"),
        ("UPDATE records SET kind = 'truth' WHERE seq = 7", "record 7: its digest does not match"),
        ("UPDATE records SET kind = x'00' WHERE seq = 7", "record 7: its digest does not match"),
        ("UPDATE records SET payload = 7 WHERE seq = 7", "record 7: its digest does not match"),
        ("UPDATE records SET key = 'k' WHERE seq = 5", "record 5: it is filed under another key than it has"),
        ("DELETE FROM records WHERE seq IN (21)", "records 21 to 21 are missing"),
        ("UPDATE records SET seq = -1 WHERE seq = 21", "records 21 to 21 are missing"),
        ("DELETE FROM records WHERE seq < 9", "records 1 to 8 are missing"),
        ("UPDATE checkpoints SET snapshot = x'00' WHERE seq = 16",
         "the checkpoint after record 16: its digest does not match"),
        ("DELETE FROM records WHERE seq > 12", "the checkpoint after record 16 is of a record that is not there"),
        ("INSERT INTO pruned VALUES (1, 4, 1, x'00')", "the mark of pruning: its digest does not match"),
        ("DROP TABLE pruned", "its tables are not those of a journal"),
    ],
)  # fmt: skip
def test_what_somebody_has_changed_is_found(file: Path, statement: str, problem: str) -> None:
    execute(file, statement)
    assert problem in verify(file).problems


def test_a_record_with_a_right_digest_and_a_wrong_content(file: Path) -> None:
    (at,) = [at for seq, at, _ in read_journal(file) if seq == 21]
    payload = b"\x80"
    digest = compute_digest(21, "experience", None, at, payload)
    execute(file, "UPDATE records SET payload = ?, digest = ? WHERE seq = 21", payload, digest)
    assert verify(file).problems == ["record 21: invalid experience record: agent is missing"]
    payload = truth(9).encode()
    digest = compute_digest(20, "truth", 5, at - 1, payload)
    execute(file, "UPDATE records SET payload = ?, digest = ? WHERE seq = 20", payload, digest)
    assert "record 20: it is of round 9 and filed under 5" in verify(file).problems


def test_only_so_many_problems_are_told(tmp_path: Path) -> None:
    file = tmp_path / "journal.sqlite3"
    write_journal(file, (truth(number) for number in range(1, PROBLEMS_MAX + 9)))
    problems = verify(file).problems
    assert len(problems) == PROBLEMS_MAX
    assert problems[-1] == f"and more: only the first {PROBLEMS_MAX - 1} are told"


def read_everything(file: Path) -> object:
    """All that is asked of a journal."""
    with JournalReader(file) as reader:
        return (
            list(reader.records()),
            reader.checkpoint(),
            reader.last_seq(),
            reader.next_round(),
            reader.find_key("k"),
            reader.find_round(3),
            reader.open_rounds(),
            reader.pruned(),
        )


def open_and_prune(file: Path) -> object:
    Journal.open(file).close(0)
    with damage_told(file), contextlib.closing(connect_to_write(file, "normal")) as connection:
        return list(prune(connection, Retention(keep_s=0), EPOCH_S * 2))


def test_any_flipped_bit_is_reported_or_changes_nothing(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)  # pytest-randomly's seed gives the same
    draw = random.Random(seed)
    file = tmp_path / "journal.sqlite3"
    write_journal(file, [*rounds(40), experience(), opened(41, key="k", size=9000)], checkpoints=[8, 100])
    before = read_everything(file)
    content = file.read_bytes()
    reported = 0
    for number in range(600):
        # The first page holds the header and the schema; half of all flips there.
        position = draw.randrange(4096 if number % 2 else len(content))
        bit = 1 << draw.randrange(8)
        damaged = bytearray(content)
        damaged[position] ^= bit
        file.write_bytes(damaged)
        for beside in ("-wal", "-shm"):
            (tmp_path / (file.name + beside)).unlink(missing_ok=True)
        try:
            problems = verify(file).problems
        except JournalUnusable as error:
            problems = [error.problem]
        if problems:
            reported += 1
            # Writing takes a disk's time: not each.
            for use in (read_everything, open_and_prune) if reported % 10 == 1 else (read_everything,):
                try:
                    use(file)
                except JournalUnusable:
                    pass
        else:
            assert read_everything(file) == before, f"seed {seed}: byte {position}, bit {bit}"
    assert reported > 100

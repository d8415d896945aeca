"""The journal's writer: groups, callbacks, one process at a time, disks that fill up."""

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import journal_peer
from journal_making import (
    EPOCH_S,
    PATIENCE_S,
    Heard,
    closed,
    execute,
    experience,
    journalling,
    opened,
    read_journal,
    record_at,
    rounds,
    truth,
    write_journal,
)
from quorate_coordinator.journal import stall, writer
from quorate_coordinator.journal.database import Sync
from quorate_coordinator.journal.errors import JournalDamaged, JournalInUse, JournalUnusable, RecordInvalid
from quorate_coordinator.journal.prune import Retention
from quorate_coordinator.journal.reader import JournalReader
from quorate_coordinator.journal.verify import verify
from quorate_coordinator.journal.writer import Journal
from quorate_protocol.errors import ConfigurationError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite3"


async def test_what_is_committed_can_be_read_while_writing_goes_on(file: Path) -> None:
    records = rounds(20)
    async with journalling(file) as (journal, heard):
        numbers = [journal.append(record, at=EPOCH_S + number) for number, record in enumerate(records)]
        assert numbers == list(range(1, len(records) + 1))
        await heard.until(committed=numbers[-1])
        assert read_journal(file) == [
            (seq, EPOCH_S + number, record) for number, (seq, record) in enumerate(zip(numbers, records, strict=True))
        ]
        assert (journal.pending_records, journal.pending_bytes) == (0, 0)
        assert verify(file).problems == []
    assert heard.committed == sorted(set(heard.committed))
    assert not heard.failed


async def test_numbers_go_on_after_reopening(file: Path) -> None:
    for first in (1, 5):
        async with journalling(file) as (journal, _):
            assert journal.last_seq == first - 1
            assert [journal.append(record, at=EPOCH_S) for record in rounds(1, first)] == list(range(first, first + 4))
    assert [seq for seq, _, _ in read_journal(file)] == list(range(1, 9))


async def test_what_queues_up_before_the_start_is_one_commit(file: Path) -> None:
    journal, heard = Journal.open(file), Heard()
    for record in rounds(50):
        journal.append(record, at=EPOCH_S)
    assert journal.pending_records == 200
    heard.start(journal)
    await heard.until(committed=200)
    journal.close(PATIENCE_S)
    assert heard.committed == [200]


async def test_flush_waits_for_all_before_it(file: Path) -> None:
    async with journalling(file) as (journal, heard):
        await journal.flush()
        for record in rounds(10):
            journal.append(record, at=EPOCH_S)
        await asyncio.wait_for(journal.flush(), PATIENCE_S)
        assert max(heard.committed) == 40
        assert len(read_journal(file)) == 40


async def test_a_checkpoint_that_stands_still_is_told_of_and_recovered_from(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No record may follow it: none is taken while that is told."""
    goes_on = threading.Event()
    write = writer._Committer._write

    def stand_still(committer: Any, rows: Any, snapshots: Any) -> None:
        if snapshots:
            goes_on.wait()
        write(committer, rows, snapshots)

    monkeypatch.setattr(writer._Committer, "_write", stand_still)
    monkeypatch.setattr(stall, "STALLED_S", 0.1)
    async with journalling(file) as (journal, heard):
        try:
            journal.append(rounds(1)[0], at=EPOCH_S)
            await heard.until(committed=1)
            journal.append_checkpoint(1, b"state", at=EPOCH_S)
            await heard.until(failed=1)
            assert heard.failed == ["the journal cannot be written: its disk has finished no commit for 0.1 s"]
            assert not heard.recovered
        finally:
            goes_on.set()
        await heard.until(recovered=1)
        assert (heard.recovered, journal.pending_records) == (1, 0)


async def test_closing_commits_what_is_queued(file: Path) -> None:
    async with journalling(file) as (journal, _):
        for record in rounds(100):
            journal.append(record, at=EPOCH_S)
        assert journal.close(PATIENCE_S)
        assert journal.close(PATIENCE_S)  # again: nothing happens
    assert len(read_journal(file)) == 400
    assert not [thread for thread in threading.enumerate() if thread.name == "journal"]


def test_closing_without_having_started(file: Path) -> None:
    journal = Journal.open(file)
    assert journal.close(0)
    journal = Journal.open(file)
    journal.append(truth(1), at=EPOCH_S)
    assert not journal.close(0)
    Journal.open(file).close(0)


async def test_a_loop_that_is_gone_does_not_stop_the_thread(file: Path) -> None:
    journal = Journal.open(file)
    gone = asyncio.new_event_loop()
    gone.close()
    journal.start(gone, lambda seq: None, lambda problem: None, lambda: None)
    journal.append(truth(1), at=EPOCH_S)
    assert journal.close(PATIENCE_S)
    assert len(read_journal(file)) == 1


def test_only_its_owner_can_read_it(file: Path) -> None:
    old = os.umask(0)
    try:
        journal = Journal.open(file)
    finally:
        os.umask(old)
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()}
    assert set(modes.values()) == {0o600}, modes
    journal.close(0)
    file.chmod(0o644)
    Journal.open(file).close(0)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(("sync", "level"), [("full", 2), ("normal", 1)])
def test_how_lasting_a_commit_is(file: Path, sync: Sync, level: int) -> None:
    journal = Journal.open(file, sync=sync)
    assert journal._connection.execute("PRAGMA synchronous").fetchone() == (level,)
    assert journal._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    journal.close(0)


def test_one_writer_at_a_time(file: Path) -> None:
    journal = Journal.open(file)
    with pytest.raises(
        JournalInUse, match=rf"^state_dir: .*journal.sqlite3 is in use by .*\(pid {os.getpid()}\)"
    ) as caught:
        Journal.open(file)
    assert isinstance(caught.value, ConfigurationError)
    JournalReader(file).close()
    code = "import sys, pathlib, quorate_coordinator.journal.writer as w; w.Journal.open(pathlib.Path(sys.argv[1]))"
    other = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=False)
    assert "JournalInUse" in other.stderr
    journal.close(0)
    Journal.open(file).close(0)


def test_readers_in_the_same_process_do_not_take_its_locks(file: Path) -> None:
    """POSIX locks go when any descriptor of the file is closed; then another process could damage the file."""
    journal = Journal.open(file)
    JournalReader(file).close()
    read_journal(file)
    verify(file)
    locks = Path("/proc/locks").read_text()
    inode = file.stat().st_ino
    held = [line for line in locks.splitlines() if f":{inode} " in line and f" {os.getpid()} " in line]
    journal.close(0)
    assert held, locks


def test_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalUnusable, match="its directory cannot be made: "):
        Journal.open(tmp_path / "file" / "journal.sqlite3")


def test_a_damaged_end_is_not_written_after(file: Path) -> None:
    write_journal(file, rounds(2))
    execute(file, "UPDATE records SET payload = x'80' WHERE seq = 8")
    with pytest.raises(JournalDamaged, match="record 8: its digest does not match") as caught:
        Journal.open(file)
    assert caught.value.seq == 8
    assert "quorate journal verify" in str(caught.value)
    with pytest.raises(JournalDamaged):  # and not that it is in use: the lock was let go
        Journal.open(file)


async def test_ceilings(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(file)
    assert not journal.is_full
    monkeypatch.setattr(writer, "PENDING_RECORDS_MAX", 4)
    for record in rounds(1):
        journal.append(record, at=EPOCH_S)
    assert journal.is_full
    monkeypatch.setattr(writer, "PENDING_RECORDS_MAX", 1000)
    assert not journal.is_full
    monkeypatch.setattr(writer, "PENDING_BYTES_MAX", journal.pending_bytes)
    assert journal.is_full
    Heard().start(journal)
    await journal.flush()
    assert not journal.is_full
    monkeypatch.setattr(writer, "RECORD_BYTES_MAX", 100)
    with pytest.raises(
        RecordInvalid, match=r"invalid opened record: it has [0-9]+ bytes, over the 100 that one may have"
    ):
        journal.append(opened(2, size=100), at=EPOCH_S)
    with pytest.raises(RecordInvalid, match="invalid checkpoint record"):
        journal.append_checkpoint(1, b"x" * 101, at=EPOCH_S)
    assert journal.append(truth(1), at=EPOCH_S) == 5  # no number was lost
    assert journal.close(PATIENCE_S)


async def test_large_records_are_committed_in_several_groups(file: Path) -> None:
    journal, heard = Journal.open(file), Heard()
    for number in range(1, 21):
        journal.append(opened(number, size=1 << 20), at=EPOCH_S)
    heard.start(journal)
    await heard.until(committed=20)
    assert len(heard.committed) > 1
    journal.close(PATIENCE_S)
    assert verify(file).problems == []


async def test_checkpoints_the_newest_two_stay(file: Path) -> None:
    async with journalling(file) as (journal, _):
        journal.append_checkpoint(0, b"empty", at=EPOCH_S)
        for number in (1, 2, 3):
            for record in rounds(1, number):
                journal.append(record, at=EPOCH_S)
            journal.append_checkpoint(journal.last_seq, b"state %d" % number, at=EPOCH_S + number)
        journal.append_checkpoint(journal.last_seq, b"state 3 again", at=EPOCH_S + 4)
        await journal.flush()
        with JournalReader(file) as reader:
            assert reader.checkpoint_seqs() == [12, 8]
            newest = reader.checkpoint()
            assert newest is not None
            assert (newest.seq, newest.at, newest.snapshot) == (12, EPOCH_S + 4, b"state 3 again")


# --- disks ---------------------------------------------------------------------------------------


def limit_pages(journal: Journal, extra: int | None) -> None:
    """Lets the file grow by so many pages only: then SQLite says what it says on a full disk."""
    connection = journal._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {1 << 30 if extra is None else pages + extra}")


async def test_a_full_disk_loses_nothing(file: Path) -> None:
    journal, heard = Journal.open(file), Heard()
    limit_pages(journal, 20)
    heard.start(journal)
    first = journal.append(opened(1, size=1000), at=EPOCH_S)
    await heard.until(committed=first)
    journal.append(opened(2, size=200_000), at=EPOCH_S)
    await heard.until(failed=1)
    assert heard.failed == ["the journal cannot be written: there is no space left on its disk"]
    for record in rounds(10, 3):
        journal.append(record, at=EPOCH_S)
    journal.append_checkpoint(journal.last_seq, b"state", at=EPOCH_S)
    assert journal.pending_records == 42
    assert [seq for seq, _, _ in read_journal(file)] == [1]
    limit_pages(journal, None)
    await heard.until(recovered=1, committed=journal.last_seq)
    assert heard.failed[1:] == []
    assert [seq for seq, _, _ in read_journal(file)] == list(range(1, journal.last_seq + 1))
    # And once more: each failure is told.
    limit_pages(journal, 1)
    journal.append(opened(100, size=200_000), at=EPOCH_S)
    await heard.until(failed=2)
    limit_pages(journal, None)
    await heard.until(recovered=2, committed=journal.last_seq)
    assert journal.close(PATIENCE_S)
    assert verify(file).problems == []


async def test_closing_on_a_full_disk_says_that_something_is_lost(file: Path) -> None:
    journal, heard = Journal.open(file), Heard()
    limit_pages(journal, 1)
    heard.start(journal)
    journal.append(opened(1, size=200_000), at=EPOCH_S)
    flushing = asyncio.ensure_future(journal.flush())
    await heard.until(failed=1)
    behind = [asyncio.ensure_future(journal.flush()), journal.prune(Retention(keep_s=0), now_s=EPOCH_S)]
    await asyncio.sleep(0)  # what was asked for is queued
    assert not journal.close(PATIENCE_S)
    assert journal.pending_records == 1
    for waiting in (flushing, *behind):
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(waiting, PATIENCE_S)
    assert verify(file).problems == []
    Journal.open(file).close(0)  # the lock was let go


async def run(*command: str) -> int:
    return await (await asyncio.create_subprocess_exec(*command)).wait()


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounting a small disk needs root")
async def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if await run("mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)):
        pytest.skip("cannot mount: root, but not in full")
    try:
        file = disk / "journal.sqlite3"
        (disk / "ballast").write_bytes(bytes(500_000))
        async with journalling(file) as (journal, heard):
            while not heard.failed:
                written = journal.append(opened(journal.last_seq + 1, size=5000), at=EPOCH_S)
                heard.on_change.clear()
                await asyncio.wait_for(heard.on_change.wait(), PATIENCE_S)
            assert heard.failed == ["the journal cannot be written: there is no space left on its disk"]
            durable = max(heard.committed)
            assert [seq for seq, _, _ in read_journal(file)][:durable] == list(range(1, durable + 1))
            (disk / "ballast").unlink()
            await heard.until(recovered=1, committed=written)
            assert [seq for seq, _, _ in read_journal(file)] == list(range(1, written + 1))
            assert verify(file).problems == []
        assert verify(file).problems == []
    finally:
        assert await run("umount", str(disk)) == 0


async def test_a_file_that_may_not_grow(file: Path) -> None:
    """RLIMIT_FSIZE makes of every write an I/O error, as a disk that breaks does."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, journal_peer.__file__, str(file), "limited", stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    # Before it stand the log's lines, which nobody has sent elsewhere.
    assert process.returncode == 0
    problem = "no file of this process may have over 300000 bytes (ulimit -f, or systemd's LimitFSIZE)"
    assert out.decode().splitlines()[-1] == f"the journal cannot be written: {problem}"
    read = read_journal(file)
    assert [(seq, record) for seq, _, record in read] == [(seq, record_at(seq)) for seq in range(1, len(read) + 1)]
    assert len(read) > 10
    assert verify(file).problems == []


async def test_another_writer_that_should_not_be_there(file: Path) -> None:
    """Somebody holds SQLite's lock: commits wait, and go on."""
    async with journalling(file) as (journal, heard):
        other = sqlite3.connect(file, isolation_level=None)
        try:
            other.execute("BEGIN IMMEDIATE")
            journal.append(experience(), at=EPOCH_S)
            other.execute("COMMIT")
        finally:
            other.close()
        await heard.until(committed=1)


async def test_what_was_appended_in_one_turn_is_told_in_one_call(file: Path) -> None:
    async with journalling(file) as (journal, heard):
        for number in range(1, 101):
            journal.append(opened(number), at=EPOCH_S)
            journal.append(closed(number), at=EPOCH_S)
        await heard.until(committed=200)
        assert len(heard.committed) < 100

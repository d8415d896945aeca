"""A journal whose files are removed, moved, replaced or cut while it is written: nothing counts as durable then."""

import os
import shutil
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent_making import echo
from coordination import coordinating, until
from journal_making import (
    EPOCH_S,
    PATIENCE_S,
    Heard,
    experience,
    journalling,
    opened,
    read_journal,
    rounds,
    truth,
    write_journal,
)
from quorate_coordinator.journal import writer
from quorate_coordinator.journal.errors import JournalInUse, JournalUnusable
from quorate_coordinator.journal.prune import Retention
from quorate_coordinator.journal.writer import Journal
from quorate_coordinator.service import Coordinator
from quorate_coordinator.settings import Settings
from quorate_protocol.errors import CallFailed


def beside(file: Path, suffix: str) -> Path:
    return file.with_name(file.name + suffix)


def replace_by_copy(file: Path) -> None:
    copy = file.with_name("copy")
    shutil.copy(file, copy)
    copy.replace(file)


def cut(file: Path, part: float) -> None:
    wal = beside(file, "-wal")
    os.truncate(wal, int(wal.stat().st_size * part))


#: What is done to a journal, and the end of the name of the file that is found wanting.
HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "removed": (lambda file: file.unlink(), "journal.sqlite3"),
    "moved": (lambda file: file.rename(file.with_name("elsewhere")), "journal.sqlite3"),
    "replaced": (replace_by_copy, "journal.sqlite3"),
    "cut": (lambda file: os.truncate(file, 1000), "journal.sqlite3"),
    "log removed": (lambda file: beside(file, "-wal").unlink(), "journal.sqlite3-wal"),
    "log emptied": (lambda file: cut(file, 0.0), "journal.sqlite3-wal"),
    "log halved": (lambda file: cut(file, 0.5), "journal.sqlite3-wal"),
    "lock removed": (lambda file: beside(file, ".lock").unlink(), "journal.sqlite3.lock"),
    "directory removed": (lambda file: shutil.rmtree(file.parent), "journal.sqlite3"),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite3"


@pytest.mark.parametrize("harm", HARMS)
async def test_what_is_written_after_does_not_count(file: Path, harm: str) -> None:
    do_harm, named = HARMS[harm]
    async with journalling(file) as (journal, heard):
        for record in rounds(5):
            journal.append(record, at=EPOCH_S)
        await heard.until(committed=20)
        do_harm(file)
        journal.append(truth(6), at=EPOCH_S)
        await heard.until(failed=1)
        assert heard.failed[0].startswith(f"the journal cannot be written: {file.parent / named}: was ")
        assert "restart the coordinator" in heard.failed[0]
        with pytest.raises(JournalUnusable, match="restart the coordinator"):
            journal._files.check()
        assert not journal.close(PATIENCE_S)
        assert max(heard.committed) == 20


@pytest.mark.parametrize("harm", HARMS)
async def test_it_is_noticed_while_nothing_is_written(file: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    monkeypatch.setattr(writer, "_LOOK_S", 0.01)
    async with journalling(file) as (journal, heard):
        for record in rounds(5):
            journal.append(record, at=EPOCH_S)
        await heard.until(committed=20)
        HARMS[harm][0](file)
        await heard.until(failed=1)
        with pytest.raises(JournalUnusable, match="restart the coordinator"):
            await journal.prune(Retention(keep_s=0), now_s=EPOCH_S * 2)


async def test_a_file_that_is_put_back(file: Path) -> None:
    elsewhere = file.with_name("elsewhere")
    async with journalling(file) as (journal, heard):
        journal.append(truth(1), at=EPOCH_S)
        await heard.until(committed=1)
        os.replace(file, elsewhere)  # noqa: PTH105
        journal.append(truth(2), at=EPOCH_S)
        await heard.until(failed=1)
        os.replace(elsewhere, file)  # noqa: PTH105
        await heard.until(recovered=1, committed=2)
    assert [record for _, _, record in read_journal(file)] == [truth(1), truth(2)]


async def test_looks_find_nothing_wrong_with_what_is_right(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in what the journal writes itself, nor when its log begins anew and is cut."""
    monkeypatch.setattr(writer, "_LOOK_S", 0.001)
    async with journalling(file) as (journal, heard):
        for turn in range(6):
            for record in rounds(20, turn * 20 + 1):
                journal.append(record, at=EPOCH_S)
            journal.append(opened(1000 + turn, size=(40 << 20) if turn == 2 else 100_000), at=EPOCH_S)
            journal.append_checkpoint(journal.last_seq, b"state", at=EPOCH_S)
            await journal.flush()
            await journal.prune(Retention(keep_s=0), now_s=EPOCH_S * 2)
            read_journal(file)
        assert not heard.failed


async def test_records_of_another_writer_are_not_overwritten(file: Path) -> None:
    async with journalling(file) as (journal, heard):
        journal.append(truth(1), at=EPOCH_S)
        await heard.until(committed=1)
        beside(file, ".lock").unlink()
        write_journal(file, [truth(2)])  # takes the number that this one would
        journal.append(truth(3), at=EPOCH_S)
        await heard.until(failed=1)
        assert not journal.close(PATIENCE_S)
        assert max(heard.committed) == 1
    assert [record for _, _, record in read_journal(file)] == [truth(1), truth(2)]


async def test_records_that_are_there_already_are_another_s(file: Path) -> None:
    """Also where the lock did not keep it out."""
    async with journalling(file) as (journal, heard):
        journal.append(truth(1), at=EPOCH_S)
        await heard.until(committed=1)
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("INSERT INTO records SELECT 2, kind, round, at, key, digest, x'00' FROM records")
        journal.append(truth(3), at=EPOCH_S)
        await heard.until(failed=1)
        assert "another coordinator uses it" in heard.failed[0]
        assert not journal.close(PATIENCE_S)
        assert other.execute("SELECT payload FROM records WHERE seq = 2").fetchone() == (b"\0",)
        other.close()


class FailsAfterCommit:
    """A connection whose first commit that writes succeeds and says that it has not, as a disk may."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.has_failed = False

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        cursor = self._connection.execute(statement, *values)
        if statement == "COMMIT" and not self.has_failed:
            self.has_failed = True
            raise sqlite3.OperationalError("disk I/O error")
        return cursor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


async def test_a_group_that_was_committed_after_all_is_written_once(file: Path) -> None:
    journal, heard = Journal.open(file), Heard()
    journal._connection = FailsAfterCommit(journal._connection)  # type: ignore[assignment]
    for record in rounds(2):
        journal.append(record, at=EPOCH_S)
    journal.append_checkpoint(8, b"state", at=EPOCH_S)
    heard.start(journal)
    await heard.until(failed=1, recovered=1, committed=8)
    journal.append(truth(3), at=EPOCH_S)
    assert journal.close(PATIENCE_S)
    assert [record for _, _, record in read_journal(file)] == [*rounds(2), truth(3)]


async def test_a_copied_journal_is_its_owners_alone(tmp_path: Path, file: Path) -> None:
    copy = tmp_path / "copy" / file.name
    copy.parent.mkdir()
    async with journalling(file) as (journal, heard):
        journal.append(experience(), at=EPOCH_S)
        await heard.until(committed=1)
        for path in file.parent.iterdir():
            (copy.parent / path.name).write_bytes(path.read_bytes())
            (copy.parent / path.name).chmod(0o644)
    async with journalling(copy):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in copy.parent.iterdir()}
    assert modes == dict.fromkeys([file.name, f"{file.name}-wal", f"{file.name}-shm", f"{file.name}.lock"], 0o600)


# --- through a coordinator -----------------------------------------------------------------------


@pytest.mark.parametrize("harm", HARMS)
async def test_no_outcome_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    monkeypatch.setattr(writer, "_LOOK_S", 3600.0)
    do_harm, named = HARMS[harm]
    file = tmp_path / "state" / "journal.sqlite3"
    async with coordinating(file.parent) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        for number in range(3):
            await operator.ask("echo", number)
        assert fleet.coordinator.is_ready
        do_harm(file)
        for kind in ("is over, but that cannot be recorded now", "no round is taken"):
            with pytest.raises(CallFailed, match=kind) as caught:
                await operator.ask("echo", 4)
            assert (caught.value.reason, caught.value.retry) == ("not-recorded", True)
            assert f"{file.parent / named}: was " in caught.value.message
            assert "restart the coordinator" in caught.value.message
        assert not fleet.coordinator.is_ready


async def test_a_log_that_was_cut_is_noticed_although_keys_alone_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_LOOK_S", 0.01)
    async with coordinating(tmp_path) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        await operator.ask("echo", 1, key="k")
        cut(tmp_path / "journal.sqlite3", 0.0)
        await until(lambda: not fleet.coordinator.is_ready)
        with pytest.raises(CallFailed) as caught:
            await operator.ask("echo", 1, key="another")
        assert caught.value.reason == "not-recorded"


async def test_one_coordinator_for_a_directory_without_a_journal(tmp_path: Path) -> None:
    settings = Settings(listen="memory:first", http="", state_dir=tmp_path, journal={"sync": "off"})
    async with Coordinator(settings):
        second = Coordinator(settings.model_copy(update={"listen": "memory:second"}))
        with pytest.raises(JournalInUse):
            await second.start()
    async with Coordinator(settings):
        pass
    assert not (tmp_path / "journal.sqlite3").exists()

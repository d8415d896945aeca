"""The journal's version: how it rises, and what is said of a file that is of another, or no journal."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from journal_making import execute, rounds, write_journal
from quorate_coordinator.journal import schema
from quorate_coordinator.journal.errors import JournalDamaged, JournalTooNew, JournalUnusable
from quorate_coordinator.journal.reader import JournalReader
from quorate_coordinator.journal.schema import APPLICATION_ID, MIGRATIONS, SCHEMA_VERSION, migrate
from quorate_coordinator.journal.writer import Journal

FILE = Path("journal.sqlite3")


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    yield connection
    connection.close()


def pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def tables(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}


def add_mood(connection: sqlite3.Connection) -> None:
    connection.execute("ALTER TABLE records ADD COLUMN mood TEXT")


def test_an_empty_file_becomes_a_journal(connection: sqlite3.Connection) -> None:
    migrate(connection, FILE)
    assert pragma(connection, "user_version") == SCHEMA_VERSION == 1
    assert pragma(connection, "application_id") == APPLICATION_ID
    assert tables(connection) == {"records", "checkpoints", "pruned"}
    migrate(connection, FILE)  # again: nothing to do


def test_steps_are_taken_from_where_the_journal_is(connection: sqlite3.Connection) -> None:
    migrate(connection, FILE)
    connection.execute("INSERT INTO records VALUES (1, 'truth', 1, 0.0, NULL, x'00', x'00')")
    migrate(connection, FILE, [*MIGRATIONS, add_mood])
    assert pragma(connection, "user_version") == 2
    assert connection.execute("SELECT seq, mood FROM records").fetchall() == [(1, None)]


def test_a_step_that_fails_changes_nothing(connection: sqlite3.Connection) -> None:
    migrate(connection, FILE)

    def halfway(connection: sqlite3.Connection) -> None:
        add_mood(connection)
        raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        migrate(connection, FILE, [*MIGRATIONS, halfway])
    assert pragma(connection, "user_version") == 1
    assert "mood" not in [row[1] for row in connection.execute("PRAGMA table_info(records)")]
    migrate(connection, FILE, [*MIGRATIONS, add_mood])
    assert pragma(connection, "user_version") == 2


def test_a_later_version_is_refused_with_both_versions(tmp_path: Path) -> None:
    file = tmp_path / "journal.sqlite3"
    write_journal(file, rounds(1))
    execute(file, "PRAGMA user_version = 7")
    for use in (JournalReader, Journal.open):
        with pytest.raises(JournalTooNew) as caught:
            use(file)  # type: ignore[operator]
        assert (caught.value.version, caught.value.version_known) == (7, SCHEMA_VERSION)
        assert str(caught.value) == (
            f"{file}: is a journal of version 7, and this Quorate knows versions up to 1; "
            "install the Quorate that wrote it, or a later one"
        )


def test_an_earlier_version_is_not_read_before_it_is_migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "journal.sqlite3"
    write_journal(file, rounds(1))
    monkeypatch.setattr(schema, "SCHEMA_VERSION", 2)
    with pytest.raises(JournalUnusable, match="version 1; the coordinator brings it to 2 when it starts"):
        JournalReader(file)


@pytest.mark.parametrize("use", [JournalReader, Journal.open], ids=["read", "write"])
def test_other_files_are_left_alone(tmp_path: Path, use: type) -> None:
    other = tmp_path / "other.sqlite3"
    execute(other, "CREATE TABLE songs (name)")
    text = tmp_path / "notes.txt"
    text.write_text("no database at all, and long enough to have been one" * 100)
    for file, problem in (
        (other, "is no journal of Quorate but some other database"),
        (text, "is no journal of Quorate, or one whose first bytes are damaged"),
        (tmp_path, "is not a file"),
    ):
        before = file.read_bytes() if file.is_file() else b""
        with pytest.raises(JournalUnusable, match=problem):
            use(file)
        assert not before or file.read_bytes() == before


@pytest.mark.parametrize("version", [0, -1, 1 - (1 << 31)])
def test_a_version_that_none_had_is_damage(tmp_path: Path, version: int) -> None:
    file = tmp_path / "journal.sqlite3"
    write_journal(file, rounds(1))
    execute(file, f"PRAGMA user_version = {version}")
    with pytest.raises(JournalDamaged, match=f"its version is {version}"):
        JournalReader(file)
    with pytest.raises(JournalDamaged, match=f"its version is {version}"):
        Journal.open(file)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(JournalUnusable, match=r"absent: cannot be read: No such file or directory$"):
        JournalReader(tmp_path / "absent")

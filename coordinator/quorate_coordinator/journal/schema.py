"""The tables, their version, and how a journal of an earlier version becomes one of this.

The version is SQLite's `user_version`, and `application_id` says whose file it is. Both change in the transaction
that changes the tables: a journal is of one version or of the next, also after a crash.
"""

import sqlite3
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Final

from quorate_coordinator.journal.errors import JournalDamaged, JournalTooNew, JournalUnusable

#: In the coordinator's state directory.
JOURNAL_NAME: Final = "journal.sqlite3"

#: "QUOR" in ASCII.
APPLICATION_ID: Final = 0x51554F52

Migration = Callable[[sqlite3.Connection], None]


def _create(connection: sqlite3.Connection) -> None:
    # `payload` is last: what is before it is read without the pages that a long one spills over to.
    # `key` is set for the opening of a round alone.
    connection.execute(
        "CREATE TABLE records (seq INTEGER PRIMARY KEY, kind TEXT NOT NULL, round INTEGER, at REAL NOT NULL, "
        "key TEXT, digest BLOB NOT NULL, payload BLOB NOT NULL)"
    )
    # With the kind, open rounds are found in the index alone.
    connection.execute("CREATE INDEX records_by_round ON records (round, kind) WHERE round IS NOT NULL")
    connection.execute("CREATE INDEX records_by_key ON records (key) WHERE key IS NOT NULL")
    # The learner's state after all records up to `seq`.
    connection.execute(
        "CREATE TABLE checkpoints (seq INTEGER PRIMARY KEY, at REAL NOT NULL, digest BLOB NOT NULL, "
        "snapshot BLOB NOT NULL)"
    )
    # One row at most: up to which record, and to which round, some have been pruned.
    connection.execute(
        "CREATE TABLE pruned (id INTEGER PRIMARY KEY CHECK (id = 1), seq INTEGER NOT NULL, round INTEGER NOT NULL, "
        "digest BLOB NOT NULL)"
    )


#: From version N to N + 1, at place N.
MIGRATIONS: Final[Sequence[Migration]] = (_create,)

SCHEMA_VERSION: Final = len(MIGRATIONS)


def migrate(connection: sqlite3.Connection, file: Path, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Brings a journal, or an empty database, to this version, each step in one transaction.

    Args:
        connection: in autocommit mode.

    Raises:
        JournalTooNew: it is of a later version.
        JournalUnusable: it is some other database.
    """
    for step in range(find_version(connection, file, len(migrations)), len(migrations)):
        connection.execute("BEGIN IMMEDIATE")
        try:
            migrations[step](connection)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {step + 1}")
            connection.execute("COMMIT")
        except BaseException:
            connection.rollback()
            raise


def find_version(connection: sqlite3.Connection, file: Path, version_known: int = SCHEMA_VERSION) -> int:
    """The version of a journal; 0 of an empty database, which is to become one.

    Raises:
        JournalTooNew: it is of a later version than is known.
        JournalUnusable: it is some other database.
    """
    version = _version(connection, file, may_be_empty=True)
    if version > version_known:
        raise JournalTooNew(file, version, version_known)
    return version


def check_version(connection: sqlite3.Connection, file: Path) -> None:
    """Whether it can be read as it is.

    Raises:
        JournalTooNew: it is of a later version.
        JournalDamaged: its tables are not as they were made.
        JournalUnusable: it is of an earlier version, or some other database.
    """
    version = _version(connection, file, may_be_empty=False)
    if version > SCHEMA_VERSION:
        raise JournalTooNew(file, version, SCHEMA_VERSION)
    if version == SCHEMA_VERSION and _schema(connection) != _expected_schema():
        # A column of another name or type would make anything of what is in it.
        raise JournalDamaged(file, "its tables are not those of a journal")
    if version < SCHEMA_VERSION:
        raise JournalUnusable(
            file,
            f"is a journal of version {version}; the coordinator brings it to {SCHEMA_VERSION} when it starts",
        )


@cache
def _expected_schema() -> list[tuple[str, str]]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for step in MIGRATIONS:
            step(connection)
        return _schema(connection)
    finally:
        connection.close()


def _schema(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    return connection.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall()


def _version(connection: sqlite3.Connection, file: Path, *, may_be_empty: bool) -> int:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application == APPLICATION_ID:
        if version < 1:  # both are set in one transaction
            raise JournalDamaged(file, f"its version is {version}")
        return int(version)
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if may_be_empty and not application and not version and not tables:
        return 0
    raise JournalUnusable(file, "is no journal of Quorate but some other database")

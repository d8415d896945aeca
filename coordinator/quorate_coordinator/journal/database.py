"""Opening the journal's file: to write it, which one process at a time may, or to read it."""

import contextlib
import errno
import fcntl
import os
import resource
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal, Self

from quorate_coordinator.journal.errors import JournalDamaged, JournalInUse, JournalUnusable
from quorate_coordinator.journal.schema import check_version, find_version, migrate
from quorate_protocol.errors import ConfigurationError

#: `full`: a commit is on the disk before it counts. `normal`: it survives the end of the process; a power cut may
#: take the last ones.
Sync = Literal["full", "normal"]

#: Seconds to wait for another connection, which holds a lock for an instant at its opening and closing only.
_BUSY_S: Final = 5.0

#: The write-ahead log is cut to this after a long reader has made it grow: some of SQLite's checkpoints, at 4 MiB each.
_WAL_BYTES_KEPT: Final = 32 << 20

#: Results of SQLite that mean the file's content. Anything else is the machine's.
_DAMAGE: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})

#: A file that is so near to the most that one may have could not take SQLite's largest page.
_LIMIT_MARGIN_BYTES: Final = 1 << 16


class Lock:
    """The right to write a journal, until `release` or the end of the process.

    A lock file and flock(2), because SQLite's own exclusive mode would keep out readers as well, and because closing
    any descriptor of the database drops the POSIX locks that SQLite holds on it.

    Raises:
        JournalInUse: another process has it.
        ConfigurationError: the lock file cannot be made.
    """

    def __init__(self, file: Path) -> None:
        self.file: Final = _beside(file, ".lock")
        path = self.file
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError("state_dir", f"cannot open {path}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._descriptor, 20, 0).decode(errors="replace").strip()
            os.close(self._descriptor)
            if not isinstance(error, BlockingIOError):
                raise ConfigurationError("state_dir", f"cannot lock {path}: {error.strerror or error}") from error
            raise JournalInUse(file, f" (pid {owner})" if owner.isdecimal() else "") from None
        # On a full disk the pid is not told; the lock holds all the same.
        with contextlib.suppress(OSError):
            os.fchmod(self._descriptor, 0o600)  # where somebody has copied it
            if os.geteuid() == 0:  # so that the coordinator's own user can open it later
                owner_of = path.parent.stat()
                os.fchown(self._descriptor, owner_of.st_uid, owner_of.st_gid)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Lets others have it. The lock file stays: removing it would let two have it at once."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class OpenFiles:
    """The files of a journal that is being written, as they were opened. SQLite goes on writing into a file that was
    removed, moved or replaced since, or cut, and nobody finds that again.

    Args:
        file: has a connection that writes.
        lock: its lock.
    """

    def __init__(self, file: Path, lock: Lock) -> None:
        self._wal = _beside(file, "-wal")
        self._opened = {path: _identify(path) for path in (file, self._wal, lock.file)}
        #: The least that these must have.
        self._bytes = {path: self._opened[path][2] for path in (file, self._wal)}

    def check(self) -> None:
        """To be called before something is written, and after, before anybody counts on it.

        Raises:
            JournalUnusable: a file is not the one that was opened, or has lost something.
        """
        for path, opened in self._opened.items():
            found = _identify(path)
            if found[:2] != opened[:2]:
                raise JournalUnusable(
                    path, "was removed, moved or replaced since it was opened; put it back, or restart the coordinator"
                )
            if found[2] < self._bytes.get(path, 0):
                raise JournalUnusable(
                    path, "was cut since it was written, and records with it; restart the coordinator"
                )

    def wrote(self) -> None:
        """Something was written: the files are as long as they should be, and grow from here."""
        for path in self._bytes:
            self._bytes[path] = _identify(path)[2]


def connect_to_write(file: Path, sync: Sync) -> sqlite3.Connection:
    """A connection that writes, in autocommit mode; the file is there, private and of this version. The caller holds
    its `Lock`, and uses the connection from one thread at a time.

    Raises:
        JournalTooNew, JournalDamaged, JournalUnusable: what is wrong with the file.
    """
    try:
        with contextlib.suppress(FileExistsError):
            # Private from the start: SQLite gives the files beside it the same mode.
            os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        _check_access(file, os.R_OK | os.W_OK)
    except OSError as error:
        raise JournalUnusable(file, f"cannot be opened: {error.strerror or error}") from error
    connection = _connect(file, "rw")
    try:
        with damage_told(file):
            find_version(connection, file)  # what is not ours is not touched
            for path in (file, _beside(file, "-wal"), _beside(file, "-shm")):
                with contextlib.suppress(OSError):
                    path.chmod(0o600)  # where somebody has copied it
            (tables,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            if not tables:
                # Of effect before the first table only; and it writes, for which a full disk has no room.
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise JournalUnusable(file, f"its file system cannot do write-ahead logging (SQLite says {mode})")
            connection.execute(f"PRAGMA synchronous = {sync.upper()}")
            connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES_KEPT}")
            migrate(connection, file)
            check_version(connection, file)
    except BaseException:
        connection.close()
        raise
    return connection


def connect_to_read(file: Path) -> sqlite3.Connection:
    """A connection that only reads, also while another process writes.

    Raises:
        JournalTooNew, JournalDamaged, JournalUnusable: what is wrong with the file.
    """
    try:
        _check_access(file, os.R_OK)
    except OSError as error:
        raise JournalUnusable(file, f"cannot be read: {error.strerror or error}") from error
    connection = _connect(file, "ro")
    try:
        with damage_told(file):
            check_version(connection, file)
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def damage_told(file: Path) -> Iterator[None]:
    """SQLite's errors become ours.

    Raises:
        JournalDamaged: of the content.
        JournalUnusable: of anything else.
    """
    try:
        yield
    except UnicodeDecodeError as error:  # of a name in the schema, which SQLite's own messages repeat
        raise JournalDamaged(file, "SQLite cannot say what, in readable text") from error
    except sqlite3.Error as error:
        # Without a code: Python could not make sense of a value, such as a text that is no UTF-8.
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code == sqlite3.SQLITE_NOTADB:
            raise JournalUnusable(file, "is no journal of Quorate, or one whose first bytes are damaged") from error
        if code in _DAMAGE or (code == sqlite3.SQLITE_ERROR and isinstance(error, sqlite3.OperationalError)):
            # An unknown table or column: the schema itself is damaged.
            raise JournalDamaged(file, f"SQLite says: {error}") from error
        raise JournalUnusable(file, f"cannot be used now: {explain(error, file)}") from error


def explain(error: sqlite3.Error, file: Path) -> str:
    """What SQLite could not do with a journal, for people."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return "there is no space left on its disk"
    if code == sqlite3.SQLITE_CONSTRAINT:
        return (
            f"{file} has records already that this process has not written: another coordinator uses it, "
            "which its lock file prevents; stop that one and restart this one"
        )
    if code == sqlite3.SQLITE_IOERR:
        # SQLite keeps to itself what the system said.
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        largest = max(_identify(path)[2] for path in (file, _beside(file, "-wal")))
        if limit != resource.RLIM_INFINITY and largest > limit - _LIMIT_MARGIN_BYTES:
            return f"no file of this process may have over {limit} bytes (ulimit -f, or systemd's LimitFSIZE)"
    return str(error)


def size_bytes(file: Path) -> int:
    """Size of a journal and of its write-ahead log."""
    return sum(path.stat().st_size for path in (file, _beside(file, "-wal")) if path.exists())


def _beside(file: Path, suffix: str) -> Path:
    return file.with_name(file.name + suffix)


def _identify(path: Path) -> tuple[int, int, int]:
    """Device, number on it, and size in bytes; zeros where there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_dev, found.st_ino, found.st_size


def _check_access(file: Path, mode: int) -> None:
    # Not by opening it: see `Lock` on closing descriptors. SQLite itself would not say what is in the way.
    if not stat.S_ISREG(file.stat().st_mode):
        raise JournalUnusable(file, "is not a file")
    if not os.access(file, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _connect(file: Path, mode: str) -> sqlite3.Connection:
    try:
        return sqlite3.connect(
            f"{file.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=_BUSY_S,
            isolation_level=None,
            check_same_thread=False,
        )
    except sqlite3.Error as error:
        raise JournalUnusable(file, f"cannot be opened: {error}") from error

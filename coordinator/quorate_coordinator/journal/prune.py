"""Taking away what is old, while the journal goes on being written.

What goes is rounds, whole, and experiences: those whose last record is older than `keep_s`, and more of the oldest as
long as the journal is over `keep_bytes`. What stays, whatever its age: rounds that are open; rounds with a record that
the oldest checkpoint does not cover, because replaying from there needs them; and rounds that the caller names.

Each step is one short transaction, so that whoever appends is not held up for long.
"""

import sqlite3
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

from quorate_coordinator.journal.rows import compute_digest, matches

#: Rows that one step looks at, and bytes of them that it takes: little more time than the commit itself needs.
_STEP_ROWS: Final = 128
_STEP_BYTES: Final = 1 << 20

#: What a row takes beside its payload, roughly: its other columns, its places in the table and the index.
_ROW_BYTES: Final = 90

#: Pages that a step gives back to the file system: more than it usually frees, so that the file shrinks
#: as the rows go.
_STEP_PAGES: Final = 512


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept."""

    #: Seconds since a round's last record; None for any time.
    keep_s: float | None = None
    #: Of the file, with what is in it only; None for any size.
    keep_bytes: int | None = None
    #: Rounds that somebody still needs: those whose truth is awaited.
    rounds: Collection[int] = ()


@dataclass(slots=True)
class PruneReport:
    """What was taken away so far."""

    records: int = 0
    rounds: int = 0
    #: Of payloads, with what goes along, roughly.
    bytes: int = 0


@dataclass(slots=True)
class _Step:
    """What one step looks at and takes."""

    cursor: int
    rounds: list[int]
    #: Records that are of no round.
    seqs: list[int]
    bytes: int = 0
    is_last: bool = False


def prune(
    connection: sqlite3.Connection,
    retention: Retention,
    now_s: float,
    *,
    up_to_seq: int | None = None,
    dry_run: bool = False,
) -> Iterator[PruneReport]:
    """Prunes, a step whenever the iterator is asked to go on; yields the same report again and again, which grows.

    Args:
        connection: in autocommit mode, with the right to write.
        now_s: Unix time.
        up_to_seq: the last record that there was when the caller named the rounds that it needs; None, where nobody
            writes meanwhile. What has come since stays.
        dry_run: only count.

    Raises:
        sqlite3.Error: a step failed and changed nothing.
    """
    report = PruneReport()
    yield report
    bound = _covered_seq(connection)
    if up_to_seq is not None:
        bound = min(bound, up_to_seq)
    excess = _excess(connection, retention)
    cursor = 0
    while bound:
        connection.execute("BEGIN" if dry_run else "BEGIN IMMEDIATE")
        try:
            step = _choose(connection, retention, now_s, cursor, bound, excess)
            records = _count(connection, step) if dry_run else _delete(connection, step)
            connection.execute("COMMIT")
        except BaseException:
            connection.rollback()
            raise
        report.records += records
        report.rounds += len(step.rounds)
        report.bytes += step.bytes
        if dry_run:
            excess -= step.bytes
        else:
            _give_back(connection)
            excess = _excess(connection, retention)
        yield report
        if step.is_last:
            break
        cursor = step.cursor
    while bound and not dry_run and _give_back(connection):
        yield report


def _covered_seq(connection: sqlite3.Connection) -> int:
    """Up to which record everything is in each checkpoint that can be read; 0 when there is none."""
    # The oldest of them: when the newest is damaged, its elder must have what it needs.
    for seq, at, digest, snapshot in connection.execute(
        "SELECT seq, at, digest, snapshot FROM checkpoints ORDER BY seq"
    ):
        if matches(digest, seq, "checkpoint", None, at, snapshot):
            return int(seq)
    return 0


def _excess(connection: sqlite3.Connection, retention: Retention) -> int:
    """Bytes in use over what may be; negative under it."""
    if retention.keep_bytes is None:
        return 0
    (pages,), (free,), (size,) = (
        connection.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size - retention.keep_bytes)


def _give_back(connection: sqlite3.Connection) -> bool:
    """Makes the file smaller by some of its free pages; whether there were any."""
    (before,) = connection.execute("PRAGMA freelist_count").fetchone()
    # As a script: it answers with rows without columns, of which `execute` takes the first for the last.
    connection.executescript(f"PRAGMA incremental_vacuum({_STEP_PAGES})")
    (after,) = connection.execute("PRAGMA freelist_count").fetchone()
    return bool(after < before)


def _choose(
    connection: sqlite3.Connection, retention: Retention, now_s: float, cursor: int, bound: int, excess: int
) -> _Step:
    step = _Step(cursor, [], [])
    oldest_s = float("-inf") if retention.keep_s is None else now_s - retention.keep_s
    # The casts make numbers of what a damaged row may have instead.
    rows = connection.execute(
        "SELECT seq, round, coalesce(CAST(at AS REAL), 0.0), coalesce(length(payload), 0) FROM records "
        "WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?",
        (cursor, bound, _STEP_ROWS),
    ).fetchall()
    step.is_last = len(rows) < _STEP_ROWS
    seen: set[int] = set()
    for seq, number, at, size in rows:
        is_over = step.bytes < excess
        if at > now_s and not is_over:
            # Written while the clock was ahead: it says nothing about those after it.
            step.cursor = seq
            continue
        if at >= oldest_s and not is_over:
            step.is_last = True  # those after it are younger, or will be looked at another day
            break
        if step.bytes > _STEP_BYTES:
            step.is_last = False
            break
        step.cursor = seq
        if number is None:
            step.seqs.append(seq)
            step.bytes += size + _ROW_BYTES
        elif isinstance(number, int) and number not in seen and number not in retention.rounds:
            seen.add(number)
            # What was told of a round that has been taken away stands alone, and is no open one.
            last_seq, last_s, is_over_and_done, all_bytes = connection.execute(
                "SELECT max(seq), coalesce(max(CAST(at AS REAL)), 0.0), "
                "max(kind = 'closed') OR NOT max(kind = 'opened'), total(length(payload) + ?) "
                "FROM records WHERE round = ?",
                (_ROW_BYTES, number),
            ).fetchone()
            if is_over_and_done and last_seq <= bound and (last_s < oldest_s or is_over):
                step.rounds.append(number)
                step.bytes += int(all_bytes)
    return step


def _count(connection: sqlite3.Connection, step: _Step) -> int:
    counts = [connection.execute("SELECT count(*) FROM records WHERE round = ?", (one,)) for one in step.rounds]
    return len(step.seqs) + sum(int(count.fetchone()[0]) for count in counts)


def _delete(connection: sqlite3.Connection, step: _Step) -> int:
    if not step.rounds and not step.seqs:
        return 0
    ends = [
        connection.execute("SELECT max(seq) FROM records WHERE round = ?", (one,)).fetchone()[0] for one in step.rounds
    ]
    deleted = sum(
        connection.execute("DELETE FROM records WHERE round = ?", (one,)).rowcount for one in step.rounds
    ) + sum(connection.execute("DELETE FROM records WHERE seq = ?", (seq,)).rowcount for seq in step.seqs)
    before_seq, before_round = connection.execute("SELECT max(seq), max(round) FROM pruned").fetchone()
    last_seq = max(*ends, *step.seqs, before_seq or 0)
    last_round = max(*step.rounds, before_round or 0, 0)
    connection.execute(
        "INSERT OR REPLACE INTO pruned (id, seq, round, digest) VALUES (1, ?, ?, ?)",
        (last_seq, last_round, compute_digest(last_seq, "pruned", last_round, 0.0, b"")),
    )
    return deleted

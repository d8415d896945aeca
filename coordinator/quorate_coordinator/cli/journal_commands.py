"""`quorate journal verify|export|prune`: what is done with the journal's file. They need the base dependencies alone.

Verifying and exporting only read, also while the coordinator runs.
"""

import base64
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from quorate_coordinator.cli import common
from quorate_coordinator.journal.database import Lock, connect_to_write, damage_told, size_bytes
from quorate_coordinator.journal.errors import JournalDamaged, JournalInUse
from quorate_coordinator.journal.prune import PruneReport, Retention, prune
from quorate_coordinator.journal.reader import JournalReader
from quorate_coordinator.journal.records import KINDS, Record, RecordedResult
from quorate_coordinator.journal.rows import Row
from quorate_coordinator.journal.schema import JOURNAL_NAME
from quorate_coordinator.journal.verify import verify
from quorate_protocol.bodies import decode_body
from quorate_protocol.errors import ConfigurationError, QuorateError
from quorate_protocol.fields import Body, BodyRef
from quorate_protocol.state_dir import default_state_dir

journal = typer.Typer(
    help="Check, export or prune the journal: the record of all rounds.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FileArgument = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help=f"The journal. Otherwise {JOURNAL_NAME} in the state directory."),
]
StateDirOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="State directory of the coordinator. Otherwise QUORATE_STATE_DIR, systemd's, or ~/.local/share/quorate.",
    ),
]

#: Fields that hold something packed by an agent or operator.
_BODIES: Final = frozenset({"body", "answer", "truth"})

#: Largest number that SQLite has.
_NUMBER_MAX: Final = (1 << 63) - 1

_SIZES: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@journal.command("verify", short_help="Check that it is whole and true.")
def verify_command(
    file: FileArgument = None, state_dir: StateDirOption = None, json_output: common.JsonOption = False
) -> None:
    """Check the journal: each bit of each record, and that what they say can be true.

    Exit code 1 when something is wrong, with a line for each problem.
    """
    with common.errors_shown():
        found = verify(_journal_file(file, state_dir))
    if json_output:
        common.print_json(found.as_json())
    else:
        for heading, counts in (("records", found.records), ("rounds", found.rounds)):
            told = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
            typer.echo(f"{heading}: {sum(counts.values())}{f' ({told})' if told else ''}")
        pruned = f", pruned up to {found.pruned_seq}" if found.pruned_seq else ""
        typer.echo(f"numbers: {found.first_seq} to {found.last_seq}{pruned}; checkpoints: {found.checkpoints}")
    if found.problems:
        count = len(found.problems)
        details = [] if json_output else found.problems
        common.fail(
            f"{found.file}: {count} problem{'s' if count > 1 else ''} found", common.EXIT_OTHER, details=details
        )
    if not json_output:
        typer.echo(f"{common.one_line(found.file)} is as it was written")


@journal.command("export", short_help="Print its records as JSON lines.")
def export_command(
    file: FileArgument = None,
    state_dir: StateDirOption = None,
    output_format: Annotated[str, typer.Option("--format", metavar="jsonl", help="JSON lines.")] = "jsonl",
    after: Annotated[
        int, typer.Option(metavar="SEQ", help="Only records after this number.", min=0, max=_NUMBER_MAX)
    ] = 0,
    kind: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help=f"Only records of this kind: {', '.join(KINDS)}. Repeatable."),
    ] = None,
    round: Annotated[
        int | None, typer.Option(metavar="N", help="Only records of this round.", min=1, max=_NUMBER_MAX)
    ] = None,
) -> None:
    """Print the records as JSON lines, in their order: one object with seq, at (Unix time), kind and its fields.

    A body is shown as the JSON that it stands for; one that cannot be read is in base64, under its name with _base64.
    Of a large one (over about 1 MiB) the journal has size and digest (SHA-256): those are under its name with _ref.
    Records that are damaged are named on standard error and left out; then the exit code is 1.
    """
    damaged: list[str] = []
    with common.errors_shown(), _closed_pipe_is_the_end():
        if output_format != "jsonl":
            raise ConfigurationError("--format", f"{output_format!r} is not jsonl, which is all there is")
        for name in kind or []:
            if name not in KINDS:
                raise ConfigurationError("--kind", f"{name!r} is none of {', '.join(KINDS)}")
        with JournalReader(_journal_file(file, state_dir)) as reader:
            for row in _chosen(reader, after, kind, round):
                try:
                    record = row.read(reader.file)
                except JournalDamaged as error:
                    damaged.append(error.damage)
                    continue
                line = {"seq": row.seq, "at": row.at, "kind": row.kind, **record_json(record)}
                sys.stdout.write(common.json_text(line) + "\n")  # not typer's: it flushes each line
    if damaged:
        common.fail("some records are damaged and were left out", common.EXIT_OTHER, details=damaged)


@journal.command("prune", short_help="Take away what is old.")
def prune_command(
    file: FileArgument = None,
    state_dir: StateDirOption = None,
    keep_days: Annotated[
        float | None, typer.Option(metavar="DAYS", help="Take away rounds that are older.", min=0)
    ] = None,
    keep_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Take away the oldest while it is larger: 500M, 4G.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    json_output: common.JsonOption = False,
) -> None:
    """Take away old rounds, while no coordinator runs; a running one does it by itself.

    Rounds go whole. What the learner's oldest checkpoint does not cover stays, whatever its age.
    """
    with common.errors_shown():
        if keep_days is None and keep_bytes is None:
            raise ConfigurationError("--keep-days", "say what to keep, with --keep-days or --keep-bytes")
        retention = Retention(
            None if keep_days is None else keep_days * 86_400, _parse_size("--keep-bytes", keep_bytes)
        )
        path = _journal_file(file, state_dir)
        report = _prune(path, retention, dry_run)
        left_bytes = size_bytes(path)
    if json_output:
        common.print_json(
            {"records": report.records, "rounds": report.rounds, "bytes": report.bytes, "dry_run": dry_run}
        )
    else:
        verb = "would go" if dry_run else "are gone"
        typer.echo(f"{report.records} records ({report.rounds} whole rounds, {_size_text(report.bytes)}) {verb}")
        if not dry_run and retention.keep_bytes is not None and left_bytes > retention.keep_bytes:
            typer.echo(f"the journal has {_size_text(left_bytes)} still: the rest is not in its oldest checkpoint yet")


def _size_text(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1_000_000 else f"{size_bytes / 1e3:.1f} kB"


def record_json(record: Record) -> dict[str, Any]:
    """A record's fields as JSON can say them."""
    return _fields_json(record)


def _fields_json(record: Record | RecordedResult) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for one in fields(record):
        value = getattr(record, one.name)
        if one.name in _BODIES and value is not None:
            shown.update(_body_json(one.name, value))
        elif one.name == "results":
            shown["results"] = [_fields_json(result) for result in value]
        else:
            shown[one.name] = common.as_json(dict(value) if one.name == "weights" else value)
    return shown


def _body_json(name: str, body: Body) -> dict[str, Any]:
    if isinstance(body, BodyRef):
        return {f"{name}_ref": {"size": body.size, "digest": body.digest.hex()}}
    try:
        value = common.as_json(decode_body(body))
        common.json_text(value)
    except (QuorateError, ValueError):
        return {f"{name}_base64": base64.b64encode(body).decode()}
    return {name: value}


def _chosen(reader: JournalReader, after: int, kinds: list[str] | None, round: int | None) -> Iterator[Row]:
    # Names of kinds are checked, and a round is a number: both may stand in the query.
    clauses = ""
    if kinds:
        clauses += " AND kind IN ({})".format(", ".join(f"'{kind}'" for kind in kinds))
    if round is not None:
        clauses += f" AND round = {round}"
    return reader.rows(after, clauses)


@contextmanager
def _closed_pipe_is_the_end() -> Iterator[None]:
    """Whoever reads us has seen enough, as `head` does: that is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered has nowhere to go; without this the interpreter would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prune(file: Path, retention: Retention, dry_run: bool) -> PruneReport:
    JournalReader(file).close()  # nothing is made of what is no journal
    try:
        lock = Lock(file)
    except JournalInUse as error:
        raise ConfigurationError(
            "state_dir",
            f"{file} is being written by a running coordinator, which prunes by itself: "
            "see keep_days and keep_bytes under [journal] in its settings",
        ) from error
    with lock:
        connection = connect_to_write(file, "full")
        try:
            with damage_told(file):
                # The same report again and again, at last whole.
                return list(prune(connection, retention, time.time(), dry_run=dry_run))[-1]
        finally:
            connection.close()


def _journal_file(file: Path | None, state_dir: Path | None) -> Path:
    if file is not None and state_dir is not None:
        raise ConfigurationError("--state-dir", "says where the journal is, and so does FILE: only one of them")
    return file or (state_dir or default_state_dir(os.environ)) / JOURNAL_NAME


def _parse_size(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = number[-1:] if number[-1:] in "KMGT" else ""
    try:
        value = float(number.removesuffix(unit)) * _SIZES[unit]
    except ValueError:
        value = -1.0
    if not 0 <= value < 1 << 60:
        raise ConfigurationError(option, f"{text!r} is not a size; write 500M, 4G or a number of bytes")
    return int(value)

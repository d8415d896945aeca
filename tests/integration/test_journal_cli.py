"""`quorate journal`: what it says of good journals, bad ones, and files that are none."""

import asyncio
import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from journal_making import (
    EPOCH_S,
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
from processes import PATIENCE_S, QUORATE, clean_environment, quorate
from quorate_coordinator.cli.app import app
from quorate_coordinator.journal.records import ExperienceTaken, RecordedResult, RoundClosed, TruthTold
from quorate_coordinator.journal.writer import Journal
from quorate_protocol.fields import BodyRef


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    write_journal(
        tmp_path / "journal.sqlite3",
        [*rounds(3), opened(4, key="k", digest=b"\1\xff"), ExperienceTaken("ant", "sound", b"\xc1"), experience()],
        checkpoints=[12],
    )
    return tmp_path


def journal(*arguments: str, state_dir: Path | None = None) -> Result:
    variables = {
        "QUORATE_STATE_DIR": str(state_dir) if state_dir else None,
        "STATE_DIRECTORY": None,
        "HOME": "/nowhere",
    }
    return CliRunner().invoke(app, ["journal", *arguments], env=variables)


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


# --- verify --------------------------------------------------------------------------------------


def test_a_good_journal(state_dir: Path) -> None:
    for arguments, default in (
        ((), state_dir),
        (("--state-dir", str(state_dir)), None),
        ((str(state_dir / "journal.sqlite3"),), None),
    ):
        ended = journal("verify", *arguments, state_dir=default)
        assert (ended.exit_code, ended.stderr) == (0, "")
        assert ended.stdout.splitlines() == [
            "records: 15 (3 closed, 2 experience, 3 late, 4 opened, 3 truth)",
            "rounds: 4 (1 open, 3 quorate)",
            "numbers: 1 to 15; checkpoints: 1",
            f"{state_dir / 'journal.sqlite3'} is as it was written",
        ]


def test_a_good_journal_in_json(state_dir: Path) -> None:
    (found,) = lines(journal("verify", "--json", state_dir=state_dir))
    assert found["ok"] is True
    assert found["problems"] == []
    assert found["rounds"] == {"quorate": 3, "open": 1}


def test_problems_are_listed(state_dir: Path) -> None:
    execute(state_dir / "journal.sqlite3", "UPDATE records SET payload = x'80' WHERE seq IN (3, 14)")
    ended = journal("verify", state_dir=state_dir)
    assert ended.exit_code == 1
    assert ended.stderr.splitlines() == [
        f"quorate: {state_dir / 'journal.sqlite3'}: 2 problems found",
        "  record 3: its digest does not match",
        "  record 14: its digest does not match",
    ]
    ended = journal("verify", "--json", state_dir=state_dir)
    assert ended.exit_code == 1
    assert json.loads(ended.stdout)["problems"] == [
        "record 3: its digest does not match",
        "record 14: its digest does not match",
    ]


# --- export --------------------------------------------------------------------------------------


def test_export(state_dir: Path) -> None:
    exported = lines(journal("export", state_dir=state_dir))
    assert [line["seq"] for line in exported] == list(range(1, 16))
    assert exported[0] == {
        "seq": 1,
        "at": EPOCH_S + 1,
        "kind": "opened",
        "round": 1,
        "task": "classify",
        "body": {"x": 1, "padding": ""},
        "selected": ["ant", "bee", "cat"],
        "quorum": 2,
        "grace_s": 0.25,
        "deadline_s": 10.0,
        "operator": "operator-1",
        "key": None,
        "digest": None,
    }
    assert (exported[1]["answer"], exported[1]["duration_s"], exported[1]["weights"]) == (
        "yes",
        closed(1).duration_s,
        closed(1).weights,
    )
    assert exported[1]["results"][2] == {
        "agent": "cat",
        "status": "lost",
        "body": None,
        "error": "link broken",
        "latency_s": None,
        "compute_s": 0.0,
        "waited_s": 0.0,
    }
    assert exported[12]["digest"] == "01ff"
    assert "body" not in exported[13]
    assert base64.b64decode(exported[13]["body_base64"]) == b"\xc1"


def test_export_of_large_bodies_is_of_their_references(tmp_path: Path) -> None:
    ref = BodyRef(size=20_000_000, digest=b"\xab" * 32)
    results = (RecordedResult("ant", "replied", ref),)
    write_journal(
        tmp_path / "journal.sqlite3",
        [
            replace(opened(1), body=ref, selected=("ant",), quorum=1),
            RoundClosed(1, "classify", "complete", 1, results, 0.1, answer=ref),
            TruthTold(1, ref),
            replace(late(1), body=ref),
            *rounds(1, first=2),
        ],
    )
    exported = lines(journal("export", state_dir=tmp_path))
    shown = {"size": 20_000_000, "digest": "ab" * 32}
    assert [exported[0]["body_ref"], exported[1]["answer_ref"], exported[1]["results"][0]["body_ref"]] == [shown] * 3
    assert [exported[2]["truth_ref"], exported[3]["body_ref"]] == [shown] * 2
    assert len(exported) == 8


def test_export_of_a_part(state_dir: Path) -> None:
    def seqs(*arguments: str) -> list[int]:
        return [line["seq"] for line in lines(journal("export", *arguments, state_dir=state_dir))]

    assert seqs("--after", "13") == [14, 15]
    assert seqs("--kind", "truth", "--kind", "late") == [3, 4, 7, 8, 11, 12]
    assert seqs("--round", "2") == [5, 6, 7, 8]
    assert seqs("--round", "2", "--kind", "truth", "--after", "7", "--format", "jsonl") == [8]
    assert seqs("--round", "99") == []


def test_export_leaves_out_what_is_damaged(state_dir: Path) -> None:
    execute(state_dir / "journal.sqlite3", "UPDATE records SET payload = x'80' WHERE seq = 3")
    ended = journal("export", state_dir=state_dir)
    assert ended.exit_code == 1
    assert [json.loads(line)["seq"] for line in ended.stdout.splitlines()] == [1, 2, *range(4, 16)]
    assert ended.stderr.splitlines() == [
        "quorate: some records are damaged and were left out",
        "  record 3: its digest does not match",
    ]


async def test_verifying_and_exporting_beside_a_writer(tmp_path: Path) -> None:
    async with journalling(tmp_path / "journal.sqlite3") as (written, _):
        for record in rounds(100):
            written.append(record, at=EPOCH_S)
        await written.flush()
        verified = await quorate("journal", "verify", "--state-dir", str(tmp_path))
        exported = await quorate("journal", "export", "--state-dir", str(tmp_path))
    assert (verified.code, verified.err) == (0, "")
    assert (exported.code, len(exported.out.splitlines())) == (0, 400)


async def test_a_closed_pipe_ends_the_export_in_peace(tmp_path: Path) -> None:
    write_journal(tmp_path / "journal.sqlite3", rounds(1000))
    process = await asyncio.create_subprocess_exec(
        *(QUORATE, "journal", "export", "--state-dir", str(tmp_path)),
        env=clean_environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE_S):
        await process.stdout.readline()
        process.stdout._transport.close()  # type: ignore[attr-defined]  # as `head -1` would
        assert await process.stderr.read() == b""
        assert await process.wait() == 0


# --- prune ---------------------------------------------------------------------------------------


def test_prune(state_dir: Path) -> None:
    file = state_dir / "journal.sqlite3"
    planned = journal("prune", "--keep-days", "30", "--dry-run", state_dir=state_dir)
    assert (planned.exit_code, planned.stdout) == (0, "12 records (3 whole rounds, 2.6 kB) would go\n")
    assert len(read_journal(file)) == 15
    ended = journal("prune", "--keep-days", "30", "--json", state_dir=state_dir)
    assert {**lines(ended)[0], "bytes": 0} == {"records": 12, "rounds": 3, "bytes": 0, "dry_run": False}
    assert [seq for seq, _, _ in read_journal(file)] == [13, 14, 15]
    assert "pruned up to 12" in journal("verify", state_dir=state_dir).stdout


@pytest.mark.parametrize(("size", "left"), [("1G", 15), ("10", 3), ("1KiB", 3), ("0.5T", 15)])
def test_prune_by_size(state_dir: Path, size: str, left: int) -> None:
    ended = journal("prune", "--keep-bytes", size, state_dir=state_dir)
    assert ended.exit_code == 0
    assert len(read_journal(state_dir / "journal.sqlite3")) == left
    assert ("the rest is not in its oldest checkpoint yet" in ended.stdout) is (left == 3)


def test_prune_leaves_a_running_coordinator_alone(state_dir: Path) -> None:
    running = Journal.open(state_dir / "journal.sqlite3")
    ended = journal("prune", "--keep-days", "1", state_dir=state_dir)
    running.close(0)
    assert ended.exit_code == 2
    assert "is being written by a running coordinator, which prunes by itself: see keep_days" in ended.stderr
    assert len(read_journal(state_dir / "journal.sqlite3")) == 15


# --- what is no good -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("export --format csv", "--format: 'csv' is not jsonl, which is all there is"),
        ("export --kind rumour", "--kind: 'rumour' is none of opened, closed, late, truth, experience"),
        ("verify --state-dir DIR DIR/journal.sqlite3", "--state-dir: says where the journal is, and so does FILE"),
        ("prune", "--keep-days: say what to keep, with --keep-days or --keep-bytes"),
        ("prune --keep-bytes lots", "--keep-bytes: 'lots' is not a size; write 500M, 4G or a number of bytes"),
        ("prune --keep-bytes -1", "--keep-bytes: '-1' is not a size"),
        ("prune --keep-bytes nan", "--keep-bytes: 'nan' is not a size"),
    ],
)
def test_wrong_arguments_are_named(state_dir: Path, arguments: str, problem: str) -> None:
    ended = journal(*(part.replace("DIR", str(state_dir)) for part in arguments.split()), state_dir=state_dir)
    assert (ended.exit_code, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"quorate: {problem}")


@pytest.mark.parametrize("command", ["verify", "export", "prune --keep-days 1"])
@pytest.mark.parametrize("what", ["missing", "directory", "text", "empty", "other", "too new", "header"])
def test_what_is_no_journal_is_named(tmp_path: Path, state_dir: Path, command: str, what: str) -> None:
    file = tmp_path / "x.sqlite3"
    problem = "is no journal of Quorate"
    if what == "missing":
        problem = "cannot be read: No such file or directory"
    elif what == "directory":
        file.mkdir()
        problem = "is not a file"
    elif what == "text":
        file.write_text("hello")
    elif what == "empty":
        file.write_bytes(b"")
    elif what == "other":
        execute(file, "CREATE TABLE songs (name)")
    elif what == "too new":
        write_journal(file, rounds(1))
        execute(file, "PRAGMA user_version = 2")
        problem = "is a journal of version 2, and this Quorate knows versions up to 1; install"
    elif what == "header":
        file.write_bytes(bytes(1) + (state_dir / "journal.sqlite3").read_bytes()[1:])
    ended = journal(*command.split(), str(file))
    assert (ended.exit_code, ended.stdout) == (2, ""), ended.output
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"quorate: {file}: {problem}")


@pytest.mark.parametrize("command", ["verify", "export", "prune --keep-days 1"])
def test_a_page_that_is_lost_is_no_traceback(tmp_path: Path, command: str) -> None:
    file = tmp_path / "journal.sqlite3"
    write_journal(file, [*rounds(200), truth(300), late(301)], checkpoints=[800])
    content = bytearray(file.read_bytes())
    for page in range(1, len(content) // 4096, 3):
        content[page * 4096 : page * 4096 + 2000] = bytes(2000)
    file.write_bytes(content)
    ended = journal(*command.split(), str(file))
    assert ended.exit_code in (1, 2)
    assert ended.exception is None or isinstance(ended.exception, SystemExit)
    assert ended.stderr.startswith("quorate: ")


def test_help(state_dir: Path) -> None:
    for arguments in ((), ("verify",), ("export",), ("prune",)):
        ended = journal(*arguments, "--help")
        assert ended.exit_code == 0
        assert "..." not in ended.stdout.split("Commands:")[-1]

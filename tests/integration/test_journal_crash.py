"""The journal after the end of its process at any instant, and after the end of its write-ahead log was torn off."""

import asyncio
import random
import shutil
import sys
from pathlib import Path

import journal_peer
from journal_making import EPOCH_S, PATIENCE_S, journalling, read_journal, record_at, rounds, write_journal
from quorate_coordinator.journal.reader import JournalReader
from quorate_coordinator.journal.verify import verify


def assert_is_prefix(file: Path, at_least: int) -> int:
    """Everything that was told to be durable is there, as it was, and nothing is between."""
    read = read_journal(file)
    assert len(read) >= at_least
    for number, (seq, _, record) in enumerate(read, start=1):
        assert (seq, record) == (number, record_at(number))
    assert verify(file).problems == []
    with JournalReader(file) as reader:
        newest = reader.checkpoint()
        assert newest is None or (newest.snapshot == b"state %d" % newest.seq and newest.seq <= len(read))
        assert reader.damaged_checkpoints == ()
    return len(read)


async def test_killed_at_any_instant_what_was_durable_is_there(tmp_path: Path) -> None:
    file = tmp_path / "journal.sqlite3"
    draw = random.Random(random.randrange(1 << 32))
    durable = 0
    for _ in range(8):
        process = await asyncio.create_subprocess_exec(
            sys.executable, journal_peer.__file__, str(file), "endless", stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        try:
            async with asyncio.timeout(PATIENCE_S):
                # Killed after so many lines, and then at any instant of the commits that go on.
                for _ in range(draw.randrange(20)):
                    await process.stdout.readline()
                await asyncio.sleep(draw.random() * 0.01)  # the only way to an instant that nothing else picks
                process.kill()
                told = (await process.stdout.read()).split(b"\n")
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        whole_lines = told[:-1]
        durable = assert_is_prefix(file, max(durable, int(whole_lines[-1]) if whole_lines else 0))
    assert durable > 100


async def test_a_torn_log_loses_only_what_was_torn_off(tmp_path: Path) -> None:
    file = tmp_path / "journal.sqlite3"
    write_journal(file, rounds(5))
    sizes: dict[int, int] = {}  # of the log, when so many records were durable
    log = tmp_path / "journal.sqlite3-wal"
    async with journalling(file) as (journal, _):
        for _ in range(40):
            for _ in range(3):
                journal.append(record_at(journal.last_seq + 1), at=EPOCH_S)
            if journal.last_seq % 10 == 0:
                journal.append_checkpoint(journal.last_seq, b"state %d" % journal.last_seq, at=EPOCH_S)
            await asyncio.wait_for(journal.flush(), PATIENCE_S)
            sizes[journal.last_seq] = log.stat().st_size
        content, log_content = file.read_bytes(), log.read_bytes()
    draw = random.Random(random.randrange(1 << 32))
    assert len(log_content) == sizes[140]
    for number in range(60):
        torn = tmp_path / f"torn-{number}"
        torn.mkdir()
        (torn / file.name).write_bytes(content)
        size = draw.choice([draw.randrange(len(log_content) + 1), draw.choice(list(sizes.values()))])
        # What the file system had not written yet may also be zeros, or what was there before.
        tail = draw.choice([b"", bytes(draw.randrange(5000)), draw.randbytes(draw.randrange(5000))])
        (torn / log.name).write_bytes(log_content[:size] + tail)
        kept = max((seq for seq, end in sizes.items() if end <= size), default=20)
        assert assert_is_prefix(torn / file.name, kept) == kept
        async with journalling(torn / file.name) as (journal, _):  # and it can be written on
            journal.append(record_at(journal.last_seq + 1), at=EPOCH_S)
        assert assert_is_prefix(torn / file.name, kept + 1) == kept + 1
        shutil.rmtree(torn)

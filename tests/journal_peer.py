"""A process that writes a journal until it is killed. It prints the number of each record that is durable.

Usage: journal_peer.py FILE endless                 appends `record_at` for ever, from where the journal ends
       journal_peer.py FILE limited                does so until no file may grow any more, and on when files may again
       journal_peer.py FILE AFTER DELAY_S < RECORDS  appends the records, and kills itself DELAY_S after so many
"""

import asyncio
import os
import resource
import signal
import sys
from pathlib import Path

import msgpack

from journal_making import EPOCH_S, Heard, record_at
from quorate_coordinator.journal.records import decode_record
from quorate_coordinator.journal.writer import Journal


def _say(seq: int) -> None:
    os.write(1, b"%d\n" % seq)


def _fail(problem: str) -> None:
    sys.exit(problem)


async def _write_for_ever(journal: Journal) -> None:
    while True:
        for _ in range(7):
            seq = journal.append(record_at(journal.last_seq + 1), at=EPOCH_S + journal.last_seq)
            if seq % 50 == 0:
                journal.append_checkpoint(seq, b"state %d" % seq, at=EPOCH_S)
        if journal.pending_records > 20:
            await journal.flush()
        await asyncio.sleep(0)


async def _write_within_limit(journal: Journal, heard: Heard) -> None:
    for limit, is_done in ((300_000, lambda: heard.failed), (resource.RLIM_INFINITY, lambda: heard.recovered)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        while not is_done():
            if not heard.failed:
                journal.append(record_at(journal.last_seq + 1), at=EPOCH_S)
            heard.on_change.clear()
            await heard.on_change.wait()
    await heard.until(committed=journal.last_seq)
    print(*heard.failed, sep="\n")  # noqa: T201


async def _write_and_die(journal: Journal, after: int, delay_s: float) -> None:
    for number, (kind, payload) in enumerate(msgpack.unpackb(sys.stdin.buffer.read())):
        if number == after:
            break
        journal.append(decode_record(kind, payload), at=EPOCH_S + number)
        await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(delay_s, os.kill, os.getpid(), signal.SIGKILL)
    await asyncio.Event().wait()


async def _main(file: str, *how: str) -> None:
    journal = Journal.open(Path(file))
    if how == ("limited",):
        heard = Heard()
        heard.start(journal)
        await _write_within_limit(journal, heard)
        return
    journal.start(asyncio.get_running_loop(), _say, _fail, lambda: None)
    if how == ("endless",):
        await _write_for_ever(journal)
    else:
        await _write_and_die(journal, int(how[0]), float(how[1]))


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))

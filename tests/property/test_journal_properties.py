"""Any records, written by a process that dies: what is read is a beginning of them, and holds all that was durable."""

import subprocess
import sys
import tempfile
from pathlib import Path

import msgpack
from hypothesis import given, settings
from hypothesis import strategies as st

import journal_peer
from journal_making import read_journal
from quorate_coordinator.journal.errors import JournalUnusable, RecordInvalid
from quorate_coordinator.journal.records import (
    KINDS,
    ExperienceTaken,
    Record,
    RecordedResult,
    ReplyLate,
    RoundClosed,
    RoundOpened,
    TruthTold,
    decode_record,
)
from quorate_coordinator.journal.verify import verify

names = st.text(st.characters(codec="utf-8"), max_size=20)
rounds = st.integers(0, (1 << 63) - 1)
bodies = st.binary(max_size=2000)
seconds = st.floats(allow_nan=False).map(lambda value: value + 0.0)  # no negative zero: nobody waits for that long
keys = st.none() | names.filter(bool)
digests = st.none() | st.binary(min_size=1, max_size=32)
results = st.builds(
    RecordedResult,
    names,
    st.sampled_from(["replied", "declined", "failed", "late", "lost", "cancelled", "unavailable"]),
    st.none() | bodies,
    names,
    st.none() | seconds,
    seconds,
    seconds,
)
records = st.one_of(
    st.builds(
        RoundOpened,
        rounds,
        names,
        bodies,
        st.lists(names, max_size=5).map(tuple),
        st.integers(0, 1 << 40),
        st.none() | seconds,
        seconds,
        names,
        keys,
        digests,
    ),
    st.builds(
        RoundClosed,
        rounds,
        names,
        st.sampled_from(["complete", "quorate", "expired", "failed", "cancelled", "interrupted"]),
        st.integers(0, 1 << 40),
        st.lists(results, max_size=5).map(tuple),
        seconds,
        names,
        st.none() | bodies,
        st.none() | seconds,
        st.dictionaries(names, seconds, max_size=5),
        keys,
        digests,
    ),
    st.builds(ReplyLate, rounds, names, names, bodies, seconds, seconds, seconds),
    st.builds(TruthTold, rounds, bodies),
    st.builds(ExperienceTaken, names, names, bodies),
)


@given(records)
@settings(max_examples=300)
def test_any_record_comes_back_as_it_was(record: Record) -> None:
    back = decode_record(record.kind, record.encode())
    assert back == record
    assert back.encode() == record.encode()


@given(st.sampled_from(list(KINDS)), st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes_are_a_record_or_refused(kind: str, payload: bytes) -> None:
    try:
        record = decode_record(kind, payload)
    except RecordInvalid:
        return
    assert decode_record(kind, record.encode()) == record


@given(records, st.data())
@settings(max_examples=300)
def test_any_changed_record_is_a_record_or_refused(record: Record, data: st.DataObject) -> None:
    payload = bytearray(record.encode())
    position = data.draw(st.integers(0, len(payload) - 1))
    payload[position] ^= data.draw(st.integers(1, 255))
    try:
        decode_record(record.kind, bytes(payload))
    except RecordInvalid:
        pass


@given(st.lists(records, max_size=60), st.integers(0, 60), st.sampled_from([0.0, 0.0002, 0.001, 0.005]))
@settings(max_examples=20)
def test_a_process_that_dies_leaves_a_beginning(written: list[Record], after: int, spin_s: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "journal.sqlite3"
        died = subprocess.run(
            [sys.executable, journal_peer.__file__, str(file), str(after), str(spin_s)],
            input=msgpack.packb([(record.kind, record.encode()) for record in written]),
            capture_output=True,
            check=False,
        )
        assert died.returncode == -9, died.stderr.decode()
        told = [int(line) for line in died.stdout.split()]
        read = read_journal(file)
        assert [record for _, _, record in read] == written[: len(read)]
        assert max(told, default=0) <= len(read) <= after
        try:
            found = verify(file)  # what these records say is not true; but bits and numbers are right
        except JournalUnusable as error:
            raise AssertionError(str(error)) from error
        assert not [problem for problem in found.problems if not problem.startswith("round ")]

"""What the journal's records are as bytes, and what is said about bytes that are none."""

import math
from typing import Any

import msgpack
import pytest

from journal_making import closed, experience, late, opened, truth
from quorate_coordinator.journal.errors import RecordInvalid
from quorate_coordinator.journal.records import (
    KINDS,
    Record,
    RecordedResult,
    RoundClosed,
    RoundOpened,
    TruthTold,
    decode_record,
)
from quorate_protocol.fields import BodyRef

LARGE = BodyRef(size=1 << 30, digest=b"x" * 32)

RECORDS = [
    opened(1),
    opened(1, key="k", digest=b"\1"),
    RoundOpened(7, "t", b"", (), 0, None, 0.0, ""),
    closed(1),
    closed(1, key="k", digest=b"\1"),
    RoundClosed(2, "t", "interrupted", 1, (), 0.0, "coordinator stops"),
    late(1),
    truth(1),
    # Of large bodies the references alone.
    RoundOpened(7, "t", LARGE, ("a",), 1, None, 1.0, ""),
    RoundClosed(7, "t", "complete", 1, (RecordedResult("a", "replied", LARGE),), 1.0, answer=LARGE),
    TruthTold(7, LARGE),
    experience(),
]


def changed(record: Record, **fields: Any) -> bytes:
    """The record's bytes with these fields instead; None takes one away."""
    map_ = msgpack.unpackb(record.encode())
    for name, value in fields.items():
        if value is None:
            del map_[name]
        else:
            map_[name] = value
    packed: bytes = msgpack.packb(map_)
    return packed


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.kind)
def test_comes_back_as_it_was(record: Record) -> None:
    back = decode_record(record.kind, record.encode())
    assert back == record
    assert repr(back) == repr(record)  # tells 1 from 1.0
    assert back.encode() == record.encode()


@pytest.mark.parametrize("seconds", [0.1 + 0.2, 5e-324, 1.7976931348623157e308, math.inf, 1 / 3])
def test_floats_are_exact(seconds: float) -> None:
    record = RoundClosed(
        1, "t", "complete", 1, (RecordedResult("a", "replied", b"", "", seconds, seconds, seconds),), seconds,
        support=seconds, weights={"a": seconds},
    )  # fmt: skip
    assert decode_record("closed", record.encode()) == record


def test_whole_numbers_come_back_as_floats() -> None:
    back = decode_record("opened", changed(opened(1), deadline_s=10))
    assert isinstance(back, RoundOpened)
    assert repr(back.deadline_s) == "10.0"


def test_defaults_take_no_place() -> None:
    assert msgpack.unpackb(truth(1).encode()) == {"round": 1, "truth": b"\xa3yes"}
    silent = msgpack.unpackb(RoundClosed(2, "t", "expired", 1, (RecordedResult("a", "late"),), 1.0).encode())
    assert set(silent) == {"round", "task", "state", "quorum", "results", "duration_s"}
    assert silent["results"] == [["a", "late", None, ""]]
    assert not {"key", "digest"} & set(msgpack.unpackb(opened(1).encode()))


def test_what_a_later_version_adds_is_passed_over() -> None:
    assert decode_record("truth", changed(truth(1), mood="good")) == truth(1)
    results = msgpack.unpackb(closed(1).encode())["results"]
    assert decode_record("closed", changed(closed(1), results=[[*one, "new"] for one in results if len(one) == 7]))


@pytest.mark.parametrize(
    ("kind", "payload", "problem"),
    [
        ("truth", b"", "invalid truth record: it is not one msgpack value: ValueError"),
        ("truth", truth(1).encode() + b"\0", "invalid truth record: it is not one msgpack value: ExtraData"),
        ("truth", b"\x93\1\2\3", "invalid truth record: it is not a map but a list"),
        ("truth", changed(truth(1), truth=None), "invalid truth record: truth is missing"),
        ("truth", changed(truth(1), truth="text"), "invalid truth record: truth is not binary: 'text'"),
        ("truth", changed(truth(1), round=-1), "invalid truth record: round is no count: -1"),
        ("truth", changed(truth(1), round=True), "invalid truth record: round is no count: True"),
        ("opened", changed(opened(1), task=5), "invalid opened record: task is no text: 5"),
        ("opened", changed(opened(1), selected="ant"), "invalid opened record: selected is no list: 'ant'"),
        ("opened", changed(opened(1), selected=[1]), "invalid opened record: selected is no text: 1"),
        ("opened", changed(opened(1), deadline_s="1"), "invalid opened record: deadline_s is no number: '1'"),
        ("closed", changed(closed(1), state="open"),
         "invalid closed record: state is no state of a closed round: 'open'"),
        ("closed", changed(closed(1), weights=[1]), "invalid closed record: weights is no map: [1]"),
        ("closed", changed(closed(1), results=[["a", "asleep", None, ""]]),
         "invalid closed record: results is no status of an agent: 'asleep'"),
        ("closed", changed(closed(1), results=[["a"]]),
         "invalid closed record: results has one that is no list of at least four: ['a']"),
        ("closed", changed(closed(1), results=[["a", [], None, ""]]),
         "invalid closed record: results is no status of an agent: []"),
        ("closed", changed(closed(1), state={}), "invalid closed record: state is no state of a closed round: {}"),
        ("rumour", b"\x80",
         "invalid rumour record: there is no such kind; there are opened, closed, late, truth, experience"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(kind: str, payload: bytes, problem: str) -> None:
    with pytest.raises(RecordInvalid) as caught:
        decode_record(kind, payload)
    assert str(caught.value) == problem


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.kind)
def test_every_beginning_is_refused(record: Record) -> None:
    whole = record.encode()
    for size in range(len(whole)):
        with pytest.raises(RecordInvalid):
            decode_record(record.kind, whole[:size])


def test_what_cannot_be_packed_is_named() -> None:
    with pytest.raises(RecordInvalid, match="invalid truth record: it cannot be packed: "):
        TruthTold(1 << 65, b"").encode()
    with pytest.raises(RecordInvalid, match="invalid opened record: it cannot be packed: "):
        opened(1, key="\ud800").encode()


def test_there_are_five_kinds() -> None:
    assert list(KINDS) == ["opened", "closed", "late", "truth", "experience"]

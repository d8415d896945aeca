"""When two bodies are the same answer."""

import datetime
import math
import struct
from typing import Any

import numpy
import pytest

from quorate_coordinator.learner.answers import DEPTH_MAX, VALUE_BYTES_MAX, answer_key
from quorate_protocol.bodies import encode_body
from quorate_protocol.errors import FrameMalformed
from quorate_protocol.fields import BodyRef

UTC = datetime.UTC
NOON = datetime.datetime(2024, 5, 1, 12, tzinfo=UTC)


def key(value: Any) -> bytes:
    return answer_key(encode_body(value))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (0.0, -0.0),
        (2**53, float(2**53)),
        (math.nan, -math.nan),
        ([1, [2.0, None]], [1.0, [2, None]]),
        ({"a": 1, "b": [True]}, {"b": [True], "a": 1.0}),
        (NOON, NOON.astimezone(datetime.timezone(datetime.timedelta(hours=2)))),
        (numpy.array([1, 2], dtype="u1"), numpy.array([1.0, 2.0], dtype=">f8")),
        (numpy.array([0.5, math.nan], dtype="f4"), numpy.array([0.5, math.nan])),
        (numpy.array([0.0]), numpy.array([-0.0])),
        (numpy.array([2**63], dtype="u8"), numpy.array([2.0**63])),
        (numpy.array([-(2**63)]), numpy.array([-(2.0**63)])),
        (numpy.array(["a", "b"], dtype="<U1"), numpy.array(["a", "b"], dtype=">U7")),
        (numpy.array([1 + 2j], dtype="c8"), numpy.array([1 + 2j], dtype="c16")),
        (numpy.zeros((0, 3)), numpy.zeros((0, 3), dtype="i4")),
        (numpy.float32(0.5), 0.5),
    ],
    ids=repr,
)
def test_same(one: Any, other: Any) -> None:
    assert key(one) == key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (0, False),
        (1, "1"),
        (1, 2),
        (1, 1.5),
        (2**53 + 1, float(2**53)),
        (math.inf, -math.inf),
        (math.nan, None),
        ("a", b"a"),
        ("a", "A"),
        ("", None),
        ("", []),
        ([], {}),
        ([1, 2], [2, 1]),
        ([[1], 2], [1, [2]]),
        (["a", "b"], ["ab"]),
        ({"a": 1}, {"a": True}),
        ({1: "a"}, {"1": "a"}),
        (NOON, NOON + datetime.timedelta(microseconds=1)),
        (NOON, NOON.timestamp()),
        (numpy.array([1, 2]), [1, 2]),
        (numpy.array([1, 0]), numpy.array([True, False])),
        (numpy.zeros((2, 3)), numpy.zeros((3, 2))),
        (numpy.array([0.5]), numpy.array([0.25])),
        (numpy.array([1 + 2j]), numpy.array([2 + 1j])),
        (numpy.array(["2024"], dtype="M8[Y]"), numpy.array(["2025"], dtype="M8[Y]")),
    ],
    ids=repr,
)
def test_different(one: Any, other: Any) -> None:
    assert key(one) != key(other)


def test_a_signalling_nan_is_a_nan() -> None:
    signalling = numpy.frombuffer(b"\x01\x7c", dtype="<f2")
    assert key(signalling) == key(numpy.array([math.nan]))


def test_one_body_packed_in_two_ways() -> None:
    assert (
        answer_key(b"\x01") == answer_key(b"\xd3" + struct.pack(">q", 1)) == answer_key(b"\xcb" + struct.pack(">d", 1))
    )


@pytest.mark.parametrize(
    "body", [b"", b"\xc1", b"\x01\x01", b"\xa5ab", b"\xa1\xff", b"\xc7\x00\x63", b"\x91" * 5_000, b"\x81\x90\x01"]
)
def test_what_cannot_be_unpacked_has_no_key(body: bytes) -> None:
    with pytest.raises(FrameMalformed):
        answer_key(body)


@pytest.mark.parametrize("size", [VALUE_BYTES_MAX, VALUE_BYTES_MAX * 8])
def test_a_large_body_is_compared_by_its_bytes(size: int) -> None:
    large = encode_body([1] * size)
    assert answer_key(large) == answer_key(bytes(large))
    assert answer_key(large) != answer_key(encode_body([1.0] + [1] * (size - 1)))


def test_a_deep_body_is_compared_by_its_bytes() -> None:
    assert key(nested(DEPTH_MAX)) == answer_key(b"\x91" * DEPTH_MAX + b"\xcb" + struct.pack(">d", 1))
    assert key(nested(DEPTH_MAX + 1)) == key(nested(DEPTH_MAX + 1))
    assert key(nested(DEPTH_MAX + 1)) != answer_key(b"\x91" * (DEPTH_MAX + 1) + b"\xcb" + struct.pack(">d", 1))
    assert key(nested(900)) != key(nested(901))


def test_a_body_that_is_elsewhere_is_its_digest() -> None:
    one, other = BodyRef(size=1 << 30, digest=b"1" * 32), BodyRef(size=1 << 30, digest=b"2" * 32)
    assert answer_key(one) == answer_key(one.model_copy()) != answer_key(other)
    assert answer_key(one) != answer_key(encode_body(b"1" * 32))

"""Bodies with large arrays: what is not copied gives the same bytes, values and errors as what is.

The threshold is lowered to some bytes where that makes the interesting inputs short: the rules do not depend on it.
"""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import msgpack
import numpy
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quorate_protocol import bodies
from quorate_protocol.bodies import LARGE_ARRAY_BYTES, decode_body, encode_body, encode_body_parts
from quorate_protocol.errors import FrameMalformed, LocalError


@contextmanager
def arrays_are_large_from(size_bytes: int) -> Iterator[None]:
    with mock.patch.object(bodies, "LARGE_ARRAY_BYTES", size_bytes):
        yield


def decode_by_copying(data: bytes) -> Any:
    """As before there were views: msgpack alone."""
    with arrays_are_large_from(1 << 62):
        return decode_body(data)


def describe(value: Any) -> Any:
    """A value so that equal means the same in type and content, all the way down."""
    if isinstance(value, numpy.ndarray):
        return "array", value.dtype.str, value.shape, value.tobytes(), value.flags.writeable
    if isinstance(value, list):
        return [describe(item) for item in value]
    if isinstance(value, dict):
        return [(describe(key), describe(item)) for key, item in value.items()]
    return type(value).__name__, repr(value)


def outcome_of(decode: Any, data: Any) -> Any:
    try:
        return describe(decode(data))
    except FrameMalformed as error:
        return f"FrameMalformed: {error}"


def ext_32(data: bytes, code: int = 1) -> bytes:
    """An extension whose length takes four bytes, as a large array's does."""
    return b"\xc9" + len(data).to_bytes(4, "big") + bytes([code]) + data


def array_32(dtype: str, shape: list[int], values: bytes) -> bytes:
    """An array as large ones are written, whatever its size."""
    head = b"\x93" + msgpack.packb(dtype) + msgpack.packb(shape)
    return ext_32(head + b"\xc6" + len(values).to_bytes(4, "big") + values)


#: Arrays, good and bad ones, as they are on the wire when they are large.
packed_arrays = st.one_of(
    st.binary(max_size=24).map(lambda values: array_32("|u1", [len(values)], values)),
    st.lists(st.floats(width=32), max_size=5).map(lambda v: array_32("<f4", [len(v), 1], numpy.float32(v).tobytes())),
    st.sampled_from([b"a\0\0\0", b"\0\xd8\0\0", b"\xff\xff\xff\xff"]).map(lambda v: array_32("<U1", [1], v)),
    st.binary(max_size=8).map(lambda values: array_32("|O8", [1], values)),
    st.tuples(st.integers(-2, 9), st.binary(max_size=8)).map(lambda pair: array_32("|u1", [pair[0]], pair[1])),
    st.binary(max_size=20).map(ext_32),
    st.tuples(st.binary(max_size=8), st.integers(0, 127)).map(lambda pair: ext_32(*pair)),
)
#: What a cut body's inside might be taken for: marks, their extension, beginnings of arrays.
tricks = st.sampled_from(
    [
        b"\xff0000000",
        b"\xd7\x01\xff0000000",
        b"\xd7\x01\xff0000001",
        b"\xc9\x00\x00\x00\x10\x01\x93",
        b"\xc9\xff\xff\xff\xff\x01\x93",
        b"\xc6\x00\x00\x00\x20",
        b"\xc4\x30",
        b"\xc4\x10",
        b"\x82",
        b"\x93",
        b"\xdd\xff\xff\xff\xff",
        b"\xc1",
    ]
)
packed_scalars = st.one_of(
    st.none(), st.integers(-100, 1 << 40), st.text(st.characters(exclude_categories=["Cs"]), max_size=9), st.binary()
).map(msgpack.packb)


def packed_list(items: list[bytes]) -> bytes:
    return bytes([0x90 | len(items)]) + b"".join(items)


def packed_map(items: list[bytes]) -> bytes:
    pairs = len(items) // 2
    return bytes([0x80 | pairs]) + b"".join(items[: 2 * pairs])


packed_values = st.recursive(
    packed_arrays | packed_scalars | packed_arrays.map(msgpack.packb),
    lambda inner: (
        st.lists(inner, max_size=4).map(packed_list)
        | st.lists(inner | packed_scalars, max_size=8).map(packed_map)
        | inner.map(msgpack.packb)  # bytes that look like a body
    ),
    max_leaves=12,
)


#: Bytes that hold what looks like an array, before others that make a good body of what is left when it is cut out.
_DECOY = array_32("|u1", [20], bytes(20))
READS_EITHER_WAY = packed_list([msgpack.packb(_DECOY), msgpack.packb(b"\x01" * (len(_DECOY) - 11))])


def test_the_body_that_reads_either_way_does() -> None:
    decoded = decode_body(READS_EITHER_WAY)
    assert [type(item) for item in decoded] == [bytes, bytes]
    without = READS_EITHER_WAY.replace(_DECOY, b"\xd7\x01\xff0000000")
    assert decode_body(without)[1] == 1


@given(data=packed_values | st.lists(packed_values | tricks, max_size=8).map(b"".join) | st.binary(max_size=80))
@example(array_32("|u1", [12], b"\xff0000000abcd") + b"\xc0")
@example(packed_list([msgpack.packb(b"x" + array_32("|u1", [4], b"abcd") + b"y"), array_32("|u1", [1], b"z")]))
@example(packed_list([msgpack.packb(b"\xff0000000"), array_32("|u1", [4], b"abcd")]))
@example(packed_list([b"\xd7\x01\xff0000000", array_32("|u1", [4], b"abcd")]))
@example(READS_EITHER_WAY)
@example(ext_32(b"\x93\xa3|u1\x91\x04\xc6\x00\x00\x00\x03abcd"))
@example(ext_32(b"\x93\xa3|u1\x91\x04\xc6\x00\x00\x00\x05abcd"))
@example(packed_map([array_32("|u1", [4], b"abcd"), b"\xc0"]))
@example(packed_map([b"\xa1a", array_32("|u1", [1], b"a"), b"\xa1a", array_32("|u1", [1], b"b")]))
def test_views_and_copies_are_the_same_for_any_bytes(data: bytes) -> None:
    expected = outcome_of(decode_by_copying, data)
    with arrays_are_large_from(0):
        assert outcome_of(decode_body, data) == expected
        assert outcome_of(decode_body, memoryview(data)) == expected
        assert outcome_of(decode_body, bytearray(data)) == expected


@given(data=packed_values, changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=3))
def test_views_and_copies_are_the_same_for_spoiled_bodies(data: bytes, changes: list[tuple[int, int]]) -> None:
    spoiled = bytearray(data)
    for place, byte in changes:
        spoiled[place % len(spoiled)] = byte
    expected = outcome_of(decode_by_copying, bytes(spoiled))
    with arrays_are_large_from(0):
        assert outcome_of(decode_body, bytes(spoiled)) == expected


sizes = st.sampled_from([0, 1, 15, 16, 17, 100])
arrays = st.one_of(
    sizes.map(lambda n: numpy.arange(n, dtype="<f8")),
    sizes.map(lambda n: numpy.arange(n, dtype=">i4").reshape(-1, 1)),
    sizes.map(lambda n: numpy.arange(2 * n, dtype="u1")[::2]),
    sizes.map(lambda n: numpy.asfortranarray(numpy.arange(4 * n, dtype="c8").reshape(4, -1))),
    sizes.map(lambda n: numpy.arange(n).astype("M8[us]")),
    sizes.map(lambda n: numpy.array(["aß"] * n, dtype="U7")),
    sizes.map(lambda n: numpy.array([b"a"] * n, dtype="S9")),
    sizes.map(lambda n: numpy.ma.masked_array(numpy.arange(n), mask=True)),
    st.just(numpy.array(1.5)),
    st.just(numpy.float32(1.5)),
    st.just(numpy.datetime64(5, "ns")),
)
refused = st.sampled_from(
    [
        numpy.array([{}] * 20),
        numpy.zeros(20, dtype="i4,f4"),
        numpy.zeros(20, dtype=numpy.longdouble),
        numpy.ndarray,
        {1},
        1 << 64,
        datetime.datetime(2024, 1, 1),  # noqa: DTZ001  that is the case
    ]
)
scalars = st.none() | st.integers(-9, 9) | st.text(max_size=3) | st.binary(max_size=200)


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.tuples(inner, inner)
            | st.dictionaries(st.text(max_size=3) | st.integers(0, 5), inner, max_size=4)
        ),
        max_leaves=10,
    )


@given(value=nested(arrays | scalars), large_bytes=st.sampled_from([9, 64, 120, 400]))
def test_the_parts_joined_are_the_body(value: Any, large_bytes: int) -> None:
    with arrays_are_large_from(1 << 62):
        expected = encode_body_parts(value)
    assert len(expected) == 1
    with arrays_are_large_from(large_bytes):
        joined = b"".join(encode_body_parts(value))
    # Small arrays have shorter headers; what they say is the same.
    assert describe(decode_body(joined)) == describe(decode_body(expected[0]))
    assert expected[0] == encode_body(value)


@given(value=nested(arrays | scalars | refused))
def test_what_cannot_travel_cannot_travel_in_parts(value: Any) -> None:
    def attempt(encode: Any) -> Any:
        try:
            return describe(decode_body(b"".join(encode(value))))
        except LocalError as error:
            return str(error)

    with arrays_are_large_from(16):
        assert attempt(encode_body_parts) == attempt(lambda value: [encode_body(value)])


@given(
    sizes_bytes=st.lists(st.sampled_from([-9, -1, 0, 1, 5000]), min_size=1, max_size=4),
    wrap=st.sampled_from([list, tuple, lambda items: {"x": items, "y": {"z": items}}]),
    pad=st.binary(max_size=9),
)
def test_at_the_real_threshold_the_bytes_are_the_same(sizes_bytes: list[int], wrap: Any, pad: bytes) -> None:
    arrays = [numpy.arange(LARGE_ARRAY_BYTES + size, dtype="u1") for size in sizes_bytes]
    value = wrap([pad, *arrays, pad])
    parts = encode_body_parts(value)
    body = encode_body(value)
    assert b"".join(parts) == body
    assert describe(decode_body(body)) == describe(decode_by_copying(body))
    whole = [array for array in arrays if array.nbytes >= LARGE_ARRAY_BYTES]
    views = [numpy.frombuffer(part, "u1") for part in parts if isinstance(part, memoryview)]
    assert all(any(numpy.shares_memory(view, array) for view in views) for array in whole)


@pytest.mark.parametrize("depth", [500, 1000, 1020, 1021, 1022, 1023, 1024, 1025, 1026])
def test_as_deep_with_views_as_without(depth: int) -> None:
    data = b"\x91" * depth + array_32("|u1", [1], b"a")

    def is_good(decode: Any) -> bool:
        try:
            decode(data)
        except FrameMalformed:
            return False
        return True

    with arrays_are_large_from(0):
        has_views = is_good(decode_body)
    assert has_views == is_good(decode_by_copying)

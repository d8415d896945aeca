"""When two bodies are the same answer.

Agents are written in many languages, and a vote must not split over how one of them packs a number:

- numbers are the same answer when they are the same number: 1 and 1.0 are, 0.0 and -0.0 too; every
  NaN is the same answer as every other;
- true is not 1, "1" is not 1, text is not bytes, and null is an answer of its own;
- lists are the same when their elements are, in order; maps when their keys and values are, in any order;
- arrays are the same when shape and elements are, whatever their dtype; an array is not a list;
- times are the same when they are the same instant;
- a body over `VALUE_BYTES_MAX`, or deeper than `DEPTH_MAX`, is the same only as a body with the same bytes;
- so is one that is not inline: its digest stands for it, and it may be anything.
"""

import datetime
import hashlib
import math
import struct
from collections.abc import Iterable
from typing import Any, Final

import numpy
import numpy.typing

from quorate_protocol.bodies import decode_body
from quorate_protocol.fields import Body, BodyRef

#: Largest body that is compared by its value, in bytes. A list of this many small numbers takes some
#: ten milliseconds, and the vote runs where the coordinator's event loop runs.
VALUE_BYTES_MAX: Final = 16 << 10

#: Deepest nesting of an answer that is compared by its value: an answer is a label or a small record,
#: and what is the same must not depend on how much of Python's stack is free.
DEPTH_MAX: Final = 64

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND: Final = datetime.timedelta(microseconds=1)


class _TooDeep(Exception):
    """A value is nested deeper than `DEPTH_MAX`."""


def answer_key(body: Body) -> bytes:
    """A key that is equal for bodies that are the same answer, and for no others.

    Raises:
        FrameMalformed: `decode_body` cannot unpack the body. One over `VALUE_BYTES_MAX` is not tried.
    """
    if isinstance(body, BodyRef):
        return b"R" + body.digest
    if len(body) <= VALUE_BYTES_MAX:
        try:
            return _key(decode_body(body), DEPTH_MAX)
        except _TooDeep:
            pass
    # Not even unpacked: a megabyte of small things takes the better part of a second.
    return b"B" + _digest([body])


def _key(value: Any, depth: int) -> bytes:
    # The first byte tells the kind apart, so that no text can look like a number.
    match value:
        case None:
            return b"0"
        case bool():
            return b"T" if value else b"F"
        case int():
            return b"i%d" % value
        case float():
            return _float_key(value)
        case str():
            return b"s" + value.encode("utf-8", "surrogatepass")
        case bytes():
            return b"y" + value
        case datetime.datetime() if value.tzinfo is not None:
            return b"t%d" % ((value - _EPOCH) // _MICROSECOND)
    if depth == 0:
        raise _TooDeep
    match value:
        case list():
            return b"l" + _digest(_key(item, depth - 1) for item in value)
        case dict():
            pairs = sorted((_key(key, depth - 1), _key(item, depth - 1)) for key, item in value.items())
            return b"m" + _digest(part for pair in pairs for part in pair)
        case numpy.ndarray():
            with numpy.errstate(all="ignore"):  # signalling NaNs are NaNs, not warnings
                return b"a" + _digest([_key(list(value.shape), 1), *_array_parts(value)])
    raise TypeError(f"no body holds a {type(value).__name__}")


def _float_key(value: float) -> bytes:
    if math.isnan(value):
        return b"n"
    if value.is_integer():  # false for infinities
        return b"i%d" % int(value)
    return b"d" + struct.pack(">d", value)


def _array_parts(array: numpy.typing.NDArray[Any]) -> Iterable[bytes]:
    """What stands for the elements. Numbers that are all whole stand as integers, whatever their dtype."""
    kind = array.dtype.kind
    if kind == "b":
        return [b"b", array.tobytes()]
    if kind in "SU":
        return [b"v", *(_key(item, 0) for item in array.ravel().tolist())]
    if kind == "c":
        return [b"c", _float_bytes(array.real), _float_bytes(array.imag)]
    if kind == "f":
        if not (numpy.isfinite(array).all() and (array == numpy.trunc(array)).all()):
            return [b"d", _float_bytes(array)]
    elif kind not in "iu":
        # Spans and times: what their bytes mean depends on the dtype.
        return [array.dtype.str.encode(), array.tobytes()]
    if array.size == 0 or (int(array.min()) >= -(2**63) and int(array.max()) < 2**63):
        return [b"i", array.astype("<i8").tobytes()]
    return [b"v", *(_key(item, 0) for item in array.ravel().tolist())]


def _float_bytes(array: numpy.typing.NDArray[Any]) -> bytes:
    exact = array.astype("<f8") + 0.0  # makes -0.0 the same as 0.0
    exact[numpy.isnan(exact)] = numpy.nan
    return exact.tobytes()


def _digest(parts: Iterable[bytes]) -> bytes:
    """A digest of a sequence of parts; each goes in with its length, so that no two sequences look the same."""
    state = hashlib.blake2b(digest_size=32)
    for part in parts:
        state.update(struct.pack(">Q", len(part)))
        state.update(part)
    return state.digest()

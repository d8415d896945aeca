"""Bodies: what a task is asked, what it answers, and the truth. One msgpack value each.

A body is packed once, by who made it, and travels inside frames as opaque bytes (`bin`): the
coordinator passes an operator's body to a thousand agents without looking into it, and a body that
cannot be unpacked spoils one reply, not a connection.

NumPy arrays travel as extension type 1: msgpack `[dtype, shape, bytes]`, little-endian or as the
dtype says, C order. Times travel as the standard extension -1. Nothing here can execute what a peer
sent: object arrays and unknown extensions are refused.
"""

import datetime
import math
import re
from typing import Any, Final

import msgpack

from quorate_protocol.errors import FrameMalformed, LocalError
from quorate_protocol.limits import BODY_BYTES_MAX

#: msgpack extension type of a NumPy array.
EXT_NDARRAY: Final = 1

#: dtypes that mean the same on every machine: truth values, numbers of a stated size and byte order, times
#: with a unit, text and bytes of fixed size. Not Python objects, not structures (they may hide objects),
#: not `long double` (its size and format differ), no aliases (`long` differs too).
_DTYPE: Final = re.compile(
    r"\|(b1|i1|u1)|[<>](i[248]|u[248]|f[248]|c8|c16|[mM]8\[([1-9][0-9]{0,8})?(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])"
    r"|\|S[1-9][0-9]{0,8}|[<>]U[1-9][0-9]{0,8}"
)

#: Beyond the last code point of Unicode, and the surrogates, which are no characters.
_CODE_POINT_MAX: Final = 0x10FFFF
_SURROGATES: Final = (0xD800, 0xDFFF)

#: More dimensions than NumPy 1 allowed are nobody's data.
_DIMENSIONS_MAX: Final = 32


def encode_body(value: Any) -> bytes:
    """Packs a value as msgpack. Tuples become lists, NumPy scalars become numbers (times and complex numbers,
    which have no msgpack form, arrays without dimensions).

    Raises:
        LocalError: the value holds something that cannot travel (a set, a class instance, an
            integer over 64 bits, an array of objects), nests too deep, or is a time without a zone.
    """
    try:
        return msgpack.packb(value, use_bin_type=True, default=_pack_default, datetime=True)  # type: ignore[no-any-return]
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise LocalError(f"body cannot be sent: {error}") from error


def decode_body(data: bytes) -> Any:
    """Unpacks what `encode_body` packed. Arrays come as read-only views of `data`, not copied.

    Raises:
        FrameMalformed: not one msgpack value, an unknown extension, text that is not UTF-8, or an
            array where NumPy is not installed.
    """
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False, ext_hook=_unpack_ext, timestamp=3)
    except FrameMalformed:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise FrameMalformed(f"body is not one msgpack value: {type(error).__name__}") from error


def _pack_default(value: Any) -> Any:
    if hasattr(value, "__array_interface__") and hasattr(value, "dtype"):
        import numpy  # only who sends arrays needs it

        if isinstance(value, numpy.generic) and value.dtype.kind in "biuf":
            return value.item()
        array = numpy.asarray(value)
        if not _DTYPE.fullmatch(array.dtype.str):
            raise TypeError(f"a NumPy array of dtype {array.dtype} cannot travel, only plain numbers, times and text")
        return msgpack.ExtType(
            EXT_NDARRAY, msgpack.packb([array.dtype.str, list(array.shape), array.tobytes()], use_bin_type=True)
        )
    if isinstance(value, datetime.datetime):
        raise TypeError(f"the time {value} has no zone")
    raise TypeError(f"a {type(value).__name__} has no msgpack form")


def _unpack_ext(code: int, data: bytes) -> Any:
    if code != EXT_NDARRAY:
        raise FrameMalformed(f"body has the unknown msgpack extension {code}")
    try:
        dtype_name, shape, raw = msgpack.unpackb(data, raw=False)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise FrameMalformed("array extension is not [dtype, shape, bytes]") from error
    if not (isinstance(dtype_name, str) and isinstance(shape, list) and isinstance(raw, bytes)):
        raise FrameMalformed("array extension is not [dtype, shape, bytes]")
    if len(shape) > _DIMENSIONS_MAX or not all(type(n) is int and n >= 0 for n in shape):
        raise FrameMalformed("array extension has an impossible shape")
    try:
        import numpy
    except ImportError as error:
        raise FrameMalformed("body holds a NumPy array, but NumPy is not installed here") from error
    if not _DTYPE.fullmatch(dtype_name):
        raise FrameMalformed("array extension has an unknown dtype")
    try:
        dtype = numpy.dtype(dtype_name)
        if math.prod(shape) * dtype.itemsize != len(raw):
            raise FrameMalformed("array extension: dtype, shape and size do not agree")
        if not raw and math.prod(size or 1 for size in shape) > BODY_BYTES_MAX:
            # No bytes at all, but a billion empty rows to whoever makes a list of it.
            raise FrameMalformed("array extension is empty in one dimension and vast in the others")
        array = numpy.frombuffer(raw, dtype=dtype).reshape(shape)
    except (TypeError, ValueError, OverflowError) as error:
        raise FrameMalformed("array extension has an impossible dtype or shape") from error
    if dtype.kind == "U":
        # NumPy takes any 32 bits for a character and raises SystemError when it is looked at.
        codes = numpy.frombuffer(raw, dtype=dtype_name[0] + "u4")
        first, last = _SURROGATES
        if bool(((codes > _CODE_POINT_MAX) | ((codes >= first) & (codes <= last))).any()):
            raise FrameMalformed("array extension holds text that is not Unicode")
    return array

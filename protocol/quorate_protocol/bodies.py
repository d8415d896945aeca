"""Bodies: what a task is asked, what it answers, and the truth. One msgpack value each.

A body is packed once, by who made it, and travels inside frames as opaque bytes (`bin`): the
coordinator passes an operator's body to a thousand agents without looking into it, and a body that
cannot be unpacked spoils one reply, not a connection.

NumPy arrays travel as extension type 1: msgpack `[dtype, shape, bytes]`, little-endian or as the
dtype says, C order. Times travel as the standard extension -1. Nothing here can execute what a peer
sent: object arrays and unknown extensions are refused.

Large arrays are not copied. `encode_body_parts` gives their own memory as parts of the body; `decode_body` gives views
into the body's.
"""

import datetime
import math
import re
import struct
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

import msgpack

from quorate_protocol.errors import FrameMalformed, LocalError
from quorate_protocol.limits import BODY_BYTES_MAX

#: msgpack extension type of a NumPy array.
EXT_NDARRAY: Final = 1

#: Arrays of so many bytes are not copied. Below, a copy is cheaper than a part of its own (7 µs for as much). Also
#: what makes their header one of four kinds only, see `_LARGE_ARRAY`.
LARGE_ARRAY_BYTES: Final = 64 << 10

#: A body in memory, wherever that is: bytes of its own, or a file's (mmap).
Buffer: TypeAlias = bytes | bytearray | memoryview

#: How an array of 64 KiB or more begins where nobody wrote longer headers than needed: an extension of 32-bit length
#: and type 1, then an array of three.
_LARGE_ARRAY: Final = re.compile(rb"\xc9(?s:....)\x01\x93")
_EXT_32: Final = struct.Struct(">BIB")
_BIN_32: Final = struct.Struct(">BI")
#: More than dtype and shape of any array take: 32 dimensions of nine bytes each.
_ARRAY_HEADER_BYTES_MAX: Final = 512
#: What a packer begins with: its default, 256 KiB, costs most bodies more than the packing.
_PACK_BYTES: Final = 8 << 10
#: Beginnings of arrays that turn out to be none, in one body, after which no more are looked for: each costs 3 µs, and
#: random bytes have one in 16 MiB.
_FALSE_STARTS_MAX: Final = 256
#: Marks that are tried before a body is left in one piece.
_MARKS_MAX: Final = 4

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


def encode_body_parts(value: Any) -> list[bytes | memoryview]:
    """As `encode_body`, without copying large arrays: the body is these parts one after the other.

    Arrays of 64 KiB and more, wherever they are in the value, are read-only views of their own memory. Until the parts
    have been sent nobody may change them: what arrives then has another digest than was announced.

    Raises:
        LocalError: as `encode_body`; or an array is over 4 GiB, the most that msgpack can say.
    """
    arrays: list[tuple[int, bytes, memoryview]] = []

    def pack_default(item: Any) -> Any:
        array = _as_large_array(item)
        if array is None:
            return _pack_default(item)
        with packer.getbuffer() as packed:
            at = len(packed)
        arrays.append((at, *_array_parts(array)))
        # One byte, which is cut out again.
        return None

    packer = msgpack.Packer(
        use_bin_type=True, default=pack_default, datetime=True, autoreset=False, buf_size=_PACK_BYTES
    )
    try:
        packer.pack(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise LocalError(f"body cannot be sent: {error}") from error
    packed: bytes = packer.bytes()
    parts: list[bytes | memoryview] = []
    done = 0
    for at, header, values in arrays:
        parts += (packed[done:at] + header, values)
        done = at + 1
    # The packer and its hook hold each other, and the hook the arrays: they would stay until the collector comes.
    arrays.clear()
    if tail := packed[done:]:
        parts.append(tail)
    return parts


def decode_body(data: Buffer) -> Any:
    """Unpacks what `encode_body` packed.

    Arrays are read-only. Large ones, of 64 KiB and more, are views into `data`, which stays as long as one of them
    does; `data` must not change then.

    Raises:
        FrameMalformed: not one msgpack value, an unknown extension, text that is not UTF-8, or an
            array where NumPy is not installed.
    """
    if len(data) >= LARGE_ARRAY_BYTES:
        cut = _cut_arrays(memoryview(data).toreadonly().cast("B"))
        if cut is not None:
            try:
                return cut.decode()
            except (FrameMalformed, ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
                # Something else is wrong, or what looked like an array is the inside of something: as without cutting.
                pass
    return _unpack(data, _unpack_ext)


def _unpack(data: Buffer, ext_hook: Any) -> Any:
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=False, ext_hook=ext_hook, timestamp=3)
    except FrameMalformed:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise FrameMalformed(f"body is not one msgpack value: {type(error).__name__}") from error


# --- packing -------------------------------------------------------------------------------------


def _pack_default(value: Any) -> Any:
    if hasattr(value, "__array_interface__") and hasattr(value, "dtype"):
        import numpy  # only who sends arrays needs it

        if isinstance(value, numpy.generic) and value.dtype.kind in "biuf":
            return value.item()
        array = numpy.asarray(value)
        _check_dtype(array)
        return msgpack.ExtType(
            EXT_NDARRAY, msgpack.packb([array.dtype.str, list(array.shape), array.tobytes()], use_bin_type=True)
        )
    if isinstance(value, datetime.datetime):
        raise TypeError(f"the time {value} has no zone")
    if isinstance(value, int):
        raise TypeError(f"an integer of {value.bit_length()} bits is over the 64 that msgpack has")
    raise TypeError(f"a {type(value).__name__} has no msgpack form")


def _check_dtype(array: Any) -> None:
    if not _DTYPE.fullmatch(array.dtype.str):
        raise TypeError(f"a NumPy array of dtype {array.dtype} cannot travel, only plain numbers, times and text")


def _as_large_array(value: Any) -> Any:
    """`value` as an array whose memory can be a part of a body; None where it is none."""
    if isinstance(value, type) or not hasattr(value, "__array_interface__") or not hasattr(value, "dtype"):
        return None
    import numpy

    array = numpy.asarray(value)
    if array.nbytes < LARGE_ARRAY_BYTES:
        return None
    _check_dtype(array)
    return array


def _array_parts(array: Any) -> tuple[bytes, memoryview]:
    """A large array's headers, and its values in C order: its own memory where they lie so."""
    import numpy

    header = b"\x93" + msgpack.packb(array.dtype.str) + msgpack.packb(list(array.shape))
    data_bytes = len(header) + _BIN_32.size + array.nbytes
    if data_bytes > 0xFFFFFFFF:
        raise ValueError(f"an array of {array.nbytes} bytes is over the 4 GiB that msgpack can say")
    values = numpy.ascontiguousarray(array).reshape(-1).view("u1").data.toreadonly()
    return _EXT_32.pack(0xC9, data_bytes, EXT_NDARRAY) + header + _BIN_32.pack(0xC6, len(values)), values


# --- unpacking -----------------------------------------------------------------------------------


def _unpack_ext(code: int, data: bytes) -> Any:
    if code != EXT_NDARRAY:
        raise FrameMalformed(f"body has the unknown msgpack extension {code}")
    try:
        dtype_name, shape, raw = msgpack.unpackb(data, raw=False)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise FrameMalformed("array extension is not [dtype, shape, bytes]") from error
    if not (isinstance(dtype_name, str) and isinstance(shape, list) and isinstance(raw, bytes)):
        raise FrameMalformed("array extension is not [dtype, shape, bytes]")
    return _make_array(dtype_name, shape, raw)


def _make_array(dtype_name: str, shape: list[Any], raw: Buffer) -> Any:
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


class _CutBody:
    """A body whose large arrays were cut out: msgpack unpacks the rest, and the arrays are views.

    In each one's place stands an extension whose data is the mark, which is nowhere else in the rest. So when msgpack
    comes upon the mark as often as something was cut out, each cut was made where an array is: up to the first one it
    reads what stands in the body, there it is at an extension in both, and behind it goes on in the same state.
    """

    def __init__(self, rest: bytes, mark: bytes, arrays: list[tuple[str, list[Any], memoryview]]) -> None:
        self._rest = rest
        self._mark = mark
        self._arrays = arrays
        self._next = 0

    def decode(self) -> Any:
        """The value.

        Raises:
            FrameMalformed: it is none, or a cut was made elsewhere.
        """
        value = _unpack(self._rest, self._unpack_ext)
        if self._next != len(self._arrays):
            raise FrameMalformed("what looked like an array is none")
        return value

    def _unpack_ext(self, code: int, data: bytes) -> Any:
        if code != EXT_NDARRAY or data != self._mark:
            return _unpack_ext(code, data)
        array = _make_array(*self._arrays[self._next])
        self._next += 1
        return array


def _cut_arrays(body: memoryview) -> _CutBody | None:
    """Cuts large arrays out of a body; None where nothing looks like one."""
    arrays: list[tuple[str, list[Any], memoryview]] = []
    between: list[memoryview] = []
    done = 0
    for start, stop, array in _find_arrays(body):
        between.append(body[done:start])
        arrays.append(array)
        done = stop
    if not arrays:
        return None
    between.append(body[done:])
    mark = _find_mark(between)
    if mark is None:
        return None
    # An extension of eight bytes.
    return _CutBody((b"\xd7\x01" + mark).join(between), mark, arrays)


def _find_arrays(body: memoryview) -> Iterator[tuple[int, int, tuple[str, list[Any], memoryview]]]:
    """Whatever looks like a large array: where it begins and ends, and its dtype, shape and values."""
    at = false_starts = 0
    while false_starts < _FALSE_STARTS_MAX and (found := _LARGE_ARRAY.search(body, at)) is not None:
        start = found.start()
        _, data_bytes, _ = _EXT_32.unpack_from(body, start)
        stop = start + _EXT_32.size + data_bytes
        array = None
        if data_bytes >= LARGE_ARRAY_BYTES and stop <= len(body):
            array = _read_array(body[start + _EXT_32.size : stop])
        if array is None:
            at = start + 1
            false_starts += 1
        else:
            yield start, stop, array
            at = stop


def _read_array(data: memoryview) -> tuple[str, list[Any], memoryview] | None:
    """Dtype, shape and values of an array extension's data; None where they are not written as we do."""
    unpacker = msgpack.Unpacker(raw=False, max_buffer_size=_ARRAY_HEADER_BYTES_MAX)
    unpacker.feed(data[:_ARRAY_HEADER_BYTES_MAX])
    try:
        unpacker.read_array_header()
        dtype_name, shape = unpacker.unpack(), unpacker.unpack()
        at = unpacker.tell()
        head, value_bytes = _BIN_32.unpack_from(data, at)
    except (ValueError, TypeError, struct.error, msgpack.UnpackException):
        return None
    if head != 0xC6 or at + _BIN_32.size + value_bytes != len(data):
        return None
    if not (isinstance(dtype_name, str) and isinstance(shape, list)):
        return None
    return dtype_name, shape, data[at + _BIN_32.size :]


def _find_mark(pieces: list[memoryview]) -> bytes | None:
    """Eight bytes that are in none of the pieces; None where whoever wrote them saw to that.

    They do not overlap with themselves, nor with the extension header before them: where they are, they were put.
    """
    text = b"\x00".join(pieces)
    for number in range(_MARKS_MAX):
        mark = b"\xff%07d" % number
        if mark not in text:
            return mark
    return None

"""Bodies: what travels, what does not, and what arrives. The bytes themselves are in the golden vectors."""

import datetime
import subprocess
import sys
from typing import Any
from unittest import mock

import msgpack
import numpy
import pytest

from quorate_protocol import bodies
from quorate_protocol.bodies import EXT_NDARRAY, decode_body, encode_body, encode_body_parts
from quorate_protocol.errors import FrameMalformed, LocalError


class TestRoundTrip:
    def test_tuples_become_lists(self) -> None:
        assert decode_body(encode_body((1, (2, 3)))) == [1, [2, 3]]

    @pytest.mark.parametrize(
        ("scalar", "plain"),
        [
            (numpy.float32(1.5), 1.5),
            (numpy.float64(1.5), 1.5),
            (numpy.int64(-3), -3),
            (numpy.uint8(200), 200),
            (numpy.bool_(True), True),
            (numpy.str_("a"), "a"),
            (numpy.bytes_(b"a"), b"a"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_numpy_scalars_become_plain(self, scalar: Any, plain: Any) -> None:
        value = decode_body(encode_body({"x": scalar}))["x"]
        assert value == plain
        assert type(value) is type(plain)

    @pytest.mark.parametrize(
        "scalar", [numpy.datetime64(5, "ns"), numpy.timedelta64(5, "s"), numpy.complex64(1 + 2j)], ids=repr
    )
    def test_numpy_scalars_without_a_plain_form_keep_their_meaning(self, scalar: Any) -> None:
        value = decode_body(encode_body(scalar))
        assert value.shape == ()
        assert value.dtype == scalar.dtype
        assert value[()] == scalar

    def test_an_array_in_fortran_order_arrives_in_c_order(self) -> None:
        array = numpy.asfortranarray([[1, 2, 3], [4, 5, 6]])
        assert not array.flags.c_contiguous
        value = decode_body(encode_body(array))
        assert value.flags.c_contiguous
        assert (value == array).all()

    def test_a_strided_view(self) -> None:
        assert decode_body(encode_body(numpy.arange(10)[::-3])).tolist() == [9, 6, 3, 0]

    def test_arrays_arrive_read_only(self) -> None:
        value = decode_body(encode_body(numpy.zeros(3)))
        with pytest.raises(ValueError, match="read-only"):
            value[0] = 1

    def test_times_of_any_zone_arrive_in_utc(self) -> None:
        zone = datetime.timezone(datetime.timedelta(hours=5, minutes=30))
        time = datetime.datetime(2024, 2, 29, 12, 34, 56, 789, tzinfo=zone)
        value = decode_body(encode_body(time))
        assert value == time
        assert value.tzinfo is datetime.UTC

    @pytest.mark.parametrize("time", [datetime.datetime.min, datetime.datetime.max], ids=["first", "last"])  # noqa: DTZ901
    def test_the_first_and_the_last_time(self, time: datetime.datetime) -> None:
        time = time.replace(tzinfo=datetime.UTC)
        assert decode_body(encode_body(time)) == time


class TestCannotTravel:
    @pytest.mark.parametrize(
        ("value", "why"),
        [
            ({1, 2}, "set"),
            (object(), "object has no msgpack form"),
            (1 << 64, "an integer of 65 bits is over the 64"),
            (-(1 << 63) - 1, "integer"),
            ("\ud800", "surrogates"),
            (1 + 2j, "complex"),
            (datetime.datetime(2024, 1, 1), "has no zone"),  # noqa: DTZ001  that is the case
            (datetime.date(2024, 1, 1), "date"),
            (numpy.array([{}], dtype=object), "dtype object"),
            (numpy.zeros(1, dtype="i4,f4"), "cannot travel"),
            (numpy.array(["a"], dtype=numpy.dtypes.StringDType()), "StringDType"),
            (numpy.zeros(1, dtype=numpy.longdouble), "cannot travel"),
            (numpy.longdouble(1), "longdouble"),
            (numpy.array(["NaT"], dtype="M8"), "cannot travel"),
            (numpy.ndarray, "cannot travel"),
        ],
        ids=lambda value: value if isinstance(value, str) and value.isascii() else None,
    )
    def test_refused(self, value: Any, why: str) -> None:
        with pytest.raises(LocalError, match=f"body cannot be sent: .*{why}"):
            encode_body({"deep": [value]})

    def test_too_deep(self) -> None:
        value: list[object] = []
        for _ in range(2000):
            value = [value]
        with pytest.raises(LocalError, match="body cannot be sent"):
            encode_body(value)


class TestArrays:
    def test_large_arrays_are_views_of_the_body(self) -> None:
        data = encode_body({"a": numpy.arange(1 << 16, dtype="u1"), "b": [numpy.arange(1 << 17, dtype="<f4")]})
        value = decode_body(data)
        memory = numpy.frombuffer(data, "u1")
        for array in (value["a"], value["b"][0]):
            assert numpy.shares_memory(array, memory)
            assert not array.flags.writeable
        assert (value["b"][0] == numpy.arange(1 << 17)).all()

    def test_views_of_memory_that_can_be_written_are_read_only(self) -> None:
        data = bytearray(encode_body(numpy.zeros(1 << 16)))
        assert not decode_body(data).flags.writeable

    def test_large_arrays_are_parts_of_the_body_as_they_are(self) -> None:
        array = numpy.arange(1 << 20, dtype=">i8").reshape(1 << 10, -1)
        parts = encode_body_parts({"x": (1, array), "y": 2})
        assert [len(part) for part in parts] == [
            len(encode_body({"x": (1, array), "y": 2})) - array.nbytes - 3,
            array.nbytes,
            3,
        ]
        assert numpy.shares_memory(numpy.frombuffer(parts[1], "u1"), array)
        assert isinstance(parts[1], memoryview)
        assert parts[1].readonly

    def test_bodies_without_large_arrays_are_one_part(self) -> None:
        value = {"x": numpy.zeros(3), "y": bytes(1 << 17)}
        assert encode_body_parts(value) == [encode_body(value)]

    def test_an_array_over_four_gibibytes_is_refused_and_not_read(self) -> None:
        array = numpy.broadcast_to(numpy.uint8(0), (1 << 32,))
        with (
            mock.patch.object(numpy, "ascontiguousarray", side_effect=AssertionError("copied")),
            pytest.raises(LocalError, match="an array of 4294967296 bytes is over the 4 GiB"),
        ):
            encode_body_parts(array)

    def test_beginnings_of_arrays_that_are_none_do_not_cost_much(self) -> None:
        data = encode_body([b"\xc9\x00\x01\x00\x00\x01\x93" * 140_000, bytes(1 << 16)])
        with mock.patch.object(bodies, "_read_array", wraps=bodies._read_array) as looked:
            assert decode_body(data)[1] == bytes(1 << 16)
        assert 0 < looked.call_count <= 256

    def test_a_body_full_of_marks_is_copied(self) -> None:
        marks = b"".join(b"\xff%07d" % number for number in range(100))
        array = numpy.ones(1 << 16)
        value = decode_body(encode_body([marks, array]))
        assert value[0] == marks
        assert (value[1] == array).all()

    def test_the_extension(self) -> None:
        packed = encode_body(numpy.array([1.5]))
        extension = msgpack.unpackb(packed)
        assert extension.code == EXT_NDARRAY == 1
        assert msgpack.unpackb(extension.data) == ["<f8", [1], b"\x00\x00\x00\x00\x00\x00\xf8\x3f"]

    def test_where_numpy_is_not_installed(self) -> None:
        """An agent needs no NumPy, until somebody sends it an array."""
        script = (
            "import sys; sys.modules['numpy'] = None\n"
            "from quorate_protocol.bodies import decode_body, encode_body\n"
            "from quorate_protocol.errors import FrameMalformed\n"
            "assert decode_body(encode_body({'x': [1, 2.5]})) == {'x': [1, 2.5]}\n"
            "try:\n"
            f"    decode_body({encode_body(numpy.zeros(1))!r})\n"
            "except FrameMalformed as error:\n"
            "    print(error)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout == "body holds a NumPy array, but NumPy is not installed here\n"

    def test_nothing_of_the_value_is_in_the_error(self) -> None:
        with pytest.raises(FrameMalformed) as caught:
            decode_body(msgpack.packb(msgpack.ExtType(1, msgpack.packb(["sesame", [1], b"a"]))))
        assert "sesame" not in str(caught.value)

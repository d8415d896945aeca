"""The golden vectors of `protocol/vectors`, replayed whole and byte by byte."""

import datetime
import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from quorate_protocol import errors
from quorate_protocol.bodies import decode_body, encode_body
from quorate_protocol.errors import ProtocolError
from quorate_protocol.frames import FrameDecoder
from quorate_protocol.limits import FRAME_BYTES_MAX, FRAME_PREFIX_BYTES
from quorate_protocol.messages import Message, message_types, parse_message

VECTORS = Path(__file__).resolve().parents[2] / "protocol" / "vectors"


def load(name: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))
    return items


def params(name: str) -> list[Any]:
    return [pytest.param(item, id=item["name"]) for item in load(name)]


def value_of(written: Any) -> Any:
    """What a JSON value of the vectors stands for; see protocol/vectors/README.md."""
    if isinstance(written, list):
        return [value_of(item) for item in written]
    if not isinstance(written, dict):
        return written
    match written:
        case {"$bytes": str(text)}:
            return bytes.fromhex(text)
        case {"$int": str(text)}:
            return int(text)
        case {"$float": str(text)}:
            return float(text)
        case {"$time": str(text)}:
            return datetime.datetime.fromisoformat(text)
        case {"$map": list(pairs)}:
            return {value_of(key): value_of(value) for key, value in pairs}
        case {"$array": {"dtype": dtype, "shape": shape, "data": data}}:
            return numpy.frombuffer(bytes.fromhex(data), dtype=dtype).reshape(shape)
    return {key: value_of(value) for key, value in written.items()}


def assert_same(actual: Any, expected: Any) -> None:
    """Equal in value and in type, all the way down; NaN equals NaN."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, numpy.ndarray):
        assert (actual.dtype.str, actual.shape) == (expected.dtype.str, expected.shape)
        assert actual.tobytes() == expected.tobytes()
    else:
        # The text of a float tells -0.0 from 0.0, and takes nan for nan.
        assert repr(actual) == repr(expected)


def expected_message(item: dict[str, Any]) -> Message:
    return message_types()[item["type"]](**value_of(item["message"]))


@pytest.mark.parametrize("item", params("frames"))
class TestFrames:
    def test_decode_whole(self, item: dict[str, Any]) -> None:
        decoder = FrameDecoder()
        (raw,) = decoder.feed(bytes.fromhex(item["frame"]))
        decoder.finish()
        assert parse_message(raw) == expected_message(item)

    def test_decode_byte_by_byte(self, item: dict[str, Any]) -> None:
        decoder = FrameDecoder()
        frame = bytes.fromhex(item["frame"])
        for index in range(len(frame) - 1):
            assert decoder.feed(frame[index : index + 1]) == []
            assert decoder.buffered_bytes == index + 1
        (raw,) = decoder.feed(frame[-1:])
        assert decoder.buffered_bytes == 0
        assert parse_message(raw) == expected_message(item)

    def test_encode(self, item: dict[str, Any]) -> None:
        frame = expected_message(item).to_frame()
        assert (frame.hex() == item["frame"]) is item.get("canonical", True)

    def test_the_message_as_written_is_what_is_on_the_wire(self, item: dict[str, Any]) -> None:
        if item.get("canonical", True):
            (raw,) = FrameDecoder().feed(bytes.fromhex(item["frame"]))
            assert_same(raw, {"type": item["type"], **value_of(item["message"])})


def test_every_type_has_frames() -> None:
    assert {item["type"] for item in load("frames")} == set(message_types())


def test_every_key_has_frames() -> None:
    seen = {(item["type"], key) for item in load("frames") for key in item["message"]}
    assert seen >= {(type_, key) for type_, model in message_types().items() for key in model.model_fields}


def test_all_frames_in_one_stream_byte_by_byte() -> None:
    items = load("frames")
    stream = b"".join(bytes.fromhex(item["frame"]) for item in items)
    decoder = FrameDecoder()
    raws = [raw for index in range(len(stream)) for raw in decoder.feed(stream[index : index + 1])]
    decoder.finish()
    assert [parse_message(raw) for raw in raws] == [expected_message(item) for item in items]


@pytest.mark.parametrize("item", params("invalid"))
class TestInvalid:
    def read(self, item: dict[str, Any], step: int) -> tuple[int, ProtocolError]:
        """Feeds the bytes, then the end: how many good messages came, and the error."""
        data = bytes.fromhex(item["bytes"])
        decoder = FrameDecoder(frame_bytes_max=item.get("frame_bytes_max", FRAME_BYTES_MAX))
        messages: list[Message] = []
        with pytest.raises(ProtocolError) as caught:
            for start in range(0, len(data), step):
                messages.extend(parse_message(raw) for raw in decoder.feed(data[start : start + step]))
            decoder.finish()
        return len(messages), caught.value

    def test_whole(self, item: dict[str, Any]) -> None:
        count, error = self.read(item, step=max(1, len(item["bytes"])))
        assert type(error) is getattr(errors, item["error"])
        assert error.code == item["code"]
        assert count == item.get("frames", 0)

    def test_byte_by_byte(self, item: dict[str, Any]) -> None:
        count, error = self.read(item, step=1)
        assert type(error) is getattr(errors, item["error"])
        assert count == item.get("frames", 0)

    def test_the_error_is_short_and_printable(self, item: dict[str, Any]) -> None:
        _, error = self.read(item, step=1)
        assert len(str(error)) < 300
        assert str(error).isprintable()


def test_an_oversized_length_is_refused_before_its_payload() -> None:
    for item in load("invalid"):
        if item["name"].startswith("oversized"):
            decoder = FrameDecoder(frame_bytes_max=item.get("frame_bytes_max", FRAME_BYTES_MAX))
            with pytest.raises(errors.FrameTooLarge):
                decoder.feed(bytes.fromhex(item["bytes"])[:FRAME_PREFIX_BYTES])
            assert decoder.buffered_bytes == 0


@pytest.mark.parametrize("item", params("bodies"))
class TestBodies:
    def test_decode(self, item: dict[str, Any]) -> None:
        assert_same(decode_body(bytes.fromhex(item["body"])), value_of(item["value"]))

    def test_encode(self, item: dict[str, Any]) -> None:
        assert (encode_body(value_of(item["value"])).hex() == item["body"]) is item.get("canonical", True)


@pytest.mark.parametrize("item", params("invalid-bodies"))
def test_invalid_body(item: dict[str, Any]) -> None:
    with pytest.raises(getattr(errors, item["error"])) as caught:
        decode_body(bytes.fromhex(item["bytes"]))
    assert len(str(caught.value)) < 200


def test_names_are_unique() -> None:
    for name in ("frames", "invalid", "bodies", "invalid-bodies"):
        names = [item["name"] for item in load(name)]
        assert len(names) == len(set(names))

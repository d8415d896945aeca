"""Frames, messages and bodies under generated input: any chunking gives the same, round trips are exact, and random
bytes raise nothing but the documented errors."""

import datetime
from typing import Any

import msgpack
import numpy
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies

from quorate_protocol.bodies import decode_body, encode_body
from quorate_protocol.errors import (
    FrameMalformed,
    FrameTooLarge,
    FrameTruncated,
    MessageInvalid,
    ProtocolError,
    UnknownType,
)
from quorate_protocol.frames import FrameDecoder, encode_frame
from quorate_protocol.limits import FRAME_BYTES_MAX
from quorate_protocol.messages import message_types, parse_message

# Text that UTF-8 can carry.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | texts
    | st.binary()
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(texts, inner, max_size=5),
    max_leaves=20,
)
maps = st.dictionaries(texts, trees, max_size=6)
times = st.datetimes(timezones=st.just(datetime.UTC))
dtypes = st.one_of(
    numpy_strategies.boolean_dtypes(),
    numpy_strategies.integer_dtypes(endianness="?"),
    numpy_strategies.unsigned_integer_dtypes(endianness="?"),
    numpy_strategies.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
    numpy_strategies.complex_number_dtypes(endianness="?", sizes=(64, 128)),
    numpy_strategies.datetime64_dtypes(endianness="?"),
    numpy_strategies.timedelta64_dtypes(endianness="?"),
    numpy_strategies.byte_string_dtypes(endianness="?", min_len=1),
)
arrays = numpy_strategies.arrays(dtypes, numpy_strategies.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))

#: What a peer's bytes may raise; anything else is a bug.
Documented = (FrameMalformed, FrameTooLarge, FrameTruncated, UnknownType, MessageInvalid)


@st.composite
def chunked(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """The same bytes, cut anywhere, empty pieces included."""
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def read(pieces: list[bytes]) -> tuple[list[dict[str, Any]], type[ProtocolError] | None, str]:
    """What a decoder makes of the pieces and the end of the stream: maps, then perhaps an error."""
    decoder = FrameDecoder()
    maps_: list[dict[str, Any]] = []
    try:
        for piece in pieces:
            maps_.extend(decoder.feed(piece))
        decoder.finish()
    except ProtocolError as error:
        return maps_, type(error), str(error)
    return maps_, None, ""


@given(messages=st.lists(maps, max_size=6), data=st.data())
def test_any_chunking_of_good_frames_gives_the_same_maps(messages: list[dict[str, Any]], data: st.DataObject) -> None:
    stream = b"".join(encode_frame(message) for message in messages)
    assert read(data.draw(chunked(stream))) == (messages, None, "")


@given(
    messages=st.lists(maps, max_size=3),
    tail=st.binary(max_size=40) | st.binary(max_size=20).map(lambda b: bytes([0, 0, 0, len(b)]) + b),
    data=st.data(),
)
def test_any_chunking_of_any_bytes_gives_the_same_maps_and_the_same_error(
    messages: list[dict[str, Any]], tail: bytes, data: st.DataObject
) -> None:
    stream = b"".join(encode_frame(message) for message in messages) + tail
    whole = read([stream])
    assert whole[0][: len(messages)] == messages
    assert read(data.draw(chunked(stream))) == whole


@given(data=st.binary(max_size=200))
@example(b"\x00\x00\x00\x01\x80")
def test_random_bytes_raise_documented_errors_only(data: bytes) -> None:
    for stream in (data, len(data).to_bytes(4, "big") + data):
        decoder = FrameDecoder()
        try:
            for raw in decoder.feed(stream):
                parse_message(raw)
            decoder.finish()
        except Documented:
            continue
        assert decoder.buffered_bytes == 0


@given(length=st.integers(0, (1 << 32) - 1))
@example(FRAME_BYTES_MAX)
@example(FRAME_BYTES_MAX + 1)
def test_any_length_is_accepted_or_refused_by_itself(length: int) -> None:
    decoder = FrameDecoder()
    try:
        assert decoder.feed(length.to_bytes(4, "big")) == []
    except FrameTooLarge:
        assert length > FRAME_BYTES_MAX
    except FrameMalformed:
        assert length == 0
    else:
        assert 0 < length <= FRAME_BYTES_MAX


@given(raw=maps, type_=st.sampled_from([*message_types(), "", "gossip"]), data=st.data())
def test_any_map_is_a_message_or_a_documented_error(raw: dict[str, Any], type_: str, data: st.DataObject) -> None:
    model = message_types().get(type_)
    keys = list(model.model_fields) if model else []
    known = data.draw(st.dictionaries(st.sampled_from(keys), trees)) if keys else {}
    try:
        message = parse_message(raw | known | {"type": type_})
    except (UnknownType, MessageInvalid) as error:
        assert len(str(error)) < 1000
    else:
        (again,) = FrameDecoder().feed(message.to_frame())
        assert parse_message(again) == message


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:@/+-]{0,20}", fullmatch=True)
seconds = st.floats(0, 86_400 * 365, exclude_min=True)
rounds = st.integers(1, (1 << 63) - 1)
labels = st.dictionaries(names, texts, max_size=4)
statuses = st.sampled_from(["replied", "declined", "failed", "late", "lost", "cancelled", "unavailable"])
results = st.fixed_dictionaries(
    {"agent": names, "status": statuses},
    optional={"body": st.none() | st.binary(), "error": texts, "latency_s": seconds, "weight": st.floats(0, 1)},
)
valid_maps = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("hello"), "id": names, "token": texts},
        optional={"labels": labels, "tasks": st.lists(names, unique=True, max_size=5), "software": texts},
    ),
    st.fixed_dictionaries({"type": st.just("welcome"), "session": names, "pulse_s": seconds, "lease_s": seconds}),
    st.fixed_dictionaries(
        {"type": st.just("assignment"), "round": rounds, "task": names, "body": st.binary(), "deadline_s": seconds},
        optional={"attempt": st.integers(1, 1000)},
    ),
    st.fixed_dictionaries(
        {"type": st.just("reply"), "round": rounds},
        optional={"status": st.sampled_from(["replied", "declined", "failed"]), "body": st.binary(), "error": texts},
    ),
    st.fixed_dictionaries(
        {
            "type": st.just("outcome"),
            "round": rounds,
            "task": names,
            "state": st.sampled_from(["complete", "quorate", "expired", "failed", "cancelled", "interrupted"]),
            "quorum": st.integers(1, 1000),
            "results": st.lists(results, max_size=4),
            "duration_s": seconds,
        },
        optional={"answer": st.binary(), "support": st.floats(0, 1), "reason": texts},
    ),
)


@given(raw=valid_maps, unknown=st.dictionaries(texts.map("x-{}".format), trees, max_size=3))
def test_messages_round_trip_and_unknown_keys_do_not_matter(raw: dict[str, Any], unknown: dict[str, Any]) -> None:
    message = parse_message(raw)
    (again,) = FrameDecoder().feed(message.to_frame())
    assert parse_message(again) == message
    assert parse_message(unknown | raw) == message
    for key, value in raw.items():
        if key not in ("type", "results"):
            assert getattr(message, key) == value


@given(value=trees | times | st.lists(times, max_size=3))
def test_bodies_round_trip(value: Any) -> None:
    assert decode_body(encode_body(value)) == value


@given(array=arrays)
def test_arrays_round_trip(array: Any) -> None:
    result = decode_body(encode_body({"x": array}))["x"]
    assert (result.dtype, result.shape) == (array.dtype, array.shape)
    assert result.tobytes() == array.tobytes()


@given(values=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), min_size=1, max_size=4))
def test_arrays_of_text_round_trip(values: list[str]) -> None:
    array = numpy.array(values, dtype="U5")
    assert decode_body(encode_body(array)).tolist() == array.tolist()


@given(data=st.binary(max_size=300))
def test_random_bytes_are_a_body_or_malformed(data: bytes) -> None:
    try:
        decode_body(data)
    except FrameMalformed:
        return


@given(
    dtype=st.text(max_size=8)
    | st.from_regex(r"[<>|=]?[biufcmMSUOVTgGpP?]\d{0,3}(\[\d?[a-zA-Z]{1,2}\])?", fullmatch=True),
    shape=st.lists(st.integers(-1, (1 << 64) - 1) | st.integers(0, 3), max_size=4),
    data=st.binary(max_size=64),
)
def test_any_array_extension_is_an_array_that_can_be_looked_at_or_malformed(
    dtype: str, shape: list[int], data: bytes
) -> None:
    packed = msgpack.packb(msgpack.ExtType(1, msgpack.packb([dtype, shape, data])))
    try:
        array = decode_body(packed)
    except FrameMalformed:
        return
    assert list(array.shape) == shape
    repr(array.tolist())
    assert encode_body(array) == packed

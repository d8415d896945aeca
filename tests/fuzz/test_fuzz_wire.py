"""Frames, messages and bodies: whatever comes, a decoder gives messages or a documented error, and keeps no more."""

import itertools
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import quorate_protocol
from fuzz.budget import fuzz
from fuzz.mutations import mutated
from quorate_protocol.bodies import decode_body
from quorate_protocol.errors import FrameMalformed, FrameTooLarge, ProtocolError
from quorate_protocol.frames import FrameDecoder
from quorate_protocol.messages import Message, parse_message

VECTORS = Path(quorate_protocol.__file__).parents[1] / "vectors"


def vectors(name: str, key: str) -> list[bytes]:
    return [bytes.fromhex(item[key]) for item in json.loads((VECTORS / name).read_text())]


FRAMES = vectors("frames.json", "frame") + vectors("invalid.json", "bytes")
BODIES = vectors("bodies.json", "body") + vectors("invalid-bodies.json", "bytes")

streams = st.lists(mutated(st.sampled_from(FRAMES)), min_size=1, max_size=4).map(b"".join) | st.binary(max_size=300)
bodies = mutated(st.sampled_from(BODIES)) | st.binary(max_size=300)


def read_through(data: bytes, cuts: list[int]) -> list[Message]:
    """All messages of a stream in pieces; raises as a reader of a connection would see it."""
    decoder = FrameDecoder(frame_bytes_max=1 << 16)
    messages = []
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for start, end in itertools.pairwise(edges):
        for raw in decoder.feed(data[start:end]):
            messages.append(parse_message(raw))  # noqa: PERF401  what came before an error counts
        assert decoder.buffered_bytes <= end
    decoder.finish()
    return messages


def test_a_damaged_stream_of_frames_gives_messages_or_a_documented_error():
    @given(data=streams, cuts=st.lists(st.integers(0, 400), max_size=5))
    def check(data, cuts):
        try:
            messages = read_through(data, cuts)
        except ProtocolError as error:
            assert 0 < error.code < 0x100
            assert len(str(error)) < 1000
            return
        for message in messages:
            # It can be sent on, and is then the same.
            assert parse_message(*FrameDecoder().feed(message.to_frame())) == message
            for value in dict(message).values():
                if isinstance(value, bytes):
                    try:
                        decode_body(value)
                    except FrameMalformed:
                        pass

    fuzz(check, 600)


def test_a_damaged_body_is_a_value_or_malformed():
    @given(data=bodies)
    def check(data):
        try:
            value = decode_body(data)
        except FrameMalformed:
            return
        assert len(repr(value)) < 1_000_000

    fuzz(check, 600)


def test_a_decoder_that_has_failed_stays_failed_and_empty():
    @given(data=streams, more=st.binary(max_size=50))
    def check(data, more):
        decoder = FrameDecoder(frame_bytes_max=1 << 12)
        try:
            decoder.feed(data)
            decoder.feed(more)
        except (FrameMalformed, FrameTooLarge) as error:
            assert decoder.buffered_bytes == 0
            for again in (more, data, b""):
                try:
                    decoder.feed(again)
                except ProtocolError as same:
                    assert type(same) is type(error)
                else:
                    raise AssertionError("it went on after an error")

    fuzz(check, 300)

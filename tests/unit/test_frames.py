"""Frames: ceilings, what comes out of which bytes, and what an error leaves behind. The bytes themselves are in
the golden vectors."""

import struct
import tracemalloc

import msgpack
import pytest

from quorate_protocol.errors import FrameMalformed, FrameTooLarge, FrameTruncated, LocalError
from quorate_protocol.frames import FrameDecoder, encode_frame
from quorate_protocol.limits import FRAME_BYTES_MAX, FRAME_PREFIX_BYTES, HELLO_BYTES_MAX

GOODBYE = encode_frame({"type": "goodbye"})
BAD = b"\x00\x00\x00\x01\xc1"


def frame_with_payload(size: int) -> bytes:
    """A frame whose payload has exactly this many bytes (from 128 KiB on)."""
    overhead = len(msgpack.packb({"type": "x", "b": bytes(1 << 16)})) - (1 << 16)
    frame = encode_frame({"type": "x", "b": bytes(size - overhead)}, frame_bytes_max=1 << 24)
    assert len(frame) == FRAME_PREFIX_BYTES + size
    return frame


class TestEncode:
    def test_length_and_map(self) -> None:
        assert GOODBYE == b"\x00\x00\x00\x0e\x81\xa4type\xa7goodbye"

    def test_at_the_ceiling_and_one_over(self) -> None:
        overhead = len(msgpack.packb({"b": bytes(1 << 17)})) - (1 << 17)
        encode_frame({"b": bytes(FRAME_BYTES_MAX - overhead)})
        with pytest.raises(FrameTooLarge) as caught:
            encode_frame({"b": bytes(FRAME_BYTES_MAX - overhead + 1)})
        assert (caught.value.frame_bytes, caught.value.frame_bytes_max) == (FRAME_BYTES_MAX + 1, FRAME_BYTES_MAX)

    @pytest.mark.parametrize("value", [{1, 2}, 1 << 64, "\ud800", object()], ids=["set", "integer", "text", "object"])
    def test_what_cannot_travel(self, value: object) -> None:
        with pytest.raises(LocalError, match="message cannot be sent"):
            encode_frame({"type": "x", "value": value})

    def test_too_deep(self) -> None:
        value: list[object] = []
        for _ in range(2000):
            value = [value]
        with pytest.raises(LocalError, match="message cannot be sent"):
            encode_frame({"type": "x", "value": value})


class TestCeiling:
    def test_a_payload_of_exactly_the_ceiling(self) -> None:
        (message,) = FrameDecoder().feed(frame_with_payload(FRAME_BYTES_MAX))
        assert message["type"] == "x"

    def test_one_byte_over(self) -> None:
        decoder = FrameDecoder()
        with pytest.raises(FrameTooLarge) as caught:
            decoder.feed(frame_with_payload(FRAME_BYTES_MAX + 1))
        assert caught.value.frame_bytes == FRAME_BYTES_MAX + 1

    def test_may_be_raised_in_the_middle_of_a_frame(self) -> None:
        decoder = FrameDecoder(frame_bytes_max=HELLO_BYTES_MAX)
        frame = frame_with_payload(2 * HELLO_BYTES_MAX)
        assert decoder.feed(frame[:3]) == []
        decoder.frame_bytes_max = FRAME_BYTES_MAX
        assert len(decoder.feed(frame[3:])) == 1

    def test_nothing_is_allocated_for_a_length_over_the_ceiling(self) -> None:
        decoder = FrameDecoder()
        tracemalloc.start()
        try:
            with pytest.raises(FrameTooLarge):
                decoder.feed(b"\xff\xff\xff\xff")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 100_000

    def test_an_announced_length_is_not_allocated_before_its_bytes_come(self) -> None:
        decoder = FrameDecoder()
        tracemalloc.start()
        try:
            assert decoder.feed(struct.pack(">I", FRAME_BYTES_MAX)) == []
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 100_000
        assert decoder.buffered_bytes == FRAME_PREFIX_BYTES


class TestDecode:
    def test_nothing(self) -> None:
        decoder = FrameDecoder()
        assert decoder.feed(b"") == []
        decoder.finish()

    def test_several_in_one_piece(self) -> None:
        decoder = FrameDecoder()
        assert decoder.feed(GOODBYE * 3 + GOODBYE[:5]) == [{"type": "goodbye"}] * 3
        assert decoder.buffered_bytes == 5
        assert decoder.feed(GOODBYE[5:]) == [{"type": "goodbye"}]
        decoder.finish()

    @pytest.mark.parametrize("missing", range(1, len(GOODBYE)))
    def test_truncated_says_how_much_is_missing(self, missing: int) -> None:
        decoder = FrameDecoder()
        decoder.feed(GOODBYE[:-missing])
        with pytest.raises(FrameTruncated) as caught:
            decoder.finish()
        # Before the length is whole, nothing but the rest of the length is known to be missing.
        assert caught.value.missing_bytes == (missing if missing <= len(GOODBYE) - 4 else 4 - len(GOODBYE) + missing)

    def test_good_frames_before_a_bad_one_are_not_lost(self) -> None:
        decoder = FrameDecoder()
        assert decoder.feed(GOODBYE + BAD + GOODBYE) == [{"type": "goodbye"}]
        with pytest.raises(FrameMalformed):
            decoder.feed(b"")

    def test_a_held_back_error_shows_at_the_end(self) -> None:
        decoder = FrameDecoder()
        decoder.feed(GOODBYE + BAD)
        with pytest.raises(FrameMalformed):
            decoder.finish()

    def test_broken_stays_broken(self) -> None:
        decoder = FrameDecoder()
        with pytest.raises(FrameMalformed) as first:
            decoder.feed(BAD)
        for _ in range(2):
            with pytest.raises(FrameMalformed) as again:
                decoder.feed(GOODBYE)
            assert again.value is first.value
        assert decoder.buffered_bytes == 0

    def test_bytes_like_input(self) -> None:
        assert FrameDecoder().feed(memoryview(GOODBYE)) == [{"type": "goodbye"}]  # type: ignore[arg-type]

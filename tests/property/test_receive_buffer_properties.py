"""A stream's bytes that come in any order, twice and in pieces are delivered once and in theirs."""

import random

import pytest
from aioquic.quic.connection import QuicConnectionError
from aioquic.quic.packet import QuicStreamFrame
from aioquic.quic.stream import FinalSizeError
from hypothesis import given
from hypothesis import strategies as st

from quorate_protocol.transport.engine.receive_buffer import PIECES_MAX, PieceCount, ReceiveBuffer

LENGTH = 300
DATA = random.Random(1).randbytes(LENGTH)


def take(buffer: ReceiveBuffer, start: int, stop: int, fin: bool = False) -> tuple[bytes, bool] | None:
    event = buffer.handle_frame(QuicStreamFrame(data=DATA[start:stop], offset=start, fin=fin))
    return None if event is None else (event.data, event.end_stream)


spans = st.tuples(st.integers(0, LENGTH), st.integers(0, LENGTH)).map(sorted)


@given(st.lists(spans, max_size=60), st.randoms(use_true_random=False))
def test_any_pieces_in_any_order(pieces, source):
    buffer = ReceiveBuffer(0, True, PieceCount())
    pieces += [[at, min(at + 37, LENGTH)] for at in range(0, LENGTH, 37)]
    source.shuffle(pieces)
    delivered, came, ended = b"", set(), False
    for start, stop in pieces:
        if (event := take(buffer, start, stop, fin=stop == LENGTH)) is not None:
            assert not ended, "nothing after the end"
            delivered += event[0]
            ended = event[1]
        came |= set(range(start, stop))
        whole = next((at for at in range(LENGTH) if at not in came), LENGTH)
        assert delivered == DATA[:whole]
        assert buffer.starting_offset() == whole
        # What is kept is what came and cannot be delivered: no byte twice.
        assert sum(map(len, buffer._pieces)) == len(came) - whole
        ends = [start + len(piece) for start, piece in zip(buffer._starts, buffer._pieces, strict=True)]
        assert all(end <= start for end, start in zip(ends, buffer._starts[1:], strict=False))
        assert buffer.has_gaps == (len(came) > whole)
        assert buffer._count.pieces == len(buffer._pieces)
    assert delivered == DATA
    assert ended
    assert buffer.is_finished


@given(spans, st.integers(0, LENGTH), st.integers(0, LENGTH))
def test_an_end_that_moves_is_an_error(span, end, other):
    buffer = ReceiveBuffer(0, True, PieceCount())
    take(buffer, end, end, fin=True)
    if other != end:
        with pytest.raises(FinalSizeError):
            take(buffer, other, other, fin=True)
    if span[1] > end:
        with pytest.raises(FinalSizeError):
            take(buffer, *span)


def test_an_end_before_what_came_is_an_error():
    buffer = ReceiveBuffer(0, True, PieceCount())
    take(buffer, 50, 100)
    with pytest.raises(FinalSizeError):
        take(buffer, 0, 20, fin=True)


def test_a_reset_lets_go_of_what_was_kept():
    buffer = ReceiveBuffer(0, True, PieceCount())
    take(buffer, 50, 100)
    assert buffer.handle_reset(final_size=100, error_code=7).error_code == 7
    assert not buffer.has_gaps
    assert take(buffer, 0, 50) is None


def test_too_many_gaps_are_an_error_however_many_streams_have_them():
    count = PieceCount()
    buffers = [ReceiveBuffer(4 * number, True, count) for number in range(8)]
    for number in range(PIECES_MAX):
        assert buffers[number % 8].handle_frame(QuicStreamFrame(data=b"x", offset=1 + 2 * number)) is None
    with pytest.raises(QuicConnectionError):
        buffers[0].handle_frame(QuicStreamFrame(data=b"x", offset=1 + 2 * PIECES_MAX))


def test_a_window_sent_backwards_is_copied_in_small_pieces_and_arrives():
    data = random.Random(2).randbytes(100_000)
    buffer = ReceiveBuffer(0, True, PieceCount())
    for at in range(len(data) - 10, 0, -10):
        buffer.handle_frame(QuicStreamFrame(data=data[at : at + 10], offset=at))
    assert 100_000 / 4096 <= len(buffer._pieces) < 100
    assert buffer.handle_frame(QuicStreamFrame(data=data[:10], offset=0)).data == data


def test_single_bytes_backwards_become_one_piece():
    buffer = ReceiveBuffer(0, True, PieceCount())
    for at in range(LENGTH - 1, 0, -1):
        take(buffer, at, at + 1)
    assert len(buffer._pieces) == 1
    assert take(buffer, 0, 1) == (DATA, False)

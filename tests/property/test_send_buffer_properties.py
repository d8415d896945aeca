"""A stream's unacknowledged bytes: whatever is lost, overtaken or acknowledged, the peer gets all of it."""

from aioquic.quic.packet_builder import QuicDeliveryState
from hypothesis import given
from hypothesis import strategies as st

from quorate_protocol.transport.engine.send_buffer import Account, SendBuffer

FATES = st.sampled_from(["write", "write", "send", "send", "send", "acknowledge", "lose", "window"])


@given(
    steps=st.lists(st.tuples(FATES, st.integers(1, 3000), st.randoms(use_true_random=False)), max_size=120),
    ends=st.booleans(),
)
def test_every_byte_arrives_once_it_is_sent_often_enough(steps, ends):
    account = Account()
    buffer = SendBuffer(0, account)
    written, received = bytearray(), {}
    window, under_way, ended = 2000, [], False

    def send(size):
        if (frame := buffer.take(size, window)) is None:
            return False
        offset, data, _ = frame
        assert len(data) <= size
        assert offset + len(data) <= max(window, 0)
        under_way.append(frame)
        return True

    def arrive(frame):
        nonlocal ended
        offset, data, is_last = frame
        for place, byte in enumerate(data, offset):
            assert received.setdefault(place, byte) == byte
        ended = ended or is_last
        buffer.on_data_delivery(QuicDeliveryState.ACKED, offset, offset + len(data), is_last)

    for fate, size, source in steps:
        if fate == "write":
            data = source.randbytes(size)
            buffer.write(data)
            written += data
        elif fate == "send":
            send(size)
        elif fate == "window":
            window += size
        elif under_way:
            frame = under_way.pop(source.randrange(len(under_way)))
            if fate == "acknowledge":
                arrive(frame)
            else:
                offset, data, is_last = frame
                buffer.on_data_delivery(QuicDeliveryState.LOST, offset, offset + len(data), is_last)
        # What is held is what the peer has not acknowledged from its first missing byte on.
        first_missing = next((place for place in range(len(written)) if place not in received), len(written))
        assert buffer.held_bytes == account.held_bytes == len(written) - first_missing
    if ends:
        buffer.write(b"", end_stream=True)
    window = 10**9
    while send(1000) or under_way:
        while under_way:
            arrive(under_way.pop())
    assert bytes(received[place] for place in range(len(written))) == bytes(written)
    assert account.held_bytes == 0
    assert buffer.buffer_is_empty
    assert ended is ends is buffer.is_finished


@given(st.binary(min_size=1, max_size=5000), st.integers(0, 5000))
def test_after_a_reset_nothing_is_held(data, taken):
    account = Account()
    buffer = SendBuffer(0, account)
    buffer.write(data)
    frame = buffer.take(taken, len(data)) if taken else None
    buffer.reset(7)
    assert account.held_bytes == buffer.held_bytes == 0
    assert buffer.buffer_is_empty
    assert buffer.reset_pending
    if frame is not None:
        offset, sent, is_last = frame
        buffer.on_data_delivery(QuicDeliveryState.LOST, offset, offset + len(sent), is_last)
        assert buffer.buffer_is_empty
    assert buffer.get_reset_frame().final_size == (len(frame[1]) if frame else 0)

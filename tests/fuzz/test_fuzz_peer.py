"""A peer that is who it says and sends what it likes: frames of any kind inside good packets.

Our engine goes on or closes with a transport code (RFC 9000, 20.1); it never raises, and holds little.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance.stock import frame, stock_world
from fuzz.budget import fuzz
from fuzz.held import HELD_BYTES_MAX, TRANSPORT_CODES, held_bytes
from fuzz.mutations import mutated, numbers

ids = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 400, 4095, 4096, 4100]) | numbers
tails = st.binary(max_size=60)
lengths = st.integers(0, 60) | numbers

#: Frames that have the right fields, with any values in them; and then any type at all.
frames = st.one_of(
    st.builds(frame, st.just(0x00)),
    st.builds(frame, st.just(0x01)),
    st.builds(frame, st.sampled_from([2, 3]), numbers, numbers, st.integers(0, 3), numbers, numbers, numbers, numbers),
    st.builds(frame, st.just(0x04), ids, numbers, numbers),
    st.builds(frame, st.just(0x05), ids, numbers),
    st.builds(frame, st.just(0x06), numbers, lengths, tails),
    st.builds(frame, st.just(0x07), lengths, tails),
    st.builds(frame, st.sampled_from([0x08, 0x09]), ids, tails),
    st.builds(frame, st.sampled_from([0x0A, 0x0B]), ids, lengths, tails),
    st.builds(frame, st.sampled_from([0x0C, 0x0D]), ids, numbers, tails),
    st.builds(frame, st.sampled_from([0x0E, 0x0F]), ids, numbers, lengths, tails),
    st.builds(frame, st.sampled_from([0x10, 0x12, 0x13, 0x14, 0x16, 0x17, 0x19]), numbers),
    st.builds(frame, st.sampled_from([0x11, 0x15]), ids, numbers),
    st.builds(frame, st.just(0x18), numbers, numbers, st.binary(min_size=1, max_size=40)),
    st.builds(frame, st.sampled_from([0x1A, 0x1B]), st.binary(min_size=8, max_size=8)),
    st.builds(frame, st.just(0x1C), numbers, numbers, lengths, tails),
    st.builds(frame, st.just(0x1D), numbers, lengths, tails),
    st.builds(frame, st.just(0x1E)),
    st.builds(frame, st.just(0x30), tails),
    st.builds(frame, st.just(0x31), lengths, tails),
    st.builds(frame, numbers, tails),
)
payloads = st.lists(frames, min_size=1, max_size=6).map(b"".join) | mutated(frames) | st.binary(max_size=200)


@pytest.mark.parametrize("hostile", ["client", "server"])
def test_any_frames_are_borne_or_closed_upon(make_factory, credentials, hostile):
    @given(sent=st.lists(payloads, min_size=1, max_size=8))
    def check(sent):
        world = stock_world(make_factory, credentials, hostile).connect()
        ours = world.server if hostile == "client" else world.client
        peer = world.client if hostile == "client" else world.server
        # Something is under way in both directions.
        peer.open(b"hello", end=False)
        ours.open(bytes(20_000), end=False)
        ours.engine.send_datagram(b"pulse")
        world.rest(0.005)
        for payload in sent:
            peer.engine.quic.inject(payload)
            world.rest(0.030)
        if ours.seen.close is not None:
            if not ours.seen.close.by_peer:
                assert ours.seen.close.transport
                assert ours.seen.close.code in TRANSPORT_CODES
                assert "Traceback" not in ours.seen.close.reason
            ours.engine.close(1, "")
        else:
            ours.open(bytes(1000))
        world.rest(2.0)
        assert held_bytes(ours.engine) < HELD_BYTES_MAX

    fuzz(check, 120)

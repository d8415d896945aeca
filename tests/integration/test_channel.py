"""Messages over real streams: what a peer that breaks the format hears, and what its neighbours do not."""

import asyncio
import struct

import msgpack
import pytest

from links import PATIENCE_S, linked, pair, ping_pong, read_all, until
from quorate_protocol.channel import Channel
from quorate_protocol.errors import (
    Code,
    ConnectionClosed,
    FrameMalformed,
    FrameTooLarge,
    FrameTruncated,
    MessageInvalid,
    ResetByPeer,
    StoppedByPeer,
    UnexpectedMessage,
    UnknownType,
)
from quorate_protocol.limits import FRAME_BYTES_MAX, HELLO_BYTES_MAX
from quorate_protocol.messages import Ask, Drain, Goodbye, Hello, Welcome

GOOD = Drain(reason="good").to_frame()


@pytest.fixture
async def link(credentials):
    async with linked(credentials) as link:
        yield link


def frame(payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + payload


#: Bytes that break the format, and how: the error here and the code that the peer hears.
BAD = {
    "not msgpack": (frame(b"\xc1\xc1\xc1"), FrameMalformed, Code.FRAME_MALFORMED),
    "not a map": (frame(msgpack.packb([1, 2])), FrameMalformed, Code.FRAME_MALFORMED),
    "two values": (frame(msgpack.packb({}) * 2), FrameMalformed, Code.FRAME_MALFORMED),
    "empty": (frame(b""), FrameMalformed, Code.FRAME_MALFORMED),
    "keys that are no text": (frame(msgpack.packb({1: 2})), FrameMalformed, Code.FRAME_MALFORMED),
    "oversized": (struct.pack(">I", FRAME_BYTES_MAX + 1), FrameTooLarge, Code.FRAME_TOO_LARGE),
    "as large as can be said": (b"\xff\xff\xff\xff", FrameTooLarge, Code.FRAME_TOO_LARGE),
    "no type": (frame(msgpack.packb({"a": 1})), UnknownType, Code.UNKNOWN_TYPE),
    "unknown type": (frame(msgpack.packb({"type": "nonsense"})), UnknownType, Code.UNKNOWN_TYPE),
    "wrong content": (frame(msgpack.packb({"type": "drain", "reason": 5})), MessageInvalid, Code.MESSAGE_INVALID),
}


async def test_messages_arrive_in_order_and_the_end_is_told(link):
    here, there = (Channel(end) for end in await pair(link))
    for number in range(100):
        await here.send(Drain(reason=str(number)))
    here.send_nowait(Goodbye(reason="over"))
    await here.finish()
    async with asyncio.timeout(PATIENCE_S):
        received = [await there.receive() for _ in range(103)]
    assert [message.reason for message in received[:101]] == [*map(str, range(100)), "over"]
    assert received[101:] == [None, None]


@pytest.mark.parametrize("split", [None, 1], ids=["whole", "byte by byte"])
async def test_frames_may_be_cut_anywhere(link, split):
    here, there = await pair(link)
    channel = Channel(there)
    for position in range(0, len(GOOD) * 2, split or len(GOOD) * 2):
        here.send_nowait((GOOD * 2)[position : position + (split or len(GOOD) * 2)])
        if split:
            await here.flush()
    async with asyncio.timeout(PATIENCE_S):
        assert [await channel.receive(), await channel.receive()] == [Drain(reason="good")] * 2


@pytest.mark.parametrize("bad", BAD)
async def test_a_bad_frame_is_told_to_its_sender_and_to_nobody_else(link, bad):
    data, error, code = BAD[bad]
    other = await pair(link)
    here, there = await pair(link)
    channel = Channel(there)
    here.send_nowait(data)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(error) as caught:
            await channel.receive()
        assert caught.value.code == code
        with pytest.raises(ResetByPeer) as reset:
            await here.receive()
        await until(lambda: here.send_is_over)
        with pytest.raises(StoppedByPeer) as stopped:
            await here.send(GOOD)
    assert reset.value.code == stopped.value.code == code
    await ping_pong(*other)
    assert not link.there.is_closed
    assert link.here.stats.streams_open == link.there.stats.streams_open == 1


@pytest.mark.parametrize("bad", BAD)
async def test_what_is_wrong_behind_a_good_frame_is_noticed_without_waiting_for_more(link, bad):
    """The peer may send nothing more before it has an answer."""
    data, error, _ = BAD[bad]
    here, there = await pair(link)
    channel = Channel(there)
    here.send_nowait(GOOD + data)
    async with asyncio.timeout(PATIENCE_S):
        assert await channel.receive() == Drain(reason="good")  # it came whole, and is not lost
        with pytest.raises(error):
            await channel.receive()


@pytest.mark.parametrize("keep", [1, 3, 4, 5, len(GOOD) - 1])
async def test_an_end_in_the_middle_of_a_frame(link, keep):
    here, there = await pair(link)
    channel = Channel(there)
    here.send_nowait(GOOD + GOOD[:keep])
    await here.finish()
    async with asyncio.timeout(PATIENCE_S):
        assert await channel.receive() == Drain(reason="good")
        with pytest.raises(FrameTruncated):
            await channel.receive()
        with pytest.raises(ResetByPeer) as caught:
            await here.receive()
    assert caught.value.code == Code.FRAME_TRUNCATED


async def test_before_the_hello_is_accepted_frames_have_a_lower_ceiling(link):
    small = Hello(id="a", token="t")
    here, there = await pair(link)
    channel = Channel(there, frame_bytes_max=HELLO_BYTES_MAX)
    large = Ask(task="t", body=bytes(HELLO_BYTES_MAX))
    async with asyncio.timeout(PATIENCE_S):
        await Channel(here).send(small)
        assert await channel.receive() == small
        channel.allow(FRAME_BYTES_MAX)
        await Channel(here).send(large)
        assert await channel.receive() == large

        here, there = await pair(link)
        channel = Channel(there, frame_bytes_max=HELLO_BYTES_MAX)
        await Channel(here).send(large)
        with pytest.raises(FrameTooLarge):
            await channel.receive()


async def test_expect_takes_one_of_its_types_and_nothing_else(link):
    here, there = await pair(link)
    channel = Channel(there)
    await Channel(here).send(Goodbye())
    async with asyncio.timeout(PATIENCE_S):
        assert await channel.expect(Welcome, Goodbye) == Goodbye()
        await Channel(here).send(Drain())
        with pytest.raises(UnexpectedMessage, match="drain"):
            await channel.expect(Welcome, Goodbye)
        with pytest.raises(ResetByPeer) as caught:
            await here.receive()
    assert caught.value.code == Code.UNEXPECTED_MESSAGE


async def test_expect_wants_a_message_and_not_the_end(link):
    here, there = await pair(link)
    await here.finish()
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(UnexpectedMessage):
            await Channel(there).expect(Welcome)
        with pytest.raises(ResetByPeer) as caught:
            await here.receive()
    assert caught.value.code == Code.UNEXPECTED_MESSAGE


async def test_an_end_that_is_no_fault_of_the_format_is_raised_as_it_is(link):
    here, there = await pair(link)
    here.reset(Code.CANCELLED)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ResetByPeer) as caught:
            await Channel(there).receive()
        assert caught.value.code == Code.CANCELLED
        here, there = await pair(link)
        waiting = asyncio.create_task(Channel(there).receive())
        await asyncio.sleep(0)
        await link.here.close(Code.SHUTDOWN)
        with pytest.raises(ConnectionClosed):
            await waiting


async def test_a_message_over_the_ceiling_is_refused_here_and_nothing_is_sent(link):
    here, there = await pair(link)
    channel = Channel(here)
    huge = Hello(id="a", token="t", labels={f"{number}-{'k' * 200}": "v" * 4096 for number in range(64)}, tasks=[])
    too_large = Ask.model_construct(task="t", body=bytes(FRAME_BYTES_MAX))
    await channel.send(huge)
    for send in (channel.send, channel.send_nowait):
        with pytest.raises(FrameTooLarge):
            result = send(too_large)
            if asyncio.iscoroutine(result):
                await result
    await channel.finish()
    assert await read_all(there) == huge.to_frame()

"""Bodies on streams of their own, over real connections: they arrive whole, or both ends hear why not."""

import asyncio
import contextlib
import gc
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest

from links import PATIENCE_S, Link, linked, noise, open_files, pair, ping_pong, until
from quorate_coordinator.certificates import DevelopmentCredentials
from quorate_protocol import bulk
from quorate_protocol.blobs import Blob, BlobBudget, BlobStore, blob_of, make_blob
from quorate_protocol.bodies import decode_body, encode_body_parts
from quorate_protocol.bulk import BulkInbox, give_up_blob, header_for, read_header, receive_blob, ref_to, send_blob
from quorate_protocol.errors import (
    BodyDigestWrong,
    BodyNotReceived,
    BodyTooLarge,
    BodyTruncated,
    Code,
    ConnectionClosed,
    FrameMalformed,
    FrameTooLarge,
    FrameTruncated,
    MessageInvalid,
    ProtocolError,
    ResetByPeer,
    SpoolFailed,
    SpoolFull,
    StoppedByPeer,
    UnexpectedMessage,
    UnknownType,
)
from quorate_protocol.fields import BodyRef
from quorate_protocol.limits import BULK_HEADER_BYTES_MAX
from quorate_protocol.messages import Bulk, Goodbye
from quorate_protocol.pace import SHARE_BYTES_MIN, WINDOW_BYTES_MIN
from quorate_protocol.transport import Connection, Priority, SendStream

#: More than fits what both ends hold of a stream: its sender is in the middle until somebody reads.
LARGE_BYTES = 24 << 20


@dataclass
class Bench:
    """A link, and an inbox at each end."""

    link: Link
    spool_dir: Path
    budget: BlobBudget
    inboxes: dict[Connection, BulkInbox] = field(default_factory=dict)
    faults: list[ProtocolError] = field(default_factory=list)
    serving: list[asyncio.Task[None]] = field(default_factory=list)

    def store(self, **limits: Any) -> BlobStore:
        return BlobStore(self.spool_dir, self.budget, spool_bytes=1 << 20, **limits)

    def serve(self, connection: Connection, store: BlobStore | None = None, **options: Any) -> BulkInbox:
        inbox = BulkInbox(store or self.store(), on_fault=self.faults.append, **options)
        self.serving.append(asyncio.create_task(inbox.serve(connection)))
        self.inboxes[connection] = inbox
        return inbox


@pytest.fixture
async def bench(credentials: DevelopmentCredentials, tmp_path: Path) -> AsyncIterator[Bench]:
    """At the end nothing is left: no task, no file, no bytes in the budget, no open stream."""
    budget = BlobBudget()
    async with linked(credentials) as link:
        bench = Bench(link, tmp_path, budget)
        yield bench
        if not link.here.is_closed:
            # Whatever became of the bodies, the connection is well.
            here, there = await pair(link)
            await ping_pong(here, there)
        for inbox in bench.inboxes.values():
            inbox.close()
            await until(lambda inbox=inbox: not inbox._tasks, "the inbox has no tasks")
            assert (inbox.unclaimed, inbox.unclaimed_bytes, inbox._unclaimed, inbox._claims) == (0, 0, {}, {})
        for task in bench.serving:
            task.cancel()
        await asyncio.gather(*bench.serving, return_exceptions=True)
    gc.collect()
    await until(lambda: (gc.collect(), budget.disk_bytes, budget.memory_bytes)[1:] == (0, 0), "the budget is free")
    assert list(tmp_path.iterdir()) == []  # noqa: ASYNC240  an empty directory
    assert [path for path in open_files() if path.startswith(str(tmp_path))] == []


def of_noise(size: int, seed: int = 0) -> Blob:
    return blob_of([noise(size, seed)])


def content(blob: Blob) -> bytes:
    return bytes(blob.view())


async def open_raw(connection: Connection, size: int, digest: bytes) -> SendStream:
    """A bulk stream after its header, for who does not keep to it."""
    stream = await connection.open_uni_stream()
    await stream.send(Bulk(of="reply", round=1, size=size, digest=digest).to_frame())
    return stream


def sha(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


async def is_stopped(stream: SendStream, code: Code) -> bool:
    """Whether the peer stops the stream with this code; waits until it does."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await stream.send(b"x")
                await asyncio.sleep(0.001)
    except StoppedByPeer as error:
        return error.code == code


# --- what comes through ---


@pytest.mark.parametrize("size", [0, 1, 100_000, 1 << 20, (1 << 20) + 1, LARGE_BYTES + 7])
async def test_both_ways_in_memory_and_on_disk(bench: Bench, size: int) -> None:
    blob = of_noise(size)
    for sender, receiver in ((bench.link.here, bench.link.there), (bench.link.there, bench.link.here)):
        inbox = bench.serve(receiver)
        async with asyncio.timeout(PATIENCE_S):
            sending = asyncio.create_task(send_blob(sender, blob, header_for(blob, "reply", round=1)))
            received = await inbox.get(ref_to(blob), PATIENCE_S)
            await sending
        assert received.is_on_disk == (size > 1 << 20)
        assert content(received) == content(blob)
    assert bench.faults == []


async def test_an_array_from_one_end_to_the_other_and_back(bench: Bench) -> None:
    here, there = bench.serve(bench.link.here), bench.serve(bench.link.there)
    array = numpy.arange(3 << 20, dtype="<f4").reshape(3, -1)
    blob = await make_blob(encode_body_parts({"x": array}))
    sending = asyncio.create_task(send_blob(bench.link.here, blob, header_for(blob, "ask")))
    received = await there.get(ref_to(blob), PATIENCE_S)
    value = decode_body(received.view())["x"]
    assert (value == array).all()
    await sending
    # What was spooled is passed on as it is.
    sending = asyncio.create_task(send_blob(bench.link.there, received, header_for(received, "assignment", round=1)))
    again = await here.get(ref_to(blob), PATIENCE_S)
    assert (decode_body(again.view())["x"] == value).all()
    await sending


async def test_a_reference_before_its_body_and_after_it(bench: Bench) -> None:
    inbox = bench.serve(bench.link.there)
    before, after = of_noise(2_000_000, 1), of_noise(2_000_000, 2)
    waiting = asyncio.create_task(inbox.get(ref_to(before), PATIENCE_S))
    await send_blob(bench.link.here, after, header_for(after, "reply", round=1))
    await until(lambda: inbox.unclaimed == 1)
    assert inbox.unclaimed_bytes == 2_000_000
    await send_blob(bench.link.here, before, header_for(before, "reply", round=1))
    assert content(await waiting) == content(before)
    assert content(await inbox.get(ref_to(after), PATIENCE_S)) == content(after)
    assert inbox.unclaimed == 0


async def test_many_at_once_in_both_directions(bench: Bench) -> None:
    async def carry(sender: Connection, inbox: BulkInbox, number: int) -> None:
        blob = of_noise(1_000 + number * 137_000, number)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send_blob(sender, blob, header_for(blob, "reply", round=number + 1)))
            received = await inbox.get(ref_to(blob), PATIENCE_S)
        assert content(received) == content(blob)

    here, there = bench.serve(bench.link.here), bench.serve(bench.link.there)
    async with asyncio.timeout(2 * PATIENCE_S), asyncio.TaskGroup() as tasks:
        for number in range(25):
            tasks.create_task(carry(bench.link.here, there, number))
            tasks.create_task(carry(bench.link.there, here, number))
    assert bench.faults == []


async def test_the_same_body_several_times_is_given_out_as_often(bench: Bench) -> None:
    inbox = bench.serve(bench.link.there)
    blob = of_noise(50_000)
    waiting = asyncio.create_task(inbox.get(ref_to(blob), PATIENCE_S))
    for round_id in (1, 2, 3):
        await send_blob(bench.link.here, blob, header_for(blob, "assignment", round=round_id))
    others = [await inbox.get(ref_to(blob), PATIENCE_S) for _ in range(2)]
    assert {content(each) for each in (await waiting, *others)} == {content(blob)}
    with pytest.raises(BodyNotReceived):
        await inbox.get(ref_to(blob), 0.01)


async def test_what_came_before_the_end_of_the_connection_is_there_after_it(bench: Bench) -> None:
    inbox = bench.serve(bench.link.there)
    claimed, unclaimed = of_noise(3_000_000, 1), of_noise(3_000_000, 2)
    waiting = asyncio.create_task(inbox.get(ref_to(claimed), PATIENCE_S))
    for blob in (claimed, unclaimed):
        await send_blob(bench.link.here, blob, header_for(blob, "reply", round=1))
    never = asyncio.create_task(inbox.get(ref_to(of_noise(1)), PATIENCE_S))
    await bench.link.here.close()
    assert content(await waiting) == content(claimed)
    del waiting  # what is raised below holds this frame, and the task the body
    assert content(await inbox.get(ref_to(unclaimed), PATIENCE_S)) == content(unclaimed)
    for get in (never, inbox.get(ref_to(of_noise(2)), PATIENCE_S)):
        with pytest.raises(ConnectionClosed):
            await get
    with pytest.raises(ConnectionClosed):
        await bench.serving[0]


# --- what is wrong ---


async def test_another_digest(bench: Bench) -> None:
    inbox = bench.serve(bench.link.there)
    for size in (1000, 3 << 20):
        stream = await open_raw(bench.link.here, size, sha(b"announced"))
        await stream.send(bytes(size))
        await stream.finish()
        with pytest.raises(BodyDigestWrong) as caught:
            await inbox.get(BodyRef(size=size, digest=sha(b"announced")), PATIENCE_S)
        assert caught.value.digest == sha(bytes(size))
        assert bench.faults.pop() is caught.value


async def test_a_truncated_body(bench: Bench) -> None:
    inbox = bench.serve(bench.link.there)
    for size in (1000, 3 << 20):
        stream = await open_raw(bench.link.here, size, sha(bytes(size)))
        await stream.send(bytes(size - 1))
        await stream.finish()
        with pytest.raises(BodyTruncated, match=f"body ended after {size - 1} bytes of {size}"):
            await inbox.get(BodyRef(size=size, digest=sha(bytes(size))), PATIENCE_S)
        assert isinstance(bench.faults.pop(), BodyTruncated)


async def test_a_body_that_goes_on(bench: Bench) -> None:
    inbox = bench.serve(bench.link.there)
    stream = await open_raw(bench.link.here, 1000, sha(bytes(1000)))
    await stream.send(bytes(1001))
    with pytest.raises(BodyTooLarge, match="over the 1000 that were announced"):
        await inbox.get(BodyRef(size=1000, digest=sha(bytes(1000))), PATIENCE_S)
    assert await is_stopped(stream, Code.BODY_INVALID)


async def test_over_the_ceiling(bench: Bench) -> None:
    inbox = bench.serve(bench.link.there, bench.store(size_bytes_max=1 << 20))
    blob = of_noise((1 << 20) + 1)
    waiting = asyncio.create_task(inbox.get(ref_to(blob), PATIENCE_S))
    with pytest.raises(StoppedByPeer) as caught:
        await send_blob(bench.link.here, blob, header_for(blob, "reply", round=1))
    assert caught.value.code == Code.BODY_INVALID
    with pytest.raises(BodyTooLarge, match="body of 1048577 bytes is over the 1048576 of the ceiling"):
        await waiting


async def test_no_room_in_the_budget(bench: Bench) -> None:
    bench.budget.disk_bytes_max = 5 << 20
    inbox = bench.serve(bench.link.there)
    first, second = of_noise(3 << 20, 1), of_noise(3 << 20, 2)
    await send_blob(bench.link.here, first, header_for(first, "reply", round=1))
    with pytest.raises(StoppedByPeer) as stopped:
        await send_blob(bench.link.here, second, header_for(second, "reply", round=1))
    assert stopped.value.code == Code.BUSY
    with pytest.raises(SpoolFull, match="no room for a body of 3145728 bytes on disk: 3145728 of 5242880 are taken"):
        await inbox.get(ref_to(second), PATIENCE_S)
    (await inbox.get(ref_to(first), PATIENCE_S)).close()
    await send_blob(bench.link.here, second, header_for(second, "reply", round=1))
    assert content(await inbox.get(ref_to(second), PATIENCE_S)) == content(second)
    assert bench.faults == []


async def test_no_space_on_the_disk(bench: Bench) -> None:
    bench.spool_dir = bench.spool_dir / "gone"
    inbox = bench.serve(bench.link.there)
    blob = of_noise(LARGE_BYTES)
    waiting = asyncio.create_task(inbox.get(ref_to(blob), PATIENCE_S))
    with pytest.raises(StoppedByPeer) as stopped:
        await send_blob(bench.link.here, blob, header_for(blob, "reply", round=1))
    assert stopped.value.code == Code.BUSY
    with pytest.raises(SpoolFailed, match="No such file or directory"):
        await waiting


@pytest.mark.parametrize(
    ("first", "error"),
    [
        (b"\x00\x00\x10\x01", FrameTooLarge),
        (b"GET / HTTP/1.1", FrameTooLarge),
        (b"\x00\x00", FrameTruncated),
        (b"\x00\x00\x00\x05\x80", FrameTruncated),
        (b"", FrameTruncated),
        (b"\x00\x00\x00\x01\xc1", FrameMalformed),
        (b"\x00\x00\x00\x00", FrameMalformed),
        (b"\x00\x00\x00\x01\x80", UnknownType),
        (Bulk(of="reply", size=1, digest=bytes(32)).to_frame().replace(b"reply", b"hello"), MessageInvalid),
        (Goodbye().to_frame(), UnexpectedMessage),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else value[:12].hex() or "nothing",
)
async def test_a_stream_that_begins_with_something_else(bench: Bench, first: bytes, error: type[ProtocolError]) -> None:
    bench.serve(bench.link.there)
    stream = await bench.link.here.open_uni_stream()
    await stream.send(first)
    await stream.finish()
    await until(lambda: bench.faults)
    assert type(bench.faults.pop()) is error


async def test_a_stream_that_goes_on_after_a_bad_beginning_is_stopped(bench: Bench) -> None:
    bench.serve(bench.link.there)
    for first, code in ((b"GET / HTTP/1.1", Code.FRAME_TOO_LARGE), (Goodbye().to_frame(), Code.UNEXPECTED_MESSAGE)):
        stream = await bench.link.here.open_uni_stream()
        await stream.send(first)
        assert await is_stopped(stream, code)


async def test_the_largest_header(bench: Bench) -> None:
    header = Bulk(of="reply", round=7, size=3, digest=sha(b"abc"))
    assert len(header.to_frame()) < BULK_HEADER_BYTES_MAX
    here = await bench.link.here.open_uni_stream()
    await here.send(header.to_frame())
    await here.send(b"abc")
    await here.finish()
    there = await bench.link.there.accept_uni_stream()
    assert await read_header(there) == header
    assert content(await receive_blob(there, header, bench.store())) == b"abc"


# --- what is given up ---


async def test_a_sender_that_gives_up_in_the_middle(bench: Bench) -> None:
    inbox = bench.serve(bench.link.there)
    blob = of_noise(LARGE_BYTES)
    stream = await open_raw(bench.link.here, blob.size_bytes, blob.digest)
    await stream.send(blob.read(0, 3 << 20))
    waiting = asyncio.create_task(inbox.get(ref_to(blob), PATIENCE_S))
    await until(lambda: bench.budget.disk_bytes)
    stream.reset(Code.CANCELLED)
    with pytest.raises(ResetByPeer) as caught:
        await waiting
    assert caught.value.code == Code.CANCELLED
    assert bench.faults == []


async def test_a_cancelled_send_resets_the_stream(bench: Bench) -> None:
    blob = of_noise(LARGE_BYTES)
    sending = asyncio.create_task(send_blob(bench.link.here, blob, header_for(blob, "reply", round=1)))
    stream = await bench.link.there.accept_uni_stream()
    header = await read_header(stream)
    # Nobody reads on: the sender waits in the middle.
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert isinstance(header, Bulk)
    with pytest.raises(ResetByPeer) as caught:
        await receive_blob(stream, header, bench.store())
    assert caught.value.code == Code.CANCELLED


async def test_a_sender_hears_that_nobody_wants_it_any_more(bench: Bench) -> None:
    inbox = bench.serve(bench.link.there)
    data = noise(LARGE_BYTES)
    waiting = asyncio.create_task(inbox.get(BodyRef(size=len(data), digest=sha(data)), PATIENCE_S))
    stream = await open_raw(bench.link.here, len(data), sha(data))
    await stream.send(data[: 1 << 20])
    await until(lambda: bench.budget.disk_bytes)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await is_stopped(stream, Code.CANCELLED)


async def test_one_that_is_given_up_in_the_moment_it_comes(bench: Bench) -> None:
    """Between the stream's coming and the waiting task's going on."""
    inbox = BulkInbox(bench.store())
    bench.inboxes[bench.link.there] = inbox
    blob = of_noise(1000)
    waiting = asyncio.create_task(inbox.get(ref_to(blob), PATIENCE_S))
    here = await open_raw(bench.link.here, blob.size_bytes, blob.digest)
    there = await bench.link.there.accept_uni_stream()
    header = await read_header(there)
    assert isinstance(header, Bulk)
    inbox.take(there, header)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await is_stopped(here, Code.CANCELLED)


async def test_not_in_time(bench: Bench) -> None:
    inbox = bench.serve(bench.link.there)
    with pytest.raises(BodyNotReceived, match=r"body of 5 bytes has not come within 0\.01 s"):
        await inbox.get(BodyRef(size=5, digest=bytes(32)), 0.01)
    data = noise(2 << 20)
    stream = await open_raw(bench.link.here, len(data), sha(data))
    await stream.send(data[:1000])
    await until(lambda: inbox.unclaimed)
    with pytest.raises(BodyNotReceived, match=r"body of 2097152 bytes has not come within 0\.05 s"):
        await inbox.get(BodyRef(size=len(data), digest=sha(data)), 0.05)
    assert await is_stopped(stream, Code.CANCELLED)


async def test_what_nobody_refers_to_expires(bench: Bench) -> None:
    inbox = bench.serve(bench.link.there, unclaimed_s=0.2)
    whole = of_noise(1000)
    await send_blob(bench.link.here, whole, header_for(whole, "reply", round=1))
    stream = await open_raw(bench.link.here, 3 << 20, bytes(32))
    await stream.send(bytes(1 << 20))
    await until(lambda: bench.budget.disk_bytes)
    await until(lambda: inbox.unclaimed == bench.budget.disk_bytes == bench.budget.memory_bytes == 0)
    assert await is_stopped(stream, Code.CANCELLED)
    with pytest.raises(BodyNotReceived):
        await inbox.get(ref_to(whole), 0.01)


async def test_what_nobody_can_refer_to_is_stopped(bench: Bench) -> None:
    inbox = bench.serve(bench.link.there, is_wanted=lambda header: header.of == "reply" and header.round == 7)
    blob = of_noise(LARGE_BYTES)
    for header in (header_for(blob, "reply", round=6), header_for(blob, "assignment", round=7)):
        with pytest.raises(StoppedByPeer) as caught:
            await send_blob(bench.link.here, blob, header)
        assert caught.value.code == Code.UNEXPECTED_MESSAGE
    assert inbox.unclaimed == 0
    await send_blob(bench.link.here, blob, header_for(blob, "reply", round=7))
    assert content(await inbox.get(ref_to(blob), PATIENCE_S)) == content(blob)


async def test_too_many_that_nobody_refers_to(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "UNCLAIMED_MAX", 3)
    monkeypatch.setattr(bulk, "UNCLAIMED_BYTES_MAX", 10_000)
    inbox = bench.serve(bench.link.there)
    small = [of_noise(100, number) for number in range(4)]
    for blob in small[:3]:
        await send_blob(bench.link.here, blob, header_for(blob, "reply", round=1))
    for blob in (small[3], of_noise(10_000)):
        stream = await open_raw(bench.link.here, blob.size_bytes, blob.digest)
        assert await is_stopped(stream, Code.BUSY)
    # The message that refers to one of them does not wait for it; the next such message may have its body yet.
    with pytest.raises(SpoolFull, match="no room for a body of 100 bytes among those that no message had referred to"):
        await inbox.get(ref_to(small[3]), PATIENCE_S)
    with pytest.raises(BodyNotReceived):
        await inbox.get(ref_to(small[3]), 0.01)
    assert [content(await inbox.get(ref_to(blob), PATIENCE_S)) for blob in small[:3]] == [*map(content, small[:3])]
    # One alone may be as large as it likes; the next has to wait for its message.
    large = of_noise(20_000)
    await send_blob(bench.link.here, large, header_for(large, "reply", round=1))
    assert await is_stopped(await open_raw(bench.link.here, 1, bytes(32)), Code.BUSY)
    assert content(await inbox.get(ref_to(large), PATIENCE_S)) == content(large)


async def test_streams_whose_beginning_does_not_come(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "HEADER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(bulk, "_HEADERS_MAX", 2)
    inbox = bench.serve(bench.link.there)
    slow = []
    for _ in range(2):
        stream = await bench.link.here.open_uni_stream()
        await stream.send(b"\x00")
        slow.append(stream)
    await until(lambda: len(inbox._beginning) == 2)
    # The next waits until they are given up.
    blob = of_noise(100_000)
    await send_blob(bench.link.here, blob, header_for(blob, "reply", round=1))
    await until(lambda: inbox.unclaimed and not inbox._beginning)
    assert content(await inbox.get(ref_to(blob), PATIENCE_S)) == content(blob)
    assert [await is_stopped(stream, Code.CANCELLED) for stream in slow] == [True, True]


async def test_a_body_that_does_not_go_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "STALLED_S", 0.3)
    inbox = bench.serve(bench.link.there)
    data = noise(3 << 20)
    streams = [await open_raw(bench.link.here, len(data), sha(data)) for _ in range(2)]
    claimed = asyncio.create_task(inbox.get(BodyRef(size=len(data), digest=sha(data)), PATIENCE_S))
    for stream in streams:
        await stream.send(data[: 1 << 20])
    with pytest.raises(BodyNotReceived, match=r"3145728 bytes: nothing has come for 0\.3 s after 1048576 of them"):
        await claimed
    # Nor does one hold anything that nobody has referred to yet; its message hears of it.
    await until(lambda: bench.budget.disk_bytes == 0)
    with pytest.raises(BodyNotReceived, match="after 1048576 of them"):
        await inbox.get(BodyRef(size=len(data), digest=sha(data)), PATIENCE_S)
    assert [await is_stopped(stream, Code.CANCELLED) for stream in streams] == [True, True]


async def test_a_body_that_nobody_takes(bench: Bench) -> None:
    blob = of_noise(LARGE_BYTES)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(send_blob(bench.link.here, blob, header_for(blob, "outcome"), untaken_s=0.2), PATIENCE_S)
    stream = await bench.link.there.accept_uni_stream()
    with pytest.raises(ResetByPeer) as caught:
        while await stream.receive(1 << 20):
            pass
    assert caught.value.code == Code.CANCELLED


async def test_a_body_that_is_taken_slowly(bench: Bench) -> None:
    """It may take several times as long as it may stand still."""
    blob = of_noise(8 << 20)
    sending = asyncio.create_task(send_blob(bench.link.here, blob, header_for(blob, "outcome"), untaken_s=0.4))
    stream = await bench.link.there.accept_uni_stream()
    began_at = asyncio.get_running_loop().time()
    async for _ in stream:
        await asyncio.sleep(0.01)
    await sending
    assert asyncio.get_running_loop().time() - began_at > 0.8


async def test_a_slow_body_is_not_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may take several times as long as it may stand still."""
    monkeypatch.setattr(bulk, "STALLED_S", 0.4)
    inbox = bench.serve(bench.link.there)
    data = noise(2 << 20)
    stream = await open_raw(bench.link.here, len(data), sha(data))
    receiving = asyncio.create_task(inbox.get(BodyRef(size=len(data), digest=sha(data)), PATIENCE_S))
    began_at = asyncio.get_running_loop().time()
    for at in range(0, len(data), 1 << 18):
        await stream.send(data[at : at + (1 << 18)])
        await asyncio.sleep(0.1)
    await stream.finish()
    assert content(await receiving) == data
    assert asyncio.get_running_loop().time() - began_at > 0.8


async def test_the_budget_ends_in_the_middle(bench: Bench) -> None:
    bench.budget.disk_bytes_max = 5 << 20
    inbox = bench.serve(bench.link.there)
    first, second = of_noise(3 << 20, 1), of_noise(3 << 20, 2)
    streams = [await open_raw(bench.link.here, blob.size_bytes, blob.digest) for blob in (first, second)]
    await until(lambda: inbox.unclaimed == 2)
    await streams[0].send(content(first))
    await streams[0].finish()
    with contextlib.suppress(StoppedByPeer):
        await streams[1].send(content(second))
    assert await is_stopped(streams[1], Code.BUSY)
    with pytest.raises(SpoolFull, match=r"no room for a body of 3145728 bytes on disk: \d+ of 5242880 are taken"):
        await inbox.get(ref_to(second), PATIENCE_S)
    assert content(await inbox.get(ref_to(first), PATIENCE_S)) == content(first)
    assert bench.faults == []


async def test_a_body_that_its_sender_gave_up(bench: Bench) -> None:
    inbox = bench.serve(bench.link.there)
    blob = of_noise(1000)
    for waits_for_it in (True, False):
        waiting = asyncio.create_task(inbox.get(ref_to(blob), PATIENCE_S)) if waits_for_it else None
        await give_up_blob(bench.link.here, header_for(blob, "feedback", round=1))
        with pytest.raises(ResetByPeer) as caught:
            await (waiting or inbox.get(ref_to(blob), PATIENCE_S))
        assert caught.value.code == Code.CANCELLED


async def test_a_body_that_its_sender_cannot_read(bench: Bench) -> None:
    """Its receiver hears of it, though nothing of the body is sent."""

    class Broken(Blob):
        async def chunks(self, chunk_bytes: int = 0) -> AsyncGenerator[bytes, None]:
            raise OSError("the disk is broken")
            yield b""

    inbox = bench.serve(bench.link.there)
    blob = Broken(1000, bytes(32))
    waiting = asyncio.create_task(inbox.get(ref_to(blob), PATIENCE_S))
    with pytest.raises(OSError, match="the disk is broken"):
        await send_blob(bench.link.here, blob, header_for(blob, "reply", round=1))
    with pytest.raises(ResetByPeer) as caught:
        await waiting
    assert caught.value.code == Code.INTERNAL


async def test_what_is_announced_holds_nothing(bench: Bench) -> None:
    bench.budget.disk_bytes_max = 1 << 34
    inbox = bench.serve(bench.link.there, bench.store(size_bytes_max=1 << 32), unclaimed_bytes_max=1 << 40)
    streams = [await open_raw(bench.link.here, 1 << 32, bytes([number] * 32)) for number in range(8)]
    await until(lambda: inbox.unclaimed == len(streams))
    assert bench.budget.disk_bytes == 0
    blob = of_noise(9 << 20)
    await send_blob(bench.link.here, blob, header_for(blob, "reply", round=1))
    assert content(await inbox.get(ref_to(blob), PATIENCE_S)) == content(blob)


async def test_a_closed_inbox(bench: Bench) -> None:
    inbox = bench.serve(bench.link.there)
    data = noise(LARGE_BYTES)
    ref = BodyRef(size=len(data), digest=sha(data))
    claimed = asyncio.create_task(inbox.get(ref, PATIENCE_S))
    streams = [await open_raw(bench.link.here, len(data), sha(data)) for _ in range(2)]
    for stream in streams:
        await stream.send(data[: 1 << 20])
    never = asyncio.create_task(inbox.get(BodyRef(size=1, digest=bytes(32)), PATIENCE_S))
    await until(lambda: inbox.unclaimed == 1 and bench.budget.disk_bytes == 2 << 20)
    inbox.close()
    for get in (claimed, never, inbox.get(ref, PATIENCE_S)):
        with pytest.raises(ConnectionClosed, match="no bodies are received any more"):
            await get
    assert [await is_stopped(stream, Code.CANCELLED) for stream in streams] == [True, True]
    assert await is_stopped(await open_raw(bench.link.here, 1, bytes(32)), Code.CANCELLED)


async def test_the_connection_ends_in_the_middle(bench: Bench) -> None:
    inbox = bench.serve(bench.link.there)
    blob = of_noise(LARGE_BYTES)
    waiting = asyncio.create_task(inbox.get(ref_to(blob), PATIENCE_S))
    stream = await open_raw(bench.link.here, blob.size_bytes, blob.digest)
    await stream.send(blob.read(0, 1 << 20))
    await until(lambda: bench.budget.disk_bytes)
    await bench.link.here.close()
    with pytest.raises(ConnectionClosed):
        await waiting
    with pytest.raises(ConnectionClosed):
        await send_blob(bench.link.here, blob, header_for(blob, "reply", round=1))


async def test_control_frames_overtake_a_body(bench: Bench) -> None:
    """A body of 64 MiB is under way; a message of a higher class is there when only a part of it is."""
    inbox = bench.serve(bench.link.there)
    blob = await make_blob([bytes(64 << 20)])
    sending = asyncio.create_task(send_blob(bench.link.here, blob, header_for(blob, "reply", round=1)))
    receiving = asyncio.create_task(inbox.get(ref_to(blob), 3 * PATIENCE_S))
    here = await bench.link.here.open_bi_stream(Priority.HIGH)
    await here.send(b"!")
    there = await bench.link.there.accept_bi_stream()
    there.priority = Priority.HIGH
    assert await there.receive() == b"!"
    await ping_pong(here, there, times=10)
    assert not sending.done()
    assert content(await receiving) == content(blob)
    await sending


async def test_a_body_leaves_no_more_under_way_than_its_pace(bench: Bench) -> None:
    """What is under way stands before every frame that is sent later."""
    inbox = bench.serve(bench.link.there)
    blob = await make_blob([bytes(32 << 20)])
    sending = asyncio.create_task(send_blob(bench.link.here, blob, header_for(blob, "reply", round=1)))
    under_way = window_bytes = 0
    while not sending.done():
        await asyncio.sleep(0)
        under_way = max(under_way, bench.link.here.engine.unacknowledged_class_bytes(Priority.NORMAL))
        if (pace := bulk._paces.get(bench.link.here)) is not None:
            window_bytes = max(window_bytes, pace.window_bytes)
    await sending
    assert SHARE_BYTES_MIN < under_way <= window_bytes + 1000
    assert window_bytes >= WINDOW_BYTES_MIN
    assert bulk._paces[bench.link.here].streams == 0
    assert (await inbox.get(ref_to(blob), PATIENCE_S)).size_bytes == 32 << 20

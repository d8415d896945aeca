"""Streams and datagrams over real sockets: what goes in comes out, whole, in order, and ends as it should."""

import array
import asyncio

import numpy
import pytest

from links import PATIENCE_S, digest, linked, noise, pair, ping_pong, read_all, read_exactly, until
from quorate_coordinator.certificates import DevelopmentCredentials
from quorate_protocol.errors import Code, ConnectionClosed, DatagramTooLarge, ResetByPeer, StoppedByPeer
from quorate_protocol.limits import DATAGRAM_QUEUE_MAX
from quorate_protocol.transport import ALPN, Priority

HOSTS = pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])


@pytest.fixture
async def link(credentials: DevelopmentCredentials):
    async with linked(credentials) as link:
        yield link


# --- what comes through ---


@HOSTS
async def test_a_link_carries_all_kinds_of_streams_both_ways(credentials, host):
    async with linked(credentials, host) as link, asyncio.timeout(PATIENCE_S):
        assert link.here.protocol == link.there.protocol == ALPN
        assert link.here.peer.rsplit(":", 1) == [host, str(link.server.address[1])]
        assert link.there.peer.startswith(f"{host}:")
        for opener, accepter in ((link.here, link.there), (link.there, link.here)):
            asking = await opener.open_bi_stream(Priority.HIGH)
            await asking.send(b"question")
            await asking.finish()
            answering = await accepter.accept_bi_stream()
            assert answering.id == asking.id
            assert await read_all(answering) == b"question"
            await answering.send(b"answer")
            await answering.finish()
            assert await read_all(asking) == b"answer"

            telling = await opener.open_uni_stream(Priority.LOW)
            await telling.send(b"news")
            await telling.finish()
            hearing = await accepter.accept_uni_stream()
            assert hearing.id == telling.id
            assert [chunk async for chunk in hearing] == [b"news"]


async def test_megabytes_in_many_sends_arrive_whole_and_in_order(link):
    data = noise(6 << 20)
    here, there = await pair(link)

    async def upload():
        # Sizes from nothing to more than the watermark.
        position = 0
        for size in (0, 1, 1200, 70_000, 5 << 20, 300_000):
            await here.send(data[position : position + size])
            position += size
        while position < len(data):
            await here.send(data[position : position + 9_999])
            position += 9_999
        await here.finish()

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        tasks.create_task(upload())
        received = await read_all(there, 50_000)
    assert digest(received) == digest(data)


async def test_two_hundred_streams_at_once_in_both_directions(link):
    async def echo(stream):
        await stream.send(await read_all(stream))
        await stream.finish()

    async def serve(connection):
        async with asyncio.TaskGroup() as tasks:
            for _ in range(100):
                tasks.create_task(echo(await connection.accept_bi_stream()))

    async def ask(connection, number):
        stream = await connection.open_bi_stream(Priority(number % len(Priority)))
        data = noise(3_000, seed=number)
        await stream.send(data)
        await stream.finish()
        assert digest(await read_all(stream)) == digest(data)

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        for connection in (link.here, link.there):
            tasks.create_task(serve(connection))
        for number in range(100):
            tasks.create_task(ask(link.here, number))
            tasks.create_task(ask(link.there, 1_000 + number))
    assert link.here.stats.streams_open == link.there.stats.streams_open == 0


async def test_a_critical_message_overtakes_queued_bulk(link):
    bulk_bytes = 1 << 20
    for _ in range(8):
        stream = await link.here.open_uni_stream(Priority.LOW)
        stream.send_nowait(b"b" * bulk_bytes)
        await stream.finish()
    control = await link.here.open_bi_stream(Priority.CRITICAL)
    control.send_nowait(b"stop")
    async with asyncio.timeout(PATIENCE_S):
        received = await link.there.accept_bi_stream()
        assert await read_exactly(received, 4) == b"stop"
        bulk_received = link.there.stats.bytes_received
        bulk_there = [await read_all(await link.there.accept_uni_stream()) for _ in range(8)]
    assert bulk_received < 2 * bulk_bytes
    assert [len(data) for data in bulk_there] == [bulk_bytes] * 8


async def test_single_bytes_are_received_in_chunks_no_larger_than_asked(link):
    here, there = await pair(link)
    data = noise(2_000)
    for position in range(len(data)):
        here.send_nowait(data[position : position + 1])
        if position % 100 == 0:
            await here.flush()
    await here.finish()
    assert await read_all(there, 7) == data
    with pytest.raises(ValueError, match="at least 1"):
        await there.receive(0)


async def test_what_is_in_no_hurry_waits_for_company_and_not_for_long(link):
    here, there = await pair(link)
    await ping_pong(here, there)
    sent_before = link.here.stats.udp_datagrams_sent
    for number in range(10):
        here.send_nowait(b"%d" % number, hurried=False)
        for _ in range(6):  # as many turns as would let one in a hurry leave
            await asyncio.sleep(0)
    assert await read_exactly(there, 10) == b"0123456789"
    # A packet for all ten, where each alone would have been one; an acknowledgement or two besides.
    assert link.here.stats.udp_datagrams_sent <= sent_before + 5
    # What is in a hurry takes the rest along.
    here.send_nowait(b"slow", hurried=False)
    here.send_nowait(b"fast")
    assert await read_exactly(there, 8) == b"slowfast"


# --- how a stream ends ---


async def test_after_the_end_receive_says_so_forever(link):
    here, there = await pair(link)
    await here.send(b"last")
    await here.finish()
    await here.finish()
    assert await read_all(there) == b"last"
    assert [await there.receive() for _ in range(3)] == [b"", b"", b""]
    with pytest.raises(RuntimeError, match="finished"):
        await here.send(b"more")
    with pytest.raises(RuntimeError, match="finished"):
        here.send_nowait(b"more")
    # The other direction is as it was.
    await there.send(b"still here")
    assert await read_exactly(here, 10) == b"still here"


async def test_an_empty_stream_is_accepted_and_ends(link):
    here = await link.here.open_uni_stream()
    await here.finish()
    async with asyncio.timeout(PATIENCE_S):
        there = await link.there.accept_uni_stream()
        assert await there.receive() == b""


@pytest.mark.parametrize("is_client", [True, False])
async def test_a_reset_reaches_the_reader_with_its_code_and_nobody_else(link, is_client):
    client_end, server_end = await pair(link)
    other = await pair(link)
    writer, reader = (client_end, server_end) if is_client else (server_end, client_end)
    await writer.send(b"before")
    await writer.flush()
    writer.reset(Code.CANCELLED)
    writer.reset(Code.BUSY)  # too late to change anything
    async with asyncio.timeout(PATIENCE_S):
        assert await reader.receive() == b"before"  # came before the reset, and is not lost
        for _ in range(2):
            with pytest.raises(ResetByPeer) as caught:
                await reader.receive()
            assert caught.value.code == Code.CANCELLED
    with pytest.raises(RuntimeError, match="reset"):
        await writer.send(b"more")
    # The other half of the same stream, and the other stream, go on.
    await reader.send(b"other half")
    assert await read_exactly(writer, 10) == b"other half"
    await ping_pong(*other)


@pytest.mark.parametrize("is_client", [True, False])
async def test_a_stop_reaches_the_writer_with_its_code_and_nobody_else(link, is_client):
    client_end, server_end = await pair(link)
    other = await pair(link)
    writer, reader = (client_end, server_end) if is_client else (server_end, client_end)
    await writer.send(b"unread")
    await writer.flush()
    reader.stop(Code.BUSY)
    reader.stop(Code.CANCELLED)
    assert await reader.receive() == b""
    await until(lambda: writer.send_is_over)
    for attempt in (writer.send, writer.send):
        with pytest.raises(StoppedByPeer) as caught:
            await attempt(b"more")
        assert caught.value.code == Code.BUSY
    with pytest.raises(StoppedByPeer):
        writer.send_nowait(b"more")
    await writer.finish()  # nothing left to finish
    await reader.send(b"other half")
    assert await read_exactly(writer, 10) == b"other half"
    await ping_pong(*other)


async def test_reset_and_stop_wake_whoever_waits(link):
    here, there = await pair(link)
    waiting = asyncio.create_task(there.receive())
    here.reset(Code.CANCELLED)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ResetByPeer):
            await waiting

    here, there = await pair(link)
    waiting = asyncio.create_task(here.send(b"x" * (8 << 20)))
    await until(lambda: there._unread)
    there.stop(Code.CANCELLED)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(StoppedByPeer):
            await waiting
    await ping_pong(*await pair(link))


async def test_a_stream_that_was_reset_before_it_carried_anything_is_accepted_as_such(link):
    here = await link.here.open_uni_stream()
    here.reset(0x1234)
    async with asyncio.timeout(PATIENCE_S):
        there = await link.there.accept_uni_stream()
        with pytest.raises(ResetByPeer) as caught:
            await there.receive()
    assert caught.value.code == 0x1234


async def test_a_stream_given_up_on_both_sides_is_forgotten_by_both(link):
    here, there = await pair(link)
    here.stop(Code.CANCELLED)
    here.reset(Code.CANCELLED)
    await until(lambda: there.send_is_over)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ResetByPeer):
            await there.receive()
    assert link.here.stats.streams_open == link.there.stats.streams_open == 0
    await until(lambda: not link.here.engine.has_stream(here.id) and not link.there.engine.has_stream(here.id))


async def test_codes_that_the_wire_cannot_carry_are_refused_at_the_call(link):
    here, there = await pair(link)
    for code in (-1, 1 << 62):
        for give_up in (here.reset, here.stop, link.here.abort):
            with pytest.raises(ValueError, match="error code"):
                give_up(code)
    await ping_pong(here, there)
    here.reset((1 << 62) - 1)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ResetByPeer) as caught:
            await there.receive()
    assert caught.value.code == (1 << 62) - 1


# --- flush ---


async def test_flush_returns_when_everything_was_acknowledged(link):
    here, there = await pair(link)
    await here.send(noise(200_000))
    assert here.unsent_bytes > 0
    async with asyncio.timeout(PATIENCE_S):
        await here.flush()
        assert here.unsent_bytes == 0
        await here.flush()
        await here.finish()
        await here.flush()
    assert len(await read_all(there)) == 200_000


async def test_flush_down_to_some_bytes(link):
    here, there = await pair(link)
    here.send_nowait(noise(3 << 20))
    flushing = asyncio.create_task(here.flush(100_000))
    # The peer's transport takes a window of what nobody reads, and no more.
    await until(lambda: here.unsent_bytes <= (2 << 20) + 1)
    assert not flushing.done()
    received = 0
    async with asyncio.timeout(PATIENCE_S):
        while received < 2_990_000:
            received += len(await there.receive(10_000))
        await flushing
        assert here.unsent_bytes <= 100_000
        await here.finish()
        received += len(await read_all(there))
    assert received == 3 << 20
    await here.flush(100_000)


@pytest.mark.parametrize("kind", ["bi", "uni"])
async def test_flush_of_a_finished_stream_hears_of_a_stop(link, kind):
    here = await (link.here.open_bi_stream() if kind == "bi" else link.here.open_uni_stream())
    here.send_nowait(b"x" * (2 << 20))  # more than the window: some of it cannot be acknowledged
    await here.finish()
    flushing = asyncio.create_task(here.flush())
    async with asyncio.timeout(PATIENCE_S):
        there = await (link.there.accept_bi_stream() if kind == "bi" else link.there.accept_uni_stream())
    there.stop(Code.BUSY)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(StoppedByPeer):
            await flushing
        with pytest.raises(StoppedByPeer):
            await here.flush()


@pytest.mark.parametrize("kind", ["bi", "uni"])
async def test_flush_of_a_finished_stream_hears_of_the_connections_end(link, kind):
    here = await (link.here.open_bi_stream() if kind == "bi" else link.here.open_uni_stream())
    here.send_nowait(b"x" * (2 << 20))
    await here.finish()
    flushing = asyncio.create_task(here.flush())
    async with asyncio.timeout(PATIENCE_S):
        there = await (link.there.accept_bi_stream() if kind == "bi" else link.there.accept_uni_stream())
        await there.receive()
        await link.there.close(Code.SHUTDOWN)
        with pytest.raises(ConnectionClosed):
            await flushing
        with pytest.raises(ConnectionClosed):
            await here.flush()


# --- datagrams ---


async def test_datagrams_go_both_ways(link):
    for sender, receiver in ((link.here, link.there), (link.there, link.here)):
        for data in (b"", b"pulse", noise(sender.datagrams.max_bytes)):
            sender.datagrams.send(data)
            async with asyncio.timeout(PATIENCE_S):
                assert await receiver.datagrams.receive() == data
        assert sender.stats.datagrams_sent == receiver.stats.datagrams_received == 3
        assert sender.stats.datagrams_dropped == receiver.stats.datagrams_dropped == 0


async def test_an_oversize_datagram_is_refused_and_holds_nothing_up(link):
    max_bytes = link.here.datagrams.max_bytes
    assert 1_000 < max_bytes < 1_200
    with pytest.raises(DatagramTooLarge) as caught:
        link.here.datagrams.send(bytes(max_bytes + 1))
    assert (caught.value.size_bytes, caught.value.max_bytes) == (max_bytes + 1, max_bytes)
    link.here.datagrams.send(bytes(max_bytes))
    async with asyncio.timeout(PATIENCE_S):
        assert await link.there.datagrams.receive() == bytes(max_bytes)
    assert link.here.stats.datagrams_sent == 1


async def test_unread_datagrams_are_dropped_oldest_first_and_counted(link):
    # In two halves: what waits to be sent is bounded, too.
    for first in (0, 200):
        for number in range(first, first + 200):
            link.here.datagrams.send(b"%d" % number)
        await until(lambda: link.there.stats.datagrams_received == first + 200)  # noqa: B023  awaited here
    dropped = 400 - DATAGRAM_QUEUE_MAX
    assert link.there.stats.datagrams_dropped == dropped
    assert link.here.stats.datagrams_dropped == 0
    received = [await link.there.datagrams.receive() for _ in range(DATAGRAM_QUEUE_MAX)]
    assert received == [b"%d" % number for number in range(dropped, 400)]


async def test_unsent_datagrams_are_dropped_oldest_first_and_counted(link):
    for number in range(300):
        link.here.datagrams.send(b"%d" % number)
    dropped = link.here.stats.datagrams_dropped
    assert dropped == 300 - 256
    async with asyncio.timeout(PATIENCE_S):
        received = [await link.there.datagrams.receive() for _ in range(300 - dropped)]
    assert received == [b"%d" % number for number in range(dropped, 300)]


async def test_datagrams_that_came_before_the_end_can_be_read_after_it(link):
    link.here.datagrams.send(b"last words")
    await until(lambda: link.there.stats.datagrams_received)
    await link.here.close()
    await until(lambda: link.there.is_closed)
    assert await link.there.datagrams.receive() == b"last words"
    with pytest.raises(ConnectionClosed):
        await link.there.datagrams.receive()
    with pytest.raises(ConnectionClosed):
        link.there.datagrams.send(b"anybody?")


async def test_one_task_at_a_time_receives(link):
    here, _ = await pair(link)
    waiting = [asyncio.create_task(here.receive()), asyncio.create_task(link.here.datagrams.receive())]
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="two tasks"):
        await here.receive()
    with pytest.raises(RuntimeError, match="two tasks"):
        await link.here.datagrams.receive()
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


async def test_a_cancelled_receive_loses_nothing(link):
    here, there = await pair(link)
    for number in range(20):
        waiting = asyncio.create_task(there.receive())
        waiting_datagram = asyncio.create_task(link.there.datagrams.receive())
        await asyncio.sleep(0)
        here.send_nowait(b"%02d" % number)
        link.here.datagrams.send(b"%02d" % number)
        if number % 2:
            # Also at the very moment at which they are woken.
            await until(lambda: (there._unread and link.there.datagrams._unread) or waiting.done())  # noqa: B023
        waiting.cancel()
        waiting_datagram.cancel()
        await asyncio.wait((waiting, waiting_datagram))
        async with asyncio.timeout(PATIENCE_S):
            data = b"" if waiting.cancelled() else waiting.result()
            assert data or await read_exactly(there, 2) == b"%02d" % number
            datagram = b"" if waiting_datagram.cancelled() else waiting_datagram.result()
            assert datagram or await link.there.datagrams.receive() == b"%02d" % number


@pytest.mark.parametrize(
    "data",
    [bytearray(b"12345678"), memoryview(b"12345678"), memoryview(array.array("H", [1, 2, 3, 4])), b"12345678"],
    ids=["bytearray", "memoryview", "items of two bytes", "bytes"],
)
async def test_whatever_has_bytes_is_sent_whole(link, data):
    expected = bytes(data)
    stream = await link.here.open_uni_stream()
    await stream.send(data)
    stream.send_nowait(data)
    await stream.finish()
    assert await read_all(await link.there.accept_uni_stream()) == 2 * expected
    link.here.datagrams.send(data)
    assert await link.there.datagrams.receive() == expected


@pytest.mark.parametrize("data", ["text", None, 7, memoryview(b"12345678")[::2]], ids=lambda data: type(data).__name__)
async def test_what_has_no_bytes_is_refused_at_the_call(link, data):
    here, there = await pair(link)
    with pytest.raises(TypeError):
        await here.send(data)
    with pytest.raises(TypeError):
        here.send_nowait(data)
    if not isinstance(data, memoryview):
        with pytest.raises(TypeError):
            link.here.datagrams.send(data)
    await ping_pong(here, there)


@pytest.mark.parametrize("priority", [9, -1, "HIGH", None, 1.5])
async def test_what_is_no_class_changes_nothing(link, priority):
    stream = await link.here.open_uni_stream(Priority.HIGH)
    with pytest.raises(ValueError, match="is not a valid Priority"):
        stream.priority = priority
    with pytest.raises(ValueError, match="is not a valid Priority"):
        await link.here.open_uni_stream(priority)
    assert stream.priority is Priority.HIGH
    assert (await link.here.open_uni_stream()).id == stream.id + 4
    stream.priority = 3
    assert stream.priority is Priority.LOW


async def test_what_was_not_sent_may_be_resized(link):
    """Whoever catches the error holds its trace, and with it what was under way."""
    here, _ = await pair(link)
    await link.there.close()
    await until(lambda: link.here.is_closed)
    data = bytearray(b"12345678")
    for send in (here.send, here.send):
        with pytest.raises(ConnectionClosed):
            await send(data)
    with pytest.raises(ConnectionClosed):
        here.send_nowait(data)
    data.clear()


async def test_nothing_of_many_dimensions_is_nothing(link):
    here, there = await pair(link)
    for nothing in (bytearray(), numpy.zeros((0, 3)), b""):
        await here.send(nothing)
        here.send_nowait(nothing)
    await here.send(numpy.arange(6, dtype=">u2").reshape(2, 3))
    assert await read_exactly(there, 12) == bytes.fromhex("000000010002000300040005")
    await ping_pong(here, there)

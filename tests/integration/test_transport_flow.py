"""Backpressure: whoever does not read holds its peer, whoever does not accept too, and nothing grows."""

import asyncio

import pytest
import structlog
from aioquic.quic.packet import QuicErrorCode

from links import (
    PATIENCE_S,
    connected,
    digest,
    linked,
    noise,
    pair,
    ping_pong,
    read_all,
    serving,
    sizes,
    unread_bytes,
    until,
    url_of,
)
from quorate_protocol.errors import Code, ConnectionClosed, ResetByPeer, StoppedByPeer
from quorate_protocol.limits import (
    CLASS_WRITE_BYTES_HIGH,
    CONNECTION_WINDOW_BYTES,
    FRAME_BYTES_MAX,
    FRAME_PREFIX_BYTES,
    STREAM_WINDOW_BYTES,
    STREAM_WRITE_BYTES_HIGH,
    STREAMS_MAX,
)
from quorate_protocol.transport import Priority

#: What a stream of `pair` holds unread when its window is full: one byte was read, too little to open it further.
FULL_BYTES = STREAM_WINDOW_BYTES - 1


@pytest.fixture
async def link(credentials):
    async with linked(credentials) as link:
        yield link


# --- of the reader ---


async def test_a_reader_that_never_reads_holds_its_sender_at_the_window(link):
    here, there = await pair(link)
    other = await pair(link)
    data = noise(8 << 20)
    accepted_bytes = 0

    async def upload():
        nonlocal accepted_bytes
        for position in range(0, len(data), 100_000):
            chunk = data[position : position + 100_000]
            await here.send(chunk)
            accepted_bytes += len(chunk)
        await here.finish()

    uploading = asyncio.create_task(upload())
    await until(lambda: unread_bytes(there) == FULL_BYTES)
    await ping_pong(*other, times=30)
    assert unread_bytes(there) == FULL_BYTES
    assert not uploading.done()
    assert accepted_bytes <= STREAM_WINDOW_BYTES + STREAM_WRITE_BYTES_HIGH + 100_000
    # It was held, not broken.
    received = await read_all(there)
    await uploading
    assert digest(received) == digest(data)


async def test_unread_streams_stay_under_the_connections_window_and_one_that_is_read_goes_on(link):
    # Eight hold almost all of the connection's window; the ninth is read, beside them.
    unread = []
    for _ in range(7):
        stream = await link.here.open_uni_stream()
        stream.send_nowait(b"u" * (2 << 20))
        unread.append(await link.there.accept_uni_stream())
    await until(lambda: sum(map(unread_bytes, unread)) == 7 * STREAM_WINDOW_BYTES)
    here, there = await pair(link)
    data = noise(3 << 20)
    here.send_nowait(data)
    await here.finish()
    received = await read_all(there)
    assert digest(received) == digest(data)
    assert sum(map(unread_bytes, unread)) == 7 * STREAM_WINDOW_BYTES
    # With one more, the connection's window is full: nothing else gets in, and nothing more is buffered.
    here, there = await pair(link)
    here.send_nowait(b"u" * (2 << 20))
    await until(lambda: unread_bytes(there) >= STREAM_WINDOW_BYTES - 64)
    waiting, waiting_there = await pair_without_data(link)
    waiting.send_nowait(b"x" * 100)
    link.here.datagrams.send(b"not under flow control")
    async with asyncio.timeout(PATIENCE_S):
        await link.there.datagrams.receive()
    assert sum(map(unread_bytes, [*unread, there, waiting_there])) <= CONNECTION_WINDOW_BYTES
    # Giving one up gives its bytes back.
    unread[0].stop(Code.CANCELLED)
    async with asyncio.timeout(PATIENCE_S):
        await waiting.finish()
        assert await read_all(waiting_there) == b"x" * 100


async def pair_without_data(link):
    """A stream that is known there because its opener wants nothing from it."""
    here = await link.here.open_bi_stream()
    here.stop(Code.CANCELLED)
    async with asyncio.timeout(PATIENCE_S):
        return here, await link.there.accept_bi_stream()


@pytest.mark.parametrize("how", ["reset", "stop", "reset in flight"])
async def test_streams_that_end_early_give_their_window_back(link, how):
    """Many times the connection's window goes down streams that are never read to their end."""
    for _ in range(3 * CONNECTION_WINDOW_BYTES // STREAM_WINDOW_BYTES):
        here = await link.here.open_uni_stream()
        here.send_nowait(bytes(STREAM_WINDOW_BYTES))
        if how == "reset in flight":
            # Before most of it has left, or while it is under way.
            await asyncio.sleep(0)
            here.reset(Code.CANCELLED)
        async with asyncio.timeout(PATIENCE_S):
            there = await link.there.accept_uni_stream()
            if how == "stop":
                there.stop(Code.CANCELLED)
                await until(lambda: here.send_is_over)  # noqa: B023  awaited here
                continue
            if how == "reset":
                await until(lambda: unread_bytes(there) == STREAM_WINDOW_BYTES)  # noqa: B023
                here.reset(Code.CANCELLED)
                await until(lambda: there.receive_is_over)  # noqa: B023
                there.stop(Code.CANCELLED)  # drops what is unread
                continue
            with pytest.raises(ResetByPeer):
                await read_all(there)
    await ping_pong(*await pair(link))
    quic = link.there.engine._quic
    assert quic._window.consumed_bytes == quic._local_max_data.used


async def test_bytes_lost_before_a_reset_are_not_lost_to_the_connections_window(link):
    """A reset stream sends nothing again, and yet all that it ever sent counts against the window."""
    here, there = await pair(link)
    send = link.here._driver._port.send
    link.here._driver._port.send = lambda datagrams: None  # the network loses what leaves now
    here.send_nowait(bytes(500_000))
    await until(lambda: here._connection.engine._quic._streams[here.id].sender.highest_offset > 10_000)
    link.here._driver._port.send = send
    here.reset(Code.CANCELLED)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ResetByPeer):
            await read_all(there)
    quic = link.there.engine._quic
    assert quic._local_max_data.used > 10_000
    assert quic._window.consumed_bytes == quic._local_max_data.used


async def test_single_bytes_do_not_swell_in_the_receivers_memory(link):
    here, there = await pair(link)
    for number in range(2_000):
        there.on_data(b"%d" % (number % 10), False)
    assert len(there._unread) < 10
    assert unread_bytes(there) == 2_000
    await here.finish()


# --- of the writer ---


async def test_send_sleeps_over_the_watermark_and_wakes_on_acknowledgements(link):
    here, there = await pair(link)
    await here.send(bytes(STREAM_WRITE_BYTES_HIGH - 1))  # under the watermark: does not sleep
    assert here.unsent_bytes == STREAM_WRITE_BYTES_HIGH - 1
    sending = asyncio.create_task(here.send(b"x"))
    await asyncio.sleep(0)
    assert not sending.done()
    # What fills the window there is acknowledged, read or not; one byte is missing to the lower mark.
    await until(lambda: here.unsent_bytes == STREAM_WRITE_BYTES_HIGH - FULL_BYTES)
    await ping_pong(*await pair(link), times=10)
    assert here.unsent_bytes == STREAM_WRITE_BYTES_HIGH // 2 + 1
    assert not sending.done()
    async with asyncio.timeout(PATIENCE_S):
        while not sending.done():
            await there.receive()
        await sending
    assert here.unsent_bytes <= STREAM_WRITE_BYTES_HIGH // 2


async def test_a_full_class_holds_its_own_writers_and_lets_a_critical_one_pass(link):
    """Each stream is under its own mark, all of them together are over that of the class."""
    count = CLASS_WRITE_BYTES_HIGH // (STREAM_WRITE_BYTES_HIGH - 1) + 2
    bulk = [await link.here.open_uni_stream() for _ in range(count)]
    sending = [asyncio.create_task(stream.send(bytes(STREAM_WRITE_BYTES_HIGH - 1))) for stream in bulk]
    held = link.here.engine.unacknowledged_class_bytes
    await until(lambda: held(Priority.NORMAL) >= CLASS_WRITE_BYTES_HIGH - CONNECTION_WINDOW_BYTES)
    readers = [await link.there.accept_uni_stream() for _ in range(5)]
    assert any(not task.done() for task in sending)
    assert held(Priority.NORMAL) < CLASS_WRITE_BYTES_HIGH + STREAM_WRITE_BYTES_HIGH

    async with asyncio.timeout(PATIENCE_S):
        urgent = await link.here.open_uni_stream(Priority.CRITICAL)
        await urgent.send(b"at once")
        # One that waits may be made urgent, and then passes as well.
        waiting, stream = next((task, one) for task, one in zip(sending, bulk, strict=True) if not task.done())
        stream.priority = Priority.HIGH
        await waiting
    assert held(Priority.HIGH) > 0
    await link.here.close()
    await asyncio.gather(*sending, return_exceptions=True)
    assert readers


async def test_two_tasks_sending_at_once_is_an_error_before_anything_was_sent(link):
    here, there = await pair(link)
    data = noise(6 << 20)
    sending = asyncio.create_task(here.send(data))
    await until(lambda: unread_bytes(there) == FULL_BYTES)
    received = b""
    # Whatever the level: also between the marks, when the first is about to wake.
    while not sending.done():
        with pytest.raises(RuntimeError, match="two tasks send at once"):
            await here.send(b"in between")
        received += await there.receive()
    await here.finish()
    received += await read_all(there)
    assert digest(received) == digest(data)


async def test_nothing_gets_into_the_middle_of_what_is_being_sent(link):
    here, there = await pair(link)
    data = noise(6 << 20)
    sending = asyncio.create_task(here.send(data))
    await until(lambda: unread_bytes(there) == FULL_BYTES)
    with pytest.raises(RuntimeError, match="in the middle"):
        here.send_nowait(b"in between")
    reading = asyncio.create_task(read_all(there))
    await sending
    here.send_nowait(b"behind")
    await here.finish()
    assert digest(await reading) == digest(data + b"behind")


async def test_a_cancelled_send_of_a_frame_has_sent_all_of_it_or_nothing(link):
    here, there = await pair(link)
    frame_bytes = FRAME_PREFIX_BYTES + FRAME_BYTES_MAX
    frames = [bytes([number]) * frame_bytes for number in range(8)]
    for frame in frames:
        sending = asyncio.create_task(here.send(frame))
        for _ in range(3):
            await asyncio.sleep(0)
        sending.cancel()
        await asyncio.wait([sending])
    reading = asyncio.create_task(read_all(there))
    async with asyncio.timeout(PATIENCE_S):
        await here.send(b"the end")
        await here.finish()
        received = await reading
    assert received.endswith(b"the end")
    body = received.removesuffix(b"the end")
    assert len(body) % frame_bytes == 0
    assert len(body) >= 2 * frame_bytes  # what fits under the watermark went out
    sent = [body[position] for position in range(0, len(body), frame_bytes)]
    assert body == b"".join(frames[number] for number in sent)
    assert sent == sorted(set(sent))


async def test_reset_wakes_a_sleeping_send_at_once(link):
    here, there = await pair(link)
    sending = asyncio.create_task(here.send(bytes(8 << 20)))
    await until(lambda: unread_bytes(there) == FULL_BYTES)
    here.reset(Code.CANCELLED)
    for _ in range(2):
        await asyncio.sleep(0)
    assert sending.done()  # before the peer can have heard of it
    with pytest.raises(RuntimeError, match="reset"):
        await sending


async def test_a_sleeping_send_hears_of_a_stop_though_all_was_handed_over(link):
    here, there = await pair(link)
    here.send_nowait(bytes(STREAM_WRITE_BYTES_HIGH - 1))
    sending = asyncio.create_task(here.send(b"x"))
    await until(lambda: unread_bytes(there) == FULL_BYTES)
    assert not sending.done()
    there.stop(Code.BUSY)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(StoppedByPeer):
            await sending


async def test_flush_and_send_may_wait_in_two_tasks(link):
    here, there = await pair(link)
    sending = asyncio.create_task(here.send(bytes(4 << 20)))
    flushing = asyncio.create_task(here.flush())
    await until(lambda: unread_bytes(there) == FULL_BYTES)
    reading = asyncio.create_task(read_all(there))
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(sending, flushing)
        await here.finish()
        assert len(await reading) == 4 << 20


# --- of whoever accepts ---


@pytest.mark.parametrize("kind", ["bi", "uni"])
async def test_opening_waits_at_the_peers_limit_and_goes_on_when_streams_end(link, kind):
    other = await pair(link)

    async def open_stream():
        return await (link.here.open_bi_stream() if kind == "bi" else link.here.open_uni_stream())

    streams = [await open_stream() for _ in range(STREAMS_MAX - (kind == "bi"))]
    for stream in streams:
        await stream.send(b"here")
    assert link.here.stats.streams_open == STREAMS_MAX + (kind == "uni")
    opening = asyncio.create_task(open_stream())
    given_up = asyncio.create_task(open_stream())
    await ping_pong(*other, times=10)
    assert not opening.done()
    given_up.cancel()
    await asyncio.wait([given_up])
    # One that ends makes room; it has to have been accepted there.
    await streams[0].finish()
    async with asyncio.timeout(PATIENCE_S):
        there = await (link.there.accept_bi_stream() if kind == "bi" else link.there.accept_uni_stream())
        assert await read_all(there) == b"here"
        if kind == "bi":
            await there.finish()
            assert await streams[0].receive() == b""
        stream = await opening
        await stream.send(b"go on")
        await stream.finish()


async def test_streams_that_nobody_accepts_hold_their_opener_even_when_they_have_ended(link):
    other = await pair(link)
    for _ in range(STREAMS_MAX):
        await (await link.here.open_uni_stream()).finish()
    opening = asyncio.create_task(link.here.open_uni_stream())
    await until(lambda: len(link.there._incoming_uni) == STREAMS_MAX)
    await until(lambda: not link.there.engine._quic._finished)
    await ping_pong(*other, times=20)
    assert not opening.done()
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(STREAMS_MAX):
            assert await (await link.there.accept_uni_stream()).receive() == b""
        await (await opening).finish()
        await link.there.accept_uni_stream()
    assert len(link.there._incoming_uni) == 0


async def test_a_peer_that_breaks_the_limit_of_unaccepted_streams_is_closed_and_others_live(credentials):
    async with serving(credentials) as server:
        good = await connected(server, url_of(server), credentials)
        bad = await connected(server, url_of(server), credentials)
        bad.here.engine._quic._remote_max_streams_uni = 1 << 40
        for _ in range(STREAMS_MAX):
            await (await bad.here.open_uni_stream()).finish()
        await until(lambda: len(bad.there._incoming_uni) == STREAMS_MAX)
        await ping_pong(*await pair(bad))
        for _ in range(64):
            if not bad.here.is_closed:
                await (await bad.here.open_uni_stream()).finish()
        await until(lambda: bad.here.is_closed and bad.there.is_closed)
        assert len(bad.there._incoming_uni) == STREAMS_MAX
        assert bad.here.close_error.transport
        assert bad.here.close_error.code == QuicErrorCode.STREAM_LIMIT_ERROR
        await ping_pong(*await pair(good))
        await good.here.close()


async def test_thousands_of_streams_over_a_connections_life_leave_nothing_behind(link):
    async def serve():
        while True:
            stream = await link.there.accept_bi_stream()
            request = await stream.receive()
            await stream.send(request)
            # The end comes alone, after everything was read.
            assert await stream.receive() == b""
            await stream.finish()

    async def call(number):
        stream = await link.here.open_bi_stream()
        await stream.send(b"%d" % number)
        assert await stream.receive() == b"%d" % number
        await stream.finish()
        assert await stream.receive() == b""

    serving_task = asyncio.create_task(serve())
    async with asyncio.timeout(4 * PATIENCE_S):
        for number in range(3_000):
            await call(number)
    serving_task.cancel()
    await asyncio.wait([serving_task])
    assert link.here.stats.streams_open == link.there.stats.streams_open == 0
    for end in (link.here, link.there):
        await until(lambda: not end.engine._quic._streams)  # noqa: B023  awaited here
        grown = {name: size for name, size in sizes(end).items() if size > 256}
        assert grown == {}
    endpoint = link.server._endpoint
    assert len(endpoint._routes) <= 16
    assert len(endpoint._timers) == 1


@pytest.mark.parametrize("leaves", ["another class", "a reset"])
async def test_room_that_another_stream_makes_in_a_class_wakes_who_waits_for_it(link, leaves):
    full, waiting = [await link.here.open_uni_stream() for _ in range(2)]
    for _ in range(CLASS_WRITE_BYTES_HIGH >> 20):
        full.send_nowait(bytes(1 << 20))
    await until(lambda: link.there.stats.streams_open)
    unread = await link.there.accept_uni_stream()
    await until(lambda: unread_bytes(unread) == STREAM_WINDOW_BYTES)
    sending = asyncio.create_task(waiting.send(b"x" * STREAM_WRITE_BYTES_HIGH))
    await asyncio.sleep(0)
    assert not sending.done()
    if leaves == "a reset":
        full.reset(Code.CANCELLED)
    else:
        full.priority = Priority.LOW
    # At once, and not when the peer next says something.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert waiting.unsent_bytes
    sending.cancel()
    await asyncio.wait((sending,))


async def test_a_send_whose_own_write_ends_the_connection_hears_of_it(link, monkeypatch):
    stream = await link.here.open_uni_stream()
    await stream.send(b"before")
    await stream.flush()
    await until(lambda: not link.here.in_turn)

    def fail(*_):
        raise ArithmeticError("the engine has a bug")

    monkeypatch.setattr(link.here.engine, "datagrams_to_send", fail)
    with structlog.testing.capture_logs() as logs, pytest.raises(ConnectionClosed):
        async with asyncio.timeout(PATIENCE_S):
            await stream.send(bytes(8 << 20))
    assert [entry["event"] for entry in logs] == ["engine_failed"]

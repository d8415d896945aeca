"""Whose turn it is to send: passes are bounded, the urgent go first, and nobody is forgotten."""

import asyncio
import contextlib

from links import connected, noise, pair, read_exactly, serving, until, url_of
from quorate_protocol.transport import Priority
from quorate_protocol.transport import endpoint as endpoint_module


async def test_one_connections_bulk_leaves_turns_to_the_others(credentials, monkeypatch):
    """Passes are bounded, and who has more waits until the others had theirs."""
    monkeypatch.setattr(endpoint_module, "PASS_DATAGRAMS_MAX", 4)
    async with serving(credentials) as server:
        link = await connected(server, url_of(server), credentials)
        other = await connected(server, url_of(server), credentials)
        streams, others = await pair(link), await pair(other)
        served: list[object] = []
        serve = server._endpoint._serve
        monkeypatch.setattr(
            server._endpoint, "_serve", lambda connection, now: (served.append(connection), serve(connection, now))[1]
        )
        data = noise(1_000_000)
        streams[1].send_nowait(data)
        others[1].send_nowait(b"small")
        reading = asyncio.create_task(read_exactly(streams[0], len(data)))
        assert await read_exactly(others[0], 5) == b"small"
        assert not reading.done()
        assert served[:2] == [link.there, other.there]
        assert await reading == data
        for client in (link.here, other.here):
            await client.close()


@contextlib.asynccontextmanager
async def crowd(credentials, monkeypatch, count: int):
    """A server's streams to so many clients, and whom it serves from then on, with the bytes of each pass."""
    async with serving(credentials) as server, contextlib.AsyncExitStack() as ends:
        streams = []
        for _ in range(count):
            link = await connected(server, url_of(server), credentials)
            ends.push_async_callback(link.here.close)
            streams.append((link, *await pair(link)))
        served: list[tuple[object, int]] = []
        endpoint = server._endpoint
        serve = endpoint._serve

        def note(connection, now):
            before = connection.stats.bytes_sent
            work = serve(connection, now)
            served.append((connection, connection.stats.bytes_sent - before))
            return work

        await until(lambda: not endpoint._turn)
        monkeypatch.setattr(endpoint, "_serve", note)
        yield endpoint, streams, served


async def test_who_has_something_urgent_to_say_goes_before_others_bulk(credentials, monkeypatch):
    async with crowd(credentials, monkeypatch, 9) as (endpoint, streams, served):
        small_link, small_here, small_there = streams.pop()
        small_there.priority = Priority.HIGH
        # The loop's turn is ours until the first `await`: all of them wait for their passes.
        endpoint._schedule_turn()
        for _, _, there in streams:
            there.send_nowait(bytes(1_000_000))
        small_there.send_nowait(b"small")
        assert await read_exactly(small_here, 5) == b"small"
        assert served[0][0] is small_link.there
        for _, here, _ in streams:
            await read_exactly(here, 1_000_000)


async def test_an_urgent_word_takes_little_of_its_connections_bulk_along(credentials, monkeypatch):
    async with crowd(credentials, monkeypatch, 2) as (endpoint, streams, served):
        (first, *_), (other, here, there) = streams
        # Long enough for larger windows and packets.
        there.send_nowait(bytes(4_000_000))
        await read_exactly(here, 4_000_000)
        urgent = await other.there.open_uni_stream(Priority.HIGH)
        await until(lambda: not endpoint._turn)
        served.clear()
        endpoint._schedule_turn()
        endpoint.wants_turn(first.there)
        there.send_nowait(bytes(1_000_000))
        urgent.send_nowait(b"small")
        await read_exactly(here, 1_000_000)
        assert served[0][0] is other.there
        assert 0 < served[0][1] <= 64 << 10
        assert max(sent_bytes for _, sent_bytes in served) > 64 << 10


async def test_those_without_anything_urgent_get_their_turn_all_the_same(credentials, monkeypatch):
    """More urgent words than a turn can send, again and again, and one body."""
    monkeypatch.setattr(endpoint_module, "_TURN_DATAGRAMS_MAX", 6)
    async with crowd(credentials, monkeypatch, 9) as (endpoint, streams, _):
        _, here, there = streams.pop()
        for _, _, talking in streams:
            talking.priority = Priority.HIGH
        is_over = False

        def talk() -> None:
            for _, _, talking in streams:
                talking.send_nowait(b"small")
            if not is_over:
                endpoint._loop.call_soon(talk)

        talk()
        there.send_nowait(bytes(300_000))
        try:
            assert len(await read_exactly(here, 300_000)) == 300_000
        finally:
            is_over = True

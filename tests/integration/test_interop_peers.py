"""Our ends against implementations that are not ours, in both versions of QUIC, with megabytes and large packets."""

import asyncio
import contextlib

import pytest

from links import PATIENCE_S, digest, noise, read_all, read_exactly, serving, until
from other_quic import AIOQUIC, QH3, VERSION_1, VERSION_2, Sniffer, saying
from quorate_protocol.errors import Code, ResetByPeer, StoppedByPeer
from quorate_protocol.transport import ALPN, ClientTls, connect

VERSIONS = {"v1": VERSION_1, "v2": VERSION_2}


@pytest.fixture(params=[AIOQUIC, QH3], ids=lambda library: library.name)
def library(request):
    return request.param


@pytest.fixture(params=VERSIONS)
def version(request):
    return VERSIONS[request.param]


@contextlib.asynccontextmanager
async def their_client(library, credentials, version, **options):
    """Their client and our end of its connection, and what passes between them."""
    async with serving(credentials) as server:
        with contextlib.closing(Sniffer(server.address)) as sniffer:
            async with (
                asyncio.timeout(2 * PATIENCE_S),
                library.connect(credentials, sniffer.port, versions=(version,), **options) as client,
            ):
                yield client, await server.accept(), sniffer


@contextlib.asynccontextmanager
async def their_server(library, credentials, versions, **options):
    """Our end of a connection to their server, theirs, and what passes between them."""
    async with library.serve(credentials, versions=versions, **options) as (port, connections):
        with contextlib.closing(Sniffer(("127.0.0.1", port))) as sniffer:
            tls = ClientTls(ca_file=credentials.ca_file)
            async with (
                asyncio.timeout(2 * PATIENCE_S),
                await connect(f"quic://127.0.0.1:{sniffer.port}", tls=tls) as here,
            ):
                yield here, connections[-1], sniffer


# --- their client, our server ---


async def test_their_client_and_our_server_exchange_megabytes_and_datagrams(library, credentials, version):
    async with their_client(library, credentials, version) as (client, there, sniffer):
        assert there.protocol == ALPN
        assert sniffer.agreed_version == version
        data = noise(1 << 20)
        stream_id = client.send(data)
        stream = await there.accept_bi_stream()
        assert stream.id == stream_id
        assert digest(await read_all(stream)) == digest(data)
        await stream.send(data[::-1])
        await stream.finish()
        assert digest(await client.receive_all(stream_id)) == digest(data[::-1])

        uni_id = client.send(b"one way", uni=True)
        uni = await there.accept_uni_stream()
        assert (uni.id, await read_all(uni)) == (uni_id, b"one way")
        back = await there.open_uni_stream()
        await back.send(b"and back")
        await back.finish()
        assert await client.receive_all(back.id) == b"and back"
        opened = await there.open_bi_stream()
        await opened.send(b"opened by the server")
        await opened.finish()
        assert await client.receive_all(opened.id) == b"opened by the server"

        client._quic.send_datagram_frame(b"a datagram")
        client.transmit()
        assert await there.datagrams.receive() == b"a datagram"
        largest = noise(there.datagrams.max_bytes)
        there.datagrams.send(largest)
        await until(lambda: client.seen["DatagramFrameReceived"])
        assert client.seen["DatagramFrameReceived"][0].data == largest


async def test_their_client_hears_resets_stops_and_the_close(library, credentials, version):
    async with their_client(library, credentials, version) as (client, there, _):
        client.send(b"hello", end=False)
        stream = await there.accept_bi_stream()
        assert await read_exactly(stream, 5) == b"hello"
        stream.reset(Code.CANCELLED)
        stream.stop(Code.BUSY)
        await until(lambda: client.seen["StreamReset"] and client.seen["StopSendingReceived"])
        assert client.seen["StreamReset"][0].error_code == Code.CANCELLED
        assert client.seen["StopSendingReceived"][0].error_code == Code.BUSY

        stream_id = client.send(b"hello", end=False)
        stream = await there.accept_bi_stream()
        assert await read_exactly(stream, 5) == b"hello"
        client._quic.reset_stream(stream_id, 77)
        client._quic.stop_stream(stream_id, 78)
        client.transmit()
        with pytest.raises(ResetByPeer) as reset:
            await stream.receive()
        await until(lambda: stream.send_is_over)
        with pytest.raises(StoppedByPeer) as stopped:
            await stream.send(b"x")
        assert (reset.value.code, stopped.value.code) == (77, 78)

        await there.close(Code.SHUTDOWN, "closing time")
        await until(lambda: client.seen["ConnectionTerminated"])
        (ended,) = client.seen["ConnectionTerminated"]
        assert (ended.error_code, ended.reason_phrase) == (Code.SHUTDOWN, "closing time")


async def test_their_clients_close_is_told(library, credentials, version):
    async with their_client(library, credentials, version) as (client, there, _):
        client._quic.close(error_code=3, reason_phrase="enough")
        client.transmit()
        await there.wait_closed()
        error = there.close_error
        assert (error.by_peer, error.transport, error.code, error.reason) == (True, False, 3, "enough")


async def test_their_client_goes_through_many_streams(library, credentials, version):
    async with their_client(library, credentials, version) as (client, there, _):
        for number in range(300):
            stream_id = client.send(b"%d" % number)
            stream = await there.accept_bi_stream()
            await stream.send(await read_all(stream))
            await stream.finish()
            assert await client.receive_all(stream_id) == b"%d" % number
        assert there.stats.streams_open == 0


async def test_a_client_that_offers_both_versions_is_served_in_one_of_them(credentials):
    """RFC 9368: a server may change to another version in its first answer, or stay with the client's."""
    for versions in ((VERSION_1, VERSION_2), (VERSION_2, VERSION_1)):
        async with serving(credentials) as server:
            with contextlib.closing(Sniffer(server.address)) as sniffer:
                async with (
                    asyncio.timeout(PATIENCE_S),
                    AIOQUIC.connect(
                        credentials, sniffer.port, versions=versions, original_version=versions[0]
                    ) as client,
                ):
                    there = await server.accept()
                    stream_id = client.send(noise(100_000))
                    assert digest(await read_all(await there.accept_bi_stream())) == digest(noise(100_000))
                    assert sniffer.agreed_version in versions
                    assert stream_id == 0


# --- our client, their server ---


@pytest.mark.parametrize("retry", [False, True], ids=["at once", "after a retry"])
async def test_our_client_and_their_server_exchange_megabytes_and_datagrams(library, credentials, version, retry):
    """A server of the second version only is found by version negotiation."""
    async with their_server(library, credentials, (version,), retry=retry) as (here, there, sniffer):
        assert here.protocol == ALPN
        assert sniffer.agreed_version == version
        data = noise(1 << 20)
        stream = await here.open_bi_stream()
        reading = asyncio.create_task(read_all(stream))
        await stream.send(data)
        await stream.finish()
        assert digest(await reading) == digest(data)
        uni = await here.open_uni_stream()
        await uni.send(data)
        await uni.finish()
        await uni.flush()
        assert digest(await there.receive_all(uni.id)) == digest(data)
        back_id = there.send(b"opened by the server")
        back = await here.accept_bi_stream()
        assert (back.id, await read_all(back)) == (back_id, b"opened by the server")
        largest = noise(here.datagrams.max_bytes)
        here.datagrams.send(largest)
        # Its echo may be too large for what the other side sends; that it came is seen there.
        await until(lambda: there.seen["DatagramFrameReceived"])
        assert there.seen["DatagramFrameReceived"][0].data == largest


async def test_our_client_hears_their_servers_resets_and_stops(library, credentials, version):
    async with their_server(library, credentials, (version,)) as (here, there, _):
        there.echoes = False
        stream = await here.open_bi_stream()
        await stream.send(b"hello")
        await until(lambda: there.data[stream.id] == b"hello")
        there._quic.send_stream_data(stream.id, b"some", False)
        there._quic.reset_stream(stream.id, 77)
        there._quic.stop_stream(stream.id, 78)
        there.transmit()
        with pytest.raises(ResetByPeer) as reset:
            while await stream.receive():
                pass
        await until(lambda: stream.send_is_over)
        with pytest.raises(StoppedByPeer) as stopped:
            await stream.send(b"x")
        assert (reset.value.code, stopped.value.code) == (77, 78)

        stream = await here.open_bi_stream()
        await stream.send(b"hello")
        await until(lambda: there.data[stream.id] == b"hello")
        stream.reset(Code.CANCELLED)
        stream.stop(Code.BUSY)
        await until(lambda: there.seen["StreamReset"][-1:] and there.seen["StopSendingReceived"])
        assert there.seen["StreamReset"][-1].error_code == Code.CANCELLED
        assert there.seen["StopSendingReceived"][-1].error_code == Code.BUSY
        await here.close(5, "that was all")
        await until(lambda: there.seen["ConnectionTerminated"])
        (ended,) = there.seen["ConnectionTerminated"]
        assert (ended.error_code, ended.reason_phrase) == (5, "that was all")


async def test_our_client_goes_through_more_streams_than_their_server_allows_at_once(library, credentials):
    async with their_server(library, credentials, (VERSION_1,)) as (here, _, _):
        for number in range(300):
            stream = await here.open_bi_stream()
            await stream.send(b"%d" % number)
            await stream.finish()
            assert await read_all(stream) == b"%d" % number
        assert here.stats.streams_open == 0


# --- large packets ---


@contextlib.asynccontextmanager
async def sending(side, library, credentials):
    """Our end, theirs, and a look at the largest datagram that we have sent."""
    if side == "our server":
        async with their_client(library, credentials, VERSION_1) as (client, there, sniffer):
            yield there, client, lambda: sniffer.largest_bytes["down"]
    else:
        async with their_server(library, credentials, (VERSION_1,)) as (here, there, sniffer):
            yield here, there, lambda: sniffer.largest_bytes["up"]


@pytest.mark.parametrize("side", ["our server", "our client"])
async def test_five_megabytes_from_us_arrive_intact_however_large_the_packets_grow(library, credentials, side):
    data = noise(5 << 20)
    async with sending(side, library, credentials) as (ours, theirs, largest_bytes):
        stream = await ours.open_uni_stream()
        await stream.send(data)
        await stream.finish()
        assert digest(await theirs.receive_all(stream.id)) == digest(data)
        if library is AIOQUIC:
            # It states no ceiling, and loopback has none. (What qh3 states is its own affair.)
            assert largest_bytes() > 8000


@pytest.mark.parametrize("side", ["our server", "our client"])
@pytest.mark.parametrize("ceiling", [1200, 1300, 4000])
async def test_a_peer_is_never_sent_more_than_it_says_that_it_takes(credentials, side, ceiling):
    data = noise(2 << 20)
    library = saying(max_udp_payload_size=ceiling)
    async with sending(side, library, credentials) as (ours, theirs, largest_bytes):
        stream = await ours.open_uni_stream()
        await stream.send(data)
        await stream.finish()
        assert digest(await theirs.receive_all(stream.id)) == digest(data)
        assert largest_bytes() <= ceiling

"""Our ends of a link against stock aioquic's: the wire is QUIC's, and no agreement between ourselves."""

import asyncio
import contextlib
from collections import defaultdict

import pytest
from aioquic.asyncio import QuicConnectionProtocol
from aioquic.asyncio import connect as stock_connect
from aioquic.asyncio import serve as stock_serve
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import (
    ConnectionTerminated,
    DatagramFrameReceived,
    HandshakeCompleted,
    StopSendingReceived,
    StreamDataReceived,
    StreamReset,
)

from links import PATIENCE_S, digest, noise, read_all, read_exactly, serving, unread_bytes, until
from quorate_protocol.errors import Code, ConnectFailed, DatagramTooLarge, ResetByPeer, StoppedByPeer
from quorate_protocol.limits import STREAM_WINDOW_BYTES, STREAMS_MAX
from quorate_protocol.transport import ALPN, ClientTls, connect


class Stock(QuicConnectionProtocol):
    """A stock connection that keeps its events, and as a server echoes streams and datagrams."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []
        self.data = defaultdict(bytes)
        self.ended = set()

    def quic_event_received(self, event):
        self.seen.append(event)
        if isinstance(event, StreamDataReceived):
            self.data[event.stream_id] += event.data
            if event.end_stream:
                self.ended.add(event.stream_id)
        if self._quic.configuration.is_client:
            return
        if isinstance(event, DatagramFrameReceived):
            self._quic.send_datagram_frame(event.data)
        elif isinstance(event, StreamDataReceived) and not event.stream_id & 2:
            self._quic.send_stream_data(event.stream_id, event.data, event.end_stream)

    def of(self, kind):
        return [event for event in self.seen if isinstance(event, kind)]

    def send(self, data, *, end=True):
        """Opens a bidirectional stream that begins with this; returns its id."""
        stream_id = self._quic.get_next_available_stream_id()
        self._quic.send_stream_data(stream_id, data, end)
        self.transmit()
        return stream_id

    async def receive_all(self, stream_id):
        await until(lambda: stream_id in self.ended)
        return self.data[stream_id]


def configuration(credentials, *, is_client, **options):
    made = QuicConfiguration(
        is_client=is_client, alpn_protocols=[ALPN], **{"max_datagram_frame_size": 65_536, **options}
    )
    if is_client:
        made.load_verify_locations(str(credentials.ca_file))
        made.server_name = "localhost"
    else:
        made.load_cert_chain(credentials.certificate_file, credentials.key_file)
    return made


@contextlib.asynccontextmanager
async def stock_server(credentials, **options):
    """A stock server; yields its port and its connections."""
    connections = []

    def create(*args, **kwargs):
        connections.append(Stock(*args, **kwargs))
        return connections[-1]

    retry = options.pop("retry", False)
    server = await stock_serve(
        "127.0.0.1", 0, configuration=configuration(credentials, is_client=False, **options),
        create_protocol=create, retry=retry,
    )  # fmt: skip
    try:
        yield server._transport.get_extra_info("sockname")[1], connections
    finally:
        server.close()


# --- a stock client, our server ---


@pytest.fixture
async def stock_client(credentials):
    """A stock client and our end of its connection."""
    async with (
        serving(credentials) as server,
        stock_connect(
            *server.address, configuration=configuration(credentials, is_client=True), create_protocol=Stock
        ) as client,
    ):
        async with asyncio.timeout(PATIENCE_S):
            there = await server.accept()
        yield client, there


async def test_a_stock_client_and_our_server_exchange_streams_and_datagrams(stock_client):
    client, there = stock_client
    assert there.protocol == ALPN
    async with asyncio.timeout(PATIENCE_S):
        data = noise(400_000)
        stream_id = client.send(data)
        stream = await there.accept_bi_stream()
        assert stream.id == stream_id
        received = await read_all(stream)
        assert digest(received) == digest(data)
        await stream.send(data)
        await stream.finish()
        assert digest(await client.receive_all(stream_id)) == digest(data)

        uni = await there.open_uni_stream()
        await uni.send(b"from the server")
        await uni.finish()
        assert await client.receive_all(uni.id) == b"from the server"

        client._quic.send_datagram_frame(b"a datagram")
        client.transmit()
        assert await there.datagrams.receive() == b"a datagram"
        there.datagrams.send(bytes(there.datagrams.max_bytes))
        await until(lambda: client.of(DatagramFrameReceived))
        assert client.of(DatagramFrameReceived)[0].data == bytes(there.datagrams.max_bytes)
        client.close(error_code=3, reason_phrase="enough")
        await there.wait_closed()
        error = there.close_error
        assert (error.by_peer, error.transport, error.code, error.reason) == (True, False, 3, "enough")


async def test_a_stock_client_hears_resets_stops_and_the_close(stock_client):
    client, there = stock_client
    async with asyncio.timeout(PATIENCE_S):
        client.send(b"hello", end=False)
        stream = await there.accept_bi_stream()
        stream.reset(Code.CANCELLED)
        stream.stop(Code.BUSY)
        await until(lambda: client.of(StreamReset) and client.of(StopSendingReceived))
        assert client.of(StreamReset)[0].error_code == Code.CANCELLED
        assert client.of(StopSendingReceived)[0].error_code == Code.BUSY

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
        await until(lambda: client.of(ConnectionTerminated))
        (ended,) = client.of(ConnectionTerminated)
        assert (ended.error_code, ended.reason_phrase, ended.frame_type) == (Code.SHUTDOWN, "closing time", None)


async def test_a_stock_sender_is_held_at_the_window_of_a_reader_that_does_not_read(stock_client):
    client, there = stock_client
    async with asyncio.timeout(PATIENCE_S):
        data = noise(3 << 20)
        client.send(data)
        stream = await there.accept_bi_stream()
        await until(lambda: unread_bytes(stream) == STREAM_WINDOW_BYTES)
        for _ in range(5):
            await client.ping()
        assert unread_bytes(stream) == STREAM_WINDOW_BYTES
        assert digest(await read_all(stream)) == digest(data)


async def test_a_stock_client_goes_through_more_streams_than_may_be_open(stock_client):
    client, there = stock_client
    # So many that the limit has to be raised on the way.
    count = STREAMS_MAX + 100
    async with asyncio.timeout(PATIENCE_S):
        ids = [client.send(b"%d" % number) for number in range(count)]
        for _ in ids:
            stream = await there.accept_bi_stream()
            await stream.send(await read_all(stream))
            await stream.finish()
        for number, stream_id in enumerate(ids):
            assert await client.receive_all(stream_id) == b"%d" % number
    assert there.stats.streams_open == 0


# --- our client, a stock server ---


@pytest.mark.parametrize("retry", [False, True], ids=["at once", "after a retry"])
async def test_our_client_and_a_stock_server_exchange_streams_and_datagrams(credentials, retry):
    async with stock_server(credentials, retry=retry) as (port, connections), asyncio.timeout(PATIENCE_S):
        tls = ClientTls(ca_file=credentials.ca_file)
        async with await connect(f"quic://127.0.0.1:{port}", tls=tls) as connection:
            assert connection.protocol == ALPN
            data = noise(400_000)
            stream = await connection.open_bi_stream()
            reading = asyncio.create_task(read_all(stream))
            await stream.send(data)
            await stream.finish()
            assert digest(await reading) == digest(data)
            uni = await connection.open_uni_stream()
            await uni.send(b"hello")
            await uni.finish()
            await uni.flush()
            connection.datagrams.send(b"a datagram")
            assert await connection.datagrams.receive() == b"a datagram"
            # More streams than a stock server allows from the start.
            for number in range(300):
                stream = await connection.open_bi_stream()
                await stream.send(b"%d" % number)
                await stream.finish()
                assert await read_all(stream) == b"%d" % number
            assert connection.stats.streams_open == 0
        await until(lambda: connections[-1].of(ConnectionTerminated))
        assert connections[-1].of(HandshakeCompleted)[0].alpn_protocol == ALPN


async def test_a_server_that_takes_no_datagrams_is_not_sent_any(credentials):
    async with (
        stock_server(credentials, max_datagram_frame_size=None) as (port, _),
        asyncio.timeout(PATIENCE_S),
        await connect(f"quic://127.0.0.1:{port}", tls=ClientTls(ca_file=credentials.ca_file)) as connection,
    ):
        assert connection.datagrams.max_bytes == 0
        with pytest.raises(DatagramTooLarge):
            connection.datagrams.send(b"x")
        stream = await connection.open_bi_stream()
        await stream.send(b"all the same")
        assert await read_exactly(stream, 12) == b"all the same"


async def test_the_largest_datagram_fits_whatever_the_length_of_the_peers_ids(credentials):
    """Ids of up to 20 bytes stand before the data; one that did not fit would hold up all behind it."""
    async with (
        stock_server(credentials, connection_id_length=20) as (port, _),
        asyncio.timeout(PATIENCE_S),
        await connect(f"quic://127.0.0.1:{port}", tls=ClientTls(ca_file=credentials.ca_file)) as connection,
    ):
        largest = noise(connection.datagrams.max_bytes)
        connection.datagrams.send(largest)
        connection.datagrams.send(b"behind it")
        assert await connection.datagrams.receive() == largest
        assert await connection.datagrams.receive() == b"behind it"


async def test_a_server_with_a_small_frame_limit_for_datagrams_is_heeded(credentials):
    async with (
        stock_server(credentials, max_datagram_frame_size=100) as (port, _),
        asyncio.timeout(PATIENCE_S),
        await connect(f"quic://127.0.0.1:{port}", tls=ClientTls(ca_file=credentials.ca_file)) as connection,
    ):
        assert connection.datagrams.max_bytes == 97
        connection.datagrams.send(noise(97))
        assert await connection.datagrams.receive() == noise(97)


async def test_a_stock_server_of_another_protocol_is_named_as_such(credentials):
    async with stock_server(credentials) as (port, _):
        with pytest.raises(ConnectFailed, match="the server speaks none of h3"):
            await connect(f"quic://127.0.0.1:{port}", tls=ClientTls(ca_file=credentials.ca_file), protocols=("h3",))

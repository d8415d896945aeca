"""The operator's client against a coordinator that is played by hand, and misbehaves."""

import asyncio
import contextlib

import pytest

from links import PATIENCE_S, UdpSocket, serving, until, url_of
from quorate_protocol.channel import Channel
from quorate_protocol.client import Client
from quorate_protocol.errors import (
    ArgumentInvalid,
    CallFailed,
    Code,
    ConfigurationError,
    ConnectFailed,
    ConnectionClosed,
    LocalError,
    Refused,
    ResetByPeer,
    UnexpectedMessage,
    UnknownType,
)
from quorate_protocol.messages import (
    Agents,
    Ask,
    CallError,
    Drain,
    Fleet,
    Hello,
    Outcome,
    Refusal,
    Reveal,
    Revealed,
    Welcome,
)
from quorate_protocol.transport import ClientTls

WELCOME = Welcome(session="s", software="played/1", pulse_s=1.0, lease_s=3.0)
OUTCOME = Outcome(round=1, task="classify", state="complete", quorum=1, results=[], duration_s=0.1)


@pytest.fixture
async def server(credentials):
    async with serving(credentials) as server:
        yield server


class Played:
    """A coordinator's end of one operator's connection."""

    def __init__(self, connection, control, hello):
        self.connection = connection
        self.control = control
        self.hello = hello

    async def call(self):
        """The next call: its channel and its request."""
        async with asyncio.timeout(PATIENCE_S):
            channel = Channel(await self.connection.accept_bi_stream())
            return channel, await channel.receive()


async def play(server, answer=WELCOME):
    """Accepts one operator and answers its hello."""
    async with asyncio.timeout(PATIENCE_S):
        connection = await server.accept()
        control = Channel(await connection.accept_bi_stream())
        hello = await control.receive()
        if answer is not None:
            await control.send(answer)
    return Played(connection, control, hello)


def connecting(server, credentials, **options):
    options = {"token": "secret", "tls": ClientTls(ca_file=credentials.ca_file), **options}
    return asyncio.create_task(Client.connect(url_of(server), **options))


@contextlib.asynccontextmanager
async def joined(server, credentials):
    """A client and the coordinator's end of its connection."""
    task = connecting(server, credentials)
    played = await play(server)
    async with asyncio.timeout(PATIENCE_S):
        client = await task
    async with client:
        yield client, played


# --- joining ---


async def test_hello_says_who_and_what_with(server, credentials):
    task = connecting(server, credentials, name="ops-1", role="observer")
    played = await play(server)
    client = await task
    assert isinstance(played.hello, Hello)
    assert (played.hello.id, played.hello.role, played.hello.token) == ("ops-1", "observer", "secret")
    assert played.hello.software.startswith("quorate/")
    assert client.coordinator_software == "played/1"
    await client.close()
    await until(lambda: played.connection.is_closed)
    assert played.connection.close_error.code == Code.NO_ERROR


async def test_a_refusal_is_raised_with_its_reason(server, credentials):
    task = connecting(server, credentials)
    played = await play(server, Refusal(reason="unauthenticated", message="who are you?", retry=True))
    with pytest.raises(Refused) as caught:
        await task
    assert (caught.value.reason, caught.value.message, caught.value.retry) == ("unauthenticated", "who are you?", True)
    await until(lambda: played.connection.is_closed)


async def test_a_hello_that_nobody_answers_has_an_end(server, credentials):
    task = connecting(server, credentials, timeout_s=0.6)
    played = await play(server, None)
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ConnectFailed, match=r"the hello was not answered within 0\.6 s"):
            await task
    await until(lambda: played.connection.is_closed)


async def test_an_answer_that_is_none(server, credentials):
    task = connecting(server, credentials)
    played = await play(server, Drain())
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(UnexpectedMessage, match="drain"):
            await task
    await until(lambda: played.connection.is_closed)


async def test_a_connection_that_is_closed_instead_of_answered(server, credentials):
    task = connecting(server, credentials)
    played = await play(server, None)
    await played.connection.close(Code.REFUSED, "no hello within 5 s")
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(ConnectionClosed, match="no hello") as caught:
            await task
    assert caught.value.code == Code.REFUSED


async def test_a_name_that_cannot_be_one_is_refused_before_anything_is_sent(credentials):
    with UdpSocket() as silent:
        with pytest.raises(ArgumentInvalid, match="name: "):
            await Client.connect(f"quic://127.0.0.1:{silent.port}", token="t", name="not a name")
        for token in ("s3cret" * 10_000, "s3cret\ud800"):
            with pytest.raises(ArgumentInvalid, match="token: ") as caught:
                await Client.connect(f"quic://127.0.0.1:{silent.port}", token=token)
            assert "s3c" not in str(caught.value)
        assert silent.receive_nowait() is None
    with pytest.raises(ConfigurationError):
        await Client.connect("nonsense", token="t")


# --- calls ---


async def test_calls_run_at_once_each_on_a_stream_of_its_own(server, credentials):
    async with joined(server, credentials) as (client, played), asyncio.timeout(PATIENCE_S):
        calls = [
            asyncio.create_task(call)
            for call in (client.ask("classify", {"x": 1}), client.reveal(7, "a"), client.agents())
        ]
        requests = {}
        for _ in calls:
            channel, request = await played.call()
            requests[type(request)] = channel
        assert set(requests) == {Ask, Reveal, Agents}
        fleet = Fleet(software="played/1", uptime_s=1.0, rounds_open=0, agents=[])
        revealed = Revealed(round=7, correct=True)
        for kind, answer in ((Agents, fleet), (Reveal, revealed), (Ask, OUTCOME)):  # not in the order of asking
            await requests[kind].send(answer)
            await requests[kind].finish()
        assert await asyncio.gather(*calls) == [OUTCOME, revealed, fleet]
        for channel in requests.values():
            assert await channel.receive() is None  # the client has finished its side, too
        assert client._connection.stats.streams_open == 1  # control


async def test_a_call_that_fails_is_raised_with_its_reason(server, credentials):
    async with joined(server, credentials) as (client, played), asyncio.timeout(PATIENCE_S):
        asking = asyncio.create_task(client.ask("classify", 1))
        channel, _ = await played.call()
        await channel.send(CallError(reason="busy", message="too many rounds", retry=True))
        with pytest.raises(CallFailed) as caught:
            await asking
        assert (caught.value.reason, caught.value.message, caught.value.retry) == ("busy", "too many rounds", True)


async def test_a_call_that_is_cancelled_is_withdrawn(server, credentials):
    async with joined(server, credentials) as (client, played), asyncio.timeout(PATIENCE_S):
        asking = asyncio.create_task(client.ask("classify", 1))
        channel, _ = await played.call()
        asking.cancel()
        with pytest.raises(ResetByPeer) as caught:
            await channel.receive()
        assert caught.value.code == Code.CANCELLED
        await until(lambda: channel.stream.send_is_over)
        # The client goes on.
        asking = asyncio.create_task(client.ask("classify", 1))
        channel, _ = await played.call()
        await channel.send(OUTCOME)
        assert await asking == OUTCOME


@pytest.mark.parametrize("how", ["reset", "unexpected", "malformed", "end"])
async def test_a_call_that_goes_wrong_leaves_no_stream_behind(server, credentials, how):
    async with joined(server, credentials) as (client, played), asyncio.timeout(PATIENCE_S):
        asking = asyncio.create_task(client.ask("classify", 1))
        channel, _ = await played.call()
        match how:
            case "reset":
                channel.stream.reset(Code.INTERNAL)  # and goes on listening
                error = ResetByPeer
            case "unexpected":
                await channel.send(Drain())
                error = UnexpectedMessage
            case "malformed":
                await channel.stream.send(b"\x00\x00\x00\x05\x81\xa1\x78\xa1\x79")
                error = UnknownType
            case _:
                await channel.finish()
                error = UnexpectedMessage
        with pytest.raises(error):
            await asking
        assert client._connection.stats.streams_open == 1
        with pytest.raises(ResetByPeer):
            await channel.receive()
        await until(lambda: played.connection.stats.streams_open == 1)


async def test_what_cannot_travel_is_refused_before_anything_is_sent(server, credentials):
    async with joined(server, credentials) as (client, played):
        with pytest.raises(LocalError):
            await client.ask("classify", object())
        with pytest.raises(LocalError):
            await client.reveal(1, object())
        for call in (
            client.ask("not a task", 1),
            client.ask("classify", 1, quorum=0),
            client.ask("classify", 1, quorum=1.5),
            client.drain("no name"),
            client.reveal(0, 1),
        ):
            with pytest.raises(ArgumentInvalid):
                await call
        assert client._connection.stats.streams_open == 1
        assert not played.connection._incoming_bi


async def test_calls_under_way_hear_of_the_connections_end(server, credentials):
    async with joined(server, credentials) as (client, played), asyncio.timeout(PATIENCE_S):
        asking = asyncio.create_task(client.ask("classify", 1))
        await played.call()
        await played.connection.close(Code.SHUTDOWN, "the coordinator stops")
        with pytest.raises(ConnectionClosed, match="the coordinator stops"):
            await asking
        with pytest.raises(ConnectionClosed):
            await client.agents()

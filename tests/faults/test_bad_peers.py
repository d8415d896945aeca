"""Peers that break the wire format, or keep it and misbehave: each loses what is its own, and nobody else anything.

Every test runs beside a fleet at work: a round is in flight while the peer does its worst, and must end
as if nothing had happened.
"""

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgpack
import pytest
import structlog

from coordination import PATIENCE_S, Fleet, RawPeer, coordinating, until
from quorate_agent import Agent
from quorate_protocol.bodies import encode_body
from quorate_protocol.channel import Channel
from quorate_protocol.client import Client
from quorate_protocol.errors import (
    Code,
    ConnectFailed,
    LinkError,
    QuorateError,
    ResetByPeer,
    StoppedByPeer,
    StreamError,
)
from quorate_protocol.limits import FRAME_BYTES_MAX, HELLO_BYTES_MAX, LABELS_MAX, TASKS_MAX
from quorate_protocol.messages import (
    Agents,
    Ask,
    Assignment,
    CoordinationOpened,
    Goodbye,
    Hello,
    Message,
    Outcome,
    Reply,
    Reveal,
    Welcome,
)
from quorate_protocol.messages import Fleet as FleetListing
from quorate_protocol.transport import BiStream, connect


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as entries:
        yield entries
    # Whatever a peer does, it is no bug of ours.
    assert [entry for entry in entries if entry["event"] in ("connection_failed", "call_failed")] == []


class Case(NamedTuple):
    """One thing that a peer does wrong."""

    name: str
    data: bytes
    #: The wire code that it is to get.
    code: Code
    peer: RawPeer


Cases = dict[str, tuple[bytes, Code]]


class Busy:
    """A fleet at work: two agents, an operator, and a round that waits for one of the agents."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.gate = asyncio.Event()
        self.operator: Client
        self._waiting: asyncio.Task[Outcome]
        self._asked = 0

    async def begin(self) -> None:
        begun = asyncio.Event()
        gate = self.gate

        def agent(name: str, task: str) -> Agent:
            agent = Agent(name, concurrency=4)

            @agent.task(task)
            async def work(body: Any) -> Any:
                if body == "wait":
                    begun.set()
                    await gate.wait()
                return body

            return agent

        await self.fleet.join(agent("good-1", "work"), agent("good-2", "work"))
        self.operator = await self.fleet.operator()
        self._waiting = asyncio.create_task(self.operator.ask("work", "wait", quorum=1.0))
        await begun.wait()

    async def works(self) -> None:
        """Others are asked and answer."""
        self._asked += 1
        async with asyncio.timeout(PATIENCE_S):
            outcome = await self.operator.ask("work", self._asked, quorum=1.0)
        assert (outcome.state, outcome.value, len(outcome.results)) == ("complete", self._asked, 2)

    async def each(self, cases: Cases) -> AsyncIterator["Case"]:
        """Every case in turn, on a connection of its own. After each, it was counted, and the others work."""
        for name, (data, code) in cases.items():
            before = self.count("quorate_protocol_errors_total", code.name)
            yield Case(name, data, code, await self.fleet.peer())
            await self.counts("quorate_protocol_errors_total", code.name, before + 1)
            await self.works()

    async def end(self) -> None:
        """The round that was in flight all the time ends as it should."""
        await self.works()
        self.gate.set()
        async with asyncio.timeout(PATIENCE_S):
            outcome = await self._waiting
        assert (outcome.state, outcome.value) == ("complete", "wait")
        assert sorted(self.fleet.connected) == ["good-1", "good-2"]

    def count(self, name: str, *labels: str) -> float:
        return self.fleet.metrics().get((name, *labels), 0.0)

    async def counts(self, name: str, label: str, value: float) -> None:
        await until(lambda: self.count(name, label) == value)


@pytest.fixture
async def busy(tmp_path: Path) -> AsyncIterator[Busy]:
    async with coordinating(tmp_path, rounds={"deadline_s": 60.0}, sessions={"hello_timeout_s": 15.0}) as fleet:
        busy = Busy(fleet)
        await busy.begin()
        before = busy.count("quorate_connections")
        yield busy
        await busy.end()
        # Closed connections linger for a moment (RFC 9000, 10.2), then nothing is left of them.
        await until(lambda: busy.count("quorate_connections") <= before)


def framed(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


def packed(**keys: Any) -> bytes:
    return framed(msgpack.packb(keys))


HELLO: Final = {"type": "hello", "id": "x", "token": "t"}

#: What is wrong in any place where a frame is expected, and the code that says so.
BROKEN: Final[dict[str, tuple[bytes, Code]]] = {
    "garbage": (framed(b"\xc1\xc1\xc1"), Code.FRAME_MALFORMED),
    "empty payload": (framed(b""), Code.FRAME_MALFORMED),
    "http": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", Code.FRAME_TOO_LARGE),
    "list": (framed(b"\x93\x01\x02\x03"), Code.FRAME_MALFORMED),
    "number": (framed(b"\x07"), Code.FRAME_MALFORMED),
    "two values": (framed(b"\x80\x80"), Code.FRAME_MALFORMED),
    "number as key": (framed(b"\x81\x01\x02"), Code.FRAME_MALFORMED),
    "bytes as key": (framed(b"\x81\xc4\x04type\xa5hello"), Code.FRAME_MALFORMED),
    "not UTF-8": (framed(b"\x81\xa4type\xa2\xff\xfe"), Code.FRAME_MALFORMED),
    "deep": (framed(b"\x81\xa1k" + b"\x91" * 5000 + b"\x01"), Code.FRAME_MALFORMED),
    "map that claims more": (framed(b"\xdf\xff\xff\xff\xff"), Code.FRAME_MALFORMED),
    "extension": (framed(b"\xd4\x05\x00"), Code.FRAME_MALFORMED),
    "length over all ceilings": (b"\xff\xff\xff\xff", Code.FRAME_TOO_LARGE),
    "length just over": ((FRAME_BYTES_MAX + 1).to_bytes(4, "big"), Code.FRAME_TOO_LARGE),
    "unknown type": (packed(type="telepathy"), Code.UNKNOWN_TYPE),
    "type of another kind": (packed(type=5), Code.UNKNOWN_TYPE),
    "no type": (packed(id="x"), Code.UNKNOWN_TYPE),
    "truncated in the length": (b"\0\0", Code.FRAME_TRUNCATED),
    "truncated in the payload": (b"\0\0\0\x10\x81\xa4ty", Code.FRAME_TRUNCATED),
}


async def send_all(stream: BiStream, data: bytes) -> None:
    """Sends and finishes; the other end may have had enough before."""
    with contextlib.suppress(StreamError, LinkError):
        await stream.send(data)
        await stream.finish()


# --- before the welcome --------------------------------------------------------------------------


FIRST_STREAM: Final[Cases] = {
    **BROKEN,
    "over the hello's ceiling": ((HELLO_BYTES_MAX + 1).to_bytes(4, "big"), Code.FRAME_TOO_LARGE),
    "nothing": (b"", Code.UNEXPECTED_MESSAGE),
    "goodbye first": (Goodbye().to_frame(), Code.UNEXPECTED_MESSAGE),
    "ask first": (Ask(task="work", body=b"\x01").to_frame(), Code.UNEXPECTED_MESSAGE),
    "reply first": (Reply(round=1, body=b"\x01").to_frame(), Code.UNEXPECTED_MESSAGE),
    "hello without keys": (packed(type="hello"), Code.MESSAGE_INVALID),
    "no id": (packed(**{**HELLO, "id": ""}), Code.MESSAGE_INVALID),
    "id with a space": (packed(**{**HELLO, "id": "a b"}), Code.MESSAGE_INVALID),
    "id beyond ASCII": (packed(**{**HELLO, "id": "ü"}), Code.MESSAGE_INVALID),
    "long id": (packed(**{**HELLO, "id": "x" * 256}), Code.MESSAGE_INVALID),
    "token that is no text": (packed(**{**HELLO, "token": 5}), Code.MESSAGE_INVALID),
    "unknown role": (packed(**{**HELLO, "role": "king"}), Code.MESSAGE_INVALID),
    "task twice": (packed(**{**HELLO, "tasks": ["a", "a"]}), Code.MESSAGE_INVALID),
    "too many tasks": (packed(**{**HELLO, "tasks": [f"t{n}" for n in range(TASKS_MAX + 1)]}), Code.MESSAGE_INVALID),
    "too many labels": (
        packed(**{**HELLO, "labels": {f"l{n}": "" for n in range(LABELS_MAX + 1)}}),
        Code.MESSAGE_INVALID,
    ),
    "label without text": (packed(**{**HELLO, "labels": {"a": None}}), Code.MESSAGE_INVALID),
}


async def test_a_first_stream_that_is_no_hello_ends_the_connection(busy: Busy) -> None:
    async for case in busy.each(FIRST_STREAM):
        await send_all(await case.peer.open(), case.data)
        closed = await case.peer.closed()
        assert (closed.code, closed.reason) == (case.code, case.code.name), case.name
    assert busy.count("quorate_handshakes_total", "bad-hello") == len(FIRST_STREAM)


async def test_an_error_tells_the_peer_its_code_and_nothing_of_what_it_sent(busy: Busy, logged: list[Any]) -> None:
    peer = await busy.fleet.peer()
    await send_all(await peer.open(), packed(**{**HELLO, "id": "secret id", "token": "secret token"}))
    assert "secret" not in (await peer.closed()).reason
    await until(lambda: any(entry["event"] == "protocol_error" for entry in logged))
    assert "secret" not in repr(logged)


async def test_a_hello_may_come_byte_by_byte(busy: Busy) -> None:
    peer = await busy.fleet.peer()
    stream = await peer.open()
    for byte in Hello(role="operator", id="slow", token=peer.token).to_frame():
        await stream.send(bytes([byte]))
        await stream.flush()
    await peer.take(Channel(stream), Welcome)
    await peer.leave()


async def test_a_hello_as_large_as_may_be_is_taken(busy: Busy) -> None:
    peer = await busy.fleet.peer()
    labels = {f"l{n}": "x" * 980 for n in range(LABELS_MAX)}
    hello = Hello(id="large", token=peer.token, tasks=[f"t{n}" for n in range(TASKS_MAX - 10)], labels=labels)
    assert HELLO_BYTES_MAX - 10_000 < len(hello.to_frame()) <= HELLO_BYTES_MAX
    control = Channel(await peer.open())
    await control.send(hello)
    await peer.take(control, Welcome)
    await peer.leave()
    await until(lambda: busy.fleet.infos()["large"].state == "lost")


@pytest.mark.parametrize(
    ("uni", "first"), [(False, True), (True, True), (True, False)], ids=["bi", "uni", "uni without a first"]
)
async def test_thousands_of_streams_before_the_hello_end_the_connection(busy: Busy, uni: bool, first: bool) -> None:
    peer = await busy.fleet.peer()
    streams: list[Any] = []
    if first:
        streams.append(await peer.open())
        await streams[0].send(b"\0")
    with contextlib.suppress(LinkError):
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(3000):
                opened = await (peer.connection.open_uni_stream() if uni else peer.connection.open_bi_stream())
                streams.append(opened)
                with contextlib.suppress(StoppedByPeer):
                    await opened.send(b"x" * 100)
    closed = await peer.closed()
    assert (closed.code, closed.reason) == (Code.REFUSED, "too many streams before hello")
    await busy.counts("quorate_handshakes_total", "bad-hello", 1)


async def test_streams_before_the_welcome_are_refused_one_by_one(busy: Busy) -> None:
    peer = await busy.fleet.peer()
    first = await peer.open()
    await first.send(b"\0")
    early = [Channel(await peer.open()) for _ in range(3)]
    for call in early:
        await call.send(Agents())
    for call in early:
        with pytest.raises(ResetByPeer) as caught:
            await call.receive()
        assert caught.value.code == Code.REFUSED
    # In one datagram with the hello, and no sooner welcome than the others.
    first.send_nowait(Hello(role="operator", id="op", token=peer.token).to_frame()[1:])
    also = Channel(await peer.open())
    also.send_nowait(Agents())
    await peer.take(Channel(first), Welcome)
    with pytest.raises(ResetByPeer) as caught:
        await also.receive()
    assert caught.value.code == Code.REFUSED
    call = Channel(await peer.open())
    await call.send(Agents())
    await peer.take(call, FleetListing)
    await peer.leave()


async def test_connections_that_say_nothing_hold_nobody_up(tmp_path: Path) -> None:
    async with coordinating(tmp_path, sessions={"hello_timeout_s": 1.0}) as fleet:
        busy = Busy(fleet)
        await busy.begin()
        lorises = [await fleet.peer() for _ in range(20)]
        for number, peer in enumerate(lorises):
            if number % 2:
                await (await peer.open()).send(b"\0\0\0")
        while not all(peer.connection.is_closed for peer in lorises):
            await busy.works()
        assert {(await peer.closed()).code for peer in lorises} == {Code.REFUSED}
        await busy.counts("quorate_handshakes_total", "timeout", 20)
        await busy.end()


async def test_connections_that_vanish_are_forgotten(busy: Busy) -> None:
    for _ in range(10):
        peer = await busy.fleet.peer()
        stream = await peer.open()
        await stream.send(b"\0")
        await stream.flush()
        await peer.leave()
    await busy.counts("quorate_handshakes_total", "gone", 10)


async def test_another_application_protocol_is_named(busy: Busy) -> None:
    with pytest.raises(ConnectFailed, match=r"the server speaks none of h3$"):
        await connect(busy.fleet.url, tls=busy.fleet.tls, protocols=("h3",))


async def test_datagrams_that_are_no_quic_are_ignored(busy: Busy) -> None:
    rng = random.Random(20)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for size in [0, 1, 5, 8, 9, 20, 1199, 1200, 1500, 9000] * 10:
            garbage = bytearray(rng.randbytes(size))
            if size > 6 and rng.random() < 0.7:  # the look of a QUIC version 1 Initial
                garbage[0] = 0xC0 | garbage[0] & 0x0F
                garbage[1:5] = b"\0\0\0\x01"
                garbage[5] = rng.choice([0, 4, 8, 20, 255])
            sock.sendto(bytes(garbage), ("127.0.0.1", busy.fleet.port))
    received = busy.count("quorate_udp_datagrams_total", "in")
    await busy.works()
    assert busy.count("quorate_udp_datagrams_total", "in") > received


# --- agents --------------------------------------------------------------------------------------


CONTROL: Final[Cases] = {
    **BROKEN,
    "hello twice": (packed(**HELLO), Code.UNEXPECTED_MESSAGE),
    "ask": (Ask(task="work", body=b"\x01").to_frame(), Code.UNEXPECTED_MESSAGE),
    "reply": (Reply(round=1, body=b"\x01").to_frame(), Code.UNEXPECTED_MESSAGE),
    "drain with a number": (packed(type="drain", reason=5), Code.MESSAGE_INVALID),
    "assignment": (Assignment(round=1, task="work", body=b"\x01", deadline_s=1.0).to_frame(), Code.UNEXPECTED_MESSAGE),
}


@pytest.mark.parametrize("role", ["agent", "operator"])
async def test_what_has_no_place_on_the_control_stream_ends_the_session(busy: Busy, role: Any) -> None:
    async for case in busy.each(CONTROL):
        if role == "agent":
            await case.peer.join("bad")
        else:
            await case.peer.hello("bad", role="operator")
        await send_all(case.peer.control.stream, case.data)
        assert (await case.peer.closed()).code == case.code, case.name
        if role == "agent":
            await until(lambda: busy.fleet.infos()["bad"].state == "lost")


COORDINATION_BEGIN: Final[Cases] = {
    **BROKEN,
    "nothing": (b"", Code.UNEXPECTED_MESSAGE),
    "reply first": (Reply(round=1, body=b"\x01").to_frame(), Code.UNEXPECTED_MESSAGE),
    "ask": (Ask(task="work", body=b"\x01").to_frame(), Code.UNEXPECTED_MESSAGE),
    "another session": (CoordinationOpened(session="another").to_frame(), Code.MESSAGE_INVALID),
    "no session": (packed(type="coordination"), Code.MESSAGE_INVALID),
}


async def test_a_coordination_stream_that_begins_badly_ends_the_session(busy: Busy) -> None:
    async for case in busy.each(COORDINATION_BEGIN):
        await case.peer.hello("bad")
        await send_all(await case.peer.open(), case.data)
        assert (await case.peer.closed()).code == case.code, case.name
        await until(lambda: busy.fleet.infos()["bad"].state == "lost")


COORDINATION: Final[Cases] = {
    **BROKEN,
    "reply without a round": (packed(type="reply"), Code.MESSAGE_INVALID),
    "round 0": (packed(type="reply", round=0), Code.MESSAGE_INVALID),
    "round as a float": (packed(type="reply", round=1.0), Code.MESSAGE_INVALID),
    "body as text": (packed(type="reply", round=1, body="text"), Code.MESSAGE_INVALID),
    "unknown status": (packed(type="reply", round=1, status="late"), Code.MESSAGE_INVALID),
    "negative time": (packed(type="reply", round=1, compute_s=-1.0), Code.MESSAGE_INVALID),
    "NaN": (packed(type="reply", round=1, compute_s=float("nan")), Code.MESSAGE_INVALID),
    "long error": (packed(type="reply", round=1, error="x" * 5000), Code.MESSAGE_INVALID),
    "call": (Agents().to_frame(), Code.UNEXPECTED_MESSAGE),
    "opened twice": (CoordinationOpened(session="x").to_frame(), Code.UNEXPECTED_MESSAGE),
}


async def test_a_bad_frame_loses_the_agent_and_not_the_reply_before_it(busy: Busy) -> None:
    async for case in busy.each(COORDINATION):
        peer = case.peer
        # Its link was at fault, not its name: the same may come again.
        await peer.join("bad")
        await until(lambda: "bad" in busy.fleet.connected)
        asked = [asyncio.create_task(busy.operator.ask("echo", n)) for n in range(2)]
        first, second = [await peer.take(peer.coordination, Assignment) for _ in range(2)]
        await send_all(peer.coordination.stream, Reply(round=first.round, body=b"\x07").to_frame() + case.data)
        assert (await peer.closed()).code == case.code, case.name
        async with asyncio.timeout(PATIENCE_S):
            outcomes = {outcome.round: outcome for outcome in await asyncio.gather(*asked)}
        assert (outcomes[first.round].state, outcomes[first.round].value) == ("complete", 7), case.name
        assert (outcomes[second.round].state, outcomes[second.round].results[0].status) == ("failed", "lost"), case.name


async def test_an_answer_that_cannot_be_unpacked_spoils_one_reply(busy: Busy) -> None:
    bad, good = await busy.fleet.peer(), await busy.fleet.peer()
    await bad.join("a-bad")
    await good.join("good")
    asking = asyncio.create_task(busy.operator.ask("echo", 1, quorum=1.0))
    assignment = await bad.take(bad.coordination, Assignment)
    await bad.coordination.send(Reply(round=assignment.round, body=b"\xc1\xc1"))
    await good.coordination.send(Reply(round=assignment.round, body=b"\x05"))
    async with asyncio.timeout(PATIENCE_S):
        outcome = await asking
    assert (outcome.state, outcome.value) == ("complete", 5)
    assert outcome.results[0].body == b"\xc1\xc1"
    revealed = await busy.operator.reveal(outcome.round, 5)
    assert revealed.right == {"a-bad": False, "good": True}
    for peer in (bad, good):
        await peer.leave()
    await until(lambda: len(busy.fleet.connected) == 2)


async def test_replies_that_nobody_waits_for_are_counted_and_change_nothing(busy: Busy) -> None:
    peer, stranger = await busy.fleet.peer(), await busy.fleet.peer()
    await peer.join("stray")
    await stranger.join("stranger", tasks=("other",))
    asking = asyncio.create_task(busy.operator.ask("echo", 1, deadline_s=30.0))
    number = (await peer.take(peer.coordination, Assignment)).round
    say = peer.coordination.send
    await say(Reply(round=10_000, body=b"\x01"))
    await say(Reply(round=number, attempt=2, body=b"\x02"))
    await say(Reply(round=1, body=b"\x03"))  # of the agents at work, and not over
    await stranger.coordination.send(Reply(round=number, body=b"\x04"))
    for kind, count in (("unknown", 1), ("wrong-attempt", 1), ("not-asked", 2)):
        await busy.counts("quorate_stray_replies_total", kind, count)
    assert not asking.done()
    await say(Reply(round=number, body=b"\x05"))
    async with asyncio.timeout(PATIENCE_S):
        outcome = await asking
    assert (outcome.state, outcome.value, len(outcome.results)) == ("complete", 5, 1)
    await say(Reply(round=number, body=b"\x06"))
    await busy.counts("quorate_stray_replies_total", "duplicate", 1)
    expired = await busy.operator.ask("echo", 1, deadline_s=0.01)
    assert expired.state == "expired"
    await say(Reply(round=expired.round, body=b"\x07"))
    await busy.counts("quorate_stray_replies_total", "late", 1)
    assert (await busy.operator.reveal(number, 5)).right == {"stray": True}
    # After the truth as well.
    await say(Reply(round=number, body=b"\x08"))
    await busy.counts("quorate_stray_replies_total", "duplicate", 2)
    assert {"stray", "stranger"} <= set(busy.fleet.connected)
    for one in (peer, stranger):
        await one.leave()
    await until(lambda: len(busy.fleet.connected) == 2)


async def test_streams_that_nobody_asked_for_are_refused_and_hold_up_no_reply(busy: Busy) -> None:
    peer = await busy.fleet.peer()
    await peer.join("chatty")

    async def flood(uni: bool) -> None:
        """More than the connection's window, on streams that have no meaning."""
        for _ in range(20):
            stream = await (peer.connection.open_uni_stream() if uni else peer.connection.open_bi_stream())
            with contextlib.suppress(StoppedByPeer):
                await stream.send(b"x" * 600_000)

    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(flood(True), flood(False))
    # A unidirectional stream has to say what it is; a bidirectional one has no business here.
    await busy.counts("quorate_protocol_errors_total", "FRAME_TOO_LARGE", 20)
    await busy.counts("quorate_protocol_errors_total", "UNEXPECTED_MESSAGE", 20)
    asking = asyncio.create_task(busy.operator.ask("echo", 1))
    assignment = await peer.take(peer.coordination, Assignment)
    await peer.coordination.send(Reply(round=assignment.round, body=encode_body("y" * 500_000)))
    async with asyncio.timeout(PATIENCE_S):
        assert (await asking).value == "y" * 500_000
    await peer.leave()
    await until(lambda: len(busy.fleet.connected) == 2)


async def test_an_agent_that_never_reads_is_let_go_and_the_others_go_on(
    busy: Busy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quorate_coordinator.links.UNSENT_BYTES_MAX", 4 << 20)
    peer = await busy.fleet.peer()
    await peer.join("deaf", tasks=("work",))
    await until(lambda: "deaf" in busy.fleet.connected)
    body = "x" * 1_000_000
    for _ in range(30):
        outcome = await busy.operator.ask("work", body, quorum=2, grace_s=0.0)
        assert (outcome.state, outcome.value) in (("quorate", body), ("complete", body))
        if peer.connection.is_closed:
            break
    closed = await peer.closed()
    assert (closed.code, closed.reason) == (Code.BUSY, "too far behind: not reading")
    await until(lambda: busy.fleet.infos()["deaf"].state == "lost")


async def test_an_agent_that_stops_its_stream_is_let_go(busy: Busy) -> None:
    peer = await busy.fleet.peer()
    await peer.join("stopped")
    await until(lambda: "stopped" in busy.fleet.connected)
    peer.coordination.stream.stop(Code.CANCELLED)
    async with asyncio.timeout(PATIENCE_S):
        while (outcome := await busy.operator.ask("echo", 1, deadline_s=0.1)).state == "expired":
            pass  # the news of the stop may come later than the question
    assert (outcome.state, outcome.results[0].status) == ("failed", "lost")
    assert (await peer.closed()).code == Code.BUSY


async def test_agents_that_take_each_others_name_leave_one(busy: Busy) -> None:
    peers: list[RawPeer] = []
    for _ in range(10):
        peers.append(await busy.fleet.peer())
        await peers[-1].join("twin")
    for peer in peers[:-1]:
        assert (await peer.closed()).code == Code.REPLACED
    asking = asyncio.create_task(busy.operator.ask("echo", 1))
    assignment = await peers[-1].take(peers[-1].coordination, Assignment)
    await peers[-1].coordination.send(Reply(round=assignment.round, body=b"\x01"))
    async with asyncio.timeout(PATIENCE_S):
        assert (await asking).state == "complete"
    await peers[-1].leave()
    await until(lambda: "twin" not in busy.fleet.connected)


async def test_an_agent_that_was_replaced_is_not_heard_any_more(busy: Busy) -> None:
    first, second = await busy.fleet.peer(), await busy.fleet.peer()
    await first.join("twin")
    asking = asyncio.create_task(busy.operator.ask("echo", 1))
    assignment = await first.take(first.coordination, Assignment)
    await second.join("twin")
    async with asyncio.timeout(PATIENCE_S):
        assert (await asking).state == "failed"
    # The reply of the old one, by the new one: its part has ended.
    await second.coordination.send(Reply(round=assignment.round, body=b"\x01"))
    await busy.counts("quorate_stray_replies_total", "late", 1)
    await second.leave()
    await until(lambda: "twin" not in busy.fleet.connected)


async def test_pulses_that_nobody_expects_do_no_harm(busy: Busy) -> None:
    peer = await busy.fleet.peer()
    await peer.join("noisy")
    for number in range(2000):
        peer.connection.datagrams.send(bytes([number % 256]) * 50)
        if number % 100 == 0:
            await busy.works()
    assert "noisy" in busy.fleet.connected
    await peer.leave()
    await until(lambda: "noisy" not in busy.fleet.connected)


# --- operators -----------------------------------------------------------------------------------


CALL: Final[Cases] = {
    **BROKEN,
    "nothing": (b"", Code.UNEXPECTED_MESSAGE),
    "hello": (packed(**HELLO), Code.UNEXPECTED_MESSAGE),
    "reply": (Reply(round=1, body=b"\x01").to_frame(), Code.UNEXPECTED_MESSAGE),
    "ask without a body": (packed(type="ask", task="work"), Code.MESSAGE_INVALID),
    "quorum 0": (packed(type="ask", task="work", body=b"\x01", quorum=0), Code.MESSAGE_INVALID),
    "body as text": (packed(type="ask", task="work", body="text"), Code.MESSAGE_INVALID),
    "negative round": (packed(type="reveal", round=-1, truth=b"\x01"), Code.MESSAGE_INVALID),
    "two requests": (
        Ask(task="work", body=encode_body("wait")).to_frame() + Agents().to_frame(),
        Code.UNEXPECTED_MESSAGE,
    ),
    "garbage after a request": (
        Ask(task="work", body=encode_body("wait")).to_frame() + b"\0\0\0\x01\xc1",
        Code.FRAME_MALFORMED,
    ),
}


async def test_a_bad_call_loses_its_stream_and_no_other_call(busy: Busy) -> None:
    peer = await busy.fleet.peer()
    await peer.hello("op", role="operator")
    good = Channel(await peer.open())
    await good.send(Ask(task="work", body=encode_body("wait")))
    async for case in busy.each(CALL):
        await case.peer.leave()
        bad = await peer.open()
        await send_all(bad, case.data)
        with pytest.raises(ResetByPeer) as caught:
            async with asyncio.timeout(PATIENCE_S):
                await bad.receive()
        assert caught.value.code == case.code, case.name
    busy.gate.set()
    assert (await peer.take(good, Outcome)).value == "wait"
    # The rounds that broken calls had opened were cancelled.
    await until(lambda: busy.fleet.coordinator.list_fleet().rounds_open == 0)
    assert busy.fleet.coordinator.list_fleet().rounds_closed["cancelled"] == 2
    await peer.leave()


async def test_streams_that_an_operator_has_no_use_for_are_refused(busy: Busy) -> None:
    peer = await busy.fleet.peer()
    await peer.hello("op", role="operator")
    for _ in range(20):
        stream = await peer.connection.open_uni_stream()
        with contextlib.suppress(StoppedByPeer):
            await stream.send(b"x" * 600_000)
    # A unidirectional stream has to say what it is.
    await busy.counts("quorate_protocol_errors_total", "FRAME_TOO_LARGE", 20)
    call = Channel(await peer.open())
    await call.send(Ask(task="work", body=encode_body("y" * 300_000)))
    assert (await peer.take(call, Outcome)).value == "y" * 300_000
    await peer.leave()


async def test_an_operator_that_never_reads_holds_up_nobody(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quorate_coordinator.operators._ACKNOWLEDGE_TIMEOUT_S", 0.2)
    peer = await busy.fleet.peer()
    await peer.hello("op", role="operator")
    body = encode_body("x" * 500_000)
    for _ in range(6):
        await Channel(await peer.open()).send(Ask(task="work", body=body))
    await until(lambda: busy.count("quorate_calls_total", "ask", "ok") == 6)
    await busy.works()
    await peer.leave()


# --- anything ------------------------------------------------------------------------------------


def mutated(rng: random.Random, frame: bytes) -> bytes:
    """A frame with something wrong, most likely."""
    data = bytearray(frame)
    for _ in range(rng.randint(1, 4)):
        match rng.randrange(4):
            case 0:
                data[rng.randrange(len(data))] = rng.randrange(256)
            case 1:
                del data[rng.randrange(len(data)) :]
            case 2:
                data[rng.randrange(len(data) + 1) : 0] = rng.randbytes(rng.randint(1, 8))
            case _:
                data += rng.randbytes(rng.randint(1, 40))
        if not data:
            return b"\0"
    return bytes(data)


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_sent_the_coordinator_goes_on(busy: Busy, seed: int) -> None:
    """The seed makes the case."""
    rng = random.Random(seed)
    session = CoordinationOpened(session="s")
    messages: list[Message] = [
        Hello(id="x", token=busy.fleet.token, tasks=["echo"]),
        Hello(role="operator", id="x", token=busy.fleet.token),
        session,
        Reply(round=1, body=b"\x01"),
        Goodbye(reason="x"),
        Ask(task="echo", body=b"\x01", labels={"a": "b"}, deadline_s=0.01),
        Reveal(round=1, truth=b"\x01"),
        Agents(),
    ]

    async def control(peer: RawPeer) -> BiStream:
        return await peer.open()

    async def after_hello(peer: RawPeer) -> BiStream:
        await peer.hello(f"fuzz-{rng.randrange(3)}", role=rng.choice(["agent", "operator"]))
        return await peer.open()

    async def coordination(peer: RawPeer) -> BiStream:
        await peer.join(f"fuzz-{rng.randrange(3)}")
        return peer.coordination.stream

    places: list[Callable[[RawPeer], Awaitable[BiStream]]] = [control, after_hello, coordination]
    for _ in range(25):
        peer = await busy.fleet.peer()
        with contextlib.suppress(QuorateError):
            stream = await rng.choice(places)(peer)
            for message in rng.choices(messages, k=rng.randint(1, 3)):
                frame = message.to_frame()
                await stream.send(mutated(rng, frame) if rng.random() < 0.7 else frame)
            if rng.random() < 0.5:
                await stream.finish()
        if rng.random() < 0.5:
            await busy.works()
        await peer.leave()
    await until(lambda: len(busy.fleet.connected) == 2)

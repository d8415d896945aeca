"""Bodies over the inline limit, through the whole system: questions, answers, outcomes, parts, truths."""

import asyncio
import contextlib
import gc
import hashlib
import os
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from coordination import PATIENCE_S, Fleet, RawPeer, coordinating, until
from processes import coordinator_process
from quorate_agent import Agent
from quorate_agent import worker as agent_worker
from quorate_coordinator import agent_bodies, operators, uni_streams
from quorate_protocol import blobs, bulk
from quorate_protocol.blobs import BlobBudget, BlobStore, blob_of
from quorate_protocol.bodies import encode_body
from quorate_protocol.bulk import header_for, read_header, ref_to, send_blob
from quorate_protocol.channel import Channel
from quorate_protocol.client import Client
from quorate_protocol.errors import BodyMissing, CallFailed, Code, QuorateError, ResetByPeer, StoppedByPeer
from quorate_protocol.fields import BodyRef
from quorate_protocol.messages import (
    Ask,
    Assignment,
    Bulk,
    Cancellation,
    CoordinationOpened,
    Feedback,
    Outcome,
    Reply,
    Resume,
)
from quorate_protocol.transport import ClientTls, ReceiveStream, SendStream

MIB = 1 << 20


def noise(size_bytes: int, seed: int = 0) -> Any:
    return numpy.random.default_rng(seed).integers(0, 256, size_bytes, dtype=numpy.uint8)


def answering(name: str, answer: Callable[[Any], Any]) -> Agent:
    agent = Agent(name)
    agent.task("t")(lambda body: answer(body))
    return agent


def budget_of(fleet: Fleet) -> BlobBudget:
    return fleet.coordinator._fleet._desk.store.budget


def held_bytes(fleet: Fleet) -> int:
    budget = budget_of(fleet)
    return budget.memory_bytes + budget.disk_bytes


@contextlib.asynccontextmanager
async def emptied(state_dir: Path, **sections: Any) -> AsyncIterator[Fleet]:
    """A fleet whose coordinator holds no large body at the end."""
    async with coordinating(state_dir, **sections) as fleet:
        yield fleet
        await until(lambda: len(fleet.coordinator._gatherer.shelf) == 0)
        await until(lambda: held_bytes(fleet) == 0)
        assert list((state_dir / "spool").iterdir()) == []


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with emptied(tmp_path, rounds={"deadline_s": PATIENCE_S}) as fleet:
        yield fleet


@pytest.fixture
def agent_stores(monkeypatch: pytest.MonkeyPatch) -> list[BlobStore]:
    """The stores of the agents that are made, for looking at."""
    stores: list[BlobStore] = []
    make = agent_worker.make_private_store

    def noted() -> BlobStore:
        stores.append(make())
        return stores[-1]

    monkeypatch.setattr(agent_worker, "make_private_store", noted)
    return stores


class SlowDisk:
    """Spooling waits from a byte of a file on, until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._after_bytes = 1 << 62
        self._gate = threading.Event()
        #: Writes that wait.
        self.waiting = 0
        append = blobs._SpoolFile.append

        def slowly(file: Any, data: memoryview) -> None:
            if os.fstat(file.fd).st_size >= self._after_bytes:
                self.waiting += 1
                self._gate.wait()
            append(file, data)

        monkeypatch.setattr(blobs._SpoolFile, "append", slowly)

    def stop_after(self, after_bytes: int) -> None:
        self._after_bytes = after_bytes

    def go_on(self) -> None:
        self._gate.set()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowDisk]:
    disk = SlowDisk(monkeypatch)
    yield disk
    disk.go_on()


def refused(fleet: Fleet) -> dict[str, float]:
    name = "quorate_bodies_refused_total"
    return {key[1]: value for key, value in fleet.metrics().items() if key[0] == name and value}


class TestValues:
    async def test_arrays_go_both_ways_bit_for_bit(self, fleet: Fleet, agent_stores: list[BlobStore]) -> None:
        """64 MiB there and back, and a truth as large."""
        learned: list[tuple[str, str]] = []
        agent = Agent("a")

        @agent.task("t")
        def flip(array: Any) -> Any:
            assert not array.flags.writeable
            return {"flipped": array[::-1]}

        @agent.feedback("t")
        def learn(array: Any, truth: Any) -> None:
            learned.append((digest_of(array), digest_of(truth["flipped"])))

        await fleet.join(agent)
        client = await fleet.operator()
        question = noise(64 * MIB).view("f4")
        outcome = await client.ask("t", question)
        assert outcome.state == "complete", outcome
        assert outcome.bulk is not None
        value = outcome.value["flipped"]
        assert value.tobytes() == question[::-1].tobytes()
        assert not value.flags.writeable
        assert outcome.results[0].value["flipped"].tobytes() == value.tobytes()
        assert (await client.reveal(outcome.round, outcome.value)).correct is True
        await until(lambda: learned)
        assert learned == [(digest_of(question), digest_of(value))]
        await until(lambda: agent_stores[0].budget.disk_bytes == 0)
        assert refused(fleet) == {}

    async def test_many_answers_come_whole_and_as_they_end(self, fleet: Fleet) -> None:
        """Three times 32 MiB; two of them are the same answer."""
        seeds = {"a": 1, "b": 2, "c": 1}
        await fleet.join(*(answering(name, lambda _, seed=seed: noise(32 * MIB, seed)) for name, seed in seeds.items()))
        client = await fleet.operator()
        came = {}
        async with client.ask_stream("t", 1, quorum=1.0) as replies:
            async for result in replies:
                came[result.agent] = digest_of(result.value)
        expected = {name: digest_of(noise(32 * MIB, seed)) for name, seed in seeds.items()}
        assert came == expected
        outcome = replies.outcome
        assert {result.agent: digest_of(result.value) for result in outcome.results} == expected
        assert (digest_of(outcome.value), round(outcome.support or 0, 3)) == (expected["a"], 0.667)
        revealed = await client.reveal(outcome.round, noise(32 * MIB, 1))
        assert revealed.right == {"a": True, "b": False, "c": True}

    async def test_one_question_to_many_is_spooled_once(self, fleet: Fleet) -> None:
        gate = asyncio.Event()
        sums: list[int] = []

        def agent_of(name: str) -> Agent:
            agent = Agent(name)

            @agent.task("t")
            async def add(array: Any) -> int:
                await gate.wait()
                sums.append(int(array.sum()))
                return sums[-1]

            return agent

        await fleet.join(*(agent_of(f"agent-{n}") for n in range(4)))
        client = await fleet.operator()
        question = noise(24 * MIB)
        asking = asyncio.create_task(client.ask("t", question, quorum=1.0))
        await until(lambda: sum(agent.running for agent in cores()) == 4)
        assert budget_of(fleet).disk_bytes < 25 * MIB
        gate.set()
        assert (await asking).value == int(question.sum())
        assert sums == [int(question.sum())] * 4

    async def test_many_questions(self, fleet: Fleet) -> None:
        await fleet.join(answering("a", lambda array: array[:2_000_000] + 1))
        client = await fleet.operator()
        values = [noise(3 * MIB, seed) for seed in range(6)]
        answers = [outcome.value async for outcome in client.ask_many("t", values, in_flight=3)]
        assert [digest_of(answer) for answer in answers] == [digest_of(value[:2_000_000] + 1) for value in values]

    async def test_an_answer_that_is_the_question_lets_go_of_it(
        self, fleet: Fleet, agent_stores: list[BlobStore]
    ) -> None:
        """Its parts are views of the spooled question: once it is delivered, nobody holds them, no cycle either."""
        await fleet.join(answering("a", lambda body: body))
        client = await fleet.operator()
        question = noise(24 * MIB)
        outcome = await client.ask("t", question)
        assert digest_of(outcome.value) == digest_of(question)
        await until(lambda: agent_stores[0].budget.disk_bytes == 0)

    async def test_an_agent_that_is_drained_delivers_its_answer_first(self, fleet: Fleet) -> None:
        await fleet.join(answering("a", lambda body: noise(48 * MIB)))
        client = await fleet.operator()
        asking = asyncio.create_task(client.ask("t", 1))
        await until(lambda: budget_of(fleet).disk_bytes)
        await client.drain("a")
        assert digest_of((await asking).value) == digest_of(noise(48 * MIB))
        await asyncio.wait_for(fleet.agents["a"], PATIENCE_S)

    async def test_a_body_that_need_not_be_on_a_stream_of_its_own(self, fleet: Fleet) -> None:
        """A peer may send small ones so; they are the same answers as those inside messages."""
        peer = await fleet.peer()
        await peer.join("raw", tasks=("t",))
        await fleet.join(answering("a", lambda body: "yes"))
        client = await fleet.operator()
        asking = asyncio.create_task(client.ask("t", 1, quorum=1.0))
        assignment = await RawPeer.take(peer.coordination, Assignment)
        blob = blob_of([encode_body("yes")])
        await peer.coordination.send(Reply(round=assignment.round, bulk=ref_to(blob)))
        await send_blob(peer.connection, blob, header_for(blob, "reply", round=assignment.round))
        outcome = await asking
        assert (outcome.value, outcome.support) == ("yes", 1.0)
        await peer.leave()


class TestKeys:
    async def test_asked_again_it_is_the_same_answer_and_not_sent_twice(self, fleet: Fleet) -> None:
        asked: list[int] = []

        def answer(body: Any) -> Any:
            asked.append(1)
            return noise(2 * MIB)

        await fleet.join(answering("a", answer))
        client = await fleet.operator()
        question = noise(2 * MIB, 7)
        first = await client.ask("t", question, key="k")
        again = await client.ask("t", question, key="k")
        assert (first.round, asked) == (again.round, [1])
        assert digest_of(again.value) == digest_of(first.value) == digest_of(noise(2 * MIB))
        fleet.coordinator._gatherer.shelf._let_go("k")
        late = await client.ask("t", question, key="k")
        assert (late.round, late.state, late.bulk) == (first.round, "complete", first.bulk)
        with pytest.raises(BodyMissing, match=r"of 20\d+ bytes is not here: the coordinator does not keep it any more"):
            late.value  # noqa: B018  raises
        with pytest.raises(CallFailed, match="was used for another question"):
            await client.ask("t", noise(2 * MIB, 8), key="k")

    async def test_a_restarted_coordinator_knows_the_answer_by_reference(self, tmp_path: Path) -> None:
        async with emptied(tmp_path) as fleet:
            await fleet.join(answering("a", lambda body: noise(2 * MIB)))
            client = await fleet.operator()
            first = await client.ask("t", 1, key="k")
            fleet.coordinator._gatherer.shelf._let_go("k")
        async with emptied(tmp_path) as fleet:
            client = await fleet.operator()
            again = await client.ask("t", 1, key="k")
            assert (again.round, again.bulk) == (first.round, first.bulk)
            assert (await client.reveal(again.round, noise(2 * MIB))).correct is True


def digest_of(array: Any) -> str:
    return hashlib.sha256(numpy.ascontiguousarray(array).tobytes()).hexdigest()


def cores() -> list[Any]:
    from quorate_agent.core import AgentCore

    return [thing for thing in gc.get_objects() if isinstance(thing, AgentCore)]


# --- what peers do wrong ---------------------------------------------------------------------------


class Rogue:
    """An agent played by hand, and a question that it was asked."""

    def __init__(self, fleet: Fleet, peer: RawPeer, asking: "asyncio.Task[Outcome]", assignment: Assignment) -> None:
        self.fleet = fleet
        self.peer = peer
        self.asking = asking
        self.round = assignment.round

    async def reply(self, size: int, digest: bytes) -> None:
        header = Bulk(of="reply", round=self.round, size=size, digest=digest)
        await self.peer.coordination.send(Reply(round=self.round, bulk=header.ref))

    async def stream(self, size: int, digest: bytes, data: bytes, round_id: int = 0) -> SendStream:
        stream = await self.peer.connection.open_uni_stream()
        header = Bulk(of="reply", round=round_id or self.round, size=size, digest=digest)
        await stream.send(header.to_frame() + data)
        return stream

    async def expect_failed(self, error: str, reason: str) -> None:
        """The reply has failed for this; and the agent is still connected and can answer."""
        outcome = await asyncio.wait_for(self.asking, PATIENCE_S)
        (result,) = outcome.results
        assert result.status == "failed", result
        assert error in result.error
        assert refused(self.fleet) == {reason: 1}
        await self.expect_well()

    async def expect_well(self) -> None:
        client = await self.fleet.operator()
        asking = asyncio.create_task(client.ask("t", 1))
        while not isinstance(message := await self.peer.coordination.receive(), Assignment):
            assert isinstance(message, Cancellation)
        await self.peer.coordination.send(Reply(round=message.round, body=encode_body("well")))
        assert (await asyncio.wait_for(asking, PATIENCE_S)).value == "well"
        await self.peer.leave()


@contextlib.asynccontextmanager
async def rogue(fleet: Fleet, **wanted: Any) -> AsyncIterator[Rogue]:
    peer = await fleet.peer()
    await peer.join("rogue", tasks=("t",))
    client = await fleet.operator()
    asking = asyncio.create_task(client.ask("t", 1, **wanted))
    assignment = await RawPeer.take(peer.coordination, Assignment)
    yield Rogue(fleet, peer, asking, assignment)
    with contextlib.suppress(CallFailed, QuorateError):
        await asking


DATA = bytes(range(256)) * 8192
DIGEST = hashlib.sha256(DATA).digest()


class TestBadReplies:
    async def test_wrong_digest(self, fleet: Fleet) -> None:
        async with rogue(fleet) as agent:
            await agent.reply(len(DATA), bytes(32))
            stream = await agent.stream(len(DATA), bytes(32), DATA)
            await stream.finish()
            await agent.expect_failed("digest", "wrong-digest")

    async def test_truncated(self, fleet: Fleet) -> None:
        async with rogue(fleet) as agent:
            await agent.reply(len(DATA), DIGEST)
            stream = await agent.stream(len(DATA), DIGEST, DATA[:-1])
            await stream.finish()
            await agent.expect_failed(f"ended after {len(DATA) - 1} bytes of {len(DATA)}", "truncated")

    async def test_given_up(self, fleet: Fleet) -> None:
        async with rogue(fleet) as agent:
            await agent.reply(len(DATA), DIGEST)
            stream = await agent.stream(len(DATA), DIGEST, DATA[:1000])
            await until(lambda: held_bytes(fleet))
            stream.reset(Code.INTERNAL)
            await agent.expect_failed("ResetByPeer", "given-up")

    async def test_over_the_ceiling(self, tmp_path: Path) -> None:
        async with emptied(tmp_path, bodies={"bytes_max": MIB}) as fleet, rogue(fleet) as agent:
            await agent.reply(len(DATA), DIGEST)
            stream = await agent.stream(len(DATA), DIGEST, DATA[:1000])
            assert await is_stopped(stream)
            await agent.expect_failed(f"body of {len(DATA)} bytes is over the {MIB} of the ceiling", "too-large")

    async def test_a_stream_that_never_comes(self, fleet: Fleet) -> None:
        async with rogue(fleet, deadline_s=0.3) as agent:
            await agent.reply(len(DATA), DIGEST)
            outcome = await agent.asking
            assert (outcome.state, outcome.results[0].status) in (("expired", "late"), ("failed", "failed"))
            await agent.expect_well()

    async def test_a_stream_that_nobody_refers_to(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        async with rogue(fleet) as agent:
            stranger = await agent.stream(len(DATA), DIGEST, DATA[:1000], round_id=agent.round + 1)
            assert await is_stopped(stranger), "it is of no round that waits for this agent"
            await agent.stream(len(DATA), DIGEST, DATA[:1000])
            await until(lambda: held_bytes(fleet))
            link = fleet.coordinator._fleet._link_of("rogue")
            assert link is not None
            assert link.inbox is not None
            assert link.inbox.unclaimed == 1
            link.inbox._expire(ref_to(blob_of([DATA])))
            await until(lambda: held_bytes(fleet) == 0)
            assert refused(fleet) == {"unreferenced": 1}
            await agent.peer.coordination.send(Reply(round=agent.round, body=encode_body(1)))
            assert (await agent.asking).value == 1
            await agent.expect_well()

    async def test_streams_whose_beginning_does_not_come(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those after them wait; none is turned away before it is known what it is."""
        monkeypatch.setattr(uni_streams, "HEADER_TIMEOUT_S", 0.2)
        monkeypatch.setattr(uni_streams, "_HEADERS_MAX", 2)
        async with rogue(fleet) as agent:
            for _ in range(2):
                slow = await agent.peer.connection.open_uni_stream()
                await slow.send(b"\x00")
            await agent.reply(len(DATA), DIGEST)
            await (await agent.stream(len(DATA), DIGEST, DATA)).finish()
            assert (await agent.asking).results[0].bulk == ref_to(blob_of([DATA]))
            await agent.expect_well()

    async def test_two_streams_for_one_reference(self, fleet: Fleet) -> None:
        async with rogue(fleet) as agent:
            await agent.reply(len(DATA), DIGEST)
            first = await agent.stream(len(DATA), DIGEST, DATA[:-1])
            await until(lambda: held_bytes(fleet))
            second = await agent.stream(len(DATA), DIGEST, DATA[:1000])
            assert await is_stopped(second)
            await first.send(DATA[-1:])
            await first.finish()
            outcome = await agent.asking
            assert outcome.results[0].bulk == ref_to(blob_of([DATA]))
            await agent.expect_well()

    async def test_a_reply_that_comes_twice_counts_once(self, fleet: Fleet) -> None:
        async with rogue(fleet) as agent:
            await agent.reply(len(DATA), DIGEST)
            await agent.reply(len(DATA), DIGEST)
            stream = await agent.stream(len(DATA), DIGEST, DATA)
            await stream.finish()
            assert (await agent.asking).results[0].status == "replied"
            await agent.expect_well()

    async def test_the_spool_is_full(self, tmp_path: Path) -> None:
        bodies = {"bytes_max": 4 * MIB, "spool_bytes_max": 4 * MIB, "memory_bytes_max": 3 * MIB}
        async with emptied(tmp_path, bodies=bodies) as fleet, rogue(fleet) as agent:
            held = blob_of([noise(2 * MIB)])
            share = budget_of(fleet).take(len(held), on_disk=False)
            await agent.reply(len(DATA), DIGEST)
            stream = await agent.stream(len(DATA), DIGEST, DATA[:1000])
            assert await is_stopped(stream, Code.BUSY)
            await agent.expect_failed(f"no room for a body of {len(DATA)} bytes now", "spool-full")
            with pytest.raises(CallFailed, match="has no room for a body of") as caught:
                await (await fleet.operator()).ask("t", noise(2 * MIB))
            assert (caught.value.reason, caught.value.retry) == ("busy", True)
            del share

    async def test_a_body_that_was_turned_away_before_its_reply(
        self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The reply fails when it comes, and not at its round's deadline."""
        monkeypatch.setattr(bulk, "UNCLAIMED_MAX", 1)
        async with rogue(fleet) as agent:
            other = await agent.stream(MIB, bytes(32), b"")
            await until(lambda: fleet.coordinator._fleet._link_of("rogue").inbox)
            assert await is_stopped(await agent.stream(len(DATA), DIGEST, DATA[:1000]), Code.BUSY)
            await agent.reply(len(DATA), DIGEST)
            await agent.expect_failed(f"no room for a body of {len(DATA)} bytes now", "spool-full")
            with contextlib.suppress(StoppedByPeer):
                other.reset(Code.CANCELLED)

    async def test_an_agent_hears_that_there_is_no_room_for_its_answer(self, fleet: Fleet) -> None:
        """And does not wait for its delivery: it may leave."""
        await fleet.join(answering("a", lambda body: noise(2 * MIB)))
        budget = budget_of(fleet)
        held = budget.take(budget.memory_bytes_max - MIB, on_disk=False)
        client = await fleet.operator()
        outcome = await client.ask("t", 1)
        assert "no room for a body of" in outcome.results[0].error
        await until(lambda: not unread_replies())
        await client.drain("a")
        await asyncio.wait_for(fleet.agents["a"], PATIENCE_S)
        assert refused(fleet) == {"spool-full": 1}
        del held

    async def test_the_disk_is_full(self, tmp_path: Path) -> None:
        spool = tmp_path / "spool"
        async with emptied(tmp_path) as fleet:
            mount = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "none", str(spool)]
            if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:  # noqa: ASYNC221
                pytest.skip("mounting takes root")
            try:
                async with rogue(fleet) as agent:
                    size = 9 * MIB
                    await agent.reply(size, bytes(32))
                    stream = await agent.stream(size, bytes(32), b"")
                    with contextlib.suppress(StoppedByPeer):
                        await stream.send(bytes(size))
                        await stream.finish()
                    await agent.expect_failed(f"cannot keep a body of {size} bytes now", "disk")
            finally:
                await until(lambda: held_bytes(fleet) == 0)
                subprocess.run(["umount", str(spool)], check=True)  # noqa: ASYNC221


class TestGreed:
    """One peer does not have everybody else turned away."""

    async def hog(self, fleet: Fleet, *, size: int, data: bytes = b"", bodies: int = 1) -> list[SendStream]:
        """An operator that begins to send bodies, and asks for nothing."""
        peer = await fleet.peer()
        await peer.hello("hog", role="operator", tasks=())
        streams = []
        for number in range(bodies):
            streams.append(await peer.connection.open_uni_stream())
            await streams[-1].send(Bulk(of="ask", size=size, digest=bytes([number] * 32)).to_frame())
            with contextlib.suppress(StoppedByPeer):
                await streams[-1].send(data)
        return streams

    async def test_bodies_that_are_only_announced(self, fleet: Fleet) -> None:
        await fleet.join(answering("a", lambda body: len(body)))
        hogs = [await self.hog(fleet, size=(4 << 30) - 1, data=b"x") for _ in range(4)]
        await until(lambda: budget_of(fleet).disk_bytes == len(hogs))
        client = await fleet.operator()
        assert (await client.ask("t", bytes(24 * MIB))).value == 24 * MIB
        for (stream,) in hogs:
            stream.reset(Code.CANCELLED)

    async def test_bodies_of_one_peer_take_half(self, tmp_path: Path) -> None:
        async with emptied(tmp_path, bodies={"spool_bytes_max": 48 * MIB, "bytes_max": 16 * MIB}) as fleet:
            await fleet.join(answering("a", lambda body: len(body)))
            first, second = await self.hog(fleet, size=15 * MIB, data=bytes(14 * MIB), bodies=2)
            assert await is_stopped(second, Code.BUSY)
            await until(lambda: budget_of(fleet).disk_bytes == 14 * MIB)
            client = await fleet.operator()
            assert (await client.ask("t", bytes(14 * MIB))).value == 14 * MIB
            first.reset(Code.CANCELLED)

    async def test_answers_of_one_agent_take_half(self, tmp_path: Path) -> None:
        bodies = {"spool_bytes_max": 48 * MIB, "bytes_max": 16 * MIB}
        async with emptied(tmp_path, bodies=bodies) as fleet, rogue(fleet) as agent:
            first = await agent.stream(15 * MIB, bytes(32), bytes(14 * MIB))
            await until(lambda: budget_of(fleet).disk_bytes == 14 * MIB)
            assert await is_stopped(await agent.stream(15 * MIB, bytes(32), b""), Code.BUSY)
            other = Agent("other")
            other.task("length")(len)
            await fleet.join(other)
            client = await fleet.operator()
            assert (await client.ask("length", bytes(14 * MIB))).value == 14 * MIB
            first.reset(Code.CANCELLED)
            await agent.peer.coordination.send(Reply(round=agent.round, body=encode_body(1)))
            await agent.asking
            await agent.peer.leave()

    async def test_an_operator_that_does_not_read(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        """The answers of its rounds are let go of."""
        monkeypatch.setattr(operators, "STALLED_S", 0.2)
        await fleet.join(answering("a", lambda body: noise(24 * MIB)))
        peer = await fleet.peer()
        await peer.hello("deaf", role="operator", tasks=())
        call = Channel(await peer.open())
        await call.send(Ask(task="t", body=encode_body(1)))
        await until(lambda: fleet.coordinator._gatherer.book.in_flight)
        await until(lambda: not fleet.coordinator._gatherer.book.in_flight)
        await until(lambda: held_bytes(fleet) == 0)
        await RawPeer.take(call, Outcome)
        with pytest.raises(ResetByPeer):
            await call.receive()
        await peer.leave()

    async def test_an_agent_that_does_not_read(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        """A truth that it does not take is let go of."""
        monkeypatch.setattr(agent_bodies, "STALLED_S", 0.2)
        async with rogue(fleet) as agent:
            await agent.peer.coordination.send(Reply(round=agent.round, body=encode_body(1)))
            await agent.asking
            client = await fleet.operator()
            await client.reveal(agent.round, noise(24 * MIB))
            await RawPeer.take(agent.peer.coordination, Feedback)
            await until(lambda: held_bytes(fleet) == 0)
            assert len(fleet.coordinator._fleet._desk.truths) == 0
            await agent.expect_well()

    async def test_an_answer_that_does_not_go_on(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bulk, "STALLED_S", 0.3)
        async with rogue(fleet) as agent:
            await agent.reply(len(DATA), DIGEST)
            stream = await agent.stream(len(DATA), DIGEST, DATA[:1000])
            assert await is_stopped(stream, Code.CANCELLED)
            await agent.expect_failed("nothing has come for 0.3 s after 1000 of them", "not-received")


class TestBadQuestions:
    async def test_over_the_ceiling(self, tmp_path: Path) -> None:
        async with emptied(tmp_path, bodies={"bytes_max": 2 * MIB}) as fleet:
            await fleet.join(answering("a", lambda body: len(body)))
            client = await fleet.operator()
            with pytest.raises(CallFailed, match=r"body of 31457\d\d bytes is over the 2097152") as caught:
                await client.ask("t", noise(3 * MIB))
            assert (caught.value.reason, caught.value.retry) == ("bad-request", False)
            outcome = await client.ask("t", noise(2 * MIB - 100))
            with pytest.raises(CallFailed, match="of the ceiling"):
                await client.reveal(outcome.round, noise(3 * MIB))
            assert refused(fleet) == {"too-large": 2}

    @pytest.mark.parametrize(("data", "digest", "error"), [(DATA, bytes(32), "digest"), (DATA[:-1], DIGEST, "ended")])
    async def test_spoiled(self, fleet: Fleet, data: bytes, digest: bytes, error: str) -> None:
        peer = await fleet.peer()
        await peer.hello("raw", role="operator", tasks=())
        call = Channel(await peer.open())
        header = Bulk(of="ask", size=len(DATA), digest=digest)
        await call.send(Ask(task="t", bulk=header.ref))
        stream = await peer.connection.open_uni_stream()
        await stream.send(header.to_frame() + data)
        await stream.finish()
        answer: Any = await call.receive()
        assert (answer.reason, error in answer.message) == ("bad-request", True), answer
        await peer.leave()

    async def test_withdrawn_while_it_is_uploaded(self, fleet: Fleet) -> None:
        await fleet.join(answering("a", lambda body: 1))
        peer = await fleet.peer()
        await peer.hello("raw", role="operator", tasks=())
        call = Channel(await peer.open())
        header = Bulk(of="ask", size=len(DATA), digest=DIGEST)
        await call.send(Ask(task="t", bulk=header.ref))
        stream = await peer.connection.open_uni_stream()
        await stream.send(header.to_frame() + DATA[:1000])
        await until(lambda: held_bytes(fleet))
        call.abort(Code.CANCELLED)
        assert await is_stopped(stream)
        await until(lambda: held_bytes(fleet) == 0)
        client = await fleet.operator()
        assert (await client.ask("t", 1)).round == 1, "there was no round"
        await peer.leave()


async def is_stopped(stream: SendStream, code: Code | None = None) -> bool:
    """Whether the peer stops the stream, with this code; waits until it does."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await stream.send(b"")
                await asyncio.sleep(0.002)
    except StoppedByPeer as error:
        return code in (None, error.code)


# --- rounds that end, links that break ---------------------------------------------------------------


class TestStopping:
    async def test_a_question_on_its_way_when_the_round_is_cancelled(self, fleet: Fleet) -> None:
        peer = await fleet.peer()
        await peer.join("slow", tasks=("t",))
        client = await fleet.operator()
        asking = asyncio.create_task(client.ask("t", noise(24 * MIB)))
        await RawPeer.take(peer.coordination, Assignment)
        stream = await peer.connection.accept_uni_stream()
        await read_header(stream)
        asking.cancel()
        await RawPeer.take(peer.coordination, Cancellation)
        with pytest.raises(ResetByPeer):
            async with asyncio.timeout(PATIENCE_S):
                while await stream.receive():
                    pass
        await peer.leave()

    async def test_an_answer_on_its_way_when_the_round_is_over(self, fleet: Fleet) -> None:
        async with rogue(fleet, deadline_s=0.5) as agent:
            await agent.reply(len(DATA), DIGEST)
            stream = await agent.stream(len(DATA), DIGEST, DATA[:1000])
            assert await is_stopped(stream, Code.CANCELLED)
            assert (await agent.asking).state == "expired"
            assert refused(fleet) in ({}, {"not-received": 1})
            await agent.expect_well()

    async def test_an_agent_stops_sending_what_nobody_waits_for(self, fleet: Fleet) -> None:
        """Its worker hears of the round's end in the middle of a large answer, and goes on with the next."""
        await fleet.join(answering("a", lambda n: noise(n * MIB) if n > 1 else n))
        client = await fleet.operator()
        asking = asyncio.create_task(client.ask("t", 128))
        await until(lambda: budget_of(fleet).disk_bytes)
        asking.cancel()
        assert (await client.ask("t", 1)).value == 1
        await until(lambda: held_bytes(fleet) == 0)

    async def test_a_slow_agent_holds_up_nobody(self, fleet: Fleet) -> None:
        peer = await fleet.peer()
        await peer.join("slow", tasks=("t",))
        await fleet.join(answering("a", lambda array: int(array.sum())))
        client = await fleet.operator()
        question = noise(24 * MIB)
        outcome = await client.ask("t", question, quorum=1, grace_s=0.0)
        assert (outcome.state, outcome.value) == ("quorate", int(question.sum()))
        await peer.leave()


class TestBrokenLinks:
    """The link breaks in the middle of a body; the session goes on over the next, and nothing is lost."""

    async def test_an_answer_is_sent_again(self, fleet: Fleet) -> None:
        worked: list[int] = []

        def answer(body: Any) -> Any:
            worked.append(1)
            return noise(64 * MIB)

        await fleet.join(answering("a", answer))
        client = await fleet.operator()
        asking = asyncio.create_task(client.ask("t", 1))
        for _ in range(2):
            await until(lambda: budget_of(fleet).disk_bytes, every_s=0.0)
            break_link(fleet, "a")
            await until(lambda: budget_of(fleet).disk_bytes == 0, every_s=0.0)
        outcome = await asyncio.wait_for(asking, PATIENCE_S)
        assert digest_of(outcome.value) == digest_of(noise(64 * MIB))
        assert (worked, fleet.metrics()["quorate_resumptions_total", "complete"]) == ([1], 2)
        assert refused(fleet) == {}

    async def test_a_question_is_sent_again(self, fleet: Fleet, agent_stores: list[BlobStore]) -> None:
        await fleet.join(answering("a", lambda array: digest_of(array)))
        client = await fleet.operator()
        question = noise(64 * MIB)
        asking = asyncio.create_task(client.ask("t", question))
        await until(lambda: agent_stores and agent_stores[0].budget.disk_bytes)
        break_link(fleet, "a")
        assert (await asyncio.wait_for(asking, PATIENCE_S)).value == digest_of(question)
        await until(lambda: agent_stores[0].budget.disk_bytes == 0)

    async def test_a_truth_is_sent_again(self, fleet: Fleet, agent_stores: list[BlobStore]) -> None:
        learned: list[str] = []
        agent = answering("a", lambda body: 1)
        agent.feedback("t")(lambda body, truth: learned.append(digest_of(truth)))
        await fleet.join(agent)
        client = await fleet.operator()
        outcome = await client.ask("t", 1)
        await client.reveal(outcome.round, noise(64 * MIB))
        await until(lambda: agent_stores[0].budget.disk_bytes)
        break_link(fleet, "a")
        await until(lambda: learned)
        assert learned == [digest_of(noise(64 * MIB))]

    async def test_a_question_that_is_known_is_not_taken_again(
        self, fleet: Fleet, agent_stores: list[BlobStore]
    ) -> None:
        gate = asyncio.Event()
        began: list[int] = []
        agent = Agent("a")

        @agent.task("t")
        async def work(array: Any) -> int:
            began.append(1)
            await gate.wait()
            return len(array)

        await fleet.join(agent)
        client = await fleet.operator()
        asking = asyncio.create_task(client.ask("t", noise(24 * MIB)))
        await until(lambda: began)
        break_link(fleet, "a")
        await until(lambda: fleet.metrics()["quorate_resumptions_total", "complete"] == 1)
        assert agent_stores[0].budget.disk_bytes < 25 * MIB
        gate.set()
        assert ((await asking).value, began) == (24 * MIB, [1])

    async def test_what_is_sent_before_a_link_takes_frames_is_sent_once(self, fleet: Fleet) -> None:
        """Between the welcome of a session that goes on and its coordination stream."""
        async with rogue(fleet) as agent:
            await agent.peer.coordination.send(Reply(round=1, body=encode_body(1)))
            await agent.asking
            session = fleet.coordinator._fleet._members["rogue"]
            break_link(fleet, "rogue")
            await until(lambda: session.link is None)
            agent.peer = peer = await fleet.peer()
            resume = Resume(session=session.name, secret=session.secret, received=1)
            await peer.hello("rogue", tasks=("t",), resume=resume)
            client = await fleet.operator()
            await client.reveal(1, noise(2 * MIB, 1))
            asking = asyncio.create_task(client.ask("t", noise(2 * MIB, 2)))
            await until(lambda: fleet.coordinator._gatherer.book.in_flight)
            peer.coordination = Channel(await peer.open())
            await peer.coordination.send(CoordinationOpened(session=session.name))
            await RawPeer.take(peer.coordination, Feedback)
            await RawPeer.take(peer.coordination, Assignment)
            came: list[tuple[str, int]] = []

            async def take_bodies() -> None:
                while True:
                    stream = await peer.connection.accept_uni_stream()
                    header = await read_header(stream)
                    assert isinstance(header, Bulk)
                    came.append((header.of, header.round))
                    while await stream.receive():
                        pass

            taking = asyncio.create_task(take_bodies())
            await until(lambda: came and not session.bodies._sending)
            assert sorted(came) == [("assignment", 2), ("feedback", 1)]
            taking.cancel()
            await peer.coordination.send(Reply(round=2, body=encode_body(1)))
            assert (await asking).value == 1
            await agent.expect_well()


class TestTruthsForAgentsThatAreAway:
    """They may hold a quarter of the budget; the oldest are given up, and their agents are told."""

    @pytest.mark.parametrize("size", [MIB * 3 // 2, 9 * MIB])
    @pytest.mark.parametrize("times", [6, 3])
    async def test_the_oldest_are_given_up(self, tmp_path: Path, size: int, times: int) -> None:
        bodies = {"memory_bytes_max": times * size, "spool_bytes_max": times * size}
        async with emptied(tmp_path, bodies=bodies) as fleet:
            peers = {name: await fleet.peer() for name in ("a", "b")}
            sessions = fleet.coordinator._fleet._members
            client = await fleet.operator()
            for name, peer in peers.items():
                await peer.join(name, tasks=("t",))
            for round_id in (1, 2, 3):
                asking = asyncio.create_task(client.ask("t", round_id, quorum=1.0))
                for peer in peers.values():
                    await RawPeer.take(peer.coordination, Assignment)
                    await peer.coordination.send(Reply(round=round_id, body=encode_body(1)))
                await asking
            for name in peers:
                break_link(fleet, name)
            await until(lambda: not any(sessions[name].link for name in peers))
            for round_id in (1, 2, 3):
                await client.reveal(round_id, noise(size, round_id))
                # One is kept, be it over a quarter, however many agents it is for; of two the older one goes.
                assert held_bytes(fleet) < 3 * size // 2
            assert len(fleet.coordinator._fleet._desk.truths) == 2
            for name in peers:
                resume = Resume(session=sessions[name].name, secret=sessions[name].secret, received=3)
                peer = await fleet.peer()
                await peer.join(name, tasks=("t",), resume=resume)
                assert [(await RawPeer.take(peer.coordination, Feedback)).round for _ in range(3)] == [1, 2, 3]
                came = {}
                for _ in range(3):
                    stream = await peer.connection.accept_uni_stream()
                    header = await read_header(stream)
                    assert isinstance(header, Bulk)
                    came[header.of, header.round] = await read_or_reset(stream) == header.digest
                assert came == {("feedback", 1): False, ("feedback", 2): False, ("feedback", 3): True}
                await until(lambda name=name: not sessions[name].bodies._feedback)
            assert len(fleet.coordinator._fleet._desk.truths) == 0
            for name in peers:
                break_link(fleet, name)

    async def test_what_is_kept_goes_with_the_session(self, fleet: Fleet) -> None:
        async with rogue(fleet) as agent:
            await agent.peer.coordination.send(Reply(round=agent.round, body=encode_body(1)))
            await agent.asking
            break_link(fleet, "rogue")
            await until(lambda: fleet.coordinator._fleet._members["rogue"].link is None)
            await (await fleet.operator()).reveal(agent.round, noise(2 * MIB))
            assert (len(fleet.coordinator._fleet._desk.truths), held_bytes(fleet) > 0) == (1, True)
            agent.peer = await fleet.peer()
            await agent.peer.join("rogue", tasks=("t",))
            await until(lambda: held_bytes(fleet) == 0)
            assert len(fleet.coordinator._fleet._desk.truths) == 0


async def read_or_reset(stream: ReceiveStream) -> bytes | None:
    """The digest of what comes to the end of a stream; None where its sender gave it up."""
    hasher = hashlib.sha256()
    try:
        async with asyncio.timeout(PATIENCE_S):
            while data := await stream.receive(MIB):
                hasher.update(data)
    except ResetByPeer as error:
        assert error.code == Code.CANCELLED
        return None
    return hasher.digest()


class TestBrokenLinksAndASlowDisk:
    """What came over the link before is still being read when the session has gone on over the next."""

    async def test_an_answer_that_was_cut_off_is_taken_over_the_next_link(self, fleet: Fleet, disk: SlowDisk) -> None:
        worked: list[int] = []

        def answer(body: Any) -> Any:
            worked.append(1)
            return noise(32 * MIB)

        await fleet.join(answering("a", answer))
        client = await fleet.operator()
        disk.stop_after(2 * MIB)
        asking = asyncio.create_task(client.ask("t", 1, deadline_s=PATIENCE_S / 2))
        await until(lambda: disk.waiting and is_held_up())
        (late,) = answers_of(fleet, "a").values()
        await go_on_over_another_link(fleet, "a")
        await until(lambda: late.task.done() and answers_of(fleet, "a"))
        disk.go_on()
        outcome = await asking
        assert outcome.state == "complete", outcome.results
        assert digest_of(outcome.value) == digest_of(noise(32 * MIB))
        assert worked == [1]
        assert refused(fleet) == {}

    async def test_an_answer_that_had_come_whole_counts_when_it_is_read(self, fleet: Fleet, disk: SlowDisk) -> None:
        """The agent has forgotten it: its transport knows that it arrived."""
        size = 9 * MIB
        await fleet.join(answering("a", lambda body: noise(size)))
        client = await fleet.operator()
        disk.stop_after(8 * MIB)
        asking = asyncio.create_task(client.ask("t", 1, deadline_s=PATIENCE_S / 2))
        await until(lambda: disk.waiting and not unread_replies())
        await go_on_over_another_link(fleet, "a")
        (late,) = answers_of(fleet, "a").values()
        disk.go_on()
        outcome = await asking
        assert late.task.done()
        assert digest_of(outcome.value) == digest_of(noise(size))

    async def test_an_answer_that_comes_whole_twice_counts_once(self, fleet: Fleet, disk: SlowDisk) -> None:
        """An acknowledgement was lost with the link, say."""
        async with rogue(fleet) as agent:
            data = bytes(noise(9 * MIB))
            digest = hashlib.sha256(data).digest()
            disk.stop_after(8 * MIB)
            await agent.reply(len(data), digest)
            await (await agent.stream(len(data), digest, data)).finish()
            await until(lambda: disk.waiting)
            session = fleet.coordinator._fleet._members["rogue"]
            resume = Resume(session=session.name, secret=session.secret, received=1)
            break_link(fleet, "rogue")
            await until(lambda: session.link is None)
            agent.peer = await fleet.peer()
            await agent.peer.join("rogue", tasks=("t",), resume=resume)
            await RawPeer.take(agent.peer.coordination, Assignment)
            await agent.reply(len(data), digest)
            stream = await agent.stream(len(data), digest, data)
            await stream.finish()
            await until(lambda: [answer.link for answer in session.bodies._replies.values()] == [session.link])
            disk.go_on()
            outcome = await asyncio.wait_for(agent.asking, PATIENCE_S)
            assert outcome.results[0].bulk == BodyRef(size=len(data), digest=digest)
            assert fleet.metrics()["quorate_replies_total", "replied", "t"] == 1
            await agent.expect_well()


def is_held_up() -> bool:
    """Whether somebody reads no further because of the disk."""
    writers = [thing for thing in gc.get_objects() if isinstance(thing, blobs.BlobWriter)]
    return any(writer._filled >= blobs._BATCH_BYTES for writer in writers)


def answers_of(fleet: Fleet, agent: str) -> dict[int, Any]:
    """The answers of an agent that are being read."""
    return fleet.coordinator._fleet._members[agent].bodies._replies


def unread_replies() -> int:
    """Large answers whose agents do not know what has become of them."""
    return sum(core._replies.bodies_under_way for core in cores())


async def go_on_over_another_link(fleet: Fleet, agent: str) -> None:
    session = fleet.coordinator._fleet._members[agent]
    link = session.link
    break_link(fleet, agent)
    await until(lambda: session.link is not None and session.link is not link and session.link.has_opened.is_set())


def break_link(fleet: Fleet, agent: str) -> None:
    link = fleet.coordinator._fleet._link_of(agent)
    assert link is not None
    link.close(Code.INTERNAL, "test")


# --- memory ----------------------------------------------------------------------------------------


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is not a file's."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("Linux says it")


async def test_the_coordinators_memory_does_not_grow_with_the_bodies(tmp_path: Path) -> None:
    """512 MiB pass through a coordinator's process, half of them each way."""
    async with coordinator_process(tmp_path) as coordinator:
        token = (coordinator.state_dir / "token").read_text().strip()
        tls = ClientTls(coordinator.state_dir / "ca.pem")
        running = asyncio.create_task(
            answering("a", lambda array: array ^ 255).run(coordinator.url, token=token, tls=tls)
        )
        pid = coordinator.process.pid
        async with await Client.connect(coordinator.url, token=token, tls=tls) as client:
            async with asyncio.timeout(PATIENCE_S):
                while not (await client.agents()).agents:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            question = noise(4 * MIB)
            await client.ask("t", question, deadline_s=60.0)
            before = anonymous_bytes(pid)
            question = noise(256 * MIB)
            outcome = await client.ask("t", question, deadline_s=60.0)
            grown = anonymous_bytes(pid) - before
            assert digest_of(outcome.value ^ 255) == digest_of(question)
        running.cancel()
        await asyncio.wait((running,))
        assert grown < 64 * MIB, "windows and batches, and not the bodies"

"""Large bodies and links that break: whatever was under way comes over the next, once."""

import asyncio
import gc
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from coordination import PATIENCE_S, Fleet, RawPeer, until
from large_bodies import (
    MIB,
    answering,
    break_link,
    budget_of,
    digest_of,
    emptied,
    held_bytes,
    noise,
    refused,
    rogue,
    unread_replies,
)
from quorate_agent import Agent
from quorate_protocol import blobs
from quorate_protocol.blobs import BlobStore
from quorate_protocol.bodies import encode_body
from quorate_protocol.bulk import read_header
from quorate_protocol.channel import Channel
from quorate_protocol.errors import Code, ResetByPeer
from quorate_protocol.fields import BodyRef
from quorate_protocol.messages import (
    Assignment,
    Bulk,
    CoordinationOpened,
    Feedback,
    Reply,
    Resume,
)
from quorate_protocol.transport import ReceiveStream


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with emptied(tmp_path, rounds={"deadline_s": PATIENCE_S}) as fleet:
        yield fleet


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
        await until(lambda: disk.waiting and not unread_replies(fleet))
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


async def go_on_over_another_link(fleet: Fleet, agent: str) -> None:
    session = fleet.coordinator._fleet._members[agent]
    link = session.link
    break_link(fleet, agent)
    await until(lambda: session.link is not None and session.link is not link and session.link.has_opened.is_set())

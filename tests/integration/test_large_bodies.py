"""Bodies over the inline limit, through the whole system: questions, answers, outcomes, parts, truths."""

import asyncio
import contextlib
import errno
import hashlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from coordination import PATIENCE_S, Fleet, RawPeer, coordinating, until
from processes import coordinator_process
from quorate_agent import Agent
from quorate_agent import worker as agent_worker
from quorate_protocol import blobs
from quorate_protocol.blobs import BlobBudget, BlobStore, blob_of
from quorate_protocol.bodies import encode_body
from quorate_protocol.bulk import header_for, read_header, ref_to, send_blob
from quorate_protocol.channel import Channel
from quorate_protocol.client import Client
from quorate_protocol.errors import BodyMissing, CallFailed, Code, QuorateError, ResetByPeer, StoppedByPeer
from quorate_protocol.messages import Ask, Assignment, Bulk, Cancellation, Outcome, Reply
from quorate_protocol.transport import ClientTls, SendStream

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
        assert list(agent_stores[0].spool_dir.iterdir()) == []
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
    import gc

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


class TestBrokenDisk:
    @pytest.mark.parametrize("streamed", [False, True])
    async def test_an_answer_that_cannot_be_read_any_more_is_not_waited_for(
        self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch, streamed: bool
    ) -> None:
        def broken(file: Any, offset: int, count: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(blobs._SpoolFile, "read_cached", broken)
        await fleet.join(answering("a", lambda body: noise(12 * MIB)))
        client = await fleet.operator()

        async def ask() -> None:
            if streamed:
                async for _ in client.ask_stream("t", 1):
                    pass
            else:
                await client.ask("t", 1)

        with pytest.raises(ResetByPeer, match="INTERNAL"):
            await asyncio.wait_for(ask(), PATIENCE_S)


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

"""Bodies over the inline limit, through the whole system: questions, answers, outcomes, parts, truths."""

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from coordination import PATIENCE_S, Fleet, RawPeer, until
from journal_making import read_journal
from large_bodies import (
    DATA,
    DIGEST,
    MIB,
    answering,
    budget_of,
    digest_of,
    emptied,
    held_bytes,
    is_stopped,
    noise,
    refused,
    rogue,
)
from processes import coordinator_process
from quorate_agent import Agent
from quorate_coordinator.journal.records import ReplyLate
from quorate_coordinator.journal.schema import JOURNAL_NAME
from quorate_protocol import blobs
from quorate_protocol.blobs import BlobStore, blob_of
from quorate_protocol.bodies import encode_body
from quorate_protocol.bulk import header_for, read_header, ref_to, send_blob
from quorate_protocol.client import Client
from quorate_protocol.errors import BodyMissing, CallFailed, Code, ResetByPeer
from quorate_protocol.fields import BodyRef
from quorate_protocol.messages import (
    Assignment,
    Cancellation,
    Reply,
)
from quorate_protocol.transport import ClientTls


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with emptied(tmp_path, rounds={"deadline_s": PATIENCE_S}) as fleet:
        yield fleet


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
        started: list[str] = []
        sums: list[int] = []

        def agent_of(name: str) -> Agent:
            agent = Agent(name)

            @agent.task("t")
            async def add(array: Any) -> int:
                started.append(name)
                await gate.wait()
                sums.append(int(array.sum()))
                return sums[-1]

            return agent

        await fleet.join(*(agent_of(f"agent-{n}") for n in range(4)))
        client = await fleet.operator()
        question = noise(24 * MIB)
        asking = asyncio.create_task(client.ask("t", question, quorum=1.0))
        await until(lambda: len(started) == 4)
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

    @pytest.mark.parametrize("has_replied", [False, True], ids=["reply too late", "body too late"])
    async def test_an_answer_that_is_late_teaches_the_learner_how_slow_its_agent_is(
        self, fleet: Fleet, tmp_path: Path, has_replied: bool
    ) -> None:
        async with rogue(fleet, deadline_s=0.3) as agent:
            if has_replied:
                await agent.reply(len(DATA), DIGEST)
            assert (await asyncio.wait_for(agent.asking, PATIENCE_S)).state == "expired"
            if not has_replied:
                await agent.reply(len(DATA), DIGEST)
            gatherer = fleet.coordinator._gatherer
            await until(lambda: gatherer.learner.latency("rogue"))
            assert gatherer.book.stray_counts["late"] == 1
            assert refused(fleet) == {}
            await agent.expect_well()
        (late,) = (record for _, _, record in read_journal(tmp_path / JOURNAL_NAME) if isinstance(record, ReplyLate))
        assert late.body == BodyRef(size=len(DATA), digest=DIGEST)

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


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is not a file's."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("Linux says it")


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

"""What peers do wrong with large bodies: it costs them their own, and nobody else anything."""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from coordination import PATIENCE_S, Fleet, RawPeer, until
from large_bodies import (
    DATA,
    DIGEST,
    MIB,
    answering,
    budget_of,
    emptied,
    held_bytes,
    is_stopped,
    noise,
    refused,
    rogue,
    unread_replies,
)
from quorate_agent import Agent
from quorate_coordinator import agent_bodies, telling, uni_streams
from quorate_protocol import bulk
from quorate_protocol.blobs import blob_of
from quorate_protocol.bodies import encode_body
from quorate_protocol.bulk import ref_to
from quorate_protocol.channel import Channel
from quorate_protocol.errors import CallFailed, Code, ResetByPeer, StoppedByPeer
from quorate_protocol.messages import (
    Ask,
    Bulk,
    Feedback,
    Outcome,
    Reply,
)
from quorate_protocol.transport import SendStream


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with emptied(tmp_path, rounds={"deadline_s": PATIENCE_S}) as fleet:
        yield fleet


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
            await agent.expect_failed("the peer gave the stream up: INTERNAL", "given-up")

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
            (unclaimed,) = link.inbox._unclaimed
            link.inbox._expire(unclaimed)
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
        await until(lambda: not unread_replies(fleet))
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
        monkeypatch.setattr(telling, "UNTAKEN_S", 0.2)
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
        header = Bulk(of="ask", call=call.stream.id, size=len(DATA), digest=digest)
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
        header = Bulk(of="ask", call=call.stream.id, size=len(DATA), digest=DIGEST)
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

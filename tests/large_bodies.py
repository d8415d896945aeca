"""What tests of large bodies share."""

import asyncio
import contextlib
import gc
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy

from coordination import PATIENCE_S, Fleet, RawPeer, coordinating, until
from quorate_agent import Agent
from quorate_agent.core import AgentCore
from quorate_protocol.blobs import BlobBudget
from quorate_protocol.bodies import encode_body
from quorate_protocol.errors import CallFailed, Code, QuorateError, StoppedByPeer
from quorate_protocol.messages import (
    Assignment,
    Bulk,
    Cancellation,
    Outcome,
    Reply,
)
from quorate_protocol.transport import SendStream

MIB = 1 << 20
DATA = bytes(range(256)) * 8192
DIGEST = hashlib.sha256(DATA).digest()


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


def refused(fleet: Fleet) -> dict[str, float]:
    name = "quorate_bodies_refused_total"
    return {key[1]: value for key, value in fleet.metrics().items() if key[0] == name and value}


def digest_of(array: Any) -> str:
    return hashlib.sha256(numpy.ascontiguousarray(array).tobytes()).hexdigest()


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


async def is_stopped(stream: SendStream, code: Code | None = None) -> bool:
    """Whether the peer stops the stream, with this code; waits until it does."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await stream.send(b"")
                await asyncio.sleep(0.002)
    except StoppedByPeer as error:
        return code in (None, error.code)


def unread_replies(fleet: Fleet) -> int:
    """Large answers whose agents, which are in this process, do not know what has become of them."""
    sessions = {fleet.coordinator._fleet.registry.session_of(agent) for agent in fleet.agents}
    cores = [thing for thing in gc.get_objects() if isinstance(thing, AgentCore)]
    # Those of other tests may be there still.
    return sum(core._replies.bodies_under_way for core in cores if core._session and core._session.name in sessions)


def break_link(fleet: Fleet, agent: str) -> None:
    link = fleet.coordinator._fleet._link_of(agent)
    assert link is not None
    link.close(Code.INTERNAL, "test")

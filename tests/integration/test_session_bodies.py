"""An agent's large answers over one connection: what has become of each, by how its stream ended."""

import pytest

from links import Link, linked, read_all, until
from quorate_agent import events as ev
from quorate_agent.session_bodies import SessionBodies
from quorate_protocol.blobs import blob_of, make_private_store
from quorate_protocol.bulk import read_header, ref_to
from quorate_protocol.errors import Code
from quorate_protocol.transport import ReceiveStream

ANSWER = blob_of([bytes(24 << 20)])


@pytest.fixture
async def link(credentials):
    async with linked(credentials) as link:
        yield link


class Sending:
    """A session that sends one answer, and the coordinator's end of its stream."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.told: list[ev.Event] = []
        self.bodies = SessionBodies(link.here, make_private_store(), "a", self.told.append)

    async def begin(self) -> ReceiveStream:
        self.bodies.send(7, 2, ref_to(ANSWER).with_content(ANSWER))
        stream = await self.link.there.accept_uni_stream()
        await read_header(stream)
        return stream

    async def ended(self) -> list[ev.Event]:
        await until(lambda: not self.bodies._tasks)
        return self.told


@pytest.mark.parametrize("code", [Code.CANCELLED, Code.UNEXPECTED_MESSAGE, Code.BUSY, Code.BODY_INVALID])
async def test_what_the_coordinator_has_decided_is_over(link: Link, code: Code) -> None:
    sending = Sending(link)
    (await sending.begin()).stop(code)
    assert await sending.ended() == [ev.ReplyBodyDelivered(7, 2)]


@pytest.mark.parametrize("code", [Code.INTERNAL, Code.SHUTDOWN, Code.NO_ERROR, 0x1234])
async def test_what_nobody_can_tell_is_kept_for_the_next_link(link: Link, code: int) -> None:
    sending = Sending(link)
    (await sending.begin()).stop(code)
    assert await sending.ended() == []


async def test_what_was_read_is_over(link: Link) -> None:
    sending = Sending(link)
    stream = await sending.begin()
    assert sending.told == []
    await read_all(stream)
    assert await sending.ended() == [ev.ReplyBodyDelivered(7, 2)]


async def test_what_cannot_be_read_here_is_over(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator counts the reply as failed: its stream is reset."""

    async def fail(blob: object) -> None:
        raise OSError("the disk is broken")
        yield

    monkeypatch.setattr(type(ANSWER), "chunks", fail)
    sending = Sending(link)
    await sending.begin()
    assert await sending.ended() == [ev.ReplyBodyDelivered(7, 2)]

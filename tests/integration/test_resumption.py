"""How a coordinator lets an agent go on with its session: over real QUIC, the agent's end played by hand."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from coordination import PATIENCE_S, Fleet, RawPeer, coordinating, until
from links import Nat
from quorate_coordinator import links as links_module
from quorate_coordinator.membership import LinkBroken
from quorate_protocol.bodies import encode_body
from quorate_protocol.channel import Channel
from quorate_protocol.errors import Code
from quorate_protocol.messages import (
    Assignment,
    Cancellation,
    Drain,
    Feedback,
    Hello,
    Outcome,
    Refusal,
    Reply,
    Resume,
    Welcome,
)


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as entries:
        yield entries
    assert [entry for entry in entries if entry["event"] in ("connection_failed", "task_failed")] == []


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with coordinating(tmp_path / "state", rounds={"deadline_s": 15.0}) as fleet:
        yield fleet


def state(fleet: Fleet, agent: str = "raw") -> tuple[str, bool]:
    (member,) = [one for one in fleet.coordinator._fleet.registry.agents() if one.agent == agent]
    return member.state, member.has_link


async def break_off(fleet: Fleet, peer: RawPeer) -> None:
    """Ends a peer's link as a break does, and waits until the coordinator has noticed."""
    await peer.connection.close(Code.INTERNAL, "a break")
    await until(lambda: state(fleet) == ("suspect", False))


def of(welcome: Welcome, received: int = 0, **changed: Any) -> Resume:
    return Resume(**{"session": welcome.session, "secret": welcome.secret, "received": received, **changed})


async def ended(task: "asyncio.Task[Outcome]") -> Outcome:
    async with asyncio.timeout(PATIENCE_S):
        return await task


async def asked(
    fleet: Fleet, peer: RawPeer, body: Any = 1, **options: Any
) -> tuple[Assignment, "asyncio.Task[Outcome]"]:
    operator = await fleet.operator()
    asking = asyncio.create_task(operator.ask("echo", body, **options))
    return await peer.take(peer.coordination, Assignment), asking


async def test_a_session_goes_on_over_another_link(fleet: Fleet) -> None:
    first = await fleet.peer()
    welcome = await first.join()
    assert (welcome.resumed, welcome.received) == (False, 0)
    assert len(welcome.secret) >= 32
    assignment, asking = await asked(fleet, first)
    await break_off(fleet, first)
    assert fleet.infos()["raw"].state == "suspect"
    second = await fleet.peer()
    again = await second.join(resume=of(welcome, received=1))
    assert (again.session, again.secret, again.resumed, again.received) == (welcome.session, welcome.secret, True, 0)
    await until(lambda: state(fleet) == ("connected", True))
    await second.coordination.send(Reply(round=assignment.round, body=encode_body(7)))
    outcome = await ended(asking)
    assert (outcome.state, outcome.value) == ("complete", 7)
    await break_off(fleet, second)
    third = await fleet.peer()
    assert (await third.join(resume=of(welcome, received=1))).received == 1


async def test_a_reply_that_had_arrived_counts_although_the_link_is_over(fleet: Fleet) -> None:
    with contextlib.closing(Nat(("127.0.0.1", fleet.port))) as nat:
        peer = await fleet.peer(port=nat.port)
        await peer.join()
        assignment, asking = await asked(fleet, peer)
        held: list[bytes] = []
        carry, nat.to_server = nat.to_server, held.append
        peer.coordination.send_nowait(Reply(round=assignment.round, body=encode_body(7)))
        await until(lambda: any(len(datagram) > 50 for datagram in held))
        count = len(held)
        await peer.connection.close(Code.INTERNAL, "a break")
        await until(lambda: len(held) > count)
        # The reply and the end of everything are there at once.
        for datagram in held:
            carry(datagram)
        assert (await ended(asking)).value == 7
        assert state(fleet) == ("suspect", False)


async def test_a_link_that_still_stands_is_read_to_its_end_before_the_session_goes_on(fleet: Fleet) -> None:
    peer = await fleet.peer()
    welcome = await peer.join()
    assignment, asking = await asked(fleet, peer)
    for turn in range(1, 10):
        peer.coordination.send_nowait(Reply(round=assignment.round, body=encode_body(7)))
        await peer.coordination.stream.flush()
        following = await fleet.peer()
        assert (await following.join(resume=of(welcome, received=1))).received == turn
        assert (await peer.closed()).code == Code.REPLACED
        peer = following
    assert (await ended(asking)).value == 7
    assert fleet.infos()["raw"].state == "connected"


async def test_what_was_not_received_is_sent_again_after_the_stream_is_open(fleet: Fleet) -> None:
    peer = await fleet.peer()
    welcome = await peer.join()
    operator = await fleet.operator()
    assignment, asking = await asked(fleet, peer)
    await peer.coordination.send(Reply(round=assignment.round, body=encode_body(1)))
    first = await ended(asking)
    cancelled, asking = await asked(fleet, peer, deadline_s=600.0)
    await operator.reveal(first.round, 1)
    assert (await peer.take(peer.coordination, Feedback)).round == first.round
    await break_off(fleet, peer)
    asking.cancel()
    await asyncio.wait([asking])
    await until(lambda: fleet.coordinator.list_fleet().rounds_open == 0)
    # It says that it has received the first assignment alone.
    back = await fleet.peer()
    await back.join(resume=of(welcome, received=1))
    assert (await back.take(back.coordination, Feedback)).round == first.round
    assert (await back.take(back.coordination, Cancellation)).round == cancelled.round
    # These are the second and the third now.
    await break_off(fleet, back)
    last = await fleet.peer()
    await last.join(resume=of(welcome, received=2))
    assert (await last.take(last.coordination, Cancellation)).round == cancelled.round


async def test_a_log_that_does_not_reach_back_is_told(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, logged: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(links_module.FrameLog.__init__, "__defaults__", (1, 1000))
    peer = await fleet.peer()
    welcome = await peer.join()
    operator = await fleet.operator()
    rounds = []
    for _ in range(2):
        assignment, asking = await asked(fleet, peer)
        await peer.coordination.send(Reply(round=assignment.round, body=encode_body(1)))
        rounds.append((await ended(asking)).round)
    for round_id in rounds:
        await operator.reveal(round_id, 1)
    await break_off(fleet, peer)
    back = await fleet.peer()
    await back.join(resume=of(welcome, received=2))
    assert (await back.take(back.coordination, Feedback)).round == rounds[1]
    assert fleet.coordinator._fleet.resumed_with_gap_total == 1
    assert [entry["agent"] for entry in logged if entry["event"] == "frames_not_kept"] == ["raw"]


@pytest.mark.parametrize("changed", [{"secret": "guessed"}, {"secret": ""}, {"session": "other"}])
async def test_without_the_secret_the_session_is_over(fleet: Fleet, changed: dict[str, str]) -> None:
    peer = await fleet.peer()
    welcome = await peer.join()
    _, asking = await asked(fleet, peer)
    stranger = await fleet.peer()
    again = await stranger.join(resume=of(welcome, **changed))
    assert again.session != welcome.session
    assert again.secret != welcome.secret
    assert (again.resumed, again.received) == (False, 0)
    assert (await peer.closed()).code == Code.REPLACED
    assert (await ended(asking)).results[0].status == "lost"


async def test_a_session_is_its_agents_own(fleet: Fleet) -> None:
    peer = await fleet.peer()
    welcome = await peer.join()
    other = await fleet.peer()
    assert not (await other.join("other", resume=of(welcome))).resumed
    assert sorted(fleet.connected) == ["other", "raw"]


async def test_operators_have_nothing_to_resume(fleet: Fleet) -> None:
    peer = await fleet.peer()
    welcome = await peer.join()
    operator = await fleet.peer()
    answer = await operator.hello("raw", role="operator", resume=of(welcome))
    assert (answer.secret, answer.resumed) == ("", False)
    assert fleet.connected == ["raw"]


async def test_who_comes_back_is_let_in_by_a_coordinator_that_drains(fleet: Fleet) -> None:
    peer = await fleet.peer()
    welcome = await peer.join()
    assignment, asking = await asked(fleet, peer)
    draining = asyncio.create_task(fleet.coordinator.drain(PATIENCE_S))
    await until(lambda: not fleet.coordinator.is_ready)
    await break_off(fleet, peer)
    stranger = await fleet.peer()
    stranger.control = Channel(await stranger.open())
    await stranger.control.send(Hello(id="new", token=fleet.token, tasks=["echo"]))
    assert (await stranger.take(stranger.control, Refusal)).reason == "draining"
    back = await fleet.peer()
    assert (await back.join(resume=of(welcome, received=1))).resumed
    await back.coordination.send(Reply(round=assignment.round, body=encode_body(7)))
    assert (await ended(asking)).value == 7
    assert await draining


async def test_one_that_comes_back_and_does_not_open_its_stream_may_try_again(tmp_path: Path) -> None:
    async with coordinating(tmp_path, sessions={"hello_timeout_s": 0.1}) as fleet:
        peer = await fleet.peer()
        welcome = await peer.join()
        await break_off(fleet, peer)
        slow = await fleet.peer()
        assert (await slow.hello(resume=of(welcome))).resumed
        assert (await slow.closed()).code == Code.UNEXPECTED_MESSAGE
        await until(lambda: state(fleet) == ("suspect", False))
        back = await fleet.peer()
        assert (await back.join(resume=of(welcome))).resumed


async def test_an_orderly_end_of_the_connection_ends_the_session(fleet: Fleet) -> None:
    peer = await fleet.peer()
    welcome = await peer.join()
    await peer.leave()
    await until(lambda: fleet.infos()["raw"].state == "lost")
    back = await fleet.peer()
    assert not (await back.join(resume=of(welcome))).resumed


async def test_what_is_read_of_a_link_that_is_over_does_not_count(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent was told how many replies are here, and sends the others again."""
    members = fleet.coordinator._fleet
    taken: list[int] = []
    take = members._on_reply

    def take_and_lose_the_link(agent: str, reply: Reply) -> None:
        taken.append(reply.round)
        take(agent, reply)
        if len(taken) == 1:
            members._handle(LinkBroken(agent, welcome.session, "test", False))

    monkeypatch.setattr(members, "_on_reply", take_and_lose_the_link)
    peer = await fleet.peer()
    welcome = await peer.join()
    first, asking = await asked(fleet, peer)
    second, asking_again = await asked(fleet, peer)
    replies = [Reply(round=one.round, body=encode_body(7)) for one in (first, second)]
    await peer.coordination.stream.send(b"".join(reply.to_frame() for reply in replies))
    await ended(asking)
    await peer.connection.close(Code.INTERNAL, "a break")
    back = await fleet.peer()
    again = await back.join(resume=of(welcome, received=2))
    assert (again.resumed, again.received, taken) == (True, 1, [first.round])
    await back.coordination.send(replies[1])
    assert (await ended(asking_again)).value == 7
    assert taken == [first.round, second.round]


async def test_an_agent_told_to_stop_is_told_again_over_its_next_link(fleet: Fleet) -> None:
    peer = await fleet.peer()
    welcome = await peer.join()
    assert fleet.coordinator._fleet.drain("raw", "scaling down")
    assert await peer.take(peer.control, Drain) == Drain(reason="scaling down", stop=True)
    await peer.connection.close(Code.INTERNAL, "a break")
    await until(lambda: state(fleet) == ("draining", False))
    back = await fleet.peer()
    await back.join(resume=of(welcome))
    assert (await back.take(back.control, Drain)).stop
    assert state(fleet) == ("draining", True)


async def test_who_does_not_come_back_is_lost_after_a_lease(tmp_path: Path) -> None:
    async with coordinating(tmp_path, sessions={"pulse_s": 0.05, "lease_s": 0.4}) as fleet:
        peer = await fleet.peer()
        await peer.join()
        _, asking = await asked(fleet, peer, deadline_s=600.0)
        await break_off(fleet, peer)
        outcome = await ended(asking)
        assert (outcome.state, outcome.results[0].status) == ("failed", "lost")
        assert "did not come back within 0.4 s" in outcome.results[0].error
        assert fleet.infos()["raw"].state == "lost"

"""A question with a key: asked again, by whomever and whenever, it is the same round."""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_making import Gated, echo
from coordination import PATIENCE_S, Fleet, coordinating, until
from journal_making import closed as done
from journal_making import opened, read_journal, write_journal
from quorate_coordinator import gather, idempotency
from quorate_coordinator.idempotency import digest_of, earlier_digest_of
from quorate_coordinator.journal.reader import JournalReader
from quorate_coordinator.journal.records import RoundClosed, RoundOpened
from quorate_protocol.blobs import blob_of
from quorate_protocol.bodies import encode_body
from quorate_protocol.bulk import header_for, ref_to, send_blob
from quorate_protocol.channel import Channel
from quorate_protocol.client import Client
from quorate_protocol.errors import CallFailed, ConnectionClosed, StoppedByPeer
from quorate_protocol.messages import Ask, CallError, Outcome


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with coordinating(tmp_path / "state", rounds={"deadline_s": 15.0}) as fleet:
        yield fleet


@pytest.fixture
async def gated(fleet: Fleet) -> Gated:
    gated = Gated("a")
    await fleet.join(gated.agent)
    return gated


def closed(fleet: Fleet) -> dict[str, int]:
    return fleet.coordinator.list_fleet().rounds_closed


async def got(asking: "asyncio.Task[Outcome]") -> Outcome:
    async with asyncio.timeout(PATIENCE_S):
        return await asking


async def withdraw(asking: "asyncio.Task[Any]") -> None:
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking


async def test_asked_again_it_is_the_same_outcome(fleet: Fleet) -> None:
    await fleet.join(echo("a"))
    first, second = await fleet.operator(), await fleet.operator()
    outcome = await first.ask("echo", {"x": 1}, key="k-1", quorum=1, labels={})
    assert await first.ask("echo", {"x": 1}, key="k-1", quorum=1) == outcome
    assert await second.ask("echo", {"x": 1}, key="k-1", quorum=1) == outcome
    streamed = second.ask_stream("echo", {"x": 1}, key="k-1", quorum=1)
    results = [result async for result in streamed]
    assert (results, streamed.outcome, streamed.opened, streamed.round) == (outcome.results, outcome, None, 1)
    assert closed(fleet) == {"complete": 1}
    assert (await first.ask("echo", {"x": 1}, key="k-2", quorum=1)).round == 2


async def test_two_at_once_share_one_round(fleet: Fleet, gated: Gated) -> None:
    first, second = await fleet.operator(), await fleet.operator()
    asking = asyncio.create_task(first.ask("echo", 1, key="k"))
    await until(lambda: gated.running == 1)

    async def stream() -> tuple[list[str], Outcome, list[str]]:
        replies = second.ask_stream("echo", 1, key="k")
        agents = [result.agent async for result in replies]
        assert replies.opened is not None
        return agents, replies.outcome, replies.opened.selected

    streaming = asyncio.create_task(stream())
    repeated = fleet.coordinator._gatherer
    await until(lambda: repeated.repeated_total == 1)
    gated.gate.set()
    outcome = await got(asking)
    async with asyncio.timeout(PATIENCE_S):
        assert await streaming == (["a"], outcome, ["a"])
    assert (closed(fleet), gated.begun) == ({"complete": 1}, 1)


async def test_who_joins_and_streams_hears_of_parts_also_where_the_first_did_not_stream(
    fleet: Fleet, gated: Gated
) -> None:
    other = Gated("b")
    await fleet.join(other.agent)
    first, second = await fleet.operator(), await fleet.operator()
    asking = asyncio.create_task(first.ask("echo", 1, key="k", quorum=1.0))
    await until(lambda: gated.running == other.running == 1)
    told: list[str] = []

    async def stream() -> None:
        async for result in second.ask_stream("echo", 1, key="k", quorum=1.0):
            told.append(result.agent)  # noqa: PERF401  looked at meanwhile

    streaming = asyncio.create_task(stream())
    await until(lambda: fleet.coordinator._gatherer.repeated_total == 1)
    other.gate.set()
    await until(lambda: told)
    assert (told, gated.running, closed(fleet)) == (["b"], 1, {})
    gated.gate.set()
    await got(asking)
    async with asyncio.timeout(PATIENCE_S):
        await streaming
    assert told == ["b", "a"]


async def test_a_withdrawal_leaves_the_round_to_who_was_cut_off(fleet: Fleet, gated: Gated) -> None:
    first, second = await fleet.operator(), await fleet.operator()
    cut_off = asyncio.create_task(first.ask("echo", 1, key="k"))
    await until(lambda: gated.running == 1)
    withdrawn = asyncio.create_task(second.ask("echo", 1, key="k"))
    await until(lambda: fleet.coordinator._gatherer.repeated_total == 1)
    first._connection.abort()
    with pytest.raises(ConnectionClosed):
        await cut_off
    await until(lambda: len(fleet.coordinator._operators._owed) == 1)
    await withdraw(withdrawn)
    await until(lambda: not fleet.coordinator._operators._owed)
    assert (closed(fleet), gated.cancelled) == ({}, 0)
    back = asyncio.create_task((await fleet.operator()).ask("echo", 1, key="k"))
    await until(lambda: fleet.coordinator._gatherer.repeated_total == 2)
    gated.gate.set()
    assert (await got(back)).value == 1
    assert gated.begun == 1


@pytest.mark.parametrize("how", ["closed", "broken"])
async def test_a_round_with_a_key_outlives_its_operators_connection(fleet: Fleet, gated: Gated, how: str) -> None:
    first = await fleet.operator()
    asking = asyncio.create_task(first.ask("echo", 1, key="k"))
    await until(lambda: gated.running == 1)
    if how == "closed":
        await first.close()
    else:
        first._connection.abort()
    with pytest.raises(ConnectionClosed):
        await asking
    await until(lambda: not fleet.coordinator._operators._owed)
    second = await fleet.operator()
    again = asyncio.create_task(second.ask("echo", 1, key="k"))
    await until(lambda: fleet.coordinator._gatherer.repeated_total == 1)
    assert (gated.running, gated.cancelled, closed(fleet)) == (1, 0, {})
    gated.gate.set()
    assert (await got(again)).value == 1
    assert (closed(fleet), gated.begun) == ({"complete": 1}, 1)


async def test_an_outcome_that_nobody_heard_is_there_for_who_asks_again(fleet: Fleet, gated: Gated) -> None:
    first, second = await fleet.operator(), await fleet.operator()
    asking = asyncio.create_task(first.ask("echo", 1, key="k"))
    await until(lambda: gated.running == 1)
    await first.close()
    with pytest.raises(ConnectionClosed):
        await asking
    gated.gate.set()
    await until(lambda: closed(fleet) == {"complete": 1})
    assert (await second.ask("echo", 1, key="k")).round == 1
    assert gated.begun == 1


async def test_a_withdrawal_cancels_only_when_nobody_else_waits(fleet: Fleet, gated: Gated) -> None:
    first, second = await fleet.operator(), await fleet.operator()
    askings = [asyncio.create_task(client.ask("echo", 1, key="k")) for client in (first, second, first)]
    await until(lambda: gated.running == 1 and fleet.coordinator._gatherer.repeated_total == 2)
    await withdraw(askings[0])
    await withdraw(askings[1])
    await until(lambda: len(fleet.coordinator._operators._owed) == 1)
    assert (closed(fleet), gated.cancelled) == ({}, 0)
    await withdraw(askings[2])
    await until(lambda: closed(fleet) == {"cancelled": 1})
    await until(lambda: gated.cancelled == 1)


async def test_a_withdrawal_counts_where_the_connection_ends_right_after(fleet: Fleet, gated: Gated) -> None:
    """Ctrl-C: the call is reset, and the process ends."""
    for number in range(1, 6):
        operator = await fleet.operator()
        asking = asyncio.create_task(operator.ask("echo", number, key=f"k-{number}"))
        await until(lambda: gated.running == 1)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await operator.close()
        await until(lambda number=number: closed(fleet) == {"cancelled": number})
        await until(lambda: gated.running == 0)


async def test_a_stream_that_is_left_is_withdrawn_where_the_connection_is_closed_at_once(
    fleet: Fleet, gated: Gated
) -> None:
    await fleet.join(echo("b"))
    operator = await fleet.operator()
    async with operator.ask_stream("echo", 1, key="k", quorum=1.0) as replies:
        async for _ in replies:
            break
    # The loop has not had a turn since.
    await operator.close()
    await until(lambda: closed(fleet) == {"cancelled": 1})


async def test_a_round_that_was_withdrawn_frees_its_key_at_once(fleet: Fleet, gated: Gated) -> None:
    operator = await fleet.operator()
    for number in range(1, 11):
        asking = asyncio.create_task(operator.ask("echo", number, key="k"))
        await until(lambda number=number: gated.begun == number)
        await withdraw(asking)
        # It need not be durable when the same key, even with another question, is used again.
        await until(lambda number=number: closed(fleet) == {"cancelled": number})
    gated.gate.set()
    async with asyncio.timeout(PATIENCE_S):
        outcome = await operator.ask("echo", "last", key="k")
    assert (outcome.state, outcome.value) == ("complete", "last")
    assert closed(fleet) == {"cancelled": 10, "complete": 1}
    assert await operator.ask("echo", "last", key="k") == outcome


async def test_another_question_under_a_used_key_is_refused(fleet: Fleet, gated: Gated) -> None:
    operator = await fleet.operator()
    asking = asyncio.create_task(operator.ask("echo", 1, key="k"))
    await until(lambda: gated.running == 1)

    async def refused(value: Any, **options: Any) -> None:
        with pytest.raises(
            CallFailed, match="key: 'k' was used for another question, or with other options; take a new key"
        ) as caught:
            await operator.ask("echo", value, key="k", **options)
        assert (caught.value.reason, caught.value.retry) == ("bad-request", False)

    await refused(2)
    gated.gate.set()
    await got(asking)
    await refused(2)
    await refused(1, quorum=1)
    assert closed(fleet) == {"complete": 1}


async def test_an_observer_is_refused_also_with_a_key_that_is_known(fleet: Fleet) -> None:
    await fleet.join(echo("a"))
    operator, observer = await fleet.operator(), await fleet.operator(role="observer")
    await operator.ask("echo", 1, key="k")
    with pytest.raises(CallFailed) as caught:
        await observer.ask("echo", 1, key="k")
    assert caught.value.reason == "forbidden"


async def test_a_question_that_was_refused_leaves_its_key_free(fleet: Fleet) -> None:
    operator = await fleet.operator()
    with pytest.raises(CallFailed, match="no connected agent"):
        await operator.ask("echo", 1, key="k")
    await fleet.join(echo("a"))
    with pytest.raises(CallFailed, match="over the 1 selected"):
        await operator.ask("echo", 1, key="k", quorum=2)
    assert (await operator.ask("echo", 1, key="k")).value == 1


async def test_a_round_that_failed_is_an_outcome_as_any_other(fleet: Fleet) -> None:
    gated = Gated("a")
    await fleet.join(gated.agent)
    operator = await fleet.operator()
    outcome = await operator.ask("echo", 1, key="k", deadline_s=0.05)
    assert outcome.state == "expired"
    gated.gate.set()
    assert await operator.ask("echo", 1, key="k", deadline_s=0.05) == outcome


async def test_while_draining_what_was_answered_is_answered_again(fleet: Fleet) -> None:
    await fleet.join(echo("a"))
    operator = await fleet.operator()
    outcome = await operator.ask("echo", 1, key="k")
    assert await fleet.coordinator.drain(5.0)
    assert await operator.ask("echo", 1, key="k") == outcome
    with pytest.raises(CallFailed, match="draining"):
        await operator.ask("echo", 1, key="new")


async def test_the_journal_knows_keys_that_are_older_than_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency.Keys.__init__, "__kwdefaults__", {"kept_max": 1, "kept_bytes_max": 1 << 20})
    async with coordinating(tmp_path) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        outcomes = [await operator.ask("echo", number, key=f"k-{number}") for number in range(5)]
        for number, outcome in enumerate(outcomes):
            assert await operator.ask("echo", number, key=f"k-{number}") == outcome
        with pytest.raises(CallFailed, match="was used for another question"):
            await operator.ask("echo", 1.5, key="k-0")
    # Another run.
    async with coordinating(tmp_path) as fleet:
        operator = await fleet.operator()
        for number, outcome in enumerate(outcomes):
            assert await operator.ask("echo", number, key=f"k-{number}") == outcome
        with pytest.raises(CallFailed, match="was used for another question"):
            await operator.ask("echo", 1.5, key="k-0")
        assert closed(fleet) == {}
    records = [record for _, _, record in read_journal(tmp_path / "journal.sqlite3")]
    assert [record.key for record in records if isinstance(record, RoundClosed)] == [f"k-{n}" for n in range(5)]
    assert [record.key for record in records if isinstance(record, RoundOpened)] == [f"k-{n}" for n in range(5)]


async def test_one_question_may_come_inline_and_on_a_stream_of_its_own(fleet: Fleet, gated: Gated) -> None:
    """In flight and over, whichever way it came first; SPEC.md lets a sender choose for a small body."""
    client, peer = await fleet.operator(), await fleet.peer()
    await peer.hello("op", role="operator", tasks=())
    blob = blob_of([encode_body("x" * 1000)])

    async def as_bulk(key: str) -> Channel:
        channel = Channel(await peer.open())
        await channel.send(Ask(task="echo", bulk=ref_to(blob), key=key))
        with contextlib.suppress(StoppedByPeer):
            await send_blob(peer.connection, blob, header_for(blob, "ask", call=channel.stream.id))
        return channel

    for number, key in enumerate(("bulk-first", "inline-first"), 1):
        gated.gate.clear()
        if key == "bulk-first":
            calls = [await as_bulk(key)]
            await until(lambda: gated.running == 1)
            asking = asyncio.create_task(client.ask("echo", "x" * 1000, key=key))
        else:
            asking = asyncio.create_task(client.ask("echo", "x" * 1000, key=key))
            await until(lambda: gated.running == 1)
            calls = [await as_bulk(key)]
        calls.append(await as_bulk(key))
        gated.gate.set()
        outcome = await got(asking)
        calls.append(await as_bulk(key))
        assert [await peer.take(call, Outcome) for call in calls] == [outcome] * 3
        assert await client.ask("echo", "x" * 1000, key=key) == outcome
        assert (closed(fleet), gated.begun) == ({"complete": number}, number)
    await peer.leave()


async def test_a_key_from_before_bodies_were_digested_by_themselves_has_its_outcome(tmp_path: Path) -> None:
    digest = earlier_digest_of(Ask(task="echo", body=encode_body("old"), quorum=1))
    write_journal(tmp_path / "journal.sqlite3", [opened(1, key="k", digest=digest), done(1, key="k", digest=digest)])
    async with coordinating(tmp_path) as fleet:
        operator = await fleet.operator()
        assert (await operator.ask("echo", "old", quorum=1, key="k")).round == 1
        with pytest.raises(CallFailed, match="was used for another question"):
            await operator.ask("echo", "new", quorum=1, key="k")


async def test_outcomes_are_read_beside_everything_else_and_two_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {n: digest_of(Ask(task="echo", body=encode_body(n))) for n in range(1, 6)}
    records = [make(n, key=f"k-{n}", digest=digest) for n, digest in digests.items() for make in (opened, done)]
    write_journal(tmp_path / "journal.sqlite3", records)
    reading, go_on = [], threading.Event()
    find_round = JournalReader.find_round

    def slow(reader: JournalReader, number: int) -> Any:
        reading.append(number)
        assert go_on.wait(PATIENCE_S)
        return find_round(reader, number)

    async with coordinating(tmp_path) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        monkeypatch.setattr(JournalReader, "find_round", slow)
        askings = [asyncio.create_task(operator.ask("echo", n, key=f"k-{n}")) for n in digests]
        askings.append(asyncio.create_task(operator.ask("echo", 1, key="k-1")))
        try:
            await until(lambda: len(reading) == 2)
            # The loop goes on, also for a key that is new.
            assert (await operator.ask("echo", 1, key="new")).value == 1
            assert len(reading) == 2
        finally:
            go_on.set()
        assert [(await got(asking)).round for asking in askings] == [1, 2, 3, 4, 5, 1]
        assert closed(fleet) == {"complete": 1}


async def test_two_that_ask_a_key_anew_while_it_is_read_are_one_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal says that the key came to nothing: the first opens a round, and the other must not."""
    digest = digest_of(Ask(task="echo", body=encode_body(1)))
    ended = dataclasses.replace(done(1, key="k", digest=digest), state="cancelled")
    write_journal(tmp_path / "journal.sqlite3", [opened(1, key="k", digest=digest), ended])
    async with coordinating(tmp_path) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        first, second = await asyncio.gather(*(operator.ask("echo", 1, key="k") for _ in range(2)))
        assert first == second
        assert (first.state, closed(fleet)) == ("complete", {"complete": 1})


async def test_a_round_that_the_end_interrupted_is_asked_anew(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as fleet:
        gated = Gated("a")
        await fleet.join(gated.agent)
        operator = await fleet.operator()
        asking = asyncio.create_task(operator.ask("echo", 1, key="k"))
        await until(lambda: gated.running == 1)
        closing = asyncio.create_task(fleet.coordinator.close())
        assert (await got(asking)).state == "interrupted"
        await closing
    async with coordinating(tmp_path) as fleet:
        await fleet.join(echo("a"))
        outcome = await (await fleet.operator()).ask("echo", 1, key="k")
        assert outcome.state == "complete"
        assert outcome.round > 1


async def test_without_a_journal_keys_live_as_long_as_the_coordinator(tmp_path: Path) -> None:
    for _ in range(2):
        async with coordinating(tmp_path, journal={"sync": "off"}) as fleet:
            await fleet.join(echo("a"))
            operator = await fleet.operator()
            outcome = await operator.ask("echo", 1, key="k")
            assert await operator.ask("echo", 1, key="k") == outcome
            assert (await operator.reveal(outcome.round, 1)).correct is True
            assert closed(fleet) == {"complete": 1}
    assert not (tmp_path / "journal.sqlite3").exists()
    # Round numbers go on all the same.
    assert outcome.round > 1


async def test_a_body_whose_call_is_refused_before_it_is_taken_is_stopped(fleet: Fleet) -> None:
    """Begun or still to come; and the next question with the same body is taken."""
    await fleet.join(echo("a"))
    client, peer = await fleet.operator(), await fleet.peer()
    await client.ask("echo", 1, key="used")
    await peer.hello("op", role="operator", tasks=())
    blob = blob_of([encode_body("x" * (3 << 20))])
    budget = fleet.coordinator._fleet._desk.store.budget

    async def refused_ask(channel: Channel) -> None:
        await channel.send(Ask(task="echo", bulk=ref_to(blob), key="used"))
        refused = await channel.receive()
        assert isinstance(refused, CallError)
        assert "was used for another question" in refused.message

    channel = Channel(await peer.open())
    begun = await peer.connection.open_uni_stream()
    await begun.send(header_for(blob, "ask", call=channel.stream.id).to_frame() + b"x" * 1000)
    await until(lambda: budget.memory_bytes + budget.disk_bytes)
    await refused_ask(channel)
    with pytest.raises(StoppedByPeer):
        async with asyncio.timeout(PATIENCE_S):
            while True:
                await begun.send(b"x" * 1000)
                await asyncio.sleep(0.002)
    channel = Channel(await peer.open())
    await refused_ask(channel)
    with pytest.raises(StoppedByPeer):
        await send_blob(peer.connection, blob, header_for(blob, "ask", call=channel.stream.id))
    await until(lambda: budget.memory_bytes + budget.disk_bytes == 0)
    # Refused, and its body was never sent: what is asked next with the same body waits for its own.
    await refused_ask(Channel(await peer.open()))
    channel = Channel(await peer.open())
    sending = asyncio.create_task(send_blob(peer.connection, blob, header_for(blob, "ask", call=channel.stream.id)))
    await until(lambda: budget.memory_bytes + budget.disk_bytes)
    await channel.send(Ask(task="echo", bulk=ref_to(blob)))
    assert isinstance(await channel.receive(), Outcome)
    await sending
    await peer.leave()


async def test_calls_with_the_same_body_are_told_apart(fleet: Fleet) -> None:
    """Some refused, some joined, some cancelled, on one connection: whoever is left gets its answer."""
    await fleet.join(echo("a"))
    client = await fleet.operator()
    text = "x" * (2 << 20)
    await client.ask("echo", 1, key="used")
    known = await client.ask("echo", text, key="known")
    for _ in range(4):
        calls = [client.ask("echo", text, key=key) for key in (None, "used", "known", None, "used", "known", None)]
        tasks = [asyncio.create_task(call) for call in calls]
        await asyncio.sleep(0)
        tasks[-1].cancel()
        *answers, _ = await asyncio.gather(*tasks, return_exceptions=True)
        got = [one if isinstance(one, BaseException) else one.value == text for one in answers]
        assert [type(one) for one in got] == [bool, CallFailed, bool, bool, CallFailed, bool], got
        assert all(got)
        assert {answers[2].round, answers[5].round} == {known.round}  # type: ignore[union-attr]


class Crowded:
    """A coordinator that takes two rounds at once, and both are those of an operator that is gone."""

    def __init__(self, fleet: Fleet, gated: Gated) -> None:
        self.fleet, self.gated = fleet, gated

    @classmethod
    async def of(cls, fleet: Fleet) -> "Crowded":
        gated = Gated("a")
        await fleet.join(gated.agent, echo("free"))
        gone = await fleet.operator()
        asks = [asyncio.create_task(cls.ask(gone, n)) for n in range(2)]
        await until(lambda: gated.begun == 2)
        await gone.close()
        await asyncio.gather(*asks, return_exceptions=True)
        gatherer = fleet.coordinator._gatherer
        await until(lambda: all(asking.deserted_at is not None for asking in gatherer._asks.values()))
        return cls(fleet, gated)

    @staticmethod
    async def ask(client: Client, number: int) -> Outcome:
        return await client.ask("echo", number, key=f"k-{number}", quorum=1.0, deadline_s=86400.0)


@pytest.fixture
async def crowded(tmp_path: Path) -> AsyncIterator[Crowded]:
    async with coordinating(tmp_path / "state", rounds={"in_flight_max": 2}) as fleet:
        yield await Crowded.of(fleet)


async def test_rounds_that_nobody_waits_for_keep_their_place_for_a_while(crowded: Crowded) -> None:
    client = await crowded.fleet.operator()
    with pytest.raises(CallFailed, match="2 rounds are in flight, as many as there may be"):
        await client.ask("echo", "new")
    asking = asyncio.create_task(crowded.ask(client, 0))
    await until(lambda: crowded.fleet.coordinator._gatherer.repeated_total == 1)
    crowded.gated.gate.set()
    assert (await got(asking)).round == 1


async def test_rounds_that_nobody_has_waited_for_make_place_for_others(
    crowded: Crowded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was left first goes first; what somebody waits for again stays."""
    monkeypatch.setattr(gather, "DESERTED_S", 0.0)
    client = await crowded.fleet.operator()
    joined = asyncio.create_task(crowded.ask(client, 0))
    await until(lambda: crowded.fleet.coordinator._gatherer.repeated_total == 1)
    assert (await client.ask("echo", "new", quorum=1)).value == "new"
    await until(lambda: crowded.gated.cancelled)
    assert closed(crowded.fleet) == {"cancelled": 1, "quorate": 1}
    waiting = asyncio.create_task(client.ask("echo", 3, quorum=1.0))
    await until(lambda: crowded.fleet.coordinator._gatherer.book.in_flight == 2)
    with pytest.raises(CallFailed, match="2 rounds are in flight, as many as there may be"):
        await client.ask("echo", "more")
    crowded.gated.gate.set()
    assert [(await got(one)).value for one in (joined, waiting)] == [0, 3]
    # The key of the other is free: a new round.
    assert (await crowded.ask(client, 1)).round > 2

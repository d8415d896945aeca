"""Answers as frames: of very many agents, those that have room, and how many had none."""

import asyncio
from typing import Any

import pytest

from quorate_coordinator.fitting import fit
from quorate_protocol.frames import FrameDecoder
from quorate_protocol.limits import FRAME_BYTES_MAX, FRAME_PREFIX_BYTES
from quorate_protocol.messages import AgentInfo, AgentResult, Draining, Fleet, Outcome, Revealed, parse_message


def outcome_of(agents: int, *, body_bytes: int = 1) -> Outcome:
    results = [
        AgentResult(
            agent=f"sensor-{number:05}.site",
            status="replied",
            body=number.to_bytes(4, "big").ljust(body_bytes, b"\0"),
            latency_s=0.125,
            compute_s=0.1,
            waited_s=0.01,
            weight=1 / agents,
        )
        for number in range(agents)
    ]
    return Outcome(
        round=1, task="t", state="complete", quorum=1, answer=b"\x01", support=1.0, results=results, duration_s=1.0
    )


async def fitted(outcome: Outcome) -> Outcome:
    told, frame = await fit(outcome)
    assert isinstance(told, Outcome)
    assert len(frame) <= FRAME_PREFIX_BYTES + FRAME_BYTES_MAX
    decoder = FrameDecoder()
    assert parse_message(decoder.feed(frame)[0]) == told
    return told


@pytest.mark.parametrize("agents", [9_500, 16_384])
async def test_of_very_many_agents_the_results_that_have_room_are_told(agents: int) -> None:
    outcome = outcome_of(agents)
    told = await fitted(outcome)
    assert told.left_out > 0
    assert len(told.results) + told.left_out == agents
    assert told.results == outcome.results[: len(told.results)]
    assert told.model_copy(update={"results": [], "left_out": 0}) == outcome.model_copy(update={"results": []})
    # No more are left out than must be: a result takes some hundred bytes.
    assert len(told.to_frame()) > FRAME_BYTES_MAX - 200


async def test_where_all_have_room_none_is_left_out() -> None:
    outcome = outcome_of(8_000)
    assert await fitted(outcome) == outcome


async def test_of_many_agents_with_bodies_only_so_many_streams_are_needed() -> None:
    outcome = outcome_of(9_000, body_bytes=200)
    told = await fitted(outcome)
    moved = [result for result in told.results if result.bulk is not None]
    assert 0 < len(moved) <= 1024
    assert len(told.results) + told.left_out == 9_000
    assert all(result.bulk is not None and result.bulk.content is not None for result in moved)


async def test_a_large_outcome_does_not_hold_up_the_loop() -> None:
    """All that is done with 64 MiB happens elsewhere: the loop goes round meanwhile."""
    fitting = asyncio.ensure_future(fit(outcome_of(100, body_bytes=640_000)))
    turns = 0
    while not fitting.done():
        await asyncio.sleep(0)
        turns += 1
    told, _ = fitting.result()
    assert isinstance(told, Outcome)
    assert (len(told.results), told.left_out) == (100, 0)
    assert turns > 10


def info_of(number: int, **more: Any) -> AgentInfo:
    return AgentInfo(agent=f"sensor-{number:05}.site", state="connected", tasks=["t"], weights={"t": 0.125}, **more)


def listing_of(agents: list[AgentInfo]) -> Fleet:
    return Fleet(software="q", uptime_s=1.0, rounds_open=0, agents=agents)


@pytest.mark.parametrize("agents", [16_000, 20_000])
async def test_of_a_fleet_without_room_as_many_are_listed_as_have_some(agents: int) -> None:
    fleet = listing_of([info_of(number) for number in range(agents)])
    told, frame = await fit(fleet)
    assert isinstance(told, Fleet)
    assert FRAME_BYTES_MAX - 300 < len(frame) <= FRAME_PREFIX_BYTES + FRAME_BYTES_MAX
    assert len(told.agents) + told.left_out == agents
    assert told.left_out
    assert [one.agent for one in told.agents] == sorted(one.agent for one in told.agents)


async def test_agents_with_very_many_labels_do_not_hide_the_others() -> None:
    """A hello may have 64 KiB of them."""
    fat = {f"{number:04}": "x" * 250 for number in range(240)}
    agents = [info_of(number, labels=fat if number % 50 == 0 else {}) for number in range(1000)]
    told, _ = await fit(listing_of(agents))
    assert isinstance(told, Fleet)
    assert 0 < told.left_out < 20
    assert [one for one in told.agents if not one.labels] == [one for one in agents if not one.labels]


async def test_a_fleet_that_has_room_is_told_whole() -> None:
    fleet = listing_of([info_of(number) for number in range(5_000)])
    assert (await fit(fleet))[0] == fleet
    assert await fit(Draining(agent="a")) == (Draining(agent="a"), Draining(agent="a").to_frame())


@pytest.mark.parametrize("scored", [1, 2, 7])
async def test_of_a_truth_about_very_many_agents_as_many_are_told_as_have_room(scored: int) -> None:
    """Some that did not reply have weights all the same."""
    names = [f"sensor-{number:05}.site" for number in range(50_000)]
    revealed = Revealed(
        round=1, correct=True, right=dict.fromkeys(names[::scored], True), weights=dict.fromkeys(names, 1 / 50_000)
    )
    told, frame = await fit(revealed)
    assert isinstance(told, Revealed)
    assert FRAME_BYTES_MAX - 300 < len(frame) <= FRAME_PREFIX_BYTES + FRAME_BYTES_MAX
    assert len(told.weights) + told.left_out == 50_000
    assert set(told.right) == set(told.weights) & set(revealed.right)
    few = Revealed(round=1, right={"a": True}, weights={"a": 1.0})
    assert await fit(few) == (few, few.to_frame())

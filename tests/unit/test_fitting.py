"""Outcomes as frames: of very many agents, the results that have room, and how many had none."""

import asyncio

import pytest

from quorate_coordinator.fitting import fit
from quorate_protocol.frames import FrameDecoder
from quorate_protocol.limits import FRAME_BYTES_MAX, FRAME_PREFIX_BYTES
from quorate_protocol.messages import AgentResult, CallError, Draining, Fleet, Outcome, parse_message


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


async def test_another_answer_that_has_no_room_is_an_error() -> None:
    assert await fit(Draining(agent="a")) == (Draining(agent="a"), Draining(agent="a").to_frame())
    fleet = Fleet(
        software="q", uptime_s=1.0, rounds_open=0, agents=[], rounds_closed={str(n): n for n in range(200_000)}
    )
    told, _ = await fit(fleet)
    assert isinstance(told, CallError)
    assert told.reason == "internal"

"""Answers as frames: an outcome's bodies that have no room in one go on streams of their own; of very many agents, some
are left out."""

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from typing import Final

import msgpack

from quorate_protocol.blobs import blob_of
from quorate_protocol.bulk import ref_to
from quorate_protocol.errors import FrameTooLarge
from quorate_protocol.fields import BodyRef, inline_bytes
from quorate_protocol.limits import FRAME_BYTES_MAX, STREAMS_MAX
from quorate_protocol.messages import AgentInfo, AgentResult, Fleet, Message, Outcome, Revealed

#: Characters of an agent's error that stay where an outcome has no room for all.
_ERROR_CHARS_LEFT: Final = 200

#: What a reference takes in a frame in place of a body, in bytes, at the most.
_REFERENCE_BYTES: Final = 80

#: Bodies of one outcome that go on streams of their own because they have no room: each takes a round trip.
_MOVED_MAX: Final = STREAMS_MAX

#: Results of an outcome that are packed on the loop; more would hold it up.
_RESULTS_MAX: Final = 1000

#: What `left_out` takes in a frame, in bytes, at the most.
_LEFT_OUT_BYTES: Final = 18


async def fit(answer: Message) -> tuple[Message, bytes]:
    """The answer as it is told, and its frame. What is large is done in a thread."""
    match answer:
        case Outcome():
            return await _fit_any_outcome(answer)
        case Fleet(agents=many) | Revealed(weights=many) if len(many) > _RESULTS_MAX:
            return await asyncio.to_thread(_fit_listing, answer)
        case Fleet() | Revealed():
            return _fit_listing(answer)
    return answer, answer.to_frame()


async def _fit_any_outcome(outcome: Outcome) -> tuple[Outcome, bytes]:
    if len(outcome.results) <= _RESULTS_MAX and _bodies_bytes(outcome) <= FRAME_BYTES_MAX:
        with contextlib.suppress(FrameTooLarge):
            return outcome, outcome.to_frame()
    return await asyncio.to_thread(_fit_outcome, outcome)


def _bodies_bytes(outcome: Outcome) -> int:
    return inline_bytes(outcome.answer) + sum(inline_bytes(result.body) for result in outcome.results)


def _fit_outcome(outcome: Outcome) -> tuple[Outcome, bytes]:
    """The outcome and its frame: with its largest inline bodies on streams of their own, as many as have to go, and
    without the last of its results where even so not all have room."""
    excess_bytes = _excess_bytes(outcome)
    if excess_bytes > 0:
        outcome, excess_bytes = _move_out(outcome)
    if excess_bytes > 0:
        sizes = [_packed_bytes(result) for result in outcome.results]
        left = len(sizes) - _how_many(reversed(sizes), excess_bytes)
        outcome = outcome.model_copy(update={"results": outcome.results[:left], "left_out": len(sizes) - left})
    return outcome, outcome.to_frame()


def _fit_listing(answer: Fleet | Revealed) -> tuple[Fleet | Revealed, bytes]:
    """The answer and its frame: without those agents that take most, where not all have room."""
    excess_bytes = _excess_bytes(answer)
    if excess_bytes > 0 and isinstance(answer, Fleet):
        # One with many labels must not hide the others.
        sizes = sorted(((_packed_bytes(one), one.agent) for one in answer.agents), reverse=True)
        gone = {agent for _, agent in sizes[: _how_many((size for size, _ in sizes), excess_bytes)]}
        agents = [one for one in answer.agents if one.agent not in gone]
        answer = answer.model_copy(update={"agents": agents, "left_out": len(gone)})
    elif excess_bytes > 0 and isinstance(answer, Revealed):
        right, weights = dict(answer.right), dict(answer.weights)
        sizes = sorted(((_entry_bytes(one, right, weights), one) for one in {*right, *weights}), reverse=True)
        gone = {agent for _, agent in sizes[: _how_many((size for size, _ in sizes), excess_bytes)]}
        for agent in gone:
            right.pop(agent, None)
            weights.pop(agent, None)
        answer = answer.model_copy(update={"right": right, "weights": weights, "left_out": len(gone)})
    return answer, answer.to_frame()


def _move_out(outcome: Outcome) -> tuple[Outcome, int]:
    """The outcome with shorter errors and its largest bodies moved out; and how many bytes are still too many."""
    results = [result.model_copy(update={"error": result.error[:_ERROR_CHARS_LEFT]}) for result in outcome.results]
    outcome = outcome.model_copy(update={"results": results})
    excess_bytes = _excess_bytes(outcome)
    moved: dict[bytes, BodyRef] = {}
    bodies = {body for body in (outcome.answer, *(result.body for result in results)) if body}
    for body in sorted(bodies, key=len, reverse=True):
        if excess_bytes <= 0 or len(body) <= _REFERENCE_BYTES or len(moved) == _MOVED_MAX:
            break
        blob = blob_of([body])
        moved[body] = ref_to(blob).with_content(blob)
        places = (outcome.answer == body) + sum(result.body == body for result in results)
        excess_bytes -= places * (len(body) - _REFERENCE_BYTES)
    for at, result in enumerate(results):
        if result.body in moved:
            results[at] = result.model_copy(update={"body": None, "bulk": moved[result.body]})
    if outcome.answer in moved:
        outcome = outcome.model_copy(update={"answer": None, "bulk": moved[outcome.answer]})
    return outcome, _excess_bytes(outcome)


def _how_many(sizes: Iterable[int], excess_bytes: int) -> int:
    """How many of the first have to go so that so many bytes are saved; and that it can be said how many."""
    missing_bytes = excess_bytes + _LEFT_OUT_BYTES
    count = 0
    for size in sizes:
        if missing_bytes <= 0:
            break
        missing_bytes -= size
        count += 1
    return count


def _packed_bytes(result: AgentResult | AgentInfo) -> int:
    return len(msgpack.packb(result.model_dump(exclude_defaults=True)))


def _entry_bytes(key: str, *maps: Mapping[str, object]) -> int:
    """What a key takes in some maps."""
    return sum(len(msgpack.packb({key: values[key]})) - 1 for values in maps if key in values)


def _excess_bytes(answer: Message) -> int:
    try:
        answer.to_frame()
    except FrameTooLarge as error:
        return error.frame_bytes - error.frame_bytes_max
    return 0

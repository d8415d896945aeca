"""Outcomes as frames: what has no room in one goes on streams of its own; of very many agents, some are left out."""

import asyncio
import contextlib
from typing import Final

import msgpack

from quorate_protocol.blobs import blob_of
from quorate_protocol.bulk import ref_to
from quorate_protocol.errors import FrameTooLarge
from quorate_protocol.fields import BodyRef, inline_bytes
from quorate_protocol.limits import FRAME_BYTES_MAX, STREAMS_MAX
from quorate_protocol.messages import AgentResult, CallError, Message, Outcome

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
    if isinstance(answer, Outcome):
        return await _fit_any_outcome(answer)
    try:
        return answer, answer.to_frame()
    except FrameTooLarge as error:
        message = f"the answer of {error.frame_bytes} bytes is over the {error.frame_bytes_max} that a frame may have"
        failure = CallError(reason="internal", message=message)
        return failure, failure.to_frame()


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
        outcome = _leave_out(outcome, excess_bytes)
    return outcome, outcome.to_frame()


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


def _leave_out(outcome: Outcome, excess_bytes: int) -> Outcome:
    results = list(outcome.results)
    excess_bytes += _LEFT_OUT_BYTES
    while excess_bytes > 0:
        excess_bytes -= _packed_bytes(results.pop())
    left_out = len(outcome.results) - len(results)
    return outcome.model_copy(update={"results": results, "left_out": left_out})


def _packed_bytes(result: AgentResult) -> int:
    return len(msgpack.packb(result.model_dump(exclude_defaults=True)))


def _excess_bytes(outcome: Outcome) -> int:
    try:
        outcome.to_frame()
    except FrameTooLarge as error:
        return error.frame_bytes - error.frame_bytes_max
    return 0

"""Short ways to write the events of rounds, and to pick instructions apart."""

from collections.abc import Iterable
from typing import Any, TypeVar

from quorate_coordinator.rounds.events import ReplyReceived, ReplyStatus, RoundRequested
from quorate_coordinator.rounds.instructions import CloseRound, Instruction, Outcome
from quorate_coordinator.rounds.policy import RoundPolicy
from quorate_coordinator.rounds.round import Round

InstructionT = TypeVar("InstructionT")

ABC = ("a", "b", "c")


def make_policy(
    quorum: int | float = 2, *, grace_s: float | None = 1.0, deadline_s: float = 10.0, attempts: int = 1
) -> RoundPolicy:
    """A policy; an int is a count, a float a fraction."""
    if isinstance(quorum, int):
        return RoundPolicy(deadline_s=deadline_s, grace_s=grace_s, quorum=quorum, attempts=attempts)
    return RoundPolicy(deadline_s=deadline_s, grace_s=grace_s, quorum_fraction=quorum, attempts=attempts)


def make_request(
    selected: Iterable[str] = ABC,
    policy: RoundPolicy | None = None,
    *,
    request_id: int = 7,
    away: Iterable[str] = (),
    body: bytes = b"question",
    operator: str = "",
    is_streamed: bool = False,
) -> RoundRequested:
    """A request for a round."""
    return RoundRequested(
        request_id, "classify", body, tuple(selected), tuple(away), policy or make_policy(), operator, is_streamed
    )


def open_round(
    selected: Iterable[str] = ABC,
    *,
    now: float = 100.0,
    quorum: int | float = 2,
    grace_s: float | None = 1.0,
    deadline_s: float = 10.0,
    attempts: int = 1,
    away: Iterable[str] = (),
    is_streamed: bool = False,
) -> tuple[Round, list[Instruction]]:
    """A round that was opened at `now`, and what its opening said."""
    policy = make_policy(quorum, grace_s=grace_s, deadline_s=deadline_s, attempts=attempts)
    round_ = Round(1, make_request(selected, policy, away=away, is_streamed=is_streamed), now)
    return round_, round_.open()


def make_reply(
    agent: str, round_id: int = 1, status: ReplyStatus = "replied", *, attempt: int = 1, body: bytes | None = b"answer"
) -> ReplyReceived:
    """A reply; with a status other than replied it has an error in place of the body."""
    if status == "replied":
        return ReplyReceived(round_id, agent, attempt, status, body, compute_s=0.25, waited_s=0.125)
    return ReplyReceived(round_id, agent, attempt, status, None, error=f"{agent} {status}")


def only(kind: type[InstructionT], instructions: Iterable[Any]) -> InstructionT:
    """The one instruction of a kind."""
    found = [instruction for instruction in instructions if isinstance(instruction, kind)]
    assert len(found) == 1, f"{len(found)} of {kind.__name__}"
    return found[0]


def outcome_in(instructions: Iterable[Instruction]) -> Outcome:
    """The outcome that was announced, once."""
    return only(CloseRound, instructions).outcome


def statuses(outcome: Outcome) -> dict[str, str]:
    """Agent to status; asserts one result for each selected agent, in order."""
    assert tuple(result.agent for result in outcome.results) == outcome.selected == tuple(sorted(set(outcome.selected)))
    return {result.agent: result.status for result in outcome.results}

"""Several may wait for one round: who is told what, and when nobody wants it any more."""

import asyncio

import pytest

from quorate_coordinator.asking import Asking, Listener
from quorate_coordinator.ledger import Question
from quorate_protocol.errors import CallFailed
from quorate_protocol.messages import AgentResult, Opened, Outcome, Part

OPENED = Opened(round=3, selected=["a"], quorum=1, deadline_s=1.0)
PART = Part(round=3, result=AgentResult(agent="a", status="replied", body=b"\xc0"))
OUTCOME = Outcome(round=3, task="t", state="complete", quorum=1, results=[], duration_s=0.1)


class Call:
    """A call and how often it was cancelled."""

    def __init__(self, key: str | None = None) -> None:
        self.cancelled = 0
        self.asking = Asking(1, Question(key, b"d" if key else None), self._cancel)

    def _cancel(self, asking: Asking) -> None:
        assert asking is self.asking
        self.cancelled += 1


async def test_listeners_hear_of_the_opening_and_of_parts_from_when_they_join() -> None:
    call = Call("k")
    first: list[Opened | Part] = []
    second: list[Opened | Part] = []
    call.asking.join(first.append)
    call.asking.tell(OPENED)
    call.asking.tell(PART)
    call.asking.join(second.append)
    call.asking.tell(PART)
    assert first == [OPENED, PART, PART]
    assert second == [OPENED, PART]


async def test_who_leaves_is_told_nothing_more() -> None:
    call = Call("k")
    told: dict[str, list[Opened | Part]] = {"leaves": [], "withdraws": [], "stays": []}
    listeners: dict[str, Listener] = {name: messages.append for name, messages in told.items()}
    for listener in listeners.values():
        call.asking.join(listener)
    call.asking.leave(listeners["leaves"])
    call.asking.withdraw(listeners["withdraws"])
    call.asking.tell(OPENED)
    assert told == {"leaves": [], "withdraws": [], "stays": [OPENED]}


async def test_who_joins_after_the_end_gets_the_outcome_alone() -> None:
    call, told = Call("k"), list[Opened | Part]()
    call.asking.join(None)
    call.asking.tell(OPENED)
    call.asking.answer(OUTCOME)
    call.asking.join(told.append)
    assert (await call.asking.outcome, told) == (OUTCOME, [])


@pytest.mark.parametrize("how", ["leave", "withdraw"])
async def test_without_a_key_the_round_goes_with_its_operator(how: str) -> None:
    call = Call()
    call.asking.join(None)
    getattr(call.asking, how)(None)
    assert call.cancelled == 1


async def test_with_a_key_it_outlives_who_is_cut_off() -> None:
    call = Call("k")
    call.asking.join(None)
    call.asking.leave(None)
    assert call.cancelled == 0
    call.asking.join(None)
    call.asking.withdraw(None)
    assert call.cancelled == 1


async def test_a_withdrawal_cancels_only_when_nobody_else_waits() -> None:
    call = Call("k")
    call.asking.join(None)
    call.asking.join(None)
    call.asking.withdraw(None)
    assert call.cancelled == 0
    call.asking.withdraw(None)
    assert call.cancelled == 1


async def test_a_withdrawal_does_not_cancel_for_who_was_cut_off_and_may_come_back() -> None:
    call = Call("k")
    call.asking.join(None)
    call.asking.join(None)
    call.asking.leave(None)
    call.asking.withdraw(None)
    assert call.cancelled == 0
    call.asking.join(None)
    call.asking.withdraw(None)
    assert call.cancelled == 1


@pytest.mark.parametrize("is_answered", [True, False])
async def test_what_is_over_is_not_cancelled(is_answered: bool) -> None:
    call = Call()
    call.asking.join(None)
    if is_answered:
        call.asking.answer(OUTCOME)
    else:
        call.asking.fail(CallFailed("busy", "too much", retry=True))
    call.asking.withdraw(None)
    assert call.cancelled == 0


async def test_the_first_end_counts() -> None:
    call = Call("k")
    call.asking.fail(CallFailed("not-recorded", "disk full", retry=True))
    call.asking.answer(OUTCOME)
    for _ in range(2):
        with pytest.raises(CallFailed, match="disk full"):
            await asyncio.shield(call.asking.outcome)

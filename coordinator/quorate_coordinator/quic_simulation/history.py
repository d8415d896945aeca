"""What is seen from outside of a fleet of real shells, and what must hold of it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn

from quorate_coordinator.journal.reader import JournalReader
from quorate_coordinator.journal.records import RoundClosed
from quorate_coordinator.simulation.plan import CallPlan
from quorate_protocol.messages import Outcome

#: Seconds by which a round may be over its deadline: the loop runs its timers a little late.
_SLACK_S: Final = 1e-3


class NotHeld(Exception):
    """Something that must hold does not."""

    def __init__(self, invariant: str, message: str) -> None:
        super().__init__(f"{invariant}: {message}")
        self.invariant = invariant
        self.message = message


def fail(invariant: str, message: str) -> NoReturn:
    """Ends the run.

    Raises:
        NotHeld: always.
    """
    raise NotHeld(invariant, message)


@dataclass(slots=True)
class History:
    """Of one run."""

    #: By agent and round: the answers that its handlers gave.
    said: dict[tuple[str, int], list[Any]] = field(default_factory=dict)
    #: (process, round, attempt) that a handler ran for.
    started: set[tuple[str, int, int]] = field(default_factory=set)
    #: By key: the outcome that an operator was told, for good.
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    rounds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    announcements: int = 0
    #: What a handler found: whatever it raises is its failure only.
    _found: NotHeld | None = None

    def check(self) -> None:
        """Every so often, and at the end.

        Raises:
            NotHeld: a handler has found that something does not hold.
        """
        if self._found is not None:
            raise self._found

    def handler_started(self, process: str, round_id: int, attempt: int) -> None:
        """A handler begins an assignment."""
        work = process, round_id, attempt
        if work in self.started:
            message = f"{process} runs round {round_id}, attempt {attempt}, again"
            self._found = NotHeld("no assignment runs twice in a process", message)
        self.started.add(work)

    def told(self, call: CallPlan, outcome: Outcome) -> None:
        """An operator is told the end of its round."""
        number, state = outcome.round, outcome.state
        names = [result.agent for result in outcome.results]
        if names != sorted(set(names)):
            fail("one status for each selected agent", f"round {number} has results of {names}")
        replied = [result for result in outcome.results if result.status == "replied"]
        if state in ("complete", "quorate") and len(replied) < outcome.quorum:
            fail("quorum is never claimed falsely", f"round {number} is {state} with {len(replied)} replies")
        if state in ("failed", "expired") and len(replied) >= outcome.quorum:
            fail("quorum is seen when it is there", f"round {number} is {state} with {len(replied)} replies")
        if state == "complete" and len(replied) != len(names):
            fail("complete means everybody", f"round {number} is complete with {len(replied)} of {len(names)}")
        if call.quorum is not None and outcome.quorum != call.quorum:
            fail("quorum is what was asked for", f"round {number} needed {outcome.quorum}, not {call.quorum}")
        if call.deadline_s is not None and outcome.duration_s > call.deadline_s + _SLACK_S:
            message = f"round {number} ended after {outcome.duration_s:.3f} s, with a deadline of {call.deadline_s:g} s"
            fail("rounds end by their deadline", message)
        for result in replied:
            if result.value not in self.said.get((result.agent, number), ()):
                fail("a reply is its agent's own", f"round {number} has {result.value!r} of {result.agent}")
        self.announcements += 1
        self.rounds[state] += 1
        self.statuses.update(result.status for result in outcome.results)
        if state not in ("cancelled", "interrupted"):
            self.outcomes[call.key] = outcome

    def told_again(self, key: str, outcome: Outcome) -> None:
        """The same call was made again, long after."""
        known = self.outcomes[key]
        if (outcome.round, outcome.state, outcome.results) != (known.round, known.state, known.results):
            message = f"{key} was told round {known.round} ({known.state}), and now {outcome.round} ({outcome.state})"
            fail("the same call has the same outcome", message)

    def check_journal(self, file: Path, calls: Iterable[CallPlan] = ()) -> None:
        """The coordinator is gone: what was announced is in its journal, and what it did for these calls."""
        waits = {call.key for call in calls if call.cancel_after_s is None}
        #: By key: the round that answers it.
        answers: dict[str, int] = {}
        with JournalReader(file) as journal:
            for _, _, record in journal.records():
                if not isinstance(record, RoundClosed) or record.key is None:
                    continue
                number, key = record.round, record.key
                if record.state == "cancelled" and key in waits:
                    fail("only its operator cancels a round", f"round {number} of {key} is cancelled: {record.reason}")
                if record.state in ("cancelled", "interrupted"):
                    continue
                if key in answers:
                    fail("one round for each key", f"rounds {answers[key]} and {number} have both answered {key}")
                answers[key] = number
            if journal.open_rounds():
                fail("every round ends", f"rounds {journal.open_rounds()[:5]} are open in the journal")
            for key, outcome in self.outcomes.items():
                known = journal.find_round(outcome.round)
                closed = None if known is None else known.closed
                if closed is None or closed.state != outcome.state:
                    fail("announced is durable", f"round {outcome.round}, told to {key}, is {closed} in the journal")
                here = [(result.agent, result.status) for result in closed.results]
                if here != [(result.agent, result.status) for result in outcome.results]:
                    fail("announced is durable", f"round {outcome.round} has other results in the journal: {here}")

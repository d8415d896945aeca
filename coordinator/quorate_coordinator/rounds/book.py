"""All rounds: those in flight, and those that are closed and remembered.

What an event costs. It depends on the agents of the rounds that it touches and never on how many
rounds are in flight: timers are a heap, `AgentLost` goes by an index of each agent's rounds, and a
reply goes straight to its round.

What is bounded, and what happens beyond (`BookLimits`):

- rounds in flight, in all, for each agent and for each operator: a request over it is rejected as `busy`;
- bytes of questions and replies held by rounds in flight, but for large bodies, which the book has by reference only
  (the shell bounds their bytes): requests are rejected as `busy` while they are
  used up, and a reply that finds no room counts as `failed`;
- the same bytes of each round, so that its end can be recorded: a reply that finds no room counts as `failed`;
- closed rounds that await their truth, by count and by bytes: the oldest is forgotten, and counted;
- what is known of closed rounds after that (to tell a duplicate from a stranger): dropped silently,
  oldest first.

Feedback. A round's truth goes to its agents as soon as it is revealed, and instructions are carried
out in order; so an operator that reveals in round order has feedback in round order, each before any
assignment that is asked for later. When truths come out of order, feedback follows the truths: one
that may never come must not hold back the others. The round's number is in the feedback.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, assert_never

from quorate_coordinator.rounds.events import (
    AgentLost,
    AgentReachable,
    CoordinatorStopped,
    DrainRequested,
    Event,
    ReplyReceived,
    RoundCancelled,
    RoundRequested,
    TimerFired,
    TruthRevealed,
)
from quorate_coordinator.rounds.instructions import (
    AnnounceDrained,
    Instruction,
    NoteForgotten,
    NoteStray,
    Outcome,
    RejectReason,
    RejectRequest,
    StrayKind,
)
from quorate_coordinator.rounds.policy import NobodySelected, PolicyConflict, TooFewSelected
from quorate_coordinator.rounds.round import Round, RoundEvent
from quorate_coordinator.rounds.shelf import Shelf
from quorate_coordinator.timers import Timers
from quorate_protocol.fields import RoundState, inline_bytes

#: What a closed round costs beside the bodies of its replies, in bytes: a result with its floats and
#: its places in tuples (230 were measured), and the round itself.
_RESULT_BYTES: Final = 256
_ROUND_BYTES: Final = 1024

#: The same once its outcome is let go, in bytes: a place in a tuple and one in the set of those owing (42 were
#: measured where everybody owes).
_TRACE_AGENT_BYTES: Final = 80

_NO_ROOM: Final = "the coordinator has no room for more replies"
_NO_ROOM_IN_ROUND: Final = "the round has no room for more answers that are inline"


@dataclass(frozen=True, slots=True)
class BookLimits:
    """Ceilings of one coordinator's rounds."""

    #: Rounds in flight in all.
    in_flight_max: int = 1024
    #: Rounds in flight that wait for one agent: what it may owe at once.
    in_flight_per_agent_max: int = 64
    #: Of these, those of one operator: one that asks without end must leave room for the others.
    in_flight_per_operator_max: int = 512
    #: Bytes of questions, reply bodies and errors that rounds in flight hold together.
    held_bytes_max: int = 512 << 20
    #: Of these, those of one round: its end is one record, which has a ceiling (the journal's `RECORD_BYTES_MAX`), and
    #: has the combined answer and the agents' names as well.
    round_bytes_max: int = 176 << 20
    #: Closed rounds that await their truth.
    remembered_max: int = 10_000
    #: Bytes that those hold together, as estimated.
    remembered_bytes_max: int = 256 << 20
    #: Closed rounds that are known by number and agents only: their truth came, or was given up.
    traces_max: int = 4096
    #: Bytes that those hold together, as estimated.
    traces_bytes_max: int = 32 << 20


class RoundBook:
    """The one door to all rounds: `handle`. Round numbers start at `first_round` and go up by 1."""

    def __init__(self, limits: BookLimits | None = None, *, first_round: int = 1) -> None:
        self.limits: Final = BookLimits() if limits is None else limits
        self._rounds: dict[int, Round] = {}
        #: Agent to the rounds that wait for it, in their order. No agent without one.
        self._rounds_of: dict[str, dict[int, None]] = {}
        #: Operator to how many rounds of theirs are in flight. No operator without one.
        self._in_flight_of_operator: Counter[str] = Counter()
        #: Round in flight to the bytes of the question and the replies it holds.
        self._held_bytes_of: dict[int, int] = {}
        self._held_bytes = 0
        self._timers: Timers[int] = Timers()
        self._remembered: Shelf[Round] = Shelf(
            count_max=self.limits.remembered_max, bytes_max=self.limits.remembered_bytes_max
        )
        self._traces: Shelf[Round] = Shelf(count_max=self.limits.traces_max, bytes_max=self.limits.traces_bytes_max)
        self._first_id: Final = first_round
        self._last_id = first_round - 1
        self._now = float("-inf")
        self._is_draining = False
        self._is_drained = False
        #: Rounds closed so far, by state. Only grows.
        self.closed_counts: Counter[RoundState] = Counter()
        #: Replies that did not count, by kind. Only grows.
        self.stray_counts: Counter[StrayKind] = Counter()
        #: Closed rounds forgotten before their truth came. Only grows.
        self.forgotten_count = 0

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Takes what happened at `now` (monotonic seconds); returns what to do about it, in order.

        Afterwards `next_timer` may have changed. Rounds whose time is over by `now` close first. A
        `now` before an earlier one counts as that one.
        """
        now = self._now = max(now, self._now)
        instructions = self._close_due(now)
        match event:
            case ReplyReceived():
                instructions += self._take_reply(event, now)
            case RoundRequested():
                instructions += self._take_request(event, now)
            case TruthRevealed():
                instructions += self._take_truth(event, now)
            case AgentReachable(agent) | AgentLost(agent):
                for round_id in tuple(self._rounds_of.get(agent, ())):
                    waiting = self._rounds[round_id]
                    instructions += self._step(waiting, event, now)
                    if not waiting.is_working(agent):
                        self._unindex(agent, round_id)
            case RoundCancelled(round_id):
                if round_id in self._rounds:
                    instructions += self._step(self._rounds[round_id], event, now)
            case DrainRequested():
                self._is_draining = True
            case CoordinatorStopped():
                self._is_draining = True
                for round_id in tuple(self._rounds):
                    instructions += self._step(self._rounds[round_id], event, now)
            case TimerFired():
                pass  # `_close_due` has seen to it
            case _:
                assert_never(event)
        if self._is_draining and not self._rounds and not self._is_drained:
            self._is_drained = True
            instructions.append(AnnounceDrained())
        return instructions

    def recall(self, outcome: Outcome) -> list[Instruction]:
        """Remembers a round that an earlier run has closed, for its truth. Before any event; oldest first."""
        assert outcome.round < self._first_id, "rounds of this run are not recalled"
        return self._remember(Round.recall(outcome), outcome)

    def give_up(self, round_id: int) -> None:
        """The truth of a closed round cannot be taken: it is not remembered any more."""
        round_ = self._remembered.take(round_id)
        if round_ is not None:
            round_.forget()
            self._keep_trace(round_)

    def next_timer(self) -> float | None:
        """The moment at or after which a `TimerFired` is owed; None when none is."""
        return self._timers.next_at()

    # --- for status and metrics ---

    @property
    def next_id(self) -> int:
        """The number of the next round."""
        return self._last_id + 1

    @property
    def in_flight(self) -> int:
        """Rounds open or in grace."""
        return len(self._rounds)

    def is_in_flight(self, round_id: int) -> bool:
        """Whether a round is open or in grace."""
        return round_id in self._rounds

    def in_flight_of(self, agent: str) -> int:
        """Rounds that wait for one agent."""
        return len(self._rounds_of.get(agent, ()))

    def awaits(self, round_id: int, agent: str, attempt: int | None) -> bool:
        """Whether a reply of an agent to this attempt, or to any, would count; time has no say in this."""
        round_ = self._rounds.get(round_id)
        return round_ is not None and round_.awaits(agent, attempt)

    def remaining_s(self, round_id: int, now: float) -> float:
        """Seconds until a round's hard end; 0 for one that is not in flight."""
        round_ = self._rounds.get(round_id)
        return 0.0 if round_ is None else max(0.0, round_.deadline_at - now)

    def in_the_way(self, request: RoundRequested, rounds: Iterable[int], now: float) -> list[int]:
        """Those of some rounds in flight, the first of them, that have to end before this one can be opened.

        None where it can be as it is, or could not even if all of them did.
        """
        if not self._explain_no_place(request) or isinstance(self._try(request, now), RejectRequest):
            return []
        limits = self.limits
        excess_rounds = len(self._rounds) + 1 - limits.in_flight_max
        excess_bytes = self._held_bytes + inline_bytes(request.body) - limits.held_bytes_max
        ending: list[int] = []
        for round_id in rounds:
            ending.append(round_id)
            excess_bytes -= self._held_bytes_of.get(round_id, 0)
            if len(ending) >= excess_rounds and excess_bytes <= 0:
                return ending
        return []

    @property
    def is_draining(self) -> bool:
        """Whether new requests are rejected for good."""
        return self._is_draining

    @property
    def held_bytes(self) -> int:
        """Bytes of questions and replies that rounds in flight hold."""
        return self._held_bytes

    @property
    def remembered(self) -> int:
        """Closed rounds that await their truth."""
        return len(self._remembered)

    def awaiting(self) -> frozenset[int]:
        """Closed rounds that await their truth, by number."""
        return frozenset(self._remembered)

    @property
    def remembered_bytes(self) -> int:
        """What those hold, as estimated."""
        return self._remembered.held_bytes

    @property
    def traces(self) -> int:
        """Closed rounds known by number and agents only."""
        return len(self._traces)

    # --- what events do ---

    def _take_request(self, event: RoundRequested, now: float) -> list[Instruction]:
        round_ = self._try(event, now)
        if isinstance(round_, RejectRequest):
            return [round_]
        if no_place := self._explain_no_place(event):
            return [_reject(event, "busy", no_place, retry=True)]
        self._last_id = round_.id
        self._rounds[round_.id] = round_
        if event.operator:
            self._in_flight_of_operator[event.operator] += 1
        for agent in round_.asked:
            self._rounds_of.setdefault(agent, {})[round_.id] = None
        self._hold(round_.id, round_.body_bytes)
        return round_.open() + self._settle(round_)

    def _try(self, event: RoundRequested, now: float) -> Round | RejectRequest:
        """The round that is asked for, or why there is none, however few are in flight."""
        everyone = event.selected + event.away
        if self._is_draining:
            return _reject(event, "draining", "the coordinator is draining: it opens no new rounds", retry=True)
        if len(set(everyone)) < len(everyone):
            return _reject(event, "bad-request", "selected: an agent is named twice", retry=False)
        try:
            round_ = Round(self.next_id, event, now)
        except NobodySelected:
            return _reject(event, "no-agents", f"no agent can be asked to {event.task}", retry=True)
        except PolicyConflict as conflict:
            return _reject(event, "bad-request", str(conflict), retry=isinstance(conflict, TooFewSelected))
        if busy := self._explain_busy(event):
            return _reject(event, "busy", busy, retry=True)
        return round_

    def _explain_no_place(self, event: RoundRequested) -> str:
        limits = self.limits
        if len(self._rounds) >= limits.in_flight_max:
            return f"{len(self._rounds)} rounds are in flight, as many as there may be"
        if self._held_bytes + inline_bytes(event.body) > limits.held_bytes_max:
            return f"rounds in flight hold {self._held_bytes} bytes, and may hold {limits.held_bytes_max}"
        return ""

    def _explain_busy(self, event: RoundRequested) -> str:
        limits = self.limits
        if event.operator and self._in_flight_of_operator[event.operator] >= limits.in_flight_per_operator_max:
            return f"{limits.in_flight_per_operator_max} rounds of this operator are in flight, as many as may be"
        for agent in event.selected + event.away:
            if self.in_flight_of(agent) >= limits.in_flight_per_agent_max:
                return f"{self.in_flight_of(agent)} rounds wait for agent {agent}, as many as may"
        return ""

    def _take_reply(self, event: ReplyReceived, now: float) -> list[Instruction]:
        round_ = self._find(event.round)
        if round_ is None:
            self.stray_counts["unknown"] += 1
            return [NoteStray("unknown", event.round, event.agent)]
        was_working = round_.is_working(event.agent)
        reply_bytes = inline_bytes(event.body) + len(event.error)
        if was_working and (problem := self._explain_no_room(round_.id, reply_bytes)):
            event = replace(event, status="failed", body=None, error=problem)
            reply_bytes = 0  # that text is one for all
        instructions = round_.handle(event, now)
        if not was_working or round_.is_working(event.agent):
            for instruction in instructions:
                if isinstance(instruction, NoteStray):
                    self.stray_counts[instruction.kind] += 1
            return instructions
        if not round_.is_closed:
            self._unindex(event.agent, round_.id)
            self._hold(round_.id, reply_bytes)
        return instructions + self._settle(round_)

    def _explain_no_room(self, round_id: int, reply_bytes: int) -> str:
        if self._held_bytes + reply_bytes > self.limits.held_bytes_max:
            return _NO_ROOM
        if self._held_bytes_of[round_id] + reply_bytes > self.limits.round_bytes_max:
            return _NO_ROOM_IN_ROUND
        return ""

    def _take_truth(self, event: TruthRevealed, now: float) -> list[Instruction]:
        round_ = self._find(event.round)
        if round_ is None:
            if 1 <= event.round < self._first_id:
                message = f"round {event.round} is of an earlier run of the coordinator, and is not remembered"
            elif 1 <= event.round <= self._last_id:
                message = f"round {event.round} is not remembered any more"
            else:
                message = f"there is no round {event.round}"
            return [RejectRequest(event.request_id, "unknown-round", message, retry=False)]
        was_awaited = round_.outcome is not None
        instructions = round_.handle(event, now)
        if was_awaited:
            self._remembered.take(round_.id)
            self._keep_trace(round_)
        return instructions

    # --- keeping the books ---

    def _find(self, round_id: int) -> Round | None:
        return self._rounds.get(round_id) or self._remembered.get(round_id) or self._traces.get(round_id)

    def _close_due(self, now: float) -> list[Instruction]:
        instructions: list[Instruction] = []
        if (due_at := self._timers.next_at()) is not None and due_at <= now:
            for round_id in self._timers.pop_due(now):
                instructions += self._step(self._rounds[round_id], TimerFired(), now)
        return instructions

    def _step(self, round_: Round, event: RoundEvent, now: float) -> list[Instruction]:
        """Hands an event to a round in flight, and the books follow."""
        return round_.handle(event, now) + self._settle(round_)

    def _settle(self, round_: Round) -> list[Instruction]:
        """Sets the round's timer; or, when it has closed, takes it out of flight and remembers it."""
        if not round_.is_closed:
            self._timers.set(round_.id, round_.due_at)
            return []
        outcome = round_.outcome
        assert outcome is not None
        self._rounds.pop(round_.id, None)
        self._timers.drop(round_.id)
        for agent in outcome.selected:
            self._unindex(agent, round_.id)
        if round_.operator:
            self._in_flight_of_operator[round_.operator] -= 1
            if not self._in_flight_of_operator[round_.operator]:
                del self._in_flight_of_operator[round_.operator]
        self._held_bytes -= self._held_bytes_of.pop(round_.id, 0)
        self.closed_counts[outcome.state] += 1
        return self._remember(round_, outcome)

    def _hold(self, round_id: int, size_bytes: int) -> None:
        self._held_bytes += size_bytes
        self._held_bytes_of[round_id] = self._held_bytes_of.get(round_id, 0) + size_bytes

    def _remember(self, round_: Round, outcome: Outcome) -> list[Instruction]:
        forgotten = self._remembered.put(round_.id, round_, estimate_bytes(outcome))
        for old in forgotten:
            old.forget()
            self._keep_trace(old)
        self.forgotten_count += len(forgotten)
        return [NoteForgotten(old.id) for old in forgotten]

    def _keep_trace(self, round_: Round) -> None:
        self._traces.put(round_.id, round_, _ROUND_BYTES + _TRACE_AGENT_BYTES * len(round_.asked))

    def _unindex(self, agent: str, round_id: int) -> None:
        rounds = self._rounds_of.get(agent)
        if rounds is not None:
            rounds.pop(round_id, None)
            if not rounds:
                del self._rounds_of[agent]


def _reject(request: RoundRequested, reason: RejectReason, message: str, *, retry: bool) -> RejectRequest:
    return RejectRequest(request.request_id, reason, message, retry)


def estimate_bytes(outcome: Outcome) -> int:
    """Memory that a closed round takes while its truth is awaited."""
    texts = sum(inline_bytes(result.body) + len(result.error) for result in outcome.results)
    return _ROUND_BYTES + _RESULT_BYTES * len(outcome.results) + texts

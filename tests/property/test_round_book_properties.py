"""Whatever happens to rounds, in whatever order: they end in time, say one true thing of each agent, once."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quorate_coordinator.rounds.book import BookLimits, RoundBook
from quorate_coordinator.rounds.events import (
    AgentLost,
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
    BroadcastAssignment,
    CloseRound,
    Instruction,
    LearnTruth,
    NoteForgotten,
    NoteStray,
    OfferLateReply,
    Outcome,
    RejectRequest,
    SendCancellation,
    SendFeedback,
)
from quorate_coordinator.rounds.policy import RoundPolicy
from quorate_protocol.messages import RoundState

AGENTS = tuple("abcdef")

LIMITS = BookLimits(
    in_flight_max=6,
    in_flight_per_agent_max=4,
    reply_bytes_max=100,
    remembered_max=4,
    remembered_bytes_max=12_000,
    traces_max=5,
    traces_bytes_max=20_000,
)


@dataclass
class Seen:
    """What the outside knows of one round: only what was handed in and what came back."""

    request: RoundRequested
    opened_at: float
    quorum: int
    #: Agents that got the assignment and whose part has not ended.
    working: set[str] = field(default_factory=set)
    #: The reply of each that came before its end and the round's, and when.
    replies: dict[str, tuple[ReplyReceived, float]] = field(default_factory=dict)
    #: Of those, the ones for which the coordinator had no room.
    crowded_out: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    #: Agents whose first reply came after their end.
    late: set[str] = field(default_factory=set)
    grace_ends_at: float = math.inf
    asked: bool = False
    outcome: Outcome | None = None
    truths: int = 0

    @property
    def deadline_at(self) -> float:
        return self.opened_at + self.request.policy.deadline_s

    @property
    def replied(self) -> int:
        """Replies that count towards quorum."""
        return sum(
            reply.status == "replied" and agent not in self.crowded_out for agent, (reply, _) in self.replies.items()
        )

    @property
    def held_bytes(self) -> int:
        """Bytes of the replies that were let in."""
        return sum(
            len(reply.body or b"") + len(reply.error)
            for agent, (reply, _) in self.replies.items()
            if agent not in self.crowded_out
        )

    @property
    def selected(self) -> tuple[str, ...]:
        return tuple(sorted(self.request.selected + self.request.unavailable))


policies = st.builds(
    RoundPolicy,
    deadline_s=st.sampled_from([1.0, 2.0, 5.0]),
    grace_s=st.sampled_from([None, 0.0, 0.5, 1.0, 2.0]),
    quorum=st.none() | st.integers(0, 5),
    quorum_fraction=st.none() | st.sampled_from([0.1, 0.5, 2 / 3, 1.0]),
)


class RoundBookMachine(RuleBasedStateMachine):
    """A coordinator's life as its book of rounds sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.book = RoundBook(LIMITS)
        self.now = 1000.0
        self.history: list[tuple[Event, float, list[Instruction]]] = []
        self.rounds: dict[int, Seen] = {}
        self.forgotten: set[int] = set()
        self.strays: Counter[str] = Counter()
        self.stopped = False
        self.drained = 0

    # --- what may happen ---

    @rule(
        selected=st.lists(st.sampled_from(AGENTS), max_size=6),
        unavailable=st.lists(st.sampled_from(AGENTS), max_size=2),
        policy=policies,
    )
    def request(self, selected: list[str], unavailable: list[str], policy: RoundPolicy) -> None:
        self._request(tuple(selected), tuple(unavailable), policy)

    @rule(
        selected=st.sets(st.sampled_from(AGENTS), min_size=1),
        grace_s=st.sampled_from([None, 0.0, 0.5, 1.0, 2.0]),
        fraction=st.sampled_from([0.1, 0.5, 1.0]),
    )
    def request_well(self, selected: set[str], grace_s: float | None, fraction: float) -> None:
        self._request(tuple(selected), (), RoundPolicy(2.0, grace_s, quorum_fraction=fraction))

    @precondition(lambda self: self.rounds)
    @rule(
        data=st.data(),
        agent=st.sampled_from(AGENTS),
        status=st.sampled_from(["replied", "replied", "replied", "declined", "failed"]),
        attempt=st.sampled_from([1, 1, 1, 1, 2]),
        size=st.sampled_from([0, 10, 60, 99, 101]),
    )
    def reply(self, data: st.DataObject, agent: str, status: Any, attempt: int, size: int) -> None:
        # Mostly the rounds in flight, but every one that ever was can be answered, and some that never were.
        round_id = data.draw(st.sampled_from([*self._in_flight() * 3, *self.rounds, 0, 99]))
        body = b"x" * size if status == "replied" else None
        self._happens(ReplyReceived(round_id, agent, attempt, status, body, error="" if body is not None else "why"))

    @precondition(lambda self: self._in_flight())
    @rule(data=st.data())
    def all_reply(self, data: st.DataObject) -> None:
        round_id = data.draw(st.sampled_from(self._in_flight()))
        for agent in sorted(self.rounds[round_id].working):
            self._happens(ReplyReceived(round_id, agent, 1, "replied", b"ok"))

    @rule(agent=st.sampled_from(AGENTS))
    def lose(self, agent: str) -> None:
        self._happens(AgentLost(agent, "gone"))

    @precondition(lambda self: self.rounds)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._happens(RoundCancelled(data.draw(st.sampled_from([*self.rounds, 99])), "no need"))

    @precondition(lambda self: self.rounds)
    @rule(data=st.data())
    def reveal(self, data: st.DataObject) -> None:
        self._happens(TruthRevealed(3, data.draw(st.sampled_from([*self.rounds, 0, 99])), b"truth"))

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def timer_fires(self) -> None:
        """The shell keeps its promise: at `next_timer`, or whenever it likes."""
        at = self.book.next_timer()
        if at is None:
            assert self._happens(TimerFired()) == []
            return
        before = self.book.in_flight
        self.now = max(self.now, at)
        self._happens(TimerFired())
        after = self.book.next_timer()
        assert self.book.in_flight < before, "a timer that is due closes a round"
        assert after is None or after > self.now

    @precondition(lambda self: len(self.history) > 30)
    @rule(stop=st.booleans())
    def end(self, stop: bool) -> None:
        self._happens(CoordinatorStopped("going down") if stop else DrainRequested())
        self.stopped = True

    # --- what must hold ---

    @invariant()
    def bounds_hold(self) -> None:
        book = self.book
        assert book.in_flight <= LIMITS.in_flight_max
        assert book.held_bytes == self._held_bytes() <= LIMITS.reply_bytes_max
        assert book.remembered <= LIMITS.remembered_max
        assert book.remembered_bytes <= LIMITS.remembered_bytes_max
        assert book.traces <= LIMITS.traces_max
        for agent in AGENTS:
            waiting = sum(agent in self.rounds[n].working for n in self._in_flight())
            assert book.in_flight_of(agent) == waiting <= LIMITS.in_flight_per_agent_max

    @invariant()
    def the_timer_is_the_earliest_end(self) -> None:
        ends = [min(self.rounds[n].deadline_at, self.rounds[n].grace_ends_at) for n in self._in_flight()]
        assert self.book.next_timer() == min(ends, default=None)
        assert self.book.in_flight == len(ends)

    @invariant()
    def nothing_rests_that_is_over(self) -> None:
        for number in self._in_flight():
            seen = self.rounds[number]
            assert seen.working, "somebody is waited for"
            assert seen.replied + len(seen.working) >= seen.quorum, "quorum can be reached"

    def teardown(self) -> None:
        # Given its timers, everything ends.
        steps = 0
        while (at := self.book.next_timer()) is not None:
            self.now = max(self.now, at)
            self._happens(TimerFired())
            steps += 1
            assert steps <= LIMITS.in_flight_max
        assert all(seen.outcome is not None for seen in self.rounds.values())
        assert self.drained == self.stopped
        # The same events give the same instructions.
        again = RoundBook(LIMITS)
        for event, now, instructions in self.history:
            assert again.handle(event, now) == instructions

    # --- the outside's bookkeeping ---

    def _in_flight(self) -> list[int]:
        return [number for number, seen in self.rounds.items() if seen.outcome is None]

    def _held_bytes(self) -> int:
        return sum(self.rounds[number].held_bytes for number in self._in_flight())

    def _request(self, selected: tuple[str, ...], unavailable: tuple[str, ...], policy: RoundPolicy) -> None:
        request = RoundRequested(5, "classify", b"question", selected, unavailable, policy)
        instructions = self._happens(request)
        rejected = [one for one in instructions if isinstance(one, RejectRequest)]
        if rejected:
            assert rejected[0].request_id == 5
            assert (rejected[0].reason == "draining") == self.stopped
            if rejected[0].reason == "busy":
                assert rejected[0].retry
                full = self.book.in_flight >= LIMITS.in_flight_max or self.book.held_bytes >= LIMITS.reply_bytes_max
                assert full or any(
                    self.book.in_flight_of(one) >= LIMITS.in_flight_per_agent_max for one in request.selected
                )
        else:
            assert not self.stopped

    def _happens(self, event: Event) -> list[Instruction]:
        """Hands an event in, and judges what comes back by what the outside knows."""
        instructions = self.book.handle(event, self.now)
        self.history.append((event, self.now, instructions))
        before = set(self._in_flight())
        over = {n for n in before if min(self.rounds[n].deadline_at, self.rounds[n].grace_ends_at) <= self.now}
        self._note(event, over)
        for place, instruction in enumerate(instructions):
            self._judge(event, instruction, instructions[place + 1 :])
        assert not over & set(self._in_flight()), "a round outlived its time"
        if isinstance(event, TruthRevealed):
            assert sum(isinstance(one, RejectRequest | LearnTruth) for one in instructions) == 1
        if isinstance(event, ReplyReceived):
            strays = [one for one in instructions if isinstance(one, NoteStray)]
            counted = event.round in before - over and self._counts(event)
            assert bool(strays) != counted, "a reply counts, or is said to be a stray"
            self.strays.update(stray.kind for stray in strays)
            assert self.book.stray_counts == self.strays
        return instructions

    def _counts(self, event: ReplyReceived) -> bool:
        kept = self.rounds[event.round].replies.get(event.agent)
        return kept is not None and kept[0] is event

    def _note(self, event: Event, over: set[int]) -> None:
        """What the event does to rounds whose time is not over, by the plain words of the design."""
        match event:
            case ReplyReceived(round_id, agent, attempt) if round_id in self.rounds and attempt == 1:
                seen = self.rounds[round_id]
                if seen.outcome is None and round_id not in over and agent in seen.working:
                    held_bytes = sum(
                        self.rounds[number].held_bytes for number in self._in_flight() if number not in over
                    )
                    seen.working.discard(agent)
                    seen.replies[agent] = (event, self.now)
                    if held_bytes + len(event.body or b"") + len(event.error) > LIMITS.reply_bytes_max:
                        seen.crowded_out.add(agent)
                    grace_s = seen.request.policy.grace_s
                    if seen.replied >= seen.quorum and seen.grace_ends_at == math.inf and grace_s is not None:
                        seen.grace_ends_at = min(self.now + grace_s, seen.deadline_at)
            case AgentLost(agent):
                for number in self._in_flight():
                    seen = self.rounds[number]
                    if number not in over and agent in seen.working:
                        seen.working.discard(agent)
                        seen.lost.add(agent)

    def _judge(self, event: Event, instruction: Instruction, later: list[Instruction]) -> None:
        match instruction:
            case BroadcastAssignment(request_id, number, agents, task, body, attempt, deadline_s):
                assert isinstance(event, RoundRequested)
                seen = self._open(event, number)
                seen.asked = True
                seen.working = set(agents)
                assert agents == tuple(sorted(event.selected))
                assert (request_id, task, body, attempt) == (5, "classify", b"question", 1)
                assert deadline_s == event.policy.deadline_s
            case SendCancellation(number, agents):
                assert set(agents) == self.rounds[number].working
                closings = [one.outcome.round for one in later if isinstance(one, CloseRound)]
                assert number in closings
            case CloseRound(outcome):
                if outcome.round not in self.rounds:
                    assert isinstance(event, RoundRequested)
                    self._open(event, outcome.round)
                self._judge_outcome(self.rounds[outcome.round], outcome)
            case SendFeedback(number, agents, _, truth):
                seen = self.rounds[number]
                assert truth == b"truth"
                assert agents == tuple(sorted(seen.request.selected))
            case LearnTruth(request_id, outcome, truth):
                assert (request_id, truth) == (3, b"truth")
                seen = self.rounds[outcome.round]
                assert outcome is seen.outcome
                assert outcome.round not in self.forgotten
                seen.truths += 1
                assert seen.truths == 1
            case NoteStray(kind, number, agent):
                assert isinstance(event, ReplyReceived)
                assert (number, agent) == (event.round, event.agent)
                if kind == "unknown":
                    assert number not in self._in_flight()
                    return
                seen = self.rounds[number]
                asked = seen.asked and agent in seen.request.selected
                first = agent not in seen.replies and agent not in seen.late
                right = event.attempt == 1
                assert kind == (
                    "not-asked" if not asked else "wrong-attempt" if not right else "late" if first else "duplicate"
                )
                offered = [one for one in later if isinstance(one, OfferLateReply)]
                assert len(offered) == (kind == "late" and event.status == "replied")
                if kind == "late":
                    assert agent not in seen.working
                    seen.late.add(agent)
            case NoteForgotten(number):
                assert self.rounds[number].truths == 0
                assert number not in self.forgotten
                self.forgotten.add(number)
            case OfferLateReply(number, _, agent, body):
                assert isinstance(event, ReplyReceived)
                assert (number, agent, body) == (event.round, event.agent, event.body)
            case AnnounceDrained():
                self.drained += 1

    def _open(self, request: RoundRequested, number: int) -> Seen:
        assert number == len(self.rounds) + 1, "numbers go up by one"
        assert not self.stopped
        count = len(request.selected) + len(request.unavailable)
        seen = self.rounds[number] = Seen(request, self.now, request.policy.resolve(count).quorum)
        return seen

    def _judge_outcome(self, seen: Seen, outcome: Outcome) -> None:
        assert seen.outcome is None, "announced once"
        seen.outcome = outcome
        assert outcome.selected == seen.selected
        assert tuple(result.agent for result in outcome.results) == seen.selected, "one result for each"
        assert outcome.quorum == seen.quorum
        assert outcome.duration_s == self.now - seen.opened_at
        for result in outcome.results:
            agent = result.agent
            if agent in seen.replies:
                reply, at = seen.replies[agent]
                assert result.latency_s == at - seen.opened_at
                if agent in seen.crowded_out:
                    assert (result.status, result.body) == ("failed", None)
                    assert "no room" in result.error
                else:
                    assert (result.status, result.body, result.error) == (reply.status, reply.body, reply.error)
            elif agent in seen.lost:
                assert (result.status, result.error) == ("lost", "gone")
            elif agent in seen.request.unavailable:
                assert result.status == "unavailable"
            else:
                # Late is who had all the time there was: grace that ended earlier leaves nobody late.
                had_all = outcome.state == "expired" or (
                    outcome.state == "quorate" and self.now >= seen.deadline_at <= seen.grace_ends_at
                )
                assert result.status == ("late" if had_all else "cancelled")
            assert (result.status == "replied") == (result.body is not None)
        replied = sum(result.status == "replied" for result in outcome.results)
        assert replied == seen.replied, "no reply is counted twice, and none that came in time is not"
        truth: dict[RoundState, bool] = {
            "complete": replied == len(outcome.selected),
            "quorate": replied >= outcome.quorum and replied < len(outcome.selected),
            "expired": replied < outcome.quorum and self.now >= seen.deadline_at,
            "failed": replied + len(seen.working) < outcome.quorum,
            "cancelled": outcome.reason == "no need",
            "interrupted": outcome.reason == "going down",
        }
        assert truth[outcome.state], f"{outcome.state} was claimed falsely"
        if not seen.asked:
            assert outcome.state == "failed"
            assert len(seen.request.selected) < outcome.quorum
        seen.working = set()


TestRoundBook = RoundBookMachine.TestCase
# Other processes share the machine: time per example says nothing here.
TestRoundBook.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

"""Whatever happens to rounds, in whatever order: they end in time, say one true thing of each agent, once."""

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from property.round_model import Expected, Outside, Seen
from quorate_coordinator.rounds.book import BookLimits, RoundBook
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
    AgentResult,
    AnnounceDrained,
    CloseRound,
    Instruction,
    LearnTruth,
    NoteForgotten,
    NoteStray,
    OfferLateReply,
    OpenRound,
    Outcome,
    RejectRequest,
    SendAssignment,
    SendCancellation,
    SendFeedback,
    TellPart,
)
from quorate_coordinator.rounds.policy import RoundPolicy
from quorate_protocol.fields import RoundState

AGENTS = tuple("abcdef")

LIMITS = BookLimits(
    in_flight_max=6,
    in_flight_per_agent_max=4,
    in_flight_per_operator_max=3,
    held_bytes_max=150,
    remembered_max=4,
    remembered_bytes_max=12_000,
    traces_max=5,
    traces_bytes_max=20_000,
)

QUORUMS = [{"quorum": 1}, {"quorum": 2}, {"quorum_fraction": 0.1}, {"quorum_fraction": 0.7}, {"quorum_fraction": 1.0}]

quorums = st.sampled_from([*QUORUMS * 3, {}, {"quorum": 0}, {"quorum": 5}, {"quorum": 1, "quorum_fraction": 0.5}])
policies = st.builds(
    lambda deadline_s, grace_s, quorum, attempts: RoundPolicy(deadline_s, grace_s, **quorum, attempts=attempts),
    st.sampled_from([0.0, 1.0, 2.0, 5.0, 5.0]),
    st.sampled_from([None, 0.0, 0.5, 1.0, 2.0]),
    quorums,
    st.sampled_from([0, 1, 2, 2, 3, 3]),
)
operators = st.sampled_from(["", "ann", "ann", "bob"])
questions = st.sampled_from([b"", b"question", b"q" * 40, b"q" * 151])


class RoundBookMachine(RuleBasedStateMachine):
    """A coordinator's life as its book of rounds sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.book = RoundBook(LIMITS)
        self.outside = Outside(AGENTS, LIMITS)
        self.rounds = self.outside.rounds
        self.now = 1000.0
        self.recalled: list[Outcome] = []
        self.history: list[tuple[Event, float, list[Instruction]]] = []
        self.forgotten: set[int] = set()
        self.strays: Counter[str] = Counter()
        self.drained = 0

    # --- what may happen ---

    @initialize(statuses=st.lists(st.sampled_from(["replied", "lost", "late", "unavailable"]), max_size=6))
    def recall(self, statuses: list[Any]) -> None:
        """The run before this one has left some rounds, each with as many agents as its number says."""
        self.book = RoundBook(LIMITS, first_round=len(statuses) + 1)
        for number in range(1, len(statuses) + 1):
            results = tuple(
                AgentResult(agent, status, b"ok" if status == "replied" else None)
                for agent, status in zip(AGENTS, statuses[:number], strict=False)
            )
            selected = AGENTS[:number]
            outcome = Outcome(number, 5, "classify", "expired", 1, selected, results, 1.0, "deadline")
            self.recalled.append(outcome)
            self.outside.recall(
                outcome, RoundRequested(5, "classify", b"", selected, (), RoundPolicy(1.0, None, quorum=1))
            )
            for forgotten in self.book.recall(outcome):
                assert isinstance(forgotten, NoteForgotten)
                self.forgotten.add(forgotten.round)

    @rule(
        agents=st.lists(st.sampled_from(AGENTS), max_size=6, unique=True)
        | st.lists(st.sampled_from(AGENTS), max_size=3),
        policy=policies,
        body=questions,
        operator=operators,
    )
    def request(self, agents: list[str], policy: RoundPolicy, body: bytes, operator: str) -> None:
        self._request(agents, policy, body, operator, is_streamed=True)

    @rule(
        agents=st.sets(st.sampled_from(AGENTS), min_size=2),
        grace_s=st.sampled_from([None, 0.0, 0.5, 1.0, 2.0]),
        quorum=st.sampled_from(QUORUMS),
        attempts=st.sampled_from([1, 2, 3, 3]),
        operator=operators,
        is_streamed=st.booleans(),
    )
    def request_well(
        self,
        agents: set[str],
        grace_s: float | None,
        quorum: dict[str, Any],
        attempts: int,
        operator: str,
        is_streamed: bool,
    ) -> None:
        policy = RoundPolicy(5.0, grace_s, **quorum, attempts=attempts)
        self._request(sorted(agents), policy, b"question", operator, is_streamed)

    @precondition(lambda self: self.rounds)
    @rule(
        data=st.data(),
        agent=st.sampled_from(AGENTS),
        status=st.sampled_from(["replied", "replied", "replied", "declined", "failed"]),
        attempt=st.sampled_from([1, 1, 1, 2, 3]),
        size=st.sampled_from([None, 0, 10, 60, 99, 151]),
    )
    def reply(self, data: st.DataObject, agent: str, status: Any, attempt: int, size: int | None) -> None:
        """Whatever may come: every round that ever was can be answered, and some that never were."""
        round_id = data.draw(st.sampled_from([*self._in_flight() * 3, *self.rounds, 0, 99]))
        body = b"x" * size if size is not None and status == "replied" else None
        self._happens(ReplyReceived(round_id, agent, attempt, status, body, error="" if body is not None else "why"))

    @precondition(lambda self: self._asked())
    @rule(data=st.data(), status=st.sampled_from(["replied", "replied", "declined"]), size=st.sampled_from([0, 10, 99]))
    def answer(self, data: st.DataObject, status: Any, size: int) -> None:
        """What should come: an agent answers what it was asked last, though its session may be over by now."""
        number, agent, attempt = data.draw(st.sampled_from(self._asked()))
        body = b"x" * size if status == "replied" else None
        self._happens(ReplyReceived(number, agent, attempt, status, body, error="" if status == "replied" else "why"))

    @precondition(lambda self: self._asked())
    @rule(data=st.data(), times=st.integers(1, 3))
    def fail(self, data: st.DataObject, times: int) -> None:
        """An agent fails, and perhaps fails again."""
        number, agent, attempt = data.draw(st.sampled_from(self._asked()))
        for failed in range(attempt, attempt + times):
            self._happens(ReplyReceived(number, agent, failed, "failed", None, error="why"))

    @precondition(lambda self: self._in_flight())
    @rule(data=st.data())
    def all_reply(self, data: st.DataObject) -> None:
        seen = self.rounds[number := data.draw(st.sampled_from(self._in_flight()))]
        for agent in sorted(seen.at_work):
            self._happens(ReplyReceived(number, agent, seen.parts[agent].attempt, "replied", b"ok"))

    @rule(agent=st.sampled_from(AGENTS))
    def link_breaks(self, agent: str) -> None:
        """Of this the book is not told: the session goes on."""
        self.outside.break_link(agent)

    @rule(agent=st.sampled_from(AGENTS))
    def lose(self, agent: str) -> None:
        self._happens(AgentLost(agent, "gone"))

    @rule(agent=st.sampled_from(AGENTS))
    def return_(self, agent: str) -> None:
        """A new link: in the same session, or in a new one after the last was lost."""
        self._happens(AgentReachable(agent))

    @rule(agent=st.sampled_from(AGENTS), times=st.integers(1, 3))
    def lose_and_return(self, agent: str, times: int) -> None:
        for _ in range(times):
            self._happens(AgentLost(agent, "gone"))
            self._happens(AgentReachable(agent))

    @rule()
    def all_return(self) -> None:
        for agent in AGENTS:
            if agent not in self.outside.linked:
                self._happens(AgentReachable(agent))

    @precondition(lambda self: self.rounds)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from([*self.rounds, 0, 99]))
        self._happens(RoundCancelled(number, "no need"))
        assert number not in self._in_flight()

    @precondition(lambda self: self.rounds)
    @rule(data=st.data())
    def reveal(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from([*self.rounds, 0, 99]))
        seen = self.rounds.get(number)
        is_awaited = seen is not None and not seen.truths and number not in self.forgotten
        instructions = self._happens(TruthRevealed(3, number, b"truth"))
        answers = [one for one in instructions if isinstance(one, RejectRequest | LearnTruth)]
        assert len(answers) == 1
        if number in self._in_flight():
            assert isinstance(answers[0], RejectRequest)
            assert answers[0].reason == "still-open"
        elif is_awaited and number not in self.forgotten:
            assert isinstance(answers[0], LearnTruth)
        else:
            assert isinstance(answers[0], RejectRequest)
            assert answers[0].reason in ("already-revealed", "unknown-round")

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.1, 0.5, 0.5, 1.0, 3.0, None]))
    def time_passes(self, seconds: float | None) -> None:
        """Some of it; or the shell keeps its promise, and tells when the moment of `next_timer` has come."""
        if seconds is not None:
            self.now += seconds
            return
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

    @precondition(lambda self: len(self.history) > 60)
    @rule(stop=st.booleans())
    def end(self, stop: bool) -> None:
        self.outside.is_stopped = True
        self._happens(CoordinatorStopped("going down") if stop else DrainRequested())
        assert not (stop and self._in_flight())

    # --- what must hold ---

    @invariant()
    def bounds_hold(self) -> None:
        book = self.book
        assert book.in_flight <= LIMITS.in_flight_max
        assert book.held_bytes == sum(seen.held_bytes for seen in self._seen()) <= LIMITS.held_bytes_max
        assert book.remembered <= LIMITS.remembered_max
        assert book.remembered_bytes <= LIMITS.remembered_bytes_max
        assert book.traces <= LIMITS.traces_max
        for agent in AGENTS:
            waiting = sum(agent in seen.waiting for seen in self._seen())
            assert book.in_flight_of(agent) == waiting <= LIMITS.in_flight_per_agent_max
        for operator in ("ann", "bob"):
            wanted = sum(seen.request.operator == operator for seen in self._seen())
            assert wanted <= LIMITS.in_flight_per_operator_max

    @invariant()
    def the_timer_is_the_earliest_end(self) -> None:
        assert self.book.next_timer() == min((seen.ends_at for seen in self._seen()), default=None)
        assert self.book.in_flight == len(self._seen())

    @invariant()
    def nothing_rests_that_is_over(self) -> None:
        for seen in self._seen():
            assert seen.waiting, "somebody is waited for"
            assert seen.replied + len(seen.waiting) >= seen.quorum, "quorum can be reached"
            assert seen.replied < seen.quorum or seen.at_work, "grace is for those at work"

    @invariant()
    def whoever_has_a_link_was_given_over_it_what_it_owes(self) -> None:
        for seen in self._seen():
            if seen.ends_at > self.now:
                for agent in seen.waiting & self.outside.linked:
                    part = seen.parts[agent]
                    assert part.is_delivered
                    assert 1 <= part.attempt <= seen.request.policy.attempts

    def teardown(self) -> None:
        # Given its timers, everything ends.
        steps = 0
        while (at := self.book.next_timer()) is not None:
            self.now = max(self.now, at)
            self._happens(TimerFired())
            steps += 1
            assert steps <= LIMITS.in_flight_max
        assert not self._in_flight()
        # The same events give the same instructions.
        again = RoundBook(LIMITS, first_round=len(self.recalled) + 1)
        for outcome in self.recalled:
            again.recall(outcome)
        for event, now, instructions in self.history:
            assert again.handle(event, now) == instructions

    # --- the outside's bookkeeping ---

    def _in_flight(self) -> list[int]:
        return self.outside.in_flight()

    def _seen(self) -> list[Seen]:
        """The rounds in flight."""
        return [self.rounds[number] for number in self._in_flight()]

    def _asked(self) -> list[tuple[int, str, int]]:
        """Round, agent and number of each part that waits for an answer."""
        return [
            (number, agent, part.attempt)
            for number in self._in_flight()
            for agent, part in self.rounds[number].parts.items()
            if part.end is None and part.attempt
        ]

    def _request(self, agents: list[str], policy: RoundPolicy, body: bytes, operator: str, is_streamed: bool) -> None:
        linked = tuple(agent for agent in agents if agent in self.outside.linked)
        away = tuple(agent for agent in agents if agent not in self.outside.linked)
        self._happens(RoundRequested(5, "classify", body, linked, away, policy, operator, is_streamed))

    def _happens(self, event: Event) -> list[Instruction]:
        """Hands an event in, and judges what comes back by what the outside knows."""
        instructions = self.book.handle(event, self.now)
        self.history.append((event, self.now, instructions))
        over = {number for number in self._in_flight() if self.rounds[number].ends_at <= self.now}
        expected = self.outside.follow(event, self.now)
        self._compare(expected, event, instructions)
        for place, instruction in enumerate(instructions):
            self._judge(event, instruction, instructions[place + 1 :])
        assert not over & set(self._in_flight()), "a round outlived its time"
        assert self.book.stray_counts == self.strays
        assert self.book.forgotten_count == len(self.forgotten)
        assert self.drained == (self.outside.is_stopped and not self._in_flight()), "said once, when it is so"
        return instructions

    def _compare(self, expected: Expected, event: Event, instructions: list[Instruction]) -> None:
        """What can be said beforehand was said, in that order, and nothing besides."""
        assert [
            (one.round, one.agents, one.attempt) for one in instructions if isinstance(one, SendAssignment)
        ] == expected.sent
        assert [(one.round, one.result.agent) for one in instructions if isinstance(one, TellPart)] == expected.told
        opened = [one.round for one in instructions if isinstance(one, OpenRound)]
        assert opened == ([] if expected.opened is None else [expected.opened])
        if isinstance(event, RoundRequested):
            rejected = [one for one in instructions if isinstance(one, RejectRequest)]
            assert [one.reason for one in rejected] == ([] if expected.rejected is None else [expected.rejected])
            # More agents than are there may come; what contradicts itself stays so.
            assert all(one.retry == (one.reason != "bad-request" or " is over the " in one.message) for one in rejected)
            assert all(one.request_id == 5 and one.message for one in rejected)
        assert sum(isinstance(one, NoteStray) for one in instructions) == expected.is_stray

    def _judge(self, event: Event, instruction: Instruction, later: list[Instruction]) -> None:
        match instruction:
            case OpenRound(request_id, number, selected, task, body, policy, operator):
                assert isinstance(event, RoundRequested)
                seen = self.rounds[number]
                assert (request_id, task, body, operator) == (5, "classify", event.body, event.operator)
                assert selected == tuple(sorted(event.selected + event.away))
                assert (policy.quorum, policy.attempts) == (seen.quorum, event.policy.attempts)
            case SendAssignment(number, agents, task, body, _, deadline_s):
                seen = self.rounds[number]
                assert seen.outcome is None, "nobody is asked for what is over"
                assert set(agents) <= seen.at_work
                assert (task, body) == ("classify", seen.request.body)
                assert deadline_s == seen.deadline_at - self.now > 0
            case TellPart(request_id, number, result):
                seen = self.rounds[number]
                assert request_id == 5
                assert seen.outcome is None, "the outcome tells the rest"
                assert result.agent not in seen.told
                seen.told[result.agent] = result
            case SendCancellation(number, agents):
                assert agents == tuple(sorted(self.rounds[number].at_work))
                assert isinstance(later[0], CloseRound)
                assert later[0].outcome.round == number
            case CloseRound(outcome):
                self._judge_outcome(self.rounds[outcome.round], outcome)
            case SendFeedback(number, agents, _, truth):
                assert truth == b"truth"
                asked = tuple(sorted(agent for agent, part in self.rounds[number].parts.items() if part.attempt))
                assert agents == asked != ()
            case LearnTruth(request_id, outcome, truth):
                assert (request_id, truth) == (3, b"truth")
                seen = self.rounds[outcome.round]
                assert outcome is seen.outcome
                assert outcome.round not in self.forgotten
                seen.truths += 1
                assert seen.truths == 1
            case NoteStray(kind, number, agent):
                self._judge_stray(event, instruction, later)
                self.strays[kind] += 1
            case NoteForgotten(number):
                assert self.rounds[number].truths == 0
                assert self.rounds[number].outcome is not None
                assert number not in self.forgotten
                self.forgotten.add(number)
            case OfferLateReply(number, _, agent, body):
                assert isinstance(event, ReplyReceived)
                assert (number, agent, body) == (event.round, event.agent, event.body)
                # It may come in the very moment in which the last round of a drain is due.
                assert later in ([], [AnnounceDrained()])
            case AnnounceDrained():
                self.drained += 1
                assert later == []

    def _judge_stray(self, event: Event, stray: NoteStray, later: list[Instruction]) -> None:
        assert isinstance(event, ReplyReceived)
        assert (stray.round, stray.agent) == (event.round, event.agent)
        if stray.kind == "unknown":
            seen = self.rounds.get(stray.round)
            assert seen is None or seen.truths or stray.round in self.forgotten, "what is awaited is known"
            return
        assert stray.kind == self.outside.name_stray(event)
        offered = [one for one in later if isinstance(one, OfferLateReply)]
        assert len(offered) == (stray.kind == "late" and event.status == "replied" and event.body is not None)
        if stray.kind == "late":
            part = self.rounds[stray.round].parts[stray.agent]
            assert part.end is not None or self.rounds[stray.round].outcome is not None
            part.is_answered = True

    def _judge_outcome(self, seen: Seen, outcome: Outcome) -> None:
        assert seen.outcome is None, "announced once"
        assert outcome.selected == tuple(sorted(seen.parts))
        assert tuple(result.agent for result in outcome.results) == outcome.selected, "one result for each"
        assert (outcome.quorum, outcome.request_id) == (seen.quorum, 5)
        assert outcome.duration_s == self.now - seen.opened_at
        # Late is who had all the time there was: grace that ended earlier leaves nobody late.
        had_all = outcome.state == "expired" or (
            outcome.state == "quorate" and seen.at_work and self.now >= seen.deadline_at <= seen.grace_ends_at
        )
        for result in outcome.results:
            part = seen.parts[result.agent]
            if part.end is not None:
                status, body, error, at = part.end
                assert (result.status, result.body, result.error) == (status, body, error)
                assert result.latency_s == (None if at is None else at - seen.opened_at)
            elif part.is_at_work:
                assert result.status == ("late" if had_all else "cancelled")
            else:
                assert (result.status, result.error) == (
                    ("lost", "gone") if part.attempt else ("unavailable", "it had no link")
                )
            assert (result.status == "replied") == (result.body is not None)
            assert (result.status == "unavailable") == (part.attempt == 0)
            if seen.request.is_streamed and part.end is not None:
                assert seen.told.pop(result.agent) == result
        assert not seen.told, "what was told stands in the outcome"
        self._judge_state(seen, outcome)
        seen.outcome = outcome

    def _judge_state(self, seen: Seen, outcome: Outcome) -> None:
        replied = sum(result.status == "replied" for result in outcome.results)
        assert replied == seen.replied, "no reply is counted twice, and none that came in time is not"
        truth: dict[RoundState, bool] = {
            "complete": replied == len(outcome.selected),
            "quorate": outcome.quorum <= replied < len(outcome.selected)
            and (not seen.at_work or self.now >= seen.ends_at),
            "expired": replied < outcome.quorum and self.now >= seen.deadline_at,
            "failed": replied + len(seen.waiting) < outcome.quorum,
            "cancelled": outcome.reason == "no need",
            "interrupted": outcome.reason == "going down",
        }
        assert truth[outcome.state], f"{outcome.state} was claimed falsely"


TestRoundBook = RoundBookMachine.TestCase
# Other processes share the machine: time per example says nothing here.
TestRoundBook.settings = settings(
    max_examples=300, stateful_step_count=80, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

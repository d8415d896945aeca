"""What an outside that knows nothing of the book's inside expects of it: agents with their links, and rounds.

By the plain words of the design, and by what was handed in: never by asking the book.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from quorate_coordinator.rounds.book import BookLimits
from quorate_coordinator.rounds.events import AgentLost, AgentReachable, Event, ReplyReceived, RoundRequested
from quorate_coordinator.rounds.instructions import Outcome
from quorate_coordinator.rounds.policy import NobodySelected, PolicyConflict


@dataclass
class Part:
    """One agent's part in one round."""

    #: The number under which it was asked last; 0 where it never was.
    attempt: int = 0
    #: Whether it answered under that number.
    is_answered: bool = False
    #: Why it was lost, while it may be asked again; empty where it was not.
    lost: str = ""
    #: Whether the assignment of that number went out while the link that it has now was there.
    is_delivered: bool = False
    #: How it ended while the round was in flight: status, body, error, and when its reply came.
    end: tuple[str, bytes | None, str, float | None] | None = None
    #: What of its reply is held.
    held_bytes: int = 0

    @property
    def is_at_work(self) -> bool:
        """Whether it was asked, and may answer."""
        return self.end is None and self.attempt > 0 and not self.lost


@dataclass
class Seen:
    """One round."""

    request: RoundRequested
    opened_at: float
    quorum: int
    parts: dict[str, Part]
    grace_ends_at: float = math.inf
    outcome: Outcome | None = None
    #: Agents whose end was told.
    told: dict[str, object] = field(default_factory=dict)
    truths: int = 0

    @property
    def deadline_at(self) -> float:
        return self.opened_at + self.request.policy.deadline_s

    @property
    def ends_at(self) -> float:
        """When time ends it."""
        return min(self.deadline_at, self.grace_ends_at)

    @property
    def replied(self) -> int:
        """Replies that count towards quorum."""
        return sum(part.end is not None and part.end[0] == "replied" for part in self.parts.values())

    @property
    def waiting(self) -> set[str]:
        """Agents whose part has not ended."""
        return {agent for agent, part in self.parts.items() if part.end is None}

    @property
    def at_work(self) -> set[str]:
        """Of these, the ones that may answer."""
        return {agent for agent, part in self.parts.items() if part.is_at_work}

    @property
    def held_bytes(self) -> int:
        """Bytes of the question and of the replies that were let in."""
        return len(self.request.body) + sum(part.held_bytes for part in self.parts.values())


@dataclass
class Expected:
    """What must come back for one event, beside the ends of rounds."""

    #: Round, agents and number of each assignment, in order.
    sent: list[tuple[int, tuple[str, ...], int]] = field(default_factory=list)
    #: Round and agent of each part that is told, in order.
    told: list[tuple[int, str]] = field(default_factory=list)
    #: Whether a reply is no part of any round in flight.
    is_stray: bool = False
    #: Why a request is rejected.
    rejected: str | None = None
    #: The round that is opened.
    opened: int | None = None


class Outside:
    """All agents and all rounds, as far as events tell of them."""

    def __init__(self, agents: Iterable[str], limits: BookLimits) -> None:
        self.limits = limits
        self.rounds: dict[int, Seen] = {}
        #: Agents that have a link. The others are away, or lost.
        self.linked = set(agents)
        self.is_stopped = False

    def in_flight(self) -> list[int]:
        """Rounds that were opened, and whose end was not announced."""
        return [number for number, seen in self.rounds.items() if seen.outcome is None]

    def recall(self, outcome: Outcome, request: RoundRequested) -> None:
        """A round of an earlier run."""
        parts = {
            result.agent: Part(attempt=int(result.status != "unavailable"), is_answered=True, end=("", None, "", None))
            for result in outcome.results
        }
        self.rounds[outcome.round] = Seen(request, 0.0, outcome.quorum, parts, outcome=outcome)

    def break_link(self, agent: str) -> None:
        """Its link is gone; what was sent over it may not have come."""
        self.linked.discard(agent)
        for seen in self.rounds.values():
            if agent in seen.parts:
                seen.parts[agent].is_delivered = False

    def follow(self, event: Event, now: float) -> Expected:
        """What the event does to rounds whose time is not over."""
        live = [number for number in self.in_flight() if now < self.rounds[number].ends_at]
        expected = Expected()
        match event:
            case RoundRequested():
                self._follow_request(event, now, live, expected)
            case ReplyReceived():
                self._follow_reply(event, now, live, expected)
            case AgentReachable(agent):
                self.break_link(agent)
                self.linked.add(agent)
                for number in live:
                    part = self.rounds[number].parts.get(agent)
                    if part is not None and part.end is None:
                        self._send(number, agent, part.attempt + (part.attempt == 0 or part.lost != ""), expected)
            case AgentLost(agent, reason):
                self.break_link(agent)
                for number in live:
                    seen = self.rounds[number]
                    part = seen.parts.get(agent)
                    if part is None or part.end is not None:
                        continue
                    if max(part.attempt, 1) < seen.request.policy.attempts:
                        part.lost = reason if part.attempt else ""
                    else:
                        self._end(
                            number, agent, ("lost" if part.attempt else "unavailable", None, reason, None), expected
                        )
        return expected

    def name_stray(self, event: ReplyReceived) -> str:
        """What a reply that does not count is, to a round that is still known."""
        part = self.rounds[event.round].parts.get(event.agent)
        if part is None or part.attempt == 0:
            return "not-asked"
        if part.is_answered:
            return "duplicate"
        return "late" if event.attempt == part.attempt else "wrong-attempt"

    def _follow_request(self, event: RoundRequested, now: float, live: list[int], expected: Expected) -> None:
        everyone = event.selected + event.away
        try:
            quorum = event.policy.resolve(len(everyone)).quorum
        except NobodySelected:
            expected.rejected = "no-agents"
        except PolicyConflict:
            expected.rejected = "bad-request"
        if len(set(everyone)) < len(everyone):
            expected.rejected = "bad-request"
        if self.is_stopped:
            expected.rejected = "draining"
        if expected.rejected is None and self._is_full(event, live):
            expected.rejected = "busy"
        if expected.rejected is not None:
            return
        number = expected.opened = len(self.rounds) + 1
        self.rounds[number] = Seen(event, now, quorum, {agent: Part() for agent in everyone})
        for agent in event.selected:
            self.rounds[number].parts[agent] = Part(attempt=1, is_delivered=agent in self.linked)
        if event.selected:
            expected.sent.append((number, tuple(sorted(event.selected)), 1))

    def _is_full(self, event: RoundRequested, live: list[int]) -> bool:
        limits = self.limits
        rounds = [self.rounds[number] for number in live]
        return (
            len(rounds) >= limits.in_flight_max
            or (
                event.operator != ""
                and sum(seen.request.operator == event.operator for seen in rounds) >= limits.in_flight_per_operator_max
            )
            or sum(seen.held_bytes for seen in rounds) + len(event.body) > limits.held_bytes_max
            or any(
                sum(agent in seen.waiting for seen in rounds) >= limits.in_flight_per_agent_max
                for agent in event.selected + event.away
            )
        )

    def _follow_reply(self, event: ReplyReceived, now: float, live: list[int], expected: Expected) -> None:
        number, agent = event.round, event.agent
        part = self.rounds[number].parts.get(agent) if number in live else None
        expected.is_stray = (
            part is None
            or part.end is not None
            or part.attempt == 0
            or event.attempt != part.attempt
            or part.is_answered
        )
        if part is None or expected.is_stray:
            return
        seen = self.rounds[number]
        held_bytes = sum(self.rounds[other].held_bytes for other in live)
        reply_bytes = len(event.body or b"") + len(event.error)
        status, body, error = str(event.status), event.body, event.error
        if held_bytes + reply_bytes > self.limits.held_bytes_max:
            status, body, error, reply_bytes = "failed", None, "the coordinator has no room for more replies", 0
        elif status == "replied" and body is None:
            status, error = "failed", "the reply has no body"
        part.is_answered = True
        if status == "failed" and part.attempt < seen.request.policy.attempts:
            if not part.lost:
                self._send(number, agent, part.attempt + 1, expected)
            return
        part.held_bytes = reply_bytes
        self._end(number, agent, (status, body, error, now), expected)
        grace_s = seen.request.policy.grace_s
        if seen.replied >= seen.quorum and seen.grace_ends_at == math.inf and grace_s is not None:
            seen.grace_ends_at = min(now + grace_s, seen.deadline_at)

    def _send(self, number: int, agent: str, attempt: int, expected: Expected) -> None:
        part = self.rounds[number].parts[agent]
        assert part.attempt <= attempt <= part.attempt + 1
        if attempt > part.attempt:
            part.is_answered = False
        part.attempt, part.lost, part.is_delivered = attempt, "", agent in self.linked
        expected.sent.append((number, (agent,), attempt))

    def _end(
        self, number: int, agent: str, end: tuple[str, bytes | None, str, float | None], expected: Expected
    ) -> None:
        seen = self.rounds[number]
        seen.parts[agent].end = end
        seen.parts[agent].lost = ""
        if seen.request.is_streamed:
            expected.told.append((number, agent))

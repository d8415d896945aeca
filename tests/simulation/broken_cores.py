"""Cores with a bug each, to see that the simulation finds it. What they break is what an honest mistake would break."""

import time
from dataclasses import replace
from typing import Any

from quorate_agent import events as ev
from quorate_agent.core import AgentCore
from quorate_coordinator import membership as ms
from quorate_coordinator.idempotency import Keyed, Keys
from quorate_coordinator.learner.vote import VoteLearner
from quorate_coordinator.ledger import Announcement, Ledger
from quorate_coordinator.registry import Registry
from quorate_coordinator.rounds.book import BookLimits, RoundBook
from quorate_coordinator.rounds.events import AgentLost, Event, ReplyReceived, RoundCancelled
from quorate_coordinator.rounds.instructions import CloseRound, Instruction, NoteStray
from quorate_coordinator.simulation.coordinator import LEARNER_CEILINGS, Cores


class CountsTwice(RoundBook):
    """Counts a reply that comes twice as two."""

    def _take_reply(self, event: ReplyReceived, now: float) -> list[Instruction]:
        instructions = super()._take_reply(event, now)
        round_ = self._rounds.get(event.round)
        if round_ is not None and NoteStray("duplicate", event.round, event.agent) in instructions:
            round_._replies += 1
            instructions += round_._follow(now) + self._settle(round_)
        return instructions


class ForgetsTheTimer(RoundBook):
    """Does not say when the next round is due while replies are held."""

    def next_timer(self) -> float | None:
        return None if self.held_bytes else super().next_timer()


class KeepsTheTimer(RoundBook):
    """Leaves a closed round's timer running: an exception, later."""

    def _settle(self, round_: Any) -> list[Instruction]:
        instructions = super()._settle(round_)
        if round_.is_closed:
            self._timers.set(round_.id, round_.deadline_at)
        return instructions


class NamesOneTwice(RoundBook):
    """Tells of a lost agent as if it had been two."""

    def handle(self, event: Event, now: float) -> list[Instruction]:
        instructions = super().handle(event, now)
        for place, one in enumerate(instructions):
            if isinstance(one, CloseRound) and any(result.status == "lost" for result in one.outcome.results):
                results = (*one.outcome.results, one.outcome.results[-1])
                instructions[place] = CloseRound(replace(one.outcome, results=results))
        return instructions


class GoesByTheTimeOfDay(RoundBook):
    """Measures its rounds by a clock that people set."""

    #: That clock, less the monotonic one, at the last event.
    ahead_s = 0.0

    def handle(self, event: Event, now: float) -> list[Instruction]:
        self.ahead_s = time.time() - now
        return super().handle(event, time.time())

    def next_timer(self) -> float | None:
        at = super().next_timer()
        return None if at is None else at - self.ahead_s


class RemembersItsClock(RoundBook):
    """Takes its clock for one that goes on from where it was before a restart."""

    latest = 0.0

    def __init__(self, limits: BookLimits, *, first_round: int) -> None:
        super().__init__(limits, first_round=first_round)
        if first_round == 1:
            RemembersItsClock.latest = 0.0

    def handle(self, event: Event, now: float) -> list[Instruction]:
        RemembersItsClock.latest = max(RemembersItsClock.latest, now)
        return super().handle(event, RemembersItsClock.latest)


class GoesOnAlone(RoundBook):
    """Does not mind that nobody wants a round any more."""

    def handle(self, event: Event, now: float) -> list[Instruction]:
        return [] if isinstance(event, RoundCancelled) else super().handle(event, now)


class WaitsForTheLost(RoundBook):
    """Does not mind that an agent is gone."""

    def handle(self, event: Event, now: float) -> list[Instruction]:
        return [] if isinstance(event, AgentLost) else super().handle(event, now)


class AsksAgain(Keys):
    """Knows a key only when its round is over."""

    def find(self, key: str, digest: bytes) -> Keyed | None:
        found = super().find(key, digest)
        return None if found is not None and found.request_id is not None else found

    def open(self, key: str, digest: bytes, request_id: int) -> None:
        self._in_flight.pop(key, None)
        super().open(key, digest, request_id)


class KeepsOneBack(Ledger):
    """Holds the last of what may be said until there is more."""

    def committed(self, seq: int) -> list[Announcement]:
        free = super().committed(seq)
        if free:
            self._held.appendleft((seq, free.pop()))
        return free


class AnnouncesEarly(Ledger):
    """Lets everything go when something has become durable."""

    def committed(self, seq: int) -> list[Announcement]:
        return super().committed(1 << 62)


class Forgets(Registry):
    """Does not ask an agent again that was suspect."""

    def _hear(self, entry: Any, seen_at: float, now: float) -> list[ms.Instruction]:
        returned = super()._hear(entry, seen_at, now)
        if returned:
            self._unindex(entry)
        return returned


class HastyRegistry(Registry):
    """Declares an agent lost that was heard, when its own clock has stood still."""

    def handle(self, event: ms.Event, now: float) -> list[ms.Instruction]:
        if isinstance(event, ms.LeaseChecked):
            event = ms.TimerFired()
        return super().handle(event, now)


class TakesOverInSilence(Registry):
    """Does not say that an agent's session is over when the agent comes back in a new one."""

    def _join(self, event: ms.AgentJoined, now: float) -> list[ms.Instruction]:
        return [one for one in super()._join(event, now) if not isinstance(one, ms.DeclareLost)]


class StaysAway(AgentCore):
    """Does not come back when it was refused."""

    def handle(self, event: ev.Event, now: float) -> list[ev.Instruction]:
        instructions = super().handle(event, now)
        if isinstance(event, ev.RefusalReceived):
            return [instruction for instruction in instructions if not isinstance(instruction, ev.Reconnect)]
        return instructions


class RunsTwice(AgentCore):
    """Starts the handler of a cancelled assignment again."""

    def handle(self, event: ev.Event, now: float) -> list[ev.Instruction]:
        running = list(self._running.values())
        instructions = super().handle(event, now)
        if isinstance(event, ev.CancellationReceived):
            for work in running:
                if work.round == event.round and not work.is_feedback:
                    self._start(replace(work, id=next(self._work_ids)), now, instructions)
        return instructions


class ForgetsWhileAway(AgentCore):
    """Keeps no reply that is finished while there is no link."""

    def _reply(self, reply: ev.SendReply, out: list[ev.Instruction]) -> None:
        if self._is_linked:
            super()._reply(reply, out)


class NeverTheSame(VoteLearner):
    """Forgets its latencies when it is restored, so that a restart changes what it knows."""

    def _load(self, state: dict[str, Any]) -> None:
        super()._load({**state, "latencies": []})


def _forgetful(snapshot: bytes | None) -> VoteLearner:
    if snapshot is None:
        return NeverTheSame(**LEARNER_CEILINGS)
    return NeverTheSame.restore(snapshot, **LEARNER_CEILINGS)


#: Name, the cores, and the invariants that may be the first to be violated.
BROKEN: dict[str, tuple[Cores, set[str]]] = {
    "a reply counts twice": (Cores(book=CountsTwice), {"quorum is never claimed falsely", "complete means everybody"}),
    "no timer": (Cores(book=ForgetsTheTimer), {"rounds end by their deadline"}),
    "a timer too many": (Cores(book=KeepsTheTimer), {"nothing raises (KeyError in _close_due)"}),
    "an agent with two results": (Cores(book=NamesOneTwice), {"one status for each selected agent"}),
    "the time of day": (
        Cores(book=GoesByTheTimeOfDay),
        {"rounds end by their deadline", "expired means after the deadline", "late means after the deadline"},
    ),
    "a clock from before the restart": (Cores(book=RemembersItsClock), {"rounds end by their deadline"}),
    "a round that nobody wants": (Cores(book=GoesOnAlone), {"who has left is not waited for"}),
    "a round that waits for who is gone": (Cores(book=WaitsForTheLost), {"no round waits for who is gone"}),
    "a key in flight is not known": (Cores(keys=AsksAgain), {"one round for each key"}),
    "an announcement is kept back": (Cores(ledger=KeepsOneBack), {"what is durable is announced"}),
    "announced early": (Cores(ledger=AnnouncesEarly), {"announced is durable"}),
    "forgets who was suspect": (Cores(registry=Forgets), {"members can be asked"}),
    "declares the living lost": (Cores(registry=HastyRegistry), {"who was heard is not lost"}),
    "a takeover in silence": (Cores(registry=TakesOverInSilence), {"a session ends before the next begins"}),
    "an agent stays away": (Cores(agent=StaysAway), {"agents come back", "all comes to rest"}),
    "an assignment runs twice": (
        Cores(agent=RunsTwice),
        {"no assignment runs twice in a process", "handlers are bounded"},
    ),
    "a reply is lost with its link": (Cores(agent=ForgetsWhileAway), {"no finished reply is lost"}),
    "a restart loses what was learned": (
        Cores(learner=_forgetful),
        {"the learner is a replay of its records"},
    ),
}

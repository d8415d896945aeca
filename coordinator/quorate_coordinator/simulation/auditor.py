"""What must hold, whatever happens. Hears of facts that can be seen from outside, and knows no core.

Most is checked when a fact comes, so that a thousand idle agents cost nothing; what can only be seen by looking at
everything is looked at every so often (`run`) and at the end.
"""

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final, NoReturn

from quorate_coordinator.simulation.disk import KEEP_S, SimDisk
from quorate_coordinator.simulation.process import Process
from quorate_coordinator.simulation.world import World
from quorate_protocol.fields import Body

#: Taken off before rounding a share of the selected up, as in `rounds.policy`: far above the error of the product.
_ROUNDING: Final = 1e-9

#: Seconds by which two floating point clocks may differ.
_SLACK_S: Final = 1e-6


class InvariantViolated(Exception):
    """Something that must hold does not."""

    def __init__(self, invariant: str, message: str, *, at_s: float, words: tuple[str, ...]) -> None:
        super().__init__(f"{invariant}: {message}")
        #: In words; the same for the same invariant.
        self.invariant = invariant
        self.message = message
        #: Virtual seconds since the start.
        self.at_s = at_s
        #: What lines of the trace have that concern it.
        self.words = words


@dataclass(frozen=True, slots=True)
class OpenedFacts:
    """A round that was opened."""

    round: int
    #: Of the call that asked for it.
    key: str
    selected: tuple[str, ...]
    opened_at: float
    deadline_s: float
    #: As the call or the settings said.
    quorum: int | None
    quorum_fraction: float | None
    #: How often one agent may be asked.
    attempts: int = 1
    #: Whether who asked has a key to it.
    is_keyed: bool = True
    #: Numbers of the operator's tries that wait for it.
    waiters: frozenset[int] = frozenset()

    @property
    def needed(self) -> int:
        """Replies needed, by the plain words of the design."""
        if self.quorum is not None:
            return self.quorum
        assert self.quorum_fraction is not None
        return max(1, math.ceil(self.quorum_fraction * len(self.selected) - _ROUNDING))


@dataclass(frozen=True, slots=True)
class ClosedFacts:
    """A round that was closed."""

    round: int
    key: str
    state: str
    quorum: int
    #: Agent, status, body.
    results: tuple[tuple[str, str, Body | None], ...]
    duration_s: float


class Auditor:
    """One run's."""

    def __init__(self, world: World, disk: SimDisk) -> None:
        self._world = world
        self._disk = disk
        #: Rounds in flight.
        self._open: dict[int, OpenedFacts] = {}
        #: (deadline, round).
        self._deadlines: list[tuple[float, int]] = []
        #: By round in flight: what ended an agent's part, an answer or its loss, whichever the coordinator heard of
        #: first, and when.
        self._parts: dict[int, dict[str, tuple[str, float]]] = {}
        #: By round in flight: who was given the assignment.
        self._assigned: dict[int, set[str]] = {}
        #: (round, agent) of answers that were offered as late.
        self._late: set[tuple[int, str]] = set()
        #: By agent: its session, as long as it is not over.
        self._sessions: dict[str, str] = {}
        self._last_round = 0
        #: By round in flight: tries of its operator that wait for it; and the rounds that nobody wants any more.
        self._waiters: dict[int, set[int]] = {}
        self._given_up: set[int] = set()
        #: By key: the round that has answered it for good in this process.
        self._settled: dict[str, int] = {}
        #: What each agent really answered, by round: (attempt, status, body).
        self._replies: dict[int, dict[str, list[tuple[int, str, Body | None]]]] = {}
        #: By session: round and attempt of what its agent has finished in it, in this order.
        self._finished: dict[str, list[tuple[int, int]]] = {}
        #: By session: cancellations and truths that its agent is to get and has not, in this order.
        self._due: dict[str, deque[tuple[str, int]]] = {}
        #: Sessions of which some could not be kept.
        self._gapped: set[str] = set()
        #: (instance, round, attempt) that a handler ran for.
        self._handled: set[tuple[str, int, int]] = set()
        #: Outcomes that operators saw, by key: round, digest, number of the record.
        self._seen: dict[str, tuple[int, str, int]] = {}
        #: Truths that operators know to be taken, by round: number of the record.
        self._truths: dict[int, int] = {}
        #: Rounds whose truth this process has learned.
        self._learned: set[int] = set()
        self._process: Process | None = None
        #: Moments of the coordinator's standing still, on its own clock: it cannot close a round then.
        self.is_suspended = False
        self._suspended_s = 0.0
        self._suspended_at = 0.0
        self.rounds: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.handlers = 0
        self.announcements = 0

    def fail(self, invariant: str, message: str, *, agent: str = "", round: int = 0) -> NoReturn:
        """Ends the run.

        Raises:
            InvariantViolated: always.
        """
        words = ((agent,) if agent else ()) + ((f"r{round}",) if round else ())
        raise InvariantViolated(invariant, message, at_s=self._world.now, words=words)

    # --- rounds ---

    def round_opened(self, facts: OpenedFacts) -> None:
        """The assignment goes out."""
        if facts.round <= self._last_round:
            self.fail("round numbers are used once", f"round {facts.round} was opened again", round=facts.round)
        if facts.is_keyed:
            self._check_key(facts)
        self._last_round = facts.round
        self._open[facts.round] = facts
        self._waiters[facts.round] = {*facts.waiters}
        self._parts[facts.round] = {}
        heapq.heappush(self._deadlines, (facts.opened_at + facts.deadline_s, facts.round))

    def _check_key(self, facts: OpenedFacts) -> None:
        """A round opens under a key: there is no other that answers it."""
        number, key = facts.round, facts.key
        other = self._settled.get(key) or self._seen.get(key, (0,))[0]
        if other:
            message = f"round {number} opens for {key}, which round {other} has answered"
            self.fail("one round for each key", message, round=number)
        for one in self._open.values():
            if one.is_keyed and one.key == key:
                message = f"round {number} opens for {key}, and round {one.round} is in flight for it"
                self.fail("one round for each key", message, round=number)

    def round_closed(self, facts: ClosedFacts) -> None:
        """The outcome stands."""
        number = facts.round
        opened = self._open.pop(number, None)
        if opened is None:
            self.fail("a round closes once", f"round {number} closed as {facts.state}, and was not open", round=number)
        waiters = self._waiters.pop(number)
        if facts.state == "cancelled" and (waiters or number not in self._given_up):
            message = f"round {number} is cancelled, and its operator has not given it up: tries {sorted(waiters)} wait"
            self.fail("only its operator cancels a round", message, round=number)
        self._given_up.discard(number)
        if opened.is_keyed and facts.state not in ("cancelled", "interrupted"):
            self._settled[facts.key] = number
        now = self._now
        if now > opened.opened_at + opened.deadline_s + self._stood_still_since(opened.opened_at) + _SLACK_S:
            message = f"round {number} ended after {facts.duration_s:.3f} s, with a deadline of {opened.deadline_s:g} s"
            self.fail("rounds end by their deadline", message, round=number)
        agents = tuple(agent for agent, _, _ in facts.results)
        if agents != opened.selected:
            message = f"round {number} selected {opened.selected} and has results of {agents}"
            self.fail("one status for each selected agent", message, round=number)
        replied = [agent for agent, status, _ in facts.results if status == "replied"]
        self._check_quorum(opened, facts, len(replied))
        self._check_replies(facts)
        self._check_parts(opened, facts)
        self.rounds[facts.state] += 1
        self.statuses.update(status for _, status, _ in facts.results)

    def _check_quorum(self, opened: OpenedFacts, facts: ClosedFacts, replied: int) -> None:
        number, state = facts.round, facts.state
        if facts.quorum != opened.needed:
            message = f"round {number} needed {facts.quorum} replies of {len(opened.selected)}, not {opened.needed}"
            self.fail("quorum is what was asked for", message, round=number)
        has_quorum = state in ("complete", "quorate")
        if has_quorum and replied < opened.needed:
            message = f"round {number} is {state} with {replied} of {opened.needed} replies"
            self.fail("quorum is never claimed falsely", message, round=number)
        if (state == "complete") != (replied == len(opened.selected)) and state not in ("cancelled", "interrupted"):
            message = f"round {number} is {state} with {replied} replies of {len(opened.selected)} selected"
            self.fail("complete means everybody", message, round=number)
        if state == "expired" and self._now + _SLACK_S < opened.opened_at + opened.deadline_s:
            message = f"round {number} is expired after {facts.duration_s:.3f} s, {opened.deadline_s:g} s were its time"
            self.fail("expired means after the deadline", message, round=number)
        if state in ("failed", "expired") and replied >= opened.needed:
            message = f"round {number} is {state} with {replied} replies, and {opened.needed} were needed"
            self.fail("quorum is seen when it is there", message, round=number)

    def _check_replies(self, facts: ClosedFacts) -> None:
        said = self._replies.get(facts.round, {})
        for agent, status, body in facts.results:
            if status in ("replied", "declined", "failed"):
                for _, own_status, own_body in said.get(agent, ()):
                    if own_status == status and own_body == body:
                        break
                    if own_status == "replied" and status == "failed":
                        break  # there was no room for its reply
                else:
                    message = f"round {facts.round} has {agent} as {status}, and it said {said.get(agent)}"
                    self.fail("a reply is its agent's own", message, agent=agent, round=facts.round)

    def _check_parts(self, opened: OpenedFacts, facts: ClosedFacts) -> None:
        """Whoever was lost before it answered is lost, and nobody else; who was at work was not done."""
        heard = self._parts.pop(facts.round)
        assigned = self._assigned.pop(facts.round, set())
        for agent, status, _ in facts.results:
            if (status == "unavailable") != (agent not in assigned):
                message = (
                    f"round {facts.round} has {agent} as {status}, and it was{' not' * (agent not in assigned)} asked"
                )
                self.fail("unavailable means never asked", message, agent=agent, round=facts.round)
        if opened.attempts > 1:
            return  # what came first is not what counts
        at_deadline = self._now + _SLACK_S >= opened.opened_at + opened.deadline_s
        for agent, status, _ in facts.results:
            if status == "unavailable":
                continue
            first, first_at = heard.get(agent, ("nothing", self._now))
            # What comes in the very moment of the end may come after it: a coordinator that stood still finds that
            # grace was over long ago.
            if (status == "lost") != (first == "lost") and (status == "lost" or first_at < self._now):
                message = f"round {facts.round} has {agent} as {status}, and what came of it first was {first}"
                self.fail("lost means lost", message, agent=agent, round=facts.round)
            if status in ("late", "cancelled") and first_at < self._now:
                message = f"round {facts.round} has {agent} as {status}, and it was {first} before"
                self.fail("an answer in time counts", message, agent=agent, round=facts.round)
            if status == "late" and not at_deadline:
                message = f"round {facts.round} has {agent} as late, {facts.duration_s:.3f} s after its opening"
                self.fail("late means after the deadline", message, agent=agent, round=facts.round)

    def reply_received(self, agent: str, round_id: int) -> None:
        """The coordinator has an agent's answer, and has not looked at it."""
        opened = self._open.get(round_id)
        if opened is not None and self._now < opened.opened_at + opened.deadline_s:
            self._parts[round_id].setdefault(agent, ("answered", self._now))

    def late_offered(self, agent: str, round_id: int) -> None:
        """An answer is offered to whoever learns from late ones."""
        now = self._now
        if (round_id, agent) in self._late:
            message = f"the late answer of {agent} in round {round_id} was offered again"
            self.fail("a late reply is offered once", message, agent=agent, round=round_id)
        first, first_at = self._parts.get(round_id, {}).get(agent, ("nothing", now))
        opened = self._open.get(round_id)
        if first == "answered" and first_at < now and (opened is None or opened.attempts == 1):
            message = f"an answer of {agent} in round {round_id} was offered as late, and one had come in time"
            self.fail("a late reply is offered once", message, agent=agent, round=round_id)
        self._late.add((round_id, agent))

    def session_began(self, agent: str, session: str) -> None:
        """An agent was let in."""
        old = self._sessions.get(agent)
        if old is not None:
            message = f"{agent} begins session {session}, and nobody was told that {old} is over"
            self.fail("a session ends before the next begins", message, agent=agent)
        self._sessions[agent] = session

    def session_over(self, agent: str, session: str) -> None:
        """A session is over, and the rounds are about to be told."""
        self._due.pop(session, None)
        self._finished.pop(session, None)
        self._gapped.add(session)  # an agent that has not heard of its end may get something still
        if self._sessions.pop(agent, None) != session:
            message = f"session {session} of {agent} is over, and was not its session"
            self.fail("a session ends before the next begins", message, agent=agent)
        for number, opened in self._open.items():
            if agent in opened.selected and self._now < opened.opened_at + opened.deadline_s:
                self._parts[number].setdefault(agent, ("lost", self._now))

    def check(self) -> None:
        """After every event: no round in flight is past its deadline."""
        deadlines = self._deadlines
        while deadlines and not self.is_suspended and deadlines[0][0] + _SLACK_S < self._now:
            deadline_at, number = heapq.heappop(deadlines)
            if number in self._open:
                message = f"round {number} is open {self._now - deadline_at:.6f} s after its deadline"
                self.fail("rounds end by their deadline", message, round=number)

    @property
    def in_flight(self) -> Iterable[OpenedFacts]:
        """Rounds that were opened and have not closed."""
        return self._open.values()

    def check_in_flight(self, count: int) -> None:
        """The book has as many rounds in flight as were opened and not closed."""
        if count != len(self._open):
            self.fail("every round is in the book", f"{count} are in flight, and {sorted(self._open)} were opened")

    def check_waiting(self, agent: str, count: int) -> None:
        """An agent is gone: so many rounds wait for it still, and may where they would ask it again."""
        again = sum(opened.attempts > 1 and agent in opened.selected for opened in self._open.values())
        if count > again:
            self.fail("no round waits for who is gone", f"{count} rounds wait for {agent}, which is gone", agent=agent)

    def assigned(self, round_id: int, agents: Iterable[str], attempt: int) -> None:
        """The assignment goes to these agents."""
        opened = self._open.get(round_id)
        if opened is None:
            self.fail("only open rounds ask", f"round {round_id} is not open, and asks", round=round_id)
        if not 1 <= attempt <= opened.attempts:
            message = f"round {round_id} asks a {attempt}th time, and may ask {opened.attempts} times"
            self.fail("attempts are bounded", message, round=round_id)
        for agent in agents:
            if agent not in opened.selected:
                message = f"round {round_id} asks {agent}, which was not selected"
                self.fail("only the selected are asked", message, agent=agent, round=round_id)
            self._assigned.setdefault(round_id, set()).add(agent)

    # --- operators ---

    def operator_joined(self, round_id: int, number: int) -> None:
        """One more try of an operator waits for a round, which was found by its key."""
        if round_id in self._waiters:
            self._waiters[round_id].add(number)

    def operator_leaves(self, key: str, number: int, *, withdraws: bool) -> None:
        """The coordinator hears that a try is over, and has not done anything yet."""
        for round_id, opened in self._open.items():
            waiters = self._waiters[round_id]
            if opened.key == key and number in waiters:
                waiters.discard(number)
                if not waiters and (withdraws or not opened.is_keyed):
                    self._given_up.add(round_id)

    def operator_left(self, key: str) -> None:
        """It has done what it does then: what nobody waits for and nobody can find again is over."""
        for round_id in self._given_up:
            if round_id in self._open and self._open[round_id].key == key:
                message = f"round {round_id} goes on for {key}, which has given it up"
                self.fail("who has left is not waited for", message, round=round_id)

    # --- agents ---

    def handler_started(self, instance: str, agent: str, round_id: int, attempt: int) -> None:
        """A handler begins an assignment."""
        work = instance, round_id, attempt
        if work in self._handled:
            message = f"{instance} runs round {round_id}, attempt {attempt}, a second time"
            self.fail("no assignment runs twice in a process", message, agent=agent, round=round_id)
        self._handled.add(work)
        self.handlers += 1

    def reply_made(self, agent: str, round_id: int, attempt: int, status: str, body: Body | None) -> None:
        """An agent's own word."""
        self._replies.setdefault(round_id, {}).setdefault(agent, []).append((attempt, status, body))

    def reply_finished(self, session: str, round_id: int, attempt: int) -> None:
        """An agent is done with an assignment, with a link or without; it may say so again."""
        finished = self._finished.setdefault(session, [])
        if (round_id, attempt) not in finished:
            finished.append((round_id, attempt))

    def session_resumed(self, agent: str, session: str, received: int, sent: list[tuple[int, int]]) -> None:
        """An agent goes on with its session over another link, and has sent these replies at once."""
        wanted = self._finished.get(session, [])[received:]
        if sent != wanted:
            message = f"{agent} resumes {session}, of which {received} replies came, with {sent} and not {wanted}"
            self.fail("no finished reply is lost", message, agent=agent)

    def reply_came(self, agent: str, session: str, number: int, round_id: int, attempt: int) -> None:
        """The coordinator counts a reply as the session's one of this number, from 1."""
        finished = self._finished.get(session, [])
        if finished[number - 1 : number] != [(round_id, attempt)]:
            message = (
                f"reply {number} of {session} is to {round_id}, {attempt}, and not {finished[number - 1 : number]}"
            )
            self.fail("no finished reply is lost", message, agent=agent, round=round_id)

    def replies_at_rest(self, agent: str, session: str, received: int) -> None:
        """All is quiet: what an agent has finished has come, and it has got what was for it."""
        finished = self._finished.get(session, [])
        if len(finished) != received:
            message = f"{received} replies of {session} came, and {len(finished)} were finished"
            self.fail("no finished reply is lost", message, agent=agent)
        due = self._due.get(session)
        if due and session not in self._gapped:
            message = f"{agent} has not got the {due[0][0]} of round {due[0][1]} and {len(due) - 1} more in {session}"
            self.fail("what is kept comes once and in order", message, agent=agent, round=due[0][1])

    def frame_sent(self, session: str, kind: str, round_id: int) -> None:
        """The coordinator has a cancellation or a truth for an agent, with a link or without."""
        self._due.setdefault(session, deque()).append((kind, round_id))

    def frames_dropped(self, session: str) -> None:
        """There were more than are kept for a session without a link: some of it does not come."""
        self._gapped.add(session)

    def frame_came(self, agent: str, session: str, kind: str, round_id: int) -> None:
        """An agent has one of them."""
        due = self._due.get(session)
        if session in self._gapped:
            return
        if not due or due.popleft() != (kind, round_id):
            message = f"{agent} got the {kind} of round {round_id} in {session}, and another was due"
            self.fail("what is kept comes once and in order", message, agent=agent, round=round_id)

    def agent_expired(self, agent: str, silent_s: float, lease_s: float) -> None:
        """The registry says that an agent's lease is over, after so much silence on the coordinator's clock."""
        if silent_s + _SLACK_S < lease_s:
            message = f"{agent} was declared lost after {silent_s:.2f} s of silence, with a lease of {lease_s:g} s"
            self.fail("who was heard is not lost", message, agent=agent)

    # --- what is durable ---

    def check_announced(self, durable: int, held: int) -> None:
        """So much is durable, and what waited for it was told: there is a reason for each that is held still."""
        if held and durable >= len(self._disk.records):
            message = f"{held} announcements are held, and all {durable} records are durable"
            self.fail("what is durable is announced", message)

    def pruned(self, rounds: frozenset[int], awaiting: Collection[int], now_s: float) -> None:
        """The disk has let go of these rounds, by this time of day; of others the truth may come."""
        if not rounds:
            return
        last_at: dict[int, float] = {}
        for record, made_at in zip(self._disk.records, self._disk.made_at, strict=True):
            if record.round in rounds:
                last_at[record.round] = max(made_at, last_at.get(record.round, 0.0))
        for round_id in sorted(rounds):
            age_s = now_s - last_at[round_id]
            if round_id in self._open or round_id in awaiting:
                what = "in flight" if round_id in self._open else "waiting for its truth"
                self.fail("nothing in use is pruned", f"round {round_id} is {what}, and pruned", round=round_id)
            if age_s < KEEP_S:
                message = f"round {round_id} was pruned {age_s:.1f} s after its last record, and is kept {KEEP_S:g} s"
                self.fail("nothing young is pruned", message, round=round_id)
        # Told again while a process remembers them, and forgotten with it.
        self._seen = {key: seen for key, seen in self._seen.items() if seen[0] not in rounds}

    def announced(self, key: str | None, round_id: int, digest: str, record: int | None) -> None:
        """An operator is told an outcome; under a key, it may ask for it again, and `record` is None then."""
        if record is not None and record > self._disk.durable:
            message = f"round {round_id} was announced with record {record}, and {self._disk.durable} are durable"
            self.fail("announced is durable", message, round=round_id)
        self.announcements += 1
        if key is None:
            return
        known = self._seen.get(key)
        if known is not None and known[:2] != (round_id, digest):
            message = f"{key} was told round {known[0]} first, and is now told round {round_id} ({known[1]}, {digest})"
            self.fail("the same call has the same outcome", message, round=round_id)
        if record is not None:
            self._seen[key] = round_id, digest, record

    def truth_learned(self, round_id: int) -> None:
        """A truth goes to the learner."""
        if round_id in self._learned or round_id in self._truths:
            self.fail("a truth is learned once", f"the truth of round {round_id} was learned again", round=round_id)
        self._learned.add(round_id)

    def truth_announced(self, round_id: int, record: int) -> None:
        """An operator is told that its truth was taken."""
        if record > self._disk.durable:
            message = f"the truth of round {round_id} was confirmed before it was durable"
            self.fail("announced is durable", message, round=round_id)
        self._truths[round_id] = record

    # --- the coordinator's life ---

    @property
    def _now(self) -> float:
        """The coordinator's monotonic clock; the world's where there is no coordinator."""
        return self._world.now if self._process is None else self._process.now

    def coordinator_started(self, process: Process) -> None:
        """A process, whose clock the rounds go by from now on."""
        self._process = process

    def suspended(self) -> None:
        """The coordinator stands still."""
        if not self.is_suspended:
            self.is_suspended = True
            self._suspended_at = self._now

    def resumed(self) -> None:
        """It goes on, and has not done anything yet."""
        if self.is_suspended:
            self.is_suspended = False
            self._suspended_s = self._now - self._suspended_at

    def _stood_still_since(self, moment: float) -> float:
        return self._suspended_s if moment <= self._suspended_at + self._suspended_s else 0.0

    def coordinator_died(self) -> None:
        """What was in flight is gone with it, and so is what it had learned and not made durable."""
        self._open.clear()
        self._waiters.clear()
        self._given_up.clear()
        self._settled.clear()
        self._parts.clear()
        self._assigned.clear()
        self._sessions.clear()
        self._deadlines.clear()
        self.is_suspended = False
        self._suspended_s = self._suspended_at = 0.0
        self._process = None
        self._learned = {number for number in self._learned if number in self._truths}
        durable = self._disk.durable
        for key, (round_id, _, record) in self._seen.items():
            if record > durable:
                message = f"round {round_id}, announced to {key}, did not survive the crash"
                self.fail("announced is durable", message, round=round_id)

    def restarted(self, learner: bytes, replayed: bytes, find: Callable[[str], int | None]) -> None:
        """A new process has replayed its disk.

        Args:
            learner: Its learner's snapshot.
            replayed: That of a learner that has lived through all durable records.
            find: By key, the round that it knows.
        """
        self.check_learner(learner, replayed)
        for key, (round_id, _, _) in self._seen.items():
            if find(key) != round_id:
                message = f"round {round_id}, announced to {key}, is not found after the restart"
                self.fail("announced stays found", message, round=round_id)

    def check_learner(self, learner: bytes, replayed: bytes) -> None:
        """The learner's state is that of a replay."""
        if learner != replayed:
            self.fail("the learner is a replay of its records", "its state differs from that of a replay")

"""The fleet: who is a member, in what state, and who can do what. A pure core.

Theory of operation. The shell turns what happens to links into events, hands each to
`Registry.handle(event, now)`, and carries out the instructions in order. `now` is a monotonic time in
seconds. A membership is named by its session; the session in an event must be the agent's current one,
otherwise the event is about a session that is over, and changes nothing. A session has one link at a
time; of a link that was replaced within its session the shell reports nothing more.

Leases. Any packet renews a lease. The shell does not report each one: it reports pulses (`PacketSeen`),
and when `next_timer` has come it asks `lease_due(now)` whose leases are to be looked at, and gives what
the transport knows about when those were last heard (`LeaseChecked`). An agent silent for
`suspect_after_s` becomes suspect, one silent for `lease_s` is lost. One check moves an agent by one step
only, and between the steps lie at least `lease_s - suspect_after_s`: a coordinator that was itself
stopped for a while (a debugger, a suspended machine) hears its agents out before it declares anybody
lost.

Links break, sessions go on. An agent whose link is gone without a goodbye is *away*: suspect (or still
draining) without a link. It keeps its session for a whole lease from when the break was noticed; a hello
with the session's name and secret resumes it. A check that comes late by more than the last part of a
lease finds a coordinator that was stopped: who is away then gets that part once more, to come back in.

Suspect agents are still asked. Most silences end: the network lost some pulses, or the agent's
machine is overloaded; leaving it out would shrink rounds at every hiccup, while asking it costs at
most the wait that quorum, grace and deadline bound anyway. Those who are away cannot be asked now, and may
be when they return: they are selected apart. Draining agents are not asked.

A second hello under the same identity that resumes nothing takes over at once: the old link is closed as
replaced, the old session is over, and what was assigned in it is lost with it.
"""

import hmac
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, assert_never, get_args

from quorate_coordinator.membership import (
    NEXT,
    AdmitAgent,
    AgentDraining,
    AgentJoined,
    AgentLeft,
    Change,
    DeclareAway,
    DeclareLeft,
    DeclareLost,
    DeclareReturned,
    DeclareSuspect,
    Event,
    Instruction,
    LeaseChecked,
    LinkBroken,
    Member,
    MemberState,
    PacketSeen,
    RefuseAgent,
    ReplaceLink,
    ResumeSession,
    TimerFired,
)
from quorate_coordinator.timers import Timers
from quorate_protocol.errors import LocalError
from quorate_protocol.limits import CONNECTIONS_MAX


@dataclass(slots=True)
class _Entry:
    """One agent in the book."""

    agent: str
    session: str
    instance: str
    labels: dict[str, str]
    tasks: tuple[str, ...]
    address: str
    software: str
    joined_at: float
    last_seen_at: float
    state_since: float
    secret: str = field(repr=False)
    state: MemberState = "connected"
    #: Since when there is no link; None while there is one.
    away_since: float | None = None
    reason: str = ""


class _Roster:
    """A set of agents, and the same sorted."""

    __slots__ = ("_in_order", "agents")

    def __init__(self) -> None:
        self.agents: set[str] = set()
        #: None when it has to be sorted again.
        self._in_order: tuple[str, ...] | None = ()

    def add(self, agent: str) -> None:
        self.agents.add(agent)
        self._in_order = None

    def discard(self, agent: str) -> None:
        if agent in self.agents:
            self.agents.remove(agent)
            self._in_order = None

    def in_order(self) -> tuple[str, ...]:
        """The same object until somebody comes or goes."""
        if self._in_order is None:
            self._in_order = tuple(sorted(self.agents))
        return self._in_order


@dataclass(slots=True)
class _TaskIndex:
    """Who can be asked to do one task: at once, or when they are back."""

    linked: _Roster = field(default_factory=_Roster)
    away: _Roster = field(default_factory=_Roster)


class Registry:
    """The one door to the fleet's membership: `handle`."""

    def __init__(
        self,
        *,
        lease_s: float,
        suspect_after_s: float | None = None,
        agents_max: int = CONNECTIONS_MAX,
        departed_max: int = 1024,
    ) -> None:
        """An empty fleet.

        Args:
            lease_s: Seconds of silence, or of being away, after which an agent is lost.
            suspect_after_s: Seconds of silence after which it is suspect; None is half of `lease_s`.
            agents_max: Agents with a session; one more is refused as `full`, until one goes.
            departed_max: Agents remembered after they were lost or left; the longest gone is dropped.

        Raises:
            LocalError: the two times are not positive and in this order.
        """
        self._lease_s: Final = lease_s
        self._suspect_after_s: Final = lease_s / 2 if suspect_after_s is None else suspect_after_s
        if not 0 < self._suspect_after_s < self._lease_s:
            raise LocalError(f"suspect_after_s {self._suspect_after_s:g} is not over 0 and under lease_s {lease_s:g}")
        self._agents_max: Final = agents_max
        self._departed_max: Final = departed_max
        self._live: dict[str, _Entry] = {}
        #: In the order of departure.
        self._departed: OrderedDict[str, _Entry] = OrderedDict()
        #: Task to the agents that are connected or suspect, away or not. No task without one.
        self._by_task: dict[str, _TaskIndex] = {}
        #: One for each live agent: when its silence, or absence, is looked at.
        self._timers: Timers[str] = Timers()
        self._counts: dict[MemberState, int] = dict.fromkeys(get_args(MemberState), 0)

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Takes what happened at `now` (monotonic seconds); returns what to do about it, in order.

        Afterwards `next_timer` may have changed.
        """
        match event:
            case PacketSeen():
                entry = self._current(event.agent, event.session)
                return [] if entry is None else self._hear(entry, now, now)
            case AgentJoined():
                return self._join(event, now)
            case LeaseChecked(last_seen_at):
                returned: list[Instruction] = []
                for agent, seen_at in last_seen_at.items():
                    if (entry := self._live.get(agent)) is not None:
                        returned += self._hear(entry, seen_at, now)
                return returned + self._check_leases(now)
            case TimerFired():
                return self._check_leases(now)
            case AgentDraining():
                entry = self._current(event.agent, event.session)
                if entry is not None and entry.state != "draining":
                    self._move(entry, Change.DRAINING, now)
                    self._unindex(entry)
                    self._timers.set(entry.agent, self._lease_ends_at(entry))
                return []
            case LinkBroken():
                entry = self._current(event.agent, event.session)
                if entry is None:
                    return []
                reason = event.reason or "link broken"
                if event.is_final:
                    return self._depart(entry, Change.BROKEN_OFF, reason, now)
                return self._lose_link(entry, reason, now)
            case AgentLeft():
                entry = self._current(event.agent, event.session)
                return [] if entry is None else self._depart(entry, Change.LEFT, event.reason, now)
            case _:
                assert_never(event)

    def next_timer(self) -> float | None:
        """The moment at or after which a `LeaseChecked` (or `TimerFired`) is owed; None when none is."""
        return self._timers.next_at()

    # --- queries ---

    def lease_due(self, now: float) -> list[str]:
        """Agents whose silence is to be looked at now: the next `LeaseChecked` says when they were last heard."""
        return self._timers.due(now)

    def select(self, task: str, labels: Mapping[str, str] | None = None) -> tuple[str, ...]:
        """Agents that can be asked now to do a task and carry all these labels, sorted; suspect ones too.

        Costs by the agents that have the task, and nothing to speak of when nobody came or went since
        the last time and no labels are asked for.
        """
        index = self._by_task.get(task)
        return () if index is None else self._carrying(labels, index.linked)

    def select_away(self, task: str, labels: Mapping[str, str] | None = None) -> tuple[str, ...]:
        """As `select`, those who are away: without a link, and expected back within their lease."""
        index = self._by_task.get(task)
        return () if index is None else self._carrying(labels, index.away)

    def _carrying(self, labels: Mapping[str, str] | None, roster: _Roster) -> tuple[str, ...]:
        if not labels:
            return roster.in_order()
        wanted = labels.items()
        return tuple(agent for agent in roster.in_order() if wanted <= self._live[agent].labels.items())

    def can_resume(self, agent: str, resume: tuple[str, str] | None) -> bool:
        """Whether a hello of this agent with this `resume` (session, secret) would go on with its session now."""
        entry = self._live.get(agent)
        if entry is None or resume is None:
            return False
        session, secret = resume
        # Both compared in any case, each in a time that says nothing of where they differ.
        is_session = hmac.compare_digest(entry.session.encode(), session.encode())
        return hmac.compare_digest(entry.secret.encode(), secret.encode()) and is_session and bool(secret)

    def session_of(self, agent: str) -> str | None:
        """The session of an agent that has one, with a link or away; None for any other."""
        entry = self._live.get(agent)
        return None if entry is None else entry.session

    def agents(self) -> tuple[Member, ...]:
        """Every agent that is known, sorted, the departed that are still remembered among them."""
        entries = [*self._live.values(), *self._departed.values()]
        return tuple(_snapshot(entry) for entry in sorted(entries, key=lambda entry: entry.agent))

    def counts(self) -> dict[MemberState, int]:
        """How many agents are known in each state; every state is there."""
        return dict(self._counts)

    def tasks(self) -> tuple[str, ...]:
        """Tasks that somebody can be asked to do, now or when they are back, sorted."""
        return tuple(sorted(self._by_task))

    # --- what events do ---

    def _current(self, agent: str, session: str) -> _Entry | None:
        """The agent's entry if it is live and this is its session."""
        entry = self._live.get(agent)
        return entry if entry is not None and entry.session == session else None

    def _join(self, event: AgentJoined, now: float) -> list[Instruction]:
        agent = event.agent
        instructions: list[Instruction] = []
        old = self._live.get(agent)
        if old is not None:
            if old.session == event.session:
                return []
            if old.away_since is None:
                instructions.append(ReplaceLink(agent, old.session))
            if self.can_resume(agent, event.resume):
                return [*instructions, *self._resume(old, event, now)]
            instructions.append(DeclareLost(agent, old.session, "replaced by a new link"))
            self._unindex(old)
        elif len(self._live) >= self._agents_max:
            message = f"{len(self._live)} agents are connected, as many as there may be"
            return [RefuseAgent(agent, event.session, "full", message, retry=True)]
        known = old or self._departed.pop(agent, None)
        if known is not None:
            assert NEXT[known.state, Change.JOINED] == "connected"
            self._counts[known.state] -= 1
        entry = _Entry(
            agent=agent,
            session=event.session,
            instance=event.instance,
            labels=dict(event.labels),
            tasks=tuple(sorted(event.tasks)),
            address=event.address,
            software=event.software,
            joined_at=now,
            last_seen_at=now,
            state_since=now,
            secret=event.secret,
        )
        self._counts[entry.state] += 1
        self._live[agent] = entry
        self._index(entry)
        self._timers.set(agent, now + self._suspect_after_s)
        return [*instructions, AdmitAgent(agent, event.session)]

    def _resume(self, entry: _Entry, event: AgentJoined, now: float) -> list[Instruction]:
        self._unindex(entry)
        entry.instance = event.instance
        entry.labels = dict(event.labels)
        entry.tasks = tuple(sorted(event.tasks))
        entry.address = event.address
        entry.software = event.software
        entry.last_seen_at = now
        entry.away_since = None
        entry.reason = ""
        self._move(entry, Change.RESUMED, now)
        if entry.state != "draining":
            self._index(entry)
        self._timers.set(entry.agent, self._lease_ends_at(entry))
        return [ResumeSession(entry.agent, entry.session)]

    def _lose_link(self, entry: _Entry, reason: str, now: float) -> list[Instruction]:
        if entry.away_since is not None:
            return []
        self._unindex(entry)
        entry.away_since = now
        entry.reason = reason
        self._move(entry, Change.LINK_BROKEN, now)
        if entry.state != "draining":
            self._index(entry)
        self._timers.set(entry.agent, self._lease_ends_at(entry))
        return [DeclareAway(entry.agent, entry.session, reason)]

    def _hear(self, entry: _Entry, seen_at: float, now: float) -> list[Instruction]:
        """Renews a lease. The timer stays: it finds out when it fires."""
        if entry.away_since is not None:
            return []
        entry.last_seen_at = max(entry.last_seen_at, min(seen_at, now))
        if entry.state != "suspect" or entry.last_seen_at + self._suspect_after_s <= now:
            return []
        self._move(entry, Change.HEARD, now)
        self._timers.set(entry.agent, entry.last_seen_at + self._suspect_after_s)
        return [DeclareReturned(entry.agent, entry.session)]

    def _check_leases(self, now: float) -> list[Instruction]:
        instructions: list[Instruction] = []
        last_part_s = self._lease_s - self._suspect_after_s
        for agent in self._timers.pop_due(now):
            entry = self._live[agent]
            ends_at = self._lease_ends_at(entry)
            if now < ends_at:
                self._timers.set(agent, ends_at)
            elif entry.state == "connected":
                self._move(entry, Change.SILENT, now)
                self._timers.set(agent, self._lease_ends_at(entry))
                instructions.append(DeclareSuspect(agent, entry.session))
            elif entry.away_since is not None and now >= ends_at + last_part_s:
                # We were stopped, and it may have knocked in vain.
                entry.away_since = now - self._suspect_after_s
                self._timers.set(agent, self._lease_ends_at(entry))
            elif entry.away_since is not None:
                reason = f"did not come back within {self._lease_s:.3g} s: {entry.reason}"
                instructions += self._depart(entry, Change.LEASE_EXPIRED, reason, now)
            else:
                silent_s = now - entry.last_seen_at
                instructions += self._depart(entry, Change.LEASE_EXPIRED, f"not heard for {silent_s:.3g} s", now)
        return instructions

    def _lease_ends_at(self, entry: _Entry) -> float:
        """When silence or absence moves this agent on, from the state it is in."""
        if entry.away_since is not None:
            return entry.away_since + self._lease_s
        if entry.state == "connected":
            return entry.last_seen_at + self._suspect_after_s
        ends_at = entry.last_seen_at + self._lease_s
        if entry.state == "suspect":  # a late check found it silent: it has the rest of its lease from then
            ends_at = max(ends_at, entry.state_since + self._lease_s - self._suspect_after_s)
        return ends_at

    def _depart(self, entry: _Entry, change: Change, reason: str, now: float) -> list[Instruction]:
        self._unindex(entry)
        self._timers.drop(entry.agent)
        del self._live[entry.agent]
        self._move(entry, change, now)
        entry.reason = reason
        entry.secret = ""
        self._departed[entry.agent] = entry
        if len(self._departed) > self._departed_max:
            _, forgotten = self._departed.popitem(last=False)
            self._counts[forgotten.state] -= 1
        if entry.state == "left":
            return [DeclareLeft(entry.agent, entry.session, reason)]
        return [DeclareLost(entry.agent, entry.session, reason)]

    # --- keeping the books ---

    def _move(self, entry: _Entry, change: Change, now: float) -> None:
        target = NEXT[entry.state, change]
        if target == entry.state:
            return
        self._counts[entry.state] -= 1
        entry.state = target
        entry.state_since = now
        self._counts[target] += 1

    def _index(self, entry: _Entry) -> None:
        for task in entry.tasks:
            index = self._by_task.setdefault(task, _TaskIndex())
            (index.linked if entry.away_since is None else index.away).add(entry.agent)

    def _unindex(self, entry: _Entry) -> None:
        """Takes an agent out of every task's index; one that is not in it (draining) is no error."""
        for task in entry.tasks:
            index = self._by_task.get(task)
            if index is None:
                continue
            index.linked.discard(entry.agent)
            index.away.discard(entry.agent)
            if not index.linked.agents and not index.away.agents:
                del self._by_task[task]


def _snapshot(entry: _Entry) -> Member:
    return Member(
        agent=entry.agent,
        session=entry.session,
        instance=entry.instance,
        state=entry.state,
        labels=dict(entry.labels),
        tasks=entry.tasks,
        address=entry.address,
        software=entry.software,
        joined_at=entry.joined_at,
        last_seen_at=entry.last_seen_at,
        state_since=entry.state_since,
        has_link=entry.away_since is None and entry.state not in ("lost", "left"),
        reason=entry.reason,
    )

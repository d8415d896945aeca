"""Whatever happens to a fleet, in whatever order: sessions begin and end once, links break
and are made anew, and nobody is asked who cannot be.
"""

from collections import Counter
from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quorate_coordinator.membership import (
    AdmitAgent,
    AgentDraining,
    AgentJoined,
    AgentLeft,
    DeclareAway,
    DeclareLeft,
    DeclareLost,
    DeclareReturned,
    DeclareSuspect,
    Event,
    Instruction,
    LeaseChecked,
    LinkBroken,
    PacketSeen,
    RefuseAgent,
    ReplaceLink,
    ResumeSession,
    TimerFired,
)
from quorate_coordinator.registry import Registry

AGENTS = tuple("abcde")
TASKS = ("classify", "rank", "score")
SUSPECT_AFTER_S, LEASE_S = 4.0, 10.0
AGENTS_MAX, DEPARTED_MAX = 4, 2


def make_registry() -> Registry:
    return Registry(lease_s=LEASE_S, suspect_after_s=SUSPECT_AFTER_S, agents_max=AGENTS_MAX, departed_max=DEPARTED_MAX)


class RegistryMachine(RuleBasedStateMachine):
    """A fleet's life as its registry sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.registry = make_registry()
        self.now = 1000.0
        self.history: list[tuple[Event, float, list[Instruction]]] = []
        #: What was said, and nothing else: agent to the hello of the session that is admitted and not over.
        self.live: dict[str, AgentJoined] = {}
        self.sessions = 0
        self.suspect: set[str] = set()
        self.draining: set[str] = set()
        #: Since when a live agent is without a link.
        self.away: dict[str, float] = {}
        #: When a live agent was last heard, as far as reported.
        self.heard_at: dict[str, float] = {}

    @rule(
        agent=st.sampled_from(AGENTS),
        tasks=st.sets(st.sampled_from(TASKS), max_size=3),
        zone=st.sampled_from(["x", "y"]),
        resume=st.sampled_from(["nothing", "wrong", "right", "right", "right"]),
    )
    def join(self, agent: str, tasks: set[str], zone: str, resume: str) -> None:
        self.sessions += 1
        name = f"s{self.sessions}"
        wanted = None
        if resume != "nothing":
            old = self.live[agent].session if agent in self.live else "s0"
            wanted = (old, f"secret of {old}" if resume == "right" else "guessed")
        secret = f"secret of {name}"
        self._happens(AgentJoined(agent, name, "", {"zone": zone}, tuple(tasks), "", "", secret, wanted))

    @rule(agent=st.sampled_from(AGENTS), stale=st.booleans(), kind=st.integers(0, 4))
    def something_of_a_link(self, agent: str, stale: bool, kind: int) -> None:
        session = self.live[agent].session if agent in self.live and not stale else "s0"
        if kind == 4:
            self._happens(LinkBroken(agent, session, "broken off", is_final=True))
        else:
            event = (PacketSeen, LinkBroken, AgentDraining, AgentLeft)[kind](agent, session)
            self._happens(event)

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, 5.0, 20.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.live)
    @rule(ago_s=st.sampled_from([0.0, 1.0, 5.0]))
    def leases_are_checked(self, ago_s: float) -> None:
        at = self.registry.next_timer()
        assert at is not None, "every live agent is watched"
        self.now = max(self.now, at)
        due = self.registry.lease_due(self.now)
        assert due
        self._happens(LeaseChecked(dict.fromkeys(due, self.now - ago_s)))

    @rule()
    def timer_fires(self) -> None:
        self._happens(TimerFired())

    @invariant()
    def selection_is_those_who_can_be_asked(self) -> None:
        askable = {agent: hello for agent, hello in self.live.items() if agent not in self.draining}
        for task in TASKS:
            for select, is_away in ((self.registry.select, False), (self.registry.select_away, True)):
                able = sorted(
                    agent for agent, hello in askable.items() if task in hello.tasks and (agent in self.away) == is_away
                )
                assert select(task) == tuple(able)
                in_x = tuple(agent for agent in able if askable[agent].labels == {"zone": "x"})
                assert select(task, {"zone": "x"}) == in_x
        assert self.registry.tasks() == tuple(sorted({task for hello in askable.values() for task in hello.tasks}))

    @invariant()
    def the_listing_says_what_was_declared(self) -> None:
        members = {member.agent: member for member in self.registry.agents()}
        live = {agent for agent, one in members.items() if one.state in ("connected", "suspect", "draining")}
        assert live == set(self.live)
        assert {agent for agent, one in members.items() if one.has_link} == live - set(self.away)
        assert {agent for agent in live if members[agent].state == "suspect"} == self.suspect
        assert {agent for agent in live if members[agent].state == "draining"} == self.draining
        assert all(members[agent].session == hello.session for agent, hello in self.live.items())
        assert len(members) - len(live) <= DEPARTED_MAX
        counted = Counter(member.state for member in members.values())
        assert {state: count for state, count in self.registry.counts().items() if count} == dict(counted)

    def teardown(self) -> None:
        # Left alone, everybody is lost within their lease, and a check's delay.
        steps = 0
        while (at := self.registry.next_timer()) is not None:
            self.now = max(self.now, at)
            self._happens(TimerFired())
            steps += 1
            assert steps <= 4 * AGENTS_MAX
        assert self.live == {}
        again = make_registry()
        for event, now, instructions in self.history:
            assert again.handle(event, now) == instructions

    def _happens(self, event: Event) -> None:
        instructions = self.registry.handle(event, self.now)
        self.history.append((event, self.now, instructions))
        if isinstance(event, PacketSeen) and self._is_current(event.agent, event.session):
            self.heard_at[event.agent] = self.now
        if isinstance(event, LeaseChecked):
            for agent, at in event.last_seen_at.items():
                if agent not in self.away:
                    self.heard_at[agent] = max(self.heard_at[agent], at)
        if isinstance(event, AgentDraining) and self._is_current(event.agent, event.session):
            self.draining.add(event.agent)
            self.suspect.discard(event.agent)
        for instruction in instructions:
            self._judge(event, instruction)
        if isinstance(event, AgentLeft) or (isinstance(event, LinkBroken) and event.is_final):
            assert not self._is_current(event.agent, event.session)
        elif isinstance(event, LinkBroken) and self._is_current(event.agent, event.session):
            assert event.agent in self.away

    def _is_current(self, agent: str, session: str) -> bool:
        return agent in self.live and self.live[agent].session == session

    def _judge(self, event: Event, instruction: Instruction) -> None:
        agent = instruction.agent
        match instruction:
            case AdmitAgent(_, session):
                assert isinstance(event, AgentJoined)
                assert (agent, session) == (event.agent, event.session)
                assert agent not in self.live
                self.live[agent] = event
                self.heard_at[agent] = self.now
                assert len(self.live) <= AGENTS_MAX
            case ResumeSession(_, session):
                assert isinstance(event, AgentJoined)
                assert self._is_current(agent, session)
                assert event.resume == (session, f"secret of {session}")
                self.live[agent] = replace(event, session=session)
                self.heard_at[agent] = self.now
                self.away.pop(agent, None)
                self.suspect.discard(agent)
            case DeclareAway(_, session, _):
                assert isinstance(event, LinkBroken)
                assert self._is_current(agent, session)
                assert agent not in self.away
                self.away[agent] = self.now
                if agent not in self.draining:
                    self.suspect.add(agent)
            case RefuseAgent():
                assert len(self.live) == AGENTS_MAX
                assert agent not in self.live
            case ReplaceLink(_, old_session):
                assert isinstance(event, AgentJoined)
                assert self._is_current(agent, old_session)
                assert agent not in self.away
            case DeclareSuspect(_, session):
                assert self._is_current(agent, session)
                assert agent not in self.suspect | self.draining
                assert self.now - self.heard_at[agent] >= SUSPECT_AFTER_S
                self.suspect.add(agent)
            case DeclareReturned(_, session):
                assert self._is_current(agent, session)
                assert self.now - self.heard_at[agent] < SUSPECT_AFTER_S
                self.suspect.remove(agent)
            case DeclareLost(_, session) | DeclareLeft(_, session):
                assert self._is_current(agent, session), "a session ends once"
                if isinstance(event, TimerFired | LeaseChecked):
                    assert agent in self.suspect | self.draining, "nobody is lost without having been suspect"
                    assert self.now - self.away.get(agent, self.heard_at[agent]) >= LEASE_S
                del self.live[agent]
                self.away.pop(agent, None)
                self.suspect.discard(agent)
                self.draining.discard(agent)


TestRegistry = RegistryMachine.TestCase
# Other processes share the machine: time per example says nothing here.
TestRegistry.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

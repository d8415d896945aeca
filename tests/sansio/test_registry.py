"""The fleet's membership: every row of its table, leases, takeover, resumption, selection, what is remembered."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import get_args

import pytest

from quorate_coordinator.membership import (
    TRANSITIONS,
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
from quorate_coordinator.registry import Registry
from quorate_protocol.errors import LocalError


def joined(
    agent: str = "a",
    session: str = "s1",
    tasks: Sequence[str] = ("classify",),
    labels: Mapping[str, str] | None = None,
    *,
    resume: tuple[str, str] | None = None,
    address: str = "127.0.0.1:5",
) -> AgentJoined:
    """A hello that was let in. The secret of session `s1` is `secret of s1`."""
    return AgentJoined(
        agent,
        session,
        f"{session}-process",
        labels or {},
        tuple(tasks),
        address,
        "test/1",
        secret=f"secret of {session}",
        resume=resume,
    )


#: What resumes the session `s1`.
RIGHT = ("s1", "secret of s1")


def make_registry(agents_max: int = 100, departed_max: int = 100) -> Registry:
    """Suspect after 4 s, lost after 10 s."""
    return Registry(lease_s=10.0, suspect_after_s=4.0, agents_max=agents_max, departed_max=departed_max)


def member(registry: Registry, agent: str = "a") -> Member:
    """One agent of the listing."""
    return next(one for one in registry.agents() if one.agent == agent)


def in_state(state: MemberState) -> Registry:
    """A registry with agent `a`, session `s1`, in this state at 104."""
    registry = make_registry()
    assert registry.handle(joined(), 100.0) == [AdmitAgent("a", "s1")]
    events: dict[MemberState, Event] = {
        "suspect": TimerFired(),
        "draining": AgentDraining("a", "s1"),
        "lost": LinkBroken("a", "s1", is_final=True),
        "left": AgentLeft("a", "s1"),
        "connected": PacketSeen("a", "s1"),
    }
    registry.handle(events[state], 104.0)
    assert member(registry).state == state
    return registry


#: How to bring each change about at 120, when every lease is over.
CHANGES: dict[Change, Callable[[], Event]] = {
    Change.JOINED: lambda: joined(session="s2"),
    Change.RESUMED: lambda: joined(session="s2", resume=RIGHT),
    Change.SILENT: TimerFired,
    Change.LEASE_EXPIRED: TimerFired,
    Change.HEARD: lambda: PacketSeen("a", "s1"),
    Change.LINK_BROKEN: lambda: LinkBroken("a", "s1", "reset"),
    Change.BROKEN_OFF: lambda: LinkBroken("a", "s1", "protocol broken", is_final=True),
    Change.DRAINING: lambda: AgentDraining("a", "s1"),
    Change.LEFT: lambda: AgentLeft("a", "s1", "done"),
}


@pytest.mark.parametrize("row", TRANSITIONS, ids=lambda row: f"{row.source}-{row.change.name}")
def test_row(row: tuple[MemberState, Change, MemberState]) -> None:
    source, change, target = row
    registry = in_state(source)
    since = member(registry).state_since
    registry.handle(CHANGES[change](), 120.0)
    assert member(registry).state == target
    # A new session's state is new, even where it has the same name.
    assert member(registry).state_since == (since if source == target and change is not Change.JOINED else 120.0)
    assert registry.counts() == {**dict.fromkeys(("connected", "suspect", "draining", "lost", "left"), 0), target: 1}


#: Pairs that are in no row. What time does to a live member is the leases' business below.
ILLEGAL = [
    (state, change)
    for state in get_args(MemberState)
    for change in Change
    if not any((row.source, row.change) == (state, change) for row in TRANSITIONS)
    and not (change in (Change.SILENT, Change.LEASE_EXPIRED) and state not in ("lost", "left"))
    # There is nothing to resume: the hello is that of a new session.
    and not (change is Change.RESUMED and state in ("lost", "left"))
]


@pytest.mark.parametrize(("state", "change"), ILLEGAL)
def test_what_is_not_in_the_table_changes_nothing(state: MemberState, change: Change) -> None:
    registry = in_state(state)
    before = member(registry)
    assert registry.handle(CHANGES[change](), 120.0) == []
    heard = change is Change.HEARD and state in ("connected", "draining")
    assert member(registry) == (replace(before, last_seen_at=120.0) if heard else before)


@pytest.mark.parametrize(
    "event",
    [
        PacketSeen("a", "old"),
        LinkBroken("a", "old"),
        AgentDraining("a", "old"),
        AgentLeft("a", "old"),
        PacketSeen("stranger", "s1"),
        LinkBroken("stranger", "s1"),
        AgentDraining("stranger", "s1"),
        AgentLeft("stranger", "s1"),
        LeaseChecked({"stranger": 101.0}),
        joined(),
    ],
)
def test_events_of_another_session_change_nothing(event: Event) -> None:
    registry = make_registry()
    registry.handle(joined(), 100.0)
    before = registry.agents()
    assert registry.handle(event, 101.0) == []
    assert registry.agents() == before


# --- leases ---


def test_silence_makes_suspect_then_lost() -> None:
    registry = make_registry()
    registry.handle(joined(), 100.0)
    assert registry.next_timer() == 104.0
    assert registry.handle(TimerFired(), 103.9) == []
    assert registry.handle(TimerFired(), 104.0) == [DeclareSuspect("a", "s1")]
    assert registry.next_timer() == 110.0
    assert registry.handle(TimerFired(), 109.9) == []
    assert registry.handle(TimerFired(), 110.0) == [DeclareLost("a", "s1", "not heard for 10 s")]
    assert registry.next_timer() is None
    assert (member(registry).state, member(registry).reason) == ("lost", "not heard for 10 s")


def test_a_packet_renews_the_lease_without_moving_the_timer() -> None:
    registry = make_registry()
    registry.handle(joined(), 100.0)
    assert registry.handle(PacketSeen("a", "s1"), 103.0) == []
    assert registry.next_timer() == 104.0
    assert registry.handle(TimerFired(), 104.0) == []
    assert registry.next_timer() == 107.0


def test_what_the_transport_heard_renews_the_lease() -> None:
    registry = make_registry()
    registry.handle(joined("a"), 100.0)
    registry.handle(joined("b"), 100.0)
    registry.handle(joined("c"), 101.0)
    assert registry.lease_due(103.9) == []
    assert registry.lease_due(104.0) == ["a", "b"]
    assert registry.handle(LeaseChecked({"a": 103.5, "b": 99.0}), 104.0) == [DeclareSuspect("b", "s1")]
    assert member(registry, "a").last_seen_at == 103.5
    assert member(registry, "b").last_seen_at == 100.0, "never backwards"
    assert registry.next_timer() == 105.0


def test_a_moment_in_the_future_counts_as_now() -> None:
    registry = make_registry()
    registry.handle(joined(), 100.0)
    registry.handle(LeaseChecked({"a": 1e9}), 104.0)
    assert member(registry).last_seen_at == 104.0


def test_a_suspect_heard_again_has_returned() -> None:
    registry = in_state("suspect")
    assert registry.handle(PacketSeen("a", "s1"), 105.0) == [DeclareReturned("a", "s1")]
    assert (member(registry).state, registry.next_timer()) == ("connected", 109.0)


def test_a_suspect_returns_only_when_heard_lately() -> None:
    registry = in_state("suspect")
    assert registry.handle(LeaseChecked({"a": 104.5}), 110.0) == [], "heard since, but not within suspect_after_s"
    assert (member(registry).state, registry.next_timer()) == ("suspect", 114.5)
    assert registry.handle(LeaseChecked({"a": 113.0}), 114.5) == [DeclareReturned("a", "s1")]


def test_a_stopped_coordinator_hears_its_agents_out_before_it_declares_them_lost() -> None:
    registry = make_registry()
    registry.handle(joined("a"), 100.0)
    registry.handle(joined("b"), 100.0)
    # It stood still for an hour: the first look finds everybody silent.
    assert registry.handle(TimerFired(), 3700.0) == [DeclareSuspect("a", "s1"), DeclareSuspect("b", "s1")]
    assert registry.next_timer() == 3706.0
    assert registry.handle(PacketSeen("a", "s1"), 3703.0) == [DeclareReturned("a", "s1")]
    lost = registry.handle(TimerFired(), 3706.0)
    assert [(type(one), one.agent) for one in lost] == [(DeclareLost, "b")]


def test_a_draining_agent_is_never_suspect_but_its_lease_ends() -> None:
    registry = in_state("draining")
    assert registry.next_timer() == 110.0
    registry.handle(PacketSeen("a", "s1"), 108.0)
    assert registry.handle(TimerFired(), 110.0) == []
    assert registry.handle(TimerFired(), 118.0) == [DeclareLost("a", "s1", "not heard for 10 s")]


def test_a_lost_session_stays_lost() -> None:
    registry = in_state("lost")
    for event in (PacketSeen("a", "s1"), LeaseChecked({"a": 105.0}), AgentLeft("a", "s1"), TimerFired()):
        assert registry.handle(event, 130.0) == []
    assert member(registry).state == "lost"
    assert not registry.can_resume("a", RIGHT)
    assert registry.handle(joined(session="s2", resume=RIGHT), 130.0) == [AdmitAgent("a", "s2")]


@pytest.mark.parametrize(("suspect_after_s", "lease_s"), [(10.0, 10.0), (11.0, 10.0), (0.0, 10.0), (None, 0.0)])
def test_times_out_of_order_are_refused(suspect_after_s: float | None, lease_s: float) -> None:
    with pytest.raises(LocalError, match="suspect_after_s"):
        Registry(lease_s=lease_s, suspect_after_s=suspect_after_s)


def test_suspicion_begins_at_half_the_lease_unless_said_otherwise() -> None:
    registry = Registry(lease_s=10.0)
    registry.handle(joined(), 0.0)
    assert registry.next_timer() == 5.0


# --- coming and going ---


def test_a_second_link_takes_over_and_the_old_ones_events_are_ignored() -> None:
    registry = make_registry()
    registry.handle(joined(session="s1", tasks=("classify", "old-task")), 100.0)
    assert registry.handle(joined(session="s2", tasks=("classify", "new-task")), 101.0) == [
        ReplaceLink("a", "s1"),
        DeclareLost("a", "s1", "replaced by a new link"),
        AdmitAgent("a", "s2"),
    ]
    assert registry.session_of("a") == "s2"
    assert (registry.select("old-task"), registry.select("new-task")) == ((), ("a",))
    # The old link closes as a consequence: that is not the agent's end.
    assert registry.handle(LinkBroken("a", "s1", "replaced"), 101.1) == []
    assert registry.handle(AgentLeft("a", "s1"), 101.1) == []
    assert registry.select("classify") == ("a",)
    assert registry.counts()["connected"] == 1
    assert registry.next_timer() == 105.0


def test_goodbye_is_told_from_a_broken_link() -> None:
    registry = make_registry()
    registry.handle(joined("a"), 100.0)
    registry.handle(joined("b"), 100.0)
    assert registry.handle(AgentLeft("a", "s1", "done"), 101.0) == [DeclareLeft("a", "s1", "done")]
    assert registry.handle(LinkBroken("b", "s1", is_final=True), 101.0) == [DeclareLost("b", "s1", "link broken")]
    # The link that goes down after a goodbye is no news.
    assert registry.handle(LinkBroken("a", "s1"), 101.1) == []
    assert registry.session_of("a") is None
    assert (registry.tasks(), registry.next_timer()) == ((), None)


def test_a_departed_agent_comes_back_as_new() -> None:
    registry = in_state("lost")
    assert registry.handle(joined(session="s2", labels={"zone": "x"}), 200.0) == [AdmitAgent("a", "s2")]
    (back,) = registry.agents()
    assert (back.state, back.joined_at, back.reason, back.labels) == ("connected", 200.0, "", {"zone": "x"})
    assert registry.counts() == {"connected": 1, "suspect": 0, "draining": 0, "lost": 0, "left": 0}


def test_a_full_fleet_refuses_strangers_and_admits_its_own() -> None:
    registry = make_registry(agents_max=2)
    registry.handle(joined("a"), 100.0)
    registry.handle(joined("b"), 100.0)
    (refused,) = registry.handle(joined("c"), 100.0)
    assert isinstance(refused, RefuseAgent)
    assert (refused.agent, refused.session, refused.reason, refused.retry) == ("c", "s1", "full", True)
    assert len(registry.agents()) == 2
    assert registry.handle(joined("b", "s2"), 100.0)[-1] == AdmitAgent("b", "s2")
    registry.handle(AgentLeft("a", "s1"), 101.0)
    assert registry.handle(joined("c", "s3"), 101.0) == [AdmitAgent("c", "s3")]


def test_the_departed_are_remembered_up_to_a_ceiling() -> None:
    registry = make_registry(departed_max=2)
    for number in range(4):
        registry.handle(joined(f"a{number}"), 100.0 + number)
        registry.handle(AgentLeft(f"a{number}", "s1", "done"), 100.5 + number)
    assert [(one.agent, one.state, one.reason) for one in registry.agents()] == [
        ("a2", "left", "done"),
        ("a3", "left", "done"),
    ]
    assert registry.counts()["left"] == 2


# --- away and back ---


def away(registry: Registry | None = None, now: float = 102.0) -> Registry:
    """A registry whose agent `a` joined at 100 and lost its link at `now`."""
    registry = registry or make_registry()
    registry.handle(joined(labels={"zone": "x"}), 100.0)
    assert registry.handle(LinkBroken("a", "s1", "reset"), now) == [DeclareAway("a", "s1", "reset")]
    return registry


def test_a_broken_link_leaves_the_session_for_a_lease() -> None:
    registry = away()
    gone = member(registry)
    assert (gone.state, gone.has_link, gone.reason, gone.session) == ("suspect", False, "reset", "s1")
    assert (registry.session_of("a"), registry.counts()["suspect"]) == ("s1", 1)
    assert registry.next_timer() == 112.0
    assert registry.handle(TimerFired(), 111.9) == []
    (lost,) = registry.handle(TimerFired(), 112.0)
    assert lost == DeclareLost("a", "s1", "did not come back within 10 s: reset")
    assert (member(registry).state, registry.tasks(), registry.next_timer()) == ("lost", (), None)


@pytest.mark.parametrize("after_s", [0.0, 5.0, 9.9])
def test_the_secret_resumes_the_session(after_s: float) -> None:
    registry = away()
    back = joined(session="s2", tasks=("rank",), labels={"zone": "y"}, resume=RIGHT, address="10.0.0.1:7")
    assert registry.can_resume("a", RIGHT)
    assert registry.handle(back, 102.0 + after_s) == [ResumeSession("a", "s1")]
    one = member(registry)
    assert (one.state, one.has_link, one.session, one.joined_at, one.reason) == ("connected", True, "s1", 100.0, "")
    assert (one.address, one.labels, one.tasks, one.instance) == ("10.0.0.1:7", {"zone": "y"}, ("rank",), "s2-process")
    # The index follows what it says now.
    assert (registry.select("classify"), registry.select("rank")) == ((), ("a",))
    assert registry.select("rank", {"zone": "x"}) == registry.select_away("rank") == ()
    assert registry.next_timer() == 106.0 + after_s
    # And again, with the same secret.
    registry.handle(LinkBroken("a", "s1"), 115.0)
    assert registry.handle(joined(session="s3", resume=RIGHT), 116.0) == [ResumeSession("a", "s1")]


@pytest.mark.parametrize(
    "resume",
    [
        None,
        ("s1", "secret of s2"),
        ("s1", ""),
        ("s1", "secret of s1 "),
        ("s2", "secret of s1"),
        ("s0", "secret of s0"),
        ("", ""),
        ("s1", "секрет"),
    ],
)
@pytest.mark.parametrize("is_away", [True, False])
def test_without_the_secret_a_hello_is_a_new_session(resume: tuple[str, str] | None, is_away: bool) -> None:
    registry = make_registry()
    registry.handle(joined(), 100.0)
    if is_away:
        registry.handle(LinkBroken("a", "s1"), 101.0)
    assert not registry.can_resume("a", resume)
    replaced = [] if is_away else [ReplaceLink("a", "s1")]
    assert registry.handle(joined(session="s2", resume=resume), 102.0) == [
        *replaced,
        DeclareLost("a", "s1", "replaced by a new link"),
        AdmitAgent("a", "s2"),
    ]
    assert registry.select("classify") == ("a",)
    assert registry.counts() == {"connected": 1, "suspect": 0, "draining": 0, "lost": 0, "left": 0}


def test_a_session_made_without_a_secret_cannot_be_resumed() -> None:
    registry = make_registry()
    registry.handle(replace(joined(), secret=""), 100.0)
    assert not registry.can_resume("a", ("s1", ""))
    assert not registry.can_resume("stranger", ("s1", ""))


def test_another_agents_secret_resumes_nothing() -> None:
    registry = away()
    assert registry.handle(joined("b", "s2", resume=RIGHT), 103.0) == [AdmitAgent("b", "s2")]


def test_a_link_that_still_stands_is_replaced_before_the_session_goes_on() -> None:
    registry = in_state("suspect")
    assert registry.handle(joined(session="s2", resume=RIGHT), 105.0) == [
        ReplaceLink("a", "s1"),
        ResumeSession("a", "s1"),
    ]
    assert (member(registry).state, member(registry).has_link, registry.next_timer()) == ("connected", True, 109.0)


def test_a_draining_agent_that_comes_back_drains_on() -> None:
    registry = in_state("draining")
    assert registry.handle(LinkBroken("a", "s1", "reset"), 105.0) == [DeclareAway("a", "s1", "reset")]
    assert (member(registry).state, member(registry).has_link) == ("draining", False)
    assert registry.next_timer() == 115.0
    assert registry.select("classify") == registry.select_away("classify") == ()
    assert registry.handle(joined(session="s2", resume=RIGHT), 114.0) == [ResumeSession("a", "s1")]
    assert (member(registry).state, member(registry).has_link) == ("draining", True)
    assert registry.select("classify") == registry.select_away("classify") == ()
    assert registry.handle(TimerFired(), 124.0) == [DeclareLost("a", "s1", "not heard for 10 s")]


def test_who_is_told_to_drain_while_away_keeps_its_lease() -> None:
    registry = away()
    assert registry.handle(AgentDraining("a", "s1"), 105.0) == []
    assert (member(registry).state, registry.select_away("classify"), registry.next_timer()) == ("draining", (), 112.0)
    assert [type(one) for one in registry.handle(TimerFired(), 112.0)] == [DeclareLost]


def test_nothing_is_heard_of_who_is_away() -> None:
    registry = away()
    before = registry.agents()
    for event in (PacketSeen("a", "s1"), LeaseChecked({"a": 103.0}), LinkBroken("a", "s1", "again")):
        assert registry.handle(event, 103.0) == []
    assert registry.agents() == before


def test_a_suspect_whose_link_breaks_has_a_whole_lease_from_then() -> None:
    registry = in_state("suspect")
    assert registry.handle(LinkBroken("a", "s1", "reset"), 109.0) == [DeclareAway("a", "s1", "reset")]
    assert (member(registry).state_since, registry.next_timer()) == (104.0, 119.0)
    assert registry.handle(TimerFired(), 118.9) == []


def test_a_stopped_coordinator_waits_for_who_is_away_before_it_declares_them_lost() -> None:
    registry = away()
    # It stood still for an hour: the agent may have knocked all the time.
    assert registry.handle(TimerFired(), 3700.0) == []
    assert registry.next_timer() == 3706.0
    assert registry.can_resume("a", RIGHT)
    (lost,) = registry.handle(TimerFired(), 3706.0)
    assert isinstance(lost, DeclareLost)


def test_a_check_that_is_a_little_late_is_not_taken_for_a_stop() -> None:
    registry = away()
    (lost,) = registry.handle(TimerFired(), 117.9)
    assert isinstance(lost, DeclareLost)


def test_who_is_away_keeps_its_place_in_a_full_fleet() -> None:
    registry = away(make_registry(agents_max=1))
    assert [type(one) for one in registry.handle(joined("b"), 103.0)] == [RefuseAgent]
    assert registry.handle(joined(session="s2", resume=RIGHT), 104.0) == [ResumeSession("a", "s1")]


def test_secrets_are_in_no_text() -> None:
    event = joined(resume=("s0", "secret of s0"))
    registry = make_registry()
    registry.handle(event, 100.0)
    assert "secret" not in repr(event) + repr(registry._live) + repr(registry.agents())


# --- asking ---


def test_selection_is_sorted_and_by_task() -> None:
    registry = make_registry()
    registry.handle(joined("c", tasks=("classify", "rank")), 0.0)
    registry.handle(joined("a", tasks=("classify",)), 0.0)
    registry.handle(joined("b", tasks=("rank",)), 0.0)
    assert registry.select("classify") == ("a", "c")
    assert registry.select("rank") == ("b", "c")
    assert registry.select("unheard-of") == ()
    assert registry.tasks() == ("classify", "rank")


def test_selection_by_labels_wants_all_of_them() -> None:
    registry = make_registry()
    registry.handle(joined("a", labels={"zone": "x", "gpu": "yes"}), 0.0)
    registry.handle(joined("b", labels={"zone": "x"}), 0.0)
    registry.handle(joined("c", labels={"zone": "y", "gpu": "yes"}), 0.0)
    assert registry.select("classify", {}) == ("a", "b", "c")
    assert registry.select("classify", {"zone": "x"}) == ("a", "b")
    assert registry.select("classify", {"zone": "x", "gpu": "yes"}) == ("a",)
    assert registry.select("classify", {"zone": "z"}) == ()


def test_suspects_are_asked_and_the_draining_and_departed_are_not() -> None:
    registry = make_registry()
    for agent in "abcde":
        registry.handle(joined(agent), 100.0)
    registry.handle(AgentDraining("b", "s1"), 101.0)
    registry.handle(AgentLeft("c", "s1"), 101.0)
    registry.handle(LinkBroken("d", "s1", is_final=True), 101.0)
    registry.handle(PacketSeen("e", "s1"), 103.0)
    registry.handle(TimerFired(), 104.0)
    assert {one.agent: one.state for one in registry.agents()} == {
        "a": "suspect",
        "b": "draining",
        "c": "left",
        "d": "lost",
        "e": "connected",
    }
    assert registry.select("classify") == ("a", "e")


def test_those_who_are_away_are_selected_apart() -> None:
    registry = make_registry()
    for agent in "cab":
        registry.handle(joined(agent, labels={"zone": agent}), 100.0)
    registry.handle(LinkBroken("c", "s1"), 101.0)
    registry.handle(LinkBroken("b", "s1"), 101.0)
    assert (registry.select("classify"), registry.select_away("classify")) == (("a",), ("b", "c"))
    assert registry.select_away("classify", {"zone": "c"}) == ("c",)
    assert registry.select_away("unheard-of") == ()
    assert registry.select_away("classify") is registry.select_away("classify")
    registry.handle(LinkBroken("a", "s1"), 102.0)
    assert (registry.select("classify"), registry.tasks()) == ((), ("classify",))
    registry.handle(joined("b", "s2", resume=RIGHT), 103.0)
    assert (registry.select("classify"), registry.select_away("classify")) == (("b",), ("a", "c"))


def test_selection_is_the_same_object_until_the_fleet_changes() -> None:
    """Rounds of an unchanged fleet share one tuple, and selecting costs nothing."""
    registry = make_registry()
    for number in range(100):
        registry.handle(joined(f"a{number}", tasks=("classify",)), 0.0)
    first = registry.select("classify")
    registry.handle(joined("other", tasks=("rank",)), 0.0)
    registry.handle(PacketSeen("a1", "s1"), 1.0)
    assert registry.select("classify") is first
    registry.handle(AgentLeft("a1", "s1"), 1.0)
    assert len(registry.select("classify")) == 99


def test_a_listing_is_a_copy() -> None:
    registry = make_registry()
    labels = {"zone": "x"}
    registry.handle(joined(labels=labels), 0.0)
    before = member(registry)
    labels["zone"] = "y"
    registry.handle(AgentDraining("a", "s1"), 1.0)
    assert (before.state, before.labels) == ("connected", {"zone": "x"})
    assert member(registry).labels == {"zone": "x"}

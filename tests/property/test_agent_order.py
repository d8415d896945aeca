"""The order in which an agent works, whatever comes in whatever order: feedback alone, and nothing overtakes."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorate_agent import events as ev
from quorate_agent.backlog import BacklogLimits
from quorate_agent.core import AgentCore
from quorate_agent.states import TRANSITIONS, State

#: One step of a run: an assignment, the truth or the cancellation of an earlier round, the end of a running
#: handler, a break of the link. The number chooses which.
steps = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "tell", "cancel", "end", "end", "end", "break"]), st.integers(0, 10**6)
    ),
    max_size=80,
)


@dataclass
class Observer:
    """Carries out the instructions as a shell would, and checks what a model trained by feedback relies on."""

    core: AgentCore
    concurrency: int
    running: dict[int, ev.StartAssignment | ev.StartFeedback] = field(default_factory=dict)
    #: What came on the stream, in order, as ("ask" or "tell", round).
    stream: list[tuple[str, int]] = field(default_factory=list)
    started: list[tuple[str, int]] = field(default_factory=list)
    replied: list[int] = field(default_factory=list)
    unwanted: set[int] = field(default_factory=set)
    abandoned: set[int] = field(default_factory=set)

    def apply(self, event: ev.Event) -> None:
        if isinstance(event, ev.HandlerReturned):
            del self.running[event.work]
        for instruction in self.core.handle(event, 0.0):
            if isinstance(instruction, ev.StartAssignment | ev.StartFeedback):
                self.on_start(instruction)
            elif isinstance(instruction, ev.SendReply):
                assert instruction.status == "replied"
                assert instruction.round not in self.unwanted
                self.replied.append(instruction.round)
            elif isinstance(instruction, ev.CancelHandler):
                assert isinstance(self.running[instruction.work], ev.StartAssignment)
                self.abandoned.add(instruction.work)

    def on_start(self, start: ev.StartAssignment | ev.StartFeedback) -> None:
        if isinstance(start, ev.StartFeedback):
            assert not self.running, "feedback runs alone"
            assert start.body == b"%d" % start.round, "with the body of its round"
            self.started.append(("tell", start.round))
        else:
            assert start.round not in self.unwanted
            assert not any(isinstance(other, ev.StartFeedback) for other in self.running.values())
            assert len(self.running) < self.concurrency
            self.started.append(("ask", start.round))
        self.running[start.work] = start


def make(concurrency: int) -> Observer:
    core = AgentCore(tasks=["t"], feedback_tasks=["t"], concurrency=concurrency)
    core.handle(ev.LinkUp(), 0.0)
    core.handle(ev.WelcomeReceived("s"), 0.0)
    return Observer(core, concurrency)


def play(observer: Observer, run: list[tuple[str, int]]) -> None:
    rounds = 0
    told: set[int] = set()
    session_began_with = 1
    for step, number in run:
        if step == "ask":
            rounds += 1
            observer.stream.append(("ask", rounds))
            observer.apply(ev.AssignmentReceived(rounds, "t", b"%d" % rounds, 1.0))
        elif step == "tell" and rounds:
            chosen = 1 + number % rounds
            if chosen not in told:
                told.add(chosen)
                observer.stream.append(("tell", chosen))
                observer.apply(ev.FeedbackReceived(chosen, "t", b"truth"))
        elif step == "cancel" and rounds:
            chosen = 1 + number % rounds
            observer.unwanted.add(chosen)
            observer.apply(ev.CancellationReceived(chosen))
        elif step == "end" and observer.running:
            work = sorted(observer.running)[number % len(observer.running)]
            observer.apply(ev.HandlerReturned(work, b"answer"))
        elif step == "break":
            # What was asked over the old link and has not been answered is not answered any more.
            observer.unwanted.update(range(session_began_with, rounds + 1))
            session_began_with = rounds + 1
            observer.apply(ev.LinkDown("broken"))
            observer.apply(ev.LinkUp())
            observer.apply(ev.WelcomeReceived("s"))
    while observer.running:
        observer.apply(ev.HandlerReturned(min(observer.running), b"answer"))


@given(run=steps, concurrency=st.integers(1, 4))
def test_feedback_is_exclusive_and_work_starts_in_stream_order(run: list[tuple[str, int]], concurrency: int) -> None:
    observer = make(concurrency)
    play(observer, run)
    place = {work: index for index, work in enumerate(observer.stream)}
    order = [place[work] for work in observer.started]
    assert order == sorted(order), "nothing overtakes"
    assert len(set(observer.started)) == len(observer.started), "nothing runs twice"
    assert [work for work in observer.started if work[0] == "tell"] == [w for w in observer.stream if w[0] == "tell"]
    assert observer.core.queued == observer.core.running == 0


@given(run=steps, concurrency=st.integers(1, 4))
def test_every_assignment_that_is_wanted_is_answered_once(run: list[tuple[str, int]], concurrency: int) -> None:
    observer = make(concurrency)
    play(observer, run)
    asked = {round_id for kind, round_id in observer.stream if kind == "ask"}
    assert len(observer.replied) == len(set(observer.replied))
    assert asked - observer.unwanted <= set(observer.replied)
    counts = observer.core.counts
    assert counts.replied + counts.cancelled + counts.lost == counts.assignments == len(asked)


@given(sizes=st.lists(st.integers(0, 60), max_size=60), count_max=st.integers(1, 8), bytes_max=st.integers(1, 200))
def test_what_waits_and_is_remembered_stays_under_its_ceilings(
    sizes: list[int], count_max: int, bytes_max: int
) -> None:
    limits = BacklogLimits(
        assignments_max=count_max,
        queued_bytes_max=bytes_max,
        remembered_max=count_max,
        remembered_bytes_max=bytes_max,
    )
    core = AgentCore(tasks=["t"], feedback_tasks=["t"], limits=limits)
    core.handle(ev.LinkUp(), 0.0)
    core.handle(ev.WelcomeReceived("s"), 0.0)
    for round_id, size in enumerate(sizes, start=1):
        out = core.handle(ev.AssignmentReceived(round_id, "t", b"x" * size, 1.0), 0.0)
        assert len(out) <= 1
        assert core.queued <= count_max
        assert core.remembered <= count_max
        assert core._remembered.size_bytes <= bytes_max
        assert core._remembered.size_bytes == sum(len(body) for _, body in core._remembered._bodies.values())
        waiting = [work.size_bytes for work in core._queue]
        assert sum(waiting) <= bytes_max or len(waiting) == 1
    assert core.counts.declined + core.queued + core.running == len(sizes)


_EVENTS: list[ev.Event] = [
    ev.ConnectFailed("x"),
    ev.LinkUp(),
    ev.LinkDown("x"),
    ev.WelcomeReceived("s"),
    ev.WelcomeReceived("s", secret="key"),
    ev.WelcomeReceived("s", resumed=True, received=1, secret="key"),
    ev.LinkDown("x", is_over=True),
    ev.LinkUp(),
    ev.RefusalReceived("full", "x", retry=True),
    ev.RepliesDelivered(),
    ev.DrainReceived(),
    ev.DrainReceived(stop=True),
    ev.DrainTimedOut(),
    ev.AssignmentReceived(1, "t", b"", 1.0),
    ev.FeedbackReceived(1, "t", b""),
    ev.CancellationReceived(1),
    ev.HandlerReturned(1),
    ev.HandlerFailed(2, "x"),
    ev.HandlerDeclined(3, "x"),
    ev.StopRequested("x"),
]


@given(run=st.lists(st.sampled_from(_EVENTS), max_size=40))
def test_every_move_is_in_the_table(run: list[ev.Event]) -> None:
    core = AgentCore(tasks=["t"], feedback_tasks=["t"])
    for event in run:
        before = core.state
        out = core.handle(event, 0.0)
        if core.state is not before:
            assert core.state in TRANSITIONS[before, type(event)]
        if before is State.GONE:
            assert not out
        stops = [i for i in out if isinstance(i, ev.Stop)]
        assert len(stops) == (core.state is State.GONE and before is not State.GONE)


def test_every_state_can_be_reached() -> None:
    """Guards the tests above: the events they draw lead everywhere."""
    rng = random.Random(1)
    reached = set()
    mild = [event for event in _EVENTS if event not in (ev.StopRequested("x"), ev.DrainReceived(stop=True))]
    for _ in range(300):
        core = AgentCore(tasks=["t"], feedback_tasks=["t"])
        for _ in range(20):
            core.handle(rng.choice(mild if rng.random() < 0.95 else _EVENTS), 0.0)
            reached.add(core.state)
    assert reached == set(State)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_model_sees_the_same_whatever_the_pace(concurrency: int) -> None:
    """Each prediction is made with exactly the truths that stood before it on the stream."""
    rng = random.Random(7)
    for _ in range(50):
        observer = make(concurrency)
        asked, told = 0, 0
        expected: dict[int, int] = {}
        seen: dict[int, int] = {}
        for _ in range(60):
            move = rng.random()
            if move < 0.4:
                asked += 1
                expected[asked] = told
                observer.apply(ev.AssignmentReceived(asked, "t", b"%d" % asked, 1.0))
            elif move < 0.6 and told < asked:
                told += 1
                observer.apply(ev.FeedbackReceived(told, "t", b""))
            elif observer.running:
                observer.apply(ev.HandlerReturned(rng.choice(sorted(observer.running)), b""))
        while observer.running:
            observer.apply(ev.HandlerReturned(min(observer.running), b""))
        trained = 0
        for kind, round_id in observer.started:
            if kind == "tell":
                trained += 1
            else:
                seen[round_id] = trained
        assert seen == expected

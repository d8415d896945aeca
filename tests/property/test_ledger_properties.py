"""Replay gives the state of the run that made the records, bit for bit, also with a learner that fails."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from quorate_coordinator.journal.records import Record, RoundClosed, TruthTold, decode_record
from quorate_coordinator.learner.api import Answer, ClosedRound, Experience, LateReply, Report
from quorate_coordinator.learner.vote import VoteLearner
from quorate_coordinator.ledger import Ledger, Question
from quorate_coordinator.rounds.book import BookLimits, RoundBook
from quorate_coordinator.rounds.events import AgentLost, RoundCancelled, TimerFired, TruthRevealed
from quorate_coordinator.rounds.instructions import CloseRound, LearnTruth, NoteForgotten, OfferLateReply, OpenRound
from quorate_protocol.bodies import encode_body
from sansio.round_making import make_policy, make_reply, make_request

AGENTS = ("a", "b", "c", "d")

#: Of these the learner below cannot combine, learn or take one.
BODIES = [encode_body(value) for value in ("yes", "no", 1, 1.0, "combine", "learn", "late")] + [b"\xc1"]


class Faulty(VoteLearner):
    """Raises, sometimes in the middle of what it does."""

    def combine(self, outcome: ClosedRound) -> Answer:
        answer = super().combine(outcome)
        if answer.body == encode_body("combine"):
            raise ZeroDivisionError
        return answer

    def learn(self, outcome: ClosedRound, truth: bytes) -> Report:
        report = super().learn(outcome, truth)
        if truth == encode_body("learn"):
            raise ZeroDivisionError
        return report

    def take_late(self, late: LateReply) -> None:
        if late.reply.body == encode_body("late"):
            raise ZeroDivisionError
        super().take_late(late)

    def process_message(self, experience: Experience) -> Report:
        raise ZeroDivisionError


class Run:
    """A book and a ledger as the gatherer has them, and what they would have had written down."""

    def __init__(self) -> None:
        self.book = RoundBook(BookLimits(remembered_max=5))
        self.ledger = Ledger(Faulty())
        self.now = 1.0
        self.records: list[Record] = []
        #: After each number of records: the learner's state.
        self.snapshots = [self.ledger.learner.snapshot()]

    def handle(self, event: Any) -> None:
        for instruction in self.book.handle(event, self.now):
            match instruction:
                case OpenRound():
                    self.record(self.ledger.open(instruction, Question()))
                case CloseRound(outcome):
                    self.record(self.ledger.close(outcome, Question())[0])
                case LearnTruth():
                    self.record(self.ledger.learn(instruction)[0])
                case OfferLateReply():
                    self.record(self.ledger.take_late(instruction))
                case NoteForgotten(number):
                    self.ledger.forget(number)

    def record(self, record: Record) -> None:
        self.records.append(decode_record(record.kind, record.encode()))
        self.snapshots.append(self.ledger.learner.snapshot())


def replay(run: Run, checkpoint: int) -> Ledger:
    """As recovery does it, from so many records on."""
    ledger = Ledger(Faulty.restore(run.snapshots[checkpoint]))
    closed = {record.round: record for record in run.records if isinstance(record, RoundClosed)}
    for record in run.records[checkpoint:]:
        if isinstance(record, TruthTold):
            ledger.replay_truth(closed[record.round], record)
        else:
            ledger.replay(record)
    return ledger


moves = st.one_of(
    st.tuples(st.just("ask"), st.sets(st.sampled_from(AGENTS), min_size=1), st.integers(1, 2)),
    st.tuples(st.just("reply"), st.integers(0, 5), st.sampled_from(AGENTS), st.sampled_from(BODIES)),
    st.tuples(st.just("truth"), st.integers(0, 5), st.sampled_from(BODIES[:-1])),
    st.tuples(st.just("wait"), st.floats(0.0, 6.0)),
    st.tuples(st.just("lost"), st.sampled_from(AGENTS)),
    st.tuples(st.just("cancel"), st.integers(0, 5)),
    st.tuples(st.just("tell"), st.sampled_from(AGENTS)),
)


def play(script: list[Any]) -> Run:
    run = Run()
    rounds = 0
    for number, move in enumerate(script):
        match move:
            case ("ask", agents, quorum):
                policy = make_policy(min(quorum, len(agents)), grace_s=0.5, deadline_s=5.0)
                run.handle(make_request(sorted(agents), policy, request_id=number))
                rounds += 1
            case ("reply", back, agent, body):
                run.handle(make_reply(agent, rounds - back, body=body))
            case ("truth", back, truth):
                run.handle(TruthRevealed(number, rounds - back, truth))
            case ("wait", seconds):
                run.now += seconds
                run.handle(TimerFired())
            case ("lost", agent):
                run.handle(AgentLost(agent, "gone"))
            case ("cancel", back):
                run.handle(RoundCancelled(rounds - back, "not wanted"))
            case ("tell", agent):
                run.record(run.ledger.experience(Experience(agent, "reward", encode_body(number)))[0])
    return run


@given(st.lists(moves, max_size=60), st.data())
def test_replay_gives_the_state_of_the_run(script: list[Any], data: st.DataObject) -> None:
    run = play(script)
    checkpoint = data.draw(st.integers(0, len(run.records)), label="checkpoint")
    replayed = replay(run, checkpoint)
    assert replayed.learner.snapshot() == run.ledger.learner.snapshot()
    # And it goes on as the run would: the same truth means the same to both.
    remembered = run.book.awaiting()
    replayed.recalled(
        record for record in run.records if isinstance(record, RoundClosed) and record.round in remembered
    )
    assert replayed.answers == run.ledger.answers
    for number in sorted(remembered):
        for instruction in run.book.handle(TruthRevealed(0, number, encode_body("yes")), run.now):
            if isinstance(instruction, LearnTruth):
                assert replayed.learn(instruction) == run.ledger.learn(instruction)
    assert replayed.learner.snapshot() == run.ledger.learner.snapshot()

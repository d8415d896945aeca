"""What is recorded and when it may be said: the ledger between rounds, learner and journal."""

import itertools

import pytest

from quorate_coordinator.journal.records import ExperienceTaken, ReplyLate, RoundClosed, TruthTold
from quorate_coordinator.learner.api import Answer, ClosedRound, Experience, Report
from quorate_coordinator.learner.vote import VoteLearner
from quorate_coordinator.ledger import Announcement, Ledger, Question, book_outcome_of, interrupt, outcome_of
from quorate_coordinator.rounds.book import RoundBook
from quorate_coordinator.rounds.events import ReplyReceived, TruthRevealed
from quorate_coordinator.rounds.instructions import LearnTruth, OfferLateReply, OpenRound
from quorate_coordinator.rounds.instructions import Outcome as BookOutcome
from quorate_protocol.bodies import encode_body
from quorate_protocol.messages import Outcome
from sansio.round_making import make_policy, make_reply, make_request, only, outcome_in

YES, NO = encode_body("yes"), encode_body("no")


def announcement(number: int) -> Announcement:
    return Announcement(number, Outcome(round=number, task="t", state="failed", quorum=1, results=[], duration_s=0.0))


def play_round(book: RoundBook, answers: dict[str, bytes], now: float = 10.0) -> tuple[OpenRound, BookOutcome]:
    """A round in which these agents answer this."""
    opened = only(OpenRound, book.handle(make_request(tuple(answers), make_policy(len(answers), grace_s=0.0)), now))
    said = []
    for agent, body in answers.items():
        said = book.handle(make_reply(agent, opened.round, body=body), now + 0.25)
    return opened, outcome_in(said)


class TestHolding:
    def test_nothing_is_said_before_its_record_is_durable(self) -> None:
        ledger = Ledger(VoteLearner())
        for seq in (3, 5, 6, 9):
            ledger.hold(seq, announcement(seq))
        assert ledger.committed(2) == []
        assert [one.request_id for one in ledger.committed(5)] == [3, 5]
        assert ledger.held == 2
        assert ledger.committed(5) == []
        assert [one.request_id for one in ledger.committed(100)] == [6, 9]
        assert ledger.held == 0

    def test_what_cannot_be_written_now_stays_held(self) -> None:
        ledger = Ledger(VoteLearner())
        ledger.hold(1, announcement(1))
        ledger.hold(2, announcement(2))
        assert [one.request_id for one in ledger.unannounced()] == [1, 2]
        assert [one.request_id for one in ledger.committed(2)] == [1, 2]
        assert ledger.unannounced() == []

    def test_records_go_up(self) -> None:
        ledger = Ledger(VoteLearner())
        ledger.hold(2, announcement(1))
        with pytest.raises(AssertionError, match="records go up"):
            ledger.hold(1, announcement(2))


class TestRecords:
    def test_a_round_is_recorded_with_its_key_and_comes_back_as_it_was_told(self) -> None:
        ledger, book = Ledger(VoteLearner()), RoundBook()
        question = Question("k-1", b"d" * 16)
        opened, closed = play_round(book, {"a": YES, "b": YES, "c": NO})
        record = ledger.open(opened, question)
        assert (record.round, record.key, record.digest, record.selected) == (1, "k-1", b"d" * 16, ("a", "b", "c"))
        assert (record.quorum, record.grace_s, record.deadline_s, record.body) == (3, 0.0, 10.0, b"question")
        record_closed, outcome = ledger.close(closed, question)
        assert (record_closed.key, record_closed.digest) == ("k-1", b"d" * 16)
        assert (outcome.state, outcome.answer, outcome.support) == ("complete", YES, pytest.approx(2 / 3))
        assert [result.weight for result in outcome.results] == [pytest.approx(1 / 3)] * 3
        # By way of the journal's bytes.
        again = RoundClosed.decode(record_closed.encode())
        assert outcome_of(again) == outcome
        assert book_outcome_of(again).results == closed.results

    def test_a_round_without_an_answer_is_not_combined(self) -> None:
        class Strict(VoteLearner):
            def combine(self, outcome: ClosedRound) -> Answer:
                raise AssertionError

        ledger, book = Ledger(Strict()), RoundBook()
        opened = only(OpenRound, book.handle(make_request(("a", "b"), make_policy(2)), 0.0))
        book.handle(make_reply("a", opened.round), 0.1)
        closed = outcome_in(book.handle(make_reply("b", opened.round, "failed"), 0.2))
        record, outcome = ledger.close(closed, Question())
        assert (record.state, record.answer, outcome.answer, ledger.answers) == ("failed", None, None, 0)

    def test_the_truth_is_scored_against_the_answer_that_was_announced(self) -> None:
        ledger, book = Ledger(VoteLearner()), RoundBook()
        _, closed = play_round(book, {"a": YES, "b": YES, "c": NO})
        ledger.close(closed, Question())
        assert ledger.answers == 1
        record, revealed = ledger.learn(only(LearnTruth, book.handle(TruthRevealed(3, 1, NO), 20.0)))
        assert record == TruthTold(1, NO)
        assert revealed is not None
        assert (revealed.correct, revealed.right) == (False, {"a": False, "b": False, "c": True})
        assert ledger.answers == 0

    def test_a_late_reply_moves_its_agents_latency(self) -> None:
        ledger = Ledger(VoteLearner())
        record = ledger.take_late(OfferLateReply(1, "classify", "z", YES, 7.5, 0.5, 0.25))
        assert record == ReplyLate(1, "classify", "z", YES, 7.5, 0.5, 0.25)
        latency = ledger.learner.latency("z")
        assert latency is not None
        assert latency.p50_s == 7.5

    def test_a_round_cut_off_is_interrupted_and_free(self) -> None:
        opened = Ledger(VoteLearner()).open(play_round(RoundBook(), {"b": YES, "a": YES})[0], Question("k", b"d"))
        closed = interrupt(opened, "it died")
        assert (closed.state, closed.reason, closed.key, closed.digest) == ("interrupted", "it died", "k", b"d")
        assert [(result.agent, result.status) for result in closed.results] == [("a", "cancelled"), ("b", "cancelled")]
        assert outcome_of(closed).state == "interrupted"

    def test_forgotten_rounds_hold_no_answer(self) -> None:
        ledger = Ledger(VoteLearner())
        ledger.close(play_round(RoundBook(), {"a": YES})[1], Question())
        ledger.forget(1)
        ledger.forget(1)
        assert ledger.answers == 0


class Failing(VoteLearner):
    """Raises at what it is told to, after it has changed: what it changed is part of its state."""

    def combine(self, outcome: ClosedRound) -> Answer:
        answer = super().combine(outcome)
        if any(reply.body == encode_body("combine") for reply in outcome.replies):
            raise ZeroDivisionError
        return answer

    def learn(self, outcome: ClosedRound, truth: bytes) -> Report:
        report = super().learn(outcome, truth)
        if truth == encode_body("learn"):
            raise ZeroDivisionError
        return report

    def process_message(self, experience: Experience) -> Report:
        raise ZeroDivisionError


class TestFailingLearner:
    def test_a_combination_that_fails_costs_the_answer_alone(self) -> None:
        ledger = Ledger(Failing())
        record, outcome = ledger.close(play_round(RoundBook(), {"a": encode_body("combine")})[1], Question())
        assert (record.state, record.answer, outcome.support, record.weights) == ("complete", None, None, {})
        assert ledger.answers == 0

    def test_a_truth_that_fails_is_recorded_and_not_announced(self) -> None:
        ledger, book = Ledger(Failing()), RoundBook()
        _, closed = play_round(book, {"a": YES, "b": NO})
        record_closed, _ = ledger.close(closed, Question())
        truth = encode_body("learn")
        record, revealed = ledger.learn(only(LearnTruth, book.handle(TruthRevealed(3, 1, truth), 20.0)))
        assert (record, revealed) == (TruthTold(1, truth), None)
        # Its replay makes the same of it.
        again = Ledger(Failing())
        again.replay(record_closed)
        again.replay_truth(record_closed, record)
        assert again.learner.snapshot() == ledger.learner.snapshot()
        assert ledger.learner.snapshot() != Failing().snapshot()

    def test_an_experience_that_fails_is_recorded(self) -> None:
        record, report = Ledger(Failing()).experience(Experience("a", "reward", YES))
        assert (record, report) == (ExperienceTaken("a", "reward", YES), Report())

    def test_what_replay_would_answer_is_not_what_was_announced(self) -> None:
        """A learner that was mended since: the truth is scored against what operators were told."""
        book, broken = RoundBook(), Ledger(Failing())
        record, _ = broken.close(play_round(book, {"a": encode_body("combine")})[1], Question())
        mended = Ledger(VoteLearner())
        mended.replay(record)
        assert mended.answers == 0


class TestRecall:
    def test_only_the_answers_of_rounds_that_await_their_truth_are_kept(self) -> None:
        book, live, replayed = RoundBook(), Ledger(VoteLearner()), Ledger(VoteLearner())
        records = [live.close(play_round(book, {"a": YES}, now)[1], Question())[0] for now in (1.0, 2.0, 3.0)]
        for record in records:
            replayed.replay(record)
        replayed.recalled(records[1:])
        assert replayed.answers == 2
        recalled = RoundBook(first_round=4)
        for record in records[1:]:
            assert recalled.recall(book_outcome_of(record)) == []
        instruction = only(LearnTruth, recalled.handle(TruthRevealed(1, 3, YES), 1.0))
        _, revealed = replayed.learn(instruction)
        _, revealed_live = live.learn(only(LearnTruth, book.handle(TruthRevealed(1, 3, YES), 5.0)))
        assert revealed == revealed_live
        assert revealed is not None
        assert revealed.correct is True


def test_late_replies_of_the_book_reach_the_learner() -> None:
    ledger, book = Ledger(VoteLearner()), RoundBook()
    opened = only(OpenRound, book.handle(make_request(("a", "b"), make_policy(1, grace_s=0.0)), 0.0))
    ledger.close(outcome_in(book.handle(make_reply("a", opened.round), 0.5)), Question())
    late = only(OfferLateReply, book.handle(ReplyReceived(opened.round, "b", 1, "replied", YES), 2.0))
    ledger.take_late(late)
    latencies = [ledger.learner.latency(agent) for agent in "ab"]
    assert [latency.p50_s for latency in latencies if latency is not None] == [0.5, 2.0]
    assert list(itertools.chain(ledger.unannounced())) == []

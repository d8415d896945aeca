"""What a coordinator knows again from a journal: the learner's state, rounds that await their truth, rounds cut off."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import structlog

from agent_making import echo
from coordination import coordinating, until
from journal_making import closed, execute, experience, late, opened, read_journal, rounds, truth, write_journal
from quorate_coordinator import gather
from quorate_coordinator.journal import stall, writer
from quorate_coordinator.journal.errors import JournalUnusable
from quorate_coordinator.journal.reader import JournalReader
from quorate_coordinator.journal.schema import JOURNAL_NAME
from quorate_coordinator.journal.writer import Journal
from quorate_coordinator.learner.api import (
    AgentScore,
    Answer,
    ClosedRound,
    Coordination,
    Latency,
    Report,
    Request,
    TaskScore,
)
from quorate_coordinator.learner.vote import VoteLearner
from quorate_coordinator.ledger import book_outcome_of
from quorate_coordinator.recovery import Recovered, recover
from quorate_coordinator.rounds.book import estimate_bytes
from quorate_coordinator.service import Coordinator
from quorate_coordinator.settings import Settings
from quorate_protocol.errors import CallFailed
from quorate_protocol.fields import Body
from restarting import replay_all


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite3"


def recovering(file: Path, remembered_max: int = 100) -> Recovered:
    with JournalReader(file) as reader:
        return recover(reader, VoteLearner, VoteLearner.restore, remembered_max=remembered_max)


def test_an_empty_journal_is_a_beginning(file: Path) -> None:
    write_journal(file, [])
    found = recovering(file)
    assert (found.awaiting, found.cut_off, found.next_round, found.replayed) == ((), (), 1, 0)
    assert found.ledger.learner.snapshot() == VoteLearner().snapshot()


def test_all_records_are_replayed_where_there_is_no_checkpoint(file: Path) -> None:
    write_journal(file, [*rounds(3), experience(), opened(4), closed(4), opened(5)])
    found = recovering(file)
    assert (found.replayed, found.next_round) == (16, 6)
    assert found.awaiting == (closed(4),)
    assert found.cut_off == (opened(5),)
    assert found.ledger.answers == 1
    assert found.ledger.learner.snapshot() == replay_all(file)
    latency = found.ledger.learner.latency("cat")  # whose replies were all late
    assert latency is not None
    assert latency.p50_s == late(1).latency_s


@pytest.mark.parametrize("checkpoint", [1, 2, 3, 4, 6, 8, 11, 12])
def test_a_checkpoint_saves_the_replay_of_what_is_before_it(file: Path, checkpoint: int) -> None:
    """Also between a round's end and its truth."""
    records = rounds(3)
    write_journal(file, records)
    before = file.with_name("before.sqlite3")
    write_journal(before, records[:checkpoint])
    snapshot = replay_all(before)
    whole = replay_all(file)
    writing = Journal.open(file)
    writing.append_checkpoint(checkpoint, snapshot, at=1.0)
    loop = asyncio.new_event_loop()
    writing.start(loop, lambda seq: None, lambda problem: None, lambda: None)
    assert writing.close(60.0)
    loop.close()
    found = recovering(file)
    assert found.replayed == len(records) - checkpoint
    assert found.ledger.learner.snapshot() == whole


def test_a_truth_without_the_end_of_its_round_is_left_out_and_said(file: Path) -> None:
    write_journal(file, [*rounds(2), opened(3), truth(3), opened(4), closed(4)])
    found = recovering(file)
    assert found.damaged == (f"{file}: has the truth of round 3 and not its end: it is left out",)
    assert [record.round for record in found.awaiting] == [4]
    beside = file.with_name("beside.sqlite3")
    write_journal(beside, [*rounds(2), opened(4), closed(4)])
    assert found.ledger.learner.snapshot() == replay_all(beside)


def test_rounds_are_remembered_up_to_the_bytes_that_they_may_have(file: Path) -> None:
    write_journal(file, [record for number in range(1, 8) for record in (opened(number), closed(number))])
    one = estimate_bytes(book_outcome_of(closed(1)))
    with JournalReader(file) as reader:
        found = recover(
            reader, VoteLearner, VoteLearner.restore, remembered_max=100, remembered_bytes_max=2 * one + one // 2
        )
    assert [record.round for record in found.awaiting] == [6, 7]
    assert found.ledger.answers == 2
    assert found.ledger.learner.snapshot() == replay_all(file)


def test_only_so_many_rounds_are_remembered_the_newest(file: Path) -> None:
    write_journal(file, [record for number in range(1, 8) for record in (opened(number), closed(number))])
    found = recovering(file, remembered_max=3)
    assert [record.round for record in found.awaiting] == [5, 6, 7]
    # Answers are kept for those alone.
    assert found.ledger.answers == 3


def test_a_journal_that_was_pruned_and_lost_its_checkpoint_is_not_begun_anew(file: Path) -> None:
    write_journal(file, rounds(2))
    with JournalReader(file) as reader:
        assert reader.checkpoint() is None
    write_journal(file, [opened(3)], checkpoints=[1])
    execute(file, "UPDATE checkpoints SET snapshot = x'00'")
    with pytest.raises(JournalUnusable, match="what was learned is lost; move the file away to begin anew"):
        recovering(file)


# --- through a coordinator -----------------------------------------------------------------------


async def test_rounds_of_earlier_runs_take_their_truth(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as fleet:
        await fleet.join(echo("a"), echo("b", "no"))
        operator = await fleet.operator()
        outcomes = [await operator.ask("echo", number, quorum=1.0) for number in range(3)]
        await operator.reveal(outcomes[0].round, 0)
    async with coordinating(tmp_path) as fleet:
        operator = await fleet.operator()
        revealed = await operator.reveal(outcomes[1].round, 1)
        assert (revealed.correct, revealed.right) == (True, {"a": True, "b": False})
        for number in (0, 1):
            with pytest.raises(CallFailed, match="has been told before") as caught:
                await operator.reveal(outcomes[number].round, number)
            assert caught.value.reason == "already-revealed"
        with pytest.raises(CallFailed) as caught:
            await operator.reveal(outcomes[2].round + 1, 1)
        assert caught.value.reason == "unknown-round"
    journal = tmp_path / "journal.sqlite3"
    assert recovering(journal).awaiting[0].round == outcomes[2].round
    assert recovering(journal).ledger.learner.snapshot() == replay_all(journal)


class NoSnapshot(VoteLearner):
    """A learner whose state cannot be written down."""

    def snapshot(self) -> bytes:
        raise ZeroDivisionError


async def test_a_learner_without_a_snapshot_costs_the_checkpoint_alone(tmp_path: Path) -> None:
    settings = Settings(listen="memory:here", http="", state_dir=tmp_path, journal={"checkpoint_rounds": 1})
    with structlog.testing.capture_logs() as logged:
        async with Coordinator(settings, learner=NoSnapshot()) as coordinator:
            await ask_and_tell(coordinator)
    assert {"checkpoint_failed", "coordinator_stopped"} <= {entry["event"] for entry in logged}
    kinds = [record.kind for _, _, record in read_journal(tmp_path / "journal.sqlite3")]
    assert kinds == ["opened", "closed", "truth"]


async def ask_and_tell(coordinator: Coordinator) -> None:
    agent = asyncio.create_task(echo("a").run(coordinator.url, **coordinator.credentials))
    async with await coordinator.client() as client:
        async with asyncio.timeout(20.0):
            while not (await client.agents()).agents:
                pass
        outcome = await client.ask("echo", 1, key="k")
        assert outcome.value == 1
        assert (await client.reveal(outcome.round, 1)).correct is True
        assert await client.ask("echo", 1, key="k") == outcome
    agent.cancel()
    await asyncio.wait([agent])


# --- rounds whose end cannot be recorded ---


class Odd(VoteLearner):
    """Reckons with NumPy; and gives what no record can have, where it is told to."""

    def __init__(self, **odd: Any) -> None:
        super().__init__()
        self.odd = odd

    def combine(self, closed: ClosedRound) -> Answer:
        answer = super().combine(closed)
        weights = {agent: numpy.float32(weight) for agent, weight in answer.weights.items()}
        return replace(answer, **{"support": numpy.float32(1.0), "weights": weights, **self.odd})

    def learn(self, closed: ClosedRound, truth: Body) -> Report:
        return replace(super().learn(closed, truth), correct=numpy.bool_(True))


async def test_a_learner_may_reckon_with_numpy(tmp_path: Path) -> None:
    async with coordinating(tmp_path, learner=Odd()) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        outcome = await operator.ask("echo", 1)
        assert (outcome.value, outcome.support, outcome.results[0].weight) == (1, 1.0, 1.0)
        assert (await operator.reveal(1, 1)).correct is True
    assert recovering(tmp_path / JOURNAL_NAME).damaged == ()


@pytest.mark.parametrize(
    "odd",
    [{"support": 2.0}, {"support": "much"}, {"weights": {"a": float("nan")}}, {"weights": {1: 1.0}}, {"body": [1]}],
    ids=str,
)
async def test_an_answer_that_cannot_be_told_costs_the_answer_alone(tmp_path: Path, odd: dict[str, Any]) -> None:
    async with coordinating(tmp_path, learner=Odd(**odd)) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        outcome = await operator.ask("echo", 1)
        assert (outcome.state, outcome.answer, outcome.results[0].value) == ("complete", None, 1)
        assert (await operator.reveal(1, 1)).right == {"a": True}
    assert recovering(tmp_path / JOURNAL_NAME).damaged == ()


async def test_a_round_whose_answers_cannot_be_recorded_fails_and_takes_no_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "RECORD_BYTES_MAX", 10_000)
    async with coordinating(tmp_path) as fleet:
        await fleet.join(*(echo(name) for name in "abcd"))
        operator = await fleet.operator()
        outcome = await operator.ask("echo", "x" * 4000, key="k")
        assert (outcome.state, outcome.reason) == ("failed", "what its agents answered cannot be recorded")
        assert [result.status for result in outcome.results] == ["failed"] * 4
        assert await operator.ask("echo", "x" * 4000, key="k") == outcome, "the handlers do not run again"
        with pytest.raises(CallFailed, match="round 1 is not remembered any more"):
            await operator.reveal(1, "x" * 4000)
        assert (await operator.ask("echo", 2)).state == "complete"
        live = fleet.coordinator._gatherer.learner.snapshot()
    found = recovering(tmp_path / JOURNAL_NAME)
    assert (found.damaged, found.cut_off, [one.state for one in found.awaiting]) == ((), (), ["failed", "complete"])
    assert found.ledger.learner.snapshot() == live


class Astray(VoteLearner):
    """Plans rounds as nobody can hold them, as it is told to; and has snapshots that are none."""

    plan: Callable[[Request], Any] | None = None
    state: Any = None

    def compute_coordination(self, request: Request) -> Coordination:
        return super().compute_coordination(request) if self.plan is None else self.plan(request)

    def snapshot(self) -> bytes:
        return super().snapshot() if self.state is None else self.state


async def test_a_plan_that_is_none_costs_the_learners_advice_alone(tmp_path: Path) -> None:
    plans: list[Callable[[Request], Any]] = [
        lambda request: None,
        lambda request: 1 / 0,
        lambda request: Coordination(("stranger",)),
        lambda request: Coordination((7,)),  # type: ignore[arg-type]
        lambda request: Coordination(request.candidates, quorum=1.5),  # type: ignore[arg-type]
        lambda request: Coordination(request.candidates, quorum=True),
        lambda request: Coordination(request.candidates, quorum=0),
        lambda request: Coordination(request.candidates, deadline_s=float("nan")),
        lambda request: Coordination(request.candidates, deadline_s="soon"),  # type: ignore[arg-type]
        lambda request: Coordination(request.candidates, grace_s=-1.0),
        lambda request: Coordination(request.candidates, deadline_s=1e9),
        lambda request: Coordination(request.candidates, grace_s=2.0, deadline_s=1.0),
        lambda request: Coordination(request.candidates, grace_s=1e9),
        lambda request: Coordination(request.candidates, quorum=3),
        lambda request: Coordination(()),
    ]
    learner = Astray()
    async with coordinating(tmp_path, learner=learner) as fleet:
        await fleet.join(echo("a"), echo("b"))
        operator = await fleet.operator()
        for number, learner.plan in enumerate(plans):
            outcome = await operator.ask("echo", number, key=f"k-{number}", quorum=1.0)
            assert [result.agent for result in outcome.results] == ["a", "b"]
        learner.plan = lambda request: Coordination(
            list(request.candidates),  # type: ignore[arg-type]
            quorum=numpy.int64(2),  # type: ignore[arg-type]
            deadline_s=numpy.float32(5.0),  # type: ignore[arg-type]
        )
        assert (await operator.ask("echo", 1, key="numpy")).quorum == 2
        assert len(fleet.coordinator._gatherer.shelf) == 0
    assert recovering(tmp_path / JOURNAL_NAME).damaged == ()


class Silent(VoteLearner):
    """Tells nothing of its agents that can be told."""

    odd_score: Any = None
    odd_latency: Any = None

    def scores(self) -> tuple[TaskScore, ...]:
        return super().scores() if self.odd_score is None else (self.odd_score,)

    def latency(self, agent: str) -> Latency | None:
        return super().latency(agent) if self.odd_latency is None else self.odd_latency()


def score_of(task: Any = "echo", agent: Any = "a", weight: Any = 1.0) -> TaskScore:
    return TaskScore(task, None, 0, {agent: AgentScore(weight, 1.0, 1)})


@pytest.mark.parametrize(
    ("score", "latency"),
    [
        (7, lambda: 1 / 0),
        (score_of(task=7), lambda: Latency(float("nan"), 1.0)),
        (score_of(agent="\udcff"), lambda: Latency(0.1, -1.0)),
        (score_of(task="two words"), lambda: Latency(0.1, 1e300)),
        (score_of(weight=float("inf")), lambda: (1, 2)),
        (score_of(weight="much"), lambda: Latency("fast", 1.0)),  # type: ignore[arg-type]
    ],
)
async def test_a_learner_that_cannot_tell_of_its_agents_costs_those_figures_alone(
    tmp_path: Path, score: Any, latency: Any
) -> None:
    learner = Silent()
    async with coordinating(tmp_path, learner=learner) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        await operator.reveal((await operator.ask("echo", 1)).round, 1)
        (before,) = (await operator.agents()).agents
        assert before.latency_p50_s is not None
        assert before.weights == {"echo": 1.0}
        learner.odd_score, learner.odd_latency = score, latency
        (after,) = (await operator.agents()).agents
        assert (after.agent, after.replies, after.latency_p50_s, after.weights) == ("a", 1, None, {})
        names = {key[0] for key in fleet.metrics()}
        assert "quorate_rounds_total" in names
        assert not {"quorate_agent_weight", "quorate_agent_reply_latency_seconds"} & names


async def test_a_round_that_cannot_be_opened_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours; its agents are not held up by it, nor is its key."""
    async with coordinating(tmp_path) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        gatherer = fleet.coordinator._gatherer
        with monkeypatch.context() as broken:
            broken.setattr(gather, "Opened", lambda **_: 1 / 0)
            for key in (None, "k"):
                with pytest.raises(CallFailed, match="the coordinator failed"):
                    await operator.ask("echo", 1, key=key)
        assert (gatherer.book.in_flight, len(gatherer.shelf)) == (0, 0)
        assert (await operator.ask("echo", 1, key="k")).value == 1
    assert recovering(tmp_path / JOURNAL_NAME).damaged == ()


async def test_a_disk_that_stands_still_is_told_of_like_one_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    write = writer._Committer._write
    monkeypatch.setattr(stall, "STALLED_S", 0.2)
    async with coordinating(tmp_path) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        await operator.ask("echo", 1)

        def stand_still(*arguments: Any) -> None:
            goes_on.wait()
            write(*arguments)

        monkeypatch.setattr(writer._Committer, "_write", stand_still)
        try:
            with pytest.raises(
                CallFailed, match=r"its disk has finished no commit for 0\.2 s; ask again later"
            ) as caught:
                await operator.ask("echo", 2, key="k")
            assert (caught.value.reason, caught.value.retry) == ("not-recorded", True)
            assert not fleet.coordinator.is_ready
            with pytest.raises(CallFailed, match="no round is taken, because none can be recorded"):
                await operator.ask("echo", 3)
        finally:
            goes_on.set()
        await until(lambda: fleet.coordinator.is_ready)
        assert (await operator.ask("echo", 2, key="k")).round == 2
        assert (await operator.ask("echo", 3)).round == 3


@pytest.mark.parametrize("state", ["text", bytearray(b"x")], ids=["text", "bytearray"])
async def test_a_snapshot_that_is_none_costs_a_restart_its_time_alone(tmp_path: Path, state: Any) -> None:
    learner = Astray()
    async with coordinating(tmp_path, learner=learner, journal={"checkpoint_rounds": 1}) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        learner.state = state
        for number in range(3):
            assert (await operator.ask("echo", number)).state == "complete"
        assert fleet.coordinator.is_ready
    found = recovering(tmp_path / JOURNAL_NAME)
    assert [one.round for one in found.awaiting] == [1, 2, 3]

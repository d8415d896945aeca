"""What the service makes of its journal: when it writes checkpoints, what it prunes, what it drops, how it ends."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from agent_making import echo
from coordination import Fleet, coordinating, until
from journal_making import execute, opened, rounds, write_journal
from quorate_agent import Agent
from quorate_agent.streams import OwnStreams
from quorate_coordinator import recording
from quorate_coordinator.journal import writer
from quorate_coordinator.journal.errors import JournalUnusable
from quorate_coordinator.journal.prune import Retention
from quorate_coordinator.journal.reader import JournalReader
from quorate_coordinator.journal.schema import JOURNAL_NAME
from quorate_coordinator.journal.writer import Journal
from quorate_coordinator.learner.api import Experience, Report
from quorate_coordinator.learner.vote import VoteLearner
from quorate_coordinator.recovery import recover
from quorate_protocol.errors import CallFailed


class Counting(VoteLearner):
    """A vote that counts what it is told."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.told = 0

    def process_message(self, experience: Experience) -> Report:  # type: ignore[override]
        self.told += 1
        return Report()


def tell(fleet: Fleet, count: int, size: int = 10) -> None:
    for _ in range(count):
        fleet.coordinator._gatherer.experience(Experience("a", "load", bytes(size)))


def journal_of(fleet: Fleet) -> Journal:
    assert fleet.coordinator._recording is not None
    return fleet.coordinator._recording.journal


@asynccontextmanager
async def slow_disk(fleet: Fleet) -> AsyncIterator[None]:
    """No commit succeeds meanwhile, nor fails: somebody else has the database's lock."""
    other = sqlite3.connect(fleet.state_dir / JOURNAL_NAME, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.close()


# --- experiences ---------------------------------------------------------------------------------


async def test_what_the_learner_does_not_take_is_not_recorded(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as fleet:
        agent = echo("a")

        @agent.background
        async def say(streams: OwnStreams) -> None:
            for number in range(3):
                await streams.tell("load", number)

        await fleet.join(agent)
        await until(lambda: fleet.coordinator.modalities.experiences_total == {"load": 3})
        assert journal_of(fleet).last_seq == 0
        assert fleet.coordinator._gatherer.experiences_dropped_total == 0


async def test_experiences_leave_rounds_their_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PENDING_RECORDS_MAX", 20)
    learner = Counting()
    async with coordinating(tmp_path, learner=learner) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        async with slow_disk(fleet):
            tell(fleet, 100)
            assert (learner.told, fleet.coordinator._gatherer.experiences_dropped_total) == (10, 90)
            asking = asyncio.create_task(operator.ask("echo", 1))
            await until(lambda: journal_of(fleet).pending_records == 12)
        assert (await asking).value == 1
        tell(fleet, 1)
        assert learner.told == 11


async def test_experiences_are_dropped_while_nothing_can_be_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_LOOK_S", 0.01)
    learner = Counting()
    async with coordinating(tmp_path, learner=learner) as fleet:
        tell(fleet, 3)
        (tmp_path / f"{JOURNAL_NAME}.lock").unlink()
        await until(lambda: fleet.coordinator._gatherer.recording_problem)
        tell(fleet, 4)
        assert (learner.told, fleet.coordinator._gatherer.experiences_dropped_total) == (3, 4)
        assert journal_of(fleet).last_seq == 3


# --- checkpoints ---------------------------------------------------------------------------------


def checkpoints(state_dir: Path) -> list[int]:
    with JournalReader(state_dir / JOURNAL_NAME) as reader:
        return reader.checkpoint_seqs()


async def test_ten_experiences_are_one_round_of_a_checkpoint(tmp_path: Path) -> None:
    async with coordinating(tmp_path, learner=Counting(), journal={"checkpoint_rounds": 2}) as fleet:
        tell(fleet, 39)
        await journal_of(fleet).flush()
        assert checkpoints(tmp_path) == [20]
        tell(fleet, 1)
        await journal_of(fleet).flush()
        assert checkpoints(tmp_path) == [40, 20]
        tell(fleet, 10)
        await fleet.join(echo("a"))
        await (await fleet.operator()).ask("echo", 1)
        await journal_of(fleet).flush()
        assert checkpoints(tmp_path) == [52, 40]


async def test_so_many_bytes_are_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "CHECKPOINT_BYTES", 1_000_000)
    async with coordinating(tmp_path, learner=Counting()) as fleet:
        tell(fleet, 25, 100_000)
        await journal_of(fleet).flush()
        assert checkpoints(tmp_path) == [20, 10]
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        await operator.ask("echo", "x" * 300_000)  # in its question, its answer and the outcome's
        await journal_of(fleet).flush()
        assert checkpoints(tmp_path)[1] == 20


async def test_what_was_replayed_counts_as_well(tmp_path: Path) -> None:
    write_journal(tmp_path / JOURNAL_NAME, rounds(3))
    async with coordinating(tmp_path, learner=Counting(), journal={"checkpoint_rounds": 12}) as fleet:
        tell(fleet, 1)
        await journal_of(fleet).flush()
        assert checkpoints(tmp_path) == [13]


# --- pruning -------------------------------------------------------------------------------------


def known(state_dir: Path, *numbers: int) -> list[int]:
    with JournalReader(state_dir / JOURNAL_NAME) as reader:
        return [number for number in numbers if reader.find_round(number) is not None]


async def test_a_running_coordinator_prunes_and_keeps_rounds_that_await_their_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "PRUNE_INTERVAL_S", 0.0)
    monkeypatch.setattr(recording, "PRUNE_SIZE_INTERVAL_S", 0.01)
    async with coordinating(tmp_path, journal={"checkpoint_rounds": 1, "keep_days": 1e-9}) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        first, told, *others = [(await operator.ask("echo", number)).round for number in range(5)]
        await operator.reveal(told, 1)
        await operator.reveal(others[0], 2)
        others.append((await operator.ask("echo", 1)).round)
        others.append((await operator.ask("echo", 1)).round)
        await until(lambda: not known(tmp_path, told, others[0]))
        awaiting = [first, *others[1:]]
        assert known(tmp_path, *awaiting) == awaiting
        for number in awaiting:
            await operator.reveal(number, 1)


async def test_a_flood_of_experiences_is_pruned_before_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "PRUNE_SIZE_INTERVAL_S", 0.01)
    monkeypatch.setattr(recording, "CHECKPOINT_BYTES", 500_000)
    async with coordinating(tmp_path, learner=Counting(), journal={"keep_bytes": 1 << 20}) as fleet:
        for _ in range(60):
            tell(fleet, 1, 100_000)
            await journal_of(fleet).flush()
        # The write-ahead log, of some four megabytes, moves into it when something is written only.
        await until(lambda: (tell(fleet, 1), (tmp_path / JOURNAL_NAME).stat().st_size < 2_000_000)[1], every_s=0.02)
        assert journal_of(fleet).last_seq >= 60


def test_what_was_pruned_is_not_replayed_without_its_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / JOURNAL_NAME
    write_journal(file, rounds(4), checkpoints=[12, 16])
    loop = asyncio.new_event_loop()
    journal = Journal.open(file)
    journal.start(loop, lambda seq: None, lambda problem: None, lambda: None)

    async def prune() -> int:
        report = await journal.prune(Retention(keep_s=0.0), now_s=2e9)
        return report.records

    # The loop of the journal is the one that it is awaited in.
    assert loop.run_until_complete(prune()) == 12
    assert journal.close(60.0)
    loop.close()
    execute(file, "DELETE FROM checkpoints")
    with (
        JournalReader(file) as reader,
        pytest.raises(JournalUnusable, match="what was learned is lost; move the file away to begin anew"),
    ):
        recover(reader, VoteLearner, VoteLearner.restore, remembered_max=100)


# --- the end -------------------------------------------------------------------------------------


async def test_outcomes_are_durable_before_operators_are_finished_with(tmp_path: Path) -> None:
    async with coordinating(tmp_path) as fleet:
        agent = Agent("a")

        @agent.task("wait")
        async def wait(body: Any) -> None:
            await asyncio.Event().wait()

        await fleet.join(agent)
        operator = await fleet.operator()
        asking = asyncio.create_task(operator.ask("wait", 1))
        await until(lambda: fleet.coordinator._gatherer.book.in_flight == 1)
        journal, operators = journal_of(fleet), fleet.coordinator._operators
        await journal.flush()
        pending: list[int] = []
        finish = operators.finish

        async def finishing(timeout_s: float) -> None:
            pending.append(journal.pending_records)
            await finish(timeout_s)

        operators.finish = finishing  # type: ignore[method-assign]
        async with slow_disk(fleet):
            closing = asyncio.create_task(fleet.coordinator.close())
            await until(lambda: journal.pending_records > 0)
        await closing
        assert pending == [0]
        outcome = await asking
        assert outcome.state == "interrupted"


@pytest.mark.parametrize("harm", ["-wal", ".lock"])
async def test_the_end_does_not_wait_for_files_that_are_gone(tmp_path: Path, harm: str) -> None:
    async with coordinating(tmp_path) as fleet:
        await fleet.join(echo("a"))
        operator = await fleet.operator()
        (tmp_path / f"{JOURNAL_NAME}{harm}").unlink()
        with pytest.raises(CallFailed, match="restart the coordinator"):
            await operator.ask("echo", 1)
        async with asyncio.timeout(4.0):
            await fleet.coordinator.close()


def test_more_than_half_full_and_not_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal.open(tmp_path / JOURNAL_NAME)
    monkeypatch.setattr(writer, "PENDING_RECORDS_MAX", 4)
    journal.append(opened(1), at=1.0)
    assert not journal.is_half_full
    journal.append(opened(2), at=1.0)
    assert journal.is_half_full
    assert not journal.is_full
    monkeypatch.setattr(writer, "PENDING_RECORDS_MAX", 100)
    assert not journal.is_half_full
    monkeypatch.setattr(writer, "PENDING_BYTES_MAX", 2 * journal.pending_bytes)
    assert journal.is_half_full
    assert not journal.is_full
    journal.close(0)

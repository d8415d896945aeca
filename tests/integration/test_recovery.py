"""A coordinator that is killed with SIGKILL and started again: what it knows, and what its fleet and operators see."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent_making import Gated, echo
from coordination import until
from journal_making import execute, opened, write_journal
from processes import PATIENCE_S, coordinator_process, quorate, running
from quorate_agent import backoff as backoff_module
from quorate_coordinator.journal.records import RoundClosed, RoundOpened, TruthTold
from quorate_coordinator.journal.verify import verify
from quorate_coordinator.ledger import outcome_of
from quorate_protocol.errors import CallFailed, ConnectionClosed
from quorate_protocol.messages import Outcome
from restarting import Restarting, agents, joined, last_state, records_in, recovered, replay_all


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Agents try again soon."""
    monkeypatch.setattr(backoff_module.Backoff.__init__, "__kwdefaults__", {"base_s": 0.05, "max_s": 0.2})


@pytest.fixture
async def restarting(tmp_path: Path) -> AsyncIterator[Restarting]:
    async with Restarting(tmp_path / "state") as restarting:
        yield restarting


def outcomes_in(journal: Path) -> dict[int, Outcome]:
    """Every outcome that the journal has, by round."""
    closed = [record for record in records_in(journal) if isinstance(record, RoundClosed)]
    assert len({record.round for record in closed}) == len(closed)
    return {record.round: outcome_of(record) for record in closed}


def assert_sound(journal: Path) -> None:
    assert verify(journal).problems == []
    assert recovered(journal).ledger.learner.snapshot() == replay_all(journal)


async def test_killed_between_rounds_nothing_is_forgotten(restarting: Restarting) -> None:
    told: dict[str, Outcome] = {}
    async with agents(restarting, echo("a"), echo("b", "no"), echo("c")):
        for run in range(3):
            async with restarting.client() as client:
                await joined(client, "a", "b", "c")
                # Outcomes of earlier runs are told again under their keys, and their truths may still come.
                for number, (key, outcome) in enumerate(told.items()):
                    assert await client.ask("echo", key, quorum=1.0, key=key) == outcome
                    if number % 3 == 0:
                        with pytest.raises(CallFailed, match="has been told before") as caught:
                            await client.reveal(outcome.round, key)
                        assert caught.value.reason == "already-revealed"
                    elif number % 10 == run:
                        revealed = await client.reveal(outcome.round, key)
                        assert (revealed.correct, revealed.right) == (True, {"a": True, "b": False, "c": True})
                for number in range(10):
                    key = f"{run}-{number}"
                    told[key] = await client.ask("echo", key, quorum=1.0, key=key)
                    assert (told[key].state, told[key].value) == ("complete", key)
                    if len(told) % 3 == 1:
                        await client.reveal(told[key].round, key)
                with pytest.raises(CallFailed, match="used for another question"):
                    await client.ask("echo", "other", quorum=1.0, key="0-0")
            if run < 2:
                await restarting.kill()
                assert_sound(restarting.journal)
                await restarting.start()
        ended = await restarting.stop()
    assert "Traceback" not in ended.err
    assert '"warning"' not in ended.err, "a stop is no trouble"
    assert {outcome.round: outcome for outcome in told.values()} == outcomes_in(restarting.journal)
    assert_sound(restarting.journal)
    # What the last one had in its memory is what an uninterrupted one would have had.
    assert last_state(restarting.journal) == replay_all(restarting.journal)


async def test_killed_in_mid_round_it_is_interrupted_and_asked_anew(restarting: Restarting) -> None:
    gated = Gated("a")
    async with agents(restarting, gated.agent, echo("b")):
        async with restarting.client() as client:
            asking = asyncio.create_task(client.ask("echo", 1, quorum=1.0, key="k"))
            plain = asyncio.create_task(client.ask("echo", 2, quorum=1.0))
            await until(lambda: gated.running == 2)
            await until(lambda: len(records_in(restarting.journal)) >= 2)
            await restarting.kill()
            for call in (asking, plain):
                with pytest.raises(ConnectionClosed):
                    await call
        gated.gate.set()
        await restarting.start()
        async with restarting.client() as client:
            await joined(client, "a", "b")
            outcome = await client.ask("echo", 1, quorum=1.0, key="k")
            assert (outcome.state, outcome.value) == ("complete", 1)
            assert await client.ask("echo", 1, quorum=1.0, key="k") == outcome
            assert (await client.agents()).rounds_closed == {"complete": 1}
        await restarting.stop()
    begun = [record for record in records_in(restarting.journal) if isinstance(record, RoundOpened)]
    outcomes = outcomes_in(restarting.journal)
    assert len(begun) == len(outcomes) == 3
    for record in begun[:2]:
        interrupted = outcomes[record.round]
        assert (interrupted.state, interrupted.reason) == ("interrupted", "the coordinator died while it was open")
        assert [(result.agent, result.status) for result in interrupted.results] == [
            ("a", "cancelled"),
            ("b", "cancelled"),
        ]
    assert (begun[2].key, begun[2].round) == ("k", outcome.round)
    assert outcome.round > begun[1].round
    assert_sound(restarting.journal)


async def test_agents_hear_of_a_restart_long_before_silence_would_tell_them(tmp_path: Path) -> None:
    environ = {"QUORATE_SESSIONS__LEASE_S": "600", "QUORATE_SESSIONS__PULSE_S": "0.2"}
    async with Restarting(tmp_path / "state", **environ) as restarting, agents(restarting, echo("a"), echo("b")):
        await restarting.kill()
        assert (restarting.state_dir / "reset-key").stat().st_mode & 0o777 == 0o600
        await restarting.start()
        async with restarting.client() as client:
            await joined(client, "a", "b", patience_s=PATIENCE_S)
        await restarting.stop()


async def test_killed_right_after_an_outcome_was_printed(restarting: Restarting) -> None:
    command = ("ask", "echo", '{"x": 1}', "--key", "k", "--json")
    async with agents(restarting, echo("a")):
        async with running(*command, **restarting.environ) as asking:
            await until(lambda: asking.out_so_far.endswith("\n"), patience_s=PATIENCE_S)
            await restarting.kill()
            printed = json.loads((await asking.end()).out)
        await restarting.start()
        again = await quorate(*command, **restarting.environ)
    assert again.code == 0
    assert json.loads(again.out) == printed
    assert outcomes_in(restarting.journal)[printed["round"]].value == {"x": 1}


async def test_a_feed_that_lost_its_coordinator_says_how_to_go_on(restarting: Restarting) -> None:
    feed = ("feed", "-", "--task", "echo", "--target", "y")
    async with agents(restarting, echo("a")):
        async with running(*feed, "--skip", "1", **restarting.environ) as feeding:
            await feeding.write("x,y\n0,0\n1,1\n2,2\n")
            await until(lambda: sum(isinstance(one, TruthTold) for one in records_in(restarting.journal)) == 2)
            async with restarting.client() as client:
                # What is recorded later is announced later: it has been told of its second truth.
                await client.ask("echo", 1)
            await restarting.kill()
            await restarting.start()
            await feeding.write("3,3\n")
            ended = await feeding.end()
        assert ended.code == 5
        assert ended.line.startswith("quorate: -, line 5: ")
        assert ended.line.endswith("; to go on from there: --skip 3")
        assert "2 rounds in " in ended.out


async def test_killed_again_and_again_while_it_reads_its_journal(restarting: Restarting) -> None:
    """Each start makes its records durable before anybody may count on them, and replays no more than it must."""
    async with agents(restarting, echo("a")):
        for number in range(4):
            async with restarting.client() as client:
                await joined(client, "a")
                outcome = await client.ask("echo", number)
                await client.reveal(outcome.round, number)
            await restarting.kill()
            assert_sound(restarting.journal)
            await restarting.start()
    # Three records for each run, and a checkpoint whenever seven are not covered.
    assert recovered(restarting.journal).replayed < 12
    truths = [record for record in records_in(restarting.journal) if isinstance(record, TruthTold)]
    assert len(truths) == 4


# --- journals that cannot be used ----------------------------------------------------------------


def make_journal(state_dir: Path) -> Path:
    state_dir.mkdir()
    journal = state_dir / "journal.sqlite3"
    write_journal(journal, [])
    return journal


async def refused(state_dir: Path) -> str:
    """What a coordinator says that does not start."""
    ended = await quorate(
        "coordinator", QUORATE_LISTEN="127.0.0.1:0", QUORATE_HTTP="", QUORATE_STATE_DIR=str(state_dir)
    )
    assert (ended.code, ended.out) == (2, "")
    assert "Traceback" not in ended.err
    assert not [entry for entry in ended.logged if entry["event"] == "coordinator_started"]
    return ended.line


async def test_a_journal_of_a_later_version_is_named(tmp_path: Path) -> None:
    journal = make_journal(tmp_path / "state")
    execute(journal, "PRAGMA user_version = 9")
    assert await refused(tmp_path / "state") == (
        f"quorate: {journal}: is a journal of version 9, and this Quorate knows versions up to 1; "
        "install the Quorate that wrote it, or a later one"
    )


@pytest.mark.parametrize("what", ["record", "file", "other"])
async def test_a_damaged_journal_is_named(tmp_path: Path, what: str) -> None:
    (tmp_path / "state").mkdir()
    journal = tmp_path / "state" / "journal.sqlite3"
    write_journal(journal, [opened(1)])
    if what == "record":
        execute(journal, "UPDATE records SET payload = x'80' || payload WHERE seq = 1")
    else:
        content = journal.read_bytes()
        journal.write_bytes(b"something else\n" * 300 if what == "other" else content[:100] + b"\xff" * len(content))
    line = await refused(tmp_path / "state")
    assert line.startswith(f"quorate: {journal}: ")
    assert "damaged" in line or "not a journal" in line or "is no" in line, line


async def test_a_journal_in_use_is_named_with_who_uses_it(tmp_path: Path) -> None:
    async with coordinator_process(tmp_path) as coordinator:
        line = await refused(tmp_path)
        assert line == (
            f"quorate: state_dir: {tmp_path}/journal.sqlite3 is in use by another process "
            f"(pid {coordinator.process.pid}); each needs a directory of its own"
        )


async def test_a_learner_that_is_not_the_journals_is_named(tmp_path: Path) -> None:
    journal = make_journal(tmp_path / "state")
    write_journal(journal, [opened(1)], checkpoints=[1])
    line = await refused(tmp_path / "state")
    assert line.startswith(f"quorate: {journal}: its checkpoint after record 1 is not this learner's: ")

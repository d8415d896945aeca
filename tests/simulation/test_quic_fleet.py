"""The simulation's plans with real shells over the real QUIC engine, on a bad network in memory, under virtual time."""

import asyncio
import gc
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quorate_coordinator.asking import Asking
from quorate_coordinator.cli.app import app
from quorate_coordinator.quic_simulation.faults import PLAYED
from quorate_coordinator.quic_simulation.history import History, NotHeld
from quorate_coordinator.quic_simulation.network import COORDINATOR_NAME, FleetNetwork
from quorate_coordinator.quic_simulation.run import playable, simulate_quic
from quorate_coordinator.quic_simulation.virtual_loop import VirtualLoop
from quorate_coordinator.simulation.plan import FAULT_KINDS, CallPlan, Plan
from quorate_coordinator.simulation.planning import make_plan
from quorate_protocol.bodies import encode_body
from quorate_protocol.errors import ConfigurationError
from quorate_protocol.messages import AgentResult, Outcome
from simulation.broken_cores import NamesOneTwice, RunsTwice


def plan_of(seed: int, agents: int = 8) -> Plan:
    return playable(make_plan(seed, agents=agents, hours=0.08))


@pytest.fixture
def nothing_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A run that has found something ends all that it began."""
    yield
    gc.collect()
    assert [text for text in caplog.messages if "Task was destroyed" in text] == []


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_must_hold_holds(seed: int) -> None:
    report = simulate_quic(plan_of(seed))
    assert report.violation is None, report.violation
    assert {*report.faults} == PLAYED, "everything went wrong"
    assert report.announcements > 20
    assert report.statuses["replied"] > 0
    assert report.handlers > 0


def test_a_book_with_a_bug_is_found(monkeypatch: pytest.MonkeyPatch, nothing_left: None) -> None:
    monkeypatch.setattr("quorate_coordinator.gather.RoundBook", NamesOneTwice)
    for seed in range(20):
        # Agents are lost when they are killed: as many as there can be.
        plan = plan_of(seed)
        crash = next(fault for fault in plan.faults if fault.kind == "agent-crash")
        crashes = tuple(
            replace(crash, at_s=float(at_s), duration_s=1.0, targets=tuple(range(8))) for at_s in range(5, 60, 3)
        )
        violation = simulate_quic(plan.only(faults=crashes)).violation
        if violation is not None:
            assert violation.invariant == "one status for each selected agent", violation
            return
    raise AssertionError("not found within 20 seeds")


def test_an_agent_with_a_bug_is_found(monkeypatch: pytest.MonkeyPatch, nothing_left: None) -> None:
    monkeypatch.setattr("quorate_agent.worker.AgentCore", RunsTwice)
    for seed in range(20):
        violation = simulate_quic(plan_of(seed)).violation
        if violation is not None:
            assert violation.invariant == "no assignment runs twice in a process", violation
            return
    raise AssertionError("not found within 20 seeds")


def test_operators_whose_links_break_find_their_rounds_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a shell that gives a round up when it only loses sight of who has its key is found."""
    plan = playable(make_plan(4, agents=8, hours=0.08, kinds=("operator-break",)))
    plan = plan.only(calls=tuple(replace(call, keyed=True, cancel_after_s=None) for call in plan.calls))
    breaks = tuple(
        replace(plan.faults[0], at_s=call.at_s + 0.05, duration_s=0.0, targets=(0, 1, 2)) for call in plan.calls[::3]
    )
    plan = plan.only(faults=breaks)
    report = simulate_quic(plan)
    assert report.violation is None, report.violation
    assert report.rounds["cancelled"] == 0
    monkeypatch.setattr("quorate_coordinator.asking.Asking.leave", Asking.withdraw)
    violation = simulate_quic(plan).violation
    assert violation is not None
    assert violation.invariant == "only its operator cancels a round", violation


def outcome_of(state: str = "quorate", *, replies: int = 1, quorum: int = 1) -> Outcome:
    results = [AgentResult(agent=f"a{place}", status="replied", body=encode_body(1)) for place in range(replies)]
    results.append(AgentResult(agent="b", status="late"))
    return Outcome(round=1, task="t", state=state, quorum=quorum, results=results, duration_s=0.5)  # type: ignore[arg-type]


CALL = CallPlan(at_s=0.0, key="k", task="t", deadline_s=1.0)


@pytest.mark.parametrize(
    ("outcome", "call", "invariant"),
    [
        (outcome_of(quorum=2), CALL, "quorum is never claimed falsely"),
        (outcome_of("expired"), CALL, "quorum is seen when it is there"),
        (outcome_of("complete"), CALL, "complete means everybody"),
        (outcome_of(), replace(CALL, quorum=3), "quorum is what was asked for"),
        (outcome_of(), replace(CALL, deadline_s=0.4), "rounds end by their deadline"),
        (outcome_of(), CALL, "a reply is its agent's own"),
    ],
)
def test_what_an_operator_is_told_is_judged(outcome: Outcome, call: CallPlan, invariant: str) -> None:
    with pytest.raises(NotHeld) as raised:
        History().told(call, outcome)
    assert raised.value.invariant == invariant


def test_another_outcome_under_the_same_key_is_found() -> None:
    history = History(said={("a0", 1): [1]})
    history.told(CALL, outcome_of())
    history.told_again("k", outcome_of())
    with pytest.raises(NotHeld, match="the same call has the same outcome"):
        history.told_again("k", outcome_of().model_copy(update={"round": 2}))


def test_an_announcement_that_the_journal_lacks_is_found(tmp_path: Path) -> None:
    from quorate_coordinator.journal.schema import JOURNAL_NAME
    from quorate_coordinator.service import Coordinator
    from quorate_coordinator.settings import Settings

    async def live() -> None:
        async with Coordinator(Settings(listen="memory:lacking", http="", state_dir=tmp_path)):
            pass

    asyncio.run(live())
    history = History(said={("a0", 1): [1]})
    history.check_journal(tmp_path / JOURNAL_NAME)
    history.told(CALL, outcome_of())
    with pytest.raises(NotHeld, match="announced is durable"):
        history.check_journal(tmp_path / JOURNAL_NAME)


def test_hours_pass_at_once_and_threads_are_waited_for() -> None:
    async def live(loop: VirtualLoop) -> tuple[float, float]:
        began_at = loop.time()
        await asyncio.sleep(7200.0)
        slept_s = loop.time() - began_at
        loop.await_threads(lambda: True)
        began_at = loop.time()
        # A thread that answers within the patience comes before a timer that is far away.
        async with asyncio.timeout(60.0):
            await asyncio.to_thread(time.sleep, 0.005)
        return slept_s, loop.time() - began_at

    loop = VirtualLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        wall_at = time.monotonic()
        slept_s, waited_s = runner.run(live(loop))
    assert slept_s == pytest.approx(7200.0)
    assert waited_s < 60.0
    assert time.monotonic() - wall_at < 60.0


def test_ways_are_shut_one_by_one() -> None:
    network = FleetNetwork(1)
    network.cut("agent-0001", 1, 0)
    assert network.is_cut("agent-0001/7", COORDINATOR_NAME)
    assert not network.is_cut(COORDINATOR_NAME, "agent-0001/7")
    assert not network.is_cut("agent-0002/8", COORDINATOR_NAME)
    network.cut("agent-0001", 1, 0)
    network.cut("agent-0001", -1, 0)
    assert network.is_cut("agent-0001/7", COORDINATOR_NAME), "faults that overlap are undone by themselves"
    network.cut("agent-0001", -1, 0)
    assert not network.is_cut("agent-0001/7", COORDINATOR_NAME)


def test_the_command_plays_it() -> None:
    ended = CliRunner().invoke(
        app, ["simulate", "--seed", "7", "--agents", "4", "--hours", "0.06", "--faults", "loss", "--engine", "quic"]
    )
    assert ended.exit_code == 0, ended.output
    assert ended.stdout.startswith("seed 7: 4 agents, 0.06 h: every invariant held\n")
    assert "trace" not in ended.stdout, "it is not the same to the byte"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--engine", "steam"), "--engine: is model or quic, and not 'steam'"),
        (("--engine", "quic", "--faults", "disk-full"), "--faults: 'disk-full' needs --engine model"),
        (("--engine", "quic", "--agents", "101"), "--agents: must be at most 100 with --engine quic, is 101"),
    ],
)
def test_what_it_cannot_play_is_named(arguments: tuple[str, ...], problem: str) -> None:
    ended = CliRunner().invoke(app, ["simulate", *arguments])
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr.splitlines()[-1].startswith(f"quorate: {problem}")


def test_a_plan_with_all_faults_leaves_out_what_it_cannot_play() -> None:
    plan = make_plan(1, agents=8, hours=0.08)
    assert {fault.kind for fault in plan.faults} == {*FAULT_KINDS}
    assert {fault.kind for fault in playable(plan).faults} == PLAYED
    with pytest.raises(ConfigurationError, match="suspend"):
        playable(plan, ["loss", "suspend"])

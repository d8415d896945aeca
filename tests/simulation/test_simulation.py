"""A whole fleet under virtual time: what must hold does, the same seed is the same run, and bugs are found."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quorate_coordinator.journal.prune import PruneReport, Retention, prune
from quorate_coordinator.journal.writer import _Committer
from quorate_coordinator.links import FrameLog
from quorate_coordinator.simulation.coordinator import Cores
from quorate_coordinator.simulation.plan import FAULT_KINDS, Plan
from quorate_coordinator.simulation.planning import make_plan
from quorate_coordinator.simulation.run import Report, simulate
from quorate_coordinator.simulation.shorten import shorten
from simulation.broken_cores import BROKEN

#: Seconds for seeds that nobody has tried before. `make simulate` looks for minutes.
SECONDS = float(os.environ.get("QUORATE_SIMULATE_SECONDS", "") or 10)

#: Seeds in which a bug has to show.
SEEDS = range(40)


def describe(report: Report) -> str:
    """What to say when a run fails."""
    plan, violation = report.plan, report.violation
    assert violation is not None
    again = f"quorate simulate --seed {plan.seed} --agents {plan.agents} --hours {plan.hours}"
    return "\n".join([f"{violation.invariant}: {violation.message}", f"again: {again}", *violation.trace])


@pytest.mark.parametrize(("seed", "agents"), [(1, 20), (2, 30), (3, 50), (4, 1), (5, 7)])
def test_what_must_hold_holds(seed: int, agents: int) -> None:
    report = simulate(make_plan(seed, agents=agents, hours=0.2))
    assert report.violation is None, describe(report)
    assert {*report.faults} == {*FAULT_KINDS}, "everything went wrong"
    assert report.announcements > 0


def test_the_fixed_seeds_together_see_everything() -> None:
    """Seeds that meet with nothing would prove nothing."""
    reports = [simulate(make_plan(seed, agents=20, hours=0.2)) for seed in range(8)]

    def seen(name: str) -> set[str]:
        return {what for report in reports for what in getattr(report, name)}

    assert seen("rounds") >= {"complete", "quorate", "expired", "failed", "cancelled"}
    assert seen("statuses") >= {"replied", "declined", "failed", "late", "lost", "cancelled"}
    assert seen("strays") >= {"late", "duplicate"}
    assert seen("calls") >= {
        "bad-request",
        "left",
        "reveal: revealed",
        "reveal: already-revealed",
        "reveal: unknown-round",
    }


@pytest.mark.timeout(0)
def test_fresh_seeds() -> None:
    first = random.SystemRandom().randrange(1 << 31)
    print(f"first seed: {first}")  # noqa: T201
    ends_at = time.monotonic() + SECONDS
    seed = first
    while time.monotonic() < ends_at:
        report = simulate(make_plan(seed, agents=20 + seed % 31, hours=0.2))
        assert report.violation is None, describe(report)
        seed += 1


@pytest.mark.parametrize("kind", FAULT_KINDS)
def test_each_fault_alone(kind: str) -> None:
    report = simulate(make_plan(11, agents=20, hours=0.15, kinds=(kind,)))
    assert report.violation is None, describe(report)
    assert {*report.faults} == {kind}


def test_without_faults_nobody_is_lost() -> None:
    report = simulate(make_plan(12, agents=40, hours=0.3, kinds=()))
    assert report.violation is None, describe(report)
    assert not report.faults
    assert report.statuses["lost"] == 0
    assert report.strays["duplicate"] == 0


_RUN = """
import sys
from quorate_coordinator.simulation.planning import make_plan
from quorate_coordinator.simulation.run import simulate
report = simulate(make_plan(int(sys.argv[1]), agents=40, hours=0.2))
print(report.digest, report.events, sorted(report.rounds.items()), sorted(report.calls.items()), report.violation)
"""


def test_the_same_seed_is_the_same_run_whatever_the_hash_seed() -> None:
    said = {
        subprocess.run(
            [sys.executable, "-c", _RUN, "77"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for hash_seed in ("0", "1", "4242")
    }
    assert len(said) == 1
    assert simulate(make_plan(77, agents=40, hours=0.2)).digest in said.pop()
    assert simulate(make_plan(78, agents=40, hours=0.2)).digest != simulate(make_plan(77, agents=40, hours=0.2)).digest


def test_a_plan_survives_json(tmp_path: Path) -> None:
    plan = make_plan(5, agents=30, hours=0.2)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert simulate(again).digest == simulate(plan).digest


def find(cores: Cores, kinds: Sequence[str] = FAULT_KINDS) -> Report:
    """The first run in which a bug shows."""
    for seed in SEEDS:
        report = simulate(make_plan(seed, agents=20, hours=0.2, kinds=kinds), cores)
        if report.violation is not None:
            return report
    raise AssertionError(f"not found within {len(SEEDS)} seeds")


@pytest.mark.parametrize("bug", BROKEN)
def test_a_bug_is_found_and_its_plan_shortened(bug: str) -> None:
    cores, invariants = BROKEN[bug]
    report = find(cores)
    assert report.violation is not None
    assert report.violation.invariant in invariants, describe(report)
    shorter = shorten(report, cores, seconds=60.0)
    assert shorter.violation is not None
    assert shorter.violation.invariant == report.violation.invariant
    assert shorter.plan.size <= max(6, report.plan.size // 10), f"{report.plan.size} became {shorter.plan.size}"
    # It is a plan like any other: what the file holds fails in the same way.
    again = simulate(Plan.from_json(shorter.plan.to_json()), cores)
    assert again.violation == shorter.violation
    assert again.digest == shorter.digest
    assert simulate(shorter.plan).violation is None, "it is the bug, and not the plan"


@pytest.mark.parametrize(
    ("bug", "kind"),
    [
        ("the time of day", "clock-jump"),
        ("a clock from before the restart", "coordinator-crash"),
        ("a key in flight is not known", "operator-break"),
    ],
)
def test_a_bug_shows_with_its_fault_alone(bug: str, kind: str) -> None:
    cores, invariants = BROKEN[bug]
    report = find(cores, kinds=(kind,))
    assert report.violation is not None
    assert report.violation.invariant in invariants, describe(report)
    assert simulate(report.plan.only(faults=()), cores).violation is None, "not without it"


def _write_in_pieces(committer: _Committer, rows: Sequence[tuple[object, ...]], snapshots: list[Any]) -> None:
    """Each record in a transaction of its own, the last first."""
    for row in reversed(rows):
        _WRITE(committer, [row], [])
    _WRITE(committer, [], snapshots)


_WRITE = _Committer._write


def _prune_all(connection: Any, retention: Retention, now_s: float) -> Iterator[PruneReport]:
    return prune(connection, replace(retention, rounds=()), now_s)


def _prune_early(connection: Any, retention: Retention, now_s: float) -> Iterator[PruneReport]:
    return prune(connection, retention, now_s + 60.0)


@pytest.mark.parametrize(
    ("place", "broken", "invariant"),
    [
        ("journal.writer._Committer._write", _write_in_pieces, "the journal is what was recorded"),
        ("simulation.journal_disk.prune", _prune_all, "nothing in use is pruned"),
        ("simulation.journal_disk.prune", _prune_early, "nothing young is pruned"),
    ],
)
def test_a_bug_of_the_journal_is_found(
    place: str, broken: object, invariant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"quorate_coordinator.{place}", broken)
    report = find(Cores(), kinds=("coordinator-crash", "clock-jump", "burst"))
    assert report.violation is not None
    assert report.violation.invariant == invariant, describe(report)
    shorter = shorten(report, seconds=8.0)
    assert shorter.plan.size <= report.plan.size // 2, f"{report.plan.size} became {shorter.plan.size}"
    monkeypatch.undo()
    assert simulate(shorter.plan).violation is None


def test_what_is_not_sent_again_after_a_break_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    resume = FrameLog.resume

    def forget(log: FrameLog, received: int) -> tuple[list[bytes], bool]:
        return [], resume(log, received)[1]

    monkeypatch.setattr(FrameLog, "resume", forget)
    violation = find(Cores()).violation
    assert violation is not None
    assert violation.invariant == "what is kept comes once and in order"

"""`quorate bench rounds`: that it runs, what it says and writes, what it leaves behind. Never how fast."""

import json
import os
import signal
from pathlib import Path

import pytest

from links import until
from processes import processes_with, quorate, running
from quorate_coordinator.bench.rounds.run import SCENARIOS, Scenario
from quorate_coordinator.bench.rounds.side import Turn


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def test_both_sides_are_measured_and_written_and_nothing_is_left(tmp_path: Path, scratch: Path) -> None:
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    variable, value = "BENCH_TEST_ROUNDS", f"{os.getpid()}"
    ended = await quorate(
        *("bench", "rounds", "--quick", "--json", str(numbers), "--picture", str(picture)),
        *("--only", " 6 agents"),
        COLUMNS="160",
        TMPDIR=str(scratch),
        **{variable: value},
    )
    assert (ended.code, ended.err) == (0, "")
    result = json.loads(numbers.read_text())
    assert result["benchmark"] == "rounds"
    assert result["machine"]["quick"] is True
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        "rounds, 6 agents, 1 in flight",
        "round p50, 6 agents, 1 in flight",
        "round p99, 6 agents, 1 in flight",
        "CPU of a reply, 6 agents, 1 in flight",
        "rounds, 6 agents, 16 in flight",
        "round p50, 6 agents, 16 in flight",
        "round p99, 6 agents, 16 in flight",
        "CPU of a reply, 6 agents, 16 in flight",
        "journal's cost, 6 agents, 16 in flight",
        "records of a round, 6 agents, 16 in flight",
        "commits of a round, 6 agents, 16 in flight",
        "written of a round, 6 agents, 16 in flight",
    ]
    assert all(name in ended.out for name in rows)
    for name, row in rows.items():
        is_compared = name.startswith(("round", "CPU"))
        assert row["peer"] == ("journal off" if is_compared else None)
        assert not name.startswith("round") or (row["value"] > 0 and row["peer_value"] > 0)
    assert rows["journal's cost, 6 agents, 16 in flight"]["target"] == 15.0
    # One when it opens and one when it closes; whatever was asked last has closed.
    assert rows["records of a round, 6 agents, 16 in flight"]["value"] == 2.0
    assert 0 < rows["commits of a round, 6 agents, 16 in flight"]["value"] <= 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert names_in(scratch) == []
    assert processes_with(variable, value) == {}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--only", "warp"), "--only: no row has 'warp' in its name; there are: rounds, 6 agents, 1 in flight; "),
        (("--only", " "), "--only: is empty; give a part of a row's name, such as --only p50"),
        (("--json", "absent/x.json"), "--json: cannot write absent/x.json: there is no directory absent"),
    ],
)
async def test_what_is_wrong_is_said_before_anything_is_measured(arguments: tuple[str, ...], problem: str) -> None:
    ended = await quorate("bench", "rounds", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.line.startswith(f"quorate: {problem}")


async def test_no_process_is_left_when_it_is_ended(scratch: Path) -> None:
    variable, value = "BENCH_TEST_ENDED", f"{os.getpid()}"
    async with running("bench", "rounds", "--only", " 6 agents", TMPDIR=str(scratch), **{variable: value}) as process:
        # The benchmark, two coordinators and a process with a crowd for each.
        await until(lambda: len(processes_with(variable, value)) == 5)
        process.send_signal(signal.SIGTERM)
        ended = await process.end()
    assert (ended.code, ended.out, ended.err.strip()) == (1, "", "quorate: ended by SIGTERM")
    await until(lambda: not processes_with(variable, value))
    assert names_in(scratch) == []


def test_rows_have_names_of_their_own() -> None:
    names = [name for scenario in SCENARIOS for name in scenario.names]
    assert len(set(names)) == len(names) == 36


def test_the_cost_is_that_of_neighbours() -> None:
    """A machine that is twice as fast for a while changes what both do, and not what the journal costs."""
    off = [Turn([0.01] * rounds, 1.0) for rounds in (100, 200, 100)]
    on = [Turn([0.01] * rounds, 1.0, records=rounds, commits=rounds // 2) for rounds in (90, 180, 90)]
    rows = {row.name.partition(",")[0]: row.value for row in Scenario(6, 16).rows(on, off)}
    assert rows["journal's cost"] == pytest.approx(10.0)
    assert rows["rounds"] == 90.0
    assert (rows["records of a round"], rows["commits of a round"]) == (1.0, 0.5)

"""`quorate bench bodies`: that it runs, what it says and writes, what it leaves behind. Never how fast."""

import json
import os
import signal
from pathlib import Path

import pytest

from links import until
from processes import processes_with, quorate, running
from quorate_coordinator.bench.bodies.loop_watch import LoopTurn, WatchedSelector, read_turns, wait_quantile
from quorate_coordinator.bench.bodies.plan import quick
from quorate_coordinator.bench.bodies.run import Turns
from quorate_coordinator.bench.bodies.side import Turn


async def test_all_is_measured_and_written_and_nothing_is_left(tmp_path: Path, scratch: Path) -> None:
    numbers = tmp_path / "numbers.json"
    variable, value = "BENCH_TEST_BODIES", f"{os.getpid()}"
    ended = await quorate(
        *("bench", "bodies", "--quick", "--size", "16", "--agents", "2", "--json", str(numbers)),
        COLUMNS="160",
        TMPDIR=str(scratch),
        **{variable: value},
    )
    assert (ended.code, ended.err) == (0, "--picture FILE.png draws it, --json FILE keeps the numbers\n")
    result = json.loads(numbers.read_text())
    assert result["benchmark"] == "bodies"
    assert result["machine"]["quick"] is True
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        *(f"small round alone, {what}" for what in ("p50", "p99", "max")),
        *(f"small round beside 16 MiB for 2 agents, {what}" for what in ("p50", "p99", "max")),
        "delay of a small round, p99",
        "coordinator's loop busy, p99",
        "coordinator's loop busy or waiting, p99",
        "coordinator's loop busy, longest",
        "body, both ways together",
        *(f"memory growth, {name}" for name in ("coordinator", "agents", "operator")),
    ]
    assert all(name in ended.out for name in rows)
    for name, row in rows.items():
        is_compared = "alone" not in name and "memory" not in name
        assert row["peer"] == ("TLS relay" if is_compared else None)
        if is_compared and "delay" not in name:
            assert row["value"] > 0
            assert row["peer_value"] > 0
    assert rows["delay of a small round, p99"]["target"] == 5.0
    assert rows["memory growth, coordinator"]["target"] == 24.0
    assert list(scratch.iterdir()) == []  # noqa: ASYNC240  an empty directory
    assert processes_with(variable, value) == {}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--size", "1000", "--agents", "8"), "--size: for 8 agents it may be 500, got 1000"),
        (("--json", "absent/x.json"), "--json: cannot write absent/x.json: there is no directory absent"),
    ],
)
async def test_what_is_wrong_is_said_before_anything_is_measured(arguments: tuple[str, ...], problem: str) -> None:
    ended = await quorate("bench", "bodies", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.line == f"quorate: {problem}"


async def test_no_process_is_left_when_it_is_ended(scratch: Path) -> None:
    variable, value = "BENCH_TEST_ENDED", f"{os.getpid()}"
    async with running("bench", "bodies", "--size", "4000", TMPDIR=str(scratch), **{variable: value}) as process:
        # The benchmark, a coordinator, two agents and an operator.
        await until(lambda: len(processes_with(variable, value)) == 5)
        process.send_signal(signal.SIGTERM)
        ended = await process.end()
    assert (ended.code, ended.out, ended.err.strip()) == (1, "", "quorate: ended by SIGTERM")
    await until(lambda: not processes_with(variable, value))
    assert list(scratch.iterdir()) == []  # noqa: ASYNC240  an empty directory


def test_what_becomes_due_in_a_turn_waits_for_the_rest_of_it() -> None:
    """One turn of a second in ten: of what comes, nine tenths do not wait, the rest for up to a second."""
    assert wait_quantile([1.0], 10.0, 0.89) == pytest.approx(0.0, abs=1e-5)
    assert wait_quantile([1.0], 10.0, 0.95) == pytest.approx(0.5, abs=1e-5)
    assert wait_quantile([1.0], 10.0, 1.0) == pytest.approx(1.0, abs=1e-5)
    # Cut into a thousand, it keeps nobody waiting for long.
    assert wait_quantile([0.001] * 1000, 10.0, 1.0) == pytest.approx(0.001, abs=1e-5)
    assert wait_quantile([], 10.0, 0.99) == 0.0


def test_a_loops_turns_are_noted(tmp_path: Path) -> None:
    selector = WatchedSelector(tmp_path / "loop")
    try:
        for _ in range(3):
            selector.select(0)
    finally:
        selector.close()
    # The last turn has not ended.
    turns = read_turns(tmp_path / "loop", 0.0, float("inf"))
    assert len(turns) == 2
    assert all(turn.length_s > 0 and turn.off_s >= 0 for turn in turns)
    assert read_turns(tmp_path / "loop", turns[1].began_s, float("inf")) == turns[1:]


def test_time_without_a_processor_is_not_the_coordinators_doing() -> None:
    held = [LoopTurn(0.0, length_s=0.5, off_s=0.499)]
    turns = Turns(
        alone=[Turn([0.002], 1.0, [])],
        body=[Turn([0.010], 1.0, held, {"coordinator": 3 << 20})],
        relay=[Turn([0.006], 1.0, [])],
    )
    rows = {row.name: row for row in turns.rows(quick(16 << 20, 1))}
    delay = rows["delay of a small round, p99"]
    assert (delay.value, delay.peer_value) == (pytest.approx(8.0), pytest.approx(4.0))
    assert delay.met is False
    assert rows["coordinator's loop busy, longest"].value == pytest.approx(1.0)
    assert rows["coordinator's loop busy or waiting, p99"].value == pytest.approx(490.0, abs=0.01)
    assert rows["memory growth, coordinator"].value == 3.0

"""`quorate simulate` as a command: what it prints, how it ends, and what it writes when something does not hold."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from quorate_coordinator.cli.app import app
from quorate_coordinator.quic_simulation import run as quic_run
from quorate_coordinator.simulation import planning
from simulation.broken_cores import BROKEN

SMALL = ("--agents", "8", "--hours", "0.08")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", *arguments])


def test_a_run_is_summed_up() -> None:
    ended = run("--seed", "7", *SMALL)
    assert ended.exit_code == 0, ended.output
    first, *rows = ended.stdout.splitlines()
    assert first == "seed 7: 8 agents, 0.08 h: every invariant held"
    assert [row.split()[0] for row in rows] == ["events", "rounds", "statuses", "faults", "strays", "calls", "trace"]


def test_json_says_the_same_each_time() -> None:
    def said() -> dict[str, object]:
        ended = run("--seed", "7", *SMALL, "--json")
        assert ended.exit_code == 0, ended.output
        (one,) = json.loads(ended.stdout)["runs"]
        assert one.pop("elapsed_s") > 0
        assert one.pop("agent_hours_per_s") > 0
        return one  # type: ignore[no-any-return]

    one = said()
    assert one == said()
    assert one["violation"] is None
    assert one["seed"] == 7


def test_seeds_in_a_row_and_seeds_until_the_time_is_over() -> None:
    ended = run("--seed", "20", "--seeds", "3", *SMALL)
    assert ended.exit_code == 0, ended.output
    assert ended.stdout.startswith("seeds 20 to 22: ")
    ended = run("--budget", "500ms", *SMALL, "--json")
    assert ended.exit_code == 0, ended.output
    seeds = [one["seed"] for one in json.loads(ended.stdout)["runs"]]
    assert seeds == list(range(seeds[0], seeds[0] + len(seeds)))


def test_only_what_is_asked_for_goes_wrong() -> None:
    ended = run("--seed", "1", *SMALL, "--faults", "loss,agent-crash", "--json")
    assert {*json.loads(ended.stdout)["runs"][0]["faults"]} == {"loss", "agent-crash"}
    ended = run("--seed", "1", *SMALL, "--faults", "none", "--json")
    assert json.loads(ended.stdout)["runs"][0]["faults"] == {}


def test_the_help_says_what_is_taken() -> None:
    shown = " ".join(run("--help").stdout.split())
    assert f"Virtual hours, {planning.HOURS_MIN:g} to {planning.HOURS_MAX:g}." in shown
    assert f"Agents in the fleet, 1 to {planning.AGENTS_MAX}." in shown
    assert f"with up to {quic_run.AGENTS_MAX} agents." in shown
    ended = run("--seed", "1", "--agents", "1", "--hours", f"{planning.HOURS_MIN:g}")
    assert ended.exit_code == 0, ended.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--faults", "loss,rain"), "--faults: 'rain' is not one of all, none, loss, "),
        (("--hours", "0.0599"), "--hours: must be from 0.06 to 1000, is 0.0599"),
        (("--hours", "nan"), "--hours: must be from 0.06 to 1000, is nan"),
        (("--hours", "inf"), "--hours: must be from 0.06 to 1000, is inf"),
        (("--agents", "0"), "--agents: must be from 1 to 16384, is 0"),
        (("--agents", "16385"), "--agents: must be from 1 to 16384, is 16385"),
        (("--agents", "101", "--engine", "quic"), "--agents: must be at most 100 with --engine quic, is 101"),
        (("--budget", "soon"), "--budget: 'soon' is not a time"),
        (("--budget", "1s", "--seeds", "2"), "--budget: says when to stop; --seeds does, too"),
        (("--plan", "absent.json"), "--plan: cannot read absent.json: No such file or directory"),
        (("--plan", "."), "--plan: cannot read .: Is a directory"),
        (("--plan", "garbage.json"), "--plan: garbage.json is not UTF-8 text (at byte 1)"),
        (("--plan", "broken.json"), "--plan: is no plan ("),
        (("--plan", "old.json"), "--plan: is of version 0; this is version 2"),
        (("--plan", "old.json", "--seed", "1"), "--plan: has its own seed"),
    ],
)
def test_what_is_wrong_is_named(
    arguments: tuple[str, ...], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text('{"version": 2}')
    Path("garbage.json").write_bytes(b"{\xff")
    Path("old.json").write_text('{"version": 0}')
    ended = run(*arguments)
    assert (ended.exit_code, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"quorate: {problem}")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_violation_is_shortened_and_can_be_played_again(
    as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores, (invariant,) = BROKEN["an agent with two results"]
    monkeypatch.setattr("quorate_coordinator.simulation.run.Cores", lambda: cores)
    monkeypatch.chdir(tmp_path)
    ended = run("--seed", "1", "--seeds", "20", "--agents", "20", "--hours", "0.2", *(["--json"] * as_json))
    assert ended.exit_code == 1, ended.output
    (file,) = tmp_path.iterdir()
    command = f"quorate simulate --plan {file.name}"
    if as_json:
        said = json.loads(ended.stdout)
        assert said["command"] == command
        assert said["shortened"]["violation"]["invariant"] == invariant
        assert said["whole"].endswith("--agents 20 --hours 0.2 --faults all")
    else:
        assert f"violated: {invariant}" in ended.stdout
        assert f"again, shortened: {command}\n" in ended.stdout
    again = run("--plan", file.name)
    assert again.exit_code == 1
    assert f"violated: {invariant}" in again.stdout
    # Without the bug the same plan holds.
    monkeypatch.undo()
    assert run("--plan", str(file)).exit_code == 0

"""The command line of `quorate-agent`: what is wrong with it is one clear line and exit code 2."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from quorate_agent import commands
from quorate_agent.agent import Agent

AGENTS = """
from quorate_agent import Agent
agent = Agent("tree-1", labels={"kind": "tree"})
nameless = Agent()

@agent.task("classify")
@nameless.task("classify")
def classify(body): return body

def make(depth: int = 3):
    made = Agent(f"depth-{depth}")
    made.task("classify")(classify)
    return made
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "cli_test_agents.py").write_text(AGENTS)
    (tmp_path / "cli_test_broken.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(
        commands.logs, "configure", lambda *arguments: None
    )  # it is the process's, and has tests of its own
    monkeypatch.setenv("QUORATE_STATE_DIR", str(tmp_path / "nothing-here"))
    monkeypatch.setenv("QUORATE_TOKEN", "x")
    yield tmp_path
    sys.modules.pop("cli_test_agents", None)
    structlog.reset_defaults()


def invoke(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(commands.app, arguments)
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["cli_test_agents"], "'cli_test_agents' is not MODULE:ATTRIBUTE"),
        (["absent:agent"], "there is no module 'absent'"),
        (["absent.py:agent"], "there is no file absent.py"),
        (["cli_test_agents:absent"], "has no attribute 'absent'; it has the agents agent, nameless"),
        (["cli_test_agents:classify"], "needs the argument 'body'"),
        (["cli_test_agents:make", "--set", "width=3"], "has no argument 'width'; it takes depth"),
        (["cli_test_agents:make", "--set", "depth"], "--set 'depth' is not NAME=VALUE"),
        (["cli_test_agents:agent", "--set", "depth=3"], "is an Agent already"),
        (["cli_test_agents:agent", "--label", "zone"], "--label 'zone' is not NAME=VALUE"),
        (["cli_test_agents:agent", "--label", "two words=x"], "label key is 'two words'"),
        (["cli_test_agents:agent", "--id", "two words"], "--id is 'two words'"),
        (["cli_test_agents:agent", "--concurrency", "1000"], "from 1 to 256"),
        (["cli_test_agents:agent", "--processes", "1000"], "from 0 (threads) to 64"),
        (["cli_test_agents:agent", "--processes", "2", "--concurrency", "1"], "of 2 processes some would never work"),
        (["cli_test_agents:agent", "--coordinator", "http://localhost"], "does not begin with quic://"),
        (["cli_test_agents:agent", "--ca", "absent.pem"], "absent.pem: no such file"),
        (["cli_test_agents:agent", "--token-file", "absent"], "absent: no such file"),
        (["cli_test_agents:agent", "--token-file", "cli_test_agents.py"], "chmod 600 cli_test_agents.py"),
    ],
)
def test_a_wrong_command_line_is_one_clear_line_and_2(folder: Path, arguments: list[str], problem: str) -> None:
    (folder / "cli_test_agents.py").chmod(0o644)
    code, out, err = invoke("run", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("quorate-agent: ")
    assert err.count("\n") == 1
    assert problem in err


@pytest.mark.parametrize("arguments", [[], ["run"], ["run", "cli_test_agents:agent", "--log-level", "loud"], ["fly"]])
def test_what_the_parser_refuses_is_2_too(arguments: list[str]) -> None:
    code, _, _ = invoke(*arguments)
    assert code == 2


def test_no_token_anywhere_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUORATE_TOKEN")
    code, _, err = invoke("run", "cli_test_agents:agent")
    assert code == 2
    assert "--token-file" in err


def test_a_module_that_cannot_be_imported_shows_its_traceback_only_when_asked() -> None:
    code, _, err = invoke("run", "cli_test_broken:agent")
    assert code == 2
    assert err.count("\n") == 1
    assert "No module named 'nowhere_to_be_found'" in err
    code, _, err = invoke("run", "cli_test_broken:agent", "--log-level", "debug")
    assert code == 2
    assert "Traceback" in err


def test_check_loads_and_lists() -> None:
    code, out, _ = invoke("check", "cli_test_agents:make", "--set", "depth=9")
    assert (code, out) == (
        0,
        "name: depth-9\nconcurrency: 1\nprocesses: none, plain functions run in threads\ntask: classify\n",
    )
    code, out, _ = invoke("check", "cli_test_agents:nameless")
    assert out.startswith("name: (chosen when it runs)\n")
    code, _, err = invoke("check", "cli_test_agents:absent")
    assert code == 2
    assert "has no attribute" in err


@pytest.mark.parametrize(
    ("given", "name", "target", "chosen"),
    [
        ("given", "own", "m:agent", r"given"),
        (None, "own", "m:agent", r"own"),
        (None, None, "folder/tree.py:agent", r".+-tree-\d+"),
        (None, None, "package.tree:agent", r".+-tree-\d+"),
        (None, None, "package.tree:forest", r".+-forest-\d+"),
        (None, None, "package.tree:Holder.inner", r".+-Holder\.inner-\d+"),
    ],
)
def test_the_id_is_chosen_so_that_it_tells_something(
    given: str | None, name: str | None, target: str, chosen: str
) -> None:
    assert re.fullmatch(chosen, commands._choose_id(given, Agent(name), target))

"""The commands as processes on a terminal that interrupts them, has few characters, or no room for what they say."""

import asyncio
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from processes import PATIENCE_S, QUORATE, clean_environment, coordinator_process

QUORATE_AGENT = str(Path(sys.executable).with_name("quorate-agent"))
MODULES = {QUORATE: "quorate_coordinator", QUORATE_AGENT: "quorate_agent"}

#: Sends the process Ctrl-C as soon as it imports a module.
INTERRUPTING = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_MODULE"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
"""

ECHO = "from quorate_agent import Agent\nagent = Agent('echo')\n@agent.task('echo')\ndef echo(body): return body\n"


def run(
    *command: str,
    redirected: str = "",
    stdout: int = subprocess.PIPE,
    encoding: str = "utf-8",
    **environ: str,
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; `redirected` is what a shell would have behind it, such as `>&-`."""
    arguments = ["sh", "-c", f'exec "$0" "$@" {redirected}', *command] if redirected else list(command)
    return subprocess.run(
        arguments,
        env=clean_environment(**environ),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        encoding=encoding,
        timeout=PATIENCE_S,
        check=False,
    )


# --- Ctrl-C --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_script", [True, False])
@pytest.mark.parametrize(
    ("command", "arguments", "module"),
    [
        (QUORATE, "--version", "typer"),
        (QUORATE, "--version", "quorate_coordinator.cli.simulate_command"),
        (QUORATE, "coordinator", "quorate_coordinator.daemon"),
        (QUORATE_AGENT, "--version", "structlog"),
        (QUORATE_AGENT, "--version", "quorate_agent.agent"),
        (QUORATE_AGENT, "run DIR/echo.py:agent", "quorate_agent.service"),
    ],
)
def test_ctrl_c_while_modules_are_imported(
    tmp_path: Path, command: str, arguments: str, module: str, is_script: bool
) -> None:
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTING)
    (tmp_path / "echo.py").write_text(ECHO)
    ended = run(
        *([command] if is_script else [sys.executable, "-m", MODULES[command]]),
        *arguments.replace("DIR", str(tmp_path)).split(),
        PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        INTERRUPTED_MODULE=module,
        QUORATE_STATE_DIR=str(tmp_path / "state"),
        QUORATE_LISTEN="127.0.0.1:0",
        QUORATE_HTTP="",
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", f"{Path(command).name}: interrupted\n")


# --- characters ----------------------------------------------------------------------------------


def test_json_is_the_same_in_every_encoding(tmp_path: Path) -> None:
    state_dir = str(tmp_path / "é日🙂")
    ended = run(
        *(QUORATE, "coordinator", "--check"),
        encoding="latin-1",
        PYTHONUTF8="0",
        PYTHONIOENCODING="latin-1",
        QUORATE_STATE_DIR=state_dir,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert r"é\u65e5\ud83d\ude42" in ended.stdout
    assert json.loads(ended.stdout)["state_dir"] == state_dir


async def test_a_terminal_without_unicode_gets_escapes(tmp_path: Path) -> None:
    async with coordinator_process(tmp_path / "state") as coordinator:
        terminal, stdout = pty.openpty()
        try:
            ended = await asyncio.to_thread(
                run,
                *(QUORATE, "status", "--coordinator", coordinator.url),
                stdout=stdout,
                PYTHONUTF8="0",
                PYTHONIOENCODING="ascii",
                QUORATE_STATE_DIR=str(tmp_path / "state"),
                COLUMNS="80",
            )
            shown = os.read(terminal, 65_536).decode("ascii")
        finally:
            os.close(terminal)
            os.close(stdout)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert rf"{coordinator.url} \u00b7 quorate/" in shown


# --- standard output that takes nothing ----------------------------------------------------------


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", [QUORATE, QUORATE_AGENT])
def test_a_full_disk_is_one_line(command: str, buffered: bool) -> None:
    ended = run(command, "--version", redirected=">/dev/full", PYTHONUNBUFFERED="" if buffered else "1")
    name = Path(command).name
    assert ended.returncode == 1
    assert ended.stderr == f"{name}: standard output cannot be written: No space left on device\n"


def test_what_an_agent_prints_shows_at_once_where_that_is_wanted(tmp_path: Path) -> None:
    """And nothing of it is lost when it is killed."""
    (tmp_path / "said.py").write_text("print('here')\nimport os; os.kill(os.getpid(), 9)\n")
    ended = run(QUORATE_AGENT, "check", f"{tmp_path / 'said.py'}:agent", PYTHONUNBUFFERED="1")
    assert (ended.returncode, ended.stdout) == (-9, "here\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_pipe_that_does_not_block_gets_all(tmp_path: Path, unbuffered: str) -> None:
    """Whoever reads it has made it so, for both ends."""
    (tmp_path / "much.py").write_text("print('x' * 1_000_000)\nimport os; os._exit(print(end='', flush=True) or 7)\n")
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    arguments = [QUORATE_AGENT, "check", f"{tmp_path / 'much.py'}:agent"]
    env = clean_environment(PYTHONUNBUFFERED=unbuffered)
    with subprocess.Popen(arguments, env=env, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            assert len(pipe.read()) == 1_000_001
        assert process.wait(PATIENCE_S) == 7


async def test_a_full_disk_under_what_rich_prints(tmp_path: Path) -> None:
    async with coordinator_process(tmp_path / "state") as coordinator:
        ended = await asyncio.to_thread(
            run,
            *(QUORATE, "status", "--coordinator", coordinator.url),
            redirected=">/dev/full",
            QUORATE_STATE_DIR=str(tmp_path / "state"),
        )
    assert ended.returncode == 1
    assert ended.stderr == "quorate: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("command", [QUORATE, QUORATE_AGENT])
def test_nothing_is_said_when_nobody_reads(command: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = run(command, "--help", stdout=writing)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, "")


@pytest.mark.parametrize(
    ("closed", "arguments", "code", "problem"),
    [
        (">&-", "--version", 1, "quorate: standard output cannot be written: Bad file descriptor\n"),
        ("<&-", "ask t -", 2, "quorate: standard input: cannot be read: Bad file descriptor\n"),
        ("<&-", "feed - --task t", 2, "quorate: standard input: cannot be read: Bad file descriptor\n"),
        ("<&- >&-", "status --coordinator nowhere", 2, "quorate: coordinator address: 'nowhere' does not begin"),
        ("2>&-", "--version", 0, ""),
        ("2>&-", "status --coordinator nowhere", 2, ""),
    ],
)
def test_streams_that_are_closed(tmp_path: Path, closed: str, arguments: str, code: int, problem: str) -> None:
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "token").chmod(0o600)
    ended = run(QUORATE, *arguments.split(), redirected=closed, QUORATE_STATE_DIR=str(tmp_path))
    assert ended.returncode == code
    assert ended.stderr.startswith(problem) if problem else not ended.stderr
    assert "Traceback" not in ended.stderr

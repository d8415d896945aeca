"""The command `quorate-agent` as processes: what it prints, how it exits, what signals do."""

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_peer import PATIENCE_S, Peer, PeerSession, listening_peer
from quorate_agent import events as ev
from quorate_agent.commands import _EXIT_CODES
from quorate_protocol.errors import Code
from quorate_protocol.messages import Drain, Refusal

AGENTS = """
import asyncio, threading, time
from quorate_agent import Agent

agent = Agent("tree-1", labels={"kind": "tree"}, concurrency=2)
nameless = Agent()

@agent.feedback("classify")
def learn(body, truth): pass

@agent.task("classify")
@nameless.task("classify")
def classify(body):
    if body == "raise":
        raise ValueError("no such class")
    return body

@agent.task("stuck")
def stuck(body):
    threading.Event().wait()

@agent.task("block")
async def block(body):
    time.sleep(600)

def make(depth: int = 3):
    made = Agent(f"depth-{depth}")
    made.task("classify")(classify)
    return made
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "my_agents.py").write_text(AGENTS)
    return tmp_path / "work"


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[Peer]:
    async with listening_peer(tmp_path / "state") as peer:
        yield peer


class Command:
    """A process of `quorate-agent`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._out = asyncio.create_task(self._read(process.stdout))
        self._err = asyncio.create_task(self._read(process.stderr))

    @staticmethod
    async def _read(stream: asyncio.StreamReader | None) -> str:
        assert stream is not None
        return (await stream.read()).decode()

    async def end(self) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        async with asyncio.timeout(PATIENCE_S):
            await self.process.wait()
            return self.process.returncode or 0, await self._out, await self._err


@contextlib.asynccontextmanager
async def command(
    *arguments: str, cwd: Path, environ: dict[str, str] | None = None, module: bool = False
) -> AsyncIterator[Command]:
    """Starts the command as a user would, and makes sure that it is gone at the end."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("QUORATE_")}
    program = (
        [sys.executable, "-m", "quorate_agent"] if module else [str(Path(sys.executable).with_name("quorate-agent"))]
    )
    process = await asyncio.create_subprocess_exec(
        *program,
        *arguments,
        cwd=cwd,
        env={**clean, "QUORATE_STATE_DIR": str(cwd / "nothing-here"), **(environ or {})},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    started = Command(process)
    try:
        yield started
    finally:
        if process.returncode is None:
            process.kill()
        await started.end()


@contextlib.asynccontextmanager
async def running(peer: Peer, folder: Path, *arguments: str, target: str = "my_agents:agent") -> AsyncIterator[Command]:
    """Starts an agent that finds its credentials in the coordinator's state directory."""
    environ = {"QUORATE_STATE_DIR": str(peer.credentials.ca_file.parent), "QUORATE_COORDINATOR": peer.url}
    async with command("run", target, *arguments, cwd=folder, environ=environ) as started:
        yield started


def one_line(text: str) -> str:
    """The last line, which must be the only one that is no log."""
    lines = [line for line in text.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


def logged(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


# --- working and leaving -------------------------------------------------------------------------


async def test_an_agent_joins_with_what_it_finds_works_and_leaves_on_sigterm(peer: Peer, folder: Path) -> None:
    async with running(peer, folder, "--label", "zone=a") as agent:
        session = await peer.joined()
        token = peer.credentials.token_file.read_text().strip()
        assert session.hello.token == token
        assert (session.hello.id, session.hello.labels) == ("tree-1", {"kind": "tree", "zone": "a"})
        assert session.hello.tasks == ["classify", "stuck", "block"]
        session.ask(1, {"x": 1})
        assert await session.answer() == {"x": 1}
        session.ask(2, "raise")
        assert (await session.reply()).error == "ValueError: no such class"
        agent.process.send_signal(signal.SIGTERM)
        assert (await session.from_control.next(Drain)).reason == "SIGTERM"
        await session.expect_goodbye()
        code, out, err = await agent.end()
    assert (code, out) == (0, "")
    events = {entry["event"]: entry for entry in logged(err)}
    assert events["joined"]["session"] == "s-1"
    assert "Traceback" in events["handler_failed"]["exception"]
    assert "my_agents.py" in events["handler_failed"]["exception"]
    assert token not in err


async def test_what_was_set_and_named_reaches_the_agent(peer: Peer, folder: Path) -> None:
    async with running(peer, folder, "--set", "depth=7", target="my_agents.py:make"):
        assert (await peer.connected()).hello.id == "depth-7"
    async with running(peer, folder, "--id", "chosen", target="my_agents:make"):
        assert (await peer.connected()).hello.id == "chosen"
    async with running(peer, folder, target="my_agents:nameless") as agent:
        assert (await peer.connected()).hello.id.endswith(f"-nameless-{agent.process.pid}")


async def test_token_and_authorities_may_be_named(peer: Peer, folder: Path) -> None:
    (folder / "secret").write_text("another-token\n")
    (folder / "secret").chmod(0o600)
    arguments = ["run", "my_agents:agent", "--coordinator", peer.url, "--ca", str(peer.credentials.ca_file)]
    async with command(*arguments, "--token-file", "secret", cwd=folder):
        assert (await peer.connected()).hello.token == "another-token"
    async with command(*arguments, cwd=folder, environ={"QUORATE_TOKEN": "from-environment"}, module=True):
        assert (await peer.connected()).hello.token == "from-environment"


async def test_an_agent_that_is_drained_for_good_exits_as_after_a_signal(peer: Peer, folder: Path) -> None:
    async with running(peer, folder) as agent:
        session = await peer.joined(secret="hush-hush")
        session.ask(1, "x")
        session.send(session.control, Drain(reason="scaling down", stop=True))
        assert await session.answer() == "x"
        await session.expect_goodbye()
        code, out, err = await agent.end()
    assert (code, out) == (0, "")
    (ending,) = [entry for entry in logged(err) if entry["event"] == "agent_ended"]
    assert (ending["why"], ending["reason"]) == ("stopped", "scaling down")
    assert "hush-hush" not in err


async def stuck_session(peer: Peer, task: str) -> PeerSession:
    """An agent of which a handler runs that never ends."""
    session = await peer.joined(pulse_s=0.02)
    session.ask(1, None, task=task)
    if task == "block":
        # Its event loop stands still from the assignment on; before, it was pulsing.
        with contextlib.suppress(TimeoutError):
            while True:
                await asyncio.wait_for(session.connection.datagrams.receive(), 0.5)
    else:
        session.ask(2, "marker")
        assert await session.answer() == "marker"
    return session


async def test_a_handler_that_never_ends_does_not_hold_up_the_exit(peer: Peer, folder: Path) -> None:
    async with running(peer, folder, "--drain-timeout", "0.2") as agent:
        await stuck_session(peer, "stuck")
        began = time.monotonic()
        agent.process.send_signal(signal.SIGTERM)
        code, _, err = await agent.end()
    assert code == 0
    assert time.monotonic() - began < 10
    assert any(entry["event"] == "drain_timed_out" for entry in logged(err))


@pytest.mark.parametrize("task", ["stuck", "block"])
async def test_a_second_interrupt_ends_at_once(peer: Peer, folder: Path, task: str) -> None:
    async with running(peer, folder) as agent:
        session = await stuck_session(peer, task)
        agent.process.send_signal(signal.SIGINT)
        if task == "stuck":
            await session.from_control.next(Drain)
        else:
            # Nothing tells from outside that a process whose loop is blocked took its first signal,
            # and two that are pending at once count as one.
            while agent.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    agent.process.send_signal(signal.SIGINT)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(agent.process.wait(), 0.2)
        if agent.process.returncode is None:
            agent.process.send_signal(signal.SIGINT)
        code, _, err = await agent.end()
    assert code == 130
    assert "ending at once" in err


# --- endings that are errors ---------------------------------------------------------------------


async def test_a_wrong_token_ends_with_3(peer: Peer, folder: Path) -> None:
    async with running(peer, folder) as agent:
        session = await peer.connected()
        session.send(session.control, Refusal(reason="unauthenticated", message="wrong token"))
        code, _, err = await agent.end()
    assert code == 3
    line = one_line(err)
    assert line.startswith("quorate-agent: the coordinator refused this agent (unauthenticated): wrong token")
    assert "--token-file" in line
    assert session.hello.token not in err


async def test_being_replaced_ends_with_4(peer: Peer, folder: Path) -> None:
    async with running(peer, folder) as agent:
        session = await peer.joined()
        await session.connection.close(Code.REPLACED, "")
        code, _, err = await agent.end()
    assert code == 4
    assert one_line(err) == "quorate-agent: another agent took the id tree-1"


async def test_no_coordinator_is_retried_and_told_and_ends_with_5_where_asked(tmp_path: Path, folder: Path) -> None:
    async with listening_peer(tmp_path / "gone") as gone:
        pass
    async with running(gone, folder, "--max-wait", "0.6") as agent:
        code, _, err = await agent.end()
    assert code == 5
    assert f"no coordinator at {gone.url} within 0.6 s" in one_line(err)
    retries = [entry for entry in logged(err) if entry["event"] == "cannot_connect"]
    assert all(re.fullmatch(r"cannot connect to .*, retrying in \d\.\d s", entry["message"]) for entry in retries)
    assert [entry["attempt"] for entry in retries] == list(range(1, len(retries) + 1))
    assert len(retries) >= 2


async def test_an_untrusted_coordinator_is_named(peer: Peer, tmp_path: Path, folder: Path) -> None:
    async with listening_peer(tmp_path / "other") as other:
        ca = other.credentials.ca_file
    async with running(peer, folder, "--ca", str(ca), "--max-wait", "0.5") as agent:
        code, _, err = await agent.end()
    assert code == 5
    assert f"not trusted by the authorities in {ca}" in one_line(err)


def test_every_ending_has_an_exit_code_of_its_own() -> None:
    assert set(_EXIT_CODES) == set(ev.EndingKind)
    assert len(set(_EXIT_CODES.values())) == len(_EXIT_CODES)


# --- wrong command lines -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["absent:agent"], "there is no module 'absent'"),
        (["my_agents:agent", "--coordinator", "http://localhost"], "does not begin with quic://"),
        (["my_agents:agent", "--token-file", "my_agents.py"], "chmod 600 my_agents.py"),
    ],
)
async def test_a_wrong_command_line_is_one_clear_line_and_2(folder: Path, arguments: list[str], problem: str) -> None:
    (folder / "my_agents.py").chmod(0o644)
    async with command("run", *arguments, cwd=folder, environ={"QUORATE_TOKEN": "x"}) as agent:
        code, out, err = await agent.end()
    assert (code, out) == (2, "")
    line = one_line(err)
    assert line.startswith("quorate-agent: ")
    assert problem in line


async def test_no_token_anywhere_is_explained(folder: Path) -> None:
    async with command("run", "my_agents:agent", cwd=folder) as agent:
        code, _, err = await agent.end()
    assert code == 2
    assert "--token-file" in one_line(err)


# --- looking -------------------------------------------------------------------------------------


async def test_check_lists_tasks_without_a_coordinator(folder: Path) -> None:
    async with command("check", "my_agents:agent", cwd=folder) as agent:
        assert await agent.end() == (
            0,
            "name: tree-1\nconcurrency: 2\nprocesses: none, plain functions run in threads\nlabel: kind=tree\n"
            "task: classify (learns from feedback)\ntask: stuck\ntask: block\n",
            "",
        )


async def test_help_and_version(folder: Path) -> None:
    async with command("--version", cwd=folder) as agent:
        code, out, _ = await agent.end()
        assert code == 0
        assert re.fullmatch(r"quorate-agent \d+\.\d+\.\d+\n", out)
    async with command("run", "--help", cwd=folder) as agent:
        code, out, _ = await agent.end()
        assert code == 0
        for option in (
            "--coordinator",
            "--id",
            "--label",
            "--token-file",
            "--ca",
            "--set",
            "--concurrency",
            "--processes",
            "--max-wait",
        ):
            assert option in out

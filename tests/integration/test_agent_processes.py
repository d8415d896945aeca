"""Agents with processes, started as users start them, in the fleet of a real coordinator."""

import asyncio
import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from coordination import Fleet, coordinating, until
from processes import PATIENCE_S, Process, clean_environment
from quorate_protocol.limits import BODY_BYTES_MAX
from quorate_protocol.messages import Outcome

AGENTS = """
import asyncio, itertools, os, sys, time
from pathlib import Path
from quorate_agent import Agent

def make(processes: int = 1, concurrency: int = 0):
    agent = Agent("worker", processes=processes, concurrency=concurrency or None)
    truths = []

    @agent.task("do")
    def do(body, context):
        what, argument = body
        if what == "spin":
            end = time.monotonic() + argument
            while time.monotonic() < end:
                pass
        elif what == "hold":
            sum(itertools.repeat(1, argument))
        elif what == "began":
            Path(argument + ".tmp").write_text(str(os.getpid()))
            os.rename(argument + ".tmp", argument)
            sum(itertools.repeat(1, 10 ** 14))
        elif what == "wait":
            Path(argument).touch()
            while not Path(argument + "-go").exists():
                time.sleep(0.01)
        elif what == "cancelled":
            Path(argument).touch()
            if context.cancelled.wait(60):
                Path(argument + "-told").touch()
        elif what == "raise":
            raise ValueError(argument)
        elif what == "kill":
            os.kill(os.getpid(), argument)
        elif what == "truths":
            return truths
        return os.getpid() if what == "pid" else argument

    @agent.feedback("do")
    def learn(body, truth):
        truths.append(truth)

    return agent
"""

PROGRAM = """
import asyncio, os, sys
from quorate_agent import Agent
from quorate_protocol.credentials import find_ca, find_token
from quorate_protocol.transport import ClientTls

agent = Agent(sys.argv[2], processes=1)

@agent.task("do")
def do(body):
    return [os.getpid(), __name__]

async def main():
    await agent.run(sys.argv[1], token=find_token(), tls=ClientTls(find_ca()))
"""


@pytest.fixture(autouse=True)
def logged() -> Any:
    with structlog.testing.capture_logs() as entries:
        yield entries


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with coordinating(tmp_path / "state", sessions={"pulse_s": 0.3, "lease_s": 1.0}) as fleet:
        yield fleet


@contextlib.asynccontextmanager
async def program(fleet: Fleet, *arguments: str) -> AsyncIterator[Process]:
    """Runs Python with these arguments; sees that it is gone at the end, with all of its process group."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        cwd=fleet.state_dir.parent,
        env=clean_environment(QUORATE_STATE_DIR=str(fleet.state_dir)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    started = Process(process)
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await started.end()


@contextlib.asynccontextmanager
async def worker(fleet: Fleet, *arguments: str) -> AsyncIterator[Process]:
    """`quorate-agent run`, when it has joined."""
    (fleet.state_dir.parent / "my_agents.py").write_text(AGENTS)
    run = ("-m", "quorate_agent", "run", "my_agents.py:make", "--coordinator", fleet.url)
    async with program(fleet, *run, *arguments) as process:
        await until(
            lambda: "worker" in fleet.connected or process.process.returncode is not None, patience_s=PATIENCE_S
        )
        assert process.process.returncode is None
        yield process


async def ask(fleet: Fleet, what: str, argument: Any = None, *, deadline_s: float = PATIENCE_S) -> Outcome:
    return await (await fleet.operator()).ask("do", [what, argument], deadline_s=deadline_s)


async def answer(fleet: Fleet, what: str, argument: Any = None) -> Any:
    outcome = await ask(fleet, what, argument)
    (result,) = outcome.results
    assert result.status == "replied", result
    return result.value


async def error(fleet: Fleet, what: str, argument: Any = None) -> str | None:
    (result,) = (await ask(fleet, what, argument)).results
    assert result.status == "failed", result
    return result.error


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# --- heartbeats ----------------------------------------------------------------------------------


async def states_during(fleet: Fleet, what: str, argument: Any) -> set[str]:
    """What the coordinator thought of the agent while it answered."""
    asking = asyncio.create_task(ask(fleet, what, argument))
    states = set()
    while not asking.done():
        states.add(fleet.infos()["worker"].state)
        await asyncio.sleep(0.02)
    await asking
    return states


def compute_hold_count(seconds: float) -> int:
    """How often `sum` adds in C, without letting another thread run, in so many seconds or more."""
    count = 5_000_000
    began = time.process_time()
    sum(itertools.repeat(1, count))
    return int(count * seconds / (time.process_time() - began))


async def test_a_busy_loop_of_seconds_does_not_look_dead(fleet: Fleet) -> None:
    async with worker(fleet):
        assert await states_during(fleet, "spin", 3.0) == {"connected"}


async def test_who_holds_the_interpreter_looks_dead_in_a_thread_and_not_in_a_process(fleet: Fleet) -> None:
    count = compute_hold_count(4.0)
    async with worker(fleet, "--processes", "0"):
        assert await states_during(fleet, "hold", count) & {"suspect", "lost"}
    await until(lambda: "worker" not in fleet.connected)
    async with worker(fleet):
        assert await states_during(fleet, "hold", count) == {"connected"}


# --- work ----------------------------------------------------------------------------------------


async def test_two_hundred_rounds_over_two_processes(fleet: Fleet) -> None:
    async with worker(fleet, "--processes", "2", "--concurrency", "8"):
        client = await fleet.operator()
        gate = asyncio.Semaphore(16)

        async def one(number: int) -> None:
            async with gate:
                outcome = await client.ask("do", ["echo", number], deadline_s=PATIENCE_S)
                assert [result.value for result in outcome.results] == [number], outcome

        async with asyncio.TaskGroup() as group:
            for number in range(200):
                group.create_task(one(number))
        pids = {await answer(fleet, "pid") for _ in range(4)}
        assert 1 <= len(pids) <= 2


async def test_the_largest_bodies_travel(fleet: Fleet) -> None:
    async with worker(fleet):
        large = b"x" * (BODY_BYTES_MAX - 20)
        outcome = await ask(fleet, "echo", large)
        assert outcome.state == "complete"
        assert outcome.value == large


async def test_truths_reach_every_process_and_are_lost_with_it(fleet: Fleet) -> None:
    async with worker(fleet):
        client = await fleet.operator()
        for truth in ("a", "b"):
            outcome = await client.ask("do", ["pid", None], deadline_s=PATIENCE_S)
            await client.reveal(outcome.round, truth)
        assert await answer(fleet, "truths") == ["a", "b"]
        await error(fleet, "kill", 9)
        assert await answer(fleet, "truths") == []


async def test_failures_are_logged_by_the_process_on_the_same_stream(fleet: Fleet) -> None:
    async with worker(fleet, "--log-format", "json") as process:
        assert await error(fleet, "raise", "no such class") == "ValueError: no such class"
        process.send_signal(signal.SIGTERM)
        ended = await process.end()
    assert (ended.code, ended.out) == (0, "")
    (entry,) = [entry for entry in ended.logged if entry["event"] == "handler_failed"]
    assert (entry["task"], entry["level"]) == ("do", "error")
    assert "my_agents.py" in entry["exception"]


async def test_a_process_that_dies_fails_its_round_and_the_agent_stays(fleet: Fleet) -> None:
    async with worker(fleet):
        before = fleet.infos()["worker"].connected_s
        assert await error(fleet, "kill", signal.SIGSEGV) == "the handler's process died (signal 11)"
        assert await answer(fleet, "echo", 1) == 1
        assert fleet.infos()["worker"].connected_s > before


async def test_a_round_that_is_over_cancels_the_handler(fleet: Fleet, tmp_path: Path) -> None:
    async with worker(fleet):
        outcome = await ask(fleet, "cancelled", str(tmp_path / "began"), deadline_s=1.0)
        assert outcome.state == "expired"
        await until((tmp_path / "began-told").exists)


# --- ends ----------------------------------------------------------------------------------------


async def test_an_interrupt_from_the_terminal_lets_the_handler_finish(fleet: Fleet, tmp_path: Path) -> None:
    async with worker(fleet) as process:
        asking = asyncio.create_task(ask(fleet, "wait", str(tmp_path / "began")))
        await until((tmp_path / "began").exists)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the children too
        await until(lambda: fleet.infos()["worker"].state == "draining")
        (tmp_path / "began-go").touch()
        outcome = await asking
        assert [result.status for result in outcome.results] == ["replied"]
        assert (await process.end()).code == 0


async def test_no_child_outlives_a_parent_that_was_killed(fleet: Fleet, tmp_path: Path) -> None:
    async with worker(fleet, "--processes", "2") as process:
        files = [tmp_path / "busy-1", tmp_path / "busy-2"]
        asking = [asyncio.create_task(ask(fleet, "began", str(file))) for file in files]
        await until(lambda: all(file.exists() for file in files), patience_s=PATIENCE_S)
        pids = [int(file.read_text()) for file in files]
        assert len({*pids, process.pid}) == 3
        assert all(is_alive(pid) for pid in pids)
        process.send_signal(signal.SIGKILL)
        await until(lambda: not any(is_alive(pid) for pid in pids))
        await asyncio.gather(*asking)


async def test_an_agent_that_a_process_cannot_load_ends_with_2(fleet: Fleet) -> None:
    (fleet.state_dir.parent / "broken.py").write_text(
        f"import os\nif os.getppid() != {os.getpid()}:\n    import nowhere_to_be_found\n" + AGENTS
    )
    run = ("-m", "quorate_agent", "run", "broken.py:make", "--coordinator", fleet.url)
    async with program(fleet, *run) as process:
        ended = await process.end()
    assert ended.code == 2
    assert "No module named 'nowhere_to_be_found'" in ended.line
    assert ended.line.startswith("quorate-agent: the handler's process cannot load the agent: ")


# --- programs of their own -----------------------------------------------------------------------


async def test_a_program_runs_its_own_agent_with_processes(fleet: Fleet) -> None:
    script = fleet.state_dir.parent / "my_program.py"
    script.write_text(PROGRAM + '\nif __name__ == "__main__":\n    asyncio.run(main())\n')
    for number, arguments in enumerate([[str(script)], ["-m", "my_program"]]):
        name = f"own-{number}"
        async with program(fleet, *arguments, fleet.url, name) as process:
            await until(lambda name=name: name in fleet.connected, patience_s=PATIENCE_S)
            pid, module = await answer(fleet, "any")
            assert pid != process.pid
            assert module == "my_program"
        await until(lambda name=name: name not in fleet.connected)


@pytest.mark.parametrize(
    ("end", "problem"),
    [
        ("\nasyncio.run(main())\n", 'put the call of run(...) under if __name__ == "__main__":'),
        (
            '\nmade = [agent]\ndel agent\nif __name__ == "__main__":\n'
            "    asyncio.run(made[0].run(sys.argv[1], token=find_token(), tls=ClientTls(find_ca())))\n",
            "the agent is no attribute of a module (looked at __main__)",
        ),
    ],
    ids=["no guard", "no attribute"],
)
async def test_a_program_that_cannot_be_loaded_again_is_told_what_to_do(fleet: Fleet, end: str, problem: str) -> None:
    script = fleet.state_dir.parent / "my_program.py"
    script.write_text(PROGRAM + end)
    async with program(fleet, str(script), fleet.url, "own") as process:
        ended = await process.end()
    assert ended.code == 1
    assert problem in ended.err.splitlines()[-1]


async def test_what_was_typed_cannot_be_loaded_again(fleet: Fleet) -> None:
    code = PROGRAM + "\nasyncio.run(main())\n"
    async with program(fleet, "-c", code, fleet.url, "own") as process:
        ended = await process.end()
    assert ended.code == 1
    assert "in a program that is no .py file" in ended.err.splitlines()[-1]

"""`quorate ask` and `drain` as an operator has them: on a terminal, in a pipe, over a coordinator that is killed."""

import asyncio
import json
import os
import pty
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent_making import Gated, echo
from coordination import Fleet, coordinating, until
from processes import PATIENCE_S, QUORATE, Ended, clean_environment, quorate, running
from quorate_agent import Agent
from quorate_agent import backoff as backoff_module
from quorate_coordinator.journal.records import RoundClosed
from restarting import Restarting, joined, records_in


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with coordinating(tmp_path / "state", rounds={"deadline_s": 15.0}) as fleet:
        yield fleet


def environ(fleet: Fleet) -> dict[str, str]:
    return {"QUORATE_STATE_DIR": str(fleet.state_dir), "QUORATE_COORDINATOR": fleet.url}


async def run(fleet: Fleet, *arguments: str) -> Ended:
    return await quorate(*arguments, **environ(fleet))


async def on_terminal(fleet: Fleet, *arguments: str) -> tuple[int, list[str]]:
    """Exit code, and the lines that a person sees, without colours."""
    ours, theirs = pty.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            QUORATE,
            *arguments,
            env=clean_environment(TERM="xterm-256color", COLUMNS="100", **environ(fleet)),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
    finally:
        os.close(theirs)

    def read() -> bytes:
        seen = bytearray()
        while True:
            try:
                data = os.read(ours, 65_536)
            except OSError:  # EIO: the other end is closed
                return bytes(seen)
            if not data:
                return bytes(seen)
            seen += data

    try:
        async with asyncio.timeout(PATIENCE_S):
            seen = await asyncio.to_thread(read)
            code = await process.wait()
    finally:
        os.close(ours)
    return code, re.sub(r"\x1b\[[0-9;?]*[a-z]", "", seen.decode(), flags=re.IGNORECASE).splitlines()


def failing(name: str, times: int = 1_000_000) -> Agent:
    """Fails so many times, then answers."""
    agent, left = Agent(name), [times]

    @agent.task("echo")
    async def fail(body: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise ValueError("no such class")
        return body

    return agent


# --- ask -----------------------------------------------------------------------------------------


async def test_streamed_on_a_terminal_each_agent_has_its_line_as_it_ends(fleet: Fleet) -> None:
    hanging = Gated("hangs")
    await fleet.join(echo("a"), failing("fails"), hanging.agent)
    code, lines = await on_terminal(fleet, "ask", "echo", '{"x": 1}', "--stream", "--quorum", "1", "--grace", "100ms")
    assert code == 0
    *parts, answer, summary = lines
    shown = [re.fullmatch(r" *\d+\.\d ms  (.*?) *", line) for line in parts]
    said = [line[1] if line else "" for line in shown]
    assert sorted(said[:2]) == ['a  replied  {"x": 1}', "fails  failed  ValueError: no such class"]
    assert said[2:] == ["hangs  cancelled"]
    assert answer == '{"x": 1}'
    assert re.fullmatch(r"round 1 quorate in \d+\.\d ms · 1 of 3 replied, quorum 1 · support 100%", summary)


async def test_without_streaming_a_terminal_has_a_table(fleet: Fleet) -> None:
    await fleet.join(echo("a"), echo("b"))
    code, lines = await on_terminal(fleet, "ask", "echo", "1", "--quorum", "100%", "--count", "1")
    assert code == 0
    assert lines[0] == "1"
    assert lines[1].split() == ["agent", "status", "answer", "weight", "latency", "ms", "compute", "ms"]
    assert lines[3].split()[:3] == ["a", "replied", "1"]
    assert lines[4].startswith("round 1 complete in ")


@pytest.mark.parametrize("options", [(), ("--json",)])
async def test_streamed_in_a_pipe_each_line_is_json(fleet: Fleet, options: tuple[str, ...]) -> None:
    gated = Gated("b")
    await fleet.join(echo("a"), gated.agent)
    arguments = ("ask", "echo", '{"x": 1}', "--stream", "--quorum", "100%", *options)
    async with running(*arguments, **environ(fleet)) as asking:
        # The first line is there before the round is over.
        await until(lambda: asking.out_so_far.count("\n") == 1, patience_s=PATIENCE_S)
        gated.gate.set()
        ended = await asking.end()
    assert (ended.code, ended.err) == (0, "")
    first, second, last = (json.loads(line) for line in ended.out.splitlines())
    assert [(one["round"], one["part"]["agent"], one["part"]["status"]) for one in (first, second)] == [
        (1, "a", "replied"),
        (1, "b", "replied"),
    ]
    assert list(last) == ["outcome"]
    assert (last["outcome"]["state"], last["outcome"]["answer"]) == ("complete", {"x": 1})


async def test_a_streamed_round_without_an_answer_exits_with_6(fleet: Fleet) -> None:
    await fleet.join(failing("a"))
    ended = await run(fleet, "ask", "echo", "1", "--stream")
    assert (ended.code, len(ended.out.splitlines())) == (6, 2)
    assert ended.line == "quorate: round 1 failed: quorum of 1 is out of reach: of 1 selected 1 failed"
    code, lines = await on_terminal(fleet, "ask", "echo", "1", "--stream")
    assert code == 6
    assert lines[-1] == "quorate: round 2 failed: quorum of 1 is out of reach: of 1 selected 1 failed"
    nobody = await run(fleet, "ask", "paint", "1", "--stream")
    assert (nobody.code, nobody.out) == (6, "")
    assert nobody.line == "quorate: no connected agent does the task 'paint' (no-agents)"


async def test_asked_again_under_its_key_it_is_the_same_round(fleet: Fleet) -> None:
    await fleet.join(echo("a"))
    first = await run(fleet, "ask", "echo", "1", "--key", "k", "--json")
    again, other = await asyncio.gather(
        run(fleet, "ask", "echo", "1", "--key", "k", "--json"), run(fleet, "ask", "echo", "2", "--key", "k")
    )
    assert (first.code, again) == (0, first)
    assert (other.code, other.out) == (6, "")
    assert other.line == (
        "quorate: key: 'k' was used for another question, or with other options; "
        "take a new key for this one (bad-request)"
    )


async def test_an_agent_that_failed_is_asked_again(fleet: Fleet) -> None:
    await fleet.join(failing("a", 1))
    assert await run(fleet, "ask", "echo", "1", "--attempts", "2") == Ended(0, "1\n", "")
    too_many, none = await asyncio.gather(
        run(fleet, "ask", "echo", "1", "--attempts", "101"), run(fleet, "ask", "echo", "1", "--count", "0")
    )
    assert (too_many.code, none.code) == (2, 2)
    assert "--attempts" in too_many.err
    assert "--count" in none.err


@pytest.mark.parametrize("options", [(), ("--stream",)])
async def test_interrupted_it_withdraws_its_round_also_with_a_key(fleet: Fleet, options: tuple[str, ...]) -> None:
    gated = Gated("a")
    await fleet.join(gated.agent)
    async with running("ask", "echo", "1", "--key", "k", *options, **environ(fleet)) as asking:
        await until(lambda: gated.running == 1)
        asking.send_signal(signal.SIGINT)
        ended = await asking.end()
    assert (ended.code, ended.line) == (130, "quorate: interrupted")
    await until(lambda: fleet.coordinator.list_fleet().rounds_closed == {"cancelled": 1})


async def test_retried_over_a_coordinator_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backoff_module.Backoff.__init__, "__kwdefaults__", {"base_s": 0.05, "max_s": 0.2})
    gated = Gated("b")
    async with Restarting(tmp_path / "state") as restarting:
        agents = [
            asyncio.create_task(agent.run(restarting.url, token=restarting.token, tls=restarting.tls))
            for agent in (echo("a"), gated.agent)
        ]
        try:
            async with restarting.client() as client:
                await joined(client, "a", "b")
            arguments = ("ask", "echo", "7", "--quorum", "100%", "--stream", "--retry", "60s")
            async with running(*arguments, **restarting.environ) as asking:
                await until(lambda: '"a"' in asking.out_so_far and gated.running == 1, patience_s=PATIENCE_S)
                await until(lambda: records_in(restarting.journal))
                await restarting.kill()
                await until(lambda: not gated.running or asking.process.returncode is None)
                gated.gate.set()
                await restarting.start()
                ended = await asking.end()
        finally:
            for task in agents:
                task.cancel()
            await asyncio.wait(agents)
    assert ended.code == 0, ended.err
    lines = [json.loads(line) for line in ended.out.splitlines()]
    outcome = lines[-1]["outcome"]
    assert (outcome["state"], outcome["answer"]) == ("complete", 7)
    parts = [(line["round"], line["part"]["agent"]) for line in lines[:-1]]
    assert len(set(parts)) == len(parts)
    assert sorted(agent for number, agent in parts if number == outcome["round"]) == ["a", "b"]
    said = ended.err.splitlines()
    assert said
    assert all(re.fullmatch(r"quorate: .*; asking again in \d+(\.\d+)? s", line) for line in said)
    # One key for all of it: the round that was cut off, and the one that was not.
    closed = [record for record in records_in(restarting.journal) if isinstance(record, RoundClosed)]
    assert [record.state for record in closed] == ["interrupted", "complete"]
    assert len({record.key for record in closed}) == 1
    assert (closed[0].key or "").startswith("ask-")


async def test_retries_have_an_end_and_what_will_not_pass_is_not_retried(fleet: Fleet) -> None:
    await fleet.join(echo("a"))
    nobody, wrong = await asyncio.gather(
        run(fleet, "ask", "paint", "1", "--retry", "400ms"),
        run(fleet, "ask", "echo", "1", "--quorum", "9", "--count", "3", "--retry", "60s"),
    )
    assert nobody.code == 6
    assert nobody.err.splitlines() == [
        "quorate: no connected agent does the task 'paint' (no-agents); asking again in 0.25 s",
        "quorate: no connected agent does the task 'paint' (no-agents)",
    ]
    assert (wrong.code, wrong.line) == (6, "quorate: quorum: 9 is over the 3 that are asked at most (bad-request)")


# --- drain ---------------------------------------------------------------------------------------

AGENT = """
from quorate_agent import Agent
agent = Agent("worker")

@agent.task("echo")
async def echo(body):
    return body
"""


async def test_an_agent_that_is_drained_ends_with_0(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(AGENT)
    worker = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("quorate-agent")),
        "run",
        f"{tmp_path}/worker.py:agent",
        env=clean_environment(**environ(fleet)),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        await until(lambda: "worker" in fleet.connected, patience_s=PATIENCE_S)
        drained = await run(fleet, "drain", "worker", "--reason", "its machine is needed")
        assert drained == Ended(0, "worker has left\n", "")
        async with asyncio.timeout(PATIENCE_S):
            _, said = await worker.communicate()
        assert worker.returncode == 0
        assert "its machine is needed" in said.decode()
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()
    gone = await run(fleet, "drain", "worker")
    assert (gone.code, gone.line) == (6, "quorate: agent 'worker' is gone: left (unknown-agent)")
    stranger = await run(fleet, "drain", "nobody")
    assert (stranger.code, stranger.line) == (6, "quorate: there is no agent 'nobody' in the fleet (unknown-agent)")


async def test_drain_waits_as_long_as_it_is_told(fleet: Fleet) -> None:
    gated = Gated("a")
    await fleet.join(gated.agent, echo("b"))
    operator = await fleet.operator()
    asking = asyncio.create_task(operator.ask("echo", 1, quorum=1.0))
    await until(lambda: gated.running == 1)
    assert await run(fleet, "drain", "a", "--wait", "0") == Ended(0, "a is draining\n", "")
    short, as_json = await asyncio.gather(
        run(fleet, "drain", "a", "--wait", "200ms"), run(fleet, "drain", "a", "--wait", "200ms", "--json")
    )
    assert (short.code, short.out) == (1, "")
    assert short.line == "quorate: a has not left within 0.2 s; it is draining"
    assert (as_json.code, json.loads(as_json.out)) == (1, {"agent": "a", "state": "draining"})
    gated.gate.set()
    assert (await asking).state == "complete"
    left = await run(fleet, "drain", "b", "--json")
    assert (left.code, json.loads(left.out)) == (0, {"agent": "b", "state": "left"})

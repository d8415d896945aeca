"""Handlers in processes of their own: real children, run by a real `HandlerRunner`."""

import asyncio
import importlib
import math
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from quorate_agent import Agent, AgentInvalid, processes
from quorate_agent.calling import Ended
from quorate_agent.events import HandlerDeclined, HandlerFailed, HandlerReturned, StartAssignment, StartFeedback
from quorate_agent.loading import load_agent
from quorate_agent.running import HandlerRunner
from quorate_agent.source import find_source
from quorate_agent.streams import OwnStreams
from quorate_protocol.blobs import Blob, blob_of
from quorate_protocol.bodies import decode_body, encode_body
from quorate_protocol.bulk import ref_to
from quorate_protocol.errors import Code, ConnectionClosed
from quorate_protocol.fields import Body, BodyRef
from quorate_protocol.limits import BODY_BYTES_MAX

#: Over anything that happens in time; a test that waits so long has failed.
PATIENCE_S = 60.0

AGENTS = """
import ctypes, os, signal, sys, threading, time
from pathlib import Path
from quorate_agent import Agent, Context, Declined

def make(processes: int = 1, concurrency: int = 0, learns: bool = False):
    agent = Agent("tree-1", processes=processes, concurrency=concurrency or None)
    truths = []
    gone = []

    @agent.task("do")
    def do(body, context: Context):
        what, *rest = body
        if what == "echo":
            return rest
        if what == "pid":
            return os.getpid()
        if what == "thread":
            return threading.current_thread() is threading.main_thread()
        if what == "context":
            return [context.round, context.task, context.agent, context.attempt, context.remaining_s]
        if what == "raise":
            raise ValueError(rest[0])
        if what == "decline":
            raise Declined(rest[0])
        if what == "exit":
            sys.exit(3)
        if what == "set":
            return {1}
        if what == "bytes":
            return b"x" * rest[0]
        if what == "die":
            os._exit(rest[0])
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "segfault":
            ctypes.string_at(0)
        if what == "wait":
            Path(rest[0]).touch()
            return context.cancelled.wait(rest[1])
        if what == "ignore":
            Path(rest[0]).touch()
            while True:
                time.sleep(0.05)
        if what == "truths":
            return [os.getpid(), truths]
        if what == "sleep":
            time.sleep(rest[0])
            return rest[0]
        if what == "argv":
            return sys.argv

    if learns:
        @agent.feedback("do")
        def learn(body, truth):
            if truth == "raise":
                raise ValueError("no such truth")
            truths.append(truth)

    return agent
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    (tmp_path / "process_test_agents.py").write_text(AGENTS)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as entries:
        yield entries


def no_link() -> OwnStreams:
    raise ConnectionClosed(Code.NO_ERROR)


class Runner:
    """A runner of an agent with processes, and the ends that it has told."""

    def __init__(self, agent: Agent) -> None:
        self.queued = 0
        #: How often it was asked for the above.
        self.asked = 0
        self.ended: asyncio.Queue[Ended] = asyncio.Queue()
        self.runner = HandlerRunner(
            agent, "agent-1", agent.concurrency, self.ended.put_nowait, no_link, self._count_queued
        )
        self._works = 0

    def _count_queued(self) -> int:
        self.asked += 1
        return self.queued

    @property
    def pids(self) -> list[int]:
        assert self.runner._pool is not None
        return self.runner._pool.pids

    def start(self, *body: Any, raw: Body | None = None, deadline: float = math.inf) -> int:
        self._works += 1
        packed = encode_body(list(body)) if raw is None else raw
        self.runner.start(StartAssignment(self._works, 5, 2, "do", packed, deadline))
        return self._works

    async def end(self) -> Ended:
        async with asyncio.timeout(PATIENCE_S):
            return await self.ended.get()

    async def ask(self, *body: Any, **options: Any) -> Ended:
        self.start(*body, **options)
        return await self.end()

    async def answer(self, *body: Any) -> Any:
        ended = await self.ask(*body)
        assert isinstance(ended, HandlerReturned), ended
        return decode_body(ended.body)

    async def error(self, *body: Any, **options: Any) -> str:
        ended = await self.ask(*body, **options)
        assert isinstance(ended, HandlerFailed), ended
        return ended.error

    async def teach(self, truth: Any) -> Ended:
        self._works += 1
        self.runner.start(StartFeedback(self._works, 5, "do", encode_body(None), encode_body(truth)))
        return await self.end()


Open = Callable[..., Any]


@pytest.fixture
async def opened(folder: Path) -> AsyncIterator[Open]:
    """Opens runners, and closes them at the end."""
    runners: list[Runner] = []

    async def opened(**settings: Any) -> Runner:
        agent = load_agent(
            f"{folder}/process_test_agents.py:make", {name: str(value).lower() for name, value in settings.items()}
        )
        runners.append(Runner(agent))
        await runners[-1].runner.open()
        return runners[-1]

    yield opened
    pids = [pid for runner in runners for pid in runner.pids]
    for runner in runners:
        await runner.runner.close()
    assert [pid for pid in pids if is_alive(pid)] == []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  what it asks tells nobody
            await asyncio.sleep(0.005)


# --- as in threads -------------------------------------------------------------------------------


async def test_handlers_run_in_the_main_thread_of_another_process(opened: Open) -> None:
    runner = await opened()
    assert await runner.answer("echo", 1, "two", {"three": b"3"}) == [1, "two", {"three": b"3"}]
    assert await runner.answer("pid") == runner.pids[0] != os.getpid()
    assert await runner.answer("thread") is True
    assert await runner.answer("argv") == sys.argv


async def test_the_context_is_that_of_the_work(opened: Open) -> None:
    runner = await opened()
    ended = await runner.ask("context", deadline=time.monotonic() + 100)
    *said, remaining_s = decode_body(ended.body)
    assert said == [5, "do", "agent-1", 2]
    assert 0 < remaining_s < 100
    assert math.isinf(decode_body((await runner.ask("context")).body)[-1])


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (("raise", "first\nsecond"), "ValueError: first"),
        (("exit",), "SystemExit: 3"),
        (("set",), "the answer cannot be sent: body cannot be sent: a set has no msgpack form"),
    ],
)
async def test_failures_are_told_as_in_a_thread_and_the_process_lives(
    opened: Open, body: tuple[Any, ...], text: str
) -> None:
    runner = await opened()
    (pid,) = runner.pids
    assert (await runner.error(*body)).startswith(text)
    assert await runner.answer("pid") == pid


async def test_large_bodies_go_both_ways(opened: Open) -> None:
    runner = await opened()
    text = "x" * (2 * BODY_BYTES_MAX)
    blob = blob_of([encode_body(["echo", text])])
    runner.start(raw=ref_to(blob).with_content(blob))
    ended = await runner.end()
    assert isinstance(ended, HandlerReturned)
    assert isinstance(ended.body, BodyRef)
    assert isinstance(ended.body.content, Blob)
    assert ended.body == ref_to(blob_of([encode_body([text])]))
    assert decode_body(ended.body.content.view()) == [text]


async def test_what_cannot_be_unpacked_fails(opened: Open) -> None:
    runner = await opened()
    assert (await runner.error(raw=b"\xc1")).startswith("the body that came cannot be unpacked")


async def test_a_handler_may_decline(opened: Open) -> None:
    ended = await (await opened()).ask("decline", "not mine")
    assert isinstance(ended, HandlerDeclined)
    assert ended.reason == "not mine"


async def test_the_handler_alone_is_measured(opened: Open) -> None:
    runner = await opened()
    ended = await runner.ask("sleep", 0.05)
    assert 0.05 <= ended.compute_s < 5
    ended = await runner.ask("bytes", BODY_BYTES_MAX - 5)
    assert ended.compute_s < 0.05, "not packing and sending"


async def test_the_largest_bodies_travel_both_ways(opened: Open) -> None:
    runner = await opened()
    largest = b"x" * (BODY_BYTES_MAX - 5)
    ended = await runner.ask("bytes", len(largest))
    assert len(ended.body) == BODY_BYTES_MAX
    body = encode_body(["echo", largest[:-7]])
    assert len(body) <= BODY_BYTES_MAX
    ended = await runner.ask(raw=body)
    assert decode_body(ended.body) == [largest[:-7]]


# --- the pool ------------------------------------------------------------------------------------


async def test_two_hundred_jobs_over_two_processes(opened: Open) -> None:
    runner = await opened(processes=2, concurrency=16)
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201
    rng = random.Random(seed)
    wanted: dict[int, Any] = {}
    for _ in range(200):
        filler = rng.randbytes(rng.choice([0, 10, 1000, 300_000]))
        wanted[runner.start("echo", len(wanted), filler)] = [len(wanted), filler]
    for _ in range(200):
        ended = await runner.end()
        assert isinstance(ended, HandlerReturned), ended
        assert decode_body(ended.body) == wanted.pop(ended.work)
    assert not wanted
    assert len(runner.pids) == 2


async def test_processes_are_started_when_they_are_needed(opened: Open, tmp_path: Path) -> None:
    runner = await opened(processes=3)
    assert len(runner.pids) == 1
    for number in range(3):
        await runner.answer("echo", number)
    assert len(runner.pids) == 1
    works = [runner.start("wait", str(tmp_path / f"began-{number}"), PATIENCE_S) for number in range(3)]
    await until(lambda: len(list(tmp_path.glob("began-*"))) == 3)
    assert len(runner.pids) == 3
    for work in works:
        runner.runner.cancel(work)
    for _ in works:
        assert decode_body((await runner.end()).body) is True


async def test_feedback_teaches_every_copy(opened: Open, tmp_path: Path) -> None:
    runner = await opened(processes=2, learns=True)
    assert len(runner.pids) == 2, "copies that learn begin together"
    for truth in ("a", "b"):
        assert isinstance(await runner.teach(truth), HandlerReturned)
    seen = {}
    async with asyncio.timeout(PATIENCE_S):
        while len(seen) < 2:
            runner.start("truths")
            runner.start("truths")
            for _ in range(2):
                pid, truths = decode_body((await runner.ended.get()).body)
                seen[pid] = truths
    assert list(seen.values()) == [["a", "b"], ["a", "b"]]
    ended = await runner.teach("raise")
    assert isinstance(ended, HandlerFailed)
    assert ended.error == "ValueError: no such truth"


# --- the end of a process ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "how"),
    [(("die", 3), "exit code 3"), (("kill",), "signal 9"), (("segfault",), "signal 11")],
    ids=["exit", "kill", "segfault"],
)
async def test_a_process_that_dies_fails_its_assignment_and_is_replaced(
    opened: Open, body: tuple[Any, ...], how: str, logged: list[Any]
) -> None:
    runner = await opened()
    (before,) = runner.pids
    assert await runner.error(*body) == f"the handler's process died ({how})"
    assert await runner.answer("pid") != before
    assert [entry["pid"] for entry in logged if entry["event"] == "handler_process_died"] == [before]


async def test_what_waited_for_a_process_that_died_runs_in_the_next(opened: Open) -> None:
    runner = await opened(concurrency=2)
    runner.start("die", 1)
    runner.start("echo", "waits")
    assert isinstance(await runner.end(), HandlerFailed)
    assert decode_body((await runner.end()).body) == ["waits"]


async def test_the_pause_grows_while_processes_die_again_and_again(opened: Open) -> None:
    runner = await opened()
    pool = runner.runner._pool
    assert pool is not None
    pauses = []
    for _ in range(3):
        await runner.error("die", 1)
        pause = pool._pause
        assert pause is not None
        pauses.append(pause.when() - asyncio.get_running_loop().time())
    assert pauses[0] <= processes.PAUSE_S
    assert pauses[1] > processes.PAUSE_S < pauses[2] / 2
    await runner.answer("echo")
    await runner.error("die", 1)
    pause = pool._pause
    assert pause is not None
    assert pause.when() - asyncio.get_running_loop().time() <= processes.PAUSE_S, "one that works begins anew"


async def test_an_idle_process_that_is_killed_is_replaced(opened: Open) -> None:
    runner = await opened()
    (before,) = runner.pids
    os.kill(before, signal.SIGKILL)
    await until(lambda: bool(runner.pids) and runner.pids != [before])
    assert await runner.answer("pid") in runner.pids


async def test_a_replacement_that_cannot_load_fails_what_waits(opened: Open, folder: Path) -> None:
    runner = await opened()
    (folder / "process_test_agents.py").write_text("import nowhere_to_be_found")
    await runner.error("die", 1)
    error = await runner.error("echo")
    assert error.startswith("the handler's process cannot load the agent: ")
    assert "No module named 'nowhere_to_be_found'" in error
    (folder / "process_test_agents.py").write_text(AGENTS)
    await until(lambda: bool(runner.pids))
    async with asyncio.timeout(PATIENCE_S):
        while isinstance(await runner.ask("echo"), HandlerFailed):
            pass


# --- cancelling ----------------------------------------------------------------------------------


async def test_a_cancelled_handler_is_told(opened: Open, tmp_path: Path) -> None:
    runner = await opened()
    work = runner.start("wait", str(tmp_path / "began"), PATIENCE_S)
    await until((tmp_path / "began").exists)
    runner.runner.cancel(work)
    assert decode_body((await runner.end()).body) is True
    runner.runner.cancel(work)  # it is over, and nothing happens


async def test_what_was_cancelled_before_it_began_does_not_begin(opened: Open, tmp_path: Path) -> None:
    runner = await opened(concurrency=2)
    first = runner.start("wait", str(tmp_path / "first"), PATIENCE_S)
    second = runner.start("wait", str(tmp_path / "second"), PATIENCE_S)
    runner.runner.cancel(second)
    assert await runner.end() == HandlerFailed(second, "the handler was cancelled")
    runner.runner.cancel(first)
    await runner.end()
    assert not (tmp_path / "second").exists()


async def test_a_handler_that_ignores_its_cancellation_is_killed_when_it_is_in_the_way(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    monkeypatch.setattr(processes, "CANCEL_GRACE_S", 0.05)
    monkeypatch.setattr(processes, "_CANCEL_CHECK_S", 0.05)
    runner = await opened()
    work = runner.start("ignore", str(tmp_path / "began"))
    await until((tmp_path / "began").exists)
    runner.runner.cancel(work)
    await until(lambda: runner.asked >= 3)
    assert runner.ended.empty(), "nobody waits for its place"
    runner.queued = 1
    assert await runner.end() == HandlerFailed(work, "the handler's process died (signal 9)")
    assert [entry["round"] for entry in logged if entry["event"] == "handler_process_killed"] == [5]
    pool = runner.runner._pool
    assert pool is not None
    assert pool._pause is None, "it was we who killed it"
    assert await runner.answer("echo") == []


async def test_closing_is_bounded_and_leaves_nothing(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "CLOSE_GRACE_S", 0.2)
    runner = await opened()
    runner.start("ignore", str(tmp_path / "began"))
    await until((tmp_path / "began").exists)
    (pid,) = runner.pids
    began = time.monotonic()
    await runner.runner.close()
    assert time.monotonic() - began < 5
    assert not is_alive(pid)
    await asyncio.sleep(0)
    assert runner.ended.empty()


async def test_a_handler_may_end_while_the_pool_closes(opened: Open, tmp_path: Path) -> None:
    runner = await opened()
    runner.start("wait", str(tmp_path / "began"), PATIENCE_S)
    await until((tmp_path / "began").exists)
    (pid,) = runner.pids
    began = time.monotonic()
    await runner.runner.close()
    assert time.monotonic() - began < processes.CLOSE_GRACE_S, "it was told"
    assert not is_alive(pid)


async def test_signals_of_the_terminal_are_not_the_childrens(opened: Open, tmp_path: Path) -> None:
    runner = await opened()
    (pid,) = runner.pids
    work = runner.start("wait", str(tmp_path / "began"), PATIENCE_S)
    await until((tmp_path / "began").exists)
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    runner.runner.cancel(work)
    assert decode_body((await runner.end()).body) is True


# --- what cannot start ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("if os.getpid() != {pid}: import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("if os.getpid() != {pid}: os._exit(7)", "process_test_broken.py:agent (exit code 7)"),
        ("if os.getpid() != {pid}: agent = 3", "it must be an Agent"),
        ("if os.getpid() == {pid}: agent.task('more')(do)", "has no task 'more' when it is loaded in a process"),
        ("if os.getpid() == {pid}: agent.feedback('do')(do2)", "has no feedback handler for 'do'"),
        (
            "if os.getpid() != {pid}:\n    import asyncio\n    asyncio.run(agent.run('quic://localhost', token='x'))",
            'put the call of run(...) under if __name__ == "__main__"',
        ),
    ],
)
async def test_an_agent_that_processes_cannot_load_is_invalid(folder: Path, source: str, problem: str) -> None:
    (folder / "process_test_broken.py").write_text(
        "import os\nfrom quorate_agent import Agent\nagent = Agent(processes=1)\n"
        "@agent.task('do')\ndef do(body): pass\ndef do2(body, truth): pass\n" + source.format(pid=os.getpid())
    )
    runner = Runner(load_agent(f"{folder}/process_test_broken.py:agent"))
    try:
        with pytest.raises(AgentInvalid) as caught:
            async with asyncio.timeout(PATIENCE_S):
                await runner.runner.open()
        assert problem in str(caught.value)
    finally:
        await runner.runner.close()


def test_an_agent_of_a_module_is_found_by_its_handlers(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    (folder / "process_test_module.py").write_text(
        "import functools\nfrom quorate_agent import Agent\nmine = Agent()\n"
        "@functools.partial\ndef do(body): pass\nmine.task('do')(do)\n"
    )
    module = importlib.import_module("process_test_module")
    assert find_source(module.mine).target == "process_test_module:mine"


def test_an_agent_that_is_nobodys_attribute_cannot_be_found() -> None:
    agent = Agent(processes=1)
    agent.task("do")(lambda body: body)
    with pytest.raises(AgentInvalid, match=r"no attribute of a module \(looked at .*\); .*top level"):
        find_source(agent)


def test_processes_and_concurrency_fit() -> None:
    assert Agent().processes == 0
    assert Agent(processes=4).concurrency == 4
    assert Agent(processes=2, concurrency=8).concurrency == 8
    agent = Agent(concurrency=2)
    agent.set_processes(3)
    assert (agent.processes, agent.concurrency) == (3, 3)
    for wrong in (-1, 65, 1.5, True):
        with pytest.raises(AgentInvalid, match="processes is"):
            Agent(processes=wrong)  # type: ignore[arg-type]


async def test_more_processes_than_may_work_are_refused(folder: Path) -> None:
    with pytest.raises(AgentInvalid, match="concurrency is 1, so that of 2 processes some would never work"):
        Runner(load_agent(f"{folder}/process_test_agents.py:make", {"processes": "2", "concurrency": "1"}))


def test_async_handlers_and_processes() -> None:
    async def later(body: Any) -> None: ...

    agent = Agent(processes=1)
    agent.task("a")(later)
    with pytest.raises(AgentInvalid, match="all tasks have async handlers"):
        agent.check()
    agent.task("b")(lambda body: body)
    agent.check()
    agent.feedback("a")(lambda body, truth: None)
    with pytest.raises(AgentInvalid, match="of task 'a' one of handler and feedback handler is async"):
        agent.check()

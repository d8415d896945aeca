"""`quorate demo` as a process: what it prints, and that nothing is left of it however it ends."""

import asyncio
import contextlib
import json
import os
import secrets
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordination import until
from processes import PATIENCE_S, Process, processes_with, quorate, running
from quorate_coordinator.demo.examples import CLASSIFIERS
from quorate_coordinator.demo.processes import _UNLESS_ORPHANED, reachable

#: Marks all processes of one test, whatever they become.
MARK = "DEMO_TEST_MARK"


class Demo:
    """A demo and the processes that it has started."""

    def __init__(self, process: Process, mark: str, folder: Path) -> None:
        self.process = process
        self._mark = mark
        self._folder = folder

    def living(self) -> dict[int, str]:
        """The processes of the demo without itself: pid to command line."""
        found = processes_with(MARK, self._mark)
        return {pid: command for pid, command in found.items() if pid != self.process.pid and command}

    async def fleet_is_there(self) -> None:
        """Waits until the coordinator and an agent at least are running."""
        await until(
            lambda: {"coordinator", "run"} <= set(" ".join(self.living().values()).split()),
            patience_s=PATIENCE_S,
            every_s=0.02,
        )

    async def nothing_is_left(self, *, folder_too: bool = True) -> None:
        with contextlib.suppress(TimeoutError):
            await until(lambda: not self.living(), patience_s=PATIENCE_S, every_s=0.02)
        assert self.living() == {}
        if folder_too:
            assert list(self._folder.iterdir()) == []


@contextlib.asynccontextmanager
async def demo(folder: Path, *arguments: str) -> AsyncIterator[Demo]:
    mark = secrets.token_hex(8)
    async with running("demo", *arguments, **{MARK: mark, "TMPDIR": str(folder)}) as process:
        yield Demo(process, mark, folder)


async def test_json_is_one_object_with_what_is_promised(tmp_path: Path) -> None:
    # Variables for other coordinators are not meant for this one.
    async with demo(tmp_path, "--json", "--limit", "6") as shown:
        ended = await shown.process.end()
        await shown.nothing_is_left()
    assert (ended.code, ended.err) == (0, "")
    result = json.loads(ended.out)
    assert list(result) == [
        "dataset",
        "instances",
        "ensemble",
        "agents",
        "rounds_per_s",
        "round_p50_ms",
        "round_p99_ms",
        "overhead_p50_ms",
    ]
    assert (result["dataset"], result["instances"]) == ("image-segments", 6)
    assert list(result["ensemble"]) == ["accuracy"]
    assert sorted(result["agents"]) == sorted(CLASSIFIERS)
    for agent in result["agents"].values():
        assert list(agent) == ["accuracy", "weight", "replies", "latency_p50_ms", "latency_p99_ms"]
        assert agent["replies"] == 5  # nobody has an answer before the first label
        assert 0 < agent["latency_p50_ms"] <= agent["latency_p99_ms"]
    assert sum(agent["weight"] for agent in result["agents"].values()) == pytest.approx(1)
    assert 0 < result["round_p50_ms"] <= result["round_p99_ms"]


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["Ctrl-C", "SIGTERM", "kill -9"]
)
async def test_nothing_is_left_when_it_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    async with demo(tmp_path, "--dataset", "phishing") as shown:
        await shown.fleet_is_there()
        shown.process.send_signal(number)
        ended = await shown.process.end()
        await shown.nothing_is_left(folder_too=number is not signal.SIGKILL)
    assert ended.out == ""
    if number is signal.SIGINT:
        assert ended.code == 130
        assert ended.err.splitlines()[-1] == "quorate: interrupted"
    elif number is signal.SIGTERM:
        assert ended.code == 1
        assert ended.err.splitlines()[-1] == "quorate: ended by SIGTERM"


async def test_serving_ends_well_with_ctrl_c(tmp_path: Path) -> None:
    async with demo(tmp_path, "--limit", "2", "--serve") as shown:
        await until(lambda: "2 rounds in" in shown.process.out_so_far, patience_s=PATIENCE_S, every_s=0.02)
        shown.process.send_signal(signal.SIGINT)
        ended = await shown.process.end()
        await shown.nothing_is_left()
    assert ended.code == 0
    assert "serving until Ctrl-C" in ended.err
    assert "interrupted" not in ended.err


async def test_every_interface_is_reached_over_loopback(tmp_path: Path) -> None:
    assert reachable("[::]:5") == "[::1]:5"
    assert reachable("192.0.2.1:5") == "192.0.2.1:5"
    async with demo(tmp_path, "--limit", "1", "--listen", "0.0.0.0:0", "--http", "") as shown:
        ended = await shown.process.end()
        await shown.nothing_is_left()
    assert (ended.code, ended.err) == (0, "starting a coordinator and six agents ...\n")
    assert "1 rounds in" in ended.out


async def test_an_unknown_data_set_names_those_that_there_are() -> None:
    ended = await quorate("demo", "--dataset", "titanic")
    assert (ended.code, ended.out) == (2, "")
    assert ended.line == "quorate: --dataset: 'titanic' is none of image-segments, phishing, bananas, shuttle"


async def test_a_process_that_does_not_start_is_named_with_its_log(tmp_path: Path) -> None:
    async with demo(tmp_path, "--listen", "203.0.113.1:1") as shown:
        ended = await shown.process.end()
        await shown.nothing_is_left()
    assert ended.code == 1
    log, last = ended.err.splitlines()[-2:]
    assert log == "  quorate: listen: cannot listen on 203.0.113.1:1: Cannot assign requested address"
    assert last == "quorate: coordinator ended with exit code 2; the end of its log is above"


async def test_what_begins_after_the_demo_was_killed_ends_by_itself() -> None:
    for parent, code, out in ((os.getpid(), 0, b"ran\n"), (os.getpid() + 1, 1, b"")):
        process = await asyncio.create_subprocess_exec(
            "sh", "-c", _UNLESS_ORPHANED, str(parent), "echo", "ran", stdout=asyncio.subprocess.PIPE
        )
        said, _ = await process.communicate()
        assert (process.returncode, said) == (code, out)

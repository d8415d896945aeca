"""A disk that is full, for real: no round is taken and why is told, nothing is spoiled, and it goes on by itself.

Two ways: a file system of two megabytes, which takes root, and a limit on the size of the process's files, which any
user may set.
"""

import asyncio
import contextlib
import os
import resource
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent_making import echo
from processes import PATIENCE_S, quorate
from quorate_coordinator.journal.records import RoundClosed, RoundOpened
from quorate_coordinator.journal.verify import verify
from quorate_protocol.client import Client
from quorate_protocol.errors import CallFailed
from quorate_protocol.messages import Outcome
from restarting import Restarting, agents, joined, last_state, records_in, replay_all


@contextlib.contextmanager
def small_file_system(directory: Path) -> Iterator[None]:
    """Two megabytes in memory."""
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "none", str(directory)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(file: Path) -> None:
    """Takes all the room there is."""
    with file.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(b"\0" * 4096)


@contextlib.asynccontextmanager
async def filled_up(
    tmp_path: Path, how: str
) -> AsyncIterator[tuple[Restarting, Callable[[], None], Callable[[], None]]]:
    """A coordinator, what makes its disk full, and what makes room again."""
    state_dir = tmp_path / "state"
    with contextlib.ExitStack() as stack:
        if how == "file system":
            stack.enter_context(small_file_system(state_dir))
        async with Restarting(state_dir) as restarting:
            if how == "file system":
                filler = state_dir / "filler"
                yield restarting, lambda: fill(filler), filler.unlink
            else:
                assert restarting.running is not None
                pid = restarting.running.process.pid
                _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                yield (
                    restarting,
                    lambda: resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard)) and None,
                    lambda: resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard)) and None,
                )


async def ask_until_refused(client: Client, size: int, prefix: str = "k") -> dict[str, CallFailed | Outcome]:
    """Asks under one key after the other until no round is taken any more; what came of each."""
    came: dict[str, CallFailed | Outcome] = {}
    async with asyncio.timeout(PATIENCE_S):
        while True:
            key = f"{prefix}-{len(came)}"
            try:
                came[key] = await client.ask("echo", key + "." * size, key=key)
            except CallFailed as error:
                assert (error.reason, error.retry) == ("not-recorded", True)
                came[key] = error
                if error.message.startswith("no round is taken"):
                    return came


async def ask_until_taken(client: Client, key: str, size: int) -> Outcome:
    """As an operator would that was told to ask again."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await client.ask("echo", key + "." * size, key=key)
            except CallFailed as error:
                assert (error.reason, error.retry) == ("not-recorded", True)
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("how", ["file system", "limit"])
async def test_rounds_are_refused_while_none_can_be_recorded(tmp_path: Path, how: str) -> None:
    if how == "file system" and os.geteuid():
        pytest.skip("only root can mount a file system")
    size = 20_000
    async with filled_up(tmp_path, how) as (restarting, fill_up, make_room):
        agent = asyncio.create_task(echo("a").run(restarting.url, token=restarting.token, tls=restarting.tls))
        try:
            async with restarting.client() as client:
                await joined(client, "a")
                before = await client.ask("echo", "before", key="before")
                fill_up()
                came = await ask_until_refused(client, size)
                problems = [error for error in came.values() if isinstance(error, CallFailed)]
                for error in problems:
                    assert "the journal cannot be written: " in error.message
                # The first that could not be written was over already, and says so.
                assert "is over, but that cannot be recorded now" in problems[0].message
                assert "ask again later under the same key" in problems[0].message
                with pytest.raises(CallFailed, match="no truth is taken"):
                    await client.reveal(before.round, "before")
                # What was announced before is still told, and agents have not noticed anything.
                assert await client.ask("echo", "before", key="before") == before
                [info] = (await client.agents()).agents
                assert (info.state, agent.done()) == ("connected", False)
                shown = await quorate("ask", "echo", "1", **restarting.environ)
                assert shown.code == 6
                assert shown.line.startswith("quorate: no round is taken, because none can be recorded: the journal ")
                assert shown.line.endswith("(not-recorded)")

                make_room()
                after = {key: await ask_until_taken(client, key, size) for key in came}
                assert (await client.reveal(before.round, "before")).correct is True
                for key, earlier in came.items():
                    assert after[key].value == key + "." * size
                    if isinstance(earlier, Outcome):
                        assert after[key] == earlier
            ended = await restarting.stop()
        finally:
            agent.cancel()
            await asyncio.wait([agent])
        assert "Traceback" not in ended.err
        events = [entry["event"] for entry in ended.logged]
        assert events.count("recording_failed") == events.count("recording_recovered") >= 1
        # No round was asked for twice, and the journal is whole.
        closed = [record for record in records_in(restarting.journal) if isinstance(record, RoundClosed)]
        opened = [record for record in records_in(restarting.journal) if isinstance(record, RoundOpened)]
        assert sorted(record.key or "" for record in closed) == sorted(["before", *came])
        assert len(opened) == len(closed)
        assert verify(restarting.journal).problems == []
        assert last_state(restarting.journal) == replay_all(restarting.journal)
        checked = await quorate("journal", "verify", str(restarting.journal))
        assert checked.code == 0, checked.err


async def killed_while_full(restarting: Restarting, fill_up: Callable[[], None], size: int) -> dict[str, Any]:
    """Asks until no round is taken any more, and is started again after that; what came of each key."""
    async with restarting.client() as client:
        came: dict[str, Any] = {"before": await client.ask("echo", "before" + "." * size, key="before")}
        fill_up()
        came |= await ask_until_refused(client, size)
    await restarting.kill()
    await restarting.start()
    return came


async def test_killed_while_the_disk_is_full_only_what_was_not_announced_is_gone(tmp_path: Path) -> None:
    async with filled_up(tmp_path, "limit") as (restarting, fill_up, _), agents(restarting, echo("a")):
        came = await killed_while_full(restarting, fill_up, 1000)
        async with restarting.client() as client:
            await joined(client, "a")
            for key, earlier in came.items():
                outcome = await client.ask("echo", key + "." * 1000, key=key)
                assert outcome.state == "complete"
                assert not isinstance(earlier, Outcome) or outcome == earlier
        await restarting.stop()
    closed = [record for record in records_in(restarting.journal) if isinstance(record, RoundClosed)]
    final = [record.key or "" for record in closed if record.state != "interrupted"]
    assert sorted(final) == sorted(came)
    assert verify(restarting.journal).problems == []


async def test_started_again_while_the_disk_is_full_it_goes_on_once_there_is_room(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can mount a file system")
    size = 20_000
    async with filled_up(tmp_path, "file system") as (restarting, fill_up, make_room), agents(restarting, echo("a")):
        came = await killed_while_full(restarting, fill_up, size)
        async with restarting.client() as client:
            await joined(client, "a")
            assert await client.ask("echo", "before" + "." * size, key="before") == came["before"]
            came |= await ask_until_refused(client, size, "again")
            make_room()
            for key, earlier in came.items():
                outcome = await ask_until_taken(client, key, size)
                assert not isinstance(earlier, Outcome) or outcome == earlier
        await restarting.stop()
        assert verify(restarting.journal).problems == []

"""One side of the benchmark: a coordinator, its crowd, and a client of it."""

import asyncio
import contextlib
import os
import time
import urllib.request
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from quorate_coordinator.certificates import DevelopmentCredentials
from quorate_coordinator.demo.examples import examples_directory
from quorate_coordinator.demo.processes import (
    DemoFailed,
    Processes,
    clean_environ,
    ready_socket,
    wait_joined,
    wait_ready,
)
from quorate_protocol.client import Client
from quorate_protocol.credentials import find_token
from quorate_protocol.transport import ClientTls

#: Whether there is a journal.
Journal = Literal["on", "off"]

#: What the crowd is asked.
_TASK: Final = "echo"
_QUESTION: Final = {"x": 1.5}

#: Longest that a round may take, in seconds: far over what is measured.
_DEADLINE_S: Final = 60.0

#: Agents that only wait must not be measured: they are silent for longer than the benchmark asks the others.
_SESSIONS: Final = {"QUORATE_SESSIONS__PULSE_S": "30", "QUORATE_SESSIONS__LEASE_S": "120"}

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Used:
    """What a coordinator has used since its start."""

    #: Seconds of processor time, all threads together.
    cpu_s: float
    #: Bytes written to files.
    written_bytes: int
    #: Records that became durable, and the transactions that made them so.
    records: int
    commits: int


@dataclass(slots=True)
class Turn:
    """What came of asking one coordinator for a while."""

    #: Seconds from each question to its outcome.
    times_s: list[float] = field(default_factory=list)
    elapsed_s: float = 0.0
    #: By the coordinator, in that time.
    cpu_s: float = 0.0
    written_bytes: int = 0
    records: int = 0
    commits: int = 0

    @property
    def rounds_per_s(self) -> float:
        """Rounds that came to their end in a second."""
        return len(self.times_s) / self.elapsed_s


class Side:
    """See `side`."""

    def __init__(self, journal: Journal, client: Client, pid: int, metrics_url: str) -> None:
        self.journal: Final = journal
        self._client = client
        self._pid = pid
        self._metrics_url = metrics_url

    async def ask_for(self, seconds: float, agents: int, in_flight: int) -> Turn:
        """Asks for so many seconds, so many rounds at a time; each waits for all its agents.

        Raises:
            DemoFailed: a round did not bring all answers.
        """
        turn = Turn()
        before = await self._used()
        began = time.perf_counter()
        ends_at = began + seconds

        async def ask() -> None:
            asked_at = time.perf_counter()
            while asked_at < ends_at:
                outcome = await self._client.ask(_TASK, _QUESTION, quorum=1.0, deadline_s=_DEADLINE_S)
                if outcome.state != "complete" or len(outcome.results) != agents:
                    raise DemoFailed(f"a round of {agents} agents is {outcome.state}: {outcome.reason or 'too few'}")
                now = time.perf_counter()
                turn.times_s.append(now - asked_at)
                asked_at = now

        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(ask())
        turn.elapsed_s = time.perf_counter() - began
        after = await self._used()
        turn.cpu_s = after.cpu_s - before.cpu_s
        turn.written_bytes = after.written_bytes - before.written_bytes
        turn.records = after.records - before.records
        turn.commits = after.commits - before.commits
        return turn

    async def _used(self) -> Used:
        counts = await asyncio.to_thread(_read_metrics, self._metrics_url)
        process = Path(f"/proc/{self._pid}")
        # After the name, which may hold anything: proc_pid_stat(5), fields 14 and 15.
        ticks = process.joinpath("stat").read_text().rpartition(")")[2].split()[11:13]
        # What went to files through write(2) and its like; datagrams do not.
        io = dict(line.split(": ") for line in process.joinpath("io").read_text().splitlines())
        return Used(
            cpu_s=sum(map(int, ticks)) / _TICKS_PER_S,
            written_bytes=int(io["wchar"]),
            records=int(counts.get("quorate_journal_records_total", 0)),
            commits=int(counts.get("quorate_journal_commits_total", 0)),
        )


@contextlib.asynccontextmanager
async def side(
    journal: Journal, agents: int, hosts: int, directory: Path, credentials: DevelopmentCredentials
) -> AsyncIterator[Side]:
    """A coordinator with or without a journal, and a crowd of so many agents in so many processes.

    The directory is there and empty.

    Raises:
        DemoFailed: a process did not start or ended early.
    """
    processes = Processes(directory)
    token = find_token(credentials.token_file)
    env = clean_environ(QUORATE_TOKEN=token, QUORATE_CA=str(credentials.ca_file))
    try:
        with ready_socket(directory) as (ready, notify_env):
            settings = {
                "QUORATE_LISTEN": "127.0.0.1:0",
                "QUORATE_HTTP": "127.0.0.1:0",
                "QUORATE_STATE_DIR": str(directory / "state"),
                "QUORATE_TLS__CERTIFICATE_FILE": str(credentials.certificate_file),
                "QUORATE_TLS__KEY_FILE": str(credentials.key_file),
                "QUORATE_JOURNAL__SYNC": "full" if journal == "on" else "off",
                **_SESSIONS,
            }
            command = ("-m", "quorate_coordinator", "coordinator")
            await processes.start("coordinator", *command, env={**env, **notify_env, **settings})
            addresses = await wait_ready(ready, processes)
        url = f"quic://{addresses['X_QUORATE_LISTEN']}"
        names = await _start_crowd(processes, agents, hosts, url, env)
        async with await Client.connect(url, token=token, tls=ClientTls(credentials.ca_file), name="bench") as client:
            await wait_joined(client, names, processes)
            yield Side(journal, client, processes.pid("coordinator"), f"http://{addresses['X_QUORATE_HTTP']}/metrics")
    finally:
        await processes.stop()


async def _start_crowd(processes: Processes, agents: int, hosts: int, url: str, env: Mapping[str, str]) -> list[str]:
    """Starts the processes that host the agents; returns the agents' names."""
    names: list[str] = []
    crowd = str(examples_directory() / "crowd.py")
    for host in range(hosts):
        count = agents // hosts + (host < agents % hosts)
        name = f"crowd-{host}"
        arguments = ("--coordinator", url, "--agents", str(count), "--name", name)
        await processes.start(name, crowd, *arguments, env=dict(env))
        names += [f"{name}-{number}" for number in range(count)]
    return names


def _read_metrics(url: str) -> dict[str, float]:
    """The samples without labels."""
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310  our own coordinator, over HTTP
        text = answer.read().decode()
    lines = (line.split() for line in text.splitlines() if not line.startswith("#") and "{" not in line)
    return {name: float(value) for name, value in lines}

"""The processes of the demo and of benchmarks: started, watched, ended, with a log each."""

import asyncio
import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final

from quorate_protocol.client import Client
from quorate_protocol.errors import QuorateError
from quorate_protocol.transport.address import join_host_port, parse_listen_address

#: How long the processes may take to be ready, in seconds: six imports of River on two cores.
_START_TIMEOUT_S: Final = 90.0

#: How long a process may take to end after SIGTERM, in seconds.
_STOP_TIMEOUT_S: Final = 15.0

#: Runs its arguments if the process with the number in $0 is the parent.
_UNLESS_ORPHANED: Final = '[ "$PPID" = "$0" ] && exec "$@"'


def clean_environ(**more: str) -> dict[str, str]:
    """This process's environment without what the shell has set for other coordinators, and more."""
    return {key: value for key, value in os.environ.items() if not key.startswith("QUORATE_")} | more


class DemoFailed(QuorateError):
    """A process of the demo, or of a benchmark, did not start or ended early. `log_tail` has the end of its log."""

    def __init__(self, problem: str, log_tail: str = "") -> None:
        super().__init__(problem)
        self.log_tail = log_tail


class Processes:
    """Processes and their logs, in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    async def start(
        self, name: str, *arguments: str, env: dict[str, str], niceness: int = 0, piped: bool = False
    ) -> None:
        """Starts `python ARGUMENTS`; its output goes to a file, or where it is piped to `line`."""
        command = [sys.executable, *arguments]
        if setpriv := shutil.which("setpriv"):
            # When this process is killed, the kernel ends the others. One that began only after it was killed is
            # not told any more, and finds another parent.
            command = [setpriv, "--pdeathsig", "TERM", "sh", "-c", _UNLESS_ORPHANED, str(os.getpid()), *command]
        with (self._directory / f"{name}.log").open("wb") as output:
            self._processes[name] = await asyncio.create_subprocess_exec(
                *command,
                env=env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if piped else output,
                stderr=output,
                start_new_session=True,
            )
        if niceness:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._processes[name].pid, niceness)

    def check(self) -> None:
        """Raises:
        DemoFailed: one of them has ended.
        """
        for name, process in self._processes.items():
            if process.returncode is not None:
                problem = f"{name} ended with exit code {process.returncode}; the end of its log is above"
                raise DemoFailed(problem, self._tail(name))

    async def watch(self) -> None:
        """Returns never.

        Raises:
            DemoFailed: one of them has ended.
        """
        waits = [asyncio.create_task(process.wait()) for process in self._processes.values()]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self.check()

    async def stop(self) -> None:
        """Ends them all: asks first, then insists."""
        for process in reversed(self._processes.values()):
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
        for process in self._processes.values():
            try:
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    async def line(self, name: str) -> str:
        """The next line that a piped one says.

        Raises:
            DemoFailed: it has ended instead.
        """
        process = self._processes[name]
        assert process.stdout is not None
        if not (line := await process.stdout.readline()):
            await process.wait()
            problem = f"{name} ended with exit code {process.returncode}; the end of its log is above"
            raise DemoFailed(problem, self._tail(name))
        return line.decode()

    def pid(self, name: str) -> int:
        """The number of one that was started."""
        return self._processes[name].pid

    def _tail(self, name: str) -> str:
        lines = (self._directory / f"{name}.log").read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-15:]) or "  (nothing)"


@contextlib.contextmanager
def ready_socket(directory: Path) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """Where the coordinator says that it is ready, as it does to systemd."""
    path = str(directory / "ready")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.setblocking(False)
        yield sock, {"NOTIFY_SOCKET": path}


async def wait_ready(ready: socket.socket, processes: Processes) -> dict[str, str]:
    """What the coordinator says when it is ready; its addresses among it.

    Raises:
        DemoFailed: it was not in time, or a process has ended.
    """
    receiving = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(ready, 4096))
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            text = await unless_one_ends(receiving, processes)
    except TimeoutError:
        raise DemoFailed(f"the coordinator was not ready within {_START_TIMEOUT_S:g} s") from None
    return dict(line.split("=", 1) for line in text.decode().splitlines())


async def wait_joined(client: Client, agents: Collection[str], processes: Processes) -> None:
    """Returns when all these agents are connected.

    Raises:
        DemoFailed: they were not in time, or a process has ended.
    """
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while True:
                fleet = await client.agents()
                if {agent.agent for agent in fleet.agents if agent.state == "connected"} >= set(agents):
                    return
                processes.check()
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise DemoFailed(f"the agents had not joined within {_START_TIMEOUT_S:g} s") from None


async def unless_one_ends(work: "asyncio.Future[Any]", processes: Processes) -> Any:
    """The result of `work`, or what a process's early end raises."""
    watching = asyncio.ensure_future(processes.watch())
    try:
        await asyncio.wait((work, watching), return_when=asyncio.FIRST_COMPLETED)
        if watching.done() and not work.done():
            watching.result()
        return await work
    finally:
        for future in (work, watching):
            future.cancel()
        await asyncio.wait((work, watching))


def reachable(listen: str) -> str:
    """The address at which this machine reaches what listens there: "every interface" is no destination."""
    host, port = parse_listen_address(listen)
    return join_host_port({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)  # noqa: S104  compared, not bound

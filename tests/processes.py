"""The command `quorate` as processes, started as a user would start them."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

#: Over anything that a process does in time on a busy machine.
PATIENCE_S = 60.0

#: The script beside the interpreter, as installed.
QUORATE = str(Path(sys.executable).with_name("quorate"))


class Ended(NamedTuple):
    """How a process ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """Standard error, which must be one line that is no log, and no traceback."""
        lines = [line for line in self.err.splitlines() if not line.startswith("{")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]

    @property
    def logged(self) -> list[dict[str, Any]]:
        """The log's events."""
        return [json.loads(line) for line in self.err.splitlines() if line.startswith("{")]


class Process:
    """A process that runs."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.pid = process.pid
        assert process.stdout is not None
        assert process.stderr is not None
        self._out, self._err = bytearray(), bytearray()
        self._readers = [
            asyncio.create_task(self._read(process.stdout, self._out)),
            asyncio.create_task(self._read(process.stderr, self._err)),
        ]

    @staticmethod
    async def _read(stream: asyncio.StreamReader, into: bytearray) -> None:
        while data := await stream.read(65_536):
            into += data

    @property
    def out_so_far(self) -> str:
        """What has come on its standard output."""
        return self._out.decode(errors="replace")

    @property
    def err_so_far(self) -> str:
        """What has come on its standard error, up to the last whole line."""
        return self._err.decode(errors="replace").rpartition("\n")[0]

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def write(self, data: str | bytes) -> None:
        """To its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(data.encode() if isinstance(data, str) else data)
        await self.process.stdin.drain()

    async def end(self) -> Ended:
        """Closes its standard input and waits for its end."""
        async with asyncio.timeout(PATIENCE_S):
            if self.process.stdin is not None:
                self.process.stdin.close()
            await self.process.wait()
            await asyncio.gather(*self._readers)
        assert self.process.returncode is not None
        return Ended(self.process.returncode, self._out.decode(), self._err.decode())


def clean_environment(**variables: str) -> dict[str, str]:
    """What the tests were started with, less what is meant for Quorate."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("QUORATE_", "NOTIFY_"))}
    return {**kept, **variables}


@contextlib.asynccontextmanager
async def running(*arguments: str, **environ: str) -> AsyncIterator[Process]:
    """Starts `quorate ARGUMENTS`, and sees that it is gone at the end."""
    process = await asyncio.create_subprocess_exec(
        QUORATE,
        *arguments,
        env=clean_environment(**environ),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    started = Process(process)
    try:
        yield started
    finally:
        if process.returncode is None:
            process.kill()
        await started.end()


async def quorate(*arguments: str, stdin: str | bytes = "", **environ: str) -> Ended:
    """Runs `quorate ARGUMENTS` to its end."""
    async with running(*arguments, **environ) as process:
        if stdin:
            await process.write(stdin)
        return await process.end()


class CoordinatorProcess:
    """`quorate coordinator` and what it told its supervisor."""

    def __init__(self, process: Process, notified: socket.socket, state_dir: Path) -> None:
        self.process = process
        self.state_dir = state_dir
        self._notified = notified
        self.listen = ""
        self.http = ""

    @property
    def url(self) -> str:
        return f"quic://{self.listen}"

    async def told(self) -> dict[str, str]:
        """The next that it tells, as systemd would hear it."""
        async with asyncio.timeout(PATIENCE_S):
            text = await asyncio.get_running_loop().sock_recv(self._notified, 4096)
        return dict(line.split("=", 1) for line in text.decode().splitlines())

    async def ready(self) -> None:
        told = await self.told()
        assert told["READY"] == "1"
        self.listen, self.http = told["X_QUORATE_LISTEN"], told["X_QUORATE_HTTP"]
        assert told["STATUS"] == f"listening on {self.listen}"


@contextlib.asynccontextmanager
async def coordinator_process(
    state_dir: Path, *arguments: str, listen: str = "127.0.0.1:0", **environ: str
) -> AsyncIterator[CoordinatorProcess]:
    """Starts a coordinator on free ports; returns when it is ready."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(f"{folder}/notify")
        notified.setblocking(False)
        settings = {
            "QUORATE_LISTEN": listen,
            "QUORATE_HTTP": "127.0.0.1:0",
            "QUORATE_STATE_DIR": str(state_dir),
            "NOTIFY_SOCKET": f"{folder}/notify",
            **environ,
        }
        async with running("coordinator", *arguments, **settings) as process:
            coordinator = CoordinatorProcess(process, notified, state_dir)
            await coordinator.ready()
            yield coordinator


def processes_with(variable: str, value: str) -> dict[int, str]:
    """Processes that live and whose environment has this: pid to command line."""
    found = {}
    wanted = f"{variable}={value}".encode()
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if wanted in (directory / "environ").read_bytes().split(b"\0"):
                found[int(directory.name)] = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found

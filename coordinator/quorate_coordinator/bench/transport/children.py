"""The benchmark's processes, seen from the one that started them."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from quorate_coordinator.bench.transport.link import DEFAULTS, LinkOptions
from quorate_coordinator.bench.transport.peer import QUORATE, STOCK
from quorate_coordinator.certificates import DevelopmentCredentials
from quorate_coordinator.demo.processes import clean_environ
from quorate_protocol.errors import QuorateError

#: Both, ours first: the order in which everything is measured.
SIDES: Final = (QUORATE, STOCK)

#: Longest that one command may take, in seconds.
_ANSWER_TIMEOUT_S: Final = 90.0
#: How long a process may take to end when its standard input has, in seconds.
_STOP_TIMEOUT_S: Final = 2.0
#: Longest answer, in bytes: some thousand samples.
_ANSWER_BYTES_MAX: Final = 16 << 20


class BenchFailed(QuorateError):
    """A process of a benchmark ended early or could not do what it was told. `log_tail` has the end of its log."""

    def __init__(self, problem: str, log_tail: str = "") -> None:
        super().__init__(problem)
        self.log_tail = log_tail


class Child:
    """One process; see `peer`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log

    async def do(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Has one command carried out and returns its answer.

        Raises:
            BenchFailed: it could not, took too long, or the process has ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        line = b""
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                stdin.write(json.dumps({"do": command, **arguments}).encode() + b"\n")
                await stdin.drain()
                line = await stdout.readline()
        except TimeoutError:
            raise self._failed(f"no answer to {command} within {_ANSWER_TIMEOUT_S:g} s") from None
        except ConnectionError:
            pass
        if not line:
            raise self._failed(f"ended during {command}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer["ok"]  # type: ignore[no-any-return]

    async def stop(self) -> None:
        """Ends it: by the end of its input, then by force."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def _failed(self, problem: str) -> BenchFailed:
        lines = self._log.read_text(errors="replace").splitlines()
        return BenchFailed(f"the process {self.name}: {problem}", "\n".join(f"  {line}" for line in lines[-15:]))


@dataclass(frozen=True, slots=True)
class Pair:
    """Server and client of one side, and the port on which the server listens for this client."""

    server: Child
    client: Child
    port: int = 0


class Children:
    """Starts processes and ends them all in the end."""

    def __init__(self, directory: Path, credentials: DevelopmentCredentials) -> None:
        self._directory = directory
        self._tls = {
            "ca": str(credentials.ca_file),
            "certificate": str(credentials.certificate_file),
            "key": str(credentials.key_file),
        }
        self._children: list[Child] = []
        self._pairs: dict[str, Pair] = {}

    async def start(self, side: str, what: str) -> Child:
        """Starts one process."""
        name = f"{side} {what}"
        log = self._directory / f"{side}-{what}-{len(self._children)}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "quorate_coordinator.bench.transport.peer", side, str(_processor(what))),
                env=clean_environ(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                limit=_ANSWER_BYTES_MAX,
                # Ctrl-C is for the parent, which ends them.
                start_new_session=True,
            )
        child = Child(name, process, log)
        self._children.append(child)
        return child

    async def stop(self) -> None:
        """Ends those that still run."""
        children, self._children = self._children, []
        await asyncio.gather(*(child.stop() for child in children))

    @contextlib.asynccontextmanager
    async def linked(
        self, ours: LinkOptions = DEFAULTS, stock: LinkOptions = DEFAULTS, *, fresh: bool = False
    ) -> AsyncIterator[dict[str, Pair]]:
        """Both sides with a link; those processes, or fresh ones whose memory nothing has touched."""
        linked: dict[str, Pair] = {}
        try:
            for side, options in zip(SIDES, (ours, stock), strict=True):
                pair = await self._start_pair(side) if fresh else await self._pair(side)
                told = {"tls": self._tls, "options": asdict(options)}
                port = (await pair.server.do("listen", **told))["port"]
                linked[side] = Pair(pair.server, pair.client, port)
                await pair.client.do("connect", port=port, **told)
            yield linked
            for pair in linked.values():
                await pair.client.do("close")
                await pair.server.do("close")
        finally:
            if fresh:
                await asyncio.gather(
                    *(child.stop() for pair in linked.values() for child in (pair.client, pair.server))
                )

    async def _pair(self, side: str) -> Pair:
        if side not in self._pairs:
            self._pairs[side] = await self._start_pair(side)
        return self._pairs[side]

    async def _start_pair(self, side: str) -> Pair:
        return Pair(await self.start(side, "server"), await self.start(side, "client"))


def _processor(what: str) -> int:
    """A processor for each end: where the scheduler puts both on one, one waits for the other, and that is measured."""
    processors = sorted(os.sched_getaffinity(0))
    return processors[0] if what == "server" else processors[-1]

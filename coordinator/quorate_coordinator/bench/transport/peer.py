"""One of the benchmark's processes: `python -m quorate_coordinator.bench.transport.peer quorate|stock`.

It reads commands from standard input, one at a time, each a line of JSON `{"do": NAME, ...}`, and answers each with
a line `{"ok": {...}}` or `{"error": TEXT}`. It ends when its standard input does, so that it never outlives the
process that started it.
"""

import asyncio
import gc
import json
import os
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from quorate_coordinator.bench.transport.flood import flood
from quorate_coordinator.bench.transport.link import LinkOptions, Listener, Side, TlsFiles
from quorate_coordinator.bench.transport.memory import MemoryWatch
from quorate_coordinator.bench.transport.services import serve
from quorate_coordinator.bench.transport.workloads import Workloads
from quorate_protocol.garbage import relax_collector

#: Names of the sides, as in the first argument.
QUORATE: Final = "quorate"
STOCK: Final = "stock"


class Peer:
    """Carries out commands; each public coroutine is one."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._listener: Listener | None = None
        self._workloads: Workloads | None = None
        self._memory = MemoryWatch()

    async def handle(self, command: dict[str, Any]) -> dict[str, Any]:
        """Answers one command."""
        name = command.pop("do")
        assert not name.startswith("_")
        target = self if hasattr(Peer, name) else self._workloads
        method: Callable[..., Awaitable[dict[str, Any]]] = getattr(target, name)
        return await method(**command)

    async def listen(self, tls: dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
        """Begins to listen."""
        self._listener = await self._side.listen(_files(tls), LinkOptions(**options), serve)
        return {"port": self._listener.port}

    async def connect(self, port: int, tls: dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
        """Connects, and sees that both ends are ready."""
        link = await self._side.connect(port, _files(tls), LinkOptions(**options))
        self._workloads = Workloads(link)
        return await self._workloads.greet()

    async def close(self) -> dict[str, Any]:
        """Ends what `listen` or `connect` began."""
        if self._workloads is not None:
            await self._workloads.link.close()
        if self._listener is not None:
            await self._listener.close()
        self._workloads = self._listener = None
        return {}

    async def watch_memory(self) -> dict[str, Any]:
        """Takes the resident set as it is now for the base of `memory_growth`."""
        gc.collect()
        self._memory.start()
        return {}

    async def memory_growth(self) -> dict[str, Any]:
        """`bytes`: by how much the resident set was larger since, at its largest."""
        return {"bytes": self._memory.stop()}

    async def flood(self, port: int, per_s: int, seconds: float) -> dict[str, Any]:
        """Sends garbage to a port; `sent`: how many datagrams."""
        return {"sent": await flood(port, per_s, seconds)}


def _files(tls: dict[str, str]) -> TlsFiles:
    return TlsFiles(**{name: Path(path) for name, path in tls.items()})


async def run(side: Side, answers: int) -> None:
    """Serves commands until standard input ends."""
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    peer = Peer(side)
    line = await commands.readline()
    while line:
        working = asyncio.ensure_future(_answer(peer, json.loads(line)))
        reading = asyncio.ensure_future(commands.readline())
        # Nothing but the end comes before the answer.
        await asyncio.wait((working, reading), return_when=asyncio.FIRST_COMPLETED)
        if reading.done() and not working.done():
            working.cancel()
            return
        os.write(answers, json.dumps(await working).encode() + b"\n")
        line = await reading


async def _answer(peer: Peer, command: dict[str, Any]) -> dict[str, Any]:
    name = command["do"]
    try:
        return {"ok": await peer.handle(command)}
    except Exception as error:  # noqa: BLE001  whatever it is, the parent must hear of it
        traceback.print_exc()
        return {"error": f"{name}: {type(error).__name__}: {error}"}


def main() -> None:
    """The process: which side it is, and the processor that it runs on."""
    os.sched_setaffinity(0, {int(sys.argv[2])})
    side: Side
    if sys.argv[1] == STOCK:
        from quorate_coordinator.bench.transport.stock_side import StockSide

        side = StockSide()
    else:
        from quorate_coordinator.bench.transport.quorate_side import QuorateSide

        side = QuorateSide()
    # Whatever else is printed must not get between the answers.
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    relax_collector()
    asyncio.run(run(side, answers))


if __name__ == "__main__":
    main()

"""Many agents in one process and one event loop, to see what a coordinator can do: each answers with what it was asked.

::

    python agent/examples/crowd.py --agents 50 --coordinator quic://127.0.0.1:4433

This is how agents are run from a program of one's own, without `quorate-agent`. What they join with is found as
`quorate-agent` finds it: QUORATE_TOKEN and QUORATE_CA, or the files of a coordinator on this machine.
"""

import argparse
import asyncio
import contextlib
import signal
from typing import Any

from quorate_agent import Agent
from quorate_protocol import logs
from quorate_protocol.credentials import find_ca, find_token
from quorate_protocol.garbage import relax_collector
from quorate_protocol.transport import ClientTls

agent = Agent("crowd", concurrency=64)


async def echo(body: Any) -> Any:
    return body


async def run(url: str, names: list[str]) -> None:
    """Joins the coordinator under each name, until SIGTERM or SIGINT."""
    token, tls = find_token(), ClientTls(find_ca())
    crowd = asyncio.gather(*(agent.run(url, token=token, tls=tls, id=name) for name in names))
    for caught in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(caught, crowd.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await crowd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--coordinator", metavar="URL", default="quic://localhost:4433", help="its address")
    parser.add_argument("--agents", metavar="N", type=int, default=50, help="how many; 50")
    parser.add_argument("--name", default="crowd", help="their names begin with it: NAME-0, NAME-1 and so on; crowd")
    parser.add_argument("--task", metavar="NAME", default="echo", help="what they call it; echo")
    given = parser.parse_args()
    agent.task(given.task)(echo)
    logs.configure("warning", "auto")
    relax_collector()
    asyncio.run(run(given.coordinator, [f"{given.name}-{number}" for number in range(given.agents)]))


if __name__ == "__main__":
    main()

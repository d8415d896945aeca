"""One end of a link in a network namespace of its own: `python path_peer.py serve|send ADDRESS DIRECTORY ...`.

Says what it does in JSON lines.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from quorate_protocol.transport import ClientTls, ServerTls, connect, listen

MEGABYTE = bytes(1_000_000)


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)  # noqa: T201


async def serve(address: str, directory: Path) -> None:
    tls = ServerTls(directory / "cert.pem", directory / "key.pem")
    async with await listen(f"{address}:4433", tls=tls) as server:
        say(listens=True)
        connection = await server.accept()
        while not connection.is_closed:
            stream = await connection.accept_bi_stream()
            count = 0
            async for chunk in stream:
                count += len(chunk)
            await stream.send(b"%d" % count)
            await stream.finish()


async def send(address: str, directory: Path) -> None:
    """A megabyte for each line on standard input; says what came of it."""
    tls = ClientTls(directory / "ca.pem", server_name="localhost")
    loop = asyncio.get_running_loop()
    async with await connect(f"quic://{address}:4433", tls=tls) as connection:
        say(connected=True)
        while await loop.run_in_executor(None, sys.stdin.readline):
            stream = await connection.open_bi_stream()
            await stream.send(MEGABYTE)
            await stream.finish()
            answer = await stream.receive()
            # The search goes on beside the bulk, and a little after it.
            before = -1
            while before != connection.stats.udp_payload_bytes:
                before = connection.stats.udp_payload_bytes
                await asyncio.sleep(0.2)
            say(received=int(answer), udp_payload_bytes=connection.stats.udp_payload_bytes)


asyncio.run({"serve": serve, "send": send}[sys.argv[1]](sys.argv[2], Path(sys.argv[3])))

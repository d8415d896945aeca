"""Who moves the bytes: an operator who asks one large question, and three processes that do the same by TLS over TCP.

Each is `python -m quorate_coordinator.bench.bodies.moving ROLE ...`. Who begins says when it did and when all had come
back, by `time.perf_counter`, as one line of JSON.
"""

import asyncio
import json
import os
import ssl
import sys
import time
from pathlib import Path
from typing import Final

import numpy

from quorate_protocol.client import Client
from quorate_protocol.credentials import find_ca, find_token
from quorate_protocol.transport import ClientTls

#: What the agent for the large body is asked.
TASK: Final = "large"

#: Longest that the body may be under way both ways, in seconds.
DEADLINE_S: Final = 600.0

#: Bytes of the body that are random; it repeats them.
_BLOCK_BYTES: Final = 4 << 20

#: Bytes that are read at once, as Quorate does.
_CHUNK_BYTES: Final = 256 << 10


async def operate(url: str, size_bytes: int) -> None:
    """Asks for the body once, and compares what comes back."""
    block = numpy.frombuffer(os.urandom(_BLOCK_BYTES), "u1")
    body = numpy.resize(block, size_bytes)
    async with await Client.connect(url, token=find_token(), tls=ClientTls(find_ca()), name="large") as client:
        began_s = time.perf_counter()
        outcome = await client.ask(TASK, body, quorum=1.0, deadline_s=DEADLINE_S)
        ended_s = time.perf_counter()
        if outcome.state != "complete":
            raise SystemExit(f"the round is {outcome.state}: {outcome.results[0].error}")
        pieces = [slice(at, at + _BLOCK_BYTES) for at in range(0, size_bytes, _BLOCK_BYTES)]
        for answer in (outcome.value, *(result.value for result in outcome.results)):
            if len(answer) != size_bytes or not all(numpy.array_equal(answer[at], body[at]) for at in pieces):
                raise SystemExit("the answer is another than the question")
    _say(began_s=began_s, ended_s=ended_s)


async def relay(certificate: str, key: str) -> None:
    """Passes on what comes from the first of two to the second, and the other way. Says its port first."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    ends: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ends.put((reader, writer))

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=context, limit=_CHUNK_BYTES)
    async with server:
        _say(port=server.sockets[0].getsockname()[1])
        (one, to_one), (other, to_other) = await ends.get(), await ends.get()
        await asyncio.gather(_pass_on(one, to_other), _pass_on(other, to_one))


async def echo(port: int, ca: str) -> None:
    """The far end: gives back what comes."""
    reader, writer = await _connect(port, ca)
    await _pass_on(reader, writer)


async def send(port: int, ca: str, size_bytes: int) -> None:
    """The near end: sends so many bytes and waits until they have come back."""
    reader, writer = await _connect(port, ca)
    block = os.urandom(_CHUNK_BYTES)

    async def upload() -> None:
        for at in range(0, size_bytes, _CHUNK_BYTES):
            writer.write(block[: size_bytes - at])
            await writer.drain()

    began_s = time.perf_counter()
    uploading = asyncio.create_task(upload())
    left = size_bytes
    while left:
        chunk = await reader.read(_CHUNK_BYTES)
        if not chunk:
            raise SystemExit("the relay has ended")
        left -= len(chunk)
    await uploading
    _say(began_s=began_s, ended_s=time.perf_counter())


async def _connect(port: int, ca: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = ssl.create_default_context(cafile=ca)
    return await asyncio.open_connection(
        "127.0.0.1", port, ssl=context, server_hostname="localhost", limit=_CHUNK_BYTES
    )


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(_CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    writer.close()


def _say(**values: float) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def main() -> None:
    """See the module."""
    role, *given = sys.argv[1:]
    match role, given:
        case "operate", [url, size]:
            work = operate(url, int(size))
        case "relay", [certificate, key]:
            work = relay(certificate, key)
        case "echo", [port, ca]:
            work = echo(int(port), ca)
        case "send", [port, ca, size]:
            work = send(int(port), ca, int(size))
        case _:
            raise SystemExit(f"{Path(__file__).name}: no such role: {role} {' '.join(given)}")
    asyncio.run(work)


if __name__ == "__main__":
    main()

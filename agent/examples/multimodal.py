"""Three modalities at once over one connection, and what each costs the others.

    python agent/examples/multimodal.py [SECONDS]

starts a coordinator with this file's `take` as the consumer of the three topics, joins it as an agent, and sends each
modality alone, then all three together, SECONDS (two) each. The table at the end shows how long messages were under
way, from the agent's `send` to the consumer's reading, in milliseconds:

- `sensor`: 64 bytes fifty times a second, HIGH;
- `audio`: 20 ms of sound (1,920 bytes) fifty times a second, NORMAL;
- `video`: 250 KB twenty-five times a second, LOW.

In a fleet of your own, the coordinator finds the consumer by its setting `consumers`, and the agent is run with
`quorate-agent run agent/examples/multimodal.py:agent`.
"""

import asyncio
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quorate_agent import Agent
from quorate_agent.streams import OwnStreams
from quorate_protocol import logs
from quorate_protocol.transport import ClientTls, Priority

#: Topic → (bytes of a message, seconds between two, sending class).
MODALITIES = {
    "sensor": (64, 0.02, Priority.HIGH),
    "audio": (1_920, 0.02, Priority.NORMAL),
    "video": (250_000, 0.04, Priority.LOW),
}

#: Seconds that each phase lasts.
PHASE_S = float(sys.argv[1]) if __name__ == "__main__" and len(sys.argv) > 1 else 2.0

#: What a message begins with: its length, and when it was sent (monotonic nanoseconds, the same for all processes of a
#: machine).
HEADER = struct.Struct("!IQ")

#: Where the consumer writes down how long messages were under way.
RESULTS = "QUORATE_MULTIMODAL_RESULTS"

agent = Agent("multimodal")
done = asyncio.Event()


@agent.task("modalities")
async def modalities(body: Any) -> list[str]:
    """What this agent sends beside its answers."""
    return list(MODALITIES)


@agent.background
async def perform(streams: OwnStreams) -> None:
    """Each modality alone, then all at once."""
    for topic in MODALITIES:
        await send(streams, topic)
    await asyncio.gather(*(send(streams, topic) for topic in MODALITIES))
    done.set()


async def send(streams: OwnStreams, topic: str) -> None:
    """One stream of a modality, for the time of a phase."""
    size, period_s, priority = MODALITIES[topic]
    padding = bytes(size - HEADER.size)
    async with await streams.open_stream(topic, priority=priority) as stream:
        begin = time.monotonic()
        for number in range(int(PHASE_S / period_s)):
            await asyncio.sleep(begin + number * period_s - time.monotonic())
            await stream.send(HEADER.pack(size, time.monotonic_ns()) + padding)


async def take(stream: Any) -> None:
    """The consumer, in the coordinator: notes for each message how long it was under way."""
    waiting = b""
    latencies_ms: list[float] = []
    async for chunk in stream:
        waiting += chunk
        while len(waiting) >= HEADER.size:
            size, sent_ns = HEADER.unpack_from(waiting)
            if len(waiting) < size:
                break
            waiting = waiting[size:]
            latencies_ms.append((time.monotonic_ns() - sent_ns) / 1e6)
    note(stream.topic, sorted(latencies_ms))


def note(topic: str, latencies_ms: list[float]) -> None:
    if results := os.environ.get(RESULTS):
        with Path(results).open("a") as file:
            file.write(json.dumps({"topic": topic, "latencies_ms": latencies_ms}) + "\n")


def show(lines: list[dict[str, Any]]) -> None:
    """The table. The first stream of each topic was alone, the second was not."""
    runs = {topic: [line["latencies_ms"] for line in lines if line["topic"] == topic] for topic in MODALITIES}
    print(f"{'':8}{'alone':>16}{'with the others':>20}    ms under way, p50 / p99")
    for topic, both in runs.items():
        cells = [f"{run[len(run) // 2]:.2f} / {run[len(run) * 99 // 100]:.2f}" for run in both]
        print(f"{topic:8}{cells[0]:>16}{cells[1]:>20}")


async def join(url: str, token: str, tls: ClientTls) -> None:
    """Works as an agent until everything was sent."""
    joined = asyncio.create_task(agent.run(url, token=token, tls=tls))
    await asyncio.wait((joined, asyncio.create_task(done.wait())), return_when=asyncio.FIRST_COMPLETED)
    joined.cancel()


def main() -> None:
    logs.configure("warning")
    with tempfile.TemporaryDirectory() as folder:
        state, results = Path(folder, "state"), Path(folder, "results")
        environ = {
            **os.environ,
            "QUORATE_STATE_DIR": str(state),
            "QUORATE_LISTEN": "127.0.0.1:0",
            "QUORATE_HTTP": "",
            "QUORATE_LOG_FORMAT": "json",
            "QUORATE_CONSUMERS": ", ".join(f"{topic}={Path(__file__).resolve()}:take" for topic in MODALITIES),
            RESULTS: str(results),
        }
        command = [sys.executable, "-m", "quorate_coordinator", "coordinator"]
        coordinator = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)  # noqa: S603  our own
        assert coordinator.stderr is not None
        try:
            log = ""
            while not (started := re.search(r'"listen": "127.0.0.1:(\d+)"', log)):
                if not (line := coordinator.stderr.readline()):
                    raise SystemExit(f"the coordinator did not start:\n{log}")
                log += line
            token = (state / "token").read_text().strip()
            asyncio.run(join(f"quic://127.0.0.1:{started[1]}", token, ClientTls(state / "ca.pem")))
        finally:
            coordinator.terminate()
            coordinator.communicate()
        show([json.loads(line) for line in results.read_text().splitlines()])


if __name__ == "__main__":
    main()

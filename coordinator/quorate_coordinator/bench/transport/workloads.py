"""What the connecting process does and measures. All times are in seconds."""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from quorate_coordinator.bench.transport.link import Link, Pipe
from quorate_coordinator.bench.transport.services import (
    CALL,
    ECHO,
    HEADER,
    NEGLECT,
    RECEIPT,
    SINK,
    receive_exactly,
)

#: A small message, in bytes.
MESSAGE_BYTES: Final = 64
#: Handed to one `send` of a large transfer, in bytes.
_CHUNK: Final = bytes(256 << 10)
#: Bytes of the first transfer of a warm-up; each next is twice as large.
_WARM_UP_BYTES: Final = 1 << 20
#: Longest wait for one answer. On loopback, who waits so long waits for a lost datagram.
_ANSWER_TIMEOUT_S: Final = 5.0
#: Turns of the loop between samples, for what has come to be handled outside of what is measured. No sleep: what a
#: processor that was asleep takes to get going is not the transport's.
_SETTLE_TURNS: Final = 10
#: Head start of the bulk, in seconds.
_BULK_LEAD_S: Final = 0.001


class Workloads:
    """One link and what is done with it; each public coroutine is a command to the process."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._streams: dict[bytes, Pipe] = {}
        self._idle: list[Pipe] = []

    async def greet(self) -> dict[str, Any]:
        """One echo: when it returns, both ends are ready."""
        await self._echo(bytes(MESSAGE_BYTES))
        return {}

    async def warm_up(self, seconds: float, transfer_s: float) -> dict[str, Any]:
        """Transfers more and more until a transfer takes about `transfer_s`, for `seconds` at the least.

        Returns:
            `count`: bytes that take about `transfer_s`; `udp_payload_bytes` at the end.
        """
        began = time.perf_counter()
        count = _WARM_UP_BYTES
        while True:
            taken_s = (await self.transfer(count))["seconds"]
            if taken_s < transfer_s / 2:
                count *= 2
            elif time.perf_counter() - began >= seconds:
                break
        return {"count": int(count * transfer_s / taken_s), "udp_payload_bytes": self.link.udp_payload_bytes}

    async def transfer(self, count: int) -> dict[str, Any]:
        """Sends as many bytes on one stream, the same each time; until the receiver says that it has read them."""
        pipe = await self._stream(SINK)
        began = time.perf_counter()
        await pipe.send(HEADER.pack(SINK, count))
        await _send_all(pipe, count)
        await _receipt(pipe)
        return {"seconds": time.perf_counter() - began}

    async def open_and_send(self, count: int) -> dict[str, Any]:
        """From before a stream is opened until its first bytes are handed to the kernel; as many samples."""
        link = self.link
        message = HEADER.pack(CALL, 0).ljust(MESSAGE_BYTES, b"\0")
        times: list[float] = []
        with _uncollected():
            for _ in range(count):
                await _settle()
                before = link.sends
                began = time.perf_counter()
                pipe = await link.open()
                await pipe.send(message)
                while link.sends == before:  # noqa: ASYNC110  the loop's turn is what is measured
                    await asyncio.sleep(0)
                times.append(time.perf_counter() - began)
                # Ended and answered before the next: no limit on streams is ever met.
                await pipe.finish()
                await _receipt(pipe)
                await pipe.receive()  # its end
        return {"times_s": times}

    async def datagram_round_trips(self, count: int) -> dict[str, Any]:
        """Echoes of an unreliable message, one after the other."""
        message = bytes(MESSAGE_BYTES)

        async def round_trip() -> None:
            self.link.send_datagram(message)
            await self.link.receive_datagram()

        return {"times_s": await _timed(round_trip, count)}

    async def stream_round_trips(self, count: int, seconds: float | None = None) -> dict[str, Any]:
        """Echoes on one open stream, one after the other; no more of them after `seconds`."""
        message = bytes(MESSAGE_BYTES)
        await self._echo(message)
        return {"times_s": await _timed(lambda: self._echo(message), count, seconds)}

    async def open_idle(self, count: int) -> dict[str, Any]:
        """Has so many streams open on which nothing happens. Returns when the peer knows them all."""
        missing = count - len(self._idle)
        for _ in range(missing):
            pipe = await self.link.open()
            await pipe.send(HEADER.pack(ECHO, 0))
            self._idle.append(pipe)
        if missing > 0:
            for pipe in (self._idle[-1], self._idle[-missing]):
                await pipe.send(b".")
                await receive_exactly(pipe, 1)
        await self._echo(bytes(MESSAGE_BYTES))
        return {}

    async def send_cost(self, count: int) -> dict[str, Any]:
        """CPU time of this thread from before a small message is sent until it is handed to the kernel."""
        link = self.link
        message = bytes(MESSAGE_BYTES)
        pipe = await self._stream(ECHO)
        times: list[float] = []
        with _uncollected():
            for _ in range(count):
                before = link.sends
                began = time.thread_time()
                await pipe.send(message)
                while link.sends == before:  # noqa: ASYNC110  the loop's turn is what is measured
                    await asyncio.sleep(0)
                times.append(time.thread_time() - began)
                await receive_exactly(pipe, MESSAGE_BYTES)
                await _settle()
        return {"times_s": times}

    async def overtake(self, streams: int, bulk_bytes: int, critical_bytes: int) -> dict[str, Any]:
        """Queues bulk on as many streams, then something critical on one more.

        Returns:
            `critical_s` and `bulk_s`: until the receiver has read all of the one and of the other.
        """
        bulk = [await self._open_sink(bulk_bytes) for _ in range(streams)]
        began = time.monotonic()
        sending = [asyncio.ensure_future(_send_counted(pipe, bulk_bytes)) for pipe in bulk]
        # They have all handed over what the transport takes, and the first packets have left.
        await asyncio.sleep(_BULK_LEAD_S)
        urgent_began = time.monotonic()
        urgent = await self._open_sink(critical_bytes, critical=True)
        urgent_done = await _send_counted(urgent, critical_bytes)
        bulk_done = max(await asyncio.gather(*sending))
        for pipe in (urgent, *bulk):
            await pipe.finish()
        return {"critical_s": urgent_done - urgent_began, "bulk_s": bulk_done - began}

    async def offer(self, count: int, patience_s: float) -> dict[str, Any]:
        """Offers bytes to a reader that never reads, until nothing more was taken for `patience_s`.

        Returns:
            `accepted`: bytes that the transport took.
        """
        pipe = await self.link.open()
        await pipe.send(HEADER.pack(NEGLECT, 0))
        accepted = 0

        async def push() -> None:
            nonlocal accepted
            while accepted < count:
                await pipe.send(_CHUNK)
                accepted += len(_CHUNK)

        pushing = asyncio.ensure_future(push())
        try:
            seen, changed_at = 0, time.monotonic()
            while time.monotonic() - changed_at < patience_s:
                await asyncio.sleep(0.02)
                if accepted != seen:
                    seen, changed_at = accepted, time.monotonic()
                if pushing.done():
                    pushing.result()
        finally:
            pushing.cancel()
            await asyncio.wait((pushing,))
        return {"accepted": accepted}

    async def _open_sink(self, count: int, *, critical: bool = False) -> Pipe:
        """A stream whose header is sent: to the stock API, one on which nothing was written is none."""
        pipe = await self.link.open(critical=critical)
        await pipe.send(HEADER.pack(SINK, count))
        return pipe

    async def _stream(self, service: bytes) -> Pipe:
        """The one stream for a service that goes on; the header of an echo is sent."""
        pipe = self._streams.get(service)
        if pipe is None:
            pipe = self._streams[service] = await self.link.open()
            if service == ECHO:
                await pipe.send(HEADER.pack(ECHO, 0))
        return pipe

    async def _echo(self, message: bytes) -> None:
        pipe = self._streams.get(ECHO) or await self._stream(ECHO)
        await pipe.send(message)
        if await receive_exactly(pipe, len(message)) is None:
            raise EOFError("the stream ended before its echo")


async def _settle() -> None:
    for _ in range(_SETTLE_TURNS):
        await asyncio.sleep(0)


async def _send_all(pipe: Pipe, count: int) -> None:
    while count >= len(_CHUNK):
        await pipe.send(_CHUNK)
        count -= len(_CHUNK)
    if count:
        await pipe.send(_CHUNK[:count])


async def _send_counted(pipe: Pipe, count: int) -> float:
    """Sends as many bytes after the header; returns the clock when the receiver had them all."""
    await _send_all(pipe, count)
    return await _receipt(pipe)


async def _receipt(pipe: Pipe) -> float:
    data = await receive_exactly(pipe, RECEIPT.size)
    if data is None:
        raise EOFError("the stream ended before its receipt")
    (at,) = RECEIPT.unpack(data)
    return float(at)


async def _timed(work: Callable[[], Awaitable[None]], count: int, seconds: float | None = None) -> list[float]:
    """How long each of `count` calls takes, one after the other."""
    times: list[float] = []
    with _uncollected():
        ends_at = time.perf_counter() + seconds if seconds is not None else float("inf")
        try:
            # One limit for many: one for each would be measured, too.
            async with asyncio.timeout((seconds or 0.0) + _ANSWER_TIMEOUT_S):
                while len(times) < count and (began := time.perf_counter()) < ends_at:
                    await work()
                    times.append(time.perf_counter() - began)
        except TimeoutError:
            if not times:
                raise
    return times


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection inside: when one falls into a sample is chance."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()

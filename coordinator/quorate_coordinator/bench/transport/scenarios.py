"""What is measured for which row."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from quorate_coordinator.bench.result import Row, is_selected
from quorate_coordinator.bench.transport import plan as promised
from quorate_coordinator.bench.transport.children import SIDES, Children, Pair
from quorate_coordinator.bench.transport.link import LinkOptions
from quorate_coordinator.bench.transport.peer import QUORATE, STOCK
from quorate_coordinator.bench.transport.plan import Plan
from quorate_coordinator.feeding.tally import quantile

#: What we are compared with.
PEER: Final = "aioquic"

IDLE_STREAMS: Final = (0, 1000, 5000)
#: Over the idle ones, for those that are used.
_STREAMS_MAX: Final = 10_000
BULK_STREAMS: Final = 20
CRITICAL_BYTES: Final = 100_000
#: Garbage datagrams a second.
_FLOOD_PER_S: Final = 20_000
#: The flood begins this long before what it shall disturb, and goes on as long after it, in seconds.
_FLOOD_LEAD_S: Final = 0.1
#: More round trips than fit the time.
_MANY: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Bench:
    """What a scenario works with."""

    children: Children
    plan: Plan


@dataclass(frozen=True, slots=True)
class Scenario:
    """One measurement, which gives one or more rows."""

    #: Shown while it runs.
    title: str
    #: Names of its rows, in order.
    names: tuple[str, ...]
    measure: Callable[[Bench], Awaitable[list[Row]]]


def _one_stream(name: str, ours: int | None, stock: int | None, target: float | None) -> Scenario:
    async def measure(bench: Bench) -> list[Row]:
        plan = bench.plan
        rates: dict[str, list[float]] = {side: [] for side in SIDES}
        warm: dict[str, dict[str, Any]] = {}
        async with bench.children.linked(LinkOptions(ours), LinkOptions(stock)) as linked:
            for side, pair in linked.items():
                warm[side] = await pair.client.do("warm_up", seconds=plan.warm_up_s, transfer_s=plan.transfer_s)
            for _ in range(plan.repetitions):
                for side, pair in linked.items():
                    count = warm[side]["count"]
                    taken_s = (await pair.client.do("transfer", count=count))["seconds"]
                    rates[side].append(count / taken_s / 1e6)
        note = (
            None if ours else f"ours came to datagrams of {warm[QUORATE]['udp_payload_bytes']} bytes, {PEER} has 1200"
        )
        return [
            Row(
                name, "MB/s", median(rates[QUORATE]), PEER, median(rates[STOCK]),
                target=target, lower_is_better=False, note=note,
            )
        ]  # fmt: skip

    return Scenario(name, (name,), measure)


def _times(
    what: str, targets: tuple[float | None, float | None], samples: Callable[[Pair, Plan], Awaitable[dict[str, Any]]]
) -> Scenario:
    """Quantiles of samples that are taken in blocks, ours and the stock's in turn."""
    names = (f"{what}, p50", f"{what}, p99")

    async def measure(bench: Bench) -> list[Row]:
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        async with bench.children.linked() as linked:
            for repetition in range(-1, bench.plan.repetitions):
                for side, pair in linked.items():
                    block = (await samples(pair, bench.plan))["times_s"]
                    if repetition >= 0:  # the first block warms up
                        times[side] += block
        return [
            Row(name, "µs", _us(times[QUORATE], q), PEER, _us(times[STOCK], q), target=target)
            for name, q, target in zip(names, (0.5, 0.99), targets, strict=True)
        ]

    return Scenario(what, names, measure)


def _idle_streams() -> Scenario:
    names = tuple(f"send cost, {count or 'no'} idle streams" for count in IDLE_STREAMS)
    ratio_name = f"send cost, {IDLE_STREAMS[-1]} idle streams against none"

    async def measure(bench: Bench) -> list[Row]:
        costs: dict[str, list[float]] = {side: [] for side in SIDES}
        options = LinkOptions(streams_max=_STREAMS_MAX)
        async with bench.children.linked(options, options) as linked:
            for count in IDLE_STREAMS:
                for side, pair in linked.items():
                    await pair.client.do("open_idle", count=count)
                    await pair.client.do("send_cost", count=bench.plan.cost_samples // 4)
                    block = (await pair.client.do("send_cost", count=bench.plan.cost_samples))["times_s"]
                    costs[side].append(_us(block, 0.5))
        rows = [
            Row(name, "µs", ours, PEER, stock)
            for name, ours, stock in zip(names, costs[QUORATE], costs[STOCK], strict=True)
        ]
        ours, stock = (costs[side][-1] / costs[side][0] for side in SIDES)
        rows.append(
            Row(
                ratio_name, "x", ours, PEER, stock, target=promised.IDLE_STREAMS_RATIO,
                note="CPU time of the sender for one small message, median; the limits on streams are raised on both",
            )
        )  # fmt: skip
        return rows

    return Scenario("send cost with idle streams", (*names, ratio_name), measure)


def _overtaking() -> Scenario:
    name = f"critical {CRITICAL_BYTES // 1000} KB behind {BULK_STREAMS} bulk streams, share of their time"

    async def measure(bench: Bench) -> list[Row]:
        shares: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(bench.plan.overtakes):
            async with bench.children.linked() as linked:
                for side, pair in linked.items():
                    await pair.client.do("warm_up", seconds=0.0, transfer_s=0.1)
                    took = await pair.client.do(
                        "overtake",
                        streams=BULK_STREAMS,
                        bulk_bytes=bench.plan.bulk_bytes,
                        critical_bytes=CRITICAL_BYTES,
                    )
                    shares[side].append(100 * took["critical_s"] / took["bulk_s"])
        note = f"{PEER} sends its streams in turn: what it takes for one is as large a share as it is of the bytes"
        return [
            Row(
                name, "%", median(shares[QUORATE]), PEER, median(shares[STOCK]),
                target=promised.OVERTAKE_PERCENT, note=note,
            )
        ]  # fmt: skip

    return Scenario("overtaking", (name,), measure)


def _memory() -> Scenario:
    names = tuple(f"{who}'s memory, 1 GiB offered to a reader that never reads" for who in ("receiver", "sender"))

    async def measure(bench: Bench) -> list[Row]:
        plan = bench.plan
        growth: dict[str, list[float]] = {}
        accepted: dict[str, float] = {}
        # Memory that earlier work has used and freed would hide what this takes.
        async with bench.children.linked(fresh=True) as linked:
            for side, pair in linked.items():
                ends = (pair.server, pair.client)
                for child in ends:
                    await child.do("watch_memory")
                count = plan.offered_bytes if side == QUORATE else plan.offered_stock_bytes
                answer = await pair.client.do("offer", count=count, patience_s=plan.held_s)
                accepted[side] = answer["accepted"] / 2**20
                growth[side] = [(await child.do("memory_growth"))["bytes"] / 2**20 for child in ends]
        note = (
            f"growth of the resident set; {PEER} was offered {plan.offered_stock_bytes >> 20} MiB, to spare the "
            f"machine, and took {accepted[STOCK]:.0f}; ours took {accepted[QUORATE]:.1f} of 1024"
        )
        return [
            Row(name, "MiB", ours, PEER, stock, target=promised.MEMORY_MIB, note=note)
            for name, ours, stock in zip(names, growth[QUORATE], growth[STOCK], strict=True)
        ]

    return Scenario("memory", names, measure)


def _flood() -> Scenario:
    name = "stream round trip p50, under a flood of garbage against without"

    async def measure(bench: Bench) -> list[Row]:
        seconds = bench.plan.flood_s
        ratios: dict[str, float] = {}
        sent = 0
        flooder = await bench.children.start(QUORATE, "flooder")
        try:
            async with bench.children.linked() as linked:
                for side, pair in linked.items():

                    async def p50(pair: Pair = pair) -> float:
                        answer = await pair.client.do("stream_round_trips", count=_MANY, seconds=seconds)
                        return _us(answer["times_s"], 0.5)

                    without = await p50()
                    flooding = asyncio.ensure_future(
                        flooder.do("flood", port=pair.port, per_s=_FLOOD_PER_S, seconds=seconds + 2 * _FLOOD_LEAD_S)
                    )
                    try:
                        await asyncio.sleep(_FLOOD_LEAD_S)
                        ratios[side] = await p50() / without
                        sent = (await flooding)["sent"]
                    finally:
                        flooding.cancel()
        finally:
            await flooder.stop()
        note = f"{sent / (seconds + 2 * _FLOOD_LEAD_S):,.0f} datagrams of 1200 random bytes a second"
        return [Row(name, "x", ratios[QUORATE], PEER, ratios[STOCK], note=note)]

    return Scenario("flood of garbage", (name,), measure)


SCENARIOS: Final = (
    _one_stream("one stream, discovered MTU", None, None, promised.DISCOVERED_MB_S),
    _one_stream("one stream, 1452-byte datagrams", 1452, 1452, promised.DATAGRAMS_1452_MB_S),
    _one_stream("one stream, 1200-byte datagrams", 1200, None, None),
    _times(
        "open a stream and send",
        (promised.OPEN_P50_US, promised.OPEN_P99_US),
        lambda pair, plan: pair.client.do("open_and_send", count=plan.samples),
    ),
    _times(
        "datagram round trip",
        (promised.DATAGRAM_ROUND_TRIP_P50_US, None),
        lambda pair, plan: pair.client.do("datagram_round_trips", count=plan.samples),
    ),
    _times(
        "stream round trip",
        (None, None),
        lambda pair, plan: pair.client.do("stream_round_trips", count=plan.samples),
    ),
    _idle_streams(),
    _overtaking(),
    _memory(),
    _flood(),
)


def selected(only: Collection[str]) -> list[Scenario]:
    """The scenarios with a row whose name holds one of these texts, whatever their case; all without texts."""
    return [scenario for scenario in SCENARIOS if any(is_selected(name, only) for name in scenario.names)]


def _us(times_s: Sequence[float], q: float) -> float:
    value = quantile(times_s, q)
    assert value is not None
    return value * 1e6

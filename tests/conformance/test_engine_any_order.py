"""Whatever two applications do, in any order, over any network: what was promised for each stream holds at the end."""

import random
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conformance.harness import End, World, make_world
from quorate_protocol.transport import Priority

#: One byte pattern for all: what a stream carries is told by its offset and its id.
PATTERN = random.Random(0).randbytes(1 << 20)


@dataclass
class Half:
    """One direction of a stream: who writes, who reads, and what each has done."""

    stream_id: int
    writer: End
    reader: End
    written: int = 0
    ended: bool = False
    reset: int | None = None
    stopped: int | None = None

    def content(self) -> bytes:
        start = self.stream_id * 31 % 1000
        return PATTERN[start : start + self.written]

    @property
    def writable(self) -> bool:
        return not self.ended and self.reset is None and self.stream_id not in self.writer.seen.stops


class Applications:
    """Carries steps out, as far as the port allows them now, and keeps what was done."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.halves: list[Half] = []
        self._answered: set[int] = set()

    def step(self, kind: int, pick: int, size: int) -> None:
        world = self.world
        end, other = (world.client, world.server) if pick & 1 else (world.server, world.client)
        halves = [half for half in self.halves if half.writable]
        half = halves[pick % len(halves)] if halves else None
        match kind:
            case 0 | 1:
                bi = bool(pick & 2)
                if end.engine.can_open_stream(bidirectional=bi):
                    priority = list(Priority)[pick >> 2 & 3]
                    stream_id = end.engine.open_stream(bidirectional=bi, priority=priority)
                    self.halves.append(Half(stream_id, end, other))
                    self.write(self.halves[-1], size, end=bool(pick & 16))
            case 2 | 3 if half:
                self.write(half, size, end=False)
            case 4 if half:
                self.write(half, size % 100, end=True)
            case 5 if half:
                half.reset = size
                half.writer.engine.reset(half.stream_id, size)
            case 6 if half and half.stream_id in half.reader.met and half.stopped is None:
                # Only what is known there can be stopped, and only once.
                half.stopped = size
                half.reader.engine.stop(half.stream_id, size)
            case 7:
                # Whoever was asked answers.
                for stream_id in end.met:
                    if not stream_id & 2 and stream_id not in self._answered:
                        self._answered.add(stream_id)
                        self.halves.append(Half(stream_id, end, other))
                        self.write(self.halves[-1], size, end=bool(pick & 2))
                        break
            case 8 if half:
                half.writer.engine.set_priority(half.stream_id, list(Priority)[size & 3])
            case 9:
                end.engine.send_datagram(bytes(size % 1000))
            case 10:
                end.reads = not end.reads
            case _:
                world.rest((size % 64) / 1000)

    def write(self, half: Half, size: int, *, end: bool) -> None:
        data = half.content()
        half.written = min(half.written + size, len(PATTERN) - 1000)
        half.ended = end
        half.writer.engine.write(half.stream_id, half.content()[len(data) :], end)

    def settled(self, half: Half) -> bool:
        """Whether both sides know all that there is to know of it."""
        reader, writer = half.reader.seen, half.writer.seen
        if half.stream_id in writer.stops:
            return True
        if half.stopped is not None:
            # A stop of what has ended or was reset meanwhile need not be told (RFC 9000, 3.5).
            return half.ended or half.reset is not None
        if half.reset is not None:
            # What had all arrived by then may be told as an end.
            return half.stream_id in reader.resets or half.stream_id in reader.ended
        if half.ended:
            return half.stream_id in reader.ended
        return len(reader.data[half.stream_id]) == half.written


steps = st.lists(st.tuples(st.integers(0, 14), st.integers(0, 255), st.integers(0, 60_000)), min_size=5, max_size=60)
networks = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1 << 20),
        "loss": st.sampled_from([0.0, 0.0, 0.02, 0.1, 0.3]),
        "doubles": st.sampled_from([0.0, 0.1]),
        "jitter_s": st.sampled_from([0.0, 0.003, 0.030]),
        "delay_s": st.sampled_from([0.0005, 0.010, 0.080]),
        "payload_bytes_max": st.sampled_from([1200, 1472, 65_527]),
        "rate_bytes_s": st.sampled_from([None, None, 2_000_000]),
    }
)


def test_what_was_promised_holds_whatever_is_done_in_whatever_order(make_factory, credentials):
    @settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], database=None)
    @given(steps=steps, network=networks)
    def check(steps, network):
        world = make_world(make_factory, credentials, **network).connect()
        applications = Applications(world)
        for step in steps:
            applications.step(*step)
        for end in world.ends:
            end.reads = True
        for way in (world.up, world.down):
            way.loss = min(way.loss, 0.05)
        halves = applications.halves
        world.run(lambda: all(map(applications.settled, halves)))
        world.run(lambda: all(end.engine.unacknowledged_total_bytes == 0 for end in world.ends))
        for half in halves:
            reader, writer = half.reader.seen, half.writer.seen
            arrived = bytes(reader.data[half.stream_id])
            assert half.content().startswith(arrived)
            if half.stream_id in reader.ended:
                assert arrived == half.content()
            # What the one heard, the other has said.
            assert reader.resets.get(half.stream_id, half.reset) in (half.reset, half.stopped)
            assert writer.stops.get(half.stream_id, half.stopped) == half.stopped
        assert world.client.seen.close is world.server.seen.close is None
        assert world.client.misrouted == world.server.misrouted == 0
        # And the connection is as good as new.
        last = world.client.open(PATTERN[:50_000])
        world.run(lambda: last in world.server.seen.ended)
        assert world.server.seen.data[last] == PATTERN[:50_000]

    check()

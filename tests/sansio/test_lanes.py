"""Which stream sends next."""

import random
from types import SimpleNamespace

import pytest

from quorate_protocol.transport.api import Priority
from quorate_protocol.transport.engine.lanes import PATIENCE_PACKETS, Lanes

CRITICAL, HIGH, NORMAL, LOW = Priority


def stream(number: int, packets: int = 10**9) -> SimpleNamespace:
    """One with so many packets to send."""
    return SimpleNamespace(stream_id=number, packets=packets)


def add(lanes: Lanes, priority: Priority, *streams: SimpleNamespace) -> None:
    for one in streams:
        lanes.set_priority(one, priority)
        lanes.add(one)


def serve(lanes: Lanes, count: int) -> list[int]:
    """Which stream had each of so many packets."""
    served = []

    def write(one: SimpleNamespace) -> bool:
        if not one.packets:
            return False
        one.packets -= 1
        served.append(one.stream_id)
        return True

    for _ in range(count):
        lanes.serve(write)
    return served


def test_a_higher_class_goes_first_and_the_lower_ones_are_not_forgotten() -> None:
    lanes = Lanes()
    add(lanes, NORMAL, stream(0))
    add(lanes, CRITICAL, stream(4, packets=200))
    served = serve(lanes, 500)
    patience = PATIENCE_PACKETS[NORMAL]
    assert served[:patience] == [4] * patience
    assert served.index(0) == patience
    assert served[:200].count(0) == pytest.approx(200 / (patience + 1), abs=2)
    assert set(served[260:]) == {0}


@pytest.mark.parametrize("priority", [HIGH, NORMAL, LOW])
def test_each_lower_class_gets_its_part_beside_an_endless_higher_one(priority: Priority) -> None:
    lanes = Lanes()
    add(lanes, CRITICAL, stream(0))
    add(lanes, priority, stream(4))
    served = serve(lanes, 2000)
    assert served.count(4) >= 2000 // (PATIENCE_PACKETS[priority] + 1) - 1


def test_all_four_classes_are_served_beside_each_other() -> None:
    lanes = Lanes()
    for number, priority in enumerate(Priority):
        add(lanes, priority, stream(4 * number))
    served = serve(lanes, 4000)
    shares = [served.count(4 * number) for number in range(4)]
    assert shares == sorted(shares, reverse=True)
    assert min(shares) >= 4000 // (PATIENCE_PACKETS[LOW] + 1) - 2


def test_streams_of_one_class_take_turns() -> None:
    lanes = Lanes()
    add(lanes, NORMAL, *(stream(4 * number) for number in range(5)))
    assert serve(lanes, 10) == [0, 4, 8, 12, 16] * 2


def test_a_stream_is_in_one_lane_once() -> None:
    lanes = Lanes()
    one = stream(0, packets=3)
    for priority in (LOW, HIGH, NORMAL, CRITICAL, NORMAL):
        add(lanes, priority, one)
    assert len(lanes) == 1
    assert serve(lanes, 6) == [0, 0, 0]
    assert len(lanes) == 0
    lanes.add(one)
    assert len(lanes) == 1


def test_a_class_changed_midway_holds_from_the_next_packet() -> None:
    lanes = Lanes()
    one, other = stream(0), stream(4)
    add(lanes, NORMAL, one, other)
    serve(lanes, 4)
    lanes.set_priority(other, CRITICAL)
    assert serve(lanes, 5) == [4] * 5


def test_any_order_of_changes_serves_everything_that_there_is(request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("randomly_seed", 0)
    source = random.Random(seed)
    lanes, streams, expected = Lanes(), [stream(4 * number, packets=0) for number in range(20)], 0
    served: list[int] = []
    for _ in range(3000):
        one = source.choice(streams)
        match source.randrange(3):
            case 0:
                one.packets += 1
                expected += 1
                lanes.add(one)
            case 1:
                lanes.set_priority(one, source.choice(list(Priority)))
            case 2:
                served += serve(lanes, 1)
    served += serve(lanes, 4000)
    assert len(served) == expected
    assert len(lanes) == 0

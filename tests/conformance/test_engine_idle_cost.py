"""What idle streams and connections cost: counted in calls of functions, which are the same on every machine."""

import sys

import pytest

from conformance.harness import World

#: What stands between "no more" and the noise of acknowledgements that fall differently.
ALIKE = 1.1


def calls(world: World, action) -> int:
    """How many functions are called while `action` runs, in Python and in C."""
    count = 0

    def tally(frame, event, argument):
        nonlocal count
        if event in ("call", "c_call"):
            count += 1

    sys.setprofile(tally)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def message_calls(world: World, here, there, times: int = 10) -> int:
    """Calls for small messages, one after the other, on a stream that is open."""
    stream_id = here.open(b"first", end=False)
    world.run(lambda: there.seen.data[stream_id])
    world.rest(1.0)

    def talk():
        for _ in range(times):
            before = len(there.seen.data[stream_id])
            here.engine.write(stream_id, b"a small message")
            world.run(lambda before=before: len(there.seen.data[stream_id]) > before)
            world.rest(0.1)

    talk()
    return calls(world, talk)


def with_idle(connected, opener: str, idle: int):
    world = connected()
    here = getattr(world, opener)
    there = world.server if here is world.client else world.client
    for _ in range(idle):
        stream_id = here.open(b"x", end=False)
    if idle:
        world.run(lambda: there.seen.data[stream_id])
    world.rest(2.0)
    return world, here, there


@pytest.mark.parametrize("opener", ["client", "server"])
def test_a_small_message_costs_no_more_with_a_thousand_idle_streams(connected, opener):
    none = message_calls(*with_idle(connected, opener, 0))
    thousand = message_calls(*with_idle(connected, opener, 1000))
    assert thousand <= ALIKE * none


def test_a_small_message_costs_no_more_with_streams_that_are_held(connected):
    """Streams that have bytes and no permission to send them are as good as idle."""
    none = message_calls(*with_idle(connected, "client", 0))
    world = connected()
    world.server.reads = False
    for _ in range(5):
        world.client.open(bytes(2 << 20), end=False)
    world.rest(3.0)
    held = message_calls(world, world.client, world.server)
    assert held <= ALIKE * none


def test_an_answer_costs_no_more_after_ten_thousand_streams_have_come_and_gone(connected):
    none = message_calls(*with_idle(connected, "client", 0))
    world = connected()
    for _ in range(100):
        ids = [world.client.open(b"x", bi=False) for _ in range(100)]
        world.run(lambda ids=ids: world.server.seen.ended >= set(ids))
    world.rest(2.0)
    assert message_calls(world, world.client, world.server) <= ALIKE * none


def test_a_pass_with_nothing_to_send_costs_a_handful_of_calls(connected):
    world, here, there = with_idle(connected, "client", 500)
    for end in (here, there):
        passes = calls(world, lambda end=end: [end.engine.datagrams_to_send(world.now, 64) for _ in range(100)])
        assert passes <= 60 * 100

"""A stranger who sees the packets and cannot make any: what he changes, cuts, repeats or makes up has no effect.

Only datagrams that he adds are looked at here; what he takes away is a loss.
"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance.harness import CLIENT_ADDRESS, SERVER_ADDRESS, make_world
from fuzz.budget import fuzz
from fuzz.mutations import mutated, tampered
from quorate_protocol.transport import ALPN


def test_a_stranger_on_the_path_does_not_disturb(make_factory, credentials):
    @given(seed=st.integers(0, 1 << 32), share=st.sampled_from([0.2, 1.0, 3.0]))
    def check(seed, share):
        rng = random.Random(seed)
        seen: dict[bool, list[bytes]] = {True: [], False: []}

        def strange(to_server, datagram):
            seen[to_server].append(datagram)
            # Also what went the other way: back to its sender.
            earlier = seen[to_server] if rng.random() < 0.8 else seen[True] + seen[False]
            count = int(share) + (rng.random() < share % 1)
            made = [tampered(rng, datagram, earlier) for _ in range(count)]
            cut = rng.randrange(len(made) + 1)
            return made[:cut], made[cut:]

        world = make_world(make_factory, credentials, seed=seed, loss=0.02)
        world.strange = strange
        world.connect()
        data = rng.randbytes(30_000)
        stream_id = world.client.open(data)
        world.run(lambda: stream_id in world.server.seen.ended)
        world.server.engine.write(stream_id, data, end=True)
        world.run(lambda: stream_id in world.client.seen.ended)
        assert world.server.seen.data[stream_id] == world.client.seen.data[stream_id] == data
        assert world.client.seen.close is world.server.seen.close is None
        # He cannot make a message come twice either.
        world.client.engine.send_datagram(b"once")
        world.rest(1.0)
        assert world.server.seen.datagrams == [b"once"] or world.server.seen.datagrams == []
        world.client.engine.close(7, "bye")
        world.run(lambda: world.client.engine.is_gone, within_s=20.0)
        world.rest(40.0)
        assert world.server.seen.close is not None

    fuzz(check, 60)


ELSEWHERE = ("198.51.100.7", 7)

#: How far a connection has come when the datagrams arrive.
STATES = ["first flight", "handshake", "connected", "busy", "closing", "draining", "gone"]


def brought_to(state, make_factory, credentials):
    """A world in one of the states, and the datagrams that both ends have sent."""
    world = make_world(make_factory, credentials)
    sent: list[bytes] = []
    world.strange = lambda to_server, datagram: (sent.append(datagram), ([], []))[1]
    world.client.engine.connect(SERVER_ADDRESS, world.now)
    world.serve()
    if state == "first flight":
        return world, sent
    world.rest(0.012)
    if state == "handshake":
        return world, sent
    world.run(lambda: all(end.seen.protocol for end in world.ends) and world.there)
    world.rest(0.5)
    if state == "connected":
        return world, sent
    for end in world.ends:
        end.open(bytes(40_000), end=False)
    world.rest(0.012)
    if state == "busy":
        return world, sent
    world.client.engine.close(1, "bye")
    world.serve()
    if state == "draining":
        world.rest(0.015)
    if state == "gone":
        world.rest(60.0)
    return world, sent


@pytest.mark.parametrize("state", STATES)
def test_any_datagram_in_any_state_raises_nothing(make_factory, credentials, state):
    _, originals = brought_to(state, make_factory, credentials)
    samples = mutated(st.sampled_from(originals or [bytes(1200)])) | st.binary(max_size=1500)

    @given(datagrams=st.lists(samples, min_size=1, max_size=20))
    def check(datagrams):
        world, own = brought_to(state, make_factory, credentials)
        world.elsewhere.add(ELSEWHERE)
        for datagram in (*datagrams, *own):
            for end in world.ends:
                world.deliver(end, datagram)
                # From elsewhere, too.
                world.deliver(end, datagram, ELSEWHERE)
            world.serve()
        world.rest(1.0)

    fuzz(check, 40)


def test_any_first_datagram_is_inspected_and_served_without_raising(make_factory, credentials):
    factory = make_factory()
    factory.set_server(credentials.tls, [ALPN])
    _, originals = brought_to("connected", make_factory, credentials)

    @given(datagram=mutated(st.sampled_from(originals)) | st.binary(max_size=1500))
    def check(datagram):
        arrival = factory.inspect(datagram)
        if arrival is None:
            return
        assert arrival.answer is None or (not arrival.opens and len(arrival.answer) <= len(datagram))
        if arrival.opens:
            assert len(datagram) >= 1200
            engine = factory.server(arrival)
            engine.receive(datagram, CLIENT_ADDRESS, 1.0)
            sent = sum(len(answer) for answer, _ in engine.datagrams_to_send(1.0, 64))
            assert sent <= 3 * len(datagram)
            if not engine.is_established:
                assert sent == 0

    fuzz(check, 300)

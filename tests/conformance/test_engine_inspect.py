"""What a factory makes of datagrams for no known connection."""

import random

import pytest

from conformance.harness import SERVER_ADDRESS
from quorate_protocol.transport import ALPN, ClientTls

#: RFC 9000, 14.1 and RFC 9369, 3.
INITIAL_BYTES_MIN = 1200
VERSION_1 = 1


@pytest.fixture
def factory(make_factory, credentials):
    made = make_factory()
    made.set_server(credentials.tls, [ALPN])
    return made


@pytest.fixture
def initial(make_factory, credentials):
    """A real first datagram of a client."""
    engine = make_factory().client(ClientTls(ca_file=credentials.ca_file), "localhost", [ALPN])
    engine.connect(SERVER_ADDRESS, 0.0)
    return engine.datagrams_to_send(0.0, 64)[0][0]


def long_header(
    *, to: bytes = b"destined", source: bytes = b"sourceid", first_byte: int = 0xC0, version: int = VERSION_1,
    size: int = INITIAL_BYTES_MIN,
) -> bytes:  # fmt: skip
    """A long header as of an Initial without a token, and noise behind it."""
    header = bytes([first_byte]) + version.to_bytes(4, "big") + bytes([len(to)]) + to + bytes([len(source)]) + source
    rest = max(0, size - len(header) - 3)
    return header + b"\0" + (rest | 0x4000).to_bytes(2, "big") + random.Random(size).randbytes(rest)


def version_negotiation(answer: bytes) -> tuple[bytes, bytes, list[int]]:
    """Destination id, source id and versions of a version negotiation packet (RFC 9000, 17.2.1)."""
    assert answer[0] & 0x80
    assert answer[1:5] == bytes(4)
    destination, rest = answer[6 : 6 + answer[5]], answer[6 + answer[5] :]
    source, versions = rest[1 : 1 + rest[0]], rest[1 + rest[0] :]
    assert len(versions) % 4 == 0
    return destination, source, [int.from_bytes(versions[at : at + 4], "big") for at in range(0, len(versions), 4)]


def test_a_clients_first_datagram_opens_a_connection_under_the_id_that_it_made_up(factory, initial):
    arrival = factory.inspect(initial)
    assert arrival.opens
    assert arrival.answer is None
    assert arrival.destination_id == initial[6 : 6 + initial[5]]
    assert len(arrival.destination_id) >= 8


@pytest.mark.parametrize("size", [*range(1, 60), 300, 1199])
def test_an_initial_that_is_short_opens_nothing_and_gets_no_answer(factory, initial, size):
    arrival = factory.inspect(initial[:size])
    assert arrival is None or (not arrival.opens and arrival.answer is None)


def test_noise_opens_nothing_and_gets_no_answer_longer_than_itself(factory):
    noise = random.Random(7)
    for size in [0, 1, 2, 5, 6, 7, 8, 9, 20, 21, 60, 1199, 1200, 1500, 9000] * 20:
        datagram = noise.randbytes(size)
        arrival = factory.inspect(datagram)
        if arrival is not None:
            assert arrival.answer is None or len(arrival.answer) <= size
            assert not arrival.opens or (datagram[0] & 0x80 and size >= INITIAL_BYTES_MIN)


def test_an_unknown_version_is_told_ours_in_less_than_it_sent(factory):
    for to, source in [(b"destined", b"sourceid"), (bytes(20), bytes(20)), (b"8 bytes.", b"")]:
        arrival = factory.inspect(long_header(to=to, source=source, version=0x1A2A3A4A))
        assert not arrival.opens
        assert len(arrival.answer) < 100
        destination, origin, versions = version_negotiation(arrival.answer)
        # RFC 9000, 17.2.1: the ids of the question, the other way round.
        assert (destination, origin) == (source, to)
        assert VERSION_1 in versions
        assert 0x1A2A3A4A not in versions


@pytest.mark.parametrize("size", [40, 100, 500, 1199])
def test_an_unknown_version_in_a_small_datagram_is_not_answered(factory, size):
    """RFC 9000, 6.1: it could not have opened a connection."""
    arrival = factory.inspect(long_header(version=0x1A2A3A4A, size=size))
    assert arrival is None or (not arrival.opens and arrival.answer is None)


def test_version_negotiation_is_not_answered_with_version_negotiation(factory):
    arrival = factory.inspect(long_header(version=0))
    assert arrival is None or (not arrival.opens and arrival.answer is None)


@pytest.mark.parametrize("first_byte", [0xD0, 0xE0, 0xF0], ids=["0-RTT", "handshake", "retry"])
def test_other_packets_of_a_known_version_open_nothing(factory, first_byte):
    arrival = factory.inspect(long_header(first_byte=first_byte))
    assert arrival is None or (not arrival.opens and arrival.answer is None)


@pytest.mark.parametrize("length", range(8))
def test_a_made_up_id_has_at_least_eight_bytes(factory, length):
    """RFC 9000, 7.2: of shorter ones, two clients' would be alike."""
    arrival = factory.inspect(long_header(to=bytes(length)))
    assert arrival is None or not arrival.opens


def test_ids_longer_than_twenty_bytes_open_nothing(factory):
    for header in (long_header(to=bytes(21)), long_header(source=bytes(21)), long_header(to=bytes(255))):
        arrival = factory.inspect(header)
        assert arrival is None or not arrival.opens


def test_a_short_header_is_for_the_id_behind_its_first_byte(factory):
    arrival = factory.inspect(b"\x40" + b"an id of ours, or not"[: factory.connection_id_bytes] + bytes(100))
    assert not arrival.opens
    assert arrival.answer is None
    assert arrival.destination_id == b"an id of ours, or not"[: factory.connection_id_bytes]


def test_a_factory_that_does_not_serve_opens_nothing(make_factory, initial):
    arrival = make_factory().inspect(initial)
    assert arrival is None or not arrival.opens

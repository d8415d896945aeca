"""Links inside one process: the real endpoint and engine over a network that does as it is told, in virtual time."""

import asyncio
import time

import pytest

from links import Link, digest, noise, pair, ping_pong, read_all, until
from quorate_protocol.errors import ConfigurationError, ConnectFailed, ConnectionClosed
from quorate_protocol.transport import ClientTls, MemoryNetwork, ServerStats, connect, listen
from quorate_protocol.transport import memory as memory_module
from quorate_protocol.transport.engine.aioquic_engine import IDLE_TIMEOUT_S
from quorate_protocol.transport.memory import Fate, Transit
from virtual import memory_linked, run_virtually, steady_credentials, virtual_time

BAD = {"delay_s": 0.02, "jitter_s": 0.01, "loss": 0.03, "duplication": 0.05, "reordering": 0.05}


def now() -> float:
    return asyncio.get_running_loop().time()


async def transfer(link: Link, data: bytes) -> float:
    """Carries bytes from client to server and as many back, at once; returns how long that took."""
    began = now()

    async def carry(opener, accepter):
        sending = await opener.open_uni_stream()

        async def send():
            await sending.send(data)
            await sending.finish()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send())
            assert digest(await read_all(await accepter.accept_uni_stream())) == digest(data)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(carry(link.here, link.there))
        tasks.create_task(carry(link.there, link.here))
    return now() - began


# --- the link ---


@virtual_time
async def test_a_link_in_memory_is_a_link(credentials):
    async with memory_linked(credentials) as link:
        assert link.server.address == ("coordinator", 0)
        assert link.here.peer == "memory:coordinator"
        assert link.there.peer.startswith("memory:client-")
        await ping_pong(*await pair(link), times=3)
        link.here.datagrams.send(b"now")
        assert await link.there.datagrams.receive() == b"now"
        await link.there.close(7, "enough")
        await link.here.wait_closed()
        assert (link.here.close_error.code, link.here.close_error.by_peer) == (7, True)


async def test_a_link_in_memory_does_not_need_virtual_time(credentials):
    async with memory_linked(credentials, MemoryNetwork(delay_s=0.001)) as link:
        await transfer(link, noise(100_000))


@virtual_time
async def test_a_perfect_network_takes_no_time(credentials):
    async with memory_linked(credentials) as link:
        assert await transfer(link, noise(500_000)) < 0.1
        assert link.server.stats.udp_datagrams_dropped == 0


@virtual_time
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_bad_network_is_made_good_in_virtual_time(credentials, seed):
    network = MemoryNetwork(seed, **BAD)
    began = time.perf_counter()
    async with memory_linked(credentials, network) as link:
        assert await transfer(link, noise(300_000)) > 2 * BAD["delay_s"]
    assert time.perf_counter() - began < 10  # of virtual seconds there may be more
    for fate in (Fate.DELIVERED, Fate.DUPLICATED, Fate.REORDERED, Fate.LOST):
        assert network.fates[fate] > 0


@virtual_time
async def test_faults_may_change_while_the_link_lives(credentials):
    network = MemoryNetwork()
    async with memory_linked(credentials, network) as link:
        streams = await pair(link)
        network.delay_s = 0.5
        began = now()
        await ping_pong(*streams)
        assert 1.0 <= now() - began < 1.5
        network.loss = 1.0
        streams[0].send_nowait(b"lost")
        await until(lambda: network.fates[Fate.LOST] >= 2, "lost, and again")
        network.loss = network.delay_s = 0.0
        assert await streams[1].receive() == b"lost"


@virtual_time
async def test_a_partition_holds_everything_up_until_it_heals(credentials):
    network = MemoryNetwork(delay_s=0.01)
    async with memory_linked(credentials, network) as link:
        here, there = await pair(link)
        client = link.there.peer.removeprefix("memory:")
        network.partition("coordinator", client)
        here.send_nowait(b"through")
        reading = asyncio.create_task(there.receive())
        await asyncio.sleep(10)
        assert not reading.done()
        assert network.fates[Fate.PARTITIONED] > 1
        # Others are not concerned.
        assert not network.is_cut("coordinator", "client-99")
        network.heal()
        async with asyncio.timeout(15):
            assert await reading == b"through"
        await ping_pong(here, there)


@virtual_time
async def test_whoever_hears_nothing_gives_up_after_the_idle_timeout(credentials):
    network = MemoryNetwork(delay_s=0.01)
    async with memory_linked(credentials, network) as link:
        await ping_pong(*await pair(link))
        network.partition("coordinator")
        heard_at = link.there.stats.received_at
        for end, at_the_latest_s in ((link.there, IDLE_TIMEOUT_S + 1), (link.here, 1.5 * IDLE_TIMEOUT_S + 1)):
            with pytest.raises(ConnectionClosed, match="Idle timeout"):
                await end.accept_bi_stream()
            assert IDLE_TIMEOUT_S - 1 < now() - heard_at < at_the_latest_s
        assert link.server.stats.connections == 0


@virtual_time
async def test_a_link_that_is_only_quiet_lives(credentials):
    async with memory_linked(credentials, MemoryNetwork(delay_s=0.01)) as link:
        await asyncio.sleep(3600)
        assert not link.here.is_closed
        await ping_pong(*await pair(link))
        assert link.there.stats.udp_datagrams_received < 1000


@virtual_time
@pytest.mark.parametrize("silent", [False, True], ids=["told", "silent"])
@pytest.mark.parametrize("mtu_bytes", [1200, 1300, 9000])
async def test_any_size_of_packets_will_do(credentials, silent, mtu_bytes):
    network = MemoryNetwork(delay_s=0.002, mtu_bytes=mtu_bytes, silent=silent)
    async with memory_linked(credentials, network) as link:
        await transfer(link, noise(300_000))
        assert link.here.engine.udp_payload_bytes <= mtu_bytes


@virtual_time
@pytest.mark.parametrize("silent", [False, True], ids=["told", "silent"])
async def test_packets_that_have_become_too_large_do_not_end_a_link(credentials, silent):
    """A black hole: the path was good for large packets and is not any more."""
    network = MemoryNetwork(delay_s=0.002, mtu_bytes=16_000, silent=silent)
    async with memory_linked(credentials, network) as link:
        await transfer(link, noise(300_000))
        network.mtu_bytes = 1250
        assert await transfer(link, noise(300_000, seed=1)) < IDLE_TIMEOUT_S
        assert link.here.engine.udp_payload_bytes <= 1250


# --- determinism ---


def transits(credentials, seed: int) -> list[Transit]:
    """All that happens in a transfer over a bad network."""
    trace: list[Transit] = []

    async def main() -> None:
        network = MemoryNetwork(seed, **BAD, mtu_bytes=1452, on_transit=trace.append)
        async with memory_linked(credentials, network) as link:
            await transfer(link, noise(200_000))

    run_virtually(main())
    return trace


def test_the_same_seed_gives_the_same_run(tmp_path):
    credentials = steady_credentials(tmp_path)
    first = transits(credentials, 5)
    assert len(first) > 100
    for _ in range(3):
        assert transits(credentials, 5) == first
    assert transits(credentials, 6) != first


def test_the_first_fates_are_the_same_whatever_the_datagrams_hold(credentials, tmp_path):
    """Until what was sent makes a difference to what is sent next."""
    one, other = transits(credentials, 5), transits(steady_credentials(tmp_path), 5)
    assert [transit.fate for transit in one[:50]] == [transit.fate for transit in other[:50]]


# --- names ---


@virtual_time
async def test_where_nobody_listens_connecting_fails_at_once(credentials):
    began = now()
    with pytest.raises(ConnectFailed) as caught:
        await connect("memory:nobody", tls=ClientTls(credentials.ca_file), network=MemoryNetwork())
    assert caught.value.problem == "nobody listens at memory:nobody"
    assert now() == began
    # Networks do not know each other.
    async with memory_linked(credentials, MemoryNetwork(), "somewhere"):
        with pytest.raises(ConnectFailed, match="nobody listens at memory:somewhere"):
            await connect("memory:somewhere", tls=ClientTls(credentials.ca_file))


@virtual_time
async def test_a_server_that_leaves_during_the_handshake(credentials):
    network = MemoryNetwork(delay_s=0.1, loss=1.0)
    server = await listen("memory:coordinator", tls=credentials.tls, network=network)
    connecting = asyncio.create_task(
        connect("memory:coordinator", tls=ClientTls(credentials.ca_file), network=network, timeout_s=30)
    )
    await until(lambda: network.fates[Fate.LOST])
    network.loss = 0.0
    await server.close()
    with pytest.raises(ConnectFailed, match="connection refused: nothing listens there"):
        await connecting


@virtual_time
async def test_a_silent_server_is_given_up(credentials):
    network = MemoryNetwork(loss=1.0)
    async with await listen("memory:coordinator", tls=credentials.tls, network=network):
        began = now()
        with pytest.raises(ConnectFailed, match="no answer within 7 s"):
            await connect("memory:coordinator", tls=ClientTls(credentials.ca_file), network=network, timeout_s=7)
        assert now() - began == pytest.approx(7)


@virtual_time
async def test_a_name_has_one_listener_and_is_free_after_it(credentials):
    for _ in range(2):
        async with await listen("memory:coordinator", tls=credentials.tls):
            with pytest.raises(ConfigurationError, match="cannot listen on memory:coordinator: the name is in use"):
                await listen("memory:coordinator", tls=credentials.tls)


def test_a_loop_that_ended_without_closing_leaves_no_name_behind(credentials):
    async def forget_to_close() -> None:
        await listen("memory:coordinator", tls=credentials.tls)

    for _ in range(2):
        run_virtually(forget_to_close())

    async def close() -> None:
        async with await listen("memory:coordinator", tls=credentials.tls):
            pass

    run_virtually(close())


@virtual_time
async def test_the_certificate_has_to_carry_the_name(credentials):
    network = MemoryNetwork()
    async with await listen("memory:here", tls=credentials.tls, network=network):
        with pytest.raises(ConnectFailed, match="certificate is for another host"):
            other = ClientTls(credentials.ca_file, server_name="elsewhere")
            await connect("memory:here", tls=other, network=network)
        # Without a name it is that of this machine: names in memory are no hosts.
        async with await connect("memory:here", tls=ClientTls(credentials.ca_file), network=network) as connection:
            assert connection.peer == "memory:here"


async def test_a_network_is_for_links_in_memory(credentials):
    with pytest.raises(ConfigurationError, match="network: is for memory:NAME"):
        await connect("quic://localhost", network=MemoryNetwork())
    with pytest.raises(ConfigurationError, match="network: is for memory:NAME"):
        await listen("127.0.0.1:0", tls=credentials.tls, network=MemoryNetwork())


# --- ports ---


class Recorder:
    """A `PacketReceiver` that keeps what it hears."""

    def __init__(self, port) -> None:
        self.got: list[tuple[float, bytes]] = []
        self.batches: list[int] = []
        self.refusals = 0
        self.too_large: list[int] = []
        port.attach(self, ServerStats())

    def datagrams_received(self, datagrams) -> None:
        self.batches.append(len(datagrams))
        self.got += [(now(), datagram) for datagram, _ in datagrams]

    def refused(self) -> None:
        self.refusals += 1

    def datagram_too_large(self, datagram_bytes, address) -> None:
        self.too_large.append(datagram_bytes)

    def writable(self) -> None:
        raise AssertionError("it always is")


@virtual_time
async def test_datagrams_arrive_in_order_and_in_bounded_batches():
    network = MemoryNetwork(delay_s=0.1, jitter_s=0.05)
    a, b = network.bind("a"), network.bind("b")
    Recorder(a)
    heard = Recorder(b)
    for number in range(10):
        a.send([(b"%04d" % (100 * number + one), b.address) for one in range(100)])
    await asyncio.sleep(0.3)
    assert [int(datagram) for _, datagram in heard.got] == list(range(1000))
    assert max(heard.batches) <= 256


@virtual_time
async def test_a_full_queue_drops(monkeypatch):
    monkeypatch.setattr(memory_module, "PORT_QUEUE_BYTES_MAX", 10_000)
    network = MemoryNetwork(delay_s=0.1)
    a, b = network.bind("a"), network.bind("b")
    Recorder(a)
    heard = Recorder(b)
    for _ in range(2):
        a.send([(bytes(1000), b.address)] * 20)
        await asyncio.sleep(0.2)
        assert len(heard.got) == 7
        heard.got.clear()
    assert network.fates[Fate.OVERFLOWED] == 26


@virtual_time
async def test_too_large_is_told_unless_the_network_is_silent():
    network = MemoryNetwork(mtu_bytes=1500)
    a, b = network.bind("a"), network.bind("b")
    told = Recorder(a)
    heard = Recorder(b)
    a.send([(bytes(1501), b.address), (bytes(1500), b.address)])
    network.silent = True
    a.send([(bytes(1501), b.address)])
    await asyncio.sleep(0.1)
    assert told.too_large == [1501]
    assert [len(datagram) for _, datagram in heard.got] == [1500]
    assert network.fates[Fate.TOO_LARGE] == 2


@virtual_time
async def test_sending_to_nobody_is_refused():
    network = MemoryNetwork()
    a, b = network.bind("a"), network.bind("b")
    told = Recorder(a)
    b.close()
    a.send([(b"?", b.address)])
    await asyncio.sleep(0.1)
    assert told.refusals == 1
    a.send([(b"?", b.address)])
    a.close()
    a.close()
    await asyncio.sleep(0.1)
    assert told.refusals == 1


@virtual_time
async def test_a_fault_that_is_switched_on_does_not_shift_the_others():
    def arrivals(loss: float) -> dict[bytes, float]:
        network = MemoryNetwork(9, delay_s=0.1, jitter_s=0.05, reordering=0.1, loss=loss, on_transit=trace.append)
        a, b = network.bind("a"), network.bind("b")
        Recorder(a)
        Recorder(b)
        trace.clear()
        for number in range(200):
            a.send([(b"%d" % number, b.address)])
        held = {number: one.arrives_at for number, one in enumerate(trace) if one.fate is Fate.REORDERED}
        for port in (a, b):
            port.close()
        return held

    trace: list[Transit] = []
    without, with_loss = arrivals(0.0), arrivals(0.3)
    assert 0 < len(with_loss) < len(without)
    assert with_loss.items() <= without.items()


@pytest.mark.parametrize(
    ("setting", "value"),
    [("loss", 5), ("loss", -0.1), ("duplication", 2), ("reordering", 1.1), ("delay_s", -1), ("jitter_s", float("nan"))],
)
def test_faults_that_make_no_sense_are_named(setting, value):
    with pytest.raises(ConfigurationError, match=f"^{setting}: .*{value}"):
        MemoryNetwork(**{setting: value})


def test_a_network_that_carries_no_quic_is_refused():
    with pytest.raises(ConfigurationError, match=r"^mtu_bytes: .*1200.*10"):
        MemoryNetwork(mtu_bytes=10)

"""A stranger at a real socket: whatever he sends, living connections go on and nothing of his stays."""

import contextlib
import random
import time

from structlog.testing import capture_logs

from fuzz.budget import FUZZ_SECONDS
from fuzz.mutations import tampered
from links import Nat, UdpSocket, connected, pair, ping_pong, serving, until, url_of

#: Datagrams between two looks at the living connection.
BATCH = 25


class Tap(Nat):
    """A relay that keeps the last datagrams of both ways."""

    def __init__(self, server):
        super().__init__(server)
        self.up, self.down = [], []
        to_server, to_client = self.to_server, self.to_client
        self.to_server = lambda data: self._keep(self.up, data, to_server)
        self.to_client = lambda data: self._keep(self.down, data, to_client)

    @staticmethod
    def _keep(kept, data, onwards):
        kept.append(data)
        del kept[:-200]
        onwards(data)


async def test_a_strangers_datagrams_do_not_disturb_a_living_connection(credentials):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201
    rng = random.Random(seed)
    ends_at = time.monotonic() + FUZZ_SECONDS
    with capture_logs() as logs:
        async with serving(credentials) as server:
            with contextlib.closing(Tap(server.address)) as tap, UdpSocket(server.address) as stranger:
                link = await connected(server, url_of(server), credentials)
                tapped = await connected(server, f"quic://127.0.0.1:{tap.port}", credentials)
                async with link.here, tapped.here:
                    streams, others = await pair(link), await pair(tapped)
                    await ping_pong(*others, times=5)
                    before = server.stats.connections
                    client_port = link.here._driver.address[1]
                    while time.monotonic() < ends_at or server.stats.udp_datagrams_unknown < 200:
                        for _ in range(BATCH):
                            seen = tap.up + tap.down
                            datagram = tampered(rng, rng.choice(seen), seen)
                            stranger.send(datagram)
                            # To a client too, whose socket takes what comes from its server only; and through the
                            # relay, which is the server's address for the other.
                            stranger.send(datagram, ("127.0.0.1", client_port))
                            tap._inside.sendto(tampered(rng, datagram, seen), tap._client)
                        await ping_pong(*streams)
                        await ping_pong(*others, times=2)
                    assert not link.here.is_closed
                    assert not tapped.here.is_closed
                # Handshakes that he began by repeating a first flight are given up in time.
                await until(lambda: server.stats.connections <= before + server.stats.handshakes)
    assert [entry["event"] for entry in logs if entry["event"] == "engine_failed"] == []
